import numpy as np
import pytest

from rigl_optax.data import crops


@pytest.fixture(scope="module")
def drawn():
    return np.concatenate([crops.draws(1000, 0, step) for step in range(3)])


def test_draws_are_a_function_of_seed_step_and_row():
    whole = crops.draws(8, 3, 5)
    assert whole.shape == (8, crops.DRAWS) and whole.min() >= 0 and whole.max() < 1
    rows = np.array([1, 6])
    np.testing.assert_array_equal(crops.draws(8, 3, 5, rows), whole[rows])
    others = [crops.draws(8, *place) for place in ((3, 6), (4, 5))]
    assert len({float(x[0, 0]) for x in (whole, *others)}) == 3


def test_the_draws_of_a_step_are_not_the_order_of_an_epoch():
    # Both are keyed by (seed, number): from one stream, crops would follow from the order.
    generator = np.random.Generator(np.random.Philox(key=np.array([3, 5], np.uint64)))
    assert not np.isin(generator.random(10_000), crops.draws(8, 3, 5)).any()


# Of `tf.image.sample_distorted_bounding_box` with the reference's arguments, TensorFlow 2.21, 6,000
# draws: mean area (of the image), height, width, top, left; standard errors are about 1 %.
TENSORFLOW = {
    (375, 500): (0.3841, 254.5, 263.6, 58.3, 117.7),
    (500, 333): (0.3358, 227.5, 231.2, 137.0, 50.5),
    (100, 400): (0.1753, 81.5, 84.7, 8.7, 156.3),
}


@pytest.mark.parametrize("shape", TENSORFLOW)
def test_random_crops_are_distributed_as_the_references(shape, drawn):
    windows = np.array([crops.resized_crop(*shape, 224, row) for row in drawn], float)
    top, left, height, width = windows.T
    area = height * width / np.prod(shape)
    found = [x.mean() for x in (area, height, width, top, left)]
    np.testing.assert_allclose(found, TENSORFLOW[shape], rtol=0.05)
    assert crops.AREA[0] <= area.min() < 0.11 and area.max() <= 1
    assert (top >= 0).all() and (top + height <= shape[0]).all()
    assert (left >= 0).all() and (left + width <= shape[1]).all()
    # A pixel more or less of the width is rounding.
    assert (width + 0.5 >= 3 / 4 * height).all() and (width - 0.5 <= 4 / 3 * height).all()
    assert np.abs(crops.is_flipped(drawn).mean() - 0.5) < 0.03


@pytest.mark.parametrize("shape", [(10, 400), (400, 10), (1, 1), (1, 3), (2, 1)])
def test_where_no_part_is_possible_the_central_one_is_taken(shape, drawn):
    for row in drawn[:200]:
        window = crops.resized_crop(*shape, 224, row)
        top, left, height, width = window
        assert 0 <= top <= shape[0] - height and 0 <= left <= shape[1] - width
        assert height >= 1 and width >= 1
        if 10 in shape:  # narrower than any part of a tenth of the area
            assert window == crops.central_crop(*shape, 224)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((375, 500), (24, 86, 328, 328)),  # 224 / 256 of 375 is 328.1
        ((500, 375), (86, 24, 328, 328)),
        ((256, 256), (16, 16, 224, 224)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_the_central_crop_is_the_references(shape, expected):
    assert crops.central_crop(*shape, 224) == expected
