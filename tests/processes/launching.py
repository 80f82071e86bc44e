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

A start costs some 3 s: let one script run all that a file wants to know (a fixture with ``scope="module"``). Where
processes are to end in different ways, `run_cases` starts the script once for each case, and imports torch once.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent
from typing import IO, Any, Literal

import torch
from attrs import define
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
FOLDER = "FLUXLOOP_TEST_FOLDER"
SIZES = (2, 4) if os.environ.get("FLUXLOOP_PROCESSES") else (2,)
"""How many processes tests of several start: four as well, and what takes long, where ``FLUXLOOP_PROCESSES=4`` asks
for it."""
LEFT_OUT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


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
        seconds: How long it took until all had ended.
        ends: Of each process, how many seconds after the start it had ended; none of ``torchrun``.
        left: Ids of the processes that were still there after the last one had ended, and are killed now.
    """

    codes: list[int]
    outputs: list[str]
    reports: list[dict[str, Any]]
    seconds: float
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
    processes: int = 2,
    *,
    arguments: Sequence[str] = (),
    timeout: float = 60,
    launcher: Literal["plain", "torchrun"] = "plain",
    options: Sequence[str] = (),
    check: bool = True,
    **environment: str,
) -> Run:
    """Run a script in several processes, until all have ended.

    Args:
        script: A file, or the text of one, which may be indented.
        processes: How many.
        arguments: Given to the script.
        timeout: Seconds, after which all are killed, and the test fails with what they wrote.
        launcher: ``"plain"``: the processes are started here, with the environment that ``torchrun`` gives them and a
            store that outlives them, which is faster by 2 s and tells each one's status. ``"torchrun"``: by itself.
        options: Of ``torchrun``, such as ``"--max-restarts=1"``.
        check: Whether one that does not end well fails the test.
        **environment: Added to the environment of all.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="fluxloop-launched-")))
        path = script if isinstance(script, Path) else folder / "script.py"
        if isinstance(script, str):
            path.write_text(dedent(script))
        env = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
        paths = [str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")]
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", FOLDER: str(folder)}
        env |= environment
        begun = time.monotonic()
        if launcher == "plain":
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
            own = [env | _rank(rank, processes, store.port) for rank in range(processes)]
            commands = [[sys.executable, str(path), *arguments]] * processes
        else:
            own = [env]
            command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            logs = ["--log-dir", str(folder / "logs"), "--redirects", "3"]
            commands = [[sys.executable, "-m", *command, *logs, *options, str(path), *arguments]]
        files = [stack.enter_context(open(folder / f"output-{number}", "w+b")) for number in range(len(own))]
        started = [
            subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=one, start_new_session=True
            )
            for command, file, one in zip(commands, files, own, strict=True)
        ]
        ends, late = _wait(started, begun + timeout)
        seconds = time.monotonic() - begun
        left = _kill_what_is_left(folder)
        outputs = [*_logged(folder, processes), *map(_text, files)]
        if late:
            raise AssertionError(f"not ended after {timeout} s: {late}\n" + "\n--------\n".join(outputs))
        reports = [_reported(folder, rank) for rank in range(processes)]
        told = Run([one.returncode for one in started], outputs, reports, seconds, [end - begun for end in ends], left)
        return told.check() if check else told


def run_cases(
    script: str, cases: Sequence[Sequence[str]], processes: int = 2, *, timeout: float = 60, at_once: int = 4
) -> list[Run]:
    """Run a script in several processes once for each case, some cases at a time; return what became of each.

    The processes are forked from one that has imported fluxloop, so that a start costs some 50 ms.

    Args:
        script: The text of a script, which may be indented.
        cases: The arguments of the script in each case.
        processes: How many run a case.
        timeout: Seconds for all cases together.
        at_once: How many cases are under way at a time.
    """
    with TemporaryDirectory(prefix="fluxloop-launched-") as name:
        folder = Path(name)
        (folder / "script.py").write_text(dedent(script))
        stores = [
            TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
            for _ in cases
        ]
        for number in range(len(cases)):
            (folder / str(number)).mkdir()
        order = {
            "script": str(folder / "script.py"),
            "cases": [list(case) for case in cases],
            "ports": [store.port for store in stores],
            "processes": processes,
            "at_once": at_once,
        }
        (folder / "order.json").write_text(json.dumps(order))
        env = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
        paths = [str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")]
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", FOLDER: str(folder)}
        env["PYTHONUNBUFFERED"] = "1"  # so that what a killed one wrote is there
        command = [sys.executable, __file__, str(folder)]
        with open(folder / "output", "w+b") as file:
            server = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
            _, late = _wait([server], time.monotonic() + timeout)
            left = _kill_what_is_left(folder)
            outputs = [[(folder / str(n) / f"output-{r}") for r in range(processes)] for n in range(len(cases))]
            texts = [[p.read_text(errors="replace") if p.exists() else "" for p in row] for row in outputs]
            if late or server.returncode:
                shown = "\n".join(f"{case}: {text}" for case, text in zip(cases, texts, strict=True))
                raise AssertionError(f"not ended after {timeout} s, or failed: {_text(file)}\n{shown}")
        told = json.loads((folder / "told.json").read_text())
        return [
            Run(
                each["codes"],
                text,
                [_reported(folder / str(number), rank) for rank in range(processes)],
                max(each["ends"]),
                each["ends"],
                left,
            )
            for number, (each, text) in enumerate(zip(told, texts, strict=True))
        ]


def _serve(folder: Path) -> None:
    """Fork the processes of each case, and tell what became of them."""
    from fluxloop.testing import toy_learner

    toy_learner().fit(1)  # what is imported for a fit is imported once for all of them
    gc.freeze()  # else each of them looks through all of it as it ends, which takes a second

    order = json.loads((folder / "order.json").read_text())
    size, cases = order["processes"], order["cases"]
    told: list[dict[str, Any]] = [{"codes": [0] * size, "ends": [0.0] * size} for _ in cases]
    running: dict[int, tuple[int, int]] = {}
    begun = [0.0] * len(cases)
    waiting = list(range(len(cases)))
    while waiting or running:
        while waiting and len({case for case, _ in running.values()}) < order["at_once"]:
            case = waiting.pop(0)
            begun[case] = time.monotonic()
            for rank in range(size):
                pid = os.fork()
                if not pid:
                    _become(folder / str(case), rank, size, order["ports"][case])
                    sys.argv = [order["script"], *cases[case]]
                    runpy.run_path(order["script"], run_name="__main__")
                    return
                running[pid] = (case, rank)
        pid, status = os.waitpid(-1, 0)
        case, rank = running.pop(pid)
        told[case]["codes"][rank] = os.waitstatus_to_exitcode(status)
        told[case]["ends"][rank] = time.monotonic() - begun[case]
    (folder / "told.json").write_text(json.dumps(told))


def _become(folder: Path, rank: int, size: int, port: int) -> None:
    """Make this process one of a case: its environment, and where it writes."""
    os.environ.update({**_rank(rank, size, port), FOLDER: str(folder)})
    with open(folder / f"output-{rank}", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _rank(rank: int, processes: int, port: int) -> dict[str, str]:
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


def _wait(started: list[subprocess.Popen[bytes]], deadline: float) -> tuple[list[float], list[int]]:
    """Wait until all have ended, and kill those that have not in time; return when each ended, and which were late."""
    ends = [0.0] * len(started)
    while True:
        for number, process in enumerate(started):
            if not ends[number] and process.poll() is not None:
                ends[number] = time.monotonic()
        late = [number for number, end in enumerate(ends) if not end]
        if not late or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for number in late:
        os.killpg(started[number].pid, signal.SIGKILL)
        started[number].wait()
    return ends, late


def _kill_what_is_left(folder: Path) -> list[int]:
    """Kill processes that were started for a run and are still there; return their ids."""
    left = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            told = f"{FOLDER}={folder}".encode() in (entry / "environ").read_bytes().split(b"\0")
            zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:  # another user's, or one that has just ended
            continue
        if told and not zombie:
            left.append(int(entry.name))
            os.kill(int(entry.name), signal.SIGKILL)
    return left


def _logged(folder: Path, processes: int) -> list[str]:
    """Return what ``torchrun`` has kept of each process, of all its attempts."""
    if not (folder / "logs").is_dir():
        return []
    texts = [""] * processes
    for path in sorted((folder / "logs").glob("*/attempt_*/*/std*.log")):
        texts[int(path.parent.name)] += path.read_text(errors="replace")
    return texts


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _reported(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"report-{rank}.pt"
    return torch.load(path, weights_only=False) if path.exists() else {}


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
