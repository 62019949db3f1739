"""Benchmarks: what a step of Jacobian descent costs, beside every peer; see ``__main__`` for how to run them."""
