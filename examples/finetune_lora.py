"""Fine-tune LoRA adapters of a Hugging Face model by Jacobian descent, one loss for each sentence.

Needs `pip install peft transformers`. A small BERT first learns, by AdamW, whether a sentence has more small
numbers than large ones. Then its weights are frozen, and adapters of rank 4 (LoRA, arXiv 2106.09685) learn
the opposite answer for sentences that begin with a 1. The Gramian covers the adapters and the classifier.

Prints the share of parameters that is trained, and the accuracy before and after. With --out, draws the
accuracy over the steps into `lora.png` there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

from gramjd import Engine
from gramjd.weighting import UPGradWeighting

VOCABULARY = 40  # 0 pads


def sentences(size: int, seed: int, flip: bool) -> tuple[Tensor, Tensor]:
    """Padded ids, half of which begin with a 1, and the answers."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (size,), generator=generator).tolist()
    each = [torch.randint(2, VOCABULARY, (n,), generator=generator) for n in lengths]
    for ids in each[::2]:
        ids[0] = 1
    labels = torch.stack([(2 * (ids < VOCABULARY // 2).sum() > len(ids)).long() for ids in each])
    ids = pad_sequence(each, batch_first=True)
    return ids, torch.where(ids[:, 0] == 1, 1 - labels, labels) if flip else labels


def losses_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """The loss of each sentence, `[B]`."""
    logits = model(input_ids=ids, attention_mask=(ids > 0).long()).logits
    return cross_entropy(logits, labels, reduction="none")


def accuracy(model: nn.Module, ids: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=(ids > 0).long()).logits
    model.train()
    return float((logits.argmax(1) == labels).double().mean())


def pretrained(steps: int) -> nn.Module:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=16)  # fmt: skip
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, labels = sentences(4096, 0, flip=False)
    for _ in range(steps):
        batch = torch.randint(0, len(ids), (32,))
        optimizer.zero_grad()
        losses_of(model, ids[batch], labels[batch]).mean().backward()
        optimizer.step()
    return model


def plot(steps: Sequence[int], accuracies: Sequence[float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    ax = figure.add_subplot()
    ax.plot(steps, [100 * each for each in accuracies], color="#0072b2")
    ax.set(xlabel="steps of the adapters", ylabel="test accuracy, %", ylim=(40, 103))
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to draw the accuracy")
    args = parser.parse_args()
    torch.manual_seed(0)
    base = pretrained(args.steps)

    adapters = LoraConfig(r=4, target_modules=["query", "value", "dense"], modules_to_save=["classifier"])
    model = get_peft_model(base, adapters)  # freezes the base
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, weighting = Engine(model, batch_dim=0), UPGradWeighting()
    optimizer = torch.optim.AdamW(trained, lr=3e-3)

    ids, labels = sentences(4096, 1, flip=True)
    test = sentences(512, 2, flip=True)
    before = accuracy(model, *test)
    steps, history = [0], [before]
    for step in range(1, args.steps + 1):
        batch = torch.randint(0, len(ids), (32,))
        losses = losses_of(model, ids[batch], labels[batch])  # [32]
        optimizer.zero_grad()
        engine.backward(losses, weighting)
        optimizer.step()
        if args.out is not None and step % 10 == 0:
            steps.append(step)
            history.append(accuracy(model, *test))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(steps, history, args.out / "lora.png")
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
    after = accuracy(model, *test)
    print(
        f"{share:.0%} of the parameters: accuracy {before:.1%} before, {after:.1%} after {args.steps} steps."
    )


if __name__ == "__main__":
    main()
