"""Checks before a fit is resumed: whether it is the one of the checkpoint, on the same data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluxloop.checkpoint.misfits import check_fits, check_same_run
from fluxloop.data.feed import Feed
from fluxloop.data.fingerprint import differences, fingerprint
from fluxloop.errors import CheckpointError, describe, warn_user
from fluxloop.persist.plain import phase_id
from fluxloop.phase import Phase
from fluxloop.run.scope import Place, is_under_way

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


def check_resumes(
    learner: RunLearner,
    state: dict[str, Any],
    epochs: int,
    phases: list[Phase],
    feeds: list[Feed],
    steps_per_epoch: int | None,
) -> None:
    """Raise where a fit is not the one of a checkpoint, before anything is changed.

    Args:
        learner: The learner.
        state: The state of the checkpoint.
        epochs: How many the fit has in all.
        phases: What a cycle runs.
        feeds: Their data.
        steps_per_epoch: How many batches an epoch has at most.

    Raises:
        CheckpointError: Says what differs.
    """
    check_fits(learner, state)
    check_same_run(learner, state)
    place = state["place"]
    if place is not None:
        _check_place(place, phases, feeds, steps_per_epoch)
    _compare_data(learner, state["data"])
    begun = state["history"]["cycles"] + is_under_way(place)
    if state["history"]["stop_reason"] is None and begun > epochs:
        raise CheckpointError(
            f"fit({epochs}, resume=...) was asked for, and {state['history']['cycles']} epochs are complete"
            f"{' and one is under way' if begun > state['history']['cycles'] else ''}; epochs count from "
            f"the beginning of the run: fit({begun}, resume=...) or more. Where a script has several fits, one after "
            "the other, give each stage a folder of its own"
        )


def _check_place(place: Place, phases: list[Phase], feeds: list[Feed], steps_per_epoch: int | None) -> None:
    """Raise where a fit cannot go on at a place.

    Raises:
        CheckpointError: Says what differs.
    """
    names = [phase_id(phase) for phase in phases]
    if is_under_way(place) and place["phases"] != names:
        raise CheckpointError(f"the fit ran the phases {place['phases']}, and now {names}; expected the same")
    if place.get("steps_per_epoch", steps_per_epoch) != steps_per_epoch:  # older files do not have it
        raise CheckpointError(
            f"the run was begun with steps_per_epoch={place['steps_per_epoch']}, and is now to go on with "
            f"steps_per_epoch={steps_per_epoch}, which makes it another run; resume with the former one. To train on "
            "from here in a run of its own: learner.load(file), then learner.fit(epochs)"
        )
    if place["feed"] is not None:
        phase = phases[place["index"]]
        if place["feed"]["key"] != phase.data_key:
            raise CheckpointError(
                f"the epoch under way ran on the {place['feed']['key']!r} data, and {phase!r} runs on the "
                f"{phase.data_key!r} data"
            )
        feeds[place["index"]].check_place(place["feed"])


def _compare_data(learner: RunLearner, kept: dict[str, Any]) -> None:
    """Warn of data that a run goes on with between two epochs and that is not the data of the checkpoint."""
    for key, source in vars(learner.data).items():
        now = fingerprint(source, learner.accelerator.world_size)
        differ = differences(kept.get(key, {}).get("fingerprint", {}), now)
        if differ:
            warn_user(
                f"the {key} data ({describe(source)}) is not the same as in the run that wrote the checkpoint: "
                f"{'; '.join(differ)}. The run goes on with what is given now, from the beginning of an epoch"
            )
