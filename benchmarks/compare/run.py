"""Run every version of the comparison that is installed, check that all trained the same, and count their lines.

    python benchmarks/compare/run.py                # all, three epochs
    python benchmarks/compare/run.py --epochs 1

Prints the tables of docs/compare.md as Markdown. A version is a file ``<task>_<framework>.py`` beside this one. All
start from the same weights, get the same batches in the same order, and the same noise: meanwhile ``torch.randn``
gives numbers that depend only on the shape and on how often that shape was asked for.

Each is compared with plain PyTorch.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import runpy
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from attrs import define, field
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

FOLDER = Path(__file__).parent
TASKS = {"gan": "GAN", "byol": "BYOL", "simclr": "SimCLR"}
FRAMEWORKS = {
    "fluxloop": "fluxloop, a phase of one's own",
    "fluxloop_phase": "fluxloop, a built-in phase",
    "torch": "plain PyTorch",
    "lightning": "Lightning, manual optimization",
    "ignite": "Ignite",
}
PACKAGES = {"lightning": "lightning", "ignite": "pytorch-ignite"}
"""What has to be installed besides fluxloop."""

BEGIN, END = "# --- counted ---", "# --- end ---"
LOSS_TOLERANCE, AVERAGE_TOLERANCE = 0.01, 1e-4


@define
class Run:
    """What a version trained.

    Args:
        weights: State of each network by name.
        losses: Mean losses of the last epoch.
        scores: Accuracies after the last epoch.
        updates: How often each optimizer stepped, by the network whose parameters it holds first.
        files: Names of the files it wrote.
    """

    weights: dict[str, dict[str, Tensor]]
    losses: dict[str, float]
    scores: dict[str, float]
    updates: dict[str, int]
    files: list[str] = field(factory=list)


# Counting


def path_of(task: str, framework: str) -> Path:
    return FOLDER / f"{task}_{framework}.py"


def region(source: str) -> str:
    """Give the part of a file that is counted, and that the page shows."""
    return source.split(f"{BEGIN}\n")[1].split(END)[0].strip("\n")


def count_lines(source: str) -> int:
    """Count a region's lines that are not blank, a comment, a docstring, or an import."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        holder = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if holder and isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
            left_out.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in left_out for n, line in lines)


def counts() -> dict[tuple[str, str], int]:
    """Count every version's lines, by task and framework."""
    found = {(task, framework): path_of(task, framework) for framework in FRAMEWORKS for task in TASKS}
    return {key: count_lines(region(path.read_text())) for key, path in found.items() if path.exists()}


def line_table() -> str:
    """Give the table of lines per version."""
    counted = counts()
    rows = [f"| version | {' | '.join(TASKS.values())} |", f"| --- |{' ---: |' * len(TASKS)}"]
    for framework, label in FRAMEWORKS.items():
        cells = [str(counted.get((task, framework), "–")) for task in TASKS]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


# Running


class Noise:
    """Stands for ``torch.randn``: numbers that depend on the shape and on how often it was asked for."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[int, ...]] = Counter()
        self.randn = torch.randn

    def __call__(self, *shape: int, device: Any = None) -> Tensor:
        count = self.asked[shape]
        self.asked[shape] += 1
        generator = torch.Generator().manual_seed(1000 * count + sum(shape))
        return self.randn(*shape, generator=generator).to(device or "cpu")


@contextlib.contextmanager
def importing_common(epochs: int, folder: Path) -> Iterator[None]:
    """Have a version's ``from common import ...`` find this run's numbers, whatever else has that name."""
    common: Any = ModuleType("common")
    exec(compile((FOLDER / "common.py").read_text(), str(FOLDER / "common.py"), "exec"), vars(common))
    common.EPOCHS, common.FOLDER = epochs, folder
    other = sys.modules.get("common")
    sys.modules["common"] = common
    try:
        yield
    finally:
        del sys.modules["common"]
        if other is not None:
            sys.modules["common"] = other


def run_version(task: str, framework: str, *, epochs: int = 3, source: str | None = None) -> Run:
    """Train one version.

    Args:
        task: ``"gan"``, ``"byol"`` or ``"simclr"``.
        framework: One of `FRAMEWORKS`.
        epochs: How many.
        source: Run this instead of the version's file.
    """
    steps: Counter[int] = Counter()
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        optimizers[id(optimizer)] = optimizer
        steps[id(optimizer)] += 1

    path = path_of(task, framework)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        if source is not None:
            path = folder / path.name
            path.write_text(source)
        stack.enter_context(importing_common(epochs, folder))
        stack.enter_context(mock.patch("torch.randn", Noise()))
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(io.StringIO()))
        stack.callback(register_optimizer_step_post_hook(note).remove)
        done = runpy.run_path(str(path), run_name="__main__")["result"]
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        for key in ("grid", "checkpoint"):
            if key in done and not Path(done[key]).is_file():
                raise SystemExit(f"{path.name} wrote no {key}")
    owners = {id(p): name for name, module in done["weights"].items() for p in module.parameters()}
    updates = {
        owners.get(id(optimizers[key].param_groups[0]["params"][0]), "probe"): count for key, count in steps.items()
    }
    weights = {
        name: {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
        for name, module in done["weights"].items()
    }
    return Run(weights, done["losses"], done.get("scores", {}), dict(sorted(updates.items())), files)


def farthest(one: Run, other: Run, names: set[str]) -> float:
    """Give the largest difference between two runs' weights."""
    return max(
        (tensor.double() - other.weights[name][key].double()).abs().max().item()
        for name in names
        for key, tensor in one.weights[name].items()
    )


def check_same(run: Run, plain: Run, label: str) -> str:
    """Raise where a version trained something else than plain PyTorch; tell how near they are.

    Raises:
        SystemExit: Other numbers of updates, or losses that differ by more than one part in a hundred.
    """
    if run.updates != plain.updates:
        raise SystemExit(f"{label}: updates {run.updates}, plain PyTorch {plain.updates}")
    off = max(abs(run.losses[name] / loss - 1) for name, loss in plain.losses.items())
    if off > LOSS_TOLERANCE:
        raise SystemExit(f"{label}: losses {run.losses}, plain PyTorch {plain.losses}")
    if "average" in run.weights and farthest(run, plain, {"average"}) > AVERAGE_TOLERANCE:
        raise SystemExit(f"{label}: the averaged weights are not plain PyTorch's")
    return "same bits" if farthest(run, plain, set(plain.weights) - {"average"}) == 0 else f"losses to {off:.2%}"


def installed(framework: str) -> bool:
    package = PACKAGES.get(framework)
    return package is None or importlib.util.find_spec(framework) is not None


def check_task(task: str, epochs: int) -> Iterator[str]:
    """Run every version of a task; give the rows that tell what they trained."""
    plain = run_version(task, "torch", epochs=epochs)
    for framework, label in FRAMEWORKS.items():
        if not path_of(task, framework).exists():
            continue
        if not installed(framework):
            print(f"{label} is not installed and was skipped: pip install {PACKAGES[framework]}", file=sys.stderr)
        elif framework == "torch":
            yield row(task, label, plain, "")
        else:
            run = run_version(task, framework, epochs=epochs)
            yield row(task, label, run, check_same(run, plain, f"{TASKS[task]}, {label}"))


def row(task: str, label: str, run: Run, same: str) -> str:
    updates = ", ".join(f"{name} {count}" for name, count in run.updates.items())
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in (run.losses | run.scores).items())
    return f"| {TASKS[task]} | {label} | {updates} | {numbers} | {same} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(line_table())
    print("\n| task | version | updates | last epoch | against plain PyTorch |\n| --- | --- | --- | --- | --- |")
    for task in TASKS:
        for row in check_task(task, arguments.epochs):
            print(row, flush=True)
    peers = [f"{package} {version(package)}" for name, package in PACKAGES.items() if installed(name)]
    print(f"\n{arguments.epochs} epochs; torch {torch.__version__}, {', '.join(peers) or 'no peer installed'}")


if __name__ == "__main__":
    main()
