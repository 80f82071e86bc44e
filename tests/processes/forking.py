"""A process that has imported what tests of several processes use, and from which theirs are forked.

To import torch and fluxloop takes a process some 3 s; one that is forked has them after 10 ms. `fork` asks one of two
servers, which start at their first use and end with the process of the tests. There are two because the order of a
set differs between processes, by their hash seeds: the second process of a test, the fourth ... are forked from the
other server than the first, the third ..., so that what would depend on such an order is still seen.

Started as a script, this file is a server. An order is a line of JSON on its standard input; on its standard output it
tells the id of the process that it has forked, and later how that one ended.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import runpy
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from attrs import define


@define(eq=False)
class Forked:
    """A process that was forked; what a `subprocess.Popen` tells of itself.

    Attributes:
        pid: Its id, and that of its session.
        returncode: Its status, once it has ended; minus the number of a signal that killed it.
        ended: When it ended, as `time.monotonic` counts; 0 before.
    """

    pid: int
    _server: Server
    returncode: int | None = None
    ended: float = 0.0

    def poll(self) -> int | None:
        """Return the status; None while the process runs."""
        if self.returncode is None:
            self._server.hear()
        return self.returncode


class Server:
    """A server, as the process of the tests sees it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.log = TemporaryFile()  # noqa: SIM115  # as long as the server
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._news = self._process.stdin, self._process.stdout
        self._heard = b""
        self._running: dict[int, Forked] = {}
        self._new: list[int] = []  # ids of processes of which `fork` has not told yet
        self.ready = False
        self.imported: set[str] = set()
        atexit.register(self.close)

    def _order(self, **order: Any) -> None:
        self._orders.write(json.dumps(order).encode() + b"\n")
        self._orders.flush()

    def prepare(self, modules: set[str]) -> None:
        """Wait until the server has imported all, these modules too."""
        if not modules <= self.imported:
            self._order(imports=sorted(modules - self.imported))
        while not self.ready or not modules <= self.imported:
            self.hear(wait=True)

    def fork(self, **order: Any) -> Forked:
        """Have a process forked; what is ordered is the module's `fork` to say."""
        self._order(**order)
        while not self._new:
            self.hear(wait=True)
        return self._running[self._new.pop()]

    def hear(self, wait: bool = False) -> None:
        """Take note of what the server has told.

        Raises:
            AssertionError: It has ended; shows what it wrote.
        """
        while select.select([self._news], [], [], None if wait else 0)[0]:
            text = os.read(self._news.fileno(), 65536)
            if not text:
                self.log.seek(0)
                raise AssertionError(f"the server of forks has ended:\n{self.log.read().decode(errors='replace')}")
            *lines, self._heard = (self._heard + text).split(b"\n")
            for line in lines:
                self._note(json.loads(line))
            wait = wait and not lines

    def _note(self, told: dict[str, Any]) -> None:
        if "ready" in told:
            self.ready = True
        elif "imported" in told:
            self.imported |= {*told["imported"]}
        elif "forked" in told:
            self._new.append(told["forked"])
            self._running[told["forked"]] = Forked(told["forked"], self)
        else:
            process = self._running.pop(told["pid"])
            process.returncode, process.ended = told["status"], told["ended"]

    def close(self) -> None:
        """Let the server end."""
        self._orders.close()
        self._process.wait()
        self._news.close()
        self.log.close()


_servers: list[Server] = []


def prepare(environment: dict[str, str], processes: int, modules: Sequence[str] = ()) -> None:
    """Start the servers that so many processes need, and wait until they have imported all.

    Args:
        environment: That of the servers.
        processes: How many processes are to be forked.
        modules: What the servers import besides.
    """
    number = min(processes, 2)
    while len(_servers) < number:
        _servers.append(Server(environment))
    for server in _servers[:number]:
        server.prepare({*modules})


def fork(
    script: Path, arguments: Sequence[str], environment: dict[str, str], output: Path, rank: int, whole_end: bool
) -> Forked:
    """Run a script in a process that is forked from a server, as ``python script arguments`` would in one of its own.

    Args:
        script: The file.
        arguments: Given to it.
        environment: That of the process.
        output: Becomes the file of what it writes, standard output and errors together.
        rank: Its number among those of a run.
        whole_end: Whether Python takes all modules apart as the process ends; else it only runs the handlers of
            `atexit`, which saves 0.2 s.
    """
    return _servers[rank % 2].fork(
        script=str(script),
        arguments=list(arguments),
        environment=environment,
        output=str(output),
        cwd=os.getcwd(),
        whole_end=whole_end,
    )


# The server


def _import() -> None:
    """Import what scripts use, so that each process finds it there, and leave all else as in a new process."""
    import torch

    import fluxloop
    from fluxloop.testing import toy_learner

    for name in ("torch.distributed.fsdp", "torch.distributed.tensor", "processes.launching"):
        import_module(name)
    numbers = torch.get_rng_state()
    for name in fluxloop.__all__:
        getattr(fluxloop, name)
    toy_learner().fit(1)
    torch.set_rng_state(numbers)
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]  # there is no other way to them
        finalizer.atexit = False  # torch's, of what it has registered: 40 ms in each process
    gc.collect()
    gc.freeze()  # else each process looks through all of it


def _serve() -> dict[str, Any] | None:
    """Fork a process for each order, and tell how it ended, until there are no more orders.

    Returns:
        In a process that was forked, its order; in the server, when all is done, None.
    """
    news, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _import()
    _tell(ready=True)
    orders = b""
    while True:
        ready = select.select([0, news], [], [])[0]
        if news in ready:
            os.read(news, 4096)
            _tell_who_has_ended()
        if 0 not in ready:
            continue
        text = os.read(0, 65536)
        if not text:
            return None
        *lines, orders = (orders + text).split(b"\n")
        for line in lines:
            order: dict[str, Any] = json.loads(line)
            if "imports" in order:
                for name in order["imports"]:
                    import_module(name)
                gc.freeze()
                _tell(imported=order["imports"])
                continue
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(news)
                os.close(wakes)
                return order
            _tell(forked=pid)


def _tell(**told: Any) -> None:
    os.write(1, json.dumps(told).encode() + b"\n")


def _tell_who_has_ended() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _tell(pid=pid, status=os.waitstatus_to_exitcode(status), ended=time.monotonic())


# A process that was forked

_status: int | None = None
"""With what the process ends at once after the handlers of `atexit`; None where Python ends as it always does."""


def _end() -> None:
    """Leave without taking all modules apart; runs after all other handlers, as it was registered before them."""
    if _status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        if _status:
            time.sleep(0.3)  # as long as Python's own end takes: the others get what was sent last
        os._exit(_status)


def _run(order: dict[str, Any]) -> dict[str, Any]:
    """Become the process that was ordered, and run its script; return the script's names, to be kept until the end."""
    global _status
    os.setsid()
    for path, flags, numbers in ((os.devnull, os.O_RDONLY, (0,)), (order["output"], os.O_WRONLY | os.O_CREAT, (1, 2))):
        file = os.open(path, flags)
        for number in numbers:
            os.dup2(file, number)
        os.close(file)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    random.seed()  # of the system, as in a new process
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    sys.path[0] = str(Path(order["script"]).parent)
    sys.argv = [order["script"], *order["arguments"]]
    status: int | None = 1
    try:
        names = runpy.run_path(order["script"], run_name="__main__")
        status = 0
        return names
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        raise
    except KeyboardInterrupt:  # Python has the signal kill it
        status = None
        raise
    finally:
        _status = None if order["whole_end"] else status


if __name__ == "__main__":
    atexit.register(_end)
    _order = _serve()
    if _order is None:
        os._exit(0)
    _names = _run(_order)
