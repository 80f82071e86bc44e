from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import (
    EMA,
    Accelerator,
    BarlowTwinsPhase,
    BatchError,
    BYOLPhase,
    Callback,
    CustomCallback,
    DINOPhase,
    Event,
    JointEmbeddingPhase,
    Learner,
    LossBegin,
    Metrics,
    MoCoPhase,
    MultiCrop,
    ObjectivePhase,
    ObjectiveValidationPhase,
    PhaseError,
    Recorder,
    SimCLRPhase,
    SimSiamPhase,
    StepBegin,
    StepEnd,
    TeacherPhase,
    TwoViews,
    UnsafeCallback,
    VICRegPhase,
    ViewDataset,
    on,
    stream_seed,
)
from fluxloop.losses import nt_xent
from fluxloop.testing import EventRecorder, assert_observer, assert_same_bits, bits, infer_access

SEED = 4
ROWS, BATCH, WIDTH, FEATURES, EMBEDDING = 18, 4, 6, 10, 5
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
STEP = ["StepBegin", "LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd", "StepEnd"]
VALIDATION = ["StepBegin", "LossBegin", "StepEnd"]


class Network(nn.Module):
    """An encoder and a projector; as one module it may be trained with labels too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU(), nn.Dropout(0.2))
        self.projector = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, EMBEDDING))

    def forward(self, xs: Tensor) -> Tensor:
        return self.projector(self.encoder(xs))


def network() -> Network:
    torch.manual_seed(1)
    return Network()


def predictor() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(EMBEDDING, 3), nn.ReLU(), nn.Linear(3, EMBEDDING))


def parts(*names: str) -> dict[str, nn.Module]:
    """Make models by name, the same ones each time."""
    whole = network()
    made = {
        "encoder": whole.encoder,
        "projector": whole.projector,
        "predictor": predictor(),
        "student": whole,
        "teacher": copy.deepcopy(whole).requires_grad_(False),
    }
    return {name: made[name] for name in names}


def augment(xs: Tensor) -> Tensor:
    return xs * (0.8 + 0.4 * torch.rand(len(xs), 1)) + 0.1 * torch.randn_like(xs)


PLAIN: dict[str, tuple[Callable[..., JointEmbeddingPhase], tuple[str, ...]]] = {
    "SimCLR": (SimCLRPhase, ("encoder", "projector")),
    "Barlow Twins": (BarlowTwinsPhase, ("encoder", "projector")),
    "VICReg": (VICRegPhase, ("encoder", "projector")),
    "SimSiam": (SimSiamPhase, ("encoder", "projector", "predictor")),
}
TEACHERS: dict[str, tuple[Callable[..., JointEmbeddingPhase], tuple[str, ...]]] = {
    "BYOL": (BYOLPhase, ("student", "teacher", "predictor")),
    "DINO": (DINOPhase, ("student", "teacher")),
    "MoCo": (partial(MoCoPhase, queue_size=7), ("student", "teacher")),
}
METHODS = {**PLAIN, **TEACHERS}
KEEPING = ["DINO", "MoCo"]
"""The methods whose phase keeps a state."""


def rows() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def batches() -> list[Tensor]:
    return list(rows().split(BATCH))


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Make two views of each batch, the same ones each time."""
    torch.manual_seed(3)
    return [(augment(xs), augment(xs)) for xs in batches()]


def labels(xs: Tensor) -> Tensor:
    return torch.arange(len(xs))


def make_learner(method: str, data: Any, *callbacks: Callback, models: Any = None, **options: Any) -> Learner:
    given = [*callbacks, *([EMA("student", 0.9, into="teacher")] if method in TEACHERS else [])]
    models = parts(*METHODS[method][1]) if models is None else models
    options = {"optimizer": SGD, "default_callbacks": False, "seed": SEED, **options}
    data = data if isinstance(data, dict) else {"training": data}
    return Learner(models, data=data, callbacks=given, accelerator=Accelerator("cpu"), **options)


def make_phase(method: str, views: Any = None, **options: Any) -> JointEmbeddingPhase:
    return METHODS[method][0](views, **options)


def keep_losses(losses: list[Tensor]) -> CustomCallback:
    return CustomCallback(lambda learner: losses.append(learner.step.loss.detach()), StepEnd, ObjectivePhase)


def shapes(learner: Learner, *names: str) -> dict[str, Any]:
    """Give the shapes of a step's entries, of each tensor in those that hold several."""
    found = {name: learner.step[name] for name in names}
    return {
        name: tuple(entry.shape) if isinstance(entry, Tensor) else [tuple(tensor.shape) for tensor in entry]
        for name, entry in found.items()
    }


# Batches


def labelled(data: list[Any]) -> list[Any]:
    return [(views, torch.arange(len(views[0]))) for views in data]


FORMS: dict[str, Callable[[], Iterable[Any]]] = {
    "tuples of views": pairs,
    "lists of views": lambda: [list(views) for views in pairs()],
    "views and labels": lambda: labelled(pairs()),
    "lists of views and labels": lambda: [[list(views), ys] for views, ys in labelled(pairs())],
}


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_batches_may_hold_the_views_in_any_form_with_and_without_labels(method: str, form: str) -> None:
    learner, plain = make_learner(method, list(FORMS[form]())), make_learner(method, pairs())
    for each in (learner, plain):
        each.fit(1, phases=[make_phase(method)])
    assert_same_bits(learner, plain)
    found = shapes(learner, "views", "features", "loss")
    assert found == {"views": [(2, WIDTH)] * 2, "features": (2, FEATURES), "loss": ()}
    assert isinstance(learner.step.views, tuple)
    assert "xs" not in learner.step
    if "labels" in form:
        assert torch.equal(learner.step.ys, torch.arange(2))
    else:
        assert "ys" not in learner.step


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("form", ["inputs", "tuples of one", "inputs and labels", "lists of inputs and labels"])
@pytest.mark.parametrize("method", METHODS)
def test_the_phase_makes_the_views_of_inputs_with_and_without_labels(method: str, form: str) -> None:
    data: dict[str, list[Any]] = {
        "inputs": batches(),
        "tuples of one": [(xs,) for xs in batches()],
        "inputs and labels": [(xs, labels(xs)) for xs in batches()],
        "lists of inputs and labels": [[xs, labels(xs)] for xs in batches()],
    }
    learner, plain = make_learner(method, data[form]), make_learner(method, batches())
    for each in (learner, plain):
        each.fit(1, phases=[make_phase(method, TwoViews(augment))])
    assert_same_bits(learner, plain)
    assert torch.equal(learner.step.xs, batches()[-1])
    assert ("ys" in learner.step) is ("labels" in form)
    assert shapes(learner, "views") == {"views": [(2, WIDTH)] * 2}
    assert not torch.equal(*learner.step.views)


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_loader_over_a_view_dataset_gives_the_batches(method: str, with_labels: bool) -> None:
    def views(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 0.1, x.flip(0)

    source = TensorDataset(rows(), torch.arange(ROWS)) if with_labels else TensorDataset(rows())
    loader = DataLoader(ViewDataset(source, views), batch_size=BATCH)
    learner = make_learner(method, loader)
    plain = make_learner(method, [(xs + 0.1, xs.flip(1)) for xs in batches()])
    for each in (learner, plain):
        each.fit(2, phases=[make_phase(method)])
    assert_same_bits(learner, plain)
    assert ("ys" in learner.step) is with_labels


def test_the_number_of_rows_of_a_step_is_that_of_one_view() -> None:
    sizes: list[int] = []
    note = CustomCallback(lambda learner: sizes.append(learner.batch_size), StepEnd, reads=("batch_size",))
    make_learner("SimCLR", pairs(), note).fit(1, phases=[SimCLRPhase()])
    assert sizes == [4, 4, 4, 4, 2]


def test_the_loss_of_an_epoch_is_weighted_by_the_rows() -> None:
    losses: list[Tensor] = []
    learner = make_learner("SimCLR", pairs(), keep_losses(losses), Recorder(), Metrics())
    history = learner.fit(1, phases=[SimCLRPhase()])
    expected = sum(n * loss.item() for n, loss in zip([4, 4, 4, 4, 2], losses, strict=True)) / ROWS
    assert history["training/loss"] == pytest.approx([expected])


# Wrong batches


@pytest.mark.slow(quick=10)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "DINO"])
@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (rows()[:4], r"was given a Tensor of shape \(4, 6\) as views; expected 2 of each row"),
        ([rows()[:4]], r"was given a list of length 1 as views; expected 2 of each row"),
        ((rows()[:4],) * 3, r"was given a tuple of length 3 as views; expected 2 of each row"),
        (((rows()[:4],) * 3, torch.arange(4)), r"was given a tuple of length 3 as views; expected 2 of each row"),
        ({"xs": rows()[:4]}, r"was given a dict of length 1 as views; expected 2 of each row"),
        (
            (rows()[:4], torch.arange(4)),
            r"was given the batch \(a Tensor of shape \(4, 6\), a Tensor of shape \(4,\)\), which are not two views of "
            r"the same rows; for rows with labels give the phase what makes views",
        ),
        ((rows()[:4], rows()[:3]), r"which are not two views of the same rows"),
        ((rows()[:4], torch.tensor(1.0)), r"which are not two views of the same rows"),
    ],
    ids=["tensor", "one view", "three views", "views and labels", "dict", "inputs and labels", "other rows", "scalar"],
)
def test_a_batch_without_two_views_says_what_to_do(method: str, batch: Any, words: str) -> None:
    learner = make_learner(method, [batch])
    before = bits(learner)
    with pytest.raises(BatchError, match=words) as error:
        learner.fit(1, phases=[make_phase(method)])
    name = type(make_phase(method)).__name__
    assert str(error.value).startswith(name)
    assert f"{name}(views=TwoViews(augment))" in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in bits(learner).items())


@pytest.mark.slow(quick=9)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "DINO"])
@pytest.mark.parametrize(
    ("views", "words"),
    [
        (lambda xs: xs, r"was given a Tensor of shape \(4, 6\) as views; expected 2 of each row"),
        (lambda xs: (xs,) * 3, r"was given a tuple of length 3 as views; expected 2"),
        (MultiCrop(augment, augment, num_local=2), r"was given a tuple of length 4 as views; expected 2"),
        (lambda xs: (xs, xs[:2]), "which are not two views of the same rows"),
    ],
    ids=["one tensor", "three views", "crops", "other rows"],
)
def test_views_that_are_not_two_are_refused(method: str, views: Any, words: str) -> None:
    learner = make_learner(method, batches())
    with pytest.raises(BatchError, match=words):
        learner.fit(1, phases=[make_phase(method, views)])


@pytest.mark.parametrize("batch", [rows()[:4], [rows()[:4]], ((rows()[:4],), torch.arange(4))])
def test_a_batch_of_fewer_than_two_crops_says_what_to_do(batch: Any) -> None:
    with pytest.raises(BatchError, match=r"DINOPhase was given .* as views; expected two or more of each row"):
        make_learner("DINO", [batch]).fit(1, phases=[DINOPhase()])


def test_inputs_and_labels_are_not_taken_for_crops() -> None:
    with pytest.raises(BatchError, match="which are not two views of the same rows"):
        make_learner("DINO", [(rows()[:4], torch.arange(4))]).fit(1, phases=[DINOPhase()])


def test_what_is_wrong_with_a_batch_is_found_in_validation_too() -> None:
    learner = make_learner("SimCLR", {"validation": batches()})
    with pytest.raises(BatchError, match="SimCLRPhase was given a Tensor"):
        learner.evaluate(phase=ObjectiveValidationPhase(SimCLRPhase()))


# Models


class Pair(NamedTuple):
    encoder: nn.Module
    projector: nn.Module


def named_tuple() -> Pair:
    return Pair(**parts("encoder", "projector"))


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "named models": (lambda: parts("encoder", "projector"), SGD),
    "named models with an optimizer each": (
        lambda: parts("encoder", "projector"),
        {"encoder": SGD, "projector": SGD},
    ),
    "named tuple": (named_tuple, SGD),
    "one module with both": (network, SGD),
    "one module with two optimizers": (network, {"encoder": SGD, "projector": SGD}),
    "one plain module": (lambda: nn.Sequential(*parts("encoder", "projector").values()), SGD),
    "an encoder alone": (lambda: {"encoder": nn.Sequential(*parts("encoder", "projector").values())}, SGD),
}


def weights(learner: Learner) -> list[Tensor]:
    return [tensor for model in learner.modules() for tensor in model.state_dict().values()]


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize("phase", [SimCLRPhase, BarlowTwinsPhase, VICRegPhase])
def test_models_may_be_given_in_any_form_with_the_same_bits(phase: Any, models: str) -> None:
    make, optimizer = MODELS[models]
    learner = make_learner("SimCLR", batches(), models=make(), optimizer=optimizer)
    named = make_learner("SimCLR", batches())
    for each in (learner, named):
        each.fit(2, phases=[phase(TwoViews(augment))])
    assert all(map(torch.equal, weights(learner), weights(named)))
    assert len(weights(learner)) == len(weights(named))
    assert torch.equal(learner.step.z1, named.step.z1)


@pytest.mark.parametrize("models", ["one plain module", "an encoder alone"])
def test_without_a_projector_the_features_are_compared(models: str) -> None:
    learner = make_learner("SimCLR", batches(), models=MODELS[models][0]())
    learner.fit(1, phases=[SimCLRPhase(TwoViews(augment))])
    assert learner.step.features.shape == (2, EMBEDDING)
    assert torch.equal(learner.step.features, learner.step.z1)


def test_a_single_module_without_a_projector_is_called_as_it_is() -> None:
    class Whole(Network):
        """Names its last part otherwise."""

        def __init__(self) -> None:
            super().__init__()
            self.head = self.projector
            del self.projector

        def forward(self, xs: Tensor) -> Tensor:
            return self.head(self.encoder(xs))

    torch.manual_seed(1)
    learner, named = make_learner("SimCLR", batches(), models=Whole()), make_learner("SimCLR", batches())
    for each in (learner, named):
        each.fit(1, phases=[SimCLRPhase(TwoViews(augment))])
    assert all(map(torch.equal, weights(learner), weights(named)))
    assert torch.equal(learner.step.features, learner.step.z1)


def test_a_single_module_with_a_projector_and_no_encoder_is_told_so_before_anything_runs() -> None:
    whole, recorder = network(), EventRecorder()
    whole.backbone = whole.encoder
    del whole.encoder
    learner = make_learner("SimCLR", batches(), recorder, models=whole)
    with pytest.raises(PhaseError, match=r"SimCLRPhase calls learner\.model\.encoder, and the models are"):
        learner.fit(1, phases=[SimCLRPhase(TwoViews(augment))])
    assert recorder.trace == []


def one_module(names: tuple[str, ...]) -> nn.Module:
    whole = nn.Module()
    for name, model in parts(*names).items():
        whole.add_module(name, model)
    return whole


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("method", METHODS)
def test_all_models_may_be_attributes_of_one_module_with_the_same_bits(method: str) -> None:
    learner = make_learner(method, batches(), models=one_module(METHODS[method][1]))
    named = make_learner(method, batches())
    for each in (learner, named):
        each.fit(2, phases=[make_phase(method, TwoViews(augment))])
    assert all(map(torch.equal, weights(learner), weights(named)))


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("method", TEACHERS)
def test_a_student_may_be_one_plain_network(method: str) -> None:
    def plain() -> dict[str, nn.Module]:
        student = nn.Sequential(*parts("encoder", "projector").values())
        given = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
        return {**given, "predictor": predictor()} if method == "BYOL" else given

    learner, named = make_learner(method, batches(), models=plain()), make_learner(method, batches())
    for each in (learner, named):
        each.fit(2, phases=[make_phase(method, TwoViews(augment))])
    assert all(map(torch.equal, weights(learner), weights(named)))
    assert learner.step.features.shape == (2, EMBEDDING)


# Missing models


REQUIRED = {
    "SimCLR": ["encoder"],
    "Barlow Twins": ["encoder"],
    "VICReg": ["encoder"],
    "SimSiam": ["encoder", "predictor"],
    "BYOL": ["student", "teacher", "predictor"],
    "DINO": ["student", "teacher"],
    "MoCo": ["student", "teacher"],
}


@pytest.mark.slow(quick=7)
@pytest.mark.parametrize(("method", "missing"), [(method, name) for method in REQUIRED for name in REQUIRED[method]])
def test_a_missing_model_is_named_before_anything_runs(method: str, missing: str) -> None:
    left = [name for name in METHODS[method][1] if name != missing]
    recorder = EventRecorder()
    data = {"training": pairs(), "validation": pairs()}
    options = {"optimizer": SGD, "default_callbacks": False, "accelerator": Accelerator("cpu")}
    learner = Learner(parts(*left), data=data, callbacks=[recorder], **options)
    phase = make_phase(method)
    dictionary = ", ".join(f"{name!r}: ..." for name in REQUIRED[method])
    expected = (
        f"{type(phase).__name__} calls learner.model.{missing}, and the models are {left}; expected "
        f"{', '.join(REQUIRED[method])}: Learner({{{dictionary}}}), or one module with these attributes"
    )
    for run in (
        lambda: learner.fit(1, phases=[phase]),
        lambda: learner.epoch(phase),
        lambda: learner.evaluate(phase=ObjectiveValidationPhase(phase)),
    ):
        with pytest.raises(PhaseError) as error:
            run()
        assert str(error.value) == expected
    (problem,) = learner.check(phases=[phase])
    assert expected in problem
    assert recorder.trace == []


@pytest.mark.parametrize("phase", [SimSiamPhase, BYOLPhase, DINOPhase, MoCoPhase])
def test_one_module_without_the_parts_is_told_what_it_has(phase: Any) -> None:
    learner = make_learner("SimCLR", batches(), models=network())
    with pytest.raises(PhaseError, match=r"calls learner.model.\w+, and the models are \['encoder', 'projector'\]"):
        learner.fit(1, phases=[phase(TwoViews(augment))])


def test_models_without_names_are_told_to_have_some() -> None:
    learner = make_learner("SimCLR", batches(), models=tuple(parts("encoder", "projector").values()))
    with pytest.raises(PhaseError, match=r"SimCLRPhase calls learner.model.encoder, and the models are none"):
        learner.fit(1, phases=[SimCLRPhase(TwoViews(augment))])


# A teacher is moved


def teaching(method: str, *callbacks: Callback) -> Learner:
    options = {"optimizer": SGD, "default_callbacks": False, "seed": SEED, "accelerator": Accelerator("cpu")}
    data = {"training": pairs(), "validation": pairs()}
    return Learner(parts(*METHODS[method][1]), data=data, callbacks=callbacks, **options)


@pytest.mark.parametrize("callbacks", [(), (EMA("student", 0.9),)], ids=["no callback", "an average elsewhere"])
@pytest.mark.parametrize("method", TEACHERS)
def test_a_teacher_that_nobody_moves_is_found_before_anything_runs(method: str, callbacks: tuple[Any, ...]) -> None:
    recorder = EventRecorder()
    learner = teaching(method, recorder, *copy.deepcopy(callbacks))
    phase = make_phase(method)
    words = (
        rf"{type(phase).__name__} learns from learner.model.teacher, .*which no callback moves.*; add "
        r"EMA\('student', 0.99, into='teacher'\) to the callbacks"
    )
    for run in (lambda: learner.fit(1, phases=[phase]), lambda: learner.epoch(phase)):
        with pytest.raises(PhaseError, match=words):
            run()
    assert recorder.trace == []


@pytest.mark.parametrize("method", TEACHERS)
def test_a_part_of_a_teacher_that_nobody_moves_is_named(method: str) -> None:
    learner = teaching(method, EMA("student.encoder", 0.9, into="teacher.encoder"))
    with pytest.raises(PhaseError, match=r"of which no callback moves 'projector\.0\.weight'"):
        learner.fit(1, phases=[make_phase(method)])


def test_a_phase_may_move_the_teacher_itself() -> None:
    class Copying(BYOLPhase):
        moves_teacher = True

        def finish(self, learner: Any, state: Any) -> None:
            learner.model.teacher.load_state_dict(learner.model.student.state_dict())

    learner = teaching("BYOL")
    learner.fit(1, phases=[Copying()])
    student, teacher = learner.model.student.state_dict(), learner.model.teacher.state_dict()
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in student.items())


@pytest.mark.parametrize("method", TEACHERS)
def test_evaluation_needs_nobody_who_moves_the_teacher(method: str) -> None:
    learner = teaching(method)
    found = learner.evaluate(phase=ObjectiveValidationPhase(make_phase(method)))
    assert set(found) == {"loss"}


class Moving(Callback):
    """Another way to move the teacher: a copy of the student after each step."""

    reads = ("model.student",)
    writes: tuple[str, ...] = ("model.teacher",)

    @on(StepEnd, TeacherPhase)
    def copy(self, event: Event, phase: Any, learner: Any) -> None:
        learner.model.teacher.load_state_dict(learner.model.student.state_dict())


class MovingAll(Moving):
    reads = ()
    writes = ("model",)


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("callback", [Moving, MovingAll])
@pytest.mark.parametrize("method", TEACHERS)
def test_a_callback_of_ones_own_may_move_the_teacher(method: str, callback: Any) -> None:
    learner = teaching(method, callback())
    learner.fit(1, phases=[make_phase(method)])
    student, teacher = learner.model.student.state_dict(), learner.model.teacher.state_dict()
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in student.items())


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("method", TEACHERS)
def test_the_parts_of_a_teacher_may_be_moved_each_by_an_average_of_its_own(method: str) -> None:
    halves = [EMA(f"student.{part}", 0.9, into=f"teacher.{part}", name=part) for part in ("encoder", "projector")]
    learner, whole = teaching(method, *halves), teaching(method, EMA("student", 0.9, into="teacher"))
    for each in (learner, whole):
        each.fit(1, phases=[make_phase(method)])
    assert_same_bits(learner, whole)


# Events and entries


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("method", METHODS)
def test_the_events_of_a_step_are_those_of_an_objective(method: str) -> None:
    recorder = EventRecorder()
    learner = make_learner(method, pairs(), recorder)
    learner.epoch(make_phase(method))
    optimizers = len(learner.optimizer_names)
    step = [*STEP[:4], *["UpdateBegin", "UpdateEnd"] * optimizers, "StepEnd"]
    assert recorder.events == ["EpochBegin", *step * 5, "EpochEnd"]


STORED = {
    "SimCLR": ["features", "z1", "z2"],
    "Barlow Twins": ["features", "z1", "z2"],
    "VICReg": ["features", "z1", "z2"],
    "SimSiam": ["features", "z1", "z2", "p1", "p2"],
    "BYOL": ["features", "p1", "p2", "t1", "t2"],
    "DINO": ["features", "student", "teacher"],
    "MoCo": ["features", "queries", "keys"],
}


class Seen(UnsafeCallback):
    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, list[str]] = {}

    @on(Event, ObjectivePhase)
    def note(self, event: Event, phase: Any, learner: Any) -> None:
        self.entries[type(event).__name__] = list(learner.step)


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("made_here", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_entries_are_there_when_the_docstrings_say(method: str, made_here: bool) -> None:
    seen = Seen()
    data = [(xs, labels(xs)) for xs in batches()] if made_here else labelled(pairs())
    learner = make_learner(method, data, seen)
    learner.epoch(make_phase(method, TwoViews(augment) if made_here else None))
    at = {event: set(entries) for event, entries in seen.entries.items()}
    assert at["StepBegin"] == {"xs" if made_here else "views", "ys"}
    assert at["LossBegin"] == at["StepBegin"] | {"views", *STORED[method]}
    assert at["BackwardBegin"] == at["LossBegin"] | {"loss"}
    assert at["BackwardEnd"] == at["StepEnd"] == at["BackwardBegin"] | {"grads"}


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("method", METHODS)
def test_the_entries_have_the_shapes_that_the_docstrings_say(method: str) -> None:
    learner = make_learner(method, pairs())
    learner.epoch(make_phase(method))
    features, embedding = (2, FEATURES), (2, EMBEDDING)
    wanted = {name: embedding for name in STORED[method]} | {"features": features, "loss": ()}
    if method == "DINO":
        wanted |= {"student": [embedding] * 2, "teacher": [embedding] * 2}
    assert shapes(learner, *wanted) == wanted


@pytest.mark.parametrize("method", METHODS)
def test_the_features_are_those_of_the_first_view(method: str) -> None:
    learner = make_learner(method, {"validation": pairs()[:1]})
    learner.epoch(ObjectiveValidationPhase(make_phase(method)))  # without dropout
    fresh = parts(*METHODS[method][1])
    encoder = (fresh["student"].encoder if method in TEACHERS else fresh["encoder"]).eval()
    assert torch.equal(learner.step.features, encoder(pairs()[0][0]))


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("made_here", [False, True])
def test_inputs_that_a_callback_replaces_are_the_ones_that_are_seen(method: str, made_here: bool) -> None:
    def replace(learner: Any) -> None:
        if made_here:
            learner.step.xs = 2 * learner.step.xs
        else:
            learner.step.views = tuple(2 * view for view in learner.step.views)

    written = ("step.xs",) if made_here else ("step.views",)
    change = CustomCallback(replace, StepBegin, reads=(), writes=written)
    data: list[Any] = batches() if made_here else pairs()
    doubled = [2 * xs for xs in batches()] if made_here else [(2 * a, 2 * b) for a, b in pairs()]
    views = TwoViews(augment) if made_here else None
    changed, expected = make_learner(method, data, change), make_learner(method, doubled)
    for each in (changed, expected):
        each.fit(1, phases=[make_phase(method, views)])
    assert_same_bits(changed, expected)


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("method", METHODS)
def test_an_embedding_that_a_callback_replaces_is_the_one_the_loss_gets(method: str) -> None:
    name = STORED[method][1]

    def replace_entry(learner: Any) -> None:
        entry = learner.step[name]
        new = [t.roll(1, 0) for t in entry] if isinstance(entry, list) else entry.roll(1, 0)
        setattr(learner.step, name, new)

    change = CustomCallback(replace_entry, LossBegin, reads=(), writes=(f"step.{name}",))
    losses: list[Tensor] = []
    unchanged: list[Tensor] = []
    make_learner(method, pairs()[:1], change, keep_losses(losses)).fit(1, phases=[make_phase(method)])
    make_learner(method, pairs()[:1], keep_losses(unchanged)).fit(1, phases=[make_phase(method)])
    assert not torch.equal(losses[0], unchanged[0])


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_go_to_every_model_but_the_teacher(method: str) -> None:
    learner = make_learner(method, pairs())
    learner.epoch(make_phase(method))
    without = {name for name, gradient in learner.step.grads.items() if gradient is None}
    assert without == {name for name in learner.step.grads if name.startswith("teacher.")}


# The validation twin


def both(make: Callable[[], Any] = pairs) -> dict[str, Any]:
    return {"training": make(), "validation": labelled(pairs())}


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("method", METHODS)
def test_the_twin_changes_no_weights_no_state_and_no_random_numbers(method: str) -> None:
    def train(*phases: Any) -> tuple[Learner, list[Tensor]]:
        losses: list[Tensor] = []
        data = {"training": batches(), "validation": [(xs + 1, labels(xs)) for xs in batches()]}
        learner = make_learner(method, data, keep_losses(losses))
        learner.fit(3, phases=phases)
        return learner, losses

    alone, watched = (make_phase(method, TwoViews(augment)) for _ in range(2))
    (one, losses), (other, same) = train(alone), train(watched, ObjectiveValidationPhase(watched))
    assert_same_bits(one, other)
    assert all(map(torch.equal, losses, same))
    assert len(losses) == len(same) == 15
    if method in KEEPING:
        assert_same_state(alone, watched)


def assert_same_state(one: Any, other: Any) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        assert same, f"{name} differs"


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("method", METHODS)
def test_the_twin_is_an_observer_of_supervised_training_too(method: str) -> None:
    class Labelled(nn.Module):
        """Has the parts of every method, and may be trained with labels."""

        def __init__(self) -> None:
            super().__init__()
            for name, model in parts("student", "teacher", "predictor").items():
                self.add_module(name, model)
            self.encoder, self.projector = self.student.encoder, self.student.projector

        def forward(self, xs: Tensor) -> Tensor:
            return self.predictor(self.student(xs))

    def make() -> Learner:
        data = {"training": [(xs, xs[:, :EMBEDDING]) for xs in batches()], "validation": pairs()}
        options = {"optimizer": SGD, "default_callbacks": False, "seed": SEED, "accelerator": Accelerator("cpu")}
        return Learner(Labelled(), nn.functional.mse_loss, data=data, **options)

    assert_observer(ObjectiveValidationPhase(make_phase(method)), make)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_between_two_epochs_changes_nothing(method: str) -> None:
    def train(evaluate: bool) -> tuple[Learner, Any, list[Tensor]]:
        losses: list[Tensor] = []
        learner = make_learner(method, both(), keep_losses(losses))
        phase = make_phase(method)
        learner.fit(1, phases=[phase])
        if evaluate:
            before = copy.deepcopy(phase.state_dict()) if method in KEEPING else None
            found = [learner.evaluate(phase=ObjectiveValidationPhase(phase)) for _ in range(2)]
            assert found[0] == found[1]
            if before is not None:
                after = phase.state_dict()
                assert all(torch.equal(torch.as_tensor(after[name]), torch.as_tensor(before[name])) for name in before)
        learner.fit(1, phases=[phase])
        return learner, phase, losses

    (one, _, losses), (other, _, same) = train(False), train(True)
    assert_same_bits(one, other)
    assert all(map(torch.equal, losses, same))


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_gives_the_loss_of_the_models_in_eval_mode(method: str) -> None:
    learner = make_learner(method, both())
    phase = make_phase(method)
    learner.fit(1, phases=[phase])
    found = learner.evaluate(pairs()[:1], phase=ObjectiveValidationPhase(phase))
    for model in learner.modules():
        model.eval()
    state = type(learner.step)({"views": pairs()[0]})
    with torch.no_grad():
        phase.forward(learner, state)
        expected = phase.loss(learner, state).item()
    assert found == pytest.approx({"loss": expected})


@pytest.mark.parametrize("method", METHODS)
def test_the_events_of_a_validation_step_are_three(method: str) -> None:
    recorder = EventRecorder()
    learner = make_learner(method, both(), recorder)
    learner.epoch(ObjectiveValidationPhase(make_phase(method)))
    assert recorder.events == ["EpochBegin", *VALIDATION * 5, "EpochEnd"]
    assert learner.step.loss.shape == ()
    assert not learner.step.loss.requires_grad
    assert "ys" in learner.step


# Check, state


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("method", METHODS)
def test_a_check_finds_nothing_and_leaves_everything_as_it_was(method: str) -> None:
    def train(check: bool) -> tuple[Learner, Any, list[Tensor]]:
        losses: list[Tensor] = []
        learner = make_learner(method, batches(), keep_losses(losses))
        phase = make_phase(method, TwoViews(augment))
        for _ in range(2):
            if check:
                assert learner.check(phases=[phase]) == []
            learner.fit(1, phases=[phase])
        return learner, phase, losses

    (one, alone, losses), (other, checked, same) = train(False), train(True)
    assert_same_bits(one, other)
    assert all(map(torch.equal, losses, same))
    if method in KEEPING:
        assert_same_state(alone, checked)


@pytest.mark.parametrize("method", KEEPING)
def test_an_evaluation_before_the_first_step_leaves_a_phase_without_a_state(method: str) -> None:
    learner, phase = make_learner(method, both()), make_phase(method)
    before = copy.deepcopy(phase.state_dict())
    learner.evaluate(phase=ObjectiveValidationPhase(phase))
    assert phase.state_dict() == before


@pytest.mark.parametrize("method", KEEPING)
def test_a_check_before_the_first_step_leaves_a_phase_without_a_state(method: str) -> None:
    learner, phase = make_learner(method, pairs()), make_phase(method)
    before = phase.state_dict()
    learner.check(phases=[phase])
    assert phase.state_dict() == before
    assert None in before.values()


@pytest.mark.parametrize("method", KEEPING)
def test_inferring_the_access_of_a_callback_leaves_the_phase_as_it_was(method: str) -> None:
    learner, phase = make_learner(method, pairs()), make_phase(method)
    before = copy.deepcopy(phase.state_dict())
    infer_access(Recorder(), learner, phases=[phase])
    assert phase.state_dict() == before


@pytest.mark.parametrize("method", KEEPING)
def test_a_kept_state_goes_on_to_the_same_bits_in_another_instance(method: str) -> None:
    whole, losses = make_learner(method, pairs(), keep_losses(one := [])), one
    phase = make_phase(method)
    whole.fit(1, phases=[phase])
    parted = make_learner(method, pairs(), keep_losses(same := []))
    first, second = make_phase(method), make_phase(method)
    parted.epoch(first, pairs()[:3])
    second.load_state_dict(first.state_dict())
    parted.epoch(second, pairs()[3:])
    assert all(map(torch.equal, losses, same))
    assert_same_bits(whole, parted)
    assert_same_state(phase, second)


@pytest.mark.parametrize("method", KEEPING)
def test_a_kept_state_does_not_change_as_the_training_goes_on(method: str) -> None:
    learner, phase = make_learner(method, pairs()), make_phase(method)
    learner.fit(1, phases=[phase])
    kept = phase.state_dict()
    before = copy.deepcopy(kept)
    learner.fit(1, phases=[phase])
    assert all(torch.equal(torch.as_tensor(kept[name]), torch.as_tensor(before[name])) for name in before)


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize("method", METHODS)
def test_modes_and_frozen_parameters_are_as_they_were_after_a_fit(method: str) -> None:
    learner = make_learner(method, pairs())
    frozen = [parameter.requires_grad for model in learner.modules() for parameter in model.parameters()]
    for model in learner.modules():
        model.eval()
    learner.fit(1, phases=[make_phase(method)])
    assert not any(module.training for model in learner.modules() for module in model.modules())
    now = [parameter.requires_grad for model in learner.modules() for parameter in model.parameters()]
    assert now == frozen


# A method of one's own


class Aligned(JointEmbeddingPhase):
    def loss(self, learner: Any, state: Any) -> Tensor:
        return (state.z1 - state.z2).pow(2).sum(1).mean()


def test_a_method_of_ones_own_says_a_loss_and_equals_a_hand_written_loop() -> None:
    losses: list[Tensor] = []
    learner = make_learner("SimCLR", batches(), keep_losses(losses))
    learner.fit(1, phases=[Aligned(TwoViews(augment))])
    model = network()
    optimizer = SGD(model.parameters())
    for step, xs in enumerate(batches()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        view1, view2 = augment(xs), augment(xs)
        loss = (model(view1) - model(view2)).pow(2).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(losses[step], loss.detach())
    assert all(map(torch.equal, weights(learner), model.state_dict().values()))


def test_a_method_of_ones_own_is_named_in_errors() -> None:
    with pytest.raises(BatchError, match=r"Aligned was given .*Aligned\(views=TwoViews\(augment\)\)"):
        make_learner("SimCLR", batches()).fit(1, phases=[Aligned()])
    with pytest.raises(PhaseError, match=r"Aligned calls learner.model.encoder"):
        make_learner("SimCLR", batches(), models=parts("projector")).fit(1, phases=[Aligned()])


def test_a_method_without_a_loss_says_what_to_write() -> None:
    with pytest.raises(PhaseError, match="JointEmbeddingPhase says no loss; write one"):
        make_learner("SimCLR", pairs()).fit(1, phases=[JointEmbeddingPhase()])


def test_a_built_in_method_may_be_extended_by_one_term() -> None:
    class Regularised(SimCLRPhase):
        def loss(self, learner: Any, state: Any) -> Tensor:
            state.contrast = super().loss(learner, state)
            return state.contrast + 0.1 * state.z1.pow(2).mean()

    learner = make_learner("SimCLR", pairs())
    learner.fit(1, phases=[Regularised(temperature=0.2)])
    step = learner.step
    torch.testing.assert_close(step.contrast, nt_xent(step.z1, step.z2, 0.2))
    torch.testing.assert_close(step.loss, step.contrast + 0.1 * step.z1.pow(2).mean())


def test_a_method_with_a_teacher_says_its_forward_and_its_loss() -> None:
    class Following(TeacherPhase):
        def forward(self, learner: Any, state: Any) -> None:
            view1, view2 = self.seen(state)
            _, state.z = self.embed(learner.model.student, view1)
            with torch.no_grad():
                _, state.t = self.embed(learner.model.teacher, view2)

        def loss(self, learner: Any, state: Any) -> Tensor:
            return (state.z - state.t).pow(2).mean()

    losses: list[Tensor] = []
    learner = make_learner("DINO", pairs(), keep_losses(losses))
    learner.fit(1, phases=[Following()])
    student, teacher = parts("student", "teacher").values()
    optimizer = SGD(student.parameters())
    for step, (view1, view2) in enumerate(pairs()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        z = student(view1)
        with torch.no_grad():
            t = teacher(view2)
        loss = (z - t).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, live in zip(teacher.parameters(), student.parameters(), strict=True):
                average.lerp_(live, 1 - 0.9)
        assert torch.equal(losses[step], loss.detach())
    expected = [*student.state_dict().values(), *teacher.state_dict().values()]
    assert all(map(torch.equal, weights(learner), expected))


def test_a_batch_of_views_with_more_beside_them_says_what_to_type() -> None:
    views = [torch.rand(4, WIDTH), torch.rand(4, WIDTH)]
    batch = (views, torch.zeros(4), torch.arange(4))
    with pytest.raises(BatchError, match=r"(?s)a batch of views and 2 items more; expected \(views, ys\).*def entries"):
        SimCLRPhase().entries(batch)
    assert set(SimCLRPhase().entries(batch[:2])) == {"views", "ys"}


@pytest.mark.parametrize("phase", [SimCLRPhase, MoCoPhase])
def test_a_compiled_model_with_a_part_encoder_and_a_forward_is_run_by_its_forward(phase: Any) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, xs: Tensor) -> Any:
            return self.head(self.encoder(xs))

    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        student: Any = torch.compile(Whole(), backend="eager") if compiled else Whole()
        models: Any = student
        callbacks: list[Callback] = []
        if phase is MoCoPhase:  # its teacher is a copy, of the compiled one too
            models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
            callbacks = [EMA("student", 0.5, into="teacher")]
        learner = Learner(
            models, data=(torch.randn(8, 4),), optimizer=SGD, callbacks=callbacks, default_callbacks=False, seed=0
        )
        learner.fit(1, phases=[phase(TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows)))])
        ends.append([tensor for model in learner.models.values() for tensor in model.state_dict().values()])
    for plain, other in zip(*ends, strict=True):
        torch.testing.assert_close(other, plain)
