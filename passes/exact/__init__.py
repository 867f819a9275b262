"""What the exact passes stand on: canonical forms, biases, products, proofs about neurons."""
