"""The accelerator that users make: where tensors are computed, for a learner and for loops of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from fluxloop.compute import accelerator as base
from fluxloop.compute.optimizers import owned_parameters
from fluxloop.errors import OptimizerError, describe
from fluxloop.nested import tensors
from fluxloop.processes.replicas import begin_alike, states_alike

if TYPE_CHECKING:
    from fluxloop.compute.raw import RawLoop


class Accelerator(base.Accelerator):
    """Places models and batches on a device; computes gradients and steps optimizers there.

    A learner is given one: ``Learner(..., accelerator=Accelerator(precision="bf16"))``. No phase and no
    callback needs a line for what it says. For a loop of one's own it has `prepare`, ``backward`` and
    `clip_grad_norm_`; both know ``gather``, ``all_gather``, ``print``, ``wait``, ``is_main`` and ``autocast``.

    Args:
        device: ``"auto"`` (CUDA, else MPS, else the CPU), or anything ``torch.device`` takes.
        precision: In which models compute: ``"fp32"``, ``"bf16"``, or ``"fp16"`` with scaled losses. Weights,
            gradients and optimizers stay in float32.
        accumulate: How many batches make one update, or one number for each optimizer by name.
        strategy: How several processes share the work; ``"auto"``: ``"replicate"`` where ``torchrun`` started several.
        compile: ``"step"``: forward, loss, backward and update of a step are one compiled graph for
            each shape of batch (`docs/speed.md`); a callback that has to run inside the step is an error.
            ``"model"``: each model's forward is compiled by ``torch.compile``. False: neither.
        optimizer_in_backward: Whether each parameter is stepped as soon as its gradient is complete, and the gradient
            dropped: the same bits, with a fifth to a third less memory for parameters, states and gradients
            (`docs/memory.md`). What needs the gradients after the backward pass is an error.
        seed_per_process: Whether each process draws random numbers of its own in its steps.
        tf32: Whether CUDA multiplies matrices of float32 in TF32, in the whole process; None leaves torch's
            setting. Elsewhere it changes nothing.
        check_compiled: Whether each graph of ``compile="step"`` is compared at its first call with the same operations
            run eagerly on copies; a warning tells the largest difference.

    Raises:
        ValueError: The device is not available on this machine, or an argument is none of these.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> accelerator = Accelerator("cpu", accumulate=2)  # a learner is given one; here is a loop of one's own
        >>> model, optimizer, batches = accelerator.prepare(model, optimizer, list(torch.ones(4, 8, 4)))
        >>> for xs in batches:
        ...     optimizer.zero_grad()
        ...     accelerator.backward(model(xs).mean())
        ...     optimizer.step()  # in every second batch
    """

    _loop: RawLoop | None = None

    def _bind(self) -> None:
        # Else it is the plain function, without a question more in each step; or a subclass's own
        if (
            not (self.is_plain or self.optimizer_in_backward)
            and self.sharding is None
            and type(self).backward is Accelerator.backward
        ):
            vars(self)["backward"] = self._backward

    def prepare(self, *objects: Any) -> Any:
        """Prepare models, optimizers and loaders for a loop of one's own, which is written as ever.

        Models are moved to the device, and compute in the precision when they are called; in several processes
        all begin with the weights of the first. Optimizers stay what they are; their ``step``
        updates with the last batch of ``accumulate``, with the gradients of all processes, and leaves out
        what is not finite in fp16. Loaders give batches on the device, and each process its rows.

        ``accelerator.backward(loss)`` takes the place of ``loss.backward()``, and
        `clip_grad_norm_` that of torch's function. The rest of the loop stays as it is::

            accelerator = Accelerator(precision="bf16")
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            for xs, ys in loader:
                optimizer.zero_grad()
                accelerator.backward(loss_fn(model(xs), ys))
                optimizer.step()

        Args:
            objects: Modules, optimizers, iterables of batches, None, and lists, tuples and mappings of them. The
                names in a mapping are those of ``accumulate``.

        Returns:
            The same in the same order; what was given alone is returned alone. Models and optimizers are the same
            objects, changed in place.

        Raises:
            TypeError: Something is none of these.
            OptimizerError: An optimizer holds parameters on another device, as its model was not given, or is
                unknown to ``accumulate``.
            ValueError: The accelerator asks for what only a learner does.
        """
        self._check_raw()
        for part in _parts(objects, nn.Module):
            self._prepare_model(part)
        prepared = tuple(self._prepared(each, None) for each in objects)
        return prepared[0] if len(prepared) == 1 else prepared

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor | None:
        """Clip the gradients of an update, between `backward` and the optimizer's step, as torch's function does.

        Args:
            parameters: Of one or more prepared optimizers.
            max_norm: What their norm is at most.
            norm_type: Which norm.

        Raises:
            OptimizerError: In a learner's step, where an update is of several batches or made in the backward pass.

        Returns:
            The norm before; None where the batch is not the last one of an update, whose gradients are not
            complete: then nothing is done.
        """
        if self._loop is None and (self.optimizer_in_backward or self.accumulate != 1):
            raise OptimizerError(
                f"accelerator.clip_grad_norm_ was called for {self!r} in a learner's step, whose gradients are not "
                "complete there; expected GradientClip(max_norm) among the callbacks"
                f"{', without optimizer_in_backward' * self.optimizer_in_backward}"
            )
        parameters = list(parameters)
        for slot in () if self._loop is None else self._loop.slots:
            if not set(parameters).isdisjoint(owned_parameters(slot.optimizer)):
                if slot.current is None or not self._loop.closes(slot):  # type: ignore[union-attr]  # it has slots
                    return None
                self._loop.complete(slot)  # type: ignore[union-attr]  # as above
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def _backward(
        self,
        loss: Tensor,
        parameters: Sequence[nn.Parameter] | None = None,
        *,
        alone: bool = False,
        retain_graph: bool = False,
    ) -> None:
        """Compute gradients: a learner's, which says whose; or those of a loop of the user's own."""
        if parameters is not None:
            super().backward(loss, parameters, alone=alone, retain_graph=retain_graph)
            return
        if self._loop is None:
            raise OptimizerError(
                f"accelerator.backward was called for {self!r}, whose updates are made of more than one gradient, or "
                "scaled, and no optimizer was prepared; expected first:\n"
                "    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)"
            )
        weighed = self._loop.weighed(loss)
        if self.casting is None:
            super().backward(weighed, retain_graph=retain_graph)
        else:
            with self.casting.off():
                super().backward(weighed, retain_graph=retain_graph)

    def _check_raw(self) -> None:
        """Raise for what loops of one's own cannot have.

        Raises:
            ValueError: Says what was given.
        """
        if self.sharding is not None:
            raise ValueError(
                f"prepare was called for strategy={self.strategy!r}, which a learner alone does; expected "
                "strategy='replicate'"
            )
        if self.optimizer_in_backward:
            raise ValueError(
                "prepare was called for optimizer_in_backward=True, which a learner alone does; expected "
                "optimizer_in_backward=False"
            )
        if self.compile == "step":
            raise ValueError(
                "prepare was called for compile='step', and a loop of one's own has no step that could be compiled; "
                "expected compile='model'"
            )
        if self._loop is None:
            from fluxloop.compute.raw import RawLoop  # which a learner needs none of

            self._loop = RawLoop(self.group, self.precision)

    def _prepare_model(self, model: nn.Module) -> None:
        self.place_model(model)
        begin_alike(self.group, [*model.named_parameters(), *model.named_buffers()])
        self.compile_model(model)
        from fluxloop.compute.raw import CastForward  # as above

        if self.casting is not None and not isinstance(vars(model).get("forward"), CastForward):
            vars(model)["forward"] = CastForward(model, self.casting, vars(model).get("forward"))

    def _prepared(self, thing: Any, name: str | None) -> Any:
        if thing is None or isinstance(thing, nn.Module):
            return thing
        if isinstance(thing, Optimizer):
            self._prepare_optimizer(thing, name)
            return thing
        if isinstance(thing, Mapping):
            return {key: self._prepared(each, str(key)) for key, each in thing.items()}
        if isinstance(thing, (tuple, list)) and not all(map(_is_batch, thing)):
            return type(thing)([self._prepared(each, None) for each in thing])
        if isinstance(thing, (Tensor, str, type, Dataset)) or not isinstance(thing, Iterable):
            hint = ": as_dataloader(data, batch_size=32)" if isinstance(thing, (Tensor, Dataset)) else ""
            raise TypeError(
                f"prepare was given {describe(thing)}; expected models, optimizers and loaders of batches{hint}"
            )
        assert self._loop is not None  # for type checkers: `_check_raw` has made it
        return PreparedLoader(thing, self, self._loop)

    def _prepare_optimizer(self, optimizer: Optimizer, name: str | None) -> None:
        for parameter in owned_parameters(optimizer):
            if parameter.device.type != self.device.type:
                raise OptimizerError(
                    f"prepare was given a {type(optimizer).__name__} with parameters on {parameter.device}, and the "
                    f"accelerator is for {self.device}; give it the model too: accelerator.prepare(model, optimizer)"
                )
        if any(optimizer.state.values()):  # of a model that has been moved since
            optimizer.load_state_dict(optimizer.state_dict())
        states_alike(self.group, {name: optimizer})
        if isinstance(self.accumulate, Mapping):
            if name is None or name not in self.accumulate:
                which = "without a name" if name is None else f"named {name!r}"
                raise OptimizerError(
                    f"prepare was given a {type(optimizer).__name__} {which}, and accumulate={self.accumulate!r}; "
                    "expected optimizers by these names: "
                    f"accelerator.prepare({{{next(iter(self.accumulate), 'G')!r}: optimizer}})"
                )
            size = self.accumulate[name]
        else:
            size = self.accumulate
        assert self._loop is not None  # for type checkers, as above
        if size > 1 or self.group is not None or self.precision == "fp16":
            self._loop.add(optimizer, name, size)
        if self.casting is not None:
            optimizer.register_step_post_hook(_forget_casts)


def _forget_casts(*_: Any) -> None:
    """Forget the weights that autocast has cast: they have changed."""
    torch.clear_autocast_cache()


class PreparedLoader:
    """A loader whose batches are on the device; in several processes, each has its own rows.

    Args:
        loader: The loader; its attributes are this one's.
        accelerator: Knows the device and the processes.
        loop: Is told of each batch.
    """

    def __init__(self, loader: Any, accelerator: Accelerator, loop: RawLoop) -> None:
        from fluxloop.data.sharing import shared

        self.loader = loader
        self._accelerator, self._loop = accelerator, loop
        self._shared = shared(loader, accelerator.group)

    def __iter__(self) -> Iterator[Any]:
        outer = self._loop.standing
        for batch in self._shared:
            entries = {"batch": batch}
            self._accelerator.place(entries)
            self._loop.begin_batch(entries["batch"], self)
            yield entries["batch"]
        self._loop.end_loader(self)
        self._loop.standing = outer

    def __len__(self) -> int:
        return len(self._shared)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet while it is copied
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __repr__(self) -> str:
        return f"PreparedLoader({describe(self.loader)})"


def _is_batch(thing: Any) -> bool:
    """Return whether an item of a list is a batch: a list of these is a source of batches."""
    return isinstance(thing, (Tensor, tuple, list, Mapping)) and next(tensors(thing), None) is not None


def _parts(things: Any, kind: type) -> Iterator[Any]:
    """Yield what is of a kind in nested lists, tuples and mappings."""
    if isinstance(things, kind):
        yield things
    elif isinstance(things, Mapping):
        for each in things.values():
            yield from _parts(each, kind)
    elif isinstance(things, (tuple, list)):
        for each in things:
            yield from _parts(each, kind)


def accelerator_or_default(accelerator: base.Accelerator | None) -> base.Accelerator:
    """Return an accelerator, or one of the fastest device where there is none.

    Raises:
        TypeError: It is something else.
    """
    if accelerator is not None and not isinstance(accelerator, base.Accelerator):
        raise TypeError(
            f"accelerator={accelerator!r} was given; expected an Accelerator: accelerator=Accelerator('cpu')"
        )
    return Accelerator() if accelerator is None else accelerator
