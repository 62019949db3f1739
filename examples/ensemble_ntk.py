"""The neural tangent kernel of many networks at once, by `torch.vmap` over their parameters.

At initialisation the kernel of a network is random; the wider the network, the less (Jacot et al.,
arXiv 1806.07572). Here an ensemble of networks of each width, drawn independently, is stacked along a
new dimension of its parameters, and one call gives the kernels of all of them.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gramjd


def network(width: int) -> nn.Module:
    """A network with the initialisation of He (arXiv 1502.01852): its kernel has a limit up to scale."""
    layers = [nn.Linear(i, o, bias=False) for i, o in [(64, width), (width, width), (width, 1)]]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def kernels(members: int, width: int, x: Tensor) -> Tensor:
    """The kernel of each member of an ensemble, `[members, samples, samples]`."""
    networks = [network(width) for _ in range(members)]
    function, _ = gramjd.functional_loss(networks[0])
    params, _ = torch.func.stack_module_state(networks)  # each [members, *shape]
    kernel = gramjd.ntk(function, trace_axes=[-1])  # of the one output
    return torch.vmap(lambda p: kernel(p, x))({name: p.detach() for name, p in params.items()})


def deviation(found: Tensor) -> float:
    """The distance of the kernels from their mean, relative to it."""
    mean = found.mean(0)
    return float((found - mean).square().sum((1, 2)).mean().sqrt() / mean.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--samples", type=int, default=50)
    args = parser.parse_args()

    torch.manual_seed(0)
    x = torch.tensor(load_digits().data[: args.samples], dtype=torch.float32) / 16
    print("| width | deviation of the kernel | times the root of the width |\n|---|---|---|")
    for width in args.widths:
        found = deviation(kernels(args.members, width, x))
        print(f"| {width} | {found:.3f} | {found * width**0.5:.2f} |")


if __name__ == "__main__":
    main()
