"""Which ops receive a parameter, and the blocks that follow from each such use."""
