"""The state of an optimizer as plain data, by the names of its parameters, and loading it.

torch numbers an optimizer's parameters by their places. A checkpoint names them too, so that each
state goes to the parameter it belongs to, in whatever order the script makes layers and groups.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fluxloop.compute.optimizers import owned_parameters
from fluxloop.errors import CheckpointError, describe, did_you_mean
from fluxloop.guard.given import as_python
from fluxloop.nested import sharded_like
from fluxloop.persist.plain import class_name, from_plain, to_plain

State = dict[str, Any]
ByName = Mapping[str, nn.Parameter]
"""Parameters by every name that they have."""

PARTS = ("state", "param_groups")
"""What the ``state_dict`` of torch's optimizers consists of."""


# Writing


def optimizer_state(optimizer: Optimizer, names: Mapping[nn.Parameter, str], label: str) -> State:
    """Return an optimizer's state as plain data.

    Args:
        optimizer: The optimizer.
        names: The names of parameters.
        label: What the optimizer is called in messages.

    Raises:
        CheckpointError: Something in it cannot be kept.
    """
    state = dict(optimizer.state_dict())
    if "param_groups" in state:
        state["param_groups"] = [
            {name: as_python(value) for name, value in group.items()} for group in state["param_groups"]
        ]
    return {
        "class": class_name(type(optimizer)),
        "defaults": plain_defaults(optimizer),
        "names": _names(optimizer, names),
        "state": to_plain(state, f"the state of {label}"),
    }


def plain_defaults(optimizer: Optimizer) -> State:
    """Return the options that an optimizer was made with, as far as they are numbers and texts."""
    options = {name: as_python(value) for name, value in optimizer.defaults.items()}
    return {name: value for name, value in options.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, type(None))) or (
        isinstance(value, tuple) and all(map(_is_plain, value))
    )


def _names(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> list[list[str]]:
    """Return the parameters' names by group; one that belongs to no model is called by its place."""
    places = {parameter: f"#{place}" for place, parameter in enumerate(owned_parameters(optimizer))}
    return [[names.get(p, places[p]) for p in group["params"]] for group in optimizer.param_groups]


# Matching


@frozen
class _Order:
    """Which group and which place of a checkpoint each of an optimizer's groups and parameters has."""

    groups: list[int]
    places: list[int]

    @property
    def is_same(self) -> bool:
        return self.groups == [*range(len(self.groups))] and self.places == [*range(len(self.places))]


def _order(optimizer: Optimizer, kept: State, by_name: ByName, label: str) -> _Order:
    """Find each parameter of an optimizer in a checkpoint by its name; by its place in one without names.

    Raises:
        CheckpointError: The parameters, or their groups, are others; a line for the list of what does not fit.
    """
    live = [list(group["params"]) for group in optimizer.param_groups]
    former = kept.get("names")
    if former is None:
        groups = kept["state"].get("param_groups", optimizer.param_groups)
        _check_sizes(label, live, [group["params"] for group in groups], ordered=True)
        return _Order([*range(len(live))], [*range(sum(map(len, live)))])
    _check_sizes(label, live, former, ordered=False)
    owned = owned_parameters(optimizer)
    names = list(chain.from_iterable(_names(optimizer, _first(by_name))))
    # A parameter that several modules share has several names: the file may have any of them
    known = {**dict(zip(names, owned, strict=True)), **by_name}
    mine, there = set(owned), [known.get(name) for name in chain.from_iterable(former)]
    place = {parameter: index for index, parameter in enumerate(there) if parameter in mine}
    gone = [name for name in chain.from_iterable(former) if known.get(name) not in mine]
    new = [name for name, parameter in zip(names, owned, strict=True) if parameter not in place]
    if gone or new:
        raise CheckpointError(
            f"{label} holds other parameters than in the checkpoint: new are {_listed(new) or 'none'}, missing are "
            f"{_listed(gone) or 'none, and one is there twice'}{did_you_mean(gone[0], new) if gone else ''}"
        )
    group_of = [index for index, group in enumerate(former) for _ in group]
    # Groups without parameters have no names to find them by: they are matched in their order
    empty = iter([index for index, group in enumerate(former) if not group])
    order = []
    for group in live:
        found = {group_of[place[parameter]] for parameter in group} or {next(empty)}
        together = former[min(found)]
        if len(found) > 1 or len(together) != len(group):
            raise CheckpointError(
                f"{label} has its parameters in other groups: in the checkpoint {_listed(together)} are one group; "
                "expected the same groups, in any order"
            )
        order.append(min(found))
    return _Order(order, [place[parameter] for parameter in owned])


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first(by_name: ByName) -> dict[nn.Parameter, str]:
    names: dict[nn.Parameter, str] = {}
    for name, parameter in by_name.items():
        names.setdefault(parameter, name)
    return names


def _check_sizes(label: str, live: list[Any], former: list[Any], ordered: bool) -> None:
    """Raise `CheckpointError` for groups of other sizes, or another number of them."""
    sizes, before = [len(group) for group in live], [len(group) for group in former]
    if sizes != before and (ordered or sorted(sizes) != sorted(before)):
        raise CheckpointError(f"{label} has groups of {sizes} parameters, in the checkpoint of {before}")


def _arranged(optimizer: Optimizer, kept: State, by_name: ByName, label: str) -> State:
    """Return the kept ``state_dict`` with parameters and groups in the optimizer's own order, still as plain data.

    Raises:
        CheckpointError: It cannot be matched.
    """
    order, state = _order(optimizer, kept, by_name, label), kept["state"]
    if order.is_same:  # the usual case, and the only one for states whose parts are not told apart by parameter
        return dict(state)
    if not all(part in state for part in PARTS) or isinstance(optimizer, torch.optim.LBFGS):
        raise CheckpointError(
            f"{label} has its parameters in another order, and a {type(optimizer).__name__} keeps a state that does "
            "not tell them apart by name; expected the order in which the checkpoint has them"
        )
    own = {key: value for key, value in state["state"].items() if not isinstance(key, int)}  # of no parameter
    by_place = {new: state["state"][old] for new, old in enumerate(order.places) if old in state["state"]}
    groups, begin = [], 0
    for live, old in zip(optimizer.param_groups, order.groups, strict=True):
        places = [*range(begin, begin + len(live["params"]))]
        group, begin = dict(state["param_groups"][old]), begin + len(places)
        if "param_names" in group:
            names = dict(zip(group["params"], group["param_names"], strict=True))
            group["param_names"] = [names[order.places[place]] for place in places]
        groups.append({**group, "params": places})
    return {**state, "state": {**own, **by_place}, "param_groups": groups}


# Comparing


def optimizer_differs(optimizer: Optimizer, kept: State, by_name: ByName, label: str) -> Iterator[str]:
    """Yield a line for each part of a kept state that does not fit an optimizer; nothing is changed.

    Args:
        optimizer: The optimizer.
        kept: What `optimizer_state` returned; a file of an older version has no names.
        by_name: Parameters by every name that they have.
        label: What the optimizer is called in messages.
    """
    name = class_name(type(optimizer))
    if kept["class"] != name:
        yield f"{label} was a {kept['class']} and is a {name}"
    wrong = list(_malformed(optimizer, kept["state"], label))
    if wrong:
        yield from wrong
        return
    try:
        state = from_plain(_arranged(optimizer, kept, by_name, label))
    except CheckpointError as error:
        yield str(error)
        return
    if kept["class"] == name and all(part in state for part in PARTS):
        for index, parameter in enumerate(owned_parameters(optimizer)):
            if index in state["state"] and not is_lazy(parameter):
                where = f"{label}: %s of {_first(by_name).get(parameter, f'parameter {index}')!r}"
                yield from _entries_differ(optimizer, parameter, state["state"][index], where)
        yield from _options_differ(optimizer, state["param_groups"], label)


def _malformed(optimizer: Optimizer, state: State, label: str) -> Iterator[str]:
    """Yield a line where a ``state_dict`` is not made as that of an optimizer."""
    present = optimizer.state_dict()
    if state.keys() != present.keys():
        yield f"{label}: the state in the checkpoint has the parts {list(state)}, expected {list(present)}"
    elif all(part in state for part in PARTS):
        groups, entries = state["param_groups"], state["state"]
        if not isinstance(groups, list) or not all(
            isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
        ):
            yield f"{label}: 'param_groups' in the checkpoint is no list of groups with 'params'"
            return
        places = [place for group in groups for place in group["params"]]
        if not all(type(place) is int for place in places) or places != [*range(len(places))]:
            yield f"{label}: the parameters of the groups in the checkpoint are numbered {places[:8]}, expected 0, 1, …"
        if not isinstance(entries, dict) or not all(isinstance(each, dict) for each in entries.values()):
            yield f"{label}: 'state' in the checkpoint is no dict of states by parameter"
            return
        foreign = [key for key in entries if isinstance(key, (int, float)) and key not in range(len(places))]
        if foreign:
            yield f"{label}: the checkpoint has a state for parameter {foreign[0]!r} of {len(places)}"


AS_PARAMETER = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "prev", "step_size", "ax"),
}
"""Entries of torch's optimizers that have their parameter's shape and type."""

ALWAYS: dict[str, str] = {
    **dict.fromkeys(("Adam", "AdamW", "RAdam", "SparseAdam"), "step exp_avg exp_avg_sq"),
    "NAdam": "step mu_product exp_avg exp_avg_sq",
    "Adamax": "step exp_avg exp_inf",
    "Adadelta": "step square_avg acc_delta",
    "Adagrad": "step sum",
    "RMSprop": "step square_avg",
    "Rprop": "step prev step_size",
    "ASGD": "step eta mu ax",
    "Adafactor": "step",
}
"""Entries that torch's optimizers have for each parameter that was stepped."""

ROWS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "row_var": lambda shape: (*shape[:-1], 1),
    "col_var": lambda shape: (*shape[:-2], 1, *shape[-1:]),
    "variance": lambda shape: shape,
}
"""The shapes of Adafactor's averages by that of the parameter."""


def _entries_differ(optimizer: Optimizer, parameter: nn.Parameter, kept: State, where: str) -> Iterator[str]:
    """Yield a line for each entry of a parameter's state that none of torch's optimizers makes.

    What other optimizers keep, and in which shapes, is theirs to say when they load it.
    """
    cls, shape = type(optimizer), tuple(parameter.shape)
    if not cls.__module__.startswith("torch.optim.") or cls is torch.optim.LBFGS:
        return
    for name in ALWAYS.get(cls.__name__, "").split() if kept else ():
        if name not in kept:
            yield f"{where % repr(name)} is not in the checkpoint"
    present = optimizer.state.get(parameter, {})
    for name, value in kept.items():
        if name in AS_PARAMETER or name in ROWS:
            expected = ROWS[name](shape) if name in ROWS else shape
            types = {parameter.dtype, getattr(present.get(name), "dtype", parameter.dtype)}
            if value is None and name == "momentum_buffer":  # as SGD begins
                continue
            if not isinstance(value, Tensor):
                yield f"{where % repr(name)} is {describe(value)} in the checkpoint, expected a tensor"
            elif tuple(value.shape) != expected:
                yield f"{where % repr(name)} has shape {tuple(value.shape)} in the checkpoint, expected {expected}"
            elif name in AS_PARAMETER and value.dtype not in types:
                yield f"{where % repr(name)} is of {value.dtype} in the checkpoint, expected {parameter.dtype}"
        elif name == "step" and not _is_count(value):
            yield f"{where % repr(name)} is {_shown(value)} in the checkpoint, expected a whole number, 0 or more"
        elif name in ("mu_product", "eta", "mu") and not _is_number(value):
            yield f"{where % repr(name)} is {_shown(value)} in the checkpoint, expected a number"


def _is_number(value: Any) -> bool:
    """Return whether a value is a number, or a tensor of one, and not NaN."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_count(value: Any) -> bool:
    number = float(value) if _is_number(value) else -1.0
    return number >= 0 and number.is_integer()


def _shown(value: Any) -> str:
    return repr(value.item()) if isinstance(value, Tensor) and value.numel() == 1 else describe(value)


def _options_differ(optimizer: Optimizer, groups: list[State], label: str) -> Iterator[str]:
    """Yield a line for each option that an optimizer would lack, or have of another kind, after loading the groups."""
    if type(optimizer).load_state_dict is Optimizer.load_state_dict:  # it changes nothing but these, so try it
        trial: Any = object.__new__(type(optimizer))
        vars(trial).update(vars(optimizer), _optimizer_load_state_dict_post_hooks=OrderedDict())
        try:
            trial.load_state_dict({"state": {}, "param_groups": groups})
        except Exception as error:
            yield f"{label} does not take the groups of the checkpoint: {error!r}"
            return
        groups = trial.param_groups
    for index, (live, kept) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        for name, value in live.items():
            if name in ("params", "param_names"):
                continue
            if name not in kept:
                yield f"{label}: the option {name!r} of group {index} is not in the checkpoint"
            elif not _is_of_kind(kept[name], as_python(value)):
                yield f"{label}: the option {name!r} of group {index} is {describe(kept[name])}, expected one like " + (
                    f"{describe(value)}"
                )


def _is_of_kind(kept: Any, live: Any) -> bool:
    """Return whether an option is of the kind that another one is of."""
    if isinstance(live, Tensor):
        return isinstance(kept, Tensor) and kept.shape == live.shape
    if isinstance(live, (list, tuple)):
        same = isinstance(kept, (list, tuple)) and len(kept) == len(live)
        return same and all(map(_is_of_kind, kept, live))
    if isinstance(live, bool) or live is None:
        return not isinstance(kept, Tensor) if live is None else kept is None or isinstance(kept, bool)
    if isinstance(live, (int, float)):
        return not isinstance(kept, Tensor) and _is_number(kept)
    return isinstance(kept, str) if isinstance(live, str) else True


# Loading


def load_optimizer(
    optimizer: Optimizer, kept: State, by_name: ByName, label: str, device: torch.device | None = None
) -> None:
    """Load a kept state, in the precision it was kept in: torch casts it to that of the parameters.

    Raises:
        CheckpointError: It cannot be matched.
    """
    state = from_plain(_arranged(optimizer, kept, by_name, label), device=device)
    if "state" in state:
        state = {**state, "state": dict(state["state"])}
        for index, parameter in enumerate(owned_parameters(optimizer)):
            if hasattr(parameter, "to_local") and index in state["state"]:  # sharded: each process takes its part
                state["state"][index] = {
                    name: sharded_like(value, parameter) if isinstance(value, Tensor) else value
                    for name, value in state["state"][index].items()
                }
    optimizer.load_state_dict(state)
    # torch has cast entries to the type of their parameter: float32 averages of bfloat16 weights are put back
    for index, parameter in enumerate(owned_parameters(optimizer)):
        for name, value in state.get("state", {}).get(index, {}).items():
            loaded = optimizer.state[parameter].get(name)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(loaded.device, copy=True)
