"""Turns a recorded graph into proven blocks."""
