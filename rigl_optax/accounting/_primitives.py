"""Counts the FLOPs of one JAX primitive: a product, elementwise arithmetic, or data movement."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

Equation = Any  # jax.extend.core.JaxprEqn


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names("""
    abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf
    erf_inv erfc exp exp2 expm1 floor integer_pow lgamma log log1p logistic neg round rsqrt sign
    sin sinh sqrt square tan tanh
    add add_any atan2 clamp div igamma igammac max min mul nextafter polygamma pow
    regularized_incomplete_beta rem sub zeta
""")
REDUCTIONS = _names("""
    reduce reduce_sum reduce_max reduce_min reduce_prod
    cumsum cumprod cummax cummin cumlogsumexp
""")
WINDOWS = _names("reduce_window reduce_window_sum reduce_window_max reduce_window_min")
SCATTERS = _names("scatter-add scatter_add scatter-mul scatter_mul")
MOVES = _names("""
    all_gather all_gather_invariant all_gather_reduced all_to_all approx_top_k
    bitcast_convert_type broadcast_in_dim complex concatenate conj convert_element_type copy copy_p
    device_put dynamic_slice dynamic_update_slice empty empty2 expand_dims gather imag iota
    layout_constraint mesh_cast name optimization_barrier pad pbroadcast pcast pmax pmin ppermute
    psum psum_invariant psum_scatter pvary ragged_all_to_all random_gamma real reduce_precision
    reduce_scatter reshape reshard rev rng_uniform scatter scatter-max scatter-min scatter_max
    scatter_min select_and_gather_add select_and_scatter_add select_n sharding_constraint slice
    sort split squeeze stop_gradient top_k transpose
""")


def product_flops(equation: Equation) -> int | None:
    """Counts multiplies and adds of a matrix product, convolution or factorisation.

    Args:
      equation: One equation of a jaxpr.

    Returns:
      FLOPs, two for a multiply-add (eight for a complex one); None for any other primitive.
    """
    count = _PRODUCTS.get(equation.primitive.name)
    if count is None:
        return None
    is_complex = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.complexfloating)
    is_product = equation.primitive.name != "fft"  # `_fft` counts complex operations already
    return count(equation) * (4 if is_complex and is_product else 1)


def elementwise_flops(equation: Equation) -> int | None:
    """Counts operations of an elementwise function, reduction or pooling window.

    Every function counts as one operation per element, `tanh` like `add`; integer arithmetic,
    comparisons and data movement are free.

    Args:
      equation: One equation of a jaxpr.

    Returns:
      Operations on floating-point elements; None if the primitive is not known here.
    """
    name = equation.primitive.name
    outputs = [v.aval for v in equation.outvars]
    if not any(_is_inexact(aval) for aval in outputs) or name in MOVES:
        return 0
    size = math.prod(outputs[0].shape)
    if name in ELEMENTWISE:
        return size
    if name in REDUCTIONS:
        inputs = math.prod(equation.invars[0].aval.shape)
        return inputs if name.startswith("cum") else max(inputs - size, 0)
    if name in WINDOWS:
        return size * (math.prod(equation.params["window_dimensions"]) - 1)
    if name in SCATTERS:
        return math.prod(equation.invars[2].aval.shape)
    return None


def convolution_flops(
    *,
    out_shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    inputs_per_output: int,
    outputs: int,
    strides: tuple[int, ...],
    padding_low: tuple[int, ...],
    input_dilation: tuple[int, ...],
    kernel_dilation: tuple[int, ...],
) -> int:
    """Computes the FLOPs of a convolution from its geometry.

    Each output position costs the full window, also where the window overlaps the padding (the
    usual convention, and the paper's). Window elements that meet the holes of a dilated input, as
    in a transposed convolution, are neither computed nor counted.

    Args:
      out_shape: Spatial output sizes.
      kernel_shape: Spatial kernel sizes.
      inputs_per_output: Input channels that one output channel sees.
      outputs: Batch size times output channels.
      strides: Window strides.
      padding_low: Padding before the first element; may be negative.
      input_dilation: Distance between input elements; 1: no holes.
      kernel_dilation: Distance between kernel elements.

    Returns:
      Multiplies plus adds.
    """
    taps = 1
    for out, kernel, stride, low, holes, dilation in zip(
        out_shape, kernel_shape, strides, padding_low, input_dilation, kernel_dilation, strict=True
    ):
        if holes == 1:
            taps *= out * kernel
            continue
        position = stride * np.arange(out)[:, None] + dilation * np.arange(kernel) - low
        taps *= int((position % holes == 0).sum())
    return 2 * outputs * inputs_per_output * taps


def _convolution(equation: Equation) -> int:
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    params = equation.params
    numbers = params["dimension_numbers"]
    return convolution_flops(
        out_shape=tuple(out[d] for d in numbers.out_spec[2:]),
        kernel_shape=tuple(kernel[d] for d in numbers.rhs_spec[2:]),
        inputs_per_output=kernel[numbers.rhs_spec[1]],
        outputs=out[numbers.out_spec[0]] * out[numbers.out_spec[1]],
        strides=params["window_strides"],
        padding_low=tuple(low for low, _ in params["padding"]),
        input_dilation=params["lhs_dilation"],
        kernel_dilation=params["rhs_dilation"],
    )


def _dot_general(equation: Equation) -> int:
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * math.prod(out) * math.prod(left[d] for d in contracted)


def _ragged_dot(equation: Equation) -> int:
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    flops = 2 * math.prod(out) * math.prod(left[d] for d in contracted)
    # Each group contracts its own part of a ragged contracting dimension.
    if set(numbers.lhs_ragged_dimensions) & set(contracted):
        flops //= equation.invars[2].aval.shape[-1]
    return flops


def _cholesky(equation: Equation) -> int:
    *batch, n, _ = equation.invars[0].aval.shape
    return math.prod(batch) * n**3 // 3


def _triangular_solve(equation: Equation) -> int:
    n = equation.invars[0].aval.shape[-1]
    return n * math.prod(equation.invars[1].aval.shape)


def _fft(equation: Equation) -> int:
    # The usual 5 n log2(n) real operations of a complex transform of n points.
    n = math.prod(equation.params["fft_lengths"])
    size = max(math.prod(v.aval.shape) for v in (*equation.invars, *equation.outvars))
    return int(5 * size * math.log2(max(n, 1)))


_PRODUCTS: dict[str, Callable[[Equation], int]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "cholesky": _cholesky,
    "triangular_solve": _triangular_solve,
    "fft": _fft,
}


def _is_inexact(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
