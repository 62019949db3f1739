"""`torch.compile` of a whole Jacobian-descent step, and of a model under an `Engine`.

1. The functional step is pure tensor code: `torch.compile(step, fullgraph=True)` makes one graph of forward,
   Gramian, weights and weighted gradient. The weighting branches on values, so the graph calls it as one op.
2. An `Engine` around a compiled model replays its call by `torch.func`, since nobody can see inside a
   compiled call. It is exact as well; the forward that you run stays compiled.

Prints times of a step, eager and compiled, and how far their results are apart. Draws the ratio of both times
for several batch sizes into `compiled.png` in the folder given by --out. Needs torch 2.13, and a C++ compiler
or another backend (--backend aot_eager).
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import gramjd
from gramjd.weighting import upgrad

Params = dict[str, Tensor]
Step = Callable[[Params, Tensor, Tensor], tuple[Params, Tensor]]


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))


@torch.library.custom_op("gramjd_example::weights", mutates_args=())
def weights_of(gramian: Tensor) -> Tensor:
    """UPGrad as an op, which tracing does not look into."""
    return upgrad(gramian)


@weights_of.register_fake
def _(gramian: Tensor) -> Tensor:
    return gramian.new_empty(gramian.shape[0])


def make_step(function: Callable[..., Tensor], lr: float = 0.1) -> Step:
    def step(params: Params, x: Tensor, y: Tensor) -> tuple[Params, Tensor]:
        J, losses = gramjd.jacobian_and_value(function)(params, x, y)
        grads = J.vjp(weights_of(J.gramian()))
        return {name: p - lr * grads[name] for name, p in params.items()}, losses

    return step


def timed(run: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds of one run, the median, after a first one that compiles."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e3 * sorted(seconds)[repeats // 2]


def ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int = 30) -> float:
    """The median ratio of the times of two steps that run in turn."""
    found = sorted(timed(fast, 1) / timed(slow, 1) for _ in range(rounds))
    return found[rounds // 2]


def plot(sizes: Sequence[int], ratios: Sequence[float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    ax = figure.add_subplot()
    bars = ax.bar([str(n) for n in sizes], list(ratios), color="#0072b2", width=0.6)
    ax.bar_label(bars, fmt="%.2f")
    ax.axhline(1, color="#d55e00", lw=1)
    ax.set(xlabel="batch size", ylabel="compiled / eager", ylim=(0, 1.15))
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to draw the ratio of times")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128], help="batches to draw")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = make_model()
    x, y = torch.randn(64, 32), torch.randint(0, 10, (64,))

    function, params = gramjd.functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    eager = make_step(function)
    compiled = cast(Step, torch.compile(eager, fullgraph=True, backend=args.backend))
    found, wanted = compiled(params, x, y)[0], eager(params, x, y)[0]
    apart = max(float((found[name] - wanted[name]).abs().max()) for name in params)
    slow, fast = timed(lambda: eager(params, x, y)), timed(lambda: compiled(params, x, y))
    print(f"functional step: eager {slow:.2f} ms, compiled {fast:.2f} ms, apart by {apart:.1e}")

    if args.out is not None:
        ratios = []
        for size in args.sizes:
            batch = torch.randn(size, 32), torch.randint(0, 10, (size,))
            ratios.append(ratio(partial(eager, params, *batch), partial(compiled, params, *batch)))
        args.out.mkdir(parents=True, exist_ok=True)
        plot(args.sizes, ratios, args.out / "compiled.png")

    # not model.compile(): it compiles the engine's hooks away, which leaves the per-row backward
    module = cast(nn.Module, torch.compile(model, backend=args.backend))
    engine = gramjd.Engine(module, batch_dim=0)
    gramian = engine.compute_gramian(nn.functional.cross_entropy(module(x), y, reduction="none"))
    wanted_gramian = gramjd.gramian(function)(params, x, y)
    apart = float((gramian - wanted_gramian).abs().max() / wanted_gramian.abs().max())
    print(f"Engine around a compiled model: relative difference {apart:.1e}")


if __name__ == "__main__":
    main()
