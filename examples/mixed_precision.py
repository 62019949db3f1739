"""Mixed precision: autocast, and a `GradScaler` where gradients are of float16.

On a GPU the network runs in float16, whose smallest gradients vanish and whose largest overflow, so the
losses are scaled and steps that overflow are skipped; without one it runs in bfloat16, which needs no
scaling (try --dtype float16). The Gramian is accumulated in float32 either way. `engine.backward` takes the
scaler: the weighting sees the Gramian without the scale, the optimizer gradients that the scaler unscales,
and infinite ones if they overflow. Prints the losses and the scale.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramjd import Engine
from gramjd.weighting import upgrad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step(
    model: nn.Module,
    engine: Engine,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """One step; returns the losses."""
    with torch.autocast(DEVICE, dtype):
        losses = cross_entropy(model(x), y, reduction="none")
    engine.backward(losses, upgrad, scaler=scaler)
    scaler.step(optimizer)  # not if gradients overflowed
    scaler.update()
    optimizer.zero_grad()
    return losses.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default=None)
    parser.add_argument("--scale", type=float, default=2.0**16, help="at the start")
    args = parser.parse_args()
    name = args.dtype or ("float16" if DEVICE == "cuda" else "bfloat16")
    dtype = getattr(torch, name)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 4)).to(DEVICE)
    truth = torch.randn(20, 4, device=DEVICE)
    engine = Engine(model, batch_dim=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=args.scale, enabled=dtype == torch.float16)
    history = []
    for _ in range(args.steps):
        x = torch.randn(32, 20, device=DEVICE)
        history.append(step(model, engine, optimizer, scaler, x, (x @ truth).argmax(1), dtype).mean())
    print(f"{name} on {DEVICE}: mean loss {history[0]:.3f} at first, {history[-1]:.3f} at last, "
          f"scale {scaler.get_scale():.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
