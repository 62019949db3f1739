"""Models of the sizes that people train, with random weights: measured on demand alone.

Dropout is off. Batch normalisation uses its running statistics (``eval()``), since those of the batch would
give one sample's loss a derivative of another's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.cases.images import _classified
from benchmarks.cases.objectives import cross_entropy
from benchmarks.cases.sequences import Logits, _labelled
from benchmarks.problem import Problem


class Pictures(nn.Module):
    """A Hugging Face model of pictures whose output is its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def bert(batch: int = 8, width: int = 768, depth: int = 12, heads: int = 12, length: int = 128,
         vocabulary: int = 30522) -> Problem:  # fmt: skip
    """BERT-base (Devlin et al., arXiv 1810.04805), two classes of a sequence."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=max(512, length), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = Logits(BertForSequenceClassification(config)).train()
    ids, labels = torch.randint(0, vocabulary, (batch, length)), torch.randint(0, 2, (batch,))
    return Problem(model, (ids,), (labels,), cross_entropy)


def gpt2_small(batch: int = 4, width: int = 768, depth: int = 12, heads: int = 12, length: int = 256,
               vocabulary: int = 50257) -> Problem:  # fmt: skip
    """GPT-2 small (Radford et al., 2019): head and embedding tied, the next token of each."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_positions=1024, n_embd=width, n_layer=depth, n_head=heads, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Logits(GPT2LMHeadModel(config)).train()
    return _labelled(model, batch, length, vocabulary, vocabulary)


def gpt2_medium(batch: int = 4, length: int = 512) -> Problem:
    """GPT-2 medium, 355 million parameters: for a GPU."""
    return gpt2_small(batch, 1024, 24, 16, length)


def resnet18(batch: int = 64, width: int = 64, size: int = 64, classes: int = 1000) -> Problem:
    """ResNet-18 (He et al., arXiv 1512.03385)."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=width, hidden_sizes=[width * 2**stage for stage in range(4)], depths=[2, 2, 2, 2],
        layer_type="basic",
    )  # fmt: skip
    config.num_labels = classes
    return _classified(Pictures(ResNetForImageClassification(config)).eval(), batch, size)


def vit_small(batch: int = 8, width: int = 384, depth: int = 12, heads: int = 6, size: int = 224,
              patch: int = 16, classes: int = 1000) -> Problem:  # fmt: skip
    """ViT-S/16 (Touvron et al., arXiv 2012.12877)."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
        image_size=size, patch_size=patch, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = classes
    return _classified(Pictures(ViTForImageClassification(config)).train(), batch, size)
