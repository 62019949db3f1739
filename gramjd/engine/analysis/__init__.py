"""What an engine reads from the graph of an output: structure, layouts, signatures."""
