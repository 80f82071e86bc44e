from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fluxloop import losses
from fluxloop.losses import ADVERSARIAL_LOSSES, AdversarialLoss, gradient_penalty, r1_penalty

Score = Callable[[float], float]

UNPAIRED = {name: loss for name, loss in ADVERSARIAL_LOSSES.items() if not loss.paired}

by_score: dict[str, tuple[Score, Score, Score]] = {
    "non-saturating": (
        lambda r: -math.log(1 / (1 + math.exp(-r))),
        lambda f: -math.log(1 - 1 / (1 + math.exp(-f))),
        lambda f: -math.log(1 / (1 + math.exp(-f))),
    ),
    "hinge": (lambda r: max(0.0, 1 - r), lambda f: max(0.0, 1 + f), lambda f: -f),
    "wasserstein": (lambda r: -r, lambda f: f, lambda f: -f),
    "least-squares": (lambda r: (r - 1) ** 2 / 2, lambda f: f**2 / 2, lambda f: (f - 1) ** 2 / 2),
}
"""What the papers say of one real score, one fake score, and one fake score in the generator's turn."""


def slope(function: Score, at: float) -> float:
    return (function(at + 1e-5) - function(at - 1e-5)) / 2e-5


def scores(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def critic_of(width: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True))


def assert_all_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


# Losses of scores


@pytest.mark.parametrize("name", by_score)
@settings(max_examples=15, deadline=None)
@given(reals=st.integers(1, 6), fakes=st.integers(1, 6), seed=st.integers(0, 999))
def test_the_losses_are_means_of_what_the_papers_say_of_each_score(
    name: str, reals: int, fakes: int, seed: int
) -> None:
    real, fake = scores(seed, reals), scores(seed + 1, fakes)
    of_real, of_fake, of_generated = by_score[name]
    critic = math.fsum(map(of_real, real.tolist())) / reals + math.fsum(map(of_fake, fake.tolist())) / fakes
    generator = math.fsum(map(of_generated, fake.tolist())) / fakes
    loss = UNPAIRED[name]
    assert loss.critic(real, fake).item() == pytest.approx(critic, rel=1e-12)
    assert loss.generator(fake).item() == pytest.approx(generator, rel=1e-12)


@pytest.mark.parametrize("name", by_score)
def test_their_gradients_are_the_slopes_of_what_the_papers_say(name: str) -> None:
    real, fake = scores(0, 5).requires_grad_(), scores(1, 4).requires_grad_()
    of_real, of_fake, of_generated = by_score[name]
    loss = ADVERSARIAL_LOSSES[name]
    to_real, to_fake = torch.autograd.grad(loss.critic(real, fake), (real, fake))
    (to_generated,) = torch.autograd.grad(loss.generator(fake), fake)
    assert to_real.tolist() == pytest.approx([slope(of_real, r) / 5 for r in real.tolist()], abs=1e-8)
    assert to_fake.tolist() == pytest.approx([slope(of_fake, f) / 4 for f in fake.tolist()], abs=1e-8)
    assert to_generated.tolist() == pytest.approx([slope(of_generated, f) / 4 for f in fake.tolist()], abs=1e-8)


def test_the_non_saturating_loss_is_binary_cross_entropy_with_logits() -> None:
    real, fake = scores(0, 9), scores(1, 9)
    bce = nn.functional.binary_cross_entropy_with_logits
    loss = losses.non_saturating
    torch.testing.assert_close(
        loss.critic(real, fake), bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
    )
    torch.testing.assert_close(loss.generator(fake), bce(fake, torch.ones_like(fake)))


@pytest.mark.parametrize("loss", UNPAIRED.values(), ids=list(UNPAIRED))
def test_the_shape_of_the_scores_does_not_matter(loss: AdversarialLoss) -> None:
    real, fake = scores(0, 12), scores(1, 12)
    expected = loss.critic(real, fake), loss.generator(fake)
    for shape in [(12, 1), (3, 1, 2, 2)]:
        found = loss.critic(real.view(shape), fake.view(shape)), loss.generator(fake.view(shape))
        assert [value.shape for value in found] == [(), ()]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", UNPAIRED.values(), ids=list(UNPAIRED))
def test_extreme_scores_give_finite_losses_and_gradients(loss: AdversarialLoss) -> None:
    real = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    fake = real.detach().flip(0).requires_grad_()
    critic, generator = loss.critic(real, fake), loss.generator(fake)
    found = [critic, generator, *torch.autograd.grad(critic, (real, fake)), *torch.autograd.grad(generator, fake)]
    assert all(value.isfinite().all() for value in found)
    torch.testing.assert_close(critic, loss.critic(real.double(), fake.double()).float())


@pytest.mark.parametrize("loss", UNPAIRED.values(), ids=list(UNPAIRED))
def test_the_critic_tells_real_from_fake_and_the_generator_works_against_it(loss: AdversarialLoss) -> None:
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    to_real, to_fake = torch.autograd.grad(loss.critic(real, fake), (real, fake), allow_unused=True)
    (to_generated,) = torch.autograd.grad(loss.generator(fake), fake)
    assert (to_real < 0).all()  # a step down raises the scores of real rows
    assert (to_fake >= 0).all()
    assert (to_generated < 0).all()


def test_every_adversarial_loss_is_found_by_its_name() -> None:
    assert set(ADVERSARIAL_LOSSES) == {"non-saturating", "hinge", "wasserstein", "least-squares", "relativistic"}
    assert all(loss.name == name for name, loss in ADVERSARIAL_LOSSES.items())
    offered = [value for value in vars(losses).values() if isinstance(value, AdversarialLoss)]
    assert {id(loss) for loss in offered} == {id(loss) for loss in ADVERSARIAL_LOSSES.values()}


def test_the_relativistic_loss_is_a_logistic_loss_of_each_pair_also_in_its_gradient() -> None:
    real, fake = scores(0, 5).requires_grad_(), scores(1, 5).requires_grad_()
    pairs = list(zip(real.tolist(), fake.tolist(), strict=True))
    critic, generator = losses.relativistic.critic(real, fake), losses.relativistic.generator(real, fake)
    assert critic.item() == pytest.approx(math.fsum(math.log(1 + math.exp(f - r)) for r, f in pairs) / 5, rel=1e-12)
    assert generator.item() == pytest.approx(math.fsum(math.log(1 + math.exp(r - f)) for r, f in pairs) / 5, rel=1e-12)
    to_real, to_fake = torch.autograd.grad(critic, (real, fake))
    slopes = [1 / (1 + math.exp(r - f)) / 5 for r, f in pairs]
    assert to_fake.tolist() == pytest.approx(slopes, rel=1e-9)
    assert to_real.tolist() == pytest.approx([-each for each in slopes], rel=1e-9)
    assert torch.autograd.grad(generator, fake)[0].tolist() == pytest.approx(
        [-1 / (1 + math.exp(f - r)) / 5 for r, f in pairs], rel=1e-9
    )


def test_scores_that_are_no_pairs_are_an_error_and_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"shapes \(4, 1\) and \(4,\); expected the same"):
        losses.relativistic_loss(torch.zeros(4, 1), torch.zeros(4))


def test_extreme_pairs_have_finite_losses_and_gradients() -> None:
    real = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    loss = losses.relativistic_loss(real, real.detach().flip(0))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, real)[0].isfinite().all()


# Gradient penalty


def penalty_by_rows(critic: nn.Module, real: Tensor, fake: Tensor, seed: int) -> Tensor:
    """Write the penalty of WGAN-GP row by row: each has a point, a gradient and a norm of its own."""
    torch.manual_seed(seed)
    shares = torch.rand(len(real), dtype=real.dtype)
    terms = []
    for share, one_real, one_fake in zip(shares, real, fake, strict=True):
        point = (share * one_real + (1 - share) * one_fake).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(point[None]).sum(), point, create_graph=True)
        terms.append((torch.sqrt((gradient**2).sum()) - 1) ** 2)
    return torch.stack(terms).mean()


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), shape=st.sampled_from([(4,), (1, 3, 2), (2, 2)]), seed=st.integers(0, 999))
def test_the_gradient_penalty_equals_the_one_computed_row_by_row(rows: int, shape: tuple[int, ...], seed: int) -> None:
    real, fake = scores(seed, rows, *shape), scores(seed + 1, rows, *shape)
    critic = critic_of(math.prod(shape))
    expected = penalty_by_rows(critic, real, fake, seed)
    torch.manual_seed(seed)
    found = gradient_penalty(critic, real, fake)
    torch.testing.assert_close(found, expected)
    assert_all_close(gradients(found, critic), gradients(expected, critic))


def test_the_gradient_penalty_of_a_linear_critic_is_known() -> None:
    weight = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64, requires_grad=True)  # of norm 3
    penalty = gradient_penalty(lambda xs: xs @ weight, scores(0, 5, 3), scores(1, 5, 3))
    torch.testing.assert_close(penalty.item(), (3.0 - 1) ** 2)
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, 2 * (3 - 1) * weight.detach() / 3)


def test_the_gradient_penalty_looks_between_real_and_fake_at_a_share_drawn_for_each_row() -> None:
    seen: list[Tensor] = []

    def critic(xs: Tensor) -> Tensor:
        seen.append(xs.detach())
        return xs.pow(2).sum((1, 2))

    real, fake = torch.zeros(200, 2, 3), torch.ones(200, 2, 3)
    gradient_penalty(critic, real, fake)
    (points,) = seen
    shares = points[:, 0, 0]
    assert torch.equal(points, shares[:, None, None].expand_as(points))  # one share for a whole row
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert len(shares.unique()) > 190
    assert torch.histc(shares, bins=4, min=0, max=1).min() > 25  # evenly


def test_a_critic_without_slope_has_a_penalty_of_one_and_a_finite_gradient() -> None:
    critic = nn.Linear(3, 1)
    nn.init.zeros_(critic.weight)
    penalty = gradient_penalty(critic, torch.randn(4, 3), torch.randn(4, 3))
    assert penalty.item() == 1
    assert all(gradient.isfinite().all() for gradient in gradients(penalty, critic))


def test_a_dead_critic_has_a_finite_gradient_of_its_penalty() -> None:
    critic = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    nn.init.constant_(critic[0].bias, -1e3)
    penalty = gradient_penalty(critic, torch.randn(4, 3), torch.randn(4, 3))
    assert penalty.item() == 1
    assert all(gradient.isfinite().all() for gradient in gradients(penalty, critic))


def test_the_gradient_penalty_takes_the_points_that_are_given() -> None:
    real, fake = scores(0, 5, 3, 2), scores(1, 5, 3, 2)
    seen: list[Tensor] = []

    def critic(xs: Tensor) -> Tensor:
        seen.append(xs.detach())
        return xs.pow(2).flatten(1).sum(1)

    epsilon = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    penalty = gradient_penalty(critic, real, fake, epsilon=epsilon)
    share = epsilon[:, None, None]
    torch.testing.assert_close(seen[0], share * real + (1 - share) * fake)
    torch.manual_seed(3)
    drawn = gradient_penalty(critic, real, fake)
    torch.manual_seed(3)
    assert torch.equal(gradient_penalty(critic, real, fake, epsilon=torch.rand(5, dtype=torch.float64)), drawn)
    assert not torch.equal(drawn, penalty)
    with pytest.raises(ValueError, match=r"epsilon of shape \(4,\) for 5 rows; expected a number for each"):
        gradient_penalty(critic, real, fake, epsilon=epsilon[:4])


def test_the_gradient_penalty_reaches_the_critic_alone() -> None:
    critic, generator = critic_of(3).float(), nn.Linear(2, 3)
    real = torch.randn(4, 3, requires_grad=True)
    gradient_penalty(critic, real, generator(torch.randn(4, 2))).backward()
    assert all(parameter.grad is not None for parameter in critic[1].parameters())
    assert real.grad is None
    assert [parameter.grad for parameter in generator.parameters()] == [None, None]


def test_the_gradient_penalty_leaves_no_gradient_behind_before_its_backward() -> None:
    critic = nn.Linear(3, 1)
    gradient_penalty(critic, torch.randn(4, 3), torch.randn(4, 3))
    assert [parameter.grad for parameter in critic.parameters()] == [None, None]


def test_a_critic_gets_its_conditions() -> None:
    weights = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)  # of norms 5 and 2

    def critic(xs: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return scale * (xs * weights[labels]).sum(1)

    labels, scale = torch.tensor([0, 1, 1]), torch.tensor(2.0, dtype=torch.float64)
    real, fake = scores(0, 3, 2), scores(1, 3, 2)
    penalty = gradient_penalty(critic, real, fake, labels, scale)
    assert penalty.item() == pytest.approx(((10 - 1) ** 2 + 2 * (4 - 1) ** 2) / 3)
    assert r1_penalty(critic, real, labels, scale).item() == pytest.approx((10**2 + 2 * 4**2) / 3 / 2)


# Path lengths


@pytest.mark.parametrize("shape", [(5,), (3, 5)], ids=["one latent", "one for each layer"])
def test_path_lengths_are_norms_of_the_jacobian_times_a_direction(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 12), nn.Tanh(), nn.Unflatten(1, (3, 2, 2))).double()
    latents, directions = scores(0, 4, *shape).requires_grad_(), scores(1, 4, 3, 2, 2)
    found = losses.path_lengths(net(latents), latents, directions)
    for row in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda z: net(z[None])[0].flatten(), latents[row].detach())
        moved = torch.einsum("p,p...->...", directions[row].flatten(), jacobian) / math.sqrt(4)
        expected = moved.square().sum(-1).mean().sqrt()
        torch.testing.assert_close(found[row], expected)
    assert all(gradient.abs().sum() > 0 for gradient in gradients(found.sum(), net)[:1])
    torch.manual_seed(3)
    drawn = losses.path_lengths(net(latents), latents)
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, losses.path_lengths(net(latents), latents, torch.randn_like(directions)))


# R1


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), shape=st.sampled_from([(4,), (1, 3, 2), (2, 2)]), seed=st.integers(0, 999))
def test_r1_equals_the_penalty_computed_row_by_row(rows: int, shape: tuple[int, ...], seed: int) -> None:
    real = scores(seed, rows, *shape)
    critic = critic_of(math.prod(shape))
    terms = []
    for row in real:
        point = row.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(point[None]).sum(), point, create_graph=True)
        terms.append((gradient**2).sum() / 2)
    expected = torch.stack(terms).mean()
    found = r1_penalty(critic, real)
    torch.testing.assert_close(found, expected)
    assert_all_close(gradients(found, critic), gradients(expected, critic))


def test_r1_of_a_linear_critic_is_known() -> None:
    weight = torch.tensor([2.0, -1.0, 2.0], requires_grad=True)
    penalty = r1_penalty(lambda xs: xs @ weight, torch.randn(5, 3))
    assert penalty.item() == 9 / 2
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert torch.equal(gradient, weight.detach())


def test_r1_leaves_the_real_rows_as_they_were_and_draws_nothing() -> None:
    real, critic = torch.randn(4, 3), nn.Linear(3, 1)
    before = torch.get_rng_state()
    r1_penalty(critic, real).backward()
    assert not real.requires_grad
    assert real.grad is None
    assert torch.equal(torch.get_rng_state(), before)
