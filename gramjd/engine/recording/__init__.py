"""What an engine records of the forward that the user runs."""
