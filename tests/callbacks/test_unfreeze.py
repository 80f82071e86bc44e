from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fluxloop import (
    EMA,
    Callback,
    GANPhase,
    KNNProbe,
    Learner,
    LinearProbe,
    Metrics,
    ModelError,
    OptimizerError,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    on,
)
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.callbacks.unfreeze import Unfreeze
from fluxloop.testing import assert_observer, assert_same_bits

BATCH, BATCHES = 4, 3
adam = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=False)
momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)


def batches() -> TensorBatches:
    xs = torch.randn(BATCH * BATCHES, 3, generator=torch.Generator().manual_seed(0))
    return TensorBatches(xs, torch.arange(BATCH * BATCHES) % 3, batch_size=BATCH)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, xs: Tensor) -> Tensor:
        return self.head(self.encoder(xs))


def learner_of(*callbacks: Callback, model: Any = None, **options: Any) -> Learner:
    return Learner(
        Net() if model is None else model,
        cross_entropy,
        callbacks=callbacks,
        seed=2,
        **{"data": (batches(), batches()), "optimizer": adam, "default_callbacks": False, **options},
    )


def trainable(learner: Learner) -> set[str]:
    return {name for name, parameter in learner.model.named_parameters() if parameter.requires_grad}


ALL = {name for name, _ in Net().named_parameters()}
HEAD = {"head.weight", "head.bias"}
LAST = {"encoder.3.weight", "encoder.3.bias"}


class Watch(Callback):
    """Keeps which parameters took gradients in each step."""

    reads = ("step.grads",)
    transient = ("names",)

    def __init__(self) -> None:
        self.names: list[set[str]] = []

    @on(StepEnd, TrainingPhase)
    def look(self, event: StepEnd, phase: Any, learner: Any) -> None:
        self.names.append({name for name, grad in learner.step.grads.items() if grad is not None})


# When


def test_parts_are_frozen_from_the_start_and_unfrozen_when_their_epoch_begins() -> None:
    watch = Watch()
    learner = learner_of(Unfreeze({"encoder": 3, "encoder.3": 1}), watch)
    assert trainable(learner) == ALL  # nothing is frozen before a fit
    learner.fit(5)
    expected = [HEAD] * BATCHES + [HEAD | LAST] * 2 * BATCHES + [ALL] * 2 * BATCHES
    assert watch.names == expected


def test_parts_are_unfrozen_when_their_step_begins() -> None:
    watch = Watch()
    learner_of(Unfreeze({"encoder": 5, "encoder.3": 2, "head": 0}, unit="step"), watch).fit(3)
    assert watch.names == [HEAD] * 2 + [HEAD | LAST] * 3 + [ALL] * 4


@pytest.mark.parametrize("optimizer", [adam, momentum])
def test_the_weights_are_those_of_a_hand_written_loop_to_the_bit(optimizer: Any) -> None:
    model = Net()
    stepper = optimizer(model.parameters())
    model.encoder.requires_grad_(False)
    for epoch in range(4):
        if epoch == 2:
            model.encoder.requires_grad_(True)
        for xs, ys in batches():
            stepper.zero_grad()
            cross_entropy(model(xs), ys).backward()
            stepper.step()
    learner = learner_of(Unfreeze({"encoder": 2}), optimizer=optimizer)
    learner.fit(4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, learner.model.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", [adam, momentum])
def test_momentum_and_weight_decay_do_not_move_what_is_frozen(optimizer: Any) -> None:
    learner = learner_of(optimizer=optimizer)
    learner.fit(2)  # there are momenta now
    before = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
    learner.add_callback(Unfreeze({"encoder": 2}))
    learner.fit(2)
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(before[name], parameter) is name.startswith("encoder"), name
    learner.fit(1)
    assert not torch.equal(before["encoder.0.weight"], learner.model.encoder[0].weight)


def test_batch_norms_statistics_follow_the_data_also_where_it_is_frozen() -> None:
    learner = learner_of(Unfreeze({"encoder": 9}))
    learner.fit(1)
    assert learner.model.encoder[1].num_batches_tracked == BATCHES
    assert torch.equal(learner.model.encoder[1].weight, torch.ones(4))


def test_what_matches_no_pattern_stays_as_it_is() -> None:
    learner = learner_of(Unfreeze({"head": 1}))
    learner.model.encoder[0].requires_grad_(False)
    learner.fit(2)
    assert trainable(learner) == ALL - {"encoder.0.weight", "encoder.0.bias"}


@pytest.mark.parametrize(
    ("pattern", "frozen"),
    [
        ("encoder", ALL - HEAD),
        ("encoder.*", ALL - HEAD),
        ("encoder.3", LAST),
        ("encoder.[01]", {"encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"}),
        ("*.bias", {name for name in ALL if name.endswith("bias")}),
        ("h??d", HEAD),
        ("head.weight", {"head.weight"}),
        ("*", ALL),
    ],
)
def test_a_pattern_is_a_modules_path_or_a_parameters_name(pattern: str, frozen: set[str]) -> None:
    learner = learner_of(Unfreeze({pattern: 5}))
    learner.fit(0)
    assert trainable(learner) == ALL - frozen


@pytest.mark.parametrize("order", [1, -1])
def test_what_matches_several_patterns_is_unfrozen_at_the_earliest(order: int) -> None:
    patterns = dict([("*", 9), ("encoder.3", 1), ("head", 0), ("head.bias", 4)][::order])
    learner = learner_of(Unfreeze(patterns))
    learner.fit(1)
    assert trainable(learner) == HEAD
    learner.fit(1)
    assert trainable(learner) == HEAD | LAST


def test_a_part_of_a_name_is_no_module() -> None:
    with pytest.raises(ModelError, match="no module or parameter matches 'enc'"):
        learner_of(Unfreeze({"enc": 1}))


def test_tied_weights_match_by_each_of_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, xs: Tensor) -> Tensor:
            return self.second(self.first(xs))

    learner = learner_of(Unfreeze({"second": 1}), model=Tied())
    learner.fit(1)
    assert trainable(learner) == {"first.bias"}
    learner.fit(2)
    assert trainable(learner) == {"first.weight", "first.bias", "second.bias"}


def test_parts_of_several_models_begin_with_the_models_name() -> None:
    models = {"generator": nn.Linear(2, 3), "critic": nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))}
    learner = learner_of(Unfreeze({"critic.0": 1}), model=models, data=(torch.randn(8, 3),))
    before = learner.model.critic[0].weight.detach().clone()
    learner.fit(1, phases=[GANPhase(noise=2)])
    assert torch.equal(learner.model.critic[0].weight, before)
    assert learner.model.critic[1].weight.requires_grad
    learner.fit(1, phases=[GANPhase(noise=2)])
    assert not torch.equal(learner.model.critic[0].weight, before)


# It freezes once


def test_what_was_frozen_by_hand_stays_frozen_through_epochs_of_training_and_validation() -> None:
    learner = learner_of(optimizer=momentum)
    learner.fit(1)
    buffers = {name: id(state["momentum_buffer"]) for name, state in enumerate(learner.optimizer.state.values())}
    learner.model.encoder.requires_grad_(False)
    before = learner.model.encoder[0].weight.detach().clone()
    for _ in range(2):
        learner.fit(2)
        learner.evaluate()
    assert trainable(learner) == HEAD
    assert torch.equal(learner.model.encoder[0].weight, before)
    after = {name: id(state["momentum_buffer"]) for name, state in enumerate(learner.optimizer.state.values())}
    assert after == buffers  # and the optimizer's state is not made anew


def test_a_second_fit_freezes_nothing_again_and_counts_on() -> None:
    watch = Watch()
    learner = learner_of(Unfreeze({"encoder.0": 3, "encoder.3": 1}), watch)
    for _ in range(4):
        learner.fit(1)
    late = {"encoder.0.weight", "encoder.0.bias"}
    one, two = ALL - late - LAST, ALL - late
    assert watch.names == [one] * BATCHES + [two] * 2 * BATCHES + [ALL] * BATCHES


def test_what_somebody_else_unfreezes_stays_so() -> None:
    learner = learner_of(Unfreeze({"encoder": 9}))
    learner.fit(1)
    learner.model.encoder[3].requires_grad_(True)
    learner.fit(1)
    assert trainable(learner) == HEAD | LAST


def test_it_works_in_a_loop_of_epochs() -> None:
    learner = learner_of(Unfreeze({"encoder": 1}))
    learner.epoch(TrainingPhase())
    assert trainable(learner) == HEAD
    learner.epoch(TrainingPhase())
    assert trainable(learner) == ALL


def test_it_begins_anew_in_a_second_learner() -> None:
    unfreeze = Unfreeze({"encoder": 1})
    first, second = learner_of(unfreeze), learner_of()
    first.fit(2)
    second.add_callback(unfreeze)
    second.fit(1)
    assert trainable(second) == HEAD


def test_gradients_from_before_it_froze_are_dropped() -> None:
    learner = learner_of(optimizer=momentum)
    learner.epoch(TrainingPhase())
    assert learner.model.encoder[0].weight.grad is not None
    learner.add_callback(Unfreeze({"encoder": 1}))
    learner.fit(0)
    assert learner.model.encoder[0].weight.grad is None
    assert learner.model.head.weight.grad is not None


# With others


def test_it_works_beside_what_averages_and_measures_the_weights_in_any_order() -> None:
    learners = []
    for order in (1, -1):
        given: list[Callback] = [
            Unfreeze({"encoder": 1}),
            EMA("model", 0.5),
            KNNProbe("model", k=1),
            LinearProbe("model", 3, entries=("preds", "ys")),
            Metrics(),
            Recorder(),
        ]
        learner = learner_of(*given[::order])
        learner.fit(2)
        learners.append(learner)
    assert learners[0].callbacks.digest == learners[1].callbacks.digest
    assert_same_bits(*learners)


def test_a_teacher_may_be_averaged_while_the_student_thaws() -> None:
    models = {"student": Net(), "teacher": Net().requires_grad_(False)}
    learner = learner_of(Unfreeze({"student.encoder": 1}), EMA("student", 0.9, into="teacher"), model=models)
    assert learner.callbacks.order


def test_what_is_not_frozen_any_more_trains_as_if_it_had_never_been() -> None:
    assert_observer(Unfreeze({"encoder": 0}), learner_of)


# What it is given


def test_an_empty_match_is_an_error_that_names_what_is_close() -> None:
    message = (
        r"matches 'encodr'; there are encoder, head, and what is inside them, such as .*; did you mean 'encoder'\?"
    )
    with pytest.raises(ModelError, match=message):
        learner_of(Unfreeze({"encodr": 1}))
    learner = learner_of()
    with pytest.raises(ModelError, match=r"matches 'head.wieght'; .*; did you mean 'head.weight'"):
        learner.add_callback(Unfreeze({"head.wieght": 1}))


def test_a_parameter_that_no_optimizer_holds_is_an_error_before_anything_is_frozen() -> None:
    model = Net()
    model.encoder[0].requires_grad_(False)
    learner = learner_of(Unfreeze({"encoder": 1}), model=model)
    before = trainable(learner)
    with pytest.raises(OptimizerError, match=r"would unfreeze encoder.0.weight, encoder.0.bias, which no optimizer"):
        learner.fit(1)
    assert trainable(learner) == before


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {}, r"Unfreeze\(a dict of length 0\) was given; expected when by pattern: Unfreeze\(\{'encoder': 5\}\)"),
        ("encoder", {}, r"Unfreeze\('encoder'\) was given"),
        ({1: 1}, {}, r"Unfreeze\(a dict of length 1\)"),
        ({"head": -1}, {}, r"Unfreeze\(\{'head': -1\}\) was given; expected the number of an epoch or a step, 0 or"),
        ({"head": 1.5}, {}, r"Unfreeze\(\{'head': 1.5\}\)"),
        ({"head": True}, {}, r"Unfreeze\(\{'head': True\}\)"),
        ({"head": 1}, {"unit": "batch"}, r"Unfreeze\(unit='batch'\) was given; expected 'epoch' or 'step'"),
    ],
)
def test_bad_input_is_refused(given: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Unfreeze(given, **options)


def test_it_shows_what_it_was_given() -> None:
    assert repr(Unfreeze({"head": 1})) == "Unfreeze(when={'head': 1}, unit='epoch')"


class Kill(Callback):
    """Kills a run when so many steps are done."""

    reads = ("cbstate.history",)

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @on(StepBegin, TrainingPhase)
    def kill(self, event: StepBegin, phase: Any, learner: Any) -> None:
        if learner.cbstate.history[phase].steps == self.steps:
            raise OSError("killed")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3, 4, 7, 11])
def test_a_resumed_run_has_the_same_trainable_set_and_ends_the_same(steps: int, tmp_path: Path) -> None:
    def make(*callbacks: Callback) -> Learner:
        by_step = Unfreeze({"encoder.0": 8, "encoder.1": 4}, unit="step", name="by step")
        return learner_of(Unfreeze({"encoder.3": 2}), by_step, Recorder(), *callbacks)

    whole, killed = make(), make(Checkpointer(tmp_path, unit="step"), Kill(steps))
    whole.fit(5)
    with pytest.raises(OSError, match="killed"):
        killed.fit(5)
    resumed = make(Checkpointer(tmp_path, unit="step"))
    watch = Watch()
    resumed.add_callback(watch)
    resumed.fit(5, resume=tmp_path)
    late = {"encoder.0.weight", "encoder.0.bias"}, {"encoder.1.weight", "encoder.1.bias"}, LAST
    expected = [
        ALL.difference(*(names for names, when in zip(late, (8, 4, 6), strict=True) if step < when))
        for step in range(15)
    ]
    assert watch.names == expected[steps:]
    assert_same_bits(resumed, whole)


def test_a_resumed_run_does_not_freeze_again_what_was_unfrozen_by_hand(tmp_path: Path) -> None:
    first = learner_of(Unfreeze({"encoder": 9}), Recorder(), Checkpointer(tmp_path))
    first.fit(1)
    first.model.encoder[3].requires_grad_(True)
    first.fit(1)
    second = learner_of(Unfreeze({"encoder": 9}), Recorder(), Checkpointer(tmp_path))
    second.fit(3, resume=tmp_path)
    assert trainable(second) == HEAD | LAST


def test_weights_that_have_seen_no_batch_are_refused_in_words() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    with pytest.raises(
        ModelError, match=r"Unfreeze cannot freeze weights that have seen no batch .lazy modules\); run"
    ):
        learner_of(Unfreeze({"0": 1}), model=model)
    learner_of(Unfreeze({"1": 1}), model=model).fit(2)  # the others may be lazy
