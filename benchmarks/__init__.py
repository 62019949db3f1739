"""What a step of Jacobian descent costs, beside every peer; ``__main__`` says how to run it."""
