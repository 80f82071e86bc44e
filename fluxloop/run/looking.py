"""Look at a learner and leave it as it is: what is wrong, what happens in a step, what the models are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fluxloop.errors import PhaseError, describe
from fluxloop.guard.given import check_number
from fluxloop.interfaces import RunLearner
from fluxloop.phase import Phase

if TYPE_CHECKING:
    from fluxloop.order.diagram import Diagram
    from fluxloop.run.summary import Summary


class Looks:
    """The methods of a learner that look at it and leave it as it is."""

    def check(self: RunLearner, batch: Any = None, *, phases: Iterable[Phase] | None = None) -> list[str]:
        """Run one step of each phase beside the training, and list what is wrong.

        Finds what a phase raises on its first batch, and a block's loss that also reaches another
        optimizer's parameters through a forgotten ``detach``, and where. Each phase is run by
        itself, without the callbacks, so one that needs an entry of a callback's is listed too.
        Everything is put back: weights, buffers, optimizers, data order and random numbers; the
        phases are copied, and the copies run.

        Of several processes each may call it by itself: its step sends nothing, as where one process trains alone
        (``learner.accelerator.world_size`` is 1 meanwhile). Where models are sharded, all have to.

        Args:
            batch: Left out, the first of each phase's data.
            phases: Left out, those that have run (before any has: `TrainingPhase`, and
                `ValidationPhase` where there is validation data).

        Returns:
            One sentence per problem of every phase; an empty list where all is well.

        Raises:
            PhaseError: Something in `phases` is no phase, or a module is lazy.
        """
        from fluxloop.run.check import check

        if phases is not None and not isinstance(phases, Iterable):
            raise PhaseError(f"phases={describe(phases)} was given; expected a list of instances: [TrainingPhase()]")
        return check(self, batch, phases)

    def timeline(self: RunLearner, phase: Phase | None = None, batch: Any = None) -> Diagram:
        """Run one step of a phase beside the training, and show its events in order, who acts, and what is stored.

        As in `check`, a copy of the phase runs without the callbacks, and everything is put back: weights, buffers,
        optimizers, data order and random numbers. The callbacks shown are those that would act. Where several batches
        make one update, the step is one that completes it; one that is compiled whole is shown as it is written. Of
        several processes each may call it by itself, as `check`; where models are sharded, all have to.

        Args:
            phase: Left out, the first training phase that has run (before any has: `TrainingPhase`).
            batch: Left out, the first of the phase's data.

        Returns:
            A diagram: ``print`` shows it as text, a notebook as a picture; ``save("step.svg")`` keeps it, and
            ``mermaid`` is the same as a sequence diagram.

        Raises:
            PhaseError: It is no phase, has no step, cannot be copied, or no batch of its data can be had; or a module
                is lazy.

        >>> learner = testing.toy_learner(Recorder(), Metrics())
        >>> print(learner.timeline())
        One step of TrainingPhase: its events in order, who acts at them, and what the step stores before them
        StepBegin                          xs, ys
        LossBegin                          preds
        BackwardBegin                      loss
        BackwardEnd                        grads
        UpdateBegin
        UpdateEnd      Recorder
        StepEnd        Recorder → Metrics
        """
        from fluxloop.run.timeline import timeline

        return timeline(self, phase, batch)

    def summary(self: RunLearner, batch: Any = None, depth: int | None = None) -> Summary:
        """List the modules with output shapes and parameters, and the optimizers; prints as a table.

        A single model is run on one batch beside the training: in eval mode, without gradients; nothing is moved.
        Of a batch that is a tuple or list it gets the first item; of a dict the entries that are arguments of its
        ``forward``, by name.

        Args:
            batch: Left out, the first of the training data.
            depth: How deep to go into modules; left out, to the end.
        """
        from fluxloop.run.summary import summary

        if depth is not None:
            check_number("learner.summary", "depth", depth, least=0, whole=True)
        return summary(self, batch, depth)
