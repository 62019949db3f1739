"""Find the training sentences whose gradients resemble that of a new sentence most.

A transformer with 29,000 parameters learns to predict the next word of 48 short sentences on four subjects.
For four new sentences it looks up the training sentences whose gradients are most alike: by cosines of exact
gradients, of all parameters (position table, tied output layer, fused projection of attention), and by
sketches in a store. Prints the nearest, and how many are of the query's subject.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import gramjd

TEXT = {
    "weather": """
        the rain fell all night on the dry fields
        a cold wind came down from the north
        the snow on the roof began to melt
        dark clouds gathered before the storm
        the sun rose over the frozen lake
        fog covered the valley until noon
        the storm broke two trees in the night
        warm rain washed the snow from the fields
        the wind turned and the clouds went away
        it was the coldest winter in ten years
        lightning struck the old tree by the lake
        the first frost came early this autumn
        """,
    "kitchen": """
        she added salt and pepper to the soup
        the bread needs an hour in the oven
        cut the onions and fry them in butter
        he stirred the soup with a wooden spoon
        the cake was sweet and full of butter
        boil the potatoes with a little salt
        the cook tasted the sauce and added garlic
        bake the cake until the top is brown
        they ate fresh bread with cheese and olives
        pour the sauce over the hot potatoes
        a pinch of sugar makes the sauce milder
        the onions should be soft and brown
        """,
    "music": """
        the violin played the slow second theme
        she sang the song without a piano
        the drummer lost the beat in the last song
        a choir of forty voices sang the mass
        he tuned the guitar before the concert
        the piano answered the violin softly
        the orchestra played the symphony twice
        her voice filled the hall to the last row
        the trumpet came in one beat too early
        they recorded the song with two guitars
        the concert ended with a quiet theme
        the pupils practise scales on the piano
        """,
    "sailing": """
        the captain ordered the crew to hoist the sails
        a small boat left the harbour at dawn
        the ship ran aground near the harbour
        the crew dropped the anchor in the bay
        the captain marked the course on the chart
        waves broke over the deck of the ship
        the sailors mended the sails on deck
        two boats raced across the bay
        the anchor chain was thick with rust
        a ship without a rudder cannot hold its course
        the sailors slept below deck in turns
        the harbour lights guided the boat home
        """,
}
QUERIES = {
    "weather": "the storm came over the lake in the night",
    "kitchen": "fry the potatoes and onions in hot butter",
    "music": "she played the song on the piano",
    "sailing": "the crew of the ship mended the anchor chain",
}
PAD, END = 0, 1


class Vocabulary:
    """Words to numbers: padding, the end of a sentence, and the words of the text."""

    def __init__(self, sentences: list[str]) -> None:
        words = sorted({word for sentence in sentences for word in sentence.split()})
        self.numbers = {word: number for number, word in enumerate(words, 2)}
        self.size = len(words) + 2
        self.longest = max(len(sentence.split()) for sentence in sentences) + 2

    def encode(self, sentences: list[str]) -> Tensor:
        """``[sentences, longest]``; each begins and ends with ``END``."""
        rows = torch.full((len(sentences), self.longest), PAD)
        for row, sentence in zip(rows, sentences, strict=True):
            numbers = [END, *(self.numbers[word] for word in sentence.split()), END]
            row[: len(numbers)] = torch.tensor(numbers)
        return rows


class Model(nn.Module):
    """A causal transformer whose output layer shares its weight with the word table."""

    def __init__(self, words: int, positions: int, width: int = 48) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(positions, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(positions))
        nn.init.normal_(self.words.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next word at each position of ``tokens [batch, positions]``."""
        hidden = self.layers(self.words(tokens) + self.positions, self.mask)
        return hidden @ self.words.weight.T


def train(model: nn.Module, tokens: Tensor, epochs: int) -> float:
    """The last loss of an epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    total = torch.inf
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(tokens)).split(16):
            logits = model(tokens[batch, :-1])
            loss = cross_entropy(logits.flatten(0, 1), tokens[batch, 1:].flatten(), ignore_index=PAD)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch) / len(tokens)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--dim", type=int, default=1024, help="numbers that a sketch has")
    parser.add_argument("--topk", type=int, default=3)
    args = parser.parse_args()

    torch.manual_seed(0)
    labelled = [
        (line.strip(), subject) for subject, text in TEXT.items() for line in text.strip().splitlines()
    ]
    sentences, subjects = map(list, zip(*labelled, strict=True))
    vocabulary = Vocabulary([*sentences, *QUERIES.values()])
    tokens, queries = vocabulary.encode(sentences), vocabulary.encode(list(QUERIES.values()))
    model = Model(vocabulary.size, vocabulary.longest - 1)
    loss = train(model, tokens, args.epochs)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(sentences)} sentences, {vocabulary.size} words, {count:,} parameters, loss {loss:.2f}\n")

    def loss_of(params: dict[str, Tensor], sentence: Tensor) -> Tensor:
        """The mean loss of the words of one sentence."""
        logits = functional_call(model, params, (sentence[None, :-1],))[0]
        each = cross_entropy(logits, sentence[1:], reduction="none")
        known = sentence[1:] != PAD
        return (each * known).sum() / known.sum()

    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = gramjd.jacobian(loss_of)
    batches = list(tokens.split(16))

    def gradients(batch: Tensor) -> gramjd.Jacobian:
        return jacobian(params, batch)

    of_queries = gradients(queries)
    exact = gramjd.dataset_similarity(of_queries, gradients, batches, cosine=True, topk=args.topk)
    with tempfile.TemporaryDirectory() as folder:
        store = gramjd.gradients_dataset(gradients, batches, Path(folder) / "store", args.dim, progress=False)
        sketched = gramjd.similarity(of_queries.sketch(args.dim), store, cosine=True, topk=args.topk)

    for row, (subject, query) in enumerate(QUERIES.items()):
        print(f"{query}  ({subject})")
        for value, which in zip(exact.values[row].tolist(), exact.indices[row].tolist(), strict=True):
            print(f"    {value:.2f}  {sentences[which]}  ({subjects[which]})")
    for name, found in (("exact gradients", exact), (f"sketches of {args.dim} numbers", sketched)):
        hits = [
            subjects[which] == subject
            for subject, row in zip(QUERIES, found.indices.tolist(), strict=True)
            for which in row
        ]
        print(f"\nOf the query's subject, by {name}: {sum(hits)} of {len(hits)}", end="")
    print()


if __name__ == "__main__":
    main()
