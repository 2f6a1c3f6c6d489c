import importlib.util
import json
import pathlib
import re

import pytest

from rigl_optax.training import config as config_lib

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_is_sound_and_has_its_launch_line(path):
    spec = importlib.util.spec_from_file_location("config_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config_lib.from_mapping(module.get_config().to_dict())
    assert f"rigl-optax train {path.stem} " in module.__doc__


def test_a_config_survives_json(small):
    saved = json.loads(json.dumps(config_lib.to_json(small)))
    assert config_lib.from_mapping(saved) == small
    assert config_lib.differences(saved, small) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"stpes": 3},
            "config.stpes: there is no such key (did you mean 'steps'?); keys of config",
        ),
        ({"sparsity": 0.9}, "config.sparsity: .* (did you mean 'config.method.sparsity'?)"),
        (
            {"data": {"nmae": "digits"}},
            "config.data.nmae: .* (did you mean 'name'?); keys of config.",
        ),
        ({"model": "lenet"}, "config.model='lenet': must be a section with keys, not a value"),
        (
            {"method": {"structure": {"layers": 3}}},
            "config.method.structure.layers=3: must be pairs",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(values, told):
    pattern = ".*".join(map(re.escape, told.split(".*")))
    with pytest.raises(ValueError, match=pattern):
        config_lib.from_mapping(values)


def test_what_a_recipe_leaves_out_has_its_default():
    assert config_lib.from_mapping({}) == config_lib.Config()
    found = config_lib.from_mapping({"method": {"name": "snfs", "momentum": 0.5}})
    assert found.method.options == {"momentum": 0.5} and found.method.sparsity == 0.9
    keys = config_lib.known_keys()
    assert set(config_lib.BOOKKEEPING) < set(keys)
    assert set(config_lib.flat(config_lib.to_json(config_lib.Config()))) == set(keys)


def test_another_name_begins_without_the_options_of_the_one_before(small):
    adam = config_lib.changed(small, {"optimizer.b2": 0.9, "optimizer.name": "adam"})
    assert adam.optimizer.options == {"b2": 0.9} and small.optimizer.options["momentum"] == 0.9
    same = config_lib.changed(small, {"optimizer.name": "sgd"})
    assert same == small


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("log.every", 0),
        ("eval.every", -1),
        ("checkpoint.every", -1),
        ("checkpoint.keep", 0),
        ("seed", -1),
        ("method.until", 0.0),
        ("method.until", 1.5),
        ("data.image_size", -1),
        ("data.threads", 0),
        ("optimizer.warmup", 1.0),
        ("method.prune_from", -0.1),
        ("loss.label_smoothing", 1.0),
        ("model.width", 0.0),
        ("optimizer.decay_factor", float("inf")),
        ("optimizer.decay_factor", -1.0),
        ("model.hidden", (20, -5)),
        ("model.hidden", (0,)),
        ("optimizer.learning_rate", -0.1),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.weight_decay", -1e-4),
        ("method.sparsity", 1.0),
        ("method.sparsity", -0.5),
        ("method.sparsity", float("nan")),
        ("method.drop_fraction", 1.1),
        ("optimizer.gradient_clip", -1.0),
        ("optimizer.gradient_clip", float("inf")),
        ("batch_size", 0),
        ("method.every", 0),
        ("steps", 2**31),
        ("seed", 2**31),
        ("data.validation", 1.0),
        ("data.validation", 0.1),  # of digits, which have splits of their own
    ],
)
def test_values_that_make_no_sense_are_refused(small, key, value):
    with pytest.raises(ValueError, match=re.escape(f"config.{key}={value}: must be")):
        config_lib.changed(small, {key: value})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data.augment": "crop"}, "config.data.augment='crop'.*none, pad_crop, resized_crop"),
        ({"model.dtype": "float16"}, "config.model.dtype='float16'.*float32, bfloat16"),
        (
            {"method.sparse_aware_init": "unit", "method.condensed": True},
            "sparse_aware_init='unit': must be 'none' with config.method.condensed=True",
        ),
        (
            {"method.sparse_aware_init": "layer", "optimizer.base_width": 128},
            "sparse_aware_init='layer': must be 'none' with config.optimizer.base_width=128",
        ),
        ({"method.sparse_aware_init": "each"}, "sparse_aware_init='each'.*none, unit, layer"),
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
        ({"optimizer.schedule": "step", "optimizer.decay_at": (1.0,)}, r"decay_at=.*in \(0, 1\)"),
    ],
)
def test_choices_and_schedules_that_make_no_sense_are_refused(small, keys, message):
    with pytest.raises(ValueError, match=message):
        config_lib.changed(small, keys)


def test_only_keys_that_change_the_numbers_count_as_differences(small):
    saved = config_lib.to_json(small)
    now = config_lib.changed(small, {"log.every": 1, "checkpoint.keep": 9, "data.dir": "elsewhere"})
    assert config_lib.differences(saved, now) == []
    now = config_lib.changed(now, {"seed": 1, "method.sparsity": 0.9})
    assert config_lib.differences(saved, now) == ["method.sparsity: 0.8 -> 0.9", "seed: 0 -> 1"]


def test_of_a_text_the_lanes_of_an_evaluation_count(small):
    saved = config_lib.to_json(small)
    assert config_lib.differences(saved, config_lib.changed(small, {"eval.batch_size": 7})) == []
    tokens = config_lib.changed(
        small, {"data.name": "topics", "model.name": "gru", "data.sequence_length": 8}
    )
    more = config_lib.changed(tokens, {"eval.batch_size": 7})
    found = config_lib.differences(config_lib.to_json(tokens), more)
    assert found == ["eval.batch_size: 128 -> 7"]


@pytest.mark.parametrize("dataset", ["text", "image_folder"])
def test_another_folder_is_other_data_where_the_folder_is_all_there_is(small, dataset):
    config = config_lib.changed(small, {"data.name": dataset, "data.dir": "a"})
    other = config_lib.changed(config, {"data.dir": "b"})
    assert config_lib.differences(config_lib.to_json(config), other) == ["data.dir: 'a' -> 'b'"]
