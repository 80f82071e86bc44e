from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from fluxloop import (
    AutoencoderPhase,
    BatchError,
    CustomCallback,
    Event,
    Learner,
    LossBegin,
    Metrics,
    ObjectiveValidationPhase,
    Phase,
    PhaseError,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    UnsafeCallback,
    on,
    stream_seed,
)
from fluxloop.testing import EventRecorder, assert_same_bits, bits

SEED, BATCH, STEPS, SIZE, CODE = 3, 4, 5, 6, 2
ADAM = partial(torch.optim.Adam, lr=0.01, fused=False)


class Nets(NamedTuple):
    encoder: nn.Module
    decoder: nn.Module


class OneModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nets()


def nets() -> Nets:
    """Make both networks with the same initial weights every time; one has statistics, one draws numbers."""
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(SIZE, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CODE))
    return Nets(encoder, nn.Sequential(nn.Linear(CODE, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, SIZE)))


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(STEPS * BATCH, SIZE, generator=generator)
    return xs, torch.randint(3, (STEPS * BATCH,), generator=generator)


def images() -> TensorBatches:
    return TensorBatches(rows()[0], batch_size=BATCH)


def learner_of(*callbacks: Any, model: Any = None, data: Any = None, **options: Any) -> Learner:
    given = {"data": (data or images(), images()), "optimizer": ADAM, "default_callbacks": False, "seed": SEED}
    return Learner(nets() if model is None else model, callbacks=callbacks, **{**given, **options})


def train_by_hand(compare: Any = mse_loss, scale: float = 1.0) -> tuple[Nets, list[Tensor]]:
    """Train both networks in plain PyTorch, on scaled inputs."""
    encoder, decoder = both = nets()
    optimizers = [ADAM(encoder.parameters()), ADAM(decoder.parameters())]
    losses = []
    for step, given in enumerate(images()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        xs = given if scale == 1 else scale * given  # the same memory: a copy may be multiplied in another order
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = compare(decoder(encoder(xs)), xs)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    return both, losses


def assert_equal(learner: Learner, expected: Nets) -> None:
    """The weights are those of the loop by hand, and no longer the initial ones."""
    for name in expected._fields:
        found, wanted, initial = (getattr(m, name).state_dict() for m in (learner.model, expected, nets()))
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
        assert [key for key in initial if "weight" in key and torch.equal(found[key], initial[key])] == []


class Losses(UnsafeCallback):
    """Keep the loss of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Learner) -> None:
        self.values.append(learner.step.loss.detach())


@pytest.mark.parametrize(
    "model", [nets, lambda: nets()._asdict(), OneModule], ids=["named tuple", "mapping", "parts of one module"]
)
def test_losses_and_weights_equal_those_of_a_hand_written_loop(model: Callable[[], Any]) -> None:
    log = Losses()
    learner = learner_of(log, model=model())
    learner.fit(1, phases=[AutoencoderPhase()])
    expected, losses = train_by_hand()
    assert log.values == losses
    assert_equal(learner, expected)


def test_another_comparison_may_be_given() -> None:
    learner = learner_of()
    learner.fit(1, phases=[AutoencoderPhase(l1_loss)])
    assert_equal(learner, train_by_hand(l1_loss)[0])


@pytest.mark.parametrize(
    "form",
    [lambda xs, ys: (xs,), lambda xs, ys: [xs], lambda xs, ys: (xs, ys), lambda xs, ys: [xs, ys]],
    ids=["tuple of one", "list of one", "pair", "list of two"],
)
def test_batches_may_have_labels_which_are_stored_and_not_used(form: Callable[[Tensor, Tensor], Any]) -> None:
    xs, ys = rows()
    learner = learner_of(data=[form(*pair) for pair in zip(xs.split(BATCH), ys.split(BATCH), strict=True)])
    learner.fit(1, phases=[AutoencoderPhase()])
    assert_equal(learner, train_by_hand()[0])
    assert torch.equal(learner.step.xs, xs[-BATCH:])
    if len(form(xs, ys)) == 2:
        assert torch.equal(learner.step.ys, ys[-BATCH:])
    else:
        assert "ys" not in learner.step


def test_the_events_and_the_entries_are_those_of_the_documentation() -> None:
    seen: list[tuple[str, set[str]]] = []

    class Entries(UnsafeCallback):
        @on(Event, AutoencoderPhase)
        def note(self, event: Event, phase: Phase, learner: Learner) -> None:
            seen.append((type(event).__name__, set(vars(learner.step))))

    learner_of(Entries(), data=[next(iter(images()))]).epoch(AutoencoderPhase())
    given = {"xs"}
    coded = given | {"latents", "features", "preds"}
    lost = coded | {"loss"}
    done = lost | {"grads"}
    updates = [("UpdateBegin", done), ("UpdateEnd", done)] * 2
    assert seen[1:-1] == [
        ("StepBegin", given),
        ("LossBegin", coded),
        ("BackwardBegin", lost),
        ("BackwardEnd", done),
        *updates,
        ("StepEnd", done),
    ]


def test_the_code_is_stored_as_latents_and_features() -> None:
    learner = learner_of()
    learner.epoch(ObjectiveValidationPhase(AutoencoderPhase()))
    xs = rows()[0][-BATCH:]
    encoder, decoder = (net.eval() for net in nets())
    step = learner.step
    assert step.features is step.latents
    assert torch.equal(step.latents, encoder(xs))
    assert step.latents.shape == (BATCH, CODE)
    assert torch.equal(step.preds, decoder(encoder(xs)))
    assert step.preds.shape == step.xs.shape


def test_images_keep_their_shape() -> None:
    xs = torch.randn(2 * BATCH, 1, 2, 3)
    models = {
        "encoder": nn.Sequential(nn.Flatten(), nn.Linear(6, CODE)),
        "decoder": nn.Sequential(nn.Linear(CODE, 6), nn.Unflatten(1, (1, 2, 3))),
    }
    learner = learner_of(model=models, data=TensorBatches(xs, batch_size=BATCH))
    learner.fit(1, phases=[AutoencoderPhase()])
    assert learner.step.preds.shape == (BATCH, 1, 2, 3)
    assert learner.step.features.shape == (BATCH, CODE)


@pytest.mark.parametrize(
    ("entry", "event"), [("xs", StepBegin), ("preds", LossBegin)], ids=["inputs at StepBegin", "preds at LossBegin"]
)
def test_what_a_callback_replaces_is_used_next(entry: str, event: type[Event]) -> None:
    def halve(learner: Any) -> None:
        setattr(learner.step, entry, getattr(learner.step, entry) / 2)

    learner = learner_of(CustomCallback(halve, event, reads=(), writes=(f"step.{entry}",)))
    learner.fit(1, phases=[AutoencoderPhase()])
    if entry == "xs":
        assert_equal(learner, train_by_hand(scale=0.5)[0])
    else:
        assert_equal(learner, train_by_hand(lambda preds, xs: mse_loss(preds / 2, xs))[0])


def test_the_history_has_one_loss_and_the_updates_of_both_optimizers() -> None:
    learner = learner_of(Recorder(), Metrics())
    learner.fit(1, phases=[AutoencoderPhase()])
    losses = train_by_hand()[1]
    assert learner.history[AutoencoderPhase].updates == {"encoder": STEPS, "decoder": STEPS}
    assert learner.history["training/loss"] == [pytest.approx(torch.stack(losses).double().mean().item(), rel=1e-12)]


def test_a_reconstruction_of_another_shape_is_an_error_and_not_broadcast() -> None:
    models = {"encoder": nn.Linear(SIZE, CODE), "decoder": nn.Linear(CODE, 1)}
    learner = learner_of(model=models)
    with pytest.raises(ValueError, match=r"of shape \(4, 1\) was compared with \(4, 6\)"):
        learner.fit(1, phases=[AutoencoderPhase()])


def test_a_batch_of_three_is_an_error_that_says_what_is_expected() -> None:
    learner = learner_of(data=[(rows()[0][:BATCH],) * 3])
    before = bits(learner)
    with pytest.raises(BatchError, match=r"a batch of 3 items .*expected xs, \(xs,\) or \(xs, ys\)"):
        learner.fit(1, phases=[AutoencoderPhase()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


# The validation twin


def test_the_twin_gives_the_loss_of_held_out_rows_without_updates() -> None:
    recorder = EventRecorder()
    learner = learner_of(recorder)
    before = bits(learner)
    xs = rows()[0][:BATCH]
    learner.epoch(ObjectiveValidationPhase(AutoencoderPhase(l1_loss)), [xs])
    assert recorder.events == ["EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]
    encoder, decoder = (net.eval() for net in nets())
    with torch.no_grad():
        assert torch.equal(learner.step.loss, l1_loss(decoder(encoder(xs)), xs))
    assert not learner.step.loss.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


def test_the_twin_only_watches_and_is_evaluated() -> None:
    phase = AutoencoderPhase()
    plain, watched = learner_of(), learner_of(Recorder(), Metrics())
    plain.fit(3, phases=[phase])
    watched.fit(3, phases=[phase, ObjectiveValidationPhase(phase)])
    assert_same_bits(plain, watched)
    found = watched.evaluate(phase=ObjectiveValidationPhase(phase))
    assert found == {"loss": watched.history["validation/loss"][-1]}


# What cannot be

MISSING: dict[str, tuple[Any, str]] = {
    "both": ({"a": nn.Linear(6, 2), "b": nn.Linear(2, 6)}, r"learner.model.encoder, and the models are \['a', 'b'\]"),
    "the decoder": (
        {"encoder": nn.Linear(6, 2), "decode": nn.Linear(2, 6)},
        r"learner.model.decoder, and the models are \['encoder', 'decode'\]",
    ),
    "all parts": (nn.Linear(6, 6), "learner.model.encoder, and the models are none"),
    "parts": (nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6)), r"model.encoder, and the models are \['0', '1'\]"),
}


@pytest.mark.parametrize("twin", [False, True], ids=["training", "validation"])
@pytest.mark.parametrize("case", MISSING)
def test_missing_models_are_an_error_that_says_what_to_write(case: str, twin: bool) -> None:
    model, words = MISSING[case]
    learner = learner_of(model=model)
    before = bits(learner)
    phase = AutoencoderPhase()
    with pytest.raises(PhaseError, match=f"AutoencoderPhase calls .*{words}") as raised:
        learner.fit(1, phases=[ObjectiveValidationPhase(phase) if twin else phase])
    assert "Learner({'encoder': ..., 'decoder': ...})" in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
