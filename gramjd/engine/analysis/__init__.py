"""Reads the graph of an output: its structure, layouts and signatures."""
