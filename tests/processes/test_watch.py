from __future__ import annotations

import itertools
import sys
import threading

import pytest
import torch.distributed as dist

from fluxloop.processes.watch import Watcher
from processes.launching import Run, run, run_cases

TRAINS = """
    import os, signal, sys, time
    import torch
    from torch import nn
    import fluxloop
    from fluxloop import Accelerator, BackwardBegin, BackwardEnd, Callback, Checkpointer, EpochEnd, Learner, Phase
    from fluxloop import StepBegin, TensorBatches, TrainingPhase, ValidationPhase, on
    from processes.launching import FOLDER, report

    how, where = sys.argv[1:]
    accelerator = Accelerator("cpu")
    is_bad = accelerator.rank == 1

    def fail(here):
        global is_bad
        if here == where and is_bad and learner.streams["training/step"].index >= 12:
            is_bad = False  # one that was stopped goes on
            report(failed=time.monotonic())
            if how != "raises":
                sys.stderr.write("ends\\n")
                os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
            else:
                raise ValueError("a broken row")

    class Model(nn.Linear):
        def forward(self, xs):
            fail("forward" if self.training else "validation")
            return super().forward(xs)

        def state_dict(self, *args, **kwargs):
            fail("save")
            return super().state_dict(*args, **kwargs)

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            fail("backward")
            return gradient

    class Averages(Callback):
        draws = False

        @on(BackwardEnd)
        def average(self, event, phase, learner):
            accelerator.group.all_reduce(torch.ones(3))
            if where == "collective":
                fail("collective")
                accelerator.group.all_reduce(torch.ones(3))

        @on(EpochEnd)
        def end(self, event, phase, learner):
            accelerator.group.all_reduce(torch.ones(3))

    class Handles(Callback):
        draws = False

        @on(StepBegin)
        def begin(self, event, phase, learner):
            fail("handler")

    def loss_fn(preds, ys):
        return Backward.apply(nn.functional.mse_loss(preds, ys))

    torch.manual_seed(0)
    data = TensorBatches(torch.randn(60, 4), torch.randn(60, 1), batch_size=3)
    folder = f"{os.environ[FOLDER]}/run-{accelerator.rank}"
    callbacks = [Averages(), Handles(), Checkpointer(folder, every=5, unit="step")]
    learner = Learner(
        Model(4, 1), loss_fn, data=(data, data), callbacks=callbacks, accelerator=accelerator, seed=0,
        default_callbacks=False,
    )
    try:
        learner.fit(3)
    except BaseException as error:
        report(error=f"{type(error).__name__}: {error}", named=time.monotonic())
        raise
"""

HOW = {
    "killed": "was killed or has crashed",
    "stopped": "was stopped by a signal",
    "raises": "raised ValueError: a broken",
}
WHERE = ("forward", "backward", "collective", "handler", "validation", "save")
CASES = [*itertools.product(HOW, WHERE)]


@pytest.fixture(scope="module")
def failures() -> dict[tuple[str, str], Run]:
    return dict(zip(CASES, run_cases(TRAINS, CASES, timeout=300, at_once=6, whole_end=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "where"), CASES)
def test_a_process_that_fails_is_named_on_the_other_and_both_end(
    failures: dict[tuple[str, str], Run], how: str, where: str
) -> None:
    told = failures[how, where]
    assert told.codes == [1, {"killed": -9, "stopped": 1, "raises": 1}[how]]
    assert told.reports[0]["error"].startswith(f"ProcessError: process 1 {HOW[how]}"), told.outputs
    assert not told.left
    sys.stdout.write(f"{told.reports[0]['named'] - told.reports[1]['failed']:.2f} s\n")  # the figures: pytest -s
    if how == "raises":
        assert told.reports[1]["error"] == "ValueError: a broken row"
        place = {"validation": "ValidationPhase(), epoch 2, step 11 of", "save": "TrainingPhase(), epoch 2,"}
        assert f"in {place.get(where, 'TrainingPhase(), epoch 2, step')}" in told.reports[0]["error"]


SPAWNS = """
    import os, signal, socket
    import torch, torch.distributed as dist, torch.multiprocessing as mp
    from torch import nn
    from fluxloop import Accelerator, Callback, Learner, StepBegin, TensorBatches, on

    class Stops(Callback):
        draws = False

        @on(StepBegin)
        def begin(self, event, phase, view):
            if dist.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGSTOP)

    def work(rank, port):
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        data, accelerator = TensorBatches(torch.ones(8, 4), torch.ones(8, 1), batch_size=2), Accelerator("cpu")
        learner = Learner(
            nn.Linear(4, 1), nn.functional.mse_loss, data=(data,), accelerator=accelerator, callbacks=[Stops()],
            default_callbacks=False,
        )
        learner.fit(1)

    if __name__ == "__main__":
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]  # no torchrun here: the first process holds the store
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.start_processes(work, (port,), nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_a_first_process_that_is_stopped_is_named_where_all_meet_in_its_store() -> None:
    told = run(SPAWNS, 1, timeout=90, check=False)  # which spawns two, whose group the script initialises
    assert told.codes == [1]
    assert "process 0 was stopped by a signal (SIGSTOP)" in told.outputs[0]


def watching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fluxloop-watch"]


def test_nothing_watches_any_more_when_a_process_ends() -> None:
    before = watching()
    watcher = Watcher(dist.HashStore(), 0, 1)
    watcher.enter()
    assert len(watching()) == len(before) + 1
    watcher.leave()
    watcher.close()  # else Python, as it ends, may meet the thread in the code of the store, and abort
    assert watching() == before
