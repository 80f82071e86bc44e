from __future__ import annotations

import importlib.util
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import KNNProbe, Learner, LossError

ROOT = Path(__file__).parents[1]
COMPARE = ROOT / "benchmarks" / "compare"
PAGE = (ROOT / "docs" / "compare.md").read_text()
EPOCHS = 2

TARGETS = {"gan": 20, "byol": 24, "simclr": 16}


def load_run() -> Any:
    spec = importlib.util.spec_from_file_location("compare_run", COMPARE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load_run()


@cache
def trained(task: str, framework: str) -> Any:
    """What a version that needs nothing else installed trained."""
    return run.run_version(task, framework, epochs=EPOCHS)


def weights_after(source: str, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Run a version whose files stay, with torch's own random numbers."""
    (script := folder / "version.py").write_text(source)
    with run.importing_common(EPOCHS, folder):
        result = runpy.run_path(str(script))["result"]
    return {name: module.state_dict() for name, module in result["weights"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["fluxloop", "fluxloop_phase"])
@pytest.mark.parametrize("task", run.TASKS)
def test_a_version_for_fluxloop_trains_the_same_bits_as_plain_pytorch(task: str, framework: str) -> None:
    ours, plain = trained(task, framework), trained(task, "torch")
    assert run.check_same(ours, plain, task) == "same bits"
    assert set(ours.updates.values()) == {EPOCHS * 11}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["byol", "simclr"])
def test_both_measure_the_same_features(task: str) -> None:
    assert trained(task, "fluxloop").scores["knn"] == pytest.approx(trained(task, "torch").scores["knn"])
    assert trained(task, "fluxloop").scores.keys() == trained(task, "torch").scores.keys()


@pytest.mark.slow
def test_the_averaged_generator_is_another_than_the_live_one() -> None:
    weights = trained("gan", "fluxloop").weights
    assert not torch.equal(weights["average"]["1.weight"], weights["gen"]["1.weight"])


@pytest.mark.slow
def test_every_version_of_the_gan_draws_a_grid_per_epoch() -> None:
    for framework in ("torch", "fluxloop", "fluxloop_phase"):
        assert sum(name.endswith(".png") for name in trained("gan", framework).files) == EPOCHS


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["GradientClip", "LRScheduler"])
def test_a_version_without_clipping_or_schedule_trains_something_else(left_out: str) -> None:
    source = re.sub(rf"    {left_out}\(.*\),\n", "", run.path_of("gan", "fluxloop").read_text())
    assert f"{left_out}(" not in source
    without = run.run_version("gan", "fluxloop", epochs=1, source=source)
    whole = run.run_version("gan", "torch", epochs=1)
    assert run.farthest(without, whole, {"gen", "disc"}) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["fluxloop", "fluxloop_phase"])
@pytest.mark.parametrize("task", run.TASKS)
def test_a_version_for_fluxloop_writes_a_checkpoint_per_epoch(task: str, framework: str) -> None:
    names = sorted(Path(name).name for name in trained(task, framework).files if name.endswith(".pt"))
    assert [int(re.findall(r"epoch-(\d+)", name)[0]) for name in names] == [1, 2]


@pytest.mark.slow
def test_the_gan_that_is_stopped_and_run_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    source = run.path_of("gan", "fluxloop").read_text()
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = weights_after(source, tmp_path / "whole")
    weights_after(source.replace("learner.fit(EPOCHS", "learner.fit(1"), tmp_path / "parts")
    parts = weights_after(source, tmp_path / "parts")
    for name, state in whole.items():
        for key, value in state.items():
            assert torch.equal(parts[name][key], value), (name, key)


@pytest.mark.slow
def test_versions_that_trained_something_else_are_told_apart() -> None:
    longer = run.run_version("simclr", "fluxloop", epochs=EPOCHS + 1)
    with pytest.raises(SystemExit, match=r"simclr: updates \{'model': 33\}, plain PyTorch \{'model': 22\}"):
        run.check_same(longer, trained("simclr", "torch"), "simclr")


@pytest.mark.slow
def test_the_probes_of_byol_leave_the_networks_as_they_are() -> None:
    source = run.path_of("byol", "fluxloop").read_text()
    bare = re.sub(r"    (LinearProbe|KNNProbe)\(.*\),\n", "", source)
    bare = re.sub(r'    "scores": \{.*?\n    \},\n', "", bare, flags=re.DOTALL)
    assert "Probe(" not in bare
    alone, watched = run.run_version("byol", "fluxloop", epochs=EPOCHS, source=bare), trained("byol", "fluxloop")
    assert run.farthest(alone, watched, set(watched.weights)) == 0


@pytest.mark.slow
def test_a_forgotten_detach_is_reported() -> None:
    source = run.path_of("gan", "fluxloop").read_text().replace(".detach()", "")
    with pytest.raises(RuntimeError, match=r"loss of optimizer 'disc' also reaches .* step\.fake"):
        run.run_version("gan", "fluxloop", epochs=1, source=f"{source}\nraise RuntimeError(learner.check()[0])\n")


def test_a_loss_that_cannot_train_its_network_is_an_error() -> None:
    source = run.path_of("gan", "fluxloop").read_text()
    detached = source.replace("softplus(-disc(state.fake))", "softplus(-disc(state.fake.detach()))")
    with pytest.raises(
        LossError, match="no gradient can be computed from the loss of optimizer 'gen': it was detached"
    ):
        run.run_version("gan", "fluxloop", epochs=1, source=detached)


def test_a_neighbours_bank_may_be_a_loader() -> None:
    rows = torch.randn(40, 4), torch.arange(40) % 2
    loader = DataLoader(TensorDataset(*rows), batch_size=8)
    probe = KNNProbe("model", bank=loader, queries=loader, k=1)
    learner = Learner(nn.Linear(4, 2), nn.functional.cross_entropy, data=(rows,), callbacks=[probe])
    learner.fit(1)
    assert learner.history["validation/knn_model"] == [1.0]


# What the page says


def test_lines_are_counted_without_blanks_comments_docstrings_and_imports() -> None:
    source = '''
"""Not counted."""
import os
from pathlib import (
    Path,
)


# not counted
class A:  # counted
    """Not
    counted."""

    text = """counted

    counted"""

    def f(self):
        "not counted"
        # not counted
        return [
            1,
        ]
'''
    assert run.count_lines(source) == 7


def test_the_page_states_the_lines_that_are_counted() -> None:
    assert run.line_table() in PAGE
    for (task, framework), count in run.counts().items():
        name = run.path_of(task, framework).name
        stated = re.findall(rf"\[`{name}`\]\(\.\./benchmarks/compare/{name}\), (\d+) lines", PAGE)
        assert stated in ([], [str(count)]), name


def test_every_block_of_the_page_is_the_counted_part_of_its_file() -> None:
    blocks = re.findall(r"\[`(\w+\.py)`\][^\n]*\n\n```(\w+)\n(.*?)\n```", PAGE, re.DOTALL)
    assert len(blocks) == len(re.findall("^```py$", PAGE, re.MULTILINE))
    for name, language, code in blocks:
        assert language == "py"  # run.py and these tests run the file itself
        assert code == run.region((COMPARE / name).read_text()), name
    shown = {name for name, _, _ in blocks}
    assert shown >= {f"{t}_{f}.py" for t in ("gan", "byol") for f in ("fluxloop", "torch", "lightning", "ignite")}


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("task", run.TASKS)
def test_a_phase_of_ones_own_stays_within_its_lines(task: str) -> None:
    assert run.counts()[task, "fluxloop"] <= TARGETS[task]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("gan", "epoch gen disc ema opt_d opt_g sched_d sched_g"),
        ("byol", "epoch step models optimizer probe_optimizer schedule"),
        ("simclr", "epoch model optimizer schedule"),
    ],
)
def test_the_checkpoint_of_plain_pytorch_holds_all_that_trains(task: str, parts: str, tmp_path: Path) -> None:
    copied = tmp_path / "last.pt"
    copying = f'\n(FOLDER / "last.pt").rename({str(copied)!r})\nresult.pop("checkpoint")\n'
    run.run_version(task, "torch", epochs=1, source=run.path_of(task, "torch").read_text() + copying)
    assert " ".join(torch.load(copied)) == parts


def test_the_lines_stated_for_newer_methods_are_those_of_their_blocks() -> None:
    blocks = re.findall(r"^### ([^\n]*), (\d+) lines\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    for name, stated, code in blocks:
        lines = [line for line in code.splitlines() if line.strip() and not re.match(r"(import|from) ", line)]
        assert len(lines) == int(stated), name
        assert len(lines) <= (12 if "own" not in name and "plain" not in name else 30), name


# The same small training, side by side

SIDE = (ROOT / "docs" / "side-by-side.md").read_text()
side_by_side: Any = runpy.run_path(str(COMPARE / "side_by_side.py"))


def test_the_small_training_of_the_page_ends_with_the_bits_of_plain_pytorch() -> None:
    assert side_by_side["compare"]("Plain PyTorch", SIDE) == "same bits"
    without = SIDE.replace(", GradientClip(0.3)", "")
    assert re.match(r"weights differ by up to 0\.\d+", side_by_side["compare"]("Plain PyTorch", without))


@pytest.mark.parametrize("section", ["Lightning", "Ignite", "fastai"])
def test_what_stands_beside_another_framework_trains_the_bits_of_plain_pytorch(section: str) -> None:
    plain, _ = side_by_side["sections"](SIDE)["Plain PyTorch"].split(side_by_side["SPLIT"])
    _, ours = side_by_side["sections"](SIDE)[section].split(side_by_side["SPLIT"])
    page = SIDE.split("\n## ")[0] + f"\n## {section}\n{plain}{side_by_side['SPLIT']}{ours}"
    assert side_by_side["compare"](section, page) == "same bits"


def test_code_of_other_frameworks_in_python_stands_where_the_script_runs_it() -> None:
    shown = {head for head, text in side_by_side["sections"](SIDE).items() if "```py\n" in text}
    assert shown | {"Plain PyTorch"} == side_by_side["FRAMEWORKS"].keys()
    for head in shown:
        assert "```py\n" not in side_by_side["sections"](SIDE)[head].split(side_by_side["SPLIT"])[1]
