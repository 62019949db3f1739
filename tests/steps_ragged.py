"""Families whose samples have unequal numbers of positions, one batch after another."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from exactness import Net, draw
from steps import At, family
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

SIZES = [2, 4, 3, 3], [3, 3, 3, 3], [5, 3, 1, 3], [1, 1, 1, 9], [3, 3, 3, 3], [3, 5, 3, 1]


def owners(sizes: list[int]) -> Tensor:
    """The sample of each position."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def starts(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes[:-1]]).cumsum(0)


def pooled(pool: Any) -> tuple[nn.Module, At]:
    """Deep sets: positions of all samples through a network, pooled sample by sample, and another one."""
    net = Net(
        lambda m, x, sizes: m.rho(pool(torch.tanh(m.phi(x)), sizes))[:, 0],
        phi=nn.Linear(3, 6),
        rho=nn.Linear(6, 1),
    )
    return net, lambda sizes: net(draw(sum(sizes), 3), sizes).square()


POOLS: dict[str, Any] = {
    "split and mean": lambda h, s: torch.stack([p.mean(0) for p in h.split(s)]),
    "split and max": lambda h, s: torch.stack([p.amax(0) for p in h.split(s)]),
    "split and attention": lambda h, s: torch.stack([((p @ p.T).softmax(1) @ p).sum(0) for p in h.split(s)]),
    "tensor_split": lambda h, s: torch.stack([p.sum(0) for p in h.tensor_split(starts(s)[1:].tolist())]),
    "narrow": lambda h, s: torch.stack(
        [h.narrow(0, int(a), n).mean(0) for a, n in zip(starts(s), s, strict=True)]
    ),
    "slices": lambda h, s: torch.stack(
        [h[int(a) : int(a) + n].sum(0) for a, n in zip(starts(s), s, strict=True)]
    ),
    "pad_sequence": lambda h, s: pad_sequence(list(h.split(s)), batch_first=True).sum(1),
    "pad_sequence and max": lambda h, s: pad_sequence(list(h.split(s)), padding_value=-9.0).amax(0),
    "segment_reduce by lengths": lambda h, s: torch.segment_reduce(h, "mean", lengths=torch.tensor(s)),
    "segment_reduce by offsets": lambda h, s: torch.segment_reduce(
        h, "max", offsets=torch.tensor([0, *s]).cumsum(0)
    ),
    "index_add": lambda h, s: h.new_zeros(len(s), 6).index_add(0, owners(s), h),
    "index_add in place": lambda h, s: h.new_zeros(len(s), 6).index_add_(0, owners(s), h),
    "index_reduce": lambda h, s: h.new_full((len(s), 6), -9.0).index_reduce(0, owners(s), h, "amax"),
    "scatter_add": lambda h, s: h.new_zeros(len(s), 6).scatter_add(0, owners(s)[:, None].expand_as(h), h),
    "scatter_reduce mean": lambda h, s: h.new_zeros(len(s), 6).scatter_reduce(
        0, owners(s)[:, None].expand_as(h), h, "mean", include_self=False
    ),
    "index_put": lambda h, s: h.new_zeros(len(s), 6).index_put((owners(s),), h, accumulate=True),
    "a membership matrix": lambda h, s: F.one_hot(owners(s), len(s)).to(h).T @ h,
    "a sparse membership matrix": lambda h, s: torch.sparse.mm(
        torch.sparse_coo_tensor(torch.stack([owners(s), torch.arange(len(h))]), h.new_ones(len(h))), h
    ),
    "embedding_bag of activations": lambda h, s: F.embedding_bag(
        torch.arange(len(h)), h, starts(s), mode="sum"
    ),
    "in a loop over owners": lambda h, s: torch.stack([h[owners(s) == k].mean(0) for k in range(len(s))]),
    "softmax in segments": lambda h, s: _attention_pool(h, owners(s), len(s)),
    "minus the mean of its sample": lambda h, s: _sum(h - (_sum(h, s) / _count(h, s))[owners(s)].sin(), s),
}


def _sum(h: Tensor, sizes: list[int]) -> Tensor:
    return h.new_zeros(len(sizes), *h.shape[1:]).index_add(0, owners(sizes), h)


def _count(h: Tensor, sizes: list[int]) -> Tensor:
    return torch.tensor(sizes).to(h).unsqueeze(1)


def _attention_pool(h: Tensor, owner: Tensor, samples: int) -> Tensor:
    """Of PyTorch Geometric: a softmax of scores over the positions of each sample."""
    scores = h[:, 0]
    most = h.new_zeros(samples).scatter_reduce(0, owner, scores.detach(), "amax", include_self=False)
    weights = (scores - most[owner]).exp()
    total = h.new_zeros(samples).index_add(0, owner, weights)
    return h.new_zeros(samples, h.shape[1]).index_add(0, owner, (weights / total[owner]).unsqueeze(1) * h)


for _name, _pool in POOLS.items():
    family(*SIZES, name=f"sets, {_name}")(lambda pool=_pool: pooled(pool))


@family(*SIZES, mixed=lambda sizes: True, why="differences of running sums are separate but for rounding")
def sets_by_differences_of_running_sums() -> tuple[nn.Module, At]:
    def pool(h: Tensor, sizes: list[int]) -> Tensor:
        sums = torch.cat([h.new_zeros(1, 6), h.cumsum(0)])[[0, *torch.tensor(sizes).cumsum(0).tolist()]]
        return sums.diff(dim=0)

    return pooled(pool)


@family(*SIZES)
def context_repeated_to_positions() -> tuple[nn.Module, At]:
    """Each sample's own vector comes to its positions, as in conditional decoders."""
    net = Net(
        lambda m, c, x, s: _sum(
            torch.tanh(m.point(x) + m.context(c).repeat_interleave(torch.tensor(s), 0)), s
        ),
        context=nn.Linear(2, 5),
        point=nn.Linear(3, 5),
    )
    return net, lambda s: net(draw(len(s), 2), draw(sum(s), 3), s).square().sum(1)


def edges_of(sizes: list[int]) -> Tensor:
    """``[2, E]`` inside each graph: random ones, as many in all whatever the sizes."""
    owner, first = owners(sizes), starts(sizes)
    to = torch.arange(len(owner)).repeat(2)
    offset = (torch.rand(len(to)) * torch.tensor(sizes)[owner[to]]).long()
    return torch.stack([first[owner[to]] + offset, to])


def graph_net(convolve: Any, pool: Any) -> tuple[nn.Module, At]:
    def forward(m: Any, x: Tensor, edges: Tensor, sizes: list[int]) -> Tensor:
        h = convolve(m.first, x, edges).tanh()
        return m.head(pool(convolve(m.second, h, edges).tanh(), sizes))

    net = Net(forward, first=nn.Linear(3, 5), second=nn.Linear(5, 5), head=nn.Linear(5, 2))

    def at(sizes: list[int]) -> Tensor:
        logits = net(draw(sum(sizes), 3), edges_of(sizes), sizes)
        return F.cross_entropy(logits, torch.randint(2, [len(sizes)]), reduction="none")

    return net, at


def message_passing(layer: nn.Module, h: Tensor, edges: Tensor) -> Tensor:
    """PyTorch Geometric's: messages by ``edge_index``, summed at their targets."""
    sent = layer(h)
    return sent + torch.zeros_like(sent).index_add(0, edges[1], sent[edges[0]])


def message_maximum(layer: nn.Module, h: Tensor, edges: Tensor) -> Tensor:
    sent = layer(h)[edges[0]]
    to = edges[1].unsqueeze(1).expand_as(sent)
    return sent.new_full((len(h), sent.shape[1]), -9.0).scatter_reduce(0, to, sent, "amax")


def graph_attention(layer: nn.Module, h: Tensor, edges: Tensor) -> Tensor:
    sent = layer(h)
    scores = F.leaky_relu(sent[edges[0]].sum(1) + sent[edges[1]].mean(1)).exp()
    total = h.new_zeros(len(h)).index_add(0, edges[1], scores)
    return torch.zeros_like(sent).index_add(0, edges[1], (scores / total[edges[1]])[:, None] * sent[edges[0]])


def sparse_product(layer: nn.Module, h: Tensor, edges: Tensor) -> Tensor:
    """DGL's: one sparse matrix of the whole batch."""
    adjacency = torch.sparse_coo_tensor(edges.flip(0), h.new_ones(edges.shape[1]), [len(h), len(h)])
    return torch.sparse.mm(adjacency.coalesce(), layer(h))


def dense_product(layer: nn.Module, h: Tensor, edges: Tensor) -> Tensor:
    adjacency = h.new_zeros(len(h), len(h)).index_put((edges[1], edges[0]), h.new_ones(1), accumulate=True)
    return adjacency @ layer(h)


_CONVOLUTIONS = message_passing, message_maximum, graph_attention, sparse_product, dense_product
_GRAPH_POOLS = {
    "batch vector": _sum,
    "batch_num_nodes": lambda h, s: torch.segment_reduce(h, "mean", lengths=torch.tensor(s)),
    "batch_independent": lambda h, s: torch.stack([p.amax(0) for p in h.split(s)]),
}
for _convolve in _CONVOLUTIONS:
    for _name, _pool in _GRAPH_POOLS.items():
        family(*SIZES, name=f"graphs, {_convolve.__name__.replace('_', ' ')}, {_name}")(
            lambda convolve=_convolve, pool=_pool: graph_net(convolve, pool)
        )


@family("ring", "chords", "linked", "ring", "linked", "chords",
        mixed=lambda kind: kind == "linked", why="an edge leads from one graph to another")  # fmt: skip
def graphs_that_an_edge_links() -> tuple[nn.Module, At]:
    """Graphs of four nodes each; ops and shapes are always the same."""
    net, _ = graph_net(message_passing, _sum)
    near = torch.arange(4).roll(1)

    def at(kind: str) -> Tensor:
        to = torch.arange(12)
        within = (near if kind == "ring" else torch.randint(4, [4])).repeat(3) + 4 * (to // 4)
        edges = torch.stack([within, to])
        if kind == "linked":
            edges[0, 3] = 9
        return net(draw(12, 3), edges, [4, 4, 4]).square().sum(1)

    return net, at


LENGTHS = [4, 3, 2, 1], [3, 3, 3, 3], [4, 4, 1, 1], [3, 3, 3, 3], [4, 2, 2, 2]


def _packed(kind: str) -> tuple[nn.Module, At]:
    unit = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind](3, 4)
    net = Net(lambda m, packed: m.unit(packed)[0], unit=unit)

    def at(lengths: list[int]) -> Tensor:
        out, _ = pad_packed_sequence(net(pack_sequence([draw(n, 3) for n in lengths])))
        return out.square().sum((0, 2))

    return net, at


for _kind in "lstm", "gru", "rnn":
    family(*LENGTHS, name=f"packed sequences, {_kind}")(lambda kind=_kind: _packed(kind))


@family([4, 1, 3, 2], [1, 2, 3, 4], [4, 3, 2, 1], [2, 2, 3, 3], [3, 3, 2, 2])
def packed_sequences_that_are_sorted_first() -> tuple[nn.Module, At]:
    """The same numbers of sequences at each time, in another order."""
    net = Net(
        lambda m, packed: m.unit(m.enter(packed), None), enter=_OnData(nn.Linear(3, 4)), unit=nn.GRU(4, 4)
    )

    def at(lengths: list[int]) -> Tensor:
        padded = pad_sequence([draw(n, 3) for n in lengths])
        _, last = net(pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False))
        return last[0].square().sum(1)

    return net, at


class _OnData(nn.Module):
    """A layer on the positions of a packed sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, packed: Any) -> Any:
        return packed._replace(data=self.layer(packed.data).tanh())


@family(*SIZES)
def nested_tensors() -> tuple[nn.Module, At]:
    net = Net(
        lambda m, x: torch.nested.to_padded_tensor(m.rho(torch.tanh(m.phi(x))), 0.0).sum((1, 2)),
        phi=nn.Linear(3, 6),
        rho=nn.Linear(6, 1),
    )
    return net, lambda s: net(
        torch.nested.nested_tensor([draw(n, 3) for n in s], layout=torch.jagged)
    ).square()


@family(*SIZES)
def positions_chosen_by_a_mask() -> tuple[nn.Module, At]:
    """Padded ``[B, T]``; only true positions go through a layer, and are put back."""
    net = Net(lambda m, x, mask: _put_back(m.inner(m.first(x)[mask]), mask), first=nn.Linear(3, 4),
              inner=nn.Linear(4, 4))  # fmt: skip

    def at(sizes: list[int]) -> Tensor:
        mask = torch.arange(9) < torch.tensor(sizes)[:, None]
        return net(draw(4, 9, 3), mask).sin().sum((1, 2))

    return net, at


def _put_back(rows: Tensor, mask: Tensor) -> Tensor:
    return rows.new_zeros(*mask.shape, rows.shape[1]).masked_scatter(mask.unsqueeze(2), rows)


@family(*SIZES, [6, 6], [1, 11], [12], [4, 4, 4], [1, 2, 9])
def packed_samples_under_a_block_mask() -> tuple[nn.Module, At]:
    """One sequence of twelve positions holds all samples; a mask keeps attention inside each."""

    def forward(m: Any, x: Tensor, sizes: list[int]) -> Tensor:
        owner = owners(sizes)
        q, k, v = m.qkv(x).unsqueeze(0).chunk(3, 2)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=owner[:, None] == owner)
        return _sum(m.out(h[0]), sizes)

    net = Net(forward, qkv=nn.Linear(3, 12), out=nn.Linear(4, 2))
    return net, lambda sizes: net(draw(12, 3), sizes).square().sum(1)


@family(*SIZES)
def packed_samples_under_an_additive_mask() -> tuple[nn.Module, At]:
    def forward(m: Any, x: Tensor, sizes: list[int]) -> Tensor:
        owner = owners(sizes)
        mask = torch.zeros(12, 12).double().masked_fill(owner[:, None] != owner, -torch.inf)
        return _sum((m.q(x) @ m.k(x).T + mask).softmax(1) @ m.v(x), sizes)

    net = Net(forward, q=nn.Linear(3, 4), k=nn.Linear(3, 4), v=nn.Linear(3, 2))
    return net, lambda sizes: net(draw(12, 3), sizes).square().sum(1)


@family(*SIZES)
def bags_of_tokens() -> tuple[nn.Module, At]:
    net = Net(lambda m, ids, at: m.head(m.bag(ids, at)), bag=nn.EmbeddingBag(7, 4), head=nn.Linear(4, 1))
    return net, lambda s: net(torch.randint(7, [sum(s)]), starts(s))[:, 0].square()


@family(*SIZES)
def sets_of_sets() -> tuple[nn.Module, At]:
    """Positions pooled in twos and fours to objects, these to samples."""
    net = Net(
        lambda m, x, s: m.c(_sum(m.b(_sum(m.a(x).tanh(), [2] * sum(s)).tanh()), s)),
        a=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 1),
    )  # fmt: skip
    return net, lambda s: net(draw(2 * sum(s), 3), s)[:, 0].square()
