"""Checkpoints of several processes: any number goes on from them, and a kill at any moment leaves one to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxloop.checkpoint.folder import Folder, read
from fluxloop.checkpoint.open_windows import OPEN
from fluxloop.checkpoint.parts import PART_NAME, names_of_parts
from fluxloop.errors import CheckpointError
from processes.launching import SIZES, run
from processes.trainings import regression, weights

pytestmark = pytest.mark.slow

HEAD = """
import os
import sys
import torch
from fluxloop import EMA, Callback, AbstractTrainingPhase, Checkpointer, GradientClip, StepBegin, on
from fluxloop.checkpoint import folder as files
from fluxloop.nested import whole
from processes.launching import report
from processes.trainings import regression, weights


class Kill(Callback):
    "Ends all processes at the begin of a step."
    transient = ("steps",)

    def __init__(self, at):
        self.at, self.steps = at, 0

    @on(StepBegin, AbstractTrainingPhase)
    def kill(self, event, phase, learner):
        self.steps += 1
        if self.steps == self.at:
            learner.accelerator.wait()
            os._exit(0)


def train(strategy, folder, accumulate, kill=0):
    callbacks = [Checkpointer(folder, unit="step", every=2), EMA("model", 0.9), GradientClip(0.1), Kill(kill)]
    made = regression(strategy, number=60, accumulate=accumulate, callbacks=callbacks)
    made.fit(2, resume=folder)
    return made


def all_of(made):
    return weights(made) | {
        f"optimizer {i} {name}": whole(tensor).clone()
        for i, entries in enumerate(made.optimizer.state.values())
        for name, tensor in entries.items()
    }
"""

TRAIN = (
    HEAD
    + """
folder, strategy, accumulate, kill = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
report(all=all_of(train(strategy, folder, accumulate, kill)))
"""
)

KILLED_IN_A_SAVE = (
    HEAD
    + """
folder, rank, when = sys.argv[1], os.environ["RANK"], sys.argv[2]
writes = 0
plain = files.write


def write(path, state):
    global writes
    writes += 1
    if writes == 3 + (when == "index" and rank == "0") and rank == ("1" if when == "parts" else "0"):
        os._exit(1)
    plain(path, state)


files.write = write
train("shard", folder, 1)
"""
)

SAVE = (
    HEAD
    + """
made = regression("shard", callbacks=[EMA("model", 0.9)])
made.fit(1)
made.save(sys.argv[1])
before = all_of(made)
made.fit(1)
made.load(sys.argv[1])
report(before=before, after=all_of(made))
"""
)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9)


def train(processes: int, folder: Path, strategy: str, accumulate: int = 1, kill: int = 0) -> list[dict[str, Any]]:
    return run(TRAIN, processes, arguments=[str(folder), strategy, str(accumulate), str(kill)], timeout=120).reports


def parts_in(folder: Path) -> list[tuple[str, Path]]:
    """Files of parts, each with the name of its checkpoint."""
    known = [(PART_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [(match[1], path) for match, path in known if match]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What one process ends with that nobody killed; three batches make an update."""
    (found,) = train(1, tmp_path_factory.mktemp("unbroken"), "auto", 3)
    expected: dict[str, Tensor] = found["all"]
    return expected


@pytest.mark.parametrize(
    ("strategy", "first", "second"),
    [
        *[("shard", 2, 1), ("shard", 1, 2), ("replicate", 2, 1)],
        *([("shard", 2, 4), ("replicate", 2, 4)] if 4 in SIZES else []),
    ],
)
def test_a_killed_run_goes_on_with_another_number_of_processes(
    strategy: str, first: int, second: int, unbroken: dict[str, Tensor], tmp_path: Path
) -> None:
    train(first, tmp_path, strategy, 3, kill=4)  # in the middle of an epoch, and of an update
    for found in train(second, tmp_path, strategy, 3):
        assert_close(found["all"], unbroken)


@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_a_run_killed_in_an_open_window_goes_on_to_the_bit_with_as_many_processes(
    strategy: str, tmp_path: Path
) -> None:
    expected = train(2, tmp_path / "unbroken", strategy, 3)
    train(2, tmp_path / "run", strategy, 3, kill=4)
    newest = read(Folder(tmp_path / "run").files()[-1][1])["updates"]
    (windows,) = newest[OPEN]["windows"].values()
    assert [(window["count"], window["complete"]) for window in windows] == [(2, False)] * 2
    assert bool(newest[OPEN]["gradients"]) is (strategy == "replicate")
    for found, known in zip(train(2, tmp_path / "run", strategy, 3), expected, strict=True):
        assert found["all"].keys() == known["all"].keys()
        assert all(torch.equal(tensor, known["all"][name]) for name, tensor in found["all"].items())


@pytest.mark.parametrize("when", ["parts", "index"])
def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before_it(when: str, tmp_path: Path) -> None:
    (expected,) = train(1, tmp_path / "unbroken", "auto")
    run(KILLED_IN_A_SAVE, 2, arguments=[str(tmp_path / "run"), when], check=False, timeout=120)
    folder = Folder(tmp_path / "run")
    complete = [path for _, path in folder.files()]
    assert all(map(folder.is_complete, complete))
    stems = {path.name.removesuffix(".pt") for path in complete}
    orphans = [path for stem, path in parts_in(folder.path) if stem not in stems]
    assert orphans
    for found in train(2, folder.path, "shard"):
        assert_close(found["all"], expected["all"])
    assert not any(path.exists() for path in orphans)
    assert {stem for stem, _ in parts_in(folder.path)} == {path.name.removesuffix(".pt") for _, path in folder.files()}


def test_what_sharded_processes_save_is_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "whole.pt"
    for found in run(SAVE, 2, arguments=[str(path)], timeout=120).reports:
        assert all(torch.equal(tensor, found["after"][name]) for name, tensor in found["before"].items())
        before = found["before"]
    alone = regression()
    alone.load_weights(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(alone).items())
    state = torch.load(path, weights_only=True)
    assert all(type(tensor) is Tensor for tensor in state["models"][""]["state"].values())


def test_a_checkpoint_without_all_of_its_parts_is_not_read(tmp_path: Path) -> None:
    train(2, tmp_path, "shard", kill=4)
    newest = Folder(tmp_path).files()[-1][1]
    assert read(newest)["models"][""]["state"]["0.weight"].shape == (16, 6)
    first, second = sorted(p for p in tmp_path.iterdir() if p.name.startswith(newest.stem + ".parts"))
    kept = second.read_bytes()
    second.write_bytes(kept[:-100])
    with pytest.raises(CheckpointError, match="incomplete or damaged"):
        read(newest)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"has parts in {second.name}, which is not there"):
        read(newest)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="parts are in none of its files"):
        read(newest)


def test_files_of_parts_are_known_by_their_names() -> None:
    names = names_of_parts("epoch-0000-step-00000002-phase-0.pt", "0123abcd", 2)
    assert [PART_NAME.fullmatch(name)[3] for name in names] == ["1", "2"]  # type: ignore[index]
