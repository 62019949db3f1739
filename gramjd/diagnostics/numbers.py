"""Numbers of a Gramian: conflicts, norms, spectrum, descent; plain functions of tensors.

A *source* is a Gramian or a :class:`~gramjd.Jacobian` of one output. A Gramian is ``[m, m]`` or generalized,
``[*shape, *reversed(shape)]``; its objectives are numbered as in the flattened output. Results are float64
tensors on the CPU. Other sources raise ``TypeError``. A tensor that cannot be a Gramian (by its shape, NaN or
asymmetry) raises ``ValueError``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramjd import pytree
from gramjd.jacobian import Jacobian
from gramjd.pytree import PyTree
from gramjd.weighting._gramian import prepare

Source = Tensor | Jacobian
Labels = Tensor | Sequence[Any]  # one for each objective


def matrix(source: Source) -> Tensor:
    """The Gramian as a matrix, ``[m, m]``."""
    if isinstance(source, Jacobian):
        source = _only(source.gramian(), source)
    if not isinstance(source, Tensor):
        raise TypeError(f"Diagnostics are of a Gramian or a Jacobian, not of a {type(source).__name__}.")
    if source.ndim % 2:
        raise ValueError(f"Diagnostics are of one Gramian, with no batch; got shape {list(source.shape)}.")
    return prepare(source.detach())[0].cpu()


def norms(source: Source) -> Tensor:
    """Norm of each objective's gradient, ``[m]``; of a Jacobian without computing its Gramian."""
    if isinstance(source, Jacobian):
        return _only(source.norms(), source).detach().flatten().to("cpu", torch.float64)
    return matrix(source).diagonal().clamp(min=0).sqrt()


def cosines(source: Source) -> Tensor:
    """Cosine similarities of the gradients, ``[m, m]``; zero where one of them is zero."""
    gramian = matrix(source)
    lengths = norms(gramian)
    return _divided(gramian, lengths[:, None] * lengths).clamp(-1, 1)


def conflicts(source: Source, threshold: float = 0.0) -> Tensor:
    """The share of the other objectives that conflict with each objective, ``[m]``.

    Two gradients conflict where their cosine similarity is below ``-threshold`` (Yu et al., arXiv
    2001.06782, Definition 1).

    Raises:
        ValueError: there is only one objective.
    """
    similar = cosines(source)
    m = len(similar)
    if m < 2:
        raise ValueError("A single objective has no other to conflict with.")
    similar.fill_diagonal_(1)
    return (similar < -threshold).double().sum(1) / (m - 1)


def conflict_rate(source: Source, threshold: float = 0.0) -> float:
    """The share of the pairs of objectives whose gradients conflict, as in :func:`conflicts`."""
    return float(conflicts(source, threshold).mean())


def outliers(source: Source, whisker: float = 1.5) -> Tensor:
    """The objectives whose gradients are far longer than most, the longest first.

    An objective counts if its norm is above the upper fence of a box plot: the third quartile plus
    ``whisker`` interquartile ranges (Tukey 1977). Samples with a wrong label are often among them. So are
    samples that are hard to learn, even if all labels are right.

    Args:
        source: a Gramian, or a Jacobian of one output.
        whisker: a larger number returns fewer objectives.

    Returns:
        Their indices, int64.
    """
    found = norms(source)
    low, high = torch.quantile(found, torch.tensor([0.25, 0.75], dtype=found.dtype))
    order = found.argsort(descending=True)
    return order[found[order] > high + whisker * (high - low)]


def spectrum(source: Source) -> Tensor:
    """Eigenvalues of the Gramian, ``[m]``, the largest first; those that are negative by rounding, zero."""
    return torch.linalg.eigvalsh(matrix(source)).flip(0).clamp(min=0)


def effective_rank(source: Source) -> float:
    """The number of directions that the gradients span, counted by how much of them lies in each.

    ``exp`` of the entropy of the eigenvalues' shares (Roy and Vetterli 2007): between 1 and m, and 0
    where every gradient is zero.
    """
    values = spectrum(source)
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def descent(source: Source, weights: Tensor) -> Tensor:
    """``G w`` scaled to cosines, ``[m]``: of each gradient with the direction ``Jᵀ w``.

    A step along the negative direction lowers, to first order, the objectives whose entry is positive
    and raises those whose entry is negative. Zero where the gradient or the direction is.

    Raises:
        ValueError: the weights are not shaped like the objectives.
    """
    gramian = matrix(source)
    w = _flat(weights, len(gramian))
    products = gramian @ w
    length = (w @ products).clamp(min=0).sqrt()
    return _divided(products, norms(gramian) * length).clamp(-1, 1)


def angle(source: Source, weights: Tensor, reference: Tensor | None = None) -> float:
    """The angle between the direction ``Jᵀ w`` and another one, in degrees.

    Args:
        source: as everywhere here.
        weights: shaped like the objectives.
        reference: weights of the other direction; by default that of the mean gradient.

    Returns:
        0 for the same direction, 180 for the opposite one, NaN where one of them is zero.

    Raises:
        ValueError: weights are not shaped like the objectives.
    """
    gramian = matrix(source)
    w = _flat(weights, len(gramian))
    other = torch.ones_like(w) if reference is None else _flat(reference, len(gramian))
    both = torch.stack([w, other])
    (ww, wo), (_, oo) = (both @ gramian @ both.mT).tolist()
    if ww <= 0 or oo <= 0:
        return float("nan")
    return float(torch.tensor(wo / (ww * oo) ** 0.5).clamp(-1, 1).acos().rad2deg())


def merged(source: Source, labels: Labels) -> tuple[Tensor, list[Any]]:
    """The Gramian of the mean gradients of each label (a class, a task), and the labels in order.

    Raises:
        ValueError: there is not one label for each objective.
    """
    gramian = matrix(source)
    names, numbers = numbered(labels, len(gramian))
    members = torch.nn.functional.one_hot(numbers, len(names)).double()
    mean = members / members.sum(0)
    return mean.mT @ gramian @ mean, names


def layers(
    jacobian: Jacobian, labels: Labels | None = None, per: Any = None
) -> tuple[Tensor, list[str], list[tuple[Any, Any]]]:
    """The layers of a model in which gradients agree, and those in which they conflict.

    Args:
        jacobian: of one output.
        labels: of each objective; the mean gradients of the labels are then compared. Without labels,
            every pair of objectives.
        per: groups of parameters, as for :meth:`gramjd.Jacobian.gramian`; or a model, for its modules in
            order. By default, parameters are grouped by module, as their names show. A model and a mapping
            keep their order; other groups are sorted by name.

    Returns:
        Cosine similarities ``[layers, pairs]``, NaN where a gradient is zero in the layer; the names of
        the layers; and the pairs of labels, or of objectives' numbers.

    Raises:
        TypeError: it is not a Jacobian.
        ValueError: there is only one objective or label, or not one label for each objective.
    """
    if not isinstance(jacobian, Jacobian):
        raise TypeError(
            f"layers() is of a Jacobian, not of a {type(jacobian).__name__}: a Gramian is their sum."
        )
    rows: dict[str, Tensor] = {}
    names: list[Any] = []
    if isinstance(per, nn.Module):
        per = _modules(per, jacobian.names)
    parts = jacobian.gramian(per=_module if per is None else per)
    for layer in parts if isinstance(per, Mapping) else sorted(parts, key=_natural):
        gramian = matrix(_only(parts[layer], jacobian))
        names = list(range(len(gramian)))
        if labels is not None:
            gramian, names = merged(gramian, labels)
        if len(names) < 2:
            raise ValueError("There is only one objective or label: no pair to compare.")
        i, j = torch.triu_indices(len(names), len(names), 1)
        lengths = norms(gramian)
        known = (lengths[i] > 0) & (lengths[j] > 0)
        rows[layer] = cosines(gramian)[i, j].where(known, torch.nan)
    pairs = [(names[a], names[b]) for a, b in zip(i.tolist(), j.tolist(), strict=True)]
    return torch.stack(list(rows.values())), list(rows), pairs


def ordering(source: Source, labels: Labels | None = None) -> Tensor:
    """The objectives' numbers in an order that puts similar gradients beside each other.

    Args:
        source: as everywhere here.
        labels: sort by these. Without labels, the order is that of the leaves of a hierarchical
            clustering (average linkage of ``1 - cosine``), which needs scipy.

    Returns:
        A permutation of ``range(m)``, int64.

    Raises:
        ImportError: scipy is needed and missing.
        ValueError: there is not one label for each objective.
    """
    similar = cosines(source)
    if labels is not None:
        return numbered(labels, len(similar))[1].argsort(stable=True)
    if len(similar) < 3:
        return torch.arange(len(similar))
    try:
        from scipy.cluster.hierarchy import leaves_list, linkage
        from scipy.spatial.distance import squareform
    except ImportError as error:
        raise ImportError("Clustering needs scipy: pip install 'gramjd[plot]', or pass labels.") from error
    distances = squareform((1 - similar).fill_diagonal_(0).numpy(), checks=False)
    tree = linkage(distances, "average", optimal_ordering=True)
    return torch.from_numpy(leaves_list(tree)).long()


def numbered(labels: Labels, m: int) -> tuple[list[Any], Tensor]:
    """The distinct labels in order, and of each objective the number of its label, ``[m]``."""
    given = labels.flatten().tolist() if isinstance(labels, Tensor) else list(labels)
    if len(given) != m:
        raise ValueError(f"There must be one label for each of the {m} objectives; got {len(given)}.")
    names = sorted(set(given))
    places = {name: n for n, name in enumerate(names)}
    return names, torch.tensor([places[name] for name in given])


def _only(found: PyTree, jacobian: Jacobian) -> Tensor:
    """The result for the only output of a Jacobian."""
    leaves = pytree.leaves(found)
    if len(leaves) != 1:
        raise ValueError(f"Diagnostics are of one output; {jacobian!r} has several.")
    tensor: Tensor = leaves[0]
    return tensor


def _divided(values: Tensor, by: Tensor) -> Tensor:
    """Zero where it is divided by zero."""
    return torch.where(by > 0, values / by.where(by > 0, 1), 0)


def _flat(weights: Tensor, m: int) -> Tensor:
    if weights.numel() != m:
        raise ValueError(
            f"There must be one weight for each of the {m} objectives; got {list(weights.shape)}."
        )
    return weights.detach().flatten().to("cpu", torch.float64)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``layer.2`` before ``layer.10``."""
    return [(int(piece) if piece.isdecimal() else 0, piece) for piece in re.split(r"(\d+)", name)]


def _module(parameter: str) -> str:
    """The name of the module that a parameter belongs to."""
    return parameter.rpartition(".")[0] or parameter


def _modules(model: nn.Module, parameters: Sequence[str]) -> dict[str, list[str]]:
    """The parameters of each module, by name, in the order of the model."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        if name in parameters:
            found.setdefault(_module(name), []).append(name)
    return found
