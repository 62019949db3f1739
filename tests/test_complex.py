"""Complex values inside, and complex parameters: real and imaginary parts count as real parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from exactness import Net, draw
from oracle import OLD, assert_close, assert_symmetric, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import Engine, SlowPathWarning

B, D = 5, 6
C = torch.complex128


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def waves(x: Tensor) -> Tensor:
    """Complex data of real ones."""
    return torch.complex(x, (3 * x).sin())


def complex_draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=C)


Function = Callable[..., Tensor]  # of parameters and one sample, both [.., D]
REAL: dict[str, tuple[Sequence[tuple[int, ...]], Function]] = {
    "learned filter": ([(4,)], lambda p, x: torch.fft.irfft(torch.fft.rfft(x) * p, n=D).sin().sum(-1)),
    "product": ([(D,)], lambda p, x: (p * waves(x)).abs().sum(-1)),
    "product from the left": ([(D,)], lambda p, x: (waves(x) * p).abs().sum(-1)),
    "sum": ([(D,)], lambda p, x: (p + waves(x)).abs().sum(-1)),
    "difference": ([(D,)], lambda p, x: (1j - p + waves(x) * p).abs().sum(-1)),
    "quotient": ([(D,)], lambda p, x: (waves(x) / (2 + p) + p / waves(x)).abs().sum(-1)),
    "one over it": ([(D,)], lambda p, x: ((1 + 1j) / (p - 3) * waves(x)).imag.sin().sum(-1)),
    "number": ([(D,)], lambda p, x: ((p * x) * (2 - 1j)).abs().sum(-1)),
    "phase": ([(D,)], lambda p, x: (waves(x) * torch.exp(1j * p)).real.sin().sum(-1)),
    "matrix, cast": ([(D, 3)], lambda p, x: (waves(x) @ p.to(C)).abs().sum(-1)),
    "matrix, made complex first": (
        [(D, 3), (D, 3)],
        lambda p, q, x: (waves(x) @ torch.complex(p, q)).abs().square().sum(-1),
    ),
    "linear of a cast weight": ([(3, D)], lambda p, x: F.linear(waves(x), p.to(C) * 1j).imag.sin().sum(-1)),
    "einsum": ([(D, 3)], lambda p, x: torch.einsum("...i,io->...o", waves(x), p + 0j).angle().sum(-1)),
    "state space": (
        [(D, 1)],
        lambda p, x: torch.exp(p * torch.complex(-x.abs(), x).unsqueeze(-1)).sum(-2).real.sum(-1),
    ),
    "pairs": (
        [(D,)],
        lambda p, x: (torch.view_as_complex((x * p).unflatten(-1, (3, 2))) * (1 + 2j)).abs().sum(-1),
    ),
    "rotary": (
        [(D, D)],
        lambda p, x: torch.view_as_real(
            torch.view_as_complex((x @ p).unflatten(-1, (3, 2)).contiguous()) * torch.polar(
                torch.ones(3).double(), torch.arange(3).double()
            )
        ).flatten(-2).sin().sum(-1),
    ),
    "conjugates": ([(D,)], lambda p, x: (torch.exp(1j * p).conj() * waves(x).conj()).real.sin().sum(-1)),
    "before and behind": (
        [(D, D), (4,), (D, 1)],
        lambda v, p, w, x: (torch.fft.irfft(torch.fft.rfft((x @ v).tanh()) * p, n=D).sin() @ w)[..., 0],
    ),
    "fourier transform of a weight": (
        [(D,)],
        lambda p, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(p), n=D).sin().sum(-1),
    ),
}  # fmt: skip

COMPLEX: dict[str, tuple[Sequence[tuple[int, ...]], Function]] = {
    "product": ([(D,)], lambda z, x: (z * waves(x)).abs().sum(-1)),
    "conjugate": ([(D,)], lambda z, x: (z.conj() * waves(x) + z * z).real.sin().sum(-1)),
    "real and imaginary part": ([(D,)], lambda z, x: (z.real * x + z.imag.sin() * x.cos()).sum(-1)),
    "absolute value": ([(D,)], lambda z, x: (z.abs() * x).sin().sum(-1)),
    "real data": ([(D, 3)], lambda z, x: ((x + 0j) @ z).abs().sum(-1)),
    "linear": (
        [(4, D), (4,), (2, 4)],
        lambda z, b, v, x: F.linear(torch.tanh(F.linear(waves(x), z, b)), v).abs().square().sum(-1),
    ),
    "einsum": ([(D, 3)], lambda z, x: torch.einsum("...i,io->...o", waves(x), z).imag.sin().sum(-1)),
    "spectral convolution": (
        [(4,)],
        lambda z, x: torch.fft.irfft(torch.fft.rfft(x) * z, n=D).sin().square().sum(-1),
    ),
    "view of pairs": ([(3, 3)], lambda z, x: (x @ torch.view_as_real(z).flatten(1).T).sin().sum(-1)),
    "tied": ([(D, D)], lambda z, x: ((waves(x) @ z) @ z.mH).abs().sum(-1)),
    "choice": ([(D,)], lambda z, x: (torch.where(x > 0, z, 2 * z.conj()) * waves(x)).real.sin().sum(-1)),
    "slice": ([(D + 2,)], lambda z, x: ((z[1:-1] + 1) * waves(x)).abs().sum(-1)),
}

EITHER: dict[str, Function] = {  # of a vector [D] of real or of complex numbers
    "angle": lambda p, x: (p + waves(x)).angle().sin().sum(-1),
    "sign": lambda p, x: ((p + waves(x)).sgn() * waves(x)).real.sum(-1),
    "vandermonde": lambda p, x: (
        (torch.exp(0.1j * p[:, None] * torch.arange(D)) * waves(x).unsqueeze(-1)).sum(-1).abs().sum(-1)
    ),
    "power": lambda p, x: ((p + 2 + waves(x)) ** 2.5).abs().sum(-1),
    "division": lambda p, x: (p / waves(x)).abs().sum(-1),
    "norm": lambda p, x: (p * waves(x)).norm(dim=-1),
    "matrix exponential": lambda p, x: (
        (torch.matrix_exp(p[:4].view(2, 2) * 1j) @ waves(x).unflatten(-1, (2, 3))).abs().sum((-1, -2))
    ),
    "outer product with its conjugate": lambda p, x: (
        (waves(x).unsqueeze(-1) * torch.outer(p, p.conj())).abs().sum((-1, -2))
    ),
    "three operands": lambda p, x: torch.einsum("...i,i,i->...", waves(x), p.to(C), p.to(C).conj()).abs(),
    "joined": lambda p, x: torch.cat([p * waves(x), (p + 1j).expand_as(waves(x))], -1).abs().sum(-1).sin(),
}
REAL.update((name, ([(D,)], function)) for name, function in EITHER.items())
COMPLEX.update((name, ([(D,)], function)) for name, function in EITHER.items())


def leaves(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Real tensors that require gradients: what parameters are made of."""
    return [(torch.view_as_real(p) if p.is_complex() else p).clone().requires_grad_() for p in parameters]


def of_leaves(parts: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_complex(r) if p.is_complex() else r for r, p in zip(parts, like, strict=True)]


def wanted(function: Function, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """The Gramian of the real and imaginary parts as real parameters, one sample at a time."""
    parts = leaves(parameters)
    out = torch.stack([function(*of_leaves(parts, parameters), sample) for sample in x])
    return dense_gramian(out, parts)


CASES = [(name, *case, False) for name, case in REAL.items()]
CASES += [(f"complex: {name}", *case, True) for name, case in COMPLEX.items()]
cases = pytest.mark.parametrize(
    ("shapes", "function", "of"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)


@cases
def test_transforms(shapes: Sequence[tuple[int, ...]], function: Function, of: bool) -> None:
    parameters = [complex_draw(*s) if of else draw(*s) for s in shapes]
    x = draw(B, D)
    want = wanted(function, parameters, x)
    got = gramjd.gramian(lambda ps, x: function(*ps, x))(parameters, x)
    assert_close(got, want)
    assert_symmetric(got)
    whole = gramjd.gramian(lambda ps: function(*ps, x), in_dims=None)(parameters)  # all samples at once
    assert_close(whole, want)


@cases
def test_engine(shapes: Sequence[tuple[int, ...]], function: Function, of: bool) -> None:
    """Op by op, and without rows one at a time."""
    if OLD and function in (COMPLEX["slice"][1], EITHER["matrix exponential"]):
        pytest.skip("modes of torch 2.1 see no slices")
    names = [f"p{n}" for n in range(len(shapes))]
    model = Net(lambda m, x: function(*(getattr(m, name) for name in names), x))
    for name, shape in zip(names, shapes, strict=True):
        setattr(model, name, nn.Parameter(complex_draw(*shape) if of else draw(*shape)))
    parameters = [p.detach() for p in model.parameters()]
    for batch_dim in (0, None):
        engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
        for _ in range(2):
            x = draw(B, D)
            out = model(x)
            want = wanted(function, parameters, x)
            assert_close(engine.compute_gramian(out), want)
            assert_close(engine.jacobian(out).gramian(), want)
        engine.close()


@pytest.mark.parametrize("way", ["ops", "functional", "rows"])
def test_every_way_of_an_engine(way: str) -> None:
    model = Net(lambda m, x: (waves(x) @ m.z * m.p).abs(), z=nn.Parameter(complex_draw(D, 2)),
                p=nn.Parameter(draw(2)))  # fmt: skip
    engine, x = Engine(model, batch_dim=0, strategies=[way]), draw(B, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        got = engine.compute_gramian(model(x))
    parts = leaves([model.z, model.p])
    z, p = of_leaves(parts, [model.z, model.p])
    assert_close(got, dense_gramian((waves(x) @ z * p).abs(), parts))


def test_gradients_in_torchs_convention() -> None:
    """``.grad``, ``vjp``, ``dense`` and ``jvp`` are what autograd says of complex parameters."""
    model = Net(lambda m, x: (waves(x) @ m.z * m.p).abs().sum(1), z=nn.Parameter(complex_draw(D, 2)),
                p=nn.Parameter(draw(2)))  # fmt: skip
    x, w = draw(B, D), draw(B)
    model(x).backward(w)
    want = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    engine = Engine(model, batch_dim=0)
    engine.jacobian(model(x)).backward(w)
    function, parameters = gramjd.functional_loss(model)
    J = gramjd.jacobian(function)(parameters, x)
    found = J.vjp(w)
    both = J.vjp(torch.stack([w, 2 * w]))
    dense = J.dense()
    for name, p in model.named_parameters():
        assert p.grad is not None and want[name] is not None
        assert_close(p.grad, want[name])
        assert_close(found[name], want[name])
        assert_close(both[name][1], 2 * want[name])
        assert_close(torch.tensordot(w.to(p.dtype), dense[name], 1), want[name])
    v = {name: torch.randn_like(p) for name, p in parameters.items()}
    step = 1e-6
    ends = [model_at(function, {n: p + s * step * v[n] for n, p in parameters.items()}, x) for s in (1, -1)]
    assert_close(J.jvp(v), (ends[0] - ends[1]) / (2 * step), 1e-7)


def model_at(function: Function, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.stack([function(parameters, sample) for sample in x])


def test_as_a_matrix() -> None:
    """Real and imaginary parts lie side by side in flat vectors."""
    z, p, x = complex_draw(D, 2), draw(2), draw(B, D)
    J = gramjd.jacobian(lambda ps, x: (waves(x) @ ps[0] * ps[1]).abs())([z, p], x)
    assert J.shape == (2 * B, 4 * D + 2) and J.dtype == torch.float64
    eye = torch.eye(J.shape[1]).double()
    matrix = J @ eye
    assert_close((J.T @ torch.eye(2 * B).double()).T, matrix)
    assert_close(J @ J.T, matrix @ matrix.T)
    assert_close(J @ eye[3], matrix[:, 3])
    square = J.gramian()
    assert_close(J.norms(), square.diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=1).sqrt())
    shares = J.gramian(per="parameter")
    assert_close(sum(shares.values()), square)
    assert_close(gramjd.Jacobian.cat([J, J]).gramian()[B:, :, :, B:], square)
    single = J.to(dtype=torch.float32)
    assert [q.dtype for q in single.parameters] == [torch.complex64, torch.float32]
    assert_close(single.gramian().double(), square, 1e-5)


def test_composition() -> None:
    """Under vmap, under grad and in a graph of make_fx."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(z: Tensor, x: Tensor) -> Tensor:
        return (waves(x) @ z).abs().sum()

    def objective(z: Tensor, x: Tensor) -> Tensor:
        return gramjd.gramian(f)(z, x).sin().sum()

    zs, x = complex_draw(3, D, 2), draw(B, D)
    each = torch.stack([gramjd.gramian(f)(z, x) for z in zs])
    assert_close(torch.vmap(gramjd.gramian(f), (0, None))(zs, x), each)
    assert_close(make_fx(gramjd.gramian(f))(zs[0], x)(zs[1], x), each[1])
    got = torch.func.grad(objective)(zs[0], x)
    step = 1e-6
    for n in (0, 3):
        for direction in (1, 1j):
            moved = torch.zeros(D, 2, dtype=C)
            moved.view(-1)[n] = direction * step
            ends = [objective(zs[0] + s * moved, x) for s in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * step)
            part = got.view(-1)[n].real if direction == 1 else got.view(-1)[n].imag
            assert_close(part, slope, 1e-6)


def test_a_step_lowers_the_losses() -> None:
    """The weighted gradient of ``losses.backward`` and the Gramian belong together."""
    model = Net(lambda m, x: (waves(x) @ m.z).abs().square().sum(1), z=nn.Parameter(complex_draw(D, 2)))
    x, w = draw(B, D), draw(B)
    engine, losses = Engine(model, batch_dim=0), model(x)
    gramian = engine.compute_gramian(losses)
    losses.backward(w)
    step = 1e-7
    with torch.no_grad():
        model.z -= step * model.z.grad
        change = (model(x) - losses) / step
    assert_close(change, -gramian @ w, 1e-5)


def test_complex_outputs_are_refused() -> None:
    model = Net(lambda m, x: waves(x) * m.z, z=nn.Parameter(complex_draw(D)))
    with pytest.raises(TypeError, match=r"output is complex.*view_as_real"):
        Engine(model, batch_dim=0).compute_gramian(model(draw(B, D)))
    with pytest.raises(TypeError, match=r"complex128.*view_as_real"):
        gramjd.gramian(lambda z, x: waves(x) * z)(complex_draw(D), draw(B, D))


def test_samples_that_are_scattered() -> None:
    """Complex values of samples of unequal lengths, one after the other."""
    sizes = [2, 4, 1, 3, 2]
    owner = torch.repeat_interleave(torch.arange(B), torch.tensor(sizes))
    z, p = nn.Parameter(complex_draw(D, 2)), nn.Parameter(draw(2))
    model = Net(lambda m, x: waves(x) @ m.z * m.p, z=z, p=p)
    x = draw(len(owner), D)

    def losses(values: Tensor) -> Tensor:
        return torch.zeros(B).double().index_add(0, owner, values.abs().square().sum(1))

    engine = Engine(model, batch_dim=0)
    parts = leaves([z, p])
    values = of_leaves(parts, [z, p])
    want = dense_gramian(losses(waves(x) @ values[0] * values[1]), parts)
    assert_close(engine.compute_gramian(losses(model(x))), want)


@pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13),
    reason="Dynamo traces these transforms as of torch 2.13",
)
def test_compiled() -> None:
    def step(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        J = gramjd.jacobian(lambda p, x: (waves(x) @ p["z"] * p["s"]).abs().sum())(p, x)
        return J.gramian(), J.vjp(torch.ones(B).double())

    p, x = {"z": complex_draw(D, 2), "s": draw(2)}, draw(B, D)
    want = step(p, x)
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(p, x)
    assert_close(got[0], want[0])
    assert_close(got[1]["z"], want[1]["z"])


@pytest.mark.parametrize("of", [False, True])
def test_writes_in_place(of: bool) -> None:
    """Of parameters into complex values: no op that can be called again, but the module can."""

    def function(p: Tensor, x: Tensor) -> Tensor:
        return (waves(x) * 1).mul_(p).add_(p).abs().sum(-1)

    p, x = complex_draw(D) if of else draw(D), draw(B, D)
    want = wanted(function, [p], x)
    assert_close(gramjd.gramian(function)(p, x), want)
    model = Net(lambda m, x: function(m.p, x), p=nn.Parameter(p))
    assert_close(Engine(model, batch_dim=0).compute_gramian(model(x)), want)
