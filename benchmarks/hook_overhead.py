"""What an engine costs a training step that does not use it, and one that does.

Ratios to one plain SGD step (forward, backward of the mean loss) of a small transformer encoder,
timed in random order in this process: the model with an engine's hooks, and the whole Gramian step.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.check_cost import Encoder
from gramjd import Engine


def main(rounds: int = 40) -> None:
    """Print the ratios of the medians, and of the lower deciles, which a busy machine moves less."""
    torch.manual_seed(0)
    plain, ids = Encoder(), torch.randint(0, 1000, (16, 64))
    hooked = copy.deepcopy(plain)
    engine = Engine(hooked, batch_dim=0)

    def losses_of(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(ids), ids, reduction="none").mean(1)

    def sgd(model: nn.Module) -> None:
        losses_of(model).mean().backward()
        model.zero_grad()

    def descent() -> None:
        losses = losses_of(hooked)
        losses.backward(engine.compute_gramian(losses).sum(0).sign() / len(ids))
        hooked.zero_grad()

    steps: list[tuple[str, Callable[[], None]]] = [
        ("SGD", lambda: sgd(plain)),
        ("hooked, unused", lambda: sgd(hooked)),
        ("Gramian step", descent),
    ]
    times: dict[str, list[float]] = {name: [] for name, _ in steps}
    descent()  # measures and checks the layouts once
    for _ in range(rounds):
        for name, step in random.sample(steps, len(steps)):
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    median, decile = (
        {name: statistics.quantiles(found, n=10)[which] for name, found in times.items()} for which in (4, 0)
    )
    for name, _ in steps[1:]:
        at_median, at_decile = median[name] / median["SGD"], decile[name] / decile["SGD"]
        print(f"{name}: {at_median:.3f} of an SGD step at the median, {at_decile:.3f} at the lower decile")


if __name__ == "__main__":
    main()
