from __future__ import annotations

import copy
import gc
import os
import random
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch
import torchmetrics
from attrs import define, field
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import fluxloop
from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    CheckpointError,
    CycleBegin,
    CycleEnd,
    EarlyStopping,
    EpochBegin,
    EpochEnd,
    FitBegin,
    FittingPhase,
    Learner,
    Phase,
    Recorder,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    on,
    runepoch,
    runstep,
    throttle,
)
from fluxloop.callbacks.checkpointer import Checkpointer
from fluxloop.checkpoint.folder import Folder, read, write
from fluxloop.state import PhaseDict
from fluxloop.testing import (
    EventRecorder,
    assert_resumes_exactly,
    assert_same_bits,
    bits,
    toy_learner,
)
from toys import Killed


def rows(count: int = 12, width: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(count, width, generator=generator), torch.randint(0, 2, (count,), generator=generator)


def network(width: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, 2))


def classifier(data: Any, *callbacks: Callback, **options: Any) -> Learner:
    settings = {"seed": 0, "default_callbacks": False, "optimizer": partial(torch.optim.Adam, lr=0.05), **options}
    return Learner(network(), nn.functional.cross_entropy, data=data, callbacks=callbacks, **settings)


def save_at(learner: Learner, moment: int, path: Path, **options: Any) -> None:
    seen = 0

    def look() -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            learner.save(path)
            raise Killed

    learner.at_safe_point(look)
    with pytest.raises(Killed):
        learner.fit(**options)


# Data


class Noisy(Dataset[Any]):
    """Draws from all three generators, and counts what it loads."""

    def __init__(self, count: int = 12) -> None:
        self.xs, self.ys = rows(count)
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.xs)

    def __getitem__(self, index: int) -> Any:
        self.loaded += 1
        noise = torch.rand(3) + numpy.random.normal() + random.random() + random.gauss(0, 1)
        return self.xs[index] + 0.1 * noise, self.ys[index]


def jitter(samples: list[Any]) -> Any:
    """Draws in collate_fn."""
    xs, ys = torch.utils.data.default_collate(samples)
    return xs + 0.1 * torch.rand(()) + float(numpy.random.normal()) * 0.1 + random.random() * 0.1, ys


class DrawsFirst(Sampler[int]):
    """Draws its order from three generators when its iteration begins."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count).tolist()
        random.shuffle(order)
        numpy.random.shuffle(order)
        return iter(order)


class DrawsAtOnce(DrawsFirst):
    """Draws as its iteration goes."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.count):
            yield int(torch.randint(0, self.count, ()))


class Counting(DrawsFirst):
    """Keeps the number of its epochs, which decides the order."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class StatefulSampler(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


class Own:
    """An iterable of batches that keeps its place itself."""

    def __init__(self, count: int = 4) -> None:
        self.xs, self.ys = rows(count * 3)
        self.count = count
        self.next = 0
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        if self.next == 0:
            self.passes += 1
        while self.next < self.count:
            first = 3 * self.next
            self.next += 1
            yield self.xs[first : first + 3] * self.passes + torch.rand(3, 3), self.ys[first : first + 3]
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.passes = state["next"], state["passes"]


class StatefulStream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.xs, self.ys = rows()
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < len(self.xs):
            self.place += 1
            yield self.xs[self.place - 1], self.ys[self.place - 1]
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def whole(sample: Any) -> Any:
    return sample[0][None].repeat(2, 1), sample[1][None].repeat(2)


SOURCES: dict[str, Callable[[], Any]] = {
    "a list": lambda: [(x, y) for x, y in zip(rows()[0].split(3), rows()[1].split(3), strict=True)],
    "TensorBatches": lambda: TensorBatches(*rows(), batch_size=3, shuffle=True),
    "TensorBatches with a seed": lambda: TensorBatches(*rows(), batch_size=5, shuffle=True, seed=3),
    "TensorBatches that drop the last": lambda: TensorBatches(*rows(), batch_size=5, shuffle=True, drop_last=True),
    "a loader of tensors": lambda: DataLoader(TensorDataset(*rows()), batch_size=3, shuffle=True),
    "a loader": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, collate_fn=jitter),
    "a loader with a generator": lambda: DataLoader(
        Noisy(), batch_size=5, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(4)
    ),
    "a weighted sampler": lambda: DataLoader(
        Noisy(), batch_size=3, sampler=WeightedRandomSampler([0.1] * 6 + [0.9] * 6, 12)
    ),
    "a sampler that draws first": lambda: DataLoader(Noisy(), batch_size=3, sampler=DrawsFirst(12)),
    "a sampler that draws as it goes": lambda: DataLoader(Noisy(), batch_size=3, sampler=DrawsAtOnce(12)),
    "a sampler that draws, of tensors": lambda: DataLoader(
        TensorDataset(*rows()), batch_size=3, sampler=DrawsAtOnce(12)
    ),
    "a sampler with a state": lambda: DataLoader(Noisy(), batch_size=3, sampler=StatefulSampler(12)),
    "a sampler with a count": lambda: DataLoader(Noisy(), batch_size=3, sampler=Counting(12)),
    "a batch sampler that is a list": lambda: DataLoader(Noisy(), batch_sampler=[[0, 1], [5, 3, 2], [7, 7]]),
    "a loader without batches": lambda: DataLoader(Noisy(4), batch_size=None, shuffle=True, collate_fn=whole),
    "torchdata's, map-style": lambda: StatefulDataLoader(Noisy(), batch_size=3, shuffle=True),
    "torchdata's, iterable": lambda: StatefulDataLoader(StatefulStream(), batch_size=3),
    "an iterable of its own": Own,
}


TORCHDATA = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it in torch 2.9


@pytest.mark.slow
@TORCHDATA
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_an_epoch_goes_on_behind_the_batches_already_used(source: Callable[[], Any]) -> None:
    def make() -> Learner:
        torch.manual_seed(3)  # some samplers draw when they are made
        return classifier((source(),))

    assert_resumes_exactly(make, epochs=2, at=[1, 3, 4, 5, 7, 9])


def loader_with(workers: int, persistent: bool) -> Learner:
    loader = DataLoader(
        Noisy(),
        batch_size=3,
        sampler=DrawsAtOnce(12),
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        collate_fn=jitter,
        multiprocessing_context="fork" if workers else None,
    )
    return classifier((loader,))


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True], ids=["new workers", "persistent workers"])
def test_a_run_goes_on_with_workers_and_with_another_number_of_them(tmp_path: Path, persistent: bool) -> None:
    plain = loader_with(0, False)
    plain.fit(2)
    for before, after, moment in ((0, 2, 4), (2, 1, 9), (1, 0, 3), (2, 2, 5)):
        path = tmp_path / f"{before}-{after}.pt"
        save_at(loader_with(before, persistent), moment, path, epochs=2)
        resumed = loader_with(after, persistent)
        resumed.fit(2, resume=path)
        assert_same_bits(plain, resumed)
        assert resumed.streams.positions() == plain.streams.positions()
        del resumed
        gc.collect()  # ends the workers


@pytest.mark.slow
@TORCHDATA
def test_torchdatas_stateful_loader_of_a_stream_goes_on() -> None:
    assert_resumes_exactly(
        lambda: classifier((StatefulDataLoader(StatefulStream(), batch_size=3),)), epochs=2, at=[2, 4, 7, 9]
    )


@pytest.mark.slow
def test_a_generator_that_training_and_validation_share_goes_on() -> None:
    def make() -> Learner:
        generator = torch.Generator().manual_seed(4)
        train, valid = (DataLoader(Noisy(6), batch_size=2, shuffle=True, generator=generator) for _ in range(2))
        return classifier((train, valid), Recorder(), fluxloop.Metrics())

    assert_resumes_exactly(make, epochs=2, at=[3, 6, 7, 9, 13])


def test_what_was_used_is_not_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    data = Noisy()
    save_at(classifier((DataLoader(data, batch_size=3, shuffle=True),)), 5, path, epochs=1)
    assert data.loaded == 9
    data = Noisy()
    classifier((DataLoader(data, batch_size=3, shuffle=True),)).fit(1, resume=path)
    assert data.loaded == 9 + 3  # the count is kept, and three more were loaded


@pytest.mark.slow
def test_what_the_step_draws_from_each_library_goes_on() -> None:
    class Draws(TrainingPhase):
        def step(self, learner: Any, batch: Any) -> Any:
            noise = torch.rand(()) + numpy.random.normal() + numpy.random.rand() + random.random() + random.gauss(0, 1)
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                more = torch.randn(()) + numpy.random.normal() + random.gauss(0, 1)
                state.loss = nn.functional.cross_entropy(learner.model(state.xs + noise * more), state.ys)
                learner.backward(state.loss)
                learner.update()

    assert_resumes_exactly(lambda: classifier((TensorBatches(*rows(), batch_size=3),)), phases=lambda: [Draws()])


# Moments


@pytest.mark.slow
def test_every_moment_of_training_and_validation_is_one_to_go_on_from() -> None:
    def make() -> Learner:
        train = TensorBatches(*rows(), batch_size=4, shuffle=True)
        valid = TensorBatches(*rows(6), batch_size=3)
        return classifier((train, valid), Recorder(), fluxloop.Metrics(fluxloop.accuracy))

    assert_resumes_exactly(make, epochs=3)


@pytest.mark.slow
def test_a_cycle_with_two_training_phases_goes_on() -> None:
    class Second(TrainingPhase):
        data_key = "unlabelled"

    def make() -> Learner:
        train, other = (TensorBatches(*rows(), batch_size=4, shuffle=True) for _ in range(2))
        return classifier({"training": train, "unlabelled": other, "validation": other}, Recorder(), fluxloop.Metrics())

    assert_resumes_exactly(make, phases=lambda: [Second(), TrainingPhase(), ValidationPhase()])


@pytest.mark.slow
def test_two_instances_of_one_phase_each_go_on_with_their_own() -> None:
    class Counts(TrainingPhase):
        def __init__(self, start: int) -> None:
            self.n = start

        def step(self, learner: Any, batch: Any) -> Any:
            self.n += 1
            return super().step(learner, (batch[0] * self.n, batch[1]))

    assert_resumes_exactly(
        lambda: classifier((TensorBatches(*rows(), batch_size=6),)), phases=lambda: [Counts(0), Counts(100)]
    )


class Wobbles(ValidationPhase):
    """Counts its steps, and draws."""

    def __init__(self, size: float, **options: Any) -> None:
        super().__init__(**options)
        self.size, self.n = size, 0

    def step(self, learner: Any, batch: Any) -> Any:
        self.n += 1
        return super().step(learner, (batch[0] + self.size * torch.randn_like(batch[0]), batch[1]))


@pytest.mark.slow
def test_phases_of_one_class_with_names_each_go_on_with_their_own() -> None:
    def make() -> Learner:
        train, valid = (TensorBatches(*rows(), batch_size=6, shuffle=True) for _ in range(2))
        return classifier((train, valid), Recorder(), fluxloop.Metrics())

    assert_resumes_exactly(
        make, phases=lambda: [TrainingPhase(), Wobbles(1.0, name="small"), Wobbles(9.0, name="large", every=2)]
    )


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("moment", range(3, 12))
def test_a_run_with_sparse_phases_ends_in_the_numbers_of_one_that_was_not_killed(tmp_path: Path, moment: int) -> None:
    def make() -> Learner:
        train, valid = (TensorBatches(*rows(), batch_size=6, shuffle=True) for _ in range(2))
        return classifier((train, valid), Recorder(), fluxloop.Metrics())

    def phases() -> list[Any]:
        return [Wobbles(1.0, name="before"), TrainingPhase(), Wobbles(9.0, name="after", every=2)]

    whole, killed, resumed = make(), make(), make()
    whole.fit(3, phases=phases())
    save_at(killed, moment, tmp_path / "state.pt", epochs=3, phases=phases())
    again = phases()
    resumed.fit(3, phases=again, resume=tmp_path / "state.pt")
    assert resumed.history.rows() == whole.history.rows()
    assert {row["epoch"] for row in resumed.history.rows() if row["phase"] == "after"} == {2, 3}
    assert [phase.n for phase in again if isinstance(phase, Wobbles)] == [6, 4]


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("moment", [3, 5, 6])
def test_a_checkpoint_from_before_phases_had_names_is_gone_on_with(tmp_path: Path, moment: int) -> None:
    def make() -> Learner:
        return classifier((TensorBatches(*rows(), batch_size=6),) * 2, Recorder(), fluxloop.Metrics(), EarlyStopping(9))

    whole, killed, resumed = make(), make(), make()
    whole.fit(3)
    save_at(killed, moment, tmp_path / "state.pt", epochs=3)
    state = read(tmp_path / "state.pt")
    for counts in state["cbstate"]["history"]["items"].values():
        for new in ("epoch", "label"):
            del counts["items"][new]
    (tmp_path / "old").mkdir()
    write(tmp_path / "old" / "state.pt", state)
    resumed.fit(3, resume=tmp_path / "old" / "state.pt")
    assert resumed.history.rows() == whole.history.rows()
    assert_same_bits(resumed, whole)


@pytest.mark.slow
def test_a_phase_without_data_does_not_matter() -> None:
    class Nothing(Phase):
        def epoch(self, learner: Any, data: Any) -> None:
            with runepoch(learner, self):
                pass

    assert_resumes_exactly(
        lambda: classifier((TensorBatches(*rows(), batch_size=6),)),
        phases=lambda: [Nothing(), TrainingPhase(), Nothing()],
    )


@pytest.mark.slow
def test_a_dry_run_goes_on(tmp_path: Path) -> None:
    def make() -> Learner:
        return classifier((TensorBatches(*rows(), batch_size=2, shuffle=True),))

    plain = make()
    plain.fit(2, steps_per_epoch=3)
    for moment in range(1, 9):
        path = tmp_path / f"{moment}.pt"
        save_at(make(), moment, path, epochs=2, steps_per_epoch=3)
        resumed = make()
        resumed.fit(2, resume=path, steps_per_epoch=3)
        assert_same_bits(plain, resumed)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("moment", [2, 4, 9])
def test_another_number_of_steps_per_epoch_is_named(moment: int, tmp_path: Path) -> None:
    def make() -> Learner:
        return classifier((TensorBatches(*rows(), batch_size=2, shuffle=True),))

    path = tmp_path / "state.pt"
    save_at(make(), moment, path, epochs=3, steps_per_epoch=3)
    for other in (None, 2):
        resumed = make()
        before = bits(resumed)
        with pytest.raises(CheckpointError, match=f"begun with steps_per_epoch=3, .* with steps_per_epoch={other}"):
            resumed.fit(3, resume=path, steps_per_epoch=other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in bits(resumed).items())
    learner = make()
    learner.load(path)  # as the error says
    learner.fit(1)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path: Path) -> None:
    def make() -> Learner:
        train, valid = DataLoader(Noisy(), batch_size=3, shuffle=True), TensorBatches(*rows(6), batch_size=3)
        return classifier((train, valid), Recorder(), fluxloop.Metrics(fluxloop.accuracy), fluxloop.EMA("model", 0.9))

    plain = make()
    plain.fit(3)
    path, lives = tmp_path / "state.pt", 0
    while True:
        learner, seen = make(), 0

        def look(learner: Learner = learner) -> None:
            nonlocal seen
            seen += 1
            if seen == 3:
                learner.save(path)
                raise Killed

        learner.at_safe_point(look)
        lives += 1
        try:
            learner.fit(3, resume=path if path.exists() else None)
        except Killed:
            continue
        break
    assert lives > 8
    assert_same_bits(plain, learner)
    assert learner.history.rows() == plain.history.rows()


# Models


class Unsaved(nn.Module):
    """Keeps a running sum that state_dict() leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("total", torch.zeros(2), persistent=False)

    def forward(self, xs: Tensor) -> Tensor:
        preds = self.layer(xs) + 0.1 * self.total
        self.total = self.total + preds.detach().mean(0)
        return preds


class Cooling(nn.Module):
    """Keeps a number of Python's that changes as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.temperature = 1.0

    def forward(self, xs: Tensor) -> Tensor:
        self.temperature *= 0.9
        return self.layer(xs) / self.temperature


@pytest.mark.slow
@pytest.mark.parametrize("model", [Unsaved, Cooling])
def test_what_a_model_keeps_besides_its_state_dict_goes_on(model: type[nn.Module]) -> None:
    def make() -> Learner:
        torch.manual_seed(1)
        data = TensorBatches(*rows(), batch_size=3)
        return Learner(model(), nn.functional.cross_entropy, data=(data,), default_callbacks=False, seed=0)

    assert_resumes_exactly(make, epochs=2)


def test_a_lazy_model_takes_its_shapes_from_the_checkpoint(tmp_path: Path) -> None:
    def make() -> Learner:
        torch.manual_seed(1)
        model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
        data = TensorBatches(*rows(), batch_size=3)
        return Learner(model, nn.functional.cross_entropy, data=(data,), default_callbacks=False, seed=0)

    plain = make()
    plain.fit(2)
    save_at(make(), 3, tmp_path / "state.pt", epochs=2)
    resumed = make()
    resumed.fit(2, resume=tmp_path / "state.pt")
    assert_same_bits(plain, resumed)


@pytest.mark.slow
def test_parameters_frozen_while_training_stay_frozen() -> None:
    class Freeze(Callback):
        writes = ("model",)
        draws = False

        @on(EpochEnd, TrainingPhase)
        def freeze(self, event: EpochEnd, phase: TrainingPhase, learner: Any) -> None:
            learner.model[0].requires_grad_(False)

    assert_resumes_exactly(lambda: classifier((TensorBatches(*rows(), batch_size=6),), Freeze()), epochs=3)


@pytest.mark.slow
def test_a_loss_function_with_parameters_goes_on() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, preds: Tensor, ys: Tensor) -> Tensor:
            return nn.functional.cross_entropy(preds * self.scale, ys) + self.scale.square()

    def make() -> Learner:
        model, loss_fn = network(), Weighted()
        optimizer = torch.optim.Adam([*model.parameters(), *loss_fn.parameters()], lr=0.05)
        data = TensorBatches(*rows(), batch_size=3, shuffle=True)
        return Learner(model, loss_fn, data=(data,), optimizer=optimizer, default_callbacks=False, seed=0)

    assert_resumes_exactly(make)


# Optimizers


class Sums(torch.optim.Optimizer):
    """Sums gradients in double precision."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "differentiable": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                total = self.state[p].setdefault("total", torch.zeros_like(p, dtype=torch.float64))
                total += p.grad.double() / 3
                p -= (group["lr"] * total).to(p.dtype)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD with momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "Adam with amsgrad": partial(torch.optim.Adam, lr=0.05, amsgrad=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.05),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.05, centered=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "sums in double precision": Sums,
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_goes_on(optimizer: Callable[..., Any]) -> None:
    make = partial(classifier, (TensorBatches(*rows(), batch_size=3),), optimizer=optimizer)
    assert_resumes_exactly(make, at=[1, 3, 5, 7])


def test_a_learning_rate_that_is_a_number_of_numpys_goes_on() -> None:
    class Cosine(Callback):
        writes = ("optimizer",)
        draws = False

        def __init__(self) -> None:
            self.steps = 0

        @on(StepEnd, TrainingPhase)
        def set(self, event: StepEnd, phase: TrainingPhase, learner: Any) -> None:
            self.steps += 1
            learner.optimizer.param_groups[0]["lr"] = 0.05 * numpy.cos(0.1 * self.steps)

    assert_resumes_exactly(lambda: classifier((TensorBatches(*rows(), batch_size=3),), Cosine()), at=[2, 6])


class EveryThird(AbstractTrainingPhase):
    """Adds up the gradients of three steps."""

    def step(self, learner: Any, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.loss = nn.functional.cross_entropy(learner.model(state.xs), state.ys) / 3
            learner.backward(state.loss)
            if learner.history[self].steps % 3 == 2:
                learner.update()
            return state


@pytest.mark.slow
def test_gradients_that_wait_for_their_update_go_on() -> None:
    def make() -> Learner:
        return classifier((TensorBatches(*rows(), batch_size=3, shuffle=True),), Recorder())

    assert_resumes_exactly(make, epochs=2, phases=lambda: [EveryThird()])


# Phases of research


def linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), nn.ReLU(), nn.Linear(6, outputs))


@pytest.mark.slow
@pytest.mark.parametrize("critic_steps", [1, 3])
def test_a_gan_goes_on(critic_steps: int) -> None:
    def make() -> Learner:
        torch.manual_seed(1)
        models = {"generator": linear(2, 3), "critic": linear(3, 1)}
        data = TensorBatches(rows()[0], batch_size=3, shuffle=True)
        return Learner(
            models, data=(data,), default_callbacks=False, seed=0, callbacks=[Recorder(), fluxloop.Metrics()]
        )

    assert_resumes_exactly(make, phases=lambda: [fluxloop.GANPhase(noise=2, critic_steps=critic_steps)])


def views(count: int = 12) -> TensorBatches:
    xs = rows(count)[0]
    return TensorBatches(xs, xs.flip(0), batch_size=3, shuffle=True)


@pytest.mark.slow
def test_momentum_contrast_goes_on_with_its_queue() -> None:
    def make() -> Learner:
        torch.manual_seed(1)
        query = linear(3, 4)
        models = {"student": query, "teacher": copy.deepcopy(query).requires_grad_(False)}
        ema = fluxloop.EMA("student", 0.9, into="teacher")
        return Learner(models, data=(views(),), default_callbacks=False, seed=0, callbacks=[ema])

    assert_resumes_exactly(make, phases=lambda: [fluxloop.MoCoPhase(queue_size=6)])


# Phases of one's own


class Attributes(TrainingPhase):
    """Keeps plain attributes."""

    def __init__(self) -> None:
        self.n = 0
        self.losses: list[float] = []
        self.total = torch.zeros(2)
        self.table = numpy.zeros(2)
        self.window: deque[float] = deque(maxlen=3)
        self.generator = torch.Generator().manual_seed(1)
        self.dice = random.Random(2)
        self.by_name: dict[str, Any] = {}

    def step(self, learner: Any, batch: Any) -> Any:
        self.n += 1
        noise = torch.rand((), generator=self.generator) + self.dice.random() + self.n + self.total.sum()
        state = super().step(learner, (batch[0] + 0.1 * noise + float(self.table.sum()), batch[1]))
        loss = state.loss.item()
        self.losses.append(loss)
        self.total += loss
        self.table += loss
        self.window.append(loss)
        self.by_name[f"step {self.n}"] = (loss, {self.n})
        return state


class Pair(TrainingPhase):
    def __init__(self) -> None:
        self.queue = torch.zeros(2)

    def step(self, learner: Any, batch: Any) -> Any:
        self.queue = torch.cat([self.queue[1:], batch[0].sum()[None]])
        return super().step(learner, (batch[0] + self.queue.sum(), batch[1]))

    def state_dict(self) -> Any:
        return self.queue

    def load_state_dict(self, state: Any) -> None:
        self.queue = state


@pytest.mark.slow
@pytest.mark.parametrize("phase", [Attributes, Pair])
def test_what_a_phase_keeps_goes_on(phase: type[Phase]) -> None:
    make = partial(classifier, (TensorBatches(*rows(), batch_size=3, shuffle=True),))
    assert_resumes_exactly(make, phases=lambda: [phase()])


class Slow(TrainingPhase):
    """Has an epoch of its own."""

    def epoch(self, learner: Any, data: Iterable[Any]) -> None:
        with runepoch(learner, self):
            for number, batch in enumerate(data):
                self.step(learner, (batch[0] * (1 + number), batch[1]))


class GoesOn(TrainingPhase):
    resumable = True

    def epoch(self, learner: Any, data: Iterable[Any]) -> None:
        with runepoch(learner, self):
            for batch in data:
                self.step(learner, (batch[0] * 2, batch[1]))


@pytest.mark.slow
def test_a_phase_that_says_its_own_epoch_goes_on_is_gone_on_with_in_the_middle() -> None:
    make = partial(classifier, (TensorBatches(*rows(), batch_size=3, shuffle=True),))
    assert_resumes_exactly(make, phases=lambda: [GoesOn()], at=[1, 2, 4, 5, 8])


def bare() -> Any:
    class Bare:
        def __iter__(self) -> Iterator[Any]:
            return ((x + torch.rand(()), y) for x, y in TensorBatches(*rows(), batch_size=3))

    return Bare()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(list(zip(*rows(), strict=True)))


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize(
    ("source", "phase", "message"),
    [
        (bare, TrainingPhase, "the 'training' data .* cannot be resumed in the middle"),
        (lambda: DataLoader(Stream(), batch_size=3), TrainingPhase, "the 'training' data .* cannot be resumed"),
        (lambda: TensorBatches(*rows(), batch_size=3, shuffle=True), Slow, r"Slow has an epoch\(\) of its own"),
    ],
    ids=["a bare iterable", "an IterableDataset", "an epoch of its own"],
)
def test_what_cannot_be_gone_on_with_is_told_once_and_goes_on_from_the_end_of_an_epoch(
    tmp_path: Path, source: Callable[[], Any], phase: type[Phase], message: str
) -> None:
    def make(*more: Callback) -> Learner:
        return classifier((source(),), Checkpointer(tmp_path, every=1, unit="step"), *more)

    plain = classifier((source(),))
    plain.fit(3, phases=[phase()])
    killed = make()
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps == 10:  # in the second epoch
            raise Killed

    killed.at_safe_point(count)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(Killed):
            killed.fit(3, phases=[phase()])
    assert len(said) == 1, [str(each.message) for each in said]
    with pytest.warns(UserWarning, match=message):
        warnings.warn_explicit(said[0].message, UserWarning, "", 1)
    newest = Folder(tmp_path).newest()
    assert newest is not None
    assert newest["place"]["feed"] is None
    assert newest["streams"]["training/step"] == 4
    resumed = make()
    with pytest.warns(UserWarning, match=message):
        resumed.fit(3, phases=[phase()], resume=tmp_path)
    assert_same_bits(plain, resumed)


# Callbacks of one's own


@define
class Plain(Callback):
    n: int = field(default=0, init=False)
    losses: list[float] = field(factory=list, init=False)
    total: Any = field(factory=lambda: torch.zeros(2), init=False)
    seen: set[str] = field(factory=set, init=False)
    last: Any = field(default=None, init=False)
    reads = ("step.loss",)
    draws = False

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.n += 1
        self.losses.append(float(learner.step.loss.detach()))
        self.total += self.n
        self.seen.add(type(phase).__name__)
        self.last = learner.step.loss.detach()


class PairCallback(Callback):
    draws = False

    def __init__(self) -> None:
        self.steps: list[int] = []

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.steps.append(len(self.steps))

    def state_dict(self) -> Any:
        return list(self.steps)

    def load_state_dict(self, state: Any) -> None:
        self.steps = list(state)


class PairOfATensor(PairCallback):
    def state_dict(self) -> Any:
        return torch.tensor(self.steps)

    def load_state_dict(self, state: Any) -> None:
        self.steps = state.tolist()


class Draws(Callback):
    draws = True

    def __init__(self) -> None:
        self.values: list[float] = []

    @on(StepEnd)
    @on(EpochEnd)
    @on(CycleEnd)
    def draw(self, event: Any, phase: Phase, learner: Any) -> None:
        self.values.append(torch.rand(()).item() + numpy.random.normal() + random.gauss(0, 1))


class DrawsUnsaid(Draws):
    draws = None


class Shares(Callback):
    writes = ("cbstate.shared", "cbstate.by_phase", "cbstate.tensor", "cbstate.names")
    draws = False

    def init(self, learner: Any) -> None:
        learner.cbstate.shared = {"steps": 0, "list": []}
        learner.cbstate.by_phase = PhaseDict(list)
        learner.cbstate.tensor = torch.zeros(2)
        learner.cbstate.names = set()

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        shared = learner.cbstate.shared
        shared["steps"] += 1
        shared["list"].append(shared["steps"])
        learner.cbstate.by_phase[phase].append(shared["steps"])
        learner.cbstate.tensor += 1
        learner.cbstate.names.add(str(shared["steps"]))


class FirstOfEpoch(Callback):
    """Has a flag that is as at first whenever a checkpoint is written."""

    draws = False

    def __init__(self) -> None:
        self.first = False
        self.firsts = 0

    @on(EpochBegin)
    def begin(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        self.first = True

    @on(StepBegin)
    def step(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        self.firsts += self.first
        self.first = False


class PairOfAFlag(FirstOfEpoch):
    """Gives an empty state where its flag is down."""

    def state_dict(self) -> Any:
        return {"firsts": self.firsts, "flag": 1} if self.first else {"firsts": self.firsts}

    def load_state_dict(self, state: Any) -> None:
        self.first, self.firsts = "flag" in state, state["firsts"]


class EmptyPair(FirstOfEpoch):
    """What its pair gives is empty, and its handlers change it."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[int] = []

    @on(EpochBegin)
    def begin(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        self.begun.append(1)

    @on(StepBegin)
    def step(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        self.firsts, self.begun = len(self.begun), []
        assert self.firsts < 2

    def state_dict(self) -> Any:
        return list(self.begun)

    def load_state_dict(self, state: Any) -> None:
        self.begun = state


class NumpyInPlace(Callback):
    draws = False

    def __init__(self) -> None:
        self.table = numpy.zeros(3)
        self.last = 0.0

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.table += 1
        self.last = float(self.table.sum())


class NumpyGenerator(Callback):
    draws = False

    def __init__(self) -> None:
        self.generator = numpy.random.default_rng(0)
        self.last = 0.0

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.last = self.generator.random()


class BeginsWithAnObject(Callback):
    """Makes objects with a state when the fit begins."""

    writes = ("optimizer",)
    draws = False

    def __init__(self) -> None:
        self.scheduler: Any = None
        self.generator: Any = None
        self.last = 0.0

    @on(FitBegin, FittingPhase)
    def begin(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        self.scheduler = torch.optim.lr_scheduler.StepLR(learner.optimizer, 2, 0.5)
        self.generator = torch.Generator().manual_seed(3)

    @on(StepEnd, TrainingPhase)
    def step(self, event: StepEnd, phase: TrainingPhase, learner: Any) -> None:
        self.scheduler.step()
        self.last = torch.rand((), generator=self.generator).item()


class EpochWithAnObject(BeginsWithAnObject):
    """Makes them when the first epoch begins."""

    @on(FitBegin, FittingPhase)
    def begin(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        pass

    @on(EpochBegin, TrainingPhase)
    def begin_epoch(self, event: EpochBegin, phase: TrainingPhase, learner: Any) -> None:
        if self.scheduler is None:
            super().begin(event, phase, learner)  # type: ignore[arg-type]


CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "plain attributes": lambda: [Plain()],
    "the pair": lambda: [PairCallback()],
    "a pair that gives a tensor": lambda: [PairOfATensor()],
    "draws": lambda: [Draws()],
    "draws, and does not say so": lambda: [DrawsUnsaid()],
    "what callbacks share": lambda: [Shares()],
    "a flag": lambda: [FirstOfEpoch()],
    "a flag in a pair": lambda: [PairOfAFlag()],
    "an empty pair": lambda: [EmptyPair()],
    "an array changed in place": lambda: [NumpyInPlace()],
    "a generator of NumPy's": lambda: [NumpyGenerator()],
    "objects made when the fit begins": lambda: [BeginsWithAnObject()],
    "every second step": lambda: [throttle(Plain(), StepEnd, freq=2)],
    "traces": lambda: [fluxloop.Traces({"loss": lambda learner: learner.step.loss}, reads=("step.loss",))],
    "an average": lambda: [fluxloop.EMA("model", 0.9)],
    "metrics": lambda: [Recorder(), fluxloop.Metrics(fluxloop.accuracy)],
    "all of the default ones": lambda: [fluxloop.StopOnNaNLoss(), Recorder(), fluxloop.Metrics()],
    "metrics of torchmetrics": lambda: [
        Recorder(),
        fluxloop.Metrics(
            torchmetrics.MetricCollection(
                [
                    torchmetrics.classification.MulticlassAccuracy(2),
                    torchmetrics.classification.MulticlassF1Score(2),
                    torchmetrics.classification.MulticlassAUROC(2),
                ]
            ),
            fluxloop.accuracy,
        ),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", CALLBACKS.values(), ids=CALLBACKS)
def test_what_a_callback_keeps_goes_on(callbacks: Callable[[], list[Callback]]) -> None:
    def make() -> Learner:
        train, valid = TensorBatches(*rows(), batch_size=6, shuffle=True), TensorBatches(*rows(6), batch_size=3)
        return classifier((train, valid), *callbacks())

    assert_resumes_exactly(make, at=[1, 3, 5, 7, 8, 10, 13])


def test_what_a_callback_makes_when_an_epoch_begins_goes_on_in_its_middle() -> None:
    make = partial(classifier, (TensorBatches(*rows(), batch_size=6, shuffle=True),))
    assert_resumes_exactly(lambda: make(EpochWithAnObject()), epochs=1, at=[2, 3, 4])


class Opaque:
    def __init__(self) -> None:
        self.n = 0
        self.lock = threading.Lock()


class HasOpaque(Callback):
    draws = False

    def __init__(self) -> None:
        self.thing = Opaque()

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.thing.n += 1


class ReplacesOpaque(HasOpaque):
    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.thing = Opaque()


class TransientOpaque(HasOpaque):
    transient = ("thing",)


@pytest.mark.parametrize("callback", [HasOpaque, ReplacesOpaque])
def test_an_attribute_that_changes_and_cannot_be_kept_is_told(tmp_path: Path, callback: type[HasOpaque]) -> None:
    learner = toy_learner(callback())
    learner.fit(1)
    with pytest.warns(
        UserWarning, match=rf"{callback.__name__}\.thing changed in training and cannot be saved in a checkpoint"
    ):
        learner.save(tmp_path / "state.pt")
    learner.save(tmp_path / "state.pt")  # told once


def test_nothing_is_told_of_what_is_transient(tmp_path: Path) -> None:
    learner = toy_learner(TransientOpaque())
    learner.fit(1)
    learner.save(tmp_path / "state.pt")


class Counter(Callback):
    draws = False

    def __init__(self) -> None:
        self.n = 0
        self.items: list[int] = []

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.n += 1
        self.items.append(self.n)


def test_loading_puts_attributes_back_to_what_they_were_at_first(tmp_path: Path) -> None:
    learner = toy_learner(Counter())
    learner.save(tmp_path / "state.pt")
    learner.fit(1)
    learner.load(tmp_path / "state.pt")
    counter = learner.get_callback(Counter)
    assert counter is not None
    assert (counter.n, counter.items) == (0, [])


# What the run tells


def test_events_are_fired_again_for_what_was_under_way_and_say_so(tmp_path: Path) -> None:
    class Begins(Callback):
        draws = False
        transient = ("told",)

        def __init__(self) -> None:
            self.told: list[tuple[str, bool]] = []

        @on(FitBegin)
        @on(CycleBegin)
        @on(EpochBegin)
        def note(self, event: Any, phase: Phase, learner: Any) -> None:
            self.told.append((type(event).__name__, event.resumed))

    def told(moment: int) -> list[tuple[str, bool]]:
        path = tmp_path / f"{moment}.pt"
        save_at(toy_learner(Begins(), num_batches=2), moment, path, epochs=2)
        begins = Begins()
        toy_learner(begins, num_batches=2).fit(2, resume=path)
        return begins.told

    fit, cycle, epoch = "FitBegin", "CycleBegin", "EpochBegin"
    second = [(cycle, False), (epoch, False), (epoch, False)]
    assert told(1) == [(fit, True), (cycle, False), (epoch, False), (epoch, False), *second]  # after FitBegin
    assert told(2) == [(fit, True), (cycle, True), (epoch, True), (epoch, False), *second]  # before the first batch
    assert told(5) == [(fit, True), (cycle, True), (epoch, False), *second]  # between training and validation
    assert told(6) == [(fit, True), (cycle, True), (epoch, True), *second]  # before the first batch of validation
    assert told(8) == [(fit, True), (cycle, True), (epoch, True), *second]  # after the last batch of validation
    assert told(9) == [(fit, True), (cycle, True), *second]  # after the last phase
    assert told(10) == [(fit, True), *second]  # between cycles


def test_the_trace_of_events_is_that_of_the_run_that_was_not_killed(tmp_path: Path) -> None:
    plain, resumed = EventRecorder(), EventRecorder()
    toy_learner(plain, num_batches=2).fit(2)
    save_at(toy_learner(EventRecorder(), num_batches=2), 6, tmp_path / "state.pt", epochs=2)
    toy_learner(resumed, num_batches=2).fit(2, resume=tmp_path / "state.pt")
    assert resumed.trace == plain.trace


def test_a_run_without_a_seed_goes_on_with_that_of_the_checkpoint(tmp_path: Path) -> None:
    def make(seed: int) -> Learner:
        model = network()
        torch.manual_seed(seed)
        data = TensorBatches(*rows(), batch_size=3, shuffle=True)
        return Learner(model, nn.functional.cross_entropy, data=(data,), default_callbacks=False)

    plain = make(5)
    plain.fit(2)
    save_at(make(5), 3, tmp_path / "state.pt", epochs=2)
    resumed = make(6)
    assert resumed.seed != plain.seed
    resumed.fit(2, resume=tmp_path / "state.pt")
    assert resumed.seed == resumed.history.seed == plain.seed
    assert_same_bits(plain, resumed)


def test_a_complete_run_trains_nothing(tmp_path: Path) -> None:
    recorder = EventRecorder()
    toy_learner(Checkpointer(tmp_path)).fit(2, resume=tmp_path)
    learner = toy_learner(Checkpointer(tmp_path), recorder)
    history = learner.fit(2, resume=tmp_path)
    assert history.cycles == 2
    assert "StepBegin" not in recorder.events


def run_with_checkpoints(folder: Path, *more: Callback) -> Learner:
    train, valid = DataLoader(Noisy(), batch_size=3, shuffle=True), TensorBatches(*rows(6), batch_size=3)
    return classifier((train, valid), Recorder(), Checkpointer(folder, every=1, unit="step", keep_last=3), *more)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 1, 100, -1], ids=lambda left: f"{left} bytes")
def test_a_file_cut_short_is_skipped_with_a_word_and_the_one_before_it_taken(tmp_path: Path, left: int) -> None:
    plain = run_with_checkpoints(tmp_path / "plain")
    plain.fit(2)
    save_at(run_with_checkpoints(tmp_path / "run"), 5, tmp_path / "state.pt", epochs=2)
    files = [path for _, path in Folder(tmp_path / "run").files()]
    content = files[-1].read_bytes()
    files[-1].write_bytes(content[:left])
    resumed = run_with_checkpoints(tmp_path / "run")
    with pytest.warns(UserWarning, match=rf"{files[-1].name} is incomplete or damaged.*; the one before it is taken"):
        resumed.fit(2, resume=tmp_path / "run")
    assert_same_bits(plain, resumed)
    assert (files[-1].exists(), resumed.history.cycles) == (False, 2)  # it was written again, and is old by now


class Signals(Callback):
    """Sends this process a signal at an event."""

    draws = False
    transient = ("left",)

    def __init__(self, number: int, event: type[Any], phase: type[Phase], at: int) -> None:
        self.number, self.event, self.phase, self.left = number, event, phase, at

    @on(fluxloop.Event)
    def send(self, event: Any, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.event) and isinstance(phase, self.phase):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)


MOMENTS: dict[str, tuple[type[Any], type[Phase], int, int]] = {
    "the fit begins": (FitBegin, FittingPhase, 1, 0),
    "a cycle begins": (CycleBegin, FittingPhase, 2, 6),
    "an epoch begins": (EpochBegin, TrainingPhase, 2, 6),
    "a step begins": (StepBegin, TrainingPhase, 6, 8),
    "a step ends": (StepEnd, TrainingPhase, 7, 9),
    "the last step of training ends": (StepEnd, TrainingPhase, 8, 10),
    "training ends": (EpochEnd, TrainingPhase, 2, 10),
    "validation begins": (EpochBegin, ValidationPhase, 2, 10),
    "a step of validation ends": (StepEnd, ValidationPhase, 3, 11),
    "validation ends": (EpochEnd, ValidationPhase, 2, 12),
    "a cycle ends": (CycleEnd, FittingPhase, 2, 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl+C", "SIGTERM"])
@pytest.mark.parametrize(("event", "phase", "at", "steps"), MOMENTS.values(), ids=MOMENTS)
def test_a_signal_at_any_event_leaves_a_checkpoint_of_the_steps_done_to_go_on_from(
    tmp_path: Path, number: signal.Signals, event: type[Any], phase: type[Phase], at: int, steps: int
) -> None:
    plain = run_with_checkpoints(tmp_path / "plain")
    plain.fit(3)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    stopped = run_with_checkpoints(tmp_path / "run", Signals(number, event, phase, at))
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as exit:
            stopped.fit(3)
        assert exit.value.code == 143
    else:
        stopped.fit(3)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert stopped.history.stop_reason in ("interrupted (Ctrl+C)", "terminated (SIGTERM)")
    newest = Folder(tmp_path / "run").newest()
    assert newest is not None
    assert sum(n for name, n in newest["streams"].items() if name.endswith("/step")) == steps
    resumed = run_with_checkpoints(tmp_path / "run")
    resumed.fit(3, resume=tmp_path / "run")
    assert (resumed.history.cycles, resumed.history.stop_reason) == (3, None)
    assert_same_bits(plain, resumed)
    assert resumed.history.rows() == plain.history.rows()


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl+C", "SIGTERM"])
def test_a_signal_while_the_last_checkpoint_is_written_changes_no_more(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = run_with_checkpoints(tmp_path)
    add = Folder.add

    def interrupted(self: Folder, progress: Any, *args: Any) -> Path:
        if progress[0] == 2:
            os.kill(os.getpid(), number)
        return add(self, progress, *args)

    monkeypatch.setattr(Folder, "add", interrupted)
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit):
            learner.fit(2)
    else:
        learner.fit(2)
    assert learner.history.cycles == 2
    assert not learner._running.fitting
    again = run_with_checkpoints(tmp_path)
    again.fit(2, resume=tmp_path)
    assert again.history.cycles == 2
    assert_same_bits(learner, again)


# What does not fit


def make_linear(**options: Any) -> Learner:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"data": (TensorBatches(*rows(), batch_size=3),), "seed": 0, **options}
    settings.setdefault("optimizer", partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    return Learner(
        settings.pop("model", partial(nn.Linear, 3, 2))(),
        nn.functional.cross_entropy,
        default_callbacks=False,
        **settings,
    )


class Another(TrainingPhase):
    pass


MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "data of another length": (
        {"data": (TensorBatches(*rows(9), batch_size=3),)},
        {},
        "after 2 of 4 batches of the training data, and there are 3 now",
    ),
    "other phases": ({}, {"phases": [Another()]}, "the fit ran the phases .*TrainingPhase.*, and now .*Another"),
    "another seed": ({"seed": 1}, {}, "seed=1 was given, and the run has seed=0"),
    "another learning rate": (
        {"optimizer": partial(torch.optim.SGD, lr=0.2, momentum=0.9)},
        {},
        r"the optimizer was made with lr=0\.1, and now with lr=0\.2",
    ),
    "another optimizer": (
        {"optimizer": partial(torch.optim.Adam, lr=0.1)},
        {},
        r"was a torch\.optim\.sgd\.SGD and is a",
    ),
    "a model of another shape": (
        {"model": partial(nn.Linear, 3, 5)},
        {},
        r"'weight' has shape \(5, 3\), in the checkpoint \(2, 3\)",
    ),
    "a model with other names": (
        {"model": lambda: nn.Sequential(nn.Linear(3, 2))},
        {},
        r"the checkpoint lacks '0\.weight'",
    ),
    "fewer epochs": ({}, {"epochs": 1}, r"fit\(1, resume=\.\.\.\) was asked for, and 1 epochs are complete and one is"),
    "no epochs": ({}, {"epochs": 0}, r"fit\(0, resume=\.\.\.\) was asked for"),
}


@pytest.mark.slow(quick=5)
@pytest.mark.parametrize(("learner", "fit", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_told_and_changes_nothing(
    tmp_path: Path, learner: dict[str, Any], fit: dict[str, Any], message: str
) -> None:
    moment = 10 if "epochs" in fit else 4
    save_at(make_linear(), moment, tmp_path / "state.pt", epochs=3)
    other = make_linear(**learner)
    before, streams = bits(other), other.streams.positions()
    with pytest.raises(CheckpointError, match=message):
        other.fit(**{"epochs": 3, **fit}, resume=tmp_path / "state.pt")
    assert bits(other).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(other).items())
    assert other.history.cycles == 0
    assert {name: n for name, n in other.streams.positions().items() if n} == {n: v for n, v in streams.items() if v}
    assert not other._running.fitting
    other.fit(1)  # it trains as one that was never asked to go on
    fresh = make_linear(**learner)
    fresh.fit(1)
    assert_same_bits(other, fresh)


def test_a_state_that_a_callback_refuses_changes_nothing(tmp_path: Path) -> None:
    class Refuses(PairCallback):
        refuses: ClassVar[bool] = False

        def load_state_dict(self, state: Any) -> None:
            if self.refuses:
                raise ValueError("another layout")
            super().load_state_dict(state)

    save_at(make_linear(callbacks=[Refuses()]), 3, tmp_path / "state.pt", epochs=2)
    other = make_linear(callbacks=[Refuses()])
    before = bits(other)
    Refuses.refuses = True
    with pytest.raises(ValueError, match="another layout"):
        other.fit(2, resume=tmp_path / "state.pt")
    assert not other._running.fitting
    assert bits(other).keys() == before.keys()


def test_callbacks_may_be_added_and_those_that_are_gone_are_told(tmp_path: Path) -> None:
    save_at(make_linear(callbacks=[Counter()]), 3, tmp_path / "state.pt", epochs=1)
    learner = make_linear(callbacks=[EventRecorder()])
    with pytest.warns(UserWarning, match="the checkpoint has states of Counter, which are not among the callbacks now"):
        learner.fit(1, resume=tmp_path / "state.pt")
    assert learner.history.cycles == 1


def test_a_checkpoint_file_that_is_not_there_is_no_new_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"epoch-0003-step-00000012-phase-0\.pt"):
        make_linear().fit(1, resume=tmp_path / "epoch-0003-step-00000012-phase-0.pt")


def test_a_state_asked_for_in_the_middle_of_a_step_is_told() -> None:
    class Asks(fluxloop.UnsafeCallback):
        @on(StepEnd)
        def ask(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            learner.state_dict()

    with pytest.raises(CheckpointError, match=r"while a step is under way.*; expected between two steps"):
        toy_learner(Asks()).fit(1)


def test_the_state_of_a_learner_that_does_not_fit_is_written_and_read(tmp_path: Path) -> None:
    learner, other = make_linear(callbacks=[Counter()]), make_linear(callbacks=[Counter()])
    learner.fit(1)
    write(tmp_path / "state.pt", learner.state_dict())
    other.load(tmp_path / "state.pt")
    assert_same_bits(learner, other)
    learner.fit(1)
    other.fit(1)
    assert_same_bits(learner, other)
    assert other.get_callback(Counter).n == learner.get_callback(Counter).n == 8  # type: ignore[union-attr]


# What models, loss functions and samplers keep in attributes


class Remembers(nn.Module):
    """Keeps a running mean, a series and a generator in attributes that no ``state_dict`` has."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(3)
        self.series: list[float] = []
        self.rng = numpy.random.default_rng(0)
        self.linear = nn.Linear(3, 3)

    def forward(self, xs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + xs.mean(0).detach()
        self.series.append(float(xs.sum()))
        return self.linear(xs) + self.mean + self.rng.random() + 0.01 * len(self.series)


class Growing:
    """A loss function that is no module, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, preds: Tensor, ys: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(preds, ys) * (1 + 0.1 * self.calls)


class Shuffles(Sampler[int]):
    """Shuffles its own list with a generator of its own."""

    def __init__(self) -> None:
        self.rng = numpy.random.default_rng(3)
        self.order = list(range(10))

    def __iter__(self) -> Iterator[int]:
        self.rng.shuffle(self.order)
        return iter(list(self.order))

    def __len__(self) -> int:
        return 10


@pytest.mark.slow
def test_what_models_losses_and_samplers_keep_in_attributes_goes_on() -> None:
    def make() -> Learner:
        torch.manual_seed(0)
        rows = TensorDataset(torch.rand(10, 3), torch.arange(10) % 3)
        loader = DataLoader(rows, batch_size=4, sampler=Shuffles())
        return Learner(Remembers(), Growing(), data=(loader,), seed=0, default_callbacks=False)

    assert_resumes_exactly(make, epochs=2)


def test_a_stop_asked_for_in_an_epoch_inside_another_waits_for_the_outer_one(tmp_path: Path) -> None:
    class Validates(fluxloop.UnsafeCallback):
        @on(StepEnd, TrainingPhase)
        def validate(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            if learner.history[TrainingPhase].steps == 5:
                learner.request_stop("enough for today")
                learner.epoch(ValidationPhase())

    def make(*more: Callback) -> Learner:
        return toy_learner(Recorder(), Checkpointer(tmp_path), *more, num_batches=8)

    history = make(Validates()).fit(1, resume=tmp_path)
    assert history.stop_reason == "enough for today"
    assert history[TrainingPhase].steps == 5
    assert history[ValidationPhase].epochs == 1
    newest = Folder(tmp_path).newest()
    assert newest is not None
    assert newest["place"]["feed"]["batch"] == 5


# Stages


class KillAt(Callback):
    """Ends everything at the n-th training step of the script."""

    transient = ("left",)
    draws = False

    def __init__(self, left: int) -> None:
        self.left = left

    @on(StepEnd, AbstractTrainingPhase)
    def count(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def in_stages(run: Path, kill: int = 10**9) -> Learner:
    """Train one learner in two stages, with one command: the second freezes a part and lowers the rate."""
    data = (TensorBatches(*rows(), batch_size=4, shuffle=True), TensorBatches(*rows(6), batch_size=3))
    callbacks = [Recorder(), fluxloop.Metrics(), fluxloop.EMA("model", 0.9), KillAt(kill)]
    learner = classifier(data, *callbacks, Checkpointer(run / "stage1", every=2, unit="step"))
    learner.fit(2, resume=run / "stage1")
    learner.model[0].requires_grad_(False)
    learner.optimizer.param_groups[0]["lr"] = 0.001
    learner.replace_callback(Checkpointer(run / "stage2", every=2, unit="step"))
    learner.fit(4, resume=run / "stage2")
    return learner


class Grown(nn.Module):
    """What was trained, and a head beside its last layer."""

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained
        self.head = nn.Linear(3, 2)

    def forward(self, xs: Tensor) -> Tensor:
        result: Tensor = self.trained(xs) + self.head(xs)
        return result


def growing(run: Path, kill: int = 10**9) -> Learner:
    """Train a model, then a bigger one around it, with one command."""
    data = (TensorBatches(*rows(), batch_size=4, shuffle=True), TensorBatches(*rows(6), batch_size=3))
    killer = KillAt(kill)

    def callbacks(stage: str) -> list[Callback]:
        checkpointer = Checkpointer(run / stage, every=2, unit="step")
        return [Recorder(), fluxloop.Metrics(), fluxloop.EMA("model", 0.9), checkpointer]

    first = classifier(data, *callbacks("small"), killer)
    first.fit(2, resume=run / "small")
    first.remove_callback(KillAt)
    second = Learner(
        Grown(first.model),  # the structure is made before the state is put in
        nn.functional.cross_entropy,
        data=data,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        callbacks=[*callbacks("grown"), killer],
        default_callbacks=False,
        seed=1,
    )
    second.fit(2, resume=run / "grown")
    return second


@pytest.mark.slow
@pytest.mark.parametrize("script", [in_stages, growing])
def test_a_script_with_two_stages_goes_on_from_a_kill_in_either(script: Callable[..., Learner], tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = script(tmp_path / "plain")
    for kill in (1, 3, 6, 7, 10, 12):  # of 12 training steps
        for again in (kill, 10**9, 10**9):  # killed, resumed to the end, and run once more
            torch.manual_seed(3)
            try:
                learner = script(tmp_path / f"{kill}", again)
            except Killed:
                continue
            assert_same_bits(plain, learner)
            averages = [each.weights["model@ema"].state_dict() for each in (plain, learner)]
            assert all(torch.equal(tensor, averages[1][name]) for name, tensor in averages[0].items())
            assert plain.history.rows() == learner.history.rows()


def test_one_folder_for_two_stages_says_what_to_do(tmp_path: Path) -> None:
    def make() -> Learner:
        return classifier((TensorBatches(*rows(), batch_size=6),), Checkpointer(tmp_path))

    make().fit(3, resume=tmp_path)
    with pytest.raises(CheckpointError, match=r"3 epochs are complete.*several fits.* give each stage a folder of its"):
        make().fit(2, resume=tmp_path)


def test_a_run_to_be_resumed_that_nobody_keeps_is_told(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"no Checkpointer is among the callbacks: .*; add Checkpointer\('.*runs'\)"
    ) as told:
        toy_learner(num_batches=2).fit(1, resume=tmp_path / "runs")
    assert len(told) == 1


def test_a_run_that_is_kept_is_not_told_of_a_checkpointer(tmp_path: Path) -> None:
    learner = toy_learner(Recorder(), Checkpointer(tmp_path / "runs"), num_batches=2)
    learner.fit(1, resume=tmp_path / "runs")
    assert (tmp_path / "runs" / "fluxloop.json").exists()
