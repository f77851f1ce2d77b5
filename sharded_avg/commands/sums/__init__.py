"""Sums of saved weights: what merge, window and posthoc share, and what a saved average is itself a sum of."""
