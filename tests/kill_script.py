"""A training to be killed: ``python kill_script.py train FOLDER``; ``serve`` forks some and kills them."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fluxloop
from fluxloop import Callback, EpochBegin, Learner, Phase, Recorder, StepBegin, StepEnd, on
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.scheduler import Scheduler
from fluxloop.checkpoint import folder as files
from fluxloop.hyperparameters import LearningRate
from fluxloop.schedules import cosine
from fluxloop.signals import INTERRUPTED
from fluxloop.testing import _parts

EPOCHS = 8
STARTS, TRAINS, WRITES, DONE = range(4)
NOT_RESTORED, STOPPED, STOPPED_EARLIER = 9, 7, 8

board = mmap.mmap(-1, 16)
"""What a training does, for whoever kills it: byte 0; whether it writes: byte 1; its steps: bytes 8 to 16."""


class Augmented(Dataset[Any]):
    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.xs = torch.rand(count, 5, generator=generator)
        self.ys = (self.xs.sum(1) > 2.5).long()

    def __len__(self) -> int:
        return len(self.xs)

    def __getitem__(self, index: int) -> Any:
        noise = torch.rand(5) + numpy.random.normal() + random.random()
        return self.xs[index] + 0.1 * noise, self.ys[index]


class Tells(Callback):
    """Tells on the board what goes on."""

    draws = False
    transient = ("told",)

    @on(EpochBegin)
    def begin(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        board[0] = TRAINS

    @on(StepBegin)
    def step(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        board[0] = TRAINS

    @on(StepEnd)
    def count(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        board[8:16] = (int.from_bytes(board[8:16], "little") + 1).to_bytes(8, "little")


def accuracy(preds: Tensor, ys: Tensor) -> Tensor:
    return (preds.argmax(1) == ys).float().mean()


def make(folder: Path, background: bool) -> Learner:
    """Make what a script makes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
    data = (DataLoader(Augmented(60), batch_size=4, shuffle=True), DataLoader(Augmented(12), batch_size=4))
    callbacks = [
        Recorder(),
        fluxloop.Metrics(accuracy),
        fluxloop.EMA("model", 0.9),
        Scheduler({LearningRate: cosine(15 * EPOCHS, 0.05, 0.001)}),
        Checkpointer(folder, every=3, unit="step", background=background),
        Tells(),
    ]
    optimizer = partial(torch.optim.Adam, lr=0.05)
    return Learner(
        model,
        nn.functional.cross_entropy,
        data=data,
        optimizer=optimizer,
        callbacks=callbacks,
        seed=0,
        default_callbacks=False,
    )


def digest(state: Any) -> str:
    """Give one number for a whole state."""
    sums = sha256()
    for name, value in sorted(_parts(state).items()):
        sums.update(name.encode())
        sums.update(value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return sums.hexdigest()


def add_and_tell(self: files.Folder, *args: Any, **options: Any) -> Path:
    """Tell on the board while a file is written."""
    board[1] = 1
    try:
        return add(self, *args, **options)
    finally:
        board[1] = 0


add = files.Folder.add


def train(folder: Path, background: bool = False) -> int:
    """Do what the script does, and give its exit status."""
    torch.set_num_threads(1)
    learner = make(folder, background)
    history = learner.fit(EPOCHS, resume=folder)
    board[0] = DONE
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return NOT_RESTORED
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return NOT_RESTORED
    if history.stop_reason is not None:
        return STOPPED if history.stop_reason == INTERRUPTED else NOT_RESTORED
    (folder.parent / f"{folder.name}.digest").write_text(digest(learner.state_dict()))
    return 0


def fork(folder: Path, background: bool) -> int:
    """Start a training as a process of its own; give its id."""
    files.Folder.add = add_and_tell  # type: ignore[method-assign]  # to know what was under way when it was killed
    board[:] = bytes(16)
    # a signal that comes before the process has done anything is kept until it can say so by its status
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with open(folder.parent / f"{folder.name}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        status = train(folder, background)
    except SystemExit as end:
        status = int(end.code or 0)
    except KeyboardInterrupt:
        status = STOPPED_EARLIER
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def look_at(folder: Path) -> str:
    """Look whether every file that can be seen is whole; tell what is not."""
    if not folder.is_dir():
        return ""
    for entry in list(folder.iterdir()):
        if entry.suffix == ".pt":
            try:
                files.read(entry)
            except fluxloop.CheckpointError as error:
                if entry.exists():
                    return str(error)
        elif entry.name == "latest":
            if not files.NAME.fullmatch(entry.read_text().strip()):
                return f"latest says {entry.read_text()!r}"
        elif entry.name != "fluxloop.json" and not (entry.name.startswith(".") and entry.name.endswith(".tmp")):
            return f"there is {entry.name}"
    return ""


def steps_in(folder: Path) -> int:
    """Give the steps of the newest file."""
    found = files.Folder(folder).files()
    return found[-1][0][1] if found else 0


def kill(order: dict[str, Any]) -> dict[str, Any]:
    """Train, and send a signal after a random time, again and again until that happened so often; train to the end."""
    dice = random.Random(order["seed"])
    number, kills, base = order["signal"], order["kills"], Path(order["folder"])
    told: dict[str, Any] = {
        "landed": {"starting": 0, "training": 0, "writing": 0},
        "runs": 0,
        "starts": 0,
        "digests": [],
        "wrong": [],
        "statuses": {},
    }
    begun = time.monotonic()
    sent = 0
    while sent < kills:
        folder = base / f"run-{told['runs']}"
        told["runs"] += 1
        while True:
            before = steps_in(folder)
            pid = fork(folder, order["background"])
            told["starts"] += 1
            if sent < kills:
                deadline = time.monotonic() + dice.uniform(0.0, order["longest"])
                while time.monotonic() < deadline:
                    if wrong := look_at(folder):
                        told["wrong"].append(wrong)
                    time.sleep(0.005)
                does, writes = board[0], board[1]
                os.kill(pid, number)
            _, ended = os.waitpid(pid, 0)
            status = os.waitstatus_to_exitcode(ended)
            told["statuses"][str(status)] = told["statuses"].get(str(status), 0) + 1
            if wrong := look_at(folder):
                told["wrong"].append(wrong)
            if status == 0:
                break
            if status not in (-number, 128 + number, STOPPED, STOPPED_EARLIER):
                told["wrong"].append(f"status {status}: {(base / f'{folder.name}.log').read_text()[-3000:]}")
                return told
            sent += 1
            told["landed"]["writing" if writes else "training" if does == TRAINS else "starting"] += 1
            if status in (128 + number, STOPPED):
                done = before + int.from_bytes(board[8:16], "little")
                if done != steps_in(folder):
                    told["wrong"].append(f"{done} steps were done, and the newest file has {steps_in(folder)}")
        told["digests"].append((base / f"{folder.name}.digest").read_text())
    told["seconds"] = round(time.monotonic() - begun, 1)
    return told


def serve() -> None:
    """Answer each order on stdin by a line on stdout."""
    with TemporaryDirectory() as folder:  # what is imported when it is first used need not be so in each training
        train(Path(folder) / "first")
        begun = time.monotonic()
        train(Path(folder) / "second")
        longest = 0.3 * (time.monotonic() - begun)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(kill({"longest": longest, **json.loads(line)})) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        sys.exit(train(Path(sys.argv[2])))
