from __future__ import annotations

from typing import Any

import pytest
import torch

from fluxloop.randomness import Streams, stream_seed
from processes.launching import run, run_cases

SCRIPT = """
    import torch
    from torch import nn
    from fluxloop import Accelerator, AbstractTrainingPhase, Callback, Learner, Phase, StepBegin, StepEnd, TensorBatches
    from fluxloop import on, runstep
    from processes.launching import report

    accelerator = Accelerator("cpu")
    rank = accelerator.rank
    torch.manual_seed(5 + rank)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = TensorBatches(torch.ones(12, 4).cumsum(0), torch.zeros(12, 1), batch_size=3, seed=1)

    class Draws(Callback):
        draws = True

        def __init__(self):
            self.drawn = []

        @on(StepEnd)
        def draw(self, event, phase, learner):
            self.drawn.append(float(torch.rand(())))

    class Own(AbstractTrainingPhase):
        def __init__(self):
            super().__init__()
            self.drawn, self.others = [], []

        def body(self, learner, handle, state):
            import random
            self.drawn.append(float(torch.rand(())))
            self.others.append(random.random())
            state.loss = learner.model(state.xs).mean()
            learner.backward(state.loss)
            learner.update()

    def train(**options):
        accelerator = Accelerator("cpu", **options)
        draws, phase = Draws(), Own()
        learner = Learner(model, data=(data,), accelerator=accelerator, callbacks=[draws], default_callbacks=False)
        begun = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        learner.fit(2, phases=[phase])
        ended = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return learner.seed, begun, ended, phase.drawn, phase.others, draws.drawn

    report(first=first, own=train(), same=train(seed_per_process=False))
    prepared = torch.optim.Adam(model.parameters())
    if rank == 0:
        model(data.data[0]).mean().backward()
        prepared.step()
    Learner(model, data=(data,), optimizer=prepared, accelerator=accelerator)
    report(state=prepared.state_dict()["state"], weights=model.state_dict())
"""


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return run(SCRIPT).reports


@pytest.mark.slow
def test_all_processes_begin_with_the_seed_and_the_weights_of_the_first(reports: list[dict[str, Any]]) -> None:
    one, other = (report["own"] for report in reports)
    assert one[0] == other[0]
    for name, tensor in reports[0]["first"].items():
        assert torch.equal(one[1][name], tensor)
        assert torch.equal(other[1][name], tensor)
    assert not torch.equal(reports[1]["first"]["0.weight"], other[1]["0.weight"])


@pytest.mark.slow
def test_weights_and_buffers_are_the_same_after_an_epoch(reports: list[dict[str, Any]]) -> None:
    for kind in ("own", "same"):
        assert all(torch.equal(tensor, reports[1][kind][2][name]) for name, tensor in reports[0][kind][2].items())
    assert not torch.equal(reports[0]["own"][2]["1.running_mean"], reports[0]["own"][1]["1.running_mean"])


@pytest.mark.slow
def test_a_step_draws_its_own_numbers_in_each_process_unless_it_is_to_draw_the_same(
    reports: list[dict[str, Any]],
) -> None:
    seed, _, _, drawn, others, of_callback = reports[0]["own"]
    _, _, _, drawn_there, others_there, of_callback_there = reports[1]["own"]
    for rank, found in enumerate((drawn, drawn_there)):
        expected = []
        for step in range(4):
            torch.manual_seed(stream_seed(seed, f"training/step{'@1' * rank}", step))
            expected.append(float(torch.rand(())))
        assert found == expected
    assert set(others).isdisjoint(others_there)
    assert of_callback == of_callback_there
    assert reports[0]["same"][3:] == reports[1]["same"][3:]


@pytest.mark.slow
def test_an_optimizer_made_beforehand_has_the_state_of_the_first_process(reports: list[dict[str, Any]]) -> None:
    one, other = (report["state"] for report in reports)
    assert one
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key][name]) for key in one for name, tensor in one[key].items())
    assert all(torch.equal(tensor, reports[1]["weights"][name]) for name, tensor in reports[0]["weights"].items())


REFUSED = """
    import sys
    import torch
    from torch import nn
    from fluxloop import Accelerator, Learner, TrainingPhase, ValidationPhase

    case = sys.argv[1]
    accelerator = Accelerator("cpu")
    rank = accelerator.rank
    data = [(torch.ones(2, 4), torch.ones(2, 1))] * 2
    model = nn.Linear(4, 1 + (case == "model" and rank))
    if case == "lazy":
        model = nn.LazyLinear(1)
    seed = {"seed": rank, "given": None if rank else 3}.get(case, 0)
    learner = Learner(model, nn.functional.mse_loss, data=(data, data), accelerator=accelerator, seed=seed)
    if case == "weights":
        with torch.no_grad():
            learner.model.weight += rank
    elif case == "history" and rank:
        learner.history.cycles += 1
    class Adds(TrainingPhase):
        def body(self, learner, handle, state):
            super().body(learner, handle, state)
            with torch.no_grad():
                learner.model.weight += 0.1 * torch.randn(1)  # of this process's own stream

    learner.fit(
        1 + (case == "epochs" and rank),
        steps_per_epoch=1 if case == "steps" and rank else None,
        phases=[
            Adds() if case == "apart" else TrainingPhase(),
            ValidationPhase(every=3 if case == "phases" and rank else 1),
        ],
    )
"""


@pytest.mark.slow
def test_processes_that_differ_are_told_what_differs() -> None:
    expected = {
        "seed": r"Learner(seed=0) was made on process 0, and Learner(seed=1) on process 1",
        "given": r"Learner(seed=3) was made on process 0, and Learner(seed=None) on process 1",
        "model": "process 1 has another model than process 0: weight is (2, 4), torch.float32 on it, and (1, 4), "
        "torch.float32 on process 0; expected the same model on all",
        "lazy": "'weight' is lazy: each process would draw weights of its own",
        "epochs": "about to run different fits (epochs in all: 1 on process 0, 2 on process 1). Expected learner.fit",
        "history": "complete epochs: 0 on process 0, 1 on process 1; epochs in all: 1 on process 0, 2 on process 1)",
        "steps": "different fits (steps_per_epoch: None on process 0, 1 on process 1)",
        "phases": "'ValidationPhase, every=1'] on process 0, ['TrainingPhase, every=1', 'ValidationPhase, every=3'] on",
        "apart": "the weights of the processes have come apart in the epoch that has just ended: weight. Something in",
        "weights": "the processes are about to train different weights: weight. Were they loaded",
    }
    for (case, text), told in zip(
        expected.items(), run_cases(REFUSED, [[case] for case in expected], timeout=200), strict=True
    ):
        assert told.codes == [1, 1], case
        assert all(text in output for output in told.outputs), told.outputs


def test_streams_of_one_process_are_those_of_the_first() -> None:
    assert Streams(5)["training/step"].next() == Streams(5, process=0)["training/step"].next()
    streams = Streams(5, "evaluate/", process=2)
    assert streams["validation/step"].next() == stream_seed(5, "evaluate/validation/step@2")
    assert streams["training/data"].next() == stream_seed(5, "evaluate/training/data")
    streams.go_on(6, {"training/epoch": 3})
    assert streams["training/epoch"].next() == stream_seed(6, "evaluate/training/epoch@2", 3)
