"""The lazy Jacobian against the dense one, from both faces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, assert_symmetric, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import Engine, Jacobian
from gramjd.blocks import Conv


class Model(nn.Module):
    """A linear map, a table used twice, a convolution, biases, and a parameter without effect."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        self.idle = nn.Parameter(torch.randn(2))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.table(ids).mT).mT.tanh()
        return self.head(h + self.table.weight.select(0, 0)).square().mean(1)  # [B, 3]


def flat(tree: dict[str, Tensor], start: int = 0) -> Tensor:
    """The tensors of a tree side by side, in the order of a Jacobian's columns."""
    return torch.cat([tree[name].flatten(start) for name in sorted(tree)], -1)


@pytest.fixture(params=["engine", "transform"])
def make(request: pytest.FixtureRequest) -> Callable[..., tuple[Jacobian, Tensor]]:
    """Makes a Jacobian for some ids, and the same densely, ``[B, 3, n]``."""
    torch.manual_seed(0)
    model = Model().double()
    params = dict(model.named_parameters())

    def functional(p: dict[str, Tensor], ids: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (ids[None],))[0]

    def from_ids(ids: Tensor) -> tuple[Jacobian, Tensor]:
        batched = torch.func.vmap(torch.func.jacrev(functional), (None, 0))(params, ids)
        dense = {name: batched[name].detach() for name in params}
        if request.param == "engine":
            dense.pop("idle")
            engine = Engine(model, batch_dim=0)
            return engine.jacobian(model(ids)), flat(dense, 2)
        detached = {n: p.detach() for n, p in params.items()}
        return gramjd.jacobian(functional)(detached, ids), flat(dense, 2)

    return from_ids


def ids(samples: int, positions: int = 5) -> Tensor:
    return torch.randint(0, 7, (samples, positions))


X = torch.randn(4, 3, dtype=torch.float64)
Make = Callable[[Tensor], tuple[Jacobian, Tensor]]


def gramian(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("bkn,cln->bklc", left, right)


def test_products(make: Make) -> None:
    J, dense = make(ids(4))
    n = dense.shape[-1]
    assert J.shape == (12, n) and J.samples == 4 and J.objectives == 3
    G = J.gramian()
    assert_close(G, gramian(dense, dense))
    assert_symmetric(G)
    assert_close(J.squared_norms(), dense.square().sum(-1))
    assert_close(J.norms(), dense.norm(dim=-1))
    assert_close(J.diagonal(), torch.einsum("bkn,bln->bkl", dense, dense))
    w, many = torch.randn(4, 3).double(), torch.randn(6, 4, 3).double()
    assert_close(flat(J.vjp(w)), torch.einsum("bkn,bk->n", dense, w))
    assert_close(flat(J.vjp(many), 1), torch.einsum("bkn,mbk->mn", dense, many))
    v = [torch.randn_like(p) for p in J.parameters]
    tangent = dict(zip(J.names, v, strict=True))
    assert_close(J.jvp(tangent), dense @ torch.cat([x.flatten() for x in v]))
    assert_close(flat(J.dense(), 2), dense)


def test_as_a_matrix(make: Make) -> None:
    J, dense = make(ids(4))
    matrix = dense.flatten(0, 1)
    v, vs = torch.randn(J.shape[1]).double(), torch.randn(J.shape[1], 2).double()
    w, ws = torch.randn(12).double(), torch.randn(12, 2).double()
    assert J.T.shape == matrix.T.shape and J.T.T is J
    assert_close(J @ v, matrix @ v)
    assert_close(J @ vs, matrix @ vs)
    assert_close(J.T @ w, matrix.T @ w)
    assert_close(J.T @ ws, matrix.T @ ws)
    assert_close(J @ J.T, matrix @ matrix.T)
    other, dense2 = make(ids(2, 3))
    assert_close(J @ other.T, matrix @ dense2.flatten(0, 1).T)
    with pytest.raises(ValueError, match=r"shape \[12\]"):
        J.T @ torch.randn(11).double()


def test_for_scipy(make: Make) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    J, dense = make(ids(6))
    matrix = dense.flatten(0, 1)
    A = J.as_linear_operator()
    assert A.shape == J.shape and A.dtype == "float64"
    got = linalg.eigsh(A @ A.H, k=3, return_eigenvectors=False)
    want = torch.linalg.eigvalsh(matrix @ matrix.T)[-3:]
    assert_close(torch.as_tensor(got).sort().values, want)
    eye = torch.eye(J.shape[1]).double()[:, :2].numpy()
    assert_close(torch.as_tensor(A @ eye), matrix[:, :2])
    assert_close(torch.as_tensor(A.H @ eye[:18]), matrix.T[:, :2])


def test_no_arrays_of_bfloat16() -> None:
    pytest.importorskip("scipy")
    J = gramjd.jacobian(lambda p, x: p @ x)(torch.randn(3).bfloat16(), torch.randn(4, 3).bfloat16())
    with pytest.raises(TypeError, match=r"no torch.bfloat16: take J.to\(dtype=torch.float32\)"):
        J.as_linear_operator()
    assert J.to(dtype=torch.float32).as_linear_operator().dtype == "float32"


def test_cross(make: Make) -> None:
    (J1, d1), (J2, d2) = make(ids(4)), make(ids(2, 3))
    assert_close(J1.cross(J2), gramian(d1, d2))
    with pytest.raises(ValueError, match="different parameters"):
        J1.cross(J2.select(["conv.weight"]))


@pytest.mark.parametrize(
    "per", ["parameter", lambda name: name.split(".")[0], {"a": ["table.weight", "head.bias"], "b": []}]
)
def test_parts_add_up_to_the_whole(make: Make, per: Any) -> None:
    J, _ = make(ids(4))
    if isinstance(per, dict):
        per = {**per, "b": [name for name in J.names if name not in per["a"]]}
    found = J.gramian(per=per)
    assert_close(sum(found.values()), J.gramian())
    assert all(torch.equal(G, G.permute(3, 2, 1, 0)) for G in found.values())
    if per == "parameter":
        assert list(found) == J.names
        for name in J.names:
            assert_close(found[name], J.select([name]).gramian())


def test_groups_are_partitions(make: Make) -> None:
    J, _ = make(ids(2))
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        J.gramian(per={"a": ["nothing"]})
    with pytest.raises(ValueError, match=r"missing are \['(conv.bias|idle)'"):
        J.gramian(per={"a": ["table.weight"]})
    with pytest.raises(ValueError, match=r"in several are \['head.bias'\]"):
        J.gramian(per={"a": J.names, "b": ["head.bias"]})
    with pytest.raises(ValueError, match="'parameter'"):
        J.gramian(per="layer")


def test_namesakes() -> None:
    """Keys with dots in them can make two names one: no share gets lost."""
    p, x = {"a": {"b": torch.ones(3).double()}, "a.b": torch.ones(3).double(), "c": torch.ones(3).double()}, X
    J = gramjd.jacobian(lambda p, x: (p["a"]["b"] * x).sin().sum() + (p["a.b"] + p["c"]) @ x)(p, x)
    for choose in (
        lambda: J.gramian(per="parameter"),
        lambda: J.gramian(per={"all": ["a.b", "c"]}),
        lambda: J.select(["a.b"]),
        lambda: J.select(lambda name: name == "a.b"),
    ):
        with pytest.raises(ValueError, match=r"Several parameters are called 'a\.b'"):
            choose()
    assert_close(sum(J.gramian(per=lambda name: name).values()), J.gramian())
    assert J.select(["c"]).names == ["c"]


def test_select(make: Make) -> None:
    J, _ = make(ids(3))
    part = J.select(lambda name: name.startswith("conv"))
    assert sorted(part.names) == ["conv.bias", "conv.weight"]
    whole = J.dense()
    rows = torch.cat([whole[name].flatten(2) for name in part.names], -1)
    assert_close(part.gramian(), gramian(rows, rows))
    assert part.vjp(torch.ones(3, 3).double()).keys() == {"conv.bias", "conv.weight"}
    with pytest.raises(ValueError, match="No parameter was chosen"):
        J.select([])


def test_cat_of_micro_batches(make: Make) -> None:
    """Batches of other sizes and lengths together, as if they had been one."""
    batches = [ids(2), ids(3, 4), ids(1)]
    made = [make(batch) for batch in batches]
    J = Jacobian.cat([jac for jac, _ in made])
    dense = torch.cat([d for _, d in made])
    assert J.shape == (18, dense.shape[-1])
    assert_close(J.gramian(), gramian(dense, dense))
    assert_symmetric(J.gramian())
    assert_close(J.squared_norms(), dense.square().sum(-1))
    assert_close(J.diagonal(), torch.einsum("bkn,bln->bkl", dense, dense))
    w = torch.randn(6, 3).double()
    assert_close(flat(J.vjp(w)), torch.einsum("bkn,bk->n", dense, w))
    v = torch.randn(J.shape[1]).double()
    assert_close((J @ v).view(6, 3), dense @ v)
    assert_close(J.cross(made[1][0]), gramian(dense, dense[2:5]))
    assert_close(flat(J.dense(), 2), dense)


def test_cat_needs_like_with_like(make: Make) -> None:
    J, _ = make(ids(2))
    with pytest.raises(ValueError, match="at least one"):
        Jacobian.cat([])
    with pytest.raises(ValueError, match="different parameters"):
        Jacobian.cat([J, J.select(["conv.bias"])])
    whole = gramjd.jacobian(lambda p: p.square(), in_dims=None)(torch.ones(2))
    with pytest.raises(ValueError, match="batch dimension"):
        Jacobian.cat([whole, whole])


def test_to(make: Make) -> None:
    J, _ = make(ids(3))
    half = J.to(dtype=torch.float32)
    assert half.gramian().dtype == torch.float32 and half.dtype == torch.float32
    assert_close(half.gramian().double(), J.gramian(), 1e-5)
    assert J.to("cpu").gramian().equal(J.gramian())
    assert J.to("meta").gramian().device.type == "meta"


def test_accumulate_dtype(make: Make) -> None:
    J, _ = make(ids(3))
    wide = J.to(dtype=torch.float32).gramian(accumulate_dtype=torch.float64)
    assert wide.dtype == torch.float64
    assert_close(wide, J.gramian(), 1e-5)
    assert_close(J.gramian(memory_budget=2**20), J.gramian())


def test_products_after_a_factor_was_written() -> None:
    """Such as a buffer that the next batch is copied into: an error, not the products of another batch."""
    x, w = torch.randn(4, 3).double(), torch.ones(4, 2).double()
    p = {"w": torch.randn(2, 3).double(), "b": torch.randn(2).double()}
    lazy = gramjd.jacobian(lambda p, x: F.linear(x, p["w"], p["b"]).tanh())
    J = lazy(p, x)
    wanted = J.gramian(), J.gramian(per="parameter")["b"]
    copied, bias, weight = copy.deepcopy(J), J.select(["b"]), J.select(["w"])
    x.mul_(2)
    both = Jacobian.cat([J, lazy(p, x)])
    products: list[Callable[[], Any]] = [
        J.gramian, J.squared_norms, J.norms, J.diagonal, J.dense, both.gramian, weight.gramian,
        lambda: J.gramian(per="parameter"), lambda: J.cross(copied), lambda: copied.cross(J),
        lambda: J.vjp(w), lambda: J.jvp(p), lambda: J @ J.T, lambda: J.to("cpu"),
    ]  # fmt: skip
    for product in products:
        with pytest.raises(RuntimeError, match=r"Jacobian of 'w' is made of.*was written in place"):
            product()
    assert_close(copied.gramian(), wanted[0])
    assert_close(bias.gramian(), wanted[1])


def test_backward_after_a_factor_was_written() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    engine = Engine(model, batch_dim=0)
    J = engine.jacobian(model(x))
    G, w = J.gramian(), torch.ones(5, 2).double()
    J.backward(w)
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # parameters are no factors here
    assert_close(J.gramian(), G)
    x.zero_()
    with pytest.raises(RuntimeError, match=r"Jacobian of '0.weight' is made of.*was written in place"):
        J.backward(w)


def test_repr(make: Make) -> None:
    J, _ = make(ids(3))
    assert repr(J).startswith(f"Jacobian(outputs=[3, 3], rows=9, parameters={len(J.parameters)}, entries=")
    assert "dtype=torch.float64, device=cpu, stored=0.0 MiB" in repr(J)


@pytest.mark.parametrize("batch_dim", [0, 1, None])
def test_backward_is_autograd_s(batch_dim: int | None) -> None:
    torch.manual_seed(0)
    model, x = Model().double(), ids(4)
    engine = Engine(model, batch_dim=batch_dim)
    seen: list[Tensor] = []
    model.head.weight.register_hook(seen.append)
    w = torch.randn(4, 3).double()
    losses, weights = (model(x), w) if batch_dim != 1 else (model(x).T, w.T)
    J = engine.jacobian(losses)
    seen.clear()  # the engine's own check of its blocks asks autograd for the gradient, too
    for times in (1, 2):  # the second time adds to what is there
        J.backward(weights)
        got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert "idle" not in got and len(seen) == times
    model.zero_grad(set_to_none=True)
    for _ in range(2):
        losses.backward(weights, retain_graph=True)
    for name, grad in got.items():
        assert_close(grad, model.get_parameter(name).grad)


def scaled(grad: Tensor) -> Tensor:
    return grad.clamp(-0.1, 0.1) * 3


@pytest.mark.filterwarnings("error::gramjd.errors.SlowPathWarning")
@pytest.mark.parametrize("preset", [False, True])
def test_backward_with_hooks_that_change_gradients(preset: bool) -> None:
    """They run when something is added to ``.grad``, once each, on ``Jᵀ w``; not in what finds ``J``."""
    torch.manual_seed(0)
    model, x = Model().double(), ids(4)
    trainable = [p for name, p in model.named_parameters() if name != "idle"]
    want = dense_gramian(model(x), trainable)
    seen: list[Tensor] = []
    for p in trainable:
        p.register_hook(scaled)
        p.register_post_accumulate_grad_hook(seen.append)
        p.retain_grad()
        p.grad = torch.ones_like(p) if preset else None
    before = [p.grad for p in trainable]
    hooks = [dict(p._backward_hooks or {}) for p in trainable]
    engine = Engine(model, batch_dim=0)
    losses, w = model(x), torch.randn(4, 3).double()
    J = engine.jacobian(losses)
    assert not seen
    assert hooks == [dict(p._backward_hooks or {}) for p in trainable]
    assert_close(J.gramian(), want)
    for factor in (1, 2):
        J.backward(factor * w)
    assert len(seen) == 2 * len(trainable)
    got = [p.grad for p in trainable]
    for p in trainable:
        p.grad = torch.ones_like(p) if preset else None
    for factor in (1, 2):
        losses.backward(factor * w, retain_graph=True)
    for p, grad, old in zip(trainable, got, before, strict=True):
        assert p.grad is not None and grad is not None
        assert_close(grad, p.grad)
        assert grad.stride() == p.grad.stride() and (grad is old) == preset


def test_backward_leaves_other_parameters_alone() -> None:
    model, x = Model().double(), ids(4)
    engine = Engine(model.conv, batch_dim=0)
    J = engine.jacobian(model(x))
    J.backward(torch.ones(4, 3).double())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"conv.weight", "conv.bias"}


def test_backward_of_a_scalar_and_errors() -> None:
    model, x = Model().double(), ids(4)
    engine = Engine(model, batch_dim=None)
    loss = model(x).sum()
    J = engine.jacobian(loss)
    J.backward()
    got = model.conv.weight.grad
    (want,) = torch.autograd.grad(loss, [model.conv.weight])
    assert_close(got, want)
    engine = Engine(model, batch_dim=0)
    J = engine.jacobian(model(x))
    with pytest.raises(ValueError, match="needs weights"):
        J.backward()
    with pytest.raises(ValueError, match=r"shape \[4, 3\]"):
        J.backward(torch.ones(4).double())
    with pytest.raises(ValueError, match="not on the Jacobian's device, cpu"):
        J.backward(torch.ones(4, 3, device="meta"))
    with pytest.raises(ValueError, match="one tensor of weights"):
        J.backward(torch.ones(2, 4, 3).double())
    functional = gramjd.jacobian(lambda p, x: (p * x).sum())(torch.ones(2), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match=r"Use J\.vjp"):
        functional.backward(torch.ones(3))


def test_outputs_in_a_pytree() -> None:
    p, x = {"a": torch.randn(3).double(), "b": torch.randn(2, 3).double()}, torch.randn(4, 3).double()

    def f(p: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"one": (p["a"] * x).sin().sum(), "two": F.linear(x, p["b"])}

    J = gramjd.jacobian(f)(p, x)
    dense = torch.vmap(torch.func.jacrev(f), (None, 0))(p, x)
    one = torch.cat([dense["one"][k].flatten(1) for k in p], -1)
    two = torch.cat([dense["two"][k].flatten(2) for k in p], -1)
    G = J.gramian()
    assert_close(G["one"]["two"], torch.einsum("bn,ckn->bkc", one, two))
    assert_close(G["two"]["two"], gramian(two, two))
    assert all(g.untyped_storage().nbytes() == g.nbytes for row in G.values() for g in row.values())
    w = {"one": torch.randn(4).double(), "two": torch.randn(4, 2).double()}
    want = torch.einsum("bn,b->n", one, w["one"]) + torch.einsum("bkn,bk->n", two, w["two"])
    assert_close(flat(J.vjp(w)), want)
    matrix = torch.cat([one, two.flatten(0, 1)])
    assert_close(J @ J.T, matrix @ matrix.T)
    v = torch.randn(9).double()
    assert_close(J @ v, matrix @ v)
    assert_close(J.T @ torch.cat([w["one"], w["two"].flatten()]), want)
    with pytest.raises(ValueError, match="structure"):
        J.vjp(torch.ones(4))
    with pytest.raises(ValueError, match="one output tensor"):
        J.diagonal()
    with pytest.raises(ValueError, match="structure"):
        J.jvp(torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \[3\] for parameter 'a'"):
        J.jvp({"a": torch.ones(2), "b": torch.ones(2, 3)})


def test_trees_by_groups_and_in_micro_batches() -> None:
    p = {name: torch.randn(3, 3).double() for name in "abc"}
    batches = [torch.randn(n, 3).double() for n in (3, 1, 4)]

    def f(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        h = F.linear(x, p["a"]).tanh()
        return F.linear(h, p["b"]), [(h @ p["c"]).sum()]  # the second does not depend on b

    J = Jacobian.cat([gramjd.jacobian(f)(p, x) for x in batches])
    first, (second,) = torch.vmap(torch.func.jacrev(f), (None, 0))(p, torch.cat(batches))
    rows = {name: (first[name].flatten(2), second[name].flatten(1)[:, None]) for name in p}
    whole, shares = J.gramian(), J.gramian(per="parameter")
    for i in range(2):
        for j in range(2):
            each = {n: gramian(rows[n][i], rows[n][j]) for n in p}
            squeezed = {n: G.squeeze(2) if j else G for n, G in each.items()}
            each = {n: G.squeeze(1) if i else G for n, G in squeezed.items()}

            def entry(tree: Any, i: int = i, j: int = j) -> Tensor:
                row = tree[1][0] if i else tree[0]
                return row[1][0] if j else row[0]

            assert_close(entry(whole), sum(each.values()))
            for name in p:
                assert_close(entry(shares[name]), each[name])
    many = torch.randn(5, 8, 3).double(), [torch.randn(5, 8).double()]
    want = {
        n: torch.einsum("bkn,mbk->mn", rows[n][0], many[0])
        + torch.einsum("bkn,mb->mn", rows[n][1], many[1][0])
        for n in p
    }
    assert_close(flat(J.vjp(many), 1), flat(want, 1))


def test_tied_entries_stay_apart() -> None:
    """As in torch.func.grad, the same tensor twice in the parameters is two parameters."""
    p, x = torch.randn(3, 3).double(), torch.randn(4, 3).double()
    J = gramjd.jacobian(lambda ps, x: F.linear(F.linear(x, ps[0]).tanh(), ps[1]).sum())([p, p], x)
    first, second = J.vjp(torch.ones(4).double())
    assert not torch.allclose(first, second)
    part = J.select(["1"])
    assert_close(part.vjp(torch.ones(4).double())["1"], second)


def test_norms_of_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are unfolded once for each sample, where whole rows of some samples fit."""
    monkeypatch.setattr("gramjd.contraction.diagonals.CACHED", 2**14)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.Flatten(1)).double()
    func, params = gramjd.functional_loss(model, lambda out: out.sin().sum(1))
    J = gramjd.jacobian(func)(params, torch.randn(40, 4, 6, 6, dtype=torch.float64))
    parts: list[int] = []
    plain = Conv.part

    def counted(self: Conv, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        parts.append(self.rows[1] * (stop - start))
        assert (start, stop) == (0, 8 * 4 * 9)
        return plain(self, start, stop, dtype)

    monkeypatch.setattr(Conv, "part", counted)
    norms = J.norms()
    assert len(parts) > 1 and sum(parts) == 40 * 8 * 4 * 9
    assert_close(norms, J.dense()["0.weight"].flatten(1).norm(dim=1))
