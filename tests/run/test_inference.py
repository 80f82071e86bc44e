from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fluxloop import (
    AbstractValidationPhase,
    Accelerator,
    BackwardBegin,
    BatchError,
    Callback,
    CombinedLoader,
    CycleEnd,
    DataError,
    EpochEnd,
    FitEnd,
    Learner,
    Metric,
    Metrics,
    Phase,
    PhaseError,
    PredictionPhase,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UpdateEnd,
    ValidationPhase,
    mae,
    mse,
    rmse,
    runepoch,
    runstep,
)
from fluxloop.data.copies import copy_of
from fluxloop.testing import EventRecorder, assert_same_bits, bits, toy_learner
from toys import BrokenError, Do, noisy_learner

XS, YS = torch.linspace(1, 10, 70).reshape(70, 1), torch.linspace(3, 30, 70).reshape(70, 1)


class Half(nn.Module):
    """Gives half of its input; has a parameter that plays no part."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, xs: Tensor) -> Tensor:
        return xs / 2 + 0 * self.unused


def half_learner(*callbacks: Callback, **options: Any) -> Learner:
    xs = torch.tensor([1.0, 2, 3, 4, 50]).reshape(5, 1)
    data = (TensorBatches(xs, xs, batch_size=2), TensorBatches(xs, 0 * xs, batch_size=2))
    return Learner(
        Half(), nn.functional.l1_loss, **{"data": data, **options}, callbacks=callbacks, default_callbacks=False
    )


# Evaluate


def test_evaluate_weighs_a_ragged_last_batch_by_its_rows():
    learner = half_learner(Recorder(), Metrics(mse, rmse, mae))
    values = learner.evaluate()
    mean, square = (0.5 + 1 + 1.5 + 2 + 25) / 5, (0.25 + 1 + 2.25 + 4 + 625) / 5
    assert values == pytest.approx({"loss": mean, "mse": square, "rmse": square**0.5, "mae": mean}, rel=1e-6)
    assert all(type(value) is float for value in values.values())


def test_evaluate_takes_other_data_metrics_and_another_phase():
    class Twice(AbstractValidationPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state):
                state.z = 2 * state.xs
                state.loss = state.z.mean()

    learner = half_learner()
    assert learner.evaluate() == {"loss": 6.0}
    assert learner.evaluate(torch.ones(3, 1), phase=Twice()) == {"loss": 2.0}
    largest = Metric(lambda z: z.max(), name="largest", inputs=("z",))
    assert learner.evaluate([[torch.ones(3, 1)]], metrics=[largest], phase=Twice()) == {"loss": 2.0, "largest": 2.0}
    assert learner.evaluate((torch.ones(3, 1), torch.zeros(3, 1))) == {"loss": 0.5}


def test_metrics_given_to_evaluate_are_used_once():
    metrics = Metrics(mae)
    learner = half_learner(Recorder(), metrics)
    assert set(learner.evaluate(metrics=[mse])) == {"loss", "mse"}
    assert set(learner.evaluate(metrics=[])) == {"loss"}
    assert set(learner.evaluate()) == {"loss", "mae"}
    assert learner.get_callback(Metrics) is metrics


def test_evaluate_without_data_says_which_is_missing():
    with pytest.raises(DataError, match="ValidationPhase runs on the 'validation' data, and there is no data"):
        half_learner(data=()).evaluate()


def test_evaluate_gives_values_by_name_and_leaves_no_trace() -> None:
    learner = toy_learner(Recorder(), Metrics())
    learner.fit(1)
    before = bits(learner), learner.history.rows(), learner.streams.positions(), learner.step
    values = learner.evaluate((XS, 3 * XS))
    expected = (XS.double() * learner.model.value.double() - 3 * XS.double()).abs().mean().item()
    assert values == {"loss": pytest.approx(expected)}
    assert learner.evaluate() == {"loss": learner.history["validation/loss"][-1]}
    assert all(torch.equal(bits(learner)[name], tensor) for name, tensor in before[0].items())
    assert (learner.history.rows(), learner.streams.positions(), learner.step) == before[1:]


# Nothing left behind


def surroundings(learner: Learner) -> dict[str, Any]:
    """All that evaluating and predicting must leave as it was."""
    return {
        "history": repr(learner.history),
        "rows": learner.history.rows(),
        "cbstate": sorted(vars(learner.cbstate)),
        "objects": [id(thing) for thing in (learner.history, learner.cbstate, learner.step, learner.callbacks)],
        "step": list(learner.step),
        "streams": learner.streams.positions(),
        "modes": [module.training for module in learner.model.modules()],
        "weights": [tensor.tolist() for tensor in learner.model.state_dict().values()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in learner.model.parameters()],
        "numbers": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
        "running": (learner._running.fitting, learner.scope, learner.num_batches),
    }


LOOKS = {
    "evaluate": lambda learner: learner.evaluate(),
    "evaluate on training data": lambda learner: learner.evaluate(learner.data.training),
    "predict": lambda learner: learner.predict(torch.ones(5, 3)),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("epochs", [0, 1])
def test_evaluating_and_predicting_leave_no_trace(look, epochs):
    recorder = EventRecorder()
    learner = noisy_learner(recorder, Recorder(), Metrics(mae))
    learner.model[1].eval()
    learner.fit(epochs)
    before, events = surroundings(learner), len(recorder.events)
    LOOKS[look](learner)
    after = surroundings(learner)
    for name, value in before.items():
        assert after[name] == value, name
    assert len(recorder.events) == events, "the learner's callbacks do not hear of it"


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_explained_of_the_callbacks_does_not_change_by_evaluating_and_predicting(look):
    learner = noisy_learner(Recorder(), Metrics(mae))
    before = str(learner.callbacks.explain())
    LOOKS[look](learner)
    assert str(learner.callbacks.explain()) == before
    assert "TrainingPhase" in before


@pytest.mark.parametrize("look", LOOKS)
def test_evaluating_and_predicting_that_fail_leave_no_trace_either(look):
    learner = noisy_learner(Recorder(), Metrics(mae))
    learner.fit(1)
    before, forward = surroundings(learner), learner.model[3].forward
    calls = 0

    def fail_late(xs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1 + (look != "predict"):
            raise BrokenError
        return forward(xs)

    learner.model[3].forward = fail_late
    with pytest.raises(BrokenError):
        LOOKS[look](learner)
    del learner.model[3].forward
    assert surroundings(learner) == before


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("look", LOOKS)
def test_evaluating_and_predicting_again_gives_the_same_and_changes_no_later_training(look):
    learner, plain = noisy_learner(Recorder()), noisy_learner(Recorder())
    learner.fit(1)
    first, second = LOOKS[look](learner), LOOKS[look](learner)
    assert torch.equal(first, second) if isinstance(first, Tensor) else first == second
    learner.fit(1)
    plain.fit(2)
    assert_same_bits(learner, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "phase"),
    [
        *((event, TrainingPhase) for event in (StepBegin, BackwardBegin, UpdateEnd, StepEnd, EpochEnd)),
        (StepEnd, ValidationPhase),
        (CycleEnd, Phase),
        (FitEnd, Phase),
    ],
    ids=lambda cls: cls.__name__,
)
def test_a_handler_may_evaluate_and_predict_while_fitting(event, phase):
    found: list[tuple[dict[str, float], Tensor]] = []
    same: list[bool] = []

    def look(learner: Learner) -> None:
        before = surroundings(learner)
        found.append((learner.evaluate(metrics=[mae]), learner.predict(torch.ones(5, 3))))
        same.append(surroundings(learner) == before)

    watched = noisy_learner(Recorder(), Metrics(mse), Do(look, event, phase))
    plain = noisy_learner(Recorder(), Metrics(mse))
    watched.fit(2)
    plain.fit(2)
    assert same
    assert all(same)
    assert_same_bits(watched, plain)
    assert watched.history.rows() == plain.history.rows()
    if event is FitEnd:
        assert found[0][0] == watched.evaluate(metrics=[mae])
        assert torch.equal(found[0][1], watched.predict(torch.ones(5, 3)))


# Predict


def test_predictions_are_those_of_the_model_in_eval_mode_in_the_order_of_the_data():
    learner = noisy_learner()
    learner.fit(1)
    xs = torch.randn(70, 3)
    predictions = learner.predict(xs)
    learner.model.eval()
    with torch.no_grad():
        assert torch.equal(predictions, torch.cat([learner.model(batch) for batch in xs.split(32)]))
    learner.model.train()
    assert predictions.shape == (70, 1)
    assert not predictions.requires_grad


@pytest.mark.parametrize(
    "data",
    [
        torch.arange(6.0).reshape(6, 1),
        np.arange(6, dtype=np.float32).reshape(6, 1),
        (torch.arange(6.0).reshape(6, 1), torch.zeros(6)),
        [torch.arange(4.0).reshape(4, 1), torch.tensor([[4.0], [5]])],
        [(torch.arange(4.0).reshape(4, 1), "targets"), [torch.tensor([[4.0], [5]])]],
        TensorBatches(torch.arange(6.0).reshape(6, 1), batch_size=4),
        TensorDataset(torch.arange(6.0).reshape(6, 1)),
        DataLoader(TensorDataset(torch.arange(6.0).reshape(6, 1), torch.zeros(6)), batch_size=4),
    ],
    ids=["tensor", "array", "pair", "batches", "pairs and lists", "tensor batches", "dataset", "loader"],
)
def test_predict_takes_inputs_in_any_form_and_leaves_targets_out(data):
    assert torch.equal(half_learner().predict(data), torch.arange(6.0).reshape(6, 1) / 2)


def test_predictions_come_in_the_order_of_the_rows() -> None:
    model = nn.Linear(1, 1)
    learner = Learner(model, nn.functional.mse_loss, seed=0)
    predictions = learner.predict((XS,))
    with torch.no_grad():
        expected = torch.cat([model(part) for part in XS.split(32)])
    assert torch.equal(predictions, expected)
    assert not predictions.requires_grad
    assert torch.equal(learner.predict((XS, YS)), expected)
    assert torch.equal(learner.predict(XS), expected)
    assert torch.equal(learner.predict(np.asarray(XS)), expected)


@pytest.mark.parametrize("data", [None, 3, "rows"])
def test_predict_wants_data(data: Any) -> None:
    with pytest.raises(DataError, match="was given as data; expected tensors or arrays"):
        toy_learner().predict(data)


def test_predict_gives_a_dict_of_inputs_to_the_model_as_it_is():
    class Sum(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return inputs["a"] + inputs["b"]

    predictions = Learner(Sum(), default_callbacks=False).predict({"a": torch.arange(40), "b": torch.ones(40)})
    assert torch.equal(predictions, torch.arange(40) + 1.0)


class Named(NamedTuple):
    mean: Tensor
    spread: Tensor


@dataclass
class Data:
    mean: Tensor
    inner: tuple[Tensor, str]


STRUCTURES: dict[str, Any] = {
    "tuple": lambda xs: (xs, xs + 1),
    "list": lambda xs: [xs, xs + 1],
    "dict": lambda xs: {"a": xs, "b": {"c": xs + 1}},
    "named tuple": lambda xs: Named(xs, xs + 1),
    "dataclass": lambda xs: Data(xs, (xs + 1, "label")),
}

EXPECTED: dict[str, Any] = {**STRUCTURES, "dataclass": lambda xs: Data(xs, (xs + 1, ["label", "label"]))}


def flat(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Data):
        return ["Data", flat(value.mean), flat(value.inner)]
    if isinstance(value, dict):
        return ["dict", *((key, flat(item)) for key, item in value.items())]
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, *map(flat, value)]
    return value


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structured_predictions_are_joined_leaf_by_leaf(structure):
    class Structured(nn.Module):
        def forward(self, xs: Tensor) -> Any:
            return STRUCTURES[structure](xs)

    xs = torch.arange(50.0).reshape(50, 1)
    predictions = Learner(Structured(), default_callbacks=False).predict(xs)
    assert flat(predictions) == flat(EXPECTED[structure](xs))


def test_a_model_that_says_how_it_predicts_is_asked_through_that():
    class Classes(Half):
        def predict(self, xs: Tensor) -> Tensor:
            assert not self.training
            return self(xs) > 1

    learner = Learner(Classes(), nn.functional.l1_loss, default_callbacks=False)
    assert learner.predict(torch.tensor([[1.0], [3.0]])).tolist() == [[False], [True]]


def test_a_custom_phase_says_what_is_predicted():
    class Embed(AbstractValidationPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch) as (_, state):
                state.preds = {"z": learner.model.a(state.xs) + learner.model.b(state.xs)}

    learner = Learner({"a": Half(), "b": Half()}, default_callbacks=False)
    assert torch.equal(learner.predict(torch.ones(40, 2), phase=Embed())["z"], torch.ones(40, 2))


def test_predictions_keep_the_order_of_the_rows_in_a_phase_on_training_data_too():
    class OnTraining(PredictionPhase):
        data_key = "training"

    xs = torch.arange(50.0).reshape(50, 1)
    assert torch.equal(half_learner().predict(xs, phase=OnTraining()), xs / 2)


def test_predicting_with_several_models_needs_a_phase_and_says_so():
    learner = Learner({"a": Half(), "b": Half()}, default_callbacks=False)
    with pytest.raises(PhaseError, match=r"predict runs one model.*\['a', 'b'\].*predict\(data, phase=MyPhase\(\)\)"):
        learner.predict(torch.ones(3, 1))


def test_a_phase_that_makes_no_predictions_says_so():
    class Silent(AbstractValidationPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            pass

    with pytest.raises(PhaseError, match=r"Silent\(\) made no predictions.*stores state\.preds"):
        half_learner().predict(torch.ones(3, 1), phase=Silent())


def test_predicting_without_rows_is_an_error():
    for nothing in ([], torch.ones(0, 1)):
        with pytest.raises(DataError, match=r"no batch|no rows"):
            half_learner().predict(nothing)


def test_a_model_that_draws_predicts_the_same_each_time_and_leaves_the_generator():
    class Sampler(nn.Module):
        def forward(self, xs: Tensor) -> Tensor:
            return xs + torch.rand_like(xs)

    learner = Learner(Sampler(), default_callbacks=False, seed=1)
    before = torch.get_rng_state()
    first = learner.predict(torch.ones(40, 1))
    assert torch.equal(first, learner.predict(torch.ones(40, 1)))
    assert len(first.unique()) > 30
    assert torch.equal(torch.get_rng_state(), before)


class OwnTraining(TrainingPhase):
    """Trains, under another name."""


@pytest.mark.parametrize("phase", [TrainingPhase(), OwnTraining()], ids=["TrainingPhase", "a subclass"])
def test_evaluate_and_predict_refuse_a_phase_that_trains(phase):
    learner = half_learner()
    before = bits(learner)
    with pytest.raises(PhaseError, match=r"given to evaluate or predict, and it trains; expected a validation phase"):
        learner.evaluate(learner.data.validation, phase=phase)
    with pytest.raises(PhaseError, match=r"given to evaluate or predict, and it trains; expected a validation phase"):
        learner.predict(learner.data.validation, phase=phase)
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(learner).items())


class StopsEarly(ValidationPhase):
    """Looks at one batch, and keeps the iterator."""

    def epoch(self, learner, data):
        self.iterator = iter(data)
        with runepoch(learner, self):
            self.step(learner, next(self.iterator))


@pytest.mark.parametrize("sampled", [False, True], ids=["the loader's generator", "the sampler's generator"])
def test_an_evaluation_that_stops_early_leaves_a_generator_as_it_was(sampled):
    rows, generator = TensorDataset(XS, YS), torch.Generator().manual_seed(1)
    if sampled:
        loader = DataLoader(rows, batch_size=2, sampler=RandomSampler(rows, generator=generator))
    else:
        loader = DataLoader(rows, batch_size=2, shuffle=True, generator=generator)
    before, phase = generator.get_state(), StopsEarly()
    learner = toy_learner()
    learner.evaluate(loader, phase=phase)
    assert torch.equal(generator.get_state(), before)
    order = [xs for xs, _ in loader]
    after = generator.get_state()
    del phase.iterator
    assert torch.equal(generator.get_state(), after)
    generator.set_state(before)
    assert all(torch.equal(a, b) for a, (b, _) in zip(order, loader, strict=True))


class Sampled(DataLoader[Any]):
    pass


ORDERED: dict[str, Any] = {
    "tensors that shuffle": lambda: TensorBatches(XS, YS, batch_size=16, shuffle=True),
    "tensors without the last": lambda: TensorBatches(XS, YS, batch_size=16, shuffle=True, drop_last=True, seed=3),
    "a loader that shuffles": lambda: DataLoader(TensorDataset(XS, YS), batch_size=16, shuffle=True),
    "without the last": lambda: DataLoader(TensorDataset(XS, YS), batch_size=16, drop_last=True),
    "a class of its own": lambda: Sampled(TensorDataset(XS, YS), batch_size=16, shuffle=True, drop_last=True),
    "rows one by one": lambda: DataLoader(TensorDataset(XS, YS), batch_size=None, shuffle=True),
    "a sampler of torch's": lambda: DataLoader(TensorDataset(XS), sampler=RandomSampler(XS, True, 9), batch_size=8),
    "batches of its own": lambda: DataLoader(
        TensorDataset(XS, YS), batch_sampler=BatchSampler(SequentialSampler(XS), 16, drop_last=True)
    ),
    "an iterable data set": lambda: DataLoader(Rows(), batch_size=16, drop_last=True),
    "loaders one after another": lambda: CombinedLoader(
        [TensorBatches(part, batch_size=8, shuffle=True) for part in XS.split(35)], mode="sequential"
    ),
}


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(XS, YS, strict=True))


@pytest.mark.slow(quick=6)
@pytest.mark.parametrize("make", ORDERED.values(), ids=ORDERED)
def test_predictions_come_in_the_order_of_the_data_set_and_are_complete(make: Any) -> None:
    learner = toy_learner()
    loader = make()
    assert torch.equal(learner.predict(loader).flatten(), learner.model(XS).detach().flatten())
    before = learner.streams.positions()
    learner.predict(loader)
    assert learner.streams.positions() == before


@pytest.mark.slow
def test_predictions_with_workers_that_stay_leave_these_to_the_training() -> None:
    options: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader = DataLoader(TensorDataset(XS, YS), batch_size=16, shuffle=True, **options)
    learner = toy_learner(data=(loader,))
    learner.fit(1)
    workers = copy_of(loader)._iterator._workers  # type: ignore[union-attr]
    assert torch.equal(learner.predict(loader), learner.model(XS).detach())
    assert copy_of(loader)._iterator._workers is workers  # type: ignore[union-attr]
    del loader, learner, workers
    gc.collect()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DataLoader(TensorDataset(XS), sampler=SubsetRandomSampler(range(9))), "a SubsetRandomSampler chooses"),
        (
            lambda: DataLoader(TensorDataset(XS), sampler=WeightedRandomSampler([1.0] * 70, 70)),
            "a WeightedRandomSampler",
        ),
        (lambda: DataLoader(TensorDataset(XS), batch_sampler=[[3, 1], [0]]), "a list chooses"),
        (lambda: DataLoader(TensorDataset(XS), sampler=SequentialSampler(range(9))), "a SequentialSampler chooses"),
        (
            lambda: CombinedLoader({"a": [XS], "b": [XS, XS]}),
            r"mode='max_size_cycle' and loaders of different lengths.*stack=False",
        ),
    ],
)
def test_predictions_in_an_order_that_cannot_be_had_are_refused(make: Any, words: str) -> None:
    learner = toy_learner()
    with pytest.raises(DataError, match=words):
        learner.predict(make())


def test_predictions_of_a_loader_as_it_is_are_a_list_of_batches() -> None:
    learner = toy_learner()
    loader = DataLoader(TensorDataset(XS), sampler=SubsetRandomSampler(range(9)), batch_size=4)
    parts = learner.predict(loader, stack=False)
    assert [len(part) for part in parts] == [4, 4, 1]
    expected = learner.model(XS[:9]).detach().flatten().sort().values
    assert torch.equal(torch.cat(parts).flatten().sort().values, expected)
    assert [len(p) for p in learner.predict(XS, stack=False)] == [32, 32, 6]


def test_predictions_that_cannot_be_joined_say_so() -> None:
    learner = toy_learner()
    rows = [torch.ones(2, 3), torch.ones(2, 4)]
    with pytest.raises(DataError, match=r"of 2 batches cannot be joined.*stack=False"):
        learner.predict(rows)
    assert [part.shape for part in learner.predict(rows, stack=False)] == [(2, 3), (2, 4)]


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"out": self.scale * ids * (1 if mask is None else mask)}


def test_a_batch_that_is_a_dict_is_given_by_name() -> None:
    learner = Learner(ByName(), accelerator=Accelerator("cpu"), data={"training": {"ids": XS, "mask": XS}})
    assert torch.equal(learner.predict({"ids": XS, "mask": XS})["out"], 2 * XS * XS)
    assert torch.equal(learner.predict({"ids": XS})["out"], 2 * XS)
    assert learner.summary().note == ""


def test_a_dict_of_other_names_is_refused_with_what_to_type_and_the_learner_goes_on() -> None:
    learner = toy_learner()
    expected = learner.predict(torch.ones(3, 1))
    for data in ({"xs": torch.ones(3, 1), "ys": torch.ones(3)}, [{"xs": torch.ones(3, 1), "ys": torch.ones(3)}]):
        with pytest.raises(BatchError, match=r"(?s)with 'xs', 'ys'.*'dict'.*; expected.*learner.predict\(data\['xs'\]"):
            learner.predict(data)
    assert torch.equal(learner.predict({"xs": torch.ones(3, 1), "ys": torch.ones(3)}["xs"]), expected)


def test_an_empty_dict_is_refused_in_words_too() -> None:
    with pytest.raises(BatchError, match=r"a dict of length 0 with nothing.*expected.*learner.predict\(data\['xs'\]"):
        toy_learner().predict([{}])


def test_an_error_of_a_model_that_takes_a_dict_is_its_own() -> None:
    class Takes(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["xs"].nothing  # type: ignore[no-any-return]

    with pytest.raises(AttributeError, match="nothing"):
        Learner(Takes(), accelerator=Accelerator("cpu")).predict({"xs": XS})


def test_empty_data_for_predict_is_named_as_what_was_given() -> None:
    with pytest.raises(DataError, match=r"the given data \(a list of length 0\) gave no batch"):
        toy_learner().predict([])


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_an_interrupted_evaluation_or_prediction_leaves_the_learner_as_it_was(call: str) -> None:
    def batches() -> Iterator[Any]:
        yield torch.ones(2, 1), torch.ones(2, 1)
        raise KeyboardInterrupt

    learner = toy_learner(Recorder(), Metrics())
    learner.model.train()
    learner.fit(1)
    before, step, rows, order = bits(learner), learner.step, learner.history.rows(), learner.callbacks.order
    with pytest.raises(KeyboardInterrupt):
        getattr(learner, call)(batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
    assert (learner.step, learner.history.rows(), learner.callbacks.order) == (step, rows, order)
    assert learner.model.training
    assert learner.scope is None
    assert learner.fit(1).cycles == 2
