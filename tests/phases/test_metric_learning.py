from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pairwise_distance, triplet_margin_loss
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import (
    BatchError,
    Event,
    Learner,
    ObjectiveValidationPhase,
    Phase,
    PhaseError,
    SupConPhase,
    TensorBatches,
    TripletPhase,
    UnsafeCallback,
    on,
    stream_seed,
)
from fluxloop.testing import EventRecorder, assert_same_bits, bits

SEED, BATCH, STEPS, SIZE, CODE, CLASSES = 3, 6, 5, 5, 4, 3
ADAM = partial(torch.optim.Adam, lr=0.01, fused=False)


def encoder() -> nn.Sequential:
    """Make a network that keeps statistics and draws numbers in train mode."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(SIZE, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, CODE))


def projector() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(CODE, 3)


def rows(count: int = STEPS * BATCH, seed: int = 0) -> Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    return torch.randint(CLASSES, (STEPS * BATCH,), generator=torch.Generator().manual_seed(9))


def learner_of(*callbacks: Any, model: Any = None, data: Any) -> Learner:
    return Learner(
        encoder() if model is None else model,
        data=(data, data),
        optimizer=ADAM,
        callbacks=callbacks,
        default_callbacks=False,
        seed=SEED,
    )


class Steps(UnsafeCallback):
    """Note the events, the entries at each, and the loss of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, set[str]]] = []
        self.losses: list[Tensor] = []

    @on(Event)
    def note(self, event: Event, phase: Phase, learner: Learner) -> None:
        self.seen.append((type(event).__name__, set(vars(learner.step))))
        if type(event).__name__ == "StepEnd":
            self.losses.append(learner.step.loss.detach())

    def of_one_step(self) -> list[tuple[str, set[str]]]:
        names = [name for name, _ in self.seen]
        return self.seen[names.index("StepBegin") : names.index("StepEnd") + 1]


def assert_equal(trained: nn.Module, expected: nn.Module, initial: nn.Module) -> None:
    found, wanted, before = trained.state_dict(), expected.state_dict(), initial.state_dict()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    assert [key for key in before if "weight" in key and torch.equal(found[key], before[key])] == []


# Supervised contrastive


def noisy(xs: Tensor) -> tuple[Tensor, Tensor]:
    """Make two views of a batch."""
    return xs + 0.1 * torch.randn_like(xs), xs + 0.1 * torch.randn_like(xs)


def supcon(z1: Tensor, z2: Tensor, ys: Tensor, temperature: float) -> Tensor:
    """Average the log-probabilities of the rows of the same class, in plain PyTorch."""
    z, classes = nn.functional.normalize(torch.cat([z1, z2]), dim=1), torch.cat([ys, ys])
    others = ~torch.eye(len(z), dtype=torch.bool)
    logits = (z @ z.T / temperature).masked_fill(~others, -math.inf)
    same = (classes.unsqueeze(1) == classes.unsqueeze(0)) & others
    logs = torch.where(others, torch.log_softmax(logits, 1), torch.zeros(()))
    per_row = -(logs * same).sum(1) / same.sum(1).clamp(min=1)
    return per_row.sum() / (same.sum(1) > 0).sum()


def supcon_by_loop(z1: Tensor, z2: Tensor, ys: Tensor, temperature: float) -> float:
    """Give the same number pair by pair, in double precision."""
    z = torch.cat([z1, z2]).double()
    z = z / z.norm(dim=1, keepdim=True)
    classes = torch.cat([ys, ys]).tolist()
    terms = []
    for i in range(len(z)):
        scores = [math.exp(float(z[i] @ z[j]) / temperature) for j in range(len(z)) if j != i]
        positives = [j for j in range(len(z)) if j != i and classes[j] == classes[i]]
        logs = [float(z[i] @ z[j]) / temperature - math.log(sum(scores)) for j in positives]
        terms.append(-sum(logs) / len(logs))
    return sum(terms) / len(terms)


def two_views() -> list[Any]:
    """Make batches that hold their views: the ones that `noisy` draws in each step."""
    made = []
    for step, (xs, ys) in enumerate(zip(rows().split(BATCH), labels().split(BATCH), strict=True)):
        torch.manual_seed(step)
        made.append((noisy(xs), ys))
    return made


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("with_projector", [False, True], ids=["encoder alone", "with a projector"])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("made_in", ["phase", "batch"])
def test_supcon_equals_a_hand_written_loop(made_in: str, temperature: float, with_projector: bool) -> None:
    log = Steps()
    model: Any = {"encoder": encoder(), "projector": projector()} if with_projector else None
    data = TensorBatches(rows(), labels(), batch_size=BATCH) if made_in == "phase" else two_views()
    learner = learner_of(log, model=model, data=data)
    learner.fit(1, phases=[SupConPhase(noisy if made_in == "phase" else None, temperature=temperature)])

    body, head = encoder(), projector() if with_projector else nn.Identity()
    optimizers = [ADAM(net.parameters()) for net in (body, head) if list(net.parameters())]
    losses = []
    for step, batch in enumerate(data):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        (view1, view2), ys = (noisy(batch[0]), batch[1]) if made_in == "phase" else batch
        for optimizer in optimizers:
            optimizer.zero_grad()
        z1, z2 = head(body(view1)), head(body(view2))
        loss = supcon(z1, z2, ys, temperature)
        assert loss.item() == pytest.approx(supcon_by_loop(z1.detach(), z2.detach(), ys, temperature), rel=1e-4)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    assert log.losses == losses
    assert_equal(learner.model.encoder if with_projector else learner.model, body, encoder())
    if with_projector:
        assert_equal(learner.model.projector, head, projector())


@pytest.mark.parametrize("made_in", ["phase", "batch"])
def test_the_events_and_entries_of_supcon_are_those_of_the_documentation(made_in: str) -> None:
    log = Steps()
    batch = (rows(BATCH), labels()[:BATCH]) if made_in == "phase" else two_views()[0]
    learner = learner_of(log, data=[batch])
    learner.epoch(SupConPhase(noisy if made_in == "phase" else None))
    given = {"xs", "ys"} if made_in == "phase" else {"views", "ys"}
    embedded = given | {"views", "features", "z1", "z2"}
    lost = embedded | {"loss"}
    done = lost | {"grads"}
    assert log.of_one_step() == [
        ("StepBegin", given),
        ("LossBegin", embedded),
        ("BackwardBegin", lost),
        *[(name, done) for name in ("BackwardEnd", "UpdateBegin", "UpdateEnd", "StepEnd")],
    ]
    step = learner.step
    assert step.features.shape == step.z1.shape == step.z2.shape == (BATCH, CODE)
    assert step.loss.shape == ()


def test_the_twin_of_supcon_gives_the_loss_of_held_out_rows_without_updates() -> None:
    recorder = EventRecorder()
    batch = two_views()[0]
    learner = learner_of(recorder, data=[batch])
    before = bits(learner)
    learner.epoch(ObjectiveValidationPhase(SupConPhase()))
    assert recorder.events == ["EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]
    body = encoder().eval()
    with torch.no_grad():
        assert torch.equal(learner.step.loss, supcon(*(body(view) for view in batch[0]), batch[1], 0.07))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


@pytest.mark.parametrize("views", [None, noisy], ids=["views in the batch", "views made here"])
def test_supcon_without_labels_is_an_error_that_says_so(views: Any) -> None:
    batch = rows(BATCH) if views else two_views()[0][0]
    learner = learner_of(data=[batch])
    before = bits(learner)
    with pytest.raises(BatchError, match=r"SupConPhase was given a .* as a batch; expected labels too, \(xs, ys\)"):
        learner.epoch(SupConPhase(views))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


@pytest.mark.parametrize(
    "batch",
    [rows(BATCH), (rows(BATCH), labels()[:BATCH]), ((rows(BATCH),) * 3, labels()[:BATCH])],
    ids=["rows", "rows with labels", "three views"],
)
def test_supcon_wants_two_views_of_each_row(batch: Any) -> None:
    with pytest.raises(BatchError, match=r"SupConPhase was given .*SupConPhase\(views=TwoViews\(augment\)\)"):
        learner_of(data=[batch]).epoch(SupConPhase())


# Triplets


def triplets() -> tuple[Tensor, Tensor, Tensor]:
    return rows(seed=1), rows(seed=2), rows(seed=3)


def parts() -> list[tuple[Tensor, ...]]:
    return list(zip(*(part.split(BATCH) for part in triplets()), strict=True))


def distance_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    near, far = pairwise_distance(anchor, positive), pairwise_distance(anchor, negative)
    return (near - far + margin).clamp(min=0).mean()


def train_triplets_by_hand(margin: float = 1.0, data: Any = None) -> tuple[nn.Module, list[Tensor]]:
    """Train the encoder in plain PyTorch."""
    net = encoder()
    optimizer = ADAM(net.parameters())
    losses = []
    for step, (anchor, positive, negative) in enumerate(data or parts()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        optimizer.zero_grad()
        embedded = net(anchor), net(positive), net(negative)
        loss = triplet_margin_loss(*embedded, margin=margin)
        assert torch.allclose(loss, distance_loss(*embedded, margin))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return net, losses


FORMS: dict[str, Callable[[], Any]] = {
    "tuples": parts,
    "lists": lambda: [list(part) for part in parts()],
    "with labels": lambda: [(part, torch.zeros(BATCH)) for part in parts()],
    "lists with labels": lambda: [[list(part), torch.zeros(BATCH)] for part in parts()],
    "tensors in memory": lambda: TensorBatches(*triplets(), batch_size=BATCH),
    "a dataset of three images and no target": lambda: DataLoader(TensorDataset(*triplets()), batch_size=BATCH),
}


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("form", FORMS)
def test_triplets_equal_a_hand_written_loop_whatever_form_the_batches_have(form: str) -> None:
    log = Steps()
    data = FORMS[form]()
    learner = learner_of(log, data=data)
    learner.fit(1, phases=[TripletPhase()])
    # a loader copies rows, and a copy at another address may be multiplied in another order
    expected, losses = train_triplets_by_hand(data=data if isinstance(data, DataLoader) else None)
    assert log.losses == losses
    assert_equal(learner.model, expected, encoder())


def test_triplets_can_be_given_to_the_learner_as_tensors() -> None:
    learner = Learner(encoder(), data=(triplets(),), optimizer=ADAM, default_callbacks=False, seed=SEED)
    learner.fit(1, phases=[TripletPhase()])
    assert learner.step.anchor.shape == (STEPS * BATCH, SIZE)


@pytest.mark.parametrize("margin", [0.2, 5.0])
def test_the_margin_is_that_of_the_loss(margin: float) -> None:
    learner = learner_of(data=parts())
    learner.fit(1, phases=[TripletPhase(margin)])
    assert_equal(learner.model, train_triplets_by_hand(margin)[0], encoder())


def test_the_model_of_triplets_may_be_called_encoder() -> None:
    learner = learner_of(model={"encoder": encoder()}, data=parts())
    learner.fit(1, phases=[TripletPhase()])
    assert_equal(learner.model.encoder, train_triplets_by_hand()[0], encoder())


def test_a_single_module_is_called_as_it_is_although_it_has_an_encoder() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()

        def forward(self, xs: Tensor) -> Tensor:
            return 2 * self.encoder(xs)

    learner = learner_of(model=Scaled(), data=parts()[:1])
    learner.epoch(ObjectiveValidationPhase(TripletPhase()))
    assert torch.equal(learner.step.features, 2 * encoder().eval()(parts()[0][0]))


@pytest.mark.parametrize("labelled", [False, True], ids=["without labels", "with labels"])
def test_the_events_and_entries_of_triplets_are_those_of_the_documentation(labelled: bool) -> None:
    log = Steps()
    ys = labels()[:BATCH]
    learner = learner_of(log, data=[(parts()[0], ys) if labelled else parts()[0]])
    learner.epoch(TripletPhase())
    given = {"anchor", "positive", "negative"} | ({"ys"} if labelled else set())
    assert not labelled or torch.equal(learner.step.ys, ys)
    embedded = given | {"features", "z_positive", "z_negative"}
    lost = embedded | {"loss"}
    done = lost | {"grads"}
    assert log.of_one_step() == [
        ("StepBegin", given),
        ("LossBegin", embedded),
        ("BackwardBegin", lost),
        *[(name, done) for name in ("BackwardEnd", "UpdateBegin", "UpdateEnd", "StepEnd")],
    ]
    step = learner.step
    for name, part in zip(("anchor", "positive", "negative"), parts()[0], strict=True):
        assert torch.equal(step[name], part)
    assert step.features.shape == step.z_positive.shape == step.z_negative.shape == (BATCH, CODE)
    assert step.loss.shape == ()


def test_the_twin_of_triplets_gives_the_loss_of_held_out_rows_without_updates() -> None:
    recorder = EventRecorder()
    learner = learner_of(recorder, data=parts()[:1])
    before = bits(learner)
    learner.epoch(ObjectiveValidationPhase(TripletPhase(0.5)))
    assert recorder.events == ["EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]
    net = encoder().eval()
    with torch.no_grad():
        embedded = [net(part) for part in parts()[0]]
    assert torch.equal(learner.step.loss, triplet_margin_loss(*embedded, margin=0.5))
    assert torch.equal(learner.step.features, embedded[0])
    assert torch.equal(learner.step.z_positive, embedded[1])
    assert torch.equal(learner.step.z_negative, embedded[2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("kind", ["supcon", "triplets"])
def test_the_twins_only_watch_and_are_evaluated(kind: str) -> None:
    phase, data = (SupConPhase(), two_views()) if kind == "supcon" else (TripletPhase(), parts())
    plain, watched = learner_of(data=data), learner_of(data=data)
    plain.fit(3, phases=[phase])
    watched.fit(3, phases=[phase, ObjectiveValidationPhase(phase)])
    assert_same_bits(plain, watched)
    found = watched.evaluate(phase=ObjectiveValidationPhase(phase))
    assert found.keys() == {"loss"}
    assert found == watched.evaluate(phase=ObjectiveValidationPhase(phase))


# What cannot be


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        (rows(BATCH), r"a Tensor of shape \(6, 5\)"),
        ((rows(BATCH), labels()[:BATCH]), "a tuple of length 2"),
        (((rows(BATCH),) * 2, labels()[:BATCH]), "a tuple of length 2"),
        ([rows(BATCH)] * 4, "a list of length 4"),
        ({"anchor": rows(BATCH)}, "a dict of length 1"),
    ],
    ids=["rows", "pair", "pairs with labels", "four", "dict"],
)
def test_a_batch_that_is_no_triplet_is_an_error_that_says_how_to_give_one(batch: Any, described: str) -> None:
    learner = learner_of(data=[batch])
    before = bits(learner)
    words = rf"TripletPhase was given {described} as a batch; expected \(anchor, positive, negative\)"
    with pytest.raises(BatchError, match=words):
        learner.epoch(TripletPhase())
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


@pytest.mark.parametrize("phase", [SupConPhase(), TripletPhase()], ids=["supcon", "triplets"])
def test_models_without_an_encoder_are_an_error_that_says_what_to_write(phase: Phase) -> None:
    learner = learner_of(model={"body": encoder(), "head": projector()}, data=parts())
    words = rf"{type(phase).__name__} calls learner.model.encoder, and the models are \['body', 'head'\]"
    with pytest.raises(PhaseError, match=words):
        learner.fit(1, phases=[phase])
