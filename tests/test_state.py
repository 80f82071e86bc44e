from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    Counts,
    FittingPhase,
    FluxloopError,
    Learner,
    MissingEntryError,
    Phase,
    PhaseError,
    Recorder,
    StepEnd,
    TrainingPhase,
    UpdateBegin,
    ValidationPhase,
    on,
)
from fluxloop.state import Container, Gradients, PhaseDict, SharedState, State, StepState
from fluxloop.testing import Coefficient, toy_learner


class MyPhase(TrainingPhase):
    """A subclass, which has entries of its own."""


# Containers of named entries


def test_any_attribute_may_be_stored_and_read_from_then_on() -> None:
    state = State()
    state.preds = 1
    state.preds = 2
    assert state.preds == state["preds"] == 2


def test_it_starts_with_the_entries_it_is_given() -> None:
    state = State({"xs": 1, "ys": 2})
    assert (state.xs, state.ys) == (1, 2)


def test_in_tells_whether_an_entry_is_there() -> None:
    state = State({"xs": None})
    assert "xs" in state
    assert "ys" not in state
    assert hasattr(state, "xs")
    assert not hasattr(state, "ys")


def test_vars_gives_all_entries_and_iterating_their_names() -> None:
    state = State({"xs": 1})
    state.loss = 2
    assert vars(state) == {"xs": 1, "loss": 2}
    assert list(state) == ["xs", "loss"]


def test_an_entry_can_be_deleted() -> None:
    state = State({"xs": 1})
    del state.xs
    assert "xs" not in state


def test_an_entry_may_have_the_name_of_a_method_of_a_dict() -> None:
    state = StepState({"values": 1, "items": 2, "get": 3})
    assert (state.values, state.items, state.get) == (1, 2, 3)


@pytest.mark.parametrize("read", [lambda s: s.los, lambda s: s["los"], lambda s: getattr(s, "los")])  # noqa: B009
def test_a_missing_entry_is_an_error_that_lists_what_there_is_and_suggests(read: Any) -> None:
    with pytest.raises(MissingEntryError, match=r"has no entry 'los'; it has: loss, xs; did you mean 'loss'\?"):
        read(State({"xs": 1, "loss": 2}))


def test_a_missing_entry_of_an_empty_state_says_that_there_is_nothing() -> None:
    with pytest.raises(MissingEntryError, match="it has: nothing"):
        _ = State().loss


def test_a_missing_entry_is_an_attribute_error_and_one_of_fluxloop_s() -> None:
    assert issubclass(MissingEntryError, AttributeError)
    assert issubclass(MissingEntryError, FluxloopError)
    assert getattr(State(), "loss", 7) == 7


def test_the_message_says_how_a_phase_stores_an_entry() -> None:
    with pytest.raises(MissingEntryError, match=r"The step has no entry.*'state\.NAME = \.\.\.' or runstep\(learner"):
        _ = StepState().loss


def test_the_message_says_how_a_callback_publishes_an_entry() -> None:
    with pytest.raises(MissingEntryError, match=r"cbstate has no entry.*writes = \('cbstate\.NAME',\)"):
        _ = SharedState().history


def test_it_shows_the_names_of_its_entries_and_not_their_values() -> None:
    assert repr(StepState({"xs": torch.zeros(1000), "loss": 1})) == "StepState(xs, loss)"
    assert repr(SharedState()) == "SharedState()"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_state_can_be_copied_and_pickled(duplicate: Any) -> None:
    state = StepState({"xs": torch.ones(2), "names": ["a"]})
    twin = duplicate(state)
    assert type(twin) is StepState
    assert list(twin) == ["xs", "names"]
    assert torch.equal(twin.xs, state.xs)
    twin.loss = 1
    assert "loss" not in state


def test_states_are_containers_that_a_reader_gets_read_only() -> None:
    kinds = (State, StepState, SharedState, PhaseDict, Gradients, Counts)
    assert all(issubclass(kind, Container) for kind in kinds)


# What is kept per phase


def test_an_entry_is_found_by_the_phase_s_class_and_by_an_instance() -> None:
    counts: PhaseDict[Counts] = PhaseDict(Counts)
    counts[TrainingPhase].epochs = 3
    assert counts[TrainingPhase()].epochs == 3
    assert counts[TrainingPhase()] is counts[TrainingPhase]


def test_an_instance_sets_and_deletes_as_its_class_does() -> None:
    notes: PhaseDict[str] = PhaseDict(str)
    notes[TrainingPhase()] = "hello"
    assert notes[TrainingPhase] == "hello"
    assert TrainingPhase() in notes
    del notes[TrainingPhase()]
    assert TrainingPhase not in notes


def test_a_phase_without_an_entry_gets_the_default() -> None:
    lists: PhaseDict[list[int]] = PhaseDict(list)
    assert ValidationPhase not in lists
    lists[ValidationPhase].append(1)
    assert lists[ValidationPhase] == [1]
    assert lists[TrainingPhase] == []


def test_phases_of_one_class_with_names_have_entries_of_their_own() -> None:
    counts: PhaseDict[int] = PhaseDict(int)
    noisy, plain = ValidationPhase(name="noisy"), ValidationPhase()
    counts[noisy] = 1
    assert counts[ValidationPhase] == 1
    counts[plain] = 2
    assert (counts[noisy], counts[plain], counts[ValidationPhase]) == (1, 2, 2)
    listed, by_class = list(counts)
    assert (listed.name, listed.data_key, listed.gradients, by_class) == ("noisy", "validation", False, ValidationPhase)
    assert counts[listed] == 1
    del counts[listed]
    assert list(counts) == [ValidationPhase]


def test_setting_by_class_does_not_replace_the_entry_of_a_phase_with_a_name() -> None:
    counts: PhaseDict[int] = PhaseDict(int)
    counts[ValidationPhase(name="noisy")] = 1
    counts[ValidationPhase] = 2
    assert list(counts.values()) == [1, 2]


def test_a_subclass_has_an_entry_of_its_own() -> None:
    counts: PhaseDict[Counts] = PhaseDict(Counts)
    counts[TrainingPhase].steps = 5
    assert counts[MyPhase].steps == 0


def test_it_is_a_mapping_keyed_by_classes_in_order_of_arrival() -> None:
    numbers: PhaseDict[int] = PhaseDict(int)
    numbers[MyPhase()] = 1
    numbers[TrainingPhase] = 2
    assert isinstance(numbers, MutableMapping)
    assert list(numbers) == [MyPhase, TrainingPhase]
    assert dict(numbers) == {MyPhase: 1, TrainingPhase: 2}
    assert list(numbers.values()) == [1, 2]
    assert len(numbers) == 2
    assert numbers.pop(MyPhase) == 1
    assert list(numbers) == [TrainingPhase]
    assert repr(numbers) == "{TrainingPhase: 2}"


def test_looking_with_in_makes_no_entry() -> None:
    counts: PhaseDict[Counts] = PhaseDict(Counts)
    assert TrainingPhase not in counts
    assert len(counts) == 0


@pytest.mark.parametrize("key", ["training", "TrainingPhase", 3, None, int, StepEnd, StepEnd()])
def test_a_key_that_is_no_phase_is_an_error_that_shows_one(key: Any) -> None:
    counts: PhaseDict[Counts] = PhaseDict(Counts)
    for use in (
        lambda: counts[key],
        lambda: counts.__setitem__(key, Counts()),
        lambda: counts.__delitem__(key),
        lambda: key in counts,
    ):
        with pytest.raises(PhaseError, match=r"was used as a key; expected a phase or its class, e\.g\. \[Training"):
            use()
    assert len(counts) == 0


def test_a_phase_dict_can_be_copied_and_pickled() -> None:
    counts: PhaseDict[Counts] = PhaseDict(Counts)
    counts[TrainingPhase].steps = 2
    for twin in (copy.deepcopy(counts), pickle.loads(pickle.dumps(counts))):
        assert twin[TrainingPhase].steps == 2
        twin[TrainingPhase].steps = 9
        assert counts[TrainingPhase].steps == 2
        assert twin[ValidationPhase] == Counts()


PHASES: list[type[Phase]] = [TrainingPhase, ValidationPhase, MyPhase, FittingPhase, AbstractTrainingPhase]


@settings(deadline=None, max_examples=40)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["set", "get", "delete"]), st.sampled_from(PHASES), st.booleans(), st.integers(0, 9)),
        max_size=20,
    )
)
def test_a_phase_dict_behaves_as_a_dict_of_classes_with_a_default(operations: list[Any]) -> None:
    ours: PhaseDict[int] = PhaseDict(int)
    plain: dict[type, int] = {}
    for operation, cls, by_instance, number in operations:
        key = cls() if by_instance else cls
        if operation == "set":
            ours[key] = plain[cls] = number
        elif operation == "get":
            assert ours[key] == plain.setdefault(cls, 0)
        elif cls in plain:
            del ours[key]
            del plain[cls]
        assert (key in ours) == (cls in plain)
    assert dict(ours) == plain


# Gradients


def test_gradients_are_read_when_asked_for() -> None:
    model = Coefficient(2.0)
    gradients = Gradients(model.named_parameters())
    assert gradients["value"] is None
    (model(torch.ones(3, 1)).sum()).backward()
    assert gradients["value"] is model.value.grad
    model.value.grad = None
    assert gradients["value"] is None


def test_assigning_a_gradient_replaces_it_for_the_update() -> None:
    model = torch.nn.Linear(2, 1)
    gradients = Gradients(model.named_parameters())
    gradients["weight"] = torch.full((1, 2), 5.0)
    assert torch.equal(model.weight.grad, torch.full((1, 2), 5.0))
    gradients["weight"] = None
    assert model.weight.grad is None


def test_gradients_are_a_mapping_of_parameter_names() -> None:
    gradients = Gradients(torch.nn.Linear(2, 1).named_parameters())
    assert isinstance(gradients, Mapping)
    assert list(gradients) == ["weight", "bias"]
    assert len(gradients) == 2
    assert "weight" in gradients
    assert "other" not in gradients
    assert repr(gradients) == "Gradients(weight, bias)"
    with pytest.raises(KeyError, match="other"):
        _ = gradients["other"]


def test_the_gradients_of_a_step_are_those_of_a_hand_written_one_and_still_there_at_its_end() -> None:
    seen: list[torch.Tensor] = []

    class Look(Callback):
        reads = ("step.grads",)

        @on(StepEnd, AbstractTrainingPhase)
        def look(self, event: Any, phase: Any, learner: Any) -> None:
            seen.append(learner.step.grads["value"].clone())

    learner = toy_learner(Look(), num_batches=3)
    xs, ys = learner.data.training.data
    learner.fit(1, phases=[TrainingPhase()])

    model = Coefficient()
    for index in range(3):
        rows = slice(8 * index, 8 * index + 8)
        model.value.grad = None
        torch.nn.functional.l1_loss(model(xs[rows]), ys[rows]).backward()
        assert torch.equal(seen[index], model.value.grad)
        with torch.no_grad():
            model.value -= 0.001 * model.value.grad
    assert torch.equal(learner.model.value, model.value)


def test_a_callback_that_writes_the_gradients_changes_the_update() -> None:
    class Double(Callback):
        writes = ("step.grads",)

        @on(UpdateBegin)
        def double(self, event: Any, phase: Any, learner: Any) -> None:
            learner.step.grads["value"] = 2 * learner.step.grads["value"]

    doubled = toy_learner(Double(), num_batches=1)
    faster = toy_learner(num_batches=1, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.002))
    for learner in (doubled, faster):
        learner.fit(1, phases=[TrainingPhase()])
    assert torch.equal(doubled.model.value, faster.model.value)


def test_the_gradients_of_named_models_have_the_models_names_in_front() -> None:
    models = {"G": torch.nn.Linear(1, 1), "D": torch.nn.Linear(1, 1, bias=False)}
    learner = Learner(models, default_callbacks=False)
    assert list(learner.updates.gradients) == ["G.weight", "G.bias", "D.weight"]


# In a learner


def test_the_step_stays_readable_after_the_step() -> None:
    learner = toy_learner(num_batches=2)
    learner.fit(1, phases=[TrainingPhase()])
    assert set(learner.step) == {"xs", "ys", "preds", "loss", "grads"}
    assert torch.equal(learner.step.xs, learner.data.training.data[0][8:16])


def test_each_step_has_a_state_of_its_own() -> None:
    steps: list[Any] = []

    class Keep(Callback):
        writes = ("step",)

        @on(StepEnd)
        def keep(self, event: Any, phase: Any, learner: Any) -> None:
            assert "mark" not in learner.step
            learner.step.mark = 1
            steps.append(learner.step)

    toy_learner(Keep(), num_batches=3).fit(1)
    assert len({id(step) for step in steps}) == 6


def test_reading_the_history_of_a_phase_creates_no_entry() -> None:
    learner = toy_learner(Recorder())
    learner.fit(1, phases=[TrainingPhase()])
    assert learner.history[ValidationPhase] == Counts()
    assert learner.history[MyPhase].steps == 0
    assert list(learner.cbstate.history) == [TrainingPhase]
    assert "ValidationPhase" not in repr(learner.history)


class Output(OrderedDict[str, Tensor]):
    """What a model of another library gives: a dict that refuses update()."""

    def update(self, *args: object, **kwargs: object) -> None:
        raise TypeError("You cannot use update")


class Closed(dict[str, Tensor]):
    def __init__(self, xs: Tensor) -> None:
        dict.__init__(self, xs=xs)

    def __setitem__(self, key: str, value: Tensor) -> None:
        raise TypeError("closed")

    def __reduce__(self) -> str:
        raise TypeError("closed")


def test_a_step_lets_go_of_the_graphs_in_a_models_output() -> None:
    made = torch.ones(2, requires_grad=True) * 2
    state = StepState({"out": Output(logits=made), "closed": Closed(made)})
    state.drop_graphs()
    assert type(state.out) is Output
    assert state.out["logits"].grad_fn is None
    assert type(state.closed) is Closed


def test_a_suggestion_in_front_of_advice_ends_with_its_question_mark_alone() -> None:
    with pytest.raises(MissingEntryError, match=r"did you mean 'preds'\? A phase stores an entry") as caught:
        _ = StepState({"preds": 1}).pred
    assert caught.value.name == "pred"
