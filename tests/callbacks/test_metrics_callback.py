from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss
from torchmetrics import MeanMetric

from fluxloop import (
    AbstractTrainingPhase,
    Accelerator,
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    Checkpointer,
    CSVLogger,
    CustomCallback,
    Learner,
    LogMetrics,
    Loss,
    Memory,
    Metric,
    MetricError,
    Metrics,
    MetricsPrinter,
    MissingEntryError,
    MissingProducerError,
    PerOptimizerPhase,
    PerOptimizerValidationPhase,
    Recorder,
    SmoothLoss,
    StateAccessError,
    StepBegin,
    StepEnd,
    TrainingPhase,
    ValidationPhase,
    mae,
    runstep,
    throttle,
)
from fluxloop.callbacks.metrics import PhaseMetrics
from fluxloop.testing import assert_observer, assert_order, toy_learner


def level(preds: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    return ys.mean()


def test_the_loss_comes_first_and_is_always_there() -> None:
    for metrics in (Metrics(), Metrics(mae), Metrics(mae, SmoothLoss())):
        learner = toy_learner(Recorder(), metrics)
        learner.fit(1)
        assert next(iter(learner.history.metrics[TrainingPhase])) == "loss"
        assert [metric.name for metric in metrics.metrics] == list(learner.history.metrics[TrainingPhase])
    given = Loss()
    assert Metrics(given).metrics == [given]


def test_values_are_published_by_phase_name_and_epoch() -> None:
    learner = toy_learner(Recorder(), Metrics(mae))
    learner.fit(3)
    published = learner.cbstate.metrics[ValidationPhase]
    assert [epoch for epoch, _ in published.epochs["mae"]] == [1, 2, 3]
    assert [value for _, value in published.epochs["mae"]] == learner.history["validation/mae"]
    assert published.last("mae") == published.epochs["mae"][-1]
    assert "mae: " in repr(published)


def test_the_numbers_of_an_epoch_are_those_of_its_newest_values() -> None:
    metrics = PhaseMetrics()
    metrics.record("loss", 1, torch.tensor(0.5), "Metrics")
    metrics.record("recall", 1, torch.tensor([0.25, 0.75]), "Metrics")
    metrics.record("confusion", 1, torch.eye(2), "Metrics")
    assert metrics.numbers_at(1) == {"loss": 0.5, "recall/0": 0.25, "recall/1": 0.75}
    metrics.record("loss", 2, 0.125, "Metrics")
    assert metrics.numbers_at(2) == {"loss": 0.125}
    assert metrics.numbers_at(3) == {}


def test_a_metric_without_a_value_says_which_there_are() -> None:
    learner = toy_learner(Recorder(), Metrics(mae))
    learner.fit(1)
    with pytest.raises(MetricError, match=r"no metric 'accuracy' was recorded; there are \['loss', 'mae'\]"):
        learner.cbstate.metrics[TrainingPhase].last("accuracy")


def test_other_callbacks_read_the_last_steps_values_and_the_average_so_far() -> None:
    seen: list[tuple[float, float]] = []

    def look(learner: Any) -> None:
        metrics = learner.cbstate.metrics[TrainingPhase]
        seen.append((metrics.latest()["level"].item(), metrics.running()["level"].item()))

    reader = CustomCallback(look, StepEnd, TrainingPhase, reads=("cbstate.metrics",), name="a reader")
    learner = toy_learner(reader, Metrics(level), Recorder(), num_batches=5)
    assert_order(learner, Recorder, Metrics, "a reader")
    learner.fit(1, phases=[TrainingPhase()])
    means = [batch[1].mean().item() for batch in learner.data.training]
    assert [latest for latest, _ in seen] == means
    assert [running for _, running in seen] == pytest.approx([sum(means[: n + 1]) / (n + 1) for n in range(5)])


def test_cancelled_steps_are_left_out() -> None:
    begun: list[int] = []

    def cancel_the_first(learner: Any) -> None:
        begun.append(1)
        if len(begun) == 1:
            raise CancelStepException

    learner = toy_learner(Recorder(), Metrics(level), CustomCallback(cancel_the_first, StepBegin), num_batches=3)
    learner.fit(1, phases=[TrainingPhase()])
    means = [batch[1].mean().item() for batch in learner.data.training][1:]
    assert learner.history["training/level"] == [pytest.approx(sum(means) / 2)]


@pytest.mark.parametrize(("signal", "values"), [(CancelEpochException, 1), (CancelFittingException, 0)])
def test_a_cancelled_epoch_publishes_what_it_saw_and_a_cancelled_fit_nothing(signal: Any, values: int) -> None:
    def cancel(learner: Any) -> None:
        if learner.cbstate.history[TrainingPhase].steps == 2:
            raise signal

    learner = toy_learner(Recorder(), Metrics(level), CustomCallback(cancel, StepBegin), num_batches=4)
    learner.fit(1, phases=[TrainingPhase()])
    means = [batch[1].mean().item() for batch in learner.data.training][:2]
    published = learner.history.metrics[TrainingPhase].get("level", [])
    assert published == [pytest.approx(sum(means) / 2)] * values


def test_a_value_that_is_no_scalar_is_kept_as_a_tensor() -> None:
    class Extremes:
        def reset(self) -> None:
            self.seen: list[torch.Tensor] = []

        def update(self, preds: torch.Tensor, ys: torch.Tensor) -> None:
            self.seen.append(ys)

        def compute(self) -> torch.Tensor:
            return torch.stack([torch.cat(self.seen).min(), torch.cat(self.seen).max()])

    learner = toy_learner(Recorder(), Metrics(Metric(Extremes(), name="extremes")))
    learner.fit(1)
    ys = torch.cat([batch[1] for batch in learner.data.training])
    assert torch.equal(learner.history["training/extremes"][0], torch.stack([ys.min(), ys.max()]))


def test_metrics_restricted_to_a_phase_are_not_called_in_another() -> None:
    calls: list[int] = []

    def spy(preds: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
        calls.append(len(preds))
        return preds.mean()

    learner = toy_learner(Recorder(), Metrics(Metric(spy, phase=ValidationPhase)), num_batches=3)
    learner.fit(1)
    assert calls == [8, 8, 8]


def test_without_a_recorder_the_error_says_what_to_add() -> None:
    with pytest.raises(MissingProducerError, match=r"Metrics reads 'cbstate\.history'.*add Recorder\(\)"):
        toy_learner(Metrics())


def test_what_metrics_publishes_can_only_be_read() -> None:
    def spoil(learner: Any) -> None:
        learner.cbstate.metrics[TrainingPhase].epochs["loss"] = []

    learner = toy_learner(Recorder(), Metrics(), CustomCallback(spoil, StepEnd))
    with pytest.raises(StateAccessError, match=r"CustomCallback tried to write 'cbstate\.metrics"):
        learner.fit(1)


def test_throttled_metrics_see_the_steps_that_pass() -> None:
    learner = toy_learner(Recorder(), throttle(Metrics(level), StepEnd, freq=4), num_batches=8)
    learner.fit(1, phases=[TrainingPhase()])
    means = [batch[1].mean().item() for batch in learner.data.training]
    assert learner.history["training/level"] == [pytest.approx((means[0] + means[4]) / 2)]


def test_evaluate_computes_the_learners_metrics_or_those_given() -> None:
    learner = toy_learner(Recorder(), Metrics(mae, SmoothLoss()))
    assert learner.evaluate().keys() == {"loss", "mae", "smoothloss"}
    assert learner.evaluate(metrics=[level]).keys() == {"loss", "level"}
    assert toy_learner().evaluate().keys() == {"loss"}


def test_measuring_changes_nothing() -> None:
    assert_observer(Metrics(mae, SmoothLoss(), level), lambda: toy_learner(Recorder()))


class Ragged(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([self.scale[0] * image.mean() for image in images])


class RaggedPhase(TrainingPhase):
    def entries(self, batch: Any) -> dict[str, Any]:
        return {"xs": batch[0], "ys": batch[1]}


def test_images_of_different_size_in_a_list_count_a_row_each() -> None:
    draw = torch.Generator().manual_seed(0)
    batches = [
        ([torch.randn(3, 8 + i, 9, generator=draw) for i in range(rows)], rows * torch.randn(rows, generator=draw))
        for rows in (8, 8, 1)
    ]
    still = partial(torch.optim.SGD, lr=0.0)
    learner = Learner(Ragged(), mse_loss, data={"training": batches}, optimizer=still, accelerator=Accelerator("cpu"))
    learner.fit(1, phases=[RaggedPhase()])
    per_row = torch.cat([(learner.model(images) - ys) ** 2 for images, ys in batches])
    assert learner.history["training/loss"] == [pytest.approx(per_row.mean().item())]


class TokenPhase(TrainingPhase):
    def weight(self, state: Any) -> torch.Tensor:
        return (state.ys != -100).sum()


def token_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    batches = []
    for real in (6, 1, 0, 4):  # in the third every token is padding: its loss is NaN
        ys = torch.randint(0, 5, (2, 3), generator=draw)
        ys.view(-1)[real:] = -100
        batches.append((torch.randn(2, 5, 3, generator=draw), ys))
    return batches


@pytest.mark.filterwarnings("ignore:.*__closure__.*cannot be saved")
@pytest.mark.parametrize("killed", [False, True])
def test_a_phase_says_what_a_step_weighs(killed: bool, tmp_path: Path) -> None:
    batches = token_batches()

    def make() -> Learner[torch.nn.Module]:
        still = partial(torch.optim.SGD, lr=0.0)
        scale = torch.nn.Conv1d(5, 5, 1, bias=False)
        torch.nn.init.dirac_(scale.weight)
        callbacks = [Recorder(), Metrics(), Checkpointer(tmp_path / "run", unit="step"), CustomCallback(end, StepBegin)]
        return Learner(
            scale,
            torch.nn.CrossEntropyLoss(),
            data=(batches,),
            optimizer=still,
            callbacks=callbacks,
            default_callbacks=False,
            accelerator=Accelerator("cpu"),
            seed=0,
        )

    steps = []

    def end(learner: Any) -> None:
        steps.append(1)
        if killed and len(steps) == 3:
            raise RuntimeError("killed")

    learner = make()
    if killed:
        with pytest.raises(RuntimeError, match="killed"):
            learner.fit(1, phases=[TokenPhase()])
        learner = make()
    learner.fit(1, phases=[TokenPhase()], resume=tmp_path / "run")
    together = torch.nn.functional.cross_entropy(
        torch.cat([xs for xs, _ in batches]), torch.cat([ys for _, ys in batches])
    )
    assert learner.history["training/loss"] == [pytest.approx(together.item(), rel=1e-6)]


def test_the_validation_twin_weighs_as_its_training_phase() -> None:
    class Weighed(PerOptimizerPhase):
        def loss(self, learner: Any, state: Any, name: str | None) -> torch.Tensor:
            return state.ys.mean() + 0 * state.preds.mean()

        def weight(self, state: Any) -> float:
            return float(state.ys[0])

    learner = toy_learner(Recorder(), Metrics(), num_batches=3)
    learner.fit(1, phases=[Weighed(), PerOptimizerValidationPhase(Weighed())])
    pairs = [(batch[1].mean().item(), batch[1][0].item()) for batch in learner.data.validation]
    expected = sum(mean * weight for mean, weight in pairs) / sum(weight for _, weight in pairs)
    assert learner.history["validation/loss"] == [pytest.approx(expected)]


@pytest.mark.parametrize("given", [-1, float("nan"), "8", None, torch.zeros(2), torch.tensor(-1.0)])
def test_a_weight_that_is_none_is_refused_with_the_phase(given: Any) -> None:
    class Wrong(TrainingPhase):
        def weight(self, state: Any) -> Any:
            return given

    learner = toy_learner(Recorder(), Metrics())
    with pytest.raises(MetricError, match=r"Wrong\.weight gave .*expected what the step weighs"):
        learner.fit(1, phases=[Wrong()])


class SometimesPhase(TrainingPhase):
    """Stores ``penalty`` in every third step."""

    number = 0

    def finish(self, learner: Any, state: Any) -> None:
        if self.number % 3 == 0:
            state.penalty = torch.tensor(float(self.number))
        self.number += 1


@pytest.mark.parametrize("stateful", [False, True])
def test_an_optional_metric_leaves_out_the_steps_without_its_inputs(stateful: bool) -> None:
    fn = MeanMetric() if stateful else lambda penalty: penalty
    metric = Metric(fn, name="penalty", inputs=("penalty",), optional=True)
    learner = toy_learner(Recorder(), Metrics(metric), num_batches=8)
    learner.fit(2, phases=[SometimesPhase(), ValidationPhase()])
    assert learner.history["training/penalty"] == [3, 12]  # of 0, 3, 6, and of 9, 12, 15
    assert "penalty" not in learner.history.metrics[ValidationPhase]


def test_without_optional_the_missing_entry_is_an_error_that_says_so() -> None:
    learner = toy_learner(Recorder(), Metrics(Metric(lambda penalty: penalty, name="penalty", inputs=("penalty",))))
    with pytest.raises(MissingEntryError) as caught:
        learner.fit(1)
    assert "optional=True" in "".join(caught.value.__notes__)


def test_an_optional_metric_whose_inputs_never_come_is_told_once() -> None:
    metric = Metric(lambda penalty: penalty, name="penalty", inputs=("penaltie",), optional=True)
    learner = toy_learner(Recorder(), Metrics(metric))
    with pytest.warns(UserWarning, match=r"no step had the inputs \['penaltie'\] of the optional metric 'penalty'"):
        learner.fit(1)
    learner.fit(1)


def test_blocks_record_their_losses_under_their_own_names() -> None:
    class Lazy(TrainingPhase):
        number = 0

        def step(self, learner: Any, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                with learner.optimizing() as block:
                    block.loss = learner.model(state.xs).mean() * 0 + self.number
                if self.number % 4 == 0:
                    with learner.optimizing(loss="R1") as block:
                        block.loss = learner.model(state.xs).mean() * 0 + 100
            self.number += 1

    learner = toy_learner(Recorder(), Metrics(SmoothLoss()), num_batches=8)
    learner.fit(1, phases=[Lazy()])
    assert learner.history["training/loss"] == [3.5]
    assert learner.history["training/r1"] == [100]
    assert set(learner.history.metrics[Lazy]) == {"loss", "r1", "smoothloss", "smoothloss_r1"}
    assert learner.history[Lazy].updates == {None: 10}


class Gives:
    """A metric object with a value of its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def update(self, preds: torch.Tensor, ys: torch.Tensor) -> None: ...

    def compute(self) -> Any:
        return self.value

    def reset(self) -> None: ...


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (torch.tensor(7), {"given": 7}),
        (12345, {"given": 12345}),
        (np.float32(0.5), {"given": 0.5}),
        (torch.tensor([0.25, 1.0]), {"given/0": 0.25, "given/1": 1.0}),
        (np.array([3, 4]), {"given/0": 3, "given/1": 4}),
        ([0.5, 0.75], {"given/0": 0.5, "given/1": 0.75}),
    ],
    ids=["whole", "large", "numpy", "vector", "array", "list"],
)
def test_whole_numbers_and_the_parts_of_vectors_are_shown_plotted_and_logged(
    value: Any, parts: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, memory = Metrics(Metric(Gives(value), name="given")), Memory()
    watchers = [MetricsPrinter(), CSVLogger(tmp_path / "log.csv"), LogMetrics(memory)]
    learner = toy_learner(Recorder(), metrics, *watchers, num_batches=2)
    learner.fit(1, phases=[TrainingPhase()])
    printed = capsys.readouterr().out
    with (tmp_path / "log.csv").open() as file:
        (row,) = csv.DictReader(file)
    for name, number in parts.items():
        text = str(number) if isinstance(number, int) else f"{number:.4g}"
        assert f"{name} {text}" in printed
        assert f"training/{name}: {text}" in repr(learner.history)
        assert float(row[name]) == number
        assert memory.series(f"epoch/training/{name}") == [(1, number)]
    panels = {axes.get_title(): axes.get_lines() for axes in learner.history.plot().axes}
    assert list(panels) == ["loss", "given"]  # the parts of a vector share a panel, with a line each
    assert [line.get_ydata().tolist() for line in panels["given"]] == [[number] for number in parts.values()]


@pytest.mark.parametrize("value", [torch.eye(3), torch.rand(1000), "text"], ids=["table", "long", "text"])
def test_values_that_nothing_shows_are_named_once(value: Any) -> None:
    metrics = Metrics(Metric(Gives(value), name="table"), Metric(Gives(value), name="other"))
    learner = toy_learner(Recorder(), metrics)
    with pytest.warns(
        UserWarning, match=r"the metrics 'table' \(.*\), 'other' .* are kept in the history, and"
    ) as told:
        learner.fit(1)
    assert len(told) == 1
    learner.fit(1)
    assert learner.history["training/table"][0] is not None
    assert learner.evaluate().keys() == {"loss", "table", "other"}


class FedLoss(AbstractTrainingPhase):
    """The loss of each step is the batch's number."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.loss = state.xs.mean()


def test_the_smooth_loss_of_a_step_is_the_smoothed_one_too() -> None:
    running: list[float] = []
    latest: list[float] = []

    def look(learner: Any) -> None:
        metrics = learner.cbstate.metrics[FedLoss]
        running.append(metrics.running()["smoothloss"].item())
        latest.append(metrics.latest()["smoothloss"].item())

    losses = [0.0, 1.0, 0.0, 1.0]
    watch = CustomCallback(look, StepEnd, FedLoss)
    data = [torch.full((4,), loss) for loss in losses]
    toy_learner(Recorder(), Metrics(SmoothLoss()), watch, data=(data,)).fit(1, phases=[FedLoss()])
    value = weight = 0.0
    for smooth, loss in zip(running, losses, strict=True):
        value, weight = 0.98 * value + 0.02 * loss, 0.98 * weight + 0.02
        assert smooth == pytest.approx(value / weight, abs=1e-6)
    assert latest == pytest.approx(running)
