"""VICRegL; recorded values are those of lightly 1.6.0 in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxloop.losses import vicregl_loss
from toys import assert_recorded, assert_same_with_gradients, doubles, waves

GRIDS = [waves(0.21, 4, 9, 2), waves(0.22, 4, 9, 2)]


@pytest.mark.parametrize(
    ("matches", "value", "norms"),
    [  # VICRegLLoss(num_matches=matches), two global views, alpha .75
        ((9, 9), 42.7047510955, [8.18298710162, 0.850821140545, 7.38517404225, 0.904101573729]),
        ((4, 2), 42.1592330996, [8.18298710162, 1.33816136862, 7.38517404225, 1.40500446606]),
    ],
)
def test_vicregl_is_what_lightly_recorded(matches: tuple[int, int], value: float, norms: list[float]) -> None:
    whole, maps = (waves(0.3, 4, 6), waves(0.7, 4, 6)), (waves(0.31, 4, 9, 6), waves(0.71, 4, 9, 6))
    assert_recorded(
        lambda z1, m1, z2, m2: vicregl_loss([z1, z2], [m1, m2], GRIDS, matches=matches),
        value,
        norms,
        *(whole[0], maps[0], whole[1], maps[1]),
    )


def spread(z: Tensor) -> Tensor:
    hinge = (1 - (z.var(0) + 1e-4).sqrt()).clamp(min=0).mean()
    c = torch.cov(z.T)
    return 25 * hinge + (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]


def matched(a: Tensor, b: Tensor, places_a: Tensor, places_b: Tensor, count: int) -> Tensor:
    """Match row by row in a loop, and compare the matches of each rank."""
    chosen: list[list[tuple[Tensor, Tensor]]] = []
    for row in range(len(a)):
        pairs = []
        for i in range(a.shape[1]):
            distances = [(places_a[row, i] - places_b[row, j]).norm().item() for j in range(b.shape[1])]
            j = min(range(b.shape[1]), key=distances.__getitem__)
            pairs.append((distances[j], i, j))
        chosen.append([(a[row, i], b[row, j]) for _, i, j in sorted(pairs)[:count]])
    firsts, seconds = (torch.stack([torch.stack([pair[k] for pair in row]) for row in chosen]) for k in (0, 1))
    spreads = [(spread(firsts[:, m]) + spread(seconds[:, m])) / 2 for m in range(firsts.shape[1])]
    return 25 * (firsts - seconds).square().mean() + torch.stack(spreads).mean()


def vicregl_by_loops(z1: Tensor, z2: Tensor, z3: Tensor, m1: Tensor, m2: Tensor, m3: Tensor) -> Tensor:
    grids = [waves(0.21, 4, 9, 2), waves(0.22, 4, 9, 2), waves(0.23, 4, 4, 2)]
    z, maps, pairs = [z1, z2, z3], [m1, m2, m3], [(0, 1), (0, 2), (1, 0), (1, 2)]
    whole = torch.stack([25 * (z[i] - z[j]).square().mean() for i, j in pairs]).mean()
    whole = whole + torch.stack([spread(each) for each in z]).mean()
    terms = []
    for i, j in pairs:
        for places in (maps, grids):
            there = matched(maps[i], maps[j], places[i], places[j], 5)
            terms.append((there + matched(maps[j], maps[i], places[j], places[i], 2)) / 2)
    return 0.6 * whole + 0.4 * torch.stack(terms).sum() / 4


def test_vicregl_with_a_smaller_view_equals_its_matches_and_terms_written_in_loops() -> None:
    inputs = [doubles(seed, 4, 5) for seed in range(3)] + [
        doubles(seed, 4, n, 5) for seed, n in ((3, 9), (4, 9), (5, 4))
    ]
    grids = [*GRIDS, waves(0.23, 4, 4, 2)]
    assert_same_with_gradients(
        lambda *given: vicregl_loss(list(given[:3]), list(given[3:]), grids, share=0.6, matches=(5, 2)),
        vicregl_by_loops,
        *inputs,
    )


def test_views_without_a_map_or_one_row_alone_are_refused() -> None:
    z, m, g = torch.zeros(2, 3), torch.zeros(2, 4, 3), torch.zeros(2, 4, 2)
    for whole, maps in (([z, z], [m]), ([z], [m]), ([z[:1], z[:1]], [m, m])):
        with pytest.raises(ValueError, match="expected two or more views"):
            vicregl_loss(whole, maps, [g] * len(maps))
