"""What torch keeps on disk of a compiled step is found again by the next process, and never used for another step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compiled_training import WITH_COMPILER

SCRIPT = Path(__file__).parent / "train_variants.py"


def train(folder: Path, *variants: str) -> dict[str, dict[str, Any]]:
    """Train in a process of its own, with a folder for what is compiled."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0"}
    done = subprocess.run([sys.executable, str(SCRIPT), *variants], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not WITH_COMPILER, reason="takes a minute; set FLUXLOOP_COMPILER=1")
def test_a_graph_is_found_again_and_one_of_another_step_is_never_used(tmp_path: Path) -> None:
    first = train(tmp_path, "first")
    assert first["first"]["misses"] == 1
    again = train(tmp_path)
    assert again["first"]["hits"] == 1
    assert all(of["apart"] < 1e-6 for of in (first["first"], *again.values())), again
    new = {name for name, of in again.items() if of["misses"]}
    # a learning rate, and a tensor that is closed over, are inputs of a graph
    assert new == set(again) - {"first", "another input option"}, again
    assert all(of["hits"] == 1 and not of["misses"] for of in train(tmp_path).values())
