"""Finds the ops that receive a parameter, and makes the blocks of each such use."""
