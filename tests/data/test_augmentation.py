import numpy as np
import pytest

from rigl_optax.data import augmentation, batches, crops, digits, resize

KINDS = ["pad_crop", "resized_crop"]
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 10, 10, 3), np.uint8)


def seen(augment, images=IMAGES, seed=3, step=7, rows=None):
    part = images if rows is None else images[rows]
    return augmentation.augmented(part, augment, len(images), seed, step, rows)


@pytest.mark.parametrize("augment", KINDS)
@pytest.mark.parametrize("images", [IMAGES, IMAGES[..., 0]], ids=["colour", "grey"])
def test_what_is_seen_is_a_function_of_seed_step_and_place(augment, images):
    found = seen(augment, images)
    assert found.shape == images.shape and found.dtype == np.uint8
    np.testing.assert_array_equal(seen(augment, images), found)
    rows = np.array([1, 4, 5, 11])  # what one host of several has
    np.testing.assert_array_equal(seen(augment, images, rows=rows), found[rows])
    assert np.any(seen(augment, images, step=8) != found)
    assert np.any(seen(augment, images, seed=4) != found)


def test_none_changes_nothing():
    assert seen("none") is IMAGES


def test_a_pad_crop_is_a_window_of_the_mirrored_image_perhaps_flipped():
    many = np.repeat(IMAGES[:1], 600, 0)
    shown = seen("pad_crop", many)
    border = [(4, 4), (4, 4), (0, 0)]
    padded = np.pad(IMAGES[0], border, mode="symmetric")  # the edge itself is repeated
    windows = {}
    for top in range(9):
        for left in range(9):
            window = padded[top : top + 10, left : left + 10]
            windows[window.tobytes()] = (top, left, False)
            windows[window[:, ::-1].tobytes()] = (top, left, True)
    places = [windows[image.tobytes()] for image in shown]
    tops, lefts, flipped = np.array(places).T
    for moved in (tops, lefts):
        assert set(moved) == set(range(9))
        assert moved.mean() == pytest.approx(4, abs=0.4)
    assert flipped.mean() == pytest.approx(0.5, abs=0.07)


def test_a_resized_crop_is_the_part_that_photos_show():
    # Images that hold their own coordinates say which part of them is seen.
    size, count = 64, 800
    y, x = np.mgrid[:size, :size].astype(np.uint8)
    many = np.repeat(np.stack([y, x], -1)[None], count, 0)
    shown = seen("resized_crop", many).astype(float)
    drawn = crops.draws(count, 3, 7)
    flipped = crops.is_flipped(drawn)
    shown[flipped] = shown[flipped, :, ::-1]
    parts = [crops.random_part(size, size, row) or (0, 0, size, size) for row in drawn]
    top, left, height, width = np.array(parts, float).T
    for start, length, places in (
        (top, height, shown[:, :, 0, 0]),
        (left, width, shown[:, 0, :, 1]),
    ):
        # The first and last new pixels have their centres half a new pixel inside the part.
        inset = 0.5 * length / size
        for place, expected in ((0, start + inset), (-1, start + length - inset)):
            expected = np.clip(expected - 0.5, 0, size - 1)
            np.testing.assert_allclose(places[:, place], expected, atol=0.51)


def test_an_image_of_which_no_part_is_drawn_is_shown_whole(monkeypatch):
    monkeypatch.setattr(crops, "random_part", lambda height, width, drawn: None)
    flipped = crops.is_flipped(crops.draws(len(IMAGES), 3, 7))
    shown = seen("resized_crop")
    shown[flipped] = shown[flipped, :, ::-1]
    np.testing.assert_array_equal(shown, IMAGES)


def test_images_are_resized_once_and_stay_what_they_are():
    data = digits.load()
    assert resize.resized(data, 0) is data and resize.resized(data, 8) is data
    larger = resize.resized(data, 16)
    assert larger.train.images.shape == (1000, 16, 16) and larger.train.images.dtype == np.uint8
    assert larger.test.images.shape == (500, 16, 16) and larger.maximum == 16
    np.testing.assert_array_equal(larger.test.labels, data.test.labels)
    # Bilinear: the mean of four neighbours of the new image is near the old pixel.
    blocks = larger.train.images.reshape(1000, 8, 2, 8, 2).astype(float).mean((2, 4))
    inside = np.s_[:, 1:-1, 1:-1]
    means = data.train.images.astype(float)
    assert np.corrcoef(blocks[inside].ravel(), means[inside].ravel())[0, 1] > 0.96
    flat = batches.Split(np.full((3, 5, 7), 9, np.uint8), np.zeros(3, np.int32))
    square = resize.resized(data._replace(train=flat), 4)
    assert square.train.images.shape == (3, 4, 4) and np.all(square.train.images == 9)
