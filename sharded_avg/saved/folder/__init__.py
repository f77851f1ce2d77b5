"""A saved folder: what ranks claim to hold of it, where it lies, and how it comes to be whole."""
