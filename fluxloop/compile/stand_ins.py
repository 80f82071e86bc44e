"""What stands for the learner, its accelerator and its looks at numbers while a step is traced."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from attrs import define
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.compile.averaging import Message, TracedAverager
from fluxloop.compile.optimizer_stand_in import count_in_double
from fluxloop.compile.windows import CANCELS, STOPS, Place, TracedWindows
from fluxloop.compute.blocks import UpdateBlock
from fluxloop.compute.finite import norm_before_clipping, stored_losses
from fluxloop.compute.updates import Updates
from fluxloop.compute.windows import WindowedUpdates
from fluxloop.errors import CompileError, annotate
from fluxloop.events import Event
from fluxloop.order.view import make_view
from fluxloop.phase import Phase
from fluxloop.state import StepState

if TYPE_CHECKING:
    from fluxloop.compute.accelerator import Accelerator
    from fluxloop.interfaces import RunLearner


class StandIn:
    """The learner of a step that is traced: a body, and handlers that are part of the graph, get it.

    It has what a step may use: models, the loss function, backward, update and update blocks,
    on stand-ins for the parameters.

    Args:
        learner: For which it stands.
        phase: The running phase.
        state: The step's entries, stand-ins too.
        leaves: The stand-in of each parameter.
        optimizers: The optimizers' stand-ins by name.
        numbers: Those of the numbers that updates of several batches or processes rest on, by place.
    """

    PASSED_ON = ("model", "models", "loss_fn", "seed", "optimizer_names", "weights", "data")

    def __init__(
        self,
        learner: RunLearner,
        phase: Phase,
        state: StepState,
        leaves: dict[nn.Parameter, Tensor],
        optimizers: dict[str | None, Optimizer],
        numbers: dict[Place, Tensor],
    ) -> None:
        self._learner = learner
        self._phase = phase
        self.step = state
        self.accelerator = AcceleratorStandIn(learner.accelerator)
        casting = learner.accelerator.casting
        handle = self._handle if casting is None else casting.outside(self, self._handle)
        self.scope = SimpleNamespace(phase=phase, handle=handle)
        self.optimizer = optimizers[None] if tuple(optimizers) == (None,) else optimizers
        names: Any = {leaves[parameter]: name for parameter, name in learner.updates.names.items()}
        self.updates = (
            TracedWindows(self, names, optimizers, learner.updates, leaves, numbers)
            if isinstance(learner.updates, WindowedUpdates) and optimizers
            else Updates(self, names, optimizers)
        )
        # a window that is open in the learner is open here, of some other step; whose step it was does not matter
        for slot in self.updates.slots:  # none in a phase without gradients
            of_learner = learner.updates.find(slot.name)
            slot.consumed, slot.in_block = False, of_learner.in_block
            slot.first_step, slot.phase = None if of_learner.first_step is None else StepState(), phase.name
        self.backward = self.updates.backward
        self.fired: list[Event] = []
        """Events, in order."""
        self.skips: list[Tensor | None] = []
        """For each of them, what says by then whether updates are left out."""
        self._asked: Tensor | None = None
        """Where a handler has asked to leave updates out."""
        self.finite = FiniteStandIn(self)

    def __getattr__(self, name: str) -> Any:
        if name in StandIn.PASSED_ON:
            return getattr(self._learner, name)
        raise CompileError(
            f"the step of {self._phase!r} uses learner.{name}, which a step that is compiled whole cannot; it may use "
            f"model, loss_fn, backward, update and optimizing. Do it in the phase's finish(learner, state)"
        )

    def fire(self, event: Event) -> None:
        """Fire an event, as a handler or a body may do."""
        self.scope.handle(event)

    def _handle(self, event: Event) -> None:
        """Call the handlers that are part of the graph; note the event for the others."""
        self.fired.append(event)
        self.skips.append(self.accelerator.skips)
        for node in self._learner.callbacks.graph.nodes:
            handler = node.callback.handler(type(event), type(self._phase))
            if handler is not None and node.callback.in_compiled_step == "inside":
                try:
                    handler(event, self._phase, make_view(node.access, self))
                except Exception as error:
                    annotate(error, f"fluxloop: raised by {node.id} at {type(event).__name__}, while it was traced")
                    raise

    def update(self, name: str | int | None = None, *, closure: Callable[[], Any] | None = None) -> None:
        """Step one optimizer, the block's, or all.

        Raises:
            CompileError: An optimizer asks for gradients as often as it likes, which no graph can follow.
        """
        if closure is not None:
            raise CompileError(
                f"the step of {self._phase!r} calls learner.update(closure=...), whose optimizer decides how often "
                "gradients are computed, so that it cannot be one graph; say compiled = False in the phase's class"
            )
        self.updates.update(name)

    def skip_update(self, when: Tensor) -> None:
        """Leave parameters, optimizers' states, and gradients that wait as they are from here on, if `when`."""
        self._asked = when if self._asked is None else self._asked | when
        self.accelerator.skip_update(when)

    def left_out(self) -> list[Tensor]:
        """Return whether updates were left out by each event; one tensor, or none where no handler has asked for it."""
        if self._asked is None:
            return []
        no = torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        return [torch.stack([no if skip is None else skip.reshape(()) for skip in self.skips])]

    def votes(self, numbers: dict[Place, Tensor]) -> list[float | Tensor]:
        """Return what this process tells the others: whether to stop, to cancel, and to leave updates out."""
        bad = self.finite.bad_so_far()
        cancels = numbers[CANCELS] if bad is None else torch.maximum(numbers[CANCELS], bad.to(numbers[CANCELS]))
        return [numbers[STOPS], cancels, 0.0 if self._asked is None else self._asked.float(), 0.0]

    def hear(self, votes: Tensor) -> None:
        """Leave updates out where one of the processes has asked for it."""
        self.accelerator.skip_update((votes[1] > 0) | (votes[2] > 0))

    def told(self) -> list[Tensor]:
        """Return what the processes have told each other: one tensor, or nothing."""
        averager = self._averager
        return [] if averager is None or not averager.told else [torch.stack(averager.told)]

    def messages(self) -> list[Message]:
        """Return what is sent to other processes."""
        return [] if self._averager is None else self._averager.messages

    @property
    def _averager(self) -> TracedAverager | None:
        return getattr(self.updates, "averager", None)

    def optimizing(
        self, name: str | int | None = None, *, loss: str | None = None, retain_graph: bool = False
    ) -> UpdateBlock:
        """Open the block in which one optimizer's parameters may change."""
        return UpdateBlock(self, self.updates.find(name), retain_graph, loss)


class AcceleratorStandIn:
    """Computes gradients and steps optimizers while a step is traced.

    Args:
        accelerator: Where the step runs.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.device, self.precision, self.autocast = accelerator.device, accelerator.precision, accelerator.autocast
        self.rank, self.world_size, self.is_main = accelerator.rank, accelerator.world_size, accelerator.is_main
        self._group = accelerator.group
        self._casting = accelerator.casting
        self._skip: Tensor | None = None

    @property
    def group(self) -> Any:
        """The processes: None, as a graph cannot ask how many rows the others have.

        Raises:
            CompileError: There are several.
        """
        if self._group is None:
            return None
        raise CompileError(
            "the step uses the rows of all processes, of which there may be another number in each step, so that it "
            "cannot be one graph; say compiled = False in the phase's class, or gather=False to a phase that has it"
        )

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes: of one.

        Raises:
            CompileError: There are several.
        """
        _ = self.group
        return tensor

    all_gather = gather

    @property
    def skips(self) -> Tensor | None:
        """What says whether updates are left out from here on; None where nothing has been asked."""
        return self._skip

    def end_casting(self) -> None:
        """Switch autocast off: the phase's own part is over."""
        if self._casting is not None:
            torch.set_autocast_enabled(self.device.type, False)

    def backward(self, loss: Tensor, own: Any, *, alone: bool = False, retain_graph: bool = False) -> None:
        """Add the gradients of a loss, as `Accelerator.backward` does, in new tensors: old ones may be inputs."""
        # the engine would add to `leaf.grad` in place, and an old gradient may be an input of the graph
        before = {leaf: leaf.grad for leaf in own if leaf.grad is not None}
        for leaf in before:
            leaf.grad = None
        torch.autograd.backward(loss, retain_graph=retain_graph, inputs=None if alone else own)
        if any(leaf.grad is not None and leaf.grad.layout is not torch.strided for leaf in own):
            raise CompileError(
                "gradients are sparse, which a step that is compiled whole cannot compute; expected "
                "Embedding(sparse=False), or compiled = False in the phase's class"
            )
        for leaf, old in before.items():
            leaf.grad = old if leaf.grad is None else old + leaf.grad

    def unless_skipped(self, before: Tensor | None, now: Tensor) -> Tensor:
        """Return the gradient to carry to the next step; the old one where this step's update is skipped."""
        if self._skip is None:
            return now
        return torch.where(self._skip, torch.zeros_like(now) if before is None else before, now)

    def carried(self, before: Tensor | None, now: float | Tensor) -> float | Tensor:
        """Return what batches weigh, to be carried to the next step; that of a step that is skipped weighs nothing."""
        if self._skip is None:
            return now
        weight = now if isinstance(now, Tensor) else torch.full((), now, dtype=torch.float64, device=self.device)
        return self.unless_skipped(before if isinstance(before, Tensor) else None, weight)

    def skip_update(self, when: Tensor) -> None:
        """Leave parameters, optimizers' states, and gradients that wait as they are from here on, if `when`.

        Gradients that waited for the update that is left out are dropped.
        """
        self._skip = when if self._skip is None else self._skip | when

    def restore(self, buffers: list[Tensor], copies: list[Tensor], versions: list[int]) -> None:
        """Restore a module's buffers where updates are skipped, if the step changes one of them."""
        if self._skip is not None and [buffer._version for buffer in buffers] != versions:
            for buffer, copied in zip(buffers, copies, strict=True):
                buffer.copy_(torch.where(self._skip, copied, buffer))

    def update(self, optimizer: Optimizer) -> None:
        """Step an optimizer.

        A graph has no branches: where an update may be skipped, it is computed all the same, and a choice is made
        between what it gave and what was there before.
        """
        count_in_double(optimizer)  # puts other tensors in the place of its counts
        changed = [leaf for group in optimizer.param_groups for leaf in group["params"] if leaf.grad is not None]
        changed += [value for leaf in changed for value in optimizer.state[leaf].values() if isinstance(value, Tensor)]
        before = [] if self._skip is None else [tensor.detach().clone() for tensor in changed]
        with torch.no_grad():
            optimizer.step()
            for tensor, old in zip(changed, before, strict=False):
                tensor.copy_(torch.where(self._skip, old, tensor))  # type: ignore[arg-type]  # there if `before` is


@define(frozen=True)
class Look:
    """One look of a step at a loss or at gradients, while it runs.

    Args:
        numbers: A stand-in for the numbers that have to be finite: a loss, or one for each parameter.
        what: What a loss is called; of gradients the name of the optimizer.
        names: Of the parameters; none for a loss.
        num_events: How many events the step had fired before.
    """

    numbers: Tensor
    what: str | None
    names: list[str]
    num_events: int


class FiniteStandIn:
    """Looks at losses and gradients while a step is traced, and leaves out the updates that follow a bad one.

    Args:
        learner: The learner's stand-in.
    """

    bad = None
    looked = False  # the losses are looked at once more when the step ends: a phase may store one after its backward

    def __init__(self, learner: StandIn) -> None:
        self._learner = learner
        self.looks: list[Look] = []

    def require_losses(self, wait: bool) -> None:
        """Leave out the updates that follow unless the step's losses are finite."""
        for what, loss in stored_losses(self._learner.step):
            if isinstance(loss, Tensor) and loss.numel() == 1:
                self._look(loss.detach().reshape(1), what, [])

    def require_gradients(self, name: str | None, wait: bool) -> None:
        """Leave out an optimizer's update, and those that follow, unless its gradients are finite."""
        updates = self._learner.updates
        updates.take_given(updates.find(name))
        leaves = [leaf for leaf in updates.find(name).parameters if leaf.grad is not None]
        numbers = [leaf.grad.detach() for leaf in leaves if leaf.grad is not None]
        norm = norm_before_clipping(self._learner.step, name)
        numbers += [norm.detach()] if norm is not None else []
        if numbers:
            fine = torch.stack([number.isfinite().all() for number in numbers])
            self._look(torch.where(fine, 0.0, float("nan")), name, [updates.names[leaf] for leaf in leaves])

    def _look(self, numbers: Tensor, what: str | None, names: list[str]) -> None:
        # fired so far, without the event at which it looks
        self.looks.append(Look(numbers, what, names, len(self._learner.fired) - 1))
        self._learner.accelerator.skip_update(~numbers.isfinite().all())

    def bad_so_far(self) -> Tensor | None:
        """Return whether anything that was looked at is not finite; None where nothing was."""
        if not self.looks:
            return None
        return torch.stack([~look.numbers.isfinite().all() for look in self.looks]).any()

    def found(self) -> list[Tensor]:
        """Return whether anything was not finite, and the numbers of each look; nothing where there was none."""
        bad = self.bad_so_far()
        return [] if bad is None else [bad, *(look.numbers for look in self.looks)]
