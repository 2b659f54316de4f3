"""The explorer, a figure that the reader can touch."""
