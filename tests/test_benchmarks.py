"""What the benchmarks rest on: their arithmetic, the check that both sides trained the same, and the results' file.

No time is asserted.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fluxloop import CustomCallback, Learner, StepBegin, StepEnd, TrainingPhase
from fluxloop.testing import toy_learner

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    "timing",
    "workloads",
    "run",
    "step_overhead",
    "compile",
    "convolutions",
    "event_overhead",
    "memory",
    "scaling",
    "peers",
    "research_peers",
    "research",
    "compiled_code",
    "gpu",
    "gpu_checks",
)


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[dict[str, Any]]:
    """Import the scripts as one that lies beside them does, and forget them afterwards."""
    kept = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.modules["peers"].nowhere().close()
        sys.path.remove(str(BENCHMARKS))
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


class FakeTime:
    """Two clocks that go on when work is done."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.worked: list[str] = []

    def work(self, name: str, wall: float, cpu: float) -> None:
        self.worked.append(name)
        self.wall += wall
        self.cpu += cpu

    @property
    def clocks(self) -> tuple[Callable[[], float], Callable[[], float]]:
        return lambda: self.wall, lambda: self.cpu


# timing.py


@pytest.mark.slow
def test_times_are_medians_per_unit_and_ratios_are_medians_of_rounds(scripts: Any) -> None:
    fake = FakeTime()
    slow = iter([9.0, 9.0, 1.0, 50.0, 2.0])  # two rounds to warm up; then one of three is disturbed
    got = scripts["timing"].interleave(
        lambda: {"a": lambda: fake.work("a", 2.0, 1.0), "b": lambda: fake.work("b", next(slow), 4.0)},
        units=2,
        rounds=3,
        clocks=fake.clocks,
    )
    assert got.micro("a") == 1e6
    assert got.micro("b") == 1e6
    assert got.ratio("b", "a") == 1.0
    assert got.cpu_ratio("b", "a") == 4.0
    assert got.difference("b", "a") == 0.0


@pytest.mark.slow
def test_sides_alternate_and_are_made_anew(scripts: Any) -> None:
    fake, made, checked = FakeTime(), [], []

    def make() -> dict[str, Callable[[], None]]:
        made.append(torch.initial_seed())
        return {name: partial(fake.work, name, 1.0, 1.0) for name in "ab"}

    got = scripts["timing"].interleave(
        make, units=1, rounds=4, starts=2, warm_up=1, clocks=fake.clocks, check=lambda: checked.append(len(fake.worked))
    )
    assert "".join(fake.worked) == "baabba" * 2
    assert made == [0, 1]
    assert checked == [6, 12]
    assert len(got.laps["a"]) == len(got.laps["b"]) == 4


@pytest.mark.slow
def test_a_side_may_measure_itself(scripts: Any) -> None:
    lap = scripts["timing"].Lap(wall=3.0, cpu=1.0)
    got = scripts["timing"].interleave(lambda: {"own": lambda: lap}, units=3, rounds=1)
    assert got.micro("own") == 1e6


def test_a_learner_and_other_sides_take_turns_in_blocks_of_steps(scripts: Any) -> None:
    path = BENCHMARKS / "processes.py"  # by its path, as "processes" is a package of tests
    spec = spec_from_file_location("processes_script", path)
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    learner = toy_learner(num_batches=7)
    order: list[str] = []
    turns = script.TakeTurns(2, {name: partial(order.append, name) for name in "ab"})
    learner.add_callback(turns)
    learner.add_callback(CustomCallback(lambda learner: order.append("step"), StepBegin, TrainingPhase))
    learner.epoch(TrainingPhase())
    assert order == ["step"] * 4 + ["a", "b"] + ["step"] * 2 + ["b", "a"] + ["step"]
    assert [len(laps) for laps in turns.laps.values()] == [2, 2, 2]


def test_a_table_is_markdown(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    table = scripts["timing"].Table({"side": "<6", "ratio": ">6.2f"})
    table.row("plain", 1.0)
    table.row("other", "–")
    assert capsys.readouterr().out.splitlines() == [
        "| side   |  ratio |",
        "| ------ | -----: |",
        "| plain  |   1.00 |",
        "| other  |      – |",
    ]


@pytest.mark.slow
def test_what_each_side_adds_to_the_first_is_told_per_thing(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake, timing = FakeTime(), scripts["timing"]
    sides = {name: partial(fake.work, name, wall, 1.0) for name, wall in (("0", 4.0), ("2", 5.0), ("10", 9.0))}
    got = timing.interleave(lambda: sides, units=1_000_000, rounds=1, clocks=fake.clocks)
    timing.print_added("callbacks", got, (0, 2, 10))
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["callbacks", "µs", "ratio", "added µs, each"]
    assert rows[2:] == [
        ["0", "4.00", "1.000", "–"],
        ["2", "5.00", "1.250", "0.500"],
        ["10", "9.00", "2.250", "0.500"],
    ]


# workloads.py: whether both trained the same


@pytest.fixture
def trained(scripts: Any) -> Callable[..., Any]:
    """Give what trains the tiny model on so many batches, from the same weights each time."""
    workloads = scripts["workloads"]

    def train(optimizer: Any, count: int = 10, *, ours: bool = False) -> Any:
        torch.manual_seed(0)
        make = workloads.fluxloop_side if ours else workloads.plain_side
        side = make(workloads.TINY.model(), workloads.TINY.batches(count), optimizer)
        side()
        return side

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD", "AdamW, fused=False"])
def test_fluxloop_trains_the_same_bits_as_the_hand_written_loop(scripts: Any, name: str) -> None:
    workloads = scripts["workloads"]
    for tracked in (False, True):
        make = partial(workloads.both_sides, workloads.TINY, workloads.OPTIMIZERS[name], tracked)
        assert workloads.audition(make, workloads.TINY, name) == "same bits"


def test_another_implementation_may_differ_by_little(scripts: Any, trained: Any) -> None:
    workloads = scripts["workloads"]
    fused = trained(partial(torch.optim.AdamW, lr=1e-4, fused=True))
    plain, batches = trained(workloads.ADAMW_PLAIN), workloads.TINY.batches(3)
    assert workloads.is_fused(fused.optimizer)
    assert float(workloads.same_training(fused, plain, batches, "fused", exact=False)) < 1e-4


@pytest.mark.parametrize("exact", [True, False])
def test_other_training_is_told_apart(scripts: Any, trained: Any, exact: bool) -> None:
    workloads = scripts["workloads"]
    compare = partial(workloads.same_training, batches=workloads.TINY.batches(3), what="tiny", exact=exact)
    sgd, adamw = trained(workloads.SGD), trained(workloads.ADAMW_PLAIN)
    with pytest.raises(workloads.DifferentTrainingError, match="tiny: the sides made 11 and 10 updates"):
        compare(trained(workloads.ADAMW_PLAIN, 11), adamw)
    with pytest.raises(workloads.DifferentTrainingError, match=r"weights lie 0\.\d+ apart"):  # an update more, of ten
        compare(trained(workloads.SGD, 11), sgd)
    with pytest.raises(workloads.DifferentTrainingError, match="apart"):
        compare(trained(partial(torch.optim.AdamW, lr=1.1e-4)), adamw)


def test_sides_that_train_nothing_are_not_the_same(scripts: Any, trained: Any) -> None:
    workloads = scripts["workloads"]
    still = trained(partial(torch.optim.SGD, lr=0.0))
    with pytest.raises(workloads.DifferentTrainingError):
        workloads.same_training(still, still, workloads.TINY.batches(3), "still", exact=False)


def test_buffers_are_compared_too(scripts: Any) -> None:
    workloads = scripts["workloads"]
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 4))
    sides = [workloads.plain_side(copy.deepcopy(model), workloads.TINY.batches(2), workloads.SGD) for _ in range(2)]
    for side in sides:
        side()
    sides[0].model[1].running_mean += 1
    with pytest.raises(workloads.DifferentTrainingError, match="apart"):
        workloads.same_training(*sides, workloads.TINY.batches(2), "norm", exact=True)


@pytest.mark.parametrize("index", range(4))
def test_every_workload_is_trained_by_both_sides(scripts: Any, index: int) -> None:
    workloads = scripts["workloads"]
    work = workloads.WORKLOADS[index]
    short = type(work)(work.name, work.model, (4, *work.shape[1:]), work.classes, 2, work.tokens)
    make = partial(workloads.both_sides, short, workloads.SGD)
    assert workloads.audition(make, short, work.name) == "same bits"


# The scripts


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("timing", "workloads", "research_peers")])
def test_a_script_tells_its_options(scripts: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        scripts[name].main(["--help"])
    assert ended.value.code == 0
    assert ("--rehearse" if name == "gpu_checks" else "--quick") in capsys.readouterr().out


def test_the_measured_steps_fire_what_the_tables_say(scripts: Any) -> None:
    events = scripts["event_overhead"]
    heard: list[str] = []

    class Counter(events.Listener):  # type: ignore[misc, name-defined]  # imported at run time
        def hear(self, event: Any, phase: Any, learner: Any) -> None:
            heard.append(type(event).__name__)

    learner = events.learner_with(Counter(), *events.many(events.Idle, 3))
    data = [None, None]
    learner.epoch(events.Firing(), data)
    assert heard == ["LossBegin"] * events.EVENTS * 2
    learner.epoch(events.Counting(), data)
    assert len(heard) == events.EVENTS * 2
    learner.add_callback(events.Reader())
    assert [id for _, _, id in learner.callbacks.table(events.Standard)[StepEnd]] == ["Reader"]
    learner.epoch(events.Standard(), data)
    assert len(heard) == events.EVENTS * 2 + 2


def test_the_ends_of_an_epoch_are_its_first_and_last_thousand(scripts: Any) -> None:
    scaling = scripts["scaling"]
    steps = scaling.Steps(2_000)
    assert len(list(steps)) == len(steps)
    assert len(steps.times) == 21
    times = [0.0]
    for index in range(30):
        times.append(times[-1] + (1e-4 if index < 10 else 3e-4 if index < 20 else 2e-4))
    assert scaling.ends(times) == pytest.approx((1.0, 2.0))


@pytest.mark.parametrize("side", ["by hand", "fluxloop"])
def test_the_loop_of_scaling_tracks_every_step(scripts: Any, side: str) -> None:
    scaling = scripts["scaling"]
    steps = scaling.Steps(200)
    if side == "by hand":
        scaling.by_hand(steps)
    else:
        learner: Learner[Any] = scaling.learner_for(steps)
        learner.epoch(scaling.Given())
        assert learner.history[scaling.Given].steps == 200
        assert learner.history["training/loss"] == [1.0]
    assert len(steps.times) == 3


def test_the_memory_of_tensors_is_their_peak(scripts: Any) -> None:
    def train() -> None:
        for _ in range(3):
            torch.zeros(2**20)

    assert scripts["memory"].tensor_peak(train) == pytest.approx(4, abs=0.5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_the_memory_of_a_process_is_its_peak_since(scripts: Any) -> None:
    assert 60 < scripts["memory"].process_peak(lambda: torch.ones(2**24)) < 90


@pytest.mark.slow
@pytest.mark.parametrize("side", ["plain", "fluxloop"])
def test_a_fresh_process_would_train_what_it_is_told(scripts: Any, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = scripts["memory"]
    monkeypatch.setattr(memory, "WORKS", {"tiny": scripts["workloads"].TINY})
    threads = torch.get_num_threads()
    try:
        assert memory.run_alone(side, "tensors", "tiny")["updates"] == scripts["workloads"].TINY.steps
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_frameworks_are_compared_and_those_that_do_something_else_left_out(
    scripts: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    peers, workloads = scripts["peers"], scripts["workloads"]

    def lazy(job: Any) -> Any:
        optimizer = workloads.ADAMW(job.model.parameters())

        def fit() -> None:
            for index, batch in enumerate(job.loader):
                if index:
                    workloads.plain_epoch(job.model, optimizer, [batch])

        return fit, optimizer

    def other(job: Any) -> Any:
        optimizer = torch.optim.AdamW(job.model.parameters(), lr=0.1)
        return lambda: workloads.plain_epoch(job.model, optimizer, job.loader), optimizer

    def absent(job: Any) -> Any:
        raise ModuleNotFoundError("No module named 'absent'")

    frameworks = {"by hand": peers.by_hand, **peers.OURS, "lazy": lazy, "other": other, "absent": absent}
    table = scripts["timing"].Table(peers.COLUMNS)
    for tracked in (False, True):
        failed = peers.measure(table, frameworks, workloads.TINY, tracked, rounds=1)
        assert failed.keys() == {"lazy", "other", "absent"}
        assert "220 updates on 221 batches" in failed["lazy"]
        assert "its loss is" in failed["other"]
        assert failed["absent"] == "ModuleNotFoundError: No module named 'absent'"
        rows = capsys.readouterr().out.splitlines()[-3:]
        assert [row.split("|")[3].strip() for row in rows] == ["by hand", *peers.OURS]
        assert rows[2].split("|")[-2].strip() == "same bits"


def test_without_other_frameworks_nothing_is_compared(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scripts["peers"], "PEERS", {})
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    scripts["peers"].main([])
    assert capsys.readouterr().out == "Skipped: no other framework is installed\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_nothing_is_claimed(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    scripts["gpu"].main([])
    assert capsys.readouterr().out == "Skipped: there is no CUDA device here\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_without_a_gpu_no_row_of_the_checks_is_run(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert scripts["gpu_checks"].main([]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == len(scripts["gpu_checks"].ALONE) + len(scripts["gpu_checks"].TOGETHER)
    assert all(line.endswith("| not run | no GPU |") for line in lines)


def test_a_row_that_fails_says_why_and_makes_the_status_1(
    scripts: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = scripts["gpu_checks"]

    def fails(device: str) -> str:
        return str(checks.require(False, f"seen on {device}"))

    monkeypatch.setattr(checks, "ALONE", {"bad": fails, "good": lambda device: "all"})
    monkeypatch.setattr(checks, "TOGETHER", {})
    assert checks.main(["--rehearse"]) == 1
    told = capsys.readouterr()
    assert "| bad | FAILED | AssertionError: seen on cpu |\n| good | passed | all |" in told.out
    assert "Traceback" in told.err


@pytest.mark.slow
def test_what_needs_no_gpu_is_rehearsed_also_in_processes(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert scripts["gpu_checks"].main(["--rehearse", "--only", "p"]) == 0
    out = capsys.readouterr().out
    assert "a rehearsal, which says nothing of GPUs" in out
    for row in ("fp32", "fp16", "replicate", "raw loop", "recomputed activations"):
        assert f"| {row} | passed |" in out


def traced(cat: str, name: str, begin: float, end: float, stream: int) -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": begin, "dur": end - begin, "args": {"stream": stream}}


def test_copies_overlap_with_kernels_of_other_streams(scripts: Any) -> None:
    events = [
        traced("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 0, 1000, 7),
        traced("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 0, 1000, 7),
        traced("kernel", "gemm", 200, 400, 1),
        traced("kernel", "add", 300, 500, 1),
        traced("kernel", "also copying", 0, 1000, 7),
        traced("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 2000, 3000, 7),
    ]
    copied, share = scripts["gpu"].overlap(events)
    assert copied == 2.0
    assert share == pytest.approx(300 / 2000)
    assert scripts["gpu"].overlap([]) == (0.0, 0.0)


def test_messages_overlap_with_kernels_that_compute_and_not_with_one_another(scripts: Any) -> None:
    events = [
        traced("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", 0, 1000, 20),
        traced("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", 500, 2000, 21),
        traced("kernel", "gemm", 200, 400, 7),
        traced("kernel", "add", 300, 500, 8),
        traced("kernel", "gemm", 1900, 5000, 7),
        traced("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 600, 1000, 9),
    ]
    sent, share = scripts["gpu"].messages_overlap(events)
    assert sent == 2.0
    assert share == pytest.approx((300 + 100) / 2000)
    assert scripts["gpu"].messages_overlap(events[2:]) == (0.0, 0.0)


def test_waits_are_counted_but_the_one_that_ends_the_trace(scripts: Any) -> None:
    names = ["cudaLaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync", "cudaDeviceSynchronize"]
    assert scripts["gpu"].traced_waits({"name": name} for name in names) == 1


# run.py


@pytest.fixture
def runner(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give run.py over two small scripts in a folder of its own."""
    run = scripts["run"]
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.md")
    monkeypatch.setattr(run, "SCRIPTS", ("first", "second", "missing"))
    (tmp_path / "first.py").write_text("import sys\nprint('| a |\\n| - |\\n| 1 |', *sys.argv[1:])  # takes --quick\n")
    (tmp_path / "second.py").write_text("import sys\nprint('second', *sys.argv[1:])\n")
    return run


def test_the_results_of_all_are_written_in_order(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runner.main([])
    text = runner.RESULTS.read_text()
    assert text.startswith("# Last results\n")
    assert text.index("## first.py") < text.index("| 1 |") < text.index("## second.py") < text.index("\nsecond\n")
    assert f"torch {torch.__version__}" in text
    assert "missing.py is not there" in capsys.readouterr().out


def test_the_results_of_others_and_of_those_that_can_measure_nothing_stay(runner: Any) -> None:
    runner.main([])
    (runner.FOLDER / "first.py").write_text("print('Skipped: no device')\n")
    (runner.FOLDER / "second.py").write_text("print('anew')\n")
    runner.main(["second.py"])
    runner.main(["first"])
    found = runner.sections(runner.RESULTS.read_text())
    assert list(found) == ["first", "second"]
    assert found["first"].endswith("| 1 |")
    assert found["second"].endswith("\n\nanew")
    assert runner.joined(found) == runner.RESULTS.read_text()


def test_columns_that_are_no_markdown_are_shown_as_they_are(runner: Any) -> None:
    (runner.FOLDER / "second.py").write_text("print('side   ratio\\nplain   1.00')\n")
    runner.main(["second"])
    assert "\n\n```text\nside   ratio\nplain   1.00\n```\n" in runner.RESULTS.read_text()


def test_a_quick_run_writes_only_where_it_is_told(runner: Any, tmp_path: Path) -> None:
    runner.main(["--quick"])
    assert not runner.RESULTS.exists()
    runner.main(["--quick", "--out", str(tmp_path / "other.md")])
    found = runner.sections((tmp_path / "other.md").read_text())
    assert found["first"].endswith("| 1 | --quick")
    assert found["second"].endswith("\n\nsecond")  # knows no such option


def test_a_script_that_fails_ends_the_run(runner: Any) -> None:
    (runner.FOLDER / "second.py").write_text("raise SystemExit('the sides trained something else')\n")
    with pytest.raises(SystemExit, match=r"second\.py failed with exit status 1"):
        runner.main(["second"])
    assert not runner.RESULTS.exists()


def test_an_unknown_benchmark_is_named(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main(["frist"])
    assert "there is no benchmark frist; expected some of first, second, missing" in capsys.readouterr().err


# research.py


@pytest.mark.parametrize("place", range(4))
def test_the_steps_of_other_frameworks_train_as_the_loops_by_hand(scripts: Any, place: int) -> None:
    def frame(models: Any, optimizers: Any, loader: Any, step: Any, tools: Any) -> Callable[[], None]:
        def fit() -> None:
            for index, batch in enumerate(loader):
                step(models, optimizers, batch, index, tools)

        return fit

    research = scripts["research"]
    method = research.METHODS[place]
    torch.manual_seed(0)
    fixed, shares, models = torch.randn(64, 64), torch.rand(64), method.models()
    hand, peer = (
        make(method, models, lambda count: fixed, lambda count: shares, *more)
        for make, more in ((research.by_hand, ()), (research.by_peer, (frame,)))
    )
    before = hand.numbers()
    hand()
    assert peer().wall > 0
    assert torch.equal(hand.numbers(), peer.numbers())
    assert not torch.equal(hand.numbers(), before)
