"""Measures our ImageNet input pipeline against tf.data's, in images per second.

Run with `make bench-input`, which puts TensorFlow into a virtual environment of its own, or
`python benchmarks/input_pipeline.py --tf-python .venv-tf/bin/python [--rounds 12]`.

Both read one TFDS directory of `imagenet2012` (tfrecord; JPEG files of 500 x 375, parts of
scikit-learn's two photographs), crop randomly as the reference code does, resize to 224 x 224,
flip, and return batches of 128 in uint8. tf.data uses `decode_and_crop_jpeg` with automatic
parallelism, and the reference code's bicubic resizing, as ours does; a third line is tf.data with
bilinear resizing, which is less work. Each side is a process of its own. They take turns, and the
others are stopped meanwhile, so that none prefetches in another's time.

Prints medians of images per second, by wall time and by processor time (which other programs on the
machine disturb less), and median and quartiles of the ratio of ours to each, over the rounds.
"""

import argparse
import itertools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

SIZE, BATCH, PHOTOS = 224, 128, 1024
SIDES = {"ours": "bicubic", "tf.data": "bicubic", "tf.data, bilinear": "bilinear"}


def write_photos(data_dir: pathlib.Path) -> None:
    """Writes a TFDS directory of photos of the median size of ImageNet's."""
    import numpy as np
    import simplejpeg

    from benchmarks import real_photos, tfds_writer

    generator = np.random.default_rng(0)
    examples = []
    for i in range(PHOTOS):
        image = real_photos.photographs()[i % 2]
        top, left = generator.integers(image.shape[0] - 374), generator.integers(141)
        piece = np.ascontiguousarray(image[top : top + 375, left : left + 500])
        data = simplejpeg.encode_jpeg(piece, quality=90, colorsubsampling="420")
        examples.append((data, i % real_photos.CLASSES))
    mean = sum(len(data) for data, _ in examples) / PHOTOS
    print(f"{PHOTOS} JPEG files of 500 x 375, {mean / 1000:.0f} kB each", flush=True)
    splits = {"train": examples, "validation": examples[:8]}
    tfds_writer.write(data_dir, "imagenet2012", splits, real_photos.CLASSES, shards=4)


def our_batches(data_dir: str) -> Iterator[Any]:
    """Yields batches as the training loop gets them."""
    from rigl_optax.data import batches, imagenet
    from rigl_optax.data.prefetch import prefetch

    train = imagenet.load(data_dir, 0, SIZE, os.cpu_count() or 1).train

    def make(step: int) -> Any:
        return batches.training_batch(train, BATCH, seed=0, step=step, augment="resized_crop")

    with prefetch(make, 0, 10**9) as made:
        yield from made


def tensorflow_batches(data_dir: str, resizing: str) -> Iterator[Any]:
    """Yields batches as the reference code's pipeline makes them, but in uint8."""
    import tensorflow as tf

    whole_image = tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4])
    features = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
    }

    def parse(record: Any) -> Any:
        example = tf.io.parse_single_example(record, features)
        shape = tf.io.extract_jpeg_shape(example["image"])
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            whole_image,
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.io.decode_and_crop_jpeg(example["image"], window, channels=3)
        if resizing == "bicubic":
            image = tf.compat.v1.image.resize_bicubic([image], [SIZE, SIZE])[0]
            image = tf.clip_by_value(image, 0.0, 255.0)
        else:
            image = tf.image.resize(image, [SIZE, SIZE], method=resizing)
        return tf.cast(tf.image.random_flip_left_right(image), tf.uint8), example["label"]

    files = sorted(map(str, pathlib.Path(data_dir).rglob("*train.tfrecord*")))
    records = tf.data.TFRecordDataset(files).repeat().shuffle(PHOTOS)
    parsed = records.map(parse, num_parallel_calls=tf.data.AUTOTUNE)
    yield from parsed.batch(BATCH, drop_remainder=True).prefetch(2)


def serve(side: str, data_dir: str) -> None:
    """Answers each number of batches on standard input with wall and processor seconds."""
    made = our_batches(data_dir) if side == "ours" else tensorflow_batches(data_dir, SIDES[side])
    for _ in range(5):
        next(made)
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter(), time.process_time()
        for batch in itertools.islice(made, int(line)):
            del batch
        ended = time.perf_counter(), time.process_time()
        print(json.dumps([e - b for b, e in zip(began, ended, strict=True)]), flush=True)


def start(side: str, python: str, data_dir: str) -> subprocess.Popen[str]:
    """Starts a process that serves a side, and waits until it is ready."""
    root = pathlib.Path(__file__).parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.Popen(
        [python, __file__, "--serve", side, "--data-dir", data_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if side != "ours" else None,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "-1"},
    )
    assert child.stdout is not None
    if child.stdout.readline() != "ready\n":
        raise SystemExit(f"{side}: {python} could not start it; see `make bench-input`")
    child.send_signal(signal.SIGSTOP)
    return child


def take_turns(children: dict[str, Any], rounds: int, count: int) -> dict[str, list[list[float]]]:
    """Returns wall and processor seconds of each side in each round; the first one rotates."""
    seconds: dict[str, list[list[float]]] = {side: [] for side in children}
    for turn in range(rounds):
        order = list(children)
        for side in order[turn % len(order) :] + order[: turn % len(order)]:
            child = children[side]
            child.send_signal(signal.SIGCONT)
            child.stdin.write(f"{count}\n")
            child.stdin.flush()
            seconds[side].append(json.loads(child.stdout.readline()))
            child.send_signal(signal.SIGSTOP)
    return seconds


def report(seconds: dict[str, list[list[float]]], count: int) -> None:
    """Prints the table."""
    print(f"{'':20} {'by the clock':>28} {'by processor time':>28}")
    cores = os.cpu_count() or 1
    for side, found in seconds.items():
        words = []
        for kind in (0, 1):
            times = [row[kind] for row in found]
            speed = count * BATCH / statistics.median(times) * (cores if kind else 1)
            words.append(f"{speed:,.0f}/s")
            if side != "ours":
                ours = [row[kind] for row in seconds["ours"]]
                ratios = [theirs / our for theirs, our in zip(times, ours, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                words[-1] += f"  ours {middle:.2f}x ({low:.2f}-{high:.2f})"
        print(f"{side:20} {words[0]:>28} {words[1]:>28}")
    print(f"{cores} cores; processor time: what all of them would do with nothing else to do")


def main() -> None:
    """Runs the benchmark, or serves one side of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tf-python", default=".venv-tf/bin/python")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batches", type=int, default=15, help="in each round, of each side")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data-dir", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.data_dir)
        return
    children: dict[str, subprocess.Popen[str]] = {}
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_photos(pathlib.Path(folder))
            for side in SIDES:
                python = sys.executable if side == "ours" else options.tf_python
                children[side] = start(side, python, folder)
            report(take_turns(children, options.rounds, options.batches), options.batches)
        finally:
            for child in children.values():
                child.kill()
                child.wait()


if __name__ == "__main__":
    main()
