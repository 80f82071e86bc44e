"""Adversarial training: a critic and a generator, each with its own loss and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fluxloop.augment.adaptive import AdaptiveAugment, apply_changes
from fluxloop.augment.views import tell_that_it_draws_once
from fluxloop.errors import BatchError, PhaseError, describe, did_you_mean
from fluxloop.events import LossBegin
from fluxloop.guard.given import as_plain, check_called, check_number
from fluxloop.losses.adversarial import (
    ADVERSARIAL_LOSSES,
    AdversarialLoss,
    Critic,
    gradient_penalty,
    path_lengths,
    r1_penalty,
)
from fluxloop.phase import AbstractTrainingPhase, without_names
from fluxloop.phases.twin import TwinPhase
from fluxloop.processes.gather import mean_of_rows, sum_over
from fluxloop.schedules import Schedule, value_at

if TYPE_CHECKING:
    from fluxloop.loop import Handle
    from fluxloop.processes.group import Group
    from fluxloop.state import StepState

Noise = int | Sequence[int] | Callable[[int, torch.device], Tensor]

ROLES = {"generator": ("generator", "gen", "G", "g"), "critic": ("critic", "discriminator", "disc", "D", "d")}
"""The names by which a model is found for each role."""


class GANPhase(AbstractTrainingPhase):
    """A GAN (Goodfellow et al., 2014): the critic learns to tell real from fake, the generator to pass.

    1. ``fake = generator(noise)``. 2. The critic's update: its loss on the real rows and the fake
    ones, detached, plus `gradient_penalty`, `r1` and `r2`. 3. In every `critic_steps`-th step the
    generator's update: its loss on the same fake rows, judged by the critic just updated (as DCGAN
    does; the paper of WGAN draws new ones, which costs another forward). Within an update block the
    other model's parameters take no gradient and cost none.

    Args:
        loss: ``"non-saturating"``, ``"hinge"``, ``"wasserstein"``, ``"least-squares"``, ``"relativistic"``, or an
            `AdversarialLoss`.
        noise: The generator's input: a size, the shape of a row, or a function of the number of
            rows and the device.
        critic_steps: Critic updates per generator update, each on a batch of its own.
        gradient_penalty: Weight of WGAN-GP's penalty (10 in the paper).
        r1: Weight of the R1 penalty, its gamma: the critic's loss gets ``r1 / 2`` times the mean squared norm of its
            gradient at real rows. A number, or a schedule over critic updates.
        r2: The same at fake rows. R3GAN is ``GANPhase("relativistic", r1=gamma, r2=gamma)``.
        every: In which critic updates the penalties are computed: the first, and each so many-th after it, with so
            many times their weight (lazy regularisation; Karras et al., 2020: 16). StyleGAN2's code makes an update
            of its own for them, for which it changes Adam's rate and betas; here they are part of the critic's.
        path_length: Weight of the generator's path length penalty (StyleGAN2: 2): the mean squared distance of
            `path_lengths` of new noise from their running mean, which is kept in checkpoints. A generator with the
            parts ``mapping`` and ``synthesis`` is looked at between the two. Computed in every fourth of its updates,
            with four times the weight: ``path_every = 2`` in a subclass says another number.
        augment: Changes what the critic sees, real rows and fake ones alike: a function of a batch that draws for each
            row and that gradients pass through, or an `AdaptiveAugment`, whose probability the phase moves. Each time
            that the critic is called it draws anew. Validation sees rows as they are.
        conditional: Whether both models take labels too, ``generator(noise, ys)`` and
            ``critic(xs, ys)``; batches are then pairs.
        generator: Name of the generator and its optimizer; left out, found by name
            (generator, G), or the other one of two, or the first of a tuple.
        critic: Name of the critic and its optimizer (critic, discriminator, D).

    Models: ``generator(noise) -> fake``, of the shape of the real rows, and ``critic(rows) -> scores``, raw
    numbers, higher for real rows; each has an optimizer of its name.
    Batches: ``real``, ``(real,)``, or ``(real, ys)``; labels are left out unless `conditional`. The
    events in order, and what the step stores by then:

    ==============================  ===================================================
    `StepBegin`                     ``real`` (N, ...), ``ys`` where conditional, ``augment_probability`` where adaptive
    `LossBegin`                     ``noise``, ``fake``, ``real_scores``, ``fake_scores``
    `BackwardBegin`, `BackwardEnd`  ``losses[critic]``, ``penalty`` where there is one
    `UpdateBegin`, `UpdateEnd`      of the critic
    `LossBegin`                     ``fake_scores``, with a graph to the generator; of pairs ``real_scores`` too
    `BackwardBegin` … `UpdateEnd`   of the generator, ``losses[generator]``
    `StepEnd`
    ==============================  ===================================================

    Raises:
        PhaseError: There is no such loss, a number is out of range, or the learner's models or optimizers do not fit.
        BatchError: A batch is something else.

    Example:
        >>> generator, critic = torch.nn.Linear(2, 4), torch.nn.Linear(4, 1)
        >>> data = (torch.randn(128, 4),)
        >>> learner = Learner({"generator": generator, "critic": critic}, data=data, default_callbacks=False)
        >>> learner.set_callbacks([Recorder()])
        >>> wgan_gp = GANPhase("wasserstein", noise=2, gradient_penalty=10, critic_steps=2)
        >>> learner.fit(1, phases=[wgan_gp])[GANPhase].updates
        {'critic': 4, 'generator': 2}
    """

    path_every: ClassVar[int] = 4
    """In which of the generator's updates the path length penalty is computed: the first, and each so many-th."""
    kept_as: ClassVar[Mapping[str, str]] = {"loss": "loss_name", "generator": "_", "critic": "_"}

    def __init__(  # noqa: PLR0913 - what papers vary
        self,
        loss: str | AdversarialLoss = "non-saturating",
        *,
        noise: Noise = 64,
        critic_steps: int = 1,
        gradient_penalty: float = 0.0,
        r1: float | Schedule = 0.0,
        r2: float | Schedule = 0.0,
        every: int = 1,
        path_length: float = 0.0,
        augment: Callable[[Tensor], Tensor] | None = None,
        conditional: bool = False,
        generator: str | None = None,
        critic: str | None = None,
    ) -> None:
        self.adversarial = _found_loss(loss)
        for name, count in (("critic_steps", critic_steps), ("every", every)):
            check_number("GANPhase", name, count, least=1, whole=True, error=PhaseError)
        fixed = {"gradient_penalty": gradient_penalty, "path_length": path_length}
        _check_weights(fixed | {name: weight for name, weight in (("r1", r1), ("r2", r2)) if not callable(weight)})
        noise = as_plain(noise)
        if not (callable(noise) or isinstance(noise, (tuple, list))):
            check_number("GANPhase", "noise", noise, least=1, whole=True, error=PhaseError)
        _check_names({"generator": generator, "critic": critic})
        if augment is not None:
            check_called("GANPhase", "augment", augment, "what changes rows: AdaptiveAugment(random_flip)", PhaseError)
            tell_that_it_draws_once("GANPhase(augment=...)", augment)
        self.noise = noise
        self.critic_steps = int(critic_steps)
        self.gradient_penalty = gradient_penalty
        self.r1 = r1
        self.r2 = r2
        self.every = int(every)
        self.path_length = path_length
        self.path_mean: Tensor | None = None
        """The running mean of the path lengths; None before the first."""
        self._path_next: Tensor | None = None
        """What it is once the update is made that is yet to come."""
        self.augment = augment
        self.conditional = conditional
        self.roles = {"generator": generator, "critic": critic}
        self._count(0)

    @property
    def augment(self) -> Callable[[Tensor], Tensor] | None:
        """What changes the rows that the critic sees, or None; another one is used from the next step on."""
        return self._augment

    @augment.setter
    def augment(self, augment: Callable[[Tensor], Tensor] | None) -> None:
        self._augment = augment
        # What a compiled step reads of its phase has to stay what it is, and the probability does not
        self._adapts = isinstance(augment, AdaptiveAugment)
        self._changes = augment.changes if isinstance(augment, AdaptiveAugment) else ()
        self._judges = augment is not None or type(self).judging is not GANPhase.judging

    @property
    def loss_name(self) -> str:
        """The name of its loss."""
        return self.adversarial.name

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return ``real``, ``ys`` where both models take labels, and ``r1`` and ``r2`` where they have schedules."""
        pair = isinstance(batch, (tuple, list))
        if pair and len(batch) > 2:
            batch = without_names(batch)
        if not pair and not isinstance(batch, Tensor):
            raise BatchError(
                f"GANPhase was given {describe(batch)} as a batch; expected real rows, (real,) or (real, ys). For "
                "others say what is real in the phase's entries(batch)"
            )
        if self.conditional and (not pair or len(batch) != 2):
            raise BatchError(f"GANPhase(conditional=True) was given {describe(batch)} as a batch; expected (real, ys)")
        entries = {"real": batch[0] if pair else batch}
        if self.conditional:
            entries["ys"] = batch[1]
        if self._adapts:
            adaptive: Any = self._augment
            entries["augment_probability"] = torch.as_tensor(adaptive.probability, dtype=torch.float32)
        for name, weight in (("r1", self.r1), ("r2", self.r2)):
            if callable(weight):
                dtype = torch.float64 if getattr(entries["real"], "dtype", None) == torch.float64 else torch.float32
                entries[name] = torch.tensor(value_at(weight, self._critic_updates), dtype=dtype)
        return entries

    def draw_noise(self, state: StepState) -> Tensor:
        """Draw the generator's input for a batch."""
        count, device = len(state.real), state.real.device
        if callable(self.noise):
            return self.noise(count, device)
        given: Any = self.noise
        shape = tuple(given) if isinstance(given, Sequence) else (given,)
        noise = torch.randn(count, *shape, device=device)
        return noise.to(state.real.dtype) if state.real.is_floating_point() else noise

    def draw_epsilon(self, state: StepState) -> Tensor:
        """Draw where between real and fake rows the gradient is penalised: a share of the real row, shape (N,)."""
        dtype = state.real.dtype if state.real.is_floating_point() else None
        return torch.rand(len(state.real), device=state.real.device, dtype=dtype)

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Train the critic on one batch, and the generator when it is its turn."""
        (generator_name, generator), (critic_name, judge) = self.models(learner)
        critic = self.judging(judge, state) if self._judges else judge
        labels = (state.ys,) if self.conditional else ()
        state.noise = self.draw_noise(state)
        with torch.set_grad_enabled(self._generator_too):
            state.fake = generator(state.noise, *labels)
        with learner.optimizing(critic_name) as block:
            fake = state.fake.detach()
            state.real_scores, state.fake_scores = critic(state.real, *labels), critic(fake, *labels)
            if self._adapts:
                state.signs = state.real_scores.detach().float().sign().reshape(len(state.real), -1).mean(1)
            handle(LossBegin())
            block.loss = self.adversarial.critic(state.real_scores, state.fake_scores)
            block.loss = self.penalized(block.loss, critic, state, fake, labels)
        if self._generator_too:
            with learner.optimizing(generator_name) as block:
                state.fake_scores = critic(state.fake, *labels)
                paired = self.adversarial.paired
                if paired:
                    with torch.no_grad():  # by the critic just updated
                        state.real_scores = critic(state.real, *labels)
                handle(LossBegin())
                block.loss = self.adversarial.generator(*([state.real_scores] if paired else []), state.fake_scores)
                if self._path_due:
                    group = learner.accelerator.group
                    block.loss = block.loss + self.path_penalty(generator, state, labels, group)

    def judging(self, critic: Critic, state: StepState) -> Critic:
        """Return what scores rows: the critic, of the rows as `augment` has changed them."""
        if self._adapts:
            changes, probability = self._changes, state.augment_probability
            return lambda rows, *labels: critic(apply_changes(changes, rows, probability), *labels)
        augment = self.augment
        return critic if augment is None else lambda rows, *labels: critic(augment(rows), *labels)

    def draw_directions(self, images: Tensor) -> Tensor:
        """Draw in which direction each image is to move with its latents, of the images' shape."""
        return torch.randn_like(images)

    def path_penalty(
        self, generator: Any, state: StepState, labels: tuple[Tensor, ...], group: Group | None = None
    ) -> Tensor:
        """Return the path length penalty of new noise; store it and ``path_lengths`` (N,), without gradient."""
        latents = self.draw_noise(state)
        if hasattr(generator, "mapping"):
            latents = generator.mapping(latents, *labels)
            images = generator.synthesis(latents)
        else:
            images = generator(latents.requires_grad_(), *labels)
        lengths = path_lengths(images, latents, self.draw_directions(images))
        mean = lengths.mean()
        if group is not None:  # the penalty, and its gradient, is that of one process on the joined batch
            total, rows = sum_over(torch.stack([lengths.sum(), lengths.new_tensor(len(lengths))]), group).unbind()
            mean = total / rows
        penalty = (lengths - self.path_mean_with(mean)).square().mean()
        state.path_lengths, state.path_penalty = lengths.detach(), penalty.detach()
        return penalty * (self.path_length * self.path_every)

    def path_mean_with(self, new: Tensor) -> Tensor:
        """Return the running mean of path lengths, moved by 1/100 towards a new mean; it begins at 0."""
        return 0.01 * new if self.path_mean is None else 0.99 * self.path_mean.to(new) + 0.01 * new

    def finish(self, learner: Any, state: StepState) -> None:
        """Count the critic's update; where it is one of several batches, with the last of them."""
        if self._path_due:  # the lengths of all processes, so that each has the same mean
            self._path_next = self.path_mean_with(mean_of_rows(state.path_lengths, learner.accelerator.group))
        updates = learner.updates
        updated = not updates.is_windowed or not updates.has_open(self.models(learner)[1][0])
        if self._adapts:
            adaptive: Any = self._augment
            signs, group = state.signs, learner.accelerator.group
            seen = torch.stack([signs.sum(), signs.new_tensor(len(signs))])
            adaptive.observe(seen if group is None else sum_over(seen, group), updated)
        if updated:
            self._count(self._critic_updates + 1)
        else:
            self._waits = True

    def _follow_update(self, learner: Any) -> None:
        """Count the critic's update where that of an epoch's last batches has been made after its last step."""
        if self._waits:
            if isinstance(self.augment, AdaptiveAugment):
                self.augment.count_update()
            self._count(self._critic_updates + 1)

    def _count(self, critic_updates: int) -> None:
        """Note how often the critic was updated, and what else the next step does."""
        self._waits = False
        self._critic_updates: int = critic_updates
        self._generator_too = (critic_updates + 1) % self.critic_steps == 0
        self._penalized = critic_updates % self.every == 0
        generator_updates = (critic_updates + 1) // self.critic_steps - 1
        self._path_due: bool = self.path_length > 0 and self._generator_too and generator_updates % self.path_every == 0
        if self._path_next is not None:
            self.path_mean, self._path_next = self._path_next, None

    def penalized(
        self, loss: Tensor, critic: Critic, state: StepState, fake: Tensor, labels: tuple[Tensor, ...]
    ) -> Tensor:
        """Add the penalties on the critic's gradient, and store them as ``penalty``."""
        penalty: Tensor | float = 0.0
        if not self._penalized:
            return loss
        if self.gradient_penalty:
            epsilon = self.draw_epsilon(state)
            between = gradient_penalty(critic, state.real, fake, *labels, epsilon=epsilon)
            penalty = penalty + self.gradient_penalty * between
        if self.r1:
            weight = state.r1 if callable(self.r1) else self.r1
            penalty = penalty + weight * r1_penalty(critic, state.real, *labels)
        if self.r2:
            weight = state.r2 if callable(self.r2) else self.r2
            penalty = penalty + weight * r1_penalty(critic, fake, *labels)
        if not isinstance(penalty, Tensor):
            return loss
        if self.every > 1:
            penalty = penalty * self.every
        state.penalty = penalty.detach()
        return loss + penalty

    def models(self, learner: Any) -> tuple[tuple[str, nn.Module], tuple[str, nn.Module]]:
        """Return the names and modules of the generator and the critic.

        Raises:
            PhaseError: The learner's models do not tell which is which.
        """
        names = tuple(learner.models)
        generator, critic = _find_roles(names, self.roles["generator"], self.roles["critic"])
        models = dict(zip(map(str, names), learner.model, strict=True))
        return (generator, models[generator]), (critic, models[critic])

    def check(self, learner: Any) -> None:
        """Raise for missing models or optimizers."""
        for name, _ in self.models(learner):
            if name not in learner.optimizer_names:
                raise PhaseError(
                    f"GANPhase updates {name!r}, and the optimizers are {list(learner.optimizer_names)}; give it one "
                    "of its name, whose options may differ by parameter groups: "
                    f"optimizer={{{name!r}: torch.optim.Adam, ...}}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: critic updates, the running mean of path lengths, and `augment`'s state."""
        adaptive = self.augment.state_dict() if isinstance(self.augment, AdaptiveAugment) else None
        kept = {"path_mean": self.path_mean, "path_next": self._path_next, "augment": adaptive}
        return {"critic_updates": self._critic_updates, **{k: v for k, v in kept.items() if v is not None}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        self._path_next = None
        self._count(state["critic_updates"])
        self.path_mean, self._path_next = state.get("path_mean"), state.get("path_next")
        if isinstance(self.augment, AdaptiveAugment):
            self.augment.load_state_dict(state.get("augment", {}))


class GANValidationPhase(TwinPhase):
    """The validation twin of a `GANPhase`: both losses on held-out rows, without penalties.

    Args:
        training: The phase whose models, noise and losses it uses.

    Events: `StepBegin`, `LossBegin`, `StepEnd`, with the entries ``real``, ``noise``, ``fake``,
    ``real_scores``, ``fake_scores`` and ``losses`` by model.

    Raises:
        PhaseError: `training` is no `GANPhase`.

    The arguments `name` and `every` are those of `TwinPhase`.

    Example:
        >>> gan = GANPhase("hinge", noise=2)
        >>> models, rows = {"G": torch.nn.Linear(2, 4), "D": torch.nn.Linear(4, 1)}, torch.randn(64, 4)
        >>> learner = Learner(models, data=(rows, rows), default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), Metrics()])
        >>> history = learner.fit(1, phases=[gan, GANValidationPhase(gan)])
        >>> sorted(history.metrics[GANValidationPhase])
        ['loss_d', 'loss_g']
    """

    of = GANPhase

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Compute both losses on one batch."""
        (generator_name, generator), (critic_name, critic) = self.training.models(learner)
        labels = (state.ys,) if self.training.conditional else ()
        state.noise = self.training.draw_noise(state)
        state.fake = generator(state.noise, *labels)
        state.real_scores, state.fake_scores = critic(state.real, *labels), critic(state.fake, *labels)
        handle(LossBegin())
        adversarial, pair = self.training.adversarial, (state.real_scores, state.fake_scores)
        state.losses = {
            critic_name: adversarial.critic(state.real_scores, state.fake_scores),
            generator_name: adversarial.generator(*pair[not adversarial.paired :]),
        }

    def check(self, learner: Any) -> None:
        """Raise for missing models."""
        self.training.models(learner)


def _found_loss(loss: str | AdversarialLoss) -> AdversarialLoss:
    """Return a loss by its name; raise `PhaseError` where there is none."""
    if isinstance(loss, AdversarialLoss):
        return loss
    if loss not in ADVERSARIAL_LOSSES:
        hint = did_you_mean(str(loss), ADVERSARIAL_LOSSES)
        raise PhaseError(
            f"GANPhase(loss={loss!r}) was given; expected one of {list(ADVERSARIAL_LOSSES)}, or an AdversarialLoss"
            f"{hint}"
        )
    return ADVERSARIAL_LOSSES[loss]


def _check_weights(given: dict[str, Any]) -> None:
    """Raise `PhaseError` for a weight that is no number from 0 on."""
    for name, weight in given.items():
        check_number("GANPhase", name, weight, least=0, error=PhaseError)


def _check_names(given: dict[str, Any]) -> None:
    """Raise `PhaseError` for what is no name of a model."""
    for role, model in given.items():
        if model is not None and not isinstance(model, str):
            raise PhaseError(f"GANPhase({role}={describe(model)}) was given; expected the name of a model: {role}='G'")


@cache  # asked in each step
def _find_roles(names: tuple[str | None, ...], generator: str | None, critic: str | None) -> tuple[str, str]:
    """Find the names of the generator and the critic.

    Args:
        names: Of the models; None of a single one.
        generator: The name that was given, if any.
        critic: The same of the critic.

    Raises:
        PhaseError: The names do not tell which is which.
    """
    models = [] if None in names else [*map(str, names)]
    given = {"generator": generator, "critic": critic}
    found = {role: name or _known(models, ROLES[role]) for role, name in given.items()}
    if models == ["0", "1"] and not any(found.values()):
        found = {"generator": "0", "critic": "1"}
    if len(models) == 2:  # the other one
        for role, other in (("generator", "critic"), ("critic", "generator")):
            if found[role] is None and found[other] in models:
                found[role] = next(name for name in models if name != found[other])
    if any(name not in models for name in found.values()) or found["generator"] == found["critic"]:
        raise PhaseError(
            f"GANPhase trains a generator and a critic, and the models are {models or 'a single one'}; name "
            "them so, "
            "Learner({'generator': ..., 'critic': ...}), or say which is which: "
            "GANPhase(generator='...', critic='...')"
        )
    return str(found["generator"]), str(found["critic"])


def _known(models: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first of the names that is a model's, or None."""
    return next((name for name in names if name in models), None)
