from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    AveragedValidationPhase,
    Callback,
    EpochEnd,
    GANPhase,
    Learner,
    PhaseError,
    Recorder,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
)
from fluxloop.testing import assert_same_bits, toy_learner


def gan_learner() -> Learner:
    torch.manual_seed(0)
    models = {"generator": nn.Linear(3, 2), "critic": nn.Linear(2, 1)}
    data = [torch.randn(4, 2, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    return Learner(models, data=(data,), seed=0, default_callbacks=False)


# A phase that keeps something between steps


def test_a_phase_begins_in_a_second_learner_as_in_the_first() -> None:
    phase = GANPhase(noise=3, critic_steps=3)
    first, second = gan_learner(), gan_learner()
    first.fit(1, phases=[phase])
    second.fit(1, phases=[phase])
    assert_same_bits(first, second)


def test_a_phase_goes_on_in_each_of_two_learners_from_where_it_was_there() -> None:
    phase, alone = GANPhase(noise=3, critic_steps=3), GANPhase(noise=3, critic_steps=3)
    first, second, reference = gan_learner(), gan_learner(), gan_learner()
    for _ in range(2):
        first.fit(1, phases=[phase])
        second.fit(1, phases=[phase])
        reference.fit(1, phases=[alone])
    assert_same_bits(first, reference)
    assert_same_bits(second, reference)


@pytest.mark.slow
def test_a_phase_begins_anew_where_its_first_learner_is_gone() -> None:
    phase = GANPhase(noise=3, critic_steps=3)
    gan_learner().fit(1, phases=[phase])
    gc.collect()
    learner, reference = gan_learner(), gan_learner()
    learner.fit(1, phases=[phase])
    reference.fit(1, phases=[GANPhase(noise=3, critic_steps=3)])
    assert_same_bits(learner, reference)


def test_a_state_that_was_loaded_is_what_a_phase_begins_with() -> None:
    phase = GANPhase(noise=3, critic_steps=3)
    phase.load_state_dict({"critic_updates": 2})
    learner = gan_learner()
    learner.fit(1, phases=[phase])
    assert learner.history[phase].updates == {}  # nobody counts
    assert phase.state_dict() == {"critic_updates": 7}


def test_half_a_pair_of_state_methods_is_an_error() -> None:
    with pytest.raises(PhaseError, match="state_dict alone; expected both"):

        class Half(AbstractTrainingPhase):
            def state_dict(self) -> dict[str, Any]:
                return {}


# Which models a phase and a callback see while a view runs


class Inside(UnsafeCallback):
    """Evaluates, predicts and runs an epoch when the averaged validation ends."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    @on(EpochEnd, AveragedValidationPhase)
    def look(self, event: EpochEnd, phase: AveragedValidationPhase, learner: Learner) -> None:
        xs = torch.ones(1, 1)
        self.seen["model"] = learner.model
        self.seen["evaluate"] = learner.evaluate()
        self.seen["predict"] = learner.predict(xs).item()
        learner.epoch(ValidationPhase())
        self.seen["loss"] = learner.step.loss.item()


def test_phases_without_a_view_run_the_live_models_inside_one_that_has_one() -> None:
    inside = Inside()
    learner = toy_learner(EMA("model", 0.9), Recorder(), inside, default_callbacks=True)
    learner.fit(1, phases=[TrainingPhase(), AveragedValidationPhase()])
    assert inside.seen["model"] is learner.weights["model@ema"]
    assert learner.model is learner.weights["model"]
    assert inside.seen["predict"] == learner.model.value.item()
    assert inside.seen["evaluate"] == learner.evaluate()
    assert learner.history["validation/loss@ema"] != learner.history["validation/loss"]


def test_a_callback_that_reads_the_model_gets_the_live_one_whatever_view_runs() -> None:
    class Reads(Callback):
        reads = ("model",)

        @on(EpochEnd)
        def keep(self, event: EpochEnd, phase: Any, learner: Any) -> None:
            models.append(learner.model)

    models: list[Any] = []
    learner = toy_learner(EMA("model", 0.9), Reads())
    learner.fit(1, phases=[TrainingPhase(), AveragedValidationPhase()])
    assert models == [learner.model, learner.model]
    assert learner.model is not learner.weights["model@ema"]


def test_a_phase_that_had_not_run_when_the_file_was_written_begins_anew(tmp_path: Path) -> None:
    class Counting(TrainingPhase):
        def __init__(self) -> None:
            self.n = 0

        def finish(self, learner: Any, state: Any) -> None:
            self.n += 1

    learner, phase = toy_learner(), Counting()
    learner.save(tmp_path / "start.pt")
    learner.fit(1, phases=[phase])
    assert phase.n == 16
    learner.load(tmp_path / "start.pt")
    assert phase.n == 0
    again = toy_learner()
    learner.fit(1, phases=[phase], steps_per_epoch=3)
    again.fit(1, phases=[phase], resume=tmp_path / "start.pt")  # the same instance, in a retry with a new learner
    assert phase.n == 16


def test_a_count_that_a_subclass_adds_to_a_phase_with_a_state_is_kept(tmp_path: Path) -> None:
    class Shows(GANPhase):
        shown = 0

        def finish(self, learner: Any, state: Any) -> None:
            super().finish(learner, state)
            self.shown += 1

    first, second = Shows(noise=3, critic_steps=3), Shows(noise=3, critic_steps=3)
    learner = gan_learner()
    learner.fit(1, phases=[first])
    learner.save(tmp_path / "state.pt")
    resumed = gan_learner()
    resumed.fit(2, phases=[second], resume=tmp_path / "state.pt")
    assert (first.shown, second.shown) == (5, 10)
    learner.fit(1, phases=[first])
    assert_same_bits(learner, resumed)
