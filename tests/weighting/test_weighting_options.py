"""Every option of every weighting has an effect or is refused, when it is given and when it is assigned."""

import builtins
import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gramian_cases import gramian
from torch import Tensor

import gramjd.weighting as w


def generator(seed: int) -> Callable[[], torch.Generator]:
    return lambda: torch.Generator().manual_seed(seed)


def projector(reg_eps: float) -> SimpleNamespace:
    """What TorchJD's are to us: two numbers."""
    return SimpleNamespace(norm_eps=1e-4, reg_eps=reg_eps)


FIRST, SECOND = torch.ones(5), torch.tensor([0.1, 0.2, 0.3, 0.0, 0.4])
VECTORS = ["mean", [1.0] * 5, torch.full((5,), torch.nan), torch.ones(5, dtype=torch.complex64)]
NEGATIVE = [-1, -1e-9, float("nan"), float("inf"), "0.1", None, True, torch.tensor(0.1)]
COUNTS: list[Any] = [-1, 1.5, 2.0, "2", None, True]
SHARES = [*NEGATIVE, 1.1]
DUAL_CONE: dict[str, tuple[Any, Any, list[Any]]] = {
    "pref_vector": (FIRST, SECOND, VECTORS),
    "projector": (None, projector(0.1), [object(), "quadprog", projector(-1.0)]),
    "norm_eps": (1e-4, 1e9, NEGATIVE),
    "reg_eps": (1e-4, 0.1, NEGATIVE),
}
# of each option, two values that must give different weights, and some that must be refused; of those
# that would have no effect (SAME), two that are the default
SAME = "the default"
OPTIONS: dict[str, dict[str, tuple[Any, Any, list[Any]]]] = {
    "AlignedMTLWeighting": {
        "pref_vector": (FIRST, SECOND, VECTORS),
        "scale_mode": ("min", "rmse", ["max", None, 1]),
    },
    "CAGradWeighting": {"c": (0.5, 0.9, NEGATIVE), "norm_eps": (1e-4, 1e9, NEGATIVE)},
    "CRMOGMWeighting": {
        "weighting": (w.MeanWeighting, w.MGDAWeighting, [None, 1.0, FIRST]),
        "alpha": (0.5, 0.9, SHARES),
        "initial_weights": (None, SECOND, VECTORS),
    },
    "ConFIGWeighting": {"pref_vector": (FIRST, SECOND, VECTORS)},
    "ConstantWeighting": {"weights": (FIRST, SECOND, [*VECTORS, None])},
    "DualProjWeighting": DUAL_CONE,
    "ExcessMTLWeighting": {
        "robust_step_size": (1.0, 0.1, [*NEGATIVE, 0]),
        "n_warmup_steps": (0, 2, COUNTS),
    },
    "FairGradWeighting": {
        "alpha": (1.0, 2.0, NEGATIVE),
        "max_iters": (SAME, None, [10, 0]),
        "reg_eps": (1e-8, 0.1, NEGATIVE),
    },
    "GradVacWeighting": {
        "beta": (0.5, 0.9, SHARES),
        "eps": (1e-8, 10.0, NEGATIVE),
        "generator": (generator(0), generator(1), [0, "cpu"]),
    },
    "IMTLGWeighting": {},
    "KrumWeighting": {"n_byzantine": (0, 2, COUNTS), "n_selected": (1, 3, [*COUNTS, 0])},
    "MGDAWeighting": {
        "epsilon": (SAME, 0.001, [1e-5, 0.0, None, -1.0]),
        "max_iters": (SAME, 100, [1000, 1, None]),
    },
    "MeanWeighting": {},
    "MoDoWeighting": {"gamma": (0.01, 0.02, [*NEGATIVE, 0]), "rho": (0.0, 1.0, NEGATIVE)},
    "NashMTLWeighting": {
        "n_tasks": (5, 4, [*COUNTS, 0]),
        "max_norm": (1.0, 0.01, NEGATIVE),
        "update_weights_every": (1, 2, [*COUNTS, 0]),
        "optim_niter": (SAME, 20, [10, 0, None]),
        "reg_eps": (1e-8, 0.1, NEGATIVE),
    },
    "PCDWeighting": {
        "tau": (
            0.02,
            torch.tensor([0.0, 0.5, 0.1, 0.9]),
            [*SHARES, torch.tensor([[0.1]]), torch.tensor([2.0])],
        ),
        "beta": (0.999, 0.1, [*SHARES, 1.0]),
        "eps": (1e-8, 100.0, NEGATIVE),
    },
    "PCGradWeighting": {"generator": (generator(0), generator(1), [0, "cpu"])},
    "RandomWeighting": {"generator": (generator(0), generator(1), [0, "cpu"])},
    "SDMGradWeighting": {
        "lr": (10.0, 0.1, [*NEGATIVE, 0]),
        "momentum": (0.5, 0.0, [*SHARES, 1.0]),
        "n_iter": (20, 2, [*COUNTS, 0]),
        "lambda_": (0.3, 0.6, NEGATIVE),
        "pref_vector": (FIRST, SECOND, VECTORS),
    },
    "SumWeighting": {},
    "UPGradWeighting": DUAL_CONE,
}
NEEDED: dict[str, dict[str, Any]] = {
    "CAGradWeighting": {"c": 0.5},
    "CRMOGMWeighting": {"weighting": w.IMTLGWeighting},
    "ConstantWeighting": {"weights": FIRST},
    "FairGradWeighting": {"alpha": 1.0},
    "KrumWeighting": {"n_byzantine": 0},
    "NashMTLWeighting": {"n_tasks": 5},
}
BASES = ("Weighting", "StatefulWeighting")
KINDS = sorted(name for name in w.__all__ if name.endswith("Weighting") and name not in BASES)
EACH = [(kind, option) for kind, options in OPTIONS.items() for option in options]


def value_of(given: Any) -> Any:
    """Generators and weightings have states: a new one each time."""
    return given() if inspect.isfunction(given) or inspect.isclass(given) else given


def make(kind: str, **options: Any) -> Any:
    given = {**NEEDED.get(kind, {}), **options}
    return getattr(w, kind)(**{name: value_of(each) for name, each in given.items()})


def results(weighting: Any) -> list[Any]:
    """Of three calls, whose Gramians differ; an error is a result, too."""
    torch.manual_seed(0)
    try:
        return [weighting(gramian("conflicting", 5, seed)).tolist() for seed in range(3)]
    except ValueError as error:
        return [str(error)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_here(kind: str) -> None:
    cls = getattr(w, kind)
    given = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"]
    named = {p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    assert set(OPTIONS[kind]) == named
    assert set(cls._options) == named
    assert "_options" in vars(cls)  # else it takes attributes that it does not have


@pytest.mark.parametrize(("kind", "option"), EACH)
def test_it_has_an_effect(kind: str, option: str) -> None:
    first, second, _ = OPTIONS[kind][option]
    if first is SAME:
        setattr(make(kind), option, second)  # not refused
        assert results(make(kind, **{option: second})) == results(make(kind))
        return
    weighting = make(kind, **{option: first})
    want = results(make(kind, **{option: second}))
    assert results(make(kind, **{option: first})) != want
    assigned = value_of(second)
    setattr(weighting, option, assigned)
    assert getattr(weighting, option) is assigned or getattr(weighting, option) == assigned
    assert results(weighting) == want


@pytest.mark.parametrize(("kind", "option"), EACH)
def test_what_is_wrong_is_refused(kind: str, option: str) -> None:
    first, second, wrong = OPTIONS[kind][option]
    start = second if first is SAME else value_of(first)
    for bad in wrong:
        with pytest.raises((TypeError, ValueError), match=option):
            make(kind, **{option: bad})
        weighting = make(kind, **{option: start})
        with pytest.raises((TypeError, ValueError), match=option):
            setattr(weighting, option, bad)
        kept = getattr(weighting, option)
        assert kept is start or kept == start


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "upgrad": w.upgrad,
    "dualproj": w.dualproj,
    "cagrad": w.cagrad,
    "fairgrad": w.fairgrad,
    "nash_mtl": w.nash_mtl,
    "aligned_mtl": w.aligned_mtl,
    "gradvac": w.gradvac,
    "krum": w.krum,
    "config": w.config,
    "modo": w.modo,
    "sdmgrad": w.sdmgrad,
    "pcd": w.pcd,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_refuse_the_same(name: str) -> None:
    kind = {"krum": "KrumWeighting"}.get(name) or next(
        k for k in KINDS if k.lower() == name.replace("_", "") + "weighting"
    )
    matrix, taken = gramian("random", 5), inspect.signature(FUNCTIONS[name]).parameters
    for option in [each for each in OPTIONS[kind] if each in taken and each != "generator"]:
        given = {each: value for each, value in NEEDED.get(kind, {}).items() if each in taken}
        for bad in OPTIONS[kind][option][2]:
            if bad is None and taken[option].default is None:
                continue
            with pytest.raises((TypeError, ValueError, AttributeError)):
                FUNCTIONS[name](matrix, **{**given, option: bad})


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_that_there_are_not(kind: str) -> None:
    weighting = make(kind)
    with pytest.raises(AttributeError, match="no option 'reg_esp'"):
        weighting.reg_esp = 1.0
    own = type("Own", (getattr(w, kind),), {})(**{k: value_of(v) for k, v in NEEDED.get(kind, {}).items()})
    own.whatever = 1.0  # a subclass may have what it likes
    assert copy.deepcopy(own).whatever == 1.0


@pytest.mark.parametrize(("kind", "option"), EACH)
def test_the_repr_tells(kind: str, option: str) -> None:
    weighting = make(kind)
    shown = repr(weighting)
    assert shown.startswith(kind)
    value = getattr(weighting, option)
    if not isinstance(value, torch.nn.Module):
        assert f"{option}={value!r}" in shown


@pytest.mark.parametrize("kind", ["UPGradWeighting", "DualProjWeighting"])
def test_the_last_of_projector_and_its_numbers_counts(kind: str) -> None:
    own = projector(0.1)
    weighting = make(kind, projector=own)
    own.reg_eps = 0.3  # TorchJD's may be changed, too
    assert weighting.reg_eps == 0.3
    weighting.norm_eps = 1e-6
    assert (weighting.projector, weighting.norm_eps, weighting.reg_eps) == (None, 1e-6, 0.3)
    weighting.projector = own
    weighting.projector = None
    assert (weighting.norm_eps, weighting.reg_eps) == (1e-4, 0.3)
    assert results(weighting) == results(make(kind, reg_eps=0.3))


def test_no_builtin_is_shadowed() -> None:
    names: dict[str, Any] = {}
    exec("from gramjd.weighting import *", names)
    assert not {name for name in names if hasattr(builtins, name)} - {"__builtins__", "__doc__"}
    assert w.sum(torch.ones(2, 2)).tolist() == [1, 1]


def test_reset_by_torchjd_reaches_ours() -> None:
    theirs = pytest.importorskip("torchjd.aggregation")
    inner: Any = w.GradVacWeighting()
    smoothed = theirs.CRMOGMWeighting(inner)
    smoothed(gramian("conflicting", 5))
    assert inner.state is not None
    smoothed.reset()
    assert inner.state is None
    assert not isinstance(w.MeanWeighting(), __import__("torchjd").Stateful)


EMPTY: dict[str, Callable[[Tensor], Any]] = {
    "upgrad": w.upgrad,
    "dualproj": w.dualproj,
    "mgda": w.mgda,
    "cagrad": lambda g: w.cagrad(g, 0.5),
    "nash_mtl": w.nash_mtl,
    "fairgrad": lambda g: w.fairgrad(g, 1.0),
    "fairgrad_0": lambda g: w.fairgrad(g, 0.0),
    "config": w.config,
    "modo": lambda g: w.modo(g)[0],
    "sdmgrad": lambda g: w.sdmgrad(g)[0],
    "pcd": lambda g: w.pcd(g)[0],
    "imtl_g": w.imtl_g,
    "aligned_mtl": w.aligned_mtl,
    "pcgrad": w.pcgrad,
    "gradvac": lambda g: w.gradvac(g)[0],
    "krum": lambda g: w.krum(g, 0),
    "mean": w.mean,
    "sum": w.sum,
    "random": w.random,
    "constant": lambda g: w.constant(g, torch.ones(g.shape[g.ndim % 2 :][: g.ndim // 2])),
}


def test_every_function_is_here() -> None:
    functions = {name for name in w.__all__ if name.islower()} | {"sum"}
    assert functions - {"cr_mogm"} == set(EMPTY) - {"fairgrad_0"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "want"),
    [((0, 0), (0,)), ((2, 0, 0, 2), (2, 0)), ((3, 0, 0), (3, 0)), ((0, 4, 4), (0, 4)), ((0, 0, 0), (0, 0))],
)
@pytest.mark.parametrize("name", EMPTY)
def test_no_objectives_no_weights(
    name: str, shape: tuple[int, ...], want: tuple[int, ...], dtype: torch.dtype
) -> None:
    weights = EMPTY[name](torch.zeros(shape, dtype=dtype))
    assert weights.shape == want
    assert weights.dtype == dtype


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "nash_mtl"])
def test_no_objectives_are_certified(name: str) -> None:
    weights, certificate = getattr(w, name)(torch.zeros(0, 0), certificate=True)
    assert weights.shape == (0,)
    assert bool(certificate.converged)
    _, certificate = getattr(w, name)(torch.zeros(0, 4, 4), certificate=True)
    assert certificate.converged.shape == (0,)
