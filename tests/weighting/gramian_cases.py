"""Gramians for the tests of the weightings: by family, from a real network, and degenerate."""

import functools

import torch
from torch import Tensor

FAMILIES = [
    "random",
    "low_rank",
    "collinear",
    "conflicting",
    "duplicated",
    "badly_scaled",
    "decaying",
    "shifted",
    "digits",
]


def jacobian(family: str, size: int, seed: int = 0) -> Tensor:
    """A float64 Jacobian ``[size, n]`` of the family."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = normal(size, 2 * size + 3)
    if family == "low_rank":
        return normal(size, size // 4 + 1)
    if family == "collinear":
        return wide[:1] + 0.01 * wide
    if family == "conflicting":
        return torch.cat([wide[: size // 2], 0.05 * wide[size // 2 :]]) - wide.mean(0) * 1.2
    if family == "duplicated":
        return torch.cat([wide[: (size + 1) // 2], wide[: size // 2]])
    if family == "badly_scaled":
        return wide * 10.0 ** (6 * torch.rand(size, 1, generator=generator, dtype=wide.dtype) - 3)
    if family == "decaying":
        return wide * torch.exp(-12 * torch.linspace(0, 1, wide.shape[1], dtype=wide.dtype))
    if family == "shifted":
        return wide - 3 * normal(1, wide.shape[1])
    if family == "digits":
        return digits_jacobian()[:size]
    return wide


def gramian(family: str, size: int, seed: int = 0) -> Tensor:
    """A float64 Gramian ``[size, size]`` of the family."""
    matrix = jacobian(family, size, seed)
    return matrix @ matrix.T


@functools.cache
def digits_jacobian() -> Tensor:
    """Per-sample gradients ``[256, n]`` of a small, briefly trained network on real digits."""
    datasets = __import__("pytest").importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16), torch.tensor(labels)
    torch.manual_seed(0)
    sizes = (64, 32, 10)
    model = torch.nn.Sequential(
        torch.nn.Linear(*sizes[:2]), torch.nn.ReLU(), torch.nn.Linear(*sizes[1:])
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, (image[None],))
        return torch.nn.functional.cross_entropy(output, label[None])

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x[:256], y[:256])
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1)


def degenerate(size: int, count: int, seed: int) -> Tensor:
    """``[count, size, size]``: zero, repeated, opposite and dependent gradients of all lengths."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rank = (uniform(count, 1, 1) * (size + 1)).floor()
    n = size + 2
    coordinates = torch.arange(n) < rank  # the first `rank` coordinates only
    matrix = torch.randn(count, size, n, generator=generator, dtype=torch.float64) * coordinates
    source = (uniform(count, size) * size).long()
    copies = matrix.gather(1, source.unsqueeze(-1).expand(-1, -1, n))
    sign = torch.where(uniform(count, size, 1) < 0.5, -1.0, 1.0)
    matrix = torch.where(uniform(count, size, 1) < 0.3, sign * copies, matrix)
    matrix = torch.where(uniform(count, size, 1) < 0.15, 0.0, matrix)
    spread = 4 * uniform(count, 1, 1).pow(2) * (2 * uniform(count, size, 1) - 1)
    matrix = matrix * 10.0**spread
    return matrix @ matrix.mT
