"""Several loaders in one step: labelled and unlabelled rows, unpaired images of two kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from fluxloop.data.indices import Numbers
from fluxloop.data.kinds import Combined
from fluxloop.data.loaders import as_dataloader, holds_rows
from fluxloop.data.passes import Pass, data_state, put_data_back, tell_epoch
from fluxloop.data.sharing import fetched_apart, own_length, steps
from fluxloop.errors import DataError, describe, did_you_mean
from fluxloop.guard.given import as_plain
from fluxloop.randomness import Stream, draw_seed, stream_seed

if TYPE_CHECKING:
    from fluxloop.data.share import Share

MODES = ("min_size", "max_size", "max_size_cycle", "sequential")
PASSES = 1000
"""How many passes an epoch is taken to have, at most, through a loader of unknown length that begins anew."""


class CombinedLoader(Combined):
    """One batch of each of several loaders in every step.

    A batch is a dict (or list, or tuple) like the one given, with a batch of each loader. In a
    learner every loader has random numbers of its own, which follow from the run's seed and the
    loader's name; an epoch is resumed in the middle where each of them can be.

    Args:
        loaders: By name, or a list or tuple of them. What holds rows (tensors, arrays, a map-style
            ``Dataset``) is shuffled, in batches of 32; for other options give ``as_dataloader(rows, ...)``.
        mode: When an epoch ends, and what becomes of loaders that end before:

            - ``"max_size_cycle"``: with the longest; one that has ended begins anew, in a new order.
            - ``"max_size"``: with the longest; None stands for the batch of one that has ended.
            - ``"min_size"``: with the shortest.
            - ``"sequential"``: the loaders follow one another; a batch is that of a loader, as it is.

    Raises:
        DataError: No loaders, one that cannot be iterated again where it has to, or an unknown mode.

    Example:
        >>> both = CombinedLoader({"labelled": [1, 2], "unlabelled": [3, 4, 5]})
        >>> list(both), len(both)
        ([{'labelled': 1, 'unlabelled': 3}, {'labelled': 2, 'unlabelled': 4}, {'labelled': 1, 'unlabelled': 5}], 3)
    """

    draws_at_fetch = False
    """Each loader's numbers are started as it is asked."""

    def __init__(self, loaders: Mapping[str, Any] | Sequence[Any], mode: str = "max_size_cycle") -> None:
        if mode not in MODES:
            raise DataError(
                f"CombinedLoader(mode={mode!r}) was given; expected one of {MODES}{did_you_mean(str(mode), MODES)}"
            )
        loaders = as_plain(loaders)
        if not isinstance(loaders, (dict, list, tuple)) or not loaders:
            raise DataError(
                f"CombinedLoader was given {describe(loaders)}; expected a dict of loaders by name, or a list of them"
            )
        self.mode = mode
        self.names: list[Any] = list(loaders) if isinstance(loaders, dict) else list(range(len(loaders)))
        given = loaders.values() if isinstance(loaders, dict) else loaders
        self.parts = [as_dataloader(each, shuffle=holds_rows(each)) for each in given]
        self._kind = dict if isinstance(loaders, dict) else type(loaders)
        for name, part in self.named_parts():
            if mode == "max_size_cycle" and hasattr(part, "__next__"):
                raise DataError(
                    f"the loader {name!r} ({describe(part)}) can be iterated once only, and mode='max_size_cycle' "
                    "begins anew; expected a loader, a list of batches or a Dataset, or mode='min_size'"
                )

    @property
    def loaders(self) -> Any:
        """The loaders, in the structure in which they were given."""
        return self.together(self.parts)

    def together(self, items: list[Any]) -> Any:
        """Put one item for each loader into the structure in which the loaders were given."""
        return dict(zip(self.names, items, strict=True)) if self._kind is dict else self._kind(items)

    def named_parts(self) -> list[tuple[str, Any]]:
        """List the loaders with their names, or their places in the list."""
        return [(str(name), part) for name, part in zip(self.names, self.parts, strict=True)]

    def __len__(self) -> int:
        """Number of batches.

        Raises:
            TypeError: A loader has no length.
        """
        lengths = [own_length(part) for part in self.parts]
        length = self.length(lengths)
        if length is None:
            unknown = [name for (name, _), length in zip(self.named_parts(), lengths, strict=True) if length is None]
            raise TypeError(f"CombinedLoader has no length: its loaders {unknown} have none")
        return length

    def length(self, lengths: list[int | None]) -> int | None:
        """Return the number of batches from those of the loaders; None where one is unknown."""
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            return None
        if self.mode == "sequential":
            return sum(known)
        return min(known) if self.mode == "min_size" else max(known)

    def __iter__(self) -> Iterator[Any]:
        """Iterate outside of a learner: the orders follow from a number drawn from torch's global generator."""
        order = draw_seed()
        numbers = Numbers(order, Stream(order, "fetch").at, Stream(order, "sample").at)
        return fetched_apart(self.begin(numbers, None, None))

    def begin(self, numbers: Numbers, epoch: int | None, running: Any, share: Share | None = None) -> _Together:
        """Begin a pass, or go on with one.

        Args:
            numbers: What its random numbers start from.
            epoch: Which epoch the loaders are told; None for none.
            running: What ``place(name)`` of the pass gave that it goes on from.
            share: The part of it that a process takes, where several share it.
        """
        lengths = [own_length(part) if share is None else steps(part, share.group) for part in self.parts]
        known = [length for length in lengths if length]
        parts = []
        for (name, source), length in zip(self.named_parts(), lengths, strict=True):
            passes = 1
            if self.mode == "max_size_cycle":
                # so that no two passes of this loader are told the same number, in whatever epochs
                passes = ceil(max(known) / length) if length and len(known) == len(lengths) else PASSES
            parts.append(_Part(name, source, numbers.order, None if epoch is None else epoch * passes, share))
        return _Together(self, parts, running) if share is None else _Shared(self, parts, running, share)

    def set_epoch(self, epoch: int) -> None:
        """Tell the loaders which epoch comes next, as ``DistributedSampler.set_epoch`` does; a learner does so."""
        tell_epoch(self, epoch)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}: {describe(part)}" for name, part in self.named_parts())
        return f"CombinedLoader({inside}, mode={self.mode!r})"


class _Part:
    """A loader within a pass through several."""

    def __init__(self, name: str, source: Any, order: int, epoch: int | None, share: Share | None) -> None:
        self.name = name
        self.source = source
        self._group = None if share is None else share.group
        self._order = order
        self._epoch = epoch
        self.begun = 0
        """How many passes of its own have begun."""
        self.ended = False
        """Whether a pass of its own has ended."""
        self.run: Pass | None = None

    def take(self) -> Any:
        """Return its next batch; where its last pass has ended, the first one of a new pass.

        Raises:
            StopIteration: Its pass has ended.
        """
        run = self._begin(None) if self.run is None else self.run
        try:
            return run.take()
        except StopIteration:
            self.run = None
            if run.went_on:  # with the rest of a pass of the epoch before
                return self.take()
            self.ended = True
            raise

    def again(self) -> Any:
        """Return its next batch, of a new pass where the last one has ended.

        Raises:
            DataError: The new one gave none.
        """
        for _ in range(2):
            try:
                return self.take()
            except StopIteration:
                pass
        raise DataError(
            f"the loader {self.name!r} ({describe(self.source)}) gave no batch when it began anew; expected at "
            "least one, each time it is iterated"
        )

    def _begin(self, place: Any) -> Pass:
        number = self.begun - (place is not None)  # of the pass, from 0
        self.begun = number + 1
        order, name = self._order, f"{self.name}/{number}"
        numbers = Numbers(
            stream_seed(order, name), Stream(order, f"{name}/fetch").at, Stream(order, f"{name}/sample").at
        )
        epoch = None if self._epoch is None else self._epoch + number
        self.run = Pass(self.source, numbers, epoch, place, self._group, self.name)
        return self.run

    def place(self, name: str | None) -> dict[str, Any]:
        """Return where it is, as plain data."""
        run = None if self.run is None else self.run.place(self.run.count, f"{name}/{self.name}")
        between = (
            None if self.run is not None or not self.begun else data_state(self.source, True, str(name), self._group)
        )
        return {"begun": self.begun, "ended": self.ended, "run": run, "between": between}

    def go_on(self, place: dict[str, Any]) -> None:
        """Go on from a place."""
        self.begun, self.ended = place["begun"], place["ended"]
        if place["between"] is not None:
            put_data_back(self.source, place["between"], self._group)
        if place["run"] is not None:
            self._begin(place["run"])


class _Together:
    """A pass through several loaders, by the combined loader's mode."""

    def __init__(self, loader: CombinedLoader, parts: list[_Part], running: Any) -> None:
        self._loader = loader
        self._parts = parts
        self._take: Callable[[], Any] = getattr(self, f"_{loader.mode}")
        self._over = False
        for part, place in zip(parts, running or (), strict=False):
            part.go_on(place)

    def place(self, name: str | None) -> list[dict[str, Any]]:
        """Return where each of the loaders is, as plain data."""
        return [part.place(name) for part in self._parts]

    def __iter__(self) -> _Together:
        return self

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        try:
            return self._take()
        except StopIteration:
            self._over = True
            raise

    def _min_size(self) -> Any:
        return self._loader.together([part.take() for part in self._parts])

    def _max_size(self) -> Any:
        return self._loader.together(self._of_all_that_last())

    def _max_size_cycle(self) -> Any:
        items = self._of_all_that_last()
        for place, part in enumerate(self._parts):
            if part.ended:
                items[place] = part.again()
        return self._loader.together(items)

    def _of_all_that_last(self) -> list[Any]:
        """Return the next batch of each loader that has not ended, None for the others.

        Raises:
            StopIteration: All have.
        """
        items = []
        for part in self._parts:
            try:
                items.append(None if part.ended else part.take())
            except StopIteration:
                items.append(None)
        if all(part.ended for part in self._parts):
            raise StopIteration
        return items

    def _sequential(self) -> Any:
        for part in self._parts:
            if not part.ended:
                try:
                    return part.take()
                except StopIteration:
                    continue
        raise StopIteration


class _Shared(_Together):
    """A process's part of a pass through several loaders.

    The first loader that has a batch in a step says whether this process's is a spare one, as its rows say what the
    step weighs. Of another loader that has no rows for this process the rows are repeated, and count.
    """

    def __init__(self, loader: CombinedLoader, parts: list[_Part], running: Any, share: Share) -> None:
        super().__init__(loader, parts, running)
        self._share = share

    def __next__(self) -> Any:
        batch = super().__next__()
        first = next(part.run for part in self._parts if part.run is not None)
        self._share.is_spare = first.share is not None and first.share.is_spare
        return batch
