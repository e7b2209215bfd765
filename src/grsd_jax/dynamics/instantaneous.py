"""The instantaneous record of the shell dynamics: rates at one set of parameters.

Every derivative is taken along a direction. If that is the gradient flow, time is that
of the flow. The rates are those of an infinitesimal step; what a training step really
did is the balance of `grsd_jax.dynamics.between_ends`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import all_finite, matmul, ratio
from grsd_jax._checks import check_at_least, check_positive, check_type, make_plain
from grsd_jax._typing import PyTree
from grsd_jax.dynamics.balance import ShellDynamics, eigenvalue_drift, shell_dynamics
from grsd_jax.dynamics.closure import (
    ClosureError,
    EdgeCrossings,
    closure_error,
    edge_crossings,
)
from grsd_jax.dynamics.moving_spectrum import Finder, MovingSpectrum, moving_spectrum
from grsd_jax.dynamics.velocity import VelocityFit, velocity_fit
from grsd_jax.kernel.derivative import central_difference, coarsest_dtype
from grsd_jax.kernel.solver import Lanczos
from grsd_jax.linalg.ritz import RitzPairs
from grsd_jax.problem import Point
from grsd_jax.results import NamedResult, result
from grsd_jax.shells.binning import Shells, assign_shells
from grsd_jax.shells.options import Window

#: Changes over the measured step, over the cube root of eps: of theta, and of e and M.
_BEND_PARAMS, _BEND_ERROR = 0.2, 20.0

#: Largest residual at which Lanczos stops, relative to the value. The measured change
#: is a difference, which enlarges errors.
_CONVERGENCE = 1e-5

#: Leading eigenvalues that a record holds.
_NUM_VALUES = 32


@dataclasses.dataclass(frozen=True)
class Instantaneous:
    """Options of the instantaneous record.

    Attributes:
        window: Which pairs are used. The default tolerance is tighter than that of
            other measurements: in float32 the smallest pairs' vectors turn to noise
            before their values do.
        num_bootstrap: Resamples behind the interval of the exponent.
        closure_step: Relative step ``h |d| / |theta|`` of the measured change; if None,
            one over which neither the parameters, the error nor M change much: by at
            most a thousandth, a tenth and a tenth in float32.
    """

    window: Window = Window(num_pairs=64, tolerance=0.01)
    num_bootstrap: int = 200
    closure_step: float | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        make_plain(self)
        check_type("window", self.window, Window)
        check_at_least("num_bootstrap", self.num_bootstrap, 0)
        if self.closure_step is not None:
            check_positive("closure_step", self.closure_step)

    @property
    def finder(self) -> Finder:
        """How pairs are found."""
        return Finder(self.window, Lanczos().block_size, _CONVERGENCE)

    def num_pairs(self, size: int) -> int:
        """Returns how many leading pairs Lanczos finds of n."""
        wanted = self.window.num_pairs
        return size if wanted is None else min(wanted, size)


@result()
class InstantRecord(NamedResult):
    """The rates of the shell dynamics at one set of parameters.

    Index 0 is the shell of the smallest values. The shells at both ends are open: they
    also hold what lies beyond their outer edge. Only resolved pairs are in shells.

    Attributes:
        finite: [] bool, whether everything that was measured is finite.
        num_resolved: [] int32, resolved pairs.
        total_energy: [], ``|e|^2``.
        shells: The shells, with the pairs in each.
        dynamics: Energies, dissipation, transfers, flux, velocity, and what is left
            unresolved.
        velocity_fit: The fit of ``v = c lambda^p``, with the interval of p.
        closure: The predicted rates of the energies beside those measured over a small
            step of the flow, of the same pairs in order.
        crossings: Resolved pairs that passed the inner edges since the last record.
        values: ``[num_values]``, the leading eigenvalues.
        drift: ``[num_values]``, ``d lambda_i / dt``.
        complete: [] bool, whether no copy of a repeated eigenvalue can be missing among
            the pairs. If not, the energy of such copies is not in their shell. True
            with the dense solver.
        num_columns: Columns that were multiplied by M, those of the small step
            included; 0 with the dense solver.
    """

    finite: jax.Array
    num_resolved: jax.Array
    total_energy: jax.Array
    shells: Shells
    dynamics: ShellDynamics
    velocity_fit: VelocityFit
    closure: ClosureError
    crossings: EdgeCrossings
    values: jax.Array
    drift: jax.Array
    complete: jax.Array
    num_columns: int = 0


def first_state(size: int, dtype: Any, num_pairs: int | None) -> dict[str, Any]:
    """Returns what one record leaves to the next, before the first one.

    Args:
        size: n.
        dtype: That of the error.
        num_pairs: Leading pairs that Lanczos finds; None for the dense solver.

    Returns:
        ``values`` and ``resolved`` of the pairs, and ``basis``: their vectors, which
        save Lanczos products; ``{}`` with the dense solver.
    """
    basis, number = {}, size
    if num_pairs is not None:
        basis, number = {"vectors": jnp.zeros((size, num_pairs), dtype)}, num_pairs
    return {
        "values": jnp.zeros(number, dtype),
        "resolved": jnp.zeros(number, bool),
        "basis": basis,
    }


def measure_instant(
    point: Point,
    earlier: dict[str, Any],
    edges: jax.Array,
    options: Instantaneous,
    *,
    again: bool,
    key: jax.Array,
) -> tuple[dict[str, Any], InstantRecord]:
    """Takes the spectra and puts the record together.

    Args:
        point: The problem at its parameters, with its direction.
        earlier: What the record before left, see `first_state`.
        edges: ``[S + 1]``, the edges of the shells.
        options: How it is measured.
        again: Whether there was a record before.
        key: Consumed.

    Returns:
        What is left to the next record, and the record.
    """
    first_key, later_key, bootstrap_key = jax.random.split(key, 3)
    finder, size = options.finder, len(earlier["values"])
    spectrum = moving_spectrum(
        point, earlier["basis"], finder, warm=again, key=first_key
    )
    basis, num_columns = {}, spectrum.num_columns
    if earlier["basis"]:
        basis = {"vectors": spectrum.pairs.vectors[:, :size]}

    def energies(p: PyTree) -> jax.Array:
        nonlocal num_columns
        still = dataclasses.replace(point, params=p, direction=None)
        same = jax.random.clone(later_key)  # random numbers cancel in a difference
        moved = moving_spectrum(still, basis, finder, warm=True, key=same)
        num_columns += moved.num_columns
        return _order_energies(moved, spectrum, edges)

    small = options.closure_step
    if small is None:
        small = float(_straight_step(spectrum, point.params, point.direction))
        small = max(small, float(jnp.finfo(coarsest_dtype(point.params)).eps))
    measured = central_difference(energies, point.params, point.direction, step=small)
    record = _transport_record(
        spectrum,
        edges,
        (earlier["values"], earlier["resolved"]),
        measured,
        bootstrap_key,
        num_values=min(_NUM_VALUES, size),
        num_bootstrap=options.num_bootstrap,
    )
    left = {
        "values": spectrum.pairs.values[:size],
        "resolved": spectrum.pairs.resolved[:size],
        "basis": basis,
    }
    return left, record._replace(num_columns=int(num_columns))


@jax.jit
def _order_energies(
    moved: MovingSpectrum, spectrum: MovingSpectrum, edges: jax.Array
) -> jax.Array:
    """Sums the energies of ``moved`` over the shells that ``spectrum`` has.

    Eigenvalues of a generic path do not cross, so the i-th of a point nearby continues
    the i-th, whichever side of an edge it has come to lie on.

    Args:
        moved: The spectrum at a point nearby.
        spectrum: The spectrum whose pairs lie in the shells.
        edges: ``[S + 1]``, the edges of the shells.

    Returns:
        ``[S]`` energies.
    """
    energies = _project(moved, moved.error) ** 2
    index = _shells(spectrum.pairs, edges).index[: len(energies)]
    shells = jnp.arange(len(edges) - 1, dtype=jnp.int32)
    return jnp.sum(jnp.where(shells[:, None] == index[None], energies[None], 0), axis=1)


@jax.jit
def _straight_step(
    spectrum: MovingSpectrum, params: PyTree, direction: PyTree
) -> jax.Array:
    """Returns a relative step ``h |d| / |theta|`` within which the flow is straight.

    Over a smaller step the change drowns in the rounding of the eigenvectors; over a
    larger one the flow bends, the sooner the faster the error and M move.

    Args:
        spectrum: Pairs, errors and their motion.
        params: Parameters theta.
        direction: The tangent d.

    Returns:
        [], positive and finite.
    """
    pairs, norm = spectrum.pairs, jnp.linalg.norm
    small = float(jnp.finfo(pairs.values.dtype).eps) ** (1 / 3)
    size, speed = (
        jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
        for tree in (params, direction)
    )
    rates = (
        ratio(speed, size) * (_BEND_ERROR / _BEND_PARAMS),
        ratio(norm(spectrum.error_rate), norm(spectrum.error)),
        ratio(norm(spectrum.coupling), norm(pairs.values)),
    )
    fastest = jnp.max(jnp.stack([rate.astype(pairs.values.dtype) for rate in rates]))
    relative = _BEND_ERROR * small * ratio(ratio(speed, size), fastest)
    usable = jnp.isfinite(relative) & (relative > 0)
    return jnp.where(usable, relative, _BEND_PARAMS * small)


@partial(jax.jit, static_argnames=("num_values", "num_bootstrap"))
def _transport_record(
    spectrum: MovingSpectrum,
    edges: jax.Array,
    earlier: tuple[jax.Array, jax.Array],
    measured_rate: jax.Array,
    key: jax.Array,
    *,
    num_values: int,
    num_bootstrap: int,
) -> InstantRecord:
    """Returns the record of a spectrum.

    Args:
        spectrum: Pairs, errors and their motion.
        edges: ``[S + 1]``, the edges of the shells.
        earlier: Values and resolved mask of the record before, ``[r]`` each.
        measured_rate: ``[S]``, the measured ``dE_a/dt``.
        key: Consumed for the bootstrap of the exponent.
        num_values: Leading eigenvalues to keep.
        num_bootstrap: Resamples of the bootstrap.

    Returns:
        The record, without its cost.
    """
    pairs, error, error_rate = spectrum.pairs, spectrum.error, spectrum.error_rate
    shells = _shells(pairs, edges)
    projections = _project(spectrum, error)
    total_energy = matmul(error, error)
    dynamics = shell_dynamics(
        pairs.values,
        projections,
        spectrum.coupling,
        shells,
        rate_projections=_project(spectrum, error_rate),
        total_energy=total_energy,
        total_dissipation=-2 * matmul(error, error_rate),
    )
    fit = velocity_fit(
        edges[1:-1],
        dynamics.velocity,
        dynamics.velocity_mask,
        num_bootstrap=num_bootstrap,
        key=key,
    )
    # Both are rates: a step of length one that starts from zero energy.
    closure = closure_error(
        dynamics.energy_rate, jnp.zeros_like(measured_rate), measured_rate, 1.0
    )
    before, was_resolved = earlier
    followed = slice(0, len(before))
    largest = jnp.finfo(edges.dtype).max
    crossings = edge_crossings(
        before,
        pairs.values[followed],
        projections[followed],
        edges.at[0].set(-largest).at[-1].set(largest),  # the shells' ends are open
        mask=was_resolved & pairs.resolved[followed],
    )
    crossings = jax.tree.map(lambda counted: counted[1:-1], crossings)
    return InstantRecord(
        finite=dynamics.finite & closure.defined & all_finite((error, error_rate)),
        num_resolved=jnp.sum(pairs.resolved, dtype=jnp.int32),
        total_energy=total_energy,
        shells=shells._replace(index=shells.index[followed]),
        dynamics=dynamics,
        velocity_fit=fit,
        closure=closure,
        crossings=crossings,
        values=pairs.values[:num_values],
        drift=eigenvalue_drift(spectrum.coupling)[:num_values],
        complete=spectrum.complete,
    )


def empty_record(
    edges: jax.Array, *, num_pairs: int, num_bootstrap: int
) -> InstantRecord:
    """Returns the record of parameters that cannot be measured: NaN, and not finite.

    Args:
        edges: ``[S + 1]``, the edges of the shells.
        num_pairs: r.
        num_bootstrap: As in the other records.

    Returns:
        The record, of the shapes and dtypes of any other.
    """
    square = jnp.zeros((num_pairs, num_pairs), edges.dtype)
    column, mask = square[0], jnp.zeros(num_pairs, bool)
    pairs = RitzPairs(column, square, column, mask)
    shapes = _transport_record.eval_shape(
        MovingSpectrum(pairs, square, column, column, 0, jnp.bool_(True)),
        edges,
        (column, mask),
        edges[1:],
        jax.random.key(0),
        num_values=min(_NUM_VALUES, num_pairs),
        num_bootstrap=num_bootstrap,
    )

    def unknown(shape: jax.ShapeDtypeStruct) -> jax.Array:
        floating = jnp.issubdtype(shape.dtype, jnp.floating)
        # From the host: computed, a NaN would stop a run under `jax_debug_nans`.
        numbers = np.full(shape.shape, np.nan if floating else 0, shape.dtype)
        return jax.device_put(numbers)

    blank = jax.tree.map(unknown, shapes)._replace(num_columns=0)
    return blank._replace(shells=blank.shells._replace(edges=edges))


def _shells(pairs: RitzPairs, edges: jax.Array) -> Shells:
    return assign_shells(pairs.values, edges, mask=pairs.resolved, open_ends=True)


def _project(spectrum: MovingSpectrum, vector: jax.Array) -> jax.Array:
    return matmul(spectrum.pairs.vectors.T, vector)
