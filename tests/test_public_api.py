from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import fluxloop
from fluxloop import Backend, Callback, Event, FluxloopError, Phase
from fluxloop.errors import CancelSignal
from fluxloop.events import STANDARD_EVENTS

PUBLIC = fluxloop.__all__
"""They are written in the tables of the packages' ``__init__.py``; the stubs beside these show what a change adds."""

TESTING = [
    "Coefficient",
    "EventRecorder",
    "assert_observer",
    "assert_order",
    "assert_same_bits",
    "bits",
    "infer_access",
    "toy_learner",
]


HELPERS = ("lazily", "all_but")
"""What the packages need to load their names when they are asked for."""


def in_order(names: list[str]) -> bool:
    return sorted(names, key=lambda name: (not name.isupper(), name)) == names


def test_the_public_names_are_sorted_and_there_once() -> None:
    assert len(PUBLIC) > 200
    assert in_order(PUBLIC)
    assert len(set(PUBLIC)) == len(PUBLIC)


@pytest.mark.slow(quick=80)
@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(fluxloop, name)
    assert (inspect.getdoc(thing) or "").strip(), f"{name} says nothing about itself"
    if isinstance(thing, type):
        assert "__doc__" in vars(thing), f"{name} says nothing of its own"
        assert thing.__doc__


def test_a_star_import_gives_exactly_the_public_names() -> None:
    namespace: dict[str, Any] = {}
    exec("from fluxloop import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(PUBLIC)


def test_whatever_the_package_imports_for_its_users_is_public() -> None:
    assert [name for name in PUBLIC if not hasattr(fluxloop, name)] == []  # which loads them
    given = {
        name
        for name, value in vars(fluxloop).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name not in HELPERS
    }
    assert given == {name for name in PUBLIC if not isinstance(getattr(fluxloop, name), types.ModuleType)}


def public_in(module: str, base: type) -> set[str]:
    """Name the public subclasses of `base` that a module defines or gives."""
    found = importlib.import_module(module)
    things = {name: getattr(found, name) for name in dir(found) if not name.startswith("_")}
    return {name for name, value in things.items() if isinstance(value, type) and issubclass(value, base)}


def test_every_error_signal_event_phase_and_callback_is_public() -> None:
    assert public_in("fluxloop.errors", FluxloopError) <= set(PUBLIC)
    assert public_in("fluxloop.errors", CancelSignal) <= set(PUBLIC)
    assert public_in("fluxloop.events", Event) <= set(PUBLIC)
    assert {event.__name__ for event in STANDARD_EVENTS} <= set(PUBLIC)
    assert public_in("fluxloop.phase", Phase) | public_in("fluxloop.phases", Phase) <= set(PUBLIC)
    assert public_in("fluxloop.callbacks", Callback) <= set(PUBLIC)


def nobodys_bases(package: str, base: type) -> set[str]:
    """Name the classes of a package that derive from `base`, and from which no other class of it derives."""
    folder = importlib.import_module(f"fluxloop.{package}").__path__
    modules = [importlib.import_module(f"fluxloop.{package}.{found.name}") for found in pkgutil.iter_modules(folder)]
    defined = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    }
    bases = {above for value in defined.values() for above in value.__mro__[1:]}
    last = {name for name, value in defined.items() if value not in bases and not name.startswith("_")}
    assert len(last) > 5
    return last


@pytest.mark.parametrize(("package", "base"), [("callbacks", Callback), ("logging", Backend), ("phases", Phase)])
def test_every_class_of_its_packages_that_is_nobodys_base_is_public(package: str, base: type) -> None:
    missing = nobodys_bases(package, base) - set(PUBLIC)
    assert sorted(missing) == [], f"add them to the table in fluxloop/{package}/__init__.py"


def test_every_public_backend_stands_in_the_table_of_its_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "logging.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)\(", row)}
    missing = nobodys_bases("logging", Backend) - listed
    assert sorted(missing) == [], "add them to the table of docs/logging.md"


@pytest.mark.parametrize("name", TESTING)
def test_what_users_tests_are_given_is_there_and_documented(name: str) -> None:
    assert (getattr(fluxloop.testing, name).__doc__ or "").strip()


@pytest.mark.parametrize("package", ["callbacks", "logging", "losses", "metrics", "phases"])
def test_the_packages_within_have_sorted_complete_public_names(package: str) -> None:
    module = importlib.import_module(f"fluxloop.{package}")
    assert in_order(module.__all__)
    for name in module.__all__:
        assert (inspect.getdoc(getattr(module, name)) or "").strip()
    given = {n for n, v in vars(module).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)}
    assert given - {"annotations", *HELPERS} == set(module.__all__)


def documented(cls: type) -> list[str]:
    """Name the public methods and properties a class defines without a word about them."""
    silent = []
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function):
            inherited = any(getattr(getattr(base, name, None), "__doc__", None) for base in cls.__mro__[1:])
            if not (function.__doc__ or inherited):
                silent.append(f"{cls.__name__}.{name}")
    return silent


def test_every_public_method_is_documented() -> None:
    classes = [getattr(fluxloop, name) for name in PUBLIC if isinstance(getattr(fluxloop, name), type)]
    assert [name for cls in classes for name in documented(cls)] == []


def test_a_version_is_given() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", fluxloop.__version__)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(fluxloop.__file__).parent / "py.typed").is_file()


def test_a_misspelt_name_asks_did_you_mean() -> None:
    with pytest.raises(AttributeError, match="fluxloop has no 'Lerner'; did you mean 'Learner'"):
        _ = fluxloop.Lerner
    assert not hasattr(fluxloop, "nothing_like_it")


# Importing


STATES = """
import json, os, random, signal, sys, threading, warnings
import numpy, torch

def states():
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [str(part) for part in numpy.random.get_state()],
        "python": repr(random.getstate()),
        "environment": dict(os.environ),
        "signals": {str(s): repr(signal.getsignal(s)) for s in signal.valid_signals()},
        "warning filters": [repr(entry) for entry in warnings.filters],
        "show warning": repr(warnings.showwarning),
        "threads": [thread.name for thread in threading.enumerate()],
        "dtype": repr(torch.get_default_dtype()),
        "num threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "gradients": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "deterministic": [
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
        ],
        "device": str(torch.get_default_device()) if hasattr(torch, "get_default_device") else "",
        "hooks": [repr(sys.excepthook), repr(sys.displayhook), repr(threading.excepthook)],
        "path": sys.path,
        "folder": os.getcwd(),
        "recursion": sys.getrecursionlimit(),
        "print options": repr(vars(torch._tensor_str.PRINT_OPTS)),
    }

torch.manual_seed(3); numpy.random.seed(3); random.seed(3)
before = states()
from fluxloop import *
after = states()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""

LOADED = """
import json, sys
import torch
before = set(sys.modules)
from fluxloop import *
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def in_a_new_process(code: str) -> Any:
    """Run code in a fresh interpreter that turns warnings into errors; give what it prints."""
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_importing_fluxloop_changes_no_global_state() -> None:
    assert in_a_new_process(STATES) == []


def test_importing_fluxloop_loads_nothing_but_torch_and_its_four_dependencies() -> None:
    loaded = {name.split(".")[0] for name in in_a_new_process(LOADED)}
    foreign = loaded - set(sys.stdlib_module_names) - {"torch"}
    assert "fluxloop" in foreign
    assert foreign <= {"fluxloop", "multipledispatch", "attr", "attrs", "tqdm"}


def test_importing_fluxloop_prints_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", "import fluxloop"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_run_time_dependencies_are_these_four_and_torch_has_no_ceiling() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^dependencies = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    dependencies = ast.literal_eval(found[1])
    assert sorted(re.split(r"[<>=!~ ]", line)[0] for line in dependencies) == [
        "attrs",
        "multipledispatch",
        "torch",
        "tqdm",
    ]
    assert not any(ceiling in line for line in dependencies for ceiling in ("<", "==", "~="))


def test_the_distribution_is_called_torch_fluxloop() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^name = "torch-fluxloop"$', text, re.MULTILINE)


def test_the_wheel_is_made_of_the_package() -> None:
    project = (Path(fluxloop.__file__).parents[1] / "pyproject.toml").read_text()
    assert '[tool.hatch.build.targets.wheel]\npackages = ["fluxloop"]\n' in project
