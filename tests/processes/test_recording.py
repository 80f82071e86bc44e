"""What callbacks record is the same in all processes as in one; and the first process alone shows and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from processes.launching import Run, run

LEARNER = '''
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from fluxloop import (
    EMA, Accelerator, Callback, EpochEnd, Learner, Metric, Metrics, SmoothLoss, TensorBatches, TrainingPhase,
    ValidationPhase, accuracy, find_lr, on,
)
from fluxloop.callbacks import (
    Checkpointer, CSVLogger, EarlyStopping, FeatureStats, KeepBestModel, KNNProbe, LinearProbe, LogHistograms,
    LogMetrics, Profile, ProgressBar, SampleImages,
)
from fluxloop.logging import CSV
from processes.launching import report

folder, world = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
torch.manual_seed(0)
xs, ys = torch.randn(45, 6, dtype=torch.float64), torch.randint(3, (45,))
held_out = xs[:21], ys[:21]


class Rows:
    """Counts rows."""

    def __init__(self):
        self.rows = 0

    def update(self, preds, ys):
        self.rows += len(preds)

    def compute(self):
        return self.rows

    def reset(self):
        self.rows = 0


class Everywhere(Callback):
    draws = False

    @on(EpochEnd, TrainingPhase)
    def end(self, event, phase, learner):
        (folder / f"everywhere-{learner.accelerator.rank}").touch()


class Main(Callback):
    draws = False
    main_only = True

    def init(self, learner):
        (folder / f"init-{learner.accelerator.rank}").touch()

    @on(EpochEnd)
    def end(self, event, phase, learner):
        assert learner.accelerator.is_main
        (folder / f"main-{learner.accelerator.rank}").touch()


log = CSV(folder / "log.csv")
linear = LinearProbe("model", 3, queries=held_out, entries=("preds", "ys"))
callbacks = [
    Metrics(accuracy, Metric(MulticlassAccuracy(3), name="macro"), Metric(Rows(), name="rows"), SmoothLoss()),
    *(ProgressBar(enabled=True, interval=0), CSVLogger(folder / "table.csv"), LogMetrics(log)),
    LogHistograms(log, every=2),
    *(Everywhere(), Main(), Profile(trace=folder / "trace", steps=(1, 1)), Checkpointer(folder / "run")),
    *(KNNProbe("model", k=3, bank=(xs, ys), queries=held_out), linear, FeatureStats("preds", rows=16)),
    *(EarlyStopping(1, monitor="validation/knn_model", mode="max"), KeepBestModel(), EMA("model", 0.9)),
    SampleImages("model", folder=folder / "images", count=2, shape=(1, 1, 3)),
]


def make():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = (TensorBatches(xs, ys, batch_size=8 // world, shuffle=True), TensorBatches(*held_out, batch_size=8 // world))
    return Learner(
        model, data=data, loss_fn=nn.CrossEntropyLoss(), optimizer=lambda p: torch.optim.SGD(p, 0.1),
        callbacks=callbacks, seed=3, accelerator=Accelerator("cpu"),
    )


'''

RECORDED = """
learner = make()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    learner.fit(4, resume=folder / "run")
averaged = {f"ema.{name}": tensor for name, tensor in learner.weights["model@ema"].state_dict().items()}
report(
    rows={f"{row['phase']}/{row['metric']}/{row['epoch']}": row["value"] for row in learner.history.rows()},
    stopped=learner.history.stop_reason,
    weights={**learner.model.state_dict(), **averaged},
    probe=linear._probe.state_dict(),
    evaluated=learner.evaluate(),
    counts=repr(learner.history[TrainingPhase]),
    sweep=find_lr(make(), steps=12),
    warned=[str(each.message) for each in caught],
)
"""

RESUMED = """
def metrics():
    return Metrics(accuracy, Metric(MulticlassAccuracy(3), name="macro"))


def told(learner):
    weights = [tensor.clone() for tensor in learner.model.parameters()]
    return weights, [row["value"] for row in learner.history.rows()]


callbacks = [metrics(), Checkpointer(folder / "steps", unit="step", keep_last=100)]
whole = make()
whole.fit(2)
report(whole=told(whole))
for name in ("epoch-0000-step-00000004-phase-0.pt", "epoch-0001-step-00000013-phase-0.pt"):
    for given in sys.argv[2:]:
        callbacks = [metrics()]
        again = make()
        again.fit(2, resume=Path(given) / "steps" / name)
        report(**{f"{given}/{name}": told(again)})
callbacks = [metrics(), Checkpointer(folder / "resumed", every=0.001, unit="second")]
make().fit(1, resume=folder / "resumed")
again = make()
again.fit(2, resume=folder / "resumed")
report(resumed=told(again))
"""


HEAD = """
torch.manual_seed(os.getpid())  # as where nobody seeds
head = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
probe = LinearProbe("model", 3, head=head, queries=held_out, entries=("preds", "ys"))
callbacks = [Metrics(), probe]
make().fit(1)
report(head=probe.state_dict()["probe"])
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Run, Path]]:
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"of-{processes}")
        found[processes] = run(LEARNER + RECORDED, processes, arguments=[str(folder)], timeout=240), folder
    return found


@pytest.mark.slow
def test_every_epoch_value_is_that_of_one_process_on_the_joined_batches(ran: Any) -> None:
    (one,), both = ran[1][0].reports, ran[2][0].reports
    for report in both:
        assert report["rows"].keys() == one["rows"].keys()
        for name, value in one["rows"].items():
            if "/rows/" in name:  # whose class does not say how to join two
                assert report["rows"][name] in (23, 11)
            else:
                assert report["rows"][name] == pytest.approx(value, abs=1e-9), name
        assert report["counts"] == one["counts"]
        assert report["stopped"] == one["stopped"] is not None
    names = {name.split("/")[1] for name in one["rows"]}
    assert names >= {"loss", "accuracy", "macro", "knn_model", "linear_model", "preds_std", "preds_rank", "smoothloss"}


@pytest.mark.slow
def test_all_processes_have_the_same_numbers_and_weights_to_the_bit(ran: Any) -> None:
    first, second = ran[2][0].reports
    for what in ("rows", "evaluated", "stopped"):
        assert first[what] == second[what]
    for what in ("weights", "probe"):
        for name, tensor in first[what].items():
            assert torch.equal(tensor, second[what][name]), name
            torch.testing.assert_close(tensor, ran[1][0].reports[0][what][name], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_sweep_of_learning_rates_is_that_of_one_process(ran: Any) -> None:
    (one,), (first, second) = ran[1][0].reports, ran[2][0].reports
    assert first["sweep"] == second["sweep"]
    assert first["sweep"].losses == pytest.approx(one["sweep"].losses, abs=1e-6)
    assert first["sweep"].suggestion == one["sweep"].suggestion


@pytest.mark.slow
def test_the_first_process_alone_prints_shows_bars_and_warns(ran: Any) -> None:
    told, _ = ran[2]
    assert "ValidationPhase    epoch 1/4  loss" in told.outputs[0]
    assert "batch/s" in told.outputs[0]
    assert told.outputs[1] == ""
    first, second = told.reports
    assert second["warned"] == []
    (warned,) = [text for text in first["warned"] if not text.startswith("Warning: Profiler clears")]  # torch 2.10's
    assert "the metric 'rows' counts the rows of the first process alone" in warned


@pytest.mark.slow
def test_the_first_process_alone_writes_what_one_process_writes(ran: Any) -> None:
    (_, alone), (_, both) = ran[1], ran[2]

    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    written = files(alone)
    assert written >= {
        "log.csv",
        "table.csv",
        "trace/trace-step-2.json",
        "run/latest",
        "main-0",
        "images/model-0001.png",
    }
    assert files(both) == written | {"everywhere-1", "init-1"}
    for table in ("table.csv", "log.csv"):
        assert len((both / table).read_text().splitlines()) == len((alone / table).read_text().splitlines())


@pytest.mark.slow
def test_a_run_is_resumed_by_as_many_processes_to_the_bit_and_by_others_to_the_same_numbers(tmp_path: Path) -> None:
    for processes, own, given in (
        (1, "of one", ["of one"]),
        (2, "of two", ["of two", "of one"]),
        (1, "more", ["of two"]),
    ):
        told = run(
            LEARNER + RESUMED, processes, arguments=[str(tmp_path / each) for each in (own, *given)], timeout=240
        )
        for report in told.reports:
            weights, values = report["whole"]
            assert len(report) == 2 + 2 * len(given)
            for name, (found, numbers) in report.items():
                exact = name in ("whole", "resumed") or Path(name).parent.name == own
                assert len(numbers) == len(values) == 12
                assert numbers == (values if exact else pytest.approx(values, abs=1e-9)), name
                for a, b in zip(found, weights, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0 if exact else 1e-12)


@pytest.mark.slow
def test_a_head_that_each_process_made_by_itself_begins_with_the_weights_of_the_first(tmp_path: Path) -> None:
    first, second = run(LEARNER + HEAD, 2, arguments=[str(tmp_path)], timeout=240).reports
    assert all(torch.equal(value, second["head"][name]) for name, value in first["head"].items())
