from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from attrs import define
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from fluxloop import (
    EMA,
    Accelerator,
    BackwardBegin,
    BackwardEnd,
    BatchError,
    CustomCallback,
    Event,
    GANPhase,
    GANValidationPhase,
    Learner,
    LossBegin,
    Metrics,
    Phase,
    PhaseError,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    linear,
    on,
    runstep,
    stream_seed,
)
from fluxloop.losses import AdversarialLoss
from fluxloop.testing import EventRecorder, assert_resumes_exactly, assert_same_bits, bits

SEED = 3
BATCH, NOISE, SIZE, CLASSES = 4, 6, 5, 3
ADAM = partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.999), fused=False)
BLOCK = ["LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd"]
LOSSES = ("non-saturating", "hinge", "wasserstein", "least-squares")


class Net(nn.Module):
    """Either network: batch norm in it where asked for, and an embedding of labels where it takes them."""

    def __init__(self, inputs: int, outputs: int, norm: bool = True, conditional: bool = False) -> None:
        super().__init__()
        middle: nn.Module = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.body = nn.Sequential(nn.Linear(inputs, 8), middle, nn.LeakyReLU(0.2), nn.Linear(8, outputs))
        if conditional:
            self.labels = nn.Embedding(CLASSES, inputs)

    def forward(self, xs: Tensor, ys: Tensor | None = None) -> Tensor:
        xs = xs.flatten(1)
        return self.body(xs if ys is None else xs + self.labels(ys))


def nets(norm: bool = True, conditional: bool = False) -> tuple[Net, Net]:
    """Make a generator and a critic with the same initial weights every time."""
    torch.manual_seed(1)
    return Net(NOISE, SIZE, norm, conditional), Net(SIZE, 1, norm, conditional)


def rows(steps: int, conditional: bool = False) -> Any:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(steps * BATCH, SIZE, generator=generator)
    ys = torch.randint(CLASSES, (steps * BATCH,), generator=generator)
    return (real, ys) if conditional else real


def batches(steps: int, conditional: bool = False) -> TensorBatches:
    data = rows(steps, conditional)
    return TensorBatches(*data, batch_size=BATCH) if conditional else TensorBatches(data, batch_size=BATCH)


def learner_of(
    *callbacks: Any, model: Any = None, steps: int = 5, conditional: bool = False, norm: bool = True, **options: Any
) -> Learner:
    if model is None:
        model = dict(zip(("generator", "critic"), nets(norm, conditional), strict=True))
    data = batches(steps, conditional)
    given = {"data": (data, data), "optimizer": ADAM, "default_callbacks": False, "seed": SEED, **options}
    return Learner(model, callbacks=callbacks, **given)


class LossLog(UnsafeCallback):
    """Keep the losses and the penalty of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[dict[str, Tensor]] = []
        self.penalties: list[Tensor] = []

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Learner) -> None:
        self.losses.append(dict(learner.step.losses))
        if "penalty" in learner.step:
            self.penalties.append(learner.step.penalty)
        assert not any(loss.requires_grad for loss in (*self.penalties, *learner.step.losses.values()))


# The loop by hand


def critic_loss(name: str, real: Tensor, fake: Tensor) -> Tensor:
    if name == "non-saturating":
        return softplus(-real).mean() + softplus(fake).mean()
    if name == "hinge":
        return relu(1 - real).mean() + relu(1 + fake).mean()
    if name == "wasserstein":
        return fake.mean() - real.mean()
    if name == "relativistic":
        return softplus(-(real - fake)).mean()
    return ((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2


def generator_loss(name: str, fake: Tensor) -> Tensor:
    if name == "non-saturating":
        return softplus(-fake).mean()
    if name == "least-squares":
        return ((fake - 1) ** 2).mean() / 2
    return -fake.mean()


def input_gradient(critic: nn.Module, inputs: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
    score = critic(inputs, *labels).sum()
    return torch.autograd.grad(score, inputs, create_graph=True)[0].flatten(1)


@define
class ByHand:
    """A GAN in plain PyTorch: what there is to compare with."""

    loss: str = "non-saturating"
    critic_steps: int = 1
    gradient_penalty: float = 0.0
    r1: float = 0.0
    r2: float = 0.0
    every: int = 1
    norm: bool = True
    conditional: bool = False
    noise: Callable[[int], Tensor] = lambda count: torch.randn(count, NOISE)

    def train(self, data: Iterable[Any], epochs: int = 1) -> tuple[Net, Net, list[dict[str, Tensor]], list[Tensor]]:
        gen, dis = nets(self.norm, self.conditional)
        step_gen, step_dis = ADAM(gen.parameters()), ADAM(dis.parameters())
        losses: list[dict[str, Tensor]] = []
        penalties: list[Tensor] = []
        for batch in [batch for _ in range(epochs) for batch in data]:
            real, labels = (batch[0], (batch[1],)) if self.conditional else (batch, ())
            torch.manual_seed(stream_seed(SEED, "training/step", len(losses)))
            fake = gen(self.noise(len(real)), *labels)
            step_dis.zero_grad()
            loss = critic_loss(self.loss, dis(real, *labels), dis(fake.detach(), *labels))
            due = len(losses) % self.every == 0
            penalty = self.penalty(dis, real, fake.detach(), labels) if due else None
            if penalty is not None:
                penalty = penalty if self.every == 1 else penalty * self.every
                loss = loss + penalty
                penalties.append(penalty.detach())
            loss.backward()
            step_dis.step()
            losses.append({"critic": loss.detach()})
            if len(losses) % self.critic_steps == 0:
                step_gen.zero_grad()
                if self.loss == "relativistic":
                    judged = dis(fake, *labels)
                    loss = softplus(-(judged - dis(real, *labels).detach())).mean()
                else:
                    loss = generator_loss(self.loss, dis(fake, *labels))
                loss.backward()
                step_gen.step()
                losses[-1]["generator"] = loss.detach()
        return gen, dis, losses, penalties

    def penalty(self, dis: Net, real: Tensor, fake: Tensor, labels: tuple[Tensor, ...]) -> Tensor | None:
        terms = []
        if self.gradient_penalty:
            share = torch.rand(len(real), 1)
            between = (share * real + (1 - share) * fake).requires_grad_()
            norms = input_gradient(dis, between, labels).norm(dim=1)
            terms.append(self.gradient_penalty * ((norms - 1) ** 2).mean())
        if self.r1:
            gradient = input_gradient(dis, real.detach().requires_grad_(), labels)
            terms.append(self.r1 * ((gradient**2).sum(1).mean() / 2))
        if self.r2:
            gradient = input_gradient(dis, fake.requires_grad_(), labels)
            terms.append(self.r2 * ((gradient**2).sum(1).mean() / 2))
        return sum(terms[1:], terms[0]) if terms else None


def assert_equal(trained: nn.Module, expected: nn.Module) -> None:
    found, wanted = trained.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def assert_changed(trained: nn.Module, initial: nn.Module) -> None:
    found, before = trained.state_dict(), initial.state_dict()
    moved = [name for name in before if "weight" in name or "running" in name]  # a bias may cancel out
    assert moved
    assert [name for name in moved if torch.equal(found[name], before[name])] == []


def assert_trains_as_by_hand(phase: GANPhase, by_hand: ByHand, steps: int, epochs: int = 1) -> Learner:
    """Train by the phase and by hand; losses, penalties, weights and buffers are the same to the bit."""
    log = LossLog()
    learner = learner_of(log, steps=steps, conditional=by_hand.conditional, norm=by_hand.norm)
    learner.fit(epochs, phases=[phase])
    gen, dis, losses, penalties = by_hand.train(batches(steps, by_hand.conditional), epochs)
    assert log.losses == losses
    assert log.penalties == penalties
    assert_equal(learner.model.generator, gen)
    assert_equal(learner.model.critic, dis)
    for trained, initial in zip(learner.model, nets(by_hand.norm, by_hand.conditional), strict=True):
        assert_changed(trained, initial)
    return learner


PENALTIES: dict[str, dict[str, float]] = {
    "no penalty": {},
    "gradient penalty": {"gradient_penalty": 10.0},
    "r1": {"r1": 0.5},
    "both penalties": {"gradient_penalty": 2.0, "r1": 0.3},
}


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])
@pytest.mark.parametrize(("critic_steps", "steps"), [(1, 5), (3, 7)])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_weights_and_batch_norm_statistics_equal_those_of_a_hand_written_loop(
    loss: str, penalty: str, critic_steps: int, steps: int, conditional: bool
) -> None:
    said: dict[str, Any] = {"critic_steps": critic_steps, "conditional": conditional, **PENALTIES[penalty]}
    assert_trains_as_by_hand(GANPhase(loss, noise=NOISE, **said), ByHand(loss, **said), steps)


R3GAN: dict[str, Any] = {"r1": 0.5, "r2": 0.3}


@pytest.mark.parametrize(
    "said",
    [{}, R3GAN, {**R3GAN, "every": 3}, {**R3GAN, "critic_steps": 2, "conditional": True}],
    ids=["no penalty", "R3GAN", "lazy", "conditional"],
)
def test_a_relativistic_gan_with_penalties_at_real_and_fake_rows_equals_a_hand_written_loop(said: Any) -> None:
    steps = 7
    assert_trains_as_by_hand(GANPhase("relativistic", noise=NOISE, **said), ByHand("relativistic", **said), steps)


def test_lazy_penalties_come_in_every_so_many_critic_updates_with_so_many_times_their_weight() -> None:
    log = LossLog()
    phase = GANPhase(noise=NOISE, r1=0.5, every=3, critic_steps=2)
    learner_of(log, steps=7, norm=False).fit(1, phases=[phase])
    once = LossLog()
    learner_of(once, steps=7, norm=False).fit(1, phases=[GANPhase(noise=NOISE, r1=0.5)])
    assert len(log.penalties) == 3  # at the updates 0, 3 and 6
    assert torch.equal(log.penalties[0], 3 * once.penalties[0])
    other = GANPhase(noise=NOISE, r1=0.5, every=3, critic_steps=2)
    other.load_state_dict(phase.state_dict())
    learner_of(more := LossLog(), steps=3, norm=False).fit(1, phases=[other])
    assert len(more.penalties) == 1  # the update 9 alone, of 7, 8 and 9


class EverySecond(GANPhase):
    """Looks at paths in every second update of the generator."""

    path_every = 2


class Styled(nn.Module):
    """A generator in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping, self.synthesis = (
            nn.Sequential(nn.Linear(NOISE, 4), nn.Tanh()),
            nn.Sequential(nn.Linear(4, SIZE), nn.Tanh()),
        )

    def forward(self, noise: Tensor) -> Tensor:
        made: Tensor = self.synthesis(self.mapping(noise))
        return made


def test_the_path_length_penalty_and_its_running_mean_equal_those_of_a_hand_written_loop() -> None:
    def styled() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        return Styled(), nn.Linear(SIZE, 1)

    phase = EverySecond(noise=NOISE, path_length=2.0, critic_steps=2)
    learner = learner_of(model=dict(zip(("generator", "critic"), styled(), strict=True)), steps=7)
    learner.fit(1, phases=[phase])
    gen, dis = styled()
    step_gen, step_dis = ADAM(gen.parameters()), ADAM(dis.parameters())
    mean, turn = torch.tensor(0.0), 0
    for number, real in enumerate(batches(7)):
        torch.manual_seed(stream_seed(SEED, "training/step", number))
        fake = gen(torch.randn(len(real), NOISE))
        step_dis.zero_grad()
        critic_loss("non-saturating", dis(real), dis(fake.detach())).backward()
        step_dis.step()
        if number % 2 == 0:
            continue
        loss = generator_loss("non-saturating", dis(fake))
        if turn % 2 == 0:
            latents = gen.mapping(torch.randn(len(real), NOISE))
            images = gen.synthesis(latents)
            moved = (images * torch.randn_like(images)).sum()
            lengths = torch.autograd.grad(moved, latents, create_graph=True)[0].square().sum(1).sqrt()
            mean = 0.99 * mean + 0.01 * lengths.mean()
            loss = loss + (lengths - mean).square().mean() * 4.0  # weight 2, in every second update
            mean = mean.detach()
        step_gen.zero_grad()
        loss.backward()
        step_gen.step()
        turn += 1
    assert_equal(learner.model.generator, gen)
    assert_equal(learner.model.critic, dis)
    assert phase.path_mean is not None
    assert torch.equal(phase.path_mean, mean)
    assert mean > 0


def test_the_running_mean_of_path_lengths_is_found_again_after_a_kill() -> None:
    for how in ({}, {"accumulate": 2}):
        assert_resumes_exactly(
            lambda how=how: learner_of(Recorder(), norm=False, accelerator=Accelerator("cpu", **how)),
            phases=lambda: [EverySecond(noise=NOISE, path_length=2.0)],
            at=[2, 3, 6],
        )


def test_the_weight_of_a_penalty_may_fall_over_critic_updates() -> None:
    log, constant = LossLog(), LossLog()
    learner_of(log, norm=False).fit(1, phases=[GANPhase("relativistic", noise=NOISE, r1=lambda t: 0.5 / (1 + t))])
    learner_of(constant, norm=False).fit(1, phases=[GANPhase("relativistic", noise=NOISE, r1=0.5)])
    assert torch.equal(log.penalties[0], constant.penalties[0])
    rising = LossLog()
    learner = learner_of(rising, norm=False, optimizer=partial(torch.optim.SGD, lr=0.0))
    learner.fit(1, phases=[GANPhase(noise=NOISE, r2=linear(4, 0.0, 4.0), critic_steps=9)])
    assert learner.step.r2.item() == 4.0
    assert rising.penalties[0] == 0
    assert all(penalty / number > 0.5 for number, penalty in enumerate(rising.penalties) if number and penalty > 0.5)


NOISES: dict[str, tuple[Any, Callable[[int], Tensor]]] = {
    "size": (NOISE, lambda count: torch.randn(count, NOISE)),
    "shape": ((2, 3), lambda count: torch.randn(count, 2, 3)),
    "list": ([3, 1, 2], lambda count: torch.randn(count, 3, 1, 2)),
    "function": (
        lambda count, device: 2 * torch.rand(count, NOISE, device=device) - 1,
        lambda count: 2 * torch.rand(count, NOISE) - 1,
    ),
}


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_a_size_a_shape_or_a_function(noise: str) -> None:
    given, drawn = NOISES[noise]
    assert_trains_as_by_hand(GANPhase(noise=given), ByHand(noise=drawn), steps=5)


def test_a_function_of_noise_is_given_the_number_of_rows_and_the_device() -> None:
    seen: list[tuple[int, torch.device]] = []

    def noise(count: int, device: torch.device) -> Tensor:
        seen.append((count, device))
        return torch.zeros(count, NOISE, device=device)

    data = TensorBatches(rows(2)[:7], batch_size=4)
    learner = learner_of(data=(data,))
    learner.epoch(GANPhase(noise=noise))
    assert seen == [(4, learner.accelerator.device), (3, learner.accelerator.device)]


@pytest.mark.parametrize(
    ("real", "noise"), [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.uint8, torch.float32)]
)
def test_noise_has_the_precision_of_the_real_rows_where_they_have_one(real: torch.dtype, noise: torch.dtype) -> None:
    learner = learner_of()
    phase = GANPhase(noise=NOISE)
    with runstep(learner, phase, real=torch.zeros(BATCH, SIZE, dtype=real)) as (_, state):
        drawn = phase.draw_noise(state)
    assert drawn.dtype == noise
    assert drawn.shape == (BATCH, NOISE)


def test_the_generators_turn_comes_after_so_many_critic_updates_across_epochs() -> None:
    learner = assert_trains_as_by_hand(GANPhase(noise=NOISE, critic_steps=3), ByHand(critic_steps=3), steps=2, epochs=4)
    assert learner.step.losses.keys() == {"critic"}  # the eighth step


def test_weights_equal_those_of_a_hand_written_loop_without_batch_norm_too() -> None:
    said: dict[str, Any] = {"gradient_penalty": 10.0, "norm": False}
    assert_trains_as_by_hand(
        GANPhase("wasserstein", noise=NOISE, gradient_penalty=10), ByHand("wasserstein", **said), 5
    )


def test_a_loss_of_ones_own_is_an_adversarial_loss() -> None:
    relativistic = AdversarialLoss(
        "relativistic",
        critic=lambda real, fake: softplus(fake - real).mean(),
        generator=lambda fake: softplus(-fake).square().mean(),
    )
    learner = learner_of()
    learner.fit(1, phases=[GANPhase(relativistic, noise=NOISE)])

    gen, dis = nets()
    step_gen, step_dis = ADAM(gen.parameters()), ADAM(dis.parameters())
    for number, real in enumerate(batches(5)):
        torch.manual_seed(stream_seed(SEED, "training/step", number))
        fake = gen(torch.randn(len(real), NOISE))
        step_dis.zero_grad()
        real_scores, fake_scores = dis(real), dis(fake.detach())
        softplus(fake_scores - real_scores).mean().backward()
        step_dis.step()
        step_gen.zero_grad()
        softplus(-dis(fake)).square().mean().backward()
        step_gen.step()
    assert_equal(learner.model.generator, gen)
    assert_equal(learner.model.critic, dis)


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize(
    "form",
    [lambda real, ys: real, lambda real, ys: (real,), lambda real, ys: [real], lambda real, ys: (real, ys)],
    ids=["tensor", "tuple of one", "list of one", "pair"],
)
def test_labels_are_left_out_unless_it_is_conditional(form: Callable[[Tensor, Tensor], Any]) -> None:
    data = [form(real, ys) for real, ys in batches(5, conditional=True)]
    learner, expected = learner_of(data=(data,)), learner_of(data=([real for real, _ in batches(5, True)],))
    for each in (learner, expected):
        each.fit(1, phases=[GANPhase(noise=NOISE)])
    assert_same_bits(learner, expected)
    assert "ys" not in learner.step


# Whose gradients are computed


def nodes(tensor: Tensor) -> set[Any]:
    """Collect the nodes of a tensor's graph."""
    todo, seen = [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(following for following, _ in node.next_functions)
    return seen


def reached(tensor: Tensor) -> set[Tensor]:
    """Collect the leaves that a tensor's gradient reaches."""
    return {node.variable for node in nodes(tensor) if hasattr(node, "variable")}


class AtEvents(UnsafeCallback):
    """Call functions of the learner and the optimizer's name in each backward."""

    def __init__(self, begin: Callable[..., object] | None = None, end: Callable[..., object] | None = None) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    @on(BackwardBegin)
    def at_begin(self, event: Event, phase: Phase, learner: Learner) -> None:
        if self.begin is not None:
            self.begin(learner, list(learner.step.losses)[-1])

    @on(BackwardEnd)
    def at_end(self, event: Event, phase: Phase, learner: Learner) -> None:
        if self.end is not None:
            self.end(learner, list(learner.step.losses)[-1])


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_generators_backward_computes_no_gradient_of_the_critics_parameters(penalty: str) -> None:
    seen: list[bool] = []

    def forget(learner: Learner, name: str) -> None:
        if name == "generator":
            for parameter in learner.model.critic.parameters():
                parameter.grad = None

    def look(learner: Learner, name: str) -> None:
        if name == "generator":
            seen.append(all(parameter.grad is None for parameter in learner.model.critic.parameters()))
            assert all(parameter.grad is not None for parameter in learner.model.generator.parameters())

    learner_of(AtEvents(forget, look)).epoch(GANPhase(noise=NOISE, **PENALTIES[penalty]))
    assert seen == [True] * 5


def test_the_generators_backward_leaves_the_gradients_of_the_critics_update_as_they_were() -> None:
    kept: list[Tensor] = []
    seen: list[bool] = []

    def keep(learner: Learner, name: str) -> None:
        if name == "generator":
            kept[:] = [parameter.grad.clone() for parameter in learner.model.critic.parameters()]

    def look(learner: Learner, name: str) -> None:
        if name == "generator":
            now = [parameter.grad for parameter in learner.model.critic.parameters()]
            seen.append(all(torch.equal(a, b) for a, b in zip(kept, now, strict=True)))

    learner_of(AtEvents(keep, look)).epoch(GANPhase(noise=NOISE))
    assert seen == [True] * 5


def test_the_graph_of_the_generators_loss_reaches_the_generator_alone_and_has_fewer_nodes_than_else() -> None:
    sizes: list[tuple[int, int]] = []

    def look(learner: Learner, name: str) -> None:
        if name == "generator":
            gen, dis = learner.model
            loss = learner.step.losses[name]
            assert reached(loss) == set(gen.parameters())
            unrestricted = generator_loss("hinge", dis(learner.step.fake))
            assert reached(unrestricted) == {*gen.parameters(), *dis.parameters()}
            sizes.append((len(nodes(loss)), len(nodes(unrestricted))))

    learner = learner_of(AtEvents(look), norm=False)
    learner.epoch(GANPhase("hinge", noise=NOISE))
    critic_parameters = len(list(learner.model.critic.parameters()))
    assert len(sizes) == 5
    assert all(own + critic_parameters <= all_of_it for own, all_of_it in sizes)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_graph_of_the_critics_loss_reaches_the_critic_alone(penalty: str) -> None:
    found: list[set[Tensor]] = []

    def look(learner: Learner, name: str) -> None:
        if name == "critic":
            found.append({leaf for leaf in reached(learner.step.losses[name]) if isinstance(leaf, nn.Parameter)})

    learner = learner_of(AtEvents(look))
    learner.epoch(GANPhase(noise=NOISE, **PENALTIES[penalty]))
    assert found == [set(learner.model.critic.parameters())] * 5


def test_the_critics_backward_computes_no_gradient_of_the_generators_parameters() -> None:
    seen: list[bool] = []

    def look(learner: Learner, name: str) -> None:
        if name == "critic":
            seen.append(all(parameter.grad is None for parameter in learner.model.generator.parameters()))

    learner_of(AtEvents(end=look)).epoch(GANPhase(noise=NOISE, critic_steps=2))
    assert seen == [True] * 5


def test_the_generators_forward_builds_a_graph_in_its_turn_alone() -> None:
    seen: list[bool] = []
    learner = learner_of(steps=6)
    learner.model.generator.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    learner.epoch(GANPhase(noise=NOISE, critic_steps=3))
    assert seen == [False, False, True, False, False, True]


# Which model is which


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize(
    ("generator", "critic"),
    [
        ("generator", "critic"),
        ("generator", "discriminator"),
        ("gen", "disc"),
        ("G", "D"),
        ("g", "d"),
        ("painter", "critic"),
        ("G", "judge"),
    ],
)
@pytest.mark.parametrize("critic_first", [False, True], ids=["generator first", "critic first"])
def test_the_models_are_known_by_their_names(generator: str, critic: str, critic_first: bool) -> None:
    models = dict(zip((generator, critic), nets(), strict=True))
    learner = learner_of(model=dict(reversed(models.items())) if critic_first else models)
    learner.fit(1, phases=[GANPhase(noise=NOISE)])
    gen, dis, losses, _ = ByHand().train(batches(5))
    assert_equal(learner.models[generator], gen)
    assert_equal(learner.models[critic], dis)
    assert learner.step.losses == {critic: losses[-1]["critic"], generator: losses[-1]["generator"]}


def test_of_a_tuple_the_first_is_the_generator() -> None:
    learner = learner_of(Recorder(), Metrics(), model=nets())
    learner.fit(1, phases=[GANPhase(noise=NOISE)])
    gen, dis, _, _ = ByHand().train(batches(5))
    assert_equal(learner.model[0], gen)
    assert_equal(learner.model[1], dis)
    assert learner.history[GANPhase].updates == {"1": 5, "0": 5}
    assert len(learner.history["training/loss_0"]) == 1


@pytest.mark.parametrize("said", [{"generator": "b", "critic": "a"}, {"generator": "b"}, {"critic": "a"}])
def test_the_models_may_be_named_explicitly(said: dict[str, str]) -> None:
    learner = learner_of(model=dict(zip(("b", "a"), nets(), strict=True)))
    learner.fit(1, phases=[GANPhase(noise=NOISE, **said)])
    gen, dis, _, _ = ByHand().train(batches(5))
    assert_equal(learner.model.b, gen)
    assert_equal(learner.model.a, dis)


def test_the_second_of_a_tuple_may_be_the_generator() -> None:
    learner = learner_of(model=tuple(reversed(nets())))
    learner.fit(1, phases=[GANPhase(noise=NOISE, generator="1", critic="0")])
    gen, dis, _, _ = ByHand().train(batches(5))
    assert_equal(learner.model[1], gen)
    assert_equal(learner.model[0], dis)


def test_two_of_four_models_are_chosen_by_name() -> None:
    torch.manual_seed(5)
    others = {"G": Net(NOISE, SIZE), "D": Net(SIZE, 1)}
    before = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in others.items()}
    learner = learner_of(model={**others, "G2": nets()[0], "D2": nets()[1]})
    learner.fit(1, phases=[GANPhase(noise=NOISE, generator="G2", critic="D2")])
    gen, dis, _, _ = ByHand().train(batches(5))
    assert_equal(learner.model.G2, gen)
    assert_equal(learner.model.D2, dis)
    for name in others:
        assert all(torch.equal(v, learner.models[name].state_dict()[k]) for k, v in before[name].items())


def other() -> nn.Module:
    return nn.Linear(SIZE, 1)


UNKNOWN_MODELS: dict[str, tuple[Any, dict[str, str], str]] = {
    "two unknown names": ({"a": other(), "b": other()}, {}, r"the models are \['a', 'b'\]"),
    "three models and no critic": ({"G": other(), "a": other(), "b": other()}, {}, r"the models are \['G', 'a', 'b'\]"),
    "a tuple of three": ((other(), other(), other()), {}, r"the models are \['0', '1', '2'\]"),
    "a single model": (other(), {}, "the models are a single one"),
    "a single model by name": ({"G": other()}, {}, r"the models are \['G'\]"),
    "a name that no model has": ({"G": other(), "D": other()}, {"critic": "C"}, r"the models are \['G', 'D'\]"),
    "one model for both": ({"G": other(), "D": other()}, {"generator": "G", "critic": "G"}, r"models are \['G', 'D'\]"),
}


@pytest.mark.parametrize("twin", [False, True], ids=["training", "validation"])
@pytest.mark.parametrize("case", UNKNOWN_MODELS)
def test_models_that_do_not_tell_which_is_which_are_an_error_that_says_what_to_write(case: str, twin: bool) -> None:
    model, said, words = UNKNOWN_MODELS[case]
    learner = learner_of(model=model)
    before = bits(learner)
    gan = GANPhase(noise=NOISE, **said)
    with pytest.raises(PhaseError, match=words) as raised:
        learner.fit(1, phases=[GANValidationPhase(gan) if twin else gan])
    assert "Learner({'generator': ..., 'critic': ...})" in str(raised.value)
    assert "GANPhase(generator='...', critic='...')" in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


def test_a_frozen_generator_has_no_optimizer_and_cannot_be_trained() -> None:
    gen, dis = nets()
    learner = learner_of(model={"generator": gen.requires_grad_(False), "critic": dis})
    with pytest.raises(PhaseError, match=r"GANPhase updates 'generator', and the optimizers are \['critic'\]"):
        learner.fit(1, phases=[GANPhase(noise=NOISE)])


# What cannot be


@pytest.mark.parametrize(
    ("loss", "hint"),
    [("hinges", "did you mean 'hinge'"), ("Wasserstein", "did you mean 'wasserstein'"), ("bce", "an AdversarialLoss$")],
)
def test_an_unknown_loss_is_an_error_that_lists_those_there_are(loss: str, hint: str) -> None:
    with pytest.raises(PhaseError, match=hint) as raised:
        GANPhase(loss)
    assert f"GANPhase(loss={loss!r})" in str(raised.value)
    assert str([*LOSSES, "relativistic"]) in str(raised.value)


@pytest.mark.parametrize("critic_steps", [0, -1])
def test_less_than_one_critic_step_is_an_error(critic_steps: int) -> None:
    with pytest.raises(
        PhaseError, match=rf"critic_steps={critic_steps}\) was given; expected a whole number, 1 or more"
    ):
        GANPhase(critic_steps=critic_steps)


@pytest.mark.parametrize("twin", [False, True], ids=["training", "validation"])
@pytest.mark.parametrize(
    ("batch", "described"),
    [
        (torch.zeros(4, SIZE), r"a Tensor of shape \(4, 5\)"),
        ((torch.zeros(4, SIZE),), "a tuple of length 1"),
        ([torch.zeros(4, SIZE)] * 3, "a list of length 3"),
    ],
    ids=["tensor", "tuple of one", "list of three"],
)
def test_a_conditional_gan_takes_pairs_alone(batch: Any, described: str, twin: bool) -> None:
    learner = learner_of(conditional=True)
    gan = GANPhase(noise=NOISE, conditional=True)
    before = bits(learner)
    with pytest.raises(BatchError, match=f"was given {described} as a batch; expected \\(real, ys\\)"):
        learner.epoch(GANValidationPhase(gan) if twin else gan, [batch])
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


@pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])
def test_a_batch_without_an_order_is_an_error_that_says_where_to_name_what_is_real(conditional: bool) -> None:
    learner = learner_of(conditional=conditional)
    gan = GANPhase(noise=NOISE, conditional=conditional)
    with pytest.raises(BatchError, match=r"was given a dict of length 1 as a batch.*the phase's entries\(batch\)"):
        learner.epoch(gan, [{"image": torch.zeros(4, SIZE)}])


def test_a_subclass_may_say_what_is_real_in_its_batches() -> None:
    class OfDicts(GANPhase):
        def entries(self, batch: Any) -> dict[str, Any]:
            return {"real": batch["image"]}

    learner = learner_of(data=([{"image": real} for real in batches(5)],))
    learner.fit(1, phases=[OfDicts(noise=NOISE)])
    gen, dis, _, _ = ByHand().train(batches(5))
    assert_equal(learner.model.generator, gen)
    assert_equal(learner.model.critic, dis)


# Events and entries


class Entries(UnsafeCallback):
    """Note what the step holds at each of its events."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, set[str], set[str]]] = []

    @on(Event, GANPhase)
    def note(self, event: Event, phase: Phase, learner: Learner) -> None:
        losses = set(vars(learner.step).get("losses", ()))
        self.seen.append((type(event).__name__, set(vars(learner.step)), losses))


@pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("penalty", ["no penalty", "r1"])
def test_the_events_and_the_entries_are_those_of_the_documentation(penalty: str, conditional: bool) -> None:
    entries = Entries()
    learner = learner_of(entries, steps=2, conditional=conditional)
    learner.epoch(GANPhase(noise=NOISE, critic_steps=2, conditional=conditional, **PENALTIES[penalty]))
    given = {"real", "ys"} if conditional else {"real"}
    scored = given | {"noise", "fake", "real_scores", "fake_scores"}
    lost = scored | {"losses"} | ({"penalty"} if penalty == "r1" else set())
    done = lost | {"grads"}
    critic: list[Any] = [
        ("StepBegin", given, set()),
        ("LossBegin", scored, set()),
        ("BackwardBegin", lost, {"critic"}),
        *[(name, done, {"critic"}) for name in ("BackwardEnd", "UpdateBegin", "UpdateEnd")],
    ]
    generator: list[Any] = [
        ("LossBegin", done, {"critic"}),
        *[(name, done, {"critic", "generator"}) for name in BLOCK[1:]],
    ]
    first = [*critic, ("StepEnd", done, {"critic"})]
    second = [*critic, *generator, ("StepEnd", done, {"critic", "generator"})]
    assert entries.seen[1:-1] == [*first, *second]


def test_update_events_carry_the_names_of_the_models() -> None:
    recorder = EventRecorder()
    learner = learner_of(recorder, Recorder(), steps=3)
    learner.epoch(GANPhase(noise=NOISE, critic_steps=2))
    turn, no_turn = ["StepBegin", *BLOCK, *BLOCK, "StepEnd"], ["StepBegin", *BLOCK, "StepEnd"]
    assert recorder.events == ["EpochBegin", *no_turn, *turn, *no_turn, "EpochEnd"]
    assert learner.history[GANPhase].updates == {"critic": 3, "generator": 1}


def test_the_entries_have_the_shapes_of_the_documentation() -> None:
    learner = learner_of(steps=1, conditional=True)
    learner.epoch(GANPhase(noise=(3, 2), conditional=True, gradient_penalty=10))
    step = learner.step
    assert {
        name: tuple(step[name].shape) for name in ("real", "ys", "noise", "fake", "real_scores", "fake_scores")
    } == {
        "real": (BATCH, SIZE),
        "ys": (BATCH,),
        "noise": (BATCH, 3, 2),
        "fake": (BATCH, SIZE),
        "real_scores": (BATCH, 1),
        "fake_scores": (BATCH, 1),
    }
    assert list(step.losses) == ["critic", "generator"]
    for scalar in (step.penalty, *step.losses.values()):
        assert scalar.shape == ()
        assert not scalar.requires_grad


def test_at_the_generators_loss_the_scores_are_the_updated_critics_with_a_graph_to_the_generator() -> None:
    found: list[Tensor] = []

    class Look(UnsafeCallback):
        @on(LossBegin)
        def look(self, event: Event, phase: Phase, learner: Learner) -> None:
            found.append(learner.step.fake_scores)
            if len(found) == 2:
                assert torch.equal(learner.step.fake_scores, learner.model.critic(learner.step.fake))

    learner = learner_of(Look(), steps=1, norm=False)
    learner.epoch(GANPhase(noise=NOISE))
    before, after = found
    assert reached(before) == set(learner.model.critic.parameters())
    assert reached(after) == set(learner.model.generator.parameters())
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("entry", "event", "change"),
    [
        ("real", StepBegin, lambda tensor: 2 * tensor),
        ("real_scores", LossBegin, lambda tensor: tensor.clamp(-0.1, 0.1)),
    ],
)
def test_what_a_callback_replaces_is_used_next(entry: str, event: type[Event], change: Any) -> None:
    def replace(learner: Any) -> None:
        setattr(learner.step, entry, change(getattr(learner.step, entry)))

    log = LossLog()
    learner = learner_of(CustomCallback(replace, event, writes=(f"step.{entry}",), reads=()), log, steps=1, norm=False)
    learner.epoch(GANPhase(noise=NOISE, r1=0.5))

    gen, dis = nets(norm=False)
    real = next(iter(batches(1)))
    torch.manual_seed(stream_seed(SEED, "training/step", 0))
    fake = gen(torch.randn(BATCH, NOISE)).detach()
    real = change(real) if entry == "real" else real
    scores = change(dis(real)) if entry == "real_scores" else dis(real)
    loss = softplus(-scores).mean() + softplus(dis(fake)).mean()
    penalty = ByHand(r1=0.5).penalty(dis, real, fake, ())
    assert torch.equal(log.losses[0]["critic"], (loss + penalty).detach())
    assert torch.equal(log.penalties[0], penalty.detach())


def test_the_history_has_both_losses_and_the_updates_by_name() -> None:
    log = LossLog()
    learner = learner_of(log, Recorder(), Metrics(), steps=10)
    learner.fit(1, phases=[GANPhase(noise=NOISE, critic_steps=5)])
    assert learner.history[GANPhase].updates == {"critic": 10, "generator": 2}
    assert learner.history[GANPhase].steps == 10
    for name, count in (("critic", 10), ("generator", 2)):
        values = [losses[name].double() for losses in log.losses if name in losses]
        assert len(values) == count
        assert learner.history[f"training/loss_{name}"] == [pytest.approx(torch.stack(values).mean().item(), rel=1e-12)]


def test_an_epoch_without_a_turn_of_the_generator_records_the_critics_loss_alone() -> None:
    learner = learner_of(Recorder(), Metrics(), steps=2)
    learner.fit(3, phases=[GANPhase(noise=NOISE, critic_steps=5)])
    assert len(learner.history["training/loss_critic"]) == 3
    epochs = [row["epoch"] for row in learner.history.rows() if row["metric"] == "loss_generator"]
    assert epochs == [3]


# The validation twin


def test_the_twin_gives_both_losses_without_penalties() -> None:
    recorder = EventRecorder()
    learner = learner_of(recorder, steps=1)
    gan = GANPhase("hinge", noise=lambda count, device: torch.ones(count, NOISE), gradient_penalty=10, r1=1)
    learner.epoch(GANValidationPhase(gan))
    assert recorder.events == ["EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]
    gen, dis = nets()
    real = next(iter(batches(1)))
    with torch.no_grad():
        fake = gen.eval()(torch.ones(BATCH, NOISE))
        real_scores, fake_scores = dis.eval()(real), dis(fake)
    step = learner.step
    assert step.losses == {
        "critic": critic_loss("hinge", real_scores, fake_scores),
        "generator": generator_loss("hinge", fake_scores),
    }
    for name, value in (("fake", fake), ("real_scores", real_scores), ("fake_scores", fake_scores)):
        assert torch.equal(step[name], value)
        assert not step[name].requires_grad
    assert set(step) == {"real", "noise", "fake", "real_scores", "fake_scores", "losses"}


def test_the_twin_takes_the_labels_of_a_conditional_gan() -> None:
    learner = learner_of(steps=1, conditional=True)
    learner.epoch(GANValidationPhase(GANPhase(noise=NOISE, conditional=True)))
    real, ys = next(iter(batches(1, conditional=True)))
    gen, dis = (net.eval() for net in nets(conditional=True))
    step = learner.step
    with torch.no_grad():
        assert torch.equal(step.real_scores, dis(real, ys))
        assert torch.equal(step.fake, gen(step.noise, ys))
        assert torch.equal(step.fake_scores, dis(step.fake, ys))
    assert not torch.equal(step.real_scores, dis(real))


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("critic_steps", [1, 3])
def test_the_twin_only_watches(critic_steps: int) -> None:
    plain, watched = learner_of(steps=4), learner_of(steps=4)
    plain.fit(3, phases=[GANPhase(noise=NOISE, critic_steps=critic_steps, gradient_penalty=1)])
    gan = GANPhase(noise=NOISE, critic_steps=critic_steps, gradient_penalty=1)
    watched.fit(3, phases=[gan, GANValidationPhase(gan)])
    assert_same_bits(plain, watched)
    assert gan.state_dict() == {"critic_updates": 12}
    assert all(module.training for model in watched.model for module in model.modules())


def test_evaluate_gives_both_losses_of_the_twin_and_the_same_ones_again() -> None:
    learner = learner_of(steps=2)
    gan = GANPhase("wasserstein", noise=NOISE)
    learner.fit(1, phases=[gan])
    before = bits(learner)
    found = learner.evaluate(phase=GANValidationPhase(gan))
    assert found == learner.evaluate(phase=GANValidationPhase(gan))
    assert found.keys() == {"loss_critic", "loss_generator"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())

    gen, dis = (model.eval() for model in learner.model)
    scores = []
    for step, real in enumerate(batches(2)):
        torch.manual_seed(stream_seed(SEED, "evaluate/validation/GANValidationPhase/step", step))
        with torch.no_grad():
            scores.append((dis(real), dis(gen(torch.randn(BATCH, NOISE)))))
    real_scores, fake_scores = (torch.cat(column).double() for column in zip(*scores, strict=True))
    assert found["loss_critic"] == pytest.approx((fake_scores.mean() - real_scores.mean()).item())
    assert found["loss_generator"] == pytest.approx(-fake_scores.mean().item())


class Averaged(GANValidationPhase):
    model_view = "ema"


def ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, NOISE, device=device)


def test_a_twin_of_a_view_judges_the_averaged_generator() -> None:
    learner = learner_of(
        EMA("generator", 0.5), Recorder(), Metrics(), steps=4, norm=False
    )  # batch norm makes nothing of equal rows
    gan = GANPhase(noise=ones)
    learner.fit(1, phases=[gan, GANValidationPhase(gan), Averaged(gan)])
    critic, average, live = learner.model.critic, learner.weights["generator@ema"], learner.model.generator
    with torch.no_grad():
        for name, generator in (("loss_generator@ema", average), ("loss_generator", live)):
            scores = critic.eval()(generator.eval()(torch.ones(BATCH, NOISE)))
            assert learner.history[f"validation/{name}"] == [pytest.approx(softplus(-scores).mean().item())]
    assert learner.history["validation/loss_generator@ema"] != learner.history["validation/loss_generator"]
    assert learner.model.generator is live


def test_a_single_step_of_a_twin_of_a_view_judges_the_averaged_generator_too() -> None:
    learner = learner_of(EMA("generator", 0.5), steps=4, norm=False)
    gan = GANPhase(noise=ones)
    learner.fit(1, phases=[gan])
    average = learner.weights["generator@ema"].eval()
    learner.model.generator.eval()
    Averaged(gan).step(learner, next(iter(batches(1))))
    assert torch.equal(learner.step.fake, average(torch.ones(BATCH, NOISE)))
    assert not torch.equal(learner.step.fake, learner.model.generator(torch.ones(BATCH, NOISE)))


@pytest.mark.parametrize(
    ("given", "described"),
    [(GANPhase, "the class GANPhase"), (TrainingPhase(), "a TrainingPhase"), (None, "None")],
    ids=["class", "another phase", "none"],
)
def test_the_twin_wants_an_instance_of_the_training_phase(given: Any, described: str) -> None:
    with pytest.raises(PhaseError, match=f"GANValidationPhase was given {described}; expected an instance"):
        GANValidationPhase(given)


def test_the_twin_shows_whose_it_is() -> None:
    assert repr(GANValidationPhase(GANPhase())) == "GANValidationPhase(GANPhase())"


# What it keeps


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_new_phase_goes_on_from_the_state_of_another(after: int) -> None:
    whole, halves = learner_of(steps=7), learner_of(steps=7)
    whole.epoch(GANPhase(noise=NOISE, critic_steps=3))
    data = list(batches(7))
    first, second = GANPhase(noise=NOISE, critic_steps=3), GANPhase(noise=NOISE, critic_steps=3)
    halves.epoch(first, data[:after])
    assert first.state_dict() == {"critic_updates": after}
    second.load_state_dict(first.state_dict())
    halves.epoch(second, data[after:])
    assert_same_bits(whole, halves)
    assert second.state_dict() == {"critic_updates": 7}


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("critic_steps", [1, 2])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_check_finds_no_leak_and_leaves_the_count_alone(penalty: str, critic_steps: int) -> None:
    def make() -> GANPhase:
        return GANPhase(noise=NOISE, critic_steps=critic_steps, **PENALTIES[penalty])

    plain, checked = learner_of(), learner_of()
    plain.fit(2, phases=[make()])
    gan = make()
    for _ in range(2):
        assert checked.check(phases=[gan]) == []
        count = gan.state_dict()
        assert checked.check(phases=[gan]) == []
        assert gan.state_dict() == count
        checked.fit(1, phases=[gan])
    assert_same_bits(plain, checked)


# Named models


class Nets(NamedTuple):
    generator: nn.Module
    critic: nn.Module


class WithEncoder(NamedTuple):
    generator: nn.Module
    critic: nn.Module
    encoder: nn.Module


def test_a_named_tuple_of_modules_keeps_its_type() -> None:
    given = Nets(*nets())
    models: list[Any] = []

    class Training(GANPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            models.append(learner.model)
            return super().step(learner, batch)

    class Watching(Averaged):
        def step(self, learner: Learner, batch: Any) -> Any:
            models.append(learner.model)
            return super().step(learner, batch)

    learner = learner_of(EMA("generator", 0.5), model=given)
    assert learner.model is given
    gan = Training(noise=NOISE)
    learner.fit(1, phases=[gan, Watching(gan)])
    assert len(models) == 10
    assert all(model is given for model in models[:5])
    assert [type(model) for model in models[5:]] == [Nets] * 5
    assert models[-1].generator is learner.weights["generator@ema"]
    assert models[-1].critic is given.critic
    assert learner.model is given
    gen, dis, _, _ = ByHand().train(batches(5))
    assert_equal(learner.model.generator, gen)
    assert_equal(learner.model.critic, dis)


def test_a_frozen_third_model_has_no_optimizer_and_stays_as_it_is() -> None:
    torch.manual_seed(7)
    encoder = nn.Linear(SIZE, 2).requires_grad_(False)
    before = encoder.weight.clone()
    given = WithEncoder(*nets(), encoder)
    learner = learner_of(model=given)
    assert learner.model is given
    assert learner.optimizer_names == ("generator", "critic")
    assert not hasattr(learner.optimizer, "encoder")
    learner.fit(1, phases=[GANPhase(noise=NOISE)])
    gen, dis, _, _ = ByHand().train(batches(5))
    assert_equal(learner.model.generator, gen)
    assert_equal(learner.model.critic, dis)
    assert torch.equal(encoder.weight, before)
    assert encoder.weight.grad is None
    assert not encoder.weight.requires_grad


def test_optimizers_may_mix_factories_and_instances() -> None:
    gen, dis = nets()
    own = torch.optim.SGD(dis.parameters(), lr=0.1, momentum=0.9)
    learner = learner_of(model={"generator": gen, "critic": dis}, optimizer={"generator": ADAM, "critic": own})
    assert learner.optimizer.critic is own
    learner.fit(1, phases=[GANPhase(noise=NOISE)])

    gen, dis = nets()
    step_gen, step_dis = ADAM(gen.parameters()), torch.optim.SGD(dis.parameters(), lr=0.1, momentum=0.9)
    for number, real in enumerate(batches(5)):
        torch.manual_seed(stream_seed(SEED, "training/step", number))
        fake = gen(torch.randn(len(real), NOISE))
        step_dis.zero_grad()
        critic_loss("non-saturating", dis(real), dis(fake.detach())).backward()
        step_dis.step()
        step_gen.zero_grad()
        generator_loss("non-saturating", dis(fake)).backward()
        step_gen.step()
    assert_equal(learner.model.generator, gen)
    assert_equal(learner.model.critic, dis)


class OneModule(nn.Module):
    """Both networks as parts of one model."""

    def __init__(self) -> None:
        super().__init__()
        self.G, self.D = nets()


class PartsOfOne(TrainingPhase):
    """A user's GAN over the parts of one model."""

    def step(self, learner: Learner, batch: Any) -> Any:
        model = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = model.G(torch.randn(len(state.real), NOISE))
            with learner.optimizing("D") as block:
                block.loss = softplus(-model.D(state.real)).mean() + softplus(model.D(state.fake.detach())).mean()
            with learner.optimizing("G") as block:
                block.loss = softplus(-model.D(state.fake)).mean()


def test_two_optimizers_over_one_model_train_it_as_the_phase_trains_two() -> None:
    learner = learner_of(Recorder(), Metrics(), model=OneModule(), optimizer={"G": ADAM, "D": ADAM})
    learner.fit(2, phases=[PartsOfOne()])
    gen, dis, _, _ = ByHand().train(batches(5), epochs=2)
    assert_equal(learner.model.G, gen)
    assert_equal(learner.model.D, dis)
    assert learner.history[PartsOfOne].updates == {"D": 10, "G": 10}
    assert len(learner.history["training/loss_g"]) == len(learner.history["training/loss_d"]) == 2


def test_a_model_with_two_optimizers_has_none_of_its_own_name() -> None:
    gen, dis = nets()
    optimizers = {"first": ADAM(gen.body[:2].parameters()), "last": ADAM(gen.body[3].parameters()), "critic": ADAM}
    learner = learner_of(model={"generator": gen, "critic": dis}, optimizer=optimizers)
    with pytest.raises(PhaseError, match=r"updates 'generator', and the optimizers are \['first', 'last', 'critic'\]"):
        learner.fit(1, phases=[GANPhase(noise=NOISE)])


def test_a_subclass_may_say_other_penalties() -> None:
    class Drift(GANPhase):
        """Keeps the critic's scores near 0, as progressive GANs do."""

        def penalized(self, loss: Tensor, critic: Any, state: Any, fake: Tensor, labels: Any) -> Tensor:
            drift = 0.01 * state.real_scores.square().mean()
            state.penalty = drift.detach()
            return super().penalized(loss, critic, state, fake, labels) + drift

    log = LossLog()
    learner = learner_of(log, steps=1)
    learner.epoch(Drift("wasserstein", noise=NOISE))
    gen, dis = nets()
    real = next(iter(batches(1)))
    torch.manual_seed(stream_seed(SEED, "training/step", 0))
    fake = gen(torch.randn(BATCH, NOISE)).detach()
    scores = dis(real)
    expected = critic_loss("wasserstein", scores, dis(fake)) + 0.01 * scores.square().mean()
    assert torch.equal(log.losses[0]["critic"], expected.detach())
    assert torch.equal(log.penalties[0], 0.01 * scores.square().mean())


class Halved(GANPhase):
    """Shows its critic half of each row, without any `augment`."""

    def judging(self, critic: Any, state: Any) -> Any:
        return lambda rows: critic(rows / 2)


def test_how_a_subclass_judges_is_used_without_changes_of_rows() -> None:
    found = []
    for phase in (GANPhase(), Halved()):
        torch.manual_seed(0)
        models = {"G": nn.Linear(64, 4), "D": nn.Linear(4, 1)}
        sgd = partial(torch.optim.SGD, lr=0.1)
        learner = Learner(models, data=(torch.ones(8, 4),), optimizer=sgd, default_callbacks=False, seed=0)
        learner.epoch(phase)
        found.append(learner.model.D.weight.detach().clone())
    assert not torch.equal(*found)
