"""Files of checkpoints: written whole or not at all, in a folder that belongs to one run.

A file is written beside its place under a name that nobody reads, made durable, and renamed. Its
name sorts by progress: ``epoch-0003-step-00000120-phase-1.pt`` has three complete epochs, 120 steps,
validation steps among them, and one complete phase of the next epoch. ``latest`` holds the name
of the newest; `fluxloop.json` says whose folder it is.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from attrs import field, frozen

from fluxloop.checkpoint.digests import check_sums, checksums, first_difference, named_tensors
from fluxloop.checkpoint.parts import (
    PART_NAME,
    PARTS,
    names_of_parts,
    parts_of,
    put_together,
    remove_orphans,
    taken_apart,
)
from fluxloop.errors import CheckpointError, annotate, sentence, warn_user
from fluxloop.processes.group import Group
from fluxloop.screen.bars import Bar, bar, tracked

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]  # there are no such locks

CHECKSUMS = "checksums"
"""The entry of a file that holds the checksums of its tensors."""
MARKED = {"what": "checkpoints of a training with fluxloop", "layout": 1}
FORMAT = 1
"""Number of the layout of a checkpoint; a file of another one is refused."""
MARKER, LATEST = "fluxloop.json", "latest"
NAME = re.compile(r"epoch-(\d+)-step-(\d+)-phase-(\d+)\.pt")
HALF_WRITTEN = re.compile(rf"\.({NAME.pattern}|{PART_NAME.pattern}|{re.escape(MARKER)}|{LATEST})\.\d+\.tmp")
Progress = tuple[int, int, int]
"""Complete epochs, steps, and complete phases of the next epoch."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Write plain data so that the file is either complete or not there, also after a crash.

    Raises:
        CheckpointError: It cannot be written, or could not be read again; what was there before is untouched.
    """
    tensors = list(named_tensors(state))  # raises for what could not be read again, before a file is there
    needed = sum(tensor.nbytes for _, tensor in tensors)
    data = {**state, CHECKSUMS: checksums(tracked(tensors, f"checksums of {path.name}", len(tensors), unit="tensor"))}
    _replace(path, lambda file: torch.save(data, file), needed)


class _Counting(io.RawIOBase):
    """A file that counts the bytes written to it, and keeps none."""

    size = 0

    def writable(self) -> bool:
        """Return True: it may be written to."""
        return True

    def write(self, data: Any) -> int:
        """Count the data."""
        self.size += len(data)
        return len(data)


def size_of_file(state: dict[str, Any]) -> int:
    """Return the size in bytes of the file that `write` makes of a state."""
    counting: Any = _Counting()
    torch.save({**state, CHECKSUMS: checksums(list(named_tensors(state)))}, counting)
    return int(counting.size)


class _Noting:
    """A file that notes why it could not be written to: torch raises another error."""

    def __init__(self, file: Any, progress: Bar) -> None:
        self._file, self._progress = file, progress
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write to the file."""
        try:
            written: int = self._file.write(data)
            self._progress.advance(written)
            return written
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _replace(path: Path, put: Any, needed: int = 0, durable: bool = True) -> None:
    temporary, noting = path.with_name(f".{path.name}.{os.getpid()}.tmp"), _Noting(None, Bar(path.name))
    try:
        with open(temporary, "wb") as file, bar(f"writing {path.name}", needed or None, unit="B") as progress:
            noting = _Noting(file, progress)
            put(noting)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)  # only now, with its bytes on the disk: a crash leaves the old file or the new one
        if durable:
            _sync(path.parent)
    except BaseException as error:
        free = _free(path.parent)  # before the part that was written is removed
        try:
            temporary.unlink(missing_ok=True)
        except OSError as failure:
            annotate(error, f"fluxloop: removing {temporary} failed as well: {failure!r}")
        if isinstance(error, (OSError, RuntimeError)):
            raise _unwritten(path, noting.error or error, needed, free) from error
        raise


FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file may not be so big"}
"""What a system says where there is no room for a file."""


def _unwritten(path: Path, error: Exception, needed: int, free: int | None) -> CheckpointError:
    """Return the error that says why a file could not be written."""
    number = getattr(error, "errno", None)
    text = f"the checkpoint {path} cannot be written: "
    if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
        return CheckpointError(
            f"{text}its folder is not there, or no longer ({error}); make it, and leave it where it is while the run "
            "goes on"
        )
    if number in FULL or isinstance(error, RuntimeError):  # torch reports a failing file as a RuntimeError
        room = "" if free is None else f", and {free:,} bytes are free there"
        why = f"{FULL[number]} ({error})" if number in FULL else f"{error}"
        return CheckpointError(
            f"{text}{sentence(why)} It needs about {needed:,} bytes{room}. Make room (or keep fewer: "
            "Checkpointer(keep_last=1)); what was there before is untouched"
        )
    return CheckpointError(f"{text}{error}")


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _sync(folder: Path) -> None:
    """Make a renamed entry of a folder durable, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: Path, weights_only: bool = False) -> dict[str, Any]:
    """Read what `write` wrote; nothing in it is executed.

    Args:
        path: The file.
        weights_only: Whether a module's own ``state_dict()`` will do.

    Raises:
        CheckpointError: There is no such file, it is incomplete or damaged, or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} was given as a checkpoint; expected a file that learner.save wrote")
    state = _load(path)
    if isinstance(state, dict) and PARTS in state:
        state = put_together(path, state, _load)
    if not isinstance(state, dict) or not (weights_only or "fluxloop" in state):
        raise CheckpointError(
            f"{path} is no checkpoint of fluxloop's; expected a file that learner.save or a Checkpointer wrote. For "
            "weights alone: learner.load_weights(path)"
        )
    return state


def _load(path: Path) -> Any:
    """Load a file, and compare it with its checksums.

    Raises:
        CheckpointError: It is incomplete or damaged, or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare the archive's checksums
        if damaged is not None:
            raise CheckpointError(f"the checkpoint {path} is damaged: {damaged!r} in it does not have its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        sums = state.pop(CHECKSUMS, None) if isinstance(state, dict) else None
        wrong = [] if sums is None else list(check_sums(state, sums))
        if wrong:
            raise CheckpointError(
                f"the checkpoint {path} is not as it was written: {'; '.join(wrong[:5])}"
                f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}; expected a file that nobody has changed"
            )
    except CheckpointError:
        raise
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds other things than numbers, texts and tensors, and is not read; expected a file that "
            "learner.save or a Checkpointer wrote, or torch.save(module.state_dict(), path)"
        ) from error
    except Exception as error:
        raise CheckpointError(f"the checkpoint {path} is incomplete or damaged: {error}") from error
    return state


@frozen
class Folder:
    """The checkpoints of one run.

    Args:
        path: The folder.
    """

    path: Path = field(converter=Path)

    def check(self) -> None:
        """Raise for a folder that is not this library's.

        Raises:
            CheckpointError: It has files, and none of them says that it belongs to a run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; expected a folder for checkpoints")
        if self.path.is_dir() and not (self.path / MARKER).exists() and not self.files():
            others = sorted(entry.name for entry in self.path.iterdir())
            others = [name for name in others if not (name.startswith(".") and name.endswith(".tmp"))]
            if others and MARKER not in others:  # another process of the run may have marked it just now
                raise CheckpointError(
                    f"{self.path} is no folder of checkpoints: it has {', '.join(others[:3])} in it; expected a new or "
                    f"empty one, such as {str(self.path / 'checkpoints')!r}"
                )

    def claim(self) -> None:
        """Make the folder, and mark it as a run's.

        Raises:
            CheckpointError: It is somebody else's, or cannot be written to.
        """
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"the folder {self.path} cannot be written to: {error}") from error
        if not (self.path / MARKER).exists():
            text = json.dumps(MARKED)
            _replace(self.path / MARKER, lambda file: file.write(f"{text}\n".encode()))
        release = self._lock()
        if release is not None:  # nobody is writing: what was left half written is gone now
            release()

    def let_go(self) -> None:
        """Take back the mark of a run that is not going to be kept here; one that has checkpoints keeps it."""
        release = None if self.files() else self._lock()
        if release is not None:
            (self.path / MARKER).unlink(missing_ok=True)
            release()

    def lock(self) -> Callable[[], None]:
        """Keep other processes, and other fits of this one, from writing here; return a function that lets them again.

        The system gives a lock back when its process ends, in whatever way, so that of a dead one
        is taken over. What such a process left half written is removed. Where the system has no
        such locks (Windows), nothing is locked.

        Raises:
            CheckpointError: Somebody holds it: names the process.
        """
        release = self._lock()
        if release is None:
            # The marker is read where another process has the lock: to open and close it here would give back one's own
            is_own = _held.get(self.path.resolve()) == os.getpid()
            who = f"this process ({os.getpid()}), in another fit" if is_own else _holder(self.path / MARKER)
            raise CheckpointError(
                f"the folder {self.path} is being written to by {who}; wait until that has ended, or give this run a "
                "folder of its own"
            )
        return release

    def _lock(self) -> Callable[[], None] | None:
        """Lock the folder and remove what dead processes left; None where somebody holds the lock."""
        place = self.path.resolve()
        # Asked before the file is opened: the system would grant a second lock to this process, and take back the first
        # one when the second file is closed.
        if _held.get(place) == os.getpid():
            return None
        try:
            handle = None if fcntl is None else _acquire(self.path / MARKER)
            if handle == BUSY:
                return None
            for entry in self.path.glob(".*.tmp"):
                if HALF_WRITTEN.fullmatch(entry.name):
                    entry.unlink(missing_ok=True)
            remove_orphans(self.path)
        except OSError as error:
            raise CheckpointError(f"the folder {self.path} cannot be written to: {error}") from error
        _held[place] = os.getpid()

        def release() -> None:
            _held.pop(place, None)
            if handle is not None:
                os.close(handle)

        return release

    def files(self) -> list[tuple[Progress, Path]]:
        """List the checkpoints, by progress."""
        try:
            found = [(NAME.fullmatch(entry.name), entry) for entry in self.path.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(((int(m[1]), int(m[2]), int(m[3])), entry) for m, entry in found if m)

    def newest(self) -> dict[str, Any] | None:
        """Read the newest complete checkpoint, and warn of newer ones that are not; None where there is none."""
        for _, path in reversed(self.files()):
            try:
                return read(path)
            except CheckpointError as error:
                warn_user(f"{str(error).removesuffix('.')}; the one before it is taken")
        return None

    def is_complete(self, path: Path) -> bool:
        """Return whether a checkpoint can be read."""
        try:
            read(path)
        except CheckpointError:
            return False
        return True

    def add(self, progress: Progress, state: dict[str, Any], again: bool = False) -> Path:
        """Write a checkpoint, and point to it; a complete one is not overwritten, unless this is the same one again.

        Raises:
            CheckpointError: There is a complete one of that progress, or it cannot be written.
        """
        path = self.path / name_of(progress)
        first = not again and not any(known != path for _, known in self.files())
        if not again and path.exists() and self.is_complete(path):
            raise CheckpointError(f"{path} is there already, and is not overwritten; give the run a folder of its own")
        write(path, state)
        if first:  # better now than after days
            _check_reads(path, state)
        _replace(self.path / LATEST, lambda file: file.write(f"{path.name}\n".encode()), durable=False)  # for people
        return path

    def add_parts(self, progress: Progress, state: dict[str, Any], again: bool, group: Group) -> Path:
        """Write a checkpoint of which each process has a part; all of them have to call this together.

        Each writes its part. Once all have said that they have, the first one writes the index, without which the parts
        are nothing; whoever is killed before leaves the checkpoint before this one as the newest.

        Args:
            progress: How far the run has come.
            state: With the sharded tensors.
            again: Whether this is the same one again.
            group: The processes.

        Raises:
            CheckpointError: As `add` does; or another process could not write its part.
        """
        path = self.path / name_of(progress)
        names = names_of_parts(path.name, group.broadcast(secrets.token_hex(4)), group.size)
        index, parts = taken_apart(state, names)
        own, failure = self.path / names[group.rank], ""
        try:
            write(own, parts)
        except CheckpointError as error:
            failure = str(error)
        failures = {rank: said for rank, said in enumerate(group.gather_objects(failure)) if said}
        if failures:
            own.unlink(missing_ok=True)
            rank, said = next(iter(failures.items()))
            raise CheckpointError(f"process {rank} could not write its part: {said}")
        if group.is_main:
            self.add(progress, index, again)
            for former in parts_of(self.path, path.name):
                if former.name not in names:
                    former.unlink(missing_ok=True)
        group.wait()
        return path

    def remove(self, names: set[str]) -> None:
        """Remove checkpoints by name; other files are never touched."""
        for _, path in self.files():
            if path.name in names:
                try:
                    path.unlink(missing_ok=True)  # the index before its parts: without it they are nothing
                    for part in parts_of(self.path, path.name):
                        part.unlink(missing_ok=True)
                except OSError as error:
                    raise CheckpointError(f"the checkpoint {path} is to be removed, and cannot be: {error}") from error


def _check_reads(path: Path, state: dict[str, Any]) -> None:
    """Read what was just written, and compare.

    Raises:
        CheckpointError: It is not what was written; the file is removed.
    """
    try:
        found = read(path)
        difference = None if PARTS in state else first_difference(state, found)
        if difference is not None:
            raise CheckpointError(difference)
    except CheckpointError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"the first checkpoint of the run was written to {path} and does not come back from there, so it was "
            f"removed: {error}"
        ) from error


_held: dict[Path, int] = {}
"""Folders that a fit of this process writes to, and the process: the system tells only processes apart."""
BUSY = -1


def _acquire(marker: Path) -> int | None:
    """Lock a run's marker and note the process in it; return the open file, `BUSY` where another process holds it.

    None where the file system has no locks. A lock belongs to the process, so a loader's worker
    that outlives it holds none.
    """
    handle = os.open(marker, os.O_RDWR)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        return BUSY if error.errno in (errno.EACCES, errno.EAGAIN) else None
    text = json.dumps({**MARKED, "process": os.getpid(), "host": socket.gethostname()})
    os.ftruncate(handle, 0)  # in place: the lock is on this file, and a new one would have none
    os.pwrite(handle, f"{text}\n".encode(), 0)
    return handle


def _holder(marker: Path) -> str:
    """Return which process holds a lock, as it noted itself."""
    try:
        noted = json.loads(marker.read_text())
        return f"process {noted['process']} on {noted['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def name_of(progress: Progress) -> str:
    """Return the file name of a checkpoint.

    >>> name_of((3, 120, 1))
    'epoch-0003-step-00000120-phase-1.pt'
    """
    epochs, steps, phase = progress
    return f"epoch-{epochs:04d}-step-{steps:08d}-phase-{phase}.pt"


def find_state(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read what a run is resumed from: a file, or the newest complete one of a folder; None where a run begins.

    Raises:
        CheckpointError: The folder is no run's, has checkpoints of which none is complete, or the file is damaged.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"resume={path!r} was given; expected the folder of a Checkpointer: resume='runs/first'")
    if Path(path).name == LATEST:
        path = Path(path).parent
    if Path(path).is_file() or NAME.fullmatch(Path(path).name):
        return read(Path(path))
    folder = Folder(Path(path))
    folder.check()
    state = folder.newest()
    if state is None and folder.files():
        raise CheckpointError(f"none of the {len(folder.files())} checkpoints in {folder.path} is complete")
    return state
