"""Stock models that accelerate spreads over two devices: ``python dispatched.py LIBRARY``."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from accelerate import dispatch_model
from device import end, start
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import gramjd

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle import dense_jacobian

GPT2 = GPT2Config(
    vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
    attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
)  # fmt: skip
BERT = BertConfig(
    vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
ON_CPU = {
    "gpt2": ["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h.0", "lm_head"],
    "bert": ["bert.embeddings", "bert.encoder.layer.0"],
}
ELSEWHERE = {
    "gpt2": ["transformer.h.1", "transformer.ln_f"],
    "bert": ["bert.encoder.layer.1", "bert.pooler", "dropout", "classifier"],
}


def steps(model: nn.Module, kind: str) -> None:
    """Gramians and gradients of steps with other data."""
    places = {**dict.fromkeys(ON_CPU[kind], "cpu"), **dict.fromkeys(ELSEWHERE[kind], "second:0")}
    twin = copy.deepcopy(model).double()
    net = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert {p.device.type for p in net.parameters()} == {"cpu", "second"}

    def losses(of: nn.Module, ids: Tensor) -> Tensor:
        logits: Tensor = of(input_ids=ids).logits
        return logits.logsumexp(-1).flatten(1).mean(-1) if logits.ndim > 2 else logits.logsumexp(-1)

    with gramjd.Engine(net, batch_dim=0) as engine:
        for _ in range(7):
            ids = torch.randint(31, (5, 8))
            J = dense_jacobian(losses(twin, ids), twin.parameters())
            gramian = engine.compute_gramian(losses(net, ids)).cpu().double()
            assert float((gramian - J @ J.T).norm() / (J @ J.T).norm()) < 1e-5
            weights = engine.backward(losses(net, ids), gramjd.weighting.upgrad).cpu().double()
            gradient = torch.cat([p.grad.cpu().double().flatten() for p in net.parameters()])
            assert float((gradient - weights @ J).norm() / gradient.norm()) < 1e-5
            net.zero_grad()


if __name__ == "__main__":
    torch.set_num_threads(1)
    start(Path(sys.argv[1]))
    torch.manual_seed(0)
    steps(GPT2LMHeadModel(GPT2), "gpt2")
    steps(BertForSequenceClassification(BERT), "bert")
    end()
