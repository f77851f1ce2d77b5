"""Averages of other tools, in and out, and whatever holds weights, opened."""
