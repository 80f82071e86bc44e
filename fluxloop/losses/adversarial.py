"""The losses of a critic and a generator, and the penalties on the critic's gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import relu, softplus

from fluxloop.compute.precision import in_full_precision
from fluxloop.guard.assign import fields_of_the_class


@fields_of_the_class
@frozen(slots=False)  # compiled steps see at a glance that an object without slots has not changed
class AdversarialLoss:
    """What a critic and a generator minimise, given the critic's scores.

    Scores are raw numbers of any shape, higher for "real"; the losses are means over them.

    Args:
        name: What `GANPhase` calls it.
        critic: ``(real_scores, fake_scores) -> scalar``.
        generator: ``(fake_scores) -> scalar``; of a loss of pairs ``(real_scores, fake_scores) -> scalar``.
        paired: Whether it compares each fake score with a real one, in the generator's turn too.

    Example:
        >>> loss = AdversarialLoss("plain", lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean())
        >>> loss.critic(torch.ones(4), torch.zeros(4)).item(), loss.generator(torch.ones(4)).item()
        (-1.0, -1.0)
    """

    name: str
    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[..., Tensor]
    paired: bool = False


def _of_fake(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return in_full_precision(loss)


non_saturating = AdversarialLoss(
    "non-saturating",
    in_full_precision(lambda real, fake: softplus(-real).mean() + softplus(fake).mean()),
    _of_fake(lambda fake: softplus(-fake).mean()),
)
"""Binary cross entropy on scores as logits; the generator maximises log D (Goodfellow et al., 2014).

Example:
    >>> unsure = torch.zeros(4)
    >>> round(non_saturating.critic(unsure, unsure).item(), 4), round(non_saturating.generator(unsure).item(), 4)
    (1.3863, 0.6931)
"""

hinge = AdversarialLoss(
    "hinge",
    in_full_precision(lambda real, fake: relu(1 - real).mean() + relu(1 + fake).mean()),
    _of_fake(lambda fake: -fake.mean()),
)
"""The hinge loss of Lim and Ye (2017) and SAGAN (Zhang et al., 2019).

Example:
    >>> real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, -0.5])  # beyond 1 and -1 nothing is left to gain
    >>> hinge.critic(real, fake).item(), hinge.generator(fake).item()
    (0.5, 1.75)
"""

wasserstein = AdversarialLoss(
    "wasserstein",
    in_full_precision(lambda real, fake: fake.mean() - real.mean()),
    _of_fake(lambda fake: -fake.mean()),
)
"""The difference of mean scores (Arjovsky et al., 2017); needs a Lipschitz critic: `gradient_penalty`.

Example:
    >>> real, fake = torch.tensor([2.0, 4.0]), torch.tensor([-1.0, 1.0])
    >>> wasserstein.critic(real, fake).item(), wasserstein.generator(fake).item() == 0
    (-3.0, True)
"""

least_squares = AdversarialLoss(
    "least-squares",
    in_full_precision(lambda real, fake: ((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2),
    _of_fake(lambda fake: ((fake - 1) ** 2).mean() / 2),
)
"""Squared distance of scores to 1 (real) and 0 (fake), halved as in LSGAN (Mao et al., 2017).

Example:
    >>> real, fake = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])
    >>> least_squares.critic(real, fake).item(), least_squares.generator(fake).item()
    (2.0, 0.5)
"""


@in_full_precision
def relativistic_loss(higher: Tensor, lower: Tensor) -> Tensor:
    """Return the logistic loss of pairs of scores, of which one is to be higher than the other.

    The relativistic pairing loss (Jolicoeur-Martineau, 2019) of R3GAN (Huang et al., 2024). For the critic real
    scores are to be higher than fake ones, ``relativistic_loss(real, fake)``; for the generator it is the other way
    round.

    Args:
        higher: Scores of any shape.
        lower: The same shape; each is compared with the one in its place.

    Returns:
        A scalar, a mean over pairs.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> round(relativistic_loss(torch.ones(3), torch.ones(3)).item(), 4)  # the logarithm of 2
        0.6931
    """
    if higher.shape != lower.shape:
        raise ValueError(
            f"relativistic_loss was given scores of shapes {tuple(higher.shape)} and {tuple(lower.shape)}; expected "
            "the same: as many fake rows as real ones"
        )
    return softplus(lower - higher).mean()


relativistic = AdversarialLoss(
    "relativistic", relativistic_loss, lambda real, fake: relativistic_loss(fake, real), paired=True
)
"""Each fake score is compared with a real one; needs a penalty on the critic's gradients (`relativistic_loss`).

Example:
    >>> real, fake = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 1.0])
    >>> [round(loss.item(), 4) for loss in (relativistic.critic(real, fake), relativistic.generator(real, fake))]
    [0.1269, 2.1269]
"""

ADVERSARIAL_LOSSES = {loss.name: loss for loss in (non_saturating, hinge, wasserstein, least_squares, relativistic)}
"""By the names that `GANPhase` takes."""

Critic = Callable[..., Tensor]


def _gradients(critic: Critic, inputs: Tensor, conditions: tuple[Tensor, ...]) -> Tensor:
    """Return the gradient of the critic's score with respect to each input, shape (N, D), differentiable."""
    scores = critic(inputs, *conditions)
    (gradient,) = torch.autograd.grad(scores.sum(), inputs, create_graph=True)
    return gradient.flatten(1)


def gradient_penalty(
    critic: Critic, real: Tensor, fake: Tensor, *conditions: Tensor, epsilon: Tensor | None = None
) -> Tensor:
    """Penalise the critic where its gradient is not of norm 1, between real and fake inputs.

    WGAN-GP (Gulrajani et al., 2017): on each row a point is drawn evenly between the two (from
    torch's global generator), and ``(norm - 1)**2`` is averaged. The paper weighs it by 10.

    Args:
        critic: ``(inputs, *conditions) -> scores``.
        real: Shape (N, ...).
        fake: The same shape.
        conditions: Further inputs of the critic, such as labels.
        epsilon: Where the points lie, shape (N,): 1 is the real row and 0 the fake one; left out, they are drawn.

    Returns:
        A scalar, differentiable with respect to the critic's parameters.

    Raises:
        ValueError: `real` and `fake` have different shapes, or `epsilon` has another number of rows.

    Example:
        >>> critic = torch.nn.Linear(4, 1, bias=False)
        >>> torch.nn.init.constant_(critic.weight, 1.5).norm().item()  # its gradient, everywhere
        3.0
        >>> gradient_penalty(critic, torch.randn(8, 4), torch.randn(8, 4)).item()  # (3 - 1)**2
        4.0
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"gradient_penalty was given real rows of shape {tuple(real.shape)} and fake ones of {tuple(fake.shape)}; "
            "expected the same shape"
        )
    if epsilon is None:
        epsilon = torch.rand(len(real), device=real.device, dtype=real.dtype)
    elif epsilon.numel() != len(real):
        raise ValueError(
            f"gradient_penalty was given epsilon of shape {tuple(epsilon.shape)} for {len(real)} rows; expected a "
            "number for each: torch.rand(len(real))"
        )
    share = epsilon.to(real).reshape(-1, *[1] * (real.ndim - 1))
    between = (share * real.detach() + (1 - share) * fake.detach()).requires_grad_()
    norms: Tensor = torch.linalg.vector_norm(_gradients(critic, between, conditions), dim=1)
    return (norms - 1).pow(2).mean()


def r1_penalty(critic: Critic, real: Tensor, *conditions: Tensor) -> Tensor:
    """Penalise the critic's gradient at real inputs: half the mean of its squared norm.

    R1 (Mescheder et al., 2018); their weight is gamma, 0.1 to 10. At fake inputs it is their R2.

    Args:
        critic: ``(inputs, *conditions) -> scores``.
        real: Real rows for R1, fake ones for R2, shape (N, ...).
        conditions: Further inputs of the critic, such as labels.

    Returns:
        A scalar, differentiable with respect to the critic's parameters.

    Example:
        >>> r1_penalty(lambda rows: 3 * rows, torch.randn(8, 1)).item()  # half of 3**2
        4.5
    """
    return _gradients(critic, real.detach().requires_grad_(), conditions).pow(2).sum(1).mean() / 2


def path_lengths(images: Tensor, latents: Tensor, directions: Tensor | None = None) -> Tensor:
    """Return how far images move, in a random direction, with their latents (Karras et al., 2020, section 3.2).

    The norm of the Jacobian's transpose times a normal vector, divided by the root of the number of pixels.

    Args:
        images: Made of the latents, with a graph to them, shape (N, C, H, W) or (N, D).
        latents: Shape (N, F), or (N, L, F) for one for each of L layers: the squared norms are averaged over these.
        directions: Standard normal, of the shape of the images; left out, they are drawn from torch's generator.

    Returns:
        Shape (N,), differentiable with respect to the generator's parameters.

    Example:
        >>> latents = torch.ones(2, 3, requires_grad=True)
        >>> path_lengths(5 * latents, latents, torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 4.0]]))
        tensor([ 5., 25.])
    """
    directions = torch.randn_like(images) if directions is None else directions
    moved = (images * directions).sum() / images.shape[2:].numel() ** 0.5
    (gradient,) = torch.autograd.grad(moved, latents, create_graph=True)
    return gradient.square().sum(-1).reshape(len(latents), -1).mean(1).sqrt()
