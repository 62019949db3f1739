"""What a sketched Gramian of a large batch costs, in SGD steps and memory beyond what was held before.

``python -m benchmarks.sketches [model …]``: an MLP of four layers of 1,024 and a small transformer, at
batches of 1,024 to 4,096, factored sketches with 1,024 columns, one thread.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import memory, timing
from benchmarks.problem import Outcome
from gramjd import Engine, Projection, SketchedGramian, functional_loss, gramian

CPU = torch.device("cpu")
WARM = (
    17  # calls until ``Engine`` has proven where the samples are, one pattern of them a call; past an audit
)


class Encoder(nn.Module):
    """Pre-norm transformer: width 64, 2 layers, sequence 16, vocabulary 256."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.tokens, self.positions = nn.Embedding(256, 64), nn.Parameter(torch.randn(16, 64))
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 256)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.tokens(ids) + self.positions))
        return logits.mT


def mlp() -> nn.Module:
    layers = [layer for _ in range(3) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, 1024))


def criterion(output: Tensor, target: Tensor) -> Tensor:
    """One loss for each sample: the mean over its positions, if it has any."""
    found = F.cross_entropy(output, target, reduction="none")
    return found if found.ndim == 1 else found.mean(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], Callable[[int], Tensor]]] = {
    "MLP": (mlp, lambda n: torch.randn(n, 1024), lambda n: torch.randint(0, 1024, (n,))),
    "transformer": (
        Encoder,
        lambda n: torch.randint(0, 256, (n, 16)),
        lambda n: torch.randint(0, 256, (n, 16)),
    ),
}


def steps_of(
    model: nn.Module, x: Tensor, y: Tensor, projection: Projection
) -> dict[str, Callable[[], Outcome]]:
    """SGD, and the sketched Gramian by either face."""
    engine = Engine(model, batch_dim=0)
    func, params = functional_loss(model, criterion)
    transform = gramian(func, sketch=projection)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def sgd() -> Outcome:
        optimizer.zero_grad()
        criterion(model(x), y).mean().backward()
        optimizer.step()
        return Outcome(None, None)

    def rows(found: SketchedGramian) -> Outcome:
        return Outcome(found.sketch, None)

    return {
        "SGD": sgd,
        "Engine": lambda: rows(engine.compute_gramian(criterion(model(x), y), sketch=projection)),
        "transform": lambda: rows(transform(params, x, y)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--kind", default="factored")
    parser.add_argument("--seconds", type=float, default=20, help="for each comparison")
    args = parser.parse_args()
    torch.set_num_threads(1)
    projection = Projection(args.dim, kind=args.kind)
    print("| model | batch | SGD, s | Engine, SGD steps | transform | SGD, MiB | Engine | transform |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.models:
        make, inputs, targets = MODELS[name]
        for batch in args.batches:
            torch.manual_seed(0)
            steps = steps_of(make(), inputs(batch), targets(batch), projection)
            plain, ratios = 0.0, []
            for step in (steps["Engine"], steps["transform"]):
                for _ in range(WARM):
                    step()
                found = timing.alternate(step, steps["SGD"], CPU, args.seconds)
                ratios.append(statistics.median(a / b for a, b in zip(found.step, found.plain, strict=True)))
                plain = statistics.median(found.plain)
            sizes = [memory.measure(step, CPU).peak / 2**20 for step in steps.values()]
            cells = [name, batch, f"{plain:.2f}", *(f"{r:.2f}" for r in ratios), *(f"{s:.0f}" for s in sizes)]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
