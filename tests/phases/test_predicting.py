"""I-JEPA and data2vec."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import Accelerator, BatchError, Data2VecPhase, IJEPAPhase, PhaseError, stream_seed
from fluxloop.augment import BlockMasks, MultiBlock, patchify
from fluxloop.testing import assert_resumes_exactly
from self_supervised import SEED, Tokens, assert_same_training, learner_of, network_and_teacher
from toys import image_batches

BLOCKS = MultiBlock(2, share=0.2, least=4)


class Encoder(nn.Module):
    """Sees some patches, each with its place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(4, 8), nn.Parameter(0.1 * torch.randn(16, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        tokens: Tensor = self.block(self.embed(patches) + self.places[places])
        return tokens


class Predictor(nn.Module):
    """Says what stands at the places wanted, by what stands at others."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.block = (
            nn.Parameter(0.1 * torch.randn(16, 8)),
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
        )

    def forward(self, tokens: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
        both = torch.cat([tokens + self.places[places], self.places[wanted]], dim=1)
        out: Tensor = self.block(both)[:, places.shape[1] :]
        return out


def ijepa_models() -> dict[str, nn.Module]:
    return network_and_teacher(Encoder, predictor=Predictor)


def ijepa_by_hand(models: Any, xs: Tensor, step: int) -> Tensor:
    """Write the authors' step with indices in place of gathers."""
    student, teacher, predictor = models.values()
    patches, n = patchify(xs, 2), len(xs)
    context, blocks = BLOCKS(n, (4, 4), xs.device)
    rows = torch.arange(n)[:, None]
    with torch.no_grad():
        h = teacher(patches, torch.arange(16).expand(n, -1))
        h = layer_norm(h, (8,))
        h = torch.cat([h[rows, blocks[:, b]] for b in range(blocks.shape[1])])
    z = student(patches[rows, context], context)
    z = predictor(z.repeat(2, 1, 1), context.repeat(2, 1), torch.cat([blocks[:, 0], blocks[:, 1]]))
    return smooth_l1_loss(z, h)


def test_five_steps_of_i_jepa_equal_those_of_a_hand_written_loop() -> None:
    learner = assert_same_training(IJEPAPhase(2, masks=BLOCKS), ijepa_models, ijepa_by_hand)
    step = learner.step
    assert step.wanted.shape[:2] == (4, 2)
    assert step.preds.shape == step.targets.shape == (8, step.wanted.shape[2], 8)
    assert not step.targets.requires_grad
    torch.testing.assert_close(step.targets.mean(-1), torch.zeros(step.targets.shape[:2]), atol=1e-5, rtol=0)


def test_the_context_of_i_jepa_has_nothing_of_the_blocks_and_all_rows_have_the_same_number_of_patches() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        context, blocks = MultiBlock()(6, (14, 14), torch.device("cpu"))
        assert context.shape[0] == blocks.shape[0] == 6
        assert context.shape[1] >= 10
        assert 0.1 * 196 < blocks.shape[2] < 0.25 * 196
        for row, wanted in zip(context.tolist(), blocks.flatten(1).tolist(), strict=True):
            assert not {*row} & {*wanted}
            assert len({*row}) == len(row)
            assert 0 <= min(row) <= max(row) < 196


def test_a_step_of_i_jepa_is_run_as_it_is_where_steps_are_compiled() -> None:
    weights = []
    for compiled in (False, "step"):
        accelerator = Accelerator("cpu", compile=compiled)
        learner = learner_of(ijepa_models(), None, accelerator=accelerator, data=(image_batches()[:2],))
        learner.fit(1, phases=[IJEPAPhase(2, masks=BLOCKS)])
        weights.append(list(learner.model.student.parameters()))
    assert all(map(torch.equal, *weights))


# data2vec


class Layers(Tokens):
    """Gives the patches of each layer."""

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Any:
        return [tokens[:, 1:] for tokens in self.layers(images, mask)]


MASKS = BlockMasks(2, share=0.2)


def data2vec_models() -> dict[str, nn.Module]:
    return network_and_teacher(Layers, predictor=lambda: nn.Linear(8, 8))


def data2vec_by_hand(models: Any, xs: Tensor, step: int) -> Tensor:
    student, teacher, predictor = models.values()
    mask = MASKS(len(xs), (4, 4), xs.device)
    with torch.no_grad():
        y = torch.stack([layer_norm(layer, (8,)) for layer in teacher(xs)]).mean(0)
        y = layer_norm(y, (8,))
    preds = predictor(student(xs, mask)[-1])
    errors = smooth_l1_loss(preds, y, beta=0.5, reduction="none").mean(-1)
    return (errors * mask).sum() / mask.sum()


def test_five_steps_of_data2vec_equal_those_of_a_hand_written_loop() -> None:
    learner = assert_same_training(Data2VecPhase(2, masks=MASKS, layers=2, beta=0.5), data2vec_models, data2vec_by_hand)
    step = learner.step
    alone = smooth_l1_loss(step.preds[step.mask], step.targets[step.mask], beta=0.5)
    torch.testing.assert_close(step.loss, alone)
    assert not step.targets.requires_grad


def test_only_the_last_layers_of_the_teacher_are_averaged() -> None:
    learner = learner_of(data2vec_models(), None, data=(image_batches()[:1],))
    learner.fit(1, phases=[Data2VecPhase(2, masks=MASKS, layers=1)])
    teacher = data2vec_models()["teacher"]
    torch.manual_seed(stream_seed(SEED, "training/step", 0))
    MASKS(4, (4, 4), torch.device("cpu"))
    last = teacher(image_batches()[0])[-1]
    torch.testing.assert_close(learner.step.targets, layer_norm(layer_norm(last, (8,)), (8,)))


@pytest.mark.parametrize("phase", [lambda: IJEPAPhase(2), lambda: Data2VecPhase(2)])
def test_a_teacher_that_nothing_moves_is_refused(phase: Any) -> None:
    learner = learner_of(ijepa_models(), None)
    learner.set_callbacks([])
    with pytest.raises(PhaseError, match="of which no callback moves"):
        learner.fit(1, phases=[phase()])


def test_what_cannot_be_used_is_refused_with_what_to_type() -> None:
    with pytest.raises(PhaseError, match=r"IJEPAPhase\(patch_size=0\) was given"):
        IJEPAPhase(0)
    with pytest.raises(PhaseError, match=r"IJEPAPhase\(masks=.* was given; expected what draws masks"):
        IJEPAPhase(2, masks=3)
    with pytest.raises(PhaseError, match=r"Data2VecPhase\(beta=0\) was given"):
        Data2VecPhase(2, beta=0)
    with pytest.raises(BatchError, match=r"H and W multiples of 3"):
        learner_of(data2vec_models(), None).fit(1, phases=[Data2VecPhase(3)])


# Masks that are drawn by the workers of a loader


def with_blocks(rows: list[tuple[Tensor]]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    images = torch.stack([row for (row,) in rows])
    return images, BLOCKS(len(images), (4, 4), images.device)


def with_mask(rows: list[tuple[Tensor]]) -> tuple[Tensor, Tensor]:
    images = torch.stack([row for (row,) in rows])
    return images, MASKS(len(images), (4, 4), images.device)


class Given(IJEPAPhase):
    """Is given blocks and contexts."""

    def entries(self, batch: Any) -> dict[str, Any]:
        images, (places, wanted) = batch
        return {**super().entries(images), "places": places, "wanted": wanted}


class GivenMask(Data2VecPhase):
    """Is given masks."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return {**super().entries(batch[0]), "mask": batch[1]}


def never(*given: Any) -> Any:
    raise AssertionError("masks were drawn in the step")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "models", "collate"),
    [
        (lambda: Given(2, masks=never), ijepa_models, with_blocks),
        (lambda: GivenMask(2, masks=never, layers=2), data2vec_models, with_mask),
    ],
    ids=["I-JEPA", "data2vec"],
)
def test_a_killed_run_goes_on_with_the_masks_that_workers_draw(make: Any, models: Any, collate: Any) -> None:
    def learner() -> Any:
        data = DataLoader(TensorDataset(torch.cat(image_batches())), 4, True, num_workers=1, collate_fn=collate)
        return learner_of(models(), None, data=(data,))

    assert_resumes_exactly(learner, phases=lambda: [make()], at=[7])


def test_i_jepa_draws_its_masks_anew_where_a_killed_run_goes_on() -> None:
    assert_resumes_exactly(
        lambda: learner_of(ijepa_models(), None), phases=lambda: [IJEPAPhase(2, masks=BLOCKS)], at=[3, 6]
    )
