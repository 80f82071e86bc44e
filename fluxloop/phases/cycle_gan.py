"""CycleGAN: translate between two kinds of images, of which no pairs are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from fluxloop.compute.precision import in_full_precision
from fluxloop.errors import BatchError, PhaseError, describe
from fluxloop.events import LossBegin
from fluxloop.guard.given import check_number
from fluxloop.losses.adversarial import AdversarialLoss, least_squares
from fluxloop.phase import AbstractTrainingPhase
from fluxloop.phases.objective import require_parts
from fluxloop.phases.twin import TwinPhase
from fluxloop.processes.gather import all_gather, compare_rows, gather_equal

if TYPE_CHECKING:
    from fluxloop.loop import Handle
    from fluxloop.processes.group import Group
    from fluxloop.state import StepState

POOLS = ("pool_a", "stored_a", "pool_b", "stored_b")
"""The attributes that make up its pools."""


@in_full_precision
def _passing(fake: Tensor) -> Tensor:
    return ((fake - 1) ** 2).mean()


cycle_gan_loss = AdversarialLoss("least-squares of CycleGAN", least_squares.critic, _passing)
"""Least squares as the authors' code has them: halved for critics, and not for generators."""


Pool = tuple[Tensor, Tensor]
"""Images (size, ...), and how many there are: a tensor with a whole number, so that nobody has to wait for it."""


def draw_numbers(pool: Pool, new: Tensor) -> Tensor:
    """Draw what decides an exchange from torch's global generator: numbers for each place, then for each image."""
    return torch.cat([torch.rand(len(rows), device=new.device) for rows in (pool[0], new)])


def draw_from_pool(pool: Pool, new: Tensor, numbers: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose past fake images, which a critic sees in place of new ones (Shrivastava et al., 2017).

    A pool stores images until it is full. From then on each new one is exchanged, with probability 1/2, for a stored
    one, which is seen in its place; the images of a batch are exchanged for different ones.

    Args:
        pool: The pool, which stays as it is: `put_into_pool` changes it.
        new: Images (N, ...).
        numbers: What `draw_numbers` drew; left out, they are drawn.

    Returns:
        What a critic sees (N, ...), the places that the images may take (N,), and which of them do (N,).

    Raises:
        BatchError: There are more images than the pool can hold.
    """
    images, stored = pool
    size, count = len(images), len(new)
    if count > size:
        raise BatchError(
            f"a pool of {size} images was given {count} at once; expected at most as many as it holds: "
            f"CycleGANPhase(pool_size={count})"
        )
    numbers = draw_numbers(pool, new) if numbers is None else numbers
    order, exchanged = numbers[:size].argsort()[:count], numbers[size:] < 0.5
    following = stored + torch.arange(count, device=new.device)
    full = stored >= size
    places = torch.where(full, order, following % size)
    old = (full & exchanged).reshape(-1, *[1] * (new.ndim - 1))
    return torch.where(old, images[places], new), places, torch.where(full, exchanged, following < size)


def put_into_pool(pool: Pool, new: Tensor, places: Tensor, taken: Tensor) -> Pool:
    """Store images in the places that they take, in place; return the pool."""
    images, stored = pool
    kept = torch.where(taken.reshape(-1, *[1] * (new.ndim - 1)), new, images[places])
    return images.index_copy_(0, places, kept), (stored + len(new)).clamp(max=len(images))


class CycleGANPhase(AbstractTrainingPhase):
    """CycleGAN (Zhu et al., 2017): two generators translate between kinds A and B, and there and back is the identity.

    1. ``fake_b = ab(a)``, ``fake_a = ba(b)``; back again, ``ba(fake_b)`` and ``ab(fake_a)``. 2. The generators' update:
    both are to pass for real, plus `cycle` times the absolute error of the cycles, plus `cycle * identity` times that
    of ``ba(a)`` and ``ab(b)``, which are to change nothing. 3. The critics' update, on real images and on fake ones
    from a pool of past ones. As in the paper each pair has one optimizer.

    Args:
        cycle: Weight of the cycles (lambda of the paper).
        identity: Weight of the identity, relative to the cycles'; 0 leaves it out (0.5 in the authors' code).
        pool_size: Number of past fake images of each kind; 0 for none.
        loss: Of critics and generators; left out, least squares, halved for critics alone.

    Models: ``generators``, with the parts ``ab`` and ``ba``, and ``critics``, with the parts ``a`` and ``b``:
    ``nn.ModuleDict({"ab": ..., "ba": ...})``. Batches: ``(a, b)``, or a dict of both, as a `CombinedLoader` of two
    loaders gives them. The events in order, and what the step stores by then: `StepBegin` (``real_a``, ``real_b``),
    `LossBegin` (``fake_b``, ``fake_a``, ``cycle_a``, ``cycle_b``), `BackwardBegin` (``adversarial``, ``cycle`` and
    ``identity``, the unweighted parts of the loss, ``losses["generators"]``), `BackwardEnd`, `UpdateBegin`,
    `UpdateEnd`; `LossBegin` (``seen_a``, ``seen_b``, what the critics see of fakes), `BackwardBegin`
    (``losses["critics"]``), `BackwardEnd`, `UpdateBegin`, `UpdateEnd`; `StepEnd`.

    Where several processes train, they have the same pools, into which the fakes of all go: all is as with one process
    on the joined batch, which has to fit into a pool.

    Raises:
        PhaseError: A number is out of range, or the learner has other models or optimizers.
        BatchError: A batch is something else, or larger than a pool.

    Attributes:
        pool_a: The past fakes of kind A, shape (pool_size, ...); None before the first step.
        pool_b: The same of kind B.
        stored_a: How many there are, a tensor.
        stored_b: The same of kind B.

    Example:
        >>> generators = torch.nn.ModuleDict({"ab": torch.nn.Linear(4, 4), "ba": torch.nn.Linear(4, 4)})
        >>> critics = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 1), "b": torch.nn.Linear(4, 1)})
        >>> data = ((torch.randn(64, 4), torch.randn(64, 4)),)  # pairs of rows that have nothing to do with each other
        >>> learner = Learner({"generators": generators, "critics": critics}, data=data, default_callbacks=False)
        >>> history = learner.fit(1, phases=[CycleGANPhase(identity=0.0)])
        >>> sorted(learner.step.losses), learner.step.cycle_a.shape
        (['critics', 'generators'], torch.Size([32, 4]))
    """

    def __init__(
        self,
        *,
        cycle: float = 10.0,
        identity: float = 0.5,
        pool_size: int = 50,
        loss: AdversarialLoss = cycle_gan_loss,
    ) -> None:
        check_number("CycleGANPhase", "cycle", cycle, least=0, error=PhaseError)
        check_number("CycleGANPhase", "identity", identity, least=0, error=PhaseError)
        check_number("CycleGANPhase", "pool_size", pool_size, least=0, whole=True, error=PhaseError)
        if not isinstance(loss, AdversarialLoss) or loss.paired:
            raise PhaseError(
                f"CycleGANPhase(loss={describe(loss)}) was given; expected an AdversarialLoss that compares no pairs: "
                "loss=fluxloop.losses.hinge"
            )
        self.cycle = cycle
        self.identity = identity
        self.adversarial = loss
        self.pool_size = pool_size
        self.pool_a: Tensor | None = None
        self.pool_b: Tensor | None = None
        self.stored_a: Tensor | None = None
        self.stored_b: Tensor | None = None

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return ``real_a`` and ``real_b``."""
        both = [batch["a"], batch["b"]] if isinstance(batch, Mapping) and {*batch} == {"a", "b"} else batch
        if not isinstance(both, (tuple, list)) or len(both) != 2 or not all(isinstance(rows, Tensor) for rows in both):
            raise BatchError(
                f"CycleGANPhase was given {describe(batch)} as a batch; expected images of both kinds, (a, b): "
                "data=(CombinedLoader({'a': loader_of_a, 'b': loader_of_b}),)"
            )
        return {"real_a": both[0], "real_b": both[1]}

    def translate(self, generators: Any, state: StepState) -> None:
        """Translate both kinds, and back."""
        state.fake_b, state.fake_a = generators.ab(state.real_a), generators.ba(state.real_b)
        state.cycle_a, state.cycle_b = generators.ba(state.fake_b), generators.ab(state.fake_a)

    def generators_loss(self, generators: Any, critics: Any, state: StepState) -> Tensor:
        """Return the loss of both generators, and store its parts."""
        adversarial = self.adversarial.generator
        passing = adversarial(critics.b(state.fake_b)) + adversarial(critics.a(state.fake_a))
        cycle = absolute(state.cycle_a, state.real_a) + absolute(state.cycle_b, state.real_b)
        state.adversarial, state.cycle = passing.detach(), cycle.detach()
        loss: Tensor = passing + self.cycle * cycle
        if self.identity:
            same = absolute(generators.ba(state.real_a), state.real_a)
            same = same + absolute(generators.ab(state.real_b), state.real_b)
            state.identity = same.detach()
            loss = loss + self.cycle * self.identity * same
        return loss

    def critics_loss(self, critics: Any, state: StepState) -> Tensor:
        """Return the loss of both critics on real images and on those that they see of fakes."""
        of_a = self.adversarial.critic(critics.a(state.real_a), critics.a(state.seen_a))
        return of_a + self.adversarial.critic(critics.b(state.real_b), critics.b(state.seen_b))

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Train the generators, then the critics, on one batch."""
        generators, critics = learner.model.generators, learner.model.critics
        with learner.optimizing("generators") as block:
            self.translate(generators, state)
            handle(LossBegin())
            block.loss = self.generators_loss(generators, critics, state)
        with learner.optimizing("critics") as block:
            state.seen_a, state.seen_b = state.fake_a.detach(), state.fake_b.detach()
            if self.pool_size:
                group = learner.accelerator.group
                state.seen_a, *state.exchange_a = self.exchange("a", state.seen_a, group)
                state.seen_b, *state.exchange_b = self.exchange("b", state.seen_b, group)
            handle(LossBegin())
            block.loss = self.critics_loss(critics, state)

    def exchange(self, kind: str, new: Tensor, group: Group | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose what a critic sees of fakes (N, ...), and which of the fakes of all processes go where in the pool.

        The numbers that decide it are those that the first process has drawn.

        Returns:
            What is seen (N, ...), the fakes of all, and of these their places and whether they take them.
        """
        pool = self.pool(kind, new)
        if group is None:
            seen, places, taken = draw_from_pool(pool, new)
            return seen, new, places, taken
        rows = compare_rows(new, group)
        fakes = all_gather(new, group, rows)
        numbers = gather_equal(draw_numbers(pool, fakes)[None], group)[0]
        seen, places, taken = draw_from_pool(pool, fakes, numbers)
        return (seen[rows.own] if rows.counts[rows.rank] else new), fakes, places, taken

    def finish(self, learner: Any, state: StepState) -> None:
        """Put the fakes into the pools."""
        if self.pool_size:
            (a, *of_a), (b, *of_b) = state.exchange_a, state.exchange_b
            self.pool_a, self.stored_a = put_into_pool(self.pool("a", a), a, *of_a)
            self.pool_b, self.stored_b = put_into_pool(self.pool("b", b), b, *of_b)

    def require(self, learner: Any) -> None:
        """Raise for missing models or parts."""
        require_parts(self, learner.model, "generators", "critics")
        require_parts(self, learner.model.generators, "ab", "ba")
        require_parts(self, learner.model.critics, "a", "b")

    def check(self, learner: Any) -> None:
        """Raise for missing models, parts, or optimizers."""
        self.require(learner)
        if {*learner.optimizer_names} != {"generators", "critics"}:
            raise PhaseError(
                f"CycleGANPhase updates 'generators' and 'critics', and the optimizers are "
                f"{list(learner.optimizer_names)}; give it these: optimizer=partial(torch.optim.Adam, lr=2e-4)"
            )

    def pool(self, kind: str, new: Tensor) -> Pool:
        """Return the pool of ``"a"`` or ``"b"``; before the first step, one without images."""
        images, stored = (self.pool_a, self.stored_a) if kind == "a" else (self.pool_b, self.stored_b)
        if images is None or stored is None:
            none = torch.zeros((), dtype=torch.long, device=new.device)
            return torch.zeros(self.pool_size, *new.shape[1:], dtype=new.dtype, device=new.device), none
        return images.to(new), stored.to(new.device)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the pools."""
        return {name: None if (held := getattr(self, name)) is None else held.clone() for name in POOLS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps.

        Raises:
            PhaseError: The pools had another size.
        """
        images = state["pool_a"]
        if images is not None and len(images) != self.pool_size:
            raise PhaseError(
                f"CycleGANPhase(pool_size={self.pool_size}) was given a state of {len(images)} images; expected the "
                f"same size: CycleGANPhase(pool_size={len(images)})"
            )
        for name in POOLS:
            setattr(self, name, None if state[name] is None else state[name].clone())


class CycleGANValidationPhase(TwinPhase):
    """The validation twin of a `CycleGANPhase`: the losses of generators and critics on held-out rows, without pools.

    Args:
        training: The phase whose losses it uses.

    Events: `StepBegin`, `LossBegin`, `StepEnd`, with the entries of the training phase and ``losses`` by model.

    Raises:
        PhaseError: `training` is no `CycleGANPhase`.

    The arguments `name` and `every` are those of `TwinPhase`.

    Example:
        >>> generators = torch.nn.ModuleDict({"ab": torch.nn.Linear(4, 4), "ba": torch.nn.Linear(4, 4)})
        >>> critics = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 1), "b": torch.nn.Linear(4, 1)})
        >>> pairs, phase = (torch.randn(64, 4), torch.randn(64, 4)), CycleGANPhase()
        >>> models = {"generators": generators, "critics": critics}
        >>> learner = Learner(models, data=(pairs, pairs), default_callbacks=False)
        >>> sorted(learner.evaluate(phase=CycleGANValidationPhase(phase)))
        ['loss_critics', 'loss_generators']
    """

    of = CycleGANPhase

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Compute both losses on one batch."""
        generators, critics = learner.model.generators, learner.model.critics
        self.training.translate(generators, state)
        state.seen_a, state.seen_b = state.fake_a, state.fake_b
        handle(LossBegin())
        state.losses = {
            "generators": self.training.generators_loss(generators, critics, state),
            "critics": self.training.critics_loss(critics, state),
        }

    def check(self, learner: Any) -> None:
        """Raise for missing models or parts."""
        self.training.require(learner)


@in_full_precision
def absolute(preds: Tensor, rows: Tensor) -> Tensor:
    """Return the mean absolute error of images, of the shape of others."""
    if preds.shape != rows.shape:
        raise PhaseError(
            f"a generator of CycleGANPhase returned {tuple(preds.shape)} where {tuple(rows.shape)} is compared with "
            "it; expected images of the same shape"
        )
    return l1_loss(preds, rows)
