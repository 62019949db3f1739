"""Weightings: from the Gramian of the objectives' gradients to one weight per objective."""

from gramjd.weighting.upgrad import UPGradWeighting, upgrad

__all__ = ["UPGradWeighting", "upgrad"]
