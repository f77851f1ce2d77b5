"""Sums of saved weights: what merge, window and posthoc share."""
