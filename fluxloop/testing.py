"""For tests of phases and callbacks, users' and our own: a toy learner, an event recorder, assertions, declarations."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from fluxloop.callback import Callback, Handler, UnsafeCallback, on
from fluxloop.checkpoint.folder import write
from fluxloop.checkpoint.gathering import gather
from fluxloop.data.loaders import TensorBatches
from fluxloop.data.passes import untouched
from fluxloop.errors import CheckpointError, DataError, describe
from fluxloop.events import Event
from fluxloop.learner import Learner
from fluxloop.order.access import SERVICES, covers, dotted, parse, weights_path
from fluxloop.order.access import Path as AccessPath
from fluxloop.order.view import FACTS
from fluxloop.order.weights import Weights
from fluxloop.persist.plain import MARK
from fluxloop.phase import Phase
from fluxloop.phases.supervised import TrainingPhase
from fluxloop.randomness import preserved, start_generators
from fluxloop.run.scope import place_of
from fluxloop.state import Container, State

MakesPhases = Callable[[], Iterable[Phase]] | None


class Coefficient(nn.Module):
    """The model with one weight: ``preds = xs * value``.

    >>> Coefficient(3.0)(torch.ones(2, 1)).flatten().tolist()
    [3.0, 3.0]
    """

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))

    def forward(self, xs: Tensor) -> Tensor:
        """Multiply inputs of shape (N, 1)."""
        return xs * self.value


def toy_learner(
    *given: Callback,
    callbacks: Iterable[Callback] = (),
    coefficient: float = 3.0,
    num_batches: int = 16,
    batch_size: int = 8,
    optimizer: Any = None,
    default_callbacks: bool = False,
    seed: int = 0,
    **options: Any,
) -> Learner:
    """Make a learner that fits one coefficient, fast: FluxTraining's ``testlearner``.

    Training and validation data are the same `num_batches` batches of inputs in [1, 100) and their
    multiples by `coefficient`; the loss is the mean absolute error. Five epochs come within 0.1.

    Args:
        given: Callbacks.
        callbacks: More callbacks.
        coefficient: What there is to learn.
        num_batches: Batches per epoch.
        batch_size: Rows per batch.
        optimizer: As for `Learner`; left out, SGD with a learning rate of 0.001.
        default_callbacks: As for `Learner`.
        seed: Decides the data and the run.
        options: Further arguments of `Learner`.

    >>> learner = toy_learner()
    >>> history = learner.fit(5)
    >>> abs(learner.model.value.item() - 3) < 0.1
    True
    """
    generator = torch.Generator().manual_seed(seed)
    xs = 1 + 99 * torch.rand(num_batches * batch_size, 1, generator=generator)
    batches = TensorBatches(xs, coefficient * xs, batch_size=batch_size)
    return Learner(
        Coefficient(),
        nn.functional.l1_loss,
        **{"data": (batches, batches), **options},
        optimizer=partial(torch.optim.SGD, lr=0.001) if optimizer is None else optimizer,
        callbacks=[*given, *callbacks],
        default_callbacks=default_callbacks,
        seed=seed,
    )


@define
class EventRecorder(Callback):
    """Record every event that is fired, in order, with its phase, in ``trace``.

    >>> recorder = EventRecorder()
    >>> toy_learner(recorder).fit(1), recorder.trace[0]
    (..., ('FitBegin', 'FittingPhase'))
    """

    trace: list[tuple[str, str]] = field(factory=list, init=False)

    draws = False
    _begins_anywhere = True
    in_compiled_step = "after"

    @on(Event)
    def record(self, event: Event, phase: Phase, learner: Any) -> None:
        """Record an event."""
        self.trace.append((type(event).__name__, type(phase).__name__))

    @property
    def events(self) -> list[str]:
        """The names of the events alone."""
        return [event for event, _ in self.trace]


def assert_order(learner: Learner, *callbacks: type[Callback] | str) -> None:
    """Assert that callbacks run in this order, and that the graph proves it.

    Args:
        learner: Whose callbacks.
        callbacks: Classes or ids, each of which the learner has.

    Raises:
        AssertionError: One is missing, or no chain of edges orders two neighbours.

    >>> assert_order(toy_learner(Metrics(), Recorder()), Recorder, Metrics)
    """
    ids = [callback if isinstance(callback, str) else _id_of(learner, callback) for callback in callbacks]
    for id in ids:
        if id not in learner.callbacks.order:
            raise AssertionError(f"the learner has no callback {id!r}; it has {learner.callbacks.order}")
    for before, after in pairwise(ids):
        if not learner.callbacks.graph.reaches(before, after):
            edges = "\n".join(f"  {edge}" for edge in learner.callbacks.graph.edges) or "  none"
            raise AssertionError(f"nothing orders {before} before {after}; the edges are\n{edges}")


def _id_of(learner: Learner, cls: type[Callback]) -> str:
    for node in learner.callbacks.graph.nodes:
        if isinstance(node.callback.unwrapped, cls):
            return node.id
    raise AssertionError(f"the learner has no {cls.__name__}; it has {learner.callbacks.order}")


def bits(learner: Learner) -> dict[str, Tensor]:
    """Return a copy of every parameter, buffer and optimizer tensor by name, to compare with another's.

    >>> bits(toy_learner())
    {'model..value': tensor([0.])}
    """
    found: dict[str, Tensor] = {}
    for model_name, model in learner.models.items():
        for name, tensor in model.state_dict().items():
            found[f"model.{model_name or ''}.{name}"] = tensor.detach().clone()
    for slot in learner.updates.slots:
        for index, state in slot.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    found[f"optimizer.{slot.name or ''}.{index}.{name}"] = value.detach().clone()
    return found


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare bytes: a NaN equals the same NaN."""
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def assert_same_bits(first: Learner, second: Learner) -> None:
    """Assert that two learners have the same weights and optimizer states, to the bit.

    Raises:
        AssertionError: Names the first tensor that differs, and by how much.

    >>> assert_same_bits(toy_learner(seed=1), toy_learner(seed=1))
    """
    a, b = bits(first), bits(second)
    if a.keys() != b.keys():
        raise AssertionError(f"the learners hold different tensors: {sorted(a.keys() ^ b.keys())}")
    for name, tensor in a.items():
        if tensor.shape != b[name].shape or tensor.dtype != b[name].dtype:
            kinds = [f"{describe(each)} ({each.dtype})" for each in (tensor, b[name])]
            raise AssertionError(f"{name} is {' and '.join(kinds)}")
        if not _same_bits(tensor, b[name]):
            difference = (tensor.double() - b[name].double()).abs().max().item()
            raise AssertionError(f"{name} differs by up to {difference:.3g}")


def assert_observer(
    observer: Callback | Phase, make_learner: Callable[[], Learner], *, epochs: int = 2, phases: MakesPhases = None
) -> None:
    """Assert that a callback or a phase only watches: training is the same to the bit without it.

    Args:
        observer: A callback, or a phase to run after each training epoch.
        make_learner: Makes the same learner each time: seed what it draws.
        epochs: How long to train.
        phases: Makes the phases that train; left out, a `TrainingPhase`.

    Raises:
        AssertionError: A weight or an optimizer state differs.
        TypeError: `observer` is neither.

    >>> assert_observer(EventRecorder(), toy_learner)
    >>> assert_observer(ValidationPhase(), toy_learner)
    """
    if not isinstance(observer, (Callback, Phase)):
        raise TypeError(f"{describe(observer)} was given; expected a callback or a phase")
    plain, watched = make_learner(), make_learner()
    if isinstance(observer, Callback):
        watched.add_callback(observer)
    for learner, also in ((plain, []), (watched, [observer] if isinstance(observer, Phase) else [])):
        learner.fit(epochs, phases=[*([TrainingPhase()] if phases is None else phases()), *also])
    assert_same_bits(plain, watched)


class _Killed(BaseException):
    """Stands for the end of a process: nobody handles it."""


def assert_resumes_exactly(
    make_learner: Callable[[], Learner],
    *,
    epochs: int = 2,
    phases: MakesPhases = None,
    at: Iterable[int] | None = None,
    ignore: Iterable[str] = (),
) -> None:
    """Assert that a run that is killed and resumed ends as one that is not, to the bit.

    Trains to the end; then, for each moment between two steps at which a checkpoint can be written, trains up to it,
    writes a file, and has a new learner go on from that. At the end everything a checkpoint keeps is compared: weights,
    optimizers, metrics, counts, random streams, and the states of callbacks and phases.

    Args:
        make_learner: Makes the same learner each time, as a new process would: seed what it draws, and
            give it new callbacks.
        epochs: How long to train.
        phases: Makes the phases, as for ``fit``; left out, those of a plain fit.
        at: Which moments, counted from 1; left out: all.
        ignore: Parts to leave out, such as ``"callbacks.Timer"``: what a clock decides.

    Raises:
        AssertionError: Something differs; names the moment and the first part.

    >>> assert_resumes_exactly(toy_learner, epochs=1, at=[1, 7, 16])
    """

    def run(learner: Learner, resume: Path | None = None) -> Learner:
        learner.fit(epochs, phases=None if phases is None else list(phases()), resume=resume)
        return learner

    plain = _parts(run(make_learner()).state_dict())
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        moments = _Moments(path)
        run(moments.watched(make_learner()))
        if moments.seen == 0:
            raise AssertionError("no checkpoint could be written: the fit had no step")
        for moment in range(1, moments.seen + 1) if at is None else at:
            path.unlink(missing_ok=True)
            try:
                run(_Moments(path, moment).watched(make_learner()))
            except _Killed:
                pass
            if not path.exists():
                raise AssertionError(
                    f"there are {moments.seen} moments to write a checkpoint at, and no number {moment}"
                )
            with preserved():
                start_generators(moment)  # a new process has drawn other numbers
                resumed = _parts(run(make_learner(), path).state_dict())
            _compare(plain, resumed, moment, tuple(ignore))


class _Moments:
    """Counts the moments of a fit at which a checkpoint can be written; writes one, and ends everything there."""

    def __init__(self, path: Path, kill_at: int | None = None) -> None:
        self.path = path
        self.kill_at = kill_at
        self.seen = 0

    def watched(self, learner: Learner) -> Learner:
        """Register with the learner's next fit."""
        learner.at_safe_point(lambda: self._look(learner))
        return learner

    def _look(self, learner: Learner) -> None:
        try:
            place = place_of(learner)
        except CheckpointError:
            return  # a checkpoint waits until the epoch ends
        if place is None or getattr(learner.scope, "finished", False):  # a complete run
            return
        self.seen += 1
        if self.seen == self.kill_at:
            write(self.path, gather(learner, place))
            raise _Killed


def _parts(state: Any, path: str = "") -> dict[str, Any]:
    """Lay a state out by path; tensors are copied. Whether an object was changed or replaced makes no difference."""
    if isinstance(state, dict) and state.get(MARK) == "changed":
        return _parts(state["to"], path)
    if isinstance(state, dict):
        return {k: v for key, item in state.items() for k, v in _parts(item, f"{path}.{key}".lstrip(".")).items()}
    if type(state) in (list, tuple):
        return {k: v for number, item in enumerate(state) for k, v in _parts(item, f"{path}.{number}").items()}
    return {path: state.detach().clone() if isinstance(state, Tensor) else state}


def _compare(plain: dict[str, Any], resumed: dict[str, Any], moment: int, ignore: tuple[str, ...]) -> None:
    """Raise `AssertionError` where two states differ."""
    where = f"resumed from moment {moment}, the run differs"
    made = re.compile(r"optimizers\.[^.]*\.defaults\.")  # some optimizers add to them when they load a state
    names = [n for n in (*plain, *(resumed.keys() - plain)) if not n.startswith(ignore) and not made.match(n)]
    names.sort(key=lambda name: not name.startswith(("callbacks.", "phases.")))  # where a cause may be, first
    for name in names:
        if name not in plain or name not in resumed:
            raise AssertionError(f"{where}: {name} is there in one of the two alone")
        a, b = plain[name], resumed[name]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            same = a.shape == b.shape and a.dtype == b.dtype and _same_bits(a, b)
        else:
            same = type(a) is type(b) and (a == b or (a != a and b != b))
        if not same and isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.numel() > 1:
            index = int((a != b).reshape(-1).int().argmax())
            a, b, name = a.reshape(-1)[index].item(), b.reshape(-1)[index].item(), f"{name}, element {index},"
        if not same:
            raise AssertionError(f"{where}: {name} is {b!r}, and was {a!r}")


def infer_access(callback: Callback, learner: Learner, *, phases: Iterable[Phase] | None = None) -> tuple[Any, Any]:
    """Find out what a callback reads and writes in one step, and print the declarations to paste.

    Runs one batch of each phase on a copy of the learner; what happens only on other occasions
    (another epoch, another branch) is not seen.

    Args:
        callback: The callback; its own declarations only say when it runs.
        learner: A learner it would run in; not changed.
        phases: As for ``fit``.

    Returns:
        ``(reads, writes)``, tuples of paths.

    >>> infer_access(Recorder(), toy_learner())
    reads = ()
    writes = ('cbstate.history',)
    ((), ('cbstate.history',))
    """
    trial = copy.deepcopy(learner, {id(learner.data): State(_first_batches(learner))})
    others = [c for c in trial.callbacks.given() if type(c.unwrapped) is not type(callback.unwrapped)]
    traced = _Traced(copy.deepcopy(callback), [type(other.unwrapped) for other in others])
    trial.set_callbacks([*others, traced])
    trial.fit(1, phases=None if phases is None else copy.deepcopy(list(phases)))
    writes = _shortest(traced.writes_seen)
    reads = _shortest(path for path in traced.reads_seen if not any(covers(w, path) for w in traced.writes_seen))
    print(f"reads = {reads!r}\nwrites = {writes!r}")
    return reads, writes


def _first_batches(learner: Learner) -> dict[str, list[Any]]:
    """Return data with one batch each.

    Raises:
        DataError: Some can be iterated once only.
    """
    batches = {}
    for key, source in vars(learner.data).items():
        if hasattr(source, "__next__"):
            raise DataError(f"the {key!r} data can be iterated once only; infer with data that can be iterated again")
        with untouched(source), preserved():
            batches[key] = [next(iter(source))]
    return batches


def _shortest(paths: Iterable[AccessPath]) -> tuple[str, ...]:
    """Write paths as users do, leaving out those that another one covers."""
    found = set(paths)
    return tuple(sorted(dotted(p) for p in found if not any(q != p and covers(q, p) for q in found)))


class _Traced(UnsafeCallback):
    """Runs a callback's handlers on a learner that notes what they touch."""

    draws = None

    def __init__(self, callback: Callback, after: list[type[Callback]]) -> None:
        self.callback = callback
        known = callback.reads or callback.writes or callback.run_after  # so that others find what it provides
        self.reads = tuple(callback.reads)  # type: ignore[misc]  # computed per instance
        self.writes = tuple(callback.writes)  # type: ignore[misc]  # computed per instance
        self.run_after = tuple(callback.run_after) if known else tuple(after)  # type: ignore[misc]  # computed, too
        self.reads_seen: set[AccessPath] = set()
        self.writes_seen: set[AccessPath] = set()

    def init(self, learner: Any) -> None:
        self.callback.init(_Noting(learner, (), self))

    def handles(self) -> list[tuple[type[Event], type[Phase]]]:
        return self.callback.handles()

    def handler(self, event: type[Event], phase: type[Phase]) -> Handler | None:
        inner = self.callback.handler(event, phase)
        if inner is None:
            return None
        return lambda event, phase, learner: inner(event, phase, _Noting(learner, (), self))


MUTATORS = frozenset(
    "add append clear discard extend insert pop popitem remove reverse setdefault sort update".split()  # noqa: SIM905
)
"""Methods that change a container in place."""


class _Noting:
    """Stands for a container on a path, and notes which paths below it are read and written."""

    def __init__(self, value: Any, path: AccessPath, traced: _Traced) -> None:
        vars(self).update(_value=value, _path=path, _traced=traced)

    def _enter(self, value: Any, name: str) -> Any:
        path: AccessPath = (*self._path, name)[:2]
        if name in MUTATORS and callable(value):
            self._traced.writes_seen.add(self._path)
            return value
        if isinstance(value, (Container, dict, list, set)):
            if len(path) > 1 or name not in ("step", "cbstate", "data"):
                self._traced.reads_seen.add(path)
            return _Noting(value, path, self._traced)
        self._traced.reads_seen.add(path)
        return value

    def __getattr__(self, name: str) -> Any:
        if (not self._path and name in (*SERVICES, *FACTS)) or name.startswith("__"):
            return getattr(self._value, name)
        if not self._path and name == "weights":
            return _NotingWeights(self._value.weights, self._traced)
        return self._enter(getattr(self._value, name), name)

    def __getitem__(self, key: Any) -> Any:
        return self._enter(self._value[key], str(key))

    def __setattr__(self, name: str, value: Any) -> None:
        self._traced.writes_seen.add((*self._path, name)[:2])
        setattr(self._value, name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._traced.writes_seen.add(self._path)
        self._value[key] = value

    def __contains__(self, key: object) -> bool:
        self._traced.reads_seen.add((*self._path, str(key))[:2])
        return key in self._value

    def __iter__(self) -> Iterator[Any]:
        self._traced.reads_seen.add(self._path)
        return iter(self._value)

    def __len__(self) -> int:
        return len(self._value)


class _NotingWeights:
    """Stands for the weights, and notes which are read and written."""

    def __init__(self, weights: Weights, traced: _Traced) -> None:
        self._weights = weights
        self._traced = traced

    def __getitem__(self, name: str) -> Any:
        self._traced.reads_seen.add(parse(weights_path(name), "infer_access"))
        return self._weights[name]

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._traced.writes_seen.add(parse(weights_path(name), "infer_access"))
        self._weights[name] = module

    def follow(self, name: str, follower: Any) -> None:
        self._traced.writes_seen.add(parse(weights_path(name), "infer_access"))
        self._weights.follow(name, follower)
