from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import functional as reference

from fluxloop import Learner, MetricError, Metrics, Recorder, mae, mse, rmse
from fluxloop.testing import Coefficient

quick = settings(deadline=None, max_examples=40)


def pair(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


@quick
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 4))
def test_errors_equal_their_formulas_and_torchmetrics(seed: int, rows: int, width: int) -> None:
    preds, ys = pair(seed, rows, width)
    difference = preds.double() - ys.double()
    absolute, squared = difference.abs().mean().item(), (difference**2).mean().item()
    assert mae(preds, ys).item() == pytest.approx(absolute, rel=1e-5)
    assert mse(preds, ys).item() == pytest.approx(squared, rel=1e-5)
    assert rmse(preds, ys).item() == pytest.approx(squared**0.5, rel=1e-5)
    flat = preds.flatten(), ys.flatten()
    assert mae(preds, ys).item() == pytest.approx(reference.mean_absolute_error(*flat).item(), rel=1e-5)
    assert mse(preds, ys).item() == pytest.approx(reference.mean_squared_error(*flat).item(), rel=1e-5)
    assert rmse(preds, ys).item() == pytest.approx(reference.mean_squared_error(*flat, squared=False).item(), rel=1e-5)


@pytest.mark.parametrize("metric", [mae, mse, rmse], ids=["mae", "mse", "rmse"])
@pytest.mark.parametrize("shapes", [((4,), (4, 1)), ((4, 1), (4,)), ((3,), (1,)), ((2, 3), (3, 2))], ids=str)
def test_shapes_that_would_broadcast_are_refused(metric: Any, shapes: tuple[Any, Any]) -> None:
    with pytest.raises(MetricError, match=r"preds of shape.*ys of shape.*ys\.reshape\(preds\.shape\)") as caught:
        metric(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
    assert str(shapes[0]) in str(caught.value)
    assert str(shapes[1]) in str(caught.value)


def epoch_values(rows: int, batch_size: int, *metrics: Any) -> tuple[dict[str, float], Tensor]:
    generator = torch.Generator().manual_seed(rows)
    xs = torch.rand(rows, 1, generator=generator)
    ys = xs**3 * 10
    learner = Learner(
        Coefficient(1.5),
        nn.functional.mse_loss,
        seed=0,
        default_callbacks=False,
        callbacks=[Recorder(), Metrics(*metrics)],
    )
    batches = list(zip(xs.split(batch_size), ys.split(batch_size), strict=True))
    return learner.evaluate(batches), 1.5 * xs.double() - ys.double()


@pytest.mark.slow
@quick
@given(st.integers(1, 40), st.integers(1, 15))
def test_over_an_epoch_the_errors_are_those_of_all_rows_at_once(rows: int, batch_size: int) -> None:
    values, difference = epoch_values(rows, batch_size, mae, mse, rmse)
    assert values == {
        "loss": pytest.approx((difference**2).mean().item(), rel=1e-6),
        "mae": pytest.approx(difference.abs().mean().item(), rel=1e-6),
        "mse": pytest.approx((difference**2).mean().item(), rel=1e-6),
        "rmse": pytest.approx((difference**2).mean().sqrt().item(), rel=1e-6),
    }


def test_rmse_is_no_mean_of_roots() -> None:
    values, difference = epoch_values(10, 4, rmse)
    roots = torch.stack([(part**2).mean().sqrt() for part in difference.split(4)])
    assert values["rmse"] == pytest.approx((difference**2).mean().sqrt().item(), rel=1e-6)
    assert values["rmse"] != pytest.approx(roots.mean().item(), rel=1e-3)
