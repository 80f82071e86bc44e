from __future__ import annotations

import copy
import enum
import io
import random
import re
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Callback,
    CSVLogger,
    EpochBegin,
    EpochEnd,
    FitBegin,
    Learner,
    LearningRate,
    Metric,
    Metrics,
    Phase,
    ProgressBar,
    Recorder,
    Scheduler,
    StepEnd,
    TensorBatches,
    Traces,
    TrainingPhase,
    UnsafeCallback,
    on,
    one_cycle,
)
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.early_stopping import EarlyStopping
from fluxloop.callbacks.gradient_clip import GradientClip
from fluxloop.callbacks.keep_best import KeepBestModel
from fluxloop.callbacks.lr_scheduler import LRScheduler
from fluxloop.callbacks.swa import StochasticWeightAveraging
from fluxloop.errors import CheckpointError
from fluxloop.testing import assert_resumes_exactly, assert_same_bits, bits, toy_learner
from toys import Versioned


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 1)

    def forward(self, xs: Tensor) -> Tensor:
        result: Tensor = self.head(self.encoder(xs))
        return result


def net(*callbacks: Callback, model: Any = None, seed: int = 7, **options: Any) -> Learner[Any]:
    torch.manual_seed(seed)
    xs = torch.linspace(0, 1, 8)[:, None]
    data = (TensorBatches(xs, 3 * xs, batch_size=4, shuffle=True), TensorBatches(xs, 3 * xs, batch_size=4))
    arguments = {"data": data, "optimizer": partial(torch.optim.Adam, lr=0.01), "seed": 1, **options}
    return Learner(
        Net() if model is None else model,
        nn.functional.mse_loss,
        callbacks=callbacks,
        default_callbacks=False,
        **arguments,
    )


def unchanged(learner: Learner[Any], before: dict[str, Tensor]) -> bool:
    after = bits(learner)
    return after.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in after.items())


class Counting(Callback):
    """Counts steps, from a number of its own on."""

    def __init__(self, start: int = 0, name: str | None = None) -> None:
        super().__init__(name=name)
        self.start = start
        self.count = start

    @on(StepEnd, AbstractTrainingPhase)
    def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.count += 1


# Saving and loading


def test_predictions_are_identical_after_loading(tmp_path: Path) -> None:
    first = net()
    first.fit(2)
    first.save(tmp_path / "state.pt")
    second = net(seed=99)
    xs = torch.rand(5, 1)
    assert not torch.equal(first.predict(xs), second.predict(xs))
    second.load(tmp_path / "state.pt")
    assert torch.equal(first.predict(xs), second.predict(xs))
    assert_same_bits(first, second)


def test_loading_and_fitting_trains_so_many_epochs_more_with_the_same_bits(tmp_path: Path) -> None:
    plain = net(Recorder(), Metrics())
    plain.fit(2)
    plain.save(tmp_path / "state.pt")
    plain.fit(3)
    again = net(Recorder(), Metrics(), seed=99)
    again.load(tmp_path / "state.pt")
    history = again.fit(3)
    assert history.cycles == history[TrainingPhase].epochs == 5
    assert history.rows() == plain.history.rows()
    assert_same_bits(plain, again)


def test_a_state_goes_through_torch_load_with_weights_only() -> None:
    learner = net(Recorder(), Metrics(), EMA("model", 0.9), KeepBestModel(), EarlyStopping(3), Counting())
    learner.fit(2)
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = net(Recorder(), Metrics(), EMA("model", 0.9), KeepBestModel(), EarlyStopping(3), Counting(), seed=99)
    again.load_state_dict(state)
    learner.fit(1)
    again.fit(1)
    assert_same_bits(learner, again)
    assert again.history.rows() == learner.history.rows()


def test_a_loaded_state_shares_nothing_with_the_one_it_came_from() -> None:
    learner, again = net(Recorder(), Counting()), net(Recorder(), Counting(), seed=99)
    learner.fit(1)
    state = learner.state_dict()
    again.load_state_dict(state)
    before = bits(learner)
    again.fit(2)
    assert unchanged(learner, before)
    third = net(Recorder(), Counting())
    third.load_state_dict(copy.deepcopy(state))
    assert unchanged(third, before)


def test_a_state_of_an_untrained_learner_is_one_too(tmp_path: Path) -> None:
    first, second = net(Recorder()), net(Recorder(), seed=99)
    first.save(tmp_path / "begin.pt")
    second.load(tmp_path / "begin.pt")
    first.fit(2)
    second.fit(2)
    assert_same_bits(first, second)


def test_loading_goes_back_as_well_as_on(tmp_path: Path) -> None:
    learner = net(Recorder(), Metrics(), counting := Counting())
    learner.fit(1)
    learner.save(tmp_path / "one.pt")
    learner.fit(2)
    assert counting.count == 6
    learner.load(tmp_path / "one.pt")
    assert (learner.history.cycles, learner.history[TrainingPhase].steps, counting.count) == (1, 2, 2)
    assert len(learner.history["training/loss"]) == 1
    plain = net(Recorder())
    plain.fit(1)
    assert_same_bits(plain, learner)


def test_the_state_cannot_be_asked_for_in_the_middle_of_a_step() -> None:
    class Asks(UnsafeCallback):
        @on(StepEnd)
        def ask(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            learner.state_dict()

    with pytest.raises(CheckpointError, match=r"while a step is under way .*learner.at_safe_point"):
        net(Asks()).fit(1)


def test_frozen_parameters_and_unsaved_buffers_come_back(tmp_path: Path) -> None:
    def model() -> Net:
        made = Net()
        made.register_buffer("temporary", torch.zeros(1), persistent=False)
        return made

    learner = net(model=model())
    learner.model.temporary += 5
    learner.model.encoder[0].weight.requires_grad_(False)
    learner.save(tmp_path / "state.pt")
    again = net(model=model())
    again.load(tmp_path / "state.pt")
    assert again.model.temporary.item() == 5
    assert [n for n, p in again.model.named_parameters() if not p.requires_grad] == ["encoder.0.weight"]


def test_a_loss_function_that_is_a_module_is_kept(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(1))

        def forward(self, preds: Tensor, ys: Tensor) -> Tensor:
            self.scale += 1
            return ((preds * self.scale - ys) ** 2).mean()

    def learner() -> Learner[Any]:
        made = net()
        return Learner(made.model, Scaled(), data=vars(made.data), default_callbacks=False, seed=1)

    first = learner()
    first.fit(1)
    first.save(tmp_path / "state.pt")
    second = learner()
    second.load(tmp_path / "state.pt")
    assert torch.equal(first.loss_fn.scale, second.loss_fn.scale)
    assert second.loss_fn.scale.item() > 1
    with pytest.raises(CheckpointError, match="one of the two has a loss function that is a module, the other has not"):
        net().load(tmp_path / "state.pt")


# What does not fit


def test_all_misfits_are_told_in_one_error_and_nothing_is_changed(tmp_path: Path) -> None:
    class Other(Callback):
        def __init__(self) -> None:
            super().__init__(name="counting")

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4))
            self.tail = nn.Linear(4, 1)

        def forward(self, xs: Tensor) -> Tensor:
            result: Tensor = self.tail(self.encoder(xs))
            return result

    first = net(Counting(name="counting"))
    first.fit(1)
    first.save(tmp_path / "state.pt")
    model = Renamed()
    groups = [{"params": model.encoder.parameters()}, {"params": model.tail.parameters()}]
    learner = net(Other(), model=model, optimizer=torch.optim.SGD(groups, lr=0.1))
    learner.fit(1)
    before, positions = bits(learner), learner.streams.positions()
    with pytest.raises(CheckpointError, match="does not fit this learner") as caught:
        learner.load(tmp_path / "state.pt")
    text = str(caught.value)
    for part in (
        "the model: 'encoder.0.weight' has shape (4, 1), in the checkpoint (3, 1)",
        "the checkpoint lacks 'tail.weight'",
        "'head.weight' of the checkpoint is not there",
        "was a torch.optim.adam.Adam and is a torch.optim.sgd.SGD",
        "has groups of [4, 2] parameters, in the checkpoint of [6]",
    ):
        assert part in text
    assert re.search("callback 'counting' was a .*Counting and is a .*Other", text)
    assert unchanged(learner, before)
    assert learner.streams.positions() == positions
    assert learner.history.cycles == 1


def test_other_models_are_told(tmp_path: Path) -> None:
    net().save(tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"the models are \['D', 'G'\], those of the checkpoint \[''\]"):
        Learner({"G": Net(), "D": Net()}, default_callbacks=False).load(tmp_path / "state.pt")


def test_what_is_no_state_is_told(tmp_path: Path) -> None:
    learner = net()
    for given in ({"weight": torch.zeros(1)}, None, [1]):
        with pytest.raises(CheckpointError, match=r"expected the state of a learner: learner.state_dict()"):
            learner.load_state_dict(given)  # type: ignore[arg-type]  # the mistake
    with pytest.raises(CheckpointError, match="has the layout 99 and this fluxloop reads 1"):
        learner.load_state_dict({**learner.state_dict(), "fluxloop": 99})
    with pytest.raises(CheckpointError, match=r"none.pt was given as a checkpoint; expected a file"):
        learner.load(tmp_path / "none.pt")


def test_a_callback_that_refuses_its_state_leaves_the_learner_as_it_was() -> None:
    class Refuses(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"layout": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise ValueError("made with another number of classes")

    first = net(Refuses())
    first.fit(1)
    second = net(counting := Counting(7), Refuses(), seed=99)
    before = bits(second)
    with pytest.raises(CheckpointError, match=r"Refuses does not take its state .*: ValueError: made with another"):
        second.load_state_dict(first.state_dict())
    assert unchanged(second, before)
    assert counting.count == 7


@pytest.mark.parametrize("begun", [False, True], ids=["a new learner", "one that has trained"])
def test_what_is_refused_only_once_the_fit_has_begun_is_undone_too(begun: bool, tmp_path: Path) -> None:
    class Opens(Callback):
        """Has an object of its own while a fit goes on, which looks closely at its state."""

        def __init__(self, size: int) -> None:
            self.size = size
            self.table: Any = None

        @on(FitBegin)
        def start(self, event: FitBegin, phase: Phase, learner: Any) -> None:
            self.table = nn.Linear(self.size, 1)

    first = net(Opens(2), Counting())
    first.fit(1)
    first.save(tmp_path / "state.pt")
    second = net(Opens(3), counting := Counting(), seed=99)
    if begun:
        second.fit(1)
    before, count, cycles = bits(second), counting.count, second.history.cycles
    with pytest.raises(CheckpointError, match=r"(?s)Opens does not take its state .*size mismatch for weight"):
        second.fit(2, resume=tmp_path / "state.pt")
    assert unchanged(second, before)
    assert (counting.count, second.history.cycles) == (count, cycles)


# Callbacks come and go


def test_states_of_callbacks_go_by_their_ids_whatever_the_order_of_the_list() -> None:
    def some() -> list[Callback]:
        return [Counting(0, "a"), Counting(100, "b"), Recorder(), Metrics(), EMA("model", 0.5)]

    given = some()
    first = net(*given)
    first.fit(2)
    for order in ([4, 3, 2, 1, 0], [1, 0, 3, 4, 2]):
        callbacks = some()
        second = net(*[callbacks[index] for index in order], seed=99)
        second.load_state_dict(first.state_dict())
        assert [callbacks[0].count, callbacks[1].count] == [4, 104]  # type: ignore[attr-defined]  # Counting
        first_average, second_average = first.weights["model@ema"], second.weights["model@ema"]
        assert all(
            torch.equal(a, b) for a, b in zip(first_average.parameters(), second_average.parameters(), strict=True)
        )


def test_states_without_a_callback_warn_and_callbacks_without_a_state_begin() -> None:
    first = net(Counting(name="former"))
    first.fit(2)
    second = net(new := Counting(name="new"))
    with pytest.warns(UserWarning, match="states of former, which are not among the callbacks now"):
        second.load_state_dict(first.state_dict())
    assert new.count == 0
    assert_same_bits(first, second)


def test_a_callback_whose_state_is_missing_is_named_and_one_that_keeps_nothing_is_not(tmp_path: Path) -> None:
    class Prints(Callback):
        """Keeps nothing but what it was made with."""

        def __init__(self, path: str) -> None:
            self.path = path

        @on(StepEnd)
        def show(self, event: StepEnd, phase: Phase, learner: Any) -> None: ...

    first = net(Recorder(), Metrics())
    first.fit(1)
    first.save(tmp_path / "state.pt")
    csv = CSVLogger(tmp_path / "log.csv")
    net(Recorder(), Metrics(), Prints("a.txt"), csv, ProgressBar()).load(tmp_path / "state.pt")
    for callback, name in ((Counting(), "Counting"), (EMA("model", 0.9), "EMA"), (Counting(name="mine"), "mine")):
        with pytest.warns(UserWarning, match=f"the checkpoint has no state of {name}: what they keep begins anew"):
            net(Recorder(), Metrics(), callback).load(tmp_path / "state.pt")
    with pytest.warns(UserWarning, match="no state of EMA, Recorder"):
        net(Recorder(), EMA("model", 0.9)).load_state_dict(net().state_dict())
    net(Recorder(), Counting()).load_state_dict(net(Recorder(), Counting()).state_dict())  # it had nothing to keep yet


def test_an_older_file_lacks_what_was_added_since_and_goes_on(tmp_path: Path) -> None:
    def make(*more: Callback) -> Learner[Any]:
        return net(Recorder(), Metrics(), EMA("model", 0.9), Counting(), *more)

    plain, again, found = make(), make(), []

    def look() -> None:
        if plain.history[TrainingPhase].steps == 3 and not found:
            found.append(copy.deepcopy(plain.state_dict()))

    plain.at_safe_point(look)
    plain.fit(3)
    state = found[0]
    del state["present"], state["optimizers"][""]["names"], state["place"]["steps_per_epoch"]
    for part in ("phase", "num_batches", "train_mode"):
        state["updates"]["slots"][""].pop(part, None)
    for kept in (*state["data"].values(), state["place"]["feed"]):
        kept.pop("fingerprint", None)
    torch.save(state, tmp_path / "old.pt")  # and has no checksums
    again.fit(3, resume=tmp_path / "old.pt")
    assert_same_bits(plain, again)
    assert plain.history.rows() == again.history.rows()


def test_an_older_file_does_not_say_which_callbacks_there_were(tmp_path: Path) -> None:
    state = net(Recorder(), EMA("model", 0.9)).state_dict()
    del state["present"]
    net(Recorder(), Counting(), EMA("model", 0.9)).load_state_dict(state)
    del state["callbacks"]["EMA"]  # which always has something to keep
    with pytest.warns(UserWarning, match="the checkpoint has no state of EMA"):
        net(Recorder(), Counting(), EMA("model", 0.9)).load_state_dict(state)


class Remembers(TrainingPhase):
    """Counts its steps."""

    def __init__(self) -> None:
        self.count = 0

    def finish(self, learner: Learner, state: Any) -> None:
        self.count += 1


def renamed(state: Any, old: str, new: str) -> Any:
    """Write another name for one wherever it stands, as if the class had been called so when the file was written."""
    if isinstance(state, dict):
        return {renamed(key, old, new): renamed(value, old, new) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(renamed(value, old, new) for value in state)
    return state.replace(old, new) if isinstance(state, str) else state


HERE = __name__


@pytest.mark.parametrize("old", ["elsewhere.Remembers", f"{HERE}.Remembered"], ids=["moved", "renamed"])
def test_a_phase_that_was_moved_or_renamed_begins_anew_and_is_named(old: str) -> None:
    first = net(Recorder(), Metrics())
    first.fit(2, phases=[Remembers()])
    state = renamed(first.state_dict(), f"{HERE}.Remembers", old)
    second, phase = net(Recorder(), Metrics(), seed=99), Remembers()
    with pytest.warns(
        UserWarning, match=f"was kept for the phases {re.escape(str([old]))}, which nobody has defined now"
    ):
        second.load_state_dict(state)
    assert_same_bits(first, second)
    assert second.history.cycles == 2
    second.fit(1, phases=[phase])
    assert phase.count == second.history[Remembers].steps == 2


def test_the_state_of_a_callback_that_was_moved_is_refused() -> None:
    first = net(Counting())
    first.fit(1)
    state = renamed(first.state_dict(), f"{HERE}.Counting", "elsewhere.Counting")
    with pytest.raises(CheckpointError, match=f"callback 'Counting' was a elsewhere.Counting and is a {HERE}.Counting"):
        net(Counting()).load_state_dict(state)


def test_a_callback_that_was_renamed_begins_anew_and_is_named() -> None:
    first, second = net(Counting()), net(counting := Counting())
    first.fit(1)
    state = renamed(first.state_dict(), "Counting", "Counted")
    with pytest.warns(UserWarning, match="has states of Counted, which .* has no state of Counting: .* begins anew"):
        second.load_state_dict(state)
    assert counting.count == 0
    assert_same_bits(first, second)


def test_what_nobody_publishes_now_is_left_out_with_a_word() -> None:
    first = net(Recorder(), Metrics())
    first.fit(2)
    second = net(seed=99)
    with pytest.warns(UserWarning, match="cbstate.history|Recorder"):
        second.load_state_dict(first.state_dict())
    assert second.history.cycles == 2
    assert_same_bits(first, second)


# Lazy modules


def lazy(*callbacks: Callback) -> Learner[Any]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Linear(4, 1))
    return net(*callbacks, model=model, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))


def test_a_lazy_model_is_kept_from_before_its_first_batch_on(tmp_path: Path) -> None:
    plain = lazy()
    plain.fit(2)
    folder = tmp_path / "run"
    for epochs in (0, 1, 2):  # the first ends before the first batch
        resumed = lazy(Checkpointer(folder, every=1, unit="step"))
        resumed.fit(epochs, resume=folder)
    assert_same_bits(plain, resumed)


def test_a_lazy_model_that_has_seen_no_batch_is_saved_and_loaded_as_one(tmp_path: Path) -> None:
    first, second = lazy(), lazy()
    first.save(tmp_path / "begin.pt")
    second.load(tmp_path / "begin.pt")
    first.fit(1)
    second.fit(1)
    assert_same_bits(first, second)
    with pytest.raises(CheckpointError, match=r"'0.weight' had seen no batch in the checkpoint \(a lazy module\)"):
        first.load(tmp_path / "begin.pt")
    assert lazy().load_weights(tmp_path / "begin.pt", strict=False)[:2] == ["0.bias", "0.weight"]
    first.save(tmp_path / "trained.pt")
    third = lazy()
    assert third.load_weights(tmp_path / "trained.pt") == []
    assert torch.equal(third.model[0].weight, first.model[0].weight)


def test_a_lazy_model_that_refused_a_state_is_still_lazy() -> None:
    class Keeps(nn.Module):
        """Has a state that is refused after the weights were loaded."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LazyLinear(1)

        def forward(self, xs: Tensor) -> Tensor:
            result: Tensor = self.layer(xs)
            return result

        def get_extra_state(self) -> Any:
            return {"kind": 1}

        def set_extra_state(self, state: Any) -> None:
            if state["kind"] != 1:
                raise ValueError("another kind")

    def make() -> Learner[Any]:
        return net(model=Keeps(), optimizer=torch.optim.SGD)

    trained, fresh, plain = make(), make(), make()
    trained.fit(1)
    state = trained.state_dict()
    state["models"][""]["state"]["_extra_state"] = {"kind": 2}
    with pytest.raises(CheckpointError, match="another kind"):
        fresh.load_state_dict(state)
    fresh.fit(1)
    plain.fit(1)
    assert torch.equal(fresh.model.layer.weight, plain.model.layer.weight)


# Weights alone


def test_a_warm_start_takes_weights_and_nothing_else(tmp_path: Path) -> None:
    first = net(Recorder())
    first.fit(3)
    first.save(tmp_path / "state.pt")
    second = net(Recorder(), seed=99, optimizer=partial(torch.optim.SGD, lr=0.5))
    assert second.load_weights(tmp_path / "state.pt") == []
    assert all(torch.equal(t, first.model.state_dict()[n]) for n, t in second.model.state_dict().items())
    assert second.history.cycles == 0
    assert second.optimizer.state_dict()["state"] == {}
    assert second.streams.positions() == net(Recorder()).streams.positions()


def test_a_warm_start_from_a_modules_own_state(tmp_path: Path) -> None:
    source = Net()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    learner = net()
    assert learner.load_weights(tmp_path / "weights.pt") == []
    assert torch.equal(learner.model.head.weight, source.head.weight)


def test_a_strict_warm_start_tells_all_that_differs_and_changes_nothing(tmp_path: Path) -> None:
    torch.save({**Net(4).state_dict(), "extra": torch.zeros(1)}, tmp_path / "weights.pt")
    learner = net()
    before = bits(learner)
    with pytest.raises(CheckpointError, match="the weights do not fit") as caught:
        learner.load_weights(tmp_path / "weights.pt")
    assert "'extra' of the checkpoint is not there" in str(caught.value)
    assert "'encoder.0.weight' has shape (3, 1), in the checkpoint (4, 1)" in str(caught.value)
    assert "load_weights(..., strict=False) takes those that do" in str(caught.value)
    assert unchanged(learner, before)


def test_a_warm_start_that_is_not_strict_takes_what_fits_and_names_the_rest(tmp_path: Path) -> None:
    state = Net().state_dict()
    del state["head.bias"]
    state["encoder.0.weight"] = torch.zeros(4, 1)
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pt")
    learner = net()
    bias, weight = learner.model.head.bias.clone(), learner.model.encoder[0].weight.clone()
    assert learner.load_weights(tmp_path / "weights.pt", strict=False) == ["encoder.0.weight", "extra", "head.bias"]
    assert torch.equal(learner.model.head.weight, state["head.weight"])
    assert torch.equal(learner.model.head.bias, bias)
    assert torch.equal(learner.model.encoder[0].weight, weight)


def test_a_part_of_a_model_takes_its_weights(tmp_path: Path) -> None:
    source = net()
    source.fit(2)
    source.save(tmp_path / "state.pt")
    learner = net(seed=99)
    head = learner.model.head.weight.clone()
    assert learner.load_weights(tmp_path / "state.pt", "encoder") == []
    assert all(
        torch.equal(t, source.model.encoder.state_dict()[n]) for n, t in learner.model.encoder.state_dict().items()
    )
    assert torch.equal(learner.model.head.weight, head)
    again = net(seed=98)
    again.load_weights(tmp_path / "state.pt", "encoder.0")
    assert torch.equal(again.model.encoder[0].weight, source.model.encoder[0].weight)
    torch.save(source.model.encoder.state_dict(), tmp_path / "encoder.pt")
    third = net(seed=97)
    third.load_weights(tmp_path / "encoder.pt", "encoder")
    assert torch.equal(third.model.encoder[0].weight, source.model.encoder[0].weight)


def test_one_of_several_models_takes_its_weights(tmp_path: Path) -> None:
    def pair(seed: int) -> Learner[Any]:
        torch.manual_seed(seed)
        return Learner({"G": Net(), "D": Net()}, default_callbacks=False)

    first, second = pair(1), pair(2)
    first.save(tmp_path / "state.pt")
    other = second.models["D"].state_dict()["head.weight"].clone()
    second.load_weights(tmp_path / "state.pt", "G")
    assert torch.equal(second.models["G"].head.weight, first.models["G"].head.weight)  # type: ignore[arg-type]
    assert torch.equal(second.models["D"].state_dict()["head.weight"], other)
    second.load_weights(tmp_path / "state.pt", "D.encoder")
    assert torch.equal(second.models["D"].encoder[0].weight, first.models["D"].encoder[0].weight)  # type: ignore[index]
    assert torch.equal(second.models["D"].state_dict()["head.weight"], other)
    single = net()
    with pytest.raises(
        CheckpointError, match=r"weights of \[''\] were asked for, .* \['D', 'G'\]; name one of the models"
    ):
        single.load_weights(tmp_path / "state.pt")
    pair(3).load_weights(tmp_path / "state.pt")


def test_names_of_nobody_are_refused(tmp_path: Path) -> None:
    net().save(tmp_path / "state.pt")
    with pytest.raises(Exception, match="nobody"):
        net().load_weights(tmp_path / "state.pt", "nobody")


@pytest.mark.parametrize("name", ["model", "0"])
def test_versions_of_modules_are_kept(name: str, tmp_path: Path) -> None:
    def learner(seed: int) -> Learner[Any]:
        torch.manual_seed(seed)
        return net(model=nn.Sequential(Versioned(1, 1)), seed=seed)

    first = learner(1)
    first.save(tmp_path / "state.pt")
    torch.save(first.model.state_dict(), tmp_path / "plain.pt")
    for file in ("state.pt", "plain.pt") if name == "model" else ("state.pt",):
        second = learner(2)
        second.load_weights(tmp_path / file, name)
        assert torch.equal(second.model[0].weight, first.model[0].weight)
    third = learner(3)
    third.load(tmp_path / "state.pt")
    assert torch.equal(third.model[0].weight, first.model[0].weight)


# What is kept of a callback


class Colour(enum.IntEnum):
    RED = 1


class Keeper(Callback):
    """Sets an attribute to a value in its first step."""

    def __init__(self, value: Any = None) -> None:
        self._given = (lambda: value,)
        self.value: Any = None

    transient = ("_given",)

    @on(StepEnd)
    def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.value = self._given[0]()


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize(
    "value",
    [
        True,
        3,
        2.5,
        float("inf"),
        2**200,
        complex(1, 2),
        "text",
        b"bytes",
        (1, (2, [3])),
        {"a": {"b": [1]}, 3: 4, (1, "x"): 5},
        {"__kept__": "mine"},
        {1, 2},
        frozenset({(1, 2)}),
        deque([1, 2], 5),
        OrderedDict(a=1),
        Counter("aab"),
        torch.float16,
        torch.device("cpu"),
        torch.Size([1, 2]),
        np.float64(1.5),
        np.float32(0.1),
        np.int64(3),
        np.bool_(True),
        np.str_("text"),
        Colour.RED,
        {"score": np.float64(2)},
        {np.int64(1): [np.float64(2)]},
    ],
    ids=repr,
)
def test_plain_data_comes_back_through_a_file(value: Any, tmp_path: Path) -> None:
    first = net(Keeper(value))
    first.fit(1)
    first.save(tmp_path / "state.pt")
    second = net(keeper := Keeper())
    second.load(tmp_path / "state.pt")
    assert keeper.value == value
    assert keeper.value is not None


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        np.array(3, dtype=np.int8),
        np.array([], dtype=np.float32),
        np.array(["a", "bc"]),
        np.array([True]),
    ],
    ids=repr,
)
def test_arrays_come_back_through_a_file(value: Any, tmp_path: Path) -> None:
    first = net(Keeper(value))
    first.fit(1)
    first.save(tmp_path / "state.pt")
    second = net(keeper := Keeper())
    second.load(tmp_path / "state.pt")
    assert keeper.value.dtype == value.dtype
    assert keeper.value.shape == value.shape
    assert (keeper.value == value).all()
    keeper.value[...] = keeper.value  # can be written to


class Ring:
    """An object of a user's, without a state of its own."""

    def __init__(self) -> None:
        self.items: list[float] = []
        self.count = 0


class InPlace(Callback):
    """Keeps things that change in place and are made before training."""

    def __init__(self) -> None:
        self.array = np.zeros(2)
        self.tensor = torch.zeros(2)
        self.data = torch.zeros(2)
        self.numpy_generator = np.random.default_rng(0)
        self.old_numpy_generator = np.random.RandomState(0)
        self.generator = torch.Generator().manual_seed(0)
        self.random = random.Random(0)
        self.counts: dict[str, list[int]] = defaultdict(list)
        self.numbers: list[float] = []

    @on(StepEnd)
    def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.array[0] += 1
        self.tensor += 1
        self.data.data.add_(1)
        self.counts["steps"].append(1)
        self.numbers.append(
            self.numpy_generator.random()
            + self.old_numpy_generator.rand()
            + torch.rand(1, generator=self.generator).item()
            + self.random.random()
        )


def test_what_changes_in_place_is_kept(tmp_path: Path) -> None:
    plain = net(a := InPlace())
    plain.fit(1)
    plain.save(tmp_path / "state.pt")
    again = net(b := InPlace())
    again.load(tmp_path / "state.pt")
    for learner in (plain, again):
        learner.fit(1)
    assert a.numbers == b.numbers
    assert a.array.tolist() == b.array.tolist() == [8, 0]
    assert a.tensor.tolist() == b.tensor.tolist() == a.data.tolist() == b.data.tolist() == [8, 8]
    assert a.counts == b.counts
    assert isinstance(b.counts, defaultdict)


def test_what_changes_in_place_resumes_exactly() -> None:
    assert_resumes_exactly(lambda: net(InPlace()), epochs=2, at=[2, 5, 8])


def test_an_object_of_plain_data_needs_no_state_of_its_own() -> None:
    class Holds(Callback):
        def __init__(self) -> None:
            self.ring = Ring()

        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.ring.count += 1
            self.ring.items.append(1.0)

    class Fills(Holds):
        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.ring.items.append(1.0)

    for kind in (Holds, Fills):
        assert_resumes_exactly(lambda kind=kind: net(kind()), epochs=1, at=[2, 5])


def test_a_ring_goes_back_with_the_learner_that_has_trained() -> None:
    class Holds(Callback):
        def __init__(self) -> None:
            self.ring = Ring()

        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.ring.count += 1
            self.ring.items.append(1.0)

    holds = Holds()
    learner = net(holds)
    begin = copy.deepcopy(learner.state_dict())
    learner.fit(1)
    steps = holds.ring.count
    after = copy.deepcopy(learner.state_dict())
    learner.load_state_dict(begin)
    assert (holds.ring.count, holds.ring.items) == (0, [])
    learner.load_state_dict(after)
    assert (holds.ring.count, holds.ring.items) == (steps, [1.0] * steps)


def test_a_parameter_that_an_optimizer_holds_stays_the_one_it_holds(tmp_path: Path) -> None:
    class Learns(Callback):
        def __init__(self) -> None:
            self.weight = nn.Parameter(torch.zeros(2))
            self.optimizer = torch.optim.SGD([self.weight], lr=0.1, momentum=0.9)

        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            with torch.enable_grad():
                ((self.weight - 1) ** 2).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    assert_resumes_exactly(lambda: net(Learns()), epochs=2, at=[3, 6])


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("when", ["init", "fit", "epoch"])
@pytest.mark.parametrize(
    "take",
    [
        pytest.param(lambda model: list(model.parameters()), id="list"),
        pytest.param(lambda model: tuple(p.data for p in model.parameters()), id="data"),
        pytest.param(lambda model: dict(model.named_parameters()), id="dict"),
        pytest.param(lambda model: next(model.parameters()), id="one"),
    ],
)
def test_a_callback_that_holds_the_models_parameters_still_does(take: Any, when: str) -> None:
    class Shrinks(UnsafeCallback):
        def __init__(self) -> None:
            self.held: Any = None

        def init(self, learner: Any) -> None:
            self.take("init", learner)

        @on(FitBegin)
        def fit(self, event: FitBegin, phase: Phase, learner: Any) -> None:
            self.take("fit", learner)

        @on(EpochBegin, AbstractTrainingPhase)
        def epoch(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
            self.take("epoch", learner)

        def take(self, now: str, learner: Any) -> None:
            if now == when:
                self.held = take(learner.model)

        @on(StepEnd, AbstractTrainingPhase)
        def shrink(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            held = self.held.values() if isinstance(self.held, dict) else self.held
            with torch.no_grad():
                for tensor in [held] if isinstance(held, Tensor) else held:
                    tensor.mul_(0.9)

    assert_resumes_exactly(lambda: net(Shrinks()), epochs=2, at=[2, 8])


def test_loading_writes_into_no_tensor_that_a_callback_only_looked_at() -> None:
    class Looks(Callback):
        reads = ("step.xs",)

        def __init__(self) -> None:
            self.last: Any = None

        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.last = learner.step.xs

    xs = torch.arange(8.0)[:, None]
    learner = net(Looks(), data=(TensorBatches(xs, xs, batch_size=4),))
    learner.fit(1)
    state = copy.deepcopy(learner.state_dict())
    learner.epoch(TrainingPhase(), data=[(xs[:4], xs[:4])])
    learner.load_state_dict(state)
    assert torch.equal(xs, torch.arange(8.0)[:, None])


def test_callbacks_that_know_each_other_or_contain_themselves_do_not_hang() -> None:
    @attrs.define
    class Helper:
        owner: Any

    @attrs.define
    class Owner(Callback):
        helper: Any = None
        count: int = 0

        def init(self, learner: Any) -> None:
            self.helper = Helper(self)

        @on(StepEnd, AbstractTrainingPhase)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.count += 1

    class Loop(Callback):
        def __init__(self) -> None:
            self.items: dict[str, Any] = {}
            self.items["self"] = self.items
            self.count = 0

        @on(StepEnd, AbstractTrainingPhase)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.count += 1

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* changed in training and cannot be saved")
        learner = net(Owner(), Loop())
        learner.fit(1)
        again = net(owner := Owner(), loop := Loop())
        again.load_state_dict(learner.state_dict())
    assert owner.count == loop.count == 2


def test_whatever_has_a_state_is_kept_also_inside_a_callback() -> None:
    class Scaler:
        """Stands for a gradient scaler, a scheduler, a metric: an object with the pair."""

        def __init__(self) -> None:
            self.scale = 2.0

        def state_dict(self) -> dict[str, Any]:
            return {"scale": self.scale}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.scale = state["scale"]

    class Scales(Callback):
        def __init__(self) -> None:
            self.scaler = Scaler()
            self.module = nn.Linear(1, 1)
            self.optimizer = torch.optim.Adam(self.module.parameters())

        @on(StepEnd)
        def step(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.scaler.scale *= 1.5
            with torch.enable_grad():
                self.module(torch.ones(1, 1)).sum().backward()
            self.optimizer.step()

    first = net(a := Scales())
    first.fit(2)
    second = net(b := Scales(), seed=99)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert b.scaler.scale == a.scaler.scale == 2.0 * 1.5**8
    assert torch.equal(a.module.weight, b.module.weight)
    assert b.optimizer.state[b.module.weight]["step"] == 8
    b.module(torch.ones(1, 1)).sum().backward()
    b.optimizer.step()
    assert not torch.equal(a.module.weight, b.module.weight)  # it steps the module that is there


def test_numbers_of_numpy_in_an_optimizer_and_a_metric_leave_files_that_can_be_read(tmp_path: Path) -> None:
    class Schedules(Callback):
        writes = ("optimizer",)

        @on(EpochBegin, AbstractTrainingPhase)
        def begin(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
            for group in learner.optimizer.param_groups:
                group["lr"] = np.float64(0.01) * np.cos(np.float64(0.1))

    def learner() -> Learner[Any]:
        metric = Metric(lambda preds, ys: torch.tensor(np.float64(preds.mean().item())), name="mean")
        return net(Recorder(), Metrics(metric), Schedules(), Checkpointer(tmp_path / "run"))

    plain = net(Recorder(), Schedules())
    plain.fit(2)
    for until in (1, 2):
        resumed = learner()
        resumed.fit(until, resume=tmp_path / "run")
    assert_same_bits(plain, resumed)


def test_a_modules_extra_state_that_no_file_can_hold_is_told_when_it_is_written(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def __init__(self, extra: Any) -> None:
            super().__init__(1, 1)
            self.extra = extra

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    learner = net(Checkpointer(tmp_path / "run"), model=Extra(Ring()))
    with pytest.raises(CheckpointError, match=r"_extra_state.*Ring"):
        learner.fit(2)
    plain = net(model=Extra({"a": [1, torch.ones(1)]}))
    plain.save(tmp_path / "state.pt")
    again = net(model=Extra(None))
    again.load(tmp_path / "state.pt")
    assert again.model.extra["a"][0] == 1


# The manifest


def test_the_manifest_of_a_big_learner_lists_every_path_that_anybody_writes() -> None:
    learner = net(
        Recorder(),
        Metrics(),
        Counting(),
        EMA("model", 0.9),
        KeepBestModel(),
        EarlyStopping(3),
        GradientClip(1.0),
        LRScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=1)),
        StochasticWeightAveraging(start=1),
    )
    learner.fit(2)
    manifest = learner.checkpoint_manifest()
    paths = {entry.path: entry for entry in manifest}
    assert {entry.kind for entry in manifest} <= {"persisted", "derived", "transient"}
    for node in learner.callbacks.graph.nodes:
        for path in node.access.writes:
            name = ".".join(path)
            assert any(name == known or known.startswith(f"{name}.") for known in paths), name
    for path in ("model", "optimizer", "cbstate.history", "cbstate.metrics", "callbacks.Counting", "streams", "seed"):
        assert paths[path].kind == "persisted"
        assert paths[path].size > 0
    assert paths["model"].owner == "learner"
    assert "Recorder" in paths["cbstate.history"].owner
    expected = sum(t.numel() * t.element_size() for t in learner.model.state_dict().values())
    assert expected <= paths["model"].size < expected + 2000
    text = repr(manifest).splitlines()
    assert text[0].split() == ["path", "owner", "kind", "bytes"]
    assert len(text) == len(manifest) + 2  # a head, and the size of the file
    assert len({line.index(entry.kind) for line, entry in zip(text[1:-1], manifest, strict=True) if entry.kind}) == 1


def test_the_manifest_says_what_is_not_kept_and_what_is_transient() -> None:
    class Writer(Callback):
        writes = ("data", "accelerator")
        transient = ("accelerator",)

        @on(EpochEnd)
        def end(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
            pass

    kinds = {entry.path: entry.kind for entry in net(Writer()).checkpoint_manifest() if entry.owner == "Writer"}
    assert kinds["data"] == "not kept"
    assert kinds["accelerator"] == "transient"


@pytest.mark.slow
def test_a_run_with_everything_resumes_exactly() -> None:
    def everything() -> Learner[Any]:
        return net(
            Recorder(),
            Metrics(),
            EMA("model", 0.9),
            KeepBestModel(),
            EarlyStopping(5),
            GradientClip(1.0),
            LRScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=1)),
            Counting(),
        )

    assert_resumes_exactly(everything, epochs=3, at=[1, 3, 5, 8, 12])


def test_values_of_metrics_are_kept_in_the_history() -> None:
    first = net(Recorder(), Metrics(Metric(lambda preds, ys: (preds - ys).abs().mean(), name="distance")))
    first.fit(2)
    second = net(Recorder(), Metrics(Metric(lambda preds, ys: (preds - ys).abs().mean(), name="distance")))
    second.load_state_dict(first.state_dict())
    assert second.history["validation/distance"] == first.history["validation/distance"]


# Checks of the older systems


def test_the_first_checkpoint_gives_other_predictions_than_the_last(tmp_path: Path) -> None:
    learner = net(Checkpointer(tmp_path, keep_last=None))
    learner.fit(5)
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == 5
    xs = torch.rand(4, 1)
    first, last = net(Checkpointer(tmp_path / "a"), seed=99), net(Checkpointer(tmp_path / "b"), seed=99)
    first.load(files[0])
    last.load(files[-1])
    assert torch.equal(last.predict(xs), learner.predict(xs))
    assert not torch.equal(first.predict(xs), learner.predict(xs))


def test_a_toy_learner_can_be_copied_and_the_copy_saved(tmp_path: Path) -> None:
    learner = toy_learner(Recorder(), num_batches=2)
    learner.fit(1)
    other = copy.deepcopy(learner)
    other.save(tmp_path / "copy.pt")
    other.fit(1)
    learner.fit(1)
    assert_same_bits(learner, other)


# Weights of which none fits


def file_of(module: nn.Module, folder: Path, rename: Callable[[str], str] = str) -> Path:
    torch.save({rename(name): tensor for name, tensor in module.state_dict().items()}, folder / "weights.pt")
    return folder / "weights.pt"


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_which_none_fits_are_refused_with_the_names_of_both(tmp_path: Path, strict: bool) -> None:
    learner = Learner(nn.Sequential(nn.Linear(2, 3)), default_callbacks=False)
    before = learner.model[0].weight.detach().clone()
    path = file_of(nn.Conv2d(1, 1, 1), tmp_path, lambda name: f"stem.{name}")
    with pytest.raises(CheckpointError, match=r"(?s)0\.weight.*stem\.weight"):
        learner.load_weights(path, strict=strict)
    assert torch.equal(learner.model[0].weight, before)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod."])
def test_names_that_differ_by_a_prefix_alone_are_told_with_what_to_type(tmp_path: Path, prefix: str) -> None:
    learner = Learner(nn.Sequential(nn.Linear(2, 3)), default_callbacks=False)
    path = file_of(nn.Sequential(nn.Linear(2, 3)), tmp_path, lambda name: f"{prefix}{name}")
    with pytest.raises(CheckpointError, match=rf"begin with '{prefix}'.*\n.*n.removeprefix\('{prefix}'\)"):
        learner.load_weights(path, strict=False)
    torch.save({n.removeprefix(prefix): t for n, t in torch.load(path).items()}, path)  # as it says
    assert learner.load_weights(path) == []


def test_weights_of_a_part_are_told_to_be_given_to_the_part(tmp_path: Path) -> None:
    part = nn.Linear(2, 3)
    learner = Learner(nn.Sequential(nn.ReLU(), nn.Linear(2, 3)), default_callbacks=False)
    path = file_of(part, tmp_path)
    with pytest.raises(CheckpointError, match=r"those of a part: learner.load_weights\(path, '1'\)"):
        learner.load_weights(path, strict=False)
    assert learner.load_weights(path, "1") == []
    assert torch.equal(learner.model[1].weight, part.weight)


def test_weights_of_which_some_fit_are_taken_and_the_rest_is_told(tmp_path: Path) -> None:
    learner = Learner(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), default_callbacks=False)
    path = file_of(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 9)), tmp_path)
    assert learner.load_weights(path, strict=False) == ["1.bias", "1.weight"]


def test_the_manifest_says_how_large_the_file_is(tmp_path: Path) -> None:
    learner = net(Recorder(), Metrics())
    learner.fit(1)
    learner.save(tmp_path / "state.pt")
    size = (tmp_path / "state.pt").stat().st_size
    manifest = learner.checkpoint_manifest()
    assert abs(manifest.file_size - size) < 0.02 * size  # names of files are in it
    assert repr(manifest).endswith(f"a file of {manifest.file_size:,} bytes")


@pytest.mark.slow
def test_a_file_of_many_steps_is_little_more_than_the_numbers_that_were_recorded(tmp_path: Path) -> None:
    steps = 2000
    learner = Learner(
        nn.Linear(1, 1),
        nn.functional.mse_loss,
        data=(TensorBatches(torch.rand(steps, 1), torch.rand(steps, 1), batch_size=1),),
        callbacks=[
            Traces({"loss": lambda learner: learner.step.loss}),
            Scheduler({LearningRate: one_cycle(steps, 0.01)}),
            Recorder(),
        ],
        default_callbacks=False,
    )
    learner.save(tmp_path / "before.pt")
    learner.fit(1)
    learner.save(tmp_path / "after.pt")
    before, after = ((tmp_path / name).stat().st_size for name in ("before.pt", "after.pt"))
    assert after - before < 1.2 * steps * (8 + 4 + 8 + 8)  # two numbers of steps, a loss, a rate
