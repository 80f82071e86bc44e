"""The weights of modules as plain data, and weights alone from a file: of fluxloop's, or a module's own."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fluxloop.errors import CheckpointError
from fluxloop.persist.modules import UNINITIALIZED, is_uninitialized, uninitialize
from fluxloop.persist.plain import from_plain, to_plain

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

State = dict[str, Any]


def weights_of(module: nn.Module) -> State:
    """Return what a module saves by itself, as plain data."""
    state, label = module.state_dict(), type(module).__name__
    return {
        "state": {
            name: UNINITIALIZED
            if is_lazy(value)
            else (value if isinstance(value, Tensor) else to_plain(value, f"{name!r} of {label}"))
            for name, value in state.items()
        },
        "metadata": to_plain(dict(getattr(state, "_metadata", {})), f"the metadata of {label}"),
    }


def restore_weights(module: nn.Module, kept: State) -> None:
    """Have a module load what `weights_of` returned."""
    lazy = {name for name, value in kept["state"].items() if is_uninitialized(value)}
    tensors = {name: from_plain(value) for name, value in kept["state"].items() if name not in lazy}
    # Lazy tensors are missing on purpose, which strict would refuse; what else is missing is looked at below
    result = module.load_state_dict(with_metadata(tensors, from_plain(kept["metadata"])), strict=not lazy)
    if lazy:
        uninitialize(module, lazy)
        if set(result.missing_keys) - lazy or result.unexpected_keys:
            raise CheckpointError(f"{type(module).__name__} does not load its state: {result}")


def with_metadata(tensors: dict[str, Any], metadata: dict[str, Any]) -> OrderedDict[str, Any]:
    """Return a module's state as its ``state_dict`` returned it, with the versions of its parts."""
    state = OrderedDict(tensors)
    state._metadata = metadata  # type: ignore[attr-defined]  # where torch keeps it
    return state


def load_weights(learner: RunLearner, state: State, name: str, strict: bool) -> list[str]:
    """Load weights from a file's state, and return the names of the others; see `Learner.load_weights`.

    Raises:
        CheckpointError: They do not fit.
    """
    from fluxloop.checkpoint.misfits import weights_differ  # nothing of it is needed where no weights are loaded

    live = dict(learner.models) if name == "model" else {None: learner.weights[name]}
    modules = {key or "": module for key, module in live.items()}
    kept, metadata = _weights_in(state, name)
    if set(modules) != set(kept):
        raise CheckpointError(
            f"weights of {sorted(modules)} were asked for, and the file has those of {sorted(kept)}; name one of the "
            "models: learner.load_weights(path, 'G')"
        )
    wrong = [line for key, module in modules.items() for line in weights_differ(module, kept[key], key or "the model")]
    if wrong and strict:
        raise CheckpointError(
            "the weights do not fit:\n  " + "\n  ".join(wrong) + "\nload_weights(..., strict=False) takes those that do"
        )
    _check_any_fits(modules, kept)
    others: list[str] = []
    # torch refuses other shapes even where strict=False: so what does not fit is left out before
    for key, module in modules.items():
        own = module.state_dict()
        fitting = {n: t for n, t in kept[key].items() if n in own and _fits(own[n], t)}
        module.load_state_dict(with_metadata(fitting, metadata.get(key, {})), strict=False)
        others += sorted({".".join(filter(None, (key, n))) for n in (own.keys() | kept[key].keys()) - fitting.keys()})
    return others


def _weights_in(state: State, name: str) -> tuple[dict[str, State], dict[str, Any]]:
    """Return the tensors and the metadata that a file has for a model, a part of one, or all models, by model."""
    if "fluxloop" not in state:  # a module's own state_dict()
        return {"": state}, {"": getattr(state, "_metadata", {})}
    models, own = state["models"], name.partition(".")[0]
    source = models if name == "model" else {"": models.get(name, models.get("", models.get(own)))}
    kept = {key: value["state"] for key, value in source.items() if value is not None}
    metadata = {key: value["metadata"] for key, value in source.items() if value is not None}
    if name != "model" and name not in models and ("" in models or own != name):  # a part of a model
        part = name if "" in models else name.partition(".")[2]
        inside = re.compile(re.escape(part) + r"(?:\.|$)")
        for of_models in (kept, metadata):
            of_models[""] = {inside.sub("", k, 1): v for k, v in of_models[""].items() if inside.match(k)}
    return kept, metadata


def _fits(own: Any, tensor: Any) -> bool:
    """Return whether a tensor can take the place of another one: any can that of one that has no shape yet."""
    return isinstance(tensor, Tensor) and (is_lazy(own) or getattr(own, "shape", None) == tensor.shape)


def _check_any_fits(modules: dict[str, nn.Module], kept: dict[str, Any]) -> None:
    """Raise where not one tensor of a file fits the models by name and shape.

    Raises:
        CheckpointError: Lists the names of both, and says what to type where they differ by what stands in front.
    """
    own = {name: tensor for module in modules.values() for name, tensor in module.state_dict().items()}
    theirs = {name: tensor for state in kept.values() for name, tensor in state.items()}
    if not own or any(name in own and _fits(own[name], tensor) for name, tensor in theirs.items()):
        return

    def shown(names: Iterable[str]) -> str:
        names = list(names)
        return f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}" or "none"

    raise CheckpointError(
        "no tensor of the file fits by name and shape, so that nothing would be taken\n"
        f"  the model has: {shown(own)}\n  the file has: {shown(theirs)}{_advise_prefix(own, theirs)}"
    )


def _advise_prefix(own: Iterable[str], theirs: Iterable[str]) -> str:
    """Return what to type where names differ by a prefix alone, such as ``"module."``; else an empty text."""
    own, theirs = list(own), list(theirs)
    longer = {a[: -len(b)] for a in theirs for b in own if a.endswith(f".{b}")}
    for prefix in sorted(longer):
        if all(f"{prefix}{name}" in theirs for name in own):
            return (
                f"\n  its names begin with {prefix!r}: take that away first:\n"
                f"    torch.save({{n.removeprefix({prefix!r}): t for n, t in torch.load(path).items()}}, new_path)"
            )
    shorter = {a[: -len(b)] for a in own for b in theirs if a.endswith(f".{b}")}
    for prefix in sorted(shorter):
        if any(f"{prefix}{name}" in own for name in theirs):
            return f"\n  they are those of a part: learner.load_weights(path, {prefix.rstrip('.')!r})"
    return ""
