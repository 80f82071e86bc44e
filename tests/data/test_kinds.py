from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from fluxloop import Accelerator, Checkpointer, Learner
from fluxloop.data.kinds import draws_order_anew, keeps_place
from fluxloop.data.passes import Pass
from fluxloop.testing import assert_resumes_exactly

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it


class Counting(TensorDataset):
    """Keeps a state, so that a loader of torchdata keeps its place by its own."""

    def __init__(self) -> None:
        xs = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
        super().__init__(xs, xs.sum(1, keepdim=True))

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


def learner_of(loader: Any) -> Learner:
    torch.manual_seed(0)
    loss = nn.functional.mse_loss
    return Learner(
        nn.Linear(4, 1), loss, data=(loader(),), default_callbacks=False, accelerator=Accelerator("cpu"), seed=1
    )


@pytest.mark.parametrize("has_generator", [False, True])
def test_a_loader_whose_order_is_in_no_state_goes_on_at_the_ends_of_epochs(tmp_path: Path, has_generator: bool) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        generator = torch.Generator().manual_seed(3) if has_generator else None
        order = BatchSampler(RandomSampler(range(24), generator=generator), 8, drop_last=False)
        return torchdata.StatefulDataLoader(Counting(), batch_sampler=order)

    assert draws_order_anew(loader()) is not has_generator
    assert keeps_place(loader()) is has_generator  # a generator's state is kept with the place
    learner = learner_of(loader)
    learner.add_callback(Checkpointer(tmp_path, every=1, unit="step", keep_last=100))
    if has_generator:
        learner.fit(2)
    else:
        told = "cannot be resumed in the middle of an epoch: its RandomSampler has no state"
        with pytest.warns(UserWarning, match=re.escape(told)):
            learner.fit(2)
    between = [each.name for each in tmp_path.iterdir() if re.search(r"step-0000000[1245]", each.name)]
    assert bool(between) is has_generator


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.filterwarnings("ignore:.*its RandomSampler has no state")
def test_a_run_over_a_loader_whose_order_is_in_no_state_ends_in_the_same_bits(asked: bool) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        made = torchdata.StatefulDataLoader(Counting(), batch_size=8, sampler=RandomSampler(range(24)))
        if asked:
            made.state_dict()  # as accelerate does with those that it makes: the loader makes an iterator for it
        return made

    assert_resumes_exactly(lambda: learner_of(loader), epochs=2)


@pytest.mark.parametrize(("options", "asked"), [({}, True), ({"persistent_workers": True}, False), ({}, False)])
def test_workers_that_do_not_begin_with_each_pass_are_told_where_the_order_is_in_no_state(
    options: dict[str, Any], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    order = RandomSampler(range(24))
    loader = torchdata.StatefulDataLoader(Counting(), batch_size=8, sampler=order, num_workers=1, **options)
    loader._initial_iter_for_state_dict = asked  # as state_dict() leaves it, which starts the worker
    monkeypatch.setattr(Pass, "_iterate", lambda *_: iter(DataLoader(Counting(), batch_size=8)))  # without workers
    told = pytest.warns(UserWarning, match="makes its workers once") if asked or options else nullcontext()
    learner = learner_of(lambda: loader)
    with told:
        learner.fit(1)


def test_a_loader_prepared_by_accelerate_is_seen_through() -> None:
    class Prepared(DataLoader[Any]):
        """Holds a loader with a state, as accelerate's do with use_stateful_dataloader=True."""

        def __init__(self, loader: Any) -> None:
            super().__init__(Counting(), batch_size=8)
            self.base_dataloader = loader

        def state_dict(self) -> Any: ...

        def load_state_dict(self, state: Any) -> None: ...

    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    order = BatchSampler(RandomSampler(range(24)), 8, drop_last=False)
    assert draws_order_anew(Prepared(torchdata.StatefulDataLoader(Counting(), batch_sampler=order)))
    assert not draws_order_anew(Prepared(torchdata.StatefulDataLoader(Counting(), batch_size=8)))
    assert not draws_order_anew(DataLoader(Counting(), batch_size=8, shuffle=True))
