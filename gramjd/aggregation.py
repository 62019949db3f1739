"""Aggregators that need the entries of the Jacobian's rows, which no Gramian tells.

They take the rows of one parameter at a time and drop them before the next, so that never all of
``J`` is there. Every other aggregator is a weighting, and a product with ``J`` that needs no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.complexes import as_given, as_real
from gramjd.contraction import products
from gramjd.jacobian import Jacobian
from gramjd.jacobian.generic import In
from gramjd.weighting._options import count, source, vector
from gramjd.weighting._small import own_array


def parameter_rows(jacobian: Jacobian[Any]) -> Iterator[Tensor]:
    """The rows of one parameter after the other, each ``[rows, *shape]``; built when asked for.

    Rows are in the order of ``J.T @ w``: the entries of one output after those of another. Of a complex
    parameter they are real, ``[rows, *shape, 2]``.
    """
    outputs = jacobian.outputs
    for found in _unordered_rows(jacobian):
        shaped = outputs.unpack(found.unflatten(0, (outputs.objectives, outputs.samples)))
        several = len(outputs.each) > 1
        yield outputs.ravel(shaped) if several else pytree.leaves(shaped)[0].reshape(found.shape)


def graddrop(
    jacobian: Jacobian[Any, In],
    f: Callable[[Tensor], Tensor] | None = None,
    leak: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> In:
    """GradDrop: keeps, for each entry of the gradient, either its positive or its negative terms.

    Chen et al. (2020), "Just Pick a Sign", arXiv 2010.06808, Algorithm 1, lines 10 to 15. With the
    purity ``P_k = (1 + Σ_i J_ik / Σ_i |J_ik|) / 2`` and a uniform number ``U_k``, the ``J_ik > 0`` count
    where ``f(P_k) > U_k``, the ``J_ik < 0`` where ``f(P_k) < U_k``; each row lets ``leak_i`` through.

    Args:
        jacobian: of any outputs.
        f: from purities to thresholds, elementwise and increasing; the identity by default.
        leak: ``[rows]``, in ``[0, 1]``; zero by default.
        generator: source of the numbers; the global one of the parameters' device by default. On the CPU
            the same seed gives TorchJD's, for columns in the order of ``jacobian.parameters``.

    Returns:
        A PyTree like the parameters; complex ones count as pairs of real ones.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: ``leak`` is not one number in ``[0, 1]`` a row.
    """
    source("generator", generator)
    if leak is not None:
        vector("leak", leak)
        if leak.shape != (jacobian.shape[0],) or not bool(((leak >= 0) & (leak <= 1)).all()):
            raise ValueError(
                f"leak must have one number in [0, 1] for each of the {jacobian.shape[0]} rows; got {leak}."
            )

    def combine(rows: Tensor) -> Tensor:
        purity = 0.5 * (1 + rows.sum(0) / rows.abs().sum(0))  # NaN where all are zero: nothing is kept
        threshold = purity if f is None else f(purity)
        device = rows.device if generator is None else generator.device
        uniform = torch.rand(purity.shape, generator=generator, dtype=rows.dtype, device=device)
        uniform = uniform.to(rows.device)
        kept = ((threshold > uniform) & (rows > 0)) | ((threshold < uniform) & (rows < 0))
        if leak is None:
            return (rows * kept).sum(0)
        share = leak.to(rows).view(-1, *[1] * (rows.ndim - 1))
        return (rows * (share + (1 - share) * kept)).sum(0)

    return _of_each(jacobian, parameter_rows(jacobian), combine)


def trimmed_mean(jacobian: Jacobian[Any, In], trim_number: int) -> In:
    """The mean of each entry over the rows, without its ``trim_number`` largest and smallest values.

    Yin et al. (2018), "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", arXiv
    1803.01498, Definition 2.

    Args:
        jacobian: of any outputs, with more than ``2 * trim_number`` rows.
        trim_number: how many values to leave out at each end.

    Returns:
        A PyTree like the parameters; complex ones count as pairs of real ones.

    Raises:
        TypeError: ``trim_number`` is not an integer.
        ValueError: it is negative, or there are too few rows.
    """
    count(0)("trim_number", trim_number)
    rows = jacobian.shape[0]
    if rows <= 2 * trim_number:
        raise ValueError(f"trim_number = {trim_number} needs {2 * trim_number + 1} rows; there are {rows}.")
    middle = slice(trim_number, rows - trim_number)
    return _of_each(jacobian, _unordered_rows(jacobian), lambda found: _sorted(found)[middle].mean(0))


def _unordered_rows(jacobian: Jacobian[Any]) -> Iterator[Tensor]:
    """The rows of one parameter after the other in the order of the factors, in memory of their own."""
    for number, parameter in enumerate(jacobian.parameters):
        yield products.dense(jacobian.intact, number, jacobian.objectives, as_real(parameter)).flatten(0, 1)


def _sorted(rows: Tensor) -> Tensor:
    """Sort each column in ascending order, NaN last; the result may share memory with ``rows``."""
    array = own_array(rows)
    if array is None:
        return rows.sort(0).values
    array.sort(0)  # of columns side by side, several times faster than torch's
    return rows


def _of_each(jacobian: Jacobian[Any, In], each: Iterable[Tensor], combine: Callable[[Tensor], Tensor]) -> In:
    """Apply a function to the rows of each parameter, one parameter at a time, in its dtype."""
    found = [combine(rows) for rows in each]
    pairs = zip(found, jacobian.parameters, strict=True)
    combined = [as_given(each.to(as_real(p).dtype), p) for each, p in pairs]
    gradients: In = pytree.unflatten(jacobian.parameters_spec, combined)
    return gradients
