"""The learner: holds all state of a training, and is what users call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from fluxloop.callback import Callback
from fluxloop.callbacks.defaults import with_defaults
from fluxloop.checkpoint.folder import read, write
from fluxloop.checkpoint.gathering import gather
from fluxloop.checkpoint.ledger import Ledger
from fluxloop.checkpoint.manifest import Manifest, manifest
from fluxloop.checkpoint.misfits import check_fits
from fluxloop.checkpoint.restoring import restore
from fluxloop.checkpoint.weights_file import load_weights
from fluxloop.compute.accelerator import Accelerator
from fluxloop.compute.blocks import UpdateBlock
from fluxloop.compute.finite import Finite
from fluxloop.compute.models import like, named_models
from fluxloop.compute.optimizers import build_optimizers, parameter_names
from fluxloop.compute.updates import Updates
from fluxloop.data.loaders import name_data
from fluxloop.errors import (
    AssignmentError,
    CallbackTypeError,
    CancelFittingException,
    CheckpointError,
    CompileError,
    LossError,
    PhaseError,
    describe,
)
from fluxloop.events import Event
from fluxloop.guard.assign import FIXED, check_known, put
from fluxloop.guard.given import as_path, check_called, check_number
from fluxloop.loop import place_in_words
from fluxloop.nested import batch_size
from fluxloop.order.owners import owners_of
from fluxloop.order.weights import Weights
from fluxloop.persist.owners import of_learners
from fluxloop.persist.walk import Walk
from fluxloop.persist.watched import Watched
from fluxloop.phase import FittingPhase, Phase
from fluxloop.phases.supervised import TrainingPhase, ValidationPhase
from fluxloop.randomness import check_seed, draw_seed
from fluxloop.run.epoch import run_epoch
from fluxloop.run.fit import fit
from fluxloop.run.inference import evaluate, predict
from fluxloop.run.scope import place_of
from fluxloop.run.session import Running, Session, copy_at_rest
from fluxloop.state import State

C = TypeVar("C", bound=Callback)

if TYPE_CHECKING:
    import typing_extensions

    from fluxloop.compile.plans import CompiledSteps
    from fluxloop.history import History
    from fluxloop.run.summary import Summary

    M = typing_extensions.TypeVar("M", default=Any)
else:
    M = TypeVar("M")


class Learner(Generic[M]):
    """Holds everything a training is made of: model, optimizer, loss, data, step and callbacks.

    Args:
        model: A module; or several as a mapping of names, a named tuple, or a tuple.
        loss_fn: ``(preds, ys) -> scalar``, a function or a module. A phase with losses of its own
            needs none.
        data: ``(train,)``, ``(train, valid)``, a mapping with any names, or nothing: then give it
            to `fit` or `epoch`. Any iterable of batches; tensors, arrays and datasets become
            loaders with batches of 32 rows (see `as_dataloader`), shuffled for training.
        optimizer: A factory that takes parameters (a class, a ``functools.partial``), an
            optimizer, or a mapping of names to either. A factory makes one optimizer per model. An
            `Adam` or `AdamW` that it makes is fused where that is possible: results agree with the
            plain loop's to float tolerance. ``fused=False`` in the factory gives its bits; so does
            an optimizer made beforehand, which is left as it is.
        callbacks: In any order.
        default_callbacks: Whether to add `Recorder`, `Metrics`, `ProgressBar`, `MetricsPrinter` and
            `StopOnNaNLoss`; one passed in `callbacks` replaces the default of its type.
        accelerator: Where tensors are computed; left out, the fastest device of the machine.
        seed: Decides all random numbers of the run, 0 … 2**32 - 1. Left out, it is drawn from
            torch's global generator, so that ``torch.manual_seed`` decides.

    Attributes:
        model: The module, or a named tuple (tuple) of modules: ``learner.model.generator``. A
            `NamedTuple` of the user's keeps its type, for type checkers too.
        weights: Every module by name: ``weights["generator"]``, ``weights["encoder.0"]``, and
            averaged copies as ``weights["generator@ema"]``.
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
    ) -> None:
        _check_loss_fn(loss_fn)
        self.models = named_models(model)
        self.data: State = name_data(data)
        if not isinstance(default_callbacks, bool):
            raise TypeError(f"default_callbacks={describe(default_callbacks)} was given; expected True or False")
        if accelerator is not None and not isinstance(accelerator, Accelerator):
            raise TypeError(
                f"accelerator={accelerator!r} was given; expected an Accelerator: accelerator=Accelerator('cpu')"
            )
        self.accelerator = Accelerator() if accelerator is None else accelerator
        self.loss_fn: Any = loss_fn
        for module in self.modules():
            self.accelerator.place_model(module)
        for module in self.models.values():
            self.accelerator.compile_model(module)
        self.model: M = like(model, self.models)
        self.weights = Weights(self.models, self.model)
        self.params: Any = like(model, {k: tuple(m.parameters()) for k, m in self.models.items()})
        optimizers = build_optimizers(self.models, optimizer, loss_fn)
        self.optimizer: Any = like(model, optimizers)
        self._seed_given = seed is not None
        self.seed = draw_seed() if seed is None else check_seed(seed)
        self._ledger = Ledger()
        self._running = Running()
        session = Session.begin(self)
        self.callbacks, self.cbstate, self.history = session.callbacks, session.cbstate, session.history
        self.streams, self._host_queue = session.streams, session._host_queue
        self.step, self.scope = session.step, session.scope
        self.phases, self.fit_phases, self.num_epochs = session.phases, session.fit_phases, session.num_epochs
        self.num_batches = session.num_batches
        self.updates = Updates(self, parameter_names(self.models, loss_fn), optimizers)
        self.finite = Finite(self)
        self._compiled: CompiledSteps | None = None
        if self.accelerator.compile == "step":
            from fluxloop.compile.plans import CompiledSteps

            self._compiled = CompiledSteps(self)
        given = listed(callbacks)
        for module in self.modules():
            self._watch(module)
        self._ledger.loss = self._kept_loss(loss_fn)
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
                if name == "data":
                    value = self._new_data(value)
                elif name == "loss_fn":
                    self._prepare_loss(value)
                elif type(self) is Learner or name in FIXED:
                    check_known(self, name, value)
            put(self, name, value)

    def _new_data(self, data: Any) -> State:
        """Name and load data that replaces the learner's.

        Raises:
            AssignmentError: An epoch or a fit is running.
            DataError: It cannot be loaded.
        """
        if self._running.fitting or self._running.phase is not None:
            raise AssignmentError(
                "learner.data was assigned during a fit or an epoch, which ends with the data it began with; give it "
                "to the next one: learner.fit(epochs, data), or end this one first: learner.request_stop('new data')"
            )
        return data if isinstance(data, State) else name_data(data)

    def _prepare_loss(self, loss_fn: Any) -> None:
        """Get a loss function ready to replace the learner's.

        Raises:
            LossError: It is none.
            OptimizerError: It has trainable parameters that are in no optimizer.
        """
        _check_loss_fn(loss_fn)
        self._meet(loss_fn)
        if isinstance(loss_fn, nn.Module) and loss_fn is not self.loss_fn:
            self.accelerator.place_model(loss_fn)
            self._watch(loss_fn)
        self._ledger.loss = self._kept_loss(loss_fn)

    def meet_parameters(self) -> None:
        """Take note of parameters that joined the models, were replaced or unfrozen; a training epoch begins with it.

        Raises:
            OptimizerError: Trainable ones are in no optimizer; says what to type.
        """
        self._meet(self.loss_fn)

    def _meet(self, loss_fn: Any) -> None:
        if self.updates.rename(parameter_names(self.models, loss_fn)):
            params: Any = like(self.weights.given, {k: tuple(m.parameters()) for k, m in self.models.items()})
            put(self, "params", params)
            for module in self.models.values():
                self.accelerator.place_model(module)
                self._watch(module)

    def _watch(self, module: nn.Module) -> None:
        """Look at the parts of a module that are new, so that changes of their attributes are seen."""
        of_learners.update(module.modules())
        known = self._ledger.modules.get(module)
        if known is None:
            self._ledger.modules[module] = Walk(
                dict(module.named_modules()), type(module).__name__, owners_of(self), parts=True
            )
        else:
            known.join(dict(module.named_modules()), owners_of(self))

    def _kept_loss(self, loss_fn: object) -> Watched | None:
        """Look at a loss function of which a checkpoint may keep something; None for others."""
        plain = loss_fn is None or isinstance(loss_fn, (nn.Module, BuiltinFunctionType))
        return None if plain else Watched(loss_fn, "loss_fn", owners_of(self))

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
        return evaluate(self, data, metrics, phase)

    def predict(self, data: Any, *, phase: Phase | None = None, stack: bool = True) -> Any:
        """Give the model's predictions for all rows, in the data set's order, on the CPU.

        A loader that shuffles, or that leaves out a last batch which is not full, is run through in
        order and to the end. What has no order but its own (a list of batches, an iterable data
        set) is taken as it comes.

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

        Inside an update block those of its optimizer's parameters, else of all it reaches. What a
        former update consumed is released first; what was not is added to.

        Raises:
            LossError: No scalar, no gradient, or it is unclear whose loss it is.
        """
        self.updates.backward(loss, retain_graph)

    def update(self, name: str | int | None = None, *, closure: Callable[[], Any] | None = None) -> None:
        """Step the optimizer `name`, the open block's, or all in order; fires `UpdateBegin` and `UpdateEnd`.

        With a closure, for optimizers that compute gradients several times in a step (`LBFGS`,
        sharpness-aware minimization), `UpdateBegin` is fired for each of them: for those that wait
        when this is called, if any do, and for those of each call of the closure. So each is clipped
        and looked at. It is one update, with one `UpdateEnd`. If anything is raised on the way, the
        parameters and the optimizer's state are put back.

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

        On the CPU that is at once; elsewhere at the end of a later step, at the latest before the
        epoch ends.
        """
        self._host_queue.request(tensor, then)

    def where(self) -> str:
        """Say where the training stands: ``"TrainingPhase(), epoch 2, step 16 of the run"``, both counted from 1."""
        return "no phase" if self.scope is None else place_in_words(self, self.scope.phase)

    def skip_update(self, when: Tensor) -> None:
        """Have parameters and optimizers' states stay as they are in this step where the scalar `when` is true.

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
        self._running.stop_requested = reason

    def at_safe_point(self, action: Callable[[], object]) -> None:
        """Call `action` at each moment between two steps or epochs of the running fit, or of the next one, to its end.

        At these moments no step is under way and the state can be kept: ``learner.save(path)``.

        Args:
            action: A function without arguments.
        """
        check_called("learner.at_safe_point", "action", action, "a function without arguments")
        self._running.safe_points.append(action)

    # Keeping

    def place(self) -> dict[str, Any] | None:
        """Give where the running fit stands in its phases and its data, as plain data; None where none can be resumed.

        Raises:
            CheckpointError: In the middle of a step, or of an epoch that cannot be resumed there.
        """
        return place_of(self)

    def state_dict(self) -> dict[str, Any]:
        """Give the whole state as plain data and tensors, from which a run goes on to the bit.

        As with ``Module.state_dict()`` the tensors are those in use; ``copy.deepcopy`` makes a copy.

        Raises:
            CheckpointError: Something cannot be kept, or a step is under way.
        """
        return gather(self, self.place())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put everything where `state_dict` found it; an epoch that was under way is not continued.

        Raises:
            CheckpointError: It does not fit this learner; nothing is changed.
        """
        check_fits(self, state)
        restore(self, state, begun=True)

    def save(self, path: str | PathLike[str]) -> None:
        """Write `state_dict` to a file, which is either complete or not there.

        Raises:
            CheckpointError: It cannot be written, or something cannot be kept.
        """
        file = as_path("learner.save", "path", path, CheckpointError)
        if file.is_dir():
            raise CheckpointError(f"learner.save({str(file)!r}) was given a folder; expected a file: 'weights.pt'")
        write(file, self.state_dict())

    def load(self, path: str | PathLike[str]) -> None:
        """Go on from what `save` or a `Checkpointer` wrote: weights, optimizers, counts, callbacks, random streams.

        To continue an interrupted run use ``fit(epochs, resume=folder)``; for weights alone `load_weights`.

        Raises:
            CheckpointError: The file is damaged, or does not fit this learner; nothing is changed.
        """
        self.load_state_dict(read(as_path("learner.load", "path", path, CheckpointError)))

    def load_weights(self, path: str | PathLike[str], name: str = "model", *, strict: bool = True) -> list[str]:
        """Take weights from a file, for a warm start: counts, schedules and optimizers stay as they are.

        Averages of those weights (`EMA`, `StochasticWeightAveraging`) begin with the loaded ones, and an
        optimizer with ``train()`` and ``eval()``, which keeps weights of its own, begins anew.

        Args:
            path: What `save` or a `Checkpointer` wrote, or ``torch.save(module.state_dict(), path)``.
            name: Whose, as in ``learner.weights[name]``; ``"model"`` stands for all models.
            strict: Whether all names and shapes have to agree; else those that do are taken.

        Returns:
            The names of tensors that were not taken, those that are missing too.

        Raises:
            CheckpointError: The file is damaged or does not fit; nothing is changed.
        """
        left = load_weights(
            self, read(as_path("learner.load_weights", "path", path, CheckpointError), weights_only=True), name, strict
        )
        self.weights.begin_anew(name)
        loaded = {parameter for module in self._named(name) for parameter in module.parameters()}
        for mode in self.updates.modes:
            if not loaded.isdisjoint(mode.parameters):
                mode.begin_anew()
        return left

    def _named(self, name: str) -> list[nn.Module]:
        """List the modules of a name, all models for ``"model"``."""
        return list(self.models.values()) if name == "model" else [self.weights[name]]

    def checkpoint_manifest(self) -> Manifest:
        """List what a checkpoint keeps: path, owner, kind and size in bytes of each part; prints as a table.

        Raises:
            CheckpointError: Something cannot be kept.
        """
        return manifest(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Learner[M]:
        """Copy everything; the copy trains to the same bits.

        What PyTorch leaves out where it copies is copied too: gradients that wait for an update, hooks of
        parameters and of optimizers. A phase goes on in the copy from where it is here. In the copy nothing is
        running, also where a fit of the original is.

        Raises:
            ModelError: A module keeps a tensor that torch does not copy, as the old ``spectral_norm`` does.
        """
        return copy_at_rest(self, memo)

    def __reduce_ex__(self, protocol: object) -> Any:
        """Raise: a learner has functions, open files and views that belong to its process.

        Raises:
            CheckpointError: Always; says what to do instead.
        """
        raise CheckpointError(
            "a learner cannot be pickled; write its state, learner.save('state.pt'), and in the other process make the "
            "learner anew and learner.load('state.pt'). A copy in this process: copy.deepcopy(learner)"
        )

    @property
    def cycle(self) -> int | None:
        """Number of the cycle that the running fit is in, from 1, those of former fits too; None outside of a fit."""
        return self.history.cycles + 1 if self.fit_phases else None

    @property
    def trained_steps(self) -> int:
        """Number of training steps that have ended, of all training phases, once `Recorder` has heard of their ends."""
        return self.history.trained_steps

    @property
    def batch_size(self) -> int:
        """Number of rows of the running or last step."""
        return batch_size(vars(self.step))

    def check(self, batch: Any = None, *, phases: Iterable[Phase] | None = None) -> list[str]:
        """Run one step of each phase on the side, before a fit, and list what is wrong.

        Finds what a phase raises on its first batch, and a block's loss that also reaches another
        optimizer's parameters through a forgotten ``detach``, and where. Each phase is run by
        itself, without the callbacks, so one that needs an entry of a callback's is listed too.
        Everything is put back: weights, buffers, optimizers, data order and random numbers; the
        phases are copied, and the copies run.

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

    # Callbacks

    def add_callback(self, callback: Callback) -> None:
        """Add a callback; takes effect at the next event.

        Raises:
            CallbackError: The callbacks would have no order; nothing is changed.
        """
        self.callbacks.set([*self.callbacks.given(), callback])

    def get_callback(self, cls: type[C]) -> C | None:
        """Give the callback of a class (unwrapped), or None."""
        return cast("C | None", self.callbacks.get(_class(cls)))

    def replace_callback(self, callback: Callback) -> Callback | None:
        """Put a callback in the place of the one of its type, or add it; give the replaced one, or None.

        Raises:
            CallbackError: The callbacks would have no order; nothing is changed.
        """
        if not isinstance(callback, Callback):
            self.callbacks.set([*self.callbacks.given(), callback])  # raises, and says what was expected
        kind = type(callback.unwrapped)
        old = self.callbacks.get(kind) or next(
            (c for c in self.callbacks if isinstance(callback.unwrapped, type(c))), None
        )
        self.callbacks.set([*(c for c in self.callbacks.given() if c.unwrapped is not old), callback])
        return old

    def remove_callback(self, cls: type[C]) -> C | None:
        """Remove the callback of a class; give it, or None.

        Raises:
            CallbackError: Another callback needs what it provides; nothing is changed.
        """
        old = self.callbacks.get(_class(cls))
        if old is not None:
            self.callbacks.set([c for c in self.callbacks.given() if c.unwrapped is not old])
        return cast("C | None", old)

    def set_callbacks(self, callbacks: Iterable[Callback]) -> None:
        """Put these callbacks in the place of all, default ones included.

        Raises:
            CallbackError: They have no order; nothing is changed.
        """
        self.callbacks.set(listed(callbacks))

    # What there is

    def modules(self) -> list[nn.Module]:
        """List the models, and the loss function where it is a module."""
        return [*self.models.values(), *([self.loss_fn] if isinstance(self.loss_fn, nn.Module) else [])]

    @property
    def optimizer_names(self) -> tuple[str | None, ...]:
        """Names of the optimizers, in order; ``(None,)`` for a single unnamed one."""
        return tuple(slot.name for slot in self.updates.slots)

    def summary(self, batch: Any = None, depth: int | None = None) -> Summary:
        """Tell the modules with output shapes and parameters, and the optimizers; prints as a table.

        A single model is run on one batch on the side: in eval mode, without gradients; nothing is moved.

        Args:
            batch: Left out, the first of the training data.
            depth: How deep to go into modules; left out, to the end.
        """
        from fluxloop.run.summary import summary

        if depth is not None:
            check_number("learner.summary", "depth", depth, least=0, whole=True)
        return summary(self, batch, depth)

    def phases_in_use(self) -> list[type[Phase]]:
        """List the phase types that have run or, before any has, those of a plain fit."""
        if self.phases:
            return [FittingPhase, *self.phases]
        validation: list[type[Phase]] = [ValidationPhase] if "validation" in self.data else []
        return [FittingPhase, TrainingPhase, *validation]

    def __repr__(self) -> str:
        models = ", ".join(
            type(m).__name__ if name is None else f"{name}: {type(m).__name__}" for name, m in self.models.items()
        )
        lines = [
            f"Learner({models}; seed={self.seed}, {self.accelerator.device})",
            f"  data: {', '.join(vars(self.data)) or 'none'}",
            f"  callbacks: {' → '.join(self.callbacks.order) or 'none'}",
        ]
        return "\n".join(lines)


def _check_loss_fn(loss_fn: object) -> None:
    """Raise `LossError` for something that cannot be called as a loss function is."""
    if loss_fn is not None and (not callable(loss_fn) or isinstance(loss_fn, type)):
        hint = f": {loss_fn.__name__}()" if isinstance(loss_fn, type) else ""
        raise LossError(
            f"loss_fn={describe(loss_fn)} was given; expected a function (preds, ys) -> scalar, or a module{hint}"
        )


def listed(callbacks: Any) -> list[Any]:
    """Raise `CallbackTypeError` for a single callback where several belong."""
    if isinstance(callbacks, (Callback, type)):
        raise CallbackTypeError(f"callbacks={describe(callbacks)} was given; expected several: callbacks=[...]")
    try:
        return list(callbacks)
    except TypeError as error:
        raise CallbackTypeError(
            f"callbacks={describe(callbacks)} was given; expected several: callbacks=[...]"
        ) from error


def _class(cls: object) -> Any:
    if not (isinstance(cls, type) and issubclass(cls, Callback)):
        raise CallbackTypeError(f"{describe(cls)} was given; expected the class of a callback, e.g. Recorder")
    return cls
