from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import pytest
import torch

from fluxloop import Accelerator
from fluxloop.processes import group as groups
from processes.launching import SIZES, run, run_cases

ENDS = """
    import os, sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from fluxloop import Accelerator, Learner, TensorBatches
    from processes.launching import report

    how = sys.argv[1]
    if how == "given":
        dist.init_process_group("gloo")
    accelerator = Accelerator("cpu", strategy="none" if how == "alone" else "replicate")
    group = accelerator.group
    report(rank=accelerator.rank, size=accelerator.world_size, main=accelerator.is_main, group=repr(type(group)))
    if how == "given":
        assert group.process_group is dist.group.WORLD
    data = TensorBatches(torch.ones(8, 4), torch.ones(8, 1), batch_size=2)
    for _ in range(2):
        learner = Learner(nn.Linear(4, 1), nn.functional.mse_loss, data=(data,), accelerator=Accelerator("cpu"), seed=0)
        assert learner.accelerator.group is group or how == "alone"
        if how != "alone":
            learner.fit(1)
    sys.stdout.write(f"initialised: {dist.is_initialized()}\\n")
    if how == "exits":
        sys.exit(3)
    if how == "raises":
        raise ValueError("after the training")
    if how == "destroyed":
        dist.destroy_process_group()
"""

FIRST = """
    import atexit, os, sys
    import torch.distributed as dist
    def threads():
        found = []
        for thread in os.listdir("/proc/self/task") if os.path.exists("/proc/self/task") else ():
            try:
                found.append(open(f"/proc/self/task/{thread}/comm").read())
            except OSError:  # it has ended
                pass
        return sum("gloo" in name for name in found)
    def end():
        sys.stdout.write(f"at exit: {dist.is_initialized()} {threads()}\\n")
        if dist.is_initialized():
            dist.destroy_process_group()  # else Python may end while a thread of gloo's runs, and aborts
    atexit.register(end)
"""

ENDINGS = {"returns": 0, "given": 0, "alone": 0, "exits": 3, "raises": 1, "destroyed": 0}


@pytest.mark.slow
def test_the_group_is_left_when_the_process_ends_whatever_way() -> None:
    told = dict(
        zip(ENDINGS, run_cases(FIRST + ENDS, [[how] for how in ENDINGS], timeout=200, whole_end=True), strict=True)
    )
    for how, code in ENDINGS.items():
        assert told[how].codes == [code, code], (how, told[how].outputs)
        # Who has initialised it destroys it. Of ours no thread is left that would meet the end of Python, and abort it
        left = "True" if how == "given" else "False 0"
        assert all(f"at exit: {left}" in output for output in told[how].outputs), (how, told[how].outputs)
        sizes = [(report["rank"], report["size"], report["main"]) for report in told[how].reports]
        assert sizes == ([(0, 1, True)] * 2 if how == "alone" else [(0, 2, True), (1, 2, False)])


@pytest.mark.slow
def test_no_thread_is_left_where_torch_imports_what_keeps_a_group_in_the_training() -> None:
    told = run(FIRST + ENDS, arguments=["returns"], FLUXLOOP_QUIET="1")  # started anew: forked ones have imported it
    assert all("at exit: False 0" in output for output in told.outputs), told.outputs


def test_a_strategy_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy='ddp'\) was given; expected 'auto', 'replicate', 'shard'"):
        Accelerator("cpu", strategy="ddp")  # type: ignore[arg-type]  # that is what is tested


@pytest.mark.parametrize("strategy", ["auto", "replicate", "none"])
def test_one_process_trains_alone_with_any_strategy(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun --nproc-per-node 1 says
    monkeypatch.setenv("RANK", "0")
    accelerator = Accelerator("cpu", strategy=strategy)
    assert accelerator.group is None
    assert (accelerator.rank, accelerator.world_size, accelerator.is_main) == (0, 1, True)


def test_an_environment_that_does_not_say_where_to_meet_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT not; expected a start by torchrun"):
        Accelerator("cpu")


def test_devices_without_a_transport_are_refused() -> None:
    with pytest.raises(ValueError, match=r"device='mps' was given, and several processes cannot train there"):
        groups.join(torch.device("mps"))


def test_processes_that_do_not_come_are_named() -> None:
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(groups.ProcessError, match=r"3 processes were to train together .* and \[1, 2\] have not come"):
        groups._meet(store, 0, 3)


@pytest.mark.parametrize(("local", "gpus", "chosen"), [(None, 4, 0), (1, 4, 1), (3, 1, 0)])
def test_each_process_of_a_machine_has_a_gpu_of_its_own(
    local: int | None, gpus: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxloop.compute import accelerator

    monkeypatch.setattr(accelerator, "local_rank", lambda: local)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert accelerator._own_gpu() == chosen


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxloop.compute import accelerator

    monkeypatch.setattr(accelerator, "local_rank", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2\), which has 2 GPUs; .* --nproc-per-node 2"):
        accelerator._own_gpu()


RESTARTS = """
    import os, signal, sys, time
    import torch
    from torch import nn
    from fluxloop import Accelerator, Callback, Checkpointer, Learner, Phase, Recorder, StepBegin, TensorBatches, on
    from processes.launching import FOLDER, report

    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    restarts = int(sys.argv[1])
    if attempt and rank:
        time.sleep(1)  # later than the other one
    accelerator = Accelerator("cpu")

    class Dies(Callback):
        draws = False

        @on(StepBegin)
        def begin(self, event, phase, view):
            is_next = kills and attempt < restarts and rank == attempt % int(os.environ["WORLD_SIZE"])
            if is_next and learner.streams["training/step"].index == 6 + 4 * attempt:
                os.kill(os.getpid(), signal.SIGKILL)

    xs = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    data = TensorBatches(xs, xs.sum(1, keepdim=True), batch_size=3, shuffle=True)

    for kills in (False, True):
        folder = os.environ[FOLDER] + f"/run-{kills}"
        torch.manual_seed(rank)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
        learner = Learner(
            model, nn.functional.mse_loss, data=(data,), accelerator=accelerator, seed=0, default_callbacks=False,
            callbacks=[Recorder(), Dies(), Checkpointer(folder, every=1, unit="step")],
        )
        learner.fit(2 + restarts // 2, resume=folder)  # of 8 steps each
        report(**{f"killed {kills}": model.state_dict(), "attempt": attempt})
"""


@pytest.mark.slow
def test_a_run_that_torchrun_restarts_ends_in_the_bits_of_one_that_was_not_killed() -> None:
    restarts = int(os.environ.get("FLUXLOOP_KILLS", 2 if 4 in SIZES else 1))
    options = [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    told = run(RESTARTS, arguments=[str(restarts)], launcher="torchrun", options=options, timeout=120 + 20 * restarts)
    for report in told.reports:
        assert report["attempt"] == restarts
        for name, tensor in report["killed False"].items():
            assert torch.equal(tensor, report["killed True"][name]), name
