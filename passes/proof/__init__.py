"""What is shown about a rewritten model: that it is valid, how far it moved and where, what each pass contributed."""
