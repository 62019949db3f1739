"""An engine changes neither whether nor what a forward computes: bit by bit, generator and buffers, too."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import Net, draw, objectives, parameter
from oracle import OLD, assert_close, dense_gramian
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import gramjd
from gramjd import Engine

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using backward.*create_graph:UserWarning"),
]

B, D = 4, 5


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 1))


class Scaled(torch.Tensor):
    """A subclass that keeps its type, as ``torch.Tensor`` does by default."""


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return 2 * g * w, (2 * g * x).sum_to_size(w.shape)


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


def scripted_inside() -> nn.Module:
    return Net(
        lambda m, x: m.last(m.f(x)), f=nn.Linear(D, D), last=torch.jit.script(nn.Linear(D, 2).double())
    )


def traced_inside() -> nn.Module:
    last = torch.jit.trace(nn.Linear(D, 2).double(), draw(B, D))
    return Net(lambda m, x: m.last(m.f(x)), f=nn.Linear(D, D), last=last)


def parametrized() -> nn.Module:
    layer = nn.Linear(D, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    nn.utils.parametrizations.weight_norm(second := nn.Linear(3, 3))
    return nn.Sequential(layer, second)


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)), nn.Linear(D, 2))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, 3), nn.Linear(3, 3))
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model[0].register_forward_hook(lambda m, args, out: out + args[0].sum(1, keepdim=True))
    model[1].weight.register_hook(lambda g: g * 1)
    return model


def stacked_ensemble(m: Any, x: Tensor) -> Tensor:
    """Parameters given to ``vmap``, as ensembles do."""
    params = {n: torch.stack([p, p + m.shift]) for n, p in m.f.named_parameters()}
    return vmap(lambda p: functional_call(m.f, p, (x,)))(params).sum(0)


def inner_steps(m: Any, x: Tensor) -> Tensor:
    """A step of MAML's inner loop by ``torch.func.grad``."""
    params = dict(m.f.named_parameters())
    slope = grad(lambda p: functional_call(m.f, p, (x[0],)).square().sum())(params)
    return functional_call(m.f, {n: p - 0.1 * slope[n] for n, p in params.items()}, (x,))


def inner_steps_of_autograd(m: Any, x: Tensor) -> Tensor:
    params = dict(m.f.named_parameters())
    loss = functional_call(m.f, params, (x,)).square().sum()
    slope = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    params = {n: p - 0.1 * g for (n, p), g in zip(params.items(), slope, strict=True)}
    return functional_call(m.f, params, (x,))


def force(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(m.f(x).sum(), x, create_graph=True)[0]


def of_a_chunk(m: Any, x: Tensor) -> Tensor:
    """A view of a tensor made of parameters, then a write into that tensor."""
    w = m.w * 2
    first, _ = w.chunk(2)
    w.mul_(3)
    return x[:, : len(first)] * first


def of_a_view(m: Any, x: Tensor) -> Tensor:
    """A write into a view of a tensor made of parameters."""
    w = m.w * 2
    w.view(D, 1).add_(1).mul_(m.w[:, None])
    return x * w


def of_entries(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    w[0] = 0
    w[1:3] *= 2
    return x * w


def in_a_list(m: Any, x: Tensor) -> Tensor:
    a, b = (m.w * 1).split(3) if D == 6 else (m.w * 1).split([2, 3])
    b.mul_(a.sum())
    return x * torch.cat([a, b])


def written_output(m: Any, x: Tensor) -> Tensor:
    h = m.f[0](x)
    h[:, 0] = h[:, 1] * m.w[0]
    h.view(-1)[::2].add_(1)
    return h.relu_()


def no_grad_write(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.ema.mul_(0.9).add_(m.w, alpha=0.1)
    return x * m.w + m.ema


def detached(m: Any, x: Tensor) -> Tensor:
    return x * m.w - (x * m.w.detach()).mean() * m.w.data.norm()


def in_inference_mode(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = m.f(x).mean().clone()
    return x * m.w * float(scale)


def saved_hooks(m: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return m.f(x)


def own_mode(m: Any, x: Tensor) -> Tensor:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with Mode():
        return m.f(x)


def random_in_vmap(m: Any, x: Tensor) -> Tensor:
    return vmap(lambda z: m.f(F.dropout(z, 0.5)), randomness="different")(x)


def caught(m: Any, x: Tensor) -> Tensor:
    try:
        m.f(x[:, :-1])
    except RuntimeError:
        x = x + 1
    return m.f(x)


def caught_in_transform(m: Any, x: Tensor) -> Tensor:
    try:
        vmap(grad(m.f))(x)  # not a scalar
    except Exception:
        x = x + 1
    return m.f(x)


def jagged(m: Any, x: Tensor) -> Tensor:
    nested = torch.nested.nested_tensor([*x.split([1, 3])], layout=torch.jagged)
    return torch.cat(m.f(nested).unbind())


def nested_and_derived(m: Any, x: Tensor) -> Tensor:
    nested = torch.nested.nested_tensor([*x.split([1, 3])], layout=torch.jagged)
    return torch.cat(F.linear(nested, (m.g * 2).T).unbind()) + x @ m.g


def forward_mode(m: Any, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(m.f(dual)).tangent + m.f(x)


TRANSFORMS: dict[str, Any] = {
    "vmap of grad": lambda m, x: vmap(grad(lambda z: m.f(z)[0]))(x),
    "vmap of grad beside the model": lambda m, x: m.f(x) + vmap(grad(lambda z: m.f(z)[0]))(x),
    "vmap of grad of one layer": lambda m, x: m.f[0](x) * vmap(grad(lambda z: m.f(z)[0]))(x).sum(1)[:, None],
    "vmap": lambda m, x: vmap(m.f)(x),
    "vmap of hessian": lambda m, x: vmap(hessian(lambda z: m.f(z)[0]))(x).diagonal(dim1=1, dim2=2),
    "vmap of jacrev": lambda m, x: vmap(jacrev(m.f))(x).flatten(1),
    "vmap of jacfwd": lambda m, x: vmap(jacfwd(m.f))(x).flatten(1),
    "hessian of a sum": lambda m, x: hessian(lambda z: m.f(z).sum())(x).diagonal(dim1=0, dim2=2).sum(0).T,
    "jvp": lambda m, x: jvp(m.f, (x,), (x.sin(),))[1],
    "vjp": lambda m, x: vjp(m.f, x)[1](torch.ones(B, 1).double())[0],
    "an ensemble": stacked_ensemble,
    "inner steps": inner_steps,
    "a weight made outside": lambda m, x: (
        vmap(lambda z: z @ m.h)(x) if setattr(m, "h", m.g.T * 2) is None else 0
    ),
    "a weight made outside, used there, too": lambda m, x: _twice(m.g.T * 2, x),
    "random": random_in_vmap,
    "an error that is caught": caught_in_transform,
    "in a checkpoint": lambda m, x: checkpoint(lambda z: vmap(m.f)(z), x, use_reentrant=False),
    "functorch's old names": lambda m, x: torch.autograd.functional.jacobian(
        lambda z: m.f(z).sum(0), x, create_graph=True
    )[0],
    "forward mode": forward_mode,
    "an energy's force": force,
    "inner steps of autograd": inner_steps_of_autograd,
}


def _twice(w: Tensor, x: Tensor) -> Tensor:
    return x @ w + vmap(lambda z: (z @ w).sin())(x)


def transposed_then_masked(m: Any, x: Tensor) -> Tensor:
    bias = (m.g * 2).transpose(0, 1)
    bias.masked_fill_(torch.ones(D, D).tril().bool(), 0.5)
    return x @ bias


def two_views(m: Any, x: Tensor) -> Tensor:
    w = m.g * 2
    rows, columns, all_of_it = w[1:], w[:, 1:], w.view(-1)
    rows.mul_(m.w)
    columns[0] = x.sum() * m.w[0]
    F.relu(all_of_it, inplace=True)
    torch.exp(w[0].detach(), out=torch.empty(D, dtype=x.dtype))
    return x @ w + rows.sum() + (x[:, 1:] @ columns.mT) + all_of_it.sum()


def written_positionally(m: Any, x: Tensor) -> Tensor:
    w = (m.g * 2).T
    F.leaky_relu(w, 0.1, True)
    F.dropout(w.T, 0.5, True, True)
    return x @ w


def as_another(m: Any, x: Tensor) -> Tensor:
    """``to`` and ``type_as`` return the tensor itself."""
    h = m.f[0](x)
    same, view = h.to(m.w), h.view_as(h * m.shift)
    same.mul_(2)
    view.sigmoid_()
    return h + same * m.w[0] + view


def unseen_before_a_view(m: Any, x: Tensor) -> Tensor:
    w = m.g * 2
    torch._foreach_mul_([w], 3.0)
    return x @ w + x @ w.T


def as_another_twice(m: Any, x: Tensor) -> Tensor:
    w = m.g.clone()
    same = w.to(m.w).to(m.w)
    w[0] = m.w.mean()
    return x @ w + x @ same


def views_of_views(m: Any, x: Tensor) -> Tensor:
    w = m.w + 1
    part = w.expand(2, D)[0].unsqueeze(0)
    part.squeeze(0)[0] = 0.5
    part[:, 1:].mul_(m.shift)
    return x * w + part


def views_after_a_write(m: Any, x: Tensor) -> Tensor:
    w = m.g * 2
    turned = w.T
    w.mul_(1.5)
    turned.reshape(-1)
    turned[1].add_(m.w.sum())
    turned.T[0] = m.w[0]
    return x @ w + x @ turned


def written_by_the_batch(m: Any, x: Tensor) -> Tensor:
    w = m.g * 1
    flat = w.flatten()
    w += x.mean(0)
    return x @ w + flat.view(D, D).sum(0)


def written_twice(m: Any, x: Tensor) -> Tensor:
    v = (m.w * 2).unsqueeze(0)
    v.exp_()
    h = x * v
    with torch.no_grad():
        v.detach().clone().mul_(3)
    u = v.squeeze(0)
    u.tanh_()
    return x * u + h.detach()


ORDINARY: dict[str, Any] = {
    "jagged": jagged,
    "nested, a derived weight": nested_and_derived,
    "dropout": lambda m, x: F.dropout(m.f(F.dropout(x, 0.3)), 0.5),
    "dropout of a weight": lambda m, x: x @ F.dropout(m.g, 0.5),
    "alpha dropout of a weight": lambda m, x: x @ F.alpha_dropout(m.g, 0.5, training=True),
    "random numbers": lambda m, x: m.f(x + torch.randn_like(x)) * torch.rand(1),
    "noise of a weight's shape": lambda m, x: x @ (m.g + torch.randn_like(m.g)),
    "a view, then a write": of_a_chunk,
    "a write into a view": of_a_view,
    "a write into entries": of_entries,
    "a write into a part": in_a_list,
    "a write into an output": written_output,
    "transposed, then masked": transposed_then_masked,
    "two views and writes": two_views,
    "inplace=True by position": written_positionally,
    "as another": as_another,
    "written by the batch": written_by_the_batch,
    "an unseen write before a view": unseen_before_a_view,
    "as another, twice": as_another_twice,
    "views of views": views_of_views,
    "views after a write": views_after_a_write,
    "written twice": written_twice,
    "a write without gradients": no_grad_write,
    "detached": detached,
    "inference mode": in_inference_mode,
    "saved on the CPU": saved_hooks,
    "a mode of its own": own_mode,
    "a custom Function": lambda m, x: Doubled.apply(m.f[0](x)[:, :D], m.w),
    "a subclass": lambda m, x: m.f(x.as_subclass(Scaled)),
    "a subclass, returned": lambda m, x: x.as_subclass(Scaled) * m.w,
    "an error that is caught": caught,
    "a sparse matrix": lambda m, x: torch.sparse.mm(x.to_sparse(), m.g),
    "a loop over parameters": lambda m, x: sum(p.sum() for p in m.parameters()) * x,
    "parameters returned": lambda m, x: x * 0 + m.w,
    "expanded": lambda m, x: m.w.expand(B, D) * x,
    "out=": lambda m, x: x * m.w + torch.mul(x, x, out=torch.empty_like(x)),
    "data_ptr and numpy": lambda m, x: x * m.w * float(m.w.detach().numpy().sum()),
    "deepcopy inside": lambda m, x: copy.deepcopy(m.f)(x).detach() + m.f(x),
    "a generator": lambda m, x: x * m.w + torch.rand(B, D, generator=torch.Generator().manual_seed(1)),
    "forked generator": lambda m, x: _forked(m, x),
    "requires_grad_ inside": lambda m, x: _with_grad(m, x),
    "deterministic": lambda m, x: _deterministic(m, x),
    "retain_grad": lambda m, x: _retained(m, x),
    "register_hook": lambda m, x: _with_hook(m, x),
    "a parameter read by item": lambda m, x: x * m.w * m.w[0].item(),
    "setattr of a tensor": lambda m, x: _stateful(m, x),
    "compiled, eager": lambda m, x: torch.compile(m.f, backend="eager")(x),
    "written by keyword": lambda m, x: x @ torch.relu_(input=m.g * 2) + torch.sigmoid_(input=m.g.T * 2)[0],
    "initialised inside": lambda m, x: x @ nn.init.constant_(tensor=m.g * 2, val=0.5) * m.w,
    "complex": lambda m, x: torch.view_as_real(torch.fft.rfft(x * m.w)).flatten(1),
    "meta": lambda m, x: x * m.w * (torch.empty(3, device="meta") * 2).shape[0],
}


if OLD:  # no jagged layout; Dynamo fails on modules with hooks; modes see no w[0] and no w[1:]
    for missing in (
        *("jagged", "nested, a derived weight", "compiled, eager"),
        *("two views and writes", "as another, twice", "views of views", "views after a write"),
    ):
        del ORDINARY[missing]
    del TRANSFORMS["in a checkpoint"]


def _forked(m: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        x = F.dropout(x, 0.5)
    return m.f(x)


def _with_grad(m: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return m.f(x) * x


def _deterministic(m: Any, x: Tensor) -> Tensor:
    out = m.f(x)
    assert out.grad_fn is not None and out.is_leaf is False and m.w.is_leaf and m.w.grad_fn is None
    return out


def _retained(m: Any, x: Tensor) -> Tensor:
    h = m.f[0](x)
    h.retain_grad()
    return h.tanh()


def _with_hook(m: Any, x: Tensor) -> Tensor:
    h = m.f[0](x)
    h.register_hook(lambda g: 2 * g)
    return h.tanh()


def _stateful(m: Any, x: Tensor) -> Tensor:
    object.__setattr__(m, "last", m.f(x))
    return m.last * 2


def net(function: Any) -> nn.Module:
    model = Net(function, f=mlp(), w=parameter(D), g=parameter(D, D), ema=torch.zeros(D), shift=torch.ones(1))
    return model


MODULES: dict[str, Callable[[], nn.Module]] = {
    "scripted inside": scripted_inside,
    "traced inside": traced_inside,
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(D, 3), nn.Tanh()).double()),
    "parametrized": parametrized,
    "spectral norm": spectral,
    "hooks of others": hooked,
    "compiled": lambda: torch.compile(mlp().double(), backend="eager"),
    "batch norm": lambda: nn.Sequential(nn.Linear(D, 3), nn.BatchNorm1d(3)),
    "recurrent": lambda: Net(
        lambda m, x: m.r(x[:, None])[0][:, 0], r=nn.LSTM(D, 3, dropout=0.5, num_layers=2)
    ),
    "recurrent, of a parameter": lambda: Net(
        lambda m, x: m.r(m.e.expand(len(x), -1, -1))[0][:, 0] * x[:, :3] + m.r(x[:, None])[0][:, 0],
        r=nn.LSTM(D, 3, dropout=0.5, num_layers=2, batch_first=True),
        e=parameter(2, D),
    ),
    "attention": lambda: nn.TransformerEncoderLayer(D, 1, 8, batch_first=True),
}


def run(model: nn.Module, x: Tensor) -> list[Any]:
    """What a step computes: output, gradients, buffers, the generator."""
    torch.manual_seed(5)
    out = model(x)
    found: list[Any] = [out.detach().clone(), type(out), out.dtype, out._version]
    (out.square().sum()).backward()
    found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    found += [b.clone() for b in model.buffers()]
    found.append(torch.get_rng_state())
    model.zero_grad()
    return found


def assert_same(got: list[Any], want: list[Any]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b


def assert_undisturbed(make: Callable[[], nn.Module], batch_dim: int | None, strategies: Any = None) -> None:
    torch.manual_seed(0)
    model, x = make().double(), draw(B, D)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        want = run(model, x)
    except RuntimeError:
        want = None
    model.load_state_dict(state)
    engine = Engine(model, batch_dim=batch_dim, **({"strategies": strategies} if strategies else {}))
    for _ in range(2):
        model.load_state_dict(state)
        if want is None:  # nor does it make a forward run that does not run without it
            with pytest.raises(RuntimeError):
                run(model, x)
            continue
        assert_same(run(model, x), want)
    if want is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gramjd.SlowPathWarning)
        for _ in range(2):
            model.load_state_dict(state)
            losses = objectives(model(x).as_subclass(Tensor))
            try:
                gramian = engine.compute_gramian(losses)
            except gramjd.GramjdError:
                continue
            assert_close(gramian, dense_gramian(losses, model.parameters()))
    engine.close()
    model.load_state_dict(state)
    assert_same(run(model, x), want)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_in_a_forward(name: str, batch_dim: int | None) -> None:
    assert_undisturbed(lambda: net(TRANSFORMS[name]), batch_dim)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("name", ORDINARY)
def test_forwards(name: str, batch_dim: int | None) -> None:
    assert_undisturbed(lambda: net(ORDINARY[name]), batch_dim)


if OLD:
    del MODULES["compiled"]


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, batch_dim: int | None) -> None:
    assert_undisturbed(MODULES[name], batch_dim)


class Tripled(torch.autograd.Function):
    """Writes into its argument."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor.mul_(3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def written(t: Tensor) -> Tensor:
    return t.mul_(3)


def first_row(t: Tensor) -> Tensor:
    return t[0]


UNSEEN: dict[str, Callable[[Tensor], Any]] = {
    "an op on lists": lambda t: torch._foreach_mul_([t], 3.0),
    "a custom Function": Tripled.apply,
    "scripted": lambda t: torch.jit.script(written)(t),
    "a scripted view": lambda t: torch.jit.script(first_row)(t).mul_(3),
}


@pytest.mark.parametrize(("name", "of_a_view"), [*((name, True) for name in UNSEEN), ("scripted", False)])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_writes_that_no_mode_sees_are_refused(name: str, of_a_view: bool) -> None:
    """A node stands between a tensor made of parameters and its view: autograd would miss the write."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.g * 2
        turned = w.T
        UNSEEN[name](turned if of_a_view else w)
        return x @ w + x @ turned

    model, x = net(forward), draw(B, D)
    engine = Engine(model, batch_dim=0)
    for _ in range(2):
        with pytest.raises(gramjd.NotCoveredError, match=r"shape \[5, 5\].*written in place.*clone"):
            model(x)
    engine.close()
    model(x).sum().backward()


def test_copies_and_pickles_compute_the_same() -> None:
    model, x = net(TRANSFORMS["vmap of grad beside the model"]), draw(B, D)
    model.function = beside
    want = run(model, x)
    engine = Engine(model, batch_dim=0)
    for found in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(run(found, x), want)
        assert_same(run(model, x), want)
        losses = objectives(found(x))
        with pytest.raises(gramjd.NotCoveredError):  # an engine is of the model that it was given
            engine.compute_gramian(losses)


def beside(m: Any, x: Tensor) -> Tensor:
    return m.f(x) + vmap(grad(lambda z: m.f(z)[0]))(x)


@pytest.mark.parametrize("place", ["forward", "transform", "child"])
def test_errors_of_a_forward_leave_nothing_behind(place: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if m.fails and place == "forward":
            raise LookupError
        if m.fails and place == "child":
            m.f(x[:, :2])
        if m.fails:
            vmap(grad(m.f))(x)
        return beside(m, x)

    model, x = net(forward), draw(B, D)
    model.fails = False
    want = run(model, x)
    engine = Engine(model, batch_dim=0)
    for _ in range(2):
        model.fails = True
        with pytest.raises((LookupError, RuntimeError)):
            model(x)
        assert torch.overrides._get_current_function_mode() is None
        model.fails = False
        assert_same(run(model, x), want)
        losses = objectives(model(x))
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))


@pytest.mark.parametrize("how", ["vmap", "grad", "hessian", "functional_call", "an ensemble"])
def test_transforms_around_a_model_with_an_engine(how: str) -> None:
    model, x = net(beside), draw(B, D)
    params = dict(model.named_parameters())
    calls: dict[str, Callable[[], Any]] = {
        "vmap": lambda: vmap(model.f)(x),
        "grad": lambda: grad(lambda p: functional_call(model, p, (x,)).sum())(params)["f.0.weight"],
        "hessian": lambda: hessian(lambda z: model.f(z)[0])(x[0]),
        "functional_call": lambda: functional_call(
            model, {"w": model.w * 2, "f.0.bias": params["f.0.bias"].exp()}, x
        ),
        "an ensemble": lambda: vmap(lambda p: functional_call(model, p, (x,)))(
            {name: torch.stack([p, 2 * p]) for name, p in params.items()}
        ),
    }
    want = calls[how]().detach()
    engine = Engine(model, batch_dim=0)
    assert torch.equal(calls[how]().detach(), want)
    losses = objectives(model(x))
    assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))
    assert torch.equal(calls[how]().detach(), want)


def test_two_engines_and_a_transform() -> None:
    model, x = net(beside), draw(B, D)
    want = run(model, x)
    engines = Engine(model, batch_dim=0), Engine(model.f, batch_dim=0), Engine(model.modules(), batch_dim=0)
    assert_same(run(model, x), want)
    losses = objectives(model(x))
    for engine in engines:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gramjd.SlowPathWarning)
            assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))


@pytest.mark.parametrize("checks", ["first", "always", "never"])
@pytest.mark.parametrize("name", [n for n in TRANSFORMS if "inner" not in n and n != "an energy's force"])
@pytest.mark.filterwarnings("ignore::gramjd.SlowPathWarning")
def test_uses_in_transforms_are_not_missed(name: str, checks: str) -> None:
    """Not even where their share is nothing at first: a gate, zero, that opens later."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.f(x) + m.gate * TRANSFORMS[name](m, x).sum(1, keepdim=True) + (x @ m.g.T.T)[:, :1]

    model, x = net(forward), draw(B, D)
    model.gate = torch.zeros(())
    engine = Engine(model, batch_dim=0, check=checks)
    for gate in (0.0, 0.0, 1.0, -2.0):
        model.gate.fill_(gate)
        losses = objectives(model(x))
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))


@pytest.mark.parametrize(
    "op",
    [
        lambda w, x: torch.einsum("bi,ijk->bj", x, w),
        lambda w, x: torch.einsum("bi,,", x, w),
        lambda w, x: F.linear(x, w[0]),
        lambda w, x: F.layer_norm(x, (3,), w),
        lambda w, x: F.embedding(x, w),
    ],
    ids=["equation", "operands", "sizes", "norm", "indices"],
)
@pytest.mark.parametrize("face", ["engine", "functional"])
def test_what_an_op_refuses_it_refuses_in_its_own_words(face: str, op: Callable[..., Tensor]) -> None:
    model, x = Net(lambda m, x: op(m.w, x), w=parameter(4, 3)), draw(2, D)
    want = _raised(lambda: model(x))
    if face == "engine":
        with Engine(model, batch_dim=0):
            got = _raised(lambda: model(x))
        assert str(got) == str(want)
    else:
        f, p = gramjd.functional_loss(model)
        got = _raised(lambda: gramjd.gramian(f)(p, x))
    assert type(got) is type(want)


def _raised(run: Callable[[], Any]) -> Exception:
    """What a call raises."""
    try:
        run()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")
