from __future__ import annotations

import copy
import io
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Counting, Net, net, unchanged
from torch import Tensor, nn

from fluxloop import (
    EMA,
    Callback,
    CSVLogger,
    FitBegin,
    Learner,
    Metric,
    Metrics,
    Phase,
    ProgressBar,
    Recorder,
    StepEnd,
    TrainingPhase,
    UnsafeCallback,
    on,
)
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.early_stopping import EarlyStopping
from fluxloop.callbacks.gradient_clip import GradientClip
from fluxloop.callbacks.keep_best import KeepBestModel
from fluxloop.callbacks.lr_scheduler import LRScheduler
from fluxloop.errors import CheckpointError
from fluxloop.testing import assert_resumes_exactly, assert_same_bits, bits, toy_learner

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
    with pytest.raises(CheckpointError, match="the loss function is a module in only one of the two"):
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
    state = renamed(first.state_dict(), "nets.Counting", "elsewhere.Counting")
    with pytest.raises(CheckpointError, match=r"callback 'Counting' was a elsewhere\.Counting and is a nets\.Counting"):
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
