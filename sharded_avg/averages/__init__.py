"""What is kept: the averaged shards, and how far they have come."""
