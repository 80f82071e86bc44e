"""Whether the cost of a step grows: with the epoch, with epochs before, with metrics.

    python benchmarks/scaling.py            # the tables
    python benchmarks/scaling.py --quick    # shorter epochs, fewer starts

Steps that compute nothing but their metrics are timed: "first µs" is the median over the hundreds
of the first thousand, "last µs" of the last thousand, "ratio" the median over fresh starts of the
second by the first; flat is 1. They run with the default callbacks and
accuracy. A loop by hand, which does the same without fluxloop, shows what the machine does
meanwhile. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from timing import Sides, Table, arguments, interleave, print_added
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


Ends = tuple[float, float]


def ends(times: Sequence[float]) -> Ends:
    """Give µs per unit of the first thousand and of the last, of the times at every hundred."""
    hundreds = [(b - a) / HUNDRED * 1e6 for a, b in pairwise(times)]
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


def one_epoch(count: int) -> dict[str, Ends]:
    """Give the ends of an epoch of so many steps, on either side."""
    steps, found = Steps(count), {}
    learner, phase = learner_for(steps), Given()
    learner.epoch(phase, Steps(1000))  # warm
    for side, run in {"by hand": lambda: by_hand(steps), "fluxloop": lambda: learner.epoch(phase)}.items():
        run()
        found[side] = ends(steps.times)
    return found


def short_epochs(count: int) -> dict[str, Ends]:
    """Give the ends of so many epochs of one step, which fits of a hundred run, on either side."""
    steps, found = Steps(1), {}
    learner, phase = learner_for(steps), Given()

    def loop() -> None:
        for _ in range(HUNDRED):
            by_hand(steps)

    for side, run in {"by hand": loop, "fluxloop": lambda: learner.fit(HUNDRED, phases=[phase])}.items():
        times = [time.perf_counter()]
        for _ in range(count // HUNDRED):
            run()
            times.append(time.perf_counter())
        found[side] = ends(times)
    return found


def print_ends(table: Table, what: str, measure: Callable[[], dict[str, Ends]], starts: int) -> None:
    """Print a row for either side."""
    found = [measure() for _ in range(starts)]
    for side in found[0]:
        first, last = (median(pair[side][index] for pair in found) for index in (0, 1))
        table.row(what, side, first, last, median(pair[side][1] / pair[side][0] for pair in found))


def before(earlier: int) -> Callable[[], object]:
    """Give what runs an epoch after so many others, whose values the history has."""
    learner, phase = learner_for(Steps(HUNDRED)), Given()
    one = Steps(1)
    for _ in range(earlier):
        learner.epoch(phase, one)
    return lambda: learner.epoch(phase)


def mean_of(preds: Tensor, ys: Tensor) -> Tensor:
    """Be a metric that costs little."""
    return preds.mean()


def with_metrics(count: int) -> Callable[[], object]:
    """Give what runs an epoch with so many metrics beside loss and accuracy."""
    learner = learner_for(Steps(HUNDRED), *(Metric(mean_of, name=f"mean{index}") for index in range(count)))
    phase = Given()
    return lambda: learner.epoch(phase)


def differences(what: str, heading: str, sides: Sides, counts: Sequence[int], quick: bool) -> None:
    """Print what each side adds to a step of the first one, for each of so many things."""
    print(f"\n{what}\n")
    print_added(heading, interleave(lambda: sides, units=HUNDRED, rounds=9 if quick else 60), counts)


COLUMNS = {"what": "<26", "side": "<8", "first µs": ">8.2f", "last µs": ">8.2f", "ratio": ">6.3f"}


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    torch.set_num_threads(1)
    print("A step of a long epoch, and an epoch of one step after many others.\n")
    table = Table(COLUMNS)
    for count in (2_000, 10_000) if quick else (2_000, 10_000, 100_000):
        starts = 1 if quick else max(3, min(9, 100_000 // count))
        print_ends(table, f"{count:,} steps", partial(one_epoch, count), starts)
    many = 2_000 if quick else 10_000
    print_ends(table, f"{many:,} epochs of one step", partial(short_epochs, many), 1 if quick else 3)

    counts = (0, many // 10, many)
    earlier = {f"{n:,}": before(n) for n in counts}
    differences("A step after so many epochs: added per epoch.", "epochs before", earlier, counts, quick)
    metrics = {f"{n}": with_metrics(n) for n in (1, 2, 6, 21)}
    differences("A step with so many further metrics: added per metric.", "metrics", metrics, (0, 1, 5, 20), quick)


if __name__ == "__main__":
    main()
