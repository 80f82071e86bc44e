"""fluxloop beside other libraries: each that is installed trains, and a table says what resumes exactly and compiles.

Each function returns a learner and its phases; docs/libraries.md shows them. ``python benchmarks/compare/libraries.py``
runs all, ``python benchmarks/compare/libraries.py peft optuna`` some.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from attrs import define
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Accelerator,
    Callback,
    Checkpointer,
    CompileError,
    CustomCallback,
    CycleEnd,
    EpochEnd,
    Learner,
    LRScheduler,
    Metrics,
    ModelLossPhase,
    ObjectivePhase,
    Phase,
    Recorder,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    on,
    seed_everything,
    watching,
)
from fluxloop.testing import assert_resumes_exactly


def transformers(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, use_cache=False))
    ids = torch.randint(2, 32, (64, 12))
    learner = Learner(model, data=({"input_ids": ids, "labels": ids},), **options)
    return learner, [ModelLossPhase()]


def generation(callbacks=(), **options):
    from transformers import GPT2Config, GPT2LMHeadModel

    @define
    class Write(Callback):
        """Print what the averaged weights write after each epoch."""

        prompt: torch.Tensor
        reads = ("model@ema",)
        draws = True  # random numbers of its own: the training does not notice

        @on(EpochEnd, AbstractTrainingPhase)
        def write(self, event, phase, learner):
            model = learner.weights["model@ema"]
            with watching(model):  # in eval mode without gradients, for this while
                tokens = model.generate(self.prompt.to(model.device), do_sample=True, max_new_tokens=8, use_cache=True)
            learner.accelerator.print(tokens.tolist())  # in the first process alone

    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    config.use_cache, config.pad_token_id = False, 1
    ids = torch.randint(2, 32, (64, 12))
    callbacks = [EMA("model", 0.99), Write(torch.zeros(1, 1, dtype=torch.long)), *callbacks]
    learner = Learner(
        GPT2LMHeadModel(config), data=({"input_ids": ids, "labels": ids},), callbacks=callbacks, **options
    )
    return learner, [ModelLossPhase()]


def datasets(**options):
    from datasets import Dataset

    rows = {"xs": torch.randn(64, 4).tolist(), "ys": [row % 2 for row in range(64)]}

    class Rows(TrainingPhase):
        def entries(self, batch):
            return batch

    learner = Learner(nn.Linear(4, 2), cross_entropy, data=(Dataset.from_dict(rows).with_format("torch"),), **options)
    return learner, [Rows()]


def peft(callbacks=(), **options):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = Path(tempfile.mkdtemp())

    def save_adapter(learner):
        if learner.accelerator.is_main:
            learner.model.save_pretrained(folder / "adapter")

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, use_cache=False))
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    ids = torch.randint(2, 32, (64, 12))
    callbacks = [CustomCallback(save_adapter, EpochEnd, AbstractTrainingPhase, reads=("model",)), *callbacks]
    data = ({"input_ids": ids, "labels": ids},)
    learner = Learner(get_peft_model(model, lora), data=data, callbacks=callbacks, **options)
    return learner, [ModelLossPhase()]


def timm(callbacks=(), **options):
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    adamw = partial(create_optimizer_v2, opt="adamw", lr=1e-2, weight_decay=0.05)  # no decay for biases and norms
    cosine = LRScheduler(partial(CosineLRScheduler, t_initial=4, warmup_t=1, warmup_lr_init=1e-3))
    data = ((torch.randn(64, 4), torch.arange(64) % 2),)
    learner = Learner(model, cross_entropy, data=data, optimizer=adamw, callbacks=[cosine, *callbacks], **options)
    return learner, [TrainingPhase()]


def schedulefree(**options):
    from schedulefree import AdamWScheduleFree

    xs = torch.randn(64, 4)
    data = ((xs, xs.sum(1, keepdim=True)), (xs, xs.sum(1, keepdim=True)))
    learner = Learner(nn.Linear(4, 1), mse_loss, data=data, optimizer=partial(AdamWScheduleFree, lr=0.05), **options)
    return learner, [TrainingPhase(), ValidationPhase()]


def pytorch_optimizer(**options):
    from pytorch_optimizer import SOAP

    xs = torch.randn(64, 4)
    data = ((xs, xs.sum(1, keepdim=True)),)
    learner = Learner(nn.Linear(4, 1), mse_loss, data=data, optimizer=partial(SOAP, lr=0.01), **options)
    return learner, [TrainingPhase()]


def torch_geometric(**options):
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GCNConv, global_mean_pool

    ring = torch.stack([torch.arange(6), torch.arange(1, 7) % 6])
    graphs = [Data(x=xs, edge_index=ring, y=xs.mean(0, keepdim=True)) for xs in torch.randn(40, 6, 3)]

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = GCNConv(3, 8), nn.Linear(8, 3)

        def forward(self, graphs):
            return self.head(global_mean_pool(self.first(graphs.x, graphs.edge_index).relu(), graphs.batch))

    class Graphs(ObjectivePhase):
        def entries(self, batch):
            return {"graphs": batch}

        def loss(self, learner, state):
            return mse_loss(learner.model(state.graphs), state.graphs.y)

    learner = Learner(Network(), data=(DataLoader(graphs, batch_size=8, shuffle=True),), **options)
    return learner, [Graphs()]


def tensordict(**options):
    from tensordict import TensorDict
    from torch.utils.data import DataLoader

    rows = TensorDict({"xs": torch.randn(64, 4), "ys": torch.arange(64) % 2}, batch_size=[64])

    class Rows(TrainingPhase):
        def entries(self, batch):
            return {"xs": batch["xs"], "ys": batch["ys"]}

    loader = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=lambda batch: batch)
    learner = Learner(nn.Linear(4, 2), cross_entropy, data=(loader,), **options)
    return learner, [Rows()]


def webdataset(**options):
    from webdataset import TarWriter, WebDataset

    path = Path(tempfile.mkdtemp()) / "rows.tar"
    with TarWriter(str(path)) as writer:
        for row in range(64):
            writer.write({"__key__": f"{row:04d}", "xs.pth": torch.randn(4), "ys.cls": row % 2})
    rows = WebDataset(str(path), shardshuffle=False).shuffle(32, seed=0).decode().to_tuple("xs.pth", "ys.cls")
    learner = Learner(nn.Linear(4, 2), cross_entropy, data=(rows.batched(16),), **options)
    return learner, [TrainingPhase()]


def hydra(callbacks=(), **options):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.create("""
        optimizer: {_target_: torch.optim.AdamW, _partial_: true, lr: 0.01}
        callbacks:
          - {_target_: fluxloop.GradientClip, max_norm: 1.0}
          - {_target_: fluxloop.EMA, model: model, decay: 0.99}
        phases:
          - {_target_: fluxloop.TrainingPhase}
    """)
    parts = instantiate(config)
    xs = torch.randn(64, 4)
    learner = Learner(
        nn.Linear(4, 1),
        mse_loss,
        data=((xs, xs.sum(1, keepdim=True)),),
        optimizer=parts.optimizer,
        callbacks=[*parts.callbacks, *callbacks],
        **options,
    )
    return learner, list(parts.phases)


def jsonargparse(callbacks=(), **options):
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(subclasses_enabled=[Callback])  # for attrs classes it wants to be told
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    parser.add_argument("--phases", type=list[Phase])
    given = {
        "callbacks": [{"class_path": "fluxloop.GradientClip", "init_args": {"max_norm": 1.0}}],
        "phases": [{"class_path": "fluxloop.TrainingPhase"}],
    }
    parts = parser.instantiate(parser.parse_object(given))
    xs = torch.randn(64, 4)
    data = ((xs, xs.sum(1, keepdim=True)),)
    learner = Learner(nn.Linear(4, 1), mse_loss, data=data, callbacks=[*parts.callbacks, *callbacks], **options)
    return learner, parts.phases


def optuna(callbacks=(), **options):
    import optuna

    xs = torch.randn(64, 4)
    data = ((xs, xs.sum(1, keepdim=True)), (xs, xs.sum(1, keepdim=True)))

    def make(rate, *callbacks):
        sgd = partial(torch.optim.SGD, lr=rate)
        callbacks = [Recorder(), Metrics(), *callbacks]
        return Learner(nn.Linear(4, 1), mse_loss, data=data, optimizer=sgd, callbacks=callbacks, **options)

    def objective(trial):
        def report(learner):
            trial.report(learner.history["validation/loss"][-1], len(learner.history["validation/loss"]))
            if trial.should_prune():
                raise optuna.TrialPruned

        pruning = CustomCallback(report, CycleEnd, reads=("history",))
        return make(trial.suggest_float("rate", 1e-4, 1.0, log=True), pruning).fit(3)["validation/loss"][-1]

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), pruner=optuna.pruners.MedianPruner(2))
    study.optimize(objective, n_trials=8)
    return make(study.best_params["rate"], *callbacks), [TrainingPhase(), ValidationPhase()]


def torchmetrics(callbacks=(), **options):
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

    scores = Metrics(MetricCollection([MulticlassAccuracy(2), MulticlassAUROC(2)]))
    data = ((torch.randn(64, 4), torch.arange(64) % 2),)
    learner = Learner(nn.Linear(4, 2), cross_entropy, data=data, callbacks=[Recorder(), scores, *callbacks], **options)
    return learner, [TrainingPhase()]


def torchdata(**options):
    from torch.utils.data import TensorDataset
    from torchdata.stateful_dataloader import StatefulDataLoader

    rows = TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    loader = StatefulDataLoader(rows, batch_size=16, shuffle=True)
    learner = Learner(nn.Linear(4, 2), cross_entropy, data=(loader,), **options)
    return learner, [TrainingPhase()]


def muon(**options):
    def muon_and_adamw(named):
        hidden = {name: each for name, each in named if each.ndim == 2 and not name.startswith("2.")}
        rest = [each for name, each in named if name not in hidden]
        return {"matrices": torch.optim.Muon(hidden.values(), lr=0.02), "rest": torch.optim.AdamW(rest, lr=1e-3)}

    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    data = TensorBatches(torch.randn(64, 4), torch.randn(64, 1), batch_size=16, shuffle=True)
    return Learner(model, mse_loss, data=(data,), optimizer=muon_and_adamw, **options), [TrainingPhase()]


DISTRIBUTIONS = {
    "hydra": "hydra-core",
    "torch_geometric": "torch-geometric",
    "muon": "torch",
    "generation": "transformers",
}
EACH = (
    *(
        transformers,
        generation,
        datasets,
        peft,
        timm,
        schedulefree,
        pytorch_optimizer,
        torch_geometric,
        tensordict,
        webdataset,
    ),
    *(hydra, jsonargparse, optuna, torchmetrics, torchdata, muon),
)


def quiet(accelerator="cpu", **options):
    """Return the options of a learner that prints nothing."""
    return {"accelerator": Accelerator(accelerator, **options), "default_callbacks": False, "seed": 1}


def made(library, **options):
    """Make a library's learner and phases from the same numbers each time."""
    seed_everything(0)
    return library(**(quiet() | options))


def resumes(library):
    """Return at which moments a killed run goes on to the bit: in the middle of an epoch, or at the ends of epochs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of data that cannot be resumed in the middle: the answer says so
        try:
            assert_resumes_exactly(lambda: made(library)[0], epochs=2, phases=lambda: made(library)[1])
        except AssertionError as error:
            return f"no: {error}"
        return "yes" if can_be_kept_in_the_middle(library) else "at the ends of epochs"


def can_be_kept_in_the_middle(library):
    """Return whether a checkpoint is written in the middle of an epoch of a library's data."""
    learner, phases = made(library)
    folder = tempfile.mkdtemp()
    learner.add_callback(Checkpointer(folder, every=1, unit="step", keep_last=100))
    learner.fit(1, phases=phases)
    return any("epoch-0000-step-00000001" in path.name for path in Path(folder).iterdir())


def compiles(library):
    """Return whether a library's step is one graph."""
    try:
        learner, phases = made(library, **quiet(compile="step"))
        learner.fit(1, phases=phases)
    except CompileError:
        return "no"
    return "yes"


def main(names):
    """Run libraries and print the table of docs/libraries.md."""
    print("| library | version | exact under resume | compiles |\n| --- | --- | --- | --- |")
    for library in EACH:
        name = library.__name__
        if names and name not in names:
            continue
        try:
            number = version(DISTRIBUTIONS.get(name, name))
            made(library)
        except (PackageNotFoundError, ImportError) as error:
            print(f"| {name} | not here: {error} | | |")
            continue
        with contextlib.redirect_stdout(sys.stderr):  # what the examples print is no part of the table
            learner, phases = made(library)
            learner.fit(2, phases=phases)
            answers = resumes(library), compiles(library)
        print(f"| {name} | {number.partition('+')[0]} | {' | '.join(answers)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
