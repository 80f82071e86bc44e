from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Callback,
    CancelFittingException,
    EpochEnd,
    FitEnd,
    Learner,
    MetricError,
    Metrics,
    MissingProducerError,
    Phase,
    Recorder,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
    runstep,
)
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.early_stopping import EarlyStopping
from fluxloop.callbacks.keep_best import KeepBestModel
from fluxloop.folder import Folder, read
from fluxloop.testing import assert_resumes_exactly, assert_same_bits, bits, toy_learner

VALUES = [3.0, 1.0, 2.0, 4.0]


class Scored(ValidationPhase):
    """Records the next value of a list in each epoch, as the loss."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = values

    def step(self, learner: Learner[Any], batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            state.loss = torch.tensor(self.values[learner.history[type(self)].epochs], dtype=torch.float64)


def toy(*callbacks: Callback, **options: Any) -> Learner[Any]:
    """A small network with a buffer that training changes."""
    torch.manual_seed(7)
    xs = torch.rand(8, 1)
    model = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    data = (TensorBatches(xs, 3 * xs, batch_size=4, shuffle=True), TensorBatches(xs, 3 * xs, batch_size=4))
    arguments: dict[str, Any] = {"data": data, "optimizer": partial(torch.optim.Adam, lr=0.01), "seed": 1, **options}
    return Learner(
        model,
        nn.functional.mse_loss,
        callbacks=[Recorder(), Metrics(), *callbacks],
        default_callbacks=False,
        **arguments,
    )


def trained(epochs: int, values: Sequence[float] = VALUES) -> Learner[Any]:
    learner = toy()
    learner.fit(epochs, phases=[TrainingPhase(), Scored(values)])
    return learner


def weights(learner: Learner[Any]) -> dict[str, Tensor]:
    return copy.deepcopy(learner.model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize(
    ("values", "options", "best"),
    [
        ([3, 1, 2, 4], {}, 2),
        ([1, 2, 3, 4], {}, 1),
        ([4, 3, 2, 1], {}, 4),
        ([3, 1, 2, 4], {"mode": "max"}, 4),
        ([4, 1, 2, 3], {"mode": "max"}, 1),
        ([nan, 2, nan, 3], {}, 2),
        ([nan, 2, nan, 3], {"mode": "max"}, 4),
        ([2, 2, 2, 2], {}, 1),
        ([3, 2.5, 2.4, 1.0], {"min_delta": 1.0}, 4),
        ([3, 2, 2.5, 1.5], {"min_delta": 1.0}, 4),
        ([3, 2, 1.5, 4], {"min_delta": 2.0}, 1),
        ([-float("inf"), 1, 2, 3], {}, 1),
    ],
    ids=repr,
)
def test_weights_are_those_of_training_for_exactly_the_best_epochs(
    values: list[float], options: dict[str, Any], best: int
) -> None:
    learner = toy(keeper := KeepBestModel(**options))
    history = learner.fit(4, phases=[TrainingPhase(), Scored(values)])
    assert (keeper.epoch, keeper.best) == (best, values[best - 1])
    assert same(weights(learner), weights(trained(best, values)))
    assert history.cycles == history[TrainingPhase].epochs == 4


def test_where_the_metric_is_always_nan_training_is_left_as_it_is() -> None:
    learner = toy(keeper := KeepBestModel())
    learner.fit(3, phases=[TrainingPhase(), Scored([nan] * 3)])
    assert keeper.best is keeper.epoch is None
    assert_same_bits(learner, trained(3, [nan] * 3))


def test_d_lz_21_weights_alone_are_put_back_and_optimizer_and_counts_stay_where_training_left_them() -> None:
    learner, plain = toy(KeepBestModel()), trained(4)
    learner.fit(4, phases=[TrainingPhase(), Scored(VALUES)])
    mine, others = bits(learner), bits(plain)
    assert {name for name in mine if not torch.equal(mine[name], others[name])} == {n for n in mine if n[:5] == "model"}
    assert learner.history[TrainingPhase].steps == 8
    assert learner.history[TrainingPhase].updates == plain.history[TrainingPhase].updates
    assert learner.history["validation/loss"] == VALUES
    assert learner.streams.positions() == plain.streams.positions()


def test_looking_at_the_metric_does_not_disturb_training() -> None:
    seen: list[list[dict[str, Tensor]]] = []
    for callbacks in ([], [KeepBestModel()]):

        class Look(UnsafeCallback):
            @on(EpochEnd, AbstractTrainingPhase)
            def look(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
                seen[-1].append(bits(learner))

        seen.append([])
        toy(Look(), *callbacks).fit(4, phases=[TrainingPhase(), Scored(VALUES)])
    assert all(same(a, b) for a, b in zip(*seen, strict=True))


def test_checkpoints_hold_what_training_made(tmp_path: Path) -> None:
    learner = toy(KeepBestModel(), Checkpointer(tmp_path))
    learner.fit(4, phases=[TrainingPhase(), Scored(VALUES)])
    last = read(Folder(tmp_path).files()[-1][1])
    assert same(last["models"][""]["state"], weights(trained(4)))
    assert same(weights(learner), weights(trained(2)))


def test_handlers_of_the_end_still_see_what_training_made() -> None:
    seen: list[dict[str, Tensor]] = []

    class Look(UnsafeCallback):
        @on(FitEnd)
        def look(self, event: FitEnd, phase: Phase, learner: Any) -> None:
            seen.append(weights(learner))

    toy(KeepBestModel(), Look()).fit(4, phases=[TrainingPhase(), Scored(VALUES)])
    assert same(seen[0], weights(trained(4)))


@pytest.mark.parametrize("error", [CancelFittingException, ValueError, KeyboardInterrupt])
def test_the_best_are_put_back_when_a_fit_ends_early_or_by_an_error(error: type[BaseException]) -> None:
    class End(UnsafeCallback):
        @on(StepEnd, AbstractTrainingPhase)
        def end(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            if learner.history[type(phase)].steps == 7:
                raise error("enough")

    learner = toy(KeepBestModel(), End())
    if error is ValueError:
        with pytest.raises(ValueError, match="enough"):
            learner.fit(4, phases=[TrainingPhase(), Scored(VALUES)])
    else:
        assert learner.fit(4, phases=[TrainingPhase(), Scored(VALUES)]).stop_reason is not None
    assert same(weights(learner), weights(trained(2)))


def test_the_best_are_put_back_after_early_stopping() -> None:
    learner = toy(keeper := KeepBestModel(), EarlyStopping(2))
    history = learner.fit(9, phases=[TrainingPhase(), Scored([3.0, 1, 2, 4, 0, 0, 0, 0, 0])])
    assert (history.cycles, keeper.epoch) == (4, 2)
    assert same(weights(learner), weights(trained(2)))


def test_the_best_of_before_still_counts_in_a_second_fit() -> None:
    values = [3.0, 1.0, 2.0, 4.0]
    learner = toy(keeper := KeepBestModel())
    for _ in range(2):
        learner.fit(2, phases=[TrainingPhase(), Scored(values)])
    assert (keeper.epoch, keeper.best) == (2, 1.0)
    assert same(weights(learner), weights(trained(2)))


def test_d_mt_09_the_best_weights_survive_a_resume(tmp_path: Path) -> None:
    for until in (1, 3, 4):
        learner = toy(keeper := KeepBestModel(), Checkpointer(tmp_path))
        learner.fit(until, phases=[TrainingPhase(), Scored(VALUES)], resume=tmp_path)
    assert (keeper.epoch, keeper.best) == (2, 1.0)
    assert same(weights(learner), weights(trained(2)))


def test_a_run_resumed_anywhere_ends_with_the_same_best() -> None:
    assert_resumes_exactly(lambda: toy(KeepBestModel()), epochs=3, at=[1, 4, 6, 8, 11])


def test_a_finished_run_gives_the_best_weights_again(tmp_path: Path) -> None:
    for _ in range(3):
        learner = toy(KeepBestModel(), Checkpointer(tmp_path))
        learner.fit(4, phases=[TrainingPhase(), Scored(VALUES)], resume=tmp_path)
        assert same(weights(learner), weights(trained(2)))


def test_an_unknown_metric_is_named_with_those_there_are() -> None:
    learner = toy(KeepBestModel("validation/accuracy"))
    with pytest.raises(
        MetricError,
        match=r"no metric 'validation/accuracy' was recorded; there are \['training/loss', 'validation/loss'\]",
    ):
        learner.fit(2)
    assert learner.history[ValidationPhase].epochs == 1


def test_without_metrics_the_learner_cannot_be_built() -> None:
    with pytest.raises(MissingProducerError, match=r"KeepBestModel reads 'cbstate.metrics'.*add Metrics\(\)"):
        toy_learner(KeepBestModel())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("loss",), {}, "monitor='loss' was given; expected the data's key"),
        (("validation/loss", "least"), {}, "mode='least' was given; expected 'min' or 'max'"),
        ((), {"min_delta": -1.0}, "min_delta=-1.0"),
        ((), {"min_delta": nan}, "min_delta=nan"),
        ((), {"min_delta": "a bit"}, "min_delta='a bit'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError, MetricError), match=message):
        KeepBestModel(*arguments, **options)


def test_any_metric_of_any_phase_may_decide() -> None:
    learner = toy(keeper := KeepBestModel("training/loss"))
    history = learner.fit(3)
    assert keeper.best == min(history["training/loss"])


def test_all_models_are_put_back_and_averages_are_not() -> None:
    learner = toy(KeepBestModel(), EMA("model", 0.5))
    plain = toy(EMA("model", 0.5))
    for each in (learner, plain):
        each.fit(4, phases=[TrainingPhase(), Scored(VALUES)])
    assert same(learner.weights["model@ema"].state_dict(), plain.weights["model@ema"].state_dict())
    assert same(weights(learner), weights(trained(2)))


class Versioned(nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 100
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_modules_version_is_kept_with_its_weights() -> None:
    def learner(*callbacks: Callback) -> Learner[Any]:
        torch.manual_seed(0)
        return Learner(
            Versioned(1, 1),
            nn.functional.l1_loss,
            data=vars(toy().data),
            callbacks=[Recorder(), Metrics(), *callbacks],
            default_callbacks=False,
            seed=1,
        )

    plain, kept = learner(), learner(KeepBestModel())
    plain.fit(2, phases=[TrainingPhase(), Scored(VALUES)])
    kept.fit(4, phases=[TrainingPhase(), Scored(VALUES)])
    assert same(weights(plain), weights(kept))


def test_mode_max_of_a_loss_that_only_falls_keeps_the_first_epochs_weights() -> None:
    learner = toy(keeper := KeepBestModel("training/loss", "max"))
    learner.fit(3)
    assert keeper.epoch == 1
    plain = toy()
    plain.fit(1)
    assert same(weights(learner), weights(plain))
