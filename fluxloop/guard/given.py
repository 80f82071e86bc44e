"""Checks of arguments: what was given, and what was expected, before anything is done with it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fluxloop.errors import CallbackError, describe


def is_number(value: object, *, whole: bool = False) -> bool:
    """Return whether a value is a number, perhaps a whole one, of Python or of NumPy; True and False are none.

    A `Fraction` is none either: torch would refuse it, in the middle of a step.
    """
    if isinstance(value, (int, float)):
        return not isinstance(value, bool) and (not whole or isinstance(value, int))
    kind: Any = Integral if whole else Real  # NumPy's numbers are these too, and most are no int or float
    return isinstance(value, kind) and _is_numpys(value)


def _is_numpys(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "numpy"


def as_python(value: Any) -> Any:
    """Return NumPy's numbers as Python's, in a list or tuple too.

    Every version of torch reads and compiles these, and they neither wrap nor round as NumPy's small ones do.
    """
    if type(value) is float:  # the usual one, and schedules are asked at every step
        return value
    if _is_numpys(value) and getattr(value, "shape", None) == ():
        held = value.item()
        return float(held) if isinstance(held, Real) and _is_numpys(held) else held  # np.longdouble stays one
    if type(value) in (list, tuple):
        return type(value)(map(as_python, value))
    return value


def as_plain(value: Any) -> Any:
    """Return the lists and dicts of a configuration as Python's own; anything else as it is.

    Hydra gives what it instantiates omegaconf's lists and dicts, which are neither `list` nor `dict`, unless the
    configuration says ``_convert_: all``.
    """
    if type(value).__module__.partition(".")[0] != "omegaconf":
        return value
    if isinstance(value, Mapping):
        return {key: as_plain(each) for key, each in value.items()}
    return [as_plain(each) for each in value] if isinstance(value, Sequence) else value


def as_pair(value: Any) -> Any:
    """Return a list of two as a tuple, as configurations know no tuples; anything else as it is, to be checked."""
    held = as_plain(value)
    return tuple(held) if isinstance(held, list) and len(held) == 2 else held


def check_number(
    whose: str,
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    whole: bool = False,
    error: type[Exception] = ValueError,
) -> None:
    """Raise for something that is no finite number, or none in a range.

    Args:
        whose: What it was given to: ``"GarbageCollect"``.
        name: The argument's.
        value: What was given; True and False are no numbers.
        least: The smallest that is allowed.
        above: What it has to be larger than.
        most: The largest that is allowed.
        whole: Whether it has to be a whole number.
        error: What is raised.

    Raises:
        ValueError: Says what was expected; or another, as `error` says.
    """
    held: Any = value
    fits = is_number(value, whole=whole) and math.isfinite(held)
    fits = fits and (least is None or held >= least) and (above is None or held > above)
    fits = fits and (most is None or held <= most)
    if fits:
        return
    wanted = "a whole number" if whole else "a finite number"
    if least is not None and most is not None:
        wanted += f" from {least} to {most}"
    elif least is not None:
        wanted += f", {least} or more"
    elif above is not None:
        wanted += f" above {above}"
    shown = repr(value) if isinstance(value, (Real, str)) else describe(value)
    raise error(f"{whose}({name}={shown}) was given; expected {wanted}")


def number(**limits: Any) -> Callable[[Any, Any, Any], None]:
    """Make a validator of a field: a finite number in a range; see `check_number`. ``none=True`` allows None."""
    none = limits.pop("none", False)

    def validate(instance: Any, attribute: Any, value: Any) -> None:
        if not (none and value is None):
            check_number(type(instance).__name__, attribute.name, value, **limits)

    return validate


def check_called(whose: str, name: str, value: object, expected: str, error: type[Exception] = TypeError) -> None:
    """Raise for something that cannot be called, or that is a class.

    Raises:
        TypeError: Says what was expected; or another, as `error` says.
    """
    if not callable(value):
        raise error(f"{whose}({name}={describe(value)}) was given; expected {expected}")


def as_path(whose: str, name: str, value: object, error: type[Exception] = ValueError) -> Path:
    """Return a path; raise for what cannot be one.

    Raises:
        ValueError: It is no text and no path, empty, too long, or holds a NUL; or another, as `error` says.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise error(f"{whose}({name}={describe(value)}) was given; expected a path: {name}='runs/first'")
    text = os.fsdecode(value)
    longest = 0 if "\0" in text else max((len(os.fsencode(part)) for part in Path(text).parts), default=0)
    # No usual file system takes a longer name: without this check the error would come with the first file, perhaps
    # in the middle of a run.
    if not text or "\0" in text or longest > 255:
        what = "is empty" if not text else "holds a NUL" if "\0" in text else f"has a name of {longest} bytes"
        shown = text if len(text) < 60 else f"{text[:40]}…"
        raise error(f"{whose}({name}={shown!r}) was given, which {what}; expected a path: {name}='runs/first'")
    return Path(text)


def named() -> Callable[[Any, Any, Any], None]:
    """Make a validator of a field: a text that is not empty."""

    def validate(instance: Any, attribute: Any, value: Any) -> None:
        check_name(type(instance).__name__, attribute.name, value)

    return validate


def check_name(whose: str, name: str, value: object, error: type[Exception] = ValueError) -> None:
    """Raise for something that is no text, or an empty one.

    Raises:
        ValueError: Says what was given; or another, as `error` says.
    """
    if not isinstance(value, str) or not value:
        raise error(f"{whose}({name}={describe(value)}) was given; expected a name, a text that is not empty")


def called(expected: str) -> Callable[[Any, Any, Any], None]:
    """Make a validator of a field: something that can be called."""

    def validate(instance: Any, attribute: Any, value: Any) -> None:
        check_called(type(instance).__name__, attribute.name, value, expected)

    return validate


def yes_or_no(none: bool = False) -> Callable[[Any, Any, Any], None]:
    """Make a validator of a field: True or False, or None where that is allowed."""

    def validate(instance: Any, attribute: Any, value: Any) -> None:
        if not (isinstance(value, bool) or (none and value is None)):
            kind = type(instance).__name__
            raise ValueError(f"{kind}({attribute.name}={describe(value)}) was given; expected True or False")

    return validate


def check_paths(whose: str, name: str, value: object) -> None:
    """Raise for something that is no tuple of a learner's paths; the paths themselves are checked by a learner.

    Raises:
        CallbackError: Says what was given.
    """
    if not isinstance(value, (tuple, list)):
        meant = value if isinstance(value, str) else "step.loss"
        raise CallbackError(f"{whose}({name}={value!r}) was given; expected a tuple of paths: {name} = ({meant!r},)")


def texts(instance: Any, attribute: Any, value: Any) -> None:
    """Raise, as a validator of a field, for something that is neither a text nor several.

    Raises:
        TypeError: Says what was given.
    """
    several = isinstance(value, (tuple, list)) and value and all(isinstance(each, str) for each in value)
    if not (isinstance(value, str) or several):
        kind, name = type(instance).__name__, attribute.name
        raise TypeError(f"{kind}({name}={value!r}) was given; expected a text, or several: {name}=('first', 'second')")
