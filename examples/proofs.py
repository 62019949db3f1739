"""Print the evidence for some Gramians: a proof of this call, an earlier proof, or a measurement.

One engine takes batches of several sizes. `explain` says for each of them how its Gramian was verified.
"""

import torch
from torch import nn

from gramjd import Engine


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
    engine = Engine(model, batch_dim=0)
    settings = [(8, 12), (8, 12), (8, 12), (8, 12), (6, 20), (6, 20), (12, 12)]
    print("| samples | tokens | the result rests on |\n|---|---|---|")
    for samples, tokens in settings:
        losses = model(torch.randint(0, 50, (samples, tokens))).square().mean((1, 2))
        print(f"| {samples} | {tokens} | {engine.explain(losses).proof} |")


if __name__ == "__main__":
    main()
