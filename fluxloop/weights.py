"""Weights have names: those of a model, of a part of one, and averaged copies beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fluxloop.access import Access, parse, weights_path
from fluxloop.errors import ModelError, PhaseError, describe, did_you_mean
from fluxloop.models import like
from fluxloop.state import Container

Models = dict[str | None, nn.Module]


class Weights(Container):
    """The weights of a learner by name: ``learner.weights["G@ema"]``.

    A name is that of a model (``"model"`` for a single one), of a part of one (``"encoder.0"``),
    or either with ``@`` and the name of a view, which is another module: the averaged copy that
    `EMA` keeps. Nothing ever puts one in the place of another.

    Args:
        models: The learner's models by name, None for a single one.
        given: The models as the learner holds them.
    """

    def __init__(self, models: Models, given: Any) -> None:
        self._models = models
        self._given = given
        self._views: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> nn.Module:
        """Give the module of a name.

        Raises:
            ModelError: There is none.
        """
        base, at, view = canonical(name).partition("@")
        if not at:
            return self._live(base)
        for whole, module in self._views.items():
            owner, _, kept = whole.partition("@")
            if kept == view and (base == owner or owner == "model" or base.startswith(f"{owner}.")):
                part = base if owner == "model" != base else base[len(owner) + 1 :]
                return submodule(module, part, name)
        raise ModelError(
            f"there are no weights {name!r}; the views are {sorted(self._views) or 'none'}: a callback such as "
            f"EMA({base!r}, 0.999) keeps '{base}@ema'"
        )

    def __setitem__(self, name: str, module: nn.Module) -> None:
        """Keep a module as a view of weights.

        Raises:
            ModelError: The name is no view's, or there are no weights to be a view of.
        """
        name = canonical(name)
        base, at, view = name.partition("@")
        if not at or not view.isidentifier():
            raise ModelError(f"weights {name!r} were assigned; expected the name of a view, such as '{base}@ema'")
        if not isinstance(module, nn.Module):
            raise ModelError(f"weights {name!r} were assigned {describe(module)}; expected a torch.nn.Module")
        self._live(base)
        self._views[name] = module

    def _live(self, base: str) -> nn.Module:
        if None in self._models:
            return submodule(self._models[None], "" if base == "model" else base, base)
        first, _, rest = base.partition(".")
        if first not in self._models:
            known = [str(name) for name in self._models]
            raise ModelError(f"there are no weights {base!r}; the models are {known}{did_you_mean(first, known)}")
        return submodule(self._models[first], rest, base)

    def view(self, view: str) -> Any:
        """Arrange the models as the learner holds them, each that has this view by its view.

        Raises:
            PhaseError: None of them has it.
        """
        names = {name: "model" if name is None else str(name) for name in self._models}
        found = {name: self._views[f"{n}@{view}"] for name, n in names.items() if f"{n}@{view}" in self._views}
        if not found:
            raise PhaseError(
                f"a phase runs the weights '@{view}', and there are {sorted(self._views) or 'none'}; keep them with a "
                f"callback: EMA({next(iter(names.values()))!r}, 0.999)"
            )
        if hasattr(self._given, "_fields"):
            return self._given._replace(**{str(name): module for name, module in found.items()})
        return like(self._given, {**self._models, **found})

    def __contains__(self, name: object) -> bool:
        try:
            self[str(name)]
        except ModelError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        """Give the names of models and views."""
        yield from ("model" if name is None else str(name) for name in self._models)
        yield from self._views

    def __repr__(self) -> str:
        return f"Weights({', '.join(self)})"


class DeclaredWeights:
    """The weights as a callback may have them: those whose paths it declared."""

    __slots__ = ("_access", "_weights")

    def __init__(self, weights: Weights, access: Access) -> None:
        self._weights = weights
        self._access = access

    def __getitem__(self, name: str) -> nn.Module:
        self._access.require(parse(weights_path(name), self._access.callback), "read")
        return self._weights[name]

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._access.require(parse(weights_path(name), self._access.callback), "write")
        self._weights[name] = module

    def __contains__(self, name: str) -> bool:
        return name in self._weights


def canonical(name: str) -> str:
    """Leave out the ``model.`` that a path begins with."""
    return name[len("model.") :] if name.startswith("model.") else name


def submodule(module: nn.Module, path: str, name: str) -> nn.Module:
    """Give a part of a module by its dotted path; the module itself for an empty one.

    Raises:
        ModelError: There is no such part.
    """
    for part in path.split(".") if path else ():
        children = dict(module.named_children())
        if part not in children:
            raise ModelError(
                f"there are no weights {name!r}: {type(module).__name__} has no part {part!r}, it has "
                f"{sorted(children) or 'none'}{did_you_mean(part, children)}"
            )
        module = children[part]
    return module
