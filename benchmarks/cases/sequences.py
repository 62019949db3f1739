"""Cases of sequences of tokens: C, E and G."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.cases.objectives import Several, token_cross_entropy
from benchmarks.problem import Problem


def _labelled(model: nn.Module, batch: int, length: int, vocabulary: int, labels: int,
              objectives: int = 1) -> Problem:  # fmt: skip
    """A label for each token."""
    ids, wanted = (torch.randint(0, n, (batch, length)) for n in (vocabulary, labels))
    loss = token_cross_entropy if objectives == 1 else Several(length, objectives)
    return Problem(model, (ids,), (wanted,), loss)


class Positions(nn.Module):
    """A learned vector added at each position."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class Encoder(nn.Module):
    """torch's own pre-norm layers, between an embedding and a head."""

    def __init__(self, width: int, depth: int, length: int, vocabulary: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.tokens, self.positions = nn.Embedding(vocabulary, width), Positions(length, width)
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.positions(self.tokens(ids))))


def encoder(batch: int = 16, width: int = 256, depth: int = 4, length: int = 64, vocabulary: int = 1000,
            objectives: int = 1) -> Problem:  # fmt: skip
    """C: a transformer encoder."""
    model = Encoder(width, depth, length, vocabulary)
    return _labelled(model, batch, length, vocabulary, vocabulary, objectives)


class Logits(nn.Module):
    """A Hugging Face model whose output is its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def gpt2(batch: int = 8, width: int = 256, depth: int = 4, length: int = 128,
         vocabulary: int = 5000) -> Problem:  # fmt: skip
    """E: GPT-2 of Hugging Face's transformers, head and embedding tied, predicting the next token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=depth, n_head=4, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Logits(GPT2LMHeadModel(config)).train()
    return _labelled(model, batch, length, vocabulary, vocabulary)


class Tagger(nn.Module):
    """An LSTM over embedded tokens, and a label for each."""

    def __init__(self, width: int, vocabulary: int, labels: int) -> None:
        super().__init__()
        self.tokens, self.recurrent = (
            nn.Embedding(vocabulary, width),
            nn.LSTM(width, 2 * width, batch_first=True),
        )
        self.head = nn.Linear(2 * width, labels)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.recurrent(self.tokens(ids))[0])


def tagger(batch: int = 16, width: int = 64, length: int = 32, vocabulary: int = 1000) -> Problem:
    """G: a sequence tagger with 20 labels."""
    return _labelled(Tagger(width, vocabulary, 20), batch, length, vocabulary, 20)
