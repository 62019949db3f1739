"""What ``gramjd.internals`` asks of torch is answered as it always was: a test for each name.

A torch that renames or changes one of these fails here, by name, and not as a wrong number somewhere.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import Net, draw, parameter
from oracle import OLD, assert_close, dense_gramian
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import gramjd
from gramjd import Engine, internals

ROOT = Path(gramjd.__file__).parent
CONTRACTS: dict[str, Callable[[], None]] = {}


def contract(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorator: a function that fails where torch no longer answers one of these questions."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        assert not CONTRACTS.keys() & set(names)
        CONTRACTS.update(dict.fromkeys(names, function))
        return function

    return register


@pytest.mark.parametrize("name", internals.__all__)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own use of it
def test_contract(name: str) -> None:
    torch.manual_seed(0)
    CONTRACTS[name]()


def leaf(*shape: int) -> Tensor:
    return draw(*shape).requires_grad_()


def raises(error: type[Exception], function: Callable[[], object]) -> bool:
    try:
        function()
    except error:
        return True
    return False


# Transforms.


@contract("inside_transform", "innermost_transform", "transform_level", "is_elsewhere")
def levels() -> None:
    assert not internals.inside_transform() and internals.innermost_transform() is None
    assert internals.transform_level() == 0 and not internals.is_elsewhere(0) and internals.is_elsewhere(1)
    seen = []

    def inner(x: Tensor) -> Tensor:
        seen.append((internals.transform_level(), internals.innermost_transform().level()))
        assert internals.inside_transform() and not internals.is_elsewhere(seen[-1][0])
        assert internals.is_elsewhere(0)
        return x.sum()

    torch.vmap(torch.func.grad(inner))(draw(2, 3))
    torch.vmap(inner)(draw(2, 3))
    assert seen == [(2, 2), (1, 1)]


@contract("outside_transforms")
def outside() -> None:
    def function(x: Tensor) -> Tensor:
        with internals.outside_transforms():
            assert not internals.inside_transform()
        assert internals.inside_transform()
        return x.sum()

    torch.vmap(torch.func.grad(function))(draw(2, 3))


@contract("differentiates")
def derivatives_in_inference_mode() -> None:
    assert internals.differentiates()
    with torch.inference_mode():
        right = bool(torch.func.grad(torch.sin)(torch.zeros(())) == 1)
        assert internals.differentiates() == right


@contract("innermost_level", "vmaps_in_progress")
def vmaps() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append((internals.innermost_level(), internals.vmaps_in_progress()))
        return x.sum()

    torch.vmap(torch.vmap(torch.func.grad(function)))(draw(2, 3, 4))
    torch.func.grad(function)(draw(2))
    assert seen == [(3, 2), (1, 0)]


@contract("below_transforms", "below_transform", "belongs_to")
def unwrapping() -> None:
    x = draw(2, 3)
    assert internals.below_transforms(x) is x

    def function(mine: Tensor) -> Tensor:
        level = internals.innermost_level()
        assert internals.belongs_to(mine, level) and not internals.belongs_to(x, level)
        assert torch.equal(internals.below_transforms(mine), x)
        (below,) = internals.below_transform([mine], level)
        assert torch.equal(below, x) and not internals.belongs_to(below, level)
        return mine.sum()

    torch.func.grad(function)(x)

    def batched(mine: Tensor) -> Tensor:
        assert internals.belongs_to(mine, internals.innermost_level())
        assert internals.below_transforms(mine).shape == (2, 3)
        return mine

    torch.vmap(batched)(x)


@contract("depends_on_innermost_transform", "differentiated_outside")
def differentiation() -> None:
    other, outer = draw(3), leaf(3)

    def inner(x: Tensor, outside: bool) -> Tensor:
        assert internals.depends_on_innermost_transform(x)
        assert not internals.depends_on_innermost_transform(other)
        assert not internals.depends_on_innermost_transform(outer)
        assert internals.differentiated_outside(x) == outside
        assert internals.differentiated_outside(outer) and not internals.differentiated_outside(other)
        return x.square().sum()

    torch.func.grad(inner)(draw(3), False)
    torch.func.grad(lambda x: torch.func.grad(inner)(x, True).sum())(draw(3))
    torch.func.grad(inner)(leaf(3), True)


@contract("stops_functions")
def transforms_and_functions() -> None:
    assert not internals.stops_functions()
    found: list[bool] = []
    torch.vmap(lambda x: (found.append(internals.stops_functions()), x)[1])(draw(2))
    assert found == [True]


@contract("batched_gradients_level", "outside_batched_gradients", "without_batch")
def batched_gradients() -> None:
    x = leaf(3)
    seen: list[Tensor] = []
    mine = internals.batched_gradients_level()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            seen.append(internals.without_batch(g, mine, 3))
            with internals.outside_batched_gradients():
                assert torch.rand(2).shape == (2,)  # refused where cotangents are batched
            return g

    torch.autograd.grad(Watched.apply(x), x, torch.eye(3, dtype=x.dtype), is_grads_batched=True)
    assert_close(seen[0], torch.eye(3, dtype=x.dtype))


# Tracing, and contexts.


@contract("is_compiling", "is_dynamo_tracing", "constant_in_graphs")
def tracing() -> None:
    assert not internals.is_compiling() and not internals.is_dynamo_tracing()

    @internals.constant_in_graphs
    def answer() -> int:
        return len({"a set": 1}.keys() & {"a set"})

    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        return x * answer() if internals.is_compiling() and internals.is_dynamo_tracing() else x * 0

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).count_nonzero() == 2
    assert function(torch.ones(2)).count_nonzero() == 0


@contract("innermost_mode")
def modes() -> None:
    assert internals.innermost_mode() is None
    with TorchFunctionMode() as outer:
        assert internals.innermost_mode() is outer
        with TorchFunctionMode() as inner:
            assert internals.innermost_mode() is inner


@contract("autocasts")
def autocast() -> None:
    assert internals.autocasts() == {}
    with torch.autocast("cpu", torch.bfloat16):
        assert internals.autocasts() == {"cpu": torch.bfloat16}


@contract("unfused_attention")
def attention() -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    with internals.unfused_attention():
        out = F.scaled_dot_product_attention(q, q, q)
    names, nodes = set(), [out.grad_fn]
    for node in nodes:
        names.add(internals.name_of(node))
        nodes += [child for child, _ in node.next_functions if child is not None]
    assert not any(name.startswith("ScaledDotProduct") for name in names)


# Tensors.


@contract("is_view", "base_of")
def views() -> None:
    x = draw(2, 3)
    assert internals.is_view(x[0]) and not internals.is_view(x) and not internals.is_view(x + 1)
    assert internals.base_of(x[0].t()) is x and internals.base_of(x) is None


@contract("memory_of")
def memory() -> None:
    x = draw(2, 3)
    assert internals.memory_of(x) == internals.memory_of(x[1]) != internals.memory_of(x.clone())


@contract("with_memory")
def zeros_without_memory() -> None:
    x = leaf(3)
    (g,) = torch.autograd.grad(torch.sgn(x).sum(), x)
    assert raises(RuntimeError, g.untyped_storage().data_ptr) and not g.any()
    same, zeros = internals.with_memory([x, g])
    assert same is x and torch.equal(zeros, g) and zeros.untyped_storage().data_ptr()
    assert internals.with_memory(given := [x]) is given


class Strange(Tensor):
    """Does what it likes with ops."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


@contract("has_plain_layout", "has_stock_type")
def kinds_of_tensors() -> None:
    x = draw(2, 2)
    assert internals.has_plain_layout(x) and internals.has_plain_layout(parameter(2))
    assert not internals.has_plain_layout(x.to_sparse())
    assert not internals.has_plain_layout(x.as_subclass(Strange))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are a prototype
        assert not internals.has_plain_layout(torch.nested.nested_tensor([x]))
    assert internals.has_stock_type(x) and internals.has_stock_type(parameter(2))
    if hasattr(nn, "Buffer"):
        assert internals.has_stock_type(nn.Buffer(x))
    assert not internals.has_stock_type(x.as_subclass(Strange))  # type: ignore[arg-type]
    with torch._subclasses.FakeTensorMode():
        assert internals.has_stock_type(torch.ones(2))


@contract("sparse_values")
def sparse() -> None:
    x = torch.eye(2).to_sparse()
    assert torch.equal(internals.sparse_values(x), torch.ones(2))
    twice = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (2,), check_invariants=True)  # is not coalesced
    assert len(internals.sparse_values(twice)) == 2


@contract("is_profiled")
def profiled() -> None:
    assert not internals.is_profiled()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert internals.is_profiled()
    with torch.autograd.profiler.profile():
        assert internals.is_profiled()
    assert not internals.is_profiled()


@contract("SeenOps", "callable_of")
def ops_below_autograd() -> None:
    seen: list[tuple[Any, ...]] = []
    x = leaf(2, 3)
    with internals.SeenOps(lambda *each: seen.append(each)):
        out = (x.t() * 2).sum()
    assert [str(each[0]) for each in seen] == ["aten.t.default", "aten.mul.Tensor", "aten.sum.default"]
    op, args, kwargs, found = seen[1]
    assert args[0] is seen[0][3] and args[1] == 2 and not kwargs and torch.equal(found.sum(), out.detach())
    assert torch.equal(internals.callable_of(op)(*args), found)


@contract("SeenReads")
def reads_of_values() -> None:
    seen: list[str] = []
    x = draw(2)
    with internals.SeenReads(seen.append):
        x.tolist(), x.numpy(), x.__array__(), x.__dlpack__(), x.sum(), x.shape
    assert set(seen) == {"tolist", "numpy", "__array__", "__dlpack__"}


@contract("is_fixed")
def ops_with_fixed_results() -> None:
    aten = torch.ops.aten
    for op in (
        aten.add.Tensor,
        aten.mm.default,
        aten.view.default,
        aten.index_put_.default,
        aten.split.Tensor,
    ):
        assert internals.is_fixed(op, ())
    varying = [aten.nonzero.default, aten._local_scalar_dense.default, aten.equal.default, aten.bernoulli.p]
    for op in [*varying, aten.masked_select.default, aten.randn.default, aten.t_.default]:
        assert not internals.is_fixed(op, ())
    mask = torch.tensor([True, False])
    assert internals.is_fixed(aten.index.Tensor, (draw(2), [None, torch.tensor([0])]))
    assert not internals.is_fixed(aten.index.Tensor, (draw(2), [mask]))
    if not OLD:
        assert not internals.is_fixed(torch.cond, ())  # of higher order


@contract("written")
def written_arguments() -> None:
    x, y, aten = draw(2), draw(2), torch.ops.aten
    assert [*internals.written(aten.add.Tensor, (x, y), {})] == []
    assert [id(t) for t in internals.written(aten.add_.Tensor, (x, y), {})] == [id(x)]
    assert [id(t) for t in internals.written(aten.add.out, (y, y), {"out": x})] == [id(x)]
    found = internals.written(aten._foreach_add_.Scalar, ([x, y], 1), {})
    assert [id(t) for t in found] == [id(x), id(y)]


@contract("geometry")
def geometries() -> None:
    x, y = draw(2, 3), draw(2, 3)
    first = internals.geometry([x, None, y])
    assert first == internals.geometry([draw(2, 3), None, draw(2, 3)]) and len({first}) == 1
    others = [[x, y], [x, None, x], [x.t(), None, y], [draw(3, 3)[1:], None, y], [x.half(), None, y]]
    assert len({first, *map(internals.geometry, others)}) == 6
    assert internals.geometry([x, x[1:]]) != internals.geometry([x, draw(3, 3)[1:2]])
    strange = x.as_subclass(Strange)  # type: ignore[arg-type]
    for t in (
        strange,
        x.to_sparse(),
        x.to("meta"),
        leaf(2),
        torch.complex(x, x).conj(),
        torch.complex(x, x).conj().imag,
    ):
        assert internals.geometry([t]) is None
    with torch.no_grad():
        assert internals.geometry([nn.Parameter(draw(2))]) == internals.geometry([draw(2)])
    with dual_level():
        assert internals.geometry([x]) is None
    with torch.autocast("cpu"):
        assert internals.geometry([x]) is None
    seen = []
    torch.vmap(lambda t: (seen.extend([internals.geometry([t]), internals.geometry([y])]), t)[1])(x)
    assert seen == [None, None]


@contract("plain_apply")
def undecorated_apply() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    x = leaf(3)
    out = internals.plain_apply(Double)(x)
    assert type(out.grad_fn).__name__ == "DoubleBackward"
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full((3,), 2.0, dtype=x.dtype))


@contract("is_wrapped")
def wrappers() -> None:
    x, seen = draw(2), []
    torch.vmap(lambda y: (seen.append((internals.is_wrapped(y), internals.is_wrapped(x))), y)[1])(x)
    assert seen == [(True, False)] and not internals.is_wrapped(x)


@contract("is_plain", "is_ours", "runs_plainly", "is_watched")
def plain() -> None:
    x = draw(2)
    assert internals.is_plain(x) and internals.is_ours(x) and internals.runs_plainly([x, parameter(2)])
    assert internals.is_plain(leaf(2)) and not internals.is_ours(leaf(2))
    strange = x.as_subclass(Strange)  # type: ignore[arg-type]
    assert not internals.is_plain(strange) and not internals.runs_plainly([strange])
    with dual_level():
        assert not internals.is_ours(make_dual(x, x)) and not internals.runs_plainly([x])
    assert not internals.is_watched()
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert internals.is_watched() and not internals.runs_plainly([x])
    seen = []
    torch.vmap(lambda y: (seen.append((internals.is_plain(y), internals.runs_plainly([x]))), y)[1])(x)
    assert seen == [(False, False)]
    traced = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.trace(
            lambda y: (traced.append(internals.runs_plainly([y])), y + 1)[1], x, check_trace=False
        )
    assert traced == [False]


@contract("differentiable")
def _() -> None:
    x, y = torch.randn(3), torch.randn(3)

    def function(zero: Tensor) -> Tensor:
        (mine,) = internals.differentiable([x])
        assert internals.depends_on_innermost_transform(mine * 2)
        with pytest.raises(RuntimeError):  # as before, once the wrapping is done
            (mine * 2).requires_grad_()
        (g,) = torch.autograd.grad((mine * y).sum(), mine)
        assert torch.equal(internals.below_transform([g], internals.innermost_level())[0], y)
        return zero

    torch.func.vjp(function, torch.zeros(()))
    assert not x.requires_grad


@contract("unseen_by_modes")
def _() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Mode():
        with internals.unseen_by_modes():
            internals.base_of(torch.ones(2)[:1])
        assert not seen
        internals.base_of(torch.ones(2))
        assert seen


@contract("in_forward_mode")
def _() -> None:
    found = []
    torch.func.jvp(
        lambda x: found.append(internals.in_forward_mode()) or x, (torch.ones(1),), (torch.ones(1),)
    )
    assert found == [True] and not internals.in_forward_mode()


@contract("outside_vmap")
def _() -> None:
    x, found = torch.randn(4, 3), []

    def function(row: Tensor) -> Tensor:
        inside = [row * 2, torch.ones(2)]
        found.append(internals.outside_vmap(inside, internals.transform_level(), 4))
        return row

    torch.vmap(function)(x)
    assert torch.equal(found[0][0], 2 * x) and torch.equal(found[0][1], torch.ones(4, 2))


@contract("versions_of")
def _() -> None:
    x, y = torch.zeros(3), torch.zeros(3)
    x.add_(1)
    assert internals.versions_of([x, y]) == (1, 0) and internals.versions_of([]) == ()
    with torch.inference_mode():
        assert internals.versions_of([torch.ones(1), x]) == (0, 1)


@contract("named_parameters", "named_tensors")
def _() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(2, 3))
    model[2].weight = model[0].weight  # tied
    model.append(model[0])  # held twice
    own, buffers = internals.named_tensors(model)
    assert [name for name, _ in own] == [
        "0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"
    ]  # fmt: skip
    assert own[0][1] is own[4][1] and own == list(internals.named_parameters(model))
    assert [name for name, _ in buffers] == [name for name, _ in model.named_buffers()]
    assert not list(internals.named_parameters(model, recurse=False))


@contract("version_of", "version_kept")
def versions() -> None:
    x = draw(2)
    assert internals.version_of(x) == 0
    x.add_(1)
    x[0] = 1
    assert internals.version_of(x) == internals.version_of(x[0]) == 2
    with internals.version_kept(x):
        x.add_(1)
    assert internals.version_of(x) == 2
    with torch.inference_mode():
        assert internals.version_of(torch.ones(1)) == 0


@contract("value_of")
def values() -> None:
    assert internals.value_of(torch.tensor(True)) is True
    assert internals.value_of(torch.tensor(True, device="meta")) is None
    found = []
    torch.vmap(lambda x: (found.append(internals.value_of(x > 0)), x)[1])(draw(2))
    with torch._subclasses.FakeTensorMode():
        found.append(internals.value_of(torch.ones(()) > 0))
    assert found == [None, None]


@contract("without_hooks", "hooks_of")
def hooks() -> None:
    x, calls = leaf(2), []
    assert not internals.hooks_of(x)
    x.register_hook(lambda g: calls.append(g))
    assert len(internals.hooks_of(x)) == 1 and internals.hooks_of(x * 1) is None
    with internals.without_hooks([x]):
        torch.autograd.grad(x.sum(), x)
    assert not calls
    torch.autograd.grad(x.sum(), x)
    assert len(calls) == 1


@contract("taking_gradients")
def gradients_taken() -> None:
    x, y, calls, taken = leaf(2, 3), leaf(3), [], {}
    x.register_hook(lambda g: calls.append(g))
    with internals.without_hooks([x, y]), internals.taking_gradients([x, y], taken.__setitem__):
        found = torch.autograd.grad((x * y).sum() + y.sum(), [x, y])
    assert torch.equal(taken[0], y.detach().expand(2, 3)) and torch.equal(taken[1], x.detach().sum(0) + 1)
    assert not calls and all(g.untyped_storage().nbytes() == 8 and not g.any() for g in found)
    assert len(internals.hooks_of(x)) == 1 and internals.hooks_of(y) is None
    found = torch.autograd.grad((x * y).sum(), [x, y])
    assert len(calls) == 1 and len(taken) == 2 and all(g.any() for g in found)


# Backward passes.


@contract("edge_behind")
def taps() -> None:
    x = leaf(3)
    before = x * 1
    edge, later = internals.edge_behind(before)
    later = later.mul_(2) if internals.is_view(later) or later is not before else later * 2
    (gradient,) = torch.autograd.grad(later.sum(), edge)
    assert_close(gradient, torch.full((3,), 2.0, dtype=x.dtype))


@contract("item_writes")
def counted_items() -> None:
    assert internals.item_writes() == 0
    if OLD:  # whose Dynamo traces no transform of ours
        return

    def function(x: Tensor) -> tuple[Tensor, int]:
        y = x * 1
        before = internals.item_writes()
        y[0] = 1
        y[1] = 2
        return y, internals.item_writes() - before

    assert torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(3))[1] == 2


@contract("sees_item_writes")
def writes_that_modes_see() -> None:
    assert internals.sees_item_writes() != OLD


@contract("zeros_that_require_gradients", "gradients_in_graphs", "reached_in_graphs")
def gradients_that_dynamo_traces() -> None:
    if OLD:
        return

    def function(w: Tensor, x: Tensor) -> Any:
        def run(w: Tensor) -> Any:
            used, unused = (
                internals.zeros_that_require_gradients(x.shape, x.dtype, x.device) for _ in range(2)
            )
            out = ((x + used) * w.T).sum()  # a property of a tensor, of which modes are shown nothing
            (x + unused).sin()
            inputs = [used, unused, w]
            found = internals.gradients_in_graphs([out], inputs, [torch.ones_like(out)])
            reached.extend(internals.reached_in_graphs())
            return torch.zeros(()), list(found)

        reached: list[bool] = []
        return torch.func.vjp(run, w, has_aux=True)[2], reached

    w, x = torch.randn(2, 3).double(), torch.randn(3, 2).double()
    (used, unused, of_w), reached = torch.compile(function, backend="eager", fullgraph=True)(w, x)
    assert reached == [True, False, True]
    assert_close(used, w.T)
    assert_close(unused, torch.zeros(3, 2).double())
    assert_close(of_w, x.T)


@contract("saved_tensors_hook")
def saved_hooks() -> None:
    assert internals.saved_tensors_hook() is None
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(internals.saved_tensors_hook())
        return x.sin()

    out = checkpoint(function, leaf(2), use_reentrant=False)
    out.sum().backward()
    assert len(seen) == 2 and seen[0] is not None and internals.saved_tensors_hook() is None
    if not OLD:
        with torch.autograd.graph.saved_tensors_hooks(pack := lambda x: x, lambda x: x):
            found: Any = internals.saved_tensors_hook()
            assert found[0] is pack


@contract("after_backward", "in_backward")
def backward_passes() -> None:
    x, told = leaf(2), []
    assert not internals.in_backward()

    def hook(g: Tensor) -> None:
        assert internals.in_backward()
        internals.after_backward(lambda: told.append("after"))
        told.append("hook")

    y = x * 2
    y.register_hook(hook)
    x.register_hook(lambda g: told.append("later"))
    y.sum().backward()
    assert told == ["hook", "later", "after"]


# Nodes.


@contract("LEAF_TYPE", "leaf_of")
def leaves() -> None:
    for x in (leaf(2), parameter(2), leaf(2).detach().to(torch.float32).requires_grad_()):
        node = (x * 1).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        assert type(node) is internals.LEAF_TYPE and internals.leaf_of(node) is x
    assert type((leaf(2) * 1).grad_fn) is not internals.LEAF_TYPE


class Own(torch.autograd.Function):
    """The identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


@contract("node_type", "name_of", "name_of_type", "is_torchs_own")
def types_of_nodes() -> None:
    node = Own.apply(leaf(2)).grad_fn
    kind = internals.node_type(Own)
    assert type(node) is kind and internals.name_of(node) == internals.name_of_type(kind) == "OwnBackward"
    assert internals.name_of(leaf(2).sin().grad_fn) == "SinBackward0"
    assert internals.name_of(torch.cat([leaf(1), leaf(1)]).grad_fn) == "CatBackward0"
    assert internals.name_of(F.nll_loss(leaf(2, 3), torch.zeros(2).long()).grad_fn) == "NllLossBackward0"
    assert internals.name_of(F.conv2d(leaf(1, 1, 3, 3), leaf(1, 1, 2, 2)).grad_fn) == "ConvolutionBackward0"
    assert internals.name_of(F.avg_pool2d(leaf(1, 2, 2), 2).grad_fn) == "AvgPool2DBackward0"
    assert not internals.is_torchs_own(kind) and not internals.is_torchs_own(type(leaf(2).sin().grad_fn))
    assert internals.is_torchs_own(internals.node_type(torch.nn.parallel.distributed._DDPSink))


@contract("is_reentrant_checkpoint")
def reentrant() -> None:
    x = leaf(2)
    node = checkpoint(torch.sin, x, use_reentrant=True).grad_fn
    assert internals.is_reentrant_checkpoint(type(node))
    assert internals.name_of(node) == "CheckpointFunctionBackward"  # the name of others' copies, too
    assert not internals.is_reentrant_checkpoint(type(x.sin().grad_fn))


@contract("is_compiled")
def compiled_code() -> None:
    x = leaf(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch 2.1, whatever is compiled next
        node = torch.compile(torch.sin, backend="aot_eager")(x).grad_fn
        other = torch.compile(torch.cos, backend="aot_eager")(x).grad_fn
    assert internals.is_compiled(type(node))
    assert type(node) is not type(other) and internals.is_compiled(type(other))
    assert not internals.is_compiled(type(x.sin().grad_fn))


@contract("learns_static_graph", "DDP_SINK_TYPE")
def static_graphs() -> None:
    sink: Any = torch.nn.parallel.distributed._DDPSink

    class Wrapped:
        static_graph = _ddp_sink_clone = False

    wrapped = Wrapped()
    node = sink.apply(lambda: wrapped, leaf(2))[0].grad_fn
    assert type(node) is internals.DDP_SINK_TYPE and not internals.learns_static_graph(node)
    wrapped.static_graph = True
    assert internals.learns_static_graph(node)


@contract("takes_one_cotangent")
def group_norms() -> None:
    out = F.group_norm(leaf(2, 4, 3), 2)
    assert internals.takes_one_cotangent(type(out.grad_fn))
    assert not internals.takes_one_cotangent(type(leaf(2).sin().grad_fn))


def at(value: Tensor, *others: str) -> tuple[Any, tuple[str, ...]]:
    return value.grad_fn, others


@contract("saved_value")
def saved() -> None:
    x, y = leaf(2, 2), leaf(2, 2)
    wanted = {
        "MmBackward0": at(x.mm(y), "self", "mat2"),
        "AddmmBackward0": at(torch.addmm(x, x, y), "mat1", "mat2"),
        "MvBackward0": at(x.mv(y[0]), "self", "vec"),
        "BmmBackward0": at(x[None].bmm(y[None]), "self", "mat2"),
        "ConvolutionBackward0": at(F.conv1d(leaf(1, 2, 3), leaf(2, 1, 2), groups=2), "groups"),
        "DivBackward0": at(x / y, "self", "other"),
        "SqrtBackward0": at(x.exp().sqrt(), "result"),
        "PowBackward0": at(x**3, "self", "exponent"),
        "PowBackward1": at(x.exp() ** y, "self", "exponent"),
        "LogBackward0": at(x.log(), "self"),
        "IndexBackward0": at(x.exp()[torch.arange(2)], "indices", "self_sym_sizes"),
        "EmbeddingBackward0": at(F.embedding(torch.zeros(1).long(), x, sparse=True), "sparse"),
        "CdistBackward0": at(torch.cdist(x, y), "x1"),
    }
    for name, (node, attributes) in wanted.items():
        assert internals.name_of(node) == name
        for attribute in attributes:
            assert internals.saved_value(node, attribute) is not None, f"{name} no longer shows {attribute}"
        assert internals.saved_value(node, "nothing") is None
    out = (x * y).sum()
    node = out.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    out.backward()
    assert raises(RuntimeError, lambda: internals.saved_value(node, "self"))


@contract("saved_numbers")
def numbers() -> None:
    node = leaf(2, 3).sum(1, keepdim=True).grad_fn
    shown = internals.saved_numbers(type(node))
    assert {"dim", "keepdim"} <= shown.keys()
    assert getattr(node, shown["keepdim"]) is True
    product = internals.saved_numbers(type((leaf(2) * leaf(2)).grad_fn))
    assert not {"self", "other"} & product.keys()  # tensors


@contract("shapes_of", "dtypes_of")
def shapes() -> None:
    found = internals.shapes_of([leaf(2, 3).sin().grad_fn, leaf(4, 2).unbind(0)[0].grad_fn])
    assert found == (None if OLD else [[(2, 3)], [(2,)] * 4])
    half = leaf(2).to(torch.float16).grad_fn
    dtypes = {torch.float16, torch.float64}
    assert internals.dtypes_of([half, leaf(2).sin().grad_fn]) == (set() if OLD else dtypes)


@contract("losses_of_stack")
def stacks() -> None:
    x, y = leaf(1)[0].detach().requires_grad_(), leaf(1)[0].detach().requires_grad_()
    edges = internals.losses_of_stack(torch.stack([x * 2, y * 3]))
    assert internals.losses_of_stack(torch.cat([x[None], y[None]])) is None
    if OLD:
        assert edges is None
        return
    assert edges is not None
    total = torch.stack([x, y])
    assert [edge.node for edge in internals.losses_of_stack(total) or []] == [
        (t * 1).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        for t in (x, y)
    ]


# Modules and functions.


@contract("held_by")
def contents() -> None:
    module = Net(lambda m: None, part=nn.Linear(1, 1), p=parameter(2), b=draw(2))
    module.empty = None
    parameters, buffers, children = internals.held_by(module)
    assert list(parameters.items()) == [("p", module.p)] and list(buffers.items()) == [("b", module.b)]
    assert children["part"] is module.part


@contract("BatchNorm")
def batch_norms() -> None:
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert issubclass(kind, internals.BatchNorm)
    assert not issubclass(nn.GroupNorm, internals.BatchNorm)


class Seen(TorchFunctionMode):
    """Keeps the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@contract("grouped_mm_op")
def grouped_mm() -> None:
    if internals.grouped_mm_op is None:
        assert not hasattr(nn.functional, "grouped_mm")
        return
    with Seen() as mode:
        nn.functional.grouped_mm(torch.randn(4, 8), torch.randn(2, 8, 8), offs=torch.tensor([1, 4]).int())
    assert internals.grouped_mm_op in mode.seen


@contract("VF", "weight_norm_op")
def fused_ops() -> None:
    kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}
    cells = {"lstm_cell": nn.LSTMCell, "gru_cell": nn.GRUCell, "rnn_tanh_cell": nn.RNNCell}
    for name, kind in {**kinds, **cells}.items():
        with Seen() as mode:
            kind(2, 3)(torch.randn(4, 2))
        assert getattr(internals.VF, name) in mode.seen, f"{kind.__name__} no longer calls {name}"
    for name, one in (("rnn_relu", nn.RNN), ("rnn_relu_cell", nn.RNNCell)):
        with Seen() as mode:
            one(2, 3, nonlinearity="relu")(torch.randn(4, 2))
        assert getattr(internals.VF, name) in mode.seen
    module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with Seen() as mode:
        module(torch.randn(1, 2))
    assert internals.weight_norm_op in mode.seen


@contract("compiled_call", "set_compiled_call", "plain_call")
def compiled_in_place() -> None:
    module = nn.Linear(2, 2)
    assert hasattr(nn.Module, "_compiled_call_impl")  # an engine asks each module for it
    assert internals.compiled_call(module) is None
    module.compile(backend="eager")
    call = internals.compiled_call(module)
    assert call is not None
    internals.set_compiled_call(module, lambda x: "instead")
    assert module(draw(1)) == "instead"
    internals.set_compiled_call(module, call)
    x = torch.randn(1, 2)
    assert torch.equal(internals.plain_call(module, x), F.linear(x, module.weight, module.bias))


@contract("hides_ops", "original_of", "name_in_original")
def compiled_modules() -> None:
    module = nn.Linear(2, 2)
    wrapper: Any = torch.compile(module, backend="eager")
    assert internals.hides_ops(wrapper) and internals.original_of(wrapper) is module
    names = [internals.name_in_original(name) for name, _ in wrapper.named_parameters()]
    assert names == [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    assert not internals.hides_ops(module) and internals.original_of(module) is module
    module.compile(backend="eager")
    assert internals.hides_ops(module)


@contract("applied")
def applying() -> None:
    module = Net(lambda m: None, part=nn.Linear(1, 1), b=torch.zeros(1))
    assert internals.applied(module, lambda t: t.to(torch.float32)) is module
    assert {t.dtype for t in (*module.parameters(), *module.buffers())} == {torch.float32}


@contract("undispatched")
def bodies() -> None:
    """What attention is made of is seen; the call itself is not."""
    follow, x = internals.undispatched(F.multi_head_attention_forward), torch.randn(3, 1, 4)
    module = nn.MultiheadAttention(4, 2)
    with Seen() as mode:
        follow(
            x, x, x, 4, 2, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
            module.out_proj.weight, module.out_proj.bias,
        )  # fmt: skip
    assert F.multi_head_attention_forward not in mode.seen and F.linear in mode.seen


# All of it.


def test_every_question_has_a_contract() -> None:
    assert CONTRACTS.keys() == set(internals.__all__)


# Of Python's own, of gramjd's, and public names with an underscore.
_NAMES = re.compile(r"_(saved|raw_saved|compiled_call|orig_mod|forward_cls|backward_cls)")
_ALLOWED = re.compile(r"^__|^_getframe$|^_replace$")


def private_names(path: Path) -> list[str]:
    """What a file reads of other objects that begins with an underscore, imports included."""
    tree = ast.parse(path.read_text())
    own = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    own |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            if node.attr not in own and not _ALLOWED.match(node.attr):
                found.append(f"{path.name}:{node.lineno} {node.attr}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"{path.name}:{node.lineno} {n}" for n in names if n.startswith("_")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _NAMES.match(node.value):
            found.append(f"{path.name}:{node.lineno} {node.value}")
    return found


def test_nothing_else_touches_torchs_insides() -> None:
    files = [p for p in ROOT.rglob("*.py") if p.parent.name != "internals"]
    assert len(files) > 100
    assert [name for path in files for name in private_names(path)] == []
    assert any(private_names(path) for path in (ROOT / "internals").glob("*.py"))  # it does see such


class Mixing(torch.autograd.Function):
    """Mixes samples when told to; calls something of its own what the nodes of leaves have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mixes: bool) -> Tensor:
        ctx.variable, ctx.mixes = torch.zeros(()), mixes
        return x + x.flip(0) if mixes else x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return (g + g.flip(0) if ctx.mixes else g), None


def test_a_function_that_looks_like_a_leaf() -> None:
    """It is one that nothing is known of: proven by what a graph showed, it would be wrong later."""
    model = nn.Linear(3, 2).double()
    engine = Engine(model, batch_dim=0, audit=None)
    for step in range(12):
        out = Mixing.apply(model(draw(4, 3)), step >= 10).square().sum(1)
        if step < 10:
            assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))
        else:
            with pytest.raises(gramjd.NotSeparableError):
                engine.compute_gramian(out)
