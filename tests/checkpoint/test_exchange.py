"""Weights go into folders of ``torch.distributed.checkpoint`` and come back from them, in any number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint

from fluxloop import Accelerator, CheckpointError, Learner
from processes.launching import run
from processes.trainings import regression, weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

SCRIPT = """
import sys
import torch
from processes.launching import report
from processes.trainings import regression, weights

first = regression("shard")
first.fit(1)
first.save(sys.argv[1], format="distributed")
second = regression("shard")
second.load_weights(sys.argv[1])
report(first=weights(first), second=weights(second))
"""


def pair() -> Learner:
    models = {"G": nn.Linear(2, 3), "D": nn.Linear(3, 1)}
    return Learner(models, default_callbacks=False, accelerator=Accelerator("cpu"))


def test_the_models_of_one_process_are_written_and_read(tmp_path: Path) -> None:
    first, second = pair(), pair()
    first.save(tmp_path / "weights", format="distributed")
    assert second.load_weights(tmp_path / "weights") == []
    assert torch.equal(second.model.G.weight, first.model.G.weight)
    assert torch.equal(second.model.D.bias, first.model.D.bias)
    read = {"G.weight": torch.zeros(3, 2)}
    checkpoint.load(read, checkpoint_id=tmp_path / "weights", no_dist=True)
    assert torch.equal(read["G.weight"], first.model.G.weight)


def test_what_torch_has_written_is_read(tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    checkpoint.save(module.state_dict(), checkpoint_id=tmp_path / "weights", no_dist=True)
    learner = Learner(nn.Linear(2, 3), default_callbacks=False, accelerator=Accelerator("cpu"))
    learner.load_weights(tmp_path / "weights")
    assert torch.equal(learner.model.weight, module.weight)


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        pair().save(tmp_path, format="distributed")
    with pytest.raises(CheckpointError, match="expected 'file' or 'distributed'"):
        pair().save(tmp_path / "x", format="zip")  # type: ignore[arg-type]  # what is refused


@pytest.mark.slow
def test_sharded_processes_write_what_one_reads(tmp_path: Path) -> None:
    reports = run(SCRIPT, 2, arguments=[str(tmp_path / "weights")]).reports
    alone = regression()
    alone.load_weights(tmp_path / "weights")
    for found in reports:
        for name, tensor in found["first"].items():
            assert torch.equal(tensor, found["second"][name])
            assert torch.equal(tensor, weights(alone)[name])
