"""Build optimizers from what the user gave, and check that they own the parameters, once each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.compute.fused import choose_fused
from fluxloop.errors import OptimizerError, describe, did_you_mean
from fluxloop.guard.given import as_python

Factory = Callable[[Any], Any]
Made = Optimizer | Mapping[str, Optimizer]
Models = Mapping[str | None, nn.Module]
Optimizers = dict[str | None, Optimizer]


def parameter_names(models: Models, loss_fn: object = None) -> dict[nn.Parameter, str]:
    """Name every parameter: ``"0.weight"``, or ``"G.0.weight"`` for named models, ``"loss_fn.weight"`` of the loss."""
    names: dict[nn.Parameter, str] = {}
    if isinstance(loss_fn, nn.Module):
        models = {**models, "loss_fn": loss_fn}
    for model_name, model in models.items():
        for name, parameter in model.named_parameters():
            names.setdefault(parameter, name if model_name is None else f"{model_name}.{name}")
    return names


def parameters_by_name(models: Models, loss_fn: object = None) -> dict[str, nn.Parameter]:
    """Return the parameters that `parameter_names` names, by every name: a shared one has several."""
    if isinstance(loss_fn, nn.Module):
        models = {**models, "loss_fn": loss_fn}
    return {
        name if model_name is None else f"{model_name}.{name}": parameter
        for model_name, model in models.items()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def build_optimizers(models: Models, optimizer: Any, loss_fn: object = None) -> Optimizers:
    """Make one optimizer per name from a factory, an optimizer, or a mapping of names to either.

    A factory makes one optimizer per model with trainable parameters, or a mapping of names to several. In a
    mapping, a factory's name says whose parameters it gets: a model's, or a submodule's (``"encoder"``, ``"G.head"``).
    Its first argument says in which form: pairs of names and parameters where it is called ``named``, the module
    where it is called ``model``, else the parameters.

    Args:
        models: By name; None names the only model of a learner with one.
        optimizer: What the user gave.
        loss_fn: The loss function; where it is a module, its trainable parameters need an optimizer too.

    Raises:
        OptimizerError: Something else was given, or a trainable parameter is in no optimizer, in
            two, or belongs to no model.
    """
    if isinstance(optimizer, Mapping):
        made_of = {name: _build(models, name, value) for name, value in optimizer.items()}
        built: Optimizers = _by_one_name(made_of)
    elif isinstance(optimizer, Optimizer):
        built = {None: optimizer}
    elif _is_factory(optimizer):
        built = _by_one_name(
            {
                name: _call(optimizer, model, name)
                for name, model in models.items()
                if any(parameter.requires_grad for parameter in model.parameters())
            }
        )
    else:
        raise OptimizerError(
            f"optimizer={describe(optimizer)} was given; expected a factory that takes parameters "
            "(torch.optim.Adam, partial(torch.optim.SGD, lr=0.1)), an optimizer, or a mapping of names to either"
        )
    _check_ownership(parameter_names(models, loss_fn), built)
    for name, made in built.items():
        _check_options(made, "the optimizer" if name is None else f"optimizer[{name!r}]")
    separate_options(built.values())
    for made in built.values():
        _given[made] = [
            {name: copy.deepcopy(value) for name, value in group.items() if name not in ("params", "param_names")}
            for group in made.param_groups
        ]
    return built


# Copies, as schedules write into the groups themselves; by optimizer, so that nothing has to be written into it.
_given: WeakKeyDictionary[Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()


def options_given(optimizer: Optimizer, group: int) -> dict[str, Any]:
    """Return the options that a parameter group had when the learner was made; none where it joined later."""
    groups = _given.get(optimizer, [])
    return groups[group] if group < len(groups) else {}


def _by_one_name(made: Mapping[str | None, Made]) -> Optimizers:
    """Name each optimizer: as its factory is named, or where that has made several, by their names behind its own."""
    built: Optimizers = {}
    for name, value in made.items():
        several = value.items() if isinstance(value, Mapping) else [(None, value)]
        for own, each in several:
            full = ".".join(part for part in (name, own) if part is not None) or None
            if full in built:
                raise OptimizerError(f"two optimizers are named {full!r}; expected each name once")
            built[full] = each
    return built


def _build(models: Models, name: Any, value: Any) -> Made:
    if not isinstance(name, str) or not name:
        raise OptimizerError(f"an optimizer is named {name!r}; expected a name such as 'generator'")
    if isinstance(value, Optimizer):
        return value
    if not _is_factory(value):
        raise OptimizerError(
            f"optimizer[{name!r}] is {describe(value)}; expected a factory such as torch.optim.Adam, or an optimizer"
        )
    if name in models:
        return _call(value, models[name], name)
    known = [str(key) for key in models if key is not None]
    for model_name, model in models.items():
        path = name if model_name is None else name.removeprefix(f"{model_name}.")
        if model_name is None or path != name:
            try:
                return _call(value, model.get_submodule(path), name)
            except AttributeError:
                known += [child for child, _ in model.named_children()]
    raise OptimizerError(
        f"optimizer[{name!r}] is a factory, but no model or submodule is called {name!r}; expected one of "
        f"{sorted(known)}, or an optimizer over given parameters{did_you_mean(name, known)}"
    )


def _is_factory(value: object) -> bool:
    """Return whether a value may make optimizers: a function, a partial, or an optimizer's class."""
    if isinstance(value, type):
        return issubclass(value, Optimizer)
    return callable(value) and not isinstance(value, nn.Module)


def _call(factory: Factory, model: nn.Module, name: str | None) -> Made:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    label = "" if name is None else f"[{name!r}]"
    if not parameters:
        raise OptimizerError(
            f"optimizer{label} would get no parameter: none of {type(model).__name__} requires a gradient; "
            "leave it out, or unfreeze the model first"
        )
    form = _form(factory)
    try:
        made: Made = factory(_in_form(form, model))
    except (TypeError, ValueError) as error:
        raise OptimizerError(
            f"the factory optimizer{label} made no optimizer of the {form}: "
            f"{str(error).removesuffix('.')}; expected {_EXPECTED[form]}"
        ) from error
    several = made if isinstance(made, Mapping) and made else {None: made}
    for own, each in several.items():
        if not isinstance(each, Optimizer):
            raise OptimizerError(
                f"the factory optimizer{label} made {describe(made if own is None else each)}"
                f"{'' if own is None else f' as {own!r}'}; expected a torch.optim.Optimizer, or a dict of names to them"
            )
        if own is not None and not (isinstance(own, str) and own):
            raise OptimizerError(f"the factory optimizer{label} names an optimizer {own!r}; expected a text")
        _prepare(each)
    return made


PARAMETERS, NAMED, MODEL = "parameters", "parameters with their names", "model"
_EXPECTED = {
    PARAMETERS: "one that takes parameters alone: partial(torch.optim.SGD, lr=0.1)",
    NAMED: "one that takes a list of pairs (name, parameter): "
    "lambda named: torch.optim.SGD([parameter for name, parameter in named])",
    MODEL: "one that takes the module: lambda model: torch.optim.SGD(model.parameters())",
}
"""What a factory may be called with, and an example of one that takes it."""


def _form(factory: Factory) -> str:
    """Return what a factory is called with, as its first argument says by its name: a key of `_EXPECTED`."""
    try:
        first = next(iter(signature(factory).parameters.values()))
    except (TypeError, ValueError, StopIteration):  # it says nothing of its arguments
        return PARAMETERS
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        return PARAMETERS
    if first.name in ("named", "named_parameters"):
        return NAMED
    return MODEL if first.name in ("model", "model_or_params") else PARAMETERS


def _in_form(form: str, model: nn.Module) -> Any:
    """Return a model's trainable parameters in the form that a factory takes; frozen ones are in the model alone."""
    if form == MODEL:
        return model
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return named if form == NAMED else [parameter for _, parameter in named]


def form_of(factory: Factory, model: nn.Module) -> Any:
    """Return what a factory takes of a model, as its first argument says; its parameters with the frozen ones.

    Example:
        >>> [name for name, _ in form_of(lambda named: torch.optim.SGD(named), torch.nn.Linear(2, 1))]
        ['weight', 'bias']
    """
    form = _form(factory)
    return model.parameters() if form == PARAMETERS else _in_form(form, model)


def _prepare(made: Optimizer) -> None:
    """Choose the kernels of an optimizer that a factory has made, and give it options of its own."""
    choose_fused(made)
    for options in (
        *made.param_groups,
        made.defaults,
    ):  # the factory keeps what it was given, for whatever it makes next
        options.update({name: _apart(value, set(), copy=True) for name, value in options.items() if name != "params"})


def _check_options(optimizer: Optimizer, label: str) -> None:
    """Hold NumPy's numbers as Python's, and raise for an option that is not finite: torch checks signs alone.

    Raises:
        OptimizerError: Names it.
    """
    for index, group in enumerate(optimizer.param_groups):
        for name in ("lr", "momentum", "betas", "weight_decay", "eps"):
            if name not in group:
                continue
            group[name] = value = as_python(group[name])
            for each in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(each, (float, Tensor)) and not math.isfinite(each):
                    raise OptimizerError(
                        f"{label} has {name}={value!r} in its parameter group {index}; expected a finite number"
                    )


def separate_options(optimizers: Iterable[Optimizer]) -> None:
    """Have each parameter group hold tensors of its own as options, such as a learning rate.

    torch keeps the one tensor that it was given in all groups, so that to change one would change all.
    The first group that holds a tensor keeps it.
    """
    # Groups before defaults: the first group keeps the tensor that the user may hold, and set by hand.
    taken: set[Tensor] = set()
    optimizers = list(optimizers)
    for options in (*(group for each in optimizers for group in each.param_groups), *(o.defaults for o in optimizers)):
        for name, value in options.items():
            if name != "params" and isinstance(value, (Tensor, tuple, list)):
                options[name] = _apart(value, taken)


def _apart(value: Any, taken: set[Tensor], copy: bool = False) -> Any:
    """Return an option with copies of its tensors, of those in `taken` or of all; one to differentiate by stays."""
    if isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
        return type(value)(_apart(item, taken, copy) for item in value)
    if not isinstance(value, Tensor) or value.requires_grad:
        return value
    if copy or value in taken:
        value = value.detach().clone()
    taken.add(value)
    return value


def owned_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """List the parameters in an optimizer's groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_ownership(names: Mapping[nn.Parameter, str], optimizers: Optimizers) -> None:
    owners: dict[nn.Parameter, list[str]] = {}
    for name, optimizer in optimizers.items():
        label = "the optimizer" if name is None else f"optimizer[{name!r}]"
        parameters = owned_parameters(optimizer)
        foreign = [p for p in parameters if p not in names]
        if foreign:
            shapes = ", ".join(str(tuple(p.shape)) for p in foreign[:3])
            raise OptimizerError(
                f"{label} holds {len(foreign)} parameters that belong to no model (shapes {shapes}"
                f"{', …' if len(foreign) > 3 else ''}); build it from the parameters of the learner's model"
            )
        for parameter in parameters:
            owners.setdefault(parameter, []).append(label)
    twice = [f"{names[p]} (in {' and '.join(held)})" for p, held in owners.items() if len(held) > 1]
    if twice:
        raise OptimizerError(
            f"parameters are held more than once: {_list(twice)}; expected each in exactly one optimizer. "
            "For parameters shared by two models give the optimizers themselves"
        )
    check_owned(names, set(owners), next(iter(optimizers), None) if len(optimizers) > 1 else None)


def check_owned(names: Mapping[nn.Parameter, str], owned: set[nn.Parameter], example: str | None = None) -> None:
    """Raise for a trainable parameter that no optimizer holds.

    Args:
        names: Of all parameters.
        owned: Those that an optimizer holds.
        example: The name of an optimizer, where there are several.

    Raises:
        OptimizerError: Names those parameters.
    """
    missing = [name for p, name in names.items() if p.requires_grad and p not in owned]
    if missing:
        raise OptimizerError(
            f"trainable parameters are in no optimizer: {_list(missing)}; add them to one, where they joined or were "
            f"unfrozen later by learner.optimizer{'' if example is None else f'[{example!r}]'}"
            ".add_param_group({'params': [...]}), or freeze them with requires_grad_(False)"
        )


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def no_such_optimizer(name: object, names: list[str]) -> OptimizerError:
    """Make the error for a name that no optimizer has; it may be that of a model which has several.

    Args:
        name: What was given.
        names: Of the optimizers; none where there is a single one without a name.
    """
    several = [each for each in names if each.startswith(f"{name}.")]
    if several:
        return OptimizerError(
            f"{name!r} has the optimizers {several}, and a block, or an update by name, steps one; expected one of "
            f"these, learner.optimizing({several[0]!r}), or a single optimizer of {name!r}: "
            f"optimizer={{{name!r}: torch.optim.Adam, ...}}"
        )
    return OptimizerError(
        f"there is no optimizer {name!r}; the learner has "
        f"{names or 'a single one without a name: learner.optimizing()'}{did_you_mean(str(name), names)}"
    )


def say_that_a_closure_is_needed(optimizer: Optimizer, error: TypeError) -> None:
    """Raise in place of an error that an optimizer's step was called without a closure; do nothing for others.

    Raises:
        OptimizerError: It was; says how to give one.
    """
    if "closure" in str(error):
        raise OptimizerError(
            f"{type(optimizer).__name__} needs a closure that computes the loss and its gradients:\n"
            "    def closure():\n"
            "        loss = ...\n"
            "        learner.backward(loss)\n"
            "        return loss\n"
            "    learner.update(closure=closure)"
        ) from error
