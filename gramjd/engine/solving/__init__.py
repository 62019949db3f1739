"""From a recorded graph to proven blocks."""
