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
    CallbackConflictError,
    CancelFittingException,
    EpochEnd,
    FitEnd,
    Learner,
    Metric,
    MetricError,
    Metrics,
    MissingProducerError,
    ModelError,
    Phase,
    Recorder,
    StepEnd,
    StochasticWeightAveraging,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
    runstep,
    throttle,
)
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.early_stopping import EarlyStopping
from fluxloop.callbacks.keep_best import KeepBestModel
from fluxloop.checkpoint.folder import Folder, read, write
from fluxloop.testing import assert_resumes_exactly, assert_same_bits, bits, toy_learner
from toys import Scored, Versioned

VALUES = [3.0, 1.0, 2.0, 4.0]


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


@pytest.mark.slow(quick=3)
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


def test_weights_alone_are_put_back_and_optimizer_and_counts_stay_where_training_left_them() -> None:
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


def test_a_second_fit_begins_anew_and_does_not_take_the_last_value_of_the_first_for_its_own() -> None:
    learner = toy(keeper := KeepBestModel())
    phases = [TrainingPhase(), Scored([3.0, 1.0, 2.0, 4.0])]
    learner.fit(2, phases=phases)
    assert (keeper.epoch, keeper.best) == (2, 1.0)
    ends: list[dict[str, Tensor]] = []

    class Look(UnsafeCallback):
        @on(EpochEnd, Scored)
        def look(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
            ends.append(weights(learner))

    learner.add_callback(Look())
    learner.fit(2, phases=phases)
    assert (keeper.epoch, keeper.best) == (3, 2.0)
    assert same(weights(learner), ends[0])
    assert not same(ends[0], ends[1])


def test_a_second_fit_on_other_data_ends_with_the_best_on_that_data() -> None:
    torch.manual_seed(0)
    xs = torch.rand(16, 1)
    easy, hard = (xs, 3 * xs), (xs, 300 * xs)
    learner = toy(keeper := KeepBestModel(), data=(easy, easy))
    learner.fit(3)
    history = learner.fit(3, data=(hard, hard))
    assert keeper.best == min(history["validation/loss"][3:])
    assert learner.evaluate(hard)["loss"] == pytest.approx(keeper.best, rel=1e-6)


def test_one_object_in_two_learners_keeps_the_weights_of_each_apart() -> None:
    keeper = KeepBestModel()
    first = toy(keeper)
    first.fit(4, phases=[TrainingPhase(), Scored(VALUES)])
    second = toy(keeper)
    assert keeper.best is keeper.epoch is None
    assert not keeper.state_dict()["weights"]
    second.fit(3, phases=[TrainingPhase(), Scored([9.0, 8.0, 7.0])])
    assert (keeper.epoch, keeper.best) == (3, 7.0)
    assert same(weights(second), weights(trained(3)))
    first.fit(1, phases=[TrainingPhase(), Scored([0.0] * 5)])  # and back in the first
    assert (keeper.epoch, keeper.best) == (5, 0.0)


def test_learners_of_other_architectures_can_share_it_one_after_the_other() -> None:
    keeper = KeepBestModel("training/loss")
    for width in (2, 5):
        model = nn.Sequential(nn.Linear(1, width), nn.Linear(width, 1))
        xs = torch.rand(8, 1)
        learner = Learner(model, nn.functional.mse_loss, data=((xs, xs),), callbacks=[keeper], seed=0)
        history = learner.fit(2)
        assert keeper.best == min(history["training/loss"])


class Scaled(nn.Module):
    """A loss with a parameter, and buffers that a checkpoint of a module holds and does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("unsaved", torch.zeros(()), persistent=False)

    def forward(self, preds: Tensor, ys: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            self.unsaved += 1
        return nn.functional.mse_loss(self.scale * preds, ys) + self.scale.square()


def with_loss(*callbacks: Callback) -> Learner[Any]:
    torch.manual_seed(7)
    model, loss = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1)), Scaled()
    return Learner(
        model,
        loss,
        data=vars(toy().data),
        optimizer=torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=0.1),
        callbacks=[Recorder(), Metrics(), *callbacks],
        default_callbacks=False,
        seed=1,
    )


def test_a_loss_with_parameters_comes_back_with_the_models_its_buffers_too() -> None:
    learner, plain = with_loss(KeepBestModel()), with_loss()
    learner.fit(4, phases=[TrainingPhase(), Scored(VALUES)])
    plain.fit(2, phases=[TrainingPhase(), Scored(VALUES)])
    assert same(weights(learner), weights(plain))
    assert torch.equal(learner.loss_fn.scale, plain.loss_fn.scale)
    assert not torch.equal(plain.loss_fn.scale, torch.ones(()))
    assert learner.loss_fn.calls == plain.loss_fn.calls == 4
    assert learner.loss_fn.unsaved == plain.loss_fn.unsaved == 4


@pytest.mark.slow
def test_the_best_loss_with_parameters_survives_a_resume() -> None:
    assert_resumes_exactly(lambda: with_loss(KeepBestModel()), epochs=3, at=[4, 7])


class ScoredAverage(Scored):
    model_view = "ema"


class ScoredSwa(Scored):
    model_view = "swa"


@pytest.mark.parametrize("phase", [ScoredAverage, ScoredSwa], ids=lambda phase: phase.model_view)
def test_an_average_that_was_measured_comes_back_with_the_weights_of_its_epoch(phase: type[Scored]) -> None:
    keep = EMA("model", 0.5) if phase is ScoredAverage else StochasticWeightAveraging()
    view = phase.model_view
    kept, plain = toy(keeper := KeepBestModel(f"validation/loss@{view}"), keep), toy(copy.deepcopy(keep))
    phases = [TrainingPhase(), ValidationPhase(), phase(VALUES)]
    kept.fit(4, phases=phases)
    plain.fit(2, phases=phases)
    assert (keeper.epoch, keeper.best) == (2, 1.0)
    assert same(weights(kept), weights(plain))
    average = kept.weights[f"model@{view}"].state_dict()
    assert same(average, plain.weights[f"model@{view}"].state_dict())
    assert not same(average, weights(kept))


def test_of_several_averages_the_measured_view_alone_comes_back() -> None:
    emas = EMA("model", 0.5), EMA("model", 0.9, view="slow")
    kept, plain, end = toy(KeepBestModel("validation/loss@ema"), *emas), *(toy(*copy.deepcopy(emas)) for _ in "ab")
    for learner, epochs in ((kept, 4), (plain, 2), (end, 4)):
        learner.fit(epochs, phases=[TrainingPhase(), ScoredAverage(VALUES)])
    assert same(kept.weights["model@ema"].state_dict(), plain.weights["model@ema"].state_dict())
    assert same(kept.weights["model@slow"].state_dict(), end.weights["model@slow"].state_dict())


def test_a_metric_whose_name_has_an_at_sign_needs_no_average() -> None:
    class Precision(ValidationPhase):
        def step(self, learner: Learner[Any], batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                state.preds, state.ys = batch[0], batch[1]
                state.loss = torch.ones(())

    learner = toy(keeper := KeepBestModel("validation/precision@k", "max"))
    learner.replace_callback(Metrics(Metric(lambda preds, ys: preds.mean(), name="precision@k", phase=Precision)))
    learner.fit(2, phases=[TrainingPhase(), Precision()])
    assert keeper.epoch == 1


def test_two_of_them_are_a_conflict_that_says_what_to_use_for_the_second() -> None:
    with pytest.raises(CallbackConflictError, match=r"would both put .*Checkpointer\(folder, keep_best=1, monitor="):
        toy(KeepBestModel("validation/a"), throttle(KeepBestModel("validation/b", "max"), EpochEnd, freq=2))

    class Mine(KeepBestModel):
        """A subclass conflicts likewise."""

    learner = toy(KeepBestModel("validation/a"))
    with pytest.raises(CallbackConflictError, match="keep one"):
        learner.add_callback(Mine("validation/b"))
    assert [type(callback) for callback in learner.callbacks].count(KeepBestModel) == 1


def test_after_load_it_is_as_it_was_saved_and_the_best_comes_back_again(tmp_path: Path) -> None:
    learner = toy(keeper := KeepBestModel())
    learner.save(tmp_path / "start.pt")
    phases = [TrainingPhase(), Scored(VALUES)]
    for _ in range(2):
        learner.fit(4, phases=phases)
        assert (keeper.epoch, keeper.best) == (2, 1.0)
        assert same(weights(learner), weights(trained(2)))
        learner.load(tmp_path / "start.pt")
        assert (keeper.best, keeper.epoch, keeper.state_dict()["weights"]) == (None, None, {})


def test_a_run_that_failed_goes_on_in_the_same_learner_with_its_best(tmp_path: Path) -> None:
    class Fail(UnsafeCallback):
        at = 7
        transient = ("at",)  # set by hand between two fits

        @on(StepEnd, AbstractTrainingPhase)
        def fail(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            if learner.history[type(phase)].steps == self.at:
                raise ValueError("no more")

    fail = Fail()
    learner = toy(keeper := KeepBestModel(), Checkpointer(tmp_path), fail)
    phases = [TrainingPhase(), Scored(VALUES)]
    with pytest.raises(ValueError, match="no more"):
        learner.fit(4, phases=phases, resume=tmp_path)
    fail.at = -1
    learner.fit(4, phases=phases, resume=tmp_path)
    assert (keeper.epoch, keeper.best) == (2, 1.0)
    assert same(weights(learner), weights(trained(2)))


def test_a_copied_learner_keeps_its_own_best() -> None:
    learner = toy(KeepBestModel())
    learner.fit(1, phases=[TrainingPhase(), Scored(VALUES)])
    copied = copy.deepcopy(learner)
    for each in (copied, learner):
        each.fit(3, phases=[TrainingPhase(), Scored(VALUES)])
        keeper = each.get_callback(KeepBestModel)
        assert keeper is not None
        assert (keeper.epoch, keeper.best) == (2, 1.0)
        assert same(keeper.state_dict()["weights"]["model"]["state"], weights(each))
        each.model[0].weight.data.zero_()
        assert same(keeper.state_dict()["weights"]["model"]["state"], weights(trained(2)))


def test_there_is_one_copy_that_is_written_over() -> None:
    places: set[frozenset[int]] = set()

    class Look(UnsafeCallback):
        run_after = (KeepBestModel,)

        @on(EpochEnd, Scored)
        def look(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
            kept = learner.get_callback(KeepBestModel).state_dict()["weights"]["model"]["state"]
            places.add(frozenset(tensor.data_ptr() for tensor in kept.values()))

    toy(KeepBestModel(), Look()).fit(4, phases=[TrainingPhase(), Scored([4.0, 3.0, 2.0, 1.0])])
    assert len(places) == 1


def test_a_state_of_its_own_shares_nothing_with_the_one_it_was_taken_from() -> None:
    learner = toy(first := KeepBestModel())
    learner.fit(1, phases=[TrainingPhase(), Scored(VALUES)])
    second = KeepBestModel()
    second.load_state_dict(first.state_dict())
    for tensor in second.state_dict()["weights"]["model"]["state"].values():
        tensor.zero_()
    assert same(first.state_dict()["weights"]["model"]["state"], weights(trained(1)))


def test_best_weights_of_another_architecture_are_an_error_before_a_resumed_run_trains(tmp_path: Path) -> None:
    toy(KeepBestModel(), Checkpointer(tmp_path)).fit(2, phases=[TrainingPhase(), Scored(VALUES)])
    newest = Folder(tmp_path).files()[-1][1]
    state = read(newest)
    kept = state["callbacks"]["KeepBestModel"]["state"]["pair"]["weights"]["model"]["state"]
    kept["0.weight"] = torch.zeros(9, 1)
    del state["callbacks"]["Checkpointer"]
    other = tmp_path / "other" / newest.name
    other.parent.mkdir()
    write(other, state)
    learner = toy(KeepBestModel())
    with pytest.raises(
        ModelError, match=r"best weights so far do not fit the models:\n.*'0.weight' has shape \(3, 1\)"
    ):
        learner.fit(4, phases=[TrainingPhase(), Scored(VALUES)], resume=other)
    assert learner.history[TrainingPhase].steps == 4


def test_a_model_that_has_grown_since_its_best_is_left_as_training_made_it_with_a_warning() -> None:
    class Grow(UnsafeCallback):
        @on(EpochEnd, Scored)
        def grow(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
            if learner.history[Scored].epochs == 3:
                learner.model.append(nn.Linear(1, 1).requires_grad_(False))

    learner = toy(KeepBestModel(), Grow())
    with pytest.warns(UserWarning, match=r"best weights, of epoch 2, are not put back: .*\n.*lacks '3"):
        learner.fit(4, phases=[TrainingPhase(), Scored(VALUES)])
    assert len(learner.model) == 4


def test_the_best_weights_survive_a_resume(tmp_path: Path) -> None:
    for until in (1, 3, 4):
        learner = toy(keeper := KeepBestModel(), Checkpointer(tmp_path))
        learner.fit(until, phases=[TrainingPhase(), Scored(VALUES)], resume=tmp_path)
    assert (keeper.epoch, keeper.best) == (2, 1.0)
    assert same(weights(learner), weights(trained(2)))


@pytest.mark.slow
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
        match=r"fit records 'validation/accuracy', .* it records \['training/loss', 'validation/loss'\]",
    ):
        learner.fit(2)
    assert learner.history[TrainingPhase].steps == 0


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
        ((), {"min_delta": True}, "min_delta=True"),
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
