from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_training import Model, graphs, learner, learner_of
from torch import Tensor, nn
from torch.nn import functional

from fluxloop import Accelerator, CompileError, Learner
from fluxloop.compile.refusals import advice


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ({"precision": "fp16"}, "precision='fp16'", "precision='bf16'"),
    ],
)
def test_what_no_graph_can_hold_is_refused_by_name(options: dict[str, Any], given: str, expected: str) -> None:
    with pytest.raises(CompileError, match=rf"compile='step'\) was given with {given}: .*Expected {expected}"):
        Learner(nn.Linear(2, 1), accelerator=Accelerator("cpu", compile="step", **options))
    Learner(nn.Linear(2, 1), accelerator=Accelerator("cpu", **options))


def test_ways_of_its_own_are_refused() -> None:
    class Own(Accelerator):
        def update(self, *given: Any, **named: Any) -> None:
            super().update(*given, **named)

    with pytest.raises(CompileError, match="Own has a backward or update of its own"):
        Learner(nn.Linear(2, 1), accelerator=Own("cpu", compile="step"))
    assert learner().accelerator.compile == "step"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.BatchNorm1d(16, momentum=None), r"BatchNorm1d at '0' has momentum=None.*momentum=0.1"),
        (lambda: nn.Embedding(16, 4, sparse=True), r"gradients of Embedding at '0' are sparse.*\(sparse=False\)"),
        (lambda: nn.utils.weight_norm(nn.Linear(16, 4)), r"weight_norm.WeightNorm.*parametrizations compile"),
        (
            lambda: torch.jit.trace(nn.Linear(16, 16), torch.ones(2, 16)),
            r"TopLevelTracedModule at '0' is compiled by torch\.jit.*the module it was made of",
        ),
    ],
    ids=["batch norm", "embedding", "weight norm", "traced by torch.jit"],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.trace.*is deprecated")
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_parts_that_no_graph_can_hold_are_refused_by_name_when_the_learner_is_made(make: Any, words: str) -> None:
    with pytest.raises(CompileError, match=words):
        learner(model=lambda: nn.Sequential(make(), nn.Linear(16, 4)))
    learner(False, model=lambda: nn.Sequential(make(), nn.Linear(16, 4)))


def packed(model: Any, out: Tensor) -> Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(out[:, :, None].expand(-1, -1, 6), torch.full((len(out),), 3), True)
    return model.recurrent(rows)[1][0]


def by_lstsq(model: Any, out: Tensor) -> Tensor:
    return out + torch.linalg.lstsq(out.mT @ out, out.mT).solution.mT


def by_ctc(model: Any, out: Tensor) -> Tensor:
    targets, lengths = torch.ones(1, 2, dtype=torch.long), torch.tensor([8])
    return out + functional.ctc_loss(out[:, None].log_softmax(-1), targets, lengths, torch.tensor([2]))


@pytest.mark.usefixtures("imported", "uncompiled")
@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (
            lambda model, out: out + torch.from_numpy(out.detach().numpy()),
            r"compute with torch.*finish\(learner, state\)",
        ),
        (lambda model, out: out * len(f"{out.sum():.2f}"), r"write texts of numbers in the phase's finish"),
        (
            lambda model, out: torch.distributions.Normal(out, 1.0, validate_args=True).log_prob(out),
            r"say validate_args=False",
        ),
        (
            lambda model, out: out[int(out.sum(1).argmax())].expand(8, 3),
            r"index_select and gather choose without asking",
        ),
        (lambda model, out: out * 2 if out.sum() > 0 else out, r"torch.where"),
        (by_lstsq, r"its numbers alone.*compiled = False in its class"),
        (by_ctc, r"ctc_loss.*compiled = False in its class"),
        (packed, r"pad them, and mask what the loss sees"),
    ],
    ids=["numpy", "text", "distribution", "index", "if", "lstsq", "ctc", "packed"],
)
def test_an_error_of_tracing_says_what_to_do(compute: Any, words: str) -> None:
    model = Model(compute)
    model.recurrent = nn.GRU(6, 3, batch_first=True)
    with pytest.raises(CompileError, match=rf"in .*test_refusals.py, line .*{words}") as caught:
        learner_of(model).fit(1)
    assert "RuntimeError: Unsupported" not in str(caught.value)


@pytest.mark.usefixtures("imported", "uncompiled")
@pytest.mark.parametrize(
    "compute",
    [
        lambda model, out: out * (out[out > -100].sum() > 0),
        lambda model, out: out + out[(out > -100).nonzero(as_tuple=True)].mean(),
        lambda model, out: out + out.detach().unique().sum(),
    ],
    ids=["mask", "nonzero", "unique"],
)
def test_rows_that_numbers_choose_are_part_of_a_graph(compute: Any) -> None:
    made = learner_of(Model(compute))
    made.fit(2)
    assert graphs(made) == 1


@pytest.mark.usefixtures("imported", "uncompiled")
def test_sparse_batches_are_refused_by_the_name_of_the_entry() -> None:
    batches = [(torch.eye(6).to_sparse(), torch.zeros(6, dtype=torch.long))] * 3
    model = Model(lambda model, out: out)
    model.layer = Sparse()
    with pytest.raises(CompileError, match=r"the entry 'xs' holds a sparse tensor.*\.to_dense\(\)"):
        learner_of(model, data=(batches,)).fit(1)


class Sparse(nn.Module):
    """Multiplies sparse rows by its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 3))

    def forward(self, xs: Tensor) -> Tensor:
        return torch.sparse.mm(xs, self.weight)


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("", "batches of few shapes"),
        ("the entry 'xs'", "batches of few shapes"),
        ("the optimizer: betas = (0.9, 0.99)", "cycle_momentum=False"),
        ("Phase.count = 8, which was 1", "keep a bool"),
    ],
)
def test_many_graphs_come_with_the_advice_that_fits(why: str, words: str) -> None:
    assert words in advice(why)
