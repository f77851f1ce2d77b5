"""What one rank holds of a model, whatever engine cut it."""
