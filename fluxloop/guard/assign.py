"""Assignments to a learner or a callback: they take effect, or are refused with what to type."""

from __future__ import annotations

from typing import Any, TypeVar

from attrs import setters

from fluxloop.errors import AssignmentError, did_you_mean
from fluxloop.guard.given import as_plain, as_python, is_number

put = object.__setattr__
"""Set an attribute of a learner from inside, past the checks for its users: quickly."""

_AROUND = "for another stage of training make a learner around the same modules: Learner(learner.model, ...)"

_MODEL = (
    "the optimizers hold the parameters of the model that it has. Put a new part into that (learner.model.head = ...) "
    "and the part's parameters into an optimizer (learner.optimizer.add_param_group), take weights from a file "
    f"(learner.load_weights(path)), or, {_AROUND}"
)

FIXED = {
    "model": _MODEL,
    "models": _MODEL,
    "optimizer": "gradients, schedules, counts and checkpoints belong to the one that it has. Change an option of that "
    "(set_hyperparameter(learner, LearningRate, 0.1)), add parameters to it (learner.optimizer.add_param_group), or, "
    f"{_AROUND}",
    "accelerator": "models, optimizers and random streams were made for the one that it has; give another to a new "
    "learner: Learner(..., accelerator=Accelerator('cpu'))",
    "callbacks": "their order has to be proved first; type learner.set_callbacks([...]), add_callback, "
    "replace_callback or remove_callback",
    "seed": "the random numbers of the run follow from the one that it has; give another to a new learner: "
    "Learner(..., seed=1)",
    "params": "they are those of the models; change their values in place, in torch.no_grad(): parameter.copy_(...)",
    "weights": "it finds modules by name; give one of them new values: learner.weights['G'].load_state_dict(...)",
    "history": "callbacks record into the one that it has; a new learner begins with an empty one",
    "cbstate": "callbacks share the one that it has; set an entry of it: learner.cbstate.name = value",
    "batch_size": "it is the number of rows of the running step; give data with batches of another size: "
    "TensorBatches(xs, ys, batch_size=64)",
}
"""What of a learner cannot be replaced, and what to do instead."""


def check_known(learner: object, name: str, value: object) -> None:
    """Raise for an attribute of a learner that does not exist, or that cannot be replaced.

    Args:
        learner: A learner that has been made.
        name: The attribute's name, without an underscore in front.
        value: What was assigned to it.

    Raises:
        AssignmentError: Says what to type instead.
    """
    if name in FIXED:
        if value is not getattr(learner, name):  # as `learner.model = learner.model.train()` is, which changes nothing
            raise AssignmentError(f"learner.{name} was assigned, which has no effect: {FIXED[name]}")
    elif not hasattr(learner, name):
        known = [known for known in dir(learner) if not known.startswith("_")]
        raise AssignmentError(
            f"learner.{name} was assigned, and a learner has no attribute {name!r}{did_you_mean(name, known)}\n"
            f"  to keep something of your own there, begin its name with an underscore (learner._{name} = ...), or "
            "write a subclass of Learner"
        )


_DECLARED = ("name", "reads", "writes", "run_after", "draws", "in_compiled_step")
"""What a learner looks at when it takes a callback."""


def set_option(callback: Any, name: str, value: Any) -> None:
    """Set a public attribute of one of fluxloop's callbacks: an option takes effect, or is refused.

    An option is checked as it was when the callback was made, and what follows from it is computed anew.

    Raises:
        AssignmentError: There is no such attribute, or it has no effect once a learner has the callback.
        Exception: What the callback's class raises for a wrong value; the old one stays.
    """
    adopted, kind = callback._adopted, type(callback).__name__
    if adopted and name in (*_DECLARED, *callback._fixed):
        raise AssignmentError(
            f"{name} of {kind} was assigned, which has no effect once a learner has the callback; put another in its "
            f"place: learner.replace_callback({kind}(..., {name}=...))"
        )
    option = callback._options.get(name)
    if option is None:
        known = callback._options or (vars(callback) if adopted else ())  # others begin without attributes
        there = hasattr(type(callback), name) or name in vars(callback)
        if known and not there and type(callback) is callback._built_in:
            names = ", ".join(each for each in known if each[0] != "_")
            raise AssignmentError(
                f"{name} of {kind} was assigned, and it has no attribute {name!r}{did_you_mean(name, known)}\n"
                f"  its options are {names}; to keep something of your own there, write a subclass"
            )
        put(callback, name, value)
        return
    if not adopted:  # checked when a learner takes it
        put(callback, name, value)
        return
    # What validates one option is run first, and then what looks at several: that needs the new value in its place
    value = setters.validate(callback, option, setters.convert(callback, option, as_plain(value)))
    value = as_python(value) if is_number(value) else value
    old = getattr(callback, name)
    put(callback, name, value)
    try:
        derive(callback)
    except BaseException:
        put(callback, name, old)
        derive(callback)
        raise


def derive(callback: Any) -> None:
    """Compute anew what follows from the options of one of fluxloop's callbacks; raise for options that are wrong."""
    again = getattr(callback._built_in, "__attrs_post_init__", None)
    if again is not None:
        again(callback)


def adopt(callback: Any) -> None:
    """Check and derive what was assigned to a callback before a learner takes it.

    Raises:
        Exception: What the callback's class raises for a wrong value.
    """
    if callback._adopted:
        return
    for name, option in callback._options.items():
        given = setters.convert(callback, option, as_plain(getattr(callback, name)))
        value = setters.validate(callback, option, given)
        put(callback, name, as_python(value) if is_number(value) else value)
    derive(callback)


class FieldsOfTheClass:
    """The fields that attrs notes in a class, which an instance does not show: it is a thing, not a record.

    Configuration libraries (omegaconf, and hydra with it) ask an object for them, and copy one that has them into a
    dict of theirs, where a callback, a schedule or a logger's backend is lost.
    """

    def __init__(self, fields: Any) -> None:
        self.fields = fields

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self.fields
        raise AttributeError(f"{owner.__name__} has fields, by attrs.fields({owner.__name__}); none of its instances")


T = TypeVar("T", bound=type)


def fields_of_the_class(cls: T) -> T:
    """Have a class that attrs has made show its fields, and its instances not."""
    name = "__attrs_attrs__"
    if name in vars(cls) and not isinstance(vars(cls)[name], FieldsOfTheClass):
        setattr(cls, name, FieldsOfTheClass(getattr(cls, name)))
    return cls
