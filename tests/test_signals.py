from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import fluxloop
from fluxloop import Checkpointer, Recorder, StepBegin, TrainingPhase, UnsafeCallback, on
from fluxloop.checkpoint.folder import Folder
from fluxloop.testing import EventRecorder, assert_same_bits, toy_learner
from processes import launching


class Signal(UnsafeCallback):
    """Sends this process a signal in a step of training, counted from 1."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    @on(StepBegin, TrainingPhase)
    def send(self, event: StepBegin, phase: TrainingPhase, learner: Any) -> None:
        if learner.history[type(phase)].steps + 1 == self.step:
            os.kill(os.getpid(), self.number)


class Looks(UnsafeCallback):
    """Notes at each training step which steps there are checkpoints of."""

    transient = ("files",)

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, []

    @on(StepBegin, TrainingPhase)
    def look(self, event: StepBegin, phase: TrainingPhase, learner: Any) -> None:
        self.files.append([progress[1] for progress, _ in Folder(self.folder).files()])


def test_sigterm_ends_a_fit_without_a_checkpointer_in_good_order_too(capsys: pytest.CaptureFixture[str]) -> None:
    events = EventRecorder()
    learner = toy_learner(Recorder(), Signal(signal.SIGTERM, 3), events)
    with pytest.raises(SystemExit) as exit:
        learner.fit(3)
    assert exit.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert learner.history.stop_reason == "terminated (SIGTERM)"
    assert learner.history[TrainingPhase].steps == 3
    assert events.events[-1] == "FitEnd"
    assert capsys.readouterr() == (
        "",
        "fluxloop: a SIGTERM ended the fit after 0 of 3 epochs and 3 training steps; no Checkpointer was among the "
        "callbacks, so that nothing of it is kept\n",
    )


def test_a_run_that_a_signal_ends_says_from_where_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = toy_learner(Recorder(), Signal(signal.SIGTERM, 20), Checkpointer(tmp_path))
    with pytest.raises(SystemExit):
        learner.fit(3, resume=tmp_path)
    assert capsys.readouterr().err == (
        "fluxloop: a SIGTERM ended the fit after 1 of 3 epochs and 20 training steps; the same command goes on from "
        f"there: fit(3, resume={str(tmp_path)!r})\n"
    )
    again = toy_learner(Recorder(), Checkpointer(tmp_path))
    assert again.fit(3, resume=tmp_path)[TrainingPhase].steps == 48


def test_an_error_in_a_fit_that_is_being_terminated_is_not_lost() -> None:
    def fail(learner: Any) -> None:
        if learner._running.stop_requested:
            raise ZeroDivisionError("on purpose")

    class Fails(Signal):
        @on(fluxloop.StepEnd, TrainingPhase)
        def end(self, event: Any, phase: Any, learner: Any) -> None:
            fail(learner)

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        toy_learner(Recorder(), Fails(signal.SIGTERM, 2)).fit(1)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the system has no such signal")
def test_sigusr1_writes_a_checkpoint_and_training_goes_on(tmp_path: Path) -> None:
    plain = toy_learner(Recorder())
    plain.fit(2)
    looks = Looks(tmp_path)
    asked = toy_learner(
        Recorder(),
        Signal(signal.SIGUSR1, 3),
        Checkpointer(tmp_path, keep_last=None),
        looks,
    )
    assert asked.fit(2).stop_reason is None
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert (looks.files[2], looks.files[3]) == ([0], [3])
    assert_same_bits(plain, asked)


HANGS = """
import json, os, sys, time
import torch
from functools import partial
from torch import nn
from torch.utils.data import DataLoader, Dataset
from fluxloop import *
from fluxloop import signals

signals.GRACE = 0.3
folder, hangs = sys.argv[1], sys.argv[2] == "hangs"
torch.set_num_threads(1)

class Rows(Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, index):
        if hangs and index == 9:
            print("hangs", flush=True)
            time.sleep(60)
        return torch.full((1,), float(index)) + torch.rand(1), torch.ones(1)

torch.manual_seed(0)
loader = DataLoader(Rows(), batch_size=2, num_workers=1, prefetch_factor=1)
sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
learner = Learner(
    nn.Sequential(nn.Dropout(0.2), nn.Linear(1, 1)), nn.functional.mse_loss, data=(loader,), optimizer=sgd, seed=0,
    callbacks=[Recorder(), Checkpointer(folder)], default_callbacks=False, accelerator=Accelerator("cpu"),
)
learner.fit(1, resume=folder)
print(json.dumps([learner.model[1].weight.item(), learner.history[TrainingPhase].steps]))
"""


@pytest.mark.slow
def test_sigterm_ends_a_process_whose_next_batch_never_comes_and_loses_no_step(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(HANGS)
    folder = tmp_path / "killed"
    order = launching.Order(tmp_path, script, [str(folder), "hangs"], 1, timeout=60, whole_end=True, launcher="alone")
    order.prepare()
    process = order.start()
    deadline = time.monotonic() + 60
    while process.running and time.monotonic() < deadline:
        if "hangs" in "".join(order.outputs()) and any(progress[1] == 0 for progress, _ in Folder(folder).files()):
            os.kill(process.processes[0].pid, signal.SIGTERM)  # the run has begun
            break
        time.sleep(0.01)
    while process.running and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.processes[0].returncode == 143, order.outputs()
    (left, *_) = reversed(Folder(folder).files())
    assert left[0][1] > 0, "the last complete step was not kept"
    ends = []
    for name in ("killed", "whole"):
        ends.append(json.loads(launching.run(HANGS, None, arguments=[str(tmp_path / name), "mended"]).outputs[0]))
    assert ends[0] == ends[1]
    assert ends[0][1] == 6


STREAMS = """
import json, os, sys, warnings
import torch
from fluxloop import *
from fluxloop.testing import toy_learner

how, result = sys.argv[1], sys.argv[2]
learner = toy_learner(Recorder(), Metrics(), ProgressBar(enabled=True, interval=0.0), MetricsPrinter(), SanityCheck())
told = []
def note(message, *rest, **more):
    told.append(str(message))
warnings.showwarning = note
read, write = os.pipe()
if how == "none":
    sys.stdout = sys.stderr = None
elif how == "closed":
    sys.stdout.close(); sys.stderr.close()
elif how == "descriptors":
    os.close(1); os.close(2)
elif how == "pipe":
    os.close(read); os.dup2(write, 1); os.dup2(write, 2)
learner.fit(2)
with open(result, "w") as file:
    json.dump({"weights": [p.tolist() for p in learner.model.parameters()], "told": told}, file)
if how != "untouched":
    os._exit(0)  # at its end Python itself flushes to what is gone
"""


@pytest.mark.slow
def test_streams_that_are_gone_do_not_end_a_training(tmp_path: Path) -> None:
    results = {}
    for how in ("untouched", "none", "closed", "descriptors", "pipe"):
        path = tmp_path / how
        launching.run(STREAMS, None, arguments=[how, str(path)], whole_end=True)
        results[how] = json.loads(path.read_text())
    weights = [result["weights"] for result in results.values()]
    assert all(other == weights[0] for other in weights)
    assert results["untouched"]["told"] == []
    for how in ("closed", "descriptors", "pipe"):
        told = [message for message in results[how]["told"] if "falls silent" in message]
        assert len(told) == len({message.split()[0] for message in told}) > 0  # each says so once
