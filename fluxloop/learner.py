"""The learner: holds all state of a training, and is what users call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fluxloop.callback import Callback
from fluxloop.callbacks.defaults import with_defaults
from fluxloop.checkpoint.ledger import Ledger
from fluxloop.compute.blocks import UpdateBlock
from fluxloop.compute.chosen import updates_of
from fluxloop.compute.models import arrange_like, named_models, state_of_models
from fluxloop.compute.optimizers import build_optimizers, parameter_names
from fluxloop.data.loaders import name_data
from fluxloop.errors import CancelFittingException, CompileError, PhaseError, describe
from fluxloop.events import Event
from fluxloop.guard.assign import put
from fluxloop.guard.given import check_called
from fluxloop.loop import place_in_words
from fluxloop.nested import batch_size
from fluxloop.order.managing import HasCallbacks, listed
from fluxloop.order.weights import Weights
from fluxloop.phase import FittingPhase, Phase
from fluxloop.phases.supervised import TrainingPhase, ValidationPhase
from fluxloop.processes.replicas import agree_on_seed, begin_alike, states_alike
from fluxloop.randomness import check_seed, draw_seed
from fluxloop.run.accelerator import Accelerator, accelerator_or_default
from fluxloop.run.epoch import run_epoch
from fluxloop.run.fit import fit
from fluxloop.run.keeping import KeepsState
from fluxloop.run.looking import Looks
from fluxloop.run.parts import accept, check_loss_fn, meet_parameters, watch_loss, watch_module
from fluxloop.run.session import Running, Session
from fluxloop.run.shown import IsShown
from fluxloop.screen.bars import is_quiet
from fluxloop.state import State

C = TypeVar("C", bound=Callback)

if TYPE_CHECKING:
    import typing_extensions

    from fluxloop.compile.plans import CompiledSteps
    from fluxloop.compute.updates import Updates
    from fluxloop.history import History

    M = typing_extensions.TypeVar("M", default=Any)
else:
    M = TypeVar("M")


class Learner(KeepsState, Looks, HasCallbacks, IsShown, Generic[M]):
    """Holds everything a training is made of: model, optimizer, loss, data, step and callbacks.

    Args:
        model: A module; or several as a mapping of names, a named tuple, or a tuple.
        loss_fn: ``(preds, ys) -> scalar``, a function or a module. A phase with losses of its own needs none.
        data: ``(train,)``, ``(train, valid)``, a mapping with any names, or nothing: then give it to `fit` or `epoch`.
            Any iterable of batches; tensors, arrays and datasets become loaders with batches of 32 rows (see
            `as_dataloader`), shuffled for training.
        optimizer: A factory that takes parameters (or ``named`` ones, or the ``model``; see docs/schedules.md), an
            optimizer, or a mapping of names to either. A factory makes one per model. An `Adam` or `AdamW` that it
            makes is fused where that is possible: results agree with the plain loop's to float tolerance.
            ``fused=False`` gives its bits; so does an optimizer made beforehand, which is left as it is.
        callbacks: In any order.
        default_callbacks: Whether to add `Recorder`, `Metrics`, `ProgressBar`, `MetricsPrinter` and
            `StopOnNaNLoss`; one passed in `callbacks` replaces the default of its type.
        accelerator: Where tensors are computed; left out, the fastest device of the machine.
        seed: Decides all random numbers of the run, 0 … 2**32 - 1. Left out, it is drawn from torch's global generator,
            so that ``torch.manual_seed`` decides.
        quiet: Whether no bar and no line is shown, of any callback; left out, as ``FLUXLOOP_QUIET=1`` says.

    Attributes:
        model: The module, or a named tuple (tuple) of modules: ``learner.model.generator``. A `NamedTuple` of the
            user's keeps its type, for type checkers too.
        weights: Every module by name: ``weights["generator"]``, ``weights["encoder.0"]``, and averaged copies as
            ``weights["generator@ema"]``.
        params: Their parameters, in the same structure.
        optimizer: The optimizer, or a named tuple of them.
        data: What each kind of phase runs on: ``learner.data.training``.
        step: The entries of the running or last step.
        cbstate: What callbacks share.
        history: Counts and metrics per phase, and why the last fit stopped.
        callbacks: The callbacks in their proved order; ``learner.callbacks.explain()`` tells why.
        loss_fn: The loss function; may be replaced at any time.
        models: The modules by name; a single one has the name None.
        accelerator: Where tensors are computed.
        seed: The run's seed.
        quiet: Whether nothing is shown of what runs.
        num_batches: Batches of the running epoch, None where its data does not know.
        num_epochs: How many epochs (cycles) the running fit comes to, those before it too; None outside of a fit.
        fit_phases: What a cycle of the running fit runs, in order; empty outside of a fit.
        phases: The phases that have run, by class.
        scope: The running step, epoch or fit, as `runstep` and `runepoch` give it; None outside of one.
        updates: Who owns which gradient, and how many updates there have been: ``learner.updates.count``.
        streams: The random numbers of the run, by what draws them.
        finite: Ends a fit whose numbers are not finite, where `StopOnNaNLoss` asks for it.

    Raises:
        ModelError: The model is no module, or its names cannot be used.
        OptimizerError: Trainable parameters are in no optimizer, in two, or belong to no model.
        DataError: Data that cannot be loaded.
        CallbackError: The callbacks have no order (one of its kinds).
        CompileError: Steps are to be compiled whole, and a callback needs a moment inside them.

    >>> model, rows = nn.Linear(4, 1), torch.randn(64, 4)
    >>> history = Learner(model, nn.functional.mse_loss, data=((rows, rows[:, :1]),)).fit(1)
    TrainingPhase      epoch 1    loss ...
    """

    def __init__(
        self,
        model: M | Mapping[str, nn.Module],
        loss_fn: Callable[..., Any] | None = None,
        *,
        data: Any = (),
        optimizer: Any = torch.optim.Adam,
        callbacks: Iterable[Callback] = (),
        default_callbacks: bool = True,
        accelerator: Accelerator | None = None,
        seed: int | None = None,
        quiet: bool | None = None,
    ) -> None:
        check_loss_fn(loss_fn)
        self.quiet = is_quiet(quiet)
        self.models = named_models(model)
        self.data: State = name_data(data)
        if not isinstance(default_callbacks, bool):
            raise TypeError(f"default_callbacks={describe(default_callbacks)} was given; expected True or False")
        self.accelerator = accelerator_or_default(accelerator)
        self.loss_fn: Any = loss_fn
        for module in self.modules():
            self.accelerator.place_model(module)
        self.accelerator.shard_models(self.models, loss_fn, optimizer)
        for module in self.models.values():
            self.accelerator.compile_model(module)
        self.model: M = arrange_like(model, self.models)
        self.weights = Weights(self.models, self.model)
        self.params: Any = arrange_like(model, {k: tuple(m.parameters()) for k, m in self.models.items()})
        begin_alike(group := self.accelerator.group, state_of_models(self.models, loss_fn))
        optimizers = states_alike(group, build_optimizers(self.models, optimizer, loss_fn))
        self.optimizer: Any = arrange_like(model, optimizers)
        self._seed_given = seed is not None
        self.seed = agree_on_seed(group, draw_seed() if seed is None else check_seed(seed), self._seed_given)
        self._ledger = Ledger()
        self._running = Running(agrees=group is not None)
        session = Session.begin(self)
        self.callbacks, self.cbstate, self.history = session.callbacks, session.cbstate, session.history
        self.streams, self._host_queue = session.streams, session._host_queue
        self.step, self.phases, self.scope = session.step, session.phases, session.scope
        self.num_batches, self.num_epochs, self.fit_phases = session.num_batches, session.num_epochs, session.fit_phases
        self.updates: Updates = updates_of(self, parameter_names(self.models, loss_fn), optimizers)
        self.finite = self.updates.finite_type(self)
        self._compiled: CompiledSteps | None = None
        if self.accelerator.compile == "step":
            from fluxloop.compile.plans import CompiledSteps

            self._compiled = CompiledSteps(self)
        given = listed(callbacks)
        for module in self.modules():
            watch_module(self, module)
        self._ledger.loss = watch_loss(self, loss_fn)
        self.callbacks.set(with_defaults(given) if default_callbacks else given)
        self._made = True

    _made = False
    """Whether what is assigned is a user's."""

    if not TYPE_CHECKING:  # for type checkers every attribute is as `__init__` says

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an attribute where that takes effect; `loss_fn` and, between fits, `data` may be replaced.

            Raises:
                AssignmentError: There is no such attribute, or it cannot be replaced; says what to type.
            """
            if self._made and name[:1] != "_":
                value = accept(self, name, value, any_name=type(self) is not Learner)
            put(self, name, value)

    def meet_parameters(self) -> None:
        """Note parameters that joined the models, were replaced or unfrozen; a training epoch begins with it.

        Raises:
            OptimizerError: Trainable ones are in no optimizer; says what to type.
        """
        meet_parameters(self, self.loss_fn)

    # Training

    def fit(
        self,
        epochs: int,
        data: Any = None,
        *,
        phases: Iterable[Phase] | None = None,
        resume: str | PathLike[str] | None = None,
        steps_per_epoch: int | None = None,
    ) -> History:
        """Train for `epochs` cycles through `phases`.

        The fit ends early, and returns, when a callback or phase raises `CancelFittingException`,
        and at Ctrl+C (after the running step; pressed twice: at once); ``history.stop_reason``
        says why. An error leaves it. `FitEnd` fires in every case.

        Args:
            epochs: How many cycles; 0 fires the events of a fit alone.
            data: Instead of the learner's, in the same forms.
            phases: What a cycle runs, in order. Left out: `TrainingPhase`, and `ValidationPhase`
                where there is validation data.
            resume: The folder of a `Checkpointer`, or one of its files, to go on from, to the bit.
                `epochs` is the total then, those before the checkpoint too; a run that is complete
                trains nothing. A new or empty folder begins a run.
            steps_per_epoch: How many batches an epoch of each phase has at most: 2 for a dry run.

        Returns:
            ``learner.history``.

        Raises:
            CheckpointError: The folder is no run's, or the checkpoint does not fit this learner;
                nothing is changed.
            PhaseError: Something in `phases` is no phase instance, or cannot run this model.
            DataError: A phase has no data, or an epoch gave no batch.
            LossError: There is no loss function, no scalar, or no gradient.
            ReentrantFitError: Called while this learner is fitting.
        """
        return fit(self, epochs, data, phases, resume, steps_per_epoch)

    def epoch(self, phase: Phase, data: Any = None) -> None:
        """Run one epoch of any phase.

        Args:
            phase: An instance.
            data: Instead of the learner's data for that phase: anything `as_dataloader` takes.

        Raises:
            CancelFittingException: Raised by a callback or phase: there is no fit to end.
        """
        run_epoch(self, phase, data)

    def evaluate(
        self, data: Any = None, *, metrics: Iterable[Any] | None = None, phase: Phase | None = None
    ) -> dict[str, float]:
        """Compute the loss and metrics over data, without a trace in the training.

        Args:
            data: Anything `as_dataloader` takes; left out, the learner's validation data. A loader is run through as
                it is: one with ``drop_last=True`` leaves its last rows out here too.
            metrics: Instead of those of the learner's `Metrics`.
            phase: Instead of `ValidationPhase`.

        Returns:
            Values by the metrics' names: ``{"loss": 0.31, "accuracy": 0.92}``.
        """
        from fluxloop.run.inference import evaluate

        return evaluate(self, data, metrics, phase)

    def predict(self, data: Any, *, phase: Phase | None = None, stack: bool = True) -> Any:
        """Return the model's predictions for all rows, in the data set's order, on the CPU.

        A loader that shuffles, or that leaves out a last batch which is not full, is run through in
        order and to the end. Data that has no order but its own (a list of batches, an iterable
        data set) is run through as it comes.

        Args:
            data: Anything `as_dataloader` takes. Of a batch that is a tuple or list the first item is used; one that is
                a dict is given to the model by names, where these are arguments of its ``forward``.
            phase: Instead of `PredictionPhase`; its step stores ``state.preds``.
            stack: Whether predictions of all batches are joined; False: a list of those of each batch, in the
                loader's order.

        Returns:
            What the model returns, joined over batches along the first dimension, leaf by leaf.

        Raises:
            DataError: The order of the data set cannot be had (a sampler chooses the rows), or the predictions
                cannot be joined.
        """
        from fluxloop.run.inference import predict

        return predict(self, data, phase, stack)

    # Inside a step

    def optimizing(
        self, name: str | int | None = None, *, loss: str | None = None, retain_graph: bool = False
    ) -> UpdateBlock:
        """Open the block in which one optimizer's parameters may change.

        On leaving it with ``block.loss`` set, the gradients of those parameters alone are
        computed and the optimizer steps, between the events of each. Inside, the parameters of
        the other optimizers require no gradient. Left by an exception it changes no parameter.

        Args:
            name: Of the optimizer; None for the only one.
            loss: The name under which the block's loss is recorded, ``"r1"`` for ``"training/r1"``;
                left out, ``"loss_<name>"`` (``"loss"`` for an only optimizer). Where a step opens
                several blocks under one name, the last of their losses is recorded.
            retain_graph: Whether another block's loss needs the same graph.

        Raises:
            OptimizerError: There is no such optimizer, or another block is open.
            LossError: On leaving: the loss is no scalar, has no gradient, or reaches none of the
                optimizer's parameters.

        Example::

            with learner.optimizing("D") as block:
                block.loss = softplus(-D(real)).mean() + softplus(D(fake.detach())).mean()
        """
        return UpdateBlock(self, self.updates.find(name), retain_graph, loss)

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Compute the gradients of a scalar loss.

        Inside an update block these are the gradients of its optimizer's parameters, elsewhere of all parameters that
        the loss reaches. Gradients that an update has used are released first; to others the new ones are added.

        Raises:
            LossError: No scalar, no gradient, or it is unclear whose loss it is.
        """
        self.updates.backward(loss, retain_graph)

    def update(self, name: str | int | None = None, *, closure: Callable[[], Any] | None = None) -> None:
        """Step the optimizer `name`, the open block's, or all in order; fires `UpdateBegin` and `UpdateEnd`.

        A closure is for optimizers that compute gradients several times in a step (`LBFGS`, sharpness-aware
        minimization). `UpdateBegin` is then fired for all gradients: for those that wait when this is called, if any
        do, and for those of each call of the closure, so that each is clipped and looked at. It is one update, with one
        `UpdateEnd`. If anything is raised on the way, the parameters and the optimizer's state are put back.

        Args:
            name: Of the optimizer.
            closure: Computes the loss, calls ``learner.backward(loss)``, and returns it. Gradients
                are released before each call.

        Raises:
            OptimizerError: There is no such optimizer, or it is not the open block's; it needs a
                closure and was given none; or several optimizers would step with one.
        """
        self.updates.update(name, closure)

    def fire(self, event: Event) -> None:
        """Fire an event with the running phase; without one, nobody hears it."""
        if self.scope is not None:
            self.scope.handle(event)

    def defer(self, undo: Callable[[], object], *, early: bool = False) -> None:
        """Call `undo` when the running step, epoch or fit ends, whatever way it ends.

        Args:
            undo: A function without arguments.
            early: Whether it is called only where the step or epoch is left by a cancel or an error, the fit by an
                error.

        Raises:
            PhaseError: Nothing is running.
        """
        check_called("learner.defer", "undo", undo, "a function without arguments")
        if self.scope is None:
            raise PhaseError("learner.defer was called while nothing is running; expected a fit, an epoch or a step")
        self.scope.defer(undo, early)

    def host(self, tensor: Tensor, then: Callable[[Any], object]) -> None:
        """Call ``then(number)`` when a scalar is on the host, without waiting for the device.

        On the CPU that is at once; elsewhere at the end of a later step, at the latest before the epoch ends.
        """
        self._host_queue.request(tensor, then)

    def where(self) -> str:
        """Return where the training stands: ``"TrainingPhase(), epoch 2, step 16 of the run"``, both counted from 1."""
        return "no phase" if self.scope is None else place_in_words(self, self.scope.phase)

    def skip_update(self, when: Tensor) -> None:
        """Leave parameters and optimizers' states as they are in this step where the scalar `when` is true.

        For handlers that are part of a compiled step (``in_compiled_step = "inside"``), which cannot
        ask for a number; the choice is made on the device. Others raise `CancelStepException`.

        Raises:
            CompileError: No step is being compiled.
        """
        raise CompileError(
            "learner.skip_update was called outside of a step that is compiled; expected raise CancelStepException, or "
            "a look at torch.compiler.is_compiling() first"
        )

    def request_stop(self, reason: str) -> None:
        """End the fit before its next batch, once a checkpoint could be written; a later fit goes on from there.

        Args:
            reason: Why, in words for people; kept in ``history.stop_reason``.

        Raises:
            CancelFittingException: No fit is running.
        """
        if not self._running.fitting:
            raise CancelFittingException(reason)
        self._running.ask_to_stop(reason)

    def at_safe_point(self, action: Callable[[], object]) -> None:
        """Call `action` at each moment between two steps or epochs of the running fit, or of the next one, to its end.

        At these moments no step is under way and the state can be kept: ``learner.save(path)``.

        Args:
            action: A function without arguments.
        """
        check_called("learner.at_safe_point", "action", action, "a function without arguments")
        self._running.safe_points.append(action)

    @property
    def cycle(self) -> int | None:
        """Number of the cycle that the running fit is in, from 1, those of former fits too; None outside of a fit."""
        return self.history.cycles + 1 if self.fit_phases else None

    @property
    def trained_steps(self) -> int:
        """Number of training steps that have ended, of all training phases, once `Recorder` has heard of their ends."""
        return self.history.trained_steps

    @property
    def is_accumulating(self) -> bool:
        """Whether batches of ``Accelerator(accumulate=k)`` wait for others, to make one update together."""
        return self.updates.is_open

    @property
    def batch_size(self) -> int:
        """Number of rows of the running or last step."""
        return batch_size(vars(self.step))

    # What there is

    def modules(self) -> list[nn.Module]:
        """List the models, and the loss function where it is a module."""
        return [*self.models.values(), *([self.loss_fn] if isinstance(self.loss_fn, nn.Module) else [])]

    @property
    def optimizer_names(self) -> tuple[str | None, ...]:
        """Names of the optimizers, in order; ``(None,)`` for a single unnamed one."""
        return tuple(slot.name for slot in self.updates.slots)

    def phases_in_use(self) -> list[type[Phase]]:
        """List the phase types that have run or, before any has, those of a plain fit."""
        if self.phases:
            return [FittingPhase, *self.phases]
        return [FittingPhase, TrainingPhase, *([ValidationPhase] if "validation" in self.data else [])]
