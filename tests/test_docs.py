"""Every code block in the README, the docs and the docstrings runs."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import itertools
import json
import os
import pkgutil
import re
import runpy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import pytest
import torch
from multipledispatch import Dispatcher
from torch import nn

import fluxloop
import fluxloop.compile.graphs
from fluxloop import Accelerator, CompileError, Learner, Phase, TrainingPhase, ValidationPhase
from fluxloop.testing import assert_same_bits, toy_learner
from processes.launching import run
from test_reference import load

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
EXAMPLES = ROOT / "docs" / "examples"
ELSEWHERE = {"common.py", "digits.py", "gallery.py", "gallery_pictures.py", "plain_digits.py"}
IMPORTED = ("matplotlib.figure", "sklearn.datasets", "sklearn.linear_model", "sklearn.manifold", "sklearn.pipeline")
"""What takes seconds to import, and most examples do."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = sorted(module.name for module in pkgutil.walk_packages(fluxloop.__path__, "fluxloop."))


def run_block(page: Path, match: re.Match[str], namespace: dict[str, Any]) -> None:
    """Run a block of a page, with the page's line numbers."""
    line = page.read_text()[: match.start(2)].count("\n")
    exec(compile("\n" * line + match[2], str(page), "exec"), namespace)


def lower_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the first graph compiled, and later ones run as they were traced: each takes the compiler some seconds."""
    lower, count = fluxloop.compile.graphs.lower, itertools.count()

    def lower_first(graph: Any, inputs: Any, device: Any) -> Any:
        return torch.no_grad()(graph) if next(count) else lower(graph, inputs, device)

    if "FLUXLOOP_COMPILER" not in os.environ:
        monkeypatch.setattr(fluxloop.compile.graphs, "lower", lower_first)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    lower_the_first(monkeypatch)
    namespace: dict[str, Any] = {"__name__": "docs"}
    printed = ""
    for match in FENCE.finditer(page.read_text()):
        language, code = match.groups()
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                run_block(page, match, namespace)
            printed = out.getvalue()
        elif language == "output":
            assert [line.rstrip() for line in printed.strip().splitlines()] == code.strip().splitlines()
    for name, function in namespace.items():
        if name.startswith("test_"):  # a page shows a test as it stands in a file of tests
            function()


def docstring(thing: Any) -> str:
    """Return what a thing says of itself; a dispatcher's ``__doc__`` would list what is registered with it."""
    return (thing.doc if isinstance(thing, Dispatcher) else "") or thing.__doc__ or ""


def of_objects(module: ModuleType) -> dict[str, str]:
    """Return what a module writes below an assignment, by the name that is assigned to: the site shows it."""
    body = ast.parse(inspect.getsource(module)).body
    return {
        statement.targets[0].id: below.value.value
        for statement, below in itertools.pairwise(body)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }


def not_found_by_doctest(module: ModuleType) -> dict[str, str]:
    """Return the docstrings of a module's objects, decorated functions and dispatchers by their names."""
    found = {name: text for name, text in of_objects(module).items() if ">>> " in text}
    for name, thing in vars(module).items():
        wrapped = hasattr(thing, "__wrapped__") and getattr(thing, "__module__", None) == module.__name__
        if wrapped or isinstance(thing, Dispatcher):
            found[name] = docstring(thing)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "__test__", not_found_by_doctest(module), raising=False)
    names = {key: getattr(fluxloop, key) for key in fluxloop.__all__}
    globs = {**names, **vars(module), "torch": torch}
    assert doctest.testmod(module, globs=globs, optionflags=FLAGS).failed == 0


def test_every_public_name_has_an_example_that_runs() -> None:
    """An object, such as ``rmse``, has one of its own: that of its class would not show what it is."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    run, objects = set(), set()
    for module in map(importlib.import_module, MODULES):
        run |= {test.docstring for test in finder.find(module) if test.examples}
        run |= {text for text in not_found_by_doctest(module).values() if ">>> " in text}
        objects |= {f"{module.__name__}.{name}" for name, text in of_objects(module).items() if ">>> " in text}
    public = load().public()
    nameless = {name for name, thing in public.items() if not hasattr(thing, "__name__")}
    assert nameless - objects == set()
    assert [name for name in public.keys() - nameless if docstring(public[name]) not in run] == []


def test_every_error_is_shown_on_the_page_of_errors() -> None:
    page = (ROOT / "docs" / "when-it-goes-wrong.md").read_text()
    found = {name: cls for name, cls in vars(fluxloop.errors).items() if isinstance(cls, type)}
    bases = {"FluxloopError", "CallbackError", "CancelSignal"}  # nobody raises these themselves
    errors = {name for name, cls in found.items() if issubclass(cls, fluxloop.FluxloopError)} - bases
    signals = {name for name, cls in found.items() if issubclass(cls, fluxloop.CancelSignal)}
    assert [name for name in errors if f"\n### {name}\n" not in page or f"\n{name}: " not in page] == []
    assert [name for name in bases | signals if f"`{name}`" not in page] == []


TWO_EPOCHS = ["digits.py", "plain_digits.py"]
ONE_EPOCH = sorted({path.name for path in EXAMPLES.glob("*.py")} - ELSEWHERE)


def run_example(script: str, out: Path, epochs: int) -> dict[str, Any]:
    arguments = ["--epochs", str(epochs), "--seed", "1", "--out", str(out)]
    run(EXAMPLES / script, None, arguments=arguments, timeout=600, imports=IMPORTED)
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    assert result["epochs"] == epochs
    assert result["seed"] == 1
    return result


@pytest.mark.slow
@pytest.mark.parametrize("script", TWO_EPOCHS)
def test_the_digits_are_learned_in_two_epochs(script: str, tmp_path: Path) -> None:
    assert run_example(script, tmp_path, epochs=2)["accuracy"] > 0.9
    assert matplotlib.image.imread(tmp_path / "history.png").std() > 0


KILLED = """
import os, runpy, signal, sys
from torch import nn

flatten, steps = nn.Flatten.forward, 0


def forward(self, xs):  # of the digits' model, once a batch
    global steps
    steps += self.training
    if steps == 15 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return flatten(self, xs)


nn.Flatten.forward = forward
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.slow
def test_the_digits_in_two_processes_go_on_where_they_were_killed(tmp_path: Path) -> None:
    command = ["--epochs", "2", "--precision", "bf16", "--accumulate", "2", "--resume", "--out"]
    script, whole, killed = EXAMPLES / "digits.py", tmp_path / "whole", tmp_path / "killed"
    run(script, 2, arguments=[*command, str(whole)], timeout=300, imports=IMPORTED)
    ended = run(KILLED, 2, arguments=[str(script), *command, str(killed)], timeout=300, imports=IMPORTED, check=False)
    assert ended.codes == [1, -9]
    assert "process 1 was killed or has crashed" in ended.outputs[0]
    first, _ = run(script, 2, arguments=[*command, str(killed)], timeout=300, imports=IMPORTED).outputs
    assert first.startswith("resumed after TrainingPhase 1 epoch")
    assert (killed / "result.json").read_text() == (whole / "result.json").read_text()
    assert json.loads((whole / "result.json").read_text())["accuracy"] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("script", ONE_EPOCH)
def test_an_example_runs_and_writes_its_results_and_pictures(script: str, tmp_path: Path) -> None:
    assert len(run_example(script, tmp_path, epochs=1)) > 2
    pictures = list(tmp_path.rglob("*.png"))
    assert pictures
    for picture in pictures:
        assert matplotlib.image.imread(picture).std() > 0


@pytest.mark.slow
def test_the_gallery_measures_methods_and_generators_and_adds_to_what_there_is(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    drawn = ["I-JEPA", "LeJEPA", "SwAV", "iBOT", "NNCLR", "MoCo v3", "data2vec"]
    for only in (["MAE", *drawn], ["VAE", "hinge, R1, ADA", "CycleGAN", "flow matching"]):
        chosen = [argument for name in only for argument in ("--only", name)]
        arguments = ["--epochs", "1", "--seed", "1", "--out", str(tmp_path), "--pictures", str(pictures), *chosen]
        told = run(EXAMPLES / "gallery.py", None, arguments=arguments, timeout=600, imports=IMPORTED)
        assert "no gradient" not in told.outputs[0]
    result = json.loads((tmp_path / "result.json").read_text())
    untrained = {"pixels", "untrained convolutions", "untrained transformer"}
    assert result["methods"].keys() == {"MAE", *drawn, *untrained}
    assert result["generators"].keys() == {"real training images", "VAE", "hinge, R1, ADA", "CycleGAN", "flow matching"}
    assert 0.1 < result["methods"]["I-JEPA"]["knn"] <= 1
    names = [
        "i_jepa",
        "lejepa",
        "swav",
        "ibot",
        "moco_v3",
        "data2vec",
        "vae",
        "hinge_r1_ada",
        "cyclegan",
        "flow_matching",
    ]
    made = {"neighbors_encoder-0001", *(f"gallery_{name}" for name in names)}
    assert {path.stem for path in pictures.iterdir()} == made
    assert all(matplotlib.image.imread(picture).std() > 0 for picture in pictures.iterdir())
    shown = result["pictures"]
    assert shown.keys() == {*drawn, "CycleGAN"}
    assert (
        shown["I-JEPA"]["pixel_error_known"]
        < shown["I-JEPA"]["pixel_error_mean"]
        < shown["I-JEPA"]["pixel_error_predicted"]
    )
    assert 1 / 10 < shown["SwAV"]["class_by_prototype"] < 1
    assert shown["CycleGAN"]["class_of_real"] > 2 * shown["CycleGAN"]["class_of_untranslated"]
    assert result["generators"]["VAE"]["frechet"] > result["generators"]["real training images"]["frechet"]


def test_the_file_tree_in_the_readme_names_the_modules_and_folders_of_the_root() -> None:
    tree = (ROOT / "README.md").read_text().split("## The files")[1]
    listed = re.findall(r"^  (\w+(?:\.py|/))", tree, re.MULTILINE)
    package = ROOT / "fluxloop"
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert sorted(listed) == sorted(
        folders | {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    )


def test_every_module_and_folder_says_in_its_first_line_what_it_is_for() -> None:
    for path in (ROOT / "fluxloop").rglob("*.py"):
        said = ast.get_docstring(ast.parse(path.read_text()))
        assert said, path
        assert said.split("\n")[0].rstrip().endswith((".", ":")), path


def test_the_hooks_before_a_commit_are_the_checks_of_ci_run() -> None:
    checks = re.findall(r"^(\.venv/bin/(?:ruff|mypy).*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    hooks = re.findall(r"^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert len(checks) == 3
    assert hooks == checks


@pytest.mark.parametrize("training", ["A classifier", "A GAN", "BYOL"])
def test_the_first_page_shows_a_training_in_a_screen_that_runs_alone(training: str) -> None:
    section = (ROOT / "docs" / "index.md").read_text().split(f"\n## {training}\n")[1]
    match = FENCE.search(section)
    assert match is not None
    assert len(match[2].splitlines()) <= 25
    scope: dict[str, Any] = {"__name__": "docs"}
    exec(match[2], scope)
    learner = next(value for value in scope.values() if isinstance(value, Learner))
    assert learner.history.cycles > 1


@pytest.mark.parametrize("page", ["index.md", "loop.md"])
def test_the_drawings_on_a_page_are_what_its_code_draws(page: str, tmp_path: Path) -> None:
    pictures = runpy.run_path(str(ROOT / "docs" / "site" / "pictures.py"))
    pictures["draw"](page, tmp_path)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert {path.name for path in drawn} <= set(re.findall(r"\(images/(.+)\)", (ROOT / "docs" / page).read_text()))
    for path in drawn:
        assert path.read_text() == (ROOT / "docs" / "images" / path.name).read_text()


def test_relative_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# The phases of the tutorial and of the README

TUTORIAL = ROOT / "docs" / "write-a-phase.md"
SUPERVISED = ROOT / "fluxloop" / "phases" / "supervised.py"


@cache
def defined_on(page: Path) -> dict[str, Any]:
    """What the blocks of a page define."""
    namespace: dict[str, Any] = {"__name__": "docs"}
    with contextlib.redirect_stdout(io.StringIO()):
        for match in FENCE.finditer(page.read_text()):
            if match[1] == "python":
                run_block(page, match, namespace)
    return namespace


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run graphs as they were traced, without a compiler: the same operations, in no time."""
    monkeypatch.setattr(fluxloop.compile.graphs, "lower", lambda graph, inputs, device: torch.no_grad()(graph))


def supervised(compile: Any) -> Learner[Any]:
    return toy_learner(default_callbacks=True, accelerator=Accelerator("cpu", compile=compile))


def said(source: str, cls: str) -> dict[str, str]:
    """The statements of a class by the names that they define, without docstrings and annotations."""
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == cls)
    statements = {}
    for node in found.body:
        if isinstance(node, ast.FunctionDef):
            is_documented = ast.get_docstring(node) is not None
            statements[node.name] = "\n".join(map(ast.unparse, node.body[is_documented:]))
        elif isinstance(node, ast.Assign):
            statements[ast.unparse(node.targets[0])] = ast.unparse(node.value)
    return statements


@pytest.mark.parametrize("builtin", ["TrainingPhase", "ValidationPhase"])
def test_the_phase_that_the_tutorial_builds_says_what_the_built_in_one_says(builtin: str) -> None:
    blocks = "".join(match[2] for match in FENCE.finditer(TUTORIAL.read_text()) if match[1] == "python")
    mine = said(blocks.replace("MyTrainingPhase.entries", "TrainingPhase.entries"), f"My{builtin}")
    theirs = said(SUPERVISED.read_text().replace("unpack(self, batch)", "batch"), builtin)
    assert mine.keys() == {"entries", "body"}
    assert theirs.keys() == {"entries", "body", "check", "stores_loss"}
    assert mine == {name: theirs[name] for name in mine}


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, "step"])
def test_the_phase_that_the_tutorial_builds_trains_the_same_bits_as_the_built_in_one(
    traced: None, compile: Any
) -> None:
    tutorial = defined_on(TUTORIAL)
    mine, builtin = supervised(compile), supervised(compile)
    mine.fit(3, phases=[tutorial["MyTrainingPhase"](), tutorial["MyValidationPhase"]()])
    builtin.fit(3, phases=[TrainingPhase(), ValidationPhase()])
    assert_same_bits(mine, builtin)
    for name in ("training/loss", "validation/loss"):
        assert mine.history[name] == builtin.history[name]


def adversarial(noise: int, compile: Any) -> Learner[Any]:
    torch.manual_seed(0)
    models = {"G": nn.Linear(noise, 2), "D": nn.Linear(2, 1)}
    adam = partial(torch.optim.Adam, lr=1e-3)
    accelerator = Accelerator("cpu", compile=compile)
    return Learner(models, data=(torch.randn(256, 2),), optimizer=adam, accelerator=accelerator, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "name", "arguments", "make", "graphs"),
    [
        (TUTORIAL, "NoisyStart", (6,), supervised, 2),
        (TUTORIAL, "GAN", (), partial(adversarial, 4), 1),
        (TUTORIAL, "SignGAN", (), partial(adversarial, 4), 1),
        (TUTORIAL, "LazyR1", (4,), partial(adversarial, 4), 2),
        (ROOT / "README.md", "GAN", (), partial(adversarial, 16), 1),
    ],
)
def test_a_body_of_the_pages_is_compiled_and_trains_the_same(
    page: Path,
    name: str,
    arguments: tuple[Any, ...],
    make: Callable[..., Learner[Any]],
    graphs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    traced: None,
) -> None:
    monkeypatch.chdir(tmp_path)  # the README writes checkpoints
    cls = defined_on(page)[name]
    eager, compiled = make(compile=False), make(compile="step")
    for learner in (eager, compiled):
        learner.fit(2, phases=[cls(*arguments)])
    for ours, theirs in zip(weights_of(eager), weights_of(compiled), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert eager.history[cls].updates == compiled.history[cls].updates
    assert compiled._compiled is not None
    assert sum(map(len, compiled._compiled._plans[cls]._graphs.values())) == graphs


def weights_of(learner: Learner[Any]) -> list[torch.Tensor]:
    modules = [learner.model] if isinstance(learner.model, nn.Module) else list(learner.model)
    return [parameter.detach() for module in modules for parameter in module.parameters()]


def test_a_step_of_the_tutorial_is_refused_where_steps_are_compiled() -> None:
    phase: Phase = defined_on(TUTORIAL)["Pieces"](10)
    with pytest.raises(CompileError, match="Pieces has a step of its own"):
        supervised("step").fit(1, phases=[phase])


def test_a_reader_who_begins_at_the_readme_finds_every_page() -> None:
    found = [ROOT / "README.md"]
    for page in found:  # which grows meanwhile
        targets = re.findall(r"\]\(([^)#:]+\.md)[)#]", page.read_text())
        found.extend(sorted({(page.parent / target).resolve() for target in targets} - set(found)))
    assert sorted({page.name for page in PAGES} - {page.name for page in found}) == []
