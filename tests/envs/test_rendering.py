import numpy as np
import pytest
import torch

from fewstep.envs.rendering import BACKGROUND, GENERATED, REAL, frame


def colored(picture, color):
    return (picture == color).all(-1)


def test_a_scatter_shows_samples_over_real_data():
    real = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    picture = frame(torch.zeros(1, 2), (2,), real=real, size=101)
    assert picture.shape == (101, 101, 3)
    assert picture.dtype == np.uint8
    rows, columns = np.nonzero(colored(picture, GENERATED))
    assert (rows.mean(), columns.mean()) == (50, 50)
    # The axes point right and up, and the view reaches half as far again as the data.
    places = set(zip(*np.nonzero(colored(picture, REAL)), strict=True))
    assert places == {(17, 83), (83, 17)}
    assert colored(picture, BACKGROUND).sum() == 101**2 - len(rows) - 2


def test_samples_out_of_view_lie_on_the_border():
    real = torch.ones(1, 2)
    picture = frame(torch.tensor([[1e6, 0.0]]), (2,), real=real, size=64)
    assert colored(picture, GENERATED)[:, -1].any()


@pytest.mark.parametrize("dimension", [1, 5])
def test_vectors_of_any_length_have_a_picture(dimension):
    assert colored(frame(torch.randn(9, dimension), (dimension,)), GENERATED).any()


def test_images_fill_a_grid_from_the_top_left():
    images = torch.stack([torch.full((1, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    picture = frame(images, (1, 8, 8), size=32)
    assert picture.shape == (32, 32, 3)
    assert [picture[y, x, 0] for y, x in [(0, 0), (0, 16), (16, 0), (16, 16)]] == [0, 128, 255, 0]


def test_color_images_keep_their_channels():
    image = torch.tensor([1.0, -1.0, 0.0])[:, None, None].expand(3, 4, 4)
    picture = frame(image[None], (3, 4, 4), size=4)
    assert (picture == (255, 0, 128)).all()


def test_shapes_without_a_picture_are_refused():
    with pytest.raises(ValueError, match="have no picture"):
        frame(torch.zeros(1, 2, 4, 4), (2, 4, 4))
