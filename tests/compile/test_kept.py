"""Compiled steps that are kept on disk: found again by the next process, and never used for another step."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_training import WITH_COMPILER
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.fx.experimental.proxy_tensor import make_fx
from train_variants import VARIANTS, trained

import fluxloop.compile.graphs
from fluxloop.compile import kept

SCRIPT = Path(__file__).parent / "train_variants.py"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Note the names of the steps that are compiled, which run as they were traced."""
    noted: list[str | None] = []

    def lower(graph: Any, inputs: Any, device: Any) -> Any:
        noted.append(kept.name_of(graph, inputs, ()))
        return torch.no_grad()(graph)

    monkeypatch.setattr(fluxloop.compile.graphs, "lower", lower)
    return noted


def name(function: Callable[..., Any], *inputs: Tensor) -> str | None:
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    return kept.name_of(graph, inputs, ())


def test_a_step_has_one_name_and_another_step_another(names: list[str | None]) -> None:
    for variant in VARIANTS.values():
        trained("step", **variant)
        trained("step", **variant)
    assert None not in names
    assert names[::2] == names[1::2]
    by_variant = dict(zip(VARIANTS, names[::2], strict=True))
    assert by_variant.pop("another input option") == by_variant["first"]  # a learning rate is an input of the graph
    assert len(set(by_variant.values())) == len(by_variant)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x + 1.0000001).relu(),
        lambda x: (x + 1).sigmoid(),
        lambda x: (1 + x).relu().relu(),
        lambda x: (x.double() + 1).relu(),
    ],
)
def test_a_name_tells_operations_and_numbers_apart(other: Callable[..., Any]) -> None:
    def plus(x: Tensor) -> Tensor:
        return (x + 1).relu()

    assert name(plus, torch.ones(3)) == name(plus, torch.zeros(3)) != name(other, torch.ones(3))


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(4, 3),
        torch.ones(3, 4, dtype=torch.float64),
        torch.ones(4, 3).T,
        torch.ones(3, 4).requires_grad_(),
        torch.ones(3, 8)[:, ::2],
    ],
    ids=["shape", "dtype", "strides", "gradient", "gaps"],
)
def test_a_name_tells_inputs_apart(other: Tensor) -> None:
    assert name(torch.neg, torch.ones(3, 4)) != name(torch.neg, other)


def test_a_name_tells_inputs_that_share_memory() -> None:
    both = torch.ones(2, 4)
    assert (
        name(torch.add, both[0], both[0]) != name(torch.add, both[0], both[1]) != name(torch.add, both[0], both[0] + 1)
    )
    assert name(torch.neg, both[0]) == name(torch.neg, both[1]) == name(torch.neg, torch.ones(4))


def test_a_name_tells_what_is_set_for_all_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    ones, found = torch.ones(3), set()
    found.add(name(torch.neg, ones))
    monkeypatch.setenv("TORCHINDUCTOR_CPP_WRAPPER", "0")
    found.add(name(torch.neg, ones))
    with config.patch(fallback_random=True):
        found.add(name(torch.neg, ones))
    torch.set_num_threads(2)
    found.add(name(torch.neg, ones))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    found.add(name(torch.neg, ones))
    monkeypatch.setattr(torch, "__version__", "2.99")
    found.add(name(torch.neg, ones))
    assert len(found) == 6
    assert None not in found


def test_another_fluxloop_that_compiles_otherwise_gives_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones(3)
    before, read = name(torch.neg, ones), Path.read_bytes
    for file in ("kept.py", "layouts.py", "graphs.py"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, file=file: read(path) + b"#" * (path.name == file))
            assert name(torch.neg, ones) != before
    assert name(torch.neg, ones) == before


def test_what_nobody_can_name_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    ones = torch.ones(3)
    library = torch.library.Library("fluxloop_tests", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    assert name(torch.ops.fluxloop_tests.twice, ones) is None  # it is whatever its library says
    constant = torch.ones(3)
    graph = make_fx(lambda x: x + constant)(ones)
    assert kept.name_of(graph, [ones], ()) is None  # the tensor would be in the library
    with config.patch(post_grad_custom_post_pass=lambda graph: None):
        assert name(torch.neg, ones) is None
    with torch.autocast("cpu"):
        assert name(torch.neg, ones) is None
    with config.patch(force_disable_caches=True):
        assert name(torch.neg, ones) is None
    with config.patch(fx_graph_cache=False):
        assert name(torch.neg, ones) is None
    assert name(torch.neg, ones) is not None
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    assert name(torch.neg, ones) is None


def test_what_is_not_whole_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert kept.folder() == tmp_path / "fluxloop"
    kept.folder().mkdir()
    for told in ("", "{}", "[]", "null", '{"sha256": "00", "changed": []}'):
        (kept.folder() / "step.so").write_bytes(b"no library")
        (kept.folder() / "step.json").write_text(told)
        assert kept.find("step") is None


@pytest.mark.skipif(
    "uid_" not in inspect.getsource(default_cache_dir),
    reason="torch 2.10 raises KeyError, with and without fluxloop, for a user without a name",
)
def test_a_user_without_a_name_has_a_folder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert str(kept.folder().parent) == default_cache_dir()

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 4242")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert str(kept.folder().parent) == default_cache_dir()
    assert "uid_" in kept.folder().parent.name


def train(folder: Path, *variants: str, **environment: str) -> dict[str, dict[str, Any]]:
    """Train in a process of its own, with a folder for what is compiled."""
    given = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), *variants]
    done = subprocess.run(command, env={**given, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not WITH_COMPILER, reason="takes minutes; set FLUXLOOP_COMPILER=1")
def test_the_next_process_finds_a_step_again_without_the_compiler_and_never_that_of_another(tmp_path: Path) -> None:
    first = train(tmp_path, "first")
    assert first["first"]["compiled"] == 1
    for library in (tmp_path / "fluxloop").glob("*.so"):
        library.write_bytes(library.read_bytes()[:-1])
    assert train(tmp_path, "first")["first"]["compiled"] == 1  # what is not whole is made anew
    second = train(tmp_path)
    assert second.pop("imported")["compiler"]
    found = {name for name, of in second.items() if not of["compiled"]}
    assert found == {"first", "another input option"}
    # torch copies a tensor of one number that is closed over, by a function that is called back in Python
    third = train(tmp_path, *(name for name in second if name != "another tensor closed over"))
    assert not third.pop("imported")["compiler"]
    assert not any(of["compiled"] for of in third.values()), third
    assert all(of["apart"] < 1e-6 for of in (*second.values(), *third.values())), (second, third)
    assert train(tmp_path, "first", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")["first"]["compiled"] == 1
