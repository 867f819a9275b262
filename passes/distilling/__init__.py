"""Moving the weights of a rewritten model together, by what the original gives."""
