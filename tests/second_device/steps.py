"""Steps of a model on the second device: ``python steps.py LIBRARY MODEL PLACE PLACE PLACE PLACE``.

Each is compared with the dense Jacobian of a float64 copy on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from device import NAME, end, reads, start
from models import MODELS
from torch import Tensor, nn

import gramjd

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle import dense_jacobian

STEPS = 9  # the proof is audited in the second, fourth and eighth; prepared ops run from the sixth on


class Steps:
    """Nine steps of one model, each with other data."""

    def __init__(self, model: str, places: list[str]) -> None:
        make, self.draw, self.loss = MODELS[model]
        torch.manual_seed(0)
        self.net, self.twin = make(places), make(["cpu"] * len(places)).double()
        values = {name: p.cpu().double() for name, p in self.net.state_dict().items()}
        self.twin.load_state_dict(values)
        self.names = [name for name, _ in self.net.named_parameters()]
        self.parameters = dict(self.net.named_parameters())
        self.is_elsewhere = set(places) == {NAME}  # nothing is on the CPU

    def dense(self, x: Tensor) -> Tensor:
        """The Jacobian ``[m, n]``."""
        x = x.double() if x.is_floating_point() else x
        return dense_jacobian(self.loss(self.twin(x)), self.twin.parameters())

    def losses(self, x: Tensor) -> Tensor:
        return self.loss(self.net(x))

    def of_sample(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.loss(torch.func.functional_call(self.net, parameters, x[None]))[0]

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs, and the Jacobian of each."""
        return [(x, self.dense(x)) for x in [self.draw() for _ in range(STEPS)]]

    def gradient(self) -> Tensor:
        """``.grad`` of all parameters, flat."""
        found = torch.cat([_flat(p.grad) for p in self.net.parameters()])
        assert all(p.grad.device == p.device for p in self.net.parameters())
        self.net.zero_grad()
        return found


def _flat(t: Tensor | None) -> Tensor:
    assert t is not None
    return t.detach().cpu().double().flatten()


def _close(got: Tensor, want: Tensor) -> None:
    error = float((got.detach().cpu().double() - want).norm() / want.norm())
    assert error < 1e-5, error


def _is_gramian(gramian: Tensor, J: Tensor) -> None:
    _close(gramjd.gramians.flatten(gramian), J @ J.T)


def by_compute_gramian(steps: Steps, **options: object) -> None:
    read = []
    with gramjd.Engine(steps.net, batch_dim=0, **options) as engine:  # type: ignore[arg-type]
        for x, J in steps.batches():
            losses = steps.losses(x)
            before = reads()
            gramian = engine.compute_gramian(losses)
            read.append(reads() - before)
            assert gramian.device == losses.device
            _is_gramian(gramian, J)
            losses.backward(torch.ones_like(losses))
            _close(steps.gradient(), J.sum(0))
    if not options and steps.is_elsewhere:
        assert min(read) == 1  # is all of it finite?


def by_budget(steps: Steps) -> None:
    by_compute_gramian(steps, memory_budget=2**16)


def always_checked(steps: Steps) -> None:
    by_compute_gramian(steps, check="always")


def by_rows(steps: Steps) -> None:
    by_compute_gramian(steps, strategies=("rows",))


def by_jacobian(steps: Steps) -> None:
    """All products of an engine's Jacobian."""
    with gramjd.Engine(steps.net, batch_dim=0) as engine:
        before = None
        for x, dense in steps.batches():
            J = engine.jacobian(steps.losses(x))
            _is_gramian(J.gramian(), dense)
            _close(J.squared_norms().flatten(), dense.square().sum(1))
            w = torch.rand(J.outputs.each[0].shape)
            J.backward(w.to(J.device))
            _close(steps.gradient(), w.double().flatten() @ dense)
            v = {name: torch.randn_like(p) for name, p in steps.parameters.items()}
            _close(J.jvp(v).flatten(), dense @ torch.cat([_flat(t) for t in v.values()]))
            _close(torch.cat([_flat(t).view(len(dense), -1) for t in J.dense().values()], 1), dense)
            flat = torch.cat([v[name].flatten().to(J.device) for name in J.names])
            _close(J @ flat, J.jvp(v).flatten().cpu().double())
            each = dict(
                zip(steps.names, dense.split([*map(torch.numel, steps.net.parameters())], 1), strict=True)
            )
            columns = torch.cat([each[name] for name in J.names], 1)
            _close(J.T @ w.flatten().to(J.device), w.double().flatten() @ columns)
            for device in ("cpu", NAME):
                _is_gramian(J.to(device).gramian(), dense)
            if before is not None and w.ndim == 1:
                _close(J.cross(before[0]), dense @ before[1].T)
            before = J, dense


def by_step(steps: Steps) -> None:
    """``engine.backward``, with weights for all parameters and for groups of them."""
    half = len(steps.names) // 2
    groups = {"first": steps.names[:half], "last": steps.names[half:]}
    with gramjd.Engine(steps.net, batch_dim=0) as engine:
        for x, J in steps.batches():
            weights = engine.backward(steps.losses(x), gramjd.weighting.upgrad)
            _close(steps.gradient(), weights.flatten().cpu().double() @ J)
            found = engine.backward(steps.losses(x), gramjd.weighting.upgrad, per=groups)
            sizes = [p.numel() for p in steps.net.parameters()]
            each = [found["first"]] * half + [found["last"]] * (len(sizes) - half)
            columns = zip(each, J.split(sizes, 1), strict=True)
            _close(steps.gradient(), torch.cat([w.flatten().cpu().double() @ part for w, part in columns]))


def by_transform(steps: Steps) -> None:
    transform, read = gramjd.jacobian(steps.of_sample), []
    for x, dense in steps.batches():
        x = x.to(next(steps.net.parameters()).device)
        before = reads()
        J = transform(steps.parameters, x)
        gramian = J.gramian()
        read.append(reads() - before)
        _is_gramian(gramian, dense)
        w = torch.rand(J.outputs.each[0].shape)
        gradient = J.vjp(w.to(J.device))
        assert all(g.device == steps.parameters[name].device for name, g in gradient.items())
        _close(torch.cat([_flat(g) for g in gradient.values()]), w.double().flatten() @ dense)
    if steps.is_elsewhere:
        assert min(read) == 0


def by_sketch(steps: Steps) -> None:
    """Sketches of an engine, of a Jacobian and of a transform are one."""
    transform = gramjd.gramian(steps.of_sample, sketch=256)
    with gramjd.Engine(steps.net, batch_dim=0) as engine:
        for _ in range(STEPS):
            x = steps.draw()
            found = engine.compute_gramian(steps.losses(x), sketch=256).sketch
            others = [
                engine.jacobian(steps.losses(x)).gramian(sketch=256).sketch,
                transform(steps.parameters, x.to(next(steps.net.parameters()).device)).sketch,
            ]
            for other in others:
                _close(other, found.cpu().double())


def by_losses(steps: Steps) -> None:
    """Few losses without samples, and many."""
    with gramjd.Engine(steps.net, batch_dim=None) as engine:
        for x, J in steps.batches():
            losses = steps.losses(x)
            _is_gramian(engine.compute_gramian(losses), J)
            few = losses.flatten()[:3]
            _is_gramian(engine.compute_gramian(few), J[:3])
            weights = gramjd.backward(few, gramjd.weighting.mgda)
            _close(steps.gradient(), weights.cpu().double() @ J[:3])
            _is_gramian(gramjd.jac(losses, steps.net).gramian(), J)


def heads(places: list[str]) -> None:
    """Tasks whose heads, and losses, lie on devices of their own."""
    trunk, first, second = (
        nn.Linear(*sizes).to(p) for sizes, p in zip(((4, 6), (6, 1), (6, 1)), places, strict=False)
    )
    for wrt in ("shared", "features"):
        for _ in range(STEPS):
            features = trunk(torch.randn(9, 4, device=places[0])).tanh()
            losses = [head(features.to(head.weight.device)).square().mean() for head in (first, second)]
            rows = [torch.autograd.grad(loss, trunk.weight, retain_graph=True)[0] for loss in losses]
            weights = gramjd.mtl_backward(losses, features, gramjd.weighting.mgda, wrt=wrt)
            want = sum(w * _flat(row) for w, row in zip(weights.cpu().double(), rows, strict=True))
            _close(_flat(trunk.weight.grad), want)
            trunk.zero_grad()


CASES: list[Callable[[Steps], None]] = [
    by_compute_gramian, by_budget, always_checked, by_rows, by_jacobian, by_step, by_transform, by_sketch,
    by_losses,
]  # fmt: skip


def main(library: str, model: str, *places: str) -> None:
    torch.set_num_threads(1)
    start(Path(library))
    for case in CASES:
        case(Steps(model, list(places)))
        print(case.__name__, flush=True)
    heads(list(places))


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
