"""Ops that no rule sees inside, written out as ops that have rules."""
