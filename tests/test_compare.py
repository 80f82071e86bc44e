from __future__ import annotations

import importlib.util
import re
import runpy
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import KNNProbe, Learner, LossError, seed_everything

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


# Newer methods

OWN, PLAIN = ", a phase of one's own", " in plain PyTorch"
METHODS = ["LeJEPA", "I-JEPA", "R3GAN", "Flow matching"]
SECTION = PAGE[PAGE.index("## Newer methods") :]
SHARED = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)[0]
BLOCKS = {
    name: (int(stated), code)
    for name, stated, code in re.findall(
        r"^### ([^\n]*), (\d+) lines\n.*?^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL
    )
}


def test_the_lines_stated_for_newer_methods_are_those_of_their_blocks() -> None:
    assert [*BLOCKS] == [name + how for name in METHODS for how in ("", OWN, PLAIN)]
    for name, (stated, code) in BLOCKS.items():
        lines = [line for line in code.splitlines() if line.strip() and not re.match(r"(import|from) ", line)]
        assert len(lines) == stated, name
    for name in METHODS:
        lines_of = [BLOCKS[name + how][0] for how in ("", OWN, PLAIN)]
        assert lines_of[0] <= 12
        assert lines_of[1] <= 30
        written = name.lower() if name == "Flow matching" else name
        assert "| {} | {} | {} | {} |".format(written, *lines_of) in PAGE


def run_block(name: str, change: Callable[[str], str] = str) -> dict[str, Any]:
    """Run a block of the page after the lines that all share, and return its names."""
    names: dict[str, Any] = {"__name__": "page"}
    seed_everything(0)
    exec(change(SHARED), names)
    exec(change(BLOCKS[name][1]), names)
    return names


def weights_of(learner: Learner[Any]) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key}": value for name in learner.weights for key, value in learner.weights[name].state_dict().items()
    }


@pytest.mark.filterwarnings("ignore:.*checkpoints will be written:UserWarning")
@pytest.mark.parametrize("name", METHODS)
def test_a_newer_method_by_hand_trains_as_the_built_in_phase(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built_in, own = (weights_of(run_block(name + how)["learner"]) for how in ("", OWN))
    assert built_in.keys() == own.keys()
    rounding = 1e-6 if name == "Flow matching" else 0  # fluxloop's takes the mean of each row first
    for key, value in built_in.items():
        torch.testing.assert_close(own[key], value, rtol=0, atol=rounding)


def draw_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch draw the same numbers for the same shape, whoever asks."""
    signs = cycle([1, -1])

    def drawn(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def alike(*args: Any, **options: Any) -> torch.Tensor:
            return draw(*args, generator=torch.Generator().manual_seed(7))

        return alike

    for name in ("rand", "randn", "randint"):
        monkeypatch.setattr(torch, name, drawn(getattr(torch, name)))
    noise = torch.randn
    monkeypatch.setattr(torch, "randn_like", lambda like: noise(*like.shape) * next(signs))
    monkeypatch.setattr(torch, "randperm", lambda rows, **options: torch.arange(rows))


@pytest.mark.parametrize("name", METHODS)
def test_a_newer_method_in_plain_pytorch_is_the_same_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_alike(monkeypatch)

    def unfused(code: str) -> str:
        return code.replace("torch.optim.AdamW, ", "torch.optim.AdamW, fused=False, ").replace(
            "torch.optim.Adam, ", "torch.optim.Adam, fused=False, "
        )

    own = run_block(name + OWN, unfused)["learner"]
    before = unfused(SHARED)
    plain = run_block(name + PLAIN)
    assert before != SHARED
    found = {
        "LeJEPA": {"encoder": "encoder", "projector": "projector"},
        "I-JEPA": {"student": "student", "teacher": "teacher", "predictor": "predictor"},
        "R3GAN": {"G": "G", "D": "D"},
        "Flow matching": {"model": "model"},
    }[name]
    for weights, variable in found.items():
        expected = plain[variable].state_dict()
        for key, value in own.weights[weights].state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    assert torch.load("runs/last.pt")["epoch"] == plain["EPOCHS"] - 1
