"""Where tensors are computed: the device, and the three places of a step that know about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fluxloop.compute.fused import step_optimizer
from fluxloop.compute.gradients import add_gradients
from fluxloop.compute.precision import TYPES, Casting
from fluxloop.compute.shard import Shard
from fluxloop.errors import BatchError, CompileError, describe, did_you_mean
from fluxloop.guard.given import is_number
from fluxloop.nested import map_tensors, move_object
from fluxloop.processes.gather import all_gather
from fluxloop.processes.group import Group, are_several, join, local_rank
from fluxloop.screen.bars import between_bars

USUAL: dict[str, Any] = {
    "precision": "fp32",
    "accumulate": 1,
    "strategy": "auto",
    "compile": False,
    "optimizer_in_backward": False,
    "seed_per_process": True,
    "tf32": None,
    "check_compiled": False,
}
"""What an accelerator is made with where nothing is said."""


class Accelerator:
    """Places models and batches on a device; computes gradients and steps optimizers there.

    ``runstep`` places a step's entries, ``learner.backward`` computes gradients and
    ``learner.update`` steps an optimizer through it. Precision, accumulation and several processes
    are chosen here too, and no phase has a line for them.

    Args:
        device: ``"auto"`` (CUDA, else MPS, else the CPU), or anything ``torch.device`` takes.
        precision: ``"fp32"``: what the tensors are. ``"bf16"``, ``"fp16"``: torch's autocast in training,
            validation and prediction; weights stay as they are; in fp16 losses are scaled (`docs/precision.md`).
        accumulate: How many batches make one update, each weighed by its rows: one number, or one for each
            optimizer by name (`docs/accumulation.md`).
        strategy: How several processes share the work (`docs/processes.md`). ``"auto"``: as ``"replicate"`` where
            ``torchrun`` started several. ``"replicate"``: each has all parameters, and gradients are averaged.
            ``"shard"``, or a `Shard`: each holds a part of them. ``"none"``: each trains alone.
        compile: ``"step"``: forward, loss, backward and update of a step are one compiled graph for
            each shape of batch (`docs/speed.md`); a callback that has to run inside the step is an error.
            ``"model"``: each model's forward is compiled by ``torch.compile``. False: neither.
        optimizer_in_backward: Whether each parameter is stepped as soon as its gradient is complete, and the gradient
            dropped: the same bits, with a fifth to a third less memory for parameters, states and gradients
            (`docs/memory.md`). What needs the gradients after the backward pass is an error.
        seed_per_process: Whether what steps draw differs between processes; the order of the data never does.
        tf32: Whether CUDA multiplies matrices of float32 in TF32, in the whole process; None leaves torch's
            setting. Elsewhere it changes nothing.
        check_compiled: Whether each graph of ``compile="step"`` is compared at its first call with the same operations
            run eagerly on copies; a warning tells the largest difference.

    Raises:
        ValueError: The device is not available on this machine, or another argument is none of these.
    """

    def __init__(
        self,
        device: str | torch.device = "auto",
        *,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        accumulate: int | Mapping[str, int] = 1,
        strategy: Literal["auto", "replicate", "shard", "none"] | Shard = "auto",
        compile: Literal[False, "model", "step"] = False,
        optimizer_in_backward: bool = False,
        seed_per_process: bool = True,
        tf32: bool | None = None,
        check_compiled: bool = False,
    ) -> None:
        _check_compile(compile, check_compiled)
        if precision not in TYPES:
            raise ValueError(
                f"Accelerator(precision={precision!r}) was given; expected 'fp32', 'bf16' or 'fp16'"
                f"{did_you_mean(str(precision), TYPES)}"
            )
        _check_flags(optimizer_in_backward=optimizer_in_backward, seed_per_process=seed_per_process, tf32=tf32)
        _check_strategy(strategy)
        self.device = _choose(device)
        self.compile = compile
        self.precision = precision
        self.accumulate = _as_accumulate(accumulate)
        self.strategy = strategy
        self.optimizer_in_backward = optimizer_in_backward
        self.seed_per_process, self.tf32, self.check_compiled = seed_per_process, tf32, check_compiled
        if tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        if optimizer_in_backward:
            _check_in_backward(self)
            self.backward = _backward_of_learner  # type: ignore[method-assign]  # so that the usual one has no branch
        self.group = _join(self.device, strategy)
        dtype = TYPES[precision]
        self.casting = None if dtype is None else Casting(self.device.type, dtype)
        """Switches autocast on and off; None in fp32."""
        self.sharding = _sharding(strategy, self.group, precision, compile)
        """Shards models, where the strategy says so and there are several processes; else None."""
        if self.sharding is not None:
            self.backward = _backward_through_all  # type: ignore[method-assign]  # so that the usual one has no branch
        self._bind()

    def _bind(self) -> None:
        """Choose functions by what was given: there is nothing to choose here."""

    @property
    def is_plain(self) -> bool:
        """Whether an update is of one batch, of one process, in the weights' own precision."""
        return self.accumulate == 1 and self.precision == "fp32" and self.group is None

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context in which models compute in the precision; steps are in one, handlers are not."""
        return nullcontext() if self.casting is None else self.casting.on()

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return 0 if self.group is None else self.group.rank

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return 1 if self.group is None else self.group.size

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which alone prints and writes."""
        return self.group is None or self.group.is_main

    def place_model(self, model: nn.Module) -> None:
        """Move a module's parameters and buffers to the device, in place."""
        model.to(self.device)

    def shard_models(self, models: Mapping[str | None, nn.Module], loss_fn: Any, optimizer: Any = None) -> None:
        """Shard modules in place, where the strategy says so.

        Args:
            models: By name.
            loss_fn: The loss function; where it is a module, it is sharded too.
            optimizer: What the user gave: optimizers that were made before hold the sharded parameters afterwards.

        Raises:
            ModelError: One cannot be sharded.
            OptimizerError: An optimizer has taken a step already.
        """
        if self.sharding is not None:
            named = dict(models)
            if isinstance(loss_fn, nn.Module):
                named["loss_fn"] = loss_fn
            self.sharding.shard(named, optimizer)

    def compile_model(self, model: nn.Module) -> None:
        """Have torch compile a model's forward, if `compile` is ``"model"``; the model stays the same object."""
        if self.compile != "model":
            return
        # The first torch.compile of a process switches off what all of torch.distributions check, for user code too
        distribution: Any = torch.distributions.Distribution
        checks = distribution._validate_args
        try:
            if hasattr(model, "_compiled_call_impl"):  # a private name of torch's
                # model.compile() would do nothing for torch's own classes, such as Sequential: their code is left alone
                call: Callable[..., Any] = model._call_impl
                model._compiled_call_impl = torch.compile(lambda *args, **kwargs: call(*args, **kwargs))
            else:
                model.compile()
        finally:
            distribution.set_default_validate_args(checks)

    def place(self, entries: dict[str, Any]) -> None:
        """Move every tensor in a step's entries to the device, in nested containers too, and what has ``to(device)``.

        To a CUDA device they are copied by a stream of their own, from pinned memory: while the
        device still computes the steps before, of which the host runs ahead.

        Raises:
            BatchError: An entry cannot be moved; names it.
        """
        device = self.device
        for name, value in entries.items():
            if type(value) is Tensor:
                if value.device != device:
                    entries[name] = self._move(value)
            else:
                try:
                    entries[name] = map_tensors(self._move, value, self._move_object)
                except TypeError as error:
                    raise BatchError(
                        f"the entry {name!r}, {describe(value)}, cannot be moved to the device {str(device)!r}: {error}"
                    ) from error

    def _move_object(self, value: Any) -> Any:
        return move_object(value, self.device)

    def _move(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        if self.device.type != "cuda" or not tensor.is_cpu:
            return tensor.to(self.device, non_blocking=True)
        # Copied by a stream of its own, or the copy would wait for the steps that the device still computes. What the
        # stream of the steps does next waits for the copy; and the memory, which belongs to the stream that made it,
        # is not used again before the step is done with it.
        copies, computes = _copy_stream(self.device), torch.cuda.current_stream(self.device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        with torch.cuda.stream(copies):
            moved = pinned.to(self.device, non_blocking=True)
        computes.wait_stream(copies)
        moved.record_stream(computes)
        return moved

    def backward(
        self,
        loss: Tensor,
        parameters: Sequence[nn.Parameter] | None = None,
        *,
        alone: bool = False,
        retain_graph: bool = False,
    ) -> None:
        """Add the gradients of a scalar loss to ``grad`` of `parameters`.

        Args:
            loss: The loss.
            parameters: Those of the optimizers whose loss it is; in loops of one's own left out: all that the loss
                reaches.
            alone: Whether the loss may be differentiated for all it reaches, because nobody else's
                parameters are to be left out; then some of `parameters` may be frozen.
            retain_graph: Whether another loss needs the same graph.
        """
        add_gradients(loss, None if alone else parameters, retain_graph)

    def update(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> None:
        """Step an optimizer.

        Args:
            optimizer: The optimizer.
            closure: For one that computes gradients itself, several times in a step: computes them, returns the loss.
        """
        step_optimizer(optimizer, closure)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of their numbers; without gradient.

        All processes have to call it. With one process it is the tensor itself.

        Args:
            tensor: Its first dimension are the rows, of which each process may have another number.

        Raises:
            BatchError: In all processes, where the tensors of two cannot be joined.
        """
        if self.group is None:
            return tensor
        with torch.no_grad():
            return all_gather(tensor, self.group)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return what `gather` does, with gradient: for losses that compare rows with each other.

        The gradient of a row is the sum of what the losses of all processes ask of it. Once gradients are averaged over
        the processes, it is that of one process with all rows, with no factor to put in: where each process has
        the loss of its own rows, compared with all, and where all have the loss of all rows.

        Args:
            tensor: Its first dimension are the rows, of which each process may have another number.

        Raises:
            BatchError: In all processes, where the tensors of two cannot be joined.

        Example::

            def loss(self, learner, state):
                z = learner.accelerator.all_gather(state.z)
                return my_loss(z)
        """
        return tensor if self.group is None else all_gather(tensor, self.group)

    def print(self, *things: Any, **options: Any) -> None:
        """Print, in the first process alone; takes what ``print`` takes."""
        if self.is_main:
            with between_bars():
                print(*things, **options)  # noqa: T201 - printing is its purpose

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.group is not None:
            self.group.wait()

    def __repr__(self) -> str:
        other = [f"{name}={value!r}" for name, usual in USUAL.items() if (value := getattr(self, name)) != usual]
        return f"Accelerator({', '.join([f'device={str(self.device)!r}', *other])})"


def _check_flags(**flags: Any) -> None:
    """Raise for something that is neither True nor False; None stands for torch's own setting of tf32.

    Raises:
        ValueError: Says what was given.
    """
    for name, value in flags.items():
        if type(value) is not bool and (value is not None or name != "tf32"):
            raise ValueError(f"Accelerator({name}={value!r}) was given; expected True or False")


def _check_compile(compile: Any, check_compiled: bool) -> None:
    """Raise for an unknown way to compile, and for a comparison of graphs where there are none.

    Raises:
        ValueError: Says what was given.
    """
    if compile not in (False, "model", "step"):
        raise ValueError(f"Accelerator(compile={compile!r}) was given; expected False, 'model' or 'step'")
    _check_flags(check_compiled=check_compiled)
    if check_compiled and compile != "step":
        raise ValueError(
            f"Accelerator(check_compiled={check_compiled!r}, compile={compile!r}) was given; expected compile='step', "
            "whose graphs are what it compares"
        )


def _as_accumulate(accumulate: Any) -> Any:
    """Return numbers of batches as Python's: windows are kept in checkpoints, which NumPy's could not be read from.

    Raises:
        ValueError: Says what was given.
    """
    each = accumulate.values() if isinstance(accumulate, Mapping) else [accumulate]
    for number in each:
        if not is_number(number, whole=True) or number < 1:
            raise ValueError(
                f"Accelerator(accumulate={accumulate!r}) was given; expected how many batches make one update, a whole "
                "number from 1, or one for each optimizer: accumulate={'G': 4, 'D': 1}"
            )
    if isinstance(accumulate, Mapping):
        return {name: int(number) for name, number in accumulate.items()}
    return int(accumulate)


def _check_strategy(strategy: object) -> None:
    """Raise for something that does not say how processes share the work.

    Raises:
        ValueError: Says what was given.
    """
    if strategy not in STRATEGIES and not isinstance(strategy, Shard):
        raise ValueError(
            f"Accelerator(strategy={strategy!r}) was given; expected "
            f"{', '.join(map(repr, STRATEGIES))} or a Shard: strategy=Shard(units=Block)"
        )


def _check_in_backward(accelerator: Accelerator) -> None:
    """Raise for an accelerator whose gradients are not those of an update yet when a backward pass has computed them.

    Raises:
        ValueError: Says what was given with ``optimizer_in_backward=True``.
    """
    accumulate = accelerator.accumulate
    each = set(accumulate.values()) if isinstance(accumulate, Mapping) else {accumulate}
    if each - {1}:
        given, why = f"accumulate={accumulate!r}", "gradients of several batches are added up; expected accumulate=1"
    elif accelerator.precision == "fp16":
        given, why = "precision='fp16'", "all gradients are looked at before an update; expected precision='bf16'"
    elif accelerator.compile:
        given = f"compile={accelerator.compile!r}"
        why = "a graph computes the gradients of a model in one piece; expected compile=False"
    elif accelerator.strategy != "none" and are_several():
        given, why = "several processes", "gradients are added up over them; expected strategy='none'"
    else:
        return
    raise ValueError(
        f"Accelerator(optimizer_in_backward=True) was given with {given}: {why}, or optimizer_in_backward=False"
    )


def _backward_of_learner(
    loss: Tensor, parameters: Sequence[nn.Parameter] | None = None, *, alone: bool = False, retain_graph: bool = False
) -> None:
    """Add the gradients of a scalar loss to ``grad`` of `parameters`, which the optimizers of a learner step meanwhile.

    Raises:
        ValueError: It is called in a loop of one's own.
    """
    if parameters is None:
        raise ValueError(
            "accelerator.backward was called with Accelerator(optimizer_in_backward=True), which a learner alone does; "
            "expected optimizer_in_backward=False"
        )
    add_gradients(loss, None if alone else parameters, retain_graph)


def _backward_through_all(
    loss: Tensor, parameters: Sequence[nn.Parameter] | None = None, *, alone: bool = False, retain_graph: bool = False
) -> None:
    """Add the gradients of a scalar loss to ``grad`` of all that it reaches, as sharded parameters want it."""
    add_gradients(loss, None, retain_graph)


def _sharding(strategy: str | Shard, group: Group | None, precision: str, compiled: object) -> Any:
    """Make what shards models; None where nothing is to be sharded.

    Raises:
        CompileError: Steps or models are to be compiled as well.
    """
    if group is None or not (strategy == "shard" or isinstance(strategy, Shard)):
        return None
    if compiled:
        raise CompileError(
            f"Accelerator(compile={compiled!r}) was given with sharded parameters, which are gathered between the "
            "parts of a step; expected compile=False, or strategy='replicate'"
        )
    from fluxloop.compute.sharding import Sharding  # takes a while, and most learners need none of it

    return Sharding(strategy if isinstance(strategy, Shard) else Shard(), group, precision)


def _join(device: torch.device, strategy: str | Shard) -> Group | None:
    """Join the other processes, where there are some and the strategy wants them."""
    return None if strategy == "none" or not are_several() else join(device)


STRATEGIES = ("auto", "replicate", "shard", "none")
"""How several processes share the work. With one process there is nothing to share, and each of them does alike."""


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that copies batches to a CUDA device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types there


def _choose(device: str | torch.device) -> torch.device:
    """Resolve ``"auto"``; add its index to a CUDA device, so that it equals the device of its tensors."""
    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
        else:
            device = "cpu"
    expected = "expected 'auto' or 'cpu', or a device that this machine has"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} was given; {expected}") from error
    available: dict[str, Callable[[], bool]]
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "xpu": torch.xpu.is_available}
    if chosen.type in available and not available[chosen.type]():
        raise ValueError(f"device={str(device)!r} was given, but {chosen.type.upper()} is not available; {expected}")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r} was given, and there are {torch.cuda.device_count()} GPUs; {expected}"
        )
    if chosen.index is None and chosen.type in ("cuda", "mps"):
        chosen = torch.device(chosen.type, _own_gpu() if chosen.type == "cuda" else 0)
    return chosen


def _own_gpu() -> int:
    """Return the number of the GPU of this process: each of those that ``torchrun`` started on a machine has its own.

    Raises:
        ValueError: There are more processes than GPUs.
    """
    rank, count = local_rank(), torch.cuda.device_count()
    if rank is None or count == 1:  # a launcher may show each process its own GPU alone
        return torch.cuda.current_device()
    if rank >= count:
        raise ValueError(
            f"this is process {rank + 1} of its machine (LOCAL_RANK={rank}), which has {count} GPUs; expected a GPU "
            f"for each: torchrun --nproc-per-node {count}"
        )
    return rank
