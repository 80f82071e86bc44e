from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fluxloop import (
    Accelerator,
    Learner,
    TensorBatches,
    TrainingPhase,
)
from fluxloop.compute import fused as fused_module
from fluxloop.compute.fused import step_optimizer
from fluxloop.compute.optimizers import build_optimizers
from fluxloop.testing import assert_same_bits, toy_learner
from small_models import (
    ADAM,
    SGD,
    Pair,
    Two,
    assert_equals,
    critic_loss,
    gan,
    generator_loss,
    images,
    models,
    one_step,
    train_by_hand,
)

# Fused implementations


def fused(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [group["fused"] for group in optimizer.param_groups]


def adam_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)


def two_groups(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.AdamW([{"params": [first], "lr": 0.5}, {"params": others, **options}])


@pytest.mark.parametrize(
    "factory",
    [torch.optim.Adam, partial(torch.optim.AdamW, lr=0.1), adam_of, lambda ps: torch.optim.AdamW(ps), two_groups],
    ids=["class", "partial", "function", "lambda", "groups"],
)
def test_adam_made_by_a_factory_is_fused_on_the_cpu(factory: Any) -> None:
    cpu = Accelerator("cpu")
    assert set(fused(Learner(Two(), optimizer=factory, accelerator=cpu).optimizer)) == {True}
    learner = Learner({"G": Two(), "D": Two()}, optimizer={"G": factory, "D": factory}, accelerator=cpu)
    assert {*fused(learner.optimizer.G), *fused(learner.optimizer.D)} == {True}


class OwnAdam(torch.optim.Adam):
    pass


@pytest.mark.parametrize(
    "factory",
    [
        partial(torch.optim.Adam, fused=False),
        partial(torch.optim.Adam, foreach=False),
        partial(torch.optim.Adam, foreach=True),
        partial(torch.optim.Adam, capturable=True),
        partial(torch.optim.Adam, differentiable=True),
        partial(torch.optim.Adam, lr=torch.tensor(0.1)),
        partial(two_groups, fused=False),
        partial(two_groups, foreach=True),
        OwnAdam,
        SGD,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
    ],
)
def test_what_the_user_said_and_other_optimizers_are_left_as_they_are(factory: Any) -> None:
    model = Two()
    [made] = build_optimizers({None: model}, factory).values()
    plain = factory(list(model.parameters()))
    for ours, theirs in zip(made.param_groups, plain.param_groups, strict=True):
        assert ours.get("fused") is theirs.get("fused")
        assert ours.get("foreach") is theirs.get("foreach")


def test_an_optimizer_that_was_made_beforehand_is_left_as_it_is() -> None:
    model = Two()
    optimizer = torch.optim.Adam(model.parameters())
    assert fused(Learner(model, optimizer=optimizer).optimizer) == [None]


@pytest.mark.parametrize(
    "parameter",
    [
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(4, 4)[:, ::2],
        torch.ones(4, 4)[::2],
        torch.ones(2, device="meta"),
    ],
    ids=["complex", "half", "with gaps", "rows with gaps", "another device"],
)
def test_parameters_that_a_fused_kernel_cannot_take_are_stepped_plainly(parameter: Tensor) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.odd = nn.Parameter(torch.ones(2)), nn.Parameter(parameter)

    [made] = build_optimizers({None: Odd()}, torch.optim.Adam).values()
    assert fused(made) == [None]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_a_fused_training_agrees_with_the_plain_one(cls: Any, memory_format: Any) -> None:
    xs, ys = torch.randn(8, 3, 5, 5), torch.randn(8, 2)
    trained = []
    for options in ({}, {"fused": False}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
        model = model.to(memory_format=memory_format)
        data = TensorBatches(xs, ys, batch_size=4)
        factory = partial(cls, lr=0.01, weight_decay=0.1, **options)
        learner = Learner(model, nn.functional.mse_loss, data=(data,), optimizer=factory, seed=0)
        learner.fit(5)
        assert fused(learner.optimizer) == [not options]
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*trained, atol=1e-5)
    assert not torch.equal(*trained)  # so one of them was fused


def losses_of(model: nn.Module) -> list[Tensor]:
    """Three losses; the second reaches the head alone."""
    xs = torch.linspace(-1, 1, 8).reshape(4, 2)
    return [
        model(xs).square().mean(),
        model.head(model.encoder(xs).detach()).square().mean(),
        model(2 * xs).abs().sum(),
    ]


def scheduled(optimizer: Any, model: nn.Module) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def decayed(optimizer: Any, model: nn.Module) -> None:
    optimizer.param_groups[0].update(weight_decay=0.3, betas=(0.5, 0.6), eps=1e-3)


def frozen(optimizer: Any, model: nn.Module) -> None:
    model.encoder.requires_grad_(False)


def with_a_new_group(optimizer: Any, model: nn.Module) -> None:
    model.extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [model.extra], "lr": 0.3, "fused": True})


def reloaded(optimizer: Any, model: nn.Module) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def with_another_state(optimizer: Any, model: nn.Module) -> None:
    state = optimizer.state[model.head[1].bias]
    state["exp_avg"] = state["exp_avg"] + 1
    optimizer.state[model.head[1].weight] = {k: v.clone() for k, v in optimizer.state[model.head[0].weight].items()}
    optimizer.state[model.head[1].weight]["exp_avg"] = torch.full((1, 3), 0.5)
    optimizer.state[model.head[1].weight]["exp_avg_sq"] = torch.full((1, 3), 0.5)


def forgotten(optimizer: Any, model: nn.Module) -> None:
    optimizer.state.clear()


def switched_off(optimizer: Any, model: nn.Module) -> None:
    optimizer.param_groups[0]["fused"] = False


def by_a_tensor(optimizer: Any, model: nn.Module) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.02)


def with_a_parameter_less(optimizer: Any, model: nn.Module) -> None:
    del optimizer.param_groups[0]["params"][1]


def with_other_parameters(optimizer: Any, model: nn.Module) -> None:
    optimizer.param_groups[0]["params"].reverse()


@pytest.mark.slow(quick=10)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}, {"weight_decay": 0.2, "lr": 1}], ids=repr)
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "change",
    [
        scheduled,
        decayed,
        frozen,
        with_a_new_group,
        reloaded,
        with_another_state,
        forgotten,
        switched_off,
        by_a_tensor,
        with_a_parameter_less,
        with_other_parameters,
    ],
)
def test_a_fused_kernel_called_directly_does_what_torchs_step_does(cls: Any, options: Any, change: Any) -> None:
    trained = []
    for step in (step_optimizer, lambda optimizer: optimizer.step()):
        torch.manual_seed(0)
        model = Two()
        optimizer = cls(model.parameters(), fused=True, **options)
        for number in range(7):
            if number == 4:
                change(optimizer, model)
            optimizer.zero_grad()
            loss = losses_of(model)[number % 3]
            (loss + model.extra.square().sum() if hasattr(model, "extra") else loss).backward()
            step(optimizer)
        states = [optimizer.state.get(p, {}) for p in model.parameters()]
        trained.append([*model.parameters(), *(state[name] for state in states for name in sorted(state))])
    assert len(trained[0]) == len(trained[1])
    assert all(map(torch.equal, *trained))


def transposed(gradient: Tensor) -> Tensor:
    return gradient.t().contiguous().t()


def repeated(gradient: Tensor) -> Tensor:
    return gradient[:1].expand_as(gradient)


@pytest.mark.parametrize("other", [transposed, repeated])
@pytest.mark.parametrize("first", [0, 2], ids=["at once", "later"])
def test_gradients_in_another_order_in_memory_are_not_mixed_up(other: Any, first: int) -> None:
    parameters = []
    for step in (step_optimizer, lambda optimizer: optimizer.step()):
        model = nn.Linear(5, 4)
        nn.init.ones_(model.weight)
        if step is step_optimizer:
            [optimizer] = build_optimizers({None: model}, torch.optim.AdamW).values()
        else:
            optimizer = torch.optim.AdamW(model.parameters())
        for number in range(4):
            gradient = torch.linspace(-1, 1, 20).reshape(4, 5)
            model.weight.grad = other(gradient) if number >= first else gradient
            step(optimizer)
        parameters.append(model.weight.detach())
    assert fused(build_optimizers({None: nn.Linear(5, 4)}, torch.optim.AdamW)[None]) == [True]
    assert torch.allclose(*parameters, rtol=0, atol=1e-7)


def test_averages_in_another_order_in_memory_are_not_mixed_up() -> None:
    trained = []
    for options in ({}, {"fused": False}):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3)
        [optimizer] = build_optimizers({None: model}, partial(torch.optim.Adam, **options)).values()
        for number in range(4):
            if number == 2:
                model.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 150).reshape(2, 3, 5, 5)).square().mean().backward()
            step_optimizer(optimizer)
        trained.append(model.weight.detach())
    assert torch.allclose(*trained, rtol=0, atol=1e-6)


@pytest.mark.parametrize("private_names", [True, False])
def test_a_fused_step_is_the_same_without_torchs_private_names(
    monkeypatch: pytest.MonkeyPatch, private_names: bool
) -> None:
    if not private_names:
        monkeypatch.setattr(fused_module, "_profiling", None)
    model, reference = Two(), Two()
    reference.load_state_dict(model.state_dict())
    [ours] = build_optimizers({None: model}, torch.optim.AdamW).values()
    theirs = torch.optim.AdamW(reference.parameters(), fused=True)
    for number in range(3):
        for each, optimizer in ((model, ours), (reference, theirs)):
            optimizer.zero_grad()
            losses_of(each)[number].backward()
        step_optimizer(ours)
        theirs.step()
    assert all(map(torch.equal, model.parameters(), reference.parameters()))


def test_hooks_of_a_fused_optimizer_run_around_its_step() -> None:
    model, seen = Two(), []
    [optimizer] = build_optimizers({None: model}, torch.optim.Adam).values()
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    losses_of(model)[0].backward()
    step_optimizer(optimizer)
    assert seen == ["before", "after"]


def test_an_adam_whose_step_was_replaced_is_stepped_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Two(), []
    [optimizer] = build_optimizers({None: model}, torch.optim.AdamW).values()
    for _ in range(2):  # the second time there are averages
        losses_of(model)[0].backward()
        step_optimizer(optimizer)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: seen.append("own"))
    step_optimizer(optimizer)
    assert seen == ["own"]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_are_refused_by_adam_and_taken_by_others() -> None:
    def learner_with(optimizer: Any) -> Learner:
        model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(), nn.Linear(4, 1))
        data = TensorBatches(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 1), batch_size=1)
        return Learner(model, nn.functional.mse_loss, data=(data,), optimizer=optimizer, default_callbacks=False)

    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        learner_with(torch.optim.Adam).fit(2)
    for optimizer in (SGD, torch.optim.Adagrad):
        learner = learner_with(optimizer)
        learner.fit(2)
        assert learner.model[0].weight.grad.is_sparse


@pytest.mark.parametrize(("first", "second"), [({}, {"fused": False}), ({"fused": False}, {})], ids=["fused", "plain"])
def test_a_training_goes_on_with_the_implementation_it_began_with(first: Any, second: Any) -> None:
    def learner_with(options: Any) -> Learner:
        torch.manual_seed(0)
        xs = torch.linspace(-1, 1, 16).reshape(8, 2)
        data = TensorBatches(xs, xs[:, :1], batch_size=2, shuffle=True)
        factory = partial(torch.optim.AdamW, lr=0.05, **options)
        return Learner(Two(), nn.functional.mse_loss, data=(data,), optimizer=factory, default_callbacks=False, seed=0)

    whole, begun, other = learner_with(first), learner_with(first), learner_with(second)
    whole.fit(4)
    begun.fit(2)
    other.load_state_dict(begun.state_dict())
    assert fused(other.optimizer) == fused(whole.optimizer)
    other.fit(2)
    assert all(map(torch.equal, whole.model.parameters(), other.model.parameters()))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_graph_made_before_a_fused_step_is_refused_after_it_as_without_fusing(hooked: bool) -> None:
    learner = Learner(nn.Linear(3, 3), data=(torch.randn(4, 3),), optimizer=torch.optim.Adam, default_callbacks=False)
    assert learner.optimizer.param_groups[0]["fused"]
    if hooked:
        learner.optimizer.register_step_post_hook(lambda *_: None)
    xs = torch.randn(4, 3)
    hidden = learner.model(xs)
    stale = learner.model(hidden).sum()  # its gradient needs the weights as they are now
    learner.backward(learner.model(xs).square().mean())
    learner.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# The optimizer's step is seen by whoever listens to PyTorch


def plain_bits(optimizer: Any = ADAM) -> Learner:
    learner = gan(optimizer=optimizer)
    learner.epoch(Pair())
    return learner


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_a_hook_on_an_optimizer_sees_each_of_its_steps_and_changes_no_bit(register: str) -> None:
    calls: list[Any] = []
    learner = gan(optimizer=ADAM)
    getattr(learner.optimizer.D, register)(lambda optimizer, args, kwargs: calls.append(optimizer))
    learner.epoch(Pair())
    assert calls == [learner.optimizer.D] * 4
    assert_same_bits(learner, plain_bits())


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_a_hook_on_every_optimizer_sees_each_step_and_changes_no_bit(register: Any) -> None:
    calls: list[Any] = []
    learner = gan(optimizer=ADAM)
    handle = register(lambda optimizer, args, kwargs: calls.append(optimizer))
    try:
        learner.epoch(Pair())
    finally:
        handle.remove()
    assert calls == [learner.optimizer.D, learner.optimizer.G] * 4
    assert_same_bits(learner, plain_bits())


def test_a_hook_that_is_removed_is_called_no_more() -> None:
    calls: list[Any] = []
    learner = gan()
    handle = learner.optimizer.D.register_step_pre_hook(lambda optimizer, args, kwargs: calls.append(optimizer))
    one_step(learner)
    handle.remove()
    one_step(learner)
    assert len(calls) == 1


def test_a_scheduler_of_torch_counts_the_steps_and_sets_the_rate() -> None:
    learner = gan()
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in learner.optimizer]
    both = models()
    gen, dis = both["G"], both["D"]
    step_g, step_d = SGD(gen.parameters()), SGD(dis.parameters())
    by_hand = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in (step_g, step_d)]
    for _ in range(3):
        learner.epoch(Pair())
        for scheduler in schedulers:
            scheduler.step()  # warns, which is an error here, where the optimizer was not seen to step
        for real in images():
            fake = gen(real)
            step_d.zero_grad()
            critic_loss(dis, real, fake).backward()
            step_d.step()
            step_g.zero_grad()
            generator_loss(dis, fake).backward()
            step_g.step()
        for scheduler in by_hand:
            scheduler.step()
    assert [group["lr"] for optimizer in learner.optimizer for group in optimizer.param_groups] == [0.0125, 0.0125]
    assert_equals(learner, both)


def test_a_step_replaced_on_an_optimizer_is_the_one_that_is_called() -> None:
    learner = gan(optimizer=ADAM)
    original, calls = learner.optimizer.G.step, []

    def step() -> None:
        calls.append(1)
        original()

    learner.optimizer.G.step = step
    learner.epoch(Pair())
    assert calls == [1] * 4
    assert_same_bits(learner, plain_bits())


def test_a_profiler_sees_the_steps_of_the_optimizers() -> None:
    learner = gan(optimizer=ADAM)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        learner.epoch(Pair())
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["Optimizer.step#Adam.step"] == 8
    assert_same_bits(learner, plain_bits())


class Sign(torch.optim.Optimizer):
    """An optimizer of one's own, whose step returns to nobody."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad.sign()


class LoudSign(Sign):
    calls = 0

    def step(self, closure: Any = None) -> None:
        type(self).calls += 1
        super().step()


@pytest.mark.parametrize("optimizer", [Sign, LoudSign])
def test_an_optimizer_of_ones_own_steps_as_in_a_hand_written_loop(optimizer: Any) -> None:
    LoudSign.calls = 0
    assert_equals(plain_bits(optimizer), train_by_hand(optimizer=optimizer))
    assert LoudSign.calls == (16 if optimizer is LoudSign else 0)


def test_a_wrapped_step_of_a_users_optimizer_is_called() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # torch wraps a class's step when the first one is made

    class Clamp(torch.optim.SGD):
        @functools.wraps(torch.optim.SGD.step)
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.clamp_(-0.1, 0.1)
            return result

    learner = toy_learner(optimizer=partial(Clamp, lr=0.1))
    learner.epoch(TrainingPhase())
    assert learner.model.value.item() == pytest.approx(0.1)


def test_a_step_wrapped_on_the_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = toy_learner(num_batches=3)
    calls: list[object] = []
    original = torch.optim.SGD.step

    @functools.wraps(original)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    learner.epoch(TrainingPhase())
    assert calls == [learner.optimizer] * 3
