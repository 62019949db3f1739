"""Records the forward pass that the user runs."""
