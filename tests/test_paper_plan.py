"""The plan on paper of ``docs/scaling.md``: its tables, and the model that it is about."""

from __future__ import annotations

import sys
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # of the benchmarks, which are not installed

import gramjd  # noqa: E402
from benchmarks import paper_plan  # noqa: E402
from benchmarks.paper_plan import Transformer  # noqa: E402
from gramjd.distributed.factors import Manifest, describe  # noqa: E402

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
SMALL = Transformer(layers=2, width=16, wide=24, vocabulary=11, length=5, dtype=torch.float32)


@pytest.mark.parametrize("model", [Transformer(), Transformer(rank=16)], ids=["whole", "adapters"])
def test_the_page_shows_what_the_planner_says(model: Transformer) -> None:
    assert paper_plan.table(model) in PAGE


def test_the_model_has_seven_billion_parameters() -> None:
    manifest = Transformer().manifest(1)
    entries = sum(prod(blocks[0].shape) for blocks in manifest.parts(manifest.meta(), range(291))[0].blocks)
    assert entries == 6_738_415_616  # of Llama 7B


def test_factors_are_those_of_a_real_model() -> None:
    """Of Hugging Face's Llama, small: the same blocks of the same tensors, shared by the same parameters."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=SMALL.vocabulary, hidden_size=SMALL.width, intermediate_size=SMALL.wide,
        num_hidden_layers=SMALL.layers, num_attention_heads=2, tie_word_embeddings=False, use_cache=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    engine = gramjd.Engine(model, batch_dim=0)
    ids = torch.randint(SMALL.vocabulary, (3, SMALL.length))
    logits = model(input_ids=ids).logits
    losses = F.cross_entropy(logits.mT, ids, reduction="none").mean(1)
    jac = engine.jacobian(losses)
    real, paper = describe(jac.parts)[0], SMALL.manifest(3)
    every = range(len(real.blocks[0]))
    assert kinds(real) == kinds(paper)
    assert real.bytes(every) == paper.bytes(every)


def kinds(manifest: Manifest) -> Counter[Any]:
    """How many parameters have which blocks, with tensors of which sizes."""
    tensors = manifest.tensors
    return Counter(
        (template.type.__name__, *sorted((name, prod(tensors[n].shape)) for name, n in template.factors))
        for blocks in manifest.blocks[0]
        for template in blocks
    )
