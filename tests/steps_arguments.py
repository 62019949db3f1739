"""Families in which numbers that are no tensors change: dimensions, offsets, strides, orders, sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exactness import Net, draw
from steps import At, family
from torch import Tensor, nn

# Samples are in the dimension that stays: of [4, 4, features], either one.
DIMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sum": lambda h, d: h.sum(d),
    "mean": lambda h, d: h.mean(d),
    "nansum": lambda h, d: h.nansum(d),
    "amax": lambda h, d: h.amax(d),
    "max": lambda h, d: h.max(d)[0],
    "min": lambda h, d: h.min(d)[0],
    "median": lambda h, d: h.median(d)[0],
    "kthvalue": lambda h, d: h.kthvalue(2, d)[0],
    "mode": lambda h, d: h.mode(d)[0],
    "prod": lambda h, d: h.prod(d),
    "logsumexp": lambda h, d: h.logsumexp(d),
    "std": lambda h, d: h.std(d),
    "var": lambda h, d: h.var(d),
    "norm": lambda h, d: h.norm(dim=d),
    "norm of order 3": lambda h, d: torch.linalg.vector_norm(h, 3, d),
    "quantile": lambda h, d: h.quantile(0.3, d),
    "select": lambda h, d: h.select(d, 1) + h.select(d, 3),
    "narrow": lambda h, d: h.narrow(d, 1, 2).sum(d),
    "unbind": lambda h, d: torch.stack(h.unbind(d)).sum(0),
    "chunk": lambda h, d: sum(h.chunk(2, d)).sum(d),  # type: ignore[attr-defined]
    "softmax": lambda h, d: h.softmax(d).square().sum(d),
    "log_softmax": lambda h, d: h.log_softmax(d).square().sum(d),
    "glu": lambda h, d: F.glu(h, d).sum(d),
    "cumsum": lambda h, d: h.cumsum(d).square().sum(d),
    "cumprod": lambda h, d: h.cumprod(d).sum(d),
    "cummax": lambda h, d: h.cummax(d)[0].square().sum(d),
    "logcumsumexp": lambda h, d: h.logcumsumexp(d).square().sum(d),
    "sort": lambda h, d: (h.sort(d)[0] * torch.arange(4.0).view(4 - 3 * d, 1 + 3 * d, 1)).sum(d),
    "topk": lambda h, d: h.topk(2, d)[0].sum(d),
    "flip": lambda h, d: (h * h.flip(d)).sum(d),
    "roll": lambda h, d: (h * h.roll(1, d)).sum(d),
    "diff": lambda h, d: h.diff(dim=d).square().sum(d),
    "trapezoid": lambda h, d: torch.trapezoid(h, dim=d),
    "unfold": lambda h, d: h.unfold(d, 2, 1).prod(-1).sum(d),
    "fft": lambda h, d: torch.fft.rfft(h, dim=d).abs().sum(d),
    "renorm": lambda h, d: h.renorm(2, 1 - d, 0.5).square().sum(d),
    "normalize": lambda h, d: (F.normalize(h, dim=d) ** 3).sum(d),
    "cosine similarity": lambda h, d: F.cosine_similarity(h, h.flip(2), dim=d),
    "index_select": lambda h, d: h.index_select(d, torch.tensor([2, 0])).prod(d),
    "gather": lambda h, d: h.gather(d, torch.zeros(4, 4, 3).long()).mean(d) + h.mean(d),
    "squeeze": lambda h, d: h.sum(d, keepdim=True).squeeze(d),
    "transpose": lambda h, d: h.transpose(0, d).sum(1),
    "movedim": lambda h, d: h.movedim(d, 0).sum(0),
    "permute": lambda h, d: h.permute(1 - d, d, 2).sum(1),
    "swapaxes of a view": lambda h, d: h.flatten(0, 1).view(4, 4, 3).transpose(d, 0).sum(1),
    "einsum": lambda h, d: torch.einsum(("bte->be", "tbe->be")[1 - d], h),
    "einsum of two": lambda h, d: torch.einsum(("tbe,tbe->b", "bte,bte->b")[d], h, h.cos())[:, None],
    "tensordot": lambda h, d: torch.tensordot(h, torch.linspace(0.1, 1, 4).double(), ([d], [0])),
    "matmul": lambda h, d: h.transpose(0, d) @ torch.ones(3, 2).double(),
    "stack": lambda h, d: torch.stack([h[:, 0], h[:, 1]], d).sum(d)[:, :3],
    "diagonal": lambda h, d: (h @ torch.ones(3, 4).double()).diagonal(0, d, 2),
    "repeat": lambda h, d: h.repeat(1, 1, 2).sum(d),
    "layer norm": lambda h, d: F.layer_norm(h.transpose(0, d), [4, 3]).square().sum(1) ** 2,
    "flattened": lambda h, d: h.transpose(0, d).flatten(1).unsqueeze(1).cos(),
}


def _along(function: Callable[[Tensor, int], Tensor]) -> tuple[nn.Module, At]:
    net = Net(lambda m, x, d: function(m.first(x).sin() + 1.5, d).flatten(1), first=nn.Linear(2, 3))
    return net, lambda d: net(draw(4, 4, 2), d).square().sum(1)


for _name, _function in DIMS.items():
    family(1, 0, 1, 0, name=f"another dimension of {_name}")(lambda f=_function: _along(f))


def rows(function: Callable[[Any, Tensor, Any], Tensor], count: int = 12) -> tuple[nn.Module, At]:
    """``function(module, h, setting)`` of ``count`` rows, and a layer behind it; losses per row."""
    net = Net(lambda m, x, s: m.last(function(m, m.first(x).tanh(), s)),
              first=nn.Linear(3, 4), last=nn.Linear(4, 2))  # fmt: skip
    return net, lambda s: net(draw(count, 3), s).square().flatten(1).sum(1)


# Functions of 12 rows and a setting to four rows; each row is used by one of them at most, where not said.
ROWS: dict[str, tuple[Callable[[Any, Tensor, Any], Tensor], tuple[Any, ...]]] = {
    "start of a slice": (lambda m, h, s: h[s : s + 4], (0, 4, 8, 3, 5, 0)),
    "offset of a slice": (lambda m, h, s: h[s::3], (0, 1, 2, 0)),
    "stride of a slice": (lambda m, h, s: h[::s][:4], (1, 2, 3, 1)),
    "start of narrow": (lambda m, h, s: h.narrow(0, s, 4), (0, 4, 6, 1, 8)),
    "numbers of select": (lambda m, h, s: torch.stack([h[k] for k in s]),
                          ([0, 1, 2, 3], [3, 1, 0, 2], [0, 3, 6, 9], [11, 2, 5, 8])),
    "one number of select": (lambda m, h, s: h.view(3, 4, 4)[s], (0, 1, 2, 0)),
    "one number of select, strided": (lambda m, h, s: h.view(4, 3, 4)[:, s], (0, 1, 2, 0)),
    "views, then a sum": (lambda m, h, s: h.view(*s).sum(s.index(3)),
                          ((4, 3, 4), (3, 4, 4), (4, 3, 4), (3, 4, 4))),
    "shift": (lambda m, h, s: h.roll(s, 0)[::3], (0, 1, 2, 3, -1)),
    "shift there and back": (lambda m, h, s: m.last(h.roll(s, 0).view(4, 3, 4).tanh())[:, :, :1].flatten(0, 1)
                             .roll(-s, 0).view(4, 3, 1).expand(4, 3, 4).mean(1), (0, 3, 6, 9, -3)),
    "offset of as_strided": (lambda m, h, s: h.contiguous().as_strided((4, 4), (4, 1), 4 * s),
                             (0, 4, 8, 2, 5)),
    "strides of as_strided": (lambda m, h, s: h.contiguous().as_strided((4, 4), (4 * s, 1)), (1, 2, 3, 1)),
    "axes of as_strided": (lambda m, h, s: h.contiguous().as_strided((4, 3, 4), s).sum(1),
                           ((12, 4, 1), (4, 16, 1), (12, 4, 1), (4, 16, 1))),
    "step of unfold": (lambda m, h, s: h.unfold(0, 1, s)[:4, :, 0], (1, 2, 3, 1)),
    "padding": (lambda m, h, s: F.pad(h, (0, 0, s, 8 - s)).view(5, 4, 4)[:4].sum(1), (0, 4, 8, 1, 3, 8)),
    "padding that crops": (lambda m, h, s: F.pad(h, (0, 0, -s, s - 8)), (0, 4, 8, 1, 3)),
    "flip of rows or features": (lambda m, h, s: h.flip(s)[::3], (0, 1, 0, 1)),
    "order of cat": (lambda m, h, s: torch.cat([h[k : k + 2] for k in s]), ((0, 2), (2, 0), (4, 8), (9, 1))),
    "order of split": (lambda m, h, s: h.split(4)[s], (0, 1, 2, 0)),
    "order of unbind": (lambda m, h, s: torch.stack([h.unbind()[k] for k in s]),
                        ((0, 1, 2, 3), (2, 3, 0, 1), (8, 6, 7, 2), (0, 1, 2, 3))),
    "sizes of split": (lambda m, h, s: torch.stack([piece.sum(0) for piece in h.split(list(s))]),
                       ((3, 3, 3, 3), (1, 5, 2, 4), (3, 3, 3, 3), (6, 2, 2, 2), (1, 1, 1, 9))),
    "repeat and repeat_interleave": (lambda m, h, s: _repeated(h, s), (0, 1, 0, 1)),
    "tile of a permutation": (lambda m, h, s: h.view(2, 6, 4).permute(*s).reshape(4, 3, 4).sum(1),
                              ((0, 1, 2), (0, 1, 2), (1, 0, 2), (0, 1, 2), (1, 0, 2))),
    "writes by number": (lambda m, h, s: _written(h, s),
                         ((0, 1, 2, 3), (3, 2, 1, 0), (1, 2, 3, 0), (0, 1, 2, 3))),
    "writes of slices": (lambda m, h, s: _written_slices(h, s), (0, 1, 2, 0)),
    "sums in place by number": (lambda m, h, s: _added(h, s),
                                ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (0, 1, 2, 3))),
    "select_scatter": (lambda m, h, s: torch.select_scatter(h[:4] * 0.0 + h[4:8], h[s], 0, s), (0, 1, 2, 3)),
    "slice_scatter": (lambda m, h, s: torch.slice_scatter(h[8:], h[s : s + 2], 0, s, s + 2), (0, 1, 2, 0)),
    "diagonal offsets": (lambda m, h, s: (h[:4] @ torch.ones(4, 8).double()).diagonal(s)[:, None]
                         .repeat(1, 4), (0, 1, 2, 4, 3)),
    "pieces of a permuted view": (lambda m, h, s: h.view(3, 2, 2, 4).permute(s).reshape(4, 3, 4).mean(1),
                                  ((1, 2, 0, 3), (2, 1, 0, 3), (1, 2, 0, 3), (2, 1, 0, 3))),
}  # fmt: skip


def _repeated(h: Tensor, interleaved: int) -> Tensor:
    """Four rows in three copies each, then back."""
    if interleaved:
        return h[:4].repeat_interleave(3, 0).sin().view(4, 3, 4).sum(1)
    return h[:4].repeat(3, 1).sin().view(3, 4, 4).sum(0)


def _written(h: Tensor, order: tuple[int, ...]) -> Tensor:
    out = torch.zeros(4, 4).double()
    for i, k in enumerate(order):
        out[i] = h[k]
    return out


def _written_slices(h: Tensor, start: int) -> Tensor:
    out = torch.zeros(8, 4).double()
    out[2 * start : 2 * start + 4] = h[:4]
    return out.view(2, 4, 4).sum(0)


def _added(h: Tensor, order: tuple[int, ...]) -> Tensor:
    out = h[8:].clone()
    for i, k in enumerate(order):
        out[i] += h[k]
    return out


for _name, (_rows, _settings) in ROWS.items():
    family(*_settings, name=f"another {_name}")(lambda f=_rows: rows(f))


@family(0, 1, 0, 2, 0, mixed=lambda k: k > 0, why="a band of an attention matrix across samples")
def tril_and_triu_of_attention_across_samples() -> tuple[nn.Module, At]:
    return rows(lambda m, h, k: (h @ h.T).tril(k).triu(-k) @ h, 4)


@family(3, 2, 3, 2, mixed=lambda step: step == 2, why="windows overlap")
def windows_over_flattened_samples() -> tuple[nn.Module, At]:
    return rows(lambda m, h, step: h.unfold(0, 3, step)[:4].sum(2), 12)


@family((3, 0, 1), (3, 1, 1), (3, 0, 1), (2, 0, 1), (3, 1, 1), (3, 1, 2),
        mixed=lambda s: s[0] < 3 or s[2] > 1, why="the windows of the convolution overlap")  # fmt: skip
def convolution_over_flattened_samples() -> tuple[nn.Module, At]:
    """``[1, C, B * L]`` with a stride as long as a sample; padding moves the windows."""
    net = Net(lambda m, x, s: F.conv1d(m.first(x).sin().T[None], m.kernel, None, s[0], s[1], s[2])[0].T[:4],
              first=nn.Linear(2, 3), kernel=nn.Parameter(torch.randn(5, 3, 3)))  # fmt: skip

    def at(s: tuple[int, int, int]) -> Tensor:
        return net(draw(12, 2), s).square().sum(1)

    return net, at


@family(3, 2, 3, 2, mixed=lambda stride: stride == 2, why="the windows of the pool overlap")
def pooling_over_flattened_samples() -> tuple[nn.Module, At]:
    return rows(lambda m, h, stride: F.avg_pool1d(h.T[None], 3, stride)[0].T[:4], 12)


@family(3, 2, 3, 2, mixed=lambda stride: stride == 2, why="the windows of the pool overlap")
def max_pooling_over_flattened_samples() -> tuple[nn.Module, At]:
    return rows(lambda m, h, stride: F.max_pool1d(h.T[None], 3, stride)[0].T[:4], 12)


@family(4, 12, 4, 2, 12, 1, mixed=lambda groups: groups < 4, why="a group holds two samples or more")
def group_norm_with_samples_in_channels() -> tuple[nn.Module, At]:
    net = Net(lambda m, x, g: F.group_norm(m.first(x).reshape(1, 12, 4), g).view(4, 3, 4),
              first=nn.Linear(2, 4))  # fmt: skip
    return net, lambda g: (net(draw(4, 3, 2), g) ** 3).sum((1, 2))


@family((0, 1), (0, 1), (1, 0), (0, 1), (1, 0))
def grouped_convolution_with_samples_in_channels() -> tuple[nn.Module, At]:
    """Kernels modulated by each sample, as in StyleGAN; three samples of three channels, in either order."""

    def forward(m: Any, x: Tensor, style: Tensor, order: tuple[int, int]) -> Tensor:
        h = m.first(x).permute(*order, 2).reshape(1, 9, 5)
        scales = m.style(style)[:, None, :, None] if order == (0, 1) else m.style(style).T[:, None, :, None]
        kernels = (m.kernel * scales).flatten(0, 1)
        return F.conv1d(h, kernels, groups=3).view(3, 2, 3).permute(*order, 2).sum(2 - order[0] - order[1])

    net = Net(
        forward, first=nn.Linear(2, 5), style=nn.Linear(4, 3), kernel=nn.Parameter(torch.randn(2, 3, 3))
    )
    return net, lambda order: net(draw(3, 3, 2), draw(3, 4), order).square().sum(1)


@family((3, 4), (4, 3), (3, 4), (6, 2), (4, 3), (2, 6), (12, 1))
def views_of_tokens_as_other_samples() -> tuple[nn.Module, At]:
    """``[12, d]`` are so many samples of so many tokens."""
    net = Net(
        lambda m, x, s: m.last(m.first(x).tanh()).view(*s, 2), first=nn.Linear(3, 4), last=nn.Linear(4, 2)
    )
    return net, lambda s: net(draw(12, 3), s).square().sum((1, 2))


@family((4, 0), (3, 1), (4, 1), (4, 0), (2, 1), (4, 1))
def a_reshape_that_means_other_samples_at_another_batch() -> tuple[nn.Module, At]:
    """``[-1, 4]`` is a row for each sample, ``[4, -1]`` a column; at a batch of four both are equal views."""
    net = Net(lambda m, x: m.first(x).tanh(), first=nn.Linear(3, 4))

    def at(setting: tuple[int, int]) -> Tensor:
        batch, columns = setting
        h = net(draw(batch * 4, 3)).square().sum(1)
        return h.view(4, -1).sum(0) if columns else h.view(-1, 4).sum(1)

    return net, at


@family(4, 3, 2, 4, 6, 1, 4)
def twins_concatenated_by_a_constant() -> tuple[nn.Module, At]:
    """Pairs in two halves, ``[2, B]``, whatever the batch: two of two, two of four."""
    net = Net(lambda m, x: m.last(m.first(x).tanh()), first=nn.Linear(3, 4), last=nn.Linear(4, 2))

    def at(batch: int) -> Tensor:
        a, b = net(torch.cat([draw(batch, 3), draw(batch, 3)])).view(2, -1, 2)
        return (a - b).square().sum(1)

    return net, at


@family((4, True), (4, False), (4, True), (3, False), (4, False), (3, True))
def tokens_of_samples_or_samples_of_tokens() -> tuple[nn.Module, At]:
    """A view of ``[B * T]`` as ``[B, T]`` or ``[T, B]``, reduced over time."""
    net = Net(lambda m, x: m.last(m.first(x).tanh()), first=nn.Linear(3, 4), last=nn.Linear(4, 2))

    def at(setting: tuple[int, bool]) -> Tensor:
        batch, first = setting
        h = net(draw(batch * 4, 3))
        return h.view(batch, 4, 2).square().sum((1, 2)) if first else h.view(4, batch, 2).square().sum((0, 2))

    return net, at


@family(2, 3, 4, 3, 5, 2, 1, 4)
def transformer_whose_batch_meets_its_other_sizes() -> tuple[nn.Module, At]:
    """Two heads, four tokens, three features a head: the batch has each of these sizes once."""

    def forward(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = m.qkv(x).view(b, t, 3, 2, 3).permute(2, 3, 0, 1, 4)
        h = ((q @ k.mT).softmax(-1) @ v).permute(1, 2, 0, 3).reshape(b, t, 6)
        return m.out((x + h).flatten(0, 1)).view(b, t, 2)

    net = Net(forward, qkv=nn.Linear(6, 18), out=nn.Linear(6, 2))
    return net, lambda batch: net(draw(batch, 4, 6)).square().sum((1, 2))


@family((4, 3), (4, 4), (3, 4), (4, 4), (2, 4), (1, 4), (4, 1))
def recurrent_network_whose_batch_meets_its_length() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.out(m.unit(x)[0]), unit=nn.LSTM(3, 4), out=nn.Linear(4, 2))
    return net, lambda s: net(draw(*s, 3)).square().sum((0, 2))


@family(True, False, True, False)
def recurrent_network_by_time_or_by_batch() -> tuple[nn.Module, At]:
    """Square ``[4, 4, d]``; ``batch_first`` changes."""
    net = Net(lambda m, x: m.unit(x)[0], unit=nn.GRU(3, 4))

    def at(batch_first: bool) -> Tensor:
        net.unit.batch_first = batch_first
        return net(draw(4, 4, 3)).square().sum((1 if batch_first else 0, 2))

    return net, at


@family(8, 8, 5, 8, 1, 3)
def last_batch_is_smaller() -> tuple[nn.Module, At]:
    body = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 8), nn.Tanh()
    )
    net = Net(lambda m, x: m.head(m.body(x)), body=body, head=nn.Linear(8, 3))
    return net, lambda batch: F.cross_entropy(
        net(draw(batch, 2, 3, 3)), torch.randint(3, [batch]), reduction="none"
    )


@family(False, True, False, True)
def ops_in_another_order() -> tuple[nn.Module, At]:
    """The graph is the same; the forward ran its two halves the other way round."""

    def forward(m: Any, x: Tensor, flip: bool) -> Tensor:
        t = x.transpose(0, 1)
        if flip:
            b, a = t @ m.w, x @ m.w
        else:
            a, b = x @ m.w, t @ m.w
        return (a.tanh() + b.transpose(0, 1).sin()).square().mean((1, 2))

    net = Net(forward, w=nn.Parameter(torch.randn(3, 3)))
    return net, lambda flip: net(draw(4, 4, 3), flip)


@family([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 1, 2])
def branches_in_another_order() -> tuple[nn.Module, At]:
    """Three towers over three layouts of one batch."""

    def forward(m: Any, x: Tensor, order: list[int]) -> Tensor:
        given = [x, x.transpose(0, 1), x.flatten(0, 1)]
        back = [lambda h: h, lambda h: h.transpose(0, 1), lambda h: h.view(4, 4, 3)]
        out = {k: m.w(given[k]) for k in order}
        return sum((k + 1) * back[k](out[k].sin()) for k in range(3)).sum((1, 2))  # type: ignore[union-attr]

    net = Net(forward, w=nn.Linear(3, 3))
    return net, lambda order: net(draw(4, 4, 3), order)


@family([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [0, 1, 2, 3])
def samples_one_by_one_in_another_order() -> tuple[nn.Module, At]:
    def forward(m: Any, x: Tensor, order: list[int]) -> Tensor:
        found = {k: m.f(x[k]).square().sum() for k in order}
        return torch.stack([found[k] for k in range(4)])

    net = Net(forward, f=nn.Linear(3, 2))
    return net, lambda order: net(draw(4, 3), order)


@family([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [0, 1, 2, 3])
def losses_in_another_order() -> tuple[nn.Module, At]:
    """``cat`` of what each sample lost, in any order."""
    net = Net(lambda m, x: m.f(x).square().sum(1), f=nn.Linear(3, 2))
    return net, lambda order: torch.cat([net(draw(4, 3)).split(1)[k] for k in order])


@family(1, 2, 4, 3, 1)
def a_loop_of_another_length() -> tuple[nn.Module, At]:
    def forward(m: Any, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = m.cell(x, x.sin())
        return x

    net = Net(forward, cell=nn.GRUCell(4, 4))
    return net, lambda times: net(draw(4, 4), times).square().sum(1)


@family(("ij,kj->ik", 0), ("ij,kj->ik", 1), ("ij,kj->ik", 0), ("ij,jk->ik", 1), ("ji,jk->ki", 1))
def equations_of_square_matrices() -> tuple[nn.Module, At]:
    """Rows of the activation are the samples or its columns are."""

    def forward(m: Any, x: Tensor, equation: str, transposed: int) -> Tensor:
        a = m.first(x)
        a = a.T if transposed and equation.startswith("ji") else a
        return (
            torch.einsum(equation, a, m.w)
            if not equation.startswith("ji")
            else torch.einsum(equation, a, m.w).T
        )

    net = Net(forward, first=nn.Linear(4, 4), w=nn.Parameter(torch.randn(4, 4)))
    return net, lambda s: net(draw(4, 4), *s).sin().sum(1)
