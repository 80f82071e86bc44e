from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    EMA,
    BatchError,
    DiffusionPhase,
    FlowMatchingPhase,
    Learner,
    Metric,
    Metrics,
    NoisedPhase,
    NoisedValidationPhase,
    Phase,
    PhaseError,
    Recorder,
    SampleImages,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    on,
    stream_seed,
)
from fluxloop.testing import EventRecorder, assert_resumes_exactly, assert_same_bits

# One network is trained with labels and without
pytestmark = pytest.mark.filterwarnings("ignore:.* got no gradient in a whole epoch")

SEED, BATCH, STEPS, SIZE, CLASSES = 3, 4, 5, 6, 3
ADAM = partial(torch.optim.Adam, lr=0.01, fused=False)

PHASES: dict[str, Callable[..., NoisedPhase]] = {
    "flow": FlowMatchingPhase,
    "logit-normal flow": partial(FlowMatchingPhase, times="logit-normal", sigma_min=0.1),
    "noise": partial(DiffusionPhase, "noise", schedule="linear"),
    "velocity": partial(DiffusionPhase, "velocity", steps=50),
    "edm": partial(DiffusionPhase, "edm", sigma_data=0.7),
}


class Net(nn.Module):
    """A model of noised rows and their times, and of labels where they are given; class 3 is none."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(SIZE + 1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, SIZE))
        self.labels = nn.Embedding(CLASSES + 1, SIZE)

    def forward(self, xs: Tensor, times: Tensor, ys: Tensor | None = None) -> Tensor:
        rows = xs if ys is None else xs + self.labels(ys)
        out: Tensor = self.body(torch.cat([rows, times.to(xs.dtype)[:, None] / 10], dim=1))
        return out


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def batches(steps: int = STEPS) -> TensorBatches:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(steps * BATCH, SIZE, generator=generator)
    return TensorBatches(xs, torch.randint(CLASSES, (len(xs),), generator=generator), batch_size=BATCH)


def learner_of(*callbacks: Any, **options: Any) -> Learner:
    data = batches()
    given = {"data": (data, data), "optimizer": ADAM, "default_callbacks": False, "seed": SEED, **options}
    return Learner(net(), callbacks=callbacks, **given)


# The loop by hand, from the papers


def shares(kind: str) -> Tensor:
    """Return the shares of variance, by the formulas of the papers in Python's floats."""
    if kind == "noise":
        betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    else:
        f = [math.cos((t / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(51)]
        betas = [min(1 - b / a, 0.999) for a, b in pairwise(f)]
    left, found = 1.0, []
    for beta in betas:
        left *= 1 - beta
        found.append(left)
    return torch.tensor(found, dtype=torch.float64)


def by_hand(kind: str, xs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Draw times; return what the model is given, which times, and what its output is compared with."""
    if "flow" in kind:
        t = torch.rand(len(xs)) if kind == "flow" else torch.sigmoid(torch.randn(len(xs)))
        left = 0.0 if kind == "flow" else 0.1
        t_ = t[:, None]
        return t_ * xs + (1 - (1 - left) * t_) * noise, t, lambda out: out - (xs - (1 - left) * noise)
    if kind == "edm":
        sigma = (-1.2 + 1.2 * torch.randn(len(xs))).exp()
        s, d = sigma[:, None], 0.7
        row = xs + s * noise
        total = (s**2 + d**2).sqrt()
        return 1 / total * row, sigma.log() / 4, lambda out: out - (xs - (d / total) ** 2 * row) / (s * d / total)
    left = shares(kind)
    t = torch.randint(len(left), (len(xs),))
    a, s = left[t].sqrt().float()[:, None], (1 - left[t]).sqrt().float()[:, None]
    return a * xs + s * noise, t, lambda out: out - (noise if kind == "noise" else a * noise - s * xs)


def train_by_hand(kind: str, conditional: bool = False) -> tuple[Net, list[Tensor]]:
    model, losses = net(), []
    optimizer = ADAM(model.parameters())
    for number, (xs, ys) in enumerate(batches()):
        torch.manual_seed(stream_seed(SEED, "training/step", number))
        noise = torch.randn(BATCH, SIZE)
        noised, times, error = by_hand(kind, xs, noise)
        given = [torch.where(torch.rand(BATCH) < 0.4, CLASSES, ys)] if conditional else []
        loss = error(model(noised, times, *given)).square().mean(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return model, losses


class Losses(UnsafeCallback):
    """Keep the losses, times, and noise of every step of phases of a type."""

    def __init__(self, phase: type[Phase] = Phase) -> None:
        super().__init__()
        self.phase = phase
        self.losses: list[Tensor] = []
        self.times: list[Tensor] = []

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Learner) -> None:
        if isinstance(phase, self.phase):
            self.losses.append(learner.step.loss.detach())
            self.times.append(learner.step.times)


@pytest.mark.parametrize("conditional", [False, True], ids=["", "conditional"])
@pytest.mark.parametrize("kind", PHASES)
def test_losses_and_weights_equal_those_of_a_hand_written_loop(kind: str, conditional: bool) -> None:
    log, said = Losses(), {"conditional": True, "condition_dropout": 0.4, "null": CLASSES} if conditional else {}
    learner = learner_of(log)
    learner.fit(1, phases=[PHASES[kind](**said)])
    model, losses = train_by_hand(kind, conditional)
    found, expected, before = learner.model.state_dict(), model.state_dict(), net().state_dict()
    assert log.losses == losses
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert not torch.equal(found["body.0.weight"], before["body.0.weight"])
    assert torch.equal(found["labels.weight"], before["labels.weight"]) is not conditional


@pytest.mark.parametrize("kind", PHASES)
def test_events_and_entries_are_those_of_the_documentation(kind: str) -> None:
    recorder = EventRecorder()
    learner = learner_of(recorder)
    learner.epoch(PHASES[kind](conditional=True), [next(iter(batches()))])
    block = ["LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd"]
    assert recorder.events == ["EpochBegin", "StepBegin", *block, "StepEnd", "EpochEnd"]
    entries = {"xs", "ys", "noise", "times", "given", "noised", "preds", "target", "errors", "loss", "grads"}
    assert set(vars(learner.step)) == entries
    assert learner.step.times.shape == learner.step.errors.shape == (BATCH,)
    assert torch.equal(learner.step.given, learner.step.ys)


def test_the_condition_of_a_share_of_the_rows_is_left_out_in_training_alone() -> None:
    phase = FlowMatchingPhase(conditional=True, condition_dropout=0.25, null=0.5)
    ys = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    given = phase.without_some(ys)
    left_out = (given == 0.5).flatten(1)
    assert torch.equal(left_out.all(1), left_out.any(1))  # a row has all of it, or nothing
    assert 0.22 < left_out[:, 0].float().mean() < 0.28
    assert torch.equal(ys, torch.ones(4000, 2, 3))

    learner = learner_of()
    always = FlowMatchingPhase(conditional=True, condition_dropout=1.0, null=CLASSES)
    learner.epoch(always)
    assert learner.step.given.tolist() == [CLASSES] * BATCH
    learner.epoch(NoisedValidationPhase(always))
    assert torch.equal(learner.step.given, learner.step.ys)


def test_rows_may_weigh_by_their_time_in_a_subclass() -> None:
    class Weighed(FlowMatchingPhase):
        def weigh(self, state: Any) -> Tensor:
            return 1 / state.times

    learner = learner_of()
    learner.epoch(Weighed())
    step = learner.step
    errors = (step.preds - step.target).square().mean(1)
    torch.testing.assert_close(step.loss, (errors / step.times).mean())


# The validation twin


@pytest.mark.parametrize("kind", PHASES)
def test_validation_has_the_same_noise_and_times_in_every_epoch_and_in_runs_of_other_seeds(kind: str) -> None:
    def run(seed: int, epochs: int) -> tuple[Losses, Learner]:
        log = Losses(NoisedValidationPhase)
        phase = PHASES[kind]()
        frozen = partial(torch.optim.SGD, lr=0.0)
        learner = learner_of(log, Recorder(), Metrics(), optimizer=frozen, seed=seed)
        learner.model.body[1] = nn.Identity()  # no statistics that move
        learner.fit(epochs, phases=[phase, NoisedValidationPhase(phase)])
        return log, learner

    (log, learner), (other, _) = run(1, 3), run(2, 1)
    assert log.losses[:STEPS] == log.losses[STEPS : 2 * STEPS] == log.losses[2 * STEPS :] == other.losses
    assert len({tuple(times.tolist()) for times in log.times}) == STEPS  # each batch has its own
    assert learner.evaluate(phase=NoisedValidationPhase(PHASES[kind]())) == pytest.approx(
        {"loss": learner.history["validation/loss"][0]}
    )
    assert len(set(learner.history["training/loss"])) == 3


def test_validation_of_the_model_is_what_is_computed_by_hand() -> None:
    learner = learner_of()
    learner.epoch(NoisedValidationPhase(FlowMatchingPhase()), [next(iter(batches()))])
    step, model = learner.step, net().eval()
    t = step.times[:, None]
    with torch.no_grad():
        preds = model(t * step.xs + (1 - t) * step.noise, step.times)
    assert torch.equal(step.loss, (preds - (step.xs - step.noise)).square().mean(1).mean())


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("kind", PHASES)
def test_a_killed_run_goes_on_to_the_bit_and_validation_only_watches(kind: str) -> None:
    def phases() -> list[Phase]:
        phase = PHASES[kind](conditional=True, condition_dropout=0.4, null=CLASSES)
        return [phase, NoisedValidationPhase(phase)]

    make = partial(learner_of, EMA("model", 0.9), Recorder(), Metrics())
    assert_resumes_exactly(make, phases=phases, at=None if kind == "flow" else [2, 7])  # in validation, too
    with_twin, alone = make(), make()
    with_twin.fit(2, phases=phases())
    alone.fit(2, phases=phases()[:1])
    assert_same_bits(with_twin, alone)


# Samples


class Images(nn.Module):
    """A model of images of 2 by 2."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, xs: Tensor, times: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.cat([xs.flatten(1), times.to(xs.dtype)[:, None]], 1))
        return out.reshape(xs.shape)


@pytest.mark.parametrize("kind", ["flow", "noise", "edm"])
def test_sample_images_samples_the_named_weights_and_changes_no_weight(kind: str) -> None:
    phase = PHASES[kind]()
    noise = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    eta = {"noise": {"eta": 1.0}}.get(kind, {})  # draws, from the callback's own stream

    def make(*callbacks: Any) -> Learner:
        torch.manual_seed(1)
        data = TensorBatches(torch.randn(12, 1, 2, 2), batch_size=4)
        averages = [Recorder(), EMA("model", 0.5), *callbacks]
        return Learner(Images(), data=(data,), optimizer=ADAM, callbacks=averages, default_callbacks=False, seed=SEED)

    sampler = SampleImages("model@ema", inputs=noise, make=partial(phase.sample, steps=3, **eta), folder=None)
    learner, without = make(sampler), make()
    for each in (learner, without):
        each.fit(2, phases=[PHASES[kind]()])
    assert all(map(torch.equal, learner.model.state_dict().values(), without.model.state_dict().values()))
    if not eta:
        made = phase.sample(learner.weights["model@ema"].eval(), noise, steps=3)
        low, high = made.min(), made.max()
        assert low < 0 < high
    assert sampler.grid is not None
    assert sampler.grid.shape[0] == 1


@pytest.mark.parametrize("make", [FlowMatchingPhase, DiffusionPhase, partial(DiffusionPhase, "edm")])
def test_guidance_leads_away_from_the_output_without_a_condition(make: Callable[..., Any]) -> None:
    phase = make(conditional=True, condition_dropout=0.1, null=2)

    def model(xs: Tensor, times: Tensor, ys: Tensor) -> Tensor:
        return xs * torch.tensor([0.1, 0.2, 0.05], dtype=xs.dtype)[ys][:, None]

    noise, ys = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1])

    def guided(xs: Tensor, times: Tensor, ys: Tensor) -> Tensor:
        return xs * (0.05 + 3 * (torch.tensor([0.1, 0.2], dtype=xs.dtype)[ys][:, None] - 0.05))

    found = phase.sample(model, noise, ys, steps=4, guidance=3.0)
    torch.testing.assert_close(found, phase.sample(guided, noise, ys, steps=4))
    without = phase.sample(model, noise, ys, steps=4, guidance=0.0)
    torch.testing.assert_close(without, phase.sample(model, noise, torch.tensor([2, 2]), steps=4))


def test_a_sample_leaves_modes_gradients_and_generators_alone() -> None:
    model = net()
    before = torch.get_rng_state()
    for kind in PHASES:
        made = PHASES[kind]().sample(model, torch.ones(2, SIZE), steps=2)
        assert not made.requires_grad
        assert torch.is_grad_enabled()
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


# What cannot be


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(4, SIZE, dtype=torch.uint8), "of torch.uint8; expected a tensor of floats"),
        ([torch.zeros(2, SIZE), torch.zeros(2), torch.zeros(2)], "a batch of 3 items"),
        ({"xs": torch.zeros(2, SIZE)}, "expected a tensor of floats"),
    ],
)
def test_rows_of_another_kind_are_an_error(batch: Any, words: str) -> None:
    with pytest.raises(BatchError, match=words):
        learner_of().epoch(FlowMatchingPhase(), [batch])


def test_a_model_with_a_condition_needs_pairs() -> None:
    with pytest.raises(BatchError, match=r"conditional=True\) was given .* expected \(xs, ys\)"):
        learner_of().epoch(FlowMatchingPhase(conditional=True), [torch.zeros(2, SIZE)])


def test_a_condition_that_is_left_out_needs_something_in_its_place() -> None:
    with pytest.raises(PhaseError, match=r"null=None; expected .* null=10\) where the labels are 0 to 9"):
        FlowMatchingPhase(conditional=True, condition_dropout=0.1)


def test_arguments_of_a_sample_that_do_not_fit_are_errors() -> None:
    noise, ys = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    plain, conditional = FlowMatchingPhase(), FlowMatchingPhase(conditional=True)
    for phase, given, words in [
        (plain, {"ys": ys}, "conditional=False; expected sample"),
        (conditional, {}, "no conditions by a phase with conditional=True"),
        (conditional, {"ys": ys, "guidance": 2.0}, "no condition that it leaves out"),
        (plain, {"steps": 0}, r"sample\(steps=0\)"),
        (plain, {"solver": "heun"}, "expected one of"),
    ]:
        with pytest.raises(PhaseError, match=words):
            phase.sample(net(), noise, **given)


def test_several_models_are_an_error_that_says_what_to_write() -> None:
    phase = FlowMatchingPhase()
    for each in (phase, NoisedValidationPhase(phase)):
        learner = Learner({"a": net(), "b": net()}, data=(batches(), batches()))
        with pytest.raises(PhaseError, match=r"runs one model, and the learner has \['a', 'b'\]; say .* predict"):
            learner.epoch(each)


def test_the_twin_takes_phases_of_its_kind() -> None:
    with pytest.raises(PhaseError, match="expected an instance of the training phase, of type NoisedPhase"):
        NoisedValidationPhase(TrainingPhase())


def test_errors_by_time_are_metrics_of_entries() -> None:
    early = Metric(lambda errors, times: errors[times < 0.5].sum() / (times < 0.5).sum(), inputs=("errors", "times"),
                   name="early")  # fmt: skip
    learner = learner_of(Recorder(), Metrics(early))
    learner.fit(1, phases=[FlowMatchingPhase()])
    assert len(learner.history["training/early"]) == 1


@pytest.mark.parametrize("phase", [DiffusionPhase(), FlowMatchingPhase()], ids=["diffusion", "flow"])
def test_a_model_that_takes_other_arguments_is_refused_before_anything_runs(phase: NoisedPhase) -> None:
    words = (
        r"calls model\(noised, times\), and the forward of Linear has the arguments \(input\).*forward\(self, noised"
    )
    for given in (phase, NoisedValidationPhase(phase)):
        with pytest.raises(PhaseError, match=f"(?s)Phase {words}"):
            Learner(nn.Linear(4, 4), data=(torch.randn(8, 4), torch.randn(8, 4))).fit(1, phases=[given])
    conditional = type(phase)(conditional=True)
    with pytest.raises(PhaseError, match=r"model\(noised, times, ys\), and the forward of Two has"):
        Learner(Two(), data=((torch.randn(8, 4), torch.arange(8)),)).fit(1, phases=[conditional])


class Two(nn.Module):
    """Takes no condition."""

    def forward(self, xs: Tensor, times: Tensor) -> Tensor:
        return xs


class OfOne(FlowMatchingPhase):
    """Runs a model of rows alone."""

    def predict(self, learner: Any, state: Any) -> None:
        state.noised, _, state.target = self.mix(state)
        state.preds = learner.model(state.noised)


def test_a_subclass_that_runs_the_model_itself_may_give_it_what_it_likes() -> None:
    learner = Learner(nn.Linear(4, 4), data=(torch.randn(8, 4),), default_callbacks=False)
    learner.fit(1, phases=[OfOne()])
    assert learner.step.loss.isfinite()
