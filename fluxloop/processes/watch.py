"""Watching the other processes: one that was killed, stopped, or raised is named on all, also while these wait for it.

Each process has a thread with a connection of its own to the store. Twice a second it says that it is alive, and looks
at the next process alone, so that a thousand of them cost the store no more than a thousand lookups: of any that fail
together, one at least comes after one that lives. Who finds a failure tells it to all.

A process that was killed, or has left, closes its connections: what the others wait for fails at once, with an error of
torch's that names a port. It becomes a `ProcessError` that names the process and what it died of. Where nothing
closes, as of a process that was stopped, or raised and lives on, the thread ends the process: gloo's waiting cannot be
ended otherwise.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from fluxloop.errors import CancelSignal, ProcessError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # whose public name has no types

INTERVAL = 0.5
"""Seconds between two looks."""
STOPPED_LIMIT = 2.0
"""Seconds of silence after which a process that the system calls stopped is given up."""
FAR_LIMIT = 3.0
"""Seconds of silence after which one of another machine is, once a connection has failed as well."""
SILENT_LIMIT = 20.0
"""Seconds of silence after which one of another machine is, of which nothing else is known: a long call that holds
Python's lock keeps its thread silent too."""
GRACE = 3.0
"""Seconds in which the main thread may end the training by itself, once a failure is known."""

IN, OUT, GONE = "in", "out", "gone"


def this_machine() -> str:
    """Return a text that processes which see each other's ids have in common."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text().strip())
        except OSError:  # there is no such file but on Linux
            pass
    return "/".join(parts)


def state_of(process: int) -> str:
    """Return what the system says of a process of this machine: ``"gone"``, ``"stopped"``, ``"alive"``, ``"unknown"``.

    One that a debugger holds is alive.
    """
    try:
        letter = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return "gone"
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return "gone"
        except OSError:
            pass
        return "unknown"
    except OSError:
        return "unknown"
    return {"Z": "gone", "X": "gone", "T": "stopped"}.get(letter, "alive")


class Beat:
    """What a process last said of itself: in a training, out of it, or gone for good; and where it runs."""

    def __init__(self, text: bytes) -> None:
        self.state, self.count, process, self.machine = text.decode().split(" ", 3)
        self.process = int(process)


class Watcher:
    """Tells the others that this process is alive, and whether they are; made by all processes before they meet.

    Args:
        store: Where the processes meet.
        rank: The number of this process.
        size: How many there are.

    Attributes:
        failure: What has failed on another process, for people; None while all is well.
        failed: The numbers of the processes that have.
        told: Whether the main thread knows of a failure, its own or another's, and ends by itself.
        answer: Returns where the main thread is, for another process that asks.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store = _connect(prefixed("watch", store))
        self.rank, self.size = rank, size
        self.failure: str | None = None
        self.failed: list[int] = []
        self.answer: Callable[[], str] | None = None
        self._depth = self._count = 0
        self._machine = this_machine()
        self._state, self._lock, self._wake = OUT, threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._next = (rank + 1) % size
        self._seen, self._seen_at, self._looked_at = b"", 0.0, 0.0
        self._alarmed = self._ended = self.told = False
        self._host: Beat | None = None
        self._host_stopped_at: float | None = None
        self.store.compare_set("failure", "", "{}")
        self.store.compare_set("question", "", "{}")
        self._say(OUT)

    # What this process says

    def _say(self, state: str | None = None) -> None:
        """Say that this process is alive, and whether it trains."""
        with self._lock:
            self._state = state or self._state
            self._count += 1
            self.store.set(f"beat/{self.rank}", f"{self._state} {self._count} {os.getpid()} {self._machine}")

    def enter(self) -> None:
        """Begin to watch and to be watched, until `leave` is called as often."""
        self._depth += 1
        if self._depth > 1:
            return
        self._say(IN)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else torchrun holds the store
            self._host = self.beats()[0]
        self._looked_at = 0.0
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="fluxloop-watch", daemon=True)
            self._thread.start()
        self._wake.set()

    def leave(self) -> None:
        """End what `enter` has begun."""
        self._depth -= 1
        if not self._depth and not self._ended:
            self._wake.clear()
            try:
                self._say(OUT)
            except RuntimeError:  # the store is gone: there is nobody to tell
                self._ended = True

    def close(self) -> None:
        """Say that this process ends well, and watch no more.

        It waits for the thread that watches: one that is in the store's code while Python ends would have the process
        abort, with "terminate called without an active exception", and a finished run counted as failed.
        """
        self._depth = 0
        self._wake.clear()
        if not self._ended:
            try:
                self._say(GONE)
            except RuntimeError:  # the store is gone, and with it whoever would hear
                pass
        self._ended = True
        self._wake.set()
        self._closed.set()
        if self._thread is not None:
            # No longer: the store may not answer any more. Where nothing has failed, it is a busy machine that is slow
            self._thread.join(5 * GRACE if self.failure is None else GRACE)

    def announce(self, text: str, ranks: list[int] | None = None) -> None:
        """Tell all processes of a failure, unless another one was told before.

        Args:
            text: What has happened, for people.
            ranks: The processes that have failed; left out, this one.
        """
        told = {"ranks": [self.rank] if ranks is None else ranks, "text": text, "by": self.rank}
        try:
            self._heed(self.store.compare_set("failure", "{}", json.dumps(told)))
        except RuntimeError:  # the store is gone
            self._ended = True

    # What it sees

    def beats(self) -> list[Beat]:
        """Return what each process last said of itself."""
        return [Beat(text) for text in self._read([f"beat/{rank}" for rank in range(self.size)])]

    def _read(self, keys: list[str]) -> list[bytes]:
        if getattr(self.store, "has_extended_api", bool)():  # torch's types do not know it
            return self.store.multi_get(keys)
        return [self.store.get(key) for key in keys]

    def _watch(self) -> None:
        while not self._ended:
            self._wake.wait()
            if self._closed.is_set():
                return
            try:
                if not self._host_is_stopped():
                    self.look()
            except RuntimeError as error:
                self._lose_store(error)
            if self.failure is not None:
                self._end_process()
            self._closed.wait(INTERVAL)

    def look(self) -> None:
        """Say that this process is alive, look at the next one, and hear what others have found or ask."""
        self._say()
        beat, failure, question = self._read([f"beat/{self._next}", "failure", "question"])
        self._heed(failure)
        self._reply(question)
        now = time.monotonic()
        late = now - self._looked_at > INTERVAL + 1  # this process itself was stopped, or its thread kept waiting
        self._looked_at = now
        if beat != self._seen or late:
            self._seen, self._seen_at = beat, now
        if self.failure is None and Beat(beat).state == IN:
            text = self._fate(Beat(beat), now - self._seen_at)
            if text is not None:
                self._tell_of({self._next: text})

    def _fate(self, beat: Beat, silent: float) -> str | None:
        """Return what has become of a process that trains and was silent for some seconds; None where it may live."""
        if beat.machine == self._machine:
            state = state_of(beat.process)
            if state == "gone":
                return "was killed or has crashed (signal 9 is that of the system where memory ran out)"
            if state == "stopped" and silent > STOPPED_LIMIT:
                return f"was stopped by a signal (SIGSTOP) and has not answered for {silent:.0f} s"
            if state != "unknown":
                return None
        limit = FAR_LIMIT if self._alarmed else SILENT_LIMIT
        if silent <= limit:
            return None
        return f"has not answered for {silent:.0f} s: it was killed or stopped, or its machine is lost"

    def _tell_of(self, fates: dict[int, str]) -> None:
        """Tell all of the processes that have failed; have those that were stopped go on, so that they end too."""
        beats = self.beats()
        for rank, beat in enumerate(beats):
            if rank != self.rank and beat.machine == self._machine and beat.state == IN and rank not in fates:
                state = state_of(beat.process)
                if state in ("gone", "stopped"):
                    fates[rank] = (
                        "was killed or has crashed" if state == "gone" else "was stopped by a signal (SIGSTOP)"
                    )
        self.announce("; ".join(f"process {rank} {fates[rank]}" for rank in sorted(fates)), sorted(fates))
        for rank in fates:
            beat = beats[rank]
            if beat.machine == self._machine and state_of(beat.process) == "stopped":
                try:
                    os.kill(beat.process, signal.SIGCONT)
                except OSError:  # somebody has ended it
                    pass

    def _heed(self, failure: bytes) -> None:
        told: dict[str, Any] = json.loads(failure)
        if told and self.failure is None:
            self.failed, self.failure = told["ranks"], told["text"]

    def _reply(self, question: bytes) -> None:
        """Say where the main thread is, to a process that has asked."""
        asked: dict[str, Any] = json.loads(question)
        if asked and self.answer is not None:
            self.reply(asked["number"], self.answer())

    def _host_is_stopped(self) -> bool:
        """Return whether the process that holds the store was stopped: to ask the store would block this thread."""
        host, now = self._host, time.monotonic()
        if host is None or host.machine != self._machine or state_of(host.process) != "stopped":
            self._host_stopped_at = None
            return False
        self._host_stopped_at = now if self._host_stopped_at is None else self._host_stopped_at
        if now - self._host_stopped_at > STOPPED_LIMIT and self.failure is None:
            self.failed, self.failure = [0], "process 0 was stopped by a signal (SIGSTOP) and has not answered"
            os.kill(host.process, signal.SIGCONT)  # so that it hears of it, and ends
            self.announce(self.failure, [0])
        return True

    def _lose_store(self, error: RuntimeError) -> None:
        """Take the end of the store for the end of the process that holds it."""
        self._ended = True
        if self._depth and self.failure is None:
            if self._host is None:
                said = str(error).partition("\n")[0]
                self.failure = f"torchrun, where all processes meet, has ended or cannot be reached ({said})"
            else:
                self.failed, self.failure = [0], "process 0 was killed or has crashed: all met there"

    def _end_process(self) -> None:
        """Let the main thread end by itself for a while, then end the process: it waits for one that does not come."""
        deadline = time.monotonic() + (INTERVAL if self.rank in self.failed else GRACE)
        said = False
        while self._depth and not self.told and time.monotonic() < deadline:
            time.sleep(0.05)
            if not said and time.monotonic() > deadline - GRACE + INTERVAL:
                said = self._write()
        if self._depth and not self.told:
            if not said:
                self._write()
            os._exit(1)
        self._ended = True

    def _write(self) -> bool:
        """Write to standard error what has failed, past Python, whose buffer the main thread may hold."""
        try:
            os.write(2, f"fluxloop: process {self.rank} ends, because {self.failure}\n".encode())
        except OSError:  # standard error is closed
            pass
        return True

    def check(self) -> None:
        """Raise where another process has failed, though this one has not met it yet.

        Raises:
            ProcessError: Names it.
        """
        if self.failure is not None and not self.told:
            raise ProcessError(self.failure, self.failed)

    def cause_of(self, error: BaseException) -> str | None:
        """Return what has failed on another process, where that is the reason for an error of this one.

        Where a connection has failed, it waits for the news.
        """
        if not is_of_connections(error):
            return None
        self._alarmed = True
        deadline = time.monotonic() + FAR_LIMIT + 3 * INTERVAL
        while self.failure is None and time.monotonic() < deadline:
            try:
                self._find_who_left()
            except RuntimeError as lost:
                self._lose_store(lost)
            time.sleep(0.1)
        return self.failure

    def _find_who_left(self) -> None:
        """Look for processes that are gone though they were in no training, or that have left it in good order."""
        self._heed(self._read(["failure"])[0])
        if self.failure is not None:
            return
        beats, fates = self.beats(), {}
        for rank, beat in enumerate(beats):
            here = rank != self.rank and beat.machine == self._machine
            if beat.state == GONE:
                fates[rank] = "has ended, while others still train"
            elif here and state_of(beat.process) == "gone":
                fates[rank] = "was killed or has crashed"
        if fates:
            self._tell_of(fates)

    def ask(self, number: str) -> None:
        """Ask the others where their main threads are; they answer until something else is asked."""
        self.store.set("question", json.dumps({"number": number}))

    def reply(self, number: str, place: str) -> None:
        """Say where the main thread is, to those that ask under a number."""
        self.store.set(f"answer/{number}/{self.rank}", place)

    def answers(self, number: str) -> dict[int, str]:
        """Return what those have answered that have."""
        keys = [(rank, f"answer/{number}/{rank}") for rank in range(self.size) if rank != self.rank]
        return {rank: self.store.get(key).decode() for rank, key in keys if self.store.check([key])}

    def wait_for_others(self, seconds: float = 10.0) -> None:
        """Wait until no other process is in a training; the store of all ends with this one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            others = [beat for rank, beat in enumerate(self.beats()) if rank != self.rank]
            if not any(beat.state == IN and state_of(beat.process) != "gone" for beat in others):
                return
            time.sleep(0.02)


def prefixed(name: str, store: Store) -> Store:
    """Return a store in a store, whose keys are apart from those of others."""
    inner: Store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]  # torch exports it without saying so
    return inner


def _connect(store: Store) -> Store:
    """Return a store with a connection of its own: the main thread may wait in the other one."""
    try:
        clone: Store = store.clone()  # type: ignore[attr-defined]  # torch's types do not know it
        return clone
    except (AttributeError, RuntimeError):  # an older torch; or a store that is no server's
        return store


MARKS = ("gloo", "nccl", "connection", "timed out", "socket", "broken pipe", "tcpstore", "process group", "aborted")


def is_of_connections(error: BaseException) -> bool:
    """Return whether an error may say no more than that another process does not answer."""
    if isinstance(error, ProcessError):
        return False
    if isinstance(error, getattr(dist, "DistError", ())):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in MARKS)


def in_words(error: BaseException, rank: int) -> str:
    """Say what a process has raised, and where: ``"process 1 raised ValueError: ... in TrainingPhase(), epoch 2"``."""
    said = str(error) if isinstance(error, ProcessError) else f"process {rank} raised {type(error).__name__}: {error}"
    text = said.rstrip(": ")
    notes = [
        note.removeprefix("fluxloop: ") for note in getattr(error, "__notes__", ()) if note.startswith("fluxloop: ")
    ]
    return f"{text} ({'; '.join(notes)})" if notes else text


@contextmanager
def watched(watcher: Watcher, leave: Callable[[], object]) -> Iterator[None]:
    """Watch the other processes, and let them watch this one; an error ends all.

    Args:
        watcher: Does it.
        leave: Leaves the group, once a process has failed.

    Raises:
        ProcessError: Another process has failed; names it, and what happened.
    """
    watcher.enter()
    try:
        yield
        watcher.check()
    except CancelSignal:
        raise
    except BaseException as error:
        if watcher.told:  # inside, where the error came from
            raise
        cause = watcher.cause_of(error)
        watcher.told = True
        if cause is None:
            watcher.announce(in_words(error, watcher.rank))
            leave()
            raise
        leave()
        raise ProcessError(cause, watcher.failed) from error
    finally:
        watcher.leave()
