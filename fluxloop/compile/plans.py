"""A whole step as one graph: forward, loss, backward and update, compiled for each shape of batch.

`trace` makes a graph of what a phase's `body` does; TorchInductor compiles it into one function,
which is called instead of the body from then on. Nobody can look in between, so this is done only
where the callbacks' declarations say that nobody needs to.

A compiled step is a function of tensors. What Python saw while it was traced is part of it: models'
attributes and modes, frozen parameters and the optimizers' options are compared, and the step is
traced anew where they have changed; what a body reads of its phase is compared at every step. What
functions reach by name, global variables and what they close over, is compared when an epoch begins.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Any

from attrs import define
from torch import nn
from torch.nn.parameter import is_lazy

from fluxloop.callback import Callback
from fluxloop.compile.by_hand import Left, left_by_hand
from fluxloop.compile.conditions import (
    HOOKS,
    changes_between_steps,
    entries_of_other_form,
    form_of_entries,
    form_of_gradient,
    has_form,
    holders_of,
    modules_of,
    rests_on,
    states_of,
)
from fluxloop.compile.fx import require_torch
from fluxloop.compile.glance import Glance, NotPlainError
from fluxloop.compile.graphs import Graph
from fluxloop.compile.hooks import hooks_of, is_own, require_no_hooks
from fluxloop.compile.optimizer_stand_in import differing
from fluxloop.compile.reach import reach_of
from fluxloop.compile.refusals import advice, require_accelerator, require_parts
from fluxloop.compile.step_averages import averages_of
from fluxloop.compile.tracing import trace
from fluxloop.compile.windows import form_of_window
from fluxloop.errors import CompileError, counted, warn_user
from fluxloop.order.explain import fired_with
from fluxloop.persist.seen import Same
from fluxloop.phase import Phase
from fluxloop.randomness import preserved
from fluxloop.state import StepState, name_of

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner
    from fluxloop.loop import Handle, Scope

MANY = 8
"""Warn after this many graphs of one phase: each takes seconds to compile."""


def require(learner: RunLearner, phases: Iterable[type[Phase]]) -> None:
    """Raise for phases whose steps cannot be one graph.

    Raises:
        CompileError: Names what stands in the way: a callback, its event and path; or the phase's own step.
    """
    for phase in phases:
        obstacles = learner.callbacks.obstacles(phase) if phase.data_key and phase.compiled else []
        if obstacles:
            found = "\n".join(f"  {obstacle}" for obstacle in obstacles)
            raise CompileError(
                f'Accelerator(compile="step") makes one graph of a step of {phase.__name__}, and this stands in '
                f"the way:\n{found}\nHandle StepBegin or StepEnd instead, leave the callback out, or have steps "
                'run as they are: Accelerator(compile=False) or compile="model" for a learner, compiled = False '
                "in a phase's class"
            )


@define
class Built:
    """What the graphs of a phase have taken.

    Args:
        graphs: How many there have been.
        traced: Seconds in which bodies were traced.
        compiled: Seconds in which torch compiled what was traced, or found it again among what it keeps on disk.
    """

    graphs: int = 0
    traced: float = 0.0
    compiled: float = 0.0

    def __str__(self) -> str:
        """Tell it in a line."""
        return f"{counted(self.graphs, 'graph')}, traced in {self.traced:.1f} s, compiled in {self.compiled:.1f} s"


class CompiledSteps:
    """The compiled steps of a learner, by phase class: ``learner._compiled``.

    Args:
        learner: Whose steps they are.

    Attributes:
        built: What the graphs of each phase have taken, by the phase's name.

    Raises:
        CompileError: This torch cannot trace steps, or the learner's accelerator asks for what no graph can hold.
    """

    def __init__(self, learner: RunLearner) -> None:
        require_torch()
        require_accelerator(learner.accelerator)
        self._learner = learner
        self._plans: dict[type[Phase], Plan] = {}
        self.built: dict[str, Built] = {}

    def require(self, phases: Iterable[type[Phase]]) -> None:
        """Raise for phases whose steps cannot be one graph: see `require`; also for hooks, optimizers and parts."""
        phases = [phase for phase in phases if phase.data_key and phase.compiled]
        require(self._learner, phases)
        if phases:
            require_no_hooks(self._learner)
        if any(phase.gradients for phase in phases):
            require_parts(self._learner)

    def run(self, phase: Phase, handle: Handle, state: StepState) -> None:
        """Do what a phase's body does, in one graph unless the phase says otherwise.

        Raises:
            CompileError: The step cannot be compiled.
        """
        learner = self._learner
        graph = None
        if phase.compiled and learner.updates.findings is None:
            if phase.gradients:
                learner.updates.drop_waiting(f"{phase.name} begins", phase.name)
            plan = self._plans.get(type(phase))
            if plan is None:
                built = self.built.setdefault(name_of(type(phase)), Built())
                plan = self._plans[type(phase)] = Plan(learner, built)
            graph = plan.graph(phase, state)
        if graph is None:
            phase.body(learner, handle, state)
        elif learner.accelerator.casting is None:
            graph.run(phase, state)
        else:  # the casts are operations of the graph; and handlers that follow it are not of the phase
            with learner.accelerator.casting.off():
                graph.run(phase, state)

    def told(self) -> dict[str, str]:
        """Return in words what the graphs of each phase have taken, by the phase's name."""
        return {phase: str(built) for phase, built in self.built.items() if built.graphs}

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledSteps:
        """Return an empty one for a copied learner: graphs are bound to the tensors of the original."""
        return CompiledSteps(copy.deepcopy(self._learner, memo))


class Plan:
    """The graphs of one phase class, and what they rest on.

    A graph is chosen in two stages. What changes seldom (modules, the loss function, optimizers) is compared
    once in an epoch of fluxloop's own, and at each step elsewhere; all graphs go where it has changed. The form
    of the entries, the phase's attributes and the optimizers' options differ from step to step, and choose one
    of the graphs that are there.

    Args:
        learner: Whose steps they are.
        built: Where it is noted what its graphs have taken.
    """

    def __init__(self, learner: RunLearner, built: Built) -> None:
        self._learner = learner
        self._built = built
        self._graphs: dict[Any, list[Graph]] = {}
        self._epoch: Scope | None = None
        self._callbacks = -1
        self._is_watched = False
        self._inside: list[Callback] = []
        self._callbacks_key: tuple[Any, ...] = ()
        self._rests_on: dict[str, Any] = {}
        self._said: dict[str, Any] = {}
        self._strange: Left | None = None
        """Parameters with gradients of nobody knows whom, as the last step, which ran as it was, found them."""
        self._adds: bool | None = None
        """Whether steps add to such gradients, as was seen of one; else they drop them first."""
        self._states: dict[str, Any] = {}
        self._glance: Glance | None = None
        self._last_used: tuple[Any, list[Graph]] = ((), [])
        """The form of the entries for which a graph was found last, and the graphs for that form, where no gradients
        wait."""
        self._last_key: Any = None
        self._why = ""

    def graph(self, phase: Phase, state: StepState) -> Graph | None:
        """Return the graph for a step, compiled now if there is none; None where this step has to run as it is.

        Raises:
            CompileError: The step cannot be compiled.
        """
        learner = self._learner
        if learner.callbacks.version != self._callbacks:
            self._look_at_callbacks(phase)
        epoch = None if learner.scope is None else learner.scope.parent
        # in an epoch of fluxloop's own nobody's code runs between the steps, so that its first step stands for all
        runs_alone = learner._running.phase is phase and type(phase).epoch is Phase.epoch
        if self._is_watched or not runs_alone or epoch is not self._epoch:
            if self._glance is None or not self._glance.shows_no_change(phase):
                self._compare(phase, again=epoch is self._epoch)
            if epoch is not self._epoch:
                self._look_around(phase)
            for graphs in self._graphs.values():
                for graph in tuple(graphs):
                    if graph.calls and not graph.calls_the_same(phase):
                        graphs.remove(graph)
            self._epoch = epoch
            if phase.gradients and self._has_strange_gradients(phase):
                self._epoch = None  # what this step does with them is looked at before the next
                return None
        waits = phase.gradients and any([slot.first_step is not None for slot in learner.updates.slots])
        form, graphs = self._last_used
        if graphs and not waits and has_form(vars(state), form, learner.accelerator.device):
            for graph in graphs:
                if graph.misfit(phase) is None:
                    return graph
        form = form_of_entries(state, learner.accelerator.device)
        key = (*self._callbacks_key, *form)
        for number, slot in enumerate(learner.updates.slots if waits else ()):
            if slot.first_step is not None:
                gradients = map(form_of_gradient, slot.parameters)
                key = (*key, (number, slot.in_block, form_of_window(slot), *gradients))
        graphs = self._graphs.get(key, [])
        for graph in graphs:
            if graph.misfit(phase) is None:
                self._last_used = (form, [] if waits else graphs)
                return graph
        made = self._make(key, phase, state)
        if made is None:
            self._epoch = None  # what this step makes is looked at before the next
        return made

    def _look_at_callbacks(self, phase: Phase) -> None:
        """Find out which callbacks are part of the graphs, or come in between.

        Raises:
            CompileError: One stands in the way of graphs.
        """
        learner = self._learner
        require(learner, [type(phase)])
        self._callbacks = learner.callbacks.version
        self._is_watched = changes_between_steps(learner, type(phase))
        self._inside = inside(learner, type(phase))
        averages = averages_of(learner, type(phase))
        self._callbacks_key = (*map(Same, self._inside), *averages)
        self._epoch, self._last_used = None, ((), [])

    def _compare(self, phase: Phase, again: bool) -> None:
        """Drop the graphs where something that they rest on has changed.

        Args:
            phase: The running phase.
            again: Whether it is compared at each step; a `Glance` tells from then on when it has to be.
        """
        before, now = self._rests_on, rests_on(self._learner, phase)
        states = states_of(self._learner) if phase.gradients else {}
        changed = [] if now == before else differing(before, now)
        # a state that was not there yet changes nothing: no graph steps its parameter, or the optimizer keeps none
        changed += [name for name, state in self._states.items() if states.get(name) != state]
        if changed:
            self._drop(changed if before else [])
        self._rests_on, self._states = now, states
        self._glance = None
        if again and not changed:
            try:
                self._glance = Glance(self._learner, phase)
            except NotPlainError:
                pass  # it is described at each step

    def _has_strange_gradients(self, phase: Phase) -> bool:
        """Return whether there are gradients that no window waits for and that a step may add to, as no graph does.

        Steps that differentiate by hand leave such, and most drop them as they begin: one is looked at, and runs as it
        is.
        """
        if self._strange is not None:
            added = self._strange.added_to()
            self._strange = None
            if added and not self._adds:
                name = self._learner.updates.names[added[0]]
                warn_user(
                    f"{name} had a gradient that learner.backward did not compute when "
                    f"a step of {phase!r} began, and the step added to it: such steps are not compiled. Expected None "
                    "there when a step begins (zero_grad), or gradients by learner.backward"
                )
            self._adds = bool(added)
        found = left_by_hand(self._learner.updates.slots)
        if not found or self._adds is False:
            return False
        self._strange = Left(found)
        return True

    def _look_around(self, phase: Phase) -> None:
        """Drop the graphs where a global variable, a closure or a class says something else than it did."""
        parts = [part for module in modules_of(self._learner, phase) for part in module.modules()]
        said = reach_of([*holders_of(phase), *self._inside], parts, self._learner.loss_fn).said()
        changed = [name.rpartition(" (")[0] for name in differing(self._said, said)]
        if changed and self._said:
            self._drop(changed)
        self._said = said

    def _drop(self, changed: list[str]) -> None:
        """Drop all graphs, for what has changed."""
        self._why = ", ".join(changed[:3])
        self._graphs.clear()
        self._last_used = (), []

    def _make(self, key: Any, phase: Phase, state: StepState) -> Graph | None:
        learner = self._learner
        modules = modules_of(learner, phase)
        if phase.gradients:
            lazy = any(is_lazy(parameter) for module in modules for parameter in module.parameters())
            if lazy or learner.streams[phase.step_stream].index == 1:
                # the first step makes what the others find: optimizers' states, a phase's queue. It runs as it is:
                # a tensor that is made inside a graph is not there for the next step
                return None
        if any(
            map(is_own, (hook for module in modules for part in module.modules() for hook in hooks_of(part, HOOKS)))
        ):
            return None  # a callback looks at what a module is given in this one step, as `SampleImages` does once
        graphs = self._graphs.setdefault(key, [])
        self._why = next((why for graph in graphs if (why := graph.misfit(phase))), self._why)
        if not self._why and self._last_key is not None:
            self._why = ", ".join(f"the entry {name!r}" for name in entries_of_other_form(self._last_key, key))
        graph = self._build(phase, modules, state)
        if graph is None:
            return None
        self._last_key = key
        graphs.append(graph)
        del graphs[:-MANY]  # numbers that change at every step do not fill the memory
        count = self._built.graphs
        if count >= MANY and (count & (count - 1)) == 0:  # then of twice as many
            warn_user(
                f"the step of {type(phase).__name__} has been compiled {count} times, which takes seconds each, "
                f"the last time for {self._why or 'another batch'}; expected {advice(self._why)}, or compile=False"
            )
        self._why = ""
        return graph

    def _shown_by(self) -> Iterator[Callable[..., AbstractContextManager[None]]]:
        """Give what callbacks open while a step is compiled, as `ProgressBar` does."""
        for node in self._learner.callbacks.graph.nodes:
            if hasattr(node.callback.unwrapped, "_compiling"):
                yield node.callback.unwrapped._compiling

    def _build(self, phase: Phase, modules: list[nn.Module], state: StepState) -> Graph | None:
        """Trace a step and compile it, while callbacks tell so; return None where this step has to run as it is."""
        learner, built, took = self._learner, self._built, list[float]()
        with preserved(), ExitStack() as told:
            for shows in self._shown_by():
                told.enter_context(shows(learner, phase, took))
            began = perf_counter()
            traced = trace(learner, phase, modules, self._inside, state)
            middle = perf_counter()
            built.traced += middle - began
            if traced.makes_state:  # an optimizer's, of parameters that were frozen, or wait for their first update
                return None
            graph = Graph(learner, phase, self._inside, traced)
            built.compiled += perf_counter() - middle
            built.graphs += 1
            took.append(perf_counter() - began)
        return graph


def inside(learner: RunLearner, phase: type[Phase]) -> list[Callback]:
    """List the callbacks that have handlers that are part of a phase's graphs."""
    events = [event for event in fired_with(phase) if event.inside_step]
    return [
        node.callback
        for node in learner.callbacks.graph.nodes
        if node.callback.in_compiled_step == "inside" and any(node.callback.handler(e, phase) for e in events)
    ]
