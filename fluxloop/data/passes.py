"""One pass through a source of batches: begun anew, or where another one was left; and leaving a source as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

from fluxloop.data.changes import (
    changes_of,
    generators_state,
    private_state,
    put_changes_back,
    put_generators_back,
    put_private_back,
    put_source_back,
    source_state,
)
from fluxloop.data.copies import EARLY, copy_of, use_copy_again
from fluxloop.data.indices import Numbers
from fluxloop.data.kinds import Combined, can_skip, draws_order_anew, drop_early_iterator, is_loader, keeps_place
from fluxloop.data.notes import Notes
from fluxloop.data.share import Share
from fluxloop.data.sharing import is_divided, iterate_share, until_all_end
from fluxloop.data.sources import iterate
from fluxloop.errors import CheckpointError, describe, warn_user
from fluxloop.interfaces import Stateful
from fluxloop.persist.plain import from_plain, to_plain
from fluxloop.randomness import start_torch

if TYPE_CHECKING:
    from fluxloop.processes.group import Group

# The number of the epoch

_told: Notes[int] = Notes()
"""What a listener was told last."""


def listeners(source: Any) -> list[Any]:
    """List what of a source wants to know the epoch: what has ``set_epoch`` of it and its parts.

    Those are the source itself, its data set, its sampler and its batch sampler.
    """
    if isinstance(source, Combined):
        return [each for part in source.parts for each in listeners(part)]
    batch_sampler = getattr(source, "batch_sampler", None)
    parts = (
        source,
        getattr(source, "dataset", None),
        getattr(source, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = {id(part): part for part in parts if callable(getattr(part, "set_epoch", None))}
    return list(found.values())


def tell_epoch(source: Any, epoch: int) -> None:
    """Tell whatever of a source wants to know which epoch begins."""
    for listener in listeners(source):
        _tell(listener, epoch)


def _tell(listener: Any, epoch: int) -> None:
    listener.set_epoch(epoch)
    _told.put(listener, epoch)


def _epochs(source: Any) -> list[tuple[Any, int]]:
    """List the listeners with the epoch each is in, as far as it says so or was told."""
    found = []
    for listener in listeners(source):
        epoch = getattr(listener, "epoch", None)
        if not isinstance(epoch, int):
            epoch = _told.get(listener)
        if epoch is not None:
            found.append((listener, epoch))
    return found


def _tell_again(source: Any, former: list[tuple[Any, int]]) -> None:
    """Tell those whose epoch was changed which one they were in."""
    now = {id(listener): epoch for listener, epoch in _epochs(source)}
    for listener, epoch in former:
        if now.get(id(listener)) != epoch:
            _tell(listener, epoch)


# Leaving a source as it was

_under_way: Notes[bool] = Notes()
"""Sources that keep their place and whose last pass was left before its end, or runs: the next one goes on there.

True where the source has to be told, False where a checkpoint was just put into it.
"""


@contextmanager
def untouched(source: Any, workers_too: bool = True) -> Iterator[None]:
    """Put a loader's own generators, its waiting workers and its place among epochs back on leaving.

    Its own are those of the loader, its sampler and its batch sampler, and those found in its
    dataset's attributes and functions.

    Args:
        source: A loader, or anything.
        workers_too: Whether somebody else uses the loader too: persistent workers, which go on drawing from where
            they are, are left out meanwhile, and what was told an epoch is told it again.
    """
    with ExitStack() as undone:
        for part in source.parts if isinstance(source, Combined) else ():
            undone.enter_context(untouched(part, workers_too))
        if workers_too:
            undone.callback(_tell_again, source, _epochs(source))
        # Undone in reverse: the workers that wait come back first, then the copy that they belong to, then what the
        # generators were.
        state, copied = generators_state(source), copy_of(source)
        undone.callback(put_generators_back, source, state)
        undone.callback(use_copy_again, source, copied)
        loaders: tuple[Any, ...] = (source, copied) if workers_too else ()
        if keeps_place(source):
            undone.callback(_under_way.put, source, _under_way.get(source))
            if not hasattr(source, "_iterator"):  # a loader's place is its iterator, put aside below
                with suppress(AttributeError, NotImplementedError):  # it has nothing to say yet
                    undone.callback(source.load_state_dict, source.state_dict())
        for loader in loaders:
            if hasattr(loader, "_iterator"):
                undone.callback(setattr, loader, "_iterator", loader._iterator)
                loader._iterator = None
                if EARLY in vars(loader):
                    undone.callback(setattr, loader, EARLY, vars(loader)[EARLY])
                    setattr(loader, EARLY, False)
        yield


# A pass


def obstacle(source: Any, name: str | None) -> str | None:
    """Say why a pass through a source cannot be resumed in the middle; None where it can.

    Args:
        source: Of batches.
        name: What the data is called in the message.
    """
    if isinstance(source, Combined):
        return next(filter(None, (obstacle(part, f"{name}/{key}") for key, part in source.named_parts())), None)
    if can_skip(source) or keeps_place(source):
        return None
    named = f"the {name!r} data ({describe(source)})"
    if draws_order_anew(source):
        return (
            f"{named} cannot be resumed in the middle of an epoch: its RandomSampler has no state, so the order would "
            "be drawn anew; expected a DataLoader over map-style data, a sampler that keeps its place (torchdata's: "
            "shuffle=True), or with accelerate use_seedable_sampler=True"
        )
    if is_loader(source):
        return (
            f"{named} cannot be resumed in the middle of an epoch: its dataset draws from generators of its own in "
            "worker processes; expected it to draw from the global ones, which start from a number of its own for "
            "each sample, or num_workers=0"
        )
    return (
        f"{named} cannot be resumed in the middle of an epoch; expected tensors, a Dataset, a DataLoader over "
        "map-style data, or an object with state_dict() and load_state_dict(state)"
    )


class Pass:
    """One pass through a source, with its random numbers where they belong.

    Args:
        source: Of batches.
        numbers: What its random numbers start from.
        epoch: Which epoch what wants to know is told; None to tell nobody.
        place: Where another pass was left, as `place` returned it; None to begin anew.
        group: The processes that share the source, all of which begin a pass now; None for this one alone.
        name: What the data is called in messages.

    Attributes:
        batches: The batches that are left.
        count: How many were taken with `take`, those before the place too.
        share: Whose part of the source it is, and whether the batch given last is a spare one; None for all of it.
    """

    def __init__(
        self,
        source: Any,
        numbers: Numbers,
        epoch: int | None,
        place: dict[str, Any] | None = None,
        group: Group | None = None,
        name: str | None = None,
    ) -> None:
        self.source = source
        self.count = 0
        self._numbers = numbers
        self.share = None if group is None else Share(group, f"the {name} data ({describe(source)})")
        place = of_process(place, group)
        if place is not None:
            self.count = place["batch"]
            put_source_back(source, place)
        self.went_on = False
        """Whether it goes on where the pass before was left before its end."""
        if keeps_place(source):
            self._go_on(place)
        elif draws_order_anew(source) and not drop_early_iterator(source):
            warn_user(
                f"the {name!r} data ({describe(source)}) makes its workers once, or has made them before its first "
                "pass, and its order is in no state: a run that is resumed would take other rows. Expected "
                "shuffle=True (a sampler of torchdata's), or num_workers=0; persistent_workers=False and no "
                "state_dict() before the fit will do as well"
            )
        if epoch is not None and not isinstance(source, Combined):  # which tells its parts
            tell_epoch(source, epoch)
        # Everything that the pass begins with stands now, so this is what another one of the same order begins with.
        # To begin draws from it (a sampler shuffles): where a place is gone on with, the data's own generators and what
        # its parts hold are therefore put a second time, to where they stood at that place.
        self._begun = source_state(source)
        start_torch(numbers.order)
        if isinstance(source, Combined):
            self.batches = source.begin(numbers, epoch, None if place is None else place["running"], self.share)
        else:
            self.batches = self._iterate(numbers, place)
        if place is not None:
            put_changes_back(source, place.get("walk_now", {}))
            put_private_back(source, place["private_now"])
        elif self.went_on:
            self.batches = self._rest_or_all(self.batches)
        if self.share is not None and not isinstance(source, Combined):
            self.batches = until_all_end(source, self.batches, self.share)
        self.draws_at_fetch: bool = getattr(source, "draws_at_fetch", not isinstance(source, (list, tuple)))
        """Whether fetching a batch may draw numbers."""

    def _iterate(self, numbers: Numbers, place: dict[str, Any] | None) -> Iterator[Any]:
        """Iterate the source, or this process's share of it, from the batch at which the pass begins."""
        skip = 0 if keeps_place(self.source) else self.count
        if self.share is None:
            return iterate(self.source, numbers, skip)
        if place is not None and place.get("out"):  # its data has ended: it only waits for the others
            self.share.is_out = True
            return iter(())
        return iterate_share(self.source, numbers, skip, self.share)

    def _go_on(self, place: dict[str, Any] | None) -> None:
        """Make a source that keeps its place go on from there, or from where its last pass was left before its end.

        So does one that a checkpoint between two epochs is put into, and the two are the same run.
        """
        source = self.source
        if place is not None:
            source.load_state_dict(from_plain(place["own"]))
            self.went_on = place.get("went_on", False)
        elif _under_way.get(source) is not None:
            self.went_on = True
            if _under_way.get(source):
                source.load_state_dict(source.state_dict())
        _under_way.put(source, True)

    def _rest_or_all(self, rest: Iterator[Any]) -> Iterator[Any]:
        """Yield the rest of a pass, or a new one where the last one was left at its very end."""
        for batch in rest:
            yield batch
            break
        else:
            self.went_on, rest = False, iterate(self.source, self._numbers)
        yield from rest

    def end(self) -> None:
        """Note that the source has no more batches."""
        _under_way.put(self.source, None)

    def take(self) -> Any:
        """Take the next batch, with numbers of its own; the first one goes on with those the pass began with.

        Raises:
            StopIteration: There is none.
        """
        if self.count and self.draws_at_fetch:
            start_torch(self._numbers.fetch(self.count))
        try:
            batch = next(self.batches)
        except StopIteration:
            self.end()
            raise
        self.count += 1
        return batch

    def place(self, count: int, name: str | None) -> dict[str, Any]:
        """Return where it is, as plain data.

        Where each of several processes has a source that keeps its place, all of them ask for it at once.

        Args:
            count: How many batches were given.
            name: What the data is called in messages.

        Raises:
            CheckpointError: The source cannot say it.
        """
        now = {"walk_now": changes_of(self.source)[0], "private_now": private_state(self.source)}
        place = {**self._begun, **now, "batch": count}
        if isinstance(self.source, Combined):
            place["running"] = self.batches.place(name)  # type: ignore[attr-defined]  # what its begin gave
        elif keeps_place(self.source):
            place |= {"own": own_state(self.source, name), "went_on": self.went_on}
        if self.share is not None:
            place["out"] = self.share.is_out
            return _of_all(self.source, place, self.share.group)
        return place


def _of_all(source: Any, state: dict[str, Any], group: Group) -> dict[str, Any]:
    """Return a state with that of each process, where each has a source that keeps its place."""
    if isinstance(source, Combined) or not keeps_place(source) or is_divided(source, group):
        return state
    return {**state, "of_processes": group.gather_objects(state)}


def of_process(state: dict[str, Any] | None, group: Group | None) -> dict[str, Any] | None:
    """Return this process's state, where each has one of its own."""
    if state is None or "of_processes" not in state:
        return state
    of_all, rank = state["of_processes"], 0 if group is None else group.rank
    return {**state, **(of_all[rank] if rank < len(of_all) else {})}


def check_place(source: Any, place: dict[str, Any], name: str | None) -> None:
    """Raise where a source does not take the generators and samplers that it had at a place; it stays as it was.

    Raises:
        CheckpointError: Says why.
    """
    before = source_state(source)
    try:
        put_source_back(source, place)
        put_private_back(source, place["private_now"])
        from_plain(place.get("own"))
    except Exception as error:
        raise CheckpointError(
            f"the place in the {name} data ({describe(source)}) cannot be put back: {type(error).__name__}: {error}"
        ) from error
    finally:
        put_source_back(source, before)


# Between two passes


def own_state(source: Any, name: str | None) -> Any:
    """Return what a source that keeps its place says of it.

    Raises:
        CheckpointError: It has ``state_dict`` by name only, or returns what no checkpoint can hold.
    """
    try:
        state = cast(Stateful, source).state_dict()
    except (AttributeError, NotImplementedError) as error:
        raise CheckpointError(
            f"the {name!r} data ({describe(source)}) has a state_dict that gives no state ({error}), so an epoch of it "
            "cannot be resumed in the middle; expected the loader that was wrapped: tensors, a Dataset or a DataLoader"
        ) from error
    return to_plain(state, f"the {name} data")


def data_state(source: Any, begun: bool, name: str, group: Group | None = None) -> dict[str, Any]:
    """Return what of a source moves, between two passes.

    Args:
        source: Of batches.
        begun: Whether a pass of this run was made, so that a source that keeps its place has one.
        name: What the data is called in messages.
        group: The processes that share it; None for this one alone. Where each has a source that keeps its place, all
            of them ask for it at once.
    """
    state = {**source_state(source), "own": None}
    if isinstance(source, Combined):
        state["parts"] = [data_state(part, begun, f"{name}/{key}", group) for key, part in source.named_parts()]
    elif begun and keeps_place(source):
        with suppress(CheckpointError):  # it says nothing of itself: it begins anew
            state |= {"own": own_state(source, name), "under_way": _under_way.get(source) is not None}
    return state if group is None else _of_all(source, state, group)


def put_data_back(source: Any, state: dict[str, Any], group: Group | None = None) -> bool:
    """Put a source where `data_state` found it, and tell whether a pass had been made."""
    then, now = len(state.get("of_processes", ())) or 1, 1 if group is None else group.size
    if then != now and not isinstance(source, Combined) and not (group and is_divided(source, group)):
        if state.get("own") is not None:
            warn_user(
                f"{describe(source)} keeps its place for each process, and {then} wrote this checkpoint; there are "
                f"{now} now: it begins anew, and rows may be seen again"
            )
        state = {**state, "own": None}
    state = of_process(state, group) or {}
    put_source_back(source, state)
    if isinstance(source, Combined):
        parts = zip(source.parts, state.get("parts", ()), strict=False)
        return any([put_data_back(part, of_part, group) for part, of_part in parts])
    if state.get("own") is None or not keeps_place(source):
        return False
    cast(Stateful, source).load_state_dict(from_plain(state["own"]))
    _under_way.put(source, False if state.get("under_way") else None)
    return True
