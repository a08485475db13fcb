"""A backbone for other libraries: written in their formats, loaded back by them, compared, described."""
