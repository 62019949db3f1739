"""Every module of the zoo, through both constructor forms and all three strategies."""

import warnings

import pytest
import torch
from oracle import assert_close, assert_symmetric, dense_gramian
from zoo import CASES, make

import gramjd
from gramjd import Engine, SlowPathWarning

STRATEGIES = {
    "all": ("ops", "functional", "rows"),
    "functional": ("functional", "rows"),
    "rows": ("rows",),
}


def objectives(out: torch.Tensor, several: bool) -> torch.Tensor:
    """``[B]`` or ``[B, 2]`` objectives from an output ``[B, ...]``."""
    flat = out.flatten(1)
    losses = (flat**2).mean(1) + flat[:, 0]
    return torch.stack([losses, flat.sin().sum(1)], 1) if several else losses


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("strategies", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, strategies: str, batch_dim: int | None, several: bool) -> None:
    module, inputs = make(name)
    engine = Engine(module, batch_dim=batch_dim, strategies=STRATEGIES[strategies])
    for samples in (3, 2, 1, 4):  # the structure is known from the second batch on
        out = objectives(module(*inputs(samples)), several)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowPathWarning)
            gramian = engine.compute_gramian(out)
        assert_close(gramian, dense_gramian(out, module.parameters()))
        assert_symmetric(gramian)
        assert not gramian.requires_grad and all(p.grad is None for p in module.parameters())
        out.backward(torch.rand_like(out))  # the graph is kept
        module.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", CASES)
def test_the_iterable_form_means_the_same(name: str) -> None:
    module, inputs = make(name)
    engine = Engine(module.modules(), batch_dim=0)
    out = objectives(module(*inputs(3)), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        assert_close(engine.compute_gramian(out), dense_gramian(out, module.parameters()))


# On torch 2.1, indexing a parameter is not shown to modes: exact there too, but by rows.
NEED_ROWS = {"in place"} | ({"reused parameter"} if torch.__version__.startswith("2.1.") else set())


@pytest.mark.parametrize("name", sorted(set(CASES) - NEED_ROWS))
def test_the_ops_cover_everything(name: str) -> None:
    """No parameter of the zoo goes a slow way, except where the point is that it must."""
    module, inputs = make(name)
    engine = Engine(module, batch_dim=0, strategies=("ops", "functional"))
    out = objectives(module(*inputs(3)), False)
    assert_close(engine.compute_gramian(out), dense_gramian(out, module.parameters()))


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("name", CASES)
def test_the_functional_face_agrees(name: str, several: bool) -> None:
    module, inputs = make(name)
    module.eval()
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def per_sample(params: dict[str, torch.Tensor], *sample: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(module, params, tuple(x[None] for x in sample))
        return objectives(out, several)[0]

    batch = inputs(3)
    out = objectives(module(*batch), several)
    gramian = gramjd.gramian(per_sample)(params, *batch).detach()
    assert_close(gramian, dense_gramian(out, module.parameters()))
    assert_symmetric(gramian)
