"""Hooks on modules, parameters and optimizers, which a graph would call while it is traced and never again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import optimizer as optimizers

from fluxloop.compile.conditions import HOOKS, STEP_HOOKS
from fluxloop.compute.slots import Slot
from fluxloop.errors import CompileError

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

OF_ALL_OPTIMIZERS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
"""Names under which torch holds the hooks of all optimizers."""


def hooks_of(thing: Any, names: Iterable[str]) -> list[Any]:
    """List the hooks that an object holds under some names."""
    found = (getattr(thing, name, None) for name in names)
    return [hook for hooks in found if hooks for hook in hooks.values()]


def function_of(hook: Any) -> Any:
    """Return the function that a hook calls, or the type of an object that is one."""
    while isinstance(hook, partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    return hook if hasattr(hook, "__qualname__") else type(hook)


def is_own(hook: Any) -> bool:
    """Return whether a hook is fluxloop's, which is there for one step alone."""
    return str(function_of(hook).__module__).startswith("fluxloop.")


def places(
    parts: Iterable[nn.Module], parameters: Mapping[Any, str], slots: Iterable[Slot]
) -> Iterator[tuple[str, list[Any]]]:
    """List what may have hooks, by what users call it, with the hooks.

    Args:
        parts: Modules, inner ones too.
        parameters: Their parameters, with names.
        slots: The optimizers.
    """
    yield from ((type(part).__name__, hooks_of(part, HOOKS)) for part in parts)
    yield from ((name, hooks_of(parameter, STEP_HOOKS)) for parameter, name in parameters.items())
    yield from ((slot.label, hooks_of(slot.optimizer, STEP_HOOKS)) for slot in slots)
    every = [f"_global{hooks}" for hooks in HOOKS]
    yield "all modules (register_module_forward_hook, …)", hooks_of(nn.modules.module, every)
    yield "all optimizers (register_optimizer_step_post_hook, …)", hooks_of(optimizers, OF_ALL_OPTIMIZERS)


def why_not(found: Iterable[tuple[str, list[Any]]]) -> str | None:
    """Return why there can be no graph, with what the hooks are on and who they are; None where there are none."""
    named = {
        f"{where} ({function.__module__}.{function.__qualname__})": None
        for where, hooks in found
        for function in map(function_of, hooks)
    }
    if not named:
        return None
    olds = (".utils.spectral_norm.", ".utils.weight_norm.")
    instead = ": those of torch.nn.utils.parametrizations compile" if any(o in n for o in olds for n in named) else ""
    return (
        f"there are hooks on {', '.join(named)}, and nobody can look into a graph while it runs; remove the hooks, or "
        f"what registers them{instead}"
    )


def require_no_hooks(learner: RunLearner) -> None:
    """Raise for hooks of others on the learner's models and optimizers, before a step runs.

    Raises:
        CompileError: Names what they are on, and the hooks.
    """
    parts = [part for module in learner.modules() for part in module.modules()]
    found = places(parts, learner.updates.names, learner.updates.slots)
    why = why_not((where, [hook for hook in hooks if not is_own(hook)]) for where, hooks in found)
    if why is not None:
        raise CompileError(
            f'Accelerator(compile="step") makes one graph of a step, and {why}. Or have steps run as they are: '
            'compile=False or compile="model"'
        )
