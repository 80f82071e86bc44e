from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

import by_hand
from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    BYOLPhase,
    Callback,
    CancelEpochException,
    CustomCallback,
    DataError,
    EpochBegin,
    EpochEnd,
    FeatureStats,
    KNNProbe,
    Learner,
    LinearProbe,
    MetricError,
    Metrics,
    MetricSource,
    MissingEntryError,
    MissingProducerError,
    ModelError,
    PhaseError,
    ProbePhase,
    Recorder,
    SimCLRPhase,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    TwoViews,
    ViewDataset,
    cosine,
    runstep,
    start_generators,
    stream_seed,
)
from fluxloop.callbacks.features import extract
from fluxloop.testing import assert_observer, assert_order, assert_same_bits, bits
from toys import through_a_file

SEED = 6
ROWS, BATCH = 24, 8

adam = partial(torch.optim.Adam, lr=0.01)


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ys = torch.arange(ROWS) % 3
    return torch.randn(ROWS, 5, generator=generator) + ys[:, None], ys


class Drawing(Dataset[tuple[Tensor, Tensor]]):
    """Rows with noise from torch, NumPy and Python, drawn when a row is fetched."""

    def __init__(self) -> None:
        self.xs, self.ys = rows()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(()) + np.random.randn() + random.random()
        return (self.xs[index] + 0.1 * noise).float(), self.ys[index]


def noisy(xs: Tensor) -> Tensor:
    """Draw a view, with numbers of torch, NumPy and Python."""
    return xs + 0.1 * torch.randn_like(xs) + 0.1 * (np.random.randn() + random.gauss(0, 1))


def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))
    return {"encoder": encoder, "projector": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))}


def learner_of(*callbacks: Callback, model: Any = None, data: Any = None, **options: Any) -> Learner:
    return Learner(
        models() if model is None else model,
        data=(TensorBatches(*rows(), batch_size=BATCH, shuffle=True), rows(1)) if data is None else data,
        optimizer=adam,
        callbacks=[Recorder(), Metrics(), *callbacks],
        seed=SEED,
        **{"default_callbacks": False, **options},
    )


def simclr() -> SimCLRPhase:
    return SimCLRPhase(TwoViews(noisy))


def train(learner: Learner, epochs: int = 2) -> Learner:
    learner.fit(epochs, phases=[simclr()])
    return learner


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def supervised(*callbacks: Callback) -> Learner:
    learner = learner_of(*callbacks, model=classifier())
    learner.loss_fn = cross_entropy
    return learner


def probes() -> list[Callback]:
    return [
        KNNProbe("encoder", k=3),
        KNNProbe("encoder", bank=Drawing(), queries=Drawing(), metric="noisy"),
        LinearProbe("encoder", 3),
        LinearProbe("encoder", 3, queries=Drawing(), metric="noisy_linear", optimizer=torch.optim.SGD),
    ]


# Watching changes nothing


def generators() -> dict[str, str]:
    """Give the states of the global generators, short enough to be read where they differ."""
    _, key, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": key.tobytes() + repr(rest).encode(),
        "python": repr(random.getstate()).encode(),
    }
    return {name: sha256(state).hexdigest() for name, state in states.items()}


class Traced(SimCLRPhase):
    """Notes what every step sees: rows, views, generators, modes of all submodules."""

    def __init__(self) -> None:
        super().__init__(TwoViews(noisy))
        self.trace: list[Any] = []

    def step(self, learner: Learner, batch: Any) -> Any:
        state = super().step(learner, batch)
        modes = [module.training for model in learner.modules() for module in model.modules()]
        self.trace.append(([state.xs.tolist(), *(view.tolist() for view in state.views)], modes))
        return state


def with_own_generator() -> DataLoader[Any]:
    return DataLoader(Drawing(), batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(3))


SOURCES: dict[str, Callable[[], Any]] = {
    "shuffled tensors": lambda: TensorBatches(*rows(), batch_size=BATCH, shuffle=True),
    "seeded tensors": lambda: TensorBatches(*rows(), batch_size=BATCH, shuffle=True, seed=2),
    "loader": lambda: DataLoader(Drawing(), batch_size=BATCH, shuffle=True),
    "loader with 2 workers": lambda: DataLoader(Drawing(), batch_size=BATCH, shuffle=True, num_workers=2),
    "loader with workers that stay": lambda: DataLoader(
        Drawing(), batch_size=BATCH, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "loader with a generator of its own": with_own_generator,
}


def traced(callbacks: Callable[[Any], list[Callback]], source: Any) -> tuple[Learner, list[Any], dict[str, str]]:
    """Train; give the learner, what each step saw, and the generators' states afterwards."""
    learner, phase = learner_of(*callbacks(source), data=(source, rows(1))), Traced()
    learner.fit(2, phases=[phase])
    after = generators()
    learner.data.training = []  # ends the workers
    return learner, phase.trace, after


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_weights_data_order_modes_and_random_numbers_are_the_same_to_the_bit_with_and_without_probes(
    source: str,
) -> None:
    start_generators(8)
    plain, trace, after = traced(lambda data: [], SOURCES[source]())
    start_generators(8)
    watched, watched_trace, watched_after = traced(lambda data: probes(), SOURCES[source]())
    assert len(trace) == 6
    assert trace == watched_trace
    assert after == watched_after
    assert_same_bits(plain, watched)
    modes = [[module.training for model in each.modules() for module in model.modules()] for each in (plain, watched)]
    assert modes[0] == modes[1]
    for name in ("knn_encoder", "noisy", "linear_encoder", "noisy_linear"):
        assert len(watched.history[f"validation/{name}"]) == 2


def test_a_loader_given_as_bank_keeps_its_own_generator_and_its_place() -> None:
    shared = with_own_generator()
    start_generators(8)
    plain, trace, after = traced(lambda data: [], with_own_generator())
    start_generators(8)
    watched, watched_trace, watched_after = traced(
        lambda data: [KNNProbe("encoder", bank=data, queries=data), LinearProbe("encoder", 3, queries=data)], shared
    )
    assert trace == watched_trace
    assert after == watched_after
    assert_same_bits(plain, watched)


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("kind", ["loader", "batches", "list of batches", "rows", "dataset"])
def test_data_of_its_own_is_anything_that_gives_labelled_batches(kind: str) -> None:
    xs, ys = rows(2)
    data: dict[str, Any] = {
        "loader": DataLoader(TensorDataset(xs, ys), batch_size=5),
        "batches": TensorBatches(xs, ys, batch_size=5),
        "list of batches": [(xs[:10], ys[:10]), (xs[10:], ys[10:])],
        "rows": (xs, ys),
        "dataset": TensorDataset(xs, ys),
    }
    learner = train(learner_of(KNNProbe("encoder", bank=data[kind], queries=data[kind], k=3)), 1)
    assert learner.history["validation/knn_encoder"] == [neighbours(learner, (xs, ys), (xs, ys), 3)]


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize(
    "make",
    [
        lambda: KNNProbe("model"),
        lambda: KNNProbe("model", bank=Drawing(), queries=Drawing()),
        lambda: LinearProbe("model", 3, entries=("preds", "ys")),
        lambda: LinearProbe("model", 3, entries=("preds", "ys"), queries=Drawing()),
    ],
)
def test_a_supervised_training_is_observed_without_a_trace(make: Callable[[], Callback]) -> None:
    assert_observer(make(), supervised)


def test_a_submodule_in_a_mode_of_its_own_gets_it_back() -> None:
    modes: list[list[bool]] = []

    class Frozen(SimCLRPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            learner.model.encoder[1].eval()  # a batch norm that keeps its statistics
            return super().step(learner, batch)

    look = CustomCallback(
        lambda learner: modes.append([module.training for module in learner.model.encoder.modules()]),
        EpochEnd,
        reads=("model", "cbstate.metrics"),
    )
    learner = learner_of(KNNProbe("encoder"), look)
    assert_order(learner, KNNProbe, "CustomCallback")
    learner.fit(1, phases=[Frozen(TwoViews(noisy))])
    assert modes == [[True, True, False, True, True, True]]


@pytest.mark.parametrize("probe", [KNNProbe, LinearProbe])
def test_modes_and_the_bank_are_put_back_after_an_error(probe: Any) -> None:
    loader = with_own_generator()
    before = loader.generator.get_state()
    encoder = models()["encoder"].train()
    encoder[3].eval()
    modes = [module.training for module in encoder.modules()]

    def broken(module: nn.Module, xs: Tensor) -> Tensor:
        assert not module.training
        assert not torch.is_grad_enabled()
        raise RuntimeError("no features")

    with pytest.raises(RuntimeError, match="no features"):
        extract(encoder, loader, broken)
    assert [module.training for module in encoder.modules()] == modes
    assert torch.equal(loader.generator.get_state(), before)
    assert torch.is_grad_enabled()
    learner = learner_of(probe("encoder", features=broken))
    with pytest.raises(RuntimeError, match="no features"):
        train(learner, 1)
    assert not any(module.training is False for module in learner.model.encoder.modules())
    assert torch.is_grad_enabled()


# Values


def features_of(module: nn.Module, xs: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(module).eval()(xs).flatten(1)


def neighbours(learner: Learner, bank: Any, queries: Any, k: int, model: str = "encoder") -> float:
    """Give the share of rows that scikit-learn classifies rightly, with neighbours weighted alike."""
    module = learner.weights[model]
    votes = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    votes.fit(features_of(module, bank[0]).double().numpy(), bank[1].numpy())
    predicted = votes.predict(features_of(module, queries[0]).double().numpy())
    return pytest.approx(float((predicted == queries[1].numpy()).mean()))  # type: ignore[no-any-return]


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("k", [1, 4, 100])
def test_the_neighbours_equal_those_of_scikit_learn(k: int) -> None:
    learner = learner_of(KNNProbe("encoder", k=k))
    for _ in range(2):
        train(learner, 1)
        expected = neighbours(learner, rows(), rows(1), min(k, ROWS))  # no more neighbours than rows
        assert learner.history["validation/knn_encoder"][-1] == expected


def test_a_classifier_that_knows_the_classes_is_right_and_one_of_noise_is_not() -> None:
    _, ys = rows()
    one_hot = torch.eye(3)[ys]
    learner = learner_of(
        KNNProbe("encoder", bank=(one_hot, ys), queries=(one_hot, ys), features=lambda module, xs: xs, metric="all"),
        KNNProbe(
            "encoder",
            bank=(one_hot, ys),
            queries=(one_hot, ys.roll(1)),
            features=lambda module, xs: xs,
            metric="none",
            k=1,
        ),
    )
    train(learner, 1)
    assert learner.history["validation/all"] == [1.0]
    assert learner.history["validation/none"] == [0.0]


def test_the_bank_is_the_training_data_and_the_queries_the_validation_data() -> None:
    learner = train(
        learner_of(KNNProbe("encoder", k=5), KNNProbe("encoder", bank=rows(), queries=rows(1), k=5, metric="x"))
    )
    assert learner.history["validation/knn_encoder"] == learner.history["validation/x"]
    other = train(learner_of(KNNProbe("encoder", queries=rows(), k=1)))
    assert other.history["validation/knn_encoder"][-1] == 1.0  # each row finds itself


def test_data_given_to_the_fit_alone_is_used() -> None:
    learner = learner_of(KNNProbe("encoder", k=3), data=())
    learner.fit(1, data=(rows(), rows(1)), phases=[simclr()])
    assert learner.history["validation/knn_encoder"] == [neighbours(learner, rows(), rows(1), 3)]


def linear_by_hand(
    steps: list[tuple[Tensor, Tensor]], optimizer: Callable[..., torch.optim.Optimizer], metric: str
) -> nn.Linear:
    """Train a linear classifier on the steps' features in plain PyTorch."""
    start_generators(stream_seed(SEED, f"LinearProbe/{metric}"))
    probe = nn.Linear(4, 3)
    by_hand.train(probe, cross_entropy, optimizer(probe.parameters()), steps)
    return probe


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.Adam, lr=1e-2), partial(torch.optim.SGD, lr=0.5, momentum=0.9)]
)
def test_the_linear_probe_equals_a_hand_written_one_on_the_same_features_to_the_bit(optimizer: Any) -> None:
    steps: list[tuple[Tensor, Tensor]] = []
    keep = CustomCallback(
        lambda learner: steps.append((learner.step.features.detach().clone(), learner.step.ys.clone())),
        StepEnd,
        AbstractTrainingPhase,
        reads=("step.features", "step.ys"),
    )
    learner = learner_of(LinearProbe("encoder", 3, optimizer=optimizer), keep)
    train(learner, 3)
    probe = linear_by_hand(steps, optimizer, "linear_encoder")
    kept = learner.get_callback(LinearProbe).state_dict()["probe"]
    assert torch.equal(kept["weight"], probe.weight)
    assert torch.equal(kept["bias"], probe.bias)
    xs, ys = rows(1)
    with torch.no_grad():
        right = (probe(features_of(learner.model.encoder, xs)).argmax(1) == ys).float().mean().item()
    assert learner.history["validation/linear_encoder"][-1] == right
    assert len(steps) == 9


@pytest.mark.slow
def test_the_linear_probe_learns_what_the_features_hold() -> None:
    xs, ys = rows()
    learner = learner_of(
        LinearProbe("encoder", 3, features=lambda module, xs: xs, entries=("xs", "ys"), queries=(xs, ys))
    )
    train(learner, 60)
    found = learner.history["validation/linear_encoder"]
    assert found[-1] > 0.9 > found[0]


@pytest.mark.slow
def test_no_gradient_of_a_linear_probe_reaches_the_model() -> None:
    seen: list[Any] = []

    class Look(SimCLRPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            state = super().step(learner, batch)
            seen.append([p.grad.clone() for p in learner.model.encoder.parameters()])
            return state

    gradients = []
    for callbacks in ([], [LinearProbe("encoder", 3)]):
        seen.clear()
        learner_of(*callbacks).fit(1, phases=[Look(TwoViews(noisy))])
        gradients.append([list(step) for step in seen])
    for plain, watched in zip(*gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_module_without_parameters_can_be_measured() -> None:
    features, labels = extract(nn.Flatten(), [rows()])
    assert torch.equal(features, rows()[0])
    assert torch.equal(labels, rows()[1])


# Which weights


def test_the_metric_carries_the_name_of_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    learner = learner_of(
        EMA("encoder", 0.9),
        KNNProbe("encoder"),
        KNNProbe("encoder@ema"),
        KNNProbe("encoder.0"),
        LinearProbe("encoder@ema", 3),
        default_callbacks=True,
    )
    train(learner, 1)
    names = ["knn_encoder", "knn_encoder.0", "knn_encoder@ema", "linear_encoder@ema"]
    assert sorted(learner.history.metrics[ProbePhase]) == names
    (line,) = capsys.readouterr().out.splitlines()
    assert all(f"{name} 0." in line or f"{name} 1" in line for name in names)
    assert {row["phase"] for row in learner.history.rows() if row["metric"] in names} == {"ProbePhase"}


def test_a_probe_of_an_average_runs_after_it_and_sees_the_newest() -> None:
    seen: list[tuple[nn.Module, Tensor]] = []

    def features(module: nn.Module, xs: Tensor) -> Tensor:
        seen.append((module, module[0].weight.clone()))
        return module(xs)

    learner = learner_of(EMA("encoder", 0.5), KNNProbe("encoder@ema", features=features, k=3))
    assert_order(learner, EMA, KNNProbe)
    for _ in range(2):
        seen.clear()
        train(learner, 1)
        average = learner.weights["encoder@ema"]
        assert all(module is average and torch.equal(weight, average[0].weight) for module, weight in seen)
        assert not torch.equal(average[0].weight, learner.model.encoder[0].weight)
        expected = neighbours(learner, rows(), rows(1), 3, "encoder@ema")
        assert learner.history["validation/knn_encoder@ema"][-1] == expected


def test_the_order_of_average_and_probe_is_that_of_no_list() -> None:
    given = [EMA("encoder"), KNNProbe("encoder@ema"), LinearProbe("encoder@ema", 3)]
    digests = {learner_of(*order).callbacks.digest for order in (given, given[::-1])}
    assert len(digests) == 1


def byol() -> dict[str, nn.Module]:
    student = models()["encoder"]
    torch.manual_seed(2)
    return {
        "student": student,
        "teacher": copy.deepcopy(student).requires_grad_(False),
        "predictor": nn.Linear(4, 4),
    }


def test_the_teacher_of_byol_is_measured_as_it_is_moved() -> None:
    learner = learner_of(EMA("student", cosine(6, 0.5, 1.0), into="teacher"), KNNProbe("teacher", k=3), model=byol())
    assert_order(learner, EMA, KNNProbe)
    learner.fit(2, phases=[BYOLPhase(TwoViews(noisy))])
    assert learner.history["validation/knn_teacher"][-1] == neighbours(learner, rows(), rows(1), 3, "teacher")
    plain = learner_of(EMA("student", cosine(6, 0.5, 1.0), into="teacher"), model=byol())
    plain.fit(2, phases=[BYOLPhase(TwoViews(noisy))])
    assert_same_bits(plain, learner)
    assert not torch.equal(learner.model.teacher[0].weight, byol()["teacher"][0].weight)


def test_a_part_of_a_single_model_is_measured_by_its_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = models()
            self.encoder, self.projector = parts["encoder"], parts["projector"]

        def forward(self, xs: Tensor) -> Tensor:
            return self.projector(self.encoder(xs))

    learner = train(learner_of(KNNProbe("encoder", k=3), LinearProbe("model.encoder", 3, metric="linear"), model=Net()))
    assert learner.history["validation/knn_encoder"][-1] == neighbours(learner, rows(), rows(1), 3)
    assert len(learner.history["validation/linear"]) == 2


# When


def test_it_measures_after_every_so_many_epochs() -> None:
    learner = train(learner_of(KNNProbe("encoder", every=2), LinearProbe("encoder", 3, every=3)), 6)
    epochs = {
        name: [row["epoch"] for row in learner.history.rows() if row["metric"] == name]
        for name in ("knn_encoder", "linear_encoder")
    }
    assert epochs == {"knn_encoder": [2, 4, 6], "linear_encoder": [3, 6]}


@pytest.mark.parametrize("every", [0, -1])
@pytest.mark.parametrize("probe", [KNNProbe, LinearProbe, FeatureStats])
def test_measuring_every_no_epochs_is_refused(probe: Any, every: int) -> None:
    with pytest.raises(ValueError, match="expected a whole number, 1 or more"):
        probe("encoder", every=every)


def test_an_epoch_that_was_cancelled_at_once_is_measured_where_there_is_something_to_measure() -> None:
    def cancel(learner: Any) -> None:
        raise CancelEpochException

    learner = learner_of(
        KNNProbe("encoder"), LinearProbe("encoder", 3), CustomCallback(cancel, EpochBegin, reads=(), name="cancel")
    )
    train(learner, 1)
    assert sorted(learner.history.metrics[ProbePhase]) == ["knn_encoder"]  # no probe has begun


def test_evaluation_measures_nothing() -> None:
    learner = supervised(KNNProbe("model"))
    learner.fit(1)
    assert list(learner.evaluate()) == ["loss"]
    assert len(learner.history["validation/knn_model"]) == 1


def test_what_probes_record_stands_for_no_phase_that_could_run() -> None:
    learner = learner_of(KNNProbe("encoder"))
    with pytest.raises(PhaseError, match="ProbePhase stands for what probes record"):
        learner.epoch(ProbePhase())


# Mistakes


@pytest.mark.parametrize("probe", [KNNProbe, LinearProbe])
def test_unknown_weights_are_an_error_when_the_learner_is_built(probe: Any) -> None:
    with pytest.raises(ModelError, match=r"no weights 'encodr'.*did you mean 'encoder'"):
        learner_of(probe("encodr"))
    with pytest.raises(MissingProducerError, match=r"reads 'model\.encoder@ema'.*EMA\('encoder', 0\.999\)"):
        learner_of(probe("encoder@ema"))


def two_views_of_rows() -> Any:
    return ViewDataset(TensorDataset(*rows()), TwoViews(noisy))


def unlabelled_views() -> Any:
    return ViewDataset(rows()[0], TwoViews(noisy))


NO_LABELS: dict[str, tuple[Callable[[], Any], Callable[[], SimCLRPhase], str]] = {
    "rows without labels": (lambda: rows()[0], simclr, r"given a Tensor of shape \(8, 5\)|given .*\(24, 5\)"),
    "rows in a tuple": (lambda: TensorDataset(rows()[0]), simclr, "given a list of length 1"),
    "labelled views": (two_views_of_rows, SimCLRPhase, "a list of length 2, such as several views"),
    "views without labels": (unlabelled_views, SimCLRPhase, r"labels.* a Tensor of shape \(24, 5\) of torch\.float32"),
    "labels of another shape": (lambda: (rows()[0], rows()[1][:, None]), simclr, r"\(24, 1\) of torch\.int64"),
    "one-hot labels": (lambda: (rows()[0], torch.eye(3)[rows()[1]]), simclr, r"\(24, 3\) of torch\.float32"),
    "labels that are no whole numbers": (lambda: (rows()[0], rows()[1] + 0.5), simclr, r"\(24,\) of torch\.float32"),
}


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("kind", NO_LABELS)
def test_training_data_without_labels_says_what_is_expected(kind: str) -> None:
    data, phase, words = NO_LABELS[kind]
    learner = learner_of(KNNProbe("encoder", k=3), data=(data(), rows(1)))
    with pytest.raises(DataError, match=rf"({words}).*bank=\(xs, ys\), queries=\(xs, ys\)"):
        learner.fit(1, phases=[phase()])


BAD_QUERIES: dict[str, Callable[[], Any]] = {
    "no labels": lambda: rows()[0],
    "labels of another shape": lambda: (rows()[0], rows()[1][:, None]),
    "one-hot labels": lambda: (rows()[0], torch.eye(3)[rows()[1]]),
    "labels that are no whole numbers": lambda: (rows()[0], rows()[1] + 0.5),
    "dictionaries": lambda: {"x": rows()[0], "y": rows()[1]},
}


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("kind", BAD_QUERIES)
@pytest.mark.parametrize("make", [partial(KNNProbe, "encoder"), partial(LinearProbe, "encoder", 3)])
def test_queries_without_labels_say_what_is_expected(make: Any, kind: str) -> None:
    learner = learner_of(make(queries=BAD_QUERIES[kind]()))
    with pytest.raises(DataError, match=r"expected .*queries=\(xs, ys\)"):
        train(learner, 1)


@pytest.mark.parametrize("probe", [KNNProbe, LinearProbe])
def test_missing_data_is_an_error_before_the_first_step(probe: Any) -> None:
    learner = learner_of(probe("encoder"), data=(rows(),))
    before = bits(learner)
    with pytest.raises(DataError, match=rf"no.*{probe.__name__}\('encoder', queries=\(xs, ys\)"):
        train(learner, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(learner).items())
    assert learner.history[SimCLRPhase].steps == 0


def test_features_that_are_no_tensor_are_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(5, 4)

        def forward(self, xs: Tensor) -> tuple[Tensor, Tensor]:
            return self.out(xs), self.out(xs)

    with pytest.raises(DataError, match=r"a tuple of length 2 from Two; .*features=lambda module, xs: module\(xs\)"):
        extract(Two(), [rows()])
    features, _ = extract(Two(), [rows()], lambda module, xs: module(xs)[0])
    assert features.shape == (ROWS, 4)


def test_features_that_are_not_finite_are_recorded_as_such_and_end_nothing() -> None:
    def broken(module: nn.Module, xs: Tensor) -> Tensor:
        return module(xs) * float("nan")

    learner = train(learner_of(KNNProbe("encoder", features=broken)), 2)
    assert len(learner.history["validation/knn_encoder"]) == 2
    assert all(value != value for value in learner.history["validation/knn_encoder"])


def test_an_iterator_is_refused_since_it_would_be_empty_the_second_time() -> None:
    for given in ({"bank": iter([rows()])}, {"queries": iter([rows()])}):
        with pytest.raises(DataError, match="can be iterated once only"):
            train(learner_of(KNNProbe("encoder", **given)), 1)
    with pytest.raises(DataError, match="can be iterated once only"):
        train(learner_of(KNNProbe("encoder"), data=(iter([rows()]), rows(1))), 1)


def test_an_empty_bank_is_an_error() -> None:
    with pytest.raises(DataError, match="gave a probe no batch; expected labelled rows"):
        train(learner_of(KNNProbe("encoder", bank=[])), 1)


def test_a_phase_without_features_or_labels_is_told_what_the_step_has() -> None:
    with pytest.raises(MissingEntryError, match=r"no entry 'ys'; it has: features.*z1"):
        train(learner_of(LinearProbe("encoder", 3), data=(rows()[0], rows(1))), 1)
    with pytest.raises(MissingEntryError, match="no entry 'features'; it has: grads, loss, preds, xs, ys"):
        supervised(LinearProbe("model", 3)).fit(1)


def test_two_probes_of_one_metric_are_refused_with_what_to_type() -> None:
    with pytest.raises(MetricError, match=r"both record the metric 'knn_encoder'.*metric='\.\.\.'"):
        learner_of(KNNProbe("encoder"), KNNProbe("encoder", k=1))
    with pytest.raises(MetricError, match="'knn_encoder'"):
        learner_of(KNNProbe("encoder"), LinearProbe("encoder", 3, metric="KNN_encoder"))
    train(learner_of(KNNProbe("encoder"), KNNProbe("encoder", k=1, metric="nearest")), 1)


def test_no_neighbours_at_all_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"k=0\) was given; expected a whole number, 1 or more"):
        train(learner_of(KNNProbe("encoder", k=0)), 1)


@pytest.mark.parametrize("probe", [KNNProbe, LinearProbe, FeatureStats])
def test_without_a_recorder_it_says_who_counts_epochs(probe: Any) -> None:
    with pytest.raises(MissingProducerError, match=r"reads 'cbstate\.history'.*Recorder\(\)"):
        Learner(models(), data=(rows(),), callbacks=[probe("encoder")], default_callbacks=False)


# State


@pytest.mark.slow
def test_a_linear_probe_goes_on_from_its_state_to_the_same_bits() -> None:
    whole = train(learner_of(LinearProbe("encoder", 3)), 4)
    learner = train(learner_of(LinearProbe("encoder", 3)), 2)
    state = through_a_file(learner.get_callback(LinearProbe).state_dict())
    fresh = LinearProbe("encoder", 3)
    learner.replace_callback(fresh)
    fresh.load_state_dict(state)
    train(learner, 2)
    assert_same_bits(whole, learner)
    first, second = (each.get_callback(LinearProbe).state_dict() for each in (whole, learner))
    assert torch.equal(first["probe"]["weight"], second["probe"]["weight"])
    assert torch.equal(first["optimizer"]["state"][0]["exp_avg"], second["optimizer"]["state"][0]["exp_avg"])
    assert whole.history["validation/linear_encoder"] == learner.history["validation/linear_encoder"]


def test_restoring_a_linear_probe_draws_no_random_numbers() -> None:
    learner = train(learner_of(LinearProbe("encoder", 3)), 1)
    probe = learner.get_callback(LinearProbe)
    state = through_a_file(probe.state_dict())
    before = generators()
    probe.load_state_dict(state)
    assert generators() == before


def test_a_linear_probe_that_has_not_begun_has_an_empty_state() -> None:
    probe = LinearProbe("encoder", 3)
    learner = learner_of(probe)
    assert probe.state_dict() == {}
    train(learner, 1)
    probe.load_state_dict({})
    assert probe.state_dict() == {}


def test_in_a_second_learner_a_linear_probe_begins_anew() -> None:
    probe = LinearProbe("encoder", 3)
    first, second = train(learner_of(probe), 1), train(learner_of(probe), 1)
    assert first.history["validation/linear_encoder"] == second.history["validation/linear_encoder"]


# A user's own


@define
class Norms(MetricSource):
    """Records the norm of the encoder's first weights."""

    name_: str = "norm"
    recorded_as = None
    draws = False
    reads = ("model.encoder", "cbstate.history")

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (self.name_,)

    def measure(self, learner: Any) -> Mapping[str, Any]:
        return {self.name_: learner.weights["encoder"][0].weight.norm()}


def test_a_source_of_a_users_own_records_beside_the_metrics_of_its_phase() -> None:
    learner = train(learner_of(Norms(every=2), Norms("other"), KNNProbe("encoder")), 4)
    assert_order(learner, Metrics, Norms)
    assert len(learner.history["training/norm"]) == 2
    assert len(learner.history["training/other"]) == 4
    norm = learner.model.encoder[0].weight.norm().item()
    assert learner.history["training/norm"][-1] == learner.history["training/other"][-1] == norm
    assert isinstance(learner.history["training/norm"][0], float)


def test_a_source_works_without_metrics_of_others() -> None:
    learner = Learner(models(), data=(rows(),), callbacks=[Recorder(), Norms()], default_callbacks=False, seed=0)
    train(learner, 1)
    assert len(learner.history["training/norm"]) == 1


def test_a_step_of_a_phase_without_labels_can_be_watched_by_neighbours_with_data_of_their_own() -> None:
    class Denoise(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, clean=batch) as (_, state):
                state.features = learner.model.encoder(noisy(state.clean))
                learner.backward(learner.model.projector(state.features).square().mean())
                learner.update()

    learner = learner_of(KNNProbe("encoder", bank=rows(), queries=rows(1), k=3), data=(rows()[0],))
    learner.fit(1, phases=[Denoise()])
    assert learner.history["validation/knn_encoder"] == [neighbours(learner, rows(), rows(1), 3)]
