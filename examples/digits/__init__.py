"""The parts of the Lightning examples that have nothing to do with averaging."""
