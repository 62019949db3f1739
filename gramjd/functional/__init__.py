"""Functions to functions: how a pure function of one sample is captured under ``vmap``."""
