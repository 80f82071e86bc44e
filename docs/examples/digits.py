"""Train a small convnet on the handwritten digits that ship with scikit-learn.

    python docs/examples/digits.py --epochs 15 --seed 0 --out runs/digits

Writes DIR/result.json (the final metrics) and DIR/history.png (loss and accuracy over epochs).
plain_digits.py is the same training in plain PyTorch. It runs in several processes, too, in bfloat16, with two batches
to an update; killed and started again with the same command, it goes on from the newest checkpoint:

    torchrun --nproc-per-node 2 docs/examples/digits.py --precision bf16 --accumulate 2 --resume
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from fluxloop import Accelerator, Checkpointer, Learner, Metrics, TensorBatches, accuracy, seed_everything, split


def load() -> tuple[torch.Tensor, torch.Tensor]:
    """Load the 1,797 images, scaled to [0, 1], of shape (1797, 1, 8, 8), and their classes."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(digits.target)


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(64 * 4 * 4, 10),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small convnet on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--accumulate", type=int, default=1, help="batches to an update")
    parser.add_argument("--resume", action="store_true", help="keep checkpoints, and go on from the newest one")
    arguments = parser.parse_args()

    seed_everything(arguments.seed)
    train, valid = split(load(), 0.2)
    checkpoints = arguments.out / "checkpoints" if arguments.resume else None
    learner = Learner(
        make_model(),
        nn.CrossEntropyLoss(),
        data=(TensorBatches(*train, batch_size=64, shuffle=True), TensorBatches(*valid, batch_size=256)),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        callbacks=[Metrics(accuracy), *([Checkpointer(checkpoints)] if checkpoints else [])],
        accelerator=Accelerator(precision=arguments.precision, accumulate=arguments.accumulate),
        seed=arguments.seed,
    )
    history = learner.fit(arguments.epochs, resume=checkpoints)

    result = {"seed": learner.seed, "epochs": arguments.epochs, **learner.evaluate()}
    if learner.accelerator.is_main:  # of several processes the first one writes
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        history.plot().savefig(arguments.out / "history.png", dpi=120)
        print(f"validation accuracy {result['accuracy']:.4f}; see {arguments.out}/result.json and history.png")


if __name__ == "__main__":
    main()
