"""Models whose parts may lie on several devices, with data that are others in each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Places = Sequence[str]  # the device of each part, and of the output


class Parts(nn.Module):
    """Modules one after the other, each on a device of its own; the output is on the last device."""

    def __init__(self, parts: Sequence[nn.Module], places: Places) -> None:
        super().__init__()
        self.parts, self.places = nn.ModuleList(parts), places
        for part, place in zip(parts, places, strict=False):
            part.to(place)

    def forward(self, x: Tensor) -> Tensor:
        for part, place in zip(self.parts, self.places, strict=False):
            x = part(x.to(place))
        return x.to(self.places[-1])


class Tied(nn.Module):
    """A language model whose head has the weight of its embedding, on another device if need be."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places
        self.embedding = nn.Embedding(11, 8).to(places[0])
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).to(places[1])

    def forward(self, x: Tensor) -> Tensor:
        embedding, layer, last, output = self.places
        hidden = self.layer(self.embedding(x.to(embedding)).to(layer)).to(last)
        return (hidden @ self.embedding.weight.to(last).T).to(output)


def mlp(places: Places) -> nn.Module:
    first, second = (nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in ((16, 256), (256, 128)))
    return Parts([first, second, nn.Linear(128, 7)], places)


def cnn(places: Places) -> nn.Module:
    first = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(16, 16, 3, groups=2), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten())
    return Parts([first, second, nn.Linear(256, 5)], places)


MODELS: dict[str, tuple[Callable[[Places], nn.Module], Callable[[], Tensor], Callable[[Tensor], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(33, 16), lambda out: out.logsumexp(-1)),
    "logits": (mlp, lambda: torch.randn(9, 16), lambda out: out),
    "cnn": (cnn, lambda: torch.randn(6, 3, 8, 8), lambda out: out.logsumexp(-1)),
    "tied": (Tied, lambda: torch.randint(11, (5, 6)), lambda out: out.logsumexp(-1).mean(-1)),
}  # how to make it, its input, and the losses
