"""Teach gramjd an op of your own, and see what that saves.

gramjd knows ops, not layers: for each op that a parameter enters, a *rule* gives the
parameter's share of the Jacobian as a block. An op without a rule is never wrong, only dense:
its rows, as large as the parameter for every sample, come from autograd. A rule keeps them
factored.

The op here is a scaled linear map of tokens, `y = x @ diag(s) @ w`, that a library might fuse
in one call. Being an op of ours, not of torch's, it announces itself with
`handle_torch_function`.
"""

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

import gramjd
from gramjd.blocks import Dense, Outer


def scaled_matmul(input: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`input [..., i]` times `scale [i]` times `weight [i, o]`."""
    if has_torch_function((input, weight, scale)):
        return handle_torch_function(scaled_matmul, (input, weight, scale), input, weight, scale)
    return (input * scale) @ weight


class Model(nn.Module):
    """Two such maps; the losses of a batch of sequences."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.first = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.second = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = scaled_matmul(x, self.first, self.scale).tanh()
        return scaled_matmul(h, self.second, self.scale).square().mean((1, 2))


def register() -> None:
    """One rule for each argument that may be a parameter.

    `c` are the cotangents of the op's output. All tensors are canonical: K objectives of B
    samples, then what one sample has, `c [K, B, ..., o]` and `input [B, ..., i]`. The argument
    that the rule is for arrives as it is. `needs` names the other arguments that the rule reads.
    """

    @gramjd.register_rule(scaled_matmul, wrt="weight", needs=["input", "scale"])
    def weight_rule(c: Tensor, input: Tensor, weight: Tensor, scale: Tensor) -> Outer:
        a = torch.einsum("b...i,bi->b...i", input, scale)
        # a sum of outer products over tokens: c [K, B, T, groups, o] and a [B, T, groups, i]
        c, a = c.flatten(2, -2).unsqueeze(3), a.flatten(1, -2).unsqueeze(2)
        return Outer(c, a, tuple(weight.shape), transposed=True)  # [i, o], not [o, i]

    @gramjd.register_rule(scaled_matmul, wrt="scale", needs=["input", "weight"])
    def scale_rule(c: Tensor, input: Tensor, weight: Tensor, scale: Tensor) -> Dense:
        rows = torch.einsum("kb...o,bio,b...i->kb...i", c, weight, input)
        return Dense(rows.flatten(2, -2).sum(2))  # [K, B, i]


def gramian(model: Model, x: Tensor) -> Tensor:
    """Proved equal to autograd's gradients by the engine: a wrong rule would not be used."""
    engine = gramjd.Engine(model, batch_dim=0)
    found = engine.compute_gramian(model(x))
    engine.close()
    return found


def main() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(16, 2, 64)
    before = gramian(model, x)
    print("Without a rule:", gramjd.explain(model, x), sep="\n", end="\n\n")
    register()
    after = gramian(model, x)
    print("With rules:", gramjd.explain(model, x), sep="\n", end="\n\n")
    print(f"The Gramians differ by {float((after - before).norm() / before.norm()):.1e}.")


if __name__ == "__main__":
    main()
