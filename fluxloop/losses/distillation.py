"""Losses that have a student agree with a teacher."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from fluxloop.compute.precision import in_full_precision


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return minus the mean cosine similarity: the loss of SimSiam (Chen and He, 2021).

    BYOL's (Grill et al., 2020) is twice this plus 2. No gradient goes to the targets.

    Args:
        predictions: Shape (N, D).
        targets: Shape (N, D).

    Returns:
        A scalar between -1 and 1.

    Example:
        >>> rows = torch.eye(4)
        >>> negative_cosine(2 * rows, rows).item(), negative_cosine(-rows, rows).item()
        (-1.0, 1.0)
    """
    return -mean_cosine(predictions, targets)


@in_full_precision
def mean_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cosine similarity of predictions with targets of the same shape; no gradient goes to these."""
    return cosine_similarity(predictions, targets.detach(), dim=1).mean()


@in_full_precision
def dino_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    center: Tensor | float = 0.0,
    student_temperature: float = 0.1,
    teacher_temperature: float | Tensor = 0.04,
) -> Tensor:
    """Have the student predict, from each crop, what the teacher says of each other global crop.

    The cross entropy of DINO (Caron et al., 2021): the teacher's outputs are centred and
    sharpened; pairs of the same crop are left out; averaged over pairs and rows.

    Args:
        student: Outputs for all crops, the global ones first, each of shape (N, K).
        teacher: Outputs for the global crops, each of shape (N, K); no gradient goes there.
        center: Subtracted from the teacher's outputs, shape (K,) or (1, K).
        student_temperature: Divides the student's outputs.
        teacher_temperature: Divides the teacher's, after centring.

    Returns:
        A scalar.

    Raises:
        ValueError: There is no pair: one crop alone.

    Example:
        >>> crops = [torch.eye(4) for _ in range(6)]
        >>> agreed = dino_loss(crops, crops[:2])
        >>> (agreed < dino_loss([crop.roll(1, 0) for crop in crops], crops[:2])).item()
        True
    """
    targets = [((output.detach() - center) / teacher_temperature).softmax(-1) for output in teacher]
    guesses = [log_softmax(output / student_temperature, dim=-1) for output in student]
    terms = [
        -(target * guess).sum(-1).mean()
        for i, target in enumerate(targets)
        for j, guess in enumerate(guesses)
        if i != j
    ]
    if not terms:
        raise ValueError(
            f"dino_loss was given {len(student)} and {len(teacher)} crops, which make no pair; expected two or more"
        )
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total / len(terms)


@in_full_precision
def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Return the divergence of a student's softened classes from a teacher's (Hinton et al., 2015).

    The Kullback-Leibler divergence from the teacher's distribution to the student's, a mean over
    rows, times ``temperature**2`` so that its gradients keep their size.

    Args:
        student: Logits, shape (N, C).
        teacher: Logits, shape (N, C); no gradient goes there.
        temperature: Divides both.

    Returns:
        A scalar.

    Example:
        >>> logits = torch.eye(4)
        >>> distillation_loss(logits + 1, logits).abs().item() < 1e-6  # of the same classes, whatever the temperature
        True
    """
    target = log_softmax(teacher.detach() / temperature, dim=1)
    guess = log_softmax(student / temperature, dim=1)
    return kl_div(guess, target, reduction="batchmean", log_target=True) * temperature**2
