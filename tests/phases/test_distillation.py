from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from fluxloop import (
    BatchError,
    DistillationPhase,
    Event,
    Learner,
    LossBegin,
    Metrics,
    ObjectiveValidationPhase,
    Phase,
    PhaseError,
    Recorder,
    StepBegin,
    TensorBatches,
    UnsafeCallback,
    accuracy,
    on,
    stream_seed,
)
from fluxloop.testing import EventRecorder, assert_same_bits, bits

SEED, BATCH, STEPS, SIZE, CLASSES = 3, 4, 5, 6, 3
ADAM = partial(torch.optim.Adam, lr=0.01, fused=False)


def net(seed: int) -> nn.Sequential:
    """Make a network that keeps statistics and draws numbers in train mode."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(SIZE, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES))


def nets() -> dict[str, nn.Module]:
    return {"student": net(1), "teacher": net(2).requires_grad_(False)}


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(STEPS * BATCH, SIZE, generator=generator)
    return xs, torch.randint(CLASSES, (STEPS * BATCH,), generator=generator)


def batches() -> TensorBatches:
    return TensorBatches(*rows(), batch_size=BATCH)


def learner_of(*callbacks: Any, model: Any = None, loss_fn: Any = None, data: Any = None) -> Learner:
    return Learner(
        nets() if model is None else model,
        loss_fn,
        data=(data or batches(), batches()),
        optimizer=ADAM,
        callbacks=callbacks,
        default_callbacks=False,
        seed=SEED,
    )


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Give the divergence from the teacher's softened classes to the student's, in its own arithmetic."""
    wanted, found = log_softmax(teacher / temperature, 1), log_softmax(student / temperature, 1)
    return (wanted.exp() * (wanted - found)).sum() / len(student) * temperature**2


def train_by_hand(temperature: float, weight: float, hard: Any = cross_entropy) -> tuple[nn.Module, list[Tensor]]:
    """Train the student in plain PyTorch."""
    both = nets()
    student, teacher = both["student"], both["teacher"].eval()
    optimizer = ADAM(student.parameters())
    losses = []
    for step, (xs, ys) in enumerate(batches()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        optimizer.zero_grad()
        logits = student(xs)
        loss = weight * soft_loss(logits, teacher(xs), temperature) + (1 - weight) * hard(logits, ys)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return student, losses


class Steps(UnsafeCallback):
    """Note the events, the entries at each, and the loss of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, set[str]]] = []
        self.losses: list[Tensor] = []

    @on(Event, DistillationPhase)
    def note(self, event: Event, phase: Phase, learner: Learner) -> None:
        self.seen.append((type(event).__name__, set(vars(learner.step))))
        if type(event).__name__ == "StepEnd":
            self.losses.append(learner.step.loss.detach())


def label_smoothing(preds: Tensor, ys: Tensor) -> Tensor:
    return cross_entropy(preds, ys, label_smoothing=0.1)


CASES: dict[str, tuple[DistillationPhase, Any, tuple[Any, ...]]] = {
    "default": (DistillationPhase(), None, (4.0, 0.9)),
    "temperature and weight": (DistillationPhase(2.0, 0.3), None, (2.0, 0.3)),
    "a loss of the labels": (DistillationPhase(2.0, 0.5), label_smoothing, (2.0, 0.5, label_smoothing)),
    "a module as loss": (DistillationPhase(3.0, 0.5), nn.CrossEntropyLoss(), (3.0, 0.5)),
    "the teacher alone": (DistillationPhase(weight=1), None, (4.0, 1)),
    "the labels alone": (DistillationPhase(weight=0), None, (4.0, 0)),
}


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_equal_those_of_a_hand_written_loop(case: str) -> None:
    phase, loss_fn, said = CASES[case]
    log = Steps()
    learner = learner_of(log, loss_fn=loss_fn)
    learner.fit(1, phases=[phase])
    expected, losses = train_by_hand(*said)
    assert log.losses == losses
    found, wanted, initial = (m.state_dict() for m in (learner.model.student, expected, nets()["student"]))
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    assert [key for key in initial if "weight" in key and torch.equal(found[key], initial[key])] == []


def test_the_events_and_the_entries_are_those_of_the_documentation() -> None:
    log = Steps()
    learner = learner_of(log, data=[next(iter(batches()))])
    learner.epoch(DistillationPhase())
    given = {"xs", "ys"}
    guessed = given | {"preds", "teacher_preds"}
    lost = guessed | {"loss"}
    done = lost | {"grads"}
    assert log.seen[1:-1] == [
        ("StepBegin", given),
        ("LossBegin", guessed),
        ("BackwardBegin", lost),
        *[(name, done) for name in ("BackwardEnd", "UpdateBegin", "UpdateEnd", "StepEnd")],
    ]
    assert learner.step.preds.shape == learner.step.teacher_preds.shape == (BATCH, CLASSES)
    assert learner.step.ys.shape == (BATCH,)
    assert learner.step.loss.shape == ()


def test_metrics_of_the_students_predictions_need_nothing_more() -> None:
    learner = learner_of(Recorder(), Metrics(accuracy))
    phase = DistillationPhase()
    learner.fit(1, phases=[phase, ObjectiveValidationPhase(phase)])
    xs, ys = rows()
    with torch.no_grad():
        hits = (learner.model.student.eval()(xs).argmax(1) == ys).double().mean().item()
    assert learner.history["validation/accuracy"] == [pytest.approx(hits)]
    assert learner.history[DistillationPhase].updates == {"student": STEPS}


# The teacher


def test_the_teacher_is_in_eval_mode_and_gets_its_own_modes_back() -> None:
    during: list[list[bool]] = []
    before: list[list[bool]] = []
    after: list[list[bool]] = []

    def modes(module: nn.Module) -> list[bool]:
        return [part.training for part in module.modules()]

    class Look(UnsafeCallback):
        @on(StepBegin, DistillationPhase)
        def begin(self, event: Event, phase: Phase, learner: Learner) -> None:
            learner.model.teacher[3].eval()  # one part in a mode of its own
            before.append(modes(learner.model.teacher))

        @on(LossBegin, DistillationPhase)
        def after(self, event: Event, phase: Phase, learner: Learner) -> None:
            after.append(modes(learner.model.teacher))

    learner = learner_of(Look())
    learner.model.teacher.register_forward_hook(lambda module, inputs, output: during.append(modes(module)))
    learner.fit(1, phases=[DistillationPhase()])
    assert during == [[False] * 6] * STEPS
    assert before == after == [[True, True, True, True, False, True]] * STEPS


def test_the_teacher_stays_as_it_is_to_the_bit_with_its_statistics() -> None:
    learner = learner_of()
    learner.fit(2, phases=[DistillationPhase()])
    found, before = learner.model.teacher.state_dict(), nets()["teacher"].state_dict()
    assert [name for name in before if not torch.equal(found[name], before[name])] == []


def test_the_teacher_answers_without_a_graph_and_gets_no_gradient() -> None:
    grad_modes: list[bool] = []
    answers: list[Tensor] = []

    class Look(UnsafeCallback):
        @on(LossBegin, DistillationPhase)
        def look(self, event: Event, phase: Phase, learner: Learner) -> None:
            answers.append(learner.step.teacher_preds)

    learner = learner_of(Look())
    learner.model.teacher.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    learner.fit(1, phases=[DistillationPhase()])
    assert grad_modes == [False] * STEPS
    assert not any(answer.requires_grad for answer in answers)
    assert all(parameter.grad is None for parameter in learner.model.teacher.parameters())
    assert learner.optimizer_names == ("student",)


def test_a_teacher_that_fails_gets_its_own_modes_back() -> None:
    def fail(module: nn.Module, inputs: Any) -> None:
        raise RuntimeError("no answer")

    learner = learner_of()
    learner.model.teacher[4].register_forward_pre_hook(fail)
    learner.model.teacher.train()
    with pytest.raises(RuntimeError, match="no answer"):
        DistillationPhase().step(learner, next(iter(batches())))
    assert all(part.training for part in learner.model.teacher.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("twin", [False, True], ids=["training", "validation"])
def test_a_teacher_that_is_trained_is_refused(twin: bool) -> None:
    models = nets()
    models["teacher"][4].requires_grad_(True)
    learner = learner_of(model=models)
    before = bits(learner)
    phase = DistillationPhase()
    with pytest.raises(PhaseError, match=r"learns from a frozen teacher.*write teacher.requires_grad_\(False\)"):
        learner.fit(1, phases=[ObjectiveValidationPhase(phase) if twin else phase])
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


# The validation twin


def test_the_twin_gives_the_loss_of_held_out_rows_without_updates() -> None:
    recorder = EventRecorder()
    learner = learner_of(recorder)
    before = bits(learner)
    xs, ys = next(iter(batches()))
    learner.epoch(ObjectiveValidationPhase(DistillationPhase(2.0, 0.3)), [(xs, ys)])
    assert recorder.events == ["EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]
    student, teacher = (model.eval() for model in nets().values())
    with torch.no_grad():
        logits = student(xs)
        expected = 0.3 * soft_loss(logits, teacher(xs), 2.0) + 0.7 * cross_entropy(logits, ys)
    assert torch.equal(learner.step.loss, expected)
    assert not learner.step.loss.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


def test_the_twin_only_watches_and_is_evaluated() -> None:
    phase = DistillationPhase()
    plain, watched = learner_of(), learner_of(Recorder(), Metrics())
    plain.fit(3, phases=[phase])
    watched.fit(3, phases=[phase, ObjectiveValidationPhase(phase)])
    assert_same_bits(plain, watched)
    found = watched.evaluate(phase=ObjectiveValidationPhase(phase))
    assert found == {"loss": watched.history["validation/loss"][-1]}


# What cannot be


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: {"student": net(1), "coach": net(2)}, r"learner.model.teacher, and the models are \['student', 'co"),
        (lambda: net(1), r"learner.model.student, and the models are \['0', '1', '2', '3', '4'\]"),
    ],
    ids=["another name", "a single model"],
)
def test_missing_models_are_an_error_that_says_what_to_write(model: Callable[[], Any], words: str) -> None:
    with pytest.raises(PhaseError, match=f"DistillationPhase calls {words}") as raised:
        learner_of(model=model()).fit(1, phases=[DistillationPhase()])
    assert "Learner({'student': ..., 'teacher': ...})" in str(raised.value)


@pytest.mark.parametrize("twin", [False, True], ids=["training", "validation"])
@pytest.mark.parametrize(
    ("batch", "described"),
    [(torch.zeros(4, SIZE), r"a Tensor of shape \(4, 6\)"), ((torch.zeros(4, SIZE),) * 3, "a tuple of length 3")],
    ids=["tensor", "three"],
)
def test_a_batch_that_is_no_pair_is_refused(batch: Any, described: str, twin: bool) -> None:
    learner = learner_of()
    before = bits(learner)
    phase = DistillationPhase()
    with pytest.raises(BatchError, match=f"DistillationPhase was given {described} as a batch; expected a pair"):
        learner.epoch(ObjectiveValidationPhase(phase) if twin else phase, [batch])
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
