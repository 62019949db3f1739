"""Stock models of the families that Hugging Face's are not, written as their papers and users write them.

``MODELS[name]`` makes a model and its losses, one for each of ``B`` samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from exactness import draw
from torch import Tensor, nn

B = 3


class FrozenBatchNorm(nn.Module):
    """Statistics and scales as buffers (He et al., arXiv 1703.06870, Section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in {"weight": 1.3, "bias": 0.1, "mean": 0.2, "var": 1.7}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.mean * scale)[:, None, None]


class Residual(nn.Module):
    """A basic block (He et al., arXiv 1512.03385), with the normalisation given."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2, self.act = norm(outputs), norm(outputs), nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.act(out)


def resnet(norm: Callable[[int], nn.Module]) -> nn.Module:
    stem = [nn.Conv2d(3, 4, 3, padding=1, bias=False), norm(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    blocks = [Residual(4, 4, 1, norm), Residual(4, 8, 2, norm)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def frozen_statistics() -> nn.Module:
    """Ordinary batch normalisation whose statistics are frozen as users do it, weights trained."""

    class Fixed(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Fixed:
            super().train(False)
            return self

    return resnet(Fixed)


class UNet(nn.Module):
    """Down, up by a transposed convolution, and skip connections (arXiv 1505.04597)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.twice(2, 4), self.twice(4, 8)
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout2d(0.2)
        self.up, self.up1 = nn.ConvTranspose2d(8, 4, 2, stride=2), self.twice(8, 4)
        self.head = nn.Conv2d(4, 3, 1)

    @staticmethod
    def twice(inputs: int, outputs: int) -> nn.Sequential:
        layers = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.ReLU(True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        h = self.up(self.drop(self.down2(self.pool(skip))))
        return self.head(self.up1(torch.cat([skip, h], 1)))


class Tagger(nn.Module):
    """A bidirectional LSTM over packed sequences (Huang et al., arXiv 1508.01991)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.drop = nn.Embedding(20, 4, padding_idx=0), nn.Dropout(0.3)
        self.recurrent = nn.LSTM(4, 3, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        h = self.drop(self.tokens(ids))
        packed = nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        return self.head(self.drop(out))


class MixtureOfExperts(nn.Module):
    """Every token goes to its two best experts (Shazeer et al., arXiv 1701.06538)."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.tokens, self.gate, self.head = nn.Embedding(20, 4), nn.Linear(4, experts), nn.Linear(4, 20)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.2), nn.Linear(6, 4))
            for _ in range(experts)
        )

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids)
        flat, out = h.flatten(0, 1), torch.zeros_like(h.flatten(0, 1))
        weights, chosen = self.gate(flat).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        for number, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == number)
            if len(rows):
                out.index_add_(0, rows, expert(flat[rows]) * weights[rows, slot, None])
        return self.head(h + out.view_as(h))


class GraphNetwork(nn.Module):
    """Messages along edges, several graphs in one (Gilmer et al., arXiv 1704.01212)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.message, self.update = nn.Linear(2, 4), nn.Linear(8, 4), nn.GRUCell(4, 4)
        self.attention, self.head = nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor, graphs: int) -> Tensor:
        h, (source, target) = self.encode(nodes).tanh(), edges
        for _ in range(2):
            messages = self.message(torch.cat([h[source], h[target]], 1)).relu()
            h = self.update(torch.zeros_like(h).index_add(0, target, messages), h)
        weights = self.attention(h).sigmoid()
        pooled = h.new_zeros(graphs, 4).scatter_add(0, graph[:, None].expand_as(h), h * weights)
        return self.head(pooled)


class Recommender(nn.Module):
    """DLRM: bags of sparse features that interact with dense ones (Naumov et al., arXiv 1906.00091)."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(10, 4, mode=mode) for mode in ("sum", "mean", "sum"))
        self.bottom = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(4 + 6, 5), nn.ReLU(), nn.Dropout(0.2), nn.Linear(5, 1))

    def forward(self, dense: Tensor, bags: list[tuple[Tensor, Tensor]]) -> Tensor:
        h = self.bottom(dense)
        sparse = [bag(ids, offsets) for bag, (ids, offsets) in zip(self.bags, bags, strict=True)]
        features = torch.stack([h, *sparse], 1)
        products = features @ features.mT
        i, j = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([h, products[:, i, j]], 1)).squeeze(1)


class LowRank(nn.Module):
    """A frozen layer and a trained update of low rank (Hu et al., arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(0.1)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(self.dropout(x))) * 2.0


def fine_tuned() -> nn.Module:
    """A frozen transformer encoder; its feed-forward layers adapted, and a new head."""
    # with another activation than torch's own two, so that no fast path reads the layers' weights
    layer = nn.TransformerEncoderLayer(4, 2, 8, activation=torch.tanh, batch_first=True)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).requires_grad_(False)
    for block in base.layers:
        block.linear1, block.linear2 = LowRank(block.linear1), LowRank(block.linear2)
    return nn.Sequential(base, nn.Linear(4, 3))


@dataclass(frozen=True)
class Model:
    make: Callable[[], nn.Module]
    losses: Callable[[nn.Module], Tensor]
    rows: tuple[str, ...] = field(default=())  # parameters that may go the slow way


IMAGES, SEQUENCES = draw(B, 3, 8, 8), draw(B, 5, 4)
IDS = torch.tensor([[3, 7, 7, 1, 0], [2, 9, 1, 4, 4], [5, 6, 0, 0, 0]])  # padded with 0
LENGTHS = torch.tensor([4, 5, 2])
NODES = draw(9, 2)
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 5], [1, 2, 0, 4, 3, 6, 7, 8, 5, 6, 5]])
GRAPH = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
BAGS = [
    (torch.tensor([1, 2, 2, 5, 9]), torch.tensor([0, 1, 3])),
    (torch.tensor([0, 3, 4, 4]), torch.tensor([0, 2, 2])),  # one bag is empty
    (torch.tensor([7, 8, 9]), torch.tensor([0, 1, 2])),
]
POINTS = draw(B, 2)  # (t, x)


def tagged(m: nn.Module) -> Tensor:
    logits = m(IDS, LENGTHS)
    return F.cross_entropy(logits.mT, IDS[:, : logits.shape[1]] % 5, reduction="none").sum(1)


def routed(m: nn.Module) -> Tensor:
    return F.cross_entropy(m(IDS).mT, IDS, reduction="none", ignore_index=0).mean(1)


def burgers(m: nn.Module) -> Tensor:
    """The residual of Burgers' equation, ``u_t + u u_x - ν u_xx`` (Raissi et al., JCP 378, 2019)."""
    points = POINTS.clone().requires_grad_()
    u = m(points)[:, 0]
    first = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
    second = torch.autograd.grad(first[:, 1].sum(), points, create_graph=True)[0]
    return torch.stack([(first[:, 0] + u * first[:, 1] - 0.01 * second[:, 1]).square(), u.square()], 1)


def pinn() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))


MODELS: dict[str, Model] = {
    "resnet, group norm": Model(
        lambda: resnet(lambda n: nn.GroupNorm(2, n)), lambda m: m(IMAGES).logsumexp(1)
    ),
    "resnet, frozen batch norm": Model(lambda: resnet(FrozenBatchNorm), lambda m: m(IMAGES).logsumexp(1)),
    "resnet, frozen statistics": Model(frozen_statistics, lambda m: m(IMAGES).logsumexp(1)),
    "u-net": Model(UNet, lambda m: m(IMAGES[:, :2]).logsumexp(1).mean((1, 2))),
    "bidirectional lstm tagger": Model(Tagger, tagged),
    "mixture of experts": Model(MixtureOfExperts, routed),
    "graph network": Model(GraphNetwork, lambda m: m(NODES, EDGES, GRAPH, B).square().sum(1)),
    "dlrm": Model(Recommender, lambda m: F.softplus(m(draw_dense(), BAGS))),
    # The loss contains derivatives of the network, which autograd itself computes with the weights: no op
    # that anyone sees. The last bias alone has none.
    "pinn": Model(pinn, burgers, rows=("weight", "bias")),
    "low-rank fine-tune": Model(fine_tuned, lambda m: m(SEQUENCES).logsumexp(2).sum(1)),
}


def draw_dense() -> Tensor:
    return torch.linspace(-1, 1, 5 * B, dtype=torch.float64).view(B, 5).sin()
