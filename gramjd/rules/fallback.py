"""The block of an op without a rule: ``Dense``, by ``vmap(vjp)`` over samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd import pytree
from gramjd.blocks import Dense
from gramjd.decompositions.registry import decomposition_of
from gramjd.rules.registry import Call, op_name

# Ops of which a sample's result, and its share of each gradient, follow from that sample alone, whatever
# the data are. For others (index_add, scatter, batch normalisation) that holds for some batches only.
_SEPARABLE = {
    torch: """
        addcdiv addcmul atan2 baddbmm bmm cat cdist clamp concat concatenate copysign cosine_similarity
        einsum fmax fmin hstack hypot inner ldexp lerp logaddexp logaddexp2 matmul maximum minimum pow prelu
        stack tensordot true_divide vstack where xlogy
    """,
    torch.linalg: "solve vecdot",
    F: """
        bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cosine_similarity
        group_norm instance_norm layer_norm linear pairwise_distance prelu scaled_dot_product_attention
    """,
    Tensor: """
        __matmul__ __pow__ __rmatmul__ __rpow__ addcdiv addcmul atan2 bmm clamp copysign fmax fmin hypot ldexp
        lerp logaddexp logaddexp2 matmul maximum minimum pow where xlogy
    """,
}
SEPARABLE = frozenset(getattr(home, name) for home, names in _SEPARABLE.items() for name in names.split())


def dense_rows(call: Call, index: int, canonical: Sequence[Any], cs: Sequence[Tensor | None]) -> Dense:
    """Rows of one argument of an op, which is a pure function of it for each sample.

    Args:
        call: the op; its arguments' values are not read, only their structure.
        index: which leaf of the arguments' tree the rows are of.
        canonical: leaves of the arguments: ``[B, ...]`` for tensors, the leaf ``index`` without B.
        cs: cotangents ``[K, B, ...]`` of the tensors that the op returns (``None``: not used).

    Raises:
        ValueError: for one sample, the op returns tensors of other shapes.
    """
    # vmap may have no batching rule for the op, and it may write into buffers
    call = call.with_op(_PURE.get(call.op) or decomposition_of(call.op) or call.op)
    _, spec = pytree.flatten(call.values)
    batched = [i for i, x in enumerate(canonical) if isinstance(x, Tensor) and i != index]
    used = [i for i, c in enumerate(cs) if c is not None]

    cot = [c for c in cs if c is not None]

    def vjp_fn(args: list[Tensor]) -> Callable[..., Any]:
        leaves = list(canonical)
        for i, value in zip(batched, args, strict=True):
            leaves[i] = value

        def op(slot: Tensor) -> list[Tensor]:
            leaves[index] = slot
            outs = tensors_of(call(pytree.unflatten(spec, leaves)))
            found = [outs[i] for i in used]
            for out, c in zip(found, cot, strict=True):
                if out.shape != c.shape[2:]:
                    what = f"it gives {list(out.shape)}, not {list(c.shape[2:])}"
                    raise ValueError(f"{op_name(call.op)} takes all samples at once: for one, {what}")
            return found

        return torch.func.vjp(op, canonical[index])[1]

    # One level of vmap at a time: under two, some of torch's own rules are wrong (cdist, prelu).
    if len(cot[0]) > 1 and cot[0].shape[1] == 1:
        pull = vjp_fn([canonical[i][0] for i in batched])
        return Dense(torch.vmap(pull)([c[:, 0] for c in cot])[0].unsqueeze(1))
    rows = torch.vmap(lambda c, args: vjp_fn(args)(c)[0])
    args = [canonical[i] for i in batched]
    return Dense(torch.stack([rows([c[k] for c in cot], args) for k in range(len(cot[0]))]))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation that leaves the running statistics alone."""
    if training:
        running_mean = running_var = None
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


_PURE = {F.batch_norm: _batch_norm}


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors that an op returns."""
    if isinstance(output, Tensor):
        return [output]
    return [leaf for leaf in pytree.leaves(output) if isinstance(leaf, Tensor)]
