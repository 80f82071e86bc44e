from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compiled_training import ADAM, ROWS, SGD, both, full, graphs, learner, mlp, rows, weights
from torch import Tensor, nn
from torch.nn import functional

import fluxloop.compile.graphs
import fluxloop.phases
from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    AutoencoderPhase,
    BackwardBegin,
    BarlowTwinsPhase,
    BYOLPhase,
    Callback,
    CompileError,
    CustomCallback,
    CycleGANPhase,
    Data2VecPhase,
    DiffusionPhase,
    DINOPhase,
    DINOv2Phase,
    DistillationPhase,
    FlowMatchingPhase,
    GANPhase,
    GANValidationPhase,
    GradientClip,
    IJEPAPhase,
    LearningRate,
    LeJEPAPhase,
    LogHistograms,
    LossBegin,
    LRScheduler,
    MAEPhase,
    Memory,
    MixUp,
    MoCoPhase,
    MoCoV3Phase,
    ModelLossPhase,
    MSNPhase,
    NNCLRPhase,
    NoisedValidationPhase,
    ObjectiveValidationPhase,
    PerOptimizerPhase,
    PerOptimizerValidationPhase,
    Phase,
    Scheduler,
    SimCLRPhase,
    SimSiamPhase,
    StepBegin,
    StepEnd,
    SupConPhase,
    SwAVPhase,
    TrainingPhase,
    TripletPhase,
    TwoViews,
    Unfreeze,
    UpdateBegin,
    VAEPhase,
    VICRegPhase,
    cosine,
    linear,
    on,
    one_cycle,
)
from fluxloop.augment import (
    AdaptiveAugment,
    RandomMasks,
    color_jitter,
    gaussian_blur,
    random_affine,
    random_flip,
    random_grayscale,
    random_resized_crop,
)

pytestmark = pytest.mark.usefixtures("imported")


# A graph that was compiled and cannot be run


def breaking(error: Exception, calls: int = 0) -> Callable[..., Any]:
    """Compile to a function that changes all it is given, draws, and fails, for so many calls or for ever."""
    failures = []

    def lower(graph: Any, inputs: list[Any], device: torch.device) -> Any:
        def call(*inputs: Tensor) -> Any:
            if calls and len(failures) == calls:
                with torch.no_grad():
                    return graph(*inputs)
            failures.append(error)
            with torch.no_grad():
                for tensor in inputs[: len(inputs) - 3]:  # the rate and the batch are no state
                    tensor.add_(1)
            torch.rand(3)
            raise error

        return call

    return lower


@pytest.mark.slow
def test_what_fails_at_the_first_call_of_a_graph_is_an_error_that_says_what_to_do_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = breaking(RuntimeError("no such kernel\nat some place"), calls=1)
    monkeypatch.setattr(fluxloop.compile.graphs, "lower", broken)
    made = learner(optimizer=SGD, model=lambda: nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4)), data=(rows(),))
    state: list[Any] = []
    note = lambda learner: state.append((weights(learner), copy.deepcopy(learner.optimizer.state_dict())))  # noqa: E731
    made.add_callback(CustomCallback(note, StepEnd, TrainingPhase))
    with pytest.raises(CompileError, match="was compiled, but cannot be run: RuntimeError: no such kernel") as caught:
        made.fit(1)
    for words in ("TrainingPhase()", "Nothing was changed", "compiled = False", 'compile="model"'):
        assert words in str(caught.value)
    assert len(state) == 1
    assert all(map(torch.equal, state[0][0], weights(made)))
    for old, new in zip(state[0][1]["state"].values(), made.optimizer.state_dict()["state"].values(), strict=True):
        assert torch.equal(old["momentum_buffer"], new["momentum_buffer"])
    made.fit(1)  # it may be tried again
    assert len(state) == 4


def test_memory_that_runs_out_at_the_first_call_is_the_error_that_everybody_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fluxloop.compile.graphs, "lower", breaking(torch.cuda.OutOfMemoryError("CUDA out of memory")))
    made = learner(data=(rows(),))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        made.fit(1)
    assert all(weight.abs().max() < 1 for weight in weights(made))


# Callbacks, phases and models, each compared with eager steps


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [GradientClip(0.1)],
        lambda: [GradientClip(value=0.01)],
        lambda: [Scheduler({LearningRate: one_cycle(9, 0.1)})],
        lambda: [LRScheduler(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2), unit="step")],
        lambda: [EMA("model", 0.9)],
        lambda: [MixUp(0.4, num_classes=4)],
        lambda: [Unfreeze({"0": 1})],
        lambda: [Unfreeze({"0": 3}, unit="step")],
        lambda: [LogHistograms(Memory(), of="weights", every=2)],
    ],
    ids=["clip", "clip values", "schedule", "torch's", "average", "mixup", "unfreeze", "unfreeze in an epoch", "log"],
)
def test_callbacks_work_with_compiled_steps(callbacks: Callable[[], list[Callback]]) -> None:
    eager, compiled = both(callbacks=callbacks)
    assert compiled.history[TrainingPhase] == eager.history[TrainingPhase]
    for name in eager.history.metrics[TrainingPhase]:
        assert compiled.history[f"training/{name}"] == pytest.approx(eager.history[f"training/{name}"], rel=1e-4)
    for view in ("model@ema",):
        if view in eager.weights:
            for a, b in zip(eager.weights[view].parameters(), compiled.weights[view].parameters(), strict=True):
                torch.testing.assert_close(a, b)


def encoder() -> dict[str, nn.Module]:
    return {"encoder": nn.Linear(16, 8), "projector": nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))}


def student(*parts: str) -> dict[str, nn.Module]:
    network = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 6))
    return {
        "student": network,
        "teacher": copy.deepcopy(network).requires_grad_(False),
        **{part: nn.Linear(6, 6) for part in parts},
    }


VIEWS = TwoViews(lambda xs: xs + 0.1 * torch.randn_like(xs))


def with_twin(phase: Any) -> list[Phase]:
    return [phase, ObjectiveValidationPhase(phase)]


class Noised(nn.Module):
    """A model of noised rows, their times, and their classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.classes = nn.Linear(16, 16), nn.Embedding(5, 16)

    def forward(self, xs: Tensor, times: Tensor, ys: Tensor) -> Tensor:
        out: Tensor = self.layer(xs + (times / 100).tanh().to(xs.dtype)[:, None] + self.classes(ys))
        return out


GUIDED: dict[str, Any] = {"conditional": True, "condition_dropout": 0.2, "null": 4}


def with_fixed_noise(phase: Any) -> list[Phase]:
    return [phase, NoisedValidationPhase(phase)]


class Triplets(TripletPhase):
    """Makes triplets of the rows."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return super().entries((batch[0], batch[0] + 0.1, batch[0].roll(1, 0)))


class Images(MAEPhase):
    """Makes images of the rows."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return super().entries(batch[0].reshape(-1, 1, 4, 4))


class HiddenPatches(DINOv2Phase):
    """Makes images of the rows."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return super().entries(batch[0].reshape(-1, 1, 4, 4))


class HiddenLayers(Data2VecPhase):
    """Makes images of the rows."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return super().entries(batch[0].reshape(-1, 1, 4, 4))


class Seeing(nn.Module):
    """Gives the mean of an image's patches, and the patches; or a list of layers."""

    def __init__(self, layers: bool = False) -> None:
        super().__init__()
        self.embed, self.hidden, self.layers = nn.Conv2d(1, 8, 2, 2), nn.Parameter(torch.randn(8)), layers

    def forward(self, images: Tensor, mask: Tensor | None) -> Any:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask[:, :, None], self.hidden, tokens)
        return [tokens, tokens.tanh()] if self.layers else (tokens.mean(1), tokens)


def seeing_patches() -> dict[str, nn.Module]:
    network = nn.ModuleDict({"encoder": Seeing(), "projector": nn.Linear(8, 6), "patch_projector": nn.Linear(8, 5)})
    return {"student": network, "teacher": copy.deepcopy(network).requires_grad_(False)}


def seeing_layers() -> dict[str, nn.Module]:
    network = Seeing(layers=True)
    return {
        "student": network,
        "teacher": copy.deepcopy(network).requires_grad_(False),
        "predictor": nn.Linear(8, 8),
    }


class Tagger(nn.Module):
    """Computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
        logits = self.layer(xs)
        return {"loss": functional.cross_entropy(logits, ys), "logits": logits}


class HiddenBlocks(IJEPAPhase):
    """Makes images of the rows, and hides as much of each."""

    compiled = True

    def entries(self, batch: Any) -> dict[str, Any]:
        return super().entries(batch[0].reshape(-1, 1, 4, 4))


def halves(rows: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """See a half of each image's patches, and predict the other patches one by one."""
    places = torch.rand(rows, grid[0] * grid[1], device=device).argsort(1)
    return places[:, :2], places[:, 2:, None]


class Predictor(nn.Module):
    """Predicts tokens of places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.places = nn.Linear(8, 8), nn.Embedding(4, 8)

    def forward(self, tokens: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
        out: Tensor = self.layer(tokens.mean(1, keepdim=True)) + self.places(wanted)
        return out


def seeing_blocks() -> dict[str, nn.Module]:
    encoder = Tokens()
    teacher = copy.deepcopy(encoder).requires_grad_(False)
    return {"student": encoder, "teacher": teacher, "predictor": Predictor()}


def teacher_moves() -> list[Callback]:
    return [EMA("student", 0.9, into="teacher")]


class Tokens(nn.Module):
    """An encoder of patches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.places = nn.Linear(4, 8), nn.Embedding(4, 8)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        out: Tensor = self.layer(patches) + self.places(places)
        return out


class Patches(nn.Module):
    """A decoder of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 16)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        out: Tensor = self.layer(tokens.mean(1)).reshape(-1, 4, 4)
        return out


ONE_LOSS = [
    (lambda: with_twin(SimCLRPhase(VIEWS)), encoder, list),
    (lambda: [BarlowTwinsPhase(VIEWS)], encoder, list),
    (lambda: [VICRegPhase(VIEWS)], encoder, list),
    (lambda: [SimSiamPhase(VIEWS)], lambda: {**encoder(), "predictor": nn.Linear(6, 6)}, list),
    (
        lambda: with_twin(BYOLPhase(VIEWS)),
        lambda: student("predictor"),
        lambda: [EMA("student", cosine(total=9, start=0.9, end=1.0), into="teacher")],
    ),
    (lambda: with_twin(MoCoPhase(VIEWS, queue_size=64)), student, lambda: [EMA("student", 0.9, into="teacher")]),
    (
        lambda: [DINOPhase(VIEWS, teacher_temperature=linear(9, 0.04, 0.07))],
        student,
        lambda: [EMA("student", 0.9, into="teacher")],
    ),
    (lambda: with_twin(LeJEPAPhase(VIEWS, num_directions=16)), encoder, list),
    (
        lambda: [MoCoV3Phase(VIEWS)],
        lambda: student("predictor"),
        lambda: [EMA("student", 0.9, into="teacher")],
    ),
    (
        lambda: [MSNPhase(VIEWS)],
        lambda: {**student(), "prototypes": nn.Linear(6, 5, bias=False)},
        lambda: [EMA("student", 0.9, into="teacher")],
    ),
    (lambda: with_twin(HiddenPatches(VIEWS, patch_size=2)), seeing_patches, teacher_moves),
    (lambda: [HiddenBlocks(2, masks=halves)], seeing_blocks, teacher_moves),
    (lambda: [HiddenLayers(2, masks=RandomMasks(0.5))], seeing_layers, teacher_moves),
    (lambda: [NNCLRPhase(VIEWS, queue_size=20)], lambda: {**encoder(), "predictor": nn.Linear(6, 6)}, list),
    (lambda: with_twin(SwAVPhase(VIEWS)), lambda: {**encoder(), "prototypes": nn.Linear(6, 5, bias=False)}, list),
    (lambda: [VAEPhase()], lambda: {"encoder": nn.Linear(16, 8), "decoder": nn.Linear(4, 16)}, list),
    (lambda: [AutoencoderPhase()], lambda: {"encoder": nn.Linear(16, 8), "decoder": nn.Linear(8, 16)}, list),
    (lambda: with_twin(SupConPhase(VIEWS)), encoder, list),
    (lambda: [DistillationPhase()], student, list),
    (lambda: [Triplets()], mlp, list),
    (lambda: [ModelLossPhase()], Tagger, list),
    (lambda: with_fixed_noise(FlowMatchingPhase(**GUIDED)), Noised, list),
    (lambda: with_fixed_noise(DiffusionPhase("velocity", **GUIDED)), Noised, list),
    (lambda: with_fixed_noise(DiffusionPhase("edm", **GUIDED)), Noised, list),
    (lambda: [Images(2, normalize=True)], lambda: {"encoder": Tokens(), "decoder": Patches()}, list),
]
"""Phases of one loss, each with what makes its models and callbacks."""


def changed(xs: Tensor) -> Tensor:
    """Change each row of a batch as an image."""
    colours = xs.reshape(-1, 1, 4, 4).expand(-1, 3, -1, -1)
    jittered = color_jitter(colours, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, probability=0.8)
    blurred = gaussian_blur(random_grayscale(random_flip(jittered, vertical=0.5)), (0.5, 1.0))
    return random_affine(random_resized_crop(blurred), degrees=20)[:, 0].flatten(1)


@pytest.mark.usefixtures("plain")
def test_changes_that_are_drawn_for_each_row_are_part_of_a_graph() -> None:
    _, compiled = both(phases=lambda: [SimCLRPhase(TwoViews(changed))], model=encoder, loss_fn=functional.mse_loss)
    assert graphs(compiled, SimCLRPhase) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("phases", "model", "callbacks"),
    ONE_LOSS,
    ids=[
        *("SimCLR", "Barlow Twins", "VICReg", "SimSiam", "BYOL", "MoCo", "DINO", "LeJEPA", "MoCo v3", "MSN", "DINOv2"),
        *("I-JEPA", "data2vec", "NNCLR", "SwAV"),
        *(
            "VAE",
            "autoencoder",
            "SupCon",
            "distillation",
            "triplets",
            "own loss",
            "flow matching",
            "diffusion",
            "EDM",
            "MAE",
        ),
    ],
)
def test_phases_of_one_loss_are_compiled(phases: Any, model: Any, callbacks: Any) -> None:
    loss_fn = None if type(phases()[0]) is DistillationPhase else functional.mse_loss
    _, compiled = both(phases=phases, model=model, callbacks=callbacks, loss_fn=loss_fn)
    assert graphs(compiled, type(phases()[0])) == 2
    assert compiled._compiled is not None
    made = [graph for each in compiled._compiled._plans[type(phases()[0])]._graphs.values() for graph in each]
    assert all(len(graph._moved) == len(callbacks()) for graph in made)  # teachers move with the update


def test_every_built_in_training_phase_is_compiled_by_a_test() -> None:
    found = {kind for row in ONE_LOSS for kind in type(row[0]()[0]).__mro__}
    found |= {TrainingPhase, GANPhase, CycleGANPhase, PerOptimizerPhase}  # of tests below
    every = [getattr(fluxloop.phases, name) for name in fluxloop.phases.__all__]
    training = [kind for kind in every if issubclass(kind, AbstractTrainingPhase) and kind.compiled]
    assert [kind for kind in training if kind not in found] == []


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_gan_is_compiled_with_a_graph_for_each_kind_of_step() -> None:
    models = lambda: {"G": nn.Linear(8, 16), "D": nn.Linear(16, 1)}  # noqa: E731
    gan = lambda: GANPhase(noise=8, critic_steps=2, gradient_penalty=10.0)  # noqa: E731
    phases = lambda: (lambda phase: [phase, GANValidationPhase(phase)])(gan())  # noqa: E731
    eager, compiled = both(4, phases=phases, model=models, loss_fn=None, optimizer=ADAM)
    assert graphs(compiled, GANPhase) == 4  # with the generator and without, full batches and the ragged one
    assert compiled.history[GANPhase].updates == eager.history[GANPhase].updates == {"D": 12, "G": 6}


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_relativistic_gan_with_lazy_penalties_is_compiled_with_a_graph_for_each_kind_of_step() -> None:
    models = lambda: {"G": nn.Linear(8, 16), "D": nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))}  # noqa: E731
    phases = lambda: [GANPhase("relativistic", noise=8, r1=linear(9, 1.0, 0.1), r2=0.5, every=2)]  # noqa: E731
    _, compiled = both(4, phases=phases, model=models, loss_fn=None, optimizer=ADAM)
    assert graphs(compiled, GANPhase) == 4  # with penalties and without, full batches and the ragged one


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_path_length_penalty_is_compiled_with_its_running_mean() -> None:
    models = lambda: {"G": nn.Sequential(nn.Linear(8, 16), nn.Tanh()), "D": nn.Linear(16, 1)}  # noqa: E731
    phases = lambda: [GANPhase(noise=8, path_length=2.0)]  # noqa: E731
    _, compiled = both(4, phases=phases, model=models, loss_fn=None, optimizer=ADAM)
    assert graphs(compiled, GANPhase) <= 6


@pytest.mark.usefixtures("plain")
def test_adaptive_changes_are_part_of_a_graph_and_their_probability_is_no_constant_of_it() -> None:
    models = lambda: {"G": nn.Linear(8, 16), "D": nn.Linear(16, 1)}  # noqa: E731
    made: list[AdaptiveAugment] = []

    def phases() -> list[Phase]:
        made.append(AdaptiveAugment(changed, target=0.0, every=1, images=200, probability=0.3))
        return [GANPhase(noise=8, r1=0.1, augment=made[-1])]

    _, compiled = both(4, phases=phases, model=models, loss_fn=None, optimizer=ADAM)
    assert graphs(compiled, GANPhase) == 2
    probabilities = [float(each.probability) for each in made if each.state_dict()["updates"]]
    assert len(probabilities) == 2
    assert probabilities[0] == pytest.approx(probabilities[1])
    assert probabilities[0] != pytest.approx(0.3)


class BothKinds(CycleGANPhase):
    """Makes two kinds of the rows."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return super().entries((batch[0], batch[0].flip(1)))


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_cycle_gan_is_compiled_with_its_pools() -> None:
    models = lambda: {  # noqa: E731
        "generators": nn.ModuleDict({"ab": nn.Linear(16, 16), "ba": nn.Linear(16, 16)}),
        "critics": nn.ModuleDict({"a": nn.Linear(16, 1), "b": nn.Linear(16, 1)}),
    }
    _, compiled = both(4, phases=lambda: [BothKinds(pool_size=50)], model=models, loss_fn=None, optimizer=ADAM)
    assert graphs(compiled, BothKinds) <= 4


class TwoRates(PerOptimizerPhase):
    def loss(self, learner: Any, state: Any, name: str | None) -> Tensor:
        loss: Tensor = learner.loss_fn(state.preds, state.ys)
        return loss + learner.model[0].weight.square().sum() if name == "0" else loss


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_one_graph_holds_the_updates_of_several_optimizers_in_order() -> None:
    phases = lambda: [TwoRates(), PerOptimizerValidationPhase(TwoRates())]  # noqa: E731
    optimizers = {"0": SGD, "2": ADAM}
    eager, compiled = both(phases=phases, optimizer=optimizers, callbacks=lambda: [GradientClip(0.5)])
    assert compiled.history[TwoRates].updates == eager.history[TwoRates].updates == {"0": 9, "2": 9}
    assert graphs(compiled, TwoRates) == 2
    assert compiled.history["training/grad_norm_2"] == pytest.approx(eager.history["training/grad_norm_2"], rel=1e-4)


class Nested(AbstractTrainingPhase):
    """A phase of a user's, with entries of its own."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"batch": {"rows": batch[0], "more": [batch[1]], "name": "digits"}}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.preds = learner.model(state.batch["rows"])
        state.seen = {"preds": state.preds.detach() * 2, "number": 3}
        with learner.optimizing() as block:
            block.loss = functional.cross_entropy(state.preds, state.batch["more"][0])

    def finish(self, learner: Any, state: Any) -> None:
        state.mean = state.preds.mean().item()


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_phase_of_ones_own_is_compiled_by_its_entries_body_and_finish() -> None:
    eager, compiled = both(phases=lambda: [Nested()])
    for made in (eager, compiled):
        assert made.step.seen["number"] == 3
        assert isinstance(made.step.mean, float)
        torch.testing.assert_close(made.step.seen["preds"], made.step.preds * 2)
    assert compiled.step.mean == pytest.approx(eager.step.mean, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.* got no gradient in a whole epoch")
@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_shared_parametrized_recurrent_unused_and_normalized_parameters() -> None:
    shared = nn.Linear(16, 16)
    models: list[Callable[[], nn.Module]] = [
        lambda: nn.Sequential(copied := copy.deepcopy(shared), nn.Tanh(), copied, nn.Linear(16, 4)),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))),
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 4))),
        lambda: nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)),
        Recurrent,
        Unused,
    ]
    for model in models:
        both(model=model, tolerance=1e-5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, xs: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(xs.view(-1, 4, 4))[0][:, -1])
        return out


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 4), nn.Linear(3, 3)

    def forward(self, xs: Tensor) -> Tensor:
        out: Tensor = self.used(xs)
        return out


class Rebinding(Unused):
    """Puts another tensor into the place of its buffer, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, xs: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return super().forward(xs) * (1 + 0.1 * self.seen)


@pytest.mark.filterwarnings("ignore:.* got no gradient in a whole epoch")
@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_buffer_that_forward_replaces_counts_on() -> None:
    _, compiled = both(model=Rebinding)
    assert compiled.model.seen == 2 * 9  # training and validation


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_tensors_that_a_loss_function_holds_are_looked_up_not_copied() -> None:
    balance = torch.ones(4)
    made = learner(loss_fn=partial(functional.cross_entropy, weight=balance))
    made.fit(1)
    graph_count = graphs(made)
    balance[:] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    made.fit(1)
    assert graphs(made) == graph_count
    with torch.no_grad():
        expected = functional.cross_entropy(made.model(made.step.xs), made.step.ys, weight=balance)
    torch.testing.assert_close(made.step.loss, expected)  # of the validation step, the last


# What a step leaves


def add(held: dict[str, Any], preds: Tensor) -> None:
    held["out"], held["number"] = preds, 3


def replace(held: dict[str, Any], preds: Tensor) -> None:
    held["rows"], held["more"] = held["more"][0], {"inside": [preds * 2]}


def remove(held: dict[str, Any], preds: Tensor) -> None:
    del held["more"]
    held["list"].pop()


def grow(held: dict[str, Any], preds: Tensor) -> None:
    held["list"] += [preds, held["rows"]]
    held["list"][0] = held["rows"] - 1


class Changing(TrainingPhase):
    """Changes a dict that its batch is."""

    def __init__(self, change: Callable[[dict[str, Any], Tensor], None]) -> None:
        self.change = change

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"held": {"rows": batch[0], "more": [batch[1]], "list": [batch[0], batch[1] + 1]}}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        preds = learner.model(state.held["rows"])
        with learner.optimizing() as block:
            block.loss = functional.cross_entropy(preds, state.held["more"][0])
        self.change(state.held, preds)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("change", [add, replace, remove, grow])
def test_what_a_step_puts_into_a_container_of_its_batch_is_there_after_it(change: Any) -> None:
    seen: list[Any] = []
    look = CustomCallback(
        lambda learner: seen.append(copy.deepcopy(learner.step).held), StepEnd, TrainingPhase, reads=("step.held",)
    )
    both(1, lambda: [Changing(change)], lambda: [look], data=(full(),))
    eager, compiled = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    torch.testing.assert_close(compiled, eager)
    assert len(eager) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_entries_stay_readable_without_graphs_and_gradients_are_not_kept() -> None:
    made = learner()
    made.fit(1, phases=[TrainingPhase()])
    step = made.step
    assert {"xs", "ys", "preds", "loss"} == set(vars(step))
    assert not step.loss.requires_grad
    assert step.preds.shape == (ROWS % 32, 4)
    assert all(parameter.grad is None for parameter in made.model.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_events_outside_and_counts_of_updates_are_as_ever() -> None:
    heard: list[str] = []

    class Note(Callback):
        in_compiled_step = "after"

        @on(StepBegin)
        @on(StepEnd)
        @on(LossBegin)
        @on(BackwardBegin)
        @on(UpdateBegin)
        def note(self, event: Any, phase: Any, learner: Any) -> None:
            heard.append(type(event).__name__)

    learner(callbacks=[Note()]).fit(1, phases=[TrainingPhase()])
    one = ["StepBegin", "LossBegin", "BackwardBegin", "UpdateBegin", "StepEnd"]
    assert heard == one * 3


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_a_graph_made_before_a_step_cannot_be_differentiated_after_it(optimizer: Any) -> None:
    for compile in (False, "step"):
        made = learner(compile, optimizer=optimizer, data=(full(),))
        made.fit(2)
        late = made.model(rows()[0]).sum()
        made.fit(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


@pytest.mark.slow
@pytest.mark.usefixtures("imported", "plain")
@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: (model.compile(backend="eager"), model)[1],
    ],
    ids=["torch.compile", "model.compile"],
)
def test_a_model_that_the_user_has_compiled_is_part_of_the_graph(prepare: Any) -> None:
    eager, compiled = both(model=lambda: prepare(mlp()))
    assert graphs(compiled) >= 1
    plain = learner(False)
    plain.fit(3)
    for a, b in zip(weights(plain), weights(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
