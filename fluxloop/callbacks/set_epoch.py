"""Tell samplers which epoch it is."""

from __future__ import annotations

from typing import Any

from attrs import define

from fluxloop.callback import Callback, on
from fluxloop.callbacks.recorder import Recorder
from fluxloop.events import EpochBegin
from fluxloop.phase import Phase


@define
class SetEpoch(Callback):
    """Call ``set_epoch(epoch)`` on a loader's sampler, batch sampler and dataset when an epoch begins.

    ``torch.utils.data.distributed.DistributedSampler`` shuffles by that number, as do samplers and
    datasets that users write. It is the number of epochs of that phase done before, so a resumed
    run goes on with the same. (A loader with a ``set_epoch`` of its own is told without this.)

    Persistent workers hold a copy of the dataset, made in their first epoch: they see no later one.

    Reads: data, cbstate.history
    Runs after: Recorder
    """

    reads = ("data", "cbstate.history")
    run_after = (Recorder,)
    draws = False

    @on(EpochBegin)
    def tell(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Tell whatever wants to know."""
        if not phase.data_key or phase.data_key not in learner.data:
            return
        loader, epoch = learner.data[phase.data_key], learner.cbstate.history[phase].epochs
        batch_sampler = getattr(loader, "batch_sampler", None)
        parts = (
            getattr(loader, "dataset", None),
            getattr(loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
        )
        for part in {id(part): part for part in parts}.values():
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)  # type: ignore[union-attr]  # it was asked for
