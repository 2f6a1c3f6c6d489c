"""Measures a run by its masks: how much they change, and which units have no connections left."""

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
