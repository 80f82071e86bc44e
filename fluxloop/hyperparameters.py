"""Hyperparameters: what can be changed while training, read and set by dispatch on what it is.

``set_hyperparameter(learner, LearningRate("G"), 1e-4)`` changes the value that the optimizer uses
in its next step. A hyperparameter of one's own is a class and two functions::

    @frozen
    class Temperature(HyperParameter):
        writes = ("loss_fn",)

    @get_hyperparameter.register(Temperature)
    def _(learner, hp):
        return learner.loss_fn.temperature

    @set_hyperparameter.register(Temperature)
    def _(learner, hp, value):
        learner.loss_fn.temperature = value

An attribute of any object needs neither: ``Attribute(loss_fn, "temperature")``. Another option of
optimizers needs a line: ``class Dampening(OptimizerOption): options = ("dampening",)``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, ClassVar, TypeVar

import torch
from attrs import field, frozen
from multipledispatch import Dispatcher
from torch import Tensor
from torch.optim import Optimizer

from fluxloop.compute.models import by_name
from fluxloop.compute.optimizers import options_given
from fluxloop.errors import OptimizerError, describe, did_you_mean
from fluxloop.guard.assign import fields_of_the_class
from fluxloop.guard.given import as_python, is_number
from fluxloop.order.view import look_up

F = TypeVar("F", bound=Callable[..., Any])


@fields_of_the_class
@frozen
class HyperParameter:
    """Base of what `get_hyperparameter` reads and `set_hyperparameter` sets.

    A subclass without arguments may be given as the class: ``{LearningRate: schedule}``. In the
    class, ``writes`` says which paths of the learner are changed, as a callback's ``writes`` does.

    Example:
        >>> class Temperature(HyperParameter):
        ...     writes = ("loss_fn",)
        >>> @set_hyperparameter.register(Temperature)
        ... def set_temperature(learner, hp, value):
        ...     learner.loss_fn.temperature = value
        >>> scheduler = Scheduler({Temperature: linear(total=100, start=1.0, end=0.1)})
    """

    writes: ClassVar[Sequence[str]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields_of_the_class(cls)

    @property
    def label(self) -> str:
        """Its name in records: the class's, in lower case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def overlaps(self, other: HyperParameter) -> bool:
        """Return whether setting this one may change the other."""
        return self == other


@frozen
class OptimizerOption(HyperParameter):
    """An option in the parameter groups of optimizers.

    Args:
        optimizer: Name of the optimizer; left out, all of them.
        group: Index of the parameter group, from 0; left out, all of them.

    Raises:
        OptimizerError: The name is no text, or the index no whole number from 0 on.

    Example:
        >>> class Dampening(OptimizerOption):
        ...     options = ("dampening",)
        >>> model = torch.nn.Linear(2, 1)
        >>> learner = Learner(model, optimizer=torch.optim.SGD(model.parameters(), momentum=0.9, dampening=0.2))
        >>> get_hyperparameter(learner, Dampening)
        0.2
    """

    optimizer: str | None = field(default=None)
    group: int | None = field(default=None)

    options: ClassVar[Sequence[str]] = ()
    """Names to try in a parameter group, in order; the first that is there is used."""
    scales: ClassVar[bool] = False
    """Whether a schedule for several parameter groups scales what each was given, as torch's schedulers do; otherwise
    groups that differ are an error, and one has to be named."""

    @optimizer.validator
    def _check_optimizer(self, attribute: object, name: object) -> None:
        if name is not None and not isinstance(name, str):
            raise OptimizerError(
                f"{type(self).__name__}({describe(name)}) was given; expected the name of an optimizer: "
                f"{type(self).__name__}('generator')"
            )

    @group.validator
    def _check_group(self, attribute: object, group: Any) -> None:
        if group is not None and (not is_number(group, whole=True) or group < 0):
            raise OptimizerError(
                f"{type(self).__name__}(group={group!r}) was given; expected the index of a parameter group, 0 or more"
            )

    @property
    def writes(self) -> tuple[str, ...]:  # type: ignore[override]  # the optimizer's
        """The optimizer, or all of them."""
        named = self.optimizer is not None and "." not in self.optimizer
        return (f"optimizer.{self.optimizer}" if named else "optimizer",)

    @property
    def label(self) -> str:
        """Such as ``"learning_rate"``, ``"learning_rate/G"`` or ``"learning_rate/G/0"``."""
        parts = [super().label, self.optimizer, self.group]
        return "/".join(str(part) for part in parts if part is not None)

    def overlaps(self, other: HyperParameter) -> bool:
        """Return whether both may set an option of one parameter group."""
        return (
            isinstance(other, OptimizerOption)
            and not set(self.options).isdisjoint(other.options)
            and (self.optimizer == other.optimizer or None in (self.optimizer, other.optimizer))
            and (self.group == other.group or None in (self.group, other.group))
        )

    def groups(self, learner: Any) -> list[tuple[dict[str, Any], str]]:
        """Find the parameter groups that are meant, and the option's name in each.

        Args:
            learner: A learner, or a view of one that may read the optimizer.

        Raises:
            OptimizerError: There is no such optimizer or group, or it has no such option.
        """
        found = []
        for name, optimizer in self.optimizers(learner):
            groups: list[dict[str, Any]] = optimizer.param_groups
            if self.group is not None and self.group >= len(groups):
                raise self._refuse(name, optimizer, f"{len(groups)} parameter groups; there is no {self.group}")
            for group in groups if self.group is None else [groups[self.group]]:
                for option in self.options:
                    if option in group:
                        found.append((group, option))
                        break
                else:
                    known = ", ".join(sorted(key for key in group if key not in ("params", "param_names")))
                    wanted = " or ".join(repr(option) for option in self.options)
                    raise self._refuse(name, optimizer, f"no {wanted}; it has {known}")
        return found

    def given(self, learner: Any) -> dict[str, Any]:
        """Return the present values of the groups that are meant, by their place: ``{"G/0": 0.1, "G/1": 0.01}``."""
        return {place: _number(group[option]) for place, group, option in self.places(learner)}

    def places(self, learner: Any) -> list[tuple[str, dict[str, Any], str]]:
        """Return the parameter groups that are meant, each with its place and the option's name in it."""
        places = [
            f"{'' if name is None else name}/{index}"
            for name, optimizer in self.optimizers(learner)
            for index in (range(len(optimizer.param_groups)) if self.group is None else [self.group])
        ]
        return [(place, group, option) for place, (group, option) in zip(places, self.groups(learner), strict=True)]

    def places_given(self, learner: Any) -> list[tuple[str, dict[str, Any], str]]:
        """Return `places` with the options that the groups had when the learner was made."""
        groups = [
            {**group, **options_given(optimizer, index)}
            for _, optimizer in self.optimizers(learner)
            for index, group in enumerate(optimizer.param_groups)
            if self.group in (None, index)
        ]
        return [(place, group, option) for (place, _, option), group in zip(self.places(learner), groups, strict=True)]

    def _refuse(self, name: str | None, optimizer: Optimizer, what: str) -> OptimizerError:
        label = type(optimizer).__name__ if name is None else f"{type(optimizer).__name__} {name!r}"
        return OptimizerError(f"{self!r}: {label} has {what}")

    def optimizers(self, learner: Any) -> list[tuple[str | None, Optimizer]]:
        """Find the optimizers that are meant, with their names.

        Raises:
            OptimizerError: There is no optimizer of that name.
        """
        if self.optimizer is None:
            return by_name(learner.optimizer)
        try:
            return [(self.optimizer, look_up(learner.optimizer, self.optimizer))]
        except (AttributeError, TypeError):
            held = getattr(learner, "_learner", learner).optimizer  # past a view, for the message alone
            known = [str(name) for name, _ in by_name(held) if name is not None]
        kind = type(self).__name__
        several = [name for name in known if name.startswith(f"{self.optimizer}.")]
        if several:
            each = ", ".join(f"{kind}({name!r}): ..." for name in several)
            raise OptimizerError(
                f"{self!r}: {self.optimizer!r} has the optimizers {several}; expected the name of one, {several[0]!r}, "
                f"or all of them by name: {{{each}}}"
            )
        raise OptimizerError(
            f"{self!r}: there is no optimizer {self.optimizer!r}; the learner has "
            f"{known or f'a single one without a name: {kind}()'}{did_you_mean(self.optimizer, known)}"
        )


@frozen
class LearningRate(OptimizerOption):
    """The learning rate: ``lr``.

    Example:
        >>> learner = testing.toy_learner()
        >>> set_hyperparameter(learner, LearningRate, 0.01)
        >>> learner.optimizer.param_groups[0]["lr"]
        0.01
    """

    options = ("lr",)
    scales = True


@frozen
class WeightDecay(OptimizerOption):
    """The weight decay: ``weight_decay``.

    Example:
        >>> learner = testing.toy_learner(Scheduler({WeightDecay: linear(total=16, start=0.0, end=0.1)}))
        >>> history = learner.fit(2)
        >>> get_hyperparameter(learner, WeightDecay)
        0.1
    """

    options = ("weight_decay",)
    scales = True


@frozen
class Momentum(OptimizerOption):
    """The momentum: ``momentum`` of SGD and RMSprop, the first of Adam's ``betas``.

    Example:
        >>> learner = Learner(torch.nn.Linear(2, 1), optimizer=torch.optim.Adam)
        >>> set_hyperparameter(learner, Momentum, 0.8)
        >>> learner.optimizer.param_groups[0]["betas"]
        (0.8, 0.999)
    """

    options = ("momentum", "betas")


@frozen
class Betas(OptimizerOption):
    """Adam's ``betas``, a pair: weights of the past in the averages of the gradient and of its square.

    Example:
        >>> learner = Learner(torch.nn.Linear(2, 1), optimizer=torch.optim.Adam)
        >>> set_hyperparameter(learner, Betas, (0.5, 0.9))
        >>> get_hyperparameter(learner, Betas)
        (0.5, 0.9)
    """

    options = ("betas",)


@frozen(repr=False)
class Attribute(HyperParameter):
    """An attribute of any object: a phase's loss weight, an average's decay, a module's temperature.

    A tensor is filled in place.

    Args:
        thing: The object.
        name: Of the attribute.
        writes: Paths of the learner that this changes, where others have to know: ``("loss_fn",)``.
        label: Its name in records; left out, such as ``"EMA.decay"``.

    Raises:
        AttributeError: There is no such attribute.

    Example:
        >>> gan = GANPhase(r1=1.0)
        >>> learner = testing.toy_learner(Scheduler({Attribute(gan, "r1"): linear(total=16, start=1.0, end=0.0)}))
        >>> history = learner.fit(2)
        >>> gan.r1
        0.0
    """

    thing: Any = field(eq=id)
    name: str
    _writes: tuple[str, ...] = field(default=(), converter=tuple, kw_only=True)
    _label: str | None = field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Attribute(..., {self.name!r}) was given; expected the name of an attribute")
        if not hasattr(self.thing, self.name):
            known = [name for name in dir(self.thing) if not name.startswith("_")]
            raise AttributeError(
                f"{describe(self.thing)} has no attribute {self.name!r} to schedule{did_you_mean(self.name, known)}"
            )

        if isinstance(getattr(self.thing, self.name), MethodType):
            raise TypeError(
                f"Attribute({type(self.thing).__name__}, {self.name!r}) was given, which is a method; expected the "
                "name of an attribute that holds a number"
            )

    @property
    def writes(self) -> tuple[str, ...]:  # type: ignore[override]  # as given
        """What was given."""
        return self._writes

    @property
    def label(self) -> str:
        """As given, or such as ``"EMA.decay"``."""
        return self._label or f"{type(self.thing).__name__}.{self.name}"

    def overlaps(self, other: HyperParameter) -> bool:
        """Return whether both are the same attribute of the same object."""
        return isinstance(other, Attribute) and self.thing is other.thing and self.name == other.name

    def __repr__(self) -> str:
        return f"Attribute({type(self.thing).__name__}, {self.name!r})"


def as_hyperparameter(given: Any) -> HyperParameter:
    """Return a hyperparameter; of a class, the one that it makes without arguments.

    Raises:
        TypeError: Something else was given.
    """
    if isinstance(given, type) and issubclass(given, HyperParameter):
        return given()
    if not isinstance(given, HyperParameter):
        raise TypeError(
            f"{describe(given)} was given as a hyperparameter; expected one such as LearningRate, LearningRate('G') or "
            "Attribute(thing, 'name')"
        )
    return given


class _OnHyperParameter(Dispatcher):  # type: ignore[misc]  # multipledispatch has no types
    """A function of (learner, hyperparameter, …), dispatched on the hyperparameter's type."""

    def register(self, *types: type, **options: Any) -> Callable[[F], F]:
        """Register a function for a type of hyperparameter."""
        decorator: Callable[[F], F] = super().register(*types, **options)
        return decorator

    def __call__(self, learner: Any, hp: Any, *value: Any) -> Any:
        """Call the function that is registered for the hyperparameter's type."""
        hp = as_hyperparameter(hp)
        function = self.dispatch(type(hp))
        if function is None:
            name = type(hp).__name__
            raise NotImplementedError(
                f"{self.name} does not know {name}; teach it:\n    @{self.name}.register({name})\n"
                f"    def _(learner, hp{', value' if value else ''}): ..."
            )
        return function(learner, hp, *value)


get_hyperparameter = _OnHyperParameter(
    "get_hyperparameter",
    doc="""Return the present value of a hyperparameter: ``get_hyperparameter(learner, LearningRate)``.

Of an optimizer's option in several parameter groups with different values it is a tuple of them.

>>> get_hyperparameter(testing.toy_learner(), LearningRate)
0.001
""",
)

set_hyperparameter = _OnHyperParameter(
    "set_hyperparameter",
    doc="""Set a hyperparameter: ``set_hyperparameter(learner, LearningRate("G"), 1e-4)``.

It is in use from the optimizer's next step on. Where an optimizer holds a tensor, it is filled in place.

>>> learner = testing.toy_learner()
>>> set_hyperparameter(learner, LearningRate, 0.01)
>>> get_hyperparameter(learner, LearningRate)
0.01
""",
)


@get_hyperparameter.register(OptimizerOption)
def _get_option(learner: Any, hp: OptimizerOption) -> Any:
    values = [_number(group[option]) for group, option in hp.groups(learner)]
    return values[0] if all(value == values[0] for value in values) else tuple(values)


@set_hyperparameter.register(OptimizerOption)
def _set_option(learner: Any, hp: OptimizerOption, value: Any) -> None:
    groups = hp.groups(learner)
    for _, option in groups:
        check_option(f"set_hyperparameter(learner, {hp!r}, ...)", option, value)
    for group, option in groups:
        put(group, option, value)


@get_hyperparameter.register(Momentum)
def _get_momentum(learner: Any, hp: Momentum) -> Any:
    held = [group[option] for group, option in hp.groups(learner)]
    values = [_number(value[0] if isinstance(value, (tuple, list)) else value) for value in held]
    return values[0] if all(value == values[0] for value in values) else tuple(values)


@set_hyperparameter.register(Momentum)
def _set_momentum(learner: Any, hp: Momentum, value: float) -> None:
    groups = hp.groups(learner)
    check_option(f"set_hyperparameter(learner, {hp!r}, ...)", "momentum", value)
    for group, option in groups:
        put(group, option, (value, *group[option][1:]) if option == "betas" else value)


@get_hyperparameter.register(Attribute)
def _get_attribute(learner: Any, hp: Attribute) -> Any:
    return _number(getattr(hp.thing, hp.name))


@set_hyperparameter.register(Attribute)
def _set_attribute(learner: Any, hp: Attribute, value: Any) -> None:
    held = getattr(hp.thing, hp.name)
    if isinstance(held, Tensor):
        fill(held, value)
    else:
        setattr(hp.thing, hp.name, value)


def check_option(whose: str, option: str, value: Any) -> None:
    """Raise for a value that no optimizer can use as a learning rate, momentum, betas or weight decay.

    Raises:
        OptimizerError: It is no number, not finite, or negative.
    """
    if option not in ("lr", "momentum", "betas", "weight_decay"):
        return
    for each in value if isinstance(value, (tuple, list)) else (value,):
        single = isinstance(each, Tensor) and each.numel() == 1
        numeric = single or is_number(each)
        if not numeric or not math.isfinite(each) or each < 0:
            raise OptimizerError(f"{whose} gave {option} the value {value!r}; expected a finite number, 0 or more")


def put(group: dict[str, Any], option: str, value: Any) -> None:
    """Put a value into a parameter group; a tensor there is filled in place, as captured graphs need it."""
    held = group[option]
    if isinstance(held, Tensor):
        fill(held, value)
    elif isinstance(held, tuple) and any(isinstance(item, Tensor) for item in held):
        for item, new in zip(held, value, strict=True):
            if isinstance(item, Tensor):
                fill(item, new)
            elif item != new:
                raise OptimizerError(f"{option} holds tensors and numbers, of which {item} cannot become {new}")
    else:
        group[option] = as_python(value)


@torch.no_grad()
def fill(tensor: Tensor, value: Any) -> None:
    """Fill a tensor with a number in place."""
    if value is not tensor:
        tensor.fill_(value)


def _number(value: Any) -> Any:
    """Return a tensor with one element as a number, another value as it is."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    if isinstance(value, (tuple, list)):
        return tuple(_number(item) for item in value)
    return value
