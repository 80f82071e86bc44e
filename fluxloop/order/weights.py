"""Weights have names: those of a model, of a part of one, and averaged copies beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fluxloop.compute.models import arrange_like
from fluxloop.errors import CallbackError, ModelError, PhaseError, describe, did_you_mean
from fluxloop.order.access import Access, Path, keeper, parse, weights_path
from fluxloop.state import Container

Models = dict[str | None, nn.Module]
Follower = Callable[[nn.Module, bool], object]


class Weights(Container):
    """The weights of a learner by name: ``learner.weights["G@ema"]``.

    A name is that of a model (``"model"`` for a single one) or of a part of one (``"encoder.0"``),
    also written as a path (``"model.encoder.0"``). With ``@`` and the name of a view it is another
    module: the averaged copy that `EMA` keeps. Nothing ever puts one in the place of another.

    Args:
        models: The learner's models by name, None for a single one.
        given: The models as the learner holds them.
    """

    def __init__(self, models: Models, given: Any) -> None:
        self._models = models
        self.given = given
        """The live models as the learner holds them, whatever view a phase runs."""
        self.views: dict[tuple[str, Path], nn.Module] = {}
        """By the view's name and the way from the models."""
        self.followers: dict[tuple[str, Path], Follower] = {}
        """What brings a view up to date before it is read, by the same."""
        self._known: dict[str, tuple[str, Path]] = {}
        """What names have been read as: averages ask in every step."""

    def __getitem__(self, name: str) -> nn.Module:
        """Return the module of a name.

        Raises:
            ModelError: There is none.
        """
        view, parts = self._read(name)
        if not view:
            whole = len(parts) == 1 and None not in self._models  # as averages ask in every step
            return self._models[parts[0]] if whole and parts[0] in self._models else self._live(parts, name)
        owners = [owner for kept, owner in self.views if kept == view and parts[: len(owner)] == owner]
        if owners:
            owner = max(owners, key=len)  # the nearest: "G.encoder@ema" may be kept beside "G@ema"
            self._bring_up_to_date(view, owner)
            return submodule(self.views[view, owner], ".".join(parts[len(owner) :]), name)
        raise ModelError(
            f"there are no weights {name!r}; the views are {self._view_names() or 'none'}: a callback such as "
            f"{keeper(name.partition('@')[0], view)} keeps {name!r}"
        )

    def __setitem__(self, name: str, module: nn.Module) -> None:
        """Keep a module as a view of weights.

        Raises:
            ModelError: The name is not that of a view, or there are no weights of which it could be one.
        """
        view, parts = self._read(name)
        if not view.isidentifier():
            raise ModelError(f"weights {name!r} were assigned; expected the name of a view, such as 'G@ema'")
        if not isinstance(module, nn.Module):
            raise ModelError(f"weights {name!r} were assigned {describe(module)}; expected a torch.nn.Module")
        self._live(parts, name)  # raises where there is nothing of which it could be a view
        self.views[view, parts] = module

    def __delitem__(self, name: str) -> None:
        """Forget a view."""
        key = self._read(name)
        del self.views[key]
        self.followers.pop(key, None)

    def follow(self, name: str, follower: Follower) -> None:
        """Register what brings a view up to date before anybody reads it, and when live weights have been loaded.

        Args:
            name: Of the view.
            follower: Called as ``follower(module, anew)``: `anew` says that other weights have been loaded.
        """
        self.followers[self._read(name)] = follower

    def begin_anew(self, name: str) -> None:
        """Call the followers of all views of weights, or of a part of them, after others have been loaded.

        Args:
            name: Of the live weights; ``"model"`` for those of all models.
        """
        view, loaded = self._read(name)
        if view:
            return
        if name == "model":
            loaded = ()
        for key, follower in self.followers.items():
            owner = key[1]
            # They are the same, or one is a part of the other
            if key in self.views and loaded[: len(owner)] == owner[: len(loaded)]:
                follower(self.views[key], True)

    def _bring_up_to_date(self, view: str, owner: Path) -> None:
        follower = self.followers.get((view, owner))
        if follower is not None:
            follower(self.views[view, owner], False)

    def _read(self, name: str) -> tuple[str, Path]:
        """Split a name into its view ("" for the live weights) and the way from the learner's models.

        Raises:
            ModelError: It is no name of weights.
        """
        if type(name) is str and name in self._known:
            return self._known[name]
        if not isinstance(name, str):
            raise ModelError(f"weights {name!r} were asked for; expected a name such as 'G', 'encoder.0' or 'G@ema'")
        try:
            root, *parts = parse(weights_path(name), "weights")
        except CallbackError as error:
            raise ModelError(
                f"weights {name!r} were asked for; expected a name such as 'G', 'encoder.0' or 'G@ema'"
            ) from error
        if "model" in self._models and (not parts or parts[0] not in self._models):
            parts = ["model", *parts]  # one of several models is called so
        found = self._known[name] = root.partition("@")[2], tuple(parts)
        return found

    def _live(self, parts: Path, name: str) -> nn.Module:
        if None in self._models:
            return submodule(self._models[None], ".".join(parts), name)
        if not parts or parts[0] not in self._models:
            known = [str(known) for known in self._models]
            raise ModelError(
                f"there are no weights {name!r}; the models are {known}{did_you_mean(parts[0] if parts else '', known)}"
            )
        return submodule(self._models[parts[0]], ".".join(parts[1:]), name)

    def _view_names(self) -> list[str]:
        return [f"{'.'.join(parts) or 'model'}@{view}" for view, parts in self.views]

    def copies(self, view: str) -> dict[str | None, nn.Module]:
        """Return the models that have a view, by name: that view of each.

        Raises:
            PhaseError: None of them has it.
        """
        paths: dict[str | None, Path] = {name: () if name is None else (str(name),) for name in self._models}
        found = {name: self.views[view, path] for name, path in paths.items() if (view, path) in self.views}
        if not found:
            raise PhaseError(
                f"a phase runs the weights '@{view}', and there are {self._view_names() or 'none'}; keep them with a "
                f"callback: {keeper(str(next(iter(self._models)) or 'model'), view)}"
            )
        for name in found:
            self._bring_up_to_date(view, paths[name])
        return found

    def view(self, view: str) -> Any:
        """Arrange the models as the learner holds them, each that has this view by its view.

        Raises:
            PhaseError: None of them has it.
        """
        found = self.copies(view)
        if hasattr(self.given, "_fields"):
            return self.given._replace(**{str(name): module for name, module in found.items()})
        return arrange_like(self.given, {**self._models, **found})

    def __contains__(self, name: object) -> bool:
        try:
            self[str(name)]
        except ModelError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        """Return the names of models and views."""
        yield from ("model" if name is None else str(name) for name in self._models)
        yield from self._view_names()

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

    def follow(self, name: str, follower: Follower) -> None:
        """Register what brings a view up to date before anybody reads it; see `Weights.follow`."""
        self._access.require(parse(weights_path(name), self._access.callback), "write")
        self._weights.follow(name, follower)

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)


def submodule(module: nn.Module, path: str, name: str) -> nn.Module:
    """Return a part of a module by its dotted path; the module itself for an empty one.

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
