"""Images in: sources, index, view plans, order, loader."""
