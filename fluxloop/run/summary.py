"""What a learner is made of, as a table: `Learner.summary`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from attrs import frozen
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fluxloop.compute.models import save_tensors
from fluxloop.compute.modes import watching
from fluxloop.data.passes import untouched
from fluxloop.data.sources import complete
from fluxloop.errors import describe
from fluxloop.nested import arguments_among, call_with, tensors
from fluxloop.randomness import preserved

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

UNKNOWN = "?"
HEAD = ("module", "class", "output", "parameters", "trainable")


@frozen
class Row:
    """One module.

    Args:
        path: As ``learner.weights`` knows it; a single model's parts without the model's name.
        kind: Its class.
        outputs: Shapes of the tensors it returned for one batch, ``"(32, 10)"``; ``"?"`` where unknown.
        parameters: Numbers in its parameters and those of its parts; None while lazy ones have no shape.
        trainable: How many of them are trained.
        depth: 0 for a model, 1 for its parts, and so on.
    """

    path: str
    kind: str
    outputs: str
    parameters: int | None
    trainable: int | None
    depth: int


@frozen
class OptimizerRow:
    """One optimizer.

    Args:
        name: Its name, None for the only one.
        kind: Its class.
        settings: Of each parameter group, as ``"lr=0.001, betas=(0.9, 0.999)"``.
        parameters: Numbers in its parameters.
        owns: Names of its parameters.
    """

    name: str | None
    kind: str
    settings: tuple[str, ...]
    parameters: int
    owns: tuple[str, ...]


@frozen(repr=False)
class Summary:
    """A learner's modules and optimizers; prints as a table.

    Args:
        rows: One per module, a model before its parts; a module used twice stands where it is first.
        optimizers: One per optimizer.
        parameters: Numbers in all parameters, shared ones counted once; lazy ones are left out.
        trainable: How many of them require gradients.
        megabytes: Of all parameters and buffers, in units of 10**6 bytes.
        note: Why shapes are unknown, or "".
        compiled: With ``Accelerator(compile="step")``, how many graphs each phase has had by now, and the seconds
            that tracing and compiling them took; by the phase's name.
    """

    rows: tuple[Row, ...]
    optimizers: tuple[OptimizerRow, ...]
    parameters: int
    trainable: int
    megabytes: float
    note: str = ""
    compiled: Mapping[str, str] = {}

    def __str__(self) -> str:
        """Lay out the table."""
        return "\n".join(self._lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return a page for notebooks: the modules as a table, and the lines below it."""
        from fluxloop.screen.pages import Markup, element, page, preformatted, table

        rows = [
            (
                Markup(f'<span style="padding-left: {1.2 * row.depth}em">{element(row.path)}</span>'),
                row.kind,
                row.outputs,
                _number(row.parameters),
                _number(row.trainable),
            )
            for row in self.rows
        ]
        below = list(self._lines())[len(rows) + 1 :]
        return page(table(HEAD, rows, numbers=[3, 4]), preformatted("\n".join(below)))

    def _lines(self) -> Iterator[str]:
        cells = [
            ("  " * row.depth + row.path, row.kind, row.outputs, _number(row.parameters), _number(row.trainable))
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(HEAD, *cells, strict=True)]
        for row in (HEAD, *cells):
            words = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
            numbers = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
            yield "  ".join([*words, *numbers]).rstrip()
        rest = self.parameters - self.trainable
        yield f"{self.parameters:,} parameters: {self.trainable:,} trainable, {rest:,} frozen; {self.megabytes:.3g} MB"
        for optimizer in self.optimizers:
            name = "" if optimizer.name is None else f" {optimizer.name!r}"
            owns = optimizer.owns if len(optimizer.owns) <= 4 else (*optimizer.owns[:2], "…", optimizer.owns[-1])
            yield (
                f"optimizer{name}: {optimizer.kind} of {optimizer.parameters:,} parameters in "
                f"{len(optimizer.owns)} tensors ({', '.join(owns)})"
            )
            yield from (f"  {settings}" for settings in optimizer.settings)
        if self.note:
            yield f"output shapes are unknown: {self.note}"
        yield from (f"compiled steps of {phase}: {told}" for phase, told in self.compiled.items())


def summary(learner: RunLearner, batch: Any = None, depth: int | None = None) -> Summary:
    """List what a learner is made of; see `Learner.summary`."""
    shapes: dict[nn.Module, str] = {}
    note = _run(learner, batch, shapes)
    rows = [
        row
        for name, model in learner.models.items()
        for row in _rows(name, model, shapes)
        if depth is None or row.depth <= depth
    ]
    parameters = _distinct(p for module in learner.modules() for p in module.parameters())
    held = [*parameters, *_distinct(b for module in learner.modules() for b in module.buffers())]
    known = [p for p in parameters if not is_lazy(p)]
    return Summary(
        tuple(rows),
        tuple(_optimizers(learner)),
        sum(p.numel() for p in known),
        sum(p.numel() for p in known if p.requires_grad),
        sum(t.numel() * t.element_size() for t in held if not is_lazy(t)) / 1e6,
        note,
        {} if learner._compiled is None else learner._compiled.told(),
    )


def _distinct(held: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in held}.values())


def _number(count: int | None) -> str:
    return "lazy" if count is None else f"{count:,}"


def _rows(name: str | None, model: nn.Module, shapes: dict[nn.Module, str]) -> Iterator[Row]:
    for path, module in model.named_modules():
        parameters = list(module.parameters())
        lazy = any(is_lazy(p) for p in parameters)
        full = ".".join(part for part in (name or "", path) if part) or "model"
        yield Row(
            full,
            type(module).__name__,
            shapes.get(module, UNKNOWN),
            None if lazy else sum(p.numel() for p in parameters),
            None if lazy else sum(p.numel() for p in parameters if p.requires_grad),
            path.count(".") + 1 if path else 0,
        )


def _optimizers(learner: RunLearner) -> Iterator[OptimizerRow]:
    for slot in learner.updates.slots:
        settings = []
        for group in slot.optimizer.param_groups:
            told = {
                key: value
                for key, value in group.items()
                if key != "params" and value is not None and value is not False
            }
            settings.append(", ".join(f"{key}={_setting(value)}" for key, value in told.items()))
        owned = [p for group in slot.optimizer.param_groups for p in group["params"]]
        yield OptimizerRow(
            slot.name,
            type(slot.optimizer).__name__,
            tuple(settings),
            sum(p.numel() for p in owned if not is_lazy(p)),
            tuple(learner.updates.names.get(p, "a parameter of no model") for p in owned),
        )


def _setting(value: Any) -> str:
    return f"{value.item():g}" if isinstance(value, Tensor) and value.numel() == 1 else f"{value}"


# Output shapes


def _run(learner: RunLearner, batch: Any, shapes: dict[nn.Module, str]) -> str:
    """Run the model on a batch on the side, and note the shapes of what each module returns.

    Returns:
        Why that is not possible, or an empty text.
    """
    if len(learner.models) > 1:
        return f"there are several models, {[str(name) for name in learner.models]}, and only a phase says how they run"
    (model,) = learner.models.values()
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return "some modules are lazy and have seen no batch"
    with ExitStack() as undone:
        undone.enter_context(preserved())
        buffers = (buffer for buffer in model.buffers() if not is_lazy(buffer))  # some change in eval mode too
        undone.callback(save_tensors([model], buffers))
        if batch is None:
            source = vars(learner.data).get("training")
            if source is None or hasattr(source, "__next__"):
                return "there is no training data that can be iterated again; give a batch: learner.summary(batch)"
            undone.enter_context(untouched(source))
            try:
                batch = next(complete(source))
            except StopIteration:
                return "the training data gave no batch"
        entries = {"xs": batch[0] if isinstance(batch, (tuple, list)) and batch else batch}
        learner.accelerator.place(entries)
        for module in model.modules():
            undone.callback(module.register_forward_hook(_note(shapes)).remove)
        undone.enter_context(watching(model))  # in eval mode: batch norm would count the batch in
        return _try(model, entries["xs"], shapes)


def _try(model: nn.Module, xs: Any, shapes: dict[nn.Module, str]) -> str:
    """Run the model on inputs; of a dict whose other entries are no arguments of the model, on those that are.

    Returns:
        Why that is not possible, or an empty text.
    """
    try:
        call_with(model, xs)
    except Exception as error:
        shapes.clear()
        said = f"the model does not run on {describe(xs)} ({type(error).__name__}: {error})"
    else:
        return ""
    if not isinstance(xs, Mapping):
        return said
    named = arguments_among(model, xs)  # such as an image without its label, which a loss takes
    if 0 < len(named) < len(xs) and not _try(model, named, shapes):
        return ""
    return f"{said}; give what your phase gives it: learner.summary(batch[{next(iter(xs), 'xs')!r}])"


def _note(shapes: dict[nn.Module, str]) -> Callable[..., None]:
    def note(module: nn.Module, given: Any, made: Any) -> None:
        # A module that is used several times is shown as it was used first
        shapes.setdefault(module, ", ".join(str(tuple(tensor.shape)) for tensor in tensors(made)) or "-")

    return note
