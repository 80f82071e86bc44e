"""The layers of the package: who may import whom at run time."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fluxloop

ROOT = Path(fluxloop.__file__).parent

LAYERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "words": (
        "Errors, events, schedules, and helpers that know nothing of a training.",
        (
            "errors",
            "events",
            "lazy",
            "guard",
            "nested",
            "randomness",
            "schedules",
            "images",
            "augment",
            "heads",
            "screen",
        ),
    ),
    "processes": ("Several processes that train together, and what they tell each other.", ("processes",)),
    "state": (
        "The entries of a step, what is shared, counts, series, when to stop, and what may be used of a learner.",
        ("state", "monitor", "history", "stopping", "interfaces", "signals"),
    ),
    "persist": ("Objects as plain data: what is kept of anything that a run can reach.", ("persist",)),
    "compute": ("Gradients are computed and optimizers step.", ("compute",)),
    "steps": ("A step, an epoch, and the phase that says what happens in them.", ("loop", "phase")),
    "data": ("Batches: where they come from, and how a pass is begun and left.", ("data",)),
    "order": (
        "Callbacks: who may touch what, and so in which order they run.",
        ("callback", "order", "hyperparameters"),
    ),
    "parts": (
        "Losses, metrics, loggers and phases: each a page that stands alone.",
        ("losses", "metrics", "logging", "phases"),
    ),
    "checkpoint": ("A learner as plain data, and the files with it.", ("checkpoint",)),
    "compile": ("A step as one graph.", ("compile",)),
    "callbacks": ("The callbacks that come with fluxloop.", ("callbacks",)),
    "run": ("What a learner does: fit, resume, predict, check.", ("run",)),
    "learner": (
        "The learner, what tests of users' parts need, and the command line.",
        ("learner", "testing", "__main__", ""),
    ),
}
"""The layers in reading order, each with what it is for: modules, and folders with all that is in them.

A module imports those of its own layer and of lower ones, for type checkers too. "" is the package itself.
"""


def layer_of(name: str) -> int:
    """Return the number of the layer that a module belongs to."""
    root = name.split(".")[0]
    return next(number for number, (_, roots) in enumerate(LAYERS.values()) if root in roots)


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


def run_time_nodes(nodes: Iterable[ast.AST], types: bool) -> Iterator[ast.AST]:
    """Walk statements, functions' bodies included, leaving out what is there for type checkers alone."""
    for node in nodes:
        if is_for_types(node) and not types:
            assert isinstance(node, ast.If)
            yield from run_time_nodes(node.orelse, types)
        else:
            yield node
            yield from run_time_nodes(ast.iter_child_nodes(node), types)


def imported(source: str, types: bool = False) -> Iterator[str]:
    """Give the names of the package's modules that some source imports at run time; "" for the package itself.

    Args:
        source: The text of a module.
        types: Whether imports for type checkers count too.
    """
    for node in run_time_nodes(ast.parse(source).body, types):
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


def source_of(name: str) -> str:
    """Return the text of a module; of a package that loads its names when they are asked for, with its stub."""
    path = modules()[name]
    stub = path.with_suffix(".pyi")
    return path.read_text(encoding="utf-8") + (stub.read_text(encoding="utf-8") if stub.exists() else "")


@cache
def imports(name: str) -> frozenset[str]:
    """Give whom a module imports; a package's module stands for its package too where an outsider imports it."""
    found = set(imported(source_of(name)))
    for other in list(found):
        package = other.rpartition(".")[0]
        if package and not (name == package or name.startswith(f"{package}.")):
            found.add(package)
    return frozenset(found)


def test_the_table_of_layers_names_every_module_and_folder_once() -> None:
    named = [name for _, roots in LAYERS.values() for name in roots]
    assert sorted(named) == sorted({name.split(".")[0] for name in modules()})


def test_the_layers_in_architecture_are_those_that_are_proved() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (.+?) \| ((?:`\w+`(?:, )?)+) \|$", page, re.MULTILINE)
    told = {name: (what, tuple(re.findall(r"`(\w+)`", roots))) for name, what, roots in rows}
    assert told == {name: (what, tuple(root or "__init__" for root in roots)) for name, (what, roots) in LAYERS.items()}


def test_the_root_holds_the_words_that_a_user_meets() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 23


@pytest.mark.slow(quick=26)
@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_modules_of_its_layer_and_of_lower_ones(name: str) -> None:
    upward = sorted({other for other in imported(source_of(name), types=True) if layer_of(other) > layer_of(name)})
    assert not upward, f"{name or 'the package'} imports {upward}, which stand higher"


def test_nothing_below_the_learner_imports_it_even_for_types() -> None:
    for name in modules():
        if name not in ("learner", "testing", "__main__", ""):
            found = set(imported(source_of(name), types=True))
            assert found.isdisjoint({"learner", "testing", ""}), name


def test_imports_at_run_time_are_acyclic() -> None:
    try:
        order = list(TopologicalSorter({name: imports(name) for name in modules()}).static_order())
    except CycleError as error:
        raise AssertionError(f"a cycle of imports: {' → '.join(error.args[1])}") from None
    assert len(order) == len(modules())


def test_imports_for_types_make_no_circle_either() -> None:
    drawn = {}
    for name, path in modules().items():
        found = set(imported(path.read_text(encoding="utf-8"), types=path.name != "__init__.py"))
        drawn[name] = {other for other in found if modules()[other].name != "__init__.py"}
    try:
        assert len(list(TopologicalSorter(drawn).static_order())) == len(modules())
    except CycleError as error:
        raise AssertionError(f"a circle of imports for types: {' → '.join(error.args[1])}") from None


@pytest.mark.parametrize(
    ("section", "folder"), [("A phase", "phases"), ("A callback", "callbacks"), ("A logger backend", "logging")]
)
def test_a_module_that_contributing_shows_imports_what_its_folder_may(section: str, folder: str) -> None:
    page = (ROOT.parent / "docs" / "contributing.md").read_text()
    shown = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", shown, re.MULTILINE | re.DOTALL)
    found = {name for block in blocks for name in imported(block, types=True)} - {"", "testing"}  # those of its test
    assert found
    assert [name for name in found if layer_of(name) > layer_of(folder)] == []


def test_callbacks_never_import_the_learner_or_the_fit() -> None:
    todo = [name for name in modules() if name.split(".")[0] == "callbacks"]
    assert len(todo) > 5
    seen: set[str] = set()
    while todo:  # nor through others
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(imports(name))
    assert {name.split(".")[0] for name in seen}.isdisjoint({"learner", "run", "testing", ""})


def test_phases_never_import_the_learner_the_fit_or_callbacks() -> None:
    for name in modules():
        if name.split(".")[0] in ("phase", "phases"):
            forbidden = {"learner", "run", "order", "callback", "callbacks"}
            assert forbidden.isdisjoint(other.split(".")[0] for other in imports(name))


def test_no_module_imports_the_package_itself() -> None:
    for name in modules().keys() - {"__main__"}:  # which is a script: nothing imports it
        assert "" not in imports(name), f"{name} imports fluxloop itself"


def test_only_the_learner_makes_an_accelerator() -> None:
    assert {name for name in modules() if "compute.accelerator" in imports(name)} == {"run.accelerator"}
    assert {name for name in modules() if "run.accelerator" in imports(name)} == {"", "learner"}


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
    assert {"callbacks", "learner", "phases", "testing"} <= imports("")
    assert {"phases.gan", "phases.supervised"} <= imports("phases")


LONG_FILES = {"schedules": "thirteen small functions of one kind, each with an example"}
LONG_FUNCTIONS = {
    "learner.Learner.__init__": "twelve lines are arguments; the others make its parts, each after what it needs",
    "run.fit.fit": "what may refuse a fit stands before any change, and one finally puts all back",
    "compile.inputs.inputs_of": "one list of a graph's inputs, in the order in which the graph takes them",
}
"""What is longer than 500 lines, or than 45 lines of code, and why."""


def code_lines(source: str, node: ast.AST, hidden: set[int]) -> int:
    """Return how many lines of a function are neither empty, nor comments, nor docstrings."""
    assert isinstance(node, ast.FunctionDef)
    assert node.end_lineno is not None
    lines = source.split("\n")
    numbers = range(node.lineno, node.end_lineno + 1)
    return sum(
        1 for n in numbers if n not in hidden and lines[n - 1].strip() and not lines[n - 1].strip().startswith("#")
    )


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the numbers of the lines of a module that belong to docstrings."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            first = node.body[0]
            assert first.end_lineno is not None
            found.update(range(first.lineno, first.end_lineno + 1))
    return found


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """List the functions of a module with their names, methods after their class's."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            own = f"{name}.{child.name}"
            if isinstance(child, ast.FunctionDef):
                yield own, child
            yield from functions(child, own)


def test_files_and_functions_are_short_but_for_those_with_a_reason() -> None:
    long_files, long_functions = set(), set()
    for name, path in modules().items():
        source = path.read_text(encoding="utf-8")
        if source.count("\n") > 500:
            long_files.add(name)
        tree = ast.parse(source)
        hidden = docstring_lines(tree)
        long_functions |= {own for own, node in functions(tree, name) if code_lines(source, node, hidden) > 45}
    assert long_files == set(LONG_FILES)
    assert long_functions == set(LONG_FUNCTIONS)
