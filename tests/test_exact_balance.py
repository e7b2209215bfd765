"""The exact balance of two spectra: by its definition, closed forms, limits, symmetry.

Closure is an identity and would hold for wrong numbers too, so that every quantity is
compared with matrices formed by NumPy in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grsd_jax.dynamics import (
    SpectralSnapshot,
    exact_balance,
    shell_dynamics,
)
from grsd_jax.dynamics.spectra import pair_snapshots
from grsd_jax.dynamics.transport import balance_spectra
from grsd_jax.experiments.track.log import balance_line
from grsd_jax.shells import SoftShells, assign_shells
from modes import no_nan
from oracles import symmetric_with_spectrum

EDGES = np.geomspace(1e-2, 3, 4)


def snapshot(values, vectors, error, dtype=jnp.float64):
    """Returns a snapshot; pairs in any order."""
    order = np.argsort(-np.asarray(values))
    parts = (np.asarray(values)[order], np.asarray(vectors)[:, order], error)
    parts = (jnp.asarray(part, dtype) for part in parts)
    eps = jnp.asarray(jnp.finfo(dtype).eps, dtype)
    rest = jnp.zeros(2, jnp.uint32), eps, jnp.bool_(True)
    return SpectralSnapshot(*parts, *rest)


def snapshot_of(matrix, error, dtype=jnp.float64, rank=None):
    values, vectors = np.linalg.eigh(matrix)
    first = 0 if rank is None else len(values) - rank
    return snapshot(values[first:], vectors[:, first:], error, dtype)


def balance(before, after, edges=EDGES, *, width=0.5, elapsed=1.0):
    shells = SoftShells(jnp.asarray(edges, before.values.dtype), width=width)
    return exact_balance(before, after, shells, elapsed=elapsed)


def random_end(seed, size=12):
    rng = np.random.default_rng(seed)
    matrix, _ = symmetric_with_spectrum(np.geomspace(1e-4, 5, size), seed)
    return matrix, rng.normal(size=size)


def functions(end, edges, width):
    """Returns ``up_k(M)`` and ``d up_k / d log lambda (M)``, the rest below all."""
    values, vectors = (np.asarray(part, np.float64) for part in end[:2])
    ratios = np.maximum(values, 1e-60)[:, None] / edges
    up = 1 / (1 + ratios ** (-1 / width)) if width else (ratios >= 1).astype(float)
    window = up * (1 - up) / (width or 1)
    as_matrices = lambda f: np.einsum("ir,rk,jr->kij", vectors, f, vectors)  # noqa: E731
    return as_matrices(up), as_matrices(window)


def turned(before, after, error, edges, width):
    """Returns half of the energy that turning vectors carry, in the old shells."""
    values, old = (np.asarray(part, np.float64) for part in before[:2])
    new = np.asarray(after.vectors, np.float64)
    ratios = np.maximum(values, 1e-60)[:, None] / edges
    up = 1 / (1 + ratios ** (-1 / width)) if width else (ratios >= 1).astype(float)
    return up.T @ ((new.T @ error) ** 2 - (old.T @ error) ** 2) / 2


def by_definition(before, after, edges, width):
    """Returns all amounts from matrices, by the formulas of the theory.

    The rotation is among them if both ends have as many pairs, which are matched.
    """
    errors = [np.asarray(end.error, np.float64) for end in (before, after)]
    ups, windows = zip(
        *(functions(end, edges, width) for end in (before, after)), strict=True
    )
    size = len(errors[0])
    whole, none = np.eye(size)[None], np.zeros((1, size, size))
    shells = [-np.diff(np.concatenate([whole, up, none]), axis=0) for up in ups]
    quadratic = lambda e, matrices: np.einsum("i,kij,j->k", e, matrices, e)  # noqa: E731
    mean, change = sum(errors) / 2, errors[1] - errors[0]
    lost = -np.einsum("i,kij,j->k", mean, shells[0] + shells[1], change)
    joint = sum(
        np.einsum("bi,ai->ba", shells[0] @ error, shells[1] @ error) for error in errors
    )
    found = {
        "energies": np.stack([quadratic(errors[s], shells[s]) for s in (0, 1)]),
        "lost": lost,
        "moved": (joint.T - joint) / 2,
        "flux": sum(quadratic(e, ups[1] - ups[0]) for e in errors) / 2,
        "density": sum(quadratic(e, w) for e in errors for w in windows) / 4,
    }
    if before.vectors.shape == after.vectors.shape:
        parts = [turned(before, after, error, edges, width) for error in errors]
        found["rotation"] = sum(parts)
    return found


def assert_balance(found, expected, rtol=1e-11, sharp=False):
    size = np.sum(expected["energies"])
    for name, value in expected.items():
        if not (sharp and name == "density"):
            np.testing.assert_allclose(
                getattr(found, name), value, rtol=rtol, atol=rtol * size, err_msg=name
            )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rank", [None, 7])
@pytest.mark.parametrize("width", [1 / 2, 1 / 3, 0])
def test_amounts_are_their_definitions(width, rank):
    (first, e0), (second, e1) = random_end(0), random_end(1)
    ends = snapshot_of(first, e0, rank=rank), snapshot_of(second, e1, rank=rank)
    expected = by_definition(*ends, EDGES, width)
    assert_balance(balance(*ends, width=width), expected, sharp=width == 0)


@st.composite
def edges_and_spectra(draw):
    """Draws edges, some close together, and two spectra.

    Their eigenvalues are zero, tiny, in clusters, on edges or barely beside them, so
    that clusters lie across edges.
    """
    first = draw(st.floats(1e-3, 1e-1))
    ratios = st.floats(1.001, 20)
    edges = first * np.cumprod([1, *(draw(ratios) for _ in range(3))])
    beside = [edge * by for edge in edges for by in (1 - 1e-7, 1, 1 + 1e-7)]
    places = st.sampled_from([0.0, 1e-6, 0.05, 0.0500001, 0.7, 9.0])
    place = st.sampled_from(beside) | places | st.floats(1e-5, 1e2)
    spectra = st.lists(place, min_size=9, max_size=9)
    return edges, (np.sort(draw(spectra)), np.sort(draw(spectra)))


@settings(deadline=None, max_examples=25)
@given(
    edges_and_spectra(),
    st.sampled_from([(9, 9), (5, 5), (9, 4), (5, 7)]),
    st.sampled_from([0, 1 / 3, 1 / 2]),
    st.integers(0, 2**31),
)
def test_identity_holds_for_any_spectrum(drawn, ranks, width, seed):
    edges, spectra = drawn
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        ends = []
        for values, rank in zip(spectra, ranks, strict=True):
            basis, _ = np.linalg.qr(rng.normal(size=(9, 9)))
            end = snapshot(values[-rank:], basis[:, :rank], rng.normal(size=9))
            ends.append(end)
        found = balance(*ends, edges, width=width)
        before, after = np.asarray(found.energies)
        closes = after - before + found.lost - np.sum(found.moved, axis=1)
        np.testing.assert_allclose(closes, 0, atol=1e-12)
        np.testing.assert_array_equal(found.moved, -found.moved.T)
        e0, e1 = (np.asarray(end.error) for end in ends)
        np.testing.assert_allclose(np.sum(before), e0 @ e0, rtol=1e-12)
        np.testing.assert_allclose(np.sum(found.lost), e0 @ e0 - e1 @ e1, atol=1e-12)
        for edge, flux in enumerate(found.flux):
            crossed = np.sum(found.moved[edge + 1 :, : edge + 1])
            np.testing.assert_allclose(flux, crossed, atol=1e-12)
        expected = by_definition(*ends, edges, width)
        assert (found.rotation is None) == ("rotation" not in expected)
        assert_balance(found, expected, sharp=width == 0)


@pytest.mark.usefixtures("x64")
def test_signs_and_rotations_inside_a_shell_change_nothing():
    (first, e0), (second, e1) = random_end(2), random_end(3)
    before, after = snapshot_of(first, e0), snapshot_of(second, e1)
    index = np.searchsorted(EDGES, after.values)
    turned = np.array(after.vectors)
    for shell in np.unique(index):
        inside = np.flatnonzero(index == shell)
        basis, _ = np.linalg.qr(np.random.default_rng(4).normal(size=[len(inside)] * 2))
        turned[:, inside] = -turned[:, inside] @ basis
    found = balance(before, after, width=0)
    again = balance(before, after._replace(vectors=jnp.asarray(turned)), width=0)
    for name in ("energies", "lost", "moved", "flux", "density"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(again, name), atol=1e-12, err_msg=name
        )
    flipped = after._replace(vectors=-after.vectors)
    for name in ("moved", "flux", "rotation", "growth"):
        found_one = getattr(balance(before, after), name)
        found_two = getattr(balance(before, flipped), name)
        np.testing.assert_allclose(found_one, found_two, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_two_turning_modes_have_their_closed_form():
    # M turns by an angle, e stays: F = cos^2(a - turn) - cos^2(a) for a sharp edge.
    values, angle, turn = np.array([4.0, 1.0]), 0.4, 0.15

    def end(by):
        vectors = np.array([[np.cos(by), -np.sin(by)], [np.sin(by), np.cos(by)]])
        return snapshot(values, vectors, np.array([np.cos(angle), np.sin(angle)]))

    expected = np.cos(angle - turn) ** 2 - np.cos(angle) ** 2
    found = balance(end(0), end(turn), [2.0], width=0)
    np.testing.assert_allclose(found.flux, expected, rtol=1e-12)
    np.testing.assert_allclose(found.moved[1, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(found.lost, 0, atol=1e-15)
    np.testing.assert_allclose(found.rotation, expected, rtol=1e-12)
    # Soft at the geometric mean: up = 4/5 and 1/5 with w = 1/2, so 3/5 of it passes.
    soft = balance(end(0), end(turn), [2.0])
    np.testing.assert_allclose(soft.flux, 0.6 * expected, rtol=1e-12)
    np.testing.assert_allclose(soft.drift, 0, atol=1e-14)
    np.testing.assert_allclose(soft.counting_velocity, 0, atol=1e-14)
    np.testing.assert_allclose(soft.excess_velocity, soft.velocity, atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("growth", [1e-4, 3.0, -8.0])
def test_a_kernel_that_only_grows_has_one_shift_and_no_excess(growth):
    matrix, error = random_end(5)
    before, after = (
        snapshot_of(np.exp(u) * matrix, e)
        for u, e in ((0, error), (growth, 0.7 * error + 0.1))
    )
    found = balance(before, after, elapsed=2.0)
    np.testing.assert_allclose(found.growth, growth, rtol=1e-6)
    np.testing.assert_allclose(found.shift_velocity, growth / 2, rtol=1e-6)
    np.testing.assert_allclose(found.rotation, 0, atol=1e-11)
    if growth == 1e-4:
        np.testing.assert_allclose(found.velocity, growth / 2, rtol=1e-6)
        np.testing.assert_allclose(found.excess_velocity, 0, atol=1e-10)


def test_growth_is_off_by_the_error_of_the_flux_over_the_density_there():
    matrix, error = random_end(5)
    before, after = (
        snapshot_of(np.exp(u) * matrix, error, jnp.float32) for u in (0, 0.7)
    )
    found = balance(before, after, elapsed=2.0)
    density = np.einsum("i,kij,j->k", error, functions(after, EDGES, 0.5)[1], error)
    expected = found.flux_error / density
    np.testing.assert_allclose(found.growth_error, expected, rtol=0.05)
    np.testing.assert_allclose(found.shift_velocity_error, expected / 2, rtol=0.05)
    assert np.all(np.abs(found.growth - 0.7) <= found.growth_error)
    # An edge above nearly all energy: no growth is sure to reach it.
    steep = snapshot_of(matrix, 1e-6 * error, jnp.float32)
    far = balance(before, steep, [*EDGES, 1e12])
    assert np.isnan(far.growth_error[-1]) or np.isinf(far.growth_error[-1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("width", [0, 1 / 2])
def test_small_steps_have_the_rates_of_the_flow_to_first_order(width):
    matrix, error = random_end(6)
    rng = np.random.default_rng(7)
    moved, rate = rng.normal(size=matrix.shape), rng.normal(size=len(error))
    moved = (moved + moved.T) * 0.02
    before = snapshot_of(matrix, error)
    values, vectors = np.asarray(before.values), np.asarray(before.vectors)
    coupling, g = vectors.T @ moved @ vectors, vectors.T @ error
    if width:
        moving = soft_transfers(values, g, coupling, width)
    else:
        shells = assign_shells(before.values, jnp.asarray([1e-9, *EDGES, 1e9]))
        flow = shell_dynamics(
            before.values,
            jnp.asarray(g),
            jnp.asarray(coupling),
            shells,
            rate_projections=jnp.asarray(vectors.T @ rate),
        )
        moving, lost = flow.transfers, flow.dissipation

    def off(h):
        after = snapshot_of(matrix + h * moved, error + h * rate)
        found = balance(before, after, width=width)
        if not width:
            np.testing.assert_allclose(found.lost / h, lost, rtol=1e-3, atol=2e-3)
        return np.max(np.abs(found.moved / h - moving)) / np.max(np.abs(moving))

    coarse, fine = off(4e-7), off(1e-7)
    assert fine < 2e-2
    assert coarse == pytest.approx(4 * fine, rel=0.2)


def soft_transfers(values, g, coupling, width):
    """Returns the limit of ``T_ab / h`` for soft shells."""
    shells = SoftShells(jnp.asarray(EDGES), width=width).checked(jnp.float64)
    f = np.asarray(shells.members(jnp.asarray(values)))
    windows = np.asarray(shells.windows(jnp.asarray(values)))
    slopes = -np.diff(np.pad(windows, ((0, 0), (1, 1))), axis=1) / values[:, None]
    gaps = values[:, None] - values[None, :] + np.eye(len(values))
    turning = 2 * g[:, None] * g[None, :] * coupling / gaps
    np.fill_diagonal(turning, 0)
    growing = g**2 * np.diag(coupling)
    drift = np.einsum("i,ia,ib->ab", growing, slopes, f)
    return f.T @ turning @ f + drift - drift.T


def test_errors_close_to_each_other_lose_what_they_lose():
    (first, e0), (second, _) = random_end(8), random_end(9)
    change = np.float32(1e-4) * np.random.default_rng(0).normal(size=len(e0))
    e0 = np.asarray(e0, np.float32)
    e1 = np.asarray(e0 + change, np.float32)
    with jax.enable_x64(True):
        wide = [snapshot_of(first, e0), snapshot_of(second, e1)]
        expected = balance(*wide).lost
    found = balance(*(snapshot(*end[:3], jnp.float32) for end in wide))
    # The difference of energies would leave no more than three digits.
    np.testing.assert_allclose(found.lost, expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-15, 1e-12, 1e15])
def test_balance_follows_the_scales_of_kernel_and_error(scale):
    (first, e0), (second, e1) = random_end(10), random_end(11)
    ends = [snapshot_of(m, e, jnp.float32) for m, e in ((first, e0), (second, e1))]
    kernels = [end._replace(values=end.values * scale) for end in ends]
    errors = [end._replace(error=end.error * scale) for end in ends]
    found = balance(*ends)
    for other, unit in (
        (balance(*kernels, EDGES * scale), 1),
        (balance(*errors), scale**2),
    ):
        for name in ("energies", "lost", "moved", "flux", "density", "rotation"):
            value = np.asarray(getattr(other, name), np.float64) / unit
            expected = np.asarray(getattr(found, name))
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=2e-4)
        for name in ("flux_error", "lost_error", "moved_error", "velocity_error"):
            rate = unit if name != "velocity_error" else 1
            value = np.asarray(getattr(other, name), np.float64) / rate
            np.testing.assert_allclose(value, getattr(found, name), rtol=1e-3)
        np.testing.assert_allclose(other.velocity, found.velocity, rtol=1e-4)
        np.testing.assert_allclose(other.growth, found.growth, rtol=1e-4)
        np.testing.assert_allclose(other.growth_error, found.growth_error, rtol=1e-2)
        assert other.finite
        assert other.in_range


@pytest.mark.parametrize("scale", [1e-25, 1e-21, 1e-18, 1e21])
def test_amounts_that_the_dtype_cannot_hold_are_undefined_and_told(scale):
    points = [random_end(seed) for seed in (10, 11)]
    ends = [snapshot_of(matrix, error, jnp.float32) for matrix, error in points]
    far = [end._replace(error=end.error * scale) for end in ends]
    whole, found = balance(*ends), balance(*far)
    assert whole.in_range
    assert not found.in_range
    assert found.finite  # the error is
    for name in ("energies", "lost", "moved", "flux", "rotation", "density", "floor"):
        assert np.all(np.isnan(getattr(found, name))), name
    for name in ("flux_error", "velocity", "excess_velocity", "velocity_error"):
        assert np.all(np.isnan(getattr(found, name))), name
    assert np.isnan(found.non_adjacent_share)
    assert not np.any(found.velocity_mask)
    np.testing.assert_allclose(found.growth, whole.growth, rtol=1e-4)
    assert "n/a" in str(found)
    assert "OUT OF THE RANGE" in str(found)
    line = balance_line(found)
    assert not line["in_range"]
    assert np.all(np.isnan(line["flux"]))
    nothing = [end._replace(error=0 * end.error) for end in ends]
    assert balance(*nothing).in_range  # zero is no error that was lost


def test_what_the_dtype_cannot_hold_makes_no_nan_in_programs():
    @jax.jit
    def inside(before, after, scale):
        ends = (end._replace(error=scale * end.error) for end in (before, after))
        found = balance(*ends)
        return found.in_range, found.velocity_mask, found.velocity, found.flux_error

    ends = [snapshot_of(*random_end(seed), jnp.float32) for seed in (10, 11)]
    with no_nan():
        for scale in (1e-21, 1e21):
            in_range, mask, *_ = inside(*ends, scale)
            assert not in_range
            assert not np.any(mask)


@pytest.mark.usefixtures("x64")
def test_edges_that_hold_nothing_are_masked():
    values = np.array([1e-3, 1.0, 1.1])
    _, basis = symmetric_with_spectrum(values)
    before = snapshot(values, basis, basis @ np.array([0.0, 1.0, 1.0]))
    after = snapshot(1.01 * values, basis, basis @ np.array([0.0, 0.9, 1.0]))
    found = balance(before, after, [1e-3, 1.0, 1e4])
    np.testing.assert_array_equal(found.velocity_mask, [False, True, False])
    np.testing.assert_allclose(found.velocity[1], np.log(1.01), rtol=1e-2)
    # No growth of the old kernel lifts an error that lies in its null space.
    null = snapshot(np.array([0.0, 0.0, 1.0]), basis, basis @ np.array([1.0, 1.0, 0]))
    assert np.isnan(balance(null, after, [1e-3, 1.0]).growth[0])
    sharp = balance(before, after, [1e-6, 1e-5, 1e-4], width=0)
    assert not np.any(sharp.velocity_mask)
    assert np.isnan(sharp.effective_edges[1])
    assert np.all(np.isnan(sharp.velocity))
    np.testing.assert_allclose(sharp.flux, 0, atol=1e-15)


def test_what_is_undefined_is_infinite_in_programs_and_nan_outside():
    before, after = (snapshot_of(*random_end(seed), jnp.float32) for seed in (0, 1))
    empty = np.array([1e-2, 1e-1, 1e6, 1e7])  # nothing near the upper two
    names = ("velocity", "excess_velocity", "counting_velocity", "non_adjacent_share")

    @jax.jit
    def inside(before, after):
        found = balance(before, after, empty, width=0)
        return [getattr(found, name) for name in names]

    with no_nan():
        programs = inside(before, after)
    found = balance(before, after, empty, width=0)
    for name, program in zip(names, programs, strict=True):
        outside = np.asarray(getattr(found, name))
        np.testing.assert_array_equal(np.isinf(program), np.isnan(outside))
        np.testing.assert_allclose(
            np.where(np.isinf(program), np.nan, program), outside, rtol=1e-4
        )
    assert np.isinf(programs[0]).sum() >= 2


@pytest.mark.usefixtures("x64")
def test_non_adjacent_share_is_defined_for_wide_shells_alone():
    (first, e0), (second, e1) = random_end(12), random_end(13)
    ends = snapshot_of(first, e0), snapshot_of(second, e1)
    sizes = np.abs(balance(*ends, width=0).moved)
    far = np.abs(np.subtract.outer(np.arange(5), np.arange(5))) > 1
    share = np.sum(sizes[far]) / np.sum(sizes)
    np.testing.assert_allclose(balance(*ends, width=0).non_adjacent_share, share)
    assert np.isnan(balance(*ends, width=0.5).non_adjacent_share)
    assert np.isfinite(balance(*ends, width=0.1).non_adjacent_share)
    assert np.isnan(balance(ends[0], ends[0], width=0).non_adjacent_share)


@pytest.mark.usefixtures("x64")
def test_an_edge_counts_only_if_all_above_it_agree():
    (first, e0), (second, e1) = random_end(16), random_end(17)
    ends = snapshot_of(first, e0), snapshot_of(second, e1)
    (pairing,) = pair_snapshots(*ends)
    values = np.array(pairing.after.values)
    middle = np.flatnonzero(values > EDGES[2])[-1]
    values[middle] = 0.99 * EDGES[2]  # the coarser spectrum has it below the edge
    coarser = pairing._replace(after=pairing.after._replace(values=jnp.asarray(values)))
    shells = SoftShells(jnp.asarray(EDGES), width=0).checked(jnp.float64)
    found = balance_spectra([pairing, coarser], shells, matched=True)
    apart = balance_spectra([coarser], shells, matched=True).flux - found.flux
    assert np.flatnonzero(np.abs(apart) > 1e-12) == [2]
    np.testing.assert_array_equal(found.converged, [False, False, False, True])
    np.testing.assert_array_equal(np.isinf(found.flux_error), ~found.converged)
    np.testing.assert_array_equal(
        np.isinf(found.lost_error), [True, True, True, True, False]
    )
    assert not np.any(found.velocity_mask[:3])


def test_runs_are_mapped_over():
    ends = [
        [snapshot_of(*random_end(20 + 2 * run + s), jnp.float32) for s in (0, 1)]
        for run in range(3)
    ]
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    before, after = (jax.tree.map(stack, *side) for side in zip(*ends, strict=True))
    together = jax.jit(jax.vmap(balance))(before, after)
    assert together.velocity.shape == (3, 4)
    for run, pair in enumerate(ends):
        alone = balance(*pair)
        for name in ("lost", "moved", "flux", "growth"):
            np.testing.assert_allclose(
                getattr(together, name)[run], getattr(alone, name), rtol=1e-3, atol=1e-5
            )
        np.testing.assert_array_equal(together.velocity_mask[run], alone.velocity_mask)


def test_numbers_that_are_not_finite_are_told():
    ends = [snapshot_of(*random_end(seed), jnp.float32) for seed in (14, 15)]
    for name, place in (("error", 3), ("values", 2), ("vectors", (2, 2))):
        spoilt = getattr(ends[1], name).at[place].set(jnp.nan)
        found = balance(ends[0], ends[1]._replace(**{name: spoilt}))
        assert not found.finite
        assert not np.any(found.velocity_mask)
    assert balance(*ends).finite
