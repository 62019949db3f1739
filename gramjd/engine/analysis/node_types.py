"""The types of autograd's nodes that are proven independent of their data.

Which entries of an input reach which entries of an output, and so which sample's values another sample's
objectives can depend on, follows for the nodes listed here from their type, the shapes and the numbers that
they save (dimensions, starts, strides): nothing else about a step can move a value from one sample to
another. A node that is not listed (an index, a custom ``autograd.Function``, one that a newer torch brings)
may do anything: the layouts of its graph are measured in every call.

Two facts about each type:

- its **sizes**: how other sizes than those of the proof may be recognised as the same case;
- how it treats **NaN** in its backward pass: the proof (:mod:`gramjd.engine.solving.separation`) makes the
  derivatives of some samples NaN, and every entry that *could* depend on them, whatever the data are, must
  become NaN. Most nodes multiply, and NaN times zero is NaN. Where one selects by value, NaN is put wherever
  it selects from.

``tests/test_node_types.py`` has a program for each type, whose data move between steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from gramjd import internals


class Sizes(Enum):
    """The sizes of a node's inputs and outputs that decide from where its entries come."""

    ANY = auto()  # their ranks and equalities: the same picture in every size
    RESHAPE = auto()  # which dimensions are merged or split
    ALONG = auto()  # the sizes in the dimensions that it names: a slice, a concatenation
    INDEXED = auto()  # which indices count their dimension up (gramjd.engine.analysis.indexing)
    WINDOW = auto()  # those of the spatial dimensions, and of the channels where there are groups
    EXACT = auto()  # all of them


class Nan(Enum):
    """The effect of NaN in the backward pass of a node."""

    MULTIPLIED = auto()  # it reaches all that the output could depend on
    SELECTED = auto()  # entry by entry it is dropped where the data say so
    CHOSEN = auto()  # along the dimensions that the node names, the data say where it goes
    WINDOWED = auto()  # in the spatial dimensions, likewise
    WITHIN_FIRST = auto()  # in all dimensions but the first, likewise
    ANYWHERE = auto()  # in all dimensions, likewise
    INDEXED = auto()  # in the dimensions whose indices do not count them up, likewise
    CONSTANT = auto()  # there never is a derivative


@dataclass(frozen=True)
class NodeType:
    """The known facts about a type of node, and the saved numbers that belong to a signature."""

    sizes: Sizes
    nan: Nan
    attributes: tuple[str, ...] = ()
    dims: str = ""  # the attribute that names dimensions


def _names(text: str) -> Iterable[str]:
    """``"Add:01"`` means ``AddBackward0`` and ``AddBackward1``, ``"Sin"`` for ``SinBackward0``."""
    for word in text.split():
        name, _, digits = word.partition(":")
        for digit in digits or "0":
            yield f"{name}Backward{digit}"


# Each entry of the output depends on the entries of the inputs in its place, after broadcasting.
_POINTWISE = """
    Abs Acos Acosh Add:01 Addcdiv Addcmul Alias Asin Asinh Atan Atan2 Atanh Clone Complex Conj
    ConjPhysical:01 Cos Cosh Deg2Rad Digamma Div:01 Erf Erfc Erfinv Exp Exp2 Expm1 Fmod:01 Frac Hypot Ldexp
    Lerp:01 Lgamma Lift LiftFresh Log Log10 Log1P Log2 Logaddexp Logaddexp2 Mul:01 Neg NegView Polar Rad2Deg
    Reciprocal Remainder:01 Rsqrt Rsub:01 Sigmoid Silu Mish Sin Sinh Softplus Sqrt Sub:01 Tan Tanh ToCopy Gelu
    LogSigmoid NativeDropout FusedDropout Elu:01 Celu:01 LeakyRelu:01 RreluWithNoise:01
    RreluWithNoiseFunctional SigmoidBackward TanhBackward SoftplusBackward GeluBackward SoftmaxBackwardData
    LogSoftmaxBackwardData MseLoss SmoothL1Loss HuberLoss SoftMarginLoss BinaryCrossEntropy
    BinaryCrossEntropyWithLogits ViewAsReal ViewAsComplex
"""
_SELECTING = """
    Clamp:01 ClampMin:01 ClampMax:01 Fmax Fmin Maximum Minimum Hardshrink Softshrink Hardsigmoid Hardswish
    Hardtanh Logit MaskedFill:01 Pow:012 PreluKernel Relu Sgn Sinc Threshold:01 Where Xlogy:012 NanToNum
    ThresholdBackward
"""
_CONSTANT = "Ceil Fill:0123 Floor Round:01 Sign Trunc Zero"
# Sums of products over whole dimensions.
_PRODUCTS = """
    Addbmm Addmm Addmv Addr Baddbmm Bmm Dot Linear LinalgCross Matmul Mm Mv Vdot WeightNormInterface
"""
# An LSTM's layer over inputs [T, B, features]: products and pointwise ops, one step of time after the other.
_RECURRENT = "MkldnnRnnLayer"
# Whole dimensions are reduced, normalised or transformed together.
_TOGETHER = """
    Sum:01 Mean:01 Logsumexp Cumsum Softmax LogSoftmax SafeSoftmax NativeLayerNorm FusedRmsNorm
    NativeBatchNorm NativeBatchNormLegit:01 NativeBatchNormLegitNoTraining CudnnBatchNorm FftR2C FftC2R FftC2C
"""
# The same where equal or zero entries drop derivatives, or where the data choose along a dimension.
_CHOOSING = """
    Max Min Amax Amin Kthvalue Median:1 Nanmedian:1 Mode Cummax Cummin Sort:01 Topk Gather IndexSelect
    Prod:01 Scatter:01 ScatterAdd IndexAdd IndexCopy IndexFill:01 Norm:13 LinalgVectorNorm Std Var StdMean
    VarMean
"""
_CHOOSING_ANYWHERE = "Max:1 Min:1 Median Nanmedian Norm:02 Embedding Take"
# Dimensions change their order or number; entries stay whole.
_TRANSPOSING = "Expand Flip Permute Squeeze:012345 T Transpose:01 Unsqueeze:01"
_RESHAPING = "View UnsafeView ReshapeAlias ReshapeCopy"
_MOVING = """
    Cat Glu NarrowCopy Roll Select Slice Split SplitWithSizes Stack Unbind UnsafeSplit UnsafeSplitWithSizes
"""
_EXACT = """
    ChannelShuffle Col2Im ConstantPadNd DiagEmbed Diagonal Im2Col NativeGroupNorm PixelShuffle PixelUnshuffle
    Repeat Rot90 SelectScatter SliceScatter Tril Triu Unfold
"""
_WINDOWS = """
    AdaptiveAvgPool2D AdaptiveAvgPool3D AvgPool2D AvgPool3D ConvDepthwise2D
    ConvDepthwise3D Convolution:01 CudnnConvolution CudnnConvolutionTranspose MkldnnConvolution
    ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D
    SlowConv2D SlowConv3D SlowConvDilated2D SlowConvDilated3D SlowConvTranspose2D SlowConvTranspose3D
    UpsampleBicubic2D UpsampleBicubic2DAa UpsampleBilinear2D UpsampleBilinear2DAa UpsampleLinear1D
    UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D
    UpsampleNearestExact2D UpsampleNearestExact3D UpsampleTrilinear3D
"""
_MAX_WINDOWS = """
    AdaptiveMaxPool2D AdaptiveMaxPool3D FractionalMaxPool2D FractionalMaxPool3D MaxPool2D MaxPool2DWithIndices
    MaxPool3DWithIndices
"""
# Inputs [N, ...] of which each entry of dimension 0 is by itself; attention kernels skip what a mask hides.
_SEPARATE_FIRST = """
    AffineGridGenerator GridSampler2D GridSampler3D CudnnGridSampler ScaledDotProductFlashAttentionForCpu
    ScaledDotProductEfficientAttention ScaledDotProductFlashAttention ScaledDotProductCudnnAttention
    ScaledDotProductFusedAttentionOverrideable
"""
_CLASSES = "NllLoss NllLoss2D"  # choose along the dimension of the classes

_GROUPS: tuple[tuple[str, Sizes, Nan], ...] = (
    (_POINTWISE, Sizes.ANY, Nan.MULTIPLIED),
    (_SELECTING, Sizes.ANY, Nan.SELECTED),
    (_CONSTANT, Sizes.ANY, Nan.CONSTANT),
    (_PRODUCTS, Sizes.ANY, Nan.MULTIPLIED),
    (_RECURRENT, Sizes.ANY, Nan.MULTIPLIED),
    (_TOGETHER, Sizes.ANY, Nan.MULTIPLIED),
    (_CHOOSING, Sizes.ANY, Nan.CHOSEN),
    (_CHOOSING_ANYWHERE, Sizes.ANY, Nan.ANYWHERE),
    (_CLASSES, Sizes.ANY, Nan.CHOSEN),
    (_TRANSPOSING, Sizes.ANY, Nan.MULTIPLIED),
    (_RESHAPING, Sizes.RESHAPE, Nan.MULTIPLIED),
    (_MOVING, Sizes.ALONG, Nan.MULTIPLIED),
    (_EXACT, Sizes.EXACT, Nan.MULTIPLIED),
    (_WINDOWS, Sizes.WINDOW, Nan.MULTIPLIED),
    (_MAX_WINDOWS, Sizes.WINDOW, Nan.WINDOWED),
    (_SEPARATE_FIRST, Sizes.ANY, Nan.WITHIN_FIRST),
    ("Index", Sizes.INDEXED, Nan.INDEXED),
)

PROVEN = {name: (sizes, nan) for text, sizes, nan in _GROUPS for name in _names(text)}
PROVEN["CopyBackwards"] = (Sizes.ANY, Nan.MULTIPLIED)  # of Tensor.copy_

# Functions of torch's own that are the identity.
_IDENTITIES = ("_DDPSinkBackward", "RegisterPostBackwardFunctionBackward")

# Numbers that scale derivatives (the proof covers a scale of zero), or that the shapes tell, too.
_SCALES = """
    alpha beta delta divisor_override dropout_p eps epsilon exponent input_scale lambd lower max max_val
    maxnorm min min_val negative_slope ord other p rounding_mode scale self threshold train upper value weight
"""
_SHAPES = """
    C HxW N batch1_sym_argsize_0 batch1_sym_argsize_1 batch2_sym_argsize_2 bias_sym_sizes_opt input_sym_sizes
    mat1_layout mat1_sym_sizes mat1_sym_strides mat2_layout mat2_sym_sizes mat2_sym_strides max_k max_q
    other_scalar_type self_layout self_options self_scalar_type self_sym_argsize_minus_1
    self_sym_argsize_minus_2 self_sym_numel self_sym_sizes self_sym_strides weight_sym_argsize_0
"""
_HARMLESS = frozenset([*_SCALES.split(), *_SHAPES.split(), "retain_variables"])

_DIMS = ("dim", "dims", "dimension")


@functools.lru_cache(maxsize=1024)
def facts_of(kind: Any) -> NodeType | None:
    """Look up the facts about a type of node; ``None`` for one that is not listed."""
    name = internals.name_of_type(kind)
    if name in _IDENTITIES and internals.is_torchs_own(kind):
        return NodeType(Sizes.ANY, Nan.MULTIPLIED)
    if name not in PROVEN:
        return None
    numbers = internals.saved_numbers(kind)
    attributes = tuple([shown for name, shown in numbers.items() if name not in _HARMLESS])
    dims = next((numbers[d] for d in _DIMS if d in numbers), "")
    return NodeType(*PROVEN[name], attributes, dims)


def dims_of(kind: Any, named: Any, rank: int) -> tuple[int, ...]:
    """The dimensions that a node of a type names, of a tensor of this rank; all, where it names none."""
    if internals.name_of_type(kind).startswith("NllLoss"):
        return (1,) if rank > 1 else (0,)
    if named is None or named == ():
        return tuple(range(rank))
    dims = map(_signed, [named] if isinstance(named, int) else named)
    return tuple([d % rank if rank else 0 for d in dims])


def _signed(dim: int) -> int:
    """A dimension as it was given: torch saves unsigned numbers, -1 as 2**64 - 1."""
    return dim - 2**64 if dim >= 2**63 else dim


def first_spatial(kind: type, rank: int) -> int:
    """The first of the spatial dimensions of a node's inputs, after samples and channels."""
    name = internals.name_of_type(kind)
    return next((rank - n for n in (1, 2, 3) if f"{n}D" in name), 2)
