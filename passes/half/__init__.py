"""What to-half stands on."""
