"""Stock models of Hugging Face, small and with random weights, exactly as a user would call them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import Engine

transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 7, dtype=torch.long)
MASK[0, 5:], MASK[2, 3:] = 0, 0
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 24, "num_attention_heads": 4}


@dataclass(frozen=True)
class Stock:
    """A model, its losses (one for each sample), and the parameters that may go the slow way."""

    make: Callable[[], nn.Module]
    losses: Callable[[nn.Module], Tensor]
    rows: tuple[str, ...] = ()  # in training mode with batch_dim=0
    mixes: bool = False  # in training mode


def tokens(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.mT, IDS, reduction="none").mean(1).double()


def masked(model: nn.Module) -> Tensor:
    return tokens(model(input_ids=IDS, attention_mask=MASK).logits)


def unmasked(model: nn.Module) -> Tensor:
    return tokens(model(input_ids=IDS).logits)


def translated(model: nn.Module) -> Tensor:
    return tokens(model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS).logits)


def classified(model: nn.Module) -> Tensor:
    return model(pixel_values=IMAGES).logits.logsumexp(1)


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, **HEADS, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **HEADS))


def t5() -> nn.Module:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **HEADS))


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4))


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


def checkpointed(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name that users know is going
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    return made


MODELS = {
    "gpt2": Stock(gpt2, masked),
    "gpt2, checkpointed": Stock(checkpointed(gpt2), masked),
    "llama, checkpointed": Stock(checkpointed(llama), masked),
    "bert, checkpointed": Stock(checkpointed(bert), masked),
    "llama": Stock(llama, masked),
    "bert": Stock(bert, masked),
    # The bias table enters fused attention itself, whose dropout cannot be drawn a second time.
    "t5": Stock(t5, translated, rows=("relative_attention_bias",)),
    "vit": Stock(vit, classified),
    "mamba": Stock(mamba, unmasked),
    "resnet": Stock(resnet, classified, mixes=True),
}


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", list(MODELS))
def test_stock_model(name: str, mode: str, batch_dim: int | None) -> None:
    stock = MODELS[name]
    model = stock.make().double().train(mode == "train")
    engine = Engine(model, batch_dim=batch_dim)
    training = mode == "train" and batch_dim == 0
    if stock.mixes and training:
        with pytest.raises(gramjd.NotSeparableError, match="batch normalisation"):
            engine.compute_gramian(stock.losses(model))
        return
    for _ in range(2):  # measured and checked first, then from what is known
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = stock.losses(model)
            gramian = engine.compute_gramian(losses)
        slow = [str(w.message) for w in caught if issubclass(w.category, gramjd.SlowPathWarning)]
        allowed = stock.rows if training else ()
        assert all(any(name in text for name in allowed) and "more" not in text for text in slow)
        assert_close(gramian, dense_gramian(losses, model.parameters()), 1e-8)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own question
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_peft_adapters_with_a_frozen_base(name: str, mode: str, batch_dim: int | None) -> None:
    """LoRA by the library itself, dropout of the adapters included: by the recorded ops alone."""
    peft = pytest.importorskip("peft")
    targets = {"gpt2": ["c_attn", "c_proj", "c_fc"], "bert": ["query", "value", "dense"]}[name]
    config = peft.LoraConfig(r=2, lora_alpha=8, lora_dropout=0.1, target_modules=targets,
                             init_lora_weights=False, fan_in_fan_out=name == "gpt2")  # fmt: skip
    model = peft.get_peft_model(MODELS[name].make(), config).double().train(mode == "train")
    assert any(p.requires_grad for p in model.parameters())
    assert not all(p.requires_grad for p in model.parameters())
    engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
    for _ in range(2):
        losses = masked(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, trained), 1e-8)
