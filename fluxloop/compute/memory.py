"""A step for which the memory does not suffice: what its error says, and what is let go of for training to go on."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

import torch

from fluxloop.compute.fused import step_optimizer
from fluxloop.errors import annotate, counted
from fluxloop.nested import batch_size

if TYPE_CHECKING:
    from fluxloop.interfaces import StepLearner
    from fluxloop.state import StepState

OutOfMemoryError: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
"""Torch's error; releases before 2.5 have it in ``torch.cuda`` alone."""

SAID = (
    "can't allocate memory",  # DefaultCPUAllocator, on Linux and macOS
    "not enough memory",  # the same on Windows
    "out of memory",  # MPS, and CUDA outside of torch's allocator
    "STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN, for their workspaces
)
"""Words by which other errors tell the same."""

NOTE = "fluxloop: out of memory"

IN_PART = "fluxloop: a part of the weights has moved"
"""Begins the note of an error that was raised while a backward pass stepped parameters."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error says that there is not enough memory, on whatever device.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    True
    """
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


def drop_frames(error: BaseException) -> None:
    """Drop the variables of the functions that an error has left: what they hold lives as long as the error does."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        each = todo.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)  # of those that are still running, nothing
            todo += [each.__cause__, each.__context__]


def release_step(error: BaseException, learner: StepLearner, state: StepState, trains: bool) -> None:
    """Note on an error that the memory did not suffice, and let go of what the step held; do nothing for other errors.

    The gradients of steps before, which wait for an update, stay.

    Args:
        error: What ended the step, of which the gradients were given up already.
        learner: Whose step it was.
        state: Its entries.
        trains: Whether its phase trains.
    """
    if not is_out_of_memory(error):
        return
    notes: list[str] = getattr(error, "__notes__", [])
    stepping = _was_stepping(error) or any(note.startswith(IN_PART) for note in notes)
    if not any(note.startswith(NOTE) for note in notes):
        annotate(error, f"{NOTE} {_told(learner.accelerator, batch_size(vars(state)), trains, stepping)}")
    state.drop_graphs()
    for slot in learner.updates.slots:
        if slot.consumed:
            slot.release()
            slot.consumed = True
        if stepping:
            _forget_unstepped(slot.optimizer)
    drop_frames(error)


def _told(accelerator: Any, rows: int, trains: bool, stepping: bool) -> str:
    """Return what is known of the step, and what takes less."""
    said = f"in a step with {counted(rows, 'row')} of precision={accelerator.precision!r}"
    if trains:
        said += f", accumulate={accelerator.accumulate!r}, compile={accelerator.compile!r}"
    if accelerator.world_size > 1:
        said += f" on each of {accelerator.world_size} processes"
    said += f"{_peak(accelerator.device)}.\n  To take less: "
    smaller = f"batches of {counted(rows // 2, 'row')}" if rows > 1 else "smaller rows"
    if not trains:
        return f"{said}{smaller}. The model can be used on."
    tips = [smaller]
    if rows > 1 and isinstance(accelerator.accumulate, int):
        tips[0] += f" with Accelerator(accumulate={2 * accelerator.accumulate}), whose updates have as many rows"
    if accelerator.precision == "fp32":
        tips.append("precision='bf16'")
    tips.append("recompute_activations(model, 'blocks.*')")
    said += "; or\n  ".join(tips)
    said += ".\n  find_batch_size(learner) finds the largest batch that fits.\n  "
    if stepping:
        said += "An optimizer was stepping: some weights may have moved. Go on from a checkpoint: learner.load(file)."
        return said
    return f"{said}What the step held was let go of, and the learner can be used on."


def _peak(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    taken, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    return f"; at most {taken / 2**30:.1f} of the {total / 2**30:.1f} GiB of {device} were taken by tensors"


def _was_stepping(error: BaseException) -> bool:
    return any(frame.f_code is step_optimizer.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _forget_unstepped(optimizer: torch.optim.Optimizer) -> None:
    """Forget the state of parameters that have never been stepped: it was being made, and may lack a part."""
    for parameter, entries in list(optimizer.state.items()):
        step = entries.get("step") if isinstance(entries, dict) else None
        if step is not None and float(step) == 0:
            del optimizer.state[parameter]
