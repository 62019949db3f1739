"""Attention of torch's own modules against the dense oracle, through both faces, without dense rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_close, dense_gramian
from torch import Tensor, nn
from torch.func import functional_call

import gramjd
from gramjd import Engine
from gramjd.blocks import Dense

CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDED = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()  # [B, T]


class Attention(nn.Module):
    """``nn.MultiheadAttention`` of a sequence to itself, or to another."""

    def __init__(self, cross: bool = False, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.cross, self.call, self.first = cross, call or {}, options.get("batch_first", False)

    def forward(self, x: Tensor, memory: Tensor, padded: Tensor) -> Tensor:
        call = dict(self.call)
        if call.pop("pad", False):
            call["key_padding_mask"] = padded
        x, memory = (x, memory) if self.first else (x.transpose(0, 1), memory.transpose(0, 1))
        out, weights = self.attention(x, *((memory, memory) if self.cross else (x, x)), **call)
        out = out if self.first else out.transpose(0, 1)
        return out if weights is None else out + weights.square().sum((1, 2), keepdim=True)


class Layer(nn.Module):
    """An encoder or a decoder layer."""

    def __init__(self, kind: type[nn.Module], masked: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer, self.masked = kind(8, 2, 12, **options), masked  # type: ignore[call-arg]
        self.first = options.get("batch_first", False)

    def forward(self, x: Tensor, memory: Tensor, padded: Tensor) -> Tensor:
        x, memory = (x, memory) if self.first else (x.transpose(0, 1), memory.transpose(0, 1))
        if isinstance(self.layer, nn.TransformerDecoderLayer):
            masks = {"tgt_mask": CAUSAL, "tgt_key_padding_mask": padded, "memory_key_padding_mask": padded}
            out = self.layer(x, memory, **(masks if self.masked else {}))
        else:
            out = self.layer(x, CAUSAL if self.masked else None, padded if self.masked else None)
        return out if self.first else out.transpose(0, 1)


CASES: dict[str, Any] = {
    "self": lambda: Attention(),
    "self, batch first": lambda: Attention(batch_first=True, call={"need_weights": False}),
    "self, masked": lambda: Attention(batch_first=True, call={"attn_mask": CAUSAL, "pad": True}),
    "self, causal": lambda: Attention(
        call={"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}, bias=False
    ),
    "cross": lambda: Attention(cross=True),
    "cross, masked": lambda: Attention(cross=True, batch_first=True, call={"pad": True}),
    "cross, other sizes": lambda: Attention(cross=True, kdim=8, vdim=8, bias=False, add_zero_attn=True),
    "bias in keys and values": lambda: Attention(add_bias_kv=True),
    "encoder": lambda: Layer(nn.TransformerEncoderLayer),
    "encoder, masked": lambda: Layer(nn.TransformerEncoderLayer, True, batch_first=True, norm_first=True),
    "decoder": lambda: Layer(nn.TransformerDecoderLayer, batch_first=True),
    "decoder, masked": lambda: Layer(nn.TransformerDecoderLayer, True, norm_first=True),
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    floats = (torch.randn(3, 5, 8, dtype=torch.float64) for _ in range(2))
    return (*floats, PADDED)  # type: ignore[return-value]


def losses(out: Tensor, several: bool) -> Tensor:
    found = [out.sin().sum((1, 2)), out.square().mean((1, 2))]
    return torch.stack(found, 1) if several else found[0]


def assert_structured(jacobian: gramjd.Jacobian) -> None:
    for name, blocks, p in zip(jacobian.names, jacobian.blocks, jacobian.parameters, strict=True):
        is_row = p.ndim == 1 or "bias_" in name
        assert is_row or not any(isinstance(block, Dense) for block in blocks), name


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("name", list(CASES))
def test_attention(name: str, train: bool, several: bool) -> None:
    model = CASES[name]().double().train(train)
    args = inputs()

    def run() -> Tensor:
        torch.manual_seed(1)
        return losses(model(*args), several)

    want = dense_gramian(run(), model.parameters())
    for batch_dim in (0, None):
        engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
        for _ in range(2):
            got = engine.jacobian(run())
            assert_close(got.gramian(), want)
        assert_structured(got)
        engine.close()

    for module in model.modules():  # randomness differs by sample there
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    want = dense_gramian(run(), model.parameters())

    def f(params: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return losses(functional_call(model, params, tuple(x[None] for x in sample)), several)[0]

    jacobian = gramjd.jacobian(f)({name: p.detach() for name, p in model.named_parameters()}, *args)
    assert_close(jacobian.gramian(), want)
    assert_structured(jacobian)
