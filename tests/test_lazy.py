from __future__ import annotations

import ast
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fluxloop
import write_stubs
from fluxloop import AutoencoderPhase, Callback, GradientClip, Learner, Phase
from fluxloop.callback import resolve_conflict
from fluxloop.events import STANDARD_EVENTS, event_types
from fluxloop.hyperparameters import get_hyperparameter, set_hyperparameter
from fluxloop.lazy import all_subclasses, homes_of
from fluxloop.logging.backend import log_to
from fluxloop.phase import phase_types

LAZY = ["fluxloop", "fluxloop.callbacks", "fluxloop.logging", "fluxloop.phases"]
"""The packages whose names are loaded when they are asked for."""


def in_a_new_process(code: str, *arguments: str) -> Any:
    """Run code in a fresh interpreter that turns warnings into errors; give what it prints."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Names


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_read_the_names_of_the_table(package: str) -> None:
    found = write_stubs.path(package).read_text(encoding="utf-8")
    assert found == write_stubs.stub(package), "write the stubs anew: .venv/bin/python tests/write_stubs.py"
    names = [alias.asname for node in ast.parse(found).body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(map(str, names)) == sorted(importlib.import_module(package).__all__)


def test_every_package_that_loads_its_names_lazily_has_a_stub() -> None:
    stubs = sorted(path.parent.name for path in Path(str(fluxloop.__file__)).parent.rglob("__init__.pyi"))
    assert stubs == sorted(package.split(".")[-1] for package in homes_of)
    assert sorted(homes_of) == sorted(LAZY)


@pytest.mark.parametrize("package", LAZY)
def test_each_name_is_what_its_module_has(package: str) -> None:
    module = importlib.import_module(package)
    for home, names in homes_of[package].items():
        for name in names.split() if home else ():
            thing = getattr(module, name)
            assert thing is getattr(importlib.import_module(f"{package}.{home}"), name)
            assert vars(module)[name] is thing  # and found without asking from then on


@pytest.mark.slow
def test_modules_need_no_import_of_their_own() -> None:
    code = """
import json, fluxloop
print(json.dumps([
    fluxloop.stopping.Patience is fluxloop.Patience,
    fluxloop.callbacks.ema.EMA is fluxloop.callbacks.EMA is fluxloop.EMA,
    fluxloop.testing.toy_learner.__name__,
]))
"""
    assert in_a_new_process(code) == [True, True, "toy_learner"]


@pytest.mark.parametrize("package", LAZY)
def test_dir_lists_every_public_name_once_loaded_or_not(package: str) -> None:
    code = (
        "import importlib, json, sys; m = importlib.import_module(sys.argv[1]); print(json.dumps([dir(m), m.__all__]))"
    )
    listed, public = in_a_new_process(code, package)
    assert set(public) <= set(listed)
    assert len(set(listed)) == len(listed)


def test_a_misspelt_name_of_a_package_within_asks_did_you_mean() -> None:
    with pytest.raises(
        AttributeError, match=r"^fluxloop\.callbacks has no 'EarlyStoping'; did you mean 'EarlyStopping'"
    ):
        _ = fluxloop.callbacks.EarlyStoping
    with pytest.raises(ImportError, match="cannot import name 'GANPhaze'"):
        exec("from fluxloop.phases import GANPhaze")
    assert not any(hasattr(fluxloop.phases, name) for name in ("_hidden", "no.such", ""))


# What is loaded when


def test_importing_fluxloop_loads_nothing_else_yet_but_the_tables_of_names() -> None:
    code = "import fluxloop, json, sys; print(json.dumps([m for m in sys.modules if m.split('.')[0] == 'fluxloop']))"
    assert sorted(in_a_new_process(code)) == sorted([*LAZY, "fluxloop.lazy"])


LEARNER = """
import json, sys, torch
from fluxloop import Learner

def loaded():
    return {name for name in sys.modules if name.split(".")[0] in ("fluxloop", "attr", "multipledispatch", "tqdm")}

first = loaded()
learner = Learner(torch.nn.Linear(2, 1), torch.nn.MSELoss(), data=((torch.ones(4, 2), torch.ones(4, 1)),) * 2)
learner.fit(1)
later = loaded() - first
learner.evaluate()
learner.predict(torch.ones(4, 2))
asked_for = loaded() - first - later
print(json.dumps([sorted(first), sorted(later), sorted(asked_for)]), file=sys.__stdout__)
"""


@pytest.mark.slow
def test_a_learner_loads_what_a_plain_fit_needs_and_nothing_later() -> None:
    code = f"import contextlib, os\nwith contextlib.redirect_stdout(open(os.devnull, 'w')):\n{indented(LEARNER)}"
    first, later, asked_for = in_a_new_process(code)
    assert later == []  # nothing was put off until the first fit
    assert asked_for == ["fluxloop.data.combined", "fluxloop.data.ordering", "fluxloop.run.inference"]
    parts = {name.removeprefix("fluxloop.") for name in first if name.startswith("fluxloop.")}
    assert {name for name in parts if name.startswith("phases.")} == {"phases.supervised"}
    assert {name for name in parts if name.startswith("callbacks.")} == {
        "callbacks.defaults",
        "callbacks.metrics",
        "callbacks.printer",
        "callbacks.progress",
        "callbacks.recorder",
        "callbacks.stop_on_nan_loss",
    }
    seldom = {
        "augment",
        "check",
        "hyperparameters",
        "images",
        "logging.backend",
        "losses",
        "lr_finder",
        "schedules",
        "stopping",
        "summary",
        "testing",
    }
    assert parts.isdisjoint(seldom)


def indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())


# What looks at the classes that there are


@pytest.mark.slow
def test_what_is_not_loaded_yet_is_known_by_name() -> None:
    code = """
import json
from fluxloop import Callback, Learner, StepEnd, on
from fluxloop.errors import HandlerError, MissingProducerError
import sys, torch

class Reads(Callback):
    reads = ("cbstate.images",)

def message(error, function):
    try:
        function()
    except error as raised:
        return str(raised)

early = [name in sys.modules for name in ("fluxloop.callbacks.sample_images", "fluxloop.phases.byol")]
print(json.dumps([
    early,
    message(MissingProducerError, lambda: Learner(torch.nn.Linear(1, 1), callbacks=[Reads()])),
    message(HandlerError, lambda: on(StepEnd, "BYOLFase")),
]))
"""
    early, missing, misspelt = in_a_new_process(code)
    assert early == [False, False]
    assert missing.endswith("or ReconstructionImages() or SampleImages() to the callbacks")
    assert misspelt.endswith("did you mean 'BYOLPhase'?")


@pytest.mark.slow
def test_a_checkpoint_is_loaded_where_its_phases_have_not_been_named(tmp_path: Path) -> None:
    parts = {"encoder": nn.Linear(3, 2), "decoder": nn.Linear(2, 3)}
    learner = Learner(parts, data=(torch.ones(4, 3),), seed=1)
    learner.fit(2, phases=[AutoencoderPhase()])
    learner.save(tmp_path / "state.pt")
    code = """
import json, sys
from torch import nn, ones
from fluxloop import Learner
parts = {"encoder": nn.Linear(3, 2), "decoder": nn.Linear(2, 3)}
learner = Learner(parts, data=(ones(4, 3),), seed=1)
assert "fluxloop.phases.autoencoder" not in sys.modules
learner.load(sys.argv[1])
rows = [[row["phase"], row["metric"], row["value"]] for row in learner.history.rows()]
print(json.dumps([rows, parts["encoder"].weight.tolist()]))
"""
    rows, weight = in_a_new_process(code, str(tmp_path / "state.pt"))
    assert rows == [[row["phase"], row["metric"], row["value"]] for row in learner.history.rows()]
    assert {phase for phase, _, _ in rows} == {"AutoencoderPhase"}
    assert weight == parts["encoder"].weight.tolist()


@pytest.mark.slow
def test_a_pickled_callback_arrives_in_a_process_that_has_not_imported_fluxloop() -> None:
    code = """
import json, pickle, sys
clip = pickle.loads(bytes.fromhex(sys.argv[1]))
import fluxloop
print(json.dumps([type(clip) is fluxloop.GradientClip, clip.max_norm]))
"""
    assert in_a_new_process(code, pickle.dumps(GradientClip(0.5)).hex()) == [True, 0.5]


def test_subclasses_are_listed_once_users_own_among_them() -> None:
    class Mine(Phase): ...

    class Other(Mine): ...

    class Both(Other, Mine): ...

    found = all_subclasses(Phase, "fluxloop.phases")
    assert [found.count(cls) for cls in (Phase, Mine, Other, Both, AutoencoderPhase)] == [1] * 5
    assert phase_types() == found


def test_events_phases_and_callbacks_of_fluxloop_are_where_those_who_look_for_them_look() -> None:
    load_everything()
    assert [cls for cls in event_types() if cls.__module__.startswith("fluxloop.")] == list(STANDARD_EVENTS)
    for base, homes in ((Phase, ("phase", "phases")), (Callback, ("callback", "callbacks"))):
        for cls in every(base):
            if getattr(sys.modules.get(cls.__module__), cls.__name__, None) is not cls:
                continue  # of an example in a docstring, which nobody has thrown away yet
            package, _, place = cls.__module__.partition(".")
            if package == "fluxloop" and not cls.__name__.startswith("_") and place != "testing":
                assert place.split(".")[0] in homes, f"{cls} would be overlooked"


def load_everything() -> None:
    exec("from fluxloop import *", {})


def every(base: type) -> set[type]:
    return set(base.__subclasses__()).union(*(every(sub) for sub in base.__subclasses__()))


@pytest.mark.parametrize(
    ("table", "home"),
    [
        (resolve_conflict, "callback"),
        (log_to, "logging.backend"),
        (get_hyperparameter, "hyperparameters"),
        (set_hyperparameter, "hyperparameters"),
    ],
)
def test_what_is_said_of_two_types_is_loaded_with_one_of_them_or_with_who_asks(table: Any, home: str) -> None:
    load_everything()
    ours = [(types, rule) for types, rule in table.funcs.items() if rule.__module__.startswith("fluxloop.")]
    assert len(ours) > 1
    for types, rule in ours:
        assert rule.__module__ in {cls.__module__ for cls in types} | {f"fluxloop.{home}"}
