"""The parts of the text example that have nothing to do with averaging."""
