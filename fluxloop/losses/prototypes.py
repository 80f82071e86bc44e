"""Losses of codes: the soft assignments of rows to prototypes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from fluxloop.compute.precision import in_full_precision
from fluxloop.processes.gather import gather_equal, sum_over
from fluxloop.processes.group import Group


@in_full_precision
def sinkhorn(
    scores: Tensor,
    epsilon: float = 0.05,
    iterations: int = 3,
    *,
    mask: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    """Assign rows to prototypes so that all prototypes are used alike: Sinkhorn's and Knopp's algorithm.

    Begins with ``exp(scores / epsilon)``, and divides in turns by the sums over rows and by the sums over prototypes
    (SwAV, Caron et al., 2020, after Cuturi, 2013). It computes with logarithms, so scores may be large.

    Args:
        scores: Of each row with each prototype, shape (N, K); no gradient goes there.
        epsilon: Divides the scores: the smaller, the harder the codes. DINOv2 gives the teacher's temperature.
        iterations: How often; 0 leaves a softmax.
        mask: True for the rows that count, shape (N,), such as hidden patches; left out, all do.
        group: The processes whose rows are assigned together; left out, this one's alone.

    Returns:
        Codes, shape (N, K): each row sums to 1, each column to about N / K.

    Example:
        >>> codes = sinkhorn(torch.tensor([[2.0, 1.0], [3.0, 1.0]]))  # the first prototype is nearer to both
        >>> codes.argmax(1)  # but each row has one of its own
        tensor([1, 0])

    Example:
        >>> sinkhorn(torch.zeros(4, 2))[0]
        tensor([0.5000, 0.5000])
    """
    logs = scores.detach() / epsilon
    for _ in range(iterations):
        counted = logs if mask is None else logs.masked_fill(~mask.bool()[:, None], float("-inf"))
        columns = counted.logsumexp(0, keepdim=True)
        if group is not None:
            if group.spare:
                columns = torch.full_like(columns, float("-inf"))
            columns = gather_equal(columns, group).logsumexp(0, keepdim=True)
        logs = logs - columns.masked_fill(columns.isneginf(), 0.0)  # where no row counts
        logs = logs - logs.logsumexp(1, keepdim=True)
    return logs.softmax(1)


@in_full_precision
def swav_loss(scores: list[Tensor], codes: list[Tensor], temperature: float = 0.1) -> Tensor:
    """Predict from each crop the codes of the other ones (SwAV, Caron et al., 2020; DINOv2's loss of crops too).

    The cross entropy, averaged over the pairs of a code and another crop, and over rows.

    Args:
        scores: Of all crops, those with codes first, each of shape (N, K).
        codes: Each of shape (N, K), such as `sinkhorn` returns; no gradient goes there.
        temperature: Divides the scores.

    Returns:
        A scalar.

    Raises:
        ValueError: There is no pair: one crop alone.

    Example:
        >>> scores = [torch.eye(4) for _ in range(3)]
        >>> codes = [sinkhorn(each) for each in scores[:2]]
        >>> (swav_loss(scores, codes) < swav_loss([each.roll(1, 0) for each in scores], codes)).item()
        True

    Example:
        >>> scores = torch.eye(4)
        >>> codes = sinkhorn(scores)
        >>> (swav_loss([scores, scores], [codes]) < swav_loss([scores, scores.roll(1, 0)], [codes])).item()
        True
    """
    guesses = [log_softmax(each / temperature, dim=1) for each in scores]
    terms = [
        -(code.detach() * guess).sum(1).mean()
        for i, code in enumerate(codes)
        for j, guess in enumerate(guesses)
        if i != j
    ]
    if not terms:
        raise ValueError(
            f"swav_loss was given {len(scores)} crops and {len(codes)} codes, which make no pair; expected two or more"
        )
    return torch.stack(terms).mean()


@in_full_precision
def masked_code_loss(scores: Tensor, codes: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """Predict the codes of hidden patches: the loss of iBOT and DINOv2 on patches.

    The cross entropy, a mean over each image's hidden patches, then over images; one without hidden patches counts
    as 0, as in the authors' code.

    Args:
        scores: The student's, shape (N, L, K); or those of hidden patches alone, (P, K), in the order of
            ``scores[mask]``, which saves memory where K is large.
        codes: The teacher's, of the same shape; no gradient goes there.
        mask: True (or 1) where a patch was hidden, shape (N, L), P of them.
        temperature: Divides the scores.

    Returns:
        A scalar.

    Raises:
        ValueError: The shapes do not fit each other.

    Example:
        >>> codes = torch.eye(4).expand(2, 4, 4)  # two images of four patches
        >>> mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
        >>> whole, hidden = masked_code_loss(codes, codes, mask), masked_code_loss(codes[mask], codes[mask], mask)
        >>> torch.equal(whole, hidden)
        True

    Example:
        >>> scores, mask = torch.eye(4)[None], torch.tensor([[True, True, False, False]])
        >>> (masked_code_loss(scores, scores, mask) < masked_code_loss(scores.roll(1, 1), scores, mask)).item()
        True
    """
    hidden = mask.to(scores.dtype)
    weight = hidden / hidden.sum(1, keepdim=True).clamp(min=1) / len(mask)
    if scores.ndim == 2:
        weight = weight[mask.bool()]
    if scores.shape != codes.shape or scores.shape[:-1] != weight.shape:
        raise ValueError(
            f"masked_code_loss was given scores of shape {tuple(scores.shape)}, codes of {tuple(codes.shape)} and a "
            f"mask of {tuple(mask.shape)} with {int(mask.sum())} hidden patches; expected scores and codes of one "
            "shape, for all patches (N, L, K), or for the hidden ones (P, K)"
        )
    return -((codes.detach() * log_softmax(scores / temperature, dim=-1)).sum(-1) * weight).sum()


@in_full_precision
def ibot_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    center: Tensor | float = 0.0,
    student_temperature: float = 0.1,
    teacher_temperature: float | Tensor = 0.04,
) -> Tensor:
    """Predict what the teacher, who sees all, says of hidden patches (iBOT, Zhou et al., 2021).

    `masked_code_loss` with codes as DINO's: the teacher's scores are centred and sharpened.

    Args:
        student: Scores, shape (N, L, K), or of hidden patches alone, (P, K).
        teacher: Scores, of the same shape; no gradient goes there.
        mask: True (or 1) where a patch was hidden, shape (N, L).
        center: Subtracted from the teacher's scores, shape (K,) or (1, K); another one than that of the class token.
        student_temperature: Divides the student's scores.
        teacher_temperature: Divides the teacher's, after centring.

    Returns:
        A scalar.

    Raises:
        ValueError: The shapes do not fit each other.

    Example:
        >>> scores, mask = torch.eye(4).expand(2, 4, 4), torch.ones(2, 4)
        >>> (ibot_loss(scores, scores, mask) < ibot_loss(scores.roll(1, 1), scores, mask)).item()
        True

    Example:
        >>> scores, mask = torch.eye(4)[None], torch.tensor([[True, True, False, False]])
        >>> (ibot_loss(scores, scores, mask) < ibot_loss(scores.roll(1, 1), scores, mask)).item()
        True
    """
    codes = ((teacher.detach() - center) / teacher_temperature).softmax(-1)
    return masked_code_loss(student, codes, mask, student_temperature)


@in_full_precision
def msn_loss(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    temperature: float = 0.1,
    sharpening: float = 0.25,
    iterations: int = 3,
    weight: float = 1.0,
    *,
    group: Group | None = None,
) -> Tensor:
    """Have masked views be near to the prototypes of the whole image: MSN (Assran et al., 2022).

    The cross entropy of each anchor's assignment with its target's, a mean over anchors, plus `weight` times what the
    entropy of the anchors' mean assignment lacks to its largest value, log K. Assignments are softmaxes of cosines.
    The target's is sharpened, then balanced by `sinkhorn`; no gradient goes there, to the prototypes neither.

    Args:
        anchors: Embeddings of V masked views, one after the other, shape (V * N, D).
        targets: Embeddings of the target view, shape (N, D).
        prototypes: Shape (K, D), trained with the network.
        temperature: Divides the cosines.
        sharpening: To the power of one by which the target's assignment is taken, from 0 to 1.
        iterations: Of `sinkhorn`; 0 leaves it out.
        weight: Of the entropy; the paper's λ.
        group: The processes whose rows are looked at together; left out, this one alone.

    Returns:
        A scalar.

    Raises:
        ValueError: There is another number of anchors than some for each target.

    Example:
        >>> targets, prototypes = torch.eye(4), torch.eye(4)
        >>> anchors = targets.repeat(2, 1)  # two masked views
        >>> (msn_loss(anchors, targets, prototypes) < msn_loss(anchors.roll(1, 0), targets, prototypes)).item()
        True

    Example:
        >>> z = torch.eye(4)
        >>> (msn_loss(z, z, prototypes=z) < msn_loss(z.roll(1, 0), z, prototypes=z)).item()
        True
    """
    if not len(targets) or len(anchors) % len(targets):
        raise ValueError(
            f"msn_loss was given {len(anchors)} anchors and {len(targets)} targets; expected as many anchors for each "
            "target: those of one view after those of another"
        )
    prototypes = normalize(prototypes, dim=1)
    logs = log_softmax(normalize(anchors, dim=1) @ prototypes.T / temperature, dim=1)
    with torch.no_grad():
        scores = normalize(targets, dim=1) @ prototypes.T / (temperature * sharpening)
        codes = sinkhorn(scores.log_softmax(1), 1.0, iterations, group=group)
    loss = -(codes.repeat(len(anchors) // len(targets), 1) * logs).sum(1).mean()
    if not weight:
        return loss
    mean = logs.exp().mean(0)
    if group is not None:
        sums = sum_over(torch.cat([logs.exp().sum(0), logs.new_full((1,), len(logs))]), group)
        mean = sums[:-1] / sums[-1]
    lack: Tensor = math.log(len(prototypes)) - torch.special.entr(mean).sum()
    return loss + weight * lack
