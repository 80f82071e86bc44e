from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn.functional import cross_entropy, l1_loss, nll_loss, one_hot

from fluxloop import (
    EMA,
    BackwardBegin,
    Callback,
    CancelStepException,
    DataError,
    Learner,
    LossBegin,
    LossError,
    Metrics,
    PerOptimizerPhase,
    Recorder,
    StepBegin,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    accuracy,
    on,
    runstep,
    stream_seed,
)
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.mixup import CutMix, Mixing, MixUp
from fluxloop.losses.mixed import MixedLoss, MixedTargets
from fluxloop.testing import assert_same_bits

SEED, BATCH, BATCHES, CLASSES = 3, 6, 4, 3
sgd = partial(torch.optim.SGD, lr=0.1)


def rows(*shape: int) -> Tensor:
    return torch.randn(BATCH * BATCHES, *shape, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(BATCH * BATCHES) % CLASSES


def net(inputs: int = 5, outputs: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


def learner_of(
    *callbacks: Callback, xs: Any = None, ys: Any = None, loss: Any = cross_entropy, model: Any = None, **options: Any
) -> Learner:
    xs, ys = rows(5) if xs is None else xs, LABELS if ys is None else ys
    batches = TensorBatches(xs, ys, batch_size=BATCH)
    return Learner(
        net() if model is None else model,
        loss,
        data=(batches, batches),
        callbacks=callbacks,
        seed=SEED,
        **{"optimizer": sgd, "default_callbacks": False, **options},
    )


def drawn(step: int, alpha: float = 0.4, name: str = "MixUp") -> tuple[Tensor, Tensor]:
    """Give the shares and the order of a step, as documented."""
    torch.manual_seed(stream_seed(SEED, f"callback/{name}", step))
    share = Beta(alpha, alpha).sample((BATCH,))
    return torch.maximum(share, 1 - share), torch.randperm(BATCH)


def steps(epochs: int, xs: Tensor, ys: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for step in range(epochs * BATCHES):
        at = slice(step % BATCHES * BATCH, (step % BATCHES + 1) * BATCH)
        yield step, xs[at], ys[at]


class Seen(Callback):
    """Keeps what the step holds when its loss is about to be computed, and after."""

    reads = ("step",)

    def __init__(self) -> None:
        self.xs: list[Tensor] = []
        self.targets: list[Any] = []

    @on(BackwardBegin)
    def look(self, event: BackwardBegin, phase: Any, learner: Any) -> None:
        self.xs.append(learner.step.xs)
        self.targets.append(learner.step.ys)


# Against a hand-written loop


def test_the_training_is_that_of_a_hand_written_loop_with_a_share_per_row() -> None:
    model, xs = net(), rows(5)
    optimizer = sgd(model.parameters())
    for step, x, y in steps(3, xs, LABELS):
        share, other = drawn(step)
        w = share.view(-1, 1)
        soft = one_hot(y, CLASSES).float()
        optimizer.zero_grad()
        cross_entropy(model(torch.lerp(x[other], x, w)), torch.lerp(soft[other], soft, w)).backward()
        optimizer.step()
    learner = learner_of(MixUp())
    learner.fit(3)
    assert torch.equal(learner.model[1].weight, model[1].weight)
    assert torch.equal(learner.model[1].bias, model[1].bias)


@pytest.mark.parametrize("loss", [nn.NLLLoss(), nn.NLLLoss(reduction="sum"), nll_loss])
def test_a_mixed_loss_blends_the_losses_of_each_row(loss: Any) -> None:
    def model() -> nn.Module:
        return nn.Sequential(*net(), nn.LogSoftmax(1))

    by_hand = model()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.01)
    total = "sum" if getattr(loss, "reduction", "mean") == "sum" else "mean"
    for step, x, y in steps(2, rows(5), LABELS):
        share, other = drawn(step)
        preds = by_hand(torch.lerp(x[other], x, share.view(-1, 1)))
        losses = share * nll_loss(preds, y, reduction="none") + (1 - share) * nll_loss(
            preds, y[other], reduction="none"
        )
        optimizer.zero_grad()
        getattr(losses, total)().backward()
        optimizer.step()
    learner = learner_of(MixUp(), model=model(), loss=MixedLoss(loss), optimizer=partial(torch.optim.SGD, lr=0.01))
    learner.fit(2)
    assert torch.equal(learner.model[1].weight, by_hand[1].weight)


def test_probabilities_and_blended_losses_of_cross_entropy_are_the_same_training() -> None:
    first, second = learner_of(MixUp()), learner_of(MixUp(), loss=MixedLoss(nn.CrossEntropyLoss()))
    first.fit(2)
    second.fit(2)
    torch.testing.assert_close(first.model[1].weight, second.model[1].weight)


@pytest.mark.parametrize("shape", [(5,), (5, 2), (3, 4, 4), (2, 3, 2, 2)], ids=["1-D", "2-D", "3-D", "4-D"])
def test_inputs_of_any_number_of_dimensions_are_mixed_row_by_row(shape: tuple[int, ...]) -> None:
    xs, seen = rows(*shape), Seen()
    learner = learner_of(MixUp(1.0), seen, xs=xs, model=net(xs[0].numel()))
    learner.epoch(TrainingPhase())
    for step, x, y in steps(1, xs, LABELS):
        share, other = drawn(step, 1.0)
        for row in range(BATCH):
            w = share[row]
            mixed = w * x[row] + (1 - w) * x[other[row]]
            torch.testing.assert_close(seen.xs[step][row], mixed)
            soft = w * one_hot(y[row], CLASSES) + (1 - w) * one_hot(y[other[row]], CLASSES)
            torch.testing.assert_close(seen.targets[step][row], soft)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.floats(0.05, 3))
def test_mixing_identical_rows_is_the_identity(number: int, alpha: float) -> None:
    xs = torch.randn(1, 3).expand(number, 3).contiguous()
    mixed, order, share = MixUp(alpha).mix(xs)
    assert torch.equal(mixed, xs)
    assert sorted(order.tolist()) == list(range(number))
    assert ((share >= 0.5) & (share <= 1)).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_a_row_stays_between_itself_and_the_other(seed: int) -> None:
    torch.manual_seed(seed)
    xs = torch.rand(7, 2, 3)
    mixed, order, share = MixUp().mix(xs)
    w = share.view(-1, 1, 1)
    torch.testing.assert_close(mixed, w * xs + (1 - w) * xs[order])


def test_several_inputs_are_mixed_alike() -> None:
    xs = {"image": torch.rand(6, 2, 2), "numbers": (torch.rand(6, 3), torch.rand(6).double())}
    mixed, order, share = MixUp().mix(xs)
    for before, after in ((xs["image"], mixed["image"]), (xs["numbers"][1], mixed["numbers"][1])):
        w = share.to(before.dtype).view(-1, *[1] * (before.ndim - 1))
        torch.testing.assert_close(after, w * before + (1 - w) * before[order])


def test_numbers_to_predict_are_mixed_as_the_inputs_are() -> None:
    xs, seen = rows(5), Seen()
    ys = 2 * xs[:, :2] + 1
    learner = learner_of(MixUp(), seen, xs=xs, ys=ys, model=net(5, 2), loss=l1_loss)
    learner.epoch(TrainingPhase())
    for mixed, targets in zip(seen.xs, seen.targets, strict=True):
        torch.testing.assert_close(targets, 2 * mixed[:, :2] + 1)
    assert torch.equal(learner.step.ys, seen.targets[-1])


def test_classes_per_place_are_mixed_too() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, CLASSES, 1)

        def forward(self, xs: Tensor) -> Tensor:
            return self.conv(xs)

    ys = torch.randint(CLASSES, (BATCH * BATCHES, 4))
    seen = Seen()
    learner = learner_of(MixUp(), Metrics(accuracy), Recorder(), seen, xs=rows(2, 4), ys=ys, model=Wide())
    learner.fit(1)
    share, other = drawn(0)
    soft = one_hot(ys[:BATCH], CLASSES).float().movedim(-1, 1)
    assert torch.equal(seen.targets[0], torch.lerp(soft[other], soft, share.view(-1, 1, 1)))


# Validation, metrics, the loop


@pytest.mark.parametrize("loss", [cross_entropy, nn.CrossEntropyLoss(), MixedLoss(nn.CrossEntropyLoss())])
def test_validation_is_not_touched_whatever_the_loss(loss: Any) -> None:
    learner = learner_of(MixUp(), Metrics(accuracy), Recorder(), loss=loss)
    learner.fit(2)
    with torch.no_grad():
        preds = learner.model(rows(5))
        assert learner.history["validation/loss"][-1] == pytest.approx(cross_entropy(preds, LABELS).item())
    assert learner.history["validation/accuracy"][-1] == pytest.approx(accuracy(preds, LABELS).item())
    assert torch.equal(learner.step.ys, LABELS[-BATCH:])
    assert learner.evaluate()["accuracy"] == learner.history["validation/accuracy"][-1]


@pytest.mark.parametrize("loss", [cross_entropy, MixedLoss(cross_entropy)], ids=["soft", "blended"])
@pytest.mark.parametrize("mixing", [MixUp(), MixUp(num_classes=CLASSES), MixUp(1.0)], ids=repr)
def test_metrics_see_the_classes_with_the_larger_share(loss: Any, mixing: MixUp) -> None:
    class Classes:
        """As torchmetrics: takes classes alone."""

        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def update(self, preds: Tensor, ys: Tensor) -> None:
            assert ys.dtype == torch.int64
            self.seen.append(ys)

        def compute(self) -> Tensor:
            return torch.equal(torch.cat(self.seen), LABELS)

        def reset(self) -> None:
            self.seen = []

    learner = learner_of(mixing, Metrics(accuracy, Classes()), Recorder(), loss=loss)
    learner.fit(1)
    assert learner.history["training/classes"] == [True]
    assert torch.equal(learner.step.ys, LABELS[-BATCH:])


def test_without_it_the_training_draws_the_same_numbers() -> None:
    def noisy() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))

    class Nothing(MixUp):
        def mix(self, xs: Any) -> tuple[Any, Tensor, Tensor]:
            _, order, share = super().mix(xs)
            return xs, order, torch.ones_like(share)

    mixed, plain = learner_of(Nothing(), model=noisy()), learner_of(model=noisy())
    mixed.fit(2)
    plain.fit(2)
    torch.testing.assert_close(mixed.model[0].weight, plain.model[0].weight)


def test_the_same_seed_gives_the_same_training_and_another_name_another() -> None:
    first, again, other = learner_of(MixUp()), learner_of(MixUp()), learner_of(MixUp(name="b"))
    for learner in (first, again, other):
        learner.fit(2)
    assert_same_bits(first, again)
    assert not torch.equal(first.model[1].weight, other.model[1].weight)


def test_it_begins_anew_in_a_second_learner_and_goes_on_in_a_second_fit() -> None:
    mixing = MixUp()
    for _ in range(2):
        learner = learner_of(mixing)
        learner.fit(1)
        learner.fit(1)
        whole = learner_of(MixUp())
        whole.fit(2)
        assert_same_bits(learner, whole)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 5, 6])
def test_a_resumed_run_mixes_as_the_one_that_was_never_killed(steps: int, tmp_path: Path) -> None:
    class Kill(Callback):
        reads = ("cbstate.history",)

        @on(StepBegin, TrainingPhase)
        def kill(self, event: StepBegin, phase: Any, learner: Any) -> None:
            if learner.cbstate.history[phase].steps == steps:
                raise OSError("killed")

    whole, killed, resumed = (
        learner_of(MixUp(), CutMix(), Recorder(), *more)
        for more in ([], [Checkpointer(tmp_path, unit="step"), Kill()], [Checkpointer(tmp_path, unit="step")])
    )
    whole.fit(3)
    with pytest.raises(OSError, match="killed"):
        killed.fit(3)
    resumed.fit(3, resume=tmp_path)
    assert_same_bits(resumed, whole)


def test_after_a_cancelled_step_the_next_is_mixed_anew() -> None:
    class Skip(Callback):
        reads = ("step.preds",)
        count = 0

        @on(LossBegin, TrainingPhase)
        def skip(self, event: LossBegin, phase: Any, learner: Any) -> None:
            self.count += 1
            if self.count == 2:
                raise CancelStepException("enough")

    learner = learner_of(MixUp(), Skip(), Recorder())
    learner.fit(1)
    assert learner.history[TrainingPhase].steps == 2 * BATCHES // 2 - 1
    assert torch.equal(learner.step.ys, LABELS[-BATCH:])


def test_each_optimizers_loss_sees_the_same_mixture() -> None:
    class Two(PerOptimizerPhase):
        def loss(self, learner: Any, state: Any, name: str | None) -> Tensor:
            seen.append(state.ys)
            return cross_entropy(state.preds, state.ys)

    seen: list[Tensor] = []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, CLASSES))
    learner = learner_of(MixUp(), model=model, optimizer={"0": sgd, "1": sgd})
    learner.fit(1, phases=[Two()])
    assert len(seen) == 2 * BATCHES
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert all(ys.shape == (BATCH, CLASSES) for ys in seen)


class Own(TrainingPhase):
    """A step of one's own, which fires no LossBegin."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            with learner.optimizing() as block:
                block.loss = cross_entropy(learner.model(state.xs), state.ys)


def test_a_step_that_fires_no_loss_begin_needs_the_number_of_classes() -> None:
    with pytest.raises(LossError, match=r"Own fires no LossBegin, .* MixUp\(0.4, num_classes=10\)"):
        learner_of(MixUp()).fit(1, phases=[Own()])
    learner, plain = learner_of(MixUp(num_classes=CLASSES)), learner_of(MixUp())
    learner.fit(2, phases=[Own()])
    plain.fit(2, phases=[TrainingPhase()])
    assert_same_bits(learner, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [None, CLASSES])
def test_the_probabilities_have_the_type_of_the_predictions(dtype: torch.dtype, num_classes: int | None) -> None:
    learner = learner_of(MixUp(num_classes=num_classes), xs=rows(5).to(dtype), model=net().to(dtype))
    learner.fit(1)
    assert learner.model[1].weight.dtype == dtype
    assert learner.model[1].weight.isfinite().all()


# CutMix


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 3))
def test_cutmix_fills_one_box_per_image_from_another_and_tells_its_area(
    seed: int, height: int, width: int, alpha: float
) -> None:
    torch.manual_seed(seed)
    number = 6
    xs = torch.arange(number).float().view(-1, 1, 1, 1).expand(number, 2, height, width).contiguous()
    mixed, order, share = CutMix(alpha).mix(xs)
    for row in range(number):
        inside = torch.zeros(height, width, dtype=torch.bool)
        foreign = mixed[row, 0] != row
        assert torch.equal(mixed[row, 0], mixed[row, 1])
        if order[row] == row:
            assert not foreign.any()
            continue
        assert set(mixed[row][:, foreign].unique().tolist()) <= {float(order[row])}
        if foreign.any():
            at = foreign.nonzero()
            (top, left), (bottom, right) = at.min(0).values, at.max(0).values
            inside[top : bottom + 1, left : right + 1] = True
        assert torch.equal(foreign, inside)  # a box
        assert share[row].item() == pytest.approx(1 - inside.float().mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    "shape", [(12,), (2, 12), (2, 3, 4), (2, 4, 3, 4)], ids=["rows", "sequences", "images", "volumes"]
)
def test_cutmix_cuts_intervals_areas_and_volumes(shape: tuple[int, ...]) -> None:
    xs = torch.arange(40).float().view(-1, *[1] * len(shape)).expand(40, *shape).contiguous()
    mixed, order, share = CutMix().mix(xs)
    own = (mixed == xs).flatten(1).float().mean(1)
    moved = order != torch.arange(40)
    torch.testing.assert_close(share[moved], own[moved])
    assert 0.3 < share.mean() < 0.9
    if len(shape) > 1:
        assert torch.equal(mixed[:, 0], mixed[:, 1])


def test_cutmix_has_a_box_of_its_own_for_each_image() -> None:
    torch.manual_seed(0)
    _, _, share = CutMix().mix(torch.rand(64, 1, 32, 32))
    assert len(share.unique()) > 32
    assert 0.3 < share.mean() < 0.85


@pytest.mark.parametrize("loss", [cross_entropy, MixedLoss(cross_entropy)], ids=["soft", "blended"])
def test_cutmix_trains_on_shares_of_the_area_and_metrics_see_the_larger(loss: Any) -> None:
    xs, seen = rows(1, 4, 4), Seen()
    learner = learner_of(CutMix(), seen, Metrics(accuracy), Recorder(), xs=xs, model=net(16), loss=loss)
    learner.fit(2)
    targets = seen.targets[0]
    if isinstance(targets, MixedTargets):
        w = targets.weight.view(-1, 1)
        targets = w * one_hot(targets.first, CLASSES) + (1 - w) * one_hot(targets.second, CLASSES)
    own = (seen.xs[0] == xs[:BATCH]).float().mean((1, 2, 3))
    same = targets.gather(1, LABELS[:BATCH, None])[:, 0] == 1
    torch.testing.assert_close(targets.gather(1, LABELS[:BATCH, None])[~same, 0], own[~same])
    assert 0 <= learner.history["training/accuracy"][-1] <= 1


@pytest.mark.parametrize("mixing", [MixUp(), CutMix()], ids=repr)
def test_what_is_drawn_is_copied_to_the_device_without_waiting(mixing: Mixing, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[tuple[Any, Any]] = []
    copy = Tensor.to

    def spy(self: Tensor, *args: Any, **options: Any) -> Tensor:
        if isinstance(args[0], torch.device):
            copies.append((tuple(self.shape), options))
        return copy(self, *args, **options)

    monkeypatch.setattr(Tensor, "to", spy)
    mixing.mix(torch.rand(4, 1, 8, 8))
    assert [options for _, options in copies] == [{"non_blocking": True}] * 2
    assert max(len(shape) for shape, _ in copies) < 3  # no boxes


@pytest.mark.parametrize("mixing", [MixUp(), CutMix()], ids=repr)
def test_the_generators_of_others_are_left_as_they_were(mixing: Mixing) -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]

    seen: list[Any] = []

    class Look(Callback):
        reads = ("step.xs",)
        run_after = (MixUp, CutMix)

        @on(StepBegin, TrainingPhase)
        def look(self, event: StepBegin, phase: Any, learner: Any) -> None:
            seen.append(states())

    for others in ([], [mixing]):
        learner_of(*others, Look(), xs=rows(1, 4, 4), model=net(16)).fit(1)
    assert seen[:BATCHES] == seen[BATCHES:]


def test_mixup_and_cutmix_follow_each_other() -> None:
    digests = []
    learners = []
    for order in (1, -1):
        given: list[Callback] = [MixUp(), CutMix(), Metrics(accuracy), Recorder(), EMA("model")]
        learner = learner_of(*given[::order], xs=rows(1, 4, 4), model=net(16))
        learner.fit(1)
        digests.append(learner.callbacks.digest)
        learners.append(learner)
    assert digests[0] == digests[1]
    assert learners[0].callbacks.order.index("MixUp") < learners[0].callbacks.order.index("CutMix")
    assert_same_bits(*learners)
    blended = learner_of(
        MixUp(), CutMix(), Metrics(accuracy), Recorder(), xs=rows(1, 4, 4), model=net(16), loss=MixedLoss(cross_entropy)
    )
    blended.fit(1)
    torch.testing.assert_close(blended.model[1].weight, learners[0].model[1].weight)


# What cannot be mixed


@pytest.mark.parametrize(
    ("mixing", "xs", "ys", "message"),
    [
        (MixUp(), torch.ones(24, 5).long(), LABELS, r"MixUp was given a Tensor of shape \(6, 5\) of torch.int64 in xs"),
        (
            CutMix(),
            rows(),
            LABELS,
            r"CutMix was given a Tensor of shape \(6,\); expected images of shape \(N, C, H, W\)",
        ),
        (MixUp(), rows(5), {"a": LABELS}, r"targets that are a dict of length 1; expected a tensor, or Learner\("),
    ],
    ids=["whole numbers", "no images", "several targets"],
)
def test_data_that_cannot_be_mixed_is_refused(mixing: Mixing, xs: Any, ys: Any, message: str) -> None:
    batches = [(xs[:BATCH], {"a": LABELS[:BATCH]} if isinstance(ys, dict) else ys[:BATCH])]
    learner = learner_of(mixing)
    with pytest.raises(DataError, match=message):
        learner.epoch(TrainingPhase(), batches)


def test_predictions_that_do_not_tell_the_number_of_classes_are_an_error() -> None:
    learner = learner_of(MixUp(), model=nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), loss=l1_loss)
    with pytest.raises(DataError, match=r"number of classes from preds of shape \(N, C, …\), and they are a Tensor of"):
        learner.epoch(TrainingPhase())


@pytest.mark.parametrize("loss", [nn.NLLLoss(), nll_loss, partial(nll_loss, reduction="sum"), nn.MultiMarginLoss()])
def test_a_loss_that_takes_classes_alone_is_named_with_what_to_give_instead(loss: Any) -> None:
    with pytest.raises(LossError, match=r"takes classes and no probabilities; give it as MixedLoss\("):
        learner_of(MixUp(), loss=loss).epoch(TrainingPhase())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixUp(0), r"MixUp\(0\) was given; expected a number above 0: MixUp\(0.4\)"),
        (lambda: CutMix(-1), r"CutMix\(-1\) was given"),
        (lambda: MixUp("0.4"), r"MixUp\('0.4'\) was given"),
        (lambda: MixUp(num_classes=1), r"MixUp\(num_classes=1\) was given; expected 2 or more"),
    ],
)
def test_bad_numbers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_it_shows_what_it_was_given() -> None:
    assert repr(MixUp()) == "MixUp(alpha=0.4, num_classes=None)"
    assert repr(CutMix(0.5, num_classes=3)) == "CutMix(alpha=0.5, num_classes=3)"


def test_it_handles_training_alone() -> None:
    assert MixUp().handler(StepBegin, ValidationPhase) is None
