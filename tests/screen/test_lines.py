from __future__ import annotations

import re
from typing import Any

import pytest
from tqdm.utils import disp_len

from fluxloop.screen.lines import ROOM, Standing

METRICS = {"loss": "0.4313", "accuracy": "0.8125", "error_rate_of_top_class": "0.1875"}


def standing(**options: Any) -> Standing:
    given: dict[str, Any] = {
        "title": "TrainingPhase epoch 3/10",
        "seen": 45,
        "total": 64,
        "unit": "batch",
        "own": (9.0, 4.0),
        "rate": 5.0,
        "fit": (72.0, 30.0),
        "numbers": METRICS,
    }
    return Standing(**{**given, **options})


BAR = re.compile(r"\{bar:(\d+)\}")


def without_bar(line: str) -> str:
    return BAR.sub("{bar}", line)


@pytest.mark.parametrize("title", ["TrainingPhase epoch 3/10", "a {phase} of 画像 epoch 3/10"])
@pytest.mark.parametrize("total", [64, None])
def test_a_line_fits_its_terminal_and_leaves_room_for_the_bar(title: str, total: int | None) -> None:
    for columns in range(24, 220):
        line = standing(title=title, total=total).line(columns)
        room = [int(width) for width in BAR.findall(line)]
        text = disp_len(BAR.sub("", line).replace("{{", "{").replace("}}", "}"))
        if total is None:
            assert room == []
            assert text <= columns
        else:
            assert room[0] >= ROOM
            assert text + room[0] == columns


def test_a_narrow_line_keeps_what_matters_most_and_whole_numbers_alone() -> None:
    """The epoch goes last, before it how far that has come, the times of the fit, and the first metric."""
    here = standing()
    seen = list(dict.fromkeys(without_bar(here.line(columns)) for columns in range(220, 20, -1)))
    assert seen[:9] == [
        "TrainingPhase epoch 3/10 (01:12, 00:30 left):  70%|{bar}| 45/64 [00:09<00:04, 5.00batch/s, "
        "loss=0.4313, accuracy=0.8125, error_rate_of_top_class=0.1875]",
        "TrainingPhase epoch 3/10 (01:12, 00:30 left):  70%|{bar}| 45/64 [5.00batch/s, "
        "loss=0.4313, accuracy=0.8125, error_rate_of_top_class=0.1875]",
        "TrainingPhase epoch 3/10 (01:12, 00:30 left):  70%|{bar}| 45/64, "
        "loss=0.4313, accuracy=0.8125, error_rate_of_top_class=0.1875",
        "TrainingPhase epoch 3/10 01:12<00:30:  70%|{bar}| 45/64, "
        "loss=0.4313, accuracy=0.8125, error_rate_of_top_class=0.1875",
        "TrainingPhase epoch 3/10 01:12<00:30: |{bar}| 45/64, "
        "loss=0.4313, accuracy=0.8125, error_rate_of_top_class=0.1875",
        "TrainingPhase epoch 3/10 01:12<00:30:  70%|{bar}| 45/64, loss=0.4313, accuracy=0.8125, ...",
        "TrainingPhase epoch 3/10 01:12<00:30: |{bar}| 45/64, loss=0.4313, accuracy=0.8125, ...",
        "TrainingPhase epoch 3/10 01:12<00:30:  70%|{bar}| 45/64, loss=0.4313, ...",
        "TrainingPhase epoch 3/10 01:12<00:30: |{bar}| 45/64, loss=0.4313, ...",
    ]
    assert seen[9:13] == [
        "TrainingPhase epoch 3/10 01:12<00:30:  70%|{bar}| 45/64",
        "TrainingPhase epoch 3/10 01:12<00:30: |{bar}| 45/64",
        "TrainingPhase epoch 3/10:  70%|{bar}| 45/64",
        "TrainingPhase epoch 3/10: |{bar}| 45/64",
    ]
    assert all(line.endswith("...: |{bar}|") for line in seen[13:])


def test_counts_and_rates_are_in_their_units() -> None:
    plain: dict[str, Any] = {"title": "it", "fit": None, "numbers": {}}
    assert standing(**plain).line(None) == "it:  70%|{bar}| 45/64 [00:09<00:04, 5.00batch/s]"
    assert standing(**plain, rate=0.25).line(None) == "it:  70%|{bar}| 45/64 [00:09<00:04, 4.00s/batch]"
    assert standing(**{**plain, "own": (0, None)}, rate=None).line(None) == "it:  70%|{bar}| 45/64 [00:00]"
    assert standing(**plain, total=None).line(None) == "it: 45batch [00:09<00:04, 5.00batch/s]"
    written = {**plain, "unit": "B", "seen": 3 * 10**6, "total": 12 * 10**6, "rate": 4.5e8}
    assert standing(**written).line(None) == "it:  25%|{bar}| 3.00MB/12.0MB [00:09<00:04, 450MB/s]"
    rough = standing(**{**written, "seen": 12 * 10**6 + 999})  # what is around the tensors in a file
    assert rough.line(None) == "it: 100%|{bar}| 12.0MB/12.0MB [00:09<00:04, 450MB/s]"
    more = standing(**plain, seen=65)  # more has come than was said
    assert more.line(None) == "it: 65batch [00:09<00:04, 5.00batch/s]"
    assert standing(**plain, total=0, seen=0).line(None).startswith("it: 0batch")
