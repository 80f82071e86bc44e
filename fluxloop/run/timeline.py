"""What happens in one step of a phase, in order, and who acts: `Learner.timeline`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attrs import define, evolve, frozen

from fluxloop.callback import UnsafeCallback, on
from fluxloop.compute.window import WindowSlot
from fluxloop.errors import CancelSignal, PhaseError, annotate
from fluxloop.events import Event, StepBegin, StepEnd
from fluxloop.order.diagram import (
    COLORS,
    FAINT,
    MARGIN,
    ROW,
    Diagram,
    boxed,
    picture,
    width_of,
    written,
)
from fluxloop.order.explain import in_mermaid
from fluxloop.phase import Phase, has_step
from fluxloop.phases.supervised import TrainingPhase
from fluxloop.run.check import aside, first_batch, refuse_lazy
from fluxloop.run.phases import check_phase
from fluxloop.state import name_of

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


@frozen
class Moment:
    """An event of a step.

    Args:
        event: Its type.
        optimizer: The name of the optimizer whose gradients or update it is about, where there are several.
        entries: Names of the entries that the step has since the event before it.
        handlers: Ids of the callbacks that act at it, in order.
    """

    event: type[Event]
    optimizer: str | None
    entries: tuple[str, ...]
    handlers: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The event's name, with the optimizer's."""
        return self.event.__name__ + ("" if self.optimizer is None else f" ({self.optimizer})")


def timeline(learner: RunLearner, phase: Phase | None, batch: Any) -> Diagram:
    """Run one step of a phase beside the training and show it. See `Learner.timeline`."""
    is_chosen = phase is not None
    if phase is None:
        phase = next((each for each in learner.phases.values() if each.gradients), None) or TrainingPhase()
    check_phase(phase)
    refuse_lazy(learner, "learner.timeline")
    if not has_step(type(phase)):
        raise PhaseError(f"{phase!r} has no step to show: its class has neither a body nor a step")
    phase.check(learner)
    moments = _watched(learner, phase, batch, is_chosen)
    ids = [id for id in learner.callbacks.order if any(id in moment.handlers for moment in moments)]
    return Diagram(
        "\n".join(_as_text(phase, moments)),
        "\n".join(_as_mermaid(phase, moments, ids)),
        _as_svg(phase, moments, ids),
    )


@define(eq=False)
class _Watcher(UnsafeCallback):
    """Notes each event of a step, and what the step has stored by then."""

    moments: list[Moment]
    several: bool
    known: set[str]

    draws = False
    in_compiled_step = "after"  # it only takes note of events, so gradients may be used and dropped before them
    _begins_anywhere = True

    @on(Event)
    def note(self, event: Event, phase: Phase, learner: Any) -> None:
        if not event.inside_step and not isinstance(event, (StepBegin, StepEnd)):
            return
        stored = [name for name in _entries(vars(learner.step)) if name not in self.known]
        self.known.update(stored)
        block = learner.updates.block
        name = getattr(event, "name", None) if block is None else block.slot.name
        self.moments.append(Moment(type(event), name if self.several else None, tuple(stored)))


def _entries(entries: dict[str, Any]) -> Iterator[str]:
    """Yield the names of a step's entries; of losses by the names of optimizers, each by itself."""
    for name, value in entries.items():
        if name == "losses" and isinstance(value, dict):
            yield from (f"losses[{key!r}]" for key in value)
        else:
            yield name


def _watched(learner: RunLearner, phase: Phase, batch: Any, is_chosen: bool) -> list[Moment]:
    """Run a step beside the training and return its events, with those who would act at them."""
    table = learner.callbacks.table(type(phase))
    watcher = _Watcher([], len(learner.optimizer_names) > 1, set())
    with aside(learner, phase, "timeline") as copied:
        batch = first_batch(learner, phase, "learner.timeline(batch=...)") if batch is None else batch
        learner.callbacks.set([watcher])
        for slot in learner.updates.slots:
            if isinstance(slot, WindowSlot):
                slot.window.size = 1  # the batch that completes an update; put back with everything else of a window
        try:
            copied.step(learner, batch)
        except CancelSignal:  # a step may end itself
            pass
        except Exception as error:
            which = "" if is_chosen else "; another phase is shown by learner.timeline(MyPhase())"
            annotate(error, f"fluxloop: in a step of {phase!r} that learner.timeline runs without the callbacks{which}")
            raise
    return [evolve(moment, handlers=tuple(id for _, _, id in table[moment.event])) for moment in watcher.moments]


def _as_text(phase: Phase, moments: list[Moment]) -> Iterator[str]:
    """Write a line for each event."""
    yield f"One step of {name_of(phase)}: its events in order, who acts at them, and what the step stores before them"
    rows = [(moment.label, " → ".join(moment.handlers), ", ".join(moment.entries)) for moment in moments]
    first, second = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    for label, handlers, entries in rows:
        yield f"{label:{first}}  {handlers:{second}}  {entries}".rstrip()


def _as_mermaid(phase: Phase, moments: list[Moment], ids: list[str]) -> Iterator[str]:
    """Write a sequence diagram: the phase tells callbacks of events."""
    yield "sequenceDiagram"
    number = {id: f"n{index}" for index, id in enumerate(ids)}
    yield f"    participant phase as {in_mermaid(name_of(phase))}"
    for id in ids:
        yield f"    participant {number[id]} as {in_mermaid(id)}"
    for moment in moments:
        if moment.entries:
            yield f"    Note over phase: {in_mermaid(', '.join(moment.entries))}"
        for id in moment.handlers:
            yield f"    phase->>{number[id]}: {in_mermaid(moment.label)}"
        if not moment.handlers:
            yield f"    phase->>phase: {in_mermaid(moment.label)}"


def _as_svg(phase: Phase, moments: list[Moment], ids: list[str]) -> str:
    """Draw a row for each event, a column for each callback, and a dot where it acts."""
    labels = width_of(moment.label for moment in moments)
    columns, x = {}, MARGIN + labels + 34
    for id in ids:
        columns[id] = x
        x += width_of([id]) + 32
    height = ROW + 6
    top = MARGIN + 34
    bottom = top + height * len(moments)
    parts = [boxed(MARGIN, MARGIN + 8, width_of([name_of(phase)]) + 20, name_of(phase), COLORS[0])]
    for index, (id, left) in enumerate(columns.items()):
        color = COLORS[(index + 1) % len(COLORS)]
        middle = left + width_of([id]) / 2 + 10
        parts.append(f'<path d="M{middle:g},{MARGIN + 20} V{bottom:g}" stroke="{color}" stroke-opacity="0.35"/>')
        parts.append(boxed(left, MARGIN + 8, width_of([id]) + 20, id, color))
    for index, moment in enumerate(moments):
        y = top + height * (index + 0.5)
        parts.append(written(MARGIN, y, moment.label))
        reached = [columns[id] + width_of([id]) / 2 + 10 for id in moment.handlers]
        begin = MARGIN + width_of([moment.label]) + 6
        if reached:
            parts.append(f'<path d="M{begin:g},{y:g} H{reached[-1]:g}" stroke="{FAINT}" stroke-dasharray="2 3"/>')
        for id, middle in zip(moment.handlers, reached, strict=True):
            color = COLORS[(ids.index(id) + 1) % len(COLORS)]
            parts.append(f'<circle cx="{middle:g}" cy="{y:g}" r="5" fill="{color}"/>')
        if moment.entries:
            parts.append(written(x + 4, y, f"has {', '.join(moment.entries)}", FAINT))
    stored = [f"has {', '.join(moment.entries)}" for moment in moments if moment.entries]
    return picture(x + 4 + width_of(stored) + MARGIN, bottom + MARGIN, parts, f"one step of {name_of(phase)}")
