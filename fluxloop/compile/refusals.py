"""The words of errors for steps that cannot be one graph: what stands in the way, where, and what to do."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fluxloop.compute.slots import Slot
from fluxloop.errors import PACKAGE, CompileError
from fluxloop.phase import Phase

if TYPE_CHECKING:
    from fluxloop.compute.accelerator import Accelerator
    from fluxloop.interfaces import RunLearner

LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, PACKAGE))
"""Folders whose code is not the user's."""

WAYS_OUT = (
    "Have steps of this phase run as they are, compiled = False in its class, or have torch compile the model alone, "
    'Accelerator(compile="model")'
)


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


def advice(why: str) -> str:
    """Return what is expected of a step instead of a graph for each value of what has changed.

    Args:
        why: What has changed: an entry, an option of an optimizer, or an attribute; empty where it is not known.
    """
    if why.startswith("the entry") or not why:
        return "batches of few shapes (drop_last=True, padding), and numbers in them as tensors"
    if "optimizer" in why.partition(":")[0]:
        return (
            "schedules of what a graph is given (rates, weight decay, the betas of Adam and AdamW, the momentum of "
            "SGD), and other options that stay (OneCycleLR(cycle_momentum=False))"
        )
    return (
        "numbers and texts that stay: decide in the phase's finish(learner, state) and keep a bool, or keep the "
        "number in a tensor"
    )


AS_THEY_ARE = "or have steps of this phase run as they are, compiled = False in its class"

HINTS = (
    (
        ("ctc_loss", "lstsq"),
        f"torch tells the shapes of what it gives from its numbers alone; compute it elsewhere, {AS_THEY_ARE}",
    ),
    (
        (".numpy()", "numpy array"),
        "compute with torch; what needs NumPy belongs into the data, or the phase's finish(learner, state)",
    ),
    (("__format__",), "write texts of numbers in the phase's finish(learner, state)"),
    (
        ("DataDependent", "data-dependent", "DynamicOutput"),
        "ask for no number in the middle of a step (.item(), float(), if tensor: ..., an index that is a tensor); "
        "torch.where, index_select and gather choose without asking",
    ),
    (("SparseTensorImpl", "sparse"), f"give it dense tensors (.to_dense()), {AS_THEY_ARE}"),
)
"""Words in errors of torch's tracing, and what to do about them."""

FOLDER_HINTS = (
    (("torch", "distributions"), "a distribution checks its arguments by their numbers: say validate_args=False"),
    (
        ("torch", "nn", "utils", "rnn.py"),
        f"sequences are packed by lengths that are numbers: pad them, and mask what the loss sees, {AS_THEY_ARE}",
    ),
)
"""Files of torch's, and what to do about an error in them."""


def hint(error: Exception) -> str:
    """Return what to do about an error of torch's tracing."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    text = f"{type(error).__name__}{error}"
    if "PackedSequence" in text or (type(error) is TypeError and "zeros(): argument 'size'" in text):
        return f": {FOLDER_HINTS[1][1]}"
    for path, advice in FOLDER_HINTS:
        if any(os.path.join("", *path) in file for file in files):
            return f": {advice}"
    return next((f": {advice}" for words, advice in HINTS if any(word in text for word in words)), f"; {AS_THEY_ARE}")


# Known before a step runs

OPTIMIZERS = {
    "Adafactor": "asks for numbers of its state",
    "Muon": "takes its rate as a number of Python's",
    "LBFGS": "computes gradients as often as it likes",
    "SparseAdam": "takes sparse gradients",
}
"""torch's optimizers that no graph can step, and why."""


def require_parts(learner: RunLearner) -> None:
    """Raise for optimizers and modules that no graph can hold, before a step runs.

    Raises:
        CompileError: Names them, and what to type.
    """
    why = next(why_not_parts(learner), None)
    if why is not None:
        raise CompileError(
            f'Accelerator(compile="step") makes one graph of a step, and {why}. Or have steps run as they are: '
            'compile=False or compile="model", or compiled = False in the phase\'s class'
        )


def why_not_parts(learner: RunLearner) -> Iterator[str]:
    """List what of a learner no graph can hold, with what to do about it."""
    for slot in learner.updates.slots:
        for name, why in OPTIMIZERS.items():
            kind = getattr(torch.optim, name, None)
            if kind is not None and isinstance(slot.optimizer, kind):
                yield f"{slot.label} is {name}, which {why}; expected another of torch.optim, such as AdamW"
    for module in learner.modules():
        for path, part in module.named_modules():
            named = f"{type(part).__name__}{f' at {path!r}' if path else ''}"
            if isinstance(part, torch.jit.ScriptModule):
                yield f"{named} is compiled by torch.jit, which runs it by itself; expected the module it was made of"
            if isinstance(part, _BatchNorm) and part.momentum is None and part.track_running_stats:
                yield (
                    f"{named} has momentum=None: it weighs a batch by how many it has seen, a number of Python's; give "
                    "it momentum=0.1"
                )
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse and part.weight.requires_grad:
                yield f"the gradients of {named} are sparse; expected {type(part).__name__}(sparse=False)"
