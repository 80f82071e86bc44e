"""Synchronised batch norm computes in several processes what one computes on the joined batch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fluxloop import CompileError, ModelError, SynchronisedBatchNorm, synchronise_batch_norm
from fluxloop.processes import batch_norm
from processes.launching import SIZES, run
from processes.pretended import Alone

SCRIPT = '''
import copy

import torch
from torch import nn

from fluxloop import EMA, Accelerator, Learner, TensorBatches, synchronise_batch_norm
from fluxloop.callbacks import StochasticWeightAveraging
from fluxloop.processes.batch_norm import apart
from processes.launching import report

accelerator = Accelerator("cpu")
group = accelerator.group
size, rank = group.size, group.rank


def furthest(found, expected):
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True))


def compare(norm, shape, counts, spare=()):
    """Return how far outputs, gradients, second derivatives and running statistics are from one process's."""
    torch.manual_seed(0)
    xs = torch.randn(sum(counts), *shape, dtype=torch.float64) * 3 + 100
    alone = norm.double()
    if alone.affine:
        nn.init.normal_(alone.weight)
        nn.init.normal_(alone.bias)
    one = synchronise_batch_norm(copy.deepcopy(alone))
    start = sum(counts[:rank])
    own = slice(start, start + counts[rank])
    off = {}
    for step in range(2):
        whole = (xs + step).requires_grad_()
        group.spare = rank in spare
        rows = whole.detach()[:2] if group.spare else whole.detach()[own]
        rows.requires_grad_()
        weight = 0.0 if group.spare else 1.0

        def losses(model, batch, factor):
            made = model(batch)
            loss = (made.sin() * factor).sum()
            (first,) = torch.autograd.grad(loss, batch, create_graph=True)
            loss = loss + (first.square() * factor).sum()
            return made, loss

        expected, loss = losses(alone, whole, 1.0)
        loss.backward()
        made, mine = losses(one, rows, weight)
        mine.backward()
        if not group.spare:
            off["outputs"] = max(off.get("outputs", 0), furthest([made], [expected[own]]))
            off["gradients"] = max(off.get("gradients", 0), furthest([rows.grad], [whole.grad[own]]))
        else:
            off["spare"] = float(rows.grad.abs().max())
        for ours, theirs in zip(one.parameters(), alone.parameters(), strict=True):
            off["weights"] = max(off.get("weights", 0), furthest([group.all_reduce(ours.grad.clone())], [theirs.grad]))
            ours.grad = theirs.grad = None
        group.spare = False
    off["buffers"] = furthest(one.buffers(), alone.buffers()) if list(one.buffers()) else 0.0
    one.eval(), alone.eval()
    off["eval"] = furthest([one(xs)], [alone(xs)]) if alone.track_running_stats else 0.0
    return off, [buffer.clone() for buffer in one.buffers()]


even, ragged = [3] * size, [1 + r for r in range(size)]
cases = {
    "1d": (nn.BatchNorm1d(4), (4,), even),
    "series": (nn.BatchNorm1d(4), (4, 5), ragged),
    "2d": (nn.BatchNorm2d(3, momentum=None), (3, 2, 2), ragged),
    "3d": (nn.BatchNorm3d(2, affine=False), (2, 2, 1, 2), ragged),
    "untracked": (nn.BatchNorm1d(4, track_running_stats=False), (4,), ragged),
    "spare": (nn.BatchNorm1d(4), (4,), [3] * (size - 1) + [0], (size - 1,)),
}
table = {name: compare(*case) for name, case in cases.items()}

small = synchronise_batch_norm(nn.BatchNorm1d(2))
half = small(torch.ones(2, 2, dtype=torch.bfloat16) * (1 + rank))
group.spare = rank > 0
try:
    small(torch.ones(1, 2))
except ValueError as error:
    alone = str(error)
group.spare = False
with apart():
    kept_apart = small(torch.randn(3 + rank, 2)).shape[0]


def make(batch_size, sync, group_of):
    torch.manual_seed(1)
    # No bias before batch norm: its gradient is rounding alone, of which Adam makes steps of a size
    layers = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)
    model = nn.Sequential(*layers).double()
    rows = torch.randn(26, 4, dtype=torch.float64)
    return Learner(
        synchronise_batch_norm(model) if sync else model,
        data=(TensorBatches(rows, rows[:, :1], batch_size=batch_size, shuffle=True),), loss_fn=nn.MSELoss(),
        optimizer=lambda p: torch.optim.Adam(p, 1e-2), callbacks=[EMA("model", 0.9), StochasticWeightAveraging()],
        seed=1, accelerator=group_of,
    )


trained = make(8 // size, True, accelerator)
trained.fit(2)
one = make(8, False, Accelerator("cpu", strategy="none"))
one.fit(2)
views = ("model", "model@ema", "model@swa")  # of the last, batch norm's statistics are means over smaller batches
states = [tensor for view in views for tensor in trained.weights[view].state_dict().values()]
found, expected = ([t for view in views[:2] for t in of.weights[view].state_dict().values()] for of in (trained, one))
report(
    table=table, half=half, alone=alone, kept_apart=kept_apart, states=states, off=furthest(found, expected),
    loss=trained.history["training/loss"][-1] - one.history["training/loss"][-1],
)
'''


@pytest.fixture(scope="module", params=SIZES)
def ran(request: pytest.FixtureRequest) -> Any:
    return run(SCRIPT, processes=request.param, timeout=180)


@pytest.mark.slow
def test_outputs_gradients_second_derivatives_and_statistics_are_those_of_one_process(ran: Any) -> None:
    for report in ran.reports:
        for name, (off, _) in report["table"].items():
            assert max(off.values()) < 1e-9, (name, off)


@pytest.mark.slow
def test_running_statistics_are_the_same_in_all_processes_to_the_bit(ran: Any) -> None:
    first, *others = ran.reports
    for other in others:
        for name, (_, buffers) in first["table"].items():
            assert all(map(torch.equal, buffers, other["table"][name][1]))
        assert all(map(torch.equal, first["states"], other["states"]))


@pytest.mark.slow
def test_a_training_with_batch_norm_ends_where_one_process_ends(ran: Any) -> None:
    for report in ran.reports:
        assert report["off"] < 1e-9
        assert abs(report["loss"]) < 1e-9


@pytest.mark.slow
def test_types_single_values_and_passes_of_each_process_by_itself(ran: Any) -> None:
    for rank, report in enumerate(ran.reports):
        assert report["half"].dtype is torch.bfloat16
        assert "expected more than one value for each channel of all processes" in report["alone"]
        assert report["kept_apart"] == 3 + rank


class Own(nn.BatchNorm1d):
    """A subclass with something of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.note = "kept"

    def shout(self) -> str:
        return self.note.upper()


def test_modules_stay_what_they_were() -> None:
    norm, own = nn.BatchNorm2d(3, momentum=0.3, eps=1e-3), Own(4)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(own, nn.Linear(4, 2))})
    seen: list[Any] = []
    norm.register_forward_hook(lambda *given: seen.append(given))
    before, parameters = {name: tensor.clone() for name, tensor in model.state_dict().items()}, list(model.parameters())
    assert synchronise_batch_norm(model) is model
    assert synchronise_batch_norm(model) is model  # a second time changes nothing
    assert model["a"] is norm
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(norm, SynchronisedBatchNorm)
    assert isinstance(own, Own)
    assert own.shout() == "KEPT"
    assert (norm.momentum, norm.eps) == (0.3, 1e-3)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    norm(torch.randn(2, 3, 4, 4))
    assert len(seen) == 1
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.randn(2, 3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_synchronised_too(copied: Any) -> None:
    model = copied(synchronise_batch_norm(nn.Sequential(nn.BatchNorm1d(3))))
    assert isinstance(model[0], SynchronisedBatchNorm)
    assert isinstance(model[0], nn.BatchNorm1d)


def test_one_process_has_the_bits_of_plain_batch_norm() -> None:
    plain = nn.BatchNorm1d(3)
    ours = synchronise_batch_norm(copy.deepcopy(plain))
    xs = torch.randn(5, 3)
    assert torch.equal(ours(xs), plain(xs))
    assert torch.equal(ours.running_var, plain.running_var)
    assert torch.equal(ours.eval()(xs), plain.eval()(xs))


class Shouting(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nn.Linear(2, 2), "which has no batch norm"),
        ([nn.BatchNorm1d(2)], "a list of length 1; expected a module"),
        (nn.Sequential(nn.LazyBatchNorm1d()), r"'0' is lazy; run a batch through the model first: model\(xs\)"),
        (nn.Sequential(nn.BatchNorm1d(2), Shouting(2)), "'1' is a Shouting, whose forward is its own"),
    ],
)
def test_what_cannot_be_synchronised_is_said_before_anything_is_changed(given: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        synchronise_batch_norm(given)
    if isinstance(given, nn.Sequential):
        assert not isinstance(given[0], SynchronisedBatchNorm)


def test_a_step_that_is_to_be_one_graph_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = synchronise_batch_norm(nn.BatchNorm1d(3))
    assert make_fx(norm, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.ones(2, 3)) is not None
    monkeypatch.setattr(batch_norm, "current", lambda: Alone(0, 2))
    with pytest.raises(CompileError, match=r"cannot be part of one graph.*compiled = False"):
        make_fx(norm, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.ones(2, 3))
