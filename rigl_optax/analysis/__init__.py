"""Measures a run: how masks change, which units have no connections, the loss around weights."""

from rigl_optax.analysis.curvature import HessianEigenvalues as HessianEigenvalues
from rigl_optax.analysis.curvature import gradient_norm as gradient_norm
from rigl_optax.analysis.curvature import hessian_eigenvalues as hessian_eigenvalues
from rigl_optax.analysis.curvature import largest_stable_curvature as largest_stable_curvature
from rigl_optax.analysis.landscape import Barrier as Barrier
from rigl_optax.analysis.landscape import Bezier as Bezier
from rigl_optax.analysis.landscape import barrier as barrier
from rigl_optax.analysis.landscape import fit_bezier as fit_bezier
from rigl_optax.analysis.landscape import interpolate as interpolate
from rigl_optax.analysis.topology import PerLayer as PerLayer
from rigl_optax.analysis.topology import churn as churn
from rigl_optax.analysis.topology import coverage as coverage
from rigl_optax.analysis.topology import explore as explore
from rigl_optax.analysis.topology import grown as grown
from rigl_optax.analysis.topology import overlap as overlap
from rigl_optax.analysis.topology import survival as survival
from rigl_optax.analysis.units import DeadUnits as DeadUnits
from rigl_optax.analysis.units import averaging_heads as averaging_heads
from rigl_optax.analysis.units import dead_heads as dead_heads
from rigl_optax.analysis.units import dead_hidden_units as dead_hidden_units
from rigl_optax.analysis.units import dead_units as dead_units
from rigl_optax.analysis.units import effective_units as effective_units
from rigl_optax.analysis.units import fan_in as fan_in
from rigl_optax.analysis.units import fan_out as fan_out
