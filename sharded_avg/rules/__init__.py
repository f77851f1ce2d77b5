"""How and when an average takes weights in: a family, one file each."""
