"""Gramians of Jacobians without the Jacobians: Jacobian descent for PyTorch."""

from gramjd import diagnostics, gramians, weighting
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
from gramjd.functional import functional_loss
from gramjd.gradients_dataset import gradients_dataset
from gramjd.influence import influence
from gramjd.jacobian import Jacobian
from gramjd.jacobian.projection import Projection
from gramjd.less import less
from gramjd.ntk import ntk
from gramjd.ntk_dataset import ntk_dataset
from gramjd.rules import register_rule
from gramjd.similarity import TopK, dataset_similarity, similarity, tracin
from gramjd.sketched import SketchedGramian
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
    "Projection",
    "RankFailedError",
    "RanksDisagreeError",
    "SketchedGramian",
    "SlowPathWarning",
    "TopK",
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
