"""Start a script in several processes, as ``torchrun`` does, and look at what each of them did.

A test writes a script, in which `report` keeps what the test is to see, and starts it::

    from processes.launching import run

    SCRIPT = '''
    from processes.launching import report
    learner = ...
    learner.fit(1)
    report(weights=learner.model.state_dict(), loss=learner.history["training/loss"])
    '''

    def test_processes_end_with_the_same_weights() -> None:
        first, second = run(SCRIPT, processes=2).reports
        assert torch.equal(first["weights"]["weight"], second["weights"]["weight"])

Processes are forked from one that has imported torch and fluxloop (``forking.py``), so that a start costs some 0.1 s;
with ``torchrun``, or an environment of their own, some 4 s each. Where processes are to end in different ways,
`run_cases` starts the script once for each case.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent
from typing import Any, Literal

import torch
from attrs import Factory, define
from torch.distributed import TCPStore

from processes.forking import Forked, fork, prepare

ROOT = Path(__file__).parents[2]
FOLDER = "FLUXLOOP_TEST_FOLDER"
SIZES = (2, 4) if os.environ.get("FLUXLOOP_PROCESSES") else (2,)
"""How many processes tests of several start: four as well, and what takes long, where ``FLUXLOOP_PROCESSES=4`` asks
for it."""
LEFT_OUT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
PREFIX = "fluxloop-launched-"
GLOO = r"(?m)^\[Gloo\] Rank \d+ is connected to \d+ peer ranks\..*\n"  # torch 2.10 writes it, whoever may print
SERVERS = f"servers of {os.getpid()}"  # in place of a folder, in the environment of those from which others are forked


def report(**things: Any) -> None:
    """Keep what a process of the script has found, for the test; what a later call names is added or replaced."""
    path = Path(os.environ[FOLDER]) / f"report-{os.environ.get('RANK', '0')}.pt"
    before = torch.load(path, weights_only=False) if path.exists() else {}
    torch.save({**before, **things}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


@define
class Run:
    """What became of a script in several processes.

    Attributes:
        codes: The status of each process; minus the number of a signal that killed it. Of ``torchrun`` its own alone.
        outputs: What each wrote, standard output and errors together; of ``torchrun`` one more: its own.
        reports: What each has kept by `report`.
        ends: Of each process, how many seconds after the start it had ended; none of ``torchrun``.
        left: Ids of the processes that were still there after the last one had ended, and are killed now.
    """

    codes: list[int]
    outputs: list[str]
    reports: list[dict[str, Any]]
    ends: list[float]
    left: list[int]

    def check(self) -> Run:
        """Raise unless all ended well and left no process.

        Raises:
            AssertionError: Shows what each wrote.
        """
        if any(self.codes) or self.left:
            raise AssertionError(f"{self.codes} {self.left}\n" + "\n--------\n".join(self.outputs))
        return self


def run(
    script: str | Path,
    processes: int | None = 2,
    *,
    arguments: Sequence[str] = (),
    timeout: float = 60,
    launcher: Literal["plain", "torchrun"] = "plain",
    options: Sequence[str] = (),
    check: bool = True,
    whole_end: bool = False,
    imports: Sequence[str] = (),
    **environment: str,
) -> Run:
    """Run a script in several processes, until all have ended.

    Args:
        script: A file, or the text of one, which may be indented.
        processes: How many; None: one, that is told nothing of others.
        arguments: Given to the script.
        timeout: Seconds, after which all are killed, and the test fails with what they wrote.
        launcher: ``"plain"``: the processes are forked here, with the environment that ``torchrun`` gives them and a
            store that outlives them, which saves 5 s and tells each one's status. ``"torchrun"``: by itself.
        options: Of ``torchrun``, such as ``"--max-restarts=1"``.
        check: Whether one that does not end well fails the test.
        whole_end: Whether Python takes itself apart in processes that are forked, as they end; else it is left out
            after the handlers of `atexit`, which saves 0.2 s.
        imports: Modules that later processes are to find imported as well.
        **environment: Added to the environment of all; processes are then started anew, not forked.
    """
    with TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        path = script if isinstance(script, Path) else folder / "script.py"
        if isinstance(script, str):
            path.write_text(dedent(script))
        way = "alone" if processes is None else launcher
        order = Order(
            folder, path, arguments, processes or 1, timeout, whole_end, way, imports, environment, options=options
        )
        (told,) = carry_out([order], timeout)
    return told.check() if check else told


def run_cases(
    script: str,
    cases: Sequence[Sequence[str]],
    processes: int | None = 2,
    *,
    timeout: float = 60,
    at_once: int = 4,
    whole_end: bool = False,
) -> list[Run]:
    """Run a script in several processes once for each case, some cases at a time; return what became of each.

    Args:
        script: The text of a script, which may be indented.
        cases: The arguments of the script in each case.
        processes: How many run a case; None: one, that is told nothing of others.
        timeout: Seconds for all cases together.
        at_once: How many cases are under way at a time.
        whole_end: As of `run`.
    """
    with TemporaryDirectory(prefix=PREFIX) as name:
        path = Path(name) / "script.py"
        path.write_text(dedent(script))
        way = "alone" if processes is None else "plain"
        orders = [
            Order(Path(name) / str(number), path, case, processes or 1, timeout, whole_end, way)
            for number, case in enumerate(cases)
        ]
        for order in orders:
            order.folder.mkdir()
        return carry_out(orders, timeout, at_once)


class Fresh(subprocess.Popen[bytes]):
    """A process that was started anew; it notes when it was found to have ended."""

    ended = 0.0

    def poll(self) -> int | None:
        """Return the status; None while the process runs."""
        status = super().poll()
        if status is not None and not self.ended:
            self.ended = time.monotonic()
        return status


@define
class Started:
    """A run that is under way.

    Attributes:
        processes: Those that were started; of ``torchrun`` itself alone.
        begun: When, as `time.monotonic` counts.
        store: Where the processes meet, as long as it is kept.
    """

    processes: Sequence[Forked | Fresh]
    begun: float
    store: TCPStore | None

    @property
    def running(self) -> bool:
        return any(one.poll() is None for one in self.processes)

    def kill(self) -> list[int]:
        """Kill the processes that have not ended, each with its session; return their numbers."""
        late = [number for number, one in enumerate(self.processes) if one.poll() is None]
        for number in late:
            os.killpg(self.processes[number].pid, signal.SIGKILL)
        while self.running:
            time.sleep(0.01)
        return late


@define
class Order:
    """A run that is to take place: what `run` was given, and the folder for what its processes report and write."""

    folder: Path
    script: Path
    arguments: Sequence[str]
    processes: int
    timeout: float
    whole_end: bool = False
    launcher: str = "plain"
    imports: Sequence[str] = ()
    environment: dict[str, str] = Factory(dict)
    options: Sequence[str] = ()

    @property
    def forks(self) -> bool:
        """Whether the processes are forked: what is read from an environment as Python starts is the servers' then."""
        return self.launcher != "torchrun" and not self.environment

    def prepare(self) -> None:
        """Have what forks the processes ready, and what they are to find imported."""
        if self.forks:
            prepare(surroundings(SERVERS), self.processes, self.imports)

    def start(self) -> Started:
        environment, begun = surroundings(str(self.folder)), time.monotonic()
        if self.launcher == "torchrun":
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
            logs = ["--log-dir", str(self.folder / "logs"), "--redirects", "3"]
            whole = [*command, *logs, *self.options]
            return Started([self._anew(whole, environment | self.environment, self._output(0))], begun, None)
        seconds = timedelta(seconds=self.timeout)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=seconds)
        started: list[Forked | Fresh] = []
        for rank in range(self.processes):
            told = {} if self.launcher == "alone" else of_rank(rank, self.processes, store.port)
            own, output = environment | told | self.environment, self._output(rank)
            if self.forks:
                started.append(fork(self.script, self.arguments, own, output, rank, self.whole_end))
            else:
                started.append(self._anew([], own, output))
        return Started(started, begun, store)

    def _anew(self, launcher: list[str], environment: dict[str, str], output: Path) -> Fresh:
        command = [sys.executable, *launcher, str(self.script), *self.arguments]
        with open(output, "wb") as file:
            return Fresh(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )

    def _output(self, number: int) -> Path:
        return self.folder / f"output-{number}"

    def outputs(self) -> list[str]:
        """Return what each process has written; of ``torchrun``, in all attempts, and last what itself has."""
        paths = [path for rank in range(self.processes) if (path := self._output(rank)).exists()]
        texts = [re.sub(GLOO, "", path.read_text(errors="replace")) for path in paths]
        if self.launcher != "torchrun":
            return texts
        logged = [""] * self.processes
        for path in sorted((self.folder / "logs").glob("*/attempt_*/*/std*.log")):
            logged[int(path.parent.name)] += path.read_text(errors="replace")
        return [*logged, *texts]

    def reports(self) -> list[dict[str, Any]]:
        """Return what each process has kept by `report`."""
        paths = [self.folder / f"report-{rank}.pt" for rank in range(self.processes)]
        return [torch.load(path, weights_only=False) if path.exists() else {} for path in paths]


def carry_out(orders: Sequence[Order], timeout: float, at_once: int = 1) -> list[Run]:
    """Start runs, some at a time, and wait until all have ended; return what became of each.

    Raises:
        AssertionError: Some have not ended in time, and were killed; shows what their processes wrote.
    """
    for order in orders:
        order.prepare()
    deadline = time.monotonic() + timeout
    started: list[Started] = []
    while time.monotonic() < deadline:
        running = sum(run.running for run in started)
        if len(started) < len(orders) and running < at_once:
            started.append(orders[len(started)].start())
        elif running:
            time.sleep(0.01)
        else:
            break
    late = [run.kill() for run in started]
    left = kill_what_is_left(
        {str(order.folder) for order in orders}, {one.pid for run in started for one in run.processes}
    )
    if any(late) or len(started) < len(orders):
        shown = (f"{who}\n" + "\n--------\n".join(orders[number].outputs()) for number, who in enumerate(late) if who)
        raise AssertionError(f"not ended after {timeout} s: " + "\n========\n".join(shown))
    told = []
    for order, run in zip(orders, started, strict=True):
        codes = [one.returncode for one in run.processes]
        ends = [one.ended - run.begun for one in run.processes]
        told.append(Run(codes, order.outputs(), order.reports(), ends, left))
    return told


def kill_what_is_left(folders: set[str], sessions: set[int]) -> list[int]:
    """Kill processes that were started for runs and are still there; return their ids.

    The environment in which a program was started names the folder of a run. A forked process has that of its server,
    and is in a session that belongs to the run.
    """
    left = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            told = re.search(rf"(?:^|\0){FOLDER}=([^\0]*)", (entry / "environ").read_text(errors="replace"))
            state, _, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # another user's, or one that has just ended
            continue
        ours = told and (told[1] in folders or (told[1] == SERVERS and int(session) in sessions))
        if ours and state != "Z":
            left.append(int(entry.name))
            os.kill(int(entry.name), signal.SIGKILL)
    return left


def surroundings(folder: str) -> dict[str, str]:
    """Return the environment of a process that reports to a folder."""
    env = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    paths = [str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")]
    return env | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",  # so that what a killed one wrote is there
        "OMP_NUM_THREADS": "1",
        FOLDER: folder,
    }


def of_rank(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return what ``torchrun`` would put into the environment of a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "none",
    }
