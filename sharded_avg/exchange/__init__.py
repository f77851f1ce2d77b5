"""Values on the move: swapped in and out, gathered into full tensors, handed over for good."""
