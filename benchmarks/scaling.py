"""Whether the cost of a step grows: with the epoch, with epochs before, with metrics.

    python benchmarks/scaling.py            # the tables
    python benchmarks/scaling.py --quick    # shorter epochs, fewer starts

Steps that compute nothing but their metrics are timed in an epoch of so many: "first µs" is the
median over the hundreds of the first thousand, "last µs" of the last thousand, "ratio" the median
over fresh starts of the second by the first; flat is 1. They run with the default callbacks and
accuracy. A loop by hand, which does the same without fluxloop, shows what the machine does
meanwhile. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from timing import Table, arguments, interleave
from torch import Tensor, nn
from workloads import ADAMW, make_learner, tracking

from fluxloop import AbstractTrainingPhase, Learner, Metric, Metrics, accuracy, runstep

HUNDRED = 100
PREDS, YS, LOSS = torch.randn(32, 4), torch.zeros(32, dtype=torch.long), torch.tensor(1.0)


class Given(AbstractTrainingPhase):
    """Stores predictions and a loss that were there before."""

    def step(self, learner: Any, batch: Any) -> None:
        """Store them."""
        with runstep(learner, self, ys=YS) as (_, state):
            state.preds, state.loss = PREDS, LOSS


@dataclass
class Steps:
    """Data of so many steps, which looks at the clock every hundred.

    Args:
        count: How many.
        times: When each hundred was begun, and when the last one was over.
    """

    count: int
    times: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[None]:
        self.times = []
        for index in range(self.count):
            if index % HUNDRED == 0:
                self.times.append(time.perf_counter())
            yield None
        self.times.append(time.perf_counter())

    def ends(self) -> tuple[float, float]:
        """Give µs per step of the first and of the last thousand."""
        hundreds = [(b - a) / HUNDRED * 1e6 for a, b in zip(self.times, self.times[1:], strict=False)]
        return median(hundreds[:10]), median(hundreds[-10:])


def learner_for(data: Any, *metrics: Any) -> Learner[Any]:
    """Make a learner with the default callbacks, accuracy, and these metrics."""
    learner = make_learner(nn.Linear(1, 1), data, ADAMW, tracked=True)
    learner.replace_callback(Metrics(accuracy, *metrics))
    return learner


def by_hand(steps: Steps) -> None:
    """Track the same numbers in a loop."""
    with tracking(len(steps)) as track:
        for _ in steps:
            track(PREDS, YS, LOSS)


def epochs(table: Table, count: int, quick: bool) -> None:
    """Print a row of an epoch of so many steps, for either side."""
    ends: dict[str, list[tuple[float, float]]] = {"by hand": [], "fluxloop": []}
    for _ in range(1 if quick else max(2, min(9, 300_000 // count))):
        steps = Steps(count)
        learner, phase = learner_for(steps), Given()
        learner.epoch(phase, Steps(1000))  # warm
        for side, run in {"by hand": lambda: by_hand(steps), "fluxloop": lambda: learner.epoch(phase)}.items():  # noqa: B023 - called at once
            run()
            ends[side].append(steps.ends())
    for side, pairs in ends.items():
        first, last = (median(pair[index] for pair in pairs) for index in (0, 1))
        table.row(f"{count:,} steps", side, first, last, median(b / a for a, b in pairs))


def before(earlier: int) -> Callable[[], object]:
    """Give what runs an epoch after so many others, whose values the history has."""
    learner, phase = learner_for(Steps(HUNDRED)), Given()
    one = Steps(1)
    for _ in range(earlier):
        learner.epoch(phase, one)
    return lambda: learner.epoch(phase)


def fit_before(earlier: int) -> Callable[[], object]:
    """Give what fits for epochs of one step after so many others."""
    learner, phase = learner_for(Steps(1)), Given()
    if earlier:
        learner.fit(earlier, phases=[phase])
    return lambda: learner.fit(HUNDRED, phases=[phase])


def mean_of(preds: Tensor, ys: Tensor) -> Tensor:
    """Be a metric that costs little."""
    return preds.mean()


def with_metrics(count: int) -> Callable[[], object]:
    """Give what runs an epoch with so many metrics beside loss and accuracy."""
    learner = learner_for(Steps(HUNDRED), *(Metric(mean_of, name=f"mean{index}") for index in range(count)))
    phase = Given()
    return lambda: learner.epoch(phase)


def table_of(what: str, heading: str, sides: dict[str, Callable[[], object]], quick: bool) -> None:
    """Print the cost of sides against the first one's."""
    print(f"\n{what}\n")
    got, base = interleave(lambda: sides, units=HUNDRED, rounds=9 if quick else 60), next(iter(sides))
    table = Table({heading: "<28", "µs": ">9.2f", "ratio": ">6.3f", "added µs": ">9.3f"})
    for side in sides:
        table.row(side, got.micro(side), got.ratio(side, base), got.difference(side, base))


EPOCH_COLUMNS = {"epoch of": "<13", "side": "<8", "first µs": ">8.2f", "last µs": ">8.2f", "ratio": ">6.3f"}


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    torch.set_num_threads(1)
    print("A step of a long epoch.\n")
    table = Table(EPOCH_COLUMNS)
    for count in (2_000, 10_000) if quick else (2_000, 10_000, 100_000):
        epochs(table, count, quick)
    many = 300 if quick else 3_000
    counts = (0, many // 10, many)
    table_of("A step after so many epochs.", "epochs before", {f"{n:,}": before(n) for n in counts}, quick)
    table_of(
        "An epoch of one step, of a fit after so many epochs.",
        "epochs before",
        {f"{n:,}": fit_before(n) for n in counts},
        quick,
    )
    table_of(
        "A step with so many further metrics.", "metrics", {f"{n}": with_metrics(n) for n in (0, 1, 5, 20)}, quick
    )


if __name__ == "__main__":
    main()
