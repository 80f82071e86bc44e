"""Name the models of a learner, and arrange what belongs to each as the models were given."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from keyword import iskeyword
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fluxloop.compute.pairs import paired
from fluxloop.errors import ModelError, describe, sentence
from fluxloop.guard.given import as_plain
from fluxloop.nested import map_tensors, move_object
from fluxloop.state import State

T = TypeVar("T")

LONGEST_NAME = 200
"""Bytes of a model's name: it is a part of names of files, which have 255 at most."""


def named_models(model: Any) -> dict[str | None, nn.Module]:
    """Name the models: None for a single one, else the mapping's or named tuple's names, or 0, 1, ….

    Raises:
        ModelError: Something is no module, the same module twice, or a name is no identifier or too long.
    """
    if isinstance(model, nn.Module):
        return {None: model}
    if isinstance(model, Mapping):
        named = dict(model)
    elif isinstance(model, tuple):
        names = getattr(model, "_fields", [str(index) for index in range(len(model))])
        named = dict(zip(names, model, strict=True))
    else:
        named = {None: model}
    if not named:
        raise ModelError("no model was given; expected a torch.nn.Module, or several by name")
    for name, module in named.items():
        label = "model" if name is None else f"model[{name!r}]"
        if not isinstance(module, nn.Module):
            hint = f": {module.__name__}(...)" if isinstance(module, type) else ""
            hint = ", or a tuple or dict of several" if isinstance(as_plain(module), list) else hint
            raise ModelError(f"{label} is {describe(module)}; expected a torch.nn.Module{hint}")
        if name in ("count", "index"):
            raise ModelError(
                f"a model is named {name!r}, which is a method of the tuple that holds the models; expected another "
                f"name, such as {name + '_net'!r}"
            )
        if name is not None and not isinstance(model, tuple) and not is_name(name):
            raise ModelError(
                f"a model is named {name!r}; expected a name to stand behind 'learner.model.', such as 'generator'"
            )
        if name is not None and len(name.encode()) > LONGEST_NAME:
            raise ModelError(
                f"a model's name has {len(name.encode())} bytes, '{name[:20]}…'; expected {LONGEST_NAME} at most: it "
                "is in names of files"
            )
    if len({id(module) for module in named.values()}) < len(named):
        raise ModelError(f"one module was given under two of the names {list(named)}; expected each once")
    return named


def is_name(name: object) -> bool:
    """Return whether a name can be that of a named tuple's field."""
    return isinstance(name, str) and name.isidentifier() and not iskeyword(name) and not name.startswith("_")


def arrange_like(model: Any, values: dict[str | None, Any]) -> Any:
    """Arrange values by model as the models were given: alone, as a tuple, or as a named tuple.

    A tuple has None where a model has no value (a frozen one has no optimizer).
    """
    if tuple(values) == (None,):
        return values[None]
    if isinstance(model, tuple) and hasattr(model, "_fields") and tuple(model) == tuple(values.values()):
        return model
    names = [str(name) for name in values]
    if isinstance(model, tuple) and not hasattr(model, "_fields") and set(names) <= set(map(str, range(len(model)))):
        return tuple(values.get(str(index)) for index in range(len(model)))
    if all(map(is_name, names)):
        return namedtuple("Named", names)(*values.values())
    return State(dict(zip(names, values.values(), strict=True)))


def by_name(held: Any) -> list[tuple[str | None, Any]]:
    """List models or optimizers with their names, from how a learner holds them: what `arrange_like` has arranged.

    Args:
        held: ``learner.model`` or ``learner.optimizer``.

    Returns:
        Pairs of a name and what is named so; the name of a single one is None. A model without an optimizer
        is left out.

    >>> by_name((nn.ReLU(), None, nn.Tanh()))
    [('0', ReLU()), ('2', Tanh())]
    """
    if isinstance(held, (nn.Module, Optimizer)):
        return [(None, held)]
    if isinstance(held, tuple):
        names = getattr(held, "_fields", None) or map(str, range(len(held)))
        items = list(zip(names, held, strict=True))
    else:
        items = [(name, held[name]) for name in held]
    return [(name, each) for name, each in items if each is not None]


def named_parts(models: Any, parts: Callable[[nn.Module], Iterable[tuple[str, T]]]) -> Iterator[tuple[str, T]]:
    """Name the parts of a learner's models as ``learner.weights`` does: ``"0.bias"`` of a single one, ``"G.0.bias"``.

    Args:
        models: ``learner.model``.
        parts: Lists the parts of one model with their names in it, such as ``nn.Module.named_modules``. The model
            itself has the name "" there, and is called ``"G"`` here, or ``"model"`` where it is the single one.
    """
    for model_name, model in by_name(models):
        for name, part in parts(model):
            yield ".".join(filter(None, (model_name, name))) or "model", part


def to_device_of(module: nn.Module, value: Any) -> Any:
    """Move the tensors in a nest of them, and what has ``to(device)``, to where a module is."""
    device = device_of(module)
    return map_tensors(lambda tensor: tensor.to(device), value, lambda other: move_object(other, device))


def save_tensors(modules: Iterable[nn.Module], tensors: Iterable[Tensor], on_host: bool = False) -> Callable[[], None]:
    """Save the values of tensors, and which buffers modules hold; return what sets them again, bit for bit.

    Args:
        modules: The modules.
        tensors: The tensors.
        on_host: Whether the values are kept in the host's memory.
    """
    values = [(tensor, copied_values(tensor, on_host)) for tensor in tensors]
    places = [(part, dict(part._buffers)) for module in modules for part in module.modules()]

    def put_back() -> None:
        for part, held in places:  # a step may have put new tensors in their place
            part._buffers.clear()
            part._buffers.update(held)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)

    return put_back


def copied_values(tensor: Tensor, on_host: bool) -> Tensor:
    """Copy a tensor's values, to where it is or into the host's memory."""
    return tensor.detach().to("cpu", copy=True) if on_host else tensor.detach().clone()


def check_not_lazy(module: nn.Module, whose: str) -> None:
    """Raise for weights that cannot be averaged yet.

    Raises:
        ModelError: They have seen no batch (lazy modules).
    """
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise ModelError(
            f"{whose} cannot average weights that have seen no batch (lazy modules); run the model on one before the "
            "learner is made"
        )


def copied_weights(module: nn.Module, whose: str) -> nn.Module:
    """Copy a module, to hold an average of its weights: frozen, in eval mode.

    Args:
        module: The module.
        whose: What keeps the average, for the message.

    Raises:
        ModelError: It has seen no batch (lazy modules), or cannot be copied.
    """
    check_not_lazy(module, whose)
    try:
        copied = copy.deepcopy(module)
    except RuntimeError as error:
        raise not_copied(whose, error) from error
    return copied.requires_grad_(False).eval()


@torch.no_grad()
def move_towards(
    average: nn.Module, live: nn.Module, weight: float | Tensor, buffers: float | Tensor, whose: str
) -> None:
    """Move an average of weights towards the live ones, in place, as ``torch.optim.swa_utils`` does.

    Args:
        average: The module that holds the average.
        live: A module with the same parameters and buffers by name.
        weight: How far its parameters move, 0 to 1; 1 copies the live ones. Whole numbers are always copied.
            A scalar tensor is not looked at, so that a graph can have it as an input.
        buffers: The same for its buffers; 0 leaves all of them.
        whose: What computes the average, for the message.

    Raises:
        ModelError: Only one of the two modules has one of the parameters or buffers.
    """
    paired(dict(average.named_parameters()), dict(live.named_parameters()), whose).move(weight)
    if isinstance(buffers, Tensor) or buffers:
        paired(dict(average.named_buffers()), dict(live.named_buffers()), whose).move(buffers)


def not_copied(whose: str, error: RuntimeError) -> ModelError:
    """Make the error for weights that torch does not copy."""
    return ModelError(
        f"{whose} cannot copy these weights: "
        f"{sentence(error)} The old torch.nn.utils.weight_norm and spectral_norm keep "
        "what they computed; those of torch.nn.utils.parametrizations can be copied"
    )


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer, the CPU where it has none."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def state_of_models(models: Mapping[str | None, nn.Module], loss_fn: object = None) -> list[tuple[str, Tensor]]:
    """List the parameters and buffers of the models, and of a loss function that is a module, by their names."""
    named: list[tuple[str, Tensor]] = []
    for name, module in [*models.items(), ("loss_fn", loss_fn)]:
        if isinstance(module, nn.Module):
            prefix = "" if name is None else f"{name}."
            named += [(f"{prefix}{key}", tensor) for key, tensor in module.named_parameters()]
            named += [(f"{prefix}{key}", tensor) for key, tensor in module.named_buffers()]
    return named
