"""Tensors as they lie on a disk, read and written a piece at a time; nothing in them runs."""
