from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import (
    Callback,
    Check,
    DataError,
    FitBegin,
    Learner,
    Recorder,
    SanityCheck,
    SanityCheckError,
    StepBegin,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    on,
    runstep,
)
from fluxloop.testing import Coefficient, EventRecorder, assert_observer, assert_same_bits, toy_learner

pytestmark = pytest.mark.filterwarnings("ignore:weights are not finite before the first step")

XS = torch.rand(32, 4, generator=torch.Generator().manual_seed(0))
YS = torch.rand(32, 1, generator=torch.Generator().manual_seed(1))
DEFAULTS = ["training data", "validation data", "parameters are finite", "model and loss on one batch"]


def fail(learner: Any) -> None:
    raise ValueError("odd")


def failed(learner: Learner, **options: Any) -> str:
    with pytest.raises(SanityCheckError) as caught:
        learner.fit(1, **options)
    return str(caught.value)


def ready(*callbacks: Any, **options: Any) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    loader = DataLoader(TensorDataset(XS, YS), batch_size=8, shuffle=True)
    return Learner(
        model,
        nn.functional.mse_loss,
        **{"data": (loader, TensorBatches(XS, YS, batch_size=8)), "seed": 0, "default_callbacks": False, **options},
        callbacks=callbacks,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )


# What it finds


def test_a_learner_that_is_well_passes() -> None:
    for learner in (toy_learner(SanityCheck(), Recorder()), ready(SanityCheck(), Recorder())):
        learner.fit(2)
        assert learner.history[TrainingPhase].epochs == 2


def test_missing_validation_data_is_a_warning() -> None:
    learner = toy_learner(SanityCheck(), Recorder(), data=([(torch.ones(2, 1), torch.ones(2, 1))],))
    with pytest.warns(UserWarning, match=r"(?s)sanity check.*warning: validation data: the learner has no validation"):
        learner.fit(1)
    assert learner.history[TrainingPhase].epochs == 1


def test_parameters_that_are_not_finite_are_found_by_name() -> None:
    learner = ready(SanityCheck())
    with torch.no_grad():
        learner.model[0].weight[2, 1] = float("nan")
    assert "error: parameters are finite: Sequential.0.weight holds NaN or infinite values" in failed(learner)
    learner = ready(SanityCheck())
    with torch.no_grad():
        learner.model[3].bias[0] = float("inf")
    assert "Sequential.3.bias" in failed(learner)


def test_parameters_of_named_models_are_looked_at() -> None:
    class Nothing(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch):
                pass

    models = {"G": Coefficient(), "D": Coefficient(float("nan"))}
    learner = Learner(models, data=([XS], [XS]), callbacks=[SanityCheck()], default_callbacks=False)
    assert "Coefficient.value holds NaN" in failed(learner, phases=[Nothing()])


class Says(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, xs: Tensor) -> str:
        return "text"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"data": ([XS], [XS])},
            "model and loss on one batch: a batch is a Tensor of shape (32, 4), not a pair (xs, ys)",
        ),
        ({"data": ([(XS,)], [(XS, YS)])}, "a batch is a tuple of length 1, not a pair (xs, ys)"),
        ({"data": ([{"xs": XS, "ys": YS}], [(XS, YS)])}, "a batch is a dict of length 2, not a pair (xs, ys)"),
        ({"loss_fn": lambda preds: preds.mean()}, "model and loss on one batch: "),
        ({"loss_fn": lambda preds, ys: (preds - ys).abs()}, "not a scalar tensor"),
        ({"loss_fn": lambda preds, ys: 1.0}, "the loss of one batch is a float, not a scalar tensor"),
        ({"model": Says()}, "model and loss on one batch: "),
        ({"model": nn.Linear(3, 1)}, "mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_data_model_and_loss_that_do_not_fit_are_found_before_the_first_step(
    options: dict[str, Any], words: str
) -> None:
    recorder = EventRecorder()
    learner = Learner(
        options.get("model", nn.Linear(4, 1)),
        options.get("loss_fn", nn.functional.mse_loss),
        data=options.get("data", ([(XS, YS)], [(XS, YS)])),
        callbacks=[SanityCheck(), recorder],
        default_callbacks=False,
    )
    text = failed(learner)
    assert text.startswith("sanity check before the first step:\n")
    assert words in text
    assert "The built-in phases take batches (xs, ys)." in text
    assert "StepBegin" not in recorder.events


def test_all_failures_are_reported_together() -> None:
    learner = ready(SanityCheck(), data={"training": [XS]})
    with torch.no_grad():
        learner.model[0].bias[0] = float("nan")
    lines = failed(learner).splitlines()
    assert [line.strip().split(":")[:2] for line in lines[1:]] == [
        ["warning", " validation data"],
        ["error", " parameters are finite"],
        ["error", " model and loss on one batch"],
    ]


def test_data_given_to_fit_is_what_is_looked_at() -> None:
    batches = [(XS, YS)]
    ready(SanityCheck(), data=()).fit(1, data=(batches, batches))
    assert "not a pair" in failed(ready(SanityCheck()), data=([XS], batches))


def test_data_given_to_an_epoch_is_what_is_looked_at() -> None:
    learner = ready(SanityCheck(), Recorder(), data={"validation": [(XS, YS)]})
    learner.epoch(TrainingPhase(), [(XS, YS)])
    assert learner.history[TrainingPhase].epochs == 1


# Checks of one's own


def test_the_default_checks_stay_when_others_are_added() -> None:
    mine = Check("mine", lambda learner: None)
    assert [check.name for check in SanityCheck().checks] == DEFAULTS
    assert [check.name for check in SanityCheck(mine).checks] == [*DEFAULTS, "mine"]
    assert [check.name for check in SanityCheck(mine, defaults=False).checks] == ["mine"]
    assert repr(SanityCheck(mine, defaults=False)) == "SanityCheck(mine)"


def test_a_check_of_ones_own_fails_with_its_hint() -> None:
    text = failed(toy_learner(SanityCheck(Check("mine", fail, "Turn it off and on."))))
    assert "  error: mine: odd. Turn it off and on." in text


def test_a_check_of_ones_own_may_only_warn() -> None:
    learner = toy_learner(SanityCheck(Check("mine", fail, severity="warning")), Recorder())
    with pytest.warns(UserWarning, match=r"(?s)sanity check.*warning: mine: odd\."):
        learner.fit(1)
    assert learner.history[TrainingPhase].epochs == 1


def test_a_check_reads_data_model_and_loss_and_writes_nothing() -> None:
    seen: list[Any] = []

    def look(learner: Any) -> None:
        seen.extend([learner.model, learner.loss_fn, learner.data.training])

    def touch(learner: Any) -> None:
        learner.loss_fn = None

    learner = toy_learner(SanityCheck(Check("look", look)))
    learner.fit(1)
    assert seen == [learner.model, learner.loss_fn, learner.data.training]
    assert "SanityCheck tried to write 'loss_fn'" in failed(toy_learner(SanityCheck(Check("touch", touch))))


@pytest.mark.parametrize("severity", ["fatal", "", None])
def test_an_unknown_severity_is_refused(severity: Any) -> None:
    with pytest.raises(ValueError, match=r"severity=.* was given; expected 'error' or 'warning'"):
        Check("mine", fail, severity=severity)


def test_checks_run_once_at_the_first_training_epoch() -> None:
    runs: list[int] = []
    recorder = EventRecorder()

    def count(learner: Any) -> None:
        runs.append(len(recorder.trace))

    learner = toy_learner(SanityCheck(Check("count", count), defaults=False), recorder)
    learner.evaluate()
    assert runs == []
    learner.fit(2)
    learner.fit(1)
    assert len(runs) == 1
    assert recorder.trace[: runs[0]][0] == (FitBegin.__name__, "FittingPhase")


# What it leaves as it was


def test_weights_statistics_modes_data_order_and_random_numbers_stay_to_the_bit() -> None:
    plain, checked = ready(), ready(SanityCheck())
    checked.model[1].eval()
    plain.model[1].eval()
    plain.fit(2)
    checked.fit(2)
    assert_same_bits(plain, checked)
    assert [m.training for m in checked.model.modules()] == [m.training for m in plain.model.modules()]
    assert checked.model[1].training is False


def test_checks_that_draw_numbers_change_nothing() -> None:
    draws = Check("draws", lambda learner: torch.rand(3))
    assert_observer(SanityCheck(draws), ready)


def own_generator() -> Any:
    return DataLoader(TensorDataset(XS, YS), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))


def seeded_batches() -> Any:
    return TensorBatches(XS, YS, batch_size=8, shuffle=True, seed=4)


@pytest.mark.parametrize("make", [own_generator, seeded_batches])
def test_the_order_of_data_with_a_generator_of_its_own_stays(make: Callable[[], Any]) -> None:
    plain, checked = (ready(*callbacks, data=(make(), make())) for callbacks in ((), (SanityCheck(),)))
    plain.fit(2)
    checked.fit(2)
    assert_same_bits(plain, checked)


def test_one_shot_data_is_not_looked_into() -> None:
    batches = list(zip(XS.split(8), YS.split(8), strict=True))
    learner = ready(SanityCheck(), Recorder(), data=(iter(batches), iter(batches)))
    learner.fit(1)
    assert learner.history[TrainingPhase].steps == 4


def test_no_warning_is_given_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(SanityCheck()).fit(1)


class Broken(ValidationPhase):
    def finish(self, learner: Learner, state: Any) -> None:
        raise KeyError("labels")


def test_a_broken_validation_phase_is_found_before_the_first_training_step() -> None:
    recorder = EventRecorder()
    learner = ready(SanityCheck(), recorder)
    text = failed(learner, phases=[TrainingPhase(), Broken()])
    assert "error: Broken(): KeyError: 'labels' (test_sanity_check.py, line " in text
    assert "StepBegin" not in recorder.events


def test_without_the_default_checks_no_phase_is_run() -> None:
    class Counts(TrainingPhase):
        bodies = 0

        def body(self, learner: Any, handle: Any, state: Any) -> None:
            Counts.bodies += 1
            super().body(learner, handle, state)

    for defaults, more in ((False, 0), (True, 1)):
        Counts.bodies = 0
        ready(SanityCheck(defaults=defaults)).fit(1, phases=[Counts()])
        assert Counts.bodies == 4 + more


class Adds(Callback):
    """Adds an entry that a phase needs: on the side, without callbacks, it is missing."""

    writes = ("step.weights",)

    @on(StepBegin)
    def add(self, event: Any, phase: Any, learner: Any) -> None:
        learner.step.weights = torch.ones(8, 1)


class Weighted(TrainingPhase):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.loss = (state.weights * (learner.model(state.xs) - state.ys).square()).mean()
        learner.backward(state.loss)
        learner.update()


def test_an_entry_that_a_callback_adds_is_only_warned_of() -> None:
    learner = ready(SanityCheck(), Adds())
    with pytest.warns(UserWarning, match=r"warning: Weighted\(\): MissingEntryError: The step has no entry 'weights'"):
        learner.fit(1, phases=[Weighted()])


def test_looking_at_the_phases_changes_nothing() -> None:
    plain, checked = (ready(*callbacks) for callbacks in ((), (SanityCheck(),)))
    for learner in (plain, checked):
        learner.fit(2)
    assert_same_bits(plain, checked)


def test_a_misspelt_entry_of_a_validation_phase_ends_the_fit_before_its_first_step() -> None:
    class Misspelt(ValidationPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            state.preds = learner.model(state.xs)
            state.loss = learner.loss_fn(state.pred, state.ys)

    learner = ready(SanityCheck())
    with pytest.raises(
        SanityCheckError, match=r"error: Misspelt\(\): MissingEntryError: .*did you mean 'preds'\? A phase"
    ):
        learner.fit(1, phases=[TrainingPhase(), Misspelt()])
    assert learner.history[TrainingPhase].steps == 0


def test_a_failure_that_ends_with_a_period_is_followed_by_the_hint_without_a_second_one() -> None:
    def fail(learner: Any) -> None:
        raise IndexError("out of bounds.")

    with pytest.raises(SanityCheckError, match=r"error: mine: out of bounds\. Look there"):
        toy_learner(SanityCheck(Check("mine", fail, "Look there"))).fit(1)


def test_missing_training_data_fails_the_fit_and_each_check_says_so_alone() -> None:
    learner = toy_learner(SanityCheck(), data=())
    with pytest.raises(DataError, match="TrainingPhase runs on the 'training' data, and there is no data"):
        learner.fit(1)
    with pytest.raises(ValueError, match="the learner has no training data"):
        SanityCheck().checks[0].run(learner)
    for check in SanityCheck().checks:
        check.run(toy_learner())  # raises where it fails
