from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fluxloop import (
    Event,
    FluxloopError,
    Learner,
    Metric,
    Metrics,
    ObjectiveValidationPhase,
    Phase,
    PhaseError,
    Recorder,
    StepEnd,
    TensorBatches,
    UnsafeCallback,
    VAEPhase,
    on,
    stream_seed,
)
from fluxloop.testing import EventRecorder, assert_same_bits, bits

SEED, BATCH, STEPS, SIZE, CODE = 3, 4, 5, 6, 2
ADAM = partial(torch.optim.Adam, lr=0.01, fused=False)


class Together(nn.Sequential):
    """Gives mean and logarithm of the variance in one tensor."""


class Apart(Together):
    """Gives them as a pair."""

    def forward(self, xs: Tensor) -> Any:
        code = super().forward(xs)
        return code[:, :CODE], code[:, CODE:]


class Listed(Apart):
    """Gives them as a list."""

    def forward(self, xs: Tensor) -> Any:
        return list(super().forward(xs))


def nets(kind: type[Together] = Together) -> dict[str, nn.Module]:
    """Make both networks with the same initial weights every time; one has statistics, one draws numbers."""
    torch.manual_seed(1)
    return {
        "encoder": kind(nn.Linear(SIZE, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2 * CODE)),
        "decoder": nn.Sequential(nn.Linear(CODE, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, SIZE)),
    }


def rows() -> Tensor:
    return torch.randn(STEPS * BATCH, SIZE, generator=torch.Generator().manual_seed(0))


def batches() -> TensorBatches:
    return TensorBatches(rows(), batch_size=BATCH)


def learner_of(*callbacks: Any, model: Any = None, data: Any = None) -> Learner:
    return Learner(
        nets() if model is None else model,
        data=(data or batches(), batches()),
        optimizer=ADAM,
        callbacks=callbacks,
        default_callbacks=False,
        seed=SEED,
    )


def half_squared_error(preds: Tensor, xs: Tensor) -> Tensor:
    return ((preds - xs) ** 2).sum(1).mean() / 2


def train_by_hand(beta: float, compare: Any = half_squared_error) -> tuple[dict[str, nn.Module], list[tuple[Any, ...]]]:
    """Train both networks in plain PyTorch; give them, and each step's loss and its two parts."""
    both = nets()
    optimizers = [ADAM(net.parameters()) for net in both.values()]
    numbers = []
    for step, xs in enumerate(batches()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        for optimizer in optimizers:
            optimizer.zero_grad()
        code = both["encoder"](xs)
        mean, logvar = code[:, :CODE], code[:, CODE:]
        latents = mean + torch.exp(logvar / 2) * torch.randn(BATCH, CODE)
        reconstruction = compare(both["decoder"](latents), xs)
        divergence = (0.5 * (mean**2 + logvar.exp() - 1 - logvar)).sum(1).mean()
        loss = reconstruction + beta * divergence
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        numbers.append((loss.detach(), reconstruction.detach(), divergence.detach()))
    return both, numbers


def assert_equal(learner: Learner, expected: dict[str, nn.Module]) -> None:
    """The weights are those of the loop by hand, and no longer the initial ones."""
    for name, net in expected.items():
        found, wanted, initial = (m.state_dict() for m in (learner.models[name], net, nets()[name]))
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
        assert [key for key in initial if "weight" in key and torch.equal(found[key], initial[key])] == []


class Numbers(UnsafeCallback):
    """Keep each step's loss and its two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[Any, ...]] = []

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Learner) -> None:
        step = learner.step
        self.values.append((step.loss.detach(), step.reconstruction.detach(), step.divergence.detach()))


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("kind", [Together, Apart, Listed], ids=["one tensor", "pair", "list"])
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_losses_and_weights_equal_those_of_a_hand_written_loop(beta: float, kind: type[Together]) -> None:
    log = Numbers()
    learner = learner_of(log, model=nets(kind))
    learner.fit(1, phases=[VAEPhase(beta)])
    expected, numbers = train_by_hand(beta)
    assert log.values == numbers
    assert_equal(learner, expected)


def test_without_beta_the_divergence_counts_once() -> None:
    learners = [learner_of(), learner_of()]
    for learner, phase in zip(learners, (VAEPhase(), VAEPhase(1.0)), strict=True):
        learner.fit(1, phases=[phase])
    assert_same_bits(*learners)


def test_another_comparison_may_be_given() -> None:
    def absolute(preds: Tensor, xs: Tensor) -> Tensor:
        return (preds - xs).abs().sum(1).mean()

    learner = learner_of()
    learner.fit(1, phases=[VAEPhase(0.5, absolute)])
    assert_equal(learner, train_by_hand(0.5, absolute)[0])


def test_the_loss_is_minus_the_evidence_lower_bound_up_to_a_constant() -> None:
    learner = learner_of(data=[rows()[:BATCH]])
    learner.epoch(VAEPhase())
    step = learner.step
    posterior = Normal(step.mean.double(), (step.logvar.double() / 2).exp())
    divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
    likelihood = Normal(step.preds.double(), 1.0).log_prob(step.xs.double()).sum(1).mean()
    constant = SIZE * torch.log(torch.tensor(2 * torch.pi, dtype=torch.double)) / 2
    assert step.divergence.item() == pytest.approx(divergence.item(), rel=1e-5)
    assert step.loss.item() == pytest.approx((divergence - likelihood - constant).item(), rel=1e-5)


def test_the_events_and_the_entries_are_those_of_the_documentation() -> None:
    seen: list[tuple[str, set[str]]] = []

    class Entries(UnsafeCallback):
        @on(Event, VAEPhase)
        def note(self, event: Event, phase: Phase, learner: Learner) -> None:
            seen.append((type(event).__name__, set(vars(learner.step))))

    learner_of(Entries(), data=[(rows()[:BATCH], torch.zeros(BATCH))]).epoch(VAEPhase())
    given = {"xs", "ys"}
    coded = given | {"mean", "features", "logvar", "latents", "preds"}
    lost = coded | {"reconstruction", "divergence", "loss"}
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


def test_the_entries_have_the_shapes_of_the_documentation() -> None:
    learner = learner_of()
    learner.epoch(VAEPhase())
    step = learner.step
    for name in ("mean", "logvar", "latents"):
        assert step[name].shape == (BATCH, CODE)
    assert step.features is step.mean or torch.equal(step.features, step.mean)
    assert step.preds.shape == step.xs.shape == (BATCH, SIZE)
    for name in ("reconstruction", "divergence", "loss"):
        assert step[name].shape == ()


def test_the_parts_of_the_loss_can_be_metrics() -> None:
    parts = [Metric(lambda value: value, name=name, inputs=(name,)) for name in ("reconstruction", "divergence")]
    learner = learner_of(Recorder(), Metrics(*parts))
    learner.fit(1, phases=[VAEPhase()])
    numbers = [torch.stack(column).double().mean().item() for column in zip(*train_by_hand(1.0)[1], strict=True)]
    for name, expected in zip(("loss", "reconstruction", "divergence"), numbers, strict=True):
        assert learner.history[f"training/{name}"] == [pytest.approx(expected, rel=1e-12)]


# The validation twin


def test_the_twin_gives_the_loss_of_held_out_rows_with_codes_of_its_own() -> None:
    recorder = EventRecorder()
    learner = learner_of(recorder)
    before = bits(learner)
    xs = rows()[:BATCH]
    learner.epoch(ObjectiveValidationPhase(VAEPhase(2.0)), [xs])
    assert recorder.events == ["EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]
    encoder, decoder = (net.eval() for net in nets().values())
    torch.manual_seed(stream_seed(SEED, "validation/ObjectiveValidationPhase/step", 0))
    with torch.no_grad():
        mean, logvar = encoder(xs).chunk(2, dim=1)
        preds = decoder(mean + (logvar / 2).exp() * torch.randn(BATCH, CODE))
        divergence = (0.5 * (mean**2 + logvar.exp() - 1 - logvar)).sum(1).mean()
    assert torch.equal(learner.step.loss, half_squared_error(preds, xs) + 2.0 * divergence)
    assert not learner.step.loss.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


def test_the_twin_only_watches_and_is_evaluated() -> None:
    phase = VAEPhase()
    plain, watched = learner_of(), learner_of()
    plain.fit(3, phases=[phase])
    watched.fit(3, phases=[phase, ObjectiveValidationPhase(phase)])
    assert_same_bits(plain, watched)
    found = watched.evaluate(phase=ObjectiveValidationPhase(phase))
    assert found.keys() == {"loss"}
    assert found == watched.evaluate(phase=ObjectiveValidationPhase(phase))


# What cannot be


@pytest.mark.parametrize("twin", [False, True], ids=["training", "validation"])
def test_missing_models_are_an_error_that_says_what_to_write(twin: bool) -> None:
    learner = learner_of(model={"encoder": nn.Linear(SIZE, 4), "generator": nn.Linear(2, SIZE)})
    phase = VAEPhase()
    words = r"VAEPhase calls learner.model.decoder, and the models are \['encoder', 'generator'\]"
    with pytest.raises(PhaseError, match=words):
        learner.fit(1, phases=[ObjectiveValidationPhase(phase) if twin else phase])


class Uneven(nn.Linear):
    """Gives logarithms of fewer variances than there are means."""

    def forward(self, xs: Tensor) -> Any:
        code = super().forward(xs)
        return code[:, :2], code[:, 2:]


@pytest.mark.parametrize(
    "encoder",
    [lambda: nn.Linear(SIZE, 3), lambda: Uneven(SIZE, 3), lambda: nn.Linear(SIZE, 1)],
    ids=["an odd number of columns", "a pair of different shapes", "one column"],
)
def test_a_code_without_a_variance_for_every_mean_is_an_error_and_not_broadcast(encoder: Callable[[], Any]) -> None:
    learner = learner_of(model={"encoder": encoder(), "decoder": nn.Linear(2, SIZE)})
    before = bits(learner)
    with pytest.raises(FluxloopError, match="VAEPhase"):
        learner.epoch(VAEPhase())
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
