"""The tables of docs/migrate.md: what they name is there, and what they write can be made."""

from __future__ import annotations

import ast
import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fluxloop
from fluxloop import Learner
from fluxloop.testing import toy_learner

PAGE = (Path(__file__).parents[1] / "docs" / "migrate.md").read_text()
SYSTEMS = re.findall(r"^## (.+)$", PAGE.split("## Where one name")[0], re.MULTILINE)
OUTSIDE = {
    "history": toy_learner().history,
    "partial": partial,
    "torch": torch,
    "xs": torch.zeros(3, 1),
    "print": print,
}

THEIRS = {
    "FluxTraining.jl": """Recorder Metrics ProgressPrinter MetricsPrinter StopOnNaNLoss ToDevice ToGPU EarlyStopping
        Checkpointer Scheduler SanityCheck Traces LogMetrics LogHyperParams LogTraces LogHistograms LogVisualization
        GarbageCollect CustomCallback throttle ConditionalCallback""",
    "luz": """progress metrics train_valid profile interrupt lr_scheduler csv_logger gradient_clip early_stopping
        model_checkpoint keep_best_model auto_resume resume_from_checkpoint mixup mixed_precision tfevents""",
    "mlr3torch": """history progress checkpoint early_stopping lr_step lr_lambda lr_multiplicative lr_cosine_annealing
        lr_one_cycle lr_reduce_on_plateau as_lr_scheduler tb unfreeze""",
    "fastai": """ActivationStats BnFreeze CSVLogger CollectDataCallback CutMix EarlyStoppingCallback FetchPredsCallback
        GradientAccumulation GradientClip MixUp MixedPrecision ModelResetter NonNativeMixedPrecision ParamScheduler
        ProgressCallback Recorder ReduceLROnPlateau RNNCallback RNNRegularizer SaveModelCallback ShortEpochCallback
        TensorBoardCallback TerminateOnNaNCallback TrackerCallback WandbCallback ChannelsLast MCDropoutCallback
        ShowGraphCallback GatherPredsCallback HookCallback SkipToEpoch TrainEvalCallback CometCallback NeptuneCallback
        AzureMLCallback DataqualityCallback TensorBoardProjectorCallback GANTrainer DistributedTrainer LRFinder""",
    "Lightning": """BackboneFinetuning BaseFinetuning BasePredictionWriter BatchSizeFinder Callback Checkpoint
        DeviceStatsMonitor EarlyStopping EmailCallback GradientAccumulationScheduler LambdaCallback LearningRateFinder
        LearningRateMonitor ModelCheckpoint ModelPruning ModelSummary OnExceptionCheckpoint ProgressBar RichModelSummary
        RichProgressBar StochasticWeightAveraging SpikeDetection ThroughputMonitor Timer TQDMProgressBar
        EMAWeightAveraging WeightAveraging""",
    "Ignite": """Checkpoint ModelCheckpoint EarlyStopping EMAHandler FastaiLRFinder TerminateOnNan TimeLimit Timer
        BasicTimeProfiler HandlersTimeProfiler EpochOutputStore ParamScheduler StateParamScheduler LRScheduler
        TensorboardLogger WandBLogger MLflowLogger""",
}
"""Every public callback of theirs."""


def section(system: str) -> str:
    return PAGE.split(f"\n## {system}\n")[1].split("\n## ")[0]


def rows(system: str) -> list[tuple[str, str]]:
    found = []
    for line in section(system).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 2 and not set(cells[0]) <= {"-", " "} and cells[1] != "here":
            found.append((cells[0], cells[1].replace("\\|", "|")))
    return found


SPANS = sorted({span for system in SYSTEMS for _, here in rows(system) for span in re.findall(r"`([^`]+)`", here)})


def test_there_is_a_table_for_each_system() -> None:
    assert list(THEIRS) == SYSTEMS


@pytest.mark.parametrize("system", THEIRS)
def test_every_callback_of_theirs_has_a_row(system: str) -> None:
    named = {name for theirs, _ in rows(system) for name in re.findall(r"`([\w.]+)`", theirs)}
    assert set(THEIRS[system].split()) - named == set()
    assert all(here for _, here in rows(system))


def paths_in(span: str) -> list[str]:
    """Give the dotted names in an expression, without those of its lambdas' arguments."""
    tree = ast.parse(span, mode="eval")
    bound = {argument.arg for node in ast.walk(tree) if isinstance(node, ast.Lambda) for argument in node.args.args}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name)) and id(node) not in inner]
    return [path for path in map(ast.unparse, nodes) if re.split(r"\W", path)[0] not in bound]


def look_up(path: str) -> Any:
    root, *rest = path.split(".")
    if root == "learner":
        found: Any = toy_learner(fluxloop.Recorder(), fluxloop.ActivationStats())
    else:
        found = OUTSIDE[root] if root in OUTSIDE else getattr(fluxloop, root)
    for name in rest:
        found = getattr(found, name)
    return found


KEYWORDS = {"monitor", "mode"}


@pytest.mark.slow(quick=74)
@pytest.mark.parametrize("span", SPANS)
def test_what_the_tables_name_is_there(span: str) -> None:
    for path in paths_in(span):
        if path not in KEYWORDS:
            look_up(re.split(r"[(\[]", path)[0])


@pytest.mark.slow(quick=30)
@pytest.mark.parametrize("span", [span for span in SPANS if set("([") & set(span)])
def test_what_the_tables_write_can_be_made(span: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call = ast.parse(span, mode="eval").body
    called = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
    if called.startswith(("learner.", "history.")):
        method = look_up(called)
        arguments = [None] * len(call.args)  # type: ignore[attr-defined]  # it is a call
        inspect.signature(method).bind(*arguments, **{word.arg: None for word in call.keywords})  # type: ignore[attr-defined]
    else:
        learner: Learner = toy_learner(num_batches=2)
        names = {name: getattr(fluxloop, name) for name in fluxloop.__all__}
        eval(compile(ast.Expression(call), span, "eval"), {**names, **OUTSIDE, "learner": learner})
