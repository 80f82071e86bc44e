from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from nets import Counting, net

from fluxloop import (
    EMA,
    Callback,
    EpochEnd,
    Metrics,
    Phase,
    Recorder,
    on,
)
from fluxloop.callbacks.early_stopping import EarlyStopping
from fluxloop.callbacks.gradient_clip import GradientClip
from fluxloop.callbacks.keep_best import KeepBestModel
from fluxloop.callbacks.lr_scheduler import LRScheduler
from fluxloop.callbacks.swa import StochasticWeightAveraging


def test_the_manifest_of_a_big_learner_lists_every_path_that_anybody_writes() -> None:
    learner = net(
        Recorder(),
        Metrics(),
        Counting(),
        EMA("model", 0.9),
        KeepBestModel(),
        EarlyStopping(3),
        GradientClip(1.0),
        LRScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=1)),
        StochasticWeightAveraging(start=1),
    )
    learner.fit(2)
    manifest = learner.checkpoint_manifest()
    paths = {entry.path: entry for entry in manifest}
    assert {entry.kind for entry in manifest} <= {"persisted", "derived", "transient"}
    for node in learner.callbacks.graph.nodes:
        for path in node.access.writes:
            name = ".".join(path)
            assert any(name == known or known.startswith(f"{name}.") for known in paths), name
    for path in ("model", "optimizer", "cbstate.history", "cbstate.metrics", "callbacks.Counting", "streams", "seed"):
        assert paths[path].kind == "persisted"
        assert paths[path].size > 0
    assert paths["model"].owner == "learner"
    assert "Recorder" in paths["cbstate.history"].owner
    expected = sum(t.numel() * t.element_size() for t in learner.model.state_dict().values())
    assert expected <= paths["model"].size < expected + 2000
    text = repr(manifest).splitlines()
    assert text[0].split() == ["path", "owner", "kind", "bytes"]
    assert len(text) == len(manifest) + 2  # a head, and the size of the file
    assert len({line.index(entry.kind) for line, entry in zip(text[1:-1], manifest, strict=True) if entry.kind}) == 1


def test_the_manifest_says_what_is_not_kept_and_what_is_transient() -> None:
    class Writer(Callback):
        writes = ("data", "accelerator")
        transient = ("accelerator",)

        @on(EpochEnd)
        def end(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
            pass

    kinds = {entry.path: entry.kind for entry in net(Writer()).checkpoint_manifest() if entry.owner == "Writer"}
    assert kinds["data"] == "not kept"
    assert kinds["accelerator"] == "transient"


def test_the_manifest_says_how_large_the_file_is(tmp_path: Path) -> None:
    learner = net(Recorder(), Metrics())
    learner.fit(1)
    learner.save(tmp_path / "state.pt")
    size = (tmp_path / "state.pt").stat().st_size
    manifest = learner.checkpoint_manifest()
    assert abs(manifest.file_size - size) < 0.02 * size  # names of files are in it
    assert repr(manifest).endswith(f"a file of {manifest.file_size:,} bytes")
