"""What people see of a running training: bars in a terminal or a notebook, lines between them, and how to be quiet."""

from __future__ import annotations

import html
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, TextIO, TypeVar

from attrs import define, field
from tqdm.std import tqdm

from fluxloop.errors import describe, warn_user
from fluxloop.screen.lines import Standing, gone_and_left

T = TypeVar("T")

QUIET = "FLUXLOOP_QUIET"
"""The environment variable that has all learners of a process show nothing."""
PATIENCE = 1.0
"""Seconds after which something that is usually quick gets a bar."""
INTERVAL = 0.1
"""Seconds between refreshes."""
SPARE = 3
"""Columns of a terminal that a bar leaves free, so that the ^C which a terminal writes behind it stands in its line."""
MEMORY = 10.0
"""Seconds after which what a step took counts about a third: the first ones may have been slow ones."""


def is_quiet(given: bool | None) -> bool:
    """Return whether nothing is to be shown: as a learner was told or, where it was not, as the environment says.

    Raises:
        TypeError: `given` is not True, False or None.
        ValueError: The environment variable says something else than yes or no.
    """
    if given is not None:
        if not isinstance(given, bool):
            raise TypeError(f"quiet={describe(given)} was given; expected True, False, or None: as {QUIET} says")
        return given
    said = os.environ.get(QUIET, "").strip().lower()
    if said not in ("", "0", "false", "no", "1", "true", "yes"):
        raise ValueError(f"the environment has {QUIET}={said!r}; expected 1 to show nothing, or 0: export {QUIET}=1")
    return said in ("1", "true", "yes")


def in_notebook() -> bool:
    """Return whether a notebook's kernel runs this process."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and getattr(shell, "kernel", None) is not None


def shown(what: str, show: Callable[[], object]) -> bool:
    """Call what writes for people to see; where its stream is closed or broken, warn, and return False.

    What is shown never ends a training: a closed terminal, or a pipe whose reader has gone.

    Args:
        what: What falls silent, for the warning.
        show: Writes it.
    """
    try:
        show()
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "closed file" not in str(error):
            raise
        warn_user(f"{what} falls silent, because what it writes to is gone ({error}); training goes on")
        return False
    return True


def tell(line: str) -> None:
    """Write a line to standard error, where there is one; bars that are shown there stay whole."""
    if sys.stderr is not None and not getattr(sys.stderr, "closed", False):
        with between_bars():
            shown("fluxloop", lambda: print(line, file=sys.stderr, flush=True))


class _Here(threading.local):
    """The screens on which bars are shown, of each thread by itself; the last one is in use."""

    def __init__(self) -> None:
        self.screens: list[Screen] = []


_here = _Here()


@define(eq=False)
class Screen:
    """Where bars are shown: lines of a terminal, or one output of a notebook's cell.

    Args:
        file: The terminal's stream; None: a notebook.
        who: Who falls silent where that is gone, for the warning.
    """

    file: TextIO | None
    who: str = "ProgressBar"
    bars: list[Bar] = field(factory=list, init=False)
    """Those that are open, outer ones first."""
    is_broken: bool = field(default=False, init=False)
    _output: Any = field(default=None, init=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Screen:
        """Return an empty one: what is shown belongs to what runs."""
        return Screen(self.file, self.who)

    def bar(self, title: str, total: float | None = None, **options: Any) -> Bar:
        """Open a bar; see `Bar`."""
        if self.file is None and self._output is None:  # outside of a fit: what is quick leaves no empty output
            options["delay"] = PATIENCE
        bar = Bar(title, total, **options)
        bar.screen = self
        self.bars.append(bar)
        if not bar.delay:
            bar.refresh()
        return bar

    def write(self, show: Callable[[], object]) -> None:
        """Write something of a bar; where that cannot be written, show nothing from now on."""
        if not self.is_broken:
            self.is_broken = not shown(self.who, show)

    def draw(self) -> None:
        """Show the bars in a notebook: all in one output, so that little is left when they are gone."""
        visible = [bar for bar in self.bars if bar.is_visible]
        rows = [
            f'<div><code style="background: none">{html.escape(bar.title)}</code> '
            f'<progress value="{bar.seen}" max="{bar.total or 0}" style="width: 16em"></progress> '
            f'<code style="background: none">{html.escape(bar.numbers_in_words())}</code></div>'
            for bar in visible
        ]
        self._put("".join(rows), "\n".join(f"{bar.title} {bar.numbers_in_words()}" for bar in visible))

    def leave(self, line: str) -> None:
        """Leave a line in a notebook in the place of the bars; a terminal has the lines that others print."""
        if self.file is None:
            self._put(f'<code style="background: none">{html.escape(line)}</code>', line)

    def _put(self, page: str, text: str) -> None:
        """Show something in the cell's output, in the place of what was there."""
        if self._output is None and not text:
            return
        from IPython.display import display

        data = {"text/html": page, "text/plain": text}
        if self._output is None:
            self._output = display(data, raw=True, display_id=True)
        elif self._output is not None:
            self._output.update(data, raw=True)


@define(eq=False)
class Bar:
    """Something that is under way; alone it shows nothing, a `Screen` shows it.

    Args:
        title: What it is.
        total: How far it will come; None where nobody knows.
        seen: How far it has come.
        unit: Of what.
        delay: Seconds after which it is first shown.
        interval: Seconds between refreshes.
    """

    title: str
    total: float | None = None
    seen: int = 0
    unit: str = "batch"
    delay: float = 0.0
    interval: float = field(factory=lambda: INTERVAL)
    numbers: dict[str, str] = field(factory=dict, init=False)
    """What is shown beside it, by name."""
    times: tuple[float, float | None] | None = field(default=None, init=False)
    """Seconds that all of it has taken, and about how many it still will: shown behind the title."""
    screen: Screen | None = field(default=None, init=False)
    begun: float = field(factory=lambda: monotonic(), init=False)
    due: float = field(init=False)
    is_visible: bool = field(default=False, init=False)
    _pace: tuple[float, float] = field(default=(0.0, 0.0), init=False)
    """How far it has come, and in how many seconds, of late."""
    _measured: tuple[float, int] = field(init=False)
    """When that was last looked at, and how far it had come."""
    _shown: Any = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.due, self._measured = self.begun + (self.delay or self.interval), (self.begun, self.seen)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bar:
        """Return one that is not shown."""
        return Bar(self.title, self.total, self.seen, self.unit, self.delay, self.interval)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """Note that it has come further; shown when it is time."""
        self.seen += count
        if self.screen is not None and monotonic() >= self.due:
            self.refresh()

    def rate(self) -> float | None:
        """Return how far it comes in a second, of late; None where nobody knows yet."""
        now, done = monotonic(), self.seen - self._measured[1]
        took = now - self._measured[0]
        if done > 0 and took > 0:
            fades = math.exp(-took / MEMORY)
            self._pace = (self._pace[0] * fades + done, self._pace[1] * fades + took)
            self._measured = (now, self.seen)
        return self._pace[0] / self._pace[1] if self._pace[1] > 0 else None

    def rest(self) -> float | None:
        """Return about how many seconds are left; None where nobody knows."""
        rate = self.rate()
        return None if self.total is None or rate is None else max(0.0, self.total - self.seen) / rate

    def numbers_in_words(self) -> str:
        """Return what is shown beside it in a notebook."""
        count = f"{self.seen}" if self.total is None else f"{self.seen}/{self.total}"
        told = [f"{name}={number}" for name, number in self.numbers.items()]
        times = [] if self.times is None else [gone_and_left(*self.times)]
        return " ".join([f"{count} {self.unit}", *times, *told])

    def refresh(self) -> None:
        """Show how far it has come."""
        self.due = monotonic() + self.interval
        if self.screen is not None:
            if not self.is_visible:  # those around it stand still from now on: where they are
                for outer in self.screen.bars[: self.screen.bars.index(self)]:
                    outer.refresh()
            self.is_visible = True
            self.screen.write(self._in_terminal if self.screen.file is not None else self.screen.draw)

    def _in_terminal(self) -> None:
        if self.screen is None or self.screen.file is None:
            return
        width = columns_of(self.screen.file)
        own, rate = (monotonic() - self.begun, self.rest()), self.rate()
        standing = Standing(self.title, self.seen, self.total, self.unit, own, rate, self.times, self.numbers)
        line = standing.line(None if width is None else max(width - SPARE, 1))
        columns = None if width is None else max(width - 1, 1)  # what is cleared when it is taken away
        if self._shown is None:
            self._shown = tqdm(
                initial=self.seen, total=self.total, ncols=columns, bar_format=line, leave=False, file=self.screen.file
            )
            return
        self._shown.ncols, self._shown.bar_format = columns, line
        self._shown.n = min(self.seen, self.total) if standing.has_end and self.total is not None else self.seen
        self._shown.refresh()

    def close(self) -> None:
        """Take it away, and those that were opened after it: one whose work has failed may be left."""
        if self.screen is not None:
            for inner in reversed(self.screen.bars[self.screen.bars.index(self) + 1 :]):
                inner.close()
        screen, self.screen = self.screen, None
        if screen is None:
            return
        screen.bars.remove(self)
        if self._shown is not None:
            bar, blank = self._shown, " " * (self._shown.ncols or 0)
            screen.write(lambda: bar.display(blank))  # the terminal may have written behind it, as it does at Ctrl+C
            screen.write(bar.close)
        elif self.is_visible:
            screen.write(screen.draw)

    def cleared(self, again: bool) -> None:
        """Clear its line in a terminal for something else; or draw it again."""
        if self._shown is not None and self.screen is not None:
            self.screen.write(self._shown.refresh if again else self._shown.clear)


def columns_of(file: TextIO | None) -> int | None:
    """Return how wide a terminal is; None where something else is written to."""
    try:
        return os.get_terminal_size(file.fileno()).columns if file is not None else None
    except (OSError, ValueError, AttributeError):  # a file, a stream in memory, something closed
        return None


@contextmanager
def on_screen(screen: Screen | None) -> Iterator[None]:
    """Show bars on a screen inside; None: as outside."""
    leave = None if screen is None else use(screen)
    try:
        yield
    finally:
        if leave is not None:
            leave()


def use(screen: Screen) -> Callable[[], None]:
    """Show bars on a screen from now on; return what ends that."""
    _here.screens.append(screen)
    end = None if screen.file is None else _warn_between_bars()

    def leave() -> None:
        if screen.bars:
            screen.bars[0].close()
        _here.screens.remove(screen)
        if end is not None:
            end()

    return leave


def bar(title: str, total: float | None = None, *, unit: str = "batch") -> Bar:
    """Open a bar of something beside an epoch, shown once that takes long; where no screen is in use, it is not.

    >>> with bar("looking", 3) as progress:
    ...     for _ in range(3):
    ...         progress.advance()
    >>> progress.seen
    3
    """
    if not _here.screens:
        return Bar(title, total, unit=unit)
    return _here.screens[-1].bar(title, total, unit=unit, delay=PATIENCE)


def tracked(things: Iterable[T], title: str, total: int | None = None, *, unit: str = "batch") -> Iterator[T]:
    """Yield things, and show how far that has come, once it takes long."""
    with bar(title, total, unit=unit) as progress:
        for thing in things:
            yield thing
            progress.advance()


def length_of(source: Any) -> int | None:
    """Return how many batches a source says that it has; None where it does not."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


@contextmanager
def between_bars() -> Iterator[None]:
    """Clear the lines of bars in a terminal while something else is written, and draw them again."""
    bars = [bar for screen in _here.screens for bar in screen.bars]
    for each in reversed(bars):
        each.cleared(again=False)
    try:
        yield
    finally:
        for each in bars:
            each.cleared(again=True)


def _warn_between_bars() -> Callable[[], None]:
    """Have warnings, of whomever, stand above the bars from now on; return what ends that."""
    usual = warnings.showwarning

    def show(*args: Any, **options: Any) -> None:
        with between_bars():
            usual(*args, **options)

    def leave() -> None:
        if warnings.showwarning is show:  # otherwise somebody else's is in use, who may go on to this one
            warnings.showwarning = usual

    warnings.showwarning = show
    return leave
