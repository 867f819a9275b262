"""The model being rewritten: files, weights, the editing view, linears and FFN blocks."""
