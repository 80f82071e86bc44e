from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fluxloop.processes.agree import Agreement
from processes.launching import Run, run_cases

TRAINS = """
    import os, signal, sys, warnings
    from glob import glob
    from pathlib import Path
    import torch
    from torch import nn
    from fluxloop.checkpoint.folder import read
    from fluxloop import (
        Accelerator, BackwardBegin, BatchLimit, Callback, CancelEpochException, CancelFittingException,
        CancelStepException, Checkpointer, EarlyStopping, EpochBegin, EpochEnd, FitEnd, GANPhase, Learner, Phase,
        Recorder, StepBegin, StepEnd, StopOnNaNLoss, TensorBatches, TrainingPhase, UpdateBegin, ValidationPhase, on,
    )
    from processes.launching import report

    what, where, who, *options = sys.argv[1:]
    accumulate = 3 if "accumulated" in options else 2 if "pairs" in options else 1
    half = "half" in options
    accelerator = Accelerator("cpu", accumulate=accumulate, precision="fp16" if half else "fp32")
    rank = accelerator.rank
    AT = 4  # the step in which it happens, from 0

    def happens(here):
        at = 8 if where in ("first", "epoch", "validation") else AT + 1
        if here != where or who not in ("all", str(rank)) or learner.streams["training/step"].index != at:
            return
        if where == "validation" and learner.streams["validation/ValidationPhase/step"].index % 4 != 2:
            return
        if what == "step":
            raise CancelStepException("bad rows")
        if what == "epoch":
            raise CancelEpochException("enough")
        if what == "fit":
            raise CancelFittingException("seen enough")
        if what == "stop":
            learner.request_stop("the budget is used up")
        if what == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if what == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)

    class Does(Callback):
        draws = False
        writes = ("step.xs",)

        @on(StepBegin)
        def begin(self, event, phase, learner):
            happens("begin" if phase.gradients else "validation")
            if what == "nan" and phase.gradients and who in ("all", str(rank)) and steps["begun"] == AT:
                learner.step.xs = learner.step.xs * float("nan")
            steps["begun"] += phase.gradients

        @on(EpochBegin)
        def first(self, event, phase, learner):
            happens("first" if phase.gradients else "-")

        @on(BackwardBegin)
        def before(self, event, phase, learner):
            happens("backward")

        @on(UpdateBegin)
        def update(self, event, phase, learner):
            happens("update")

        @on(StepEnd)
        def end(self, event, phase, learner):
            steps["ended"] += phase.gradients
            happens("end")

        @on(EpochEnd)
        def epoch(self, event, phase, view):
            steps["epochs"].append((type(phase).__name__, steps["ended"]))
            if phase.gradients and learner.streams["training/epoch"].index == 1:
                happens("epoch")

        @on(FitEnd)
        def fit(self, event, phase, learner):
            if where == "fit" and who == str(rank):
                os.kill(os.getpid(), signal.SIGTERM)

    steps = {"begun": 0, "ended": 0, "epochs": []}
    torch.manual_seed(0)
    dtype = torch.float32 if half else torch.float64
    xs, rows = torch.randn(1 if "few" in options else 48, 4, dtype=dtype), 6 // accelerator.world_size
    data = TensorBatches(xs, xs.sum(1, keepdim=True), batch_size=rows)
    few = TensorBatches(xs[:24], xs[:24].sum(1, keepdim=True), batch_size=rows)
    norm = nn.BatchNorm1d(3) if what == "nan" else nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 3), norm, nn.Linear(3, 1)).to(dtype)
    callbacks = [Recorder(), Does(), StopOnNaNLoss()]
    if what == "limit":
        callbacks.append(BatchLimit(4))
        callbacks.append(BatchLimit(2, phase=ValidationPhase, name="v"))
    if "saved" in options:
        folder = os.path.join(os.environ["FLUXLOOP_TEST_FOLDER"], "..", f"{where}-{who}")
        callbacks.append(Checkpointer(folder, unit="step", keep_last=99))
    learner = Learner(
        model, nn.functional.mse_loss, data=(data, few), callbacks=callbacks, accelerator=accelerator,
        optimizer=torch.optim.Adam, seed=0, default_callbacks=False,
    )
    try:
        with warnings.catch_warnings(record=True):
            learner.fit(2)
    except BaseException as error:
        report(error=f"{type(error).__name__}: {error}")
        raise
    if "saved" in options:
        report(saved=[read(Path(path)) for path in sorted(glob(f"{folder}/*.pt")) if ".parts-" not in path])
    if half:
        scale = learner.updates.scale
        report(scale=(scale.value, scale.growth))
    report(
        steps=steps, reason=learner.history.stop_reason, weights=model.state_dict(), updates=learner.updates.count,
        series=[len(value) for value in learner.history.metrics.get(TrainingPhase(), {}).values()],
    )
"""

LEFT_OUT = [(what, where, who) for what in ("step", "epoch", "fit") for where in ("begin", "backward") for who in "01"]
AFTER = [("fit", "end", "1"), ("epoch", "end", "0"), ("stop", "begin", "1"), ("stop", "end", "0")]
AFTER += [("interrupt", "begin", "1"), ("fit", "epoch", "1"), ("stop", "validation", "1"), ("fit", "validation", "0")]
AFTER += [("nan", "-", "1"), ("nan", "-", "all"), ("limit", "-", "all")]
ALL = [(what, where, "all") for what in ("step", "epoch", "fit") for where in ("begin", "backward", "end", "update")]
ACCUMULATED = [("step", where, who, "accumulated") for where in ("begin", "backward") for who in ("1", "all")]
TERMINATED = [("terminate", "begin", "0"), ("terminate", "end", "1"), ("terminate", "fit", "1")]
ALL += [("epoch", "first", "all"), ("fit", "first", "all")]
AFTER += [("fit", "first", "1")]
PAIRS = [("epoch", where, who, "pairs") for where in ("begin", "end") for who in "01"]
SAVED = [("step", "begin", who, "pairs", "saved") for who in "01"]
HALF = [("nothing", "-", "all", "half"), ("nothing", "-", "all", "half", "few")]
DIVERGES = [("step", "update", "1"), ("epoch", "first", "1")]
ON_ALL = [case for case in (*ALL, *AFTER, *ACCUMULATED) if case[2] == "all"]
CASES = [*LEFT_OUT, *AFTER, *ALL, *ACCUMULATED, *PAIRS, *SAVED, *HALF, *TERMINATED, *DIVERGES]


@pytest.fixture(scope="module")
def runs() -> dict[Any, Run]:
    return dict(zip(CASES, run_cases(TRAINS, CASES, timeout=400), strict=True))


@pytest.fixture(scope="module")
def alone() -> dict[Any, Run]:
    return dict(zip(ON_ALL, run_cases(TRAINS, ON_ALL, 1, timeout=200), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in (*DIVERGES, *TERMINATED)], ids="-".join)
def test_what_one_process_wants_acts_on_all_at_the_same_step(runs: dict[Any, Run], case: Any) -> None:
    one, other = runs[case].check().reports
    if case[2] == "all" or len(case) == 3 or "half" in case:  # else a batch is left out of an update by one alone
        assert one["steps"]["ended"] == other["steps"]["ended"]
        assert one["steps"]["epochs"] == other["steps"]["epochs"]
    assert one["reason"] == other["reason"]
    assert one["updates"] == other["updates"]
    assert one["series"] == other["series"]
    for name, tensor in one["weights"].items():
        if "running" not in name:  # statistics are exchanged when an epoch is complete, which it may not be
            assert torch.equal(tensor, other["weights"][name]), name


ENDS = {  # steps that end, epochs that do, and why the fit stops
    ("step", "begin"): (15, 4, None),
    ("epoch", "begin"): (12, 4, None),
    ("fit", "begin"): (4, 0, "seen enough"),
    ("fit", "end"): (6, 0, "seen enough"),  # the others are past that step: it ends after the next one
    ("epoch", "end"): (13, 4, None),
    ("stop", "begin"): (5, 0, "the budget is used up"),
    ("stop", "end"): (6, 0, "the budget is used up"),
    ("interrupt", "begin"): (5, 0, "interrupted (Ctrl+C)"),
    ("fit", "first"): (8, 2, "seen enough"),
    ("fit", "epoch"): (8, 1, "seen enough"),
    ("stop", "validation"): (8, 2, "the budget is used up"),
    ("fit", "validation"): (8, 2, "seen enough"),
    ("nan", "-"): (4, 0, "the loss became nan in TrainingPhase(), epoch 1, step 5 of the run"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in (*LEFT_OUT, *AFTER) if case[2] != "all"], ids="-".join)
def test_what_one_process_alone_wants_takes_effect_soon(runs: dict[Any, Run], case: Any) -> None:
    what, where, _ = case
    found = runs[case].reports[0]
    ended, epochs, reason = ENDS[what, "begin" if where == "backward" else where]
    assert (found["steps"]["ended"], len(found["steps"]["epochs"]), found["reason"]) == (ended, epochs, reason)


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_ALL, ids="-".join)
def test_what_all_processes_want_acts_as_in_one_process_on_the_joined_batches(
    runs: dict[Any, Run], alone: dict[Any, Run], case: Any
) -> None:
    together, (one,) = runs[case].reports[0], alone[case].check().reports
    for what in ("steps", "reason", "updates", "series"):
        assert together[what] == one[what], what
    if case[0] != "nan":  # whose batch norm sees other rows
        for name, tensor in one["weights"].items():
            torch.testing.assert_close(together["weights"][name], tensor, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_a_batch_cancelled_on_one_process_of_an_accumulated_update_is_left_out_of_it(runs: dict[Any, Run]) -> None:
    for where in ("begin", "backward"):
        assert runs["step", where, "1", "accumulated"].reports[0]["updates"] == 6  # of 8 batches, by 3, in each epoch


@pytest.mark.slow
def test_an_update_that_one_process_cancels_and_others_make_ends_all(runs: dict[Any, Run]) -> None:
    told = runs["step", "update", "1"]
    assert told.codes == [1, 1]
    assert all("process 1 cancelled an update that the others have made" in each["error"] for each in told.reports)


@pytest.mark.slow
@pytest.mark.parametrize("case", TERMINATED, ids="-".join)
def test_a_sigterm_to_one_process_ends_all_in_good_order(runs: dict[Any, Run], case: Any) -> None:
    told = runs[case]
    assert told.codes == [143, 143], told.outputs
    assert [report["error"] for report in told.reports] == ["SystemExit: 143"] * 2


@pytest.mark.parametrize("who", [0, 1])
def test_a_checkpoint_in_an_open_window_holds_what_another_process_than_one_that_cancelled_its_batch_has(
    runs: dict[Any, Run], who: int
) -> None:
    one, other = runs["step", "begin", str(who), "pairs", "saved"].check().reports
    assert len(one["saved"]) == len(other["saved"]) > 8  # of each step, those of one process and the other's alike
    updates = one["saved"][4]["updates"]  # after five steps; the file of none is gone
    assert updates["slots"][""]["waiting"]
    assert updates["slots"][""]["window"]["weight"] == 3.0  # rows of the one that went on
    opened = updates["open windows"]
    assert [window["weight"] for window in opened["windows"][""]] == ([0, 3] if who == 0 else [3, 0])
    assert len(opened["gradients"]) == 4
    for gradients in opened["gradients"].values():
        assert [bool(gradient.any()) for gradient in gradients] == [who != 0, who == 0]


@pytest.mark.slow
@pytest.mark.parametrize("case", HALF, ids="-".join)
def test_with_fp16_all_leave_out_the_same_updates_also_where_one_has_no_row_of_its_own(
    runs: dict[Any, Run], case: Any
) -> None:
    one, other = runs[case].check().reports
    assert (one["updates"], one["scale"]) == (other["updates"], other["scale"])
    assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())
    assert one["steps"]["ended"] == (2 if "few" in case else 16)
    assert "few" in case or one["updates"] > 10


@pytest.mark.slow
def test_an_epoch_that_one_process_cancels_as_it_begins_ends_all(runs: dict[Any, Run]) -> None:
    told = runs["epoch", "first", "1"]
    assert told.codes == [1, 1]
    assert all("the processes [1] alone cancelled an epoch" in each["error"] for each in told.reports)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"sent": 5, "inside": None}, True),
        ({"sent": 6, "inside": None}, True),  # it has seen this one, and waits for it in the exchange
        ({"sent": 6, "inside": [0]}, False),  # it takes part in the message of a third one
        ({"sent": 4, "inside": None}, False),
        ({"sent": 6, "inside": None, "cancelled": None}, False),
        ({"sent": 5, "inside": None, "step": 2}, False),
    ],
)
def test_who_cancels_the_same_step_is_known_before_and_in_the_exchange(other: dict[str, Any], expected: bool) -> None:
    agreement = Agreement(SimpleNamespace(watcher=None))
    agreement.steps, agreement.sent = 3, 5
    place = {"step": 3, "in_step": True, "cancelled": 0, "left": False, **other}
    assert agreement._cancels_too(place) is expected
