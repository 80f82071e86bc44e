from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("kill_script.py")
KILLS = int(os.environ.get("FLUXLOOP_KILLS", "8"))

Order = Callable[..., dict[str, Any]]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plain") / "run"
    subprocess.run([sys.executable, str(SCRIPT), "train", str(folder)], check=True, env=environment(), timeout=60)
    return folder.with_name("run.digest").read_text()


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Order]:
    command = [sys.executable, str(SCRIPT), "serve"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    assert server.stdin is not None
    assert server.stdout is not None

    def give(number: int, kills: int, background: bool = False) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("killed")
        told = {"signal": number, "kills": kills, "background": background, "seed": number}
        server.stdin.write(json.dumps({**told, "folder": str(folder)}) + "\n")  # type: ignore[union-attr]
        server.stdin.flush()  # type: ignore[union-attr]
        answer: dict[str, Any] = json.loads(server.stdout.readline())  # type: ignore[union-attr]
        sys.stdout.write(f"{answer}\n")  # the figures: pytest -s
        return answer

    yield give
    server.stdin.close()
    server.wait(60)
    server.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["in the step", "in the background"])
def test_a_script_killed_at_random_moments_and_started_again_ends_as_one_that_was_not(
    order: Order, unkilled: str, background: bool
) -> None:
    told = order(signal.SIGKILL, KILLS, background)
    assert told["wrong"] == []
    assert sum(told["landed"].values()) == told["statuses"]["-9"] == KILLS
    assert set(told["digests"]) == {unkilled}


@pytest.mark.slow
def test_a_script_told_to_terminate_stops_after_its_step_and_says_so_by_its_status(order: Order, unkilled: str) -> None:
    told = order(signal.SIGTERM, KILLS)
    assert told["wrong"] == []
    assert set(told["statuses"]) <= {"0", "143", "-15"}  # -15: before the fit
    assert told["statuses"]["143"] >= 1
    assert set(told["digests"]) == {unkilled}


@pytest.mark.slow
def test_a_script_interrupted_returns_from_its_fit_with_a_checkpoint_of_the_last_step(
    order: Order, unkilled: str
) -> None:
    told = order(signal.SIGINT, KILLS)
    assert told["wrong"] == []
    assert set(told["statuses"]) <= {"0", "7", "8"}  # 8: before the fit
    assert told["statuses"]["7"] >= 1
    assert set(told["digests"]) == {unkilled}
