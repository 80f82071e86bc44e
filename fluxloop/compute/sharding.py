"""Sharded parameters: which parts of a model are gathered together, and what torch's ``fully_shard`` needs in a step.

Each process keeps a part of every parameter, of its gradient and of what the optimizer holds for it. A *unit*, a part
of a model, has its parameters whole while it computes, and only then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fluxloop.compute.models import state_of_models
from fluxloop.compute.shard import Shard
from fluxloop.compute.units import by_size, has_parameters, roots_of, runnable, shared_beyond
from fluxloop.errors import ModelError, OptimizerError, sentence
from fluxloop.nested import local_part, sharded_like, tensors
from fluxloop.processes.group import Group
from fluxloop.processes.replicas import begin_alike

CANNOT_SHARD = (ValueError, AssertionError, RuntimeError, NotImplementedError)
"""What torch raises for modules that it cannot shard."""


class Sharding:
    """Shards models as a `Shard` says.

    Args:
        policy: What the user gave.
        group: The processes.
        precision: That of the accelerator: with ``"bf16"`` parameters are gathered in it.

    Raises:
        ValueError: The processes cannot be divided into so many copies.
        RuntimeError: Torch is too old.
    """

    def __init__(self, policy: Shard, group: Group, precision: str) -> None:
        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
            raise RuntimeError(
                f"sharded parameters need a newer torch than {torch.__version__}, whose fully_shard adds up gradients "
                "without dividing them; expected 2.9 or later, or Accelerator(strategy='replicate')"
            )
        self.policy = policy
        self.group = group
        self._mesh = _mesh(policy.num_replicas(group.size), group)
        self._half = precision == "bf16"

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharding:
        """Return itself: nothing in it changes."""
        return self

    def shard(self, models: Mapping[str | None, nn.Module], optimizer: Any = None) -> None:
        """Shard modules in place; what has no parameters, or is sharded by this already, is left as it is.

        All processes begin with the weights of the first one.

        Args:
            models: By name, on the device of the group.
            optimizer: What the user gave; optimizers that were made before hold the sharded parameters afterwards.

        Raises:
            ModelError: A module cannot be sharded.
            OptimizerError: An optimizer has taken a step already.
        """
        roots = {
            name: root
            for model_name, model in models.items()
            for name, root in roots_of(model_name or "model", model)
            if sharded_model(root) is None
        }
        _check(roots)
        _check_new(optimizer)
        units = {name: self._units(name, root) for name, root in roots.items()}
        blueprints = {name: _blueprint(root) for name, root in roots.items()}
        before = [parameter for root in roots.values() for parameter in root.parameters()]
        begin_alike(self.group, [entry for name, root in roots.items() for entry in state_of_models({name: root})])
        for name, root in roots.items():
            self.apply(name, root, units[name], blueprints[name])
        after = [parameter for root in roots.values() for parameter in root.parameters()]
        _hold_sharded(optimizer, dict(zip(before, after, strict=True)))

    def _units(self, name: str, root: nn.Module) -> list[str]:
        """Choose the parts of a root that are gathered by themselves."""
        parts = {path: part for path, part in root.named_modules() if path and has_parameters(part)}
        policy = self.policy
        if policy.units:
            kinds = tuple(each for each in policy.units if isinstance(each, type))
            patterns = [each for each in policy.units if isinstance(each, str)]
            names = {path: (path, f"{name}.{path}") for path in parts}
            chosen = {
                path
                for path, part in parts.items()
                if isinstance(part, kinds) or any(fnmatchcase(n, p) for n in names[path] for p in patterns)
            }
        elif policy.min_parameters is None:
            chosen = {path for path, _ in root.named_children()}
        else:
            chosen = by_size(root, policy.min_parameters)
        if not policy.units:
            chosen -= {path for path in chosen if shared_beyond(root, path)}
        for path in sorted(chosen):
            shared = shared_beyond(root, path)
            if shared is not None:
                raise ModelError(
                    f"{name}.{shared[0]} is held by {shared[1]!r} too, which is not in the unit {path!r}; expected "
                    "what shares parameters in one unit, or in none: Shard(units=...)"
                )
        if self._half:  # the statistics of a batch norm are in single precision, and its parameters have to be, too
            chosen |= {path for path, part in parts.items() if isinstance(part, _BatchNorm)}
        chosen = {inner for path in chosen if path in parts for inner in runnable(path, parts[path])}
        return [path for path in parts if path in chosen]

    def apply(
        self, name: str, root: nn.Module, units: Sequence[str], blueprint: nn.Module | None, fill: bool = False
    ) -> ShardedModel:
        """Shard a module in place.

        Args:
            name: What messages call it.
            root: The module.
            units: The paths of its parts that are gathered by themselves.
            blueprint: A copy of it, not sharded and without numbers, of which copies are made; None where it has none.
            fill: Whether it has no numbers either, and gets memory for them.

        Raises:
            ModelError: torch cannot shard it.
        """
        kind = type(root).__name__
        # On the CPU memory is the host's anyway, and without a device there is none to pin it for
        pinned = self.group.device.type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.policy.offload else OffloadPolicy()
        shard: Callable[..., Any] = partial(
            fully_shard, mesh=self._mesh, reshard_after_forward=True, offload_policy=offload
        )
        try:
            for path in sorted(units, key=lambda path: -path.count(".")):  # the innermost first
                part = root.get_submodule(path)
                shard(part, mp_policy=self._precision(part))
            shard(root, mp_policy=self._precision(root))
            if fill:
                root.to_empty(device="cpu" if self.policy.offload else self.group.device)
            begin: Any = getattr(_state(root), "_lazy_init", None)
            if begin is not None:  # a private name: without it, no part may be called before the whole has been
                begin()
        except CANNOT_SHARD as error:
            raise ModelError(
                f"{name} ({kind}) cannot be sharded: {sentence(str(error))} Shard(units=...) says which "
                "parts of a model are gathered together"
            ) from error
        return ShardedModel(name, root, tuple(units), self, blueprint)

    def _precision(self, part: nn.Module) -> MixedPrecisionPolicy:
        half = self._half and not isinstance(part, _BatchNorm)
        dtype, reduced = (torch.bfloat16, torch.float32) if half else (None, None)
        return MixedPrecisionPolicy(dtype, reduced, cast_forward_inputs=False)  # autocast does that


class ShardedModel:
    """A sharded module, and what a step has to know of it.

    Args:
        name: What messages call it.
        module: The module.
        units: The paths of its parts that are gathered by themselves.
        sharding: What has sharded it.
        blueprint: A copy of it, not sharded and without numbers.

    Attributes:
        parameters: Its parameters, sharded. While a unit computes, the module has whole ones in their place.
        is_open: Whether a gradient of a gradient is under way, for which parameters stay whole.
        reached: Whether the running backward pass has come to an output.
        output: The newest output with a graph, until a backward pass has used it.
    """

    def __init__(
        self, name: str, module: nn.Module, units: tuple[str, ...], sharding: Sharding, blueprint: nn.Module | None
    ) -> None:
        self.name = name
        self.module = module
        self.units = units
        self.sharding = sharding
        self.blueprint = blueprint
        self.parameters = tuple(module.parameters())
        self.is_open = self.reached = False
        self.output: Tensor | None = None
        self._parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
        for path, part in module.named_modules():
            if isinstance(part, FSDPModule):
                # Sums over processes, no means: their batches may weigh differently
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # else a multiplication by 1 that gloo does not know
                part.register_forward_hook(self._follow)  # type: ignore[attr-defined]  # it is a module
                type(part).__deepcopy__ = _copy_part  # type: ignore[attr-defined]  # of a class that torch made
            elif part._parameters:
                part.register_forward_pre_hook(partial(_check_whole, name, path))
            if part._parameters:
                part.register_load_state_dict_pre_hook(_take_whole)
            _sharded[part] = ref(self)

    def _follow(self, part: nn.Module, inputs: Any, output: Any) -> None:
        """Take note of what a unit has computed, and of when a backward pass comes there."""
        if torch.is_grad_enabled():
            for tensor in tensors(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(self._meet)  # type: ignore[no-untyped-call]  # torch has no types there
                    self.output = tensor

    def _meet(self, gradient: Tensor) -> None:
        self.reached = True
        if torch.is_grad_enabled() and not self.is_open:  # a graph of this pass is made, to be differentiated in turn
            self.is_open = True
            for part in self._parts:
                part.set_reshard_after_backward(False, recurse=False)

    def begin_backward(self) -> None:
        """Make ready for a backward pass that ends a graph."""
        self.reached = False
        if self.is_open:  # whatever has run since may have given parameters up that the inner pass has saved
            for part in self._parts:
                part.unshard()

    def end_backward(self, is_own: bool) -> None:
        """Send what a backward pass has computed and not sent; shard again what has been kept whole.

        Args:
            is_own: Whether gradients of this model were asked for.
        """
        output, self.output = self.output, None
        if is_own and not self.reached and output is not None:
            # The loss reaches parameters and none of the outputs, as a penalty alone does: torch sends gradients only
            # when it has come to an output. So it is told that it has, with a pass that ends there.
            torch.autograd.grad(output, output, torch.zeros_like(output))
        self.close()

    def close(self) -> None:
        """Shard again what a gradient of a gradient has kept whole; the next forward would use the old weights."""
        if self.is_open:
            self.is_open = False
            for part in self._parts:
                part.set_reshard_after_backward(True, recurse=False)
                part.reshard()

    def abandon(self) -> None:
        """Make ready for the next step, where one was left in the middle of a forward or backward pass."""
        self.output = None
        self.close()
        reset = getattr(self._parts[0], "reset_iter_state", None)  # newer than the oldest torch that this runs on
        if reset is not None:
            reset()

    def copied(self, part: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """Copy a part of the module, or all of it, sharded in the same way.

        Args:
            part: The part.
            memo: As that of ``copy.deepcopy``: what has been copied.

        Raises:
            ModelError: It cannot be copied, or has other parts than when it was sharded.
        """
        path = next(path for path, each in self.module.named_modules() if each is part)
        if self.blueprint is None:
            raise ModelError(f"{self.name} is sharded, and holds something that torch does not copy")
        blueprint = self.blueprint.get_submodule(path)
        made = copy.deepcopy(blueprint)
        _become_like(made, part, memo)
        below = f"{path}." if path else ""
        units = [unit.removeprefix(below) for unit in self.units if unit.startswith(below) and unit != path]
        self.sharding.apply(f"a copy of {self.name}", made, units, blueprint, fill=True)
        with torch.no_grad():
            for old, new in zip(part.parameters(), made.parameters(), strict=True):
                local_part(new).copy_(local_part(old))
                memo[id(old)] = new
            for old_buffer, new_buffer in zip(part.buffers(), made.buffers(), strict=True):
                new_buffer.copy_(old_buffer)
                memo[id(old_buffer)] = new_buffer
        memo |= {id(old): new for old, new in zip(part.modules(), made.modules(), strict=True)}
        return made


_sharded: WeakKeyDictionary[nn.Module, ref[ShardedModel]] = WeakKeyDictionary()
"""By module and each of its parts; the module holds its `ShardedModel`, in the hooks of its forward."""


def sharded_model(module: nn.Module) -> ShardedModel | None:
    """Return what shards a module or the model that it is a part of; None where nothing does."""
    found = _sharded.get(module)
    return None if found is None else found()


def _take_whole(
    part: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
) -> None:
    """Have a part of a sharded module load whole parameters, of which each process takes its own part."""
    for name, parameter in part._parameters.items():
        value = state.get(f"{prefix}{name}")
        if isinstance(value, Tensor):
            state[f"{prefix}{name}"] = sharded_like(value, parameter)


def _copy_part(part: Any, memo: dict[int, Any]) -> nn.Module:
    """Stand for the ``__deepcopy__`` of sharded modules, which raises."""
    sharded = sharded_model(part)
    if sharded is None:
        raise ModelError(
            f"{type(part).__name__} was sharded by fully_shard itself, and cannot be copied; leave it to "
            "Accelerator(strategy='shard')"
        )
    return sharded.copied(part, memo)


def _state(module: Any) -> Any:
    """Return torch's own state of a sharded module; None where torch has renamed it."""
    get = getattr(module, "_get_fsdp_state", None)
    return None if get is None else get()


def _mesh(replicas: int, group: Group) -> DeviceMesh:
    kind = group.device.type
    if replicas == 1:
        return group.mesh
    return init_device_mesh(kind, (replicas, group.size // replicas), mesh_dim_names=("replicate", "shard"))


def _check(roots: Mapping[str, nn.Module]) -> None:
    """Raise for what ``fully_shard`` cannot take, before anything is changed.

    Raises:
        ModelError: Names it.
    """
    owners: dict[Tensor, str] = {}
    for name, root in roots.items():
        for path, parameter in root.named_parameters():
            if is_lazy(parameter):
                raise ModelError(
                    f"{name}.{path} has seen no batch (lazy modules), and cannot be sharded; run the model on one first"
                )
            if isinstance(parameter, DTensor):
                raise ModelError(
                    f"{name}.{path} is sharded already; leave that to Accelerator(strategy=Shard(...)), or train it "
                    "with Accelerator(strategy='none')"
                )
            if parameter.ndim == 0:
                raise ModelError(
                    f"{name}.{path} has no dimension, and cannot be sharded; expected one of a single element: "
                    "nn.Parameter(value.reshape(1))"
                )
            if parameter in owners:
                raise ModelError(
                    f"{name}.{path} is a parameter of {owners[parameter]} too, and each can be sharded in one of them "
                    "alone; expected models that share none, or Accelerator(strategy='replicate')"
                )
        owners |= dict.fromkeys(root.parameters(), name)


def _blueprint(root: nn.Module) -> nn.Module | None:
    """Copy a module without its numbers; return None if torch does not copy it."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in root.parameters()
    }
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in root.buffers()}
    try:
        return copy.deepcopy(root, memo)
    except RuntimeError:  # it keeps a tensor that has a graph, as the old spectral_norm does
        return None


def _become_like(made: nn.Module, part: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copy what has changed in a module since its blueprint was made: modes, attributes, what is frozen.

    Raises:
        ModelError: It has other parts now.
    """
    pairs = [*zip(part.modules(), made.modules(), strict=False)]
    if len(pairs) < max(len([*part.modules()]), len([*made.modules()])):
        raise ModelError("a module that is sharded has got other parts since, and cannot be copied")
    memo |= {id(old): new for old, new in pairs}  # attributes may hold the modules themselves
    for old, new in pairs:
        new.training = old.training
        for name, value in vars(old).items():
            if name[:1] != "_" and vars(new).get(name, None) is not value:
                vars(new)[name] = copy.deepcopy(value, memo)
    for old_parameter, new_parameter in zip(part.parameters(), made.parameters(), strict=True):
        new_parameter.requires_grad_(old_parameter.requires_grad)


def _check_whole(name: str, path: str, part: nn.Module, inputs: Any) -> None:
    """Raise where a part of a sharded model is called while its parameters are not whole.

    Raises:
        ModelError: Says how to have it be a unit.
    """
    for parameter in part._parameters.values():
        if isinstance(parameter, DTensor):
            raise ModelError(
                f"{name}.{path} ({type(part).__name__}) was called by itself, and its parameters are sharded; expected "
                f"the part that is called to be gathered by itself: Accelerator(strategy=Shard(units=({path!r}, ...)))"
            )


def _given(optimizer: Any) -> list[Optimizer]:
    given = optimizer.values() if isinstance(optimizer, Mapping) else [optimizer]
    return [each for each in given if isinstance(each, Optimizer)]


def _check_new(optimizer: Any) -> None:
    """Raise for an optimizer that was made beforehand and has taken a step with whole parameters.

    Raises:
        OptimizerError: Names its class.
    """
    for each in _given(optimizer):
        if each.state:
            raise OptimizerError(
                f"{type(each).__name__} has taken steps with parameters that are to be sharded; expected a new one, or "
                "a factory, and learner.load for what it had"
            )


def _hold_sharded(optimizer: Any, sharded: Mapping[Tensor, nn.Parameter]) -> None:
    """Have optimizers that were made beforehand hold the sharded parameters."""
    for each in _given(optimizer):
        for group in each.param_groups:
            group["params"] = [sharded.get(parameter, parameter) for parameter in group["params"]]
