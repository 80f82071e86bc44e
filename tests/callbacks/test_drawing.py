from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import ImageFont
from torch import Tensor

from fluxloop import ModelError
from fluxloop.callbacks.drawing import as_rgb, colours_of, enlarged, framed, heated, lettering, scatter, table


@pytest.mark.parametrize(
    ("images", "first"),
    [
        (torch.tensor([[[0.0, 0.5], [1.0, 3.0]]]), [0.0, 0.5, 1.0, 1.0]),
        (torch.tensor([[[-1.0, 0.0], [1.0, float("nan")]]]), [0.0, 0.5, 1.0, 0.0]),
        (torch.tensor([[[0, 51], [102, 255]]], dtype=torch.uint8), [0.0, 0.2, 0.4, 1.0]),
        (torch.tensor([[[True, False], [False, True]]]), [1.0, 0.0, 0.0, 1.0]),
    ],
    ids=["0 … 1", "-1 … 1", "bytes", "yes or no"],
)
def test_images_of_several_kinds_are_shown_from_black_to_white(images: Tensor, first: list[float]) -> None:
    shown = as_rgb(images, "who")
    assert shown.shape == (1, 3, 2, 2)
    torch.testing.assert_close(shown[0, 2].flatten(), torch.tensor(first))
    torch.testing.assert_close(as_rgb(images, "who", (0.0, 2.0))[0, 0, 0, 0], (images[0, 0, 0].float() / 2).clamp(0, 1))


@pytest.mark.parametrize("bad", [torch.zeros(3, 2, 4, 4), torch.zeros(3, 4), torch.zeros(0, 1, 4, 4), "images", None])
def test_what_is_no_image_is_told(bad: Any) -> None:
    with pytest.raises(ModelError, match=r"^who got .* to show; expected images of shape \(N, 1 or 3, H, W\)"):
        as_rgb(bad, "who")


def test_a_table_has_its_images_in_their_places_and_room_for_its_title() -> None:
    images = torch.rand(6, 3, 10, 20)
    drawn = table([images[:3], images[3:]], ["a", "b", "c"], "a title that is wider than these three images are")
    assert drawn.shape[0] == 3
    assert drawn.shape[1] == 6 + 2 * 19 + 2 * 16
    assert drawn.shape[2] > 6 + 3 * 26
    found = drawn[:, 44 + 16 : 44 + 26, 6 + 26 : 6 + 46].float() / 255
    torch.testing.assert_close(found, images[4], atol=0.002, rtol=0)
    assert drawn[:, :20].min() < 100  # letters
    assert bool((drawn[:, :, -1] == 255).all())


def test_frames_and_enlarged_images() -> None:
    large = enlarged(torch.arange(4.0).reshape(1, 1, 2, 2), 6)
    assert large.shape == (1, 1, 6, 6)
    assert large[0, 0].diagonal().tolist() == [0, 0, 0, 3, 3, 3]
    frame = framed(torch.zeros(3, 4, 4), (255, 0, 0))
    assert frame.shape == (3, 10, 10)
    assert frame[:, 0, 5].tolist() == [1, 0, 0]
    assert frame[:, 3:7, 3:7].sum() == 0


def test_heat_grows_brighter_from_cold_to_hot() -> None:
    bright = heated(torch.linspace(0, 1, 50)) @ torch.tensor([0.3, 0.6, 0.1])
    assert bool((bright.diff() > 0).all())


def test_classes_have_colours_of_their_own_however_many() -> None:
    for count in (3, 10, 40):
        colours, legend = colours_of(torch.arange(count).repeat(2))
        assert colours[:count] == colours[count:]
        assert len(set(colours)) == count
        assert [name for name, _ in legend] == [str(each) for each in range(count)]
    assert colours_of(torch.tensor([7, 3, 7]))[1][0][0] == "3"
    numbers, legend = colours_of(torch.tensor([0.5, -2.0, 3.0]))
    assert [name for name, _ in legend] == ["-2", "3"]
    assert numbers[1:] == [legend[0][1], legend[1][1]]
    assert colours_of(torch.zeros(2, 3)) == ([(31, 119, 180)] * 2, [])


def test_points_lie_in_the_square_and_a_long_legend_is_cut() -> None:
    points = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 5.0], [10.0, 5.0]])
    drawn = scatter(points, torch.zeros(4).long(), "title", "axes")
    blue = (drawn.int() - torch.tensor([31, 119, 180])[:, None, None]).abs().sum(0) < 120
    inside = blue[30:510, 16:496].nonzero()  # without the legend
    assert inside.amin(0).tolist() == pytest.approx([14, 14], abs=2)  # 4 % of 480, less the radius
    assert inside.amax(0).tolist() == pytest.approx([465, 465], abs=2)
    many = scatter(torch.rand(60, 2), torch.arange(60), "title", "axes")
    few = scatter(torch.rand(60, 2), torch.arange(60) % 24, "title", "axes")
    assert many.shape == few.shape
    last = [drawn[:, 34 + 19 * 23 : 34 + 19 * 24, 508:522] for drawn in (many, few)]  # where a line's spot is
    assert [bool((line.float().std(0) > 20).any()) for line in last] == [False, True]  # "and 37 more" has none


def test_letters_of_an_older_pillow_have_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ImageFont.load_default(10)
    monkeypatch.setattr(ImageFont, "load_default", lambda: old)
    assert lettering() is old
