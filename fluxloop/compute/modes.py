"""Train and eval mode: of modules, and of optimizers whose weights differ between the two.

Such an optimizer has ``train()`` and ``eval()`` as modules have (schedule-free ones do): it steps in
train mode, and the weights to evaluate are those that it puts in place in eval mode. Training epochs
put it into train mode, and back into eval mode when they end; whatever evaluates meanwhile has it
in eval mode for that time, and the weights of train mode back afterwards, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer


def switch_modes(models: Iterable[nn.Module], train: bool) -> Callable[[], None]:
    """Put models into train or eval mode; return what puts each submodule back into its own."""
    models = list(models)
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.train(train)

    def put_back() -> None:
        for module, mode in modes:
            module.training = mode

    return put_back


def is_held_in_eval(model: nn.Module) -> bool:
    """Return whether a model stays in eval mode where others are trained: it is in it, and all of it is frozen."""
    return not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@contextmanager
def watching(*models: nn.Module) -> Iterator[None]:
    """Run models in eval mode and without gradients for a while; every submodule gets its own mode back.

    An optimizer with modes of its own that trains one of them is in eval mode meanwhile, too.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Dropout())
        >>> with watching(model):
        ...     preds = model(torch.ones(1, 4))
        >>> preds.requires_grad, model.training
        (False, True)
    """
    put_back = [switch_modes(models, False), *_in_eval(models)]
    try:
        with torch.no_grad():
            yield
    finally:
        for undo in reversed(put_back):
            undo()


class OptimizerMode:
    """The mode of an optimizer that has ``train()`` and ``eval()``.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._noted = False
        self._first = [_options(group) for group in optimizer.param_groups]

    @staticmethod
    def of(optimizer: Optimizer) -> OptimizerMode | None:
        """Return the mode of an optimizer, None where it has none."""
        has_modes = all(callable(getattr(type(optimizer), name, None)) for name in ("train", "eval"))
        return OptimizerMode(optimizer) if has_modes else None

    @property
    def is_train(self) -> bool:
        """Whether it is train mode, as the optimizer says, or as it was put into last."""
        said = self.optimizer.param_groups[0].get("train_mode")
        return said if isinstance(said, bool) else self._noted

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the optimizer."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def set(self, train: bool) -> None:
        """Put the optimizer into a mode, and the weights of that mode in place."""
        self._join_groups()
        if train:
            self.optimizer.train()
            _training.add(self)
        else:
            if any(self.optimizer.state.values()):  # before its first step both modes have the same weights
                self.optimizer.eval()
            _training.discard(self)
        self._noted = train

    def _join_groups(self) -> None:
        """Have parameter groups that joined later be in the mode of the first one, in which they have been stepped.

        Such a group (`add_param_group`, in the middle of training) comes with the mode of a new optimizer, which would
        leave its weights where they are as the others go into eval mode, and move them wrongly on the way back.
        """
        for group in self.optimizer.param_groups:
            if isinstance(group.get("train_mode"), bool):
                group["train_mode"] = self.is_train

    def switch(self, train: bool) -> Callable[[], None]:
        """Put the optimizer into a mode for a while; return what puts it and its weights back, to the bit."""
        if self.is_train is train:
            return _nothing
        parameters = self.parameters
        # Eval mode is computed from the weights of train mode, and train mode from those of eval mode: exactly only on
        # paper. So the weights of train mode are saved where it is left for a while; those of eval mode are not needed.
        saved = [] if train else [parameter.detach().clone() for parameter in parameters]
        self.set(train)

        def put_back() -> None:
            self.set(not train)
            with torch.no_grad():
                for parameter, value in zip(parameters, saved, strict=False):
                    parameter.copy_(value)  # the way there and back is rounded

        return put_back

    def begin_anew(self) -> None:
        """Have the optimizer forget what it knows of other weights than those that are in place now."""
        if not any(self.optimizer.state.values()):
            return
        train, groups = self.is_train, self.optimizer.param_groups
        first = [*self._first, *map(_options, groups[len(self._first) :])]
        state = self.optimizer.state_dict()
        for packed, group, options in zip(state["param_groups"], groups, first, strict=True):
            scheduled = {name: group[name] for name in ("lr", "initial_lr") if name in group}
            fresh = {**copy.deepcopy(options), **scheduled, "params": packed["params"]}
            packed.clear()
            packed.update(fresh)
        self.optimizer.load_state_dict({**state, "state": {}})
        if train:
            self.set(True)


_training: WeakSet[OptimizerMode] = WeakSet()
"""The modes of optimizers that have been put into train mode."""


def switch_optimizers(modes: Iterable[OptimizerMode], train: bool) -> Callable[[], None]:
    """Put optimizers into train or eval mode for a while; return what puts them and their weights back."""
    undone = [mode.switch(train) for mode in modes]

    def put_back() -> None:
        for undo in undone:
            undo()

    return put_back


def _in_eval(models: Iterable[nn.Module]) -> list[Callable[[], None]]:
    """Put optimizers that train some models into eval mode for a while; return what puts them back."""
    if not _training:
        return []
    own = {parameter for model in models for parameter in model.parameters()}
    return [mode.switch(False) for mode in list(_training) if not own.isdisjoint(mode.parameters)]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _nothing() -> None:
    """Put nothing back."""
