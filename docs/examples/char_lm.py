"""Train a small transformer to write like Shakespeare's sonnets, one character after the other.

    python docs/examples/char_lm.py --epochs 8 --seed 0 --out runs/char_lm

Writes DIR/result.json (bits per character of held-out text, and what the model wrote while it
learned) and DIR/char_lm_history.png.
"""

import math
from functools import partial
from pathlib import Path

import torch
from attrs import define, field
from common import parse, write_result
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    GradientClip,
    Learner,
    LRScheduler,
    StepEnd,
    as_dataloader,
    on,
    watching,
)

TEXT = Path(__file__).parent / "text" / "sonnets.txt"
CONTEXT = 64
"""How many characters the model sees at most."""
HELD_OUT = 54 * CONTEXT + 1
"""Characters at the end of the text that it is measured on, about a tenth."""


class Windows(Dataset):
    """Pieces of a text as ``(xs, ys)``, each `stride` characters after the last; ys is one character ahead of xs."""

    def __init__(self, text: Tensor, stride: int) -> None:
        self.text, self.stride = text, stride

    def __len__(self) -> int:
        return (len(self.text) - CONTEXT - 1) // self.stride + 1

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        piece = self.text[row * self.stride :][: CONTEXT + 1]
        return piece[:-1], piece[1:]


class Block(nn.Module):
    """Attention to what came before, then a small network for each place."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, zs: Tensor) -> Tensor:
        """Mix places, then numbers, (N, T, width)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(zs)).chunk(3, -1)
        )
        zs = zs + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return zs + self.mlp(zs)


class CharTransformer(nn.Module):
    """Scores for each next character, (N, T, symbols), of whole numbers (N, T), T at most `CONTEXT`."""

    def __init__(self, symbols: int, width: int = 64, heads: int = 4, depth: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(CONTEXT, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, symbols))

    def forward(self, xs: Tensor) -> Tensor:
        """Score what comes next after each place."""
        return self.head(self.blocks(self.dropout(self.symbols(xs) + self.places.weight[: xs.shape[1]])))

    def write(self, xs: Tensor, length: int, temperature: float = 0.7) -> Tensor:
        """Go on with whole numbers (N, T): draw `length` characters, one after the other."""
        for _ in range(length):
            odds = (self(xs[:, -CONTEXT:])[:, -1] / temperature).softmax(-1)
            xs = torch.cat([xs, torch.multinomial(odds, 1)], dim=1)
        return xs


def bits(preds: Tensor, ys: Tensor) -> Tensor:
    """Cross entropy in bits per character."""
    return cross_entropy(preds.flatten(0, 1), ys.flatten()) / math.log(2)


@define
class WriteSamples(Callback):
    """Have the model write a little every so many steps, print it and keep it."""

    alphabet: str
    every: int = 300
    length: int = 200
    written: dict[int, str] = field(factory=dict, init=False)
    reads = ("model", "step.xs", "cbstate.history")
    draws = True

    @on(StepEnd, AbstractTrainingPhase)
    def sample(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Learner) -> None:
        """Write, beginning after a line's end (code 0), where it is time."""
        steps = learner.cbstate.history[phase].steps
        if steps % self.every == 0:
            with watching(learner.model):
                codes = learner.model.write(learner.step.xs.new_zeros(1, 1), self.length)
            self.written[steps] = "".join(self.alphabet[code] for code in codes[0, 1:])
            print(f"\nafter {steps} steps:\n{self.written[steps]}\n")


def baselines(train: Tensor, valid: Tensor, symbols: int) -> dict[str, float]:
    """Give the bits per character of guessing by how often a character, or a pair, occurs in the training text."""
    before, after = valid[:-1], valid[1:]
    singles = 0.1 + torch.bincount(train, minlength=symbols)
    pairs = 0.1 + torch.bincount(train[:-1] * symbols + train[1:], minlength=symbols**2).view(symbols, symbols)
    return {
        "unigram": -(singles / singles.sum())[after].log2().mean().item(),
        "bigram": -(pairs / pairs.sum(1, keepdim=True))[before, after].log2().mean().item(),
    }


def main() -> None:
    arguments = parse("char_lm", 8, __doc__.splitlines()[0])
    text = TEXT.read_text()
    alphabet = "".join(sorted(set(text)))
    codes = torch.tensor([alphabet.index(character) for character in text])
    train, valid = codes[:-HELD_OUT], codes[-HELD_OUT:]
    batches = as_dataloader(Windows(train, stride=10), batch_size=16, shuffle=True)

    model = CharTransformer(len(alphabet))
    steps = arguments.epochs * len(batches)
    schedule = partial(OneCycleLR, max_lr=1e-2, total_steps=steps + 1, pct_start=0.1)
    samples = WriteSamples(alphabet)
    learner = Learner(
        model,
        bits,
        data=(batches, Windows(valid, stride=CONTEXT)),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
        callbacks=[
            GradientClip(1.0),
            LRScheduler(schedule, unit="step"),
            samples,
        ],
        seed=arguments.seed,
    )
    history = learner.fit(arguments.epochs)

    guesses = baselines(train, valid, len(alphabet))
    write_result(arguments, bits=learner.evaluate()["loss"], **guesses, steps=steps, samples=samples.written)
    figure = history.plot()
    for (name, value), style in zip(guesses.items(), (":", "--"), strict=True):
        figure.axes[0].axhline(value, color="gray", linestyle=style, label=name)
    figure.axes[0].set(title="bits per character")
    figure.axes[0].legend()
    figure.savefig(arguments.out / "char_lm_history.png", dpi=100)


if __name__ == "__main__":
    main()
