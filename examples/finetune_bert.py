"""Fine-tune a Hugging Face model by Jacobian descent: a `Trainer` with a `training_step` of its own.

Needs `pip install transformers accelerate`. The model is a small BERT with random weights; its task is
to tell whether a sentence of 4 to 12 tokens has more small numbers than large ones. Sentences are padded
and masked, as a collator of real text does. Prints the accuracy before and after.
"""

import argparse
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from gramjd import Engine
from gramjd.weighting import UPGradWeighting

VOCABULARY = 40  # 0 pads


class GramianTrainer(Trainer):
    """Weighs the samples of every batch by the Gramian of their gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine = Engine(self.model, batch_dim=0)
        self.weighting = UPGradWeighting()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with self.compute_loss_context_manager():  # autocast, if the arguments ask for it
            logits = model(**inputs).logits
            losses = cross_entropy(logits, labels, reduction="none")  # one a sample
        weights = self.weighting(self.engine.compute_gramian(losses))
        self.accelerator.backward(losses, gradient=weights)
        return losses.detach().mean()


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random token ids, and whether most of them are small."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(4, 13, (size,), generator=generator).tolist()
        self.ids = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"ids": ids, "label": (2 * (ids < VOCABULARY // 2).sum() > len(ids)).long()}


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = pad_sequence([sample["ids"] for sample in samples], batch_first=True)
    labels = torch.stack([sample["label"] for sample in samples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def make_model() -> BertForSequenceClassification:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=16)  # fmt: skip
    return BertForSequenceClassification(config)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = GramianTrainer(
            make_model(),
            arguments,
            data_collator=collate,
            train_dataset=Sentences(4096, seed=0),
            eval_dataset=Sentences(512, seed=1),
            compute_metrics=accuracy,
        )
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        after = trainer.evaluate()["eval_accuracy"]
    print(f"Accuracy: {before:.1%} before, {after:.1%} after {args.steps} steps.")


if __name__ == "__main__":
    main()
