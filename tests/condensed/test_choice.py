"""The table of measured ratios, and what is chosen by it."""

import numpy as np
import pytest

from rigl_optax import Block
from rigl_optax.condensed import _choice, _measured, choose, measured_ratio


def test_the_table_is_whole():
    assert list(_measured.DENSITIES) == sorted(_measured.DENSITIES)
    for (kind, size), rows in _measured.RATIOS.items():
        widths = _measured.WIDTHS[kind]
        assert list(widths) == sorted(widths) and len(rows) == len(widths)
        assert all(len(row) == len(_measured.DENSITIES) and min(row) > 0 for row in rows)
        assert {n for k, n in _measured.RATIOS if k == kind} >= {size}
    assert {kind for kind, _ in _measured.RATIOS} == set(_measured.WIDTHS)


@pytest.mark.parametrize("kind, window", [("product", ()), ("convolution", (3, 3))])
def test_at_its_points_the_best_of_the_table_is_chosen(kind, window):
    for i, width in enumerate(_measured.WIDTHS[kind]):
        for j, density in enumerate(_measured.DENSITIES):
            found = choose((*window, width, width), 1 - density)
            sizes = {n: rows[i][j] for (k, n), rows in _measured.RATIOS.items() if k == kind}
            fitting = {n: ratio for n, ratio in sizes.items() if n <= width}
            best = max(fitting, key=fitting.get)
            assert found.block == Block(best, best, pad=True)
            np.testing.assert_allclose(found.ratio, fitting[best])
            assert found.pays == (fitting[best] > 1)


def test_between_points_ratios_lie_between_and_beyond_the_table_they_stay():
    rows, widths = ((1.0, 4.0), (4.0, 16.0)), (10, 1000)
    at = lambda width, density: _choice._between(
        tuple((*(low,) * (len(_measured.DENSITIES) - 1), high) for low, high in rows),
        widths,
        width,
        density,
    )
    found = [at(10, 0.02), at(1000, 0.5), at(100, 0.02), at(1, 0.001), at(10**6, 0.99)]
    np.testing.assert_allclose(found, [1, 16, 2, 1, 16])


def test_a_layer_narrower_than_all_blocks_has_none():
    assert choose((784, 10), 0.9) == (None, 0.0) and not choose((784, 10), 0.9).pays
    assert choose((1, 1, 64, 64), 0.9) == choose((64, 64), 0.9)


def test_the_ratio_of_some_blocks_is_that_of_their_row_of_the_table():
    for (kind, size), rows in _measured.RATIOS.items():
        width = _measured.WIDTHS[kind][-1]
        shape = (width, width) if kind == "product" else (3, 3, width, width)
        sparsity = 1 - _measured.DENSITIES[1]
        np.testing.assert_allclose(measured_ratio(shape, sparsity, Block(size, size)), rows[-1][1])
    assert measured_ratio((512, 512), 0.9, Block(16, 32)) is None
    assert measured_ratio((512, 512), 0.9, Block(8, 8)) is None
    assert measured_ratio((512, 10), 0.9, Block(16, 16, pad=True)) is None
