"""Gramians of Jacobians without the Jacobians: Jacobian descent for PyTorch."""

import warnings

with warnings.catch_warnings():  # numpy is optional here, and torch warns where it is not installed
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch

from gramjd import aggregation, diagnostics, gramians, weighting
from gramjd.datasets.gradients import gradients_dataset
from gramjd.datasets.influence import influence
from gramjd.datasets.less import less
from gramjd.datasets.similarity import TopK, dataset_similarity, similarity, tracin
from gramjd.datasets.store import GradientStore
from gramjd.descent import backward, grad, grad_and_value, jac, mtl_backward, record
from gramjd.engine import Engine
from gramjd.errors import (
    CheckFailedError,
    GramjdError,
    NoGraphError,
    NotCoveredError,
    NotFiniteError,
    NotSeparableError,
    RankFailedError,
    RanksDisagreeError,
    SlowPathWarning,
)
from gramjd.explain import explain
from gramjd.explanation import Explanation
from gramjd.functional.module import functional_loss
from gramjd.functional.transforms import gramian, gramian_and_value, jacobian, jacobian_and_value
from gramjd.jacobian import Jacobian
from gramjd.jacobian.projection import Projection
from gramjd.ntk.dataset import ntk_dataset
from gramjd.ntk.kernel import ntk
from gramjd.rules import register_rule
from gramjd.sketched import SketchedGramian

del torch, warnings

__all__ = [
    "CheckFailedError",
    "Engine",
    "Explanation",
    "GradientStore",
    "GramjdError",
    "Jacobian",
    "NoGraphError",
    "NotCoveredError",
    "NotFiniteError",
    "NotSeparableError",
    "Projection",
    "RankFailedError",
    "RanksDisagreeError",
    "SketchedGramian",
    "SlowPathWarning",
    "TopK",
    "aggregation",
    "backward",
    "dataset_similarity",
    "diagnostics",
    "explain",
    "functional_loss",
    "grad",
    "grad_and_value",
    "gradients_dataset",
    "gramian",
    "gramian_and_value",
    "gramians",
    "influence",
    "jac",
    "jacobian",
    "jacobian_and_value",
    "less",
    "mtl_backward",
    "ntk",
    "ntk_dataset",
    "record",
    "register_rule",
    "similarity",
    "tracin",
    "weighting",
]
__version__ = "0.1.0"
