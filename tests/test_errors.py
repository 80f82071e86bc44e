from __future__ import annotations

import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch

import fluxloop
from fluxloop import errors
from fluxloop.errors import (
    CancelEpochException,
    CancelFittingException,
    CancelSignal,
    CancelStepException,
    FluxloopError,
    StateAccessError,
    annotate,
    counted,
    describe,
    did_you_mean,
    sentence,
)

TREE = {
    "ModelError": (FluxloopError, TypeError),
    "OptimizerError": (FluxloopError, ValueError),
    "LossError": (FluxloopError, ValueError),
    "DataError": (FluxloopError, ValueError),
    "BatchError": (errors.DataError, ValueError),
    "PhaseError": (FluxloopError, TypeError),
    "MetricError": (FluxloopError, ValueError),
    "SanityCheckError": (FluxloopError, ValueError),
    "CheckpointError": (FluxloopError, ValueError),
    "CompileError": (FluxloopError, RuntimeError),
    "LogExistsError": (FluxloopError, FileExistsError),
    "ProcessError": (FluxloopError, RuntimeError),
    "ReentrantFitError": (FluxloopError, RuntimeError),
    "AssignmentError": (FluxloopError, AttributeError),
    "MissingEntryError": (FluxloopError, AttributeError),
    "StateAccessError": (FluxloopError, Exception),
    "CallbackError": (FluxloopError, Exception),
    "CallbackTypeError": (errors.CallbackError, TypeError),
    "HandlerError": (errors.CallbackError, TypeError),
    "AmbiguousHandlerError": (errors.CallbackError, Exception),
    "DuplicateCallbackError": (errors.CallbackError, ValueError),
    "CallbackConflictError": (errors.CallbackError, Exception),
    "CallbackCycleError": (errors.CallbackError, Exception),
    "MissingProducerError": (errors.CallbackError, Exception),
}


def error_classes() -> dict[str, type[BaseException]]:
    return {
        name: cls
        for name, cls in vars(errors).items()
        if inspect.isclass(cls) and issubclass(cls, BaseException) and cls.__module__ == errors.__name__
    }


@pytest.mark.parametrize("name", TREE)
def test_an_error_is_caught_by_its_own_base_and_by_the_builtin_one_a_caller_expects(name):
    cls = getattr(errors, name)
    assert issubclass(cls, TREE[name])
    assert not issubclass(cls, CancelSignal)


def test_the_tree_of_errors_and_signals_is_complete_and_at_the_top_of_the_package():
    signals = {"CancelSignal", "CancelStepException", "CancelEpochException", "CancelFittingException"}
    assert set(error_classes()) == {"FluxloopError", *TREE, *signals}
    for name, cls in error_classes().items():
        assert getattr(fluxloop, name) is cls
        assert name in (errors.__doc__ or "") or name == "FluxloopError"
        assert cls.__doc__


def test_signals_are_no_errors_and_carry_their_reason():
    for cls in (CancelStepException, CancelEpochException, CancelFittingException):
        signal = cls("low loss reached")
        assert signal.reason == str(signal) == "low loss reached"
        assert cls().reason == ""
        assert issubclass(cls, CancelSignal)
        assert not issubclass(cls, FluxloopError)
    assert not issubclass(CancelEpochException, CancelFittingException)


def test_a_state_access_error_names_the_callback_the_path_the_event_and_the_line_to_add():
    error = StateAccessError("Hook", "step.loss", "read", (("model",), ("cbstate.x",)))
    error.event = "StepEnd"
    text = str(error)
    assert "Hook tried to read 'step.loss' at StepEnd" in text
    assert "reads = ('model',), writes = ('cbstate.x',)" in text
    assert "write in the class: reads = ('model', 'step.loss')" in text
    error = StateAccessError("Hook", "step.loss", "write", ((), ()))
    assert "write in the class: writes = ('step.loss',)" in str(error)
    assert " at " not in str(error).splitlines()[0]


@pytest.mark.parametrize("error", [errors.DataError("no data"), CancelFittingException("enough")], ids=repr)
def test_errors_and_signals_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)


def test_a_state_access_error_survives_pickling():
    error = StateAccessError("Hook", "step.loss", "read", (("model",), ()))
    error.event = "StepEnd"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_annotate_adds_notes_in_order_and_keeps_the_exception_what_it_is():
    error = KeyError("x")
    annotate(error, "first")
    annotate(error, "second")
    assert error.__notes__ == ["first", "second"]
    assert type(error) is KeyError
    assert error.args == ("x",)


def test_annotate_works_where_exceptions_have_no_add_note():
    class Old(Exception):  # noqa: N818
        def __getattribute__(self, name: str) -> object:
            if name == "add_note":
                raise AttributeError(name)
            return super().__getattribute__(name)

    error = Old()
    annotate(error, "first")
    annotate(error, "second")
    assert error.__notes__ == ["first", "second"]


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("StepBegn", ["StepBegin", "StepEnd"], "; did you mean 'StepBegin'?"),
        ("validaton", {"training": 1, "validation": 2}, "; did you mean 'validation'?"),
        ("banana", ["StepBegin", "StepEnd"], ""),
        ("StepBegin", [], ""),
        ("", ["StepBegin"], ""),
    ],
)
def test_did_you_mean_names_a_near_miss_and_nothing_else(word, known, expected):
    assert did_you_mean(word, known) == expected


class Halves(list[int]):
    def __len__(self):
        return 0.5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(2, 3), "a Tensor of shape (2, 3)"),
        (np.zeros((2, 3)), "a ndarray of shape (2, 3)"),
        ([1, 2], "a list of length 2"),
        ((), "a tuple of length 0"),
        ({"a": 1}, "a dict of length 1"),
        (None, "None"),
        ("text", "'text'"),
        (3, "3"),
        (True, "True"),
        (torch.nn.Linear, "the class Linear"),
        (torch.nn.Linear(1, 1), "a Linear"),
        (object(), "a object"),
        (Halves([1]), "a Halves"),
    ],
)
def test_describe_says_what_a_value_is(value, expected):
    assert describe(value) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("index out of bounds", "index out of bounds."),
        (IndexError("index out of bounds."), "index out of bounds."),
        ("no entry 'pred'; did you mean 'preds'?", "no entry 'pred'; did you mean 'preds'?"),
        ("stop!\n", "stop!"),
    ],
)
def test_what_another_sentence_follows_ends_with_one_mark(said, expected):
    assert sentence(said) == expected


def test_one_of_something_is_in_the_singular():
    assert [counted(count, "step") for count in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


def test_a_process_that_is_muted_does_not_warn() -> None:
    try:
        errors.mute_warnings(True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            errors.warn_user("said by the first process")
    finally:
        errors.mute_warnings(False)
    with pytest.warns(UserWarning, match="said again"):
        errors.warn_user("said again")
