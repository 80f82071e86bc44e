from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics.classification import MulticlassF1Score

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    Checkpointer,
    CheckpointError,
    CustomCallback,
    DataError,
    EarlyStopping,
    Learner,
    LearningRate,
    LinearProbe,
    LossError,
    Metric,
    MetricError,
    Metrics,
    MissingEntryError,
    OptimizerError,
    Recorder,
    SimCLRPhase,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    TwoViews,
    WeightDecay,
    accuracy,
    cosine,
    start_generators,
    stream_seed,
    top_k,
)
from fluxloop.testing import assert_observer, assert_same_bits

SEED, ROWS = 6, 24


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ys = torch.arange(ROWS) % 3
    return torch.randn(ROWS, 5, generator=generator) + ys[:, None], ys


def learner_of(*callbacks: Callback, data: Any = None) -> Learner:
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    return Learner(
        {"encoder": encoder, "projector": nn.Linear(4, 4)},
        data=(TensorBatches(*rows(), batch_size=8, shuffle=True), rows(1)) if data is None else data,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        callbacks=[Recorder(), Metrics(), *callbacks],
        default_callbacks=False,
        seed=SEED,
    )


def simclr() -> SimCLRPhase:
    return SimCLRPhase(TwoViews(lambda xs: xs + 0.1 * torch.randn_like(xs)))


def train(learner: Learner, epochs: int = 2, **options: Any) -> Learner:
    learner.fit(epochs, phases=[simclr()], **options)
    return learner


def deep(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 3))


SGD = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
SCHEDULE = cosine(total=6, start=0.3, end=0.01)


def features_of(learner: Learner, xs: Tensor) -> Tensor:
    encoder = learner.model.encoder.eval()
    with torch.no_grad():
        found: Tensor = encoder(xs)
    encoder.train()
    return found


def by_hand(steps: list[tuple[Tensor, Tensor]], metric: str) -> nn.Module:
    """Train the deep head on the steps' features in plain PyTorch."""
    start_generators(stream_seed(SEED, f"LinearProbe/{metric}"))
    head = deep(4)
    optimizer = SGD(head.parameters())
    for index, (features, ys) in enumerate(steps):
        optimizer.param_groups[0]["lr"] = SCHEDULE(index)
        optimizer.param_groups[0]["weight_decay"] = 0.1 * (index + 1)
        start_generators(stream_seed(SEED, f"LinearProbe/{metric}/step", index))
        optimizer.zero_grad()
        cross_entropy(head(features), ys, label_smoothing=0.1).backward()
        optimizer.step()
    return head.eval()


def full_probe(**options: Any) -> LinearProbe:
    given: dict[str, Any] = {
        "head": deep,
        "optimizer": SGD,
        "schedule": {LearningRate: SCHEDULE, WeightDecay: lambda step: 0.1 * (step + 1)},
        "loss": lambda outputs, ys: cross_entropy(outputs, ys, label_smoothing=0.1),
        "metrics": {"accuracy": accuracy, "Top2": top_k(2), "f1": MulticlassF1Score(3)},
    }
    return LinearProbe("encoder", 3, **{**given, **options})


def test_head_optimizer_schedule_loss_and_metrics_equal_a_hand_written_loop_to_the_bit() -> None:
    steps: list[tuple[Tensor, Tensor]] = []
    keep = CustomCallback(
        lambda learner: steps.append((learner.step.features.detach().clone(), learner.step.ys.clone())),
        StepEnd,
        AbstractTrainingPhase,
        reads=("step.features", "step.ys"),
    )
    learner = train(learner_of(full_probe(), keep))
    head = by_hand(steps, "linear_encoder")
    kept = learner.get_callback(LinearProbe).state_dict()["probe"]
    assert kept.keys() == head.state_dict().keys()
    assert all(torch.equal(kept[name], value) for name, value in head.state_dict().items())
    xs, ys = rows(1)
    with torch.no_grad():
        outputs = head(features_of(learner, xs))
    expected = {
        "accuracy": (outputs.argmax(1) == ys).float().mean().item(),
        "top2": top_k(2)(outputs, ys).item(),
        "f1": MulticlassF1Score(3)(outputs, ys).item(),
    }
    for name, value in expected.items():
        assert learner.history[f"validation/linear_encoder_{name}"][-1] == pytest.approx(value)
    assert "linear_encoder" not in [row["metric"] for row in learner.history.rows()]


def test_it_changes_nothing_of_the_training() -> None:
    assert_same_bits(train(learner_of()), train(learner_of(full_probe())))

    def supervised(*callbacks: Callback) -> Learner:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        data = (TensorBatches(*rows(), batch_size=8, shuffle=True), rows(1))
        return Learner(model, cross_entropy, data=data, callbacks=[Recorder(), Metrics(), *callbacks], seed=SEED)

    probe = LinearProbe("model", 3, head=nn.Sequential(nn.Dropout(0.5), nn.LazyLinear(3)), entries=("preds", "ys"))
    assert_observer(probe, supervised)


def test_a_module_is_copied_and_begins_anew_in_each_learner() -> None:
    head = nn.Linear(4, 3).eval()
    before = head.weight.clone()
    probe = LinearProbe("encoder", 3, head=head)
    first, second = train(learner_of(probe)), train(learner_of(probe))
    assert torch.equal(head.weight, before)
    assert first.history["validation/linear_encoder"] == second.history["validation/linear_encoder"]
    assert not torch.equal(second.get_callback(LinearProbe).state_dict()["probe"]["weight"], before)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Any) -> None:
    whole = train(learner_of(full_probe()), 3)
    for epochs in (1, 3):
        learner = learner_of(full_probe(), Checkpointer(tmp_path / "run", every=2, unit="step"))
        train(learner, epochs, resume=tmp_path / "run")
    kept, expected = (each.get_callback(LinearProbe).state_dict() for each in (learner, whole))
    assert kept["steps"] == expected["steps"] == 9
    assert all(torch.equal(kept["probe"][name], value) for name, value in expected["probe"].items())
    for name in ("accuracy", "top2", "f1"):
        name = f"validation/linear_encoder_{name}"
        assert learner.history[name] == whole.history[name]


def test_a_state_from_before_steps_were_counted_is_loaded() -> None:
    learner = train(learner_of(LinearProbe("encoder", 3)), 1)
    state = dict(learner.get_callback(LinearProbe).state_dict())
    del state["steps"]
    fresh = LinearProbe("encoder", 3)
    learner.replace_callback(fresh)
    fresh.load_state_dict(state)
    train(learner, 1)
    assert fresh.state_dict()["steps"] == 3


def test_numbers_are_predicted_with_a_loss_and_metrics_of_ones_own() -> None:
    xs, _ = rows()
    targets, fast = xs.sum(1, keepdim=True), partial(torch.optim.Adam, lr=0.3)
    probe = LinearProbe("encoder", 1, loss=mse_loss, metrics={"mse": mse_loss}, queries=(xs, targets), optimizer=fast)
    learner = train(learner_of(probe, data=((xs, targets),)), 40)
    found = learner.history["validation/linear_encoder_mse"]
    assert len(found) == 40
    assert found[-1] < 0.5 * found[0]


def test_a_monitor_knows_which_way_its_metrics_are_better() -> None:
    probe = LinearProbe("encoder", 3, metrics=[accuracy, MulticlassF1Score(3)])
    assert probe.metric_names == ("linear_encoder_accuracy", "linear_encoder_multiclassf1score")
    stop = EarlyStopping(1, monitor="validation/linear_encoder_accuracy", mode="max")
    assert len(train(learner_of(probe, stop), 3).history["validation/linear_encoder_accuracy"]) >= 2
    typo = EarlyStopping(1, monitor="validation/linear_encoder_acc", mode="max")
    with pytest.raises(MetricError, match="linear_encoder_accuracy"):
        train(learner_of(LinearProbe("encoder", 3, metrics=accuracy), typo))


# Mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"head": nn.Linear(7, 3)},
            r"4 numbers for each row, which its head does not take .*expected a head of 4 inputs",
        ),
        ({"head": lambda width: nn.Linear(width, 5)}, r"made a Tensor of shape \(1, 5\); expected num_classes=3"),
        ({"head": lambda width: width}, "head gave .*for features of 4 numbers; expected a module"),
        ({"features": lambda module, xs: module(xs)[:, :, None]}, r"gave .*\(1, 4, 1\).*\(N, F\)"),
        ({"features": lambda module, xs: module(xs).mean()}, r"gave .*as the features of one row.*\(N, F\)"),
    ],
    ids=["head of another width", "outputs", "no module", "three dimensions", "one number"],
)
@pytest.mark.parametrize("given", [False, True])
def test_what_does_not_fit_is_said_when_the_learner_is_built(options: Any, words: str, given: bool) -> None:
    probe = LinearProbe("encoder", 3, **options, queries=rows(1) if given else None)
    with pytest.raises(DataError, match=f"(?s){words}"):
        learner_of(probe)


def test_a_head_that_does_not_fit_is_said_at_the_first_step_where_no_row_lies_at_hand() -> None:
    class Stream(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, index: int) -> Any:
            return rows(1)[0][index], rows(1)[1][index]

    learner = learner_of(LinearProbe("encoder", 3, head=nn.Linear(7, 3), queries=Stream()))
    with pytest.raises(DataError, match="expected a head of 4 inputs"):
        train(learner)
    assert learner.history[SimCLRPhase].epochs == 0


def test_a_step_whose_features_are_of_another_width_than_held_out_ones_is_named_at_once() -> None:
    learner = learner_of(LinearProbe("encoder", 3, features=lambda module, xs: module[0](xs)))
    with pytest.raises(DataError, match="the step's 'features' has 4 numbers for each row, and 'encoder' gives 8"):
        train(learner)
    assert learner.history[SimCLRPhase].epochs == 0


def test_looking_at_a_row_when_the_learner_is_built_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    torch.manual_seed(1)
    start = torch.get_rng_state()
    learner_of()
    after = torch.get_rng_state()
    torch.set_rng_state(start)
    learner = learner_of(full_probe())
    assert torch.equal(torch.get_rng_state(), after)
    assert learner.model.encoder.training
    assert int(learner.model.encoder[1].num_batches_tracked) == 0
    torch.set_rng_state(before)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_classes": 1}, ValueError, "2 or more, or the loss"),
        ({"head": 3}, TypeError, "expected a module, or what makes one of a width"),
        ({"optimizer": 3}, TypeError, "expected a factory"),
        ({"loss": 3}, TypeError, r"expected a function \(outputs, ys\)"),
        ({"schedule": "fast"}, ValueError, "fast"),
        ({"schedule": {"lr": 0.1}}, TypeError, "LearningRate"),
        ({"metrics": 3}, MetricError, "was given as a metric"),
        ({"metrics": []}, MetricError, "expected one or more"),
        ({"metrics": [accuracy, accuracy]}, MetricError, "each with a name of its own"),
    ],
)
def test_arguments_of_another_kind_are_refused(options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        LinearProbe("encoder", **{"num_classes": 3, **options})


def test_a_phase_that_is_supervised_can_be_probed_with_any_entry() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    data = (TensorBatches(*rows(), batch_size=8, shuffle=True), rows(1))
    probe = LinearProbe("model", 3, head=lambda width: nn.Linear(width, 3), entries=("preds", "ys"))
    learner = Learner(model, cross_entropy, data=data, callbacks=[probe], seed=SEED)
    learner.fit(1, phases=[TrainingPhase()])
    assert len(learner.history["validation/linear_model"]) == 1


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda named: torch.optim.SGD([{"params": [each]} for _, each in named], lr=0.1),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    ],
    ids=["named", "model"],
)
def test_an_optimizers_factory_has_the_forms_that_a_learner_takes(optimizer: Any) -> None:
    found = train(learner_of(LinearProbe("encoder", 3, optimizer=optimizer)))
    expected = train(learner_of(LinearProbe("encoder", 3, optimizer=partial(torch.optim.SGD, lr=0.1))))
    kept, of_parameters = (each.get_callback(LinearProbe).state_dict()["probe"] for each in (found, expected))
    assert torch.equal(kept["weight"], of_parameters["weight"])


class Averaging(torch.optim.SGD):
    """Has weights of its own for each mode."""

    def train(self) -> None:
        """Put those to train in place."""

    def eval(self) -> None:
        """Put those to evaluate in place."""


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"optimizer": lambda named: {"a": None}}, OptimizerError, "made a dict of length 1; expected one torch.optim"),
        ({"optimizer": torch.optim.LBFGS}, OptimizerError, "was given LBFGS.*expected an optimizer that steps on"),
        ({"optimizer": Averaging}, OptimizerError, "was given Averaging, whose weights differ"),
        ({"head": nn.Linear(4, 3).requires_grad_(False)}, OptimizerError, "no parameter requires a gradient"),
        ({"loss": lambda outputs, ys: outputs.sum(1)}, LossError, r"LinearProbe\('encoder'\) has shape \(8,\)"),
        ({"loss": lambda outputs, ys: 1.0}, LossError, r"LinearProbe\('encoder'\) is .*expected a tensor"),
    ],
    ids=["several", "closure", "modes", "frozen", "rows", "number"],
)
def test_what_cannot_be_trained_with_is_said_at_the_first_step(options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        train(learner_of(LinearProbe("encoder", 3, **options)))


def test_metrics_of_other_entries_are_refused_or_left_out_where_they_are_optional() -> None:
    def mean(features: Tensor) -> Tensor:
        return features.mean()

    other = Metric(mean, inputs=("features",))
    with pytest.raises(MissingEntryError, match="no entry 'features'; it has: preds, ys"):
        train(learner_of(LinearProbe("encoder", 3, metrics=[accuracy, other])))
    optional = Metric(mean, inputs=("features",), optional=True)
    learner = train(learner_of(LinearProbe("encoder", 3, metrics=[accuracy, optional])))
    assert len(learner.history["validation/linear_encoder_accuracy"]) == 2


def test_a_run_goes_on_with_the_schedule_and_the_head_that_it_began_with(tmp_path: Any) -> None:
    train(learner_of(full_probe(), Checkpointer(tmp_path / "run")), 1)
    for options, words in (
        (
            {"schedule": cosine(total=6, start=0.1, end=0.0)},
            r"learning_rate was scheduled by cosine\(.*start=0.3.*start=0.1",
        ),
        ({"head": lambda width: nn.Linear(width, 3)}, "another head or optimizer .*go on with that one"),
    ):
        given = {"schedule": {LearningRate: SCHEDULE, WeightDecay: lambda step: 0.1 * (step + 1)}, **options}
        with pytest.raises(CheckpointError, match=f"(?s){words}"):
            train(learner_of(full_probe(**given), Checkpointer(tmp_path / "run")), 2, resume=tmp_path / "run")
