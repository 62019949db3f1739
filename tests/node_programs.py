"""Programs in which each type of autograd node occurs, a layer in front; their data move between steps.

``PROGRAMS`` maps a type without its trailing digit to programs ``(m, h, k) -> out``: ``h [4, 4, 3]`` is a
layer's output, ``k`` the step, ``m(*shape)`` a parameter, and ``out`` gives a loss to each entry of its first
dimension. In those whose name begins with ``mixed`` samples are mixed in some step, which may be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from exactness import draw
from torch import Tensor

Program = Callable[[Any, Tensor, int], Tensor]
PROGRAMS: dict[str, dict[str, Program]] = {}
D = torch.float64
NO_CHOLESKY = isinstance(torch.cholesky, FunctionType)  # which raises, from torch 2.14 on


def occurs_in(types: str, **programs: Program) -> None:
    """Each of the types occurs in at least one of the programs."""
    for name in types.split():
        found = PROGRAMS.setdefault(name.removesuffix("!") if "!" in name else f"{name}Backward", {})
        for key, program in programs.items():
            found[f"{key} {len(found)}"] = program


def neighbours(h: Tensor) -> Tensor:
    return h.roll(1, 0)


def flat(h: Tensor) -> Tensor:
    return h.flatten(1)


def beside(h: Tensor, out: Tensor) -> Tensor:
    return torch.cat([flat(h), flat(out).abs()], 1)


DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda h: h,
    "unit": lambda h: 0.1 + 0.8 * h.sigmoid(),
    "positive": lambda h: 0.5 + h.sigmoid(),
    "above one": lambda h: 1.5 + h.sigmoid(),
}


def unary(types: str, f: Callable[[Tensor], Tensor], domain: str = "real") -> None:
    """Of each entry: data decide where it is flat; neighbours come in by a factor that is zero at first."""
    into = DOMAINS[domain]
    occurs_in(
        types,
        apart=lambda m, h, k: f(into(h + 2 * draw(4, 4, 3))),
        mixed=lambda m, h, k: beside(h, f(into(neighbours(h) * (0.7 * k)))),
        mixed_dead=lambda m, h, k: beside(h, f(into(neighbours(h) - 20 + 20 * (k % 2)))),
    )


def binary(types: str, f: Callable[[Tensor, Tensor], Tensor], domain: str = "real") -> None:
    into = DOMAINS[domain]
    occurs_in(
        types,
        data=lambda m, h, k: f(into(h), into(draw(4, 4, 3))),
        data_first=lambda m, h, k: f(into(draw(4, 1, 3)), into(h)),
        own=lambda m, h, k: f(into(h), into(h.sin() + k)),
        broadcast=lambda m, h, k: f(into(h), into(m(3))),
        mixed=lambda m, h, k: f(into(h), into(neighbours(h) * (0.7 * k))),
    )


def along(types: str, f: Callable[[Tensor, int], Tensor]) -> None:
    """Along a dimension of ``[4, 4, 3]``: within samples, in either dimension, and across them."""

    def back(out: Tensor, k: int) -> Tensor:
        return out.transpose(0, k % 2) if out.ndim == 3 else out

    occurs_in(
        types,
        apart=lambda m, h, k: f(h, 1),
        last=lambda m, h, k: f(h, -1),
        moved=lambda m, h, k: back(f(h, 1 - k % 2), k),
        mixed=lambda m, h, k: _four(f(h, k % 2)),
    )


def every_sum(h: Tensor) -> Tensor:
    one = h.sum() + h.mean() + h.prod() + h.max() + h.min() + h.median() + h.nanmedian()
    return one + h.norm() + h.std() + h.var() + h.norm(3)


def _four(out: Tensor) -> Tensor:
    """Of results ``[4, ...]`` as they are, else summed and spread over four losses."""
    return out if out.ndim and len(out) == 4 else out.sum() * torch.arange(1.0, 5).to(out)


def _in(types: str, f: Callable[[Any], Any], **more: Any) -> None:
    unary(types, lambda h: f(h.clone()), **more)


# Entry by entry.
for _types, _function in {
    "Abs": torch.abs,
    "Atan": torch.atan,
    "Asinh": torch.asinh,
    "Ceil": torch.ceil,
    "Clone": torch.clone,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Deg2Rad": torch.deg2rad,
    "Erf": torch.erf,
    "Erfc": torch.erfc,
    "Exp": torch.exp,
    "Exp2": torch.exp2,
    "Expm1": torch.expm1,
    "Floor": torch.floor,
    "Frac": torch.frac,
    "I0": torch.i0,
    "SpecialI0E": torch.special.i0e,
    "SpecialI1": torch.special.i1,
    "SpecialI1E": torch.special.i1e,
    "Neg": torch.neg,
    "Rad2Deg": torch.rad2deg,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinc": torch.sinc,
    "Sinh": torch.sinh,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Trunc": torch.trunc,
    "Relu": torch.relu,
    "Silu": F.silu,
    "Mish": F.mish,
    "Elu": F.elu,
    "Celu": F.celu,
    "Gelu": F.gelu,
    "Hardshrink": F.hardshrink,
    "Hardtanh": F.hardtanh,
    "Hardsigmoid": F.hardsigmoid,
    "Hardswish": F.hardswish,
    "LeakyRelu": F.leaky_relu,
    "LogSigmoid": F.logsigmoid,
    "Softplus": F.softplus,
    "Softshrink": F.softshrink,
    "Sigmoid": torch.sigmoid,
    "NanToNum": torch.nan_to_num,
    "Sgn": torch.sgn,
    "Alias": torch.ops.aten.alias,
    "Angle": lambda h: torch.complex(h, h.cos()).angle(),
    "ToCopy": lambda h: h.to(torch.float32).to(D),
    "ViewAsReal": lambda h: torch.view_as_real(torch.complex(h, h)),
    "ViewAsComplex": lambda h: torch.view_as_complex(torch.stack([h, h.sin()], -1)).abs(),
    "Complex": lambda h: torch.complex(h, h.sin()).abs(),
    "Polar": lambda h: torch.polar(h.exp(), h).real,
    "Conj": lambda h: (torch.complex(h, h).conj() * (1 + 2j)).real,
    "ConjPhysical": lambda h: torch.complex(h, h).conj_physical().real,
    "NegView Select": lambda h: torch.complex(h, h.sin()).conj().imag,
    "Threshold": lambda h: F.threshold(h, 0.3, 0.0),
    "Rsub": lambda h: torch.rsub(h, 2.0),
    "Clamp": lambda h: h.clamp(-1, 1),
    "ClampMin": lambda h: torch.clamp_min(h, 0.2),
    "ClampMax": lambda h: torch.clamp_max(h, 0.2),
    "Pow": lambda h: h**3,
    "Add": lambda h: h + 2,
    "Sub": lambda h: h - 2,
    "Mul": lambda h: h * 2.5,
    "Div": lambda h: h / 2.5,
    "Remainder": lambda h: h.remainder(1.3),
    "Fmod": lambda h: h.fmod(1.3),
    "Copysign": lambda h: h.copysign(-1.0),
    "Mul Dropout": lambda h: F.dropout(h, 0.5),
    "NativeDropout": lambda h: torch.native_dropout(h, 0.5, True)[0],
    "RreluWithNoise": lambda h: F.rrelu(h, training=True),
    "Expand": lambda h: h.unsqueeze(2).expand(4, 4, 5, 3),
    "Repeat": lambda h: h.repeat(1, 2, 1),
    "Clone Contiguous": lambda h: h.transpose(1, 2).contiguous(),
    "Polygamma": lambda h: torch.polygamma(1, h.exp() + 1),
    "Ldexp": lambda h: torch.ldexp(h, torch.tensor(2)),
    "Frexp": lambda h: torch.frexp(h)[0],
    "LiftFresh": lambda h: torch.ops.aten.lift_fresh(h),
    "UnsafeView": lambda h: torch.ops.aten._unsafe_view(h, [4, 12]),
    "ReshapeAlias": lambda h: torch.ops.aten._reshape_alias(h.contiguous(), [4, 12], [12, 1]),
    "Fill": lambda h: h.clone().fill_(2.0) + h,
    "Zero": lambda h: h.clone().zero_() + h,
    "SelectScatter": lambda h: h.select_scatter(h[:, 0].sin(), 1, 2),
    "SpecialEntr": lambda h: torch.special.entr(h.sigmoid()),
    "Mvlgamma": lambda h: torch.mvlgamma(h.exp() + 3, 2),
    "Lgamma": lambda h: torch.lgamma(h.exp()),
    "Digamma": lambda h: torch.digamma(h.exp()),
}.items():
    unary(_types.removesuffix(" Dropout").removesuffix(" Contiguous"), _function)

for _types, _function in {
    "SpecialErfcx": torch.special.erfcx,
    "Acos": torch.acos,
    "Asin": torch.asin,
    "Atanh": torch.atanh,
    "Erfinv": torch.erfinv,
    "Logit": torch.logit,
    "SpecialNdtri": torch.special.ndtri,
    "Bernoulli": lambda h: torch.bernoulli(h) + h,
}.items():
    unary(_types, _function, domain="unit")
for _types, _function in {
    "Log": torch.log,
    "Log10": torch.log10,
    "Log1P": torch.log1p,
    "Log2": torch.log2,
    "Reciprocal": torch.reciprocal,
    "Rsqrt": torch.rsqrt,
    "Sqrt": torch.sqrt,
    "Poisson": lambda h: torch.poisson(h) + h,
}.items():
    unary(_types, _function, domain="positive")
unary("Acosh", torch.acosh, domain="above one")
_in("Relu", torch.relu_)
_in("LeakyRelu", F.leaky_relu_)
_in("Sigmoid", torch.sigmoid_)
_in("Tanh", torch.tanh_)
_in("Threshold", lambda h: F.threshold_(h, 0.3, 0.0))
_in("Elu", F.elu_)
_in("Celu", torch.celu_)
_in("ConjPhysical", lambda h: torch.complex(h, h).conj_physical_().real)
_in("RreluWithNoise", lambda h: F.rrelu_(h, training=True))
unary("SpecialLogNdtr", torch.special.log_ndtr)
unary(
    "Exponential Normal Uniform Cauchy",
    lambda h: h + h.clone().exponential_() + h.clone().normal_() + h.clone().uniform_() + h.clone().cauchy_(),
)
unary(
    "Geometric LogNormal Random",
    lambda h: h + h.clone().geometric_(0.4) + h.clone().log_normal_() + h.clone().random_(3),
)
unary("Polygamma", lambda h: (h.exp() + 1).polygamma_(1))
unary("Pow", lambda h: 2.0**h)
unary("Fill", lambda h: h.clone().fill_(h.sum() * 0) + h)
unary("Round", lambda h: torch.round(h, decimals=1) + h)

for _types, _function in {
    "Add": torch.add,
    "Sub": torch.sub,
    "Rsub": lambda a, b: torch.rsub(a, b),
    "Mul": torch.mul,
    "Atan2": torch.atan2,
    "Copysign": torch.copysign,
    "Hypot": torch.hypot,
    "Logaddexp": torch.logaddexp,
    "Logaddexp2": torch.logaddexp2,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "Fmax": torch.fmax,
    "Fmin": torch.fmin,
    "Clamp": lambda a, b: a.clamp(b - 1, b + 1),
    "ClampMin": lambda a, b: torch.clamp_min(a, b),
    "ClampMax": lambda a, b: torch.clamp_max(a, b),
    "Where": lambda a, b: torch.where(a > 0.2, a, b),
    "Lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "MseLoss": lambda a, b: F.mse_loss(a, b, reduction="none"),
    "SmoothL1Loss": lambda a, b: F.smooth_l1_loss(a, b, reduction="none"),
    "Sub Scaled": lambda a, b: torch.sub(a, b, alpha=2),
    "HuberLoss": lambda a, b: F.huber_loss(a, b, reduction="none"),
    "Addcmul": lambda a, b: torch.addcmul(a, b, a.sin()),
    "Abs Loss": lambda a, b: F.l1_loss(a, b, reduction="none"),
    "LinalgCross": lambda a, b: torch.linalg.cross(a, b.expand(4, 4, 3)),
    "Ldexp": torch.ldexp,
    "Stack": lambda a, b: torch.stack(torch.broadcast_tensors(a, b), 1),
    "Cat": lambda a, b: torch.cat([a.expand_as(b + a), b.expand_as(b + a)], 1),
}.items():
    binary(_types.split()[0], _function)
binary("Lerp", lambda a, b: torch.lerp(a, a.sin(), b))
binary("Where", lambda a, b: torch.where(b > 0, a, b))
for _types, _function in {
    "Div": torch.div,
    "Addcdiv": lambda a, b: torch.addcdiv(a, a.sin(), b),
    "Pow": torch.pow,
    "Xlogy": torch.xlogy,
    "SpecialXlog1Py": torch.special.xlog1py,
    "Remainder": torch.remainder,
    "Fmod": torch.fmod,
}.items():
    binary(_types.split()[-1], _function, domain="positive")
binary("Div", lambda a, b: torch.div(a, b, rounding_mode=None), domain="positive")
unary("Div", lambda h: torch.div(h, 2.0, rounding_mode="floor") + h)
binary("Div", lambda a, b: torch.div(a, b, rounding_mode="trunc") + a + b, domain="positive")
unary(
    "Xlogy SpecialXlog1Py",
    lambda h: (
        torch.xlogy(h, 2.0)
        + torch.xlogy(2.0, h.exp())
        + torch.special.xlog1py(h, 2.0)
        + torch.special.xlog1py(2.0, h.exp())
    ),
)
unary(
    "BinaryCrossEntropy",
    lambda h: F.binary_cross_entropy(h, torch.rand_like(h).round(), reduction="none"),
    "unit",
)
binary(
    "BinaryCrossEntropyWithLogits",
    lambda a, b: F.binary_cross_entropy_with_logits(a.expand_as(a + b), b.expand_as(a + b), reduction="none"),
)
unary("SoftMarginLoss", lambda h: F.soft_margin_loss(h, torch.randn_like(h).sign(), reduction="none"))
unary("PreluKernel", lambda h: F.prelu(h, torch.tensor(0.3).double()))
occurs_in("PreluKernel", apart=lambda m, h, k: F.prelu(h, m(1)))

# Along a dimension.
for _types, _along in {
    "Sum": lambda h, d: h.sum(d),
    "Mean": lambda h, d: h.mean(d),
    "Nansum": lambda h, d: h.nansum(d),
    "Prod": lambda h, d: h.prod(d),
    "Amax": lambda h, d: h.amax(d),
    "Amin": lambda h, d: h.amin(d),
    "Aminmax": lambda h, d: h.aminmax(dim=d)[1],
    "Max": lambda h, d: h.max(d)[0],
    "Min": lambda h, d: h.min(d)[0],
    "Median": lambda h, d: h.median(d)[0],
    "Nanmedian": lambda h, d: h.nanmedian(d)[0],
    "Mode": lambda h, d: h.mode(d)[0],
    "Kthvalue": lambda h, d: h.kthvalue(2, d)[0],
    "Logsumexp": lambda h, d: h.logsumexp(d),
    "Std": lambda h, d: h.std(d),
    "Var": lambda h, d: h.var(d),
    "StdMean": lambda h, d: torch.std_mean(h, d)[0],
    "VarMean": lambda h, d: torch.var_mean(h, d)[0],
    "LinalgVectorNorm": lambda h, d: torch.linalg.vector_norm(h, 3, d),
    "Softmax": lambda h, d: h.softmax(d),
    "LogSoftmax": lambda h, d: h.log_softmax(d),
    "Cumsum": lambda h, d: h.cumsum(d),
    "Cumprod": lambda h, d: h.cumprod(d),
    "Cummax": lambda h, d: h.cummax(d)[0],
    "Cummin": lambda h, d: h.cummin(d)[0],
    "Logcumsumexp": lambda h, d: h.logcumsumexp(d),
    "Sort": lambda h, d: h.sort(d)[0],
    "Topk": lambda h, d: h.topk(2, d)[0].sum(d),
    "Flip": lambda h, d: h.flip(d) * h,
    "Roll": lambda h, d: h.roll(1, d) * h,
    "Unbind": lambda h, d: torch.stack(h.unbind(d)).prod(0),
    "Glu": lambda h, d: F.glu(torch.cat([h, h.sin()], d), d),
    "Renorm": lambda h, d: h.renorm(2, d % 3, 0.5),
    "Squeeze": lambda h, d: h.mean(d, keepdim=True).squeeze(d),
    "Unsqueeze": lambda h, d: (h.unsqueeze(d) * 2).sum(d),
    "Select": lambda h, d: h.select(d, 1),
    "Slice": lambda h, d: h.narrow(d, 1, 2).sum(d),
    "Split": lambda h, d: torch.cat(h.split(2, d)[::-1], d) * h,
    "SplitWithSizes": lambda h, d: torch.stack([p.sum(d) for p in h.split([1, h.shape[d] - 1], d)]).prod(0),
    "Unfold": lambda h, d: h.unfold(d, 2, 1).prod(-1).sum(d),
    "IndexSelect": lambda h, d: h.index_select(d, torch.tensor([2, 0])).prod(d),
    "Diff Sub": lambda h, d: h.diff(dim=d).square().sum(d),
    "SafeSoftmax": lambda h, d: torch.ops.aten._safe_softmax(h, d),
    "UnsafeSplit": lambda h, d: torch.cat(h.unsafe_split(2, d)[::-1], d) * h,
    "FftR2C FftC2R": lambda h, d: torch.fft.irfft(
        torch.fft.rfft(h, dim=d).abs() * (1 + 0j), n=h.shape[d], dim=d
    ),
    "FftC2C": lambda h, d: torch.fft.ifft(torch.fft.fft(torch.complex(h, h), dim=d).abs(), dim=d).real,
    "Take Gather": lambda h, d: torch.take_along_dim(h, h.detach().argsort(d), d),
    "Chunk Split": lambda h, d: torch.cat(h.chunk(2, d)[::-1], d) * h,
    "UnsafeSplitWithSizes": lambda h, d: torch.stack(
        [p.sum(d) for p in h.unsafe_split_with_sizes([1, h.shape[d] - 1], d)]
    ).prod(0),
}.items():
    along(_types.split()[-1] if _types.startswith(("Diff", "Take", "Chunk")) else _types, _along)
along(
    "SegmentReduce",
    lambda h, d: (
        torch.segment_reduce(h, "sum", lengths=torch.full([*h.shape[:d], 2], h.shape[d] // 2), axis=d)
        if d >= 0 and h.shape[d] % 2 == 0
        else torch.segment_reduce(h, "sum", lengths=torch.full([4, 4, 1], 3), axis=2)
    ),
)
occurs_in(
    "Sum Mean Prod Max Min Median Nanmedian LinalgVectorNorm Std Var",
    apart=lambda m, h, k: torch.stack([every_sum(s) for s in h]),
    mixed=lambda m, h, k: h + every_sum(h),
)
occurs_in(
    "Norm",
    apart=lambda m, h, k: torch.stack(
        [torch.ops.aten.norm.Scalar(s, 2) + torch.ops.aten.norm.ScalarOpt_dtype(s, 3, dtype=D) for s in h]
    ),
    apart_dims=lambda m, h, k: (
        torch.ops.aten.norm.ScalarOpt_dim(h, 2, [1])
        + torch.ops.aten.norm.ScalarOpt_dim_dtype(h, 3, [1], False, dtype=D)
    ),
    moved=lambda m, h, k: torch.ops.aten.norm.ScalarOpt_dim(h, 2, [k % 2]),
    mixed=lambda m, h, k: h + torch.ops.aten.norm.Scalar(h * k, 2),
)
occurs_in(
    "Squeeze",
    apart=lambda m, h, k: h[:, :1].squeeze() + h[:, :1].squeeze(1),
    apart_several=lambda m, h, k: h[:, :1, :1].squeeze((1, 2)),
    apart_in_place=lambda m, h, k: (
        h[:, :1].clone().squeeze_(1).unsqueeze_(1).squeeze_((1,)).unsqueeze_(1).squeeze_()
    ),
)
occurs_in("Unsqueeze", apart_in_place=lambda m, h, k: h.clone().unsqueeze_(k % 2).sum(k % 2))

# Products.
P4 = [[0, 1, 2, 3], [1, 0, 3, 2], [0, 1, 2, 3], [3, 1, 0, 2]]


def perm(k: int) -> Tensor:
    return torch.tensor(P4[k % 4])


def matrix(k: int) -> Tensor:
    """The identity, a permutation, or a full matrix."""
    return torch.eye(4).double()[perm(k)] if k < 3 else draw(4, 4)


occurs_in(
    "Mm",
    apart=lambda m, h, k: flat(h) @ m(12, 3),
    mixed=lambda m, h, k: matrix(k) @ flat(h),
    apart_data=lambda m, h, k: flat(h) @ draw(12, 3),
    moved=lambda m, h, k: torch.eye(4).double()[perm(k)] @ flat(h),
    mixed_gram=lambda m, h, k: flat(h) @ flat(h).T * torch.eye(4)[perm(k)],
)
occurs_in(
    "Bmm",
    apart=lambda m, h, k: torch.bmm(h, h.mT),
    data=lambda m, h, k: torch.bmm(draw(4, 2, 4), h),
    mixed=lambda m, h, k: torch.bmm(matrix(k).expand(4, 4, 4), h.transpose(0, 1)).transpose(0, 1),
    mixed_pairs=lambda m, h, k: torch.bmm(h, h[perm(k)].mT),
)
occurs_in(
    "Mv",
    apart=lambda m, h, k: torch.mv(flat(h), m(12)),
    mixed=lambda m, h, k: torch.mv(matrix(k), flat(h)[:, 0]),
)
occurs_in(
    "Dot",
    apart=lambda m, h, k: torch.stack([torch.dot(r, m(12)) for r in flat(h)]),
    mixed=lambda m, h, k: torch.stack(
        [torch.dot(r, s) for r, s in zip(flat(h), flat(h)[perm(k)], strict=True)]
    ),
)
occurs_in(
    "Vdot",
    apart=lambda m, h, k: torch.stack(
        [torch.vdot(torch.complex(r, r.cos()), torch.complex(r, r.sin())).abs() for r in flat(h)]
    ),
)
occurs_in(
    "Addmm",
    apart=lambda m, h, k: torch.addmm(m(5), flat(h), m(12, 5), beta=0.5, alpha=2),
    mixed=lambda m, h, k: torch.addmm(flat(h), matrix(k), flat(h).sin()),
)
occurs_in(
    "Addmv",
    apart=lambda m, h, k: torch.addmv(flat(h)[:, 0], flat(h), m(12)),
    mixed=lambda m, h, k: torch.addmv(flat(h)[:, 0], matrix(k), flat(h)[:, 1]),
)
occurs_in(
    "Addr",
    apart=lambda m, h, k: torch.addr(draw(4, 5), flat(h)[:, 0], m(5)),
    mixed=lambda m, h, k: torch.addr(draw(4, 4), flat(h)[:, 0], flat(h)[:, 1]) * torch.eye(4)[perm(k)],
)
occurs_in(
    "Baddbmm",
    apart=lambda m, h, k: torch.baddbmm(m(4, 4), h, h.mT),
    mixed=lambda m, h, k: torch.baddbmm(h, matrix(k).expand(4, 4, 4), h.transpose(0, 1)),
)
occurs_in(
    "Addbmm",
    apart=lambda m, h, k: torch.addbmm(draw(4, 5), h.transpose(0, 1), m(4, 3, 5)),
    mixed=lambda m, h, k: torch.addbmm(draw(4, 4), h, h.mT),
)
occurs_in(
    "Trilinear",
    apart=lambda m, h, k: F.bilinear(flat(h), flat(h).sin(), m(2, 12, 12)),
    mixed=lambda m, h, k: F.bilinear(flat(h), flat(h)[perm(k)], m(2, 12, 12)),
)
occurs_in(
    "Cdist",
    apart=lambda m, h, k: torch.cdist(h, m(5, 3).expand(4, 5, 3)),
    data=lambda m, h, k: torch.cdist(flat(h), draw(5, 12)),
    mixed=lambda m, h, k: torch.cdist(flat(h), flat(h).sin(), p=3.0),
)
occurs_in(
    "EuclideanDist",
    apart=lambda m, h, k: torch.cdist(flat(h), m(30, 12), compute_mode="use_mm_for_euclid_dist"),
    mixed=lambda m, h, k: torch.cdist(flat(h), flat(h) + 1, compute_mode="use_mm_for_euclid_dist"),
)
occurs_in(
    "Pdist",
    apart=lambda m, h, k: torch.stack([torch.pdist(s) for s in h]),
    mixed=lambda m, h, k: h + torch.pdist(flat(h)).sum(),
)
occurs_in(
    "Dist",
    apart=lambda m, h, k: torch.stack([torch.dist(s, s.sin()) for s in h]),
    mixed=lambda m, h, k: h * torch.dist(h, draw(4, 4, 3)),
)
occurs_in(
    "Trace",
    apart=lambda m, h, k: torch.stack([s[:, :3].trace() for s in h]),
    mixed=lambda m, h, k: h + flat(h).trace(),
)

# Shapes and views.
occurs_in(
    "View",
    apart=lambda m, h, k: h.view(4, 12),
    moved=lambda m, h, k: h.view(4, 4, 3) if k % 2 else h.view(4, 2, 6),
    moved_back=lambda m, h, k: (h.transpose(0, 1).reshape(16, 3) * 2).view(4, 4, 3).sum(k % 2),
    mixed=lambda m, h, k: h.transpose(0, 1).reshape(48).view(4, 12).cumsum(1),
)
occurs_in(
    "T",
    apart=lambda m, h, k: (flat(h).t() * 2).t(),
    mixed=lambda m, h, k: (flat(h)[:, :4].t() if k % 2 else flat(h)[:, :4]).exp() + flat(h)[:, :4],
    apart_in_place=lambda m, h, k: flat(h).clone().t_().sin().t(),
)
occurs_in(
    "Transpose",
    apart=lambda m, h, k: h.transpose(1, 2),
    moved=lambda m, h, k: (h.transpose(0, k % 2) ** 2).sum(1),
    mixed=lambda m, h, k: h + h.transpose(0, k % 2),
    apart_in_place=lambda m, h, k: h.clone().transpose_(1, 2),
)
occurs_in(
    "Permute",
    apart=lambda m, h, k: h.permute(0, 2, 1),
    moved=lambda m, h, k: h.permute(*([1, 0, 2] if k % 2 else [0, 1, 2])).sum(1),
    mixed=lambda m, h, k: h + h.permute(*([1, 0, 2] if k % 2 else [0, 1, 2])),
)
occurs_in(
    "AsStrided",
    apart=lambda m, h, k: h.contiguous().as_strided((4, 6), (12, 1), k),
    moved=lambda m, h, k: h.contiguous().as_strided((4, 3), (12, 4) if k % 2 else (3, 12), 1),
    mixed=lambda m, h, k: h.contiguous().as_strided((4, 6), (4 * (3 - k), 1)),
)
occurs_in(
    "Diagonal",
    apart=lambda m, h, k: h.diagonal(k % 2, 1, 2),
    moved=lambda m, h, k: h.diagonal(0, k % 2, 2)[:, :3].sum(1),
    mixed=lambda m, h, k: h + h.diagonal(0, 0, 1).T,
)
occurs_in(
    "DiagEmbed",
    apart=lambda m, h, k: torch.diag_embed(h, k % 2),
    mixed=lambda m, h, k: h + torch.diag_embed(flat(h)[:, 0])[:, :, None].sum(0),
)
occurs_in(
    "BlockDiag",
    apart=lambda m, h, k: torch.block_diag(*h[perm(k)]).view(4, -1),
    moved=lambda m, h, k: torch.block_diag(*h)[4 * (k % 2) : 4 * (k % 2) + 4],
)
occurs_in(
    "Tril Triu",
    apart=lambda m, h, k: h.tril(k % 2).triu(-1),
    mixed=lambda m, h, k: (flat(h) @ flat(h).T).tril(k).triu(-k),
)
occurs_in(
    "Rot90",
    apart=lambda m, h, k: torch.rot90(h, k, (1, 2)).flatten(1),
    moved=lambda m, h, k: torch.rot90(h, k, (0, 1)).sum(1),
    mixed=lambda m, h, k: h + torch.rot90(h, k, (0, 1)),
)
occurs_in("Roll", moved=lambda m, h, k: h.roll(k, 0), mixed=lambda m, h, k: h + h.roll(k, 0))
occurs_in("Flip", moved=lambda m, h, k: h.flip(k % 2), mixed=lambda m, h, k: h + h.flip(k % 2))
occurs_in(
    "Slice",
    moved=lambda m, h, k: h.repeat(2, 1, 1)[k : k + 4],
    mixed=lambda m, h, k: h.repeat(2, 1, 1)[k : k + 4] + h,
)
occurs_in(
    "Select",
    moved=lambda m, h, k: torch.stack([h[i] for i in P4[k % 4]]),
    mixed=lambda m, h, k: torch.stack([h[i] for i in P4[k % 4]]) + h,
    moved_dim=lambda m, h, k: torch.stack([h.select(0, i) for i in P4[k % 4]]),
)
occurs_in(
    "Unbind",
    moved=lambda m, h, k: torch.stack([h.unbind()[i] for i in P4[k % 4]]),
    mixed=lambda m, h, k: torch.stack([h.unbind()[i] for i in P4[k % 4]]) + h,
)
occurs_in(
    "Split",
    moved=lambda m, h, k: torch.cat([h.split(1)[i] for i in P4[k % 4]]),
    mixed=lambda m, h, k: torch.cat([h.split(1)[i] for i in P4[k % 4]]) + h,
)
SPLITS = [3, 3, 3, 3], [1, 5, 2, 4], [3, 3, 3, 3], [9, 1, 1, 1]
occurs_in(
    "SplitWithSizes",
    moved=lambda m, h, k: torch.stack([p.sum(0) for p in h.flatten(0, 1)[:12].split(SPLITS[k % 4])]),
)
occurs_in(
    "Cat",
    moved=lambda m, h, k: torch.cat([h[2:], h[:2]] if k % 2 else [h[:2], h[2:]]),
    mixed=lambda m, h, k: torch.cat([h[2:], h[:2]] if k % 2 else [h[:2], h[2:]]) + h,
)
occurs_in("Stack", moved=lambda m, h, k: torch.stack([h[:, i] for i in range(4)], 1 - k % 2).sum(1 - k % 2))
occurs_in(
    "Repeat",
    moved=lambda m, h, k: (
        h.repeat(3, 1, 1).view(3, 4, 12).sum(0) if k % 2 else h.repeat(3, 1, 1).view(3, 4, 12)[0]
    ),
    mixed=lambda m, h, k: h.repeat(3, 1, 1).view(4, 36).cumsum(1),
)
occurs_in(
    "Expand",
    moved=lambda m, h, k: h.unsqueeze(k % 2).expand(4, 4, 4, 3).sum(1) if k % 2 else h,
    mixed=lambda m, h, k: h[:1].expand(4, 4, 3) + h,
)
occurs_in(
    "Unfold",
    moved=lambda m, h, k: h.flatten(0, 1).unfold(0, 1, 1 + k)[:4],
    mixed=lambda m, h, k: h.flatten(0, 1).unfold(0, 4, 4 - k)[:4],
)
occurs_in(
    "ConstantPadNd",
    apart=lambda m, h, k: F.pad(h, (k, 1)),
    moved=lambda m, h, k: F.pad(h, (0, 0, 0, 0, k, 4 - k)).view(2, 4, 4, 3).sum(0),
    mixed=lambda m, h, k: F.pad(h, (0, 0, 0, 0, k, -k)) + h,
)
occurs_in(
    "SelectScatter",
    apart=lambda m, h, k: h.select_scatter(draw(4, 3), 1, k),
    moved=lambda m, h, k: draw(4, 4, 3).select_scatter(h[k], 0, k),
    mixed=lambda m, h, k: h.select_scatter(h[0], 0, k),
)
occurs_in(
    "SliceScatter",
    apart=lambda m, h, k: h.slice_scatter(draw(4, 1, 3), 1, k, k + 1),
    mixed=lambda m, h, k: h.slice_scatter(h[:1], 0, k, k + 1),
)
occurs_in(
    "DiagonalScatter",
    apart=lambda m, h, k: h.diagonal_scatter(draw(4, 3), 0, 1, 2),
    mixed=lambda m, h, k: h.diagonal_scatter(h[0].T.contiguous().T[:, :3].T.contiguous() * k, 0, 0, 1),
)
occurs_in(
    "AsStridedScatter",
    apart=lambda m, h, k: h.contiguous().as_strided_scatter(draw(4, 3), (4, 3), (12, 1), k),
    mixed=lambda m, h, k: h.contiguous().as_strided_scatter(flat(h)[:, :3], (4, 3), (12 - 4 * (k % 2), 1), k),
)
occurs_in(
    "PixelShuffle",
    apart=lambda m, h, k: F.pixel_shuffle(h.reshape(4, 4, 3, 1), 2),
    moved=lambda m, h, k: F.pixel_shuffle(h.reshape(1, 16, 3, 1), 2)[0],
)
occurs_in(
    "PixelUnshuffle",
    apart=lambda m, h, k: F.pixel_unshuffle(h.reshape(4, 1, 2, 6), 2),
    moved=lambda m, h, k: F.pixel_unshuffle(h.reshape(4, 1, 6, 2), 2),
)
occurs_in(
    "ChannelShuffle",
    apart=lambda m, h, k: F.channel_shuffle(h.unsqueeze(-1), 2 + 2 * (k % 2)),
    moved=lambda m, h, k: F.channel_shuffle(h.reshape(1, 4, 4, 3), 2 + 2 * (k % 2))[0],
)
occurs_in(
    "CopySlices!",
    apart=lambda m, h, k: _write(h, lambda o: o[:, k].copy_(h[:, 0].sin())),
    moved=lambda m, h, k: _writes(h, P4[k % 4]),
    mixed=lambda m, h, k: _write(h, lambda o: o[k].add_(h[0])),
)
occurs_in(
    "CopyBackwards!",
    apart=lambda m, h, k: torch.empty(4, 4, 3).double().copy_(h),
    mixed=lambda m, h, k: h + torch.empty(4, 4, 3).double().copy_(h[k % 4]),
)
occurs_in("AccumulateGrad!", apart=lambda m, h, k: h)


def _write(h: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    out = h.clone()
    change(out)
    return out


def _writes(h: Tensor, order: list[int]) -> Tensor:
    out = torch.zeros(4, 4, 3).double()
    for i, k in enumerate(order):
        out[i] = h[k]
    return out


# Norms, convolutions, pools.
occurs_in(
    "NativeLayerNorm",
    apart=lambda m, h, k: F.layer_norm(h, [4, 3], m(4, 3), m(4, 3)),
    mixed=lambda m, h, k: F.layer_norm(h, [4, 4, 3]),
    mixed_moved=lambda m, h, k: F.layer_norm(h.transpose(0, k % 2), [4, 3]).square().sum(1),
)
occurs_in(
    "NativeGroupNorm",
    apart=lambda m, h, k: F.group_norm(h, 2, m(4), m(4)),
    moved=lambda m, h, k: F.group_norm(h.reshape(1, 16, 3), 4).view(4, 12),
    mixed=lambda m, h, k: F.group_norm(h.reshape(1, 16, 3), [4, 2, 4, 8][k % 4]).view(4, 12),
)
occurs_in(
    "NativeBatchNorm",
    apart=lambda m, h, k: F.batch_norm(h, draw(4), draw(4).exp(), m(4), m(4)),
    mixed=lambda m, h, k: F.batch_norm(
        h, torch.zeros(4).double(), torch.ones(4).double(), training=k % 2 == 1
    ),
    apart_instances=lambda m, h, k: F.instance_norm(h, weight=m(4)),
)
occurs_in(
    "WeightNormInterface",
    apart=lambda m, h, k: h @ torch._weight_norm(m(3, 5), m(1, 5).exp(), 1),
    apart_samples=lambda m, h, k: torch._weight_norm(h, h[:, :1, :1].exp(), 0),
    mixed=lambda m, h, k: torch._weight_norm(flat(h)[:, :4].T, flat(h)[:1, :4].T.exp(), 0).T,
)
occurs_in(
    "Convolution",
    apart=lambda m, h, k: F.conv1d(h, m(5, 4, 2), m(5), 1 + k % 2),
    transposed=lambda m, h, k: F.conv_transpose1d(h, m(4, 2, 2), padding=k % 2),
    groups=lambda m, h, k: F.conv2d(h.unsqueeze(1), m(2, 1, 2, 2), padding=k % 2),
    three=lambda m, h, k: F.conv3d(h.view(4, 1, 2, 2, 3), m(2, 1, 2, 1, 2)),
    moved=lambda m, h, k: (
        F.conv1d(h.flatten(0, 1).T[None], m(5, 3, 4), stride=4)[0].T
        if k % 2
        else F.conv1d(h.flatten(0, 1).T[None], m(5, 3, 4), stride=4, padding=2)[0].T[:4]
    ),
    mixed=lambda m, h, k: F.conv1d(h.flatten(0, 1).T[None], m(5, 3, 4), stride=4 - k % 2)[0].T[:4],
    mixed_groups=lambda m, h, k: F.conv1d(
        h.reshape(1, 16, 3), m(4, 16 // [4, 1, 4, 2][k % 4], 2), groups=[4, 1, 4, 2][k % 4]
    )[0],
)
occurs_in("ConvTbc", mixed=lambda m, h, k: torch.conv_tbc(h, m(3, 3, 5), m(5), 1))
for _name, _pool in {
    "MaxPool2DWithIndices": F.max_pool2d,
    "AvgPool2D": F.avg_pool2d,
    "AdaptiveAvgPool2D": lambda h, s: F.adaptive_avg_pool2d(h, (4 // s, 3)),
    "AdaptiveMaxPool2D": lambda h, s: F.adaptive_max_pool2d(h, (4 // s, 3)),
}.items():
    occurs_in(
        _name,
        apart=lambda m, h, k, f=_pool: f(h.unsqueeze(1), 2),
        moved=lambda m, h, k, f=_pool: f(h.reshape(1, 1, 16, 3).expand(1, 1, 16, 3), 1)[0, 0].view(4, -1),
        mixed=lambda m, h, k, f=_pool: _four(f(h.transpose(0, 1).unsqueeze(1), 2).transpose(0, 2)).repeat(
            2, 1, 1, 1
        )[:4],
    )
for _name, _pool in {
    "MaxPool3DWithIndices": F.max_pool3d,
    "AvgPool3D": F.avg_pool3d,
    "AdaptiveAvgPool3D": lambda h, s: F.adaptive_avg_pool3d(h, (2, 1, 2)),
    "AdaptiveMaxPool3D": lambda h, s: F.adaptive_max_pool3d(h, (2, 1, 2)),
}.items():
    occurs_in(
        _name,
        apart=lambda m, h, k, f=_pool: f(h.view(4, 1, 2, 2, 3), 2),
        mixed=lambda m, h, k, f=_pool: h + f(h.unsqueeze(0), 2).sum(),
    )
occurs_in(
    "MaxPool2DWithIndices Squeeze",
    moved=lambda m, h, k: (
        F.max_pool1d(h.flatten(0, 1).T[None], 4, 4 - k % 2 * 3)[0].T[::1][:4]
        if k % 2 == 0
        else F.max_pool1d(h.flatten(0, 1).T[None], 4, 4)[0].T
    ),
    mixed=lambda m, h, k: F.max_pool1d(h.flatten(0, 1).T[None], 4, 4 - k % 2)[0].T[:4],
)
occurs_in(
    "FractionalMaxPool2D",
    apart=lambda m, h, k: F.fractional_max_pool2d(h.unsqueeze(1), 2, output_size=(2, 2)),
    mixed=lambda m, h, k: h + F.fractional_max_pool2d(h.transpose(0, 2)[None], 2, output_size=(2, 2)).sum(),
)
occurs_in(
    "FractionalMaxPool3D",
    apart=lambda m, h, k: F.fractional_max_pool3d(
        h.repeat(1, 2, 2).view(4, 1, 4, 4, 3), 2, output_size=(2, 2, 1)
    ),
)
occurs_in(
    "MaxUnpool2D",
    apart=lambda m, h, k: F.max_unpool2d(
        *F.max_pool2d(h.unsqueeze(1), 2, return_indices=True), 2, output_size=(4, 3)
    ),
    moved=lambda m, h, k: F.max_unpool2d(
        h.reshape(1, 3, 4, 4)[:, :, :, :],
        torch.arange(16).view(4, 4)[perm(k)].expand(1, 3, 4, 4).contiguous(),
        1,
    )[0].permute(1, 2, 0),
)
occurs_in(
    "MaxUnpool3D",
    apart=lambda m, h, k: F.max_unpool3d(
        *F.max_pool3d(h.view(4, 1, 2, 2, 3), 2, return_indices=True), 2, output_size=(2, 2, 3)
    ),
)
occurs_in(
    "Im2Col",
    apart=lambda m, h, k: F.unfold(h.unsqueeze(1), 2, padding=k % 2),
    mixed=lambda m, h, k: (
        F.unfold(h.transpose(0, 1).unsqueeze(0), (2, 3), padding=(k % 2, 0))[0].T[:1].repeat(4, 1)
    ),
)
occurs_in(
    "Col2Im",
    apart=lambda m, h, k: F.fold(h, (2, 4), (2, 2)),
    mixed=lambda m, h, k: F.fold(h.transpose(0, 1), (2, 4), (2, 2)).sum(0).flatten()[:4],
)

# Padding and up-sampling.
for _name, _mode in ("ReflectionPad", "reflect"), ("ReplicationPad", "replicate"):
    occurs_in(
        f"{_name}1D",
        apart=lambda m, h, k, f=_mode: F.pad(h, (1, k % 3), f),
        mixed=lambda m, h, k, f=_mode: F.pad(h.transpose(0, 2), (k % 3, 0), f).transpose(0, 2)[:4] + h,
    )
    occurs_in(f"{_name}2D", apart=lambda m, h, k, f=_mode: F.pad(h.unsqueeze(1), (1, k % 3, 1, 0), f))
    occurs_in(
        f"{_name}3D", apart=lambda m, h, k, f=_mode: F.pad(h.view(4, 1, 2, 2, 3), (1, k % 3, 1, 0, 0, 1), f)
    )
for _name, _mode in {
    "UpsampleLinear1D": "linear",
    "UpsampleNearest1D": "nearest",
    "UpsampleNearestExact1D": "nearest-exact",
}.items():
    occurs_in(
        _name,
        apart=lambda m, h, k, f=_mode: F.interpolate(h, 4 + k, mode=f),
        mixed=lambda m, h, k, f=_mode: F.interpolate(h.transpose(0, 2), 4 + k, mode=f).transpose(0, 2)[:4],
        moved=lambda m, h, k, f=_mode: F.interpolate(h.transpose(0, 2), 4, mode=f).transpose(0, 2),
    )
for _name, _mode in {
    "UpsampleBilinear2D": "bilinear",
    "UpsampleBicubic2D": "bicubic",
    "UpsampleNearest2D": "nearest",
    "UpsampleNearestExact2D": "nearest-exact",
}.items():
    occurs_in(
        _name,
        apart=lambda m, h, k, f=_mode: F.interpolate(h.unsqueeze(1), (5, 4 + k), mode=f),
        mixed=lambda m, h, k, f=_mode: F.interpolate(h.permute(2, 0, 1).unsqueeze(0), (4 + k, 4), mode=f)[
            0
        ].transpose(0, 1)[:4],
    )
for _name, _mode in {"UpsampleBilinear2DAa": "bilinear", "UpsampleBicubic2DAa": "bicubic"}.items():
    occurs_in(
        _name,
        apart=lambda m, h, k, f=_mode: F.interpolate(h.unsqueeze(1), (3, 2), mode=f, antialias=True),
        mixed=lambda m, h, k, f=_mode: (
            F.interpolate(h.permute(2, 0, 1).unsqueeze(0), (4, 3), mode=f, antialias=True)[0].transpose(0, 1)
            + F.interpolate(h.permute(2, 0, 1).unsqueeze(0), (3, 4), mode=f, antialias=True).sum()
        ),
    )
for _name, _mode in {
    "UpsampleTrilinear3D": "trilinear",
    "UpsampleNearest3D": "nearest",
    "UpsampleNearestExact3D": "nearest-exact",
}.items():
    occurs_in(
        _name, apart=lambda m, h, k, f=_mode: F.interpolate(h.view(4, 1, 2, 2, 3), (3, 2, 4 + k), mode=f)
    )
occurs_in(
    "GridSampler2D",
    apart=lambda m, h, k: F.grid_sample(h.unsqueeze(1), draw(4, 2, 2, 2).tanh(), align_corners=False),
    moved=lambda m, h, k: _sampled(h, k),
    mixed=lambda m, h, k: h + _sampled(h, k),
    own=lambda m, h, k: F.grid_sample(draw(4, 2, 3, 3), h[:, :, :2].unsqueeze(1).tanh(), align_corners=False),
)
occurs_in(
    "GridSampler3D",
    apart=lambda m, h, k: F.grid_sample(
        h.view(4, 1, 2, 2, 3), draw(4, 2, 2, 1, 3).tanh(), align_corners=False
    ),
)
occurs_in(
    "AffineGridGenerator", apart=lambda m, h, k: F.affine_grid(h[:, :2], [4, 1, 2, 3], align_corners=False)
)


def _sampled(h: Tensor, k: int) -> Tensor:
    """An image whose rows are the samples, read at centres of rows in some order."""
    at = (perm(k) * 2 + 1) / 4 - 1
    columns = (torch.arange(12) * 2 + 1) / 12 - 1
    grid = torch.stack(torch.broadcast_tensors(columns, at[:, None]), -1).double()
    return F.grid_sample(flat(h)[None, None], grid[None], mode="nearest", align_corners=False).view(4, 4, 3)


# Indices and orders.
def spread(k: int) -> Tensor:
    return perm(k)[:, None, None].expand(4, 4, 3)


for _name, _move in {
    "Index": lambda h, k: h[perm(k)],
    "IndexSelect": lambda h, k: h.index_select(0, perm(k)),
    "Gather": lambda h, k: h.gather(0, spread(k)),
    "Take": lambda h, k: h.take(torch.arange(48).view(4, 12)[perm(k)]).view(4, 4, 3),
    "Scatter": lambda h, k: torch.zeros_like(h).scatter(0, spread(k), h),
    "ScatterAdd": lambda h, k: torch.zeros_like(h).scatter_add(0, spread(k), h),
    "IndexAdd": lambda h, k: torch.zeros_like(h).index_add(0, perm(k), h),
    "IndexCopy": lambda h, k: torch.zeros_like(h).index_copy(0, perm(k), h),
    "IndexPut": lambda h, k: torch.zeros_like(h).index_put((perm(k),), h),
    "IndexReduce": lambda h, k: (torch.zeros_like(h) - 9).index_reduce(0, perm(k), h, "amax"),
    "ScatterReduce": lambda h, k: torch.zeros_like(h).scatter_reduce(0, spread(k), h, "sum"),
    "Put": lambda h, k: torch.zeros_like(h).put(
        torch.arange(48).view(4, 12)[perm(k)], h.contiguous().view(4, 12)
    ),
    "Embedding": lambda h, k: F.embedding(perm(k), flat(h)).view(4, 4, 3),
    "EmbeddingBag": lambda h, k: F.embedding_bag(perm(k)[:, None], flat(h), mode="sum").view(4, 4, 3),
    "MaskedSelect": lambda h, k: torch.cat(
        [h.masked_select((torch.arange(4) == i)[:, None, None]).view(1, 4, 3) for i in P4[k % 4]]
    ),
    "MaskedScatter": lambda h, k: torch.stack(
        [torch.zeros(4, 3).double().masked_scatter(torch.ones(4, 3).bool(), h[i]) for i in P4[k % 4]]
    ),
    "MaskedFill": lambda h, k: sum(
        h[i].expand(4, 4, 3).masked_fill((perm(k) != i)[:, None, None], 0.0) for i in range(4)
    ),
    "Where": lambda h, k: sum(torch.where((perm(k) == i)[:, None, None], h[i], 0.0) for i in range(4)),
    "Sort": lambda h, k: torch.arange(4.0).double()[perm(k)].add(h[:, 0, 0] * 1e-3).sort()[0],
    "UnsafeIndex": lambda h, k: torch.ops.aten._unsafe_index(h, [perm(k)]),
    "Topk": lambda h, k: torch.arange(4.0).double()[perm(k)].add(h[:, 0, 0] * 1e-3).topk(4)[0],
    "IndexPutImpl": lambda h, k: torch.ops.aten._index_put_impl(torch.zeros_like(h), [perm(k)], h),
    "UnsafeIndexPut": lambda h, k: torch.ops.aten._unsafe_index_put(torch.zeros_like(h), [perm(k)], h),
    "UnsafeMaskedIndex": lambda h, k: torch.ops.aten._unsafe_masked_index(
        h, torch.ones(4, 1, 1).bool(), [perm(k)], 0.0
    ),
    "UnsafeMaskedIndexPutAccumulate": lambda h, k: torch.ops.aten._unsafe_masked_index_put_accumulate(
        torch.zeros_like(h), torch.ones(4, 1, 1).bool(), [perm(k)], h
    ),
}.items():
    occurs_in(
        _name,
        moved=lambda m, h, k, f=_move: f(h, k),
        mixed=lambda m, h, k, f=_move: (h if f(h, 0).ndim == 3 else h[:, 0, 0]) + f(h, k),
    )
occurs_in(
    "IndexFill MaskedFill",
    apart=lambda m, h, k: h.index_fill(1, torch.tensor([k]), 0.3).masked_fill(draw(4, 4, 3) > 0, 0.1),
    mixed=lambda m, h, k: h.index_fill(0, perm(k)[:2], h[0, 0, 0]).masked_fill(draw(4, 4, 3) > 0, h[1, 1, 1]),
)
occurs_in("Scatter", apart=lambda m, h, k: h.scatter(1, torch.randint(4, [4, 1, 3]), 0.5))
occurs_in(
    "Index",
    apart=lambda m, h, k: h[:, [k, 0]],
    apart_class=lambda m, h, k: h[torch.arange(4), torch.randint(4, [4])],
    apart_last=lambda m, h, k: h[torch.arange(4)[:, None], torch.randint(4, [4, 2])],
    apart_both=lambda m, h, k: h[torch.arange(4), torch.randint(4, [4]), perm(k) % 3],
    apart_around=lambda m, h, k: h[torch.arange(4), :, torch.randint(3, [4])],
    apart_later=lambda m, h, k: h.movedim(0, 1)[:, torch.arange(4), torch.randint(3, [4])].movedim(0, 1),
    between=lambda m, h, k: h.movedim(0, 1)[perm(k), torch.arange(4)],
    apart_mask=lambda m, h, k: h[:, torch.arange(4) != k % 4],
    apart_new=lambda m, h, k: h[None, torch.arange(4), 1:, [k % 3]].squeeze(0),
    moved=lambda m, h, k: h[perm(k), torch.arange(4)],
    moved_class=lambda m, h, k: h[perm(k), torch.randint(4, [4])],
    moved_last=lambda m, h, k: h[perm(k)[:, None], torch.arange(4)],
    moved_mask=lambda m, h, k: torch.cat([h[torch.arange(4) == i] for i in P4[k % 4]]),
    mixed_later=lambda m, h, k: h + h[torch.arange(4) if k == 0 else perm(k), torch.arange(4)],
    mixed_around=lambda m, h, k: h.movedim(0, 1)[torch.arange(4), :, torch.randint(3, [4])],
    diagonal=lambda m, h, k: h[:, :, [0, 1, 2, 0]][torch.arange(4), :, torch.arange(4)],
    mixed_diagonal=lambda m, h, k: h.movedim(0, 1)[torch.arange(4), torch.arange(4)] + h[:, 0],
    mixed=lambda m, h, k: h[draw(4, 4, 3) > 0].sum() + h,
    data=lambda m, h, k: m(7, 3)[torch.randint(7, [4, 2])].flatten(1) + h[:, 0, :2].repeat(1, 3),
)
occurs_in(
    "Embedding",
    apart=lambda m, h, k: F.embedding(torch.randint(7, [4, 2]), m(7, 3)),
    positions=lambda m, h, k: h + F.embedding(torch.arange(4), m(7, 3)),
)
occurs_in(
    "EmbeddingBag",
    apart=lambda m, h, k: F.embedding_bag(
        torch.randint(7, [12]), m(7, 3), torch.tensor([0, *SPLITS[k % 4][:3]]).cumsum(0), mode="mean"
    ),
    moved=lambda m, h, k: F.embedding_bag(
        torch.arange(12), h.flatten(0, 1), torch.tensor([0, *SPLITS[k % 4][:3]]).cumsum(0), mode="sum"
    ),
)
occurs_in(
    "SegmentReduce",
    moved=lambda m, h, k: torch.segment_reduce(
        h.flatten(0, 1)[:12], "mean", lengths=torch.tensor(SPLITS[k % 4])
    ),
)
occurs_in(
    "IndexAdd",
    apart_sets=lambda m, h, k: (
        torch.zeros(4, 3)
        .double()
        .index_add(0, torch.arange(4).repeat_interleave(torch.tensor(SPLITS[k % 4])), h.flatten(0, 1)[:12])
    ),
)
occurs_in(
    "Max Min Median",
    apart=lambda m, h, k: torch.stack([r.max() + r.min() * r.median() for r in h]),
    moved=lambda m, h, k: torch.stack(
        [f(h[:, 0, 0] + perm(k)) for f in (torch.max, torch.min, torch.median)][:3]
    ),
    mixed=lambda m, h, k: torch.stack([(c + perm(k)).max() + c.min() - c.median() for c in h[:, :, 0].T]),
)
occurs_in(
    "Kthvalue",
    moved=lambda m, h, k: torch.stack([(h[:, 0, 0] + perm(k)).kthvalue(i)[0] for i in (1, 2, 3, 4)]),
)

# Losses.
occurs_in(
    "NllLoss",
    apart=lambda m, h, k: F.nll_loss(
        flat(h).log_softmax(1), torch.randint(12, [4]), reduction="none", ignore_index=3
    ),
    moved=lambda m, h, k: F.nll_loss(flat(h).T[:4].contiguous(), perm(k), reduction="none"),
    weights=lambda m, h, k: F.nll_loss(flat(h), torch.randint(12, [4]), draw(12).exp(), reduction="none"),
    mixed=lambda m, h, k: F.nll_loss(flat(h) @ flat(h).T, perm(k), reduction="none"),
    mixed_mean=lambda m, h, k: flat(h) * F.nll_loss(flat(h), torch.randint(12, [4])),
)
occurs_in(
    "NllLoss2D",
    apart=lambda m, h, k: F.nll_loss(h.unsqueeze(-1), torch.randint(4, [4, 3, 1]), reduction="none"),
    mixed=lambda m, h, k: F.nll_loss(
        (h + neighbours(h) * (k % 2)).unsqueeze(-1), torch.randint(4, [4, 3, 1]), reduction="none"
    ),
)
occurs_in(
    "MultiMarginLoss",
    apart=lambda m, h, k: F.multi_margin_loss(flat(h), torch.randint(12, [4]), reduction="none"),
    mixed=lambda m, h, k: F.multi_margin_loss(flat(h) @ flat(h).T, perm(k), reduction="none"),
)
occurs_in(
    "MultilabelMarginLoss",
    apart=lambda m, h, k: F.multilabel_margin_loss(flat(h), torch.randint(12, [4, 12]), reduction="none"),
)
occurs_in(
    "CtcLoss",
    apart=lambda m, h, k: F.ctc_loss(
        h.transpose(0, 1).log_softmax(2),
        torch.randint(1, 3, [4, 2]),
        torch.tensor([4, 3, 4, 4]),
        torch.tensor([2, 1, 1, 2]),
        reduction="none",
        zero_infinity=True,
    ),
    mixed=lambda m, h, k: F.ctc_loss(
        h.transpose(0, k % 2).log_softmax(2),
        torch.randint(1, 3, [4, 2]),
        torch.tensor([4, 4, 4, 4]),
        torch.tensor([1, 1, 1, 2]),
        reduction="none",
    ),
)

# Attention and recurrent networks.
occurs_in(
    "ScaledDotProductFlashAttentionForCpu",
    apart=lambda m, h, k: F.scaled_dot_product_attention(
        h[:, None], h[:, None].sin(), h[:, None], is_causal=k % 2 == 1
    ),
    masked=lambda m, h, k: F.scaled_dot_product_attention(
        h[:, None], h[:, None], h[:, None].cos(), attn_mask=draw(4, 1, 4, 4)
    ),
    moved=lambda m, h, k: F.scaled_dot_product_attention(
        h.transpose(0, k % 2)[:, None], h.transpose(0, k % 2)[:, None], h.transpose(0, k % 2)[:, None]
    )[:, 0].transpose(0, k % 2),
    mixed=lambda m, h, k: F.scaled_dot_product_attention(
        h.transpose(0, 1)[:, None],
        h.transpose(0, 1)[:, None],
        h.transpose(0, 1)[:, None],
        attn_mask=torch.where(torch.eye(4)[perm(k)] > 0, 0.0, -torch.inf).double(),
    )[:, 0].transpose(0, 1),
)
occurs_in("PackPaddedSequence", moved=lambda m, h, k: _packed(h, LENGTHS[k % 4]))
LENGTHS = [4, 3, 2, 1], [3, 3, 3, 3], [4, 4, 1, 1], [4, 2, 2, 2]


def _packed(h: Tensor, lengths: list[int]) -> Tensor:
    packed = torch.nn.utils.rnn.pack_padded_sequence(h, torch.tensor(lengths), batch_first=True)
    return torch.nn.utils.rnn.pad_packed_sequence(packed._replace(data=packed.data.sin()), batch_first=True)[
        0
    ]


# Linear algebra of each sample's 3x3 matrix.
def square(h: Tensor) -> Tensor:
    return h[:, :3] + 4 * torch.eye(3).double()


def definite(h: Tensor) -> Tensor:
    return h[:, :3] @ h[:, :3].mT + torch.eye(3).double()


for _name, _function in {
    "LinalgInvEx": lambda h: torch.linalg.inv(square(h)),
    "LinalgDet": lambda h: torch.linalg.det(square(h)),
    "LinalgSlogdet": lambda h: torch.linalg.slogdet(square(h))[1],
    "LinalgCholeskyEx": lambda h: torch.linalg.cholesky(definite(h)),
    "LinalgSolveEx": lambda h: torch.linalg.solve(square(h), h[:, 0].unsqueeze(2)),
    "LinalgEigh": lambda h: torch.linalg.eigvalsh(definite(h)),
    "LinalgSvd": lambda h: torch.linalg.svdvals(square(h)),
    "LinalgQr": lambda h: torch.linalg.qr(square(h))[1].abs(),
    "LinalgPinv": lambda h: torch.linalg.pinv(square(h)),
    "LinalgHouseholderProduct": lambda h: torch.linalg.householder_product(
        h[:, :3].tril(), h[:, 0].sigmoid()
    ),
    "LinalgMatrixExp": lambda h: torch.linalg.matrix_exp(h[:, :3]),
    "LinalgSolveTriangular": lambda h: torch.linalg.solve_triangular(
        square(h).tril(), h[:, :1].mT, upper=False
    ),
    "CholeskySolve": lambda h: torch.cholesky_solve(h[:, :1].mT, torch.linalg.cholesky(definite(h))),
    "CholeskyInverse": lambda h: torch.cholesky_inverse(torch.linalg.cholesky(definite(h))),
    "LinalgLuFactorEx": lambda h: torch.linalg.lu_factor(square(h))[0],
    "LinalgLu": lambda h: torch.linalg.lu(square(h))[2],
    "LuUnpack": lambda h: torch.lu_unpack(*torch.linalg.lu_factor(square(h)))[2],
    "LinalgLuSolve": lambda h: torch.linalg.lu_solve(*torch.linalg.lu_factor(square(h)), h[:, :1].mT),
    "LinalgEig": lambda h: torch.linalg.eigvals(
        square(h) + torch.diag(torch.tensor([1.0, 5, 9]).double())
    ).abs(),
    "TriangularSolve": lambda h: torch.triangular_solve(h[:, :1].mT, square(h))[0],
    **({} if NO_CHOLESKY else {"Cholesky": lambda h: torch.cholesky(definite(h))}),
    "LinalgLstsq": lambda h: torch.linalg.lstsq(square(h), h[:, :1].mT)[0],
}.items():
    occurs_in(
        _name,
        apart=lambda m, h, k, f=_function: f(h),
        mixed=lambda m, h, k, f=_function: f(h + 0.7 * (k % 2) * neighbours(h)),
    )

# Sparse matrices.
occurs_in(
    "SparseAddmm",
    moved=lambda m, h, k: torch.sparse.mm(torch.eye(4).double()[perm(k)].to_sparse(), flat(h)),
    mixed=lambda m, h, k: torch.sparse.mm(matrix(k).to_sparse(), flat(h)) + flat(h),
)
occurs_in(
    "ToSparse ToDense",
    apart=lambda m, h, k: (h * (draw(4, 4, 3) > 0)).to_sparse().to_dense(),
    mixed=lambda m, h, k: h + (neighbours(h) * (k % 2)).to_sparse().to_dense(),
)
occurs_in(
    "SparseCooTensorWithDimsAndTensors",
    moved=lambda m, h, k: torch.sparse_coo_tensor(perm(k)[None], h, [4, 4, 3]).to_dense(),
)
occurs_in("SparseSum", apart=lambda m, h, k: torch.sparse.sum(h.to_sparse(), 1).to_dense())
occurs_in(
    "SparseSoftmax",
    apart=lambda m, h, k: torch.sparse.softmax(h.to_sparse(), 1).to_dense(),
    mixed=lambda m, h, k: torch.sparse.softmax(h.to_sparse(), k % 2).to_dense(),
)
occurs_in("SparseLogSoftmax", apart=lambda m, h, k: torch.sparse.log_softmax(h.to_sparse(), 1).to_dense())
occurs_in(
    "Coalesce Values",
    moved=lambda m, h, k: torch.sparse_coo_tensor(perm(k)[None], h, [4, 4, 3]).coalesce().values() * 2,
)

# Overloads that Python reaches by the op's name alone, and what the others of a family leave.
aten = torch.ops.aten
unary("Mul", lambda h: aten.mul.Scalar(h, 2.5))
unary("Div", lambda h: aten.div.Scalar(h, 2.5) + aten.div.Scalar_mode(h, 2.5, rounding_mode="floor"))
unary("Add", lambda h: aten.add.Scalar(h, 2.5))
unary("Sub", lambda h: aten.sub.Scalar(h, 2.5))
unary("Rsub", lambda h: aten.rsub.Scalar(h, 2.5))
unary("Fill", lambda h: torch.fill(h, 2.0) + torch.fill(h, torch.tensor(1.0).double()) + h)
unary("Lift", lambda h: aten.lift(h))
unary("ReshapeCopy", lambda h: aten._reshape_copy(h, [4, 12]))
unary("NarrowCopy", lambda h: aten.narrow_copy(h, 1, 1, 2))
unary("Normal", lambda h: torch.normal(h, 1.0) + torch.normal(1.0, h.exp()) + torch.normal(h, h.exp()) + h)
unary("StandardGamma", lambda h: torch._standard_gamma(h.exp()) * 0 + h)
unary(
    "Igamma Igammac",
    lambda h: torch.igamma(1 + torch.rand_like(h), h.exp()) + torch.igammac(1 + torch.rand_like(h), h.exp()),
)
unary(
    "SpecialZeta",
    lambda h: torch.special.zeta(2.5, h.exp() + 1) + torch.special.zeta(2 + torch.rand_like(h), h.exp() + 1),
)
unary("Bernoulli", lambda h: h.clone().bernoulli_(0.4) + h.clone().bernoulli_(torch.rand_like(h)) + h)
along("Sort", lambda h, d: h.sort(dim=d, stable=True)[0])
along(
    "NativeBatchNormLegit",
    lambda h, d: aten._native_batch_norm_legit(
        h.movedim(d, 0)[None],
        None,
        None,
        torch.zeros(h.shape[d]).double(),
        torch.ones(h.shape[d]).double(),
        True,
        0.1,
        1e-5,
    )[0][0].movedim(0, d),
)
occurs_in(
    "NativeBatchNormLegitNoTraining",
    apart=lambda m, h, k: aten._native_batch_norm_legit_no_training(
        h, m(4), m(4), draw(4), draw(4).exp(), 0.1, 1e-5
    )[0],
)
occurs_in(
    "CtcLoss",
    apart_lists=lambda m, h, k: aten.ctc_loss.IntList(
        h.transpose(0, 1).log_softmax(2),
        torch.randint(1, 3, [4, 2]),
        [4, 3, 4, 4],
        [1, 1, 2 - k % 2, 1],
        0,
        0,
        True,
    ),
)


# Derivatives of derivatives, as gradient penalties have them.
def penalised(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.autograd.grad(f(h).square().sum(), h, create_graph=True)[0]


for _types, _function in {
    "SigmoidBackward": torch.sigmoid,
    "TanhBackward": torch.tanh,
    "GeluBackward": F.gelu,
    "EluBackward": F.elu,
    "LeakyReluBackward": F.leaky_relu,
    "SoftplusBackward": F.softplus,
    "HardswishBackward": F.hardswish,
    "LogSigmoidBackward": F.logsigmoid,
    "HardtanhBackward": F.hardtanh,
    "HardshrinkBackward": F.hardshrink,
    "SoftshrinkBackward": F.softshrink,
    "GluBackward": lambda h: F.glu(h[:, :2], 1),
    "SoftmaxBackwardData": lambda h: h.softmax(1),
    "LogSoftmaxBackwardData": lambda h: h.log_softmax(1),
    "MseLossBackward": lambda h: F.mse_loss(h, draw(4, 4, 3), reduction="none"),
    "SmoothL1LossBackward": lambda h: F.smooth_l1_loss(h, draw(4, 4, 3), reduction="none"),
    "HuberLossBackward": lambda h: F.huber_loss(h, draw(4, 4, 3), reduction="none"),
    "SoftMarginLossBackward": lambda h: F.soft_margin_loss(h, draw(4, 4, 3).sign(), reduction="none"),
    "ThresholdBackward": torch.relu,
    "AvgPool2DBackward": lambda h: F.avg_pool2d(h.unsqueeze(1), 2),
    "MaxPool2DWithIndicesBackward": lambda h: F.max_pool2d(h.unsqueeze(1), 2),
    "AvgPool3DBackward": lambda h: F.avg_pool3d(h.view(4, 1, 2, 2, 3), 2),
    "MaxPool3DWithIndicesBackward": lambda h: F.max_pool3d(h.view(4, 1, 2, 2, 3), 2),
    "AdaptiveAvgPool2DBackward": lambda h: F.adaptive_avg_pool2d(h.unsqueeze(1), (2, 2)),
    "AdaptiveMaxPool2DBackward": lambda h: F.adaptive_max_pool2d(h.unsqueeze(1), (2, 2)),
    "ReflectionPad1DBackward": lambda h: F.pad(h, (1, 1), "reflect"),
    "ReplicationPad1DBackward": lambda h: F.pad(h, (1, 1), "replicate"),
    "ReflectionPad2DBackward": lambda h: F.pad(h.unsqueeze(1), (1, 1, 1, 1), "reflect"),
    "ReplicationPad2DBackward": lambda h: F.pad(h.unsqueeze(1), (1, 1, 1, 1), "replicate"),
    "UpsampleLinear1DBackward": lambda h: F.interpolate(h, 5, mode="linear"),
    "UpsampleNearest1DBackward": lambda h: F.interpolate(h, 5),
    "UpsampleBilinear2DBackward": lambda h: F.interpolate(h.unsqueeze(1), (5, 5), mode="bilinear"),
    "UpsampleNearest2DBackward": lambda h: F.interpolate(h.unsqueeze(1), (5, 5)),
    "UpsampleBicubic2DBackward": lambda h: F.interpolate(h.unsqueeze(1), (5, 5), mode="bicubic"),
    "SelectBackward": lambda h: h[:, 1],
    "SliceBackward": lambda h: h[:, 1:3],
    "UnfoldBackward": lambda h: h.unfold(1, 2, 1),
    "DiagonalBackward": lambda h: h.diagonal(0, 1, 2),
    "NllLossBackward": lambda h: F.nll_loss(flat(h), torch.randint(12, [4]), reduction="none"),
    "NllLoss2DBackward": lambda h: F.nll_loss(h.unsqueeze(-1), torch.randint(4, [4, 3, 1]), reduction="none"),
    "BinaryCrossEntropyBackward": lambda h: F.binary_cross_entropy(
        h.sigmoid(), torch.rand(4, 4, 3).double(), reduction="none"
    ),
    "NativeLayerNormBackward": lambda h: F.layer_norm(h, [3], torch.ones(3).double()),
    "ConvolutionBackward": lambda h: F.conv1d(h, torch.ones(2, 4, 2).double()),
    "MaskedScatterBackward": lambda h: torch.zeros_like(h).masked_scatter(torch.ones_like(h).bool(), h),
    "GridSampler2DBackward": lambda h: F.grid_sample(
        h.unsqueeze(1), torch.zeros(4, 2, 2, 2).double(), align_corners=False
    ),
    "RreluWithNoiseBackward": lambda h: F.rrelu(h, training=True),
    "PreluKernelBackward": lambda h: F.prelu(h, torch.tensor(0.3).double()),
}.items():
    unary(_types, penalised(_function))

# Kernels that torch chooses by itself elsewhere.
occurs_in(
    "SlowConv2D",
    apart=lambda m, h, k: aten._slow_conv2d_forward(
        h.unsqueeze(1), m(2, 1, 2, 2), [2, 2], m(2), [1, 1], [k % 2, 0]
    ),
)
occurs_in(
    "SlowConv3D",
    apart=lambda m, h, k: aten.slow_conv3d_forward(
        h.view(4, 1, 2, 2, 3), m(2, 1, 2, 1, 2), [2, 1, 2], m(2), [1, 1, 1], [k % 2, 0, 0]
    ),
)
occurs_in(
    "SlowConvDilated2D",
    apart=lambda m, h, k: aten.slow_conv_dilated2d(
        h.unsqueeze(1), m(2, 1, 2, 2), [2, 2], m(2), [1, 1], [1, 0], [1 + k % 2, 1]
    ),
)
occurs_in(
    "SlowConvDilated3D",
    apart=lambda m, h, k: aten.slow_conv_dilated3d(
        h.view(4, 1, 2, 2, 3), m(2, 1, 2, 1, 2), [2, 1, 2], m(2), [1, 1, 1], [1, 0, 0], [1 + k % 2, 1, 1]
    ),
)
occurs_in(
    "SlowConvTranspose2D",
    apart=lambda m, h, k: aten.slow_conv_transpose2d(
        h.unsqueeze(1), m(1, 2, 2, 2), [2, 2], m(2), [1 + k % 2, 1]
    ),
)
occurs_in(
    "SlowConvTranspose3D",
    apart=lambda m, h, k: aten.slow_conv_transpose3d(
        h.view(4, 1, 2, 2, 3), m(1, 2, 2, 1, 2), [2, 1, 2], m(2), [1 + k % 2, 1, 1]
    ),
)
along(
    "NativeBatchNormLegit",
    lambda h, d: aten._native_batch_norm_legit.no_stats(h.movedim(d, 0)[None], None, None, True, 0.1, 1e-5)[
        0
    ][0].movedim(0, d),
)
occurs_in(
    "RreluWithNoiseFunctional",
    apart=lambda m, h, k: aten.rrelu_with_noise_functional(h, torch.rand_like(h), 0.1, 0.3, True)[0],
)


# Types that only float32 has.
IN_FLOAT32 = ("MkldnnRnnLayerBackward",)


def _lstm(m: Any, x: Tensor, start: Tensor | None = None, batch_first: bool = True) -> list[Tensor]:
    """Outputs, hidden states and cells of a layer of width 3, from some hidden state or zeros."""
    h = x.new_zeros(1, x.shape[0 if batch_first else 1], 3) if start is None else start.unsqueeze(0)
    weights = [m(12, 2), m(12, 3)]
    return torch._VF.lstm(x[..., :2], (h, h.sin()), weights, False, 1, 0.0, True, False, batch_first)


occurs_in(
    "MkldnnRnnLayer",
    apart=lambda m, h, k: _lstm(m, 5 * h)[0],
    cells=lambda m, h, k: _lstm(m, h)[2].squeeze(0),
    state=lambda m, h, k: _lstm(m, h * (k % 2), h[:, 0] * k)[0],
    moved=lambda m, h, k: _lstm(m, h.transpose(0, k % 2), batch_first=k % 2 == 0)[0].transpose(0, k % 2),
    mixed=lambda m, h, k: _lstm(m, h, batch_first=False)[0],
    mixed_state=lambda m, h, k: _lstm(m, h, neighbours(h)[:, 0] * (0.7 * k))[0],
    mixed_dead=lambda m, h, k: beside(h, _lstm(m, neighbours(h) * (0.7 * k))[0]),
)


# Listed types that no program on a CPU, in float64, can have.
ELSEWHERE = {
    **dict.fromkeys(["AcoshBackward1", "AsinhBackward1", "AtanhBackward1"], "the backward pass raises"),
    **dict.fromkeys(["LinearBackward0", "MatmulBackward0"], "of nested tensors alone"),
    **dict.fromkeys(["ConvolutionBackward1", "MaxPool2DBackward0"], "of Apple's and other devices"),
    "MkldnnConvolutionBackward0": "in float32 alone",
    **({"CholeskyBackward0": "of torch.cholesky, which torch 2.14 has removed"} if NO_CHOLESKY else {}),
    "FusedRmsNormBackward0": "of CUDA",
    "FusedDropoutBackward0": "of CUDA",
    "ConvDepthwise2DBackward0": "of CUDA",
    "ConvDepthwise3DBackward0": "of CUDA",
    "ScaledDotProductEfficientAttentionBackward0": "of CUDA",
    "ScaledDotProductFlashAttentionBackward0": "of CUDA",
    "ScaledDotProductFusedAttentionOverrideableBackward0": "of other devices",
    **dict.fromkeys(
        [
            f"Cudnn{name}Backward0"
            for name in ("BatchNorm", "Convolution", "ConvolutionTranspose", "GridSampler")
        ],
        "of CUDA",
    ),
    "ScaledDotProductCudnnAttentionBackward0": "of CUDA",
}
