"""What the integer passes stand on: codes, scales, forms, and what is chosen between them."""
