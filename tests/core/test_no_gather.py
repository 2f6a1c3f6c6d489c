"""What crosses devices when a sharded weight is rewired, read from the compiled program."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_optax

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

LEAVES = 3
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVES = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
SEARCH = 31  # passes of a loop whose end is not known: one for each bit of a score or an index


def computations(text):
    """The lines of each computation of an HLO program, and the name of the one it starts with."""
    found, name, entry = {}, None, None
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if start:
            name = start[2]
            entry = name if start[1] else entry
            found[name] = []
        elif name is not None:
            found[name].append(line)
    return found, entry


def collectives(text):
    """`(operation, bytes it moves, how often it runs at most)` of every collective of a program."""
    lines_of, entry = computations(text)
    found = []

    def walk(name, times):
        for line in lines_of[name]:
            done = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
            if done:
                parts = re.findall(r"(\w+)\[([\d,]*)\]", done[1])
                sizes = [BYTES[t] * math.prod(int(n) for n in s.split(",") if n) for t, s in parts]
                found.append((done[2], sum(sizes), times))
            inner = times
            if " while(" in line:
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                inner = times * (int(known[1]) if known else SEARCH)
            for called in re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)", line):
                walk(called, inner)
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                for called in branches.split(", "):
                    walk(called.lstrip("%"), times)
            for called in re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line):
                walk(called, times)

    walk(entry, 1)
    return found


def moved(axis_type, shape):
    """The collectives of an update that may rewire three weights, sharded along both axes."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    with jax.set_mesh(mesh):
        params = {f"{i}": jax.device_put(jnp.ones(shape), sharding) for i in range(LEAVES)}
        tx = rigl_optax.rigl(optax.adam(0.1), rigl_optax.uniform(0.75), end=6, every=2)
        state = tx.init(params)
        return collectives(jax.jit(tx.update).lower(params, state, params).compile().as_text())


SHAPES = ((64, 96), (256, 192))


@pytest.fixture(scope="module", params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def programs(request):
    """For each shape, its rows on a device and the collectives."""
    return [(shape[0] // 4, moved(request.param, shape)) for shape in SHAPES]


def counts_of_all(rows):
    """Bytes of one count of each row, at most int16, and one of each leaf."""
    return LEAVES * (2 * rows + 4)


def test_no_weight_travels(programs):
    """Nothing is gathered or sent: what crosses devices are sums of counts.

    A count is of a leaf, or, where it is added up along an axis that is cut, of each row a device
    has; never of an entry.
    """
    for rows, found in programs:
        assert found, "a sharded count needs some collective: does this test read the program?"
        assert {operation for operation, _, _ in found} == {"all-reduce"}, found
        # Together: active weights, those to heal, gradients that are not finite.
        assert max(size for _, size, _ in found) <= 3 * counts_of_all(rows), found


def test_the_bytes_that_travel_are_bounded(programs):
    """Two searches, two loops of at most 31 passes each, and a few sums outside of them."""
    for rows, found in programs:
        inside = [(size, times) for _, size, times in found if times > 1]
        assert {times for _, times in inside} == {2 * SEARCH}, found
        assert sum(size for size, _ in inside) <= 2 * counts_of_all(rows), found
        total = sum(size * times for _, size, times in found)
        assert 2 * 2 * SEARCH * LEAVES * 4 <= total <= (4 * SEARCH + 6) * counts_of_all(rows), found


def test_this_reads_programs_that_gather():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("x"))
    whole = NamedSharding(mesh, PartitionSpec())

    def gathers_in_a_loop(x):
        add = lambda _, y: y + jax.lax.with_sharding_constraint(jnp.sort(y), whole)
        return jax.lax.fori_loop(0, 5, add, x)

    x = jax.device_put(jnp.ones(64), sharded)
    text = jax.jit(gathers_in_a_loop, out_shardings=sharded).lower(x).compile().as_text()
    found = collectives(text)
    assert any(size >= 64 * 4 for operation, size, _ in found if operation == "all-gather"), found
