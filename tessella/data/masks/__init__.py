"""Images of which every pixel has a class."""
