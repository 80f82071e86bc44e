"""What the parts of fluxloop may use of a learner, so that none of them has to know the learner itself.

Parts that stand higher than this module (the order of callbacks, the data, a compiled step) are
not named by their types here: an arrow upwards, even one for type checkers alone, would tie the
layers together again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fluxloop.events import Event
    from fluxloop.history import History
    from fluxloop.state import State, StepState


@runtime_checkable
class Stateful(Protocol):
    """What keeps something between steps, as a phase with a queue does."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state: Any) -> Any:
        """Go on from a state."""


class RunPhase(Protocol):
    """What a step and an epoch ask of the phase that they belong to."""

    @property
    def data_key(self) -> str:
        """The key of its data."""

    @property
    def gradients(self) -> bool:
        """Whether it trains."""

    @property
    def train_mode(self) -> bool:
        """Whether models are in train mode."""

    @property
    def model_view(self) -> str:
        """The weights view that it runs; "" for the live weights."""

    @property
    def step_stream(self) -> str:
        """The name of the stream of its steps."""

    @property
    def epoch_stream(self) -> str:
        """The name of the stream of its epochs."""


class StepLearner(Protocol):
    """What a step may use of a learner; in a step that is traced, something else stands for the learner.

    Update blocks, the bookkeeping of gradients, the views of callbacks and the traced step rest on
    this and on nothing more.
    """

    step: StepState
    """The entries of the step."""
    updates: Any
    """Its `Updates`: the optimizers, and who owns which gradient."""
    finite: Any
    """Its `Finite`, or what stands for it: ends a fit whose numbers are not finite."""
    accelerator: Any
    """Its `Accelerator`, or what stands for it."""
    loss_fn: Any
    """The loss function, or None."""
    scope: Any
    """The running step, epoch or fit; None outside of one."""

    @property
    def model(self) -> Any:
        """The module, or a tuple of modules."""

    @property
    def models(self) -> dict[str | None, nn.Module]:
        """The modules by name; a single one has the name None."""

    @property
    def weights(self) -> Any:
        """Its `Weights`: every module by name, averaged ones too."""

    def fire(self, event: Event) -> None:
        """Call the handlers of an event."""

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Compute the gradients of a scalar loss."""

    def update(self, name: str | int | None = None, *, closure: Callable[[], Any] | None = None) -> None:
        """Step one optimizer, the block's, or all."""

    def optimizing(
        self, name: str | int | None = None, *, loss: str | None = None, retain_graph: bool = False
    ) -> AbstractContextManager[Any]:
        """Open the block in which one optimizer's parameters may change."""

    def skip_update(self, when: Tensor) -> None:
        """Leave all parameters as they are in a compiled step where a scalar is true."""


class RunLearner(StepLearner, Protocol):
    """What the parts that run, watch, copy and keep a learner may use of it.

    They are the learner's own, so that they see more than users do: names that begin with an
    underscore are shared among them alone.
    """

    data: State
    """What each kind of phase runs on."""
    optimizer: Any
    """The optimizer, or a tuple of them."""
    callbacks: Any
    """Its `Callbacks`, in their proved order."""
    cbstate: Any
    """What callbacks share."""
    history: History
    """Its `History`: counts and metrics of each phase."""
    seed: int
    """The seed of the run."""
    streams: Any
    """Its `Streams` of random numbers."""
    num_batches: int | None
    """Batches of the running epoch."""
    quiet: bool
    """Whether nothing is shown of what runs."""
    num_epochs: int | None
    """How many cycles the running fit comes to."""
    fit_phases: tuple[Any, ...]
    """What a cycle of the running fit runs."""
    phases: dict[Any, Any]
    """The phases that have run, by class."""

    _host_queue: Any
    _compiled: Any
    _ledger: Any
    _running: Any
    _seed_given: bool

    @property
    def trained_steps(self) -> int:
        """How many training steps there have been."""

    @property
    def optimizer_names(self) -> tuple[str | None, ...]:
        """Names of the optimizers, in order."""

    def fit(self, epochs: int, data: Any = None, *, phases: Any = None) -> Any:
        """Train for some cycles."""

    def host(self, tensor: Tensor, then: Callable[[Any], object]) -> None:
        """Call a function with a number once it is on the host."""

    def where(self) -> str:
        """Return in words where the training stands."""

    def modules(self) -> list[nn.Module]:
        """List the models, and the loss function where it is a module."""

    def phases_in_use(self) -> list[type[Any]]:
        """List the phase types that have run, or those of a plain fit."""

    def meet_parameters(self) -> None:
        """Take note of parameters that joined the models, were replaced or unfrozen."""

    def place(self) -> dict[str, Any] | None:
        """Return where the running fit stands, as plain data."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore everything from a state."""
