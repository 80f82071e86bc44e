"""The same work in other frameworks, each set up as its own users would for speed.

    python benchmarks/peers.py            # the table; benchmarks/README.md says how to install the others
    python benchmarks/peers.py --quick    # the smaller one alone, fewer rounds

All train the same multilayer perceptrons from the same weights on the same batches, which lie in
memory, with AdamW. "bare" is without logger, checkpoints, validation, progress bar and metrics;
"tracked" has the loss, the accuracy on what is trained on, and a progress bar, as each framework
offers them. Per round each side runs a fit of its own, in alternating order; the clock runs from the
moment at which a batch in its middle is asked for to the last, so setting up is not counted. The
ratio is the median of the rounds' ratios to the hand-written loop. One thread.

Before anything is timed each side makes one fit: it has to make as many updates as the hand-written
loop and to come to the same loss, else it is left out; "trained" says how its weights agree then: to
the bit, or how far they lay apart as a share of the way that training moved them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from typing import Any, TextIO

import torch
from timing import Lap, Stopwatch, Table, arguments, interleave, skip
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from workloads import (
    ADAMW,
    ADAMW_PLAIN,
    CLOSE_LOSS,
    SMALL,
    TINY,
    Batches,
    DifferentTrainingError,
    Side,
    Workload,
    distance,
    loss_of,
    make_learner,
    plain_epoch,
    tracking_epoch,
    updates_of,
)

from fluxloop import TrainingPhase

WARM_UP = 20
"""Steps of a fit before the clock runs."""

RATE = 1e-4
"""The optimizer's learning rate."""


class Loader:
    """Batches that lie in memory; the clock runs from the one after the warm-up to the last.

    Args:
        batches: All of them; the last only shows that the one before is done.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.watch = Stopwatch()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in enumerate(self.batches):
            if index == WARM_UP:
                self.watch.start()
            elif index == len(self.batches) - 1:
                self.watch.stop()
            yield batch


@dataclass
class Job:
    """What a framework is to do: train `model` on all of `loader` per call of what it gives."""

    model: nn.Module
    loader: Loader
    tracked: bool


Fit = Callable[[], object]
Framework = Callable[[Job], tuple[Fit, Any]]
"""Gives what runs a fit, and the optimizer, whose updates are counted."""


def by_hand(job: Job) -> tuple[Fit, Any]:
    optimizer = ADAMW(job.model.parameters())
    epoch: Callable[..., None] = tracking_epoch if job.tracked else plain_epoch
    return lambda: epoch(job.model, optimizer, job.loader), optimizer


def fluxloop(job: Job, optimizer: Any = ADAMW) -> tuple[Fit, Any]:
    learner = make_learner(job.model, job.loader, optimizer, job.tracked)
    return lambda: learner.fit(1, phases=[TrainingPhase()]), learner.optimizer


def lightning(job: Job) -> tuple[Fit, Any]:
    import lightning.pytorch as pl

    optimizer = ADAMW(job.model.parameters())

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: Any, index: int) -> Tensor:
            xs, ys = batch
            preds = self.model(xs)
            loss = cross_entropy(preds, ys)
            if job.tracked:
                hits = (preds.argmax(1) == ys).float().mean()
                self.log_dict({"loss": loss, "accuracy": hits}, on_step=False, on_epoch=True, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    module = Module()
    bare: dict[str, Any] = {"barebones": True}
    tracked = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}

    def fit() -> None:
        options = tracked if job.tracked else bare
        pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, **options).fit(module, job.loader)

    return fit, optimizer


def ignite(job: Job) -> tuple[Fit, Any]:
    from ignite.engine import Engine
    from ignite.handlers import ProgressBar
    from ignite.metrics import Accuracy, Average

    optimizer = ADAMW(job.model.parameters())

    def step(engine: Engine, batch: Any) -> Any:
        xs, ys = batch
        job.model.train()
        optimizer.zero_grad()
        preds = job.model(xs)
        loss = cross_entropy(preds, ys)
        loss.backward()
        optimizer.step()
        return (preds.detach(), ys, loss.detach()) if job.tracked else None

    engine = Engine(step)
    if job.tracked:
        Accuracy(output_transform=lambda output: output[:2]).attach(engine, "accuracy")
        Average(output_transform=lambda output: output[2]).attach(engine, "loss")
        ProgressBar().attach(engine)
    return lambda: engine.run(job.loader, max_epochs=1), optimizer


def skorch(job: Job) -> tuple[Fit, Any]:
    from skorch import NeuralNetClassifier
    from skorch.callbacks import EpochScoring, ProgressBar

    callbacks: Any = "disable"
    if job.tracked:
        callbacks = [EpochScoring("accuracy", on_train=True, name="accuracy"), ProgressBar()]
    rows = torch.utils.data.TensorDataset(*job.loader.batches[0])
    net = NeuralNetClassifier(
        job.model,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=RATE,
        train_split=None,
        iterator_train=lambda dataset, **options: job.loader,
        callbacks=callbacks,
        verbose=int(job.tracked),
    ).initialize()
    targets = torch.cat([ys for _, ys in job.loader.batches]).numpy() if job.tracked else None
    return lambda: net.partial_fit(rows, targets, epochs=1), net.optimizer_


def accelerate(job: Job) -> tuple[Fit, Any]:
    from accelerate import Accelerator
    from workloads import tracking

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(job.model, ADAMW(job.model.parameters()))

    def fit() -> None:
        model.train()
        with tracking(len(job.loader)) if job.tracked else contextlib.nullcontext() as track:
            for xs, ys in job.loader:
                optimizer.zero_grad()
                preds = model(xs)
                loss = cross_entropy(preds, ys)
                accelerator.backward(loss)
                optimizer.step()
                if track is not None:
                    track(preds, ys, loss)

    return fit, optimizer


def fastai(job: Job) -> tuple[Fit, Any]:
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner, Recorder
    from fastai.metrics import accuracy
    from fastai.optimizer import OptimWrapper

    learner = Learner(
        DataLoaders(job.loader, []),
        job.model,
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
        lr=RATE,
        metrics=[accuracy] if job.tracked else [],
    )
    learner.create_opt()
    if job.tracked:
        learner.recorder.train_metrics = True
    else:
        learner.remove_cbs([Recorder, ProgressCallback])

    return lambda: learner.fit(1), learner.opt.opt


def poutyne(job: Job) -> tuple[Fit, Any]:
    from poutyne import Model

    optimizer = ADAMW(job.model.parameters())
    metrics = ["accuracy"] if job.tracked else None
    model = Model(job.model, optimizer, nn.CrossEntropyLoss(), batch_metrics=metrics, device="cpu")
    return lambda: model.fit_generator(job.loader, epochs=1, verbose=job.tracked), optimizer


def keras(job: Job) -> tuple[Fit, Any]:
    import keras as k

    linear = [layer for layer in job.model if isinstance(layer, nn.Linear)]
    dense = [k.layers.Dense(layer.out_features, "relu" if layer is not linear[-1] else None) for layer in linear]
    model = k.Sequential([k.Input((linear[0].in_features,)), *dense])
    for ours, theirs in zip(linear, dense, strict=True):
        theirs.set_weights([ours.weight.detach().numpy().T, ours.bias.detach().numpy()])
    model.compile(
        optimizer=k.optimizers.AdamW(RATE, weight_decay=0.01, epsilon=1e-8),
        loss=k.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"] if job.tracked else [],
    )

    def fit() -> None:
        model.fit(iter(job.loader), epochs=1, steps_per_epoch=len(job.loader), verbose=int(job.tracked))
        with torch.no_grad():
            for ours, theirs in zip(linear, dense, strict=True):
                ours.weight.copy_(theirs.kernel.value.T)
                ours.bias.copy_(theirs.bias.value)

    return fit, model.optimizer


def composer(job: Job) -> tuple[Fit, Any]:
    import composer
    from composer.models import ComposerModel
    from torchmetrics.classification import MulticlassAccuracy

    optimizer = ADAMW(job.model.parameters())
    classes = [layer for layer in job.model if isinstance(layer, nn.Linear)][-1].out_features

    class Module(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model
            self.accuracy = MulticlassAccuracy(classes, average="micro")

        def forward(self, batch: Any) -> Tensor:
            return self.model(batch[0])

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return cross_entropy(outputs, batch[1])

        def get_metrics(self, is_train: bool = False) -> dict[str, Any]:
            return {"accuracy": self.accuracy} if job.tracked else {}

        def update_metric(self, batch: Any, outputs: Tensor, metric: Any) -> None:
            metric.update(outputs, batch[1])

    trainer = composer.Trainer(
        model=Module(),
        train_dataloader=job.loader,
        max_duration="1ep",
        optimizers=optimizer,
        device_train_microbatch_size=len(job.loader.batches[0][0]),
        progress_bar=job.tracked,
        device="cpu",
    )
    done = []

    def fit() -> None:
        trainer.fit(duration="1ep" if done else None)
        done.append(True)

    return fit, optimizer


@dataclass(frozen=True)
class Peer:
    """A side of the comparison: what is imported, the distribution that it comes with, and how it trains."""

    module: str
    distribution: str
    train: Framework


PEERS = {
    "Ignite": Peer("ignite", "pytorch-ignite", ignite),
    "Accelerate": Peer("accelerate", "accelerate", accelerate),
    "Poutyne": Peer("poutyne", "poutyne", poutyne),
    "skorch": Peer("skorch", "skorch", skorch),
    "Lightning": Peer("lightning", "lightning", lightning),
    "fastai": Peer("fastai", "fastai", fastai),
    "Composer": Peer("composer", "mosaicml", composer),
    "Keras (torch)": Peer("keras", "keras", keras),
}
OURS: dict[str, Framework] = {
    "fluxloop": fluxloop,
    "fluxloop, fused=False": partial(fluxloop, optimizer=ADAMW_PLAIN),
}


def installed() -> dict[str, Framework]:
    """Give the other frameworks that are installed; name the rest."""
    found: dict[str, Framework] = {}
    for name, peer in PEERS.items():
        if importlib.util.find_spec(peer.module) is None:
            print(f"{name} is not installed.\n")
        else:
            found[f"{name} {version(peer.distribution)}"] = peer.train
    return found


@cache
def nowhere() -> TextIO:
    """Open what swallows all: a file, as some ask for its number, and open to the end, as some keep it."""
    return open(os.devnull, "w")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep frameworks from printing, warning and logging."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(nowhere()))
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        yield


@dataclass
class Contender:
    """A framework at work: calling it runs a fit, and gives the lap of its steps."""

    loader: Loader
    side: Side

    def __call__(self) -> Lap:
        self.loader.watch.lap = None
        with silence():
            self.side()
        if self.loader.watch.lap is None:
            raise DifferentTrainingError("the last batch was not asked for")
        return self.loader.watch.lap

    @property
    def updates(self) -> int:
        """How many updates were made."""
        optimizer: Any = self.side.optimizer
        if hasattr(optimizer, "iterations"):  # Keras
            return int(optimizer.iterations)
        return updates_of(optimizer) or 0


def enter(framework: Framework, model: nn.Module, batches: Batches, tracked: bool) -> Contender:
    """Set a framework up to train a copy of a model."""
    loader, copied = Loader(batches), copy.deepcopy(model)
    with silence():
        fit, optimizer = framework(Job(copied, loader, tracked))
    return Contender(loader, Side(copied, fit, optimizer))


def compared(contender: Contender, base: Contender, batches: Batches) -> str:
    """Let a framework train once, and tell how that agrees with the hand-written loop.

    Raises:
        DifferentTrainingError: It made another number of updates, or its loss is another.
    """
    contender()
    if contender.updates != len(batches):
        raise DifferentTrainingError(f"it made {contender.updates} updates on {len(batches)} batches")
    losses = [loss_of(each.side.model, batches[:10]) for each in (contender, base)]
    if abs(losses[0] - losses[1]) > CLOSE_LOSS * losses[1]:
        raise DifferentTrainingError(f"its loss is {losses[0]}, by hand it is {losses[1]}")
    apart = distance(contender.side, base.side)
    return "same bits" if apart == 0 else f"{apart:.0e}"


def measure(
    table: Table, frameworks: dict[str, Framework], work: Workload, tracked: bool, rounds: int
) -> dict[str, str]:
    """Print the rows of one workload; give why a framework is not among them."""
    batches = work.batches(WARM_UP + work.steps + 1)
    torch.manual_seed(0)
    model = work.model()
    contenders: dict[str, Contender] = {}
    trained: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, framework in frameworks.items():
        try:
            contender = enter(framework, model, batches, tracked)
            trained[name] = compared(contender, contenders.get("by hand", contender), batches)
            contenders[name] = contender
        except (Exception, DifferentTrainingError) as error:  # a release that does not run must not end the comparison
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0]
    got = interleave(lambda: contenders, units=work.steps, rounds=rounds, warm_up=1)
    for name in contenders:
        ratios = got.ratio(name, "by hand"), got.cpu_ratio(name, "by hand")
        table.row(work.name, "tracked" if tracked else "bare", name, got.micro(name), *ratios, trained[name])
    return failed


COLUMNS = {
    "workload": "<35",
    "work": "<7",
    "framework": "<21",
    "µs": ">8.1f",
    "ratio": ">6.3f",
    "CPU ratio": ">9.3f",
    "trained": "<9",
}


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    os.environ["KERAS_BACKEND"] = "torch"  # read when keras is imported
    torch.set_num_threads(1)
    if not any(importlib.util.find_spec(peer.module) for peer in PEERS.values()):
        skip("no other framework is installed")
        return
    frameworks: dict[str, Framework] = {"by hand": by_hand, **OURS, **installed()}
    with contextlib.ExitStack() as around:
        folder = around.enter_context(tempfile.TemporaryDirectory())  # some write files
        around.callback(os.chdir, os.getcwd())  # Python 3.10 has no contextlib.chdir
        os.chdir(folder)
        table, failed = Table(COLUMNS), dict[str, str]()
        for work in (TINY,) if quick else (TINY, SMALL):
            for tracked in (False, True):
                failed |= measure(table, frameworks, work, tracked, 2 if quick else 20)
    for name, why in failed.items():
        print(f"\n{name} is left out: {why}")


if __name__ == "__main__":
    main()
