"""Data of real processes: what each trains on is, together, what one process trains on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fluxloop import Accelerator, Checkpointer, Learner
from processes.launching import Run, run

MIDDLE = "epoch-0001-step-00000004-phase-0.pt"
"""The checkpoint of the second epoch's first step, of three."""
STEP_4 = "epoch-0000-step-00000004-phase-0.pt"
"""That of the first epoch's fourth step, of five."""

SCRIPT = """
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset

from fluxloop import Checkpointer, CustomCallback, DataError, StepEnd, TensorBatches, TrainingPhase
from fluxloop.data.feed import Feed
from fluxloop.data.sharing import shared
from fluxloop.randomness import Streams
from processes.launching import report
from processes.test_shared_data import MIDDLE, STEP_4, Kept, make_learner

given = Path(sys.argv[1])
learner = make_learner(4)
group = learner.accelerator.group
learner.fit(2)
rows = torch.arange(13 * 3.0, dtype=torch.float64).view(13, 3)
report(
    weights=learner.model.state_dict(),
    predictions=learner.predict(TensorBatches(rows, batch_size=4)),
    parts=[len(part) for part in learner.predict(TensorBatches(rows, batch_size=4), stack=False)],
    few=learner.predict(rows[:1]),
)

learner = make_learner(4, rows=17)
learner.fit(2)
report(spare=learner.model.state_dict())

seen = []


def validate(_):
    before = group.spare
    learner.evaluate([(rows, rows[:, :1])])
    seen.append((before, group.spare))


learner.add_callback(CustomCallback(validate, StepEnd, TrainingPhase, name="validates"))
learner.fit(1)
report(seen=seen)

written = make_learner(4, Checkpointer(given / f"two/{group.rank}", unit="step", keep_last=100))
written.fit(2)
group.wait()
for name, place in [("resumed", given / "two/0" / MIDDLE), ("doubled", given / "one" / MIDDLE)]:
    resumed = make_learner(4)
    resumed.fit(2, resume=place)
    report(**{name: resumed.model.state_dict()})


keeps = Checkpointer(given / f"kept/{group.rank}", unit="step", keep_last=100)
for name, callbacks, place in [("whole", [keeps], None), ("rest", [], given / "kept/0" / STEP_4)]:
    kept = make_learner(4, *callbacks)
    own = Kept(range(group.rank, 10 - 5 * group.rank, 2))
    kept.fit(2, (own,), resume=place)
    report(**{f"{name} of kept": (kept.model.state_dict(), own.given)})
    group.wait()


class Sharded(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def batches_of(source):
    data = Feed(source, "training", Streams(0), "training", group=group)
    data.check()
    return [(batch.tolist(), group.spare) for batch in data]


own = range(group.rank, 10 - 5 * group.rank, 2)
report(
    iterable=batches_of(DataLoader(Sharded(own), batch_size=2)),
    workers=batches_of(DataLoader(range(11), batch_size=2, shuffle=True, num_workers=2)),
    ragged=batches_of(TensorBatches(torch.arange(5), batch_size=2)),
    loop=[batch.tolist() for batch in shared(DataLoader(range(11), batch_size=2, shuffle=True), group)],
)
try:
    batches_of(TensorBatches(torch.arange(10) + group.rank, batch_size=2))
except DataError as error:
    report(error=str(error))
"""


class Noisy(Dataset[Any]):
    """Rows with noise of their own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return index + torch.rand(3, dtype=torch.float64), torch.tensor([random.random()], dtype=torch.float64)


class Kept:
    """Batches of one row, of which each process has other ones; keeps its place itself."""

    def __init__(self, rows: range) -> None:
        self.rows, self.next = rows, 0
        self.given: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        while self.next < len(self.rows):
            self.given.append(self.rows[self.next])
            self.next += 1
            xs = torch.full((1, 3), float(self.given[-1]), dtype=torch.float64)
            yield xs, xs[:, :1]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def make_learner(batch_size: int, *callbacks: Any, rows: int = 21) -> Learner:
    torch.manual_seed(0)
    return Learner(
        nn.Linear(3, 1, dtype=torch.float64),
        nn.functional.mse_loss,
        data=(DataLoader(Noisy(rows), batch_size=batch_size, shuffle=True),),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        callbacks=list(callbacks),
        default_callbacks=False,
        accelerator=Accelerator("cpu"),
        seed=3,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Learner:
    learner = make_learner(8, Checkpointer(folder / "one", unit="step", keep_last=100))
    learner.fit(2)
    return learner


@pytest.fixture(scope="module")
def two(alone: Learner, folder: Path) -> Run:
    return run(SCRIPT, processes=2, arguments=[str(folder)])


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-9, atol=1e-12)


def test_processes_train_as_one_with_their_joined_batches(alone: Learner, two: Run) -> None:
    for each in two.reports:
        assert_close(alone.model.state_dict(), each["weights"])


def test_a_batch_that_only_repeats_rows_trains_nothing(two: Run) -> None:
    alone = make_learner(8, rows=17)
    alone.fit(2)
    for each in two.reports:
        assert_close(alone.model.state_dict(), each["spare"])


def test_a_validation_inside_a_step_leaves_what_is_said_of_its_batch(two: Run) -> None:
    first, second = (each["seen"] for each in two.reports)
    assert first == [(False, False)] * 3
    assert second == [(False, False), (False, False), (True, True)]


def test_predictions_are_in_order_on_all(alone: Learner, two: Run) -> None:
    rows = torch.arange(13 * 3.0, dtype=torch.float64).view(13, 3)
    expected = alone.predict(rows)
    for each in two.reports:
        torch.testing.assert_close(each["predictions"], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(each["few"], expected[:1], rtol=1e-9, atol=1e-12)
        assert each["parts"] == [4, 4, 3, 2]


@pytest.mark.filterwarnings("ignore:the checkpoint has states of Checkpointer")
def test_an_epoch_goes_on_in_the_middle(alone: Learner, two: Run, folder: Path) -> None:
    for each in two.reports:
        for name, value in each["weights"].items():
            assert torch.equal(each["resumed"][name], value)
        assert_close(alone.model.state_dict(), each["doubled"])
    one = make_learner(8)
    one.fit(2, resume=folder / "two/0" / MIDDLE)
    assert_close(alone.model.state_dict(), one.model.state_dict())


def test_so_does_one_of_data_that_keeps_its_place_in_each_process(two: Run) -> None:
    first, second = two.reports
    assert first["whole of kept"][1] == [0, 2, 4, 6, 8] * 2
    assert first["rest of kept"][1] == [8, 0, 2, 4, 6, 8]
    assert second["whole of kept"][1] == [1, 3] * 2
    assert second["rest of kept"][1] == [1, 3]  # it had ended before the others, and waited for them


def test_and_ends_with_the_same_bits(two: Run) -> None:
    for each in two.reports:
        for name, value in each["whole of kept"][0].items():
            assert torch.equal(each["rest of kept"][0][name], value)


def test_iterables_of_different_length_end_together(two: Run) -> None:
    first, second = (each["iterable"] for each in two.reports)
    assert first == [([0, 2], False), ([4, 6], False), ([8], False)]
    assert second == [([1, 3], False), ([1, 3], True), ([1, 3], True)]


def test_all_rows_are_taken_once(two: Run) -> None:
    for name in ("workers", "loop"):
        batches = [batch[0] if name == "workers" else batch for each in two.reports for batch in each[name]]
        assert sorted(row for batch in batches for row in batch) == list(range(11))
    assert [each["ragged"][-1] for each in two.reports] == [([4], False), ([2, 3], True)]


def test_data_that_differs_is_the_same_error_on_all(two: Run) -> None:
    first, second = (each["error"] for each in two.reports)
    assert first == second
    assert "is not the same on all processes:\n  some values" in first
