"""Each type of node: its derivative is exact or refused at every step while the data move."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from exactness import draw, nodes
from node_programs import ELSEWHERE, IN_FLOAT32, PROGRAMS, Program
from oracle import OLD, assert_close, dense_gramian
from test_proofs import WHOLE
from torch import Tensor, nn

from gramjd import Engine, GramjdError, SlowPathWarning

STEPS = 4
WITHOUT_DERIVATIVE = {  # so that no sample reaches what is before them, and nothing can be proven
    f"{name}Backward" for name in ("Ceil", "Floor", "Round", "Sgn", "Sign", "Trunc", "Fill", "Zero")
} | {"AffineGridGeneratorBackward"}
LACKING = ("SafeSoftmax", "UnsafeMaskedIndex", "UnsafeMaskedIndexPutAccumulate", "RreluWithNoiseFunctional")
if OLD:
    for kind in LACKING:
        del PROGRAMS[f"{kind}Backward"]
    del PROGRAMS["ConvolutionBackward"]["moved 4"]  # refused, where all layouts are measured
CASES = [(kind, name) for kind, programs in PROGRAMS.items() for name in programs]


class Model(nn.Module):
    """A program behind a layer; its parameters come into being when it first asks for them."""

    def __init__(self, program: Program, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.program, self.first, self.own = program, nn.Linear(2, 3, dtype=dtype), nn.ParameterDict()
        self.dtype = dtype

    def parameter(self, *shape: int) -> Tensor:
        name = "x".join(map(str, shape))
        if name not in self.own:
            self.own[name] = nn.Parameter(draw(*shape).to(self.dtype))
        return self.own[name]

    def forward(self, step: int) -> Tensor:
        out = self.program(self.parameter, self.first(draw(4, 4, 2).to(self.dtype)), step)
        return out.abs().square().flatten(1).sum(1) if out.ndim > 1 else out.abs().square()


def bare(kind: str) -> str:
    """A type's name without its number."""
    return re.sub(r"\d+$", "", kind)


def listed() -> set[str]:
    """The types that the engine takes for independent of their data."""
    module = importlib.import_module("gramjd.engine.analysis.node_types")
    return set(module.PROVEN)


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_data_that_move_between_steps(kind: str, name: str) -> None:
    dtype, tolerance = (torch.float32, 1e-5) if kind in IN_FLOAT32 else (torch.float64, 1e-9)
    model = Model(PROGRAMS[kind][name], dtype)
    before = [
        nodes(model(step)) for step in range(STEPS)
    ]  # without an engine; the parameters come into being
    known = {bare(node) for node in set().union(*before)} | set().union(*before)
    if OLD and kind not in known:
        pytest.skip("torch 2.1 has other nodes for it")
    assert kind in known
    engine = Engine(model, batch_dim=0, audit=None)  # what is trusted must be right by itself
    found: list[str] = []
    for step in (*range(STEPS), 0):
        losses = model(step)
        told = f"step {step} after {found}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SlowPathWarning)
                got = engine.compute_gramian(losses)
        except GramjdError as error:
            if not name.startswith("mixed"):
                raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error
            found.append(type(error).__name__)
            continue
        try:
            assert_close(got, dense_gramian(losses, model.parameters()), tolerance)
        except AssertionError as error:
            raise AssertionError(f"{told}: {error}") from None
        found.append("exact")
    evidence = str(engine.explain(losses)).splitlines()[-1]
    others = "nothing is proven of", "each row is an ordinary backward pass"
    if name.startswith("apart") and kind not in WITHOUT_DERIVATIVE:
        assert WHOLE in evidence or any(other in evidence for other in others)


@pytest.mark.skipif(OLD, reason="other ops have other nodes")
@pytest.mark.filterwarnings("ignore")
def test_every_listed_type_has_a_program() -> None:
    """A type that this version of torch lacks needs none, nor one that only other devices have."""
    known = set(dir(torch._C._functions))
    occurring = {
        kind: set().union(*[_occurring(kind, program) for program in programs.values()])
        for kind, programs in PROGRAMS.items()
    }
    reachable = (listed() & known) - set(ELSEWHERE)
    missing = [kind for kind in reachable if kind not in occurring.get(bare(kind), set())]
    assert not missing, f"write a program into node_programs.py in which there are {sorted(missing)}"


def _occurring(kind: str, program: Callable[..., Tensor]) -> set[str]:
    model = Model(program, torch.float32 if kind in IN_FLOAT32 else torch.float64)
    return set().union(*(nodes(model(step)) for step in range(STEPS)))
