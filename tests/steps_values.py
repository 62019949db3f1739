"""Families in which tensors of integers and booleans, or values compared, say where samples go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exactness import Net, draw, parameter
from steps import At, family
from steps_arguments import rows
from torch import Tensor, nn

IDENTITY, SHIFTED, SWAPPED, SHUFFLED = [0, 1, 2, 3], [1, 2, 3, 0], [1, 0, 3, 2], [2, 0, 3, 1]
ORDERS = IDENTITY, SHIFTED, IDENTITY, SWAPPED, SHUFFLED
T = torch.tensor


def wide(index: Any, features: int = 4) -> Tensor:
    return T(index)[:, None].expand(-1, features)


def _filled(h: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    out = torch.zeros_like(h)
    write(out)
    return out


# Functions of 4 rows and a permutation: each of their rows is one of these.
MOVES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "index": lambda h, s: h[s],
    "index by tensor": lambda h, s: h[T(s)],
    "index by two tensors": lambda h, s: h[T(s)[:, None], torch.arange(4)],
    "index_select": lambda h, s: h.index_select(0, T(s)),
    "gather": lambda h, s: h.gather(0, wide(s)),
    "take_along_dim": lambda h, s: torch.take_along_dim(h, wide(s), 0),
    "take": lambda h, s: h.take(T(s)[:, None] * 4 + torch.arange(4)),
    "scatter": lambda h, s: torch.zeros_like(h).scatter(0, wide(s), h),
    "scatter_add": lambda h, s: h.cos().scatter_add(0, wide(IDENTITY), h.gather(0, wide(IDENTITY)))[T(s)],
    "scatter_reduce": lambda h, s: (torch.zeros_like(h) - 9).scatter_reduce(0, wide(s), h, "amax"),
    "index_copy": lambda h, s: torch.zeros_like(h).index_copy(0, T(s), h),
    "index_put": lambda h, s: torch.zeros_like(h).index_put((T(s),), h),
    "index_fill": lambda h, s: h[T(s)].index_fill(0, T(s[:1]), 0.3),
    "put": lambda h, s: torch.zeros_like(h).put(T(s)[:, None] * 4 + torch.arange(4), h),
    "setitem": lambda h, s: _filled(h, lambda out: out.__setitem__(T(s), h)),
    "setitem by numbers": lambda h, s: _filled(
        h, lambda out: [out.__setitem__(i, h[k]) for i, k in enumerate(s)]
    ),
    "embedding of activations": lambda h, s: F.embedding(T(s), h),
    "embedding_bag of activations": lambda h, s: F.embedding_bag(T(s)[:, None], h, mode="mean"),
    "a permutation matrix": lambda h, s: torch.eye(4).double()[s] @ h,
    "a sparse permutation matrix": lambda h, s: torch.sparse.mm(torch.eye(4).double()[s].to_sparse(), h),
    "einsum with one-hot": lambda h, s: torch.einsum("ij,jd->id", F.one_hot(T(s), 4).double(), h),
    "sorted by keys": lambda h, s: h[T(s).argsort()],
    "masks one by one": lambda h, s: torch.cat([h[torch.arange(4) == k] for k in s]),
    "masked_select": lambda h, s: torch.cat(
        [h.masked_select((torch.arange(4) == k)[:, None]) for k in s]
    ).view(4, 4),
    "masked_scatter": lambda h, s: torch.stack(
        [torch.zeros(4).double().masked_scatter(torch.ones(4).bool(), h[k]) for k in s]
    ),
    "masks of where": lambda h, s: sum(  # type: ignore[return-value]
        torch.where((T(s) == k)[:, None], h[k], 0.0) for k in range(4)
    ),
    "masked_fill": lambda h, s: sum(  # type: ignore[return-value]
        h[k].expand(4, 4).masked_fill((T(s) != k)[:, None], 0.0) for k in range(4)
    ),
    "hard attention": lambda h, s: (
        (torch.zeros(4, 4).double().masked_fill(F.one_hot(T(s), 4) == 0, -torch.inf)).softmax(1) @ h
    ),
    "grid_sample": lambda h, s: (
        F.grid_sample(
            h.T.reshape(1, 4, 1, 4),
            torch.stack([(T(s) * 2 + 1) / 4 - 1, torch.zeros(4)], 1).double().view(1, 1, 4, 2),
            align_corners=False,
        )[0, :, 0].T
    ),
    "a fixed attention mask": lambda h, s: F.scaled_dot_product_attention(
        h[None], h[None], h[None], attn_mask=F.one_hot(T(s), 4).bool()[None]
    )[0],
    "max_unpool": lambda h, s: F.max_unpool1d(h.T[None], T(s).expand(1, 4, 4), 1)[0].T,
}
for _name, _move in MOVES.items():
    _why = "attention inside a mask still compares queries and keys of two samples"
    family(
        *ORDERS,
        name=f"samples permuted, {_name}",
        mixed=(lambda s: s != IDENTITY) if _name == "a fixed attention mask" else (lambda s: False),
        why=_why if _name == "a fixed attention mask" else "",
    )(lambda f=_move: rows(lambda m, h, s: f(h, s), 4))


@family(*ORDERS)
def permuted_and_put_back() -> tuple[nn.Module, At]:
    """A layer on samples in another order, as after sorting by length."""
    return rows(lambda m, h, s: m.last(h[T(s)])[T(s).argsort()].repeat(1, 2).sin(), 4)


@family(
    *ORDERS, [0, 0, 1, 1], [3, 3, 3, 3], mixed=lambda s: s != IDENTITY, why="a sample is added to another"
)
def neighbours_added() -> tuple[nn.Module, At]:
    return rows(lambda m, h, s: h + h[T(s)], 4)


@family(*ORDERS, mixed=lambda s: s != IDENTITY, why="targets name another sample's score")
def targets_that_pick_samples() -> tuple[nn.Module, At]:
    """``nll_loss(h @ h.T, t)``."""
    net = Net(lambda m, x: m.f(x).tanh(), f=nn.Linear(3, 4))

    def at(s: list[int]) -> Tensor:
        h = net(draw(4, 3))
        return F.nll_loss(h @ h.T, T(s), reduction="none")

    return net, at


@family(*ORDERS)
def targets_that_pick_permuted_samples() -> tuple[nn.Module, At]:
    """Scores of every sample for every slot; the loss of a slot picks one sample's."""
    net = Net(lambda m, x: m.f(x).tanh(), f=nn.Linear(3, 4))
    return net, lambda s: F.nll_loss(net(draw(4, 3)).T, T(s), reduction="none")


@family(*ORDERS)
def cross_entropy_of_ordinary_targets() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.f(x), f=nn.Linear(3, 4))
    return net, lambda s: F.cross_entropy(net(draw(4, 3)), T(s), reduction="none", ignore_index=2)


@family(*ORDERS, mixed=lambda s: s != IDENTITY, why="pairs compare two samples")
def pairs_of_a_ranking_loss() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.f(x)[:, 0], f=nn.Linear(3, 1))

    def at(s: list[int]) -> Tensor:
        scores = net(draw(4, 3))
        return F.softplus(scores[T(s)] + scores)

    return net, at


@family(*ORDERS)
def codebooks_by_nearest_entry() -> tuple[nn.Module, At]:
    """Vector quantisation: a code of the table for each sample, by distance."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        return (h - m.codes[torch.cdist(h, m.codes).argmin(1)]).square().sum(1)

    net = Net(forward, f=nn.Linear(3, 4), codes=parameter(5, 4))
    return net, lambda s: net(draw(4, 3)[T(s)])


# Each gives rows (or entries) of samples in an order that values decide.
CHOICES: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda u: u.sort()[0],
    "argsort": lambda u: u[u.argsort()],
    "topk": lambda u: u.topk(3)[0],
    "max, median and min": lambda u: torch.stack([u.max(), u.median(), u.min()]),
    "max of pieces": lambda u: u.view(2, 2).max(0)[0],
    "amax of pieces": lambda u: u.view(2, 2).amax(1),
    "kthvalue": lambda u: torch.stack([u.kthvalue(k, 0)[0] for k in (1, 2, 3, 4)]),
    "cummax": lambda u: u.cummax(0)[0][-1:],
    "where of halves": lambda u: torch.where(u[:2] > u[2:], u[:2], u[2:]),
    "maximum of halves": lambda u: torch.maximum(u[:2], u[2:]),
    "minimum and maximum": lambda u: torch.cat([torch.minimum(u[:2], u[2:]), torch.maximum(u[:2], u[2:])]),
    "max_pool": lambda u: F.max_pool1d(u[None, None], 2)[0, 0],
    "adaptive_max_pool": lambda u: F.adaptive_max_pool1d(u[None, None], 2)[0, 0],
    "quantile of an entry": lambda u: torch.stack([u.quantile(0.0), u.quantile(1.0)]),
    "aminmax": lambda u: torch.stack([*u.aminmax()]),
    "unique": lambda u: u[u.detach().unique(return_inverse=True)[1].argsort()],
    "nonzero": lambda u: u[(u.detach() > u.detach().median()).nonzero()[:, 0]],
    "mode": lambda u: u.mode()[0][None],
    "norm of order infinity": lambda u: torch.stack([u[:2].norm(torch.inf), u[2:].norm(torch.inf)]),
    "if": lambda u: u if bool(u[0] > u[1]) else u.flip(0),
    "argmax": lambda u: u[u.view(2, 2).argmax(1) + T([0, 2])],
}


def _chosen(choose: Callable[[Tensor], Tensor]) -> tuple[nn.Module, At]:
    net = Net(
        lambda m, x: choose(m.last(m.first(x).tanh())[:, 0]), first=nn.Linear(3, 4), last=nn.Linear(4, 1)
    )

    def at(s: list[int]) -> Tensor:
        return net(draw(4, 3)[T(s)]).square()

    return net, at


for _name, _choose in CHOICES.items():
    family(*ORDERS, name=f"samples chosen by {_name}")(lambda f=_choose: _chosen(f))


@family(*ORDERS)
def mixture_of_experts() -> tuple[nn.Module, At]:
    """Tokens go to two experts of two by value, as in Switch transformers, flattened."""

    def forward(m: Any, x: Tensor) -> Tensor:
        tokens = m.enter(x).flatten(0, 1)
        weights, chosen = m.router(tokens).softmax(1).topk(1, 1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate((m.one, m.two)):
            where = (chosen[:, 0] == number).nonzero()[:, 0]
            out = out.index_add(0, where, weights[where] * expert(tokens[where]))
        return out.view(4, 3, 4)

    net = Net(
        forward, enter=nn.Linear(3, 4), router=nn.Linear(4, 2), one=nn.Linear(4, 4), two=nn.Linear(4, 4)
    )
    return net, lambda s: net(draw(4, 3, 3)[T(s)]).square().sum((1, 2))


@family(*ORDERS, mixed=lambda s: True, why="experts choose tokens by a softmax over all of them")
def experts_that_choose_tokens() -> tuple[nn.Module, At]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.enter(x)
        weights, chosen = m.router(h).T.softmax(1).topk(2, 1)
        out = torch.zeros_like(h)
        for number, expert in enumerate((m.one, m.two)):
            out = out.index_add(0, chosen[number], weights[number, :, None] * expert(h[chosen[number]]))
        return h + out

    net = Net(
        forward, enter=nn.Linear(3, 4), router=nn.Linear(4, 2), one=nn.Linear(4, 4), two=nn.Linear(4, 4)
    )
    return net, lambda s: net(draw(4, 3)[T(s)]).square().sum(1)


@family([2, 2], [3, 1], [2, 2], [0, 4], [1, 3])
def experts_of_sorted_tokens() -> tuple[nn.Module, At]:
    """Tokens sorted by expert, split by how many each has, and put back."""

    def forward(m: Any, x: Tensor, counts: list[int]) -> Tensor:
        h = m.enter(x)
        order = torch.randperm(4)
        pieces = h[order].split(counts)
        out = torch.cat([m.one(pieces[0]), m.two(pieces[1])])
        return out[order.argsort()]

    net = Net(forward, enter=nn.Linear(3, 4), one=nn.Linear(4, 4), two=nn.Linear(4, 4))
    return net, lambda counts: net(draw(4, 3), counts).square().sum(1)


class Pick(torch.autograd.Function):
    """Rows by a list of numbers that autograd does not save."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, order: list[int]) -> Tensor:
        ctx.order = order
        return h[order]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return torch.zeros_like(grads[0]).index_add(0, T(ctx.order), grads[0]), None


class PickSaved(torch.autograd.Function):
    """Rows by a tensor that it saved."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return h[order]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (order,) = ctx.saved_tensors
        return torch.zeros_like(grads[0]).index_add(0, order, grads[0]), None


class SumSets(torch.autograd.Function):
    """Sums of unequal numbers of rows."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return torch.stack([piece.sum(0) for piece in h.split(sizes)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].repeat_interleave(T(ctx.sizes), 0), None


@family(*ORDERS)
def rows_picked_in_a_custom_function() -> tuple[nn.Module, At]:
    return rows(lambda m, h, s: Pick.apply(h, s), 4)


@family(*ORDERS)
def rows_picked_in_a_custom_function_by_a_saved_tensor() -> tuple[nn.Module, At]:
    return rows(lambda m, h, s: PickSaved.apply(h, T(s)), 4)


@family(*ORDERS, mixed=lambda s: s != IDENTITY, why="a custom function adds another sample")
def samples_added_in_a_custom_function() -> tuple[nn.Module, At]:
    return rows(lambda m, h, s: h + Pick.apply(h, s), 4)


@family([3, 3, 3, 3], [5, 3, 1, 3], [3, 3, 3, 3], [1, 1, 1, 9])
def sets_summed_in_a_custom_function() -> tuple[nn.Module, At]:
    return rows(lambda m, h, s: SumSets.apply(h, s))


@torch.library.custom_op("gramjd_tests::pick", mutates_args=())
def pick(h: Tensor, order: list[int]) -> Tensor:
    """An op that only torch's dispatcher knows, as one that is written in C++."""
    return h[order].clone()


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.order = inputs[1]


def _picked(ctx: Any, grad: Tensor) -> Any:
    return torch.zeros_like(grad).index_add(0, T(ctx.order), grad), None


pick.register_autograd(_picked, setup_context=_keep)


@family(*ORDERS)
def rows_picked_in_an_op_of_a_library() -> tuple[nn.Module, At]:
    return rows(lambda m, h, s: pick(h, s), 4)


def _compiled(backend: str) -> tuple[nn.Module, At]:
    torch._dynamo.reset()
    move = torch.compile(lambda h, order: h[order].sin(), backend=backend)
    return rows(lambda m, h, s: move(h, T(s)), 4)


for _backend in "eager", "aot_eager":
    family(*ORDERS, name=f"rows picked in a compiled function, {_backend}")(lambda b=_backend: _compiled(b))


@family(*ORDERS)
def rows_of_a_hook() -> tuple[nn.Module, At]:
    """A forward hook moves a module's samples."""
    net = Net(lambda m, x: m.last(m.first(x).tanh()), first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    chosen = [IDENTITY]
    net.first.register_forward_hook(lambda module, args, out: out[T(chosen[0])])

    def at(s: list[int]) -> Tensor:
        chosen[0] = s
        return net(draw(4, 3)).square().sum(1)

    return net, at


@family("none", "own", "none", "other", "own", mixed=lambda kind: kind == "other",
        why="the hook hands a sample's gradient to another")  # fmt: skip
def hooks_on_tensors_that_move_gradients() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.first(x).tanh(), first=nn.Linear(3, 4), last=nn.Linear(4, 2))

    def at(kind: str) -> Tensor:
        h = net(draw(4, 3))
        if kind != "none":
            h.register_hook((lambda g: 2 * g) if kind == "own" else (lambda g: g + g.flip(0)))
        return net.last(h).square().sum(1)

    return net, at


@family("none", "own", "none", "other", "own", mixed=lambda kind: kind == "other",
        why="the hook hands a sample's loss to another")  # fmt: skip
def hooks_on_losses() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.first(x).tanh(), first=nn.Linear(3, 4))

    def at(kind: str) -> Tensor:
        losses = net(draw(4, 3)).square().sum(1)
        if kind != "none":
            losses.register_hook((lambda g: 2 * g) if kind == "own" else (lambda g: g + g.flip(0)))
        return losses

    return net, at


@family("none", "own", "none", "other", "own", mixed=lambda kind: kind == "other",
        why="the hook hands a sample's gradient to another")  # fmt: skip
def hooks_inside_of_a_forward() -> tuple[nn.Module, At]:
    """One outside, on what enters no recorded op, is seen by audits alone (``docs/limits.md``)."""

    def forward(m: Any, x: Tensor, kind: str) -> Tensor:
        h = m.first(x).tanh()
        if kind != "none":
            h.register_hook((lambda g: 2 * g) if kind == "own" else (lambda g: g + g.flip(0)))
        return m.last(h)

    net = Net(forward, first=nn.Linear(3, 4), last=nn.Linear(4, 2))

    def at(kind: str) -> Tensor:
        return net(draw(4, 3), kind).square().sum(1)

    return net, at


@family("eye", "permuted", "eye", "random blocks", "full", "eye",
        mixed=lambda kind: kind == "full", why="the matrix mixes samples")  # fmt: skip
def a_matrix_of_data_across_samples() -> tuple[nn.Module, At]:
    """A product with an adjacency of data; which entries are zero changes."""
    kinds = {
        "eye": lambda: torch.eye(4).double(),
        "permuted": lambda: torch.eye(4).double()[[1, 0, 3, 2]],
        "random blocks": lambda: torch.block_diag(*draw(4, 1, 1)),
        "full": lambda: draw(4, 4),
    }
    return rows(lambda m, h, kind: kinds[kind]() @ h, 4)


@family("causal", "own", "causal", "own", "all", mixed=lambda kind: kind != "own", why="samples are attended")
def attention_across_samples_under_masks() -> tuple[nn.Module, At]:
    masks = {"causal": torch.ones(4, 4).tril(), "own": torch.eye(4), "all": torch.ones(4, 4)}

    def forward(m: Any, x: Tensor, kind: str) -> Tensor:
        q, k, v = m.qkv(x)[None].chunk(3, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masks[kind].bool())[0]

    net = Net(forward, qkv=nn.Linear(3, 12))
    return net, lambda kind: net(draw(4, 3), kind).square().sum(1)


@family([0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1])
def two_samples_in_one_sequence_by_mask() -> tuple[nn.Module, At]:
    """Which positions belong to which of two samples changes, equal numbers each."""

    def forward(m: Any, x: Tensor, owner: Tensor) -> Tensor:
        mask = owner[:, None] != owner
        h = m.attend(x, x, x, attn_mask=mask, need_weights=False)[0]
        return torch.zeros(2, 4).double().index_add(0, owner, h)

    net = Net(forward, attend=nn.MultiheadAttention(4, 2))
    return net, lambda s: net(draw(4, 4), T(s)).square().sum(1)


@family([4, 3, 2, 1], [1, 2, 3, 4], [4, 4, 4, 4], [2, 2, 2, 2])
def padding_masks() -> tuple[nn.Module, At]:
    net = Net(lambda m, x, mask: m.encoder(x, src_key_padding_mask=mask),
              encoder=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0))  # fmt: skip

    def at(s: list[int]) -> Tensor:
        padded = torch.arange(4) >= T(s)[:, None]
        return (net(draw(4, 4, 4), padded) * ~padded[:, :, None]).square().sum((1, 2))

    return net, at


@family(
    (0, 1), (1, 0), (0, 1), (1, 1), (0, 0), mixed=lambda s: s[0] == s[1], why="both losses take one sample"
)
def two_losses_that_choose_by_number() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.first(x).square().sum(1), first=nn.Linear(3, 4))

    def at(s: tuple[int, int]) -> Tensor:
        found = net(draw(2, 3))
        return torch.stack([found[k] for k in s]) * torch.tensor([1.0, 2.0]).double()

    return net, at


@family([0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3], [5, 4, 7, 6])
def rows_of_a_replay_buffer() -> tuple[nn.Module, At]:
    """Eight samples are encoded, losses of four are asked for."""
    net = Net(lambda m, x: m.first(x).tanh().square().sum(1), first=nn.Linear(3, 4))
    return net, lambda s: net(draw(8, 3))[s]


@family([0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [0, 1, 2, 3])
def parameters_of_each_sample() -> tuple[nn.Module, At]:
    """Auto-decoders: each sample has a code of its own, by number."""
    net = Net(
        lambda m, x, s: m.f(x + m.codes[T(s)]).square().sum(1), f=nn.Linear(3, 4), codes=parameter(6, 3)
    )
    return net, lambda s: net(draw(4, 3), s)
