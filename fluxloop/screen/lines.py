"""The line of a bar in a terminal: where it is narrow, what matters least is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta

from attrs import frozen
from tqdm.std import tqdm
from tqdm.utils import disp_len

ROOM = 8
"""Columns that the bar itself has at least, as long as there is anything else to leave out."""
HERE = "\0"
"""Where in a line the bar is, until it is known which line that is."""
MORE = "..."
"""Stands for what is left out."""


def in_words(seconds: float) -> str:
    """Return a time as people read it.

    >>> in_words(72.4), in_words(7384)
    ('01:12', '2:03:04')
    """
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


def gone_and_left(gone: float, left: float | None, short: bool = False) -> str:
    """Return how many seconds are gone and left, as people read it.

    >>> gone_and_left(72, 30), gone_and_left(72, 30, short=True), gone_and_left(72, None)
    ('01:12, 00:30 left', '01:12<00:30', '01:12')
    """
    if left is None:
        return in_words(gone)
    return f"{in_words(gone)}<{in_words(left)}" if short else f"{in_words(gone)}, {in_words(left)} left"


@frozen
class Standing:
    """How far something has come, and what is told of it.

    Args:
        title: What it is.
        seen: How far it has come.
        total: How far it will come; None where nobody knows.
        unit: Of what; ``"B"``: bytes.
        own: Seconds that it has taken, and about how many it still will.
        rate: How far it comes in a second; None where nobody knows yet.
        fit: The same of the fit around it; None where there is none.
        numbers: What stands beside it, by name.
    """

    title: str
    seen: int
    total: float | None
    unit: str
    own: tuple[float, float | None]
    rate: float | None
    fit: tuple[float, float | None] | None
    numbers: Mapping[str, str]

    def line(self, columns: int | None) -> str:
        """Return the line for so many columns, with a placeholder for tqdm's bar; None: as many as it takes.

        >>> of_fit, metrics = (72, 30), {"loss": "0.4313", "accuracy": "0.8125"}
        >>> here = Standing("epoch 3/10", 45, 64, "batch", (9, 4), 5.0, of_fit, metrics)
        >>> for columns in (None, 63, 31):
        ...     here.line(columns).split("|")[::2]
        ['epoch 3/10 (01:12, 00:30 left):  70%', ' 45/64 [00:09<00:04, 5.00batch/s, loss=0.4313, accuracy=0.8125]']
        ['epoch 3/10 01:12<00:30:  70%', ' 45/64, loss=0.4313, ...']
        ['epoch 3/10: ', ' 45/64']
        """
        room, bar = ROOM if self.has_end else 0, "bar"
        for line in self._lines():
            if columns is None or disp_len(line.replace(HERE, "")) + room <= columns:
                break
        else:
            line = self._cut(0 if columns is None else columns - room)
        if columns is not None:
            bar = f"bar:{max(columns - disp_len(line.replace(HERE, '')), 1)}"
        # Braces of a title are not for tqdm to fill in
        return line.replace("{", "{{").replace("}", "}}").replace(HERE, f"{{{bar}}}")

    @property
    def has_end(self) -> bool:
        """Whether anybody knows how far it will come; of bytes it is known roughly."""
        return self.total is not None and self.total > 0 and (self.seen <= self.total or self.unit == "B")

    def _lines(self) -> Iterator[str]:
        """Yield lines, shorter and shorter ones."""
        rate = [] if self.rate is None else [self._rate(self.rate)]
        yield self._line(self._of_fit(), [gone_and_left(*self.own, short=True), *rate], True)
        yield self._line(self._of_fit(), rate, True)
        yield self._line(self._of_fit(), [], True)
        short = self._of_fit(short=True)
        for told in range(len(self.numbers), -1, -1):
            yield self._line(short, [], True, told)
            yield self._line(short, [], False, told)
        yield self._line("", [], True, 0)
        yield self._line("", [], False, 0)

    def _line(self, of_fit: str, of_own: list[str], percent: bool, told: int | None = None) -> str:
        numbers = [f"{name}={number}" for name, number in self.numbers.items()]
        if told is not None and told < len(numbers):
            numbers = [*numbers[:told], MORE] if told else []
        rest = ", ".join([*of_own, *numbers])
        if rest:
            rest = f" [{rest}]" if of_own else f", {rest}"
        if self.total is None or not self.has_end:
            return f"{self.title}{of_fit}: {self._count(self.seen)}{'' if self.unit == 'B' else self.unit}{rest}"
        seen = min(self.seen, self.total)
        part = f"{int(100 * seen / self.total):3d}%" if percent else ""
        return f"{self.title}{of_fit}: {part}|{HERE}| {self._count(seen)}/{self._count(self.total)}{rest}"

    def _cut(self, columns: int) -> str:
        """Return a line whose title is cut."""
        end = f": |{HERE}|" if self.has_end else ""
        title = self.title
        while title and disp_len(f"{title}{MORE}{end}".replace(HERE, "")) > columns:
            title = title[:-1]
        return f"{title}{MORE}{end}"

    def _of_fit(self, short: bool = False) -> str:
        if self.fit is None:
            return ""
        times = gone_and_left(*self.fit, short=short)
        return f" {times}" if short else f" ({times})"

    def _count(self, count: float) -> str:
        return tqdm.format_sizeof(count, "B") if self.unit == "B" else f"{count}"

    def _rate(self, rate: float) -> str:
        if self.unit == "B":
            return f"{tqdm.format_sizeof(rate, 'B')}/s"
        return f"{rate:.2f}{self.unit}/s" if rate >= 1 or rate <= 0 else f"{1 / rate:.2f}s/{self.unit}"
