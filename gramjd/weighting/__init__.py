"""Weightings: from the Gramian of the objectives' gradients to one weight per objective.

Each is a pure function of a Gramian, ``upgrad(gramian)``, and an object with the name and arguments
of TorchJD's, ``UPGradWeighting()(gramian)``. A Gramian has shape ``[m, m]``, the generalized
``[*shape, *reversed(shape)]``, or one of these behind a batch dimension. Everything runs on its
device, in float64, and gives weights of its dtype. Where an optimization problem is solved,
``certificate=True`` also returns the evidence that it was; a wrong answer raises an error.
``sum`` is not among the names that ``import *`` imports: it would hide the builtin.
"""

from gramjd.weighting._base import StatefulWeighting, Weighting
from gramjd.weighting._certificate import Certificate, NotConvergedError
from gramjd.weighting.aligned_mtl import AlignedMTLWeighting, aligned_mtl
from gramjd.weighting.cagrad import CAGradWeighting, cagrad
from gramjd.weighting.config import ConFIGWeighting, config
from gramjd.weighting.cr_mogm import CRMOGMWeighting, cr_mogm
from gramjd.weighting.dualproj import DualProjWeighting, dualproj
from gramjd.weighting.excess_mtl import ExcessMTLWeighting
from gramjd.weighting.fairgrad import FairGradWeighting, fairgrad
from gramjd.weighting.fixed import (
    ConstantWeighting,
    MeanWeighting,
    RandomWeighting,
    SumWeighting,
    constant,
    mean,
    random,
)
from gramjd.weighting.fixed import sum as sum
from gramjd.weighting.gradvac import GradVacWeighting, gradvac
from gramjd.weighting.imtl_g import IMTLGWeighting, imtl_g
from gramjd.weighting.krum import KrumWeighting, krum
from gramjd.weighting.mgda import MGDAWeighting, mgda
from gramjd.weighting.modo import MoDoWeighting, modo
from gramjd.weighting.nash_mtl import NashMTLWeighting, nash_mtl
from gramjd.weighting.pcd import PCDWeighting, pcd
from gramjd.weighting.pcgrad import PCGradWeighting, pcgrad
from gramjd.weighting.sdmgrad import SDMGradWeighting, sdmgrad
from gramjd.weighting.upgrad import UPGradWeighting, upgrad

__all__ = [
    "AlignedMTLWeighting",
    "CAGradWeighting",
    "CRMOGMWeighting",
    "Certificate",
    "ConFIGWeighting",
    "ConstantWeighting",
    "DualProjWeighting",
    "ExcessMTLWeighting",
    "FairGradWeighting",
    "GradVacWeighting",
    "IMTLGWeighting",
    "KrumWeighting",
    "MGDAWeighting",
    "MeanWeighting",
    "MoDoWeighting",
    "NashMTLWeighting",
    "NotConvergedError",
    "PCDWeighting",
    "PCGradWeighting",
    "RandomWeighting",
    "SDMGradWeighting",
    "StatefulWeighting",
    "SumWeighting",
    "UPGradWeighting",
    "Weighting",
    "aligned_mtl",
    "cagrad",
    "config",
    "constant",
    "cr_mogm",
    "dualproj",
    "fairgrad",
    "gradvac",
    "imtl_g",
    "krum",
    "mean",
    "mgda",
    "modo",
    "nash_mtl",
    "pcd",
    "pcgrad",
    "random",
    "sdmgrad",
    "upgrad",
]
