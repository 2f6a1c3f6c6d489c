import importlib.util
import json
import pathlib
import re

import pytest

from rigl_optax.training import config as config_lib

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_has_exactly_the_known_keys_and_its_launch_line(path):
    spec = importlib.util.spec_from_file_location("config_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config_lib.from_mapping(module.get_config().to_dict())
    assert f"--config=configs/{path.name}" in module.__doc__


def test_a_config_survives_json(small):
    saved = json.loads(json.dumps(config_lib.to_json(small)))
    assert config_lib.from_mapping(saved) == small
    assert config_lib.differences(saved, small) == []


def test_unknown_and_missing_keys_are_listed_with_the_known_ones(small):
    values = config_lib.to_json(small)
    del values["steps"]
    values["sparsty"] = 0.9
    with pytest.raises(ValueError) as error:
        config_lib.from_mapping(values)
    message = str(error.value)
    assert "unknown keys ['sparsty']" in message and "no ['steps']" in message
    assert all(key in message for key in config_lib.known_keys())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("log_every", 0),
        ("eval_every", -1),
        ("checkpoint_every", -1),
        ("keep_checkpoints", 0),
        ("seed", -1),
        ("rewire_until", 0.0),
        ("rewire_until", 1.5),
        ("image_size", -1),
        ("loader_threads", 0),
        ("warmup", 1.0),
        ("prune_from", -0.1),
        ("label_smoothing", 1.0),
        ("width", 0.0),
        ("decay_factor", float("inf")),
        ("decay_factor", -1.0),
        ("hidden", (20, -5)),
        ("hidden", (0,)),
        ("learning_rate", -0.1),
        ("learning_rate", float("nan")),
        ("weight_decay", -1e-4),
        ("momentum", 1.5),
        ("momentum", -0.1),
        ("sparsity", 1.0),
        ("sparsity", -0.5),
        ("sparsity", float("nan")),
        ("drop_fraction", 1.1),
        ("gradient_clip", -1.0),
        ("gradient_clip", float("inf")),
        ("batch_size", 0),
        ("rewire_every", 0),
        ("steps", 2**31),
        ("seed", 2**31),
        ("validation_fraction", 1.0),
        ("validation_fraction", 0.1),  # of digits, which have splits of their own
    ],
)
def test_values_that_make_no_sense_are_refused(small, key, value):
    with pytest.raises(ValueError, match=re.escape(f"config.{key}={value}: must be")):
        config_lib.changed(small, {key: value})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data.augment": "crop"}, "augment='crop'.*none, pad_crop, resized_crop"),
        ({"model.dtype": "float16"}, "compute_dtype='float16'.*float32, bfloat16"),
        ({"optimizer.schedule": "linear"}, "schedule='linear'.*constant, cosine, step"),
        (
            {"optimizer.weight_decay_on": "convs"},
            "weight_decay_on='convs'.*kernels_but_depthwise, all",
        ),
        ({"optimizer.schedule": "step"}, "decay_at=.*must be given for schedule='step'"),
        ({"optimizer.decay_at": (0.5,)}, "decay_at=.*this is 'cosine'"),
        ({"optimizer.schedule": "step", "optimizer.decay_at": (0.5, 0.5)}, "decay_at=.*ascending"),
        (
            {"optimizer.schedule": "step", "optimizer.decay_at": (0.5,), "optimizer.warmup": 0.5},
            "decay_at=.*warmup of 0.5",
        ),
        ({"optimizer.schedule": "step", "optimizer.decay_at": (1.0,)}, "decay_at=.*before 1"),
    ],
)
def test_choices_and_schedules_that_make_no_sense_are_refused(small, keys, message):
    with pytest.raises(ValueError, match=message):
        config_lib.changed(small, keys)


def test_a_run_of_a_version_with_fewer_keys_is_read_and_no_different(small):
    saved = config_lib.to_json(small)
    old = {key: value for key, value in saved.items() if key not in config_lib.ADDED}
    assert config_lib.from_mapping(old) == small
    assert config_lib.differences(old, small) == []
    wider = config_lib.changed(small, {"model.width": 2.0})
    assert config_lib.differences(old, wider) == ["width: 1.0 -> 2.0"]


def test_only_keys_that_change_the_numbers_count_as_differences(small):
    saved = config_lib.to_json(small)
    now = config_lib.changed(small, {"log.every": 1, "checkpoint.keep": 9, "data.dir": "elsewhere"})
    assert config_lib.differences(saved, now) == []
    now = config_lib.changed(now, {"seed": 1, "method.sparsity": 0.9})
    assert config_lib.differences(saved, now) == ["seed: 0 -> 1", "sparsity: 0.8 -> 0.9"]


def test_of_a_text_the_lanes_of_an_evaluation_count(small):
    saved = config_lib.to_json(small)
    assert config_lib.differences(saved, config_lib.changed(small, {"eval.batch_size": 7})) == []
    tokens = config_lib.changed(
        small, {"data.name": "topics", "model.name": "gru", "data.sequence_length": 8}
    )
    more = config_lib.changed(tokens, {"eval.batch_size": 7})
    found = config_lib.differences(config_lib.to_json(tokens), more)
    assert found == ["eval_batch_size: 128 -> 7"]


@pytest.mark.parametrize("dataset", ["text", "image_folder"])
def test_another_folder_is_other_data_where_the_folder_is_all_there_is(small, dataset):
    config = config_lib.changed(small, {"data.name": dataset, "data.dir": "a"})
    other = config_lib.changed(config, {"data.dir": "b"})
    assert config_lib.differences(config_lib.to_json(config), other) == ["data_dir: 'a' -> 'b'"]


@pytest.mark.parametrize("words", ["3", "3, a=1", "**{'a': 1}", "a=b", "a=1)(b=2", ")"])
def test_only_keyword_arguments_that_are_literals_are_read(words):
    with pytest.raises(ValueError, match=r"config.method_options=.*must be like 'a=1'"):
        config_lib.keywords(words, "method_options", "a=1")
    assert config_lib.keywords("a=1, b=[2]", "method_options", "a=1") == {"a": 1, "b": [2]}
