"""Nested containers of tensors. The only module that imports optree.

Besides Python's containers, those that are registered with optree globally or in the namespace
``"gramjd"`` are seen through: ``optree.register_pytree_node(Cls, ..., namespace="gramjd")``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
from torch import Tensor

_OPTIONS: dict[str, Any] = {"none_is_leaf": True, "namespace": "gramjd"}
PLACEHOLDER = object()  # in the place of a tensor in the structure of a tree
PyTree = Any
PyTreeSpec = optree.PyTreeSpec


def flatten(tree: PyTree) -> tuple[list[Any], PyTreeSpec]:
    """Leaves of ``tree`` and its structure; ``None`` counts as a leaf, so that no position moves."""
    return optree.tree_flatten(tree, **_OPTIONS)


LEAF = flatten(None)[1]  # the structure of a single leaf


def unflatten(spec: PyTreeSpec, leaves: list[Any]) -> PyTree:
    """The tree of structure ``spec`` with these ``leaves``."""
    return optree.tree_unflatten(spec, leaves)


def leaves(tree: PyTree) -> list[Any]:
    """Leaves of ``tree``, from left to right."""
    return optree.tree_leaves(tree, **_OPTIONS)


def map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``tree`` with ``fn`` applied to its leaves (and to those of ``rest`` beside them)."""
    return optree.tree_map(fn, tree, *rest, **_OPTIONS)


def prefix(tree: PyTree, full: PyTree) -> list[Any]:
    """The leaf of ``tree``, a prefix of ``full``, that belongs to each leaf of ``full``.

    Raises:
        ValueError: it is not.
    """
    return leaves(map(lambda leaf, part: [leaf] * len(leaves(part)), tree, full))


def paths(tree: PyTree) -> list[str]:
    """A readable name for every leaf: the keys that lead to it, joined by dots."""
    return [".".join(str(key) for key in path) for path in optree.tree_paths(tree, **_OPTIONS)]


def tensor_leaves(tree: PyTree, what: str) -> tuple[list[Tensor], PyTreeSpec]:
    """Leaves and structure of a tree that may hold tensors only; ``what`` names it in the error."""
    found, spec = flatten(tree)
    for number, leaf in enumerate(found):
        if not isinstance(leaf, Tensor):
            path = paths(tree)[number]
            where = f" at {path!r}" if path else ""
            raise TypeError(
                f"{what} must be a tensor or a PyTree of tensors, but{where} there is a "
                f"{type(leaf).__name__}. Return such values through has_aux=True, or register the "
                "container with optree.register_pytree_node(..., namespace='gramjd') if it holds tensors."
            )
    return found, spec
