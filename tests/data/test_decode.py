import io
import random
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from benchmarks.real_photos import photographs, png
from rigl_optax.data import decode
from rigl_optax.data.crops import Window

WHOLE = Window(0, 0, 427, 640)


@pytest.fixture(scope="module")
def photo():
    return photographs()[0]


@pytest.fixture(scope="module")
def jpeg(photo):
    return simplejpeg.encode_jpeg(photo, quality=95, colorsubsampling="444")


def look(data, window, size=64, **options):
    out = np.empty((size, size, 3), np.uint8)
    decode.photo(data, lambda height, width: window, out, **options)
    return out


def distance(found, wanted):
    return np.abs(found.astype(float) - wanted).mean()


def near(found, wanted, tolerance):
    assert distance(found, wanted) < tolerance


@pytest.mark.parametrize("window", [Window(100, 200, 64, 64), Window(0, 0, 120, 100), WHOLE])
def test_a_part_is_decoded_and_resized(photo, jpeg, window):
    top, left, height, width = window
    part = photo[top : top + height, left : left + width]
    found = look(jpeg, window)
    if (height, width) == (64, 64):
        near(found, part, 3)  # only JPEG's loss
    near(found, np.asarray(Image.fromarray(part).resize((64, 64), Image.Resampling.BOX)), 12)
    np.testing.assert_array_equal(look(jpeg, window, flip=True), found[:, ::-1])


def test_the_size_is_what_the_part_is_chosen_from(jpeg):
    seen = []

    def choose(height, width):
        seen.append((height, width))
        return WHOLE

    decode.photo(jpeg, choose, np.empty((32, 32, 3), np.uint8))
    decode.photo(png(photographs()[1]), choose, np.empty((32, 32, 3), np.uint8))
    assert seen == [(427, 640)] * 2


def test_a_much_larger_part_is_decoded_at_a_fraction(photo, jpeg, monkeypatch):
    shapes = []
    decoder = simplejpeg.decode_jpeg

    def seen(*args, **keys):
        pixels = decoder(*args, **keys)
        shapes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", seen)
    window = Window(24, 40, 400, 512)
    for size, shape in ((400, (427, 640)), (201, (427, 640)), (200, (214, 320)), (50, (54, 80))):
        found = look(jpeg, window, size)
        assert shapes[-1] == shape
        part = Image.fromarray(photo[24:424, 40:552]).resize((size, size), Image.Resampling.BOX)
        wanted = np.asarray(part)
        near(found, wanted, 12)
        for axis in (0, 1):  # and it is in its place: half a pixel to a side fits less
            aside = (wanted + np.roll(wanted, 1, axis).astype(float)) / 2
            assert distance(found, wanted) < distance(found, aside)
            assert distance(found, wanted) < distance(found, np.roll(aside, -1, axis))


def test_grey_and_four_colours_and_png_become_rgb(photo):
    grey = np.asarray(Image.fromarray(photo).convert("L"))
    file = simplejpeg.encode_jpeg(grey[..., None], quality=95, colorspace="GRAY")
    near(look(file, WHOLE, 427), look(png(grey), WHOLE, 427), 2)
    np.testing.assert_array_equal(np.ptp(look(png(grey), WHOLE), axis=-1), 0)
    four = io.BytesIO()
    Image.fromarray(photo).convert("CMYK").save(four, "JPEG", quality=95)
    near(look(four.getvalue(), WHOLE), look(png(photo), WHOLE), 3)
    np.testing.assert_array_equal(decode.stored(png(grey)), grey)
    np.testing.assert_array_equal(decode.stored(png(photo)), photo)


def test_sixteen_bits_of_grey_are_not_clipped(photo):
    grey = np.asarray(Image.fromarray(photo).convert("L"))
    deep = png(grey.astype(np.uint16) * 257)
    assert Image.open(io.BytesIO(deep)).mode.startswith("I")
    np.testing.assert_array_equal(decode.stored(deep), grey)
    np.testing.assert_array_equal(look(deep, WHOLE), look(png(grey), WHOLE))


def large_png():
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def large_jpeg(jpeg):
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", 60_000, 60_000) + jpeg[at + 4 :]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda jpeg, png: b"", "not a PNG or JPEG"),
        (lambda jpeg, png: b"GIF89a" + jpeg, "not a PNG or JPEG"),
        (lambda jpeg, png: jpeg[:20], "not a PNG or JPEG"),
        (lambda jpeg, png: jpeg[: len(jpeg) // 2], "damaged JPEG"),
        (lambda jpeg, png: jpeg[:-2], "damaged JPEG"),
        (lambda jpeg, png: png[: len(png) // 2], "damaged"),
        (lambda jpeg, png: png[:5000] + bytes(50) + png[5050:], "damaged"),
        (lambda jpeg, png: large_jpeg(jpeg), "60000 x 60000 pixels"),
        (lambda jpeg, png: large_png(), "60000 x 60000|bomb"),
    ],
)
def test_what_cannot_be_decoded_is_a_value_error(jpeg, photo, spoil, problem):
    with pytest.raises(ValueError, match=problem):
        look(spoil(jpeg, png(photo)), WHOLE)


def test_bytes_after_the_last_pixel_are_no_damage(jpeg):
    spoiled = jpeg[:-2] + b"abcdefg" + jpeg[-2:] + b"zzz"
    np.testing.assert_array_equal(look(spoiled, WHOLE), look(jpeg, WHOLE))


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it finds
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_mutated_files_are_decoded_or_refused(kind):
    from benchmarks.loader_fuzz import mutate

    small = photographs()[0][:64, :80]
    raw = png(small) if kind == "png" else simplejpeg.encode_jpeg(small)
    generator = random.Random(kind)
    ends = set()
    for _ in range(150):
        try:
            look(mutate(raw, generator), Window(0, 0, 8, 8), 8)
            ends.add("taken")
        except ValueError as error:
            assert str(error)
            ends.add("refused")
    assert "refused" in ends
