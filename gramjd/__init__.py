"""Gramians of Jacobians without the Jacobians: Jacobian descent for PyTorch."""

from gramjd import diagnostics, weighting
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
from gramjd.functional import functional_loss
from gramjd.gradients_dataset import gradients_dataset
from gramjd.jacobian import Jacobian
from gramjd.less import less
from gramjd.ntk import ntk
from gramjd.ntk_dataset import ntk_dataset
from gramjd.rules import register_rule
from gramjd.similarity import TopK, dataset_similarity, similarity, tracin
from gramjd.store import GradientStore
from gramjd.transforms import gramian, gramian_and_value, jacobian, jacobian_and_value

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
    "RankFailedError",
    "RanksDisagreeError",
    "SlowPathWarning",
    "TopK",
    "dataset_similarity",
    "diagnostics",
    "explain",
    "functional_loss",
    "gradients_dataset",
    "gramian",
    "gramian_and_value",
    "jacobian",
    "jacobian_and_value",
    "less",
    "ntk",
    "ntk_dataset",
    "register_rule",
    "similarity",
    "tracin",
    "weighting",
]
__version__ = "0.1.0"
