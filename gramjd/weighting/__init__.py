"""Weightings: from the Gramian of the objectives' gradients to one weight per objective."""

from gramjd.weighting._certificate import Certificate, NotConvergedError
from gramjd.weighting.dualproj import DualProjWeighting, dualproj
from gramjd.weighting.upgrad import UPGradWeighting, upgrad

__all__ = [
    "Certificate",
    "DualProjWeighting",
    "NotConvergedError",
    "UPGradWeighting",
    "dualproj",
    "upgrad",
]
