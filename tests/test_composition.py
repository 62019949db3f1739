"""The transforms inside and around torch.func's own, against dense references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import gramjd

Params = dict[str, Tensor]

# torch's forward-mode derivatives use what torch itself calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


class PlainNorm(TorchFunctionMode):
    """Layer normalisation by its formula: torch's own has a wrong derivative of its derivative."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.layer_norm:
            return func(*args, **(kwargs or {}))
        x, scale, shift = args[0], kwargs["weight"], kwargs["bias"]
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale + shift


def flat(tree: Params, start: int) -> Tensor:
    return torch.cat([tree[name].flatten(start) for name in sorted(tree)], -1)


def dense(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The Gramian by definition, from ``torch.func.jacrev``, with everything batched along 0."""

    def transformed(params: Params, *args: Tensor) -> Tensor:
        with PlainNorm():
            rows = vmap(jacrev(func), (None, *[0] * len(args)))(params, *args)
        out = func(params, *[x[0] for x in args]).ndim
        J = flat(rows, 1 + out)
        matrix = J.flatten(0, out) @ J.flatten(0, out).mT
        square = matrix.view(*J.shape[:-1], *J.shape[:-1])
        return square.permute(*range(1 + out), *reversed(range(1 + out, 2 + 2 * out)))

    return transformed


def mlp(p: Params, x: Tensor) -> Tensor:
    """Two outputs a sample."""
    h = F.layer_norm(F.linear(x, p["w1"], p["b1"]), (4,), p["s"], p["t"])
    return F.linear(F.gelu(h), p["w2"] * p["scale"])


def loss(p: Params, x: Tensor) -> Tensor:
    return mlp(p, x).square().sum()


def make_params(*lead: int) -> Params:
    shapes = {"w1": (4, 3), "b1": (4,), "s": (4,), "t": (4,), "w2": (2, 4), "scale": (2, 1)}
    return {name: torch.randn(*lead, *shape).double() for name, shape in shapes.items()}


FUNCTIONS = {"losses": loss, "outputs": mlp}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_over_ensembles(name: str) -> None:
    func, x = FUNCTIONS[name], torch.randn(3, 3).double()
    members = make_params(5)
    got = vmap(gramjd.gramian(func), (0, None))(members, x)
    want = torch.stack([dense(func)({k: v[n] for k, v in members.items()}, x) for n in range(5)])
    assert_close(got, want)
    both = vmap(gramjd.gramian(func))(members, torch.stack([x] * 5))
    assert_close(both, want)


def test_vmap_over_seeds() -> None:
    """Each seed draws parameters and inputs of its own."""

    def at(scale: Tensor) -> Tensor:
        params = {k: scale * v for k, v in base.items()}
        x = torch.randn(3, 3, dtype=torch.float64)
        return torch.stack([gramjd.gramian(loss)(params, x), dense(loss)(params, x)])

    base = make_params()
    found = vmap(at, randomness="different")(torch.linspace(0.5, 1.5, 4).double())
    assert_close(found[:, 0], found[:, 1])
    assert not torch.allclose(found[0], found[1])


def logdet(G: Tensor) -> Tensor:
    n = int(G.numel() ** 0.5)
    return torch.logdet(G.reshape(n, n) + torch.eye(n).double())


def alignment(G: Tensor) -> Tensor:
    """Of the kernel with a target kernel."""
    target = torch.linspace(-1, 1, G.numel()).double().view(G.shape)
    return (G * target).sum() / G.norm()


def weighted(G: Tensor) -> Tensor:
    """The squared norm of UPGrad's update, its weights held constant."""
    n = int(G.numel() ** 0.5)
    matrix = G.reshape(n, n)
    w = gramjd.weighting.upgrad(matrix.detach())
    return w @ matrix @ w


@pytest.mark.parametrize("of", [logdet, alignment])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_grad_through_the_gramian(name: str, of: Callable[[Tensor], Tensor]) -> None:
    func, x, params = FUNCTIONS[name], torch.randn(3, 3).double(), make_params()
    found, wanted = (
        grad(lambda p, x, g=g: of(g(func)(p, x)), (0, 1))(params, x) for g in (gramjd.gramian, dense)
    )
    for key in params:
        assert_close(found[0][key], wanted[0][key])
    assert_close(found[1], wanted[1])


@pytest.mark.parametrize("by", ["autograd", "func"])
def test_grad_with_weights_held_constant(by: str) -> None:
    """With respect to parameters and inputs."""
    x, params = torch.randn(3, 3).double(), make_params()

    def gradients(g: Callable[..., Any]) -> list[Tensor]:
        if by == "func":
            by_params, by_x = grad(lambda p, x: weighted(g(loss)(p, x)), (0, 1))(params, x)
            return [*by_params.values(), by_x]
        leaves = [*(p.clone().requires_grad_() for p in params.values()), x.clone().requires_grad_()]
        given = dict(zip(params, leaves[:-1], strict=True))
        return list(torch.autograd.grad(weighted(g(loss)(given, leaves[-1])), leaves))

    for got, want in zip(gradients(gramjd.gramian), gradients(dense), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("of", [logdet, alignment, weighted, torch.clone])
def test_jacrev_through_the_gramian(of: Callable[[Tensor], Tensor]) -> None:
    """With respect to parameters and inputs, of scalars and of the whole Gramian."""
    x, params = torch.randn(3, 3).double(), make_params()
    found, wanted = (
        jacrev(lambda p, x, g=g: of(g(loss)(p, x)), (0, 1))(params, x) for g in (gramjd.gramian, dense)
    )
    for key in params:
        assert_close(found[0][key], wanted[0][key])
    assert_close(found[1], wanted[1])


def test_jvp_of_the_gramian() -> None:
    x, params = torch.randn(3, 3).double(), make_params()
    tangents = make_params(), torch.randn(3, 3).double()
    found, wanted = (jvp(g(mlp), (params, x), tangents)[1] for g in (gramjd.gramian, dense))
    assert_close(found, wanted)


def test_derivative_of_products() -> None:
    """``J.vjp``, ``J.jvp`` and the norms are differentiable, too."""
    x, params = torch.randn(3, 3).double(), make_params()

    def direct(p: Params) -> Tensor:
        with PlainNorm():
            return flat(grad(lambda p: vmap(loss, (None, 0))(p, x) @ w)(p), 0).square().sum()

    def ours(p: Params) -> Tensor:
        return flat(gramjd.jacobian(loss)(p, x).vjp(w), 0).square().sum()

    w = torch.randn(3).double()
    found, wanted = grad(ours)(params), grad(direct)(params)
    for key in params:
        assert_close(found[key], wanted[key])


def pinn(p: Params, x: Tensor) -> Tensor:
    """The residual of Poisson's equation, by two derivatives inside."""

    def u(x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, p["w1"], p["b1"]))
        return F.linear(h, p["w2"]).sum() + (p["s"] * h).sum()

    return torch.trace(torch.func.hessian(u)(x)) - x.sum()


def forward_over_reverse(p: Params, x: Tensor) -> Tensor:
    def u(x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, p["w1"], p["b1"])), p["w2"]).sum()

    return jvp(grad(u), (x,), (torch.ones_like(x),))[1].sum() + u(x)


def maml(p: Params, x: Tensor) -> Tensor:
    """The loss after one inner gradient step."""
    inner = grad(loss)(p, x)
    return loss({k: v - 0.1 * inner[k] for k, v in p.items()}, x.flip(0))


def inner_vmap(p: Params, x: Tensor) -> Tensor:
    """The same weights at every position, by a vmap of the function's own."""
    tokens = torch.stack([x, 2 * x, x.sin()])
    h = vmap(lambda t: F.linear(t, p["w1"], p["b1"]))(tokens)
    return F.linear(torch.tanh(h), p["w2"]).square().sum() + vmap(mlp, (None, 0))(p, tokens).sum()


def derived_inside(p: Params, x: Tensor) -> Tensor:
    """A tensor made of parameters alone that meets the batch at an inner level, and outside of it."""
    w = p["w1"].T / p["w1"].norm()
    u = lambda x: torch.tanh(x @ w).sum()  # noqa: E731
    return grad(u)(x).square().sum() + (x @ w).sin().sum()


def written(p: Params, x: Tensor) -> Tensor:
    """Parameters written into buffers, used under no_grad, detached, compared, indexed by data."""
    buffer = torch.cat([x, x[:1]])
    buffer[:2] = p["b1"][:2]
    h = F.relu(F.linear(x, p["w1"], p["b1"]), inplace=True) + buffer
    with torch.no_grad():
        frozen = F.linear(x, p["w1"])
        also = p["w2"].T * 2
    h.mul_(p["s"])
    gate = torch.where(p["t"] > 0, h, -h)
    row = p["w1"].index_select(0, (x[:1] > 0).long())
    return (gate * frozen).sum() + (h @ also).sum() + (p["t"].detach() * h).sum() + row.sin().sum()


def writing(how: str) -> Callable[[Params, Tensor], Tensor]:
    """A function that writes into what the gradient of an earlier op needs."""

    def func(p: Params, x: Tensor) -> Tensor:
        h, scale = x - 0.1, torch.ones(4, 1, dtype=torch.float64)
        y = F.linear(h, p["w1"] * scale)
        if how == "method":
            h.add_(1)
        elif how == "operator":
            h += 1
        elif how == "item":
            h[0] = 1
        elif how == "view":
            h[:2].zero_()
        elif how == "flag":
            F.relu(h, inplace=True)
        elif how == "constant":  # of a tensor made of parameters
            scale.mul_(2)
        return y.sin().sum()

    return func


WRITES = ["method", "operator", "item", "view", "flag", "constant"]


def harmless(p: Params, x: Tensor) -> Tensor:
    """Writes after which every gradient can be had: into what no gradient needs, or of no effect."""
    h, buffer = x * 1, torch.cat([x, x[:1]])
    y = h + p["w1"][0]
    unused = F.linear(h, p["w1"])
    h.add_(3)
    buffer[:3] = h
    buffer = buffer * p["t"]
    z = F.linear(h, p["w1"]).add_(1)
    unused.zero_()
    return y.square().sum() + (z * buffer).sum()


def closed_over(p: Params, x: Tensor) -> Tensor:
    """Another level's tensors, by a closure."""
    return grad(lambda y: F.linear(torch.sin(y * x), p["w1"]).square().sum())(x).square().sum()


INSIDE = [pinn, forward_over_reverse, maml, inner_vmap, derived_inside, written, closed_over]


@pytest.mark.parametrize("func", INSIDE)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_transforms_inside(func: Callable[..., Tensor], several: bool) -> None:
    x, params = torch.randn(4, 3).double(), make_params()

    def objectives(p: Params, x: Tensor) -> Tensor:
        return torch.stack([func(p, x), loss(p, x) + func(p, 2 * x)]) if several else func(p, x)

    assert_close(gramjd.gramian(objectives)(params, x), dense(objectives)(params, x))
    if func is written:
        return  # vmap refuses writes of what it maps over
    members = make_params(2)
    found, wanted = (vmap(g(objectives), (0, None))(members, x) for g in (gramjd.gramian, dense))
    assert_close(found, wanted)


@pytest.mark.parametrize("how", WRITES)
def test_writes_that_gradients_do_not_survive(how: str) -> None:
    """An error, as of autograd."""
    func, params, x = writing(how), make_params(), torch.randn(4, 3).double()
    for transformed in (
        vmap(grad(func), (None, 0)),
        gramjd.gramian(func),
        gramjd.gramian(func, chunk_size=2),
    ):
        with pytest.raises(RuntimeError, match="inplace operation"):
            transformed(params, x)
    with pytest.raises(RuntimeError, match="inplace operation"):
        gramjd.gramian(func, in_dims=None)(params, x[0])


def test_harmless_writes() -> None:
    params, x = make_params(), torch.randn(4, 3).double()
    assert_close(gramjd.gramian(harmless)(params, x), dense(harmless)(params, x))


@pytest.mark.parametrize("func", [pinn, maml, derived_inside])
def test_grad_around_and_inside(func: Callable[..., Tensor]) -> None:
    x, params = torch.randn(3, 3).double(), make_params()
    with PlainNorm():
        found, wanted = (grad(lambda p, g=g: logdet(g(func)(p, x)))(params) for g in (gramjd.gramian, dense))
    for key in params:
        assert_close(found[key], wanted[key])


def test_weights_computed_from_parameters_without_a_batch() -> None:
    """Where nothing is batched, a tensor made of parameters alone is like any other."""
    x, params = torch.randn(3).double(), make_params()
    assert_close(gramjd.gramian(mlp, in_dims=None)(params, x), dense(mlp)(params, x[None])[0, ..., 0])


def wide(p: Params, x: Tensor) -> Tensor:
    """Four outputs a sample: of 260 samples, more rows than one product takes at once."""
    return torch.tanh(x @ p["w1"].T + p["b1"]) @ p["w2"].T


def wide_params(*lead: int) -> Params:
    shapes = {"w1": (5, 3), "b1": (5,), "w2": (4, 5)}
    return {name: torch.randn(*lead, *shape).double() for name, shape in shapes.items()}


def test_products_in_pieces_inside_transforms() -> None:
    """What is written in place elsewhere is not where something differentiates, maps or traces it."""
    x, params, tangent = torch.randn(260, 3).double(), wide_params(), wide_params()
    found, want = (g(wide)(params, x) for g in (gramjd.gramian, dense))
    assert_close(found, want)
    grads, wanted = (grad(lambda p, g=g: alignment(g(wide)(p, x)))(params) for g in (gramjd.gramian, dense))
    for key in params:
        assert_close(grads[key], wanted[key])
    found, tangents = (jvp(lambda p, g=g: g(wide)(p, x), (params,), (tangent,))[1]
                       for g in (gramjd.gramian, dense))  # fmt: skip
    assert_close(found, tangents)
    members = wide_params(2)
    found = vmap(gramjd.gramian(wide), (0, None))(members, x)
    for n in range(2):
        assert_close(found[n], dense(wide)({k: v[n] for k, v in members.items()}, x))
    with forward_ad.dual_level():
        dual = {k: forward_ad.make_dual(v, tangent[k]) for k, v in params.items()}
        found = forward_ad.unpack_dual(gramjd.gramian(wide)(dual, x))
    assert_close(found.primal, want)
    assert_close(found.tangent, tangents)
    traced = make_fx(gramjd.gramian(wide))(params, x)
    assert_close(traced(members := wide_params(), x), dense(wide)(members, x))
    assert_close(torch.func.functionalize(gramjd.gramian(wide))(params, x), want)


def test_inference_mode() -> None:
    """Right, or an error where torch itself gives zeros."""
    x, params = torch.randn(260, 3).double(), wide_params()
    want = dense(wide)(params, x)
    with torch.inference_mode():
        if not grad(torch.sin)(torch.zeros(())):
            with pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
                gramjd.jacobian(wide)(params, x)
            return
        J = gramjd.jacobian(wide)(params, x)
        assert_close(J.gramian().clone(), want)
    assert_close(J.gramian(), want)


def test_inside_no_grad() -> None:
    x, params = torch.randn(3, 3).double(), {k: v.requires_grad_() for k, v in make_params().items()}
    with torch.no_grad():
        got = gramjd.gramian(mlp)(params, x)
    assert not got.requires_grad
    assert_close(got, dense(mlp)(params, x))


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh()).logsumexp(-1).sum(-1)


def test_functional_call_with_tied_parameters() -> None:
    model, ids = TiedModel().double(), torch.randint(0, 7, (4, 5))
    params = {k: v.detach() for k, v in model.named_parameters()}

    def func(p: Params, ids: Tensor) -> Tensor:
        return functional_call(model, p, (ids,))

    assert params.keys() == {"embed.weight"}
    assert_close(gramjd.gramian(func)(params, ids), dense(func)(params, ids))


@pytest.mark.parametrize("take", ["index", "unbind", "loop"])
def test_stacked_parameters_by_index(take: str) -> None:
    """One tensor holds the weights of all layers, as scanned models keep them."""
    params = {"w": torch.randn(3, 4, 4).double(), "b": torch.randn(3, 4).double()}

    def func(p: Params, x: Tensor) -> Tensor:
        if take == "unbind":
            for w, b in zip(p["w"].unbind(0), p["b"], strict=True):
                x = torch.tanh(F.linear(x, w, b))
        elif take == "index":
            for n in range(3):
                x = torch.tanh(F.linear(x, p["w"][n], p["b"][n]))
        else:
            for n in range(3):
                x = torch.tanh(x @ p["w"].select(0, n).T + p["b"].narrow(0, n, 1).squeeze(0))
        return x.sum()

    x = torch.randn(5, 4).double()
    assert_close(gramjd.gramian(func)(params, x), dense(func)(params, x))


def test_ops_that_torch_differentiates_wrongly_under_nested_vmap() -> None:
    def func(p: Tensor, x: Tensor) -> Tensor:
        return torch.cdist(x[None], p).square().sum(0)

    p, x = torch.randn(3, 2).double(), torch.randn(4, 2).double()
    got = gramjd.gramian(func)(p, x)  # several outputs, one at a time
    rows = 2 * (p - x[:, None]).unsqueeze(2) * torch.eye(3)[None, :, :, None].transpose(1, 2)
    J = rows.double().transpose(1, 2).flatten(2)
    assert_close(got, torch.einsum("bkn,cln->bklc", J, J))
    with pytest.raises(NotImplementedError, match="cdist is wrong, or fails, under nested vmap"):
        vmap(gramjd.gramian(func), (0, None))(torch.randn(2, 3, 2).double(), x)


class Subclass(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")  # torch 2.1
def test_tensor_subclasses_are_refused() -> None:
    p, x = torch.randn(3), torch.randn(4, 3)
    func: Any = lambda p, x: (p * x).sum()  # noqa: E731
    for args in ((p.as_subclass(Subclass), x), (p, x.as_subclass(Subclass))):
        with pytest.raises(TypeError, match=r"plain tensors, not Subclass.*as_subclass"):
            gramjd.gramian(func)(*args)
    with pytest.raises(TypeError, match="UninitializedParameter"):
        gramjd.gramian(func)(nn.LazyLinear(3).weight, x)
    assert gramjd.gramian(func)(nn.Parameter(p), x).shape == (4, 4)
