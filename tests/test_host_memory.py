"""Memory of rows that later steps use again: no tensor that is alive ever shares it with another."""

from __future__ import annotations

import copy
import gc
import mmap
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import assert_close
from torch import Tensor, nn

import gramjd
from gramjd import host_memory

pytestmark = pytest.mark.skipif(not host_memory._AVAILABLE, reason="the system has no MADV_FREE")
LARGE = (1024, 1024)  # 4 MiB in float32


@pytest.fixture(autouse=True)
def _nothing_is_held() -> Iterator[None]:
    gc.collect()
    host_memory._freed.clear()
    yield
    host_memory._freed.clear()


def large(**options: Any) -> Tensor:
    return host_memory.empty(LARGE, torch.empty(0, **options))


def test_a_freed_block_is_used_again() -> None:
    first = large()
    place = first.data_ptr()
    del first
    assert [len(block) for block in host_memory._freed] == [2**22]
    assert large().data_ptr() == place


@pytest.mark.parametrize(
    "kept",
    [
        lambda x: x[3:5],
        lambda x: x.data,
        lambda x: x.detach().view(-1)[::7],
        lambda x: x.untyped_storage(),
        lambda x: x.numpy(),
        lambda x: (torch.ones(3, 1024, requires_grad=True) @ x).sum().grad_fn,  # saved for a backward pass
    ],
)
def test_a_block_in_use_is_not(kept: Any) -> None:
    first = large().fill_(3.0)
    held, place = kept(first), first.data_ptr()
    del first
    assert not host_memory._freed and large().data_ptr() != place
    del held
    assert place in {large().data_ptr() for _ in range(2)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_dtypes(dtype: torch.dtype) -> None:
    found = large(dtype=dtype)
    assert found.dtype == dtype and found.shape == LARGE and found.is_contiguous()
    assert found.data_ptr() % 4096 == 0


def test_a_much_larger_block_is_left_for_larger_tensors() -> None:
    block = host_memory.empty((5, *LARGE), torch.empty(0))
    place = block.data_ptr()
    del block
    assert large().data_ptr() != place


def test_few_blocks_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "MOST", 3)
    several = [large() for _ in range(5)]
    last = several[-1].data_ptr()
    while several:
        several.pop(0)
    assert len(host_memory._freed) == 3 and large().data_ptr() == last


def is_resizable(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is from torch's own allocator."""
    storage = tensor.untyped_storage()
    try:
        storage.resize_(storage.nbytes() + 1)
    except RuntimeError:
        return False
    return True


def test_small_tensors_and_other_devices_take_torch_s_memory() -> None:
    assert is_resizable(host_memory.empty((4, 4), torch.empty(0)))
    assert host_memory.empty(LARGE, torch.empty(0, device="meta")).is_meta
    assert not is_resizable(large())  # the counterpart


def test_profilers_see_torch_s_allocations() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert is_resizable(large())


def test_a_system_that_takes_no_pages_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_FREE", -1)  # no advice that a system knows
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)
    large().fill_(1.0)
    assert not host_memory._freed


def test_a_system_that_maps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert is_resizable(large().fill_(2.0))  # torch's own


def tokens(width: int = 128) -> tuple[nn.Module, Tensor]:
    """Products over 64 tokens, rows of 2.5 MiB for 40 samples."""
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    return model, torch.randn(40, 64, width)


def dense(model: nn.Module, x: Tensor) -> Tensor:
    """Rows by ordinary backward passes, in float64."""
    model, x = copy.deepcopy(model).double(), x.double()
    losses = model(x).square().mean((1, 2))
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def assert_products(jac: gramjd.Jacobian[Any], rows: Tensor, w: Tensor) -> None:
    flat = torch.cat([g.flatten() for g in jac.vjp(w).values()])
    assert_close(flat, (w.double() @ rows).float(), 1e-5)


def test_jacobians_that_are_alive_together() -> None:
    """Rows that one of them keeps are not those of the next, whichever is dropped in between."""
    model, x = tokens()
    engine = gramjd.Engine(model, batch_dim=0)
    batches = [x, x.flip(1) * 2, x[:30] - 1, x[5:] * 0.5]
    alive: list[tuple[gramjd.Jacobian[Any], Tensor, Tensor]] = []
    for step in range(8):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.99)
        given = batches[step % 4]
        jac, rows = engine.jacobian(model(given).square().mean((1, 2))), dense(model, given)
        assert_close(jac.gramian(), (rows @ rows.T).float(), 1e-5)
        assert jac.parts[0].kept  # rows in such memory
        alive.append((jac, rows, torch.randn(len(given))))
        for each in alive:
            assert_products(*each)
        if step % 2:
            del alive[0]
    jac, rows, w = alive[-1]
    for other in (copy.deepcopy(jac), pickle.loads(pickle.dumps(jac))):
        assert_products(other, rows, w)


def test_threads() -> None:
    """Each fills its own tensors; none sees another's numbers."""
    wrong: list[float] = []

    def work(number: float) -> None:
        for _ in range(60):
            mine = [large().fill_(number) for _ in range(2)]
            wrong.extend(float(x.min()) for x in mine if not bool((x == number).all()))

    threads = [threading.Thread(target=work, args=(float(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and host_memory._freed


def test_inference_mode() -> None:
    model, x = tokens()
    jac = gramjd.jacobian(lambda p, x: torch.func.functional_call(model, p, (x,)).square().mean())(
        {n: p.detach() for n, p in model.named_parameters()}, x
    )
    rows = dense(model, x)
    with torch.inference_mode():
        inside = jac.gramian()
    assert_close(inside, (rows @ rows.T).float(), 1e-5)
    assert_products(jac, rows, torch.randn(40))
