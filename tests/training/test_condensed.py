"""Runs of stored blocks are the masked runs of the same config."""

import numpy as np
import pytest

from rigl_optax.data import batches
from rigl_optax.training import (
    checks,
    files,
    health,
    loop,
    metrics,
    setup,
    sparsity,
)
from rigl_optax.training import config as config_lib
from tests.training import condensed_runs as runs
from tests.training.condensed_runs import GRU, LENET, MOBILENET

slow = pytest.mark.slow
KINDS = [pytest.param(kind, marks=() if kind == "lenet" else slow) for kind in runs.KINDS]


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """Of the masked and of the condensed run: config, workdir, run, result."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        runs.shorten(patch)
        for is_condensed in (False, True):
            config = config_lib.changed(
                runs.KINDS[request.param], {"method.condensed": is_condensed}
            )
            workdir = tmp_path_factory.mktemp("run")
            result, _ = runs.train(config, workdir)
            prepared = setup.prepare(config)
            found[is_condensed] = (config, workdir, prepared, result)
        yield found[False], found[True]


def test_it_starts_from_the_same_network_exactly(both):
    (_, _, masked, _), (config, _, condensed, _) = both
    runs.assert_same_masks(condensed.initial, masked.initial)
    runs.assert_close(condensed.initial, masked.initial, rtol=0, atol=0)
    found = sparsity.distribution(config)(condensed.shapes)
    sparse = {path: s for path, s in found.items() if s}  # ERK leaves small layers whole
    assert condensed.initial.opt_state.topologies.keys() == sparse.keys() and sparse
    shapes = {path: leaf.shape for path, leaf in runs.named(condensed.initial.params).items()}
    for path, topology in condensed.initial.opt_state.topologies.items():
        assert shapes[path] == topology.values_shape


def test_it_ends_with_the_same_masks_and_weights(both):
    (masked, *_), (config, *_) = both
    ends = [runs.final(masked, both[0][1]), runs.final(config, both[1][1])]
    runs.assert_same_masks(ends[1], ends[0])
    runs.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)
    start, end = runs.masks_of(both[0][2].initial), runs.masks_of(ends[0])
    changed = [path for path in end if (end[path] != start[path]).any()]
    assert bool(changed) == both[1][2].rewirings.happen
    assert checks.counters(ends[1]) == (both[1][2].rewirings.before(config.steps), 0)
    before, after = (runs.dense_of(x) for x in (both[0][2].initial, ends[0]))
    assert all((before[path] != after[path]).any() for path in ends[1].opt_state.topologies)


# What comes from losses; all else in a record is counted, and the same to the last digit.
ROUNDED = ("loss", "accuracy", "bits_per_byte")


def test_its_records_say_the_same(both):
    records = [metrics.read(workdir / metrics.FILE) for _, workdir, *_ in both]
    told = [[(r["step"], r["kind"], sorted(r)) for r in found] for found in records]
    assert told[0] == told[1]
    for masked, condensed in zip(*records, strict=True):
        for name, value in masked.items():
            # Effective units are quotients of sums, which differ in their order.
            if name in ROUNDED or name.startswith("effective_outputs/"):
                assert condensed[name] == pytest.approx(value, rel=1e-4)
            else:
                assert condensed[name] == value, (condensed["kind"], condensed["step"], name)
    kinds = {kind for _, kind, _ in told[1]}
    assert ("rewiring" in kinds) == both[1][2].rewirings.happen


def test_its_result_says_the_same(both):
    (_, masked_dir, _, masked), (_, condensed_dir, _, condensed) = both
    for key in ("active_weights", "weights", "flops", "coverage", "warnings"):
        assert condensed[key] == masked[key], key
    for split in ("validation", "test"):
        assert condensed[split] == pytest.approx(masked[split], rel=1e-4)
    explained = [path / "explanation.json" for path in (masked_dir, condensed_dir)]
    assert explained[0].read_text() == explained[1].read_text()
    assert all(np.isfinite(value) for value in condensed["test"].values())


# ---------------------------------------------------------------------------- what is counted


def test_blocks_at_the_edge_count_as_the_weights_they_have():
    prepared = setup.prepare(LENET)
    masks = runs.masks_of(prepared.initial)
    active = checks.active_weights(prepared, prepared.initial)
    assert active == {path: int(mask.sum()) for path, mask in masks.items()}
    topology = prepared.initial.opt_state.topologies["layers/1/kernel"]
    assert topology.shape == (20, 10) and topology.grid == (5, 3)
    edge = np.asarray(topology.cols) == 2
    assert edge.any() and active["layers/1/kernel"] == 16 * (~edge).sum() + 8 * edge.sum()
    of = prepared.representation.entries(prepared.initial)["layers/1/kernel"]
    assert of.outputs.tolist() == [4, 4, 2] and of.inputs.tolist() == [4] * 5
    assert checks.dead_units(prepared, prepared.initial) == {
        path: int((~mask.any(0)).sum()) for path, mask in masks.items() if mask.ndim == 2
    }
    assert health.coverage(prepared, prepared.initial) == pytest.approx(
        sum(m.sum() for p, m in masks.items() if not m.all())
        / sum(m.size for m in masks.values() if not m.all())
    )
    assert prepared.representation.sizes(prepared.initial) == {
        path: mask.size for path, mask in masks.items()
    }


# ------------------------------------------------------------------- gates, some of them dense


@slow
def test_a_cell_may_have_dense_gates_besides_condensed_ones():
    config = config_lib.changed(
        GRU,
        {
            "model.dense_layers": "embedding|recurrent/reset|input/update",
            "model.hidden": (8,),
            "data.sequence_length": 5,
        },
    )
    prepared = {c: setup.prepare(c) for c in (config, runs.masked(config))}
    assert len(prepared[config].initial.opt_state.topologies) == 5
    ends = [runs.advance(run, 9) for c, run in prepared.items()]
    runs.assert_same_masks(*ends)
    runs.assert_close(*ends, rtol=1e-4, atol=1e-5)
    assert int(ends[0].opt_state.rewirings) == 2


# -------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("bad", [20, pytest.param(33, marks=slow)])  # a rewiring; none
def test_after_a_skipped_step_both_forms_rewire_at_the_same_steps(tmp_path, monkeypatch, bad):
    sound = batches.training_batch

    def training_batch(*args, step, **keys):
        batch = sound(*args, step=step, **keys)
        if step == bad:
            batch["labels"] = np.full_like(batch["labels"], 1000)
        return batch

    monkeypatch.setattr(batches, "training_batch", training_batch)
    config = config_lib.changed(LENET, {"faults.on_nonfinite": "skip", "steps": 60})
    ends = {}
    for each in (config, runs.masked(config)):
        workdir = tmp_path / str(each.method.condensed)
        result, _ = runs.train(each, workdir)
        assert any("1 steps up to" in warning for warning in result["warnings"])
        ends[each] = runs.final(each, workdir)
    runs.assert_same_masks(*ends.values())
    runs.assert_close(*ends.values(), rtol=1e-4, atol=1e-5)
    assert [int(end.opt_state.count) for end in ends.values()] == [59, 59]
    assert len({checks.counters(end) for end in ends.values()}) == 1


# ------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            LENET,
            {"method.name": "snfs"},
            "method.name='snfs': methods of stored.*are static, set, mest, rigl$",
        ),
        (
            LENET,
            {"method.name": "dense"},
            "name='dense': methods of stored.*static, set, mest, rigl$",
        ),
        (
            LENET,
            {"method.structure": {"name": "unstructured"}},
            "structure.name='unstructured': must be 'block' or 'measured' with",
        ),
        (
            LENET,
            {
                "method.structure": {
                    "name": "unstructured",
                    "layers": (("layers/0", {"name": "block", "rows": 4, "cols": 4}),),
                }
            },
            r"must be blocks for 'layers/1/kernel'.*not Unstructured.*config.model.dense_layers",
        ),
        (
            LENET,
            {"method.structure": {"name": "nm", "n": 1, "m": 4}},
            r"must be blocks for 'layers/0/.*not NM\(",
        ),
        (
            LENET,
            {"method.structure": {"name": "constant_fan_in"}},
            "blocks for 'layers/0/.*not ConstantFanIn",
        ),
        (
            LENET,
            {"method.structure": {"name": "block", "rows": 3, "cols": 4}},
            r"Block\(rows=3.*'layers/0/kernel' of 64 inputs",
        ),
        (
            LENET,
            {
                "method.structure": {
                    "name": "unstructured",
                    "layers": (("dense", {"name": "block", "rows": 4, "cols": 4}),),
                }
            },
            "'dense'",
        ),
        (
            LENET,
            {"method.sparsity": 0.0},
            "config.method.sparsity=0.0: must leave some layer sparse with",
        ),
        (LENET, {"model.dense_layers": "layers"}, "nothing left to sparsify.*'layers/0/kernel'"),
        (LENET, {"mesh.params": 2}, "mesh.params=2: must be 1 with config.method.condensed=True"),
        (LENET, {"mesh.axes": "explicit"}, "mesh.axes='explicit': must be 'auto' with"),
        (
            LENET,
            {"method.accumulate": 2},
            r"method.accumulate: .*for 'rigl \(condensed\)' candidates, min_fan",
        ),
        (LENET, {"method.name": "set", "method.momentum": 1}, "method.momentum: .*for 'set"),
        (
            LENET,
            {"method.name": "static", "method.min_fan_in": 1},
            r"\(condensed\)' none more",
        ),
        (LENET, {"method.ticket": "somewhere"}, "rigl takes none"),
        (
            MOBILENET,
            {
                "model.dense_layers": "stem|blocks/1",
                "method.structure": {"name": "block", "rows": 2, "cols": 2, "pad": True},
            },
            "'blocks/0/depthwise/kernel', since its channels are in 8 groups; 'blocks/2/dep",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(config, changes, message, monkeypatch):
    runs.shorten(monkeypatch)
    with pytest.raises(ValueError, match=message):
        setup.prepare(config_lib.changed(config, changes))


def test_layers_that_stay_dense_may_be_of_any_kind():
    config = config_lib.changed(GRU, {"model.dense_layers": "embedding|layers"})
    assert setup.prepare(config).initial.opt_state.topologies.keys() == {"readout/0/kernel"}
    assert runs.advance(setup.prepare(config), 1).step == 1


def test_layers_with_a_schedule_of_their_own_rewire_alike_and_are_told_alike(tmp_path):
    layers = (
        ("layers/0", {"name": "block", "rows": 4, "cols": 4}),
        ("layers/1", {"name": "block", "rows": 4, "cols": 5}),
    )
    config = config_lib.changed(
        LENET,
        {
            "method.overrides": (("layers/0", {"every": 5, "drop_fraction": 0.1}),),
            "method.structure": {"layers": layers},
            "steps": 20,
        },
    )
    ends, told = [], []
    for is_condensed in (False, True):
        one, workdir = (
            config_lib.changed(config, {"method.condensed": is_condensed}),
            tmp_path / "masked",
        )
        if is_condensed:
            workdir = tmp_path / "condensed"
        result, _ = runs.train(one, workdir)
        assert result["warnings"] == []
        ends.append(runs.final(one, workdir))
        records = metrics.read(workdir / metrics.FILE)
        rewired = [r["step"] for r in records if r["kind"] == "rewiring"]
        assert rewired == [1, 6, 11]  # at counts 0, 5 and 10; ends at 15
        trained = [r for r in records if r["kind"] == "train"]
        assert [r["rewirings"] for r in trained] == [2, 3]
        # Cosines to 0 at count 15, of what each layer was given.
        shares = [(r["drop_fraction/layers/0/kernel"], r["drop_fraction"]) for r in trained]
        assert shares == [pytest.approx((0.025, 0.075)), (0, 0)]
        assert "drop_fraction/layers/1/kernel" not in trained[0]
        plan = files.read(workdir / loop.EXPLANATION_FILE, "", files.EXPLANATION)
        told.append((plan["rewirings"], plan["replaced"], plan["active"], plan["training_ratio"]))
        flops = result["flops"]
        assert flops["training"] / flops["training_dense"] == pytest.approx(told[-1][-1])
        dense, sparse = flops["inference_dense"], flops["inference"]
        expected = config.batch_size * (17 * 3 * sparse + 3 * (2 * sparse + dense))
        assert flops["training"] == pytest.approx(expected)
    runs.assert_same_masks(ends[1], ends[0])
    assert told[0] == told[1] and told[0][0] == 3
