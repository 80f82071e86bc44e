"""Losses that pull embeddings of one thing together and push those of others apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fluxloop.compute.precision import in_full_precision


@in_full_precision
def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5, *, own: slice | None = None) -> Tensor:
    """Compare two views of each row against all other rows of both: SimCLR's loss.

    The normalised temperature-scaled cross entropy of Chen et al. (2020), averaged over the 2N
    embeddings: each is to find its row's other view among the 2N - 1 others by cosine similarity.

    Args:
        z1: Embeddings of the first view, shape (N, D); need not be normalised.
        z2: Those of the second view, row by row, shape (N, D).
        temperature: Divides the similarities.
        own: The rows whose embeddings are compared with all, such as those of one process among several;
            left out, all are.

    Returns:
        A scalar, a mean over the rows that are compared.

    Example:
        >>> views = torch.eye(8)
        >>> (nt_xent(views, views) < nt_xent(views, views.roll(1, 0))).item()  # the less, the more views agree
        True
    """
    z = normalize(torch.cat([z1, z2]), dim=1)
    rows = torch.arange(len(z), device=z.device)
    if own is None:
        similarities = z @ z.T / temperature
        similarities.fill_diagonal_(float("-inf"))
        return cross_entropy(similarities, rows.roll(len(z1)))
    chosen = torch.cat([rows[: len(z1)][own], rows[len(z1) :][own]])
    similarities = z[chosen] @ z.T / temperature
    similarities = similarities.masked_fill(chosen[:, None] == rows, float("-inf"))
    return cross_entropy(similarities, rows.roll(len(z1))[chosen])


@in_full_precision
def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float = 0.07) -> Tensor:
    """Have each query find its key among negatives: MoCo's loss (He et al., 2020).

    Args:
        queries: Shape (N, D), normalised.
        keys: One per query, shape (N, D), normalised.
        negatives: Shape (K, D), normalised.
        temperature: Divides the similarities.

    Returns:
        A scalar.

    Example:
        >>> queries, others = torch.eye(4)[:2], torch.eye(4)[2:]
        >>> (info_nce(queries, queries, others) < info_nce(queries, -queries, others)).item()
        True
    """
    positive = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([positive, queries @ negatives.T], dim=1) / temperature
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


@in_full_precision
def batch_nce(queries: Tensor, keys: Tensor, temperature: float = 0.2, *, own: slice | None = None) -> Tensor:
    """Have each query find its key among those of the batch: the loss of MoCo v3 and NNCLR (Chen et al., 2021).

    MoCo v3 multiplies it by twice the temperature.

    Args:
        queries: Shape (N, D); need not be normalised.
        keys: Shape (M, D), row by row those of the queries and perhaps others.
        temperature: Divides the cosine similarities.
        own: Which of the keys are those of the queries, such as one process's among several; left out, the first N.

    Returns:
        A scalar, a mean over queries.

    Example:
        >>> keys = torch.eye(4)
        >>> (batch_nce(keys, keys) < batch_nce(keys, keys.roll(1, 0))).item()
        True
    """
    logits = normalize(queries, dim=1) @ normalize(keys, dim=1).T / temperature
    rows = torch.arange(len(keys), device=keys.device)
    return cross_entropy(logits, rows[slice(len(queries)) if own is None else own])


@in_full_precision
def dcl_loss(
    z1: Tensor, z2: Tensor, temperature: float = 0.1, sigma: float | None = None, *, own: slice | None = None
) -> Tensor:
    """Compare two views of each row with other rows alone: decoupled contrastive learning (Yeh et al., 2022).

    As `nt_xent`, but the row's other view is not among those that it is compared with (the paper's equation 6).

    Args:
        z1: Embeddings of the first view, shape (N, D); need not be normalised.
        z2: Those of the second view, row by row, shape (N, D).
        temperature: Divides the similarities.
        sigma: Of the weights of the paper's DCLW: a row weighs ``2 - N * softmax(cosine / sigma)``, so that rows whose
            views are far apart weigh more; left out, all weigh 1.
        own: The rows that are compared with all, as in `nt_xent`; left out, all are.

    Returns:
        A scalar, a mean over the rows that are compared and both views.

    Raises:
        ValueError: There is one row alone.

    Example:
        >>> views = torch.eye(8)
        >>> round(dcl_loss(views, views).item(), 3)  # minus 1 / 0.1, plus the logarithm of 14 others
        -7.361

    Example:
        >>> z = torch.eye(4)
        >>> (dcl_loss(z, z) < dcl_loss(z, z.roll(1, 0))).item()
        True
    """
    if len(z1) < 2:
        raise ValueError("dcl_loss was given one row, which has no others; expected two or more: drop_last=True")
    z1, z2 = normalize(z1, dim=1), normalize(z2, dim=1)
    rows = torch.arange(len(z1), device=z1.device)[slice(None) if own is None else own]
    itself = rows[:, None] == torch.arange(len(z1), device=z1.device)
    cosines = (z1 * z2).sum(1)
    positive = cosines / temperature
    if sigma is not None:
        positive = positive * (2 - len(z1) * (cosines.detach() / sigma).softmax(0))
    total = -positive[rows].mean()
    for a, b in ((z1, z2), (z2, z1)):
        similarities = a[rows] @ torch.cat([a, b]).T / temperature
        others = similarities.masked_fill(torch.cat([itself, itself], dim=1), float("-inf"))
        total = total + others.logsumexp(1).mean() / 2
    return total


@in_full_precision
def supervised_contrastive(embeddings: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Pull together the embeddings of one class (Khosla et al., 2020, the loss "out").

    For each row, the log-probabilities of the other rows of its class among all other rows are
    averaged; rows that are alone in their class are left out of the mean.

    Args:
        embeddings: Shape (N, D); need not be normalised. Two views are 2N rows.
        labels: Classes, shape (N,).
        temperature: Divides the similarities.

    Returns:
        A scalar; 0 where every row is alone in its class.

    Example:
        >>> embeddings = torch.eye(2).repeat(2, 1)
        >>> right, wrong = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
        >>> (supervised_contrastive(embeddings, right) < supervised_contrastive(embeddings, wrong)).item()
        True
    """
    z = normalize(embeddings, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarities = (z @ z.T / temperature).masked_fill(itself, float("-inf"))
    log_probabilities = similarities.log_softmax(1).masked_fill(itself, 0.0)
    positive = (labels[:, None] == labels) & ~itself
    count = positive.sum(1)
    of_rows = -(log_probabilities * positive).sum(1) / count.clamp(min=1)
    return of_rows.sum() / (count > 0).sum().clamp(min=1)
