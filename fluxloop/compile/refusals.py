"""The words of errors for steps that cannot be one graph: what stands in the way, where, and what to do."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fluxloop.compute.slots import Slot
from fluxloop.errors import PACKAGE, CompileError
from fluxloop.phase import Phase

if TYPE_CHECKING:
    from fluxloop.compute.accelerator import Accelerator

LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, PACKAGE))
"""Folders whose code is not the user's."""


def require_accelerator(accelerator: Accelerator) -> None:
    """Raise for an accelerator whose steps no graph can hold.

    Raises:
        CompileError: Names the argument, and what to type.
    """
    kind = type(accelerator)
    if any(not method.__module__.startswith("fluxloop.") for method in (kind.backward, kind.update)):
        raise CompileError(f"{kind.__name__} has a backward or update of its own; use it with compile=False")
    if accelerator.precision == "fp16":
        raise CompileError(
            "Accelerator(compile='step') was given with precision='fp16': in fp16 the host looks at the gradients "
            "before every update, and leaves it out where they are infinite. Expected precision='bf16', which needs "
            "no such look, or compile='model'"
        )


def refusal(phase: Phase, why: str) -> CompileError:
    """Return the error for a step that no graph can hold."""
    return CompileError(f"the step of {phase!r} cannot be one graph: {why}")


def changes_python(phase: Phase, names: Iterable[str]) -> CompileError:
    """Return the error for a step that changes something that is no tensor."""
    return refusal(
        phase,
        f"it changes {', '.join(names)}, which Python would do once and not at every step; keep numbers that "
        "change in buffers, make what is kept before, or change it in the phase's finish(learner, state)",
    )


def writes_options(phase: Phase, slot: Slot, names: Iterable[str]) -> CompileError:
    """Return the error for a step that sets an optimizer's options, such as its learning rate."""
    return refusal(
        phase,
        f"it writes {', '.join(names)} of {slot.label}, which the optimizer, records and checkpoints would know "
        "nothing of; set options in the phase's finish(learner, state), or by a callback: "
        "Scheduler({LearningRate: ...})",
    )


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(". ")


def where(error: Exception) -> str:
    """Return the line of the user's code in which an error was raised, or of torch's where the user has none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.exists(f.filename)]
    users = [f for f in frames if not f.filename.startswith(LIBRARIES)]
    modules = [f for f in frames if f"{os.sep}nn{os.sep}modules{os.sep}" in f.filename]
    last = (users or modules)[-1:]
    return "".join(f" (in {f.filename}, line {f.lineno}: {f.line})" for f in last)


def hint(error: Exception) -> str:
    """Return what to do about an error of torch's tracing; empty where nothing is known of it."""
    asked = any(
        word in f"{type(error).__name__}{error}" for word in ("DataDependent", "data-dependent", "DynamicOutput")
    )
    if asked:
        return (
            ": ask for no number in the middle of a step (.item(), float(), if tensor: ..., boolean masks that choose "
            "rows); torch.where chooses without asking"
        )
    return ""
