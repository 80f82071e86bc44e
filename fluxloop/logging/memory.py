"""Log to a list."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from attrs import define, field, frozen

from fluxloop.guard.assign import fields_of_the_class
from fluxloop.logging.backend import Backend, key, log_to
from fluxloop.logging.loggables import Loggable, Scalar


@frozen
class Record:
    """One thing that was logged.

    Args:
        step: Where it stands on the x axis.
        group: From the outermost in.
        name: Its name in the group.
        loggable: The thing itself.
    """

    step: int
    group: tuple[str, ...]
    name: str
    loggable: Loggable


@fields_of_the_class
@define(eq=False, slots=False)
class Memory(Backend):
    """Log everything to a list, for tests and notebooks.

    A resumed run's list holds what it logs itself.

    Attributes:
        records: In the order in which they were logged.

    Example:
        >>> from fluxloop.logging import Scalar, log_to
        >>> memory = Memory()
        >>> log_to(memory, Scalar(0.5), "loss", step=1, group=("epoch", "validation"))
        >>> memory.records
        [Record(step=1, group=('epoch', 'validation'), name='loss', loggable=Scalar(value=0.5))]
    """

    records: list[Record] = field(factory=list, init=False, repr=False)

    muted: ClassVar[bool] = False

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return the (step, value) pairs of a number by its full name.

        Args:
            name: The groups and the name, ``"epoch/validation/loss"``.
        """
        return [
            (record.step, record.loggable.value)
            for record in self.records
            if key(record.name, record.group) == name and isinstance(record.loggable, Scalar)
        ]

    @property
    def names(self) -> list[str]:
        """The full names of what was logged, in order of appearance."""
        return list(dict.fromkeys(key(record.name, record.group) for record in self.records))

    def _position(self) -> int:
        return len(self.records)

    def _rewind(self, position: Any) -> None:
        del self.records[position or 0 :]

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        copied = memo[id(self)] = copy.copy(self)
        copied.records = list(self.records)
        return copied


@log_to.register(Memory, Loggable)
def _keep(backend: Memory, thing: Loggable, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.records.append(Record(step, group, name, thing))
