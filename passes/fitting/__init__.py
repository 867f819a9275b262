"""What the approximate passes stand on: statistics of real inputs, closed-form fits, scores, stand-ins for blocks."""
