from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluxloop import (
    BatchError,
    CombinedLoader,
    CycleGANPhase,
    CycleGANValidationPhase,
    Event,
    Learner,
    Metrics,
    Phase,
    PhaseError,
    Recorder,
    TensorBatches,
    UnsafeCallback,
    on,
    stream_seed,
)
from fluxloop.losses import hinge, relativistic
from fluxloop.phases.cycle_gan import draw_from_pool, put_into_pool
from fluxloop.testing import assert_resumes_exactly, assert_same_bits
from processes.launching import run

SEED, BATCH, STEPS = 3, 2, 5
ADAM = partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.999), fused=False)


def generator() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1), nn.Tanh())


def critic() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 2, 2), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 1))


def models() -> dict[str, nn.ModuleDict]:
    torch.manual_seed(1)
    return {
        "generators": nn.ModuleDict({"ab": generator(), "ba": generator()}),
        "critics": nn.ModuleDict({"a": critic(), "b": critic()}),
    }


def images(seed: int, count: int = STEPS * BATCH) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def data() -> CombinedLoader:
    kinds = {"a": images(0), "b": images(1)}
    return CombinedLoader({kind: TensorBatches(rows, batch_size=BATCH) for kind, rows in kinds.items()})


def learner_of(*callbacks: Any, **options: Any) -> Learner:
    given = {"data": (data(), data()), "optimizer": ADAM, "default_callbacks": False, "seed": SEED, **options}
    return Learner(options.pop("model", None) or models(), callbacks=callbacks, **{k: v for k, v in given.items()
                   if k != "model"})  # fmt: skip


class Pool:
    """The pool of the paper for batches of any size, in Python's lists."""

    def __init__(self, size: int) -> None:
        self.size, self.images = size, []

    def query(self, new: Tensor) -> Tensor:
        if not self.size:
            return new
        order = torch.rand(self.size).argsort().tolist()
        swaps = torch.rand(len(new)).tolist()
        seen, was_full = [], len(self.images) == self.size
        for image, place, number in zip(new, order, swaps, strict=False):
            if not was_full:
                if len(self.images) < self.size:
                    self.images.append(image)
                seen.append(image)
            elif number < 0.5:
                seen.append(self.images[place])
                self.images[place] = image
            else:
                seen.append(image)
        return torch.stack(seen)


def train_by_hand(pool_size: int, identity: float, epochs: int = 2) -> tuple[dict[str, nn.ModuleDict], dict[str, Pool]]:
    """Train as the authors' code does: two optimizers, generators first, fakes of the critics from pools."""
    both = models()
    ab, ba = both["generators"]["ab"], both["generators"]["ba"]
    of_a, of_b = both["critics"]["a"], both["critics"]["b"]
    step_g, step_d = (ADAM(nets.parameters()) for nets in both.values())
    pools = {"a": Pool(pool_size), "b": Pool(pool_size)}
    mse, l1 = nn.MSELoss(), nn.L1Loss()
    pairs = list(zip(images(0).split(BATCH), images(1).split(BATCH), strict=True))
    for number, (a, b) in enumerate(pairs * epochs):
        torch.manual_seed(stream_seed(SEED, "training/step", number))
        fake_b, fake_a = ab(a), ba(b)
        back_a, back_b = ba(fake_b), ab(fake_a)
        score_b, score_a = of_b(fake_b), of_a(fake_a)
        loss = mse(score_b, torch.ones_like(score_b)) + mse(score_a, torch.ones_like(score_a))
        loss = loss + 10 * (l1(back_a, a) + l1(back_b, b))
        if identity:
            loss = loss + 10 * identity * (l1(ba(a), a) + l1(ab(b), b))
        step_g.zero_grad()
        loss.backward()
        step_g.step()
        step_d.zero_grad()
        fake_a, fake_b = pools["a"].query(fake_a.detach()), pools["b"].query(fake_b.detach())
        losses = []
        for net, real, fake in ((of_a, a, fake_a), (of_b, b, fake_b)):
            real_score, fake_score = net(real), net(fake)
            losses.append(mse(real_score, torch.ones_like(real_score)) / 2 + mse(fake_score, 0 * fake_score) / 2)
        sum(losses[1:], losses[0]).backward()
        step_d.step()
    return both, pools


@pytest.mark.parametrize(("pool_size", "identity"), [(4, 0.5), (5, 0.0), (0, 0.5)])
def test_weights_and_pools_equal_those_of_a_hand_written_loop(pool_size: int, identity: float) -> None:
    learner = learner_of()
    phase = CycleGANPhase(pool_size=pool_size, identity=identity)
    learner.fit(2, phases=[phase])
    expected, pools = train_by_hand(pool_size, identity)
    for name, nets in expected.items():
        found, wanted, before = (m.state_dict() for m in (learner.models[name], nets, models()[name]))
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
        assert not all(torch.equal(found[key], before[key]) for key in before)
    for kind, pool in pools.items():
        if pool_size:
            assert torch.equal(getattr(phase, f"pool_{kind}"), torch.stack(pool.images))
        else:
            assert getattr(phase, f"pool_{kind}") is None


def test_each_pair_has_one_optimizer_and_one_loss() -> None:
    learner = learner_of(Recorder(), Metrics())
    learner.fit(1, phases=[CycleGANPhase()])
    assert learner.optimizer_names == ("generators", "critics")
    assert learner.history[CycleGANPhase].updates == {"generators": STEPS, "critics": STEPS}
    assert {"loss_generators", "loss_critics"} == set(learner.history.metrics[CycleGANPhase])


def test_the_events_and_the_entries_are_those_of_the_documentation() -> None:
    seen: list[tuple[str, set[str]]] = []

    class Entries(UnsafeCallback):
        @on(Event, CycleGANPhase)
        def note(self, event: Event, phase: Phase, learner: Learner) -> None:
            seen.append((type(event).__name__, set(vars(learner.step))))

    learner_of(Entries()).epoch(CycleGANPhase(), [(images(0, 2), images(1, 3))])  # numbers of rows may differ
    names = [name for name, _ in seen][1:-1]
    block = ["LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd"]
    assert names == ["StepBegin", *block, *block, "StepEnd"]
    entries = dict(seen[1:4])
    assert entries["StepBegin"] == {"real_a", "real_b"}
    assert entries["LossBegin"] == {"real_a", "real_b", "fake_a", "fake_b", "cycle_a", "cycle_b"}
    assert entries["BackwardBegin"] - entries["LossBegin"] == {"adversarial", "cycle", "identity", "losses"}
    assert {"seen_a", "seen_b"} <= seen[-1][1]


# Pools


def test_a_pool_gives_new_images_until_it_is_full_and_then_an_old_one_half_of_the_time() -> None:
    torch.manual_seed(0)
    pool, returned = (torch.zeros(20, 1), torch.tensor(0)), 0
    for number in range(600):
        new = torch.tensor([[2.0 * number], [2.0 * number + 1]])
        seen, *exchange = draw_from_pool(pool, new)
        pool = put_into_pool(pool, new, *exchange)
        if number < 10:
            assert torch.equal(seen, new)
        else:
            returned += (seen != new).sum().item()
            assert (seen <= new.max()).all()
    assert 520 < returned < 660  # of 1180
    assert pool[1].item() == 20
    assert len(pool[0].unique()) == 20


def test_a_pool_that_a_batch_fills_up_leaves_out_what_does_not_fit() -> None:
    pool = torch.zeros(3, 1), torch.tensor(0)
    for start in (0.0, 2.0):
        new = torch.tensor([[start], [start + 1]])
        seen, *exchange = draw_from_pool(pool, new)
        pool = put_into_pool(pool, new, *exchange)
        assert torch.equal(seen, new)
    assert pool[0].tolist() == [[0.0], [1.0], [2.0]]
    with pytest.raises(BatchError, match=r"a pool of 3 images was given 4 at once; .* CycleGANPhase\(pool_size=4\)"):
        draw_from_pool(pool, torch.zeros(4, 1))


def test_a_killed_run_goes_on_to_the_bit_with_its_pools() -> None:
    assert_resumes_exactly(
        partial(learner_of, Recorder(), Metrics()), phases=lambda: [CycleGANPhase(pool_size=3)], at=[1, 4, 7]
    )


TOGETHER = """
import os
import sys

from fluxloop import Accelerator, Checkpointer, CycleGANPhase, Recorder
from processes.launching import report
from phases.test_cycle_gan import data, learner_of

folder = os.environ["FLUXLOOP_TEST_FOLDER"] + "/run"


def make(*callbacks):
    return learner_of(Recorder(), *callbacks, accelerator=Accelerator("cpu"), data=(data(),))


whole, first, second = (CycleGANPhase(pool_size=5) for _ in range(3))
expected = make()
expected.fit(4, phases=[whole])
make(Checkpointer(folder)).fit(2, phases=[first])
resumed = make(Checkpointer(folder))
resumed.fit(4, phases=[second], resume=folder)
of = lambda learner: [p.detach() for model in learner.models.values() for p in model.parameters()]
report(whole=[of(expected), whole.state_dict()], resumed=[of(resumed), second.state_dict()])
"""


@pytest.mark.slow
def test_pools_of_several_processes_are_the_same_and_are_found_again() -> None:
    first, second = run(TOGETHER, 2, timeout=120).reports
    for report in (first, second):
        for found in (report["whole"], report["resumed"]):
            assert all(map(torch.equal, found[0], first["whole"][0]))
            for name, kept in first["whole"][1].items():
                assert torch.equal(found[1][name], kept), name
    assert first["whole"][1]["stored_a"] == 5


def test_a_state_of_another_size_is_an_error_that_changes_nothing() -> None:
    phase, other = CycleGANPhase(pool_size=3), CycleGANPhase(pool_size=4)
    learner_of().epoch(phase)
    with pytest.raises(PhaseError, match=r"pool_size=4\) was given a state of 3 images; .* CycleGANPhase\(pool_size=3"):
        other.load_state_dict(phase.state_dict())
    assert other.pool_a is None


def test_a_state_is_a_copy_that_further_steps_leave_alone() -> None:
    learner, phase = learner_of(), CycleGANPhase(pool_size=2)
    learner.epoch(phase)
    state = phase.state_dict()
    kept = state["pool_a"].clone()
    learner.epoch(phase)
    assert torch.equal(state["pool_a"], kept)
    assert not torch.equal(phase.pool_a, kept)


# The validation twin


def test_the_twin_gives_the_losses_of_held_out_rows_and_only_watches() -> None:
    phase = CycleGANPhase(pool_size=2)
    plain, watched = learner_of(Recorder(), Metrics()), learner_of(Recorder(), Metrics())
    plain.fit(2, phases=[CycleGANPhase(pool_size=2)])
    watched.fit(2, phases=[phase, CycleGANValidationPhase(phase)])
    assert_same_bits(plain, watched)
    nets = {name: m.eval() for name, m in watched.models.items()}
    ab, ba, of_a, of_b = (
        nets["generators"]["ab"],
        nets["generators"]["ba"],
        nets["critics"]["a"],
        nets["critics"]["b"],
    )
    a, b = images(0), images(1)
    with torch.no_grad():
        expected = [
            ((of_a(a) - 1).square().mean() + of_a(ba(b)).square().mean()
             + (of_b(b) - 1).square().mean() + of_b(ab(a)).square().mean()) / 2,
            (of_b(ab(a)) - 1).square().mean() + (of_a(ba(b)) - 1).square().mean()
            + 10 * ((ba(ab(a)) - a).abs().mean() + (ab(ba(b)) - b).abs().mean())
            + 5 * ((ba(a) - a).abs().mean() + (ab(b) - b).abs().mean()),
        ]  # fmt: skip
    found = watched.evaluate(phase=CycleGANValidationPhase(phase))
    assert [found["loss_critics"], found["loss_generators"]] == pytest.approx([e.item() for e in expected], rel=1e-5)


# What cannot be


@pytest.mark.parametrize("batch", [torch.zeros(2, 1, 4, 4), (torch.zeros(2, 1, 4, 4),), {"a": torch.zeros(1), "c": 3}])
def test_other_batches_are_an_error(batch: Any) -> None:
    with pytest.raises(BatchError, match=r"expected images of both kinds, \(a, b\): data=\(CombinedLoader"):
        learner_of().epoch(CycleGANPhase(), [batch])


def test_other_models_parts_and_optimizers_are_errors_before_anything_runs() -> None:
    nets = models()
    for given, options, words in [
        ({"G": nets["generators"], "critics": nets["critics"]}, {}, "calls learner.model.generators"),
        ({"generators": nn.ModuleDict({"ab": generator()}), "critics": nets["critics"]}, {}, "calls .*ba"),
        (nets, {"optimizer": {"generators.ab": ADAM, "generators.ba": ADAM, "critics": ADAM}}, "the optimizers are"),
    ]:
        with pytest.raises(PhaseError, match=words):
            learner_of(model=given, **options).epoch(CycleGANPhase())


def test_a_generator_of_another_size_is_an_error_and_not_broadcast() -> None:
    given = models()
    given["generators"]["ba"] = nn.AdaptiveAvgPool2d(2)
    with pytest.raises(PhaseError, match=r"returned \(2, 1, 2, 2\) where \(2, 1, 4, 4\) is compared"):
        learner_of(model=given).epoch(CycleGANPhase())


def test_a_loss_may_be_another_but_no_loss_of_pairs() -> None:
    learner = learner_of()
    learner.fit(1, phases=[CycleGANPhase(loss=hinge, pool_size=0)])
    with pytest.raises(PhaseError, match="expected an AdversarialLoss that compares no pairs"):
        CycleGANPhase(loss=relativistic)
