"""The layers of the package: who may import whom at run time."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fluxloop

ROOT = Path(fluxloop.__file__).parent

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("given",),
    (
        "events",
        "gradients",
        "images",
        "losses.adversarial",
        "losses.contrastive",
        "losses.distillation",
        "losses.reconstruction",
        "losses.redundancy",
        "metrics.averages",
        "metrics.neighbors",
        "nested",
        "notes",
        "randomness",
        "schedules",
        "series",
        "signals",
    ),
    (
        "access",
        "assign",
        "augment",
        "digests",
        "host",
        "lazy",
        "loading",
        "logging.loggables",
        "losses.mixed",
        "metrics.classification",
        "modes",
        "optimizers",
        "state",
    ),
    (
        "accelerator",
        "data",
        "finite",
        "folder",
        "logging.backend",
        "loop",
        "losses",
        "models",
        "monitor",
        "persist",
        "readonly",
        "updates",
    ),
    (
        "arguments",
        "fingerprint",
        "history",
        "layout",
        "logging.memory",
        "logging.tensorboard",
        "logging.text_files",
        "logging.wandb",
        "optimizer_state",
        "phase",
        "stopping",
        "walk",
        "weights",
    ),
    ("sources",),
    (
        "callback",
        "logging.mlflow",
        "metrics.base",
        "misfits",
        "passes",
        "phases.supervised",
        "phases.twin",
        "seen",
        "view",
    ),
    (
        "callbacks.batch_limit",
        "callbacks.conditional",
        "callbacks.custom",
        "callbacks.early_stopping",
        "callbacks.ema",
        "callbacks.garbage_collect",
        "callbacks.mixup",
        "callbacks.progress",
        "callbacks.recorder",
        "callbacks.sanity_check",
        "callbacks.stall_report",
        "callbacks.stop_on_nan_loss",
        "callbacks.swa",
        "callbacks.unfreeze",
        "checkpoint",
        "combined",
        "feed",
        "forbidden",
        "graph",
        "hyperparameters",
        "logging",
        "metrics.expected",
        "metrics.regression",
        "outlook",
        "phases.gan",
        "phases.objective",
        "phases.per_optimizer",
        "summary",
    ),
    (
        "callbacks.activation_stats",
        "callbacks.checkpointer",
        "callbacks.sample_images",
        "callbacks.scheduler",
        "callbacks.set_epoch",
        "callbacks.traces",
        "metrics",
        "ordering",
        "phases.autoencoder",
        "phases.distillation",
        "phases.joint_embedding",
        "phases.mae",
        "phases.vae",
        "resume",
        "runner",
        "tracing",
    ),
    (
        "callbacks.lr_scheduler",
        "callbacks.metrics",
        "callbacks.profile",
        "compiled",
        "phases.barlow_twins",
        "phases.byol",
        "phases.dino",
        "phases.metric_learning",
        "phases.moco",
        "phases.simclr",
        "phases.simsiam",
        "phases.vicreg",
    ),
    (
        "callbacks.csv_logger",
        "callbacks.log",
        "callbacks.printer",
        "callbacks.probe",
        "phases",
    ),
    (
        "callbacks.defaults",
        "callbacks.feature_stats",
        "callbacks.gradient_clip",
        "callbacks.keep_best",
        "callbacks.log_pictures",
        "fit",
    ),
    (
        "callbacks",
        "lr_finder",
    ),
    ("inference",),
    ("check",),
    ("learner",),
    ("testing",),
    ("",),
)
"""The modules in reading order: each may import those of lower layers alone. "" is the package itself."""


@cache
def modules() -> dict[str, Path]:
    """Give the package's modules by name, without "fluxloop."."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_for_types(node: ast.AST) -> bool:
    """Tell whether a statement is ``if TYPE_CHECKING:``."""
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def run_time_nodes(nodes: Iterable[ast.AST], lazy: bool) -> Iterator[ast.AST]:
    """Walk statements, functions' bodies included, leaving out what is there for type checkers alone."""
    for node in nodes:
        if is_for_types(node) and not lazy:
            assert isinstance(node, ast.If)
            yield from run_time_nodes(node.orelse, lazy)
        else:
            yield node
            yield from run_time_nodes(ast.iter_child_nodes(node), lazy)


def imported(source: str, lazy: bool = False) -> Iterator[str]:
    """Give the names of the package's modules that some source imports at run time; "" for the package itself.

    A lazy package shows its names to type checkers and loads them when they are asked for, which is at run time.
    """
    for node in run_time_nodes(ast.parse(source).body, lazy):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fluxloop":
                    yield alias.name.partition(".")[2]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            if node.module.split(".")[0] == "fluxloop":
                base = node.module.partition(".")[2]
                for alias in node.names:
                    inner = f"{base}.{alias.name}".lstrip(".")
                    yield inner if inner in modules() else base


@cache
def imports(name: str) -> frozenset[str]:
    """Give whom a module imports; a package's module stands for its package too where an outsider imports it."""
    path = modules()[name]
    found = set(imported(path.read_text(encoding="utf-8"), lazy=path.name == "__init__.py"))
    for other in list(found):
        package = other.rpartition(".")[0]
        if package and not (name == package or name.startswith(f"{package}.")):
            found.add(package)
    return frozenset(found)


def test_the_table_of_layers_names_every_module_once() -> None:
    named = [name for layer in LAYERS for name in layer]
    assert sorted(named) == sorted(modules())


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_modules_of_lower_layers(name: str) -> None:
    layer = {module: index for index, names in enumerate(LAYERS) for module in names}
    upward = sorted(other for other in imports(name) if layer[other] >= layer[name])
    assert not upward, f"{name or 'the package'} imports {upward}, which stand no lower"


def test_imports_at_run_time_are_acyclic() -> None:
    try:
        order = list(TopologicalSorter({name: imports(name) for name in modules()}).static_order())
    except CycleError as error:
        raise AssertionError(f"a cycle of imports: {' → '.join(error.args[1])}") from None
    assert len(order) == len(modules())


def test_callbacks_never_import_the_learner_or_the_fit() -> None:
    todo = [name for name in modules() if name.split(".")[0] == "callbacks"]
    assert len(todo) > 5
    seen: set[str] = set()
    while todo:  # nor through others
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(imports(name))
    assert seen.isdisjoint({"learner", "fit", "inference", "check", "testing", ""})


def test_phases_never_import_the_learner_the_fit_or_callbacks() -> None:
    for name in modules():
        if name.split(".")[0] in ("phase", "phases"):
            forbidden = {"learner", "fit", "runner", "callback", "callbacks"}
            assert forbidden.isdisjoint(other.split(".")[0] for other in imports(name))


def test_no_module_imports_the_package_itself() -> None:
    for name in modules():
        assert "" not in imports(name), f"{name} imports fluxloop itself"


def test_only_the_learner_makes_an_accelerator() -> None:
    users = {name for name in modules() if "accelerator" in imports(name)}
    assert users <= {"", "learner"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import fluxloop", [""]),
        ("import fluxloop.state", ["state"]),
        ("from fluxloop import Learner", [""]),
        ("from fluxloop import errors", ["errors"]),
        ("from fluxloop.metrics import base, Loss", ["metrics.base", "metrics"]),
        ("def f():\n    from fluxloop.state import State", ["state"]),
        ("class A:\n    if x:\n        import fluxloop.loop", ["loop"]),
        ("if TYPE_CHECKING:\n    from fluxloop.state import State", []),
        ("if typing.TYPE_CHECKING:\n    import fluxloop\nelse:\n    import fluxloop.loop", ["loop"]),
        ("import fluxloops, torch", []),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, expected: list[str]) -> None:
    assert list(imported(source)) == expected


def test_what_a_package_loads_lazily_counts_as_what_it_imports() -> None:
    source = "if TYPE_CHECKING:\n    from fluxloop.callbacks.ema import EMA"
    assert list(imported(source, lazy=True)) == ["callbacks.ema"]
    assert {"callbacks", "learner", "phases", "testing"} <= imports("")
    assert {"phases.gan", "phases.supervised"} <= imports("phases")
