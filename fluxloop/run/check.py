"""A step of each phase on the side, to find what is wrong with it before a fit: `Learner.check`."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import fields
from torch import nn
from torch.nn.parameter import is_lazy

from fluxloop.callback import UnsafeCallback
from fluxloop.compute.models import save_tensors
from fluxloop.compute.saved import save_optimizer
from fluxloop.compute.updates import Updates
from fluxloop.compute.window import Window
from fluxloop.data.passes import untouched
from fluxloop.data.share import unspoken
from fluxloop.errors import PACKAGE, DataError, MissingEntryError, PhaseError
from fluxloop.loop import set_modes
from fluxloop.persist.attributes import OF_EVERY_MODULE
from fluxloop.phase import Phase, has_step
from fluxloop.processes.batch_norm import apart
from fluxloop.randomness import preserved
from fluxloop.run.epoch import feed
from fluxloop.run.phases import check_phase, default_phases
from fluxloop.run.session import beside

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


Severity = Literal["error", "warning", "skipped"]


def first_batch(learner: RunLearner, phase: Phase, call: str = "learner.check(batch)") -> Any:
    """Return the first batch of a phase's data.

    Args:
        learner: Whose data.
        phase: It says which.
        call: What to type instead, for messages.

    Raises:
        DataError: There is none, or the data can be iterated once only: its first batch would be lost.
    """
    data = feed(learner, phase)
    data.check()
    if hasattr(data.source, "__next__"):
        raise NotLookedAtError(
            f"the {phase.data_key!r} data can be iterated once only; give a batch to look at: {call}"
        )
    with untouched(data.source):
        for batch in data:
            return batch
    raise PhaseError(f"{phase!r} runs on no data of the learner's; give a batch to look at: {call}")


class NotLookedAtError(PhaseError, DataError):
    """No step could be run without a trace: the data can be iterated once only, or a phase cannot be copied."""


def _save_updates(updates: Updates) -> Callable[[], None]:
    """Save the gradients, and what is counted of them, and begin without any; return a function that restores them."""
    gradients = [(parameter, parameter.grad) for parameter in updates.names]
    saved = dict(vars(updates))
    slots = [
        (slot, {each.name: _kept(getattr(slot, each.name)) for each in fields(type(slot))}) for slot in updates.slots
    ]
    scale = updates.scale_state()
    for slot in updates.slots:
        slot.end_gradients()
    for parameter in updates.names:
        parameter.grad = None

    def restore() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        vars(updates).update(saved)
        updates.restore_scale(scale.get("scale"))
        for slot, values in slots:
            for name, value in values.items():
                setattr(slot, name, value)

    return restore


def _kept(value: Any) -> Any:
    """Return what is to be put back: a window, which is changed in place, as it is now."""
    return copy.copy(value) if isinstance(value, Window) else value


def check(learner: RunLearner, batch: Any, phases: Iterable[Phase] | None) -> list[str]:
    """Run one step per phase and list what is wrong; everything is put back. See `Learner.check`."""
    in_use = list(learner.phases.values()) or default_phases(learner.data)
    chosen = in_use if phases is None else list(phases)
    for phase in chosen:
        check_phase(phase)
    refuse_lazy(learner, "learner.check")
    return list(dict.fromkeys(problem for phase in chosen for problem in look_at(learner, phase, batch)))


def refuse_lazy(learner: RunLearner, who: str) -> None:
    """Raise `PhaseError` for modules that have no shape yet: a step would give them one, which cannot be taken back."""
    if any(is_lazy(parameter) for module in learner.modules() for parameter in module.parameters()):
        raise PhaseError(f"{who} cannot look at lazy modules that have seen no batch; run one step first")


class Problem(str):
    """What is wrong with a phase, in a sentence.

    Attributes:
        severity: ``"error"`` where a fit would fail too; ``"warning"`` where it would not (a gradient is
            computed and not used) or need not (a callback declares to store the missing entry);
            ``"skipped"`` where no step could be run.
    """

    __slots__ = ("severity",)
    severity: Severity

    def __new__(cls, text: str, severity: Severity) -> Problem:
        """Make a problem of a sentence."""
        problem = super().__new__(cls, text)
        problem.severity = severity
        return problem


def look_at(learner: RunLearner, phase: Phase, batch: Any) -> list[Problem]:
    """Run one step of a copy of a phase on the side, and return what is wrong.

    Args:
        learner: Everything in it is put back.
        phase: It is left as it is.
        batch: Left out, the first of the phase's data.
    """
    findings: list[str] = []
    problems: list[Problem] = []
    try:
        phase.check(learner)
        if has_step(type(phase)):  # else it has an epoch alone
            with aside(learner, phase, "check") as copied:
                learner.updates.findings = findings  # put back with everything else that `updates` has
                copied.step(learner, first_batch(learner, phase) if batch is None else batch)
    except Exception as error:
        severity: Severity = "warning" if _may_be_stored(learner, error) else "error"
        if isinstance(error, NotLookedAtError):
            severity = "skipped"
        problems.append(Problem(f"{phase!r}: {type(error).__name__}: {error}{_place(error)}", severity))
    return [*(Problem(finding, "warning") for finding in findings), *problems]


def _may_be_stored(learner: RunLearner, error: Exception) -> bool:
    """Return whether a callback declares to store the entry that is missing: none of them runs in a check."""
    if not isinstance(error, MissingEntryError) or error.name is None or not error.name.isidentifier():
        return False
    own = [each.unwrapped for each in learner.callbacks if not type(each.unwrapped).__module__.startswith("fluxloop.")]
    return any(isinstance(each, UnsafeCallback) for each in own) or any(  # such a one declares nothing
        learner.callbacks.writers(f"{root}.{error.name}") for root in ("step", "cbstate")
    )


@contextmanager
def _by_itself(learner: RunLearner) -> Iterator[None]:
    """Have this process send nothing inside: others need not look too, and one whose step fails keeps nobody waiting.

    The parts of sharded models are in several processes, so there all have to look, and nothing is changed.
    """
    accelerator, updates = learner.accelerator, learner.updates
    group, averager = accelerator.group, getattr(updates, "averager", None)
    if group is None or accelerator.sharding is not None:
        yield
        return
    accelerator.group = updates.averager = None
    try:
        with apart():
            yield
    finally:
        accelerator.group, updates.averager = group, averager


@contextmanager
def aside(learner: RunLearner, phase: Phase, owner: str, on_host: bool = False) -> Iterator[Phase]:
    """Yield a copy of a phase, to run steps of it; put everything back after it.

    Args:
        learner: Its own models are run, not copies.
        phase: It is left as it is.
        owner: Whose random numbers are drawn inside, such as ``"check"``.
        on_host: Whether what is put back is kept in the host's memory, so that the device has all of its own.

    Raises:
        PhaseError: The phase or the loss function cannot be copied; nothing was run.
    """
    modules, updates = learner.modules(), learner.updates
    with ExitStack() as undone:
        undone.enter_context(preserved())
        undone.enter_context(unspoken(learner.accelerator.group))
        undone.enter_context(_by_itself(learner))
        undone.enter_context(beside(learner, owner, []))
        undone.callback(_save_updates(updates))  # gradients that wait are put aside: the step begins without any
        for slot in updates.slots:
            undone.callback(save_optimizer(slot.optimizer, on_host))
        weights = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        undone.callback(save_tensors(modules, weights, on_host))
        undone.callback(_save_attributes(modules))
        undone.callback(set_modes(learner, phase))
        for name in ("loss_fn", "_compiled"):
            undone.callback(setattr, learner, name, getattr(learner, name))
        # What the phase holds of the learner is not copied: its step runs the learner's models, which are put back
        memo = {id(thing): thing for thing in (learner, *_held(learner))}
        learner._compiled = None  # the step as it is written has the same problems, and need not be compiled
        if not isinstance(learner.loss_fn, nn.Module):
            learner.loss_fn = _copied(learner.loss_fn, memo, "the loss function")
        yield _copied(phase, memo, repr(phase))


def _held(learner: RunLearner) -> Iterator[Any]:
    """Yield the learner's objects that a phase may hold: the copy of the phase holds the same ones."""
    for module in learner.modules():
        yield from module.modules()
        yield from module.parameters()
        yield from module.buffers()
    yield from (slot.optimizer for slot in learner.updates.slots)
    yield from vars(learner.data).values()


def _copied(thing: Any, memo: dict[int, Any], name: str) -> Any:
    """Return a copy of something in which a step leaves traces.

    Raises:
        PhaseError: It cannot be copied, so nothing can be run without a trace.
    """
    try:
        return copy.deepcopy(thing, memo)
    except Exception as error:
        raise NotLookedAtError(
            f"{name} cannot be copied ({type(error).__name__}: {error}), so a step of it would leave traces in it; "
            "nothing was run. Give its class a __deepcopy__"
        ) from error


def _save_attributes(modules: list[nn.Module]) -> Callable[[], None]:
    """Save the plain attributes of modules, such as a count of calls; return a function that restores them."""
    saved = [
        (vars(part), name, value, copy.copy(value))
        for module in modules
        for part in module.modules()
        for name, value in vars(part).items()
        if name not in OF_EVERY_MODULE and type(value) in PLAIN
    ]

    def restore() -> None:
        for attributes, name, value, copied in saved:
            if isinstance(value, list):  # in place: others may hold it
                value[:] = copied
            elif isinstance(value, (dict, set)):
                value.clear()
                value.update(copied)
            attributes[name] = value

    return restore


PLAIN = (bool, int, float, str, type(None), list, dict, set, tuple)


def _place(error: BaseException) -> str:
    """Return where an error was raised, in the user's code where it passed through it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_librarys(frame.filename)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def _is_librarys(filename: str) -> bool:
    return filename.startswith((PACKAGE, str(Path(torch.__file__).parent), "<"))
