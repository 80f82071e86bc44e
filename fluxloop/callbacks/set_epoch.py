"""The callback that was needed for samplers that shuffle by the epoch."""

from __future__ import annotations

from attrs import define

from fluxloop.callback import Callback


@define
class SetEpoch(Callback):
    """Do nothing: the ``set_epoch`` of data is called without this callback, too.

    When an epoch of any phase begins, ``set_epoch(epoch)`` is called on the loader, its sampler, its
    batch sampler and its data set, whichever have it: ``DistributedSampler`` shuffles by that
    number, streaming data sets of Hugging Face too. It is the number of epochs of that data begun before by the
    phase, so a resumed run goes on with the same. A script that still lists this callback runs as before.

    Persistent workers hold a copy of the data set, made in their first epoch: they see no later number, unless
    the data set shares it with them.

    Example:
        >>> learner = testing.toy_learner(SetEpoch())  # the same as without it
        >>> learner.callbacks.order
        ['SetEpoch']
    """

    draws = False
