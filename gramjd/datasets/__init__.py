"""Gradients of whole datasets: sketched, stored, compared."""
