"""Shells and the coupling between them, against NumPy loops over the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.dynamics import shell_dynamics
from grsd_jax.shells import binning as module
from grsd_jax.shells import toeplitz
from grsd_jax.shells.binning import Shells
from modes import no_nan

log_shells = jax.jit(module.log_shells, static_argnums=1)
toeplitz_residual = jax.jit(toeplitz.toeplitz_residual)
shell_coupling = jax.jit(
    module.shell_coupling, static_argnames=("renormalize", "min_count")
)


def spectrum(size, decades=4.0, seed=0, scale=1.0):
    """Values over some decades, in descending order, with none on a shell edge."""
    logs = np.random.default_rng(seed).uniform(-decades, 0.0, size)
    return np.sort(scale * 10.0**logs)[::-1].astype(np.float32)


def check_consistent(values, shells, num_shells, used):
    """Whatever the input: edges increase, and every used value is between its edges."""
    edges, index = np.asarray(shells.edges), np.asarray(shells.index)
    assert edges.shape == (num_shells + 1,)
    assert np.isfinite(edges).all()
    assert (np.diff(edges) > 0).all()
    assert (shells.centers > edges[:-1]).all()
    assert (shells.centers < edges[1:]).all()
    assert index.dtype == np.int32
    assert shells.counts.dtype == np.int32
    assert (index[~used] == -1).all()
    assert (index[used] >= 0).all()
    assert (edges[index[used]] <= values[used]).all()
    assert (values[used] <= edges[index[used] + 1]).all()
    expected = np.bincount(index[used], minlength=num_shells)
    np.testing.assert_array_equal(shells.counts, expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("num_shells", [1, 7, 40])
def test_shells_have_equal_width_in_log(scale, num_shells):
    values = spectrum(200, scale=scale)
    shells = log_shells(values, num_shells)
    check_consistent(values, shells, num_shells, np.ones(200, bool))
    logs = np.log(np.asarray(shells.edges, np.float64))
    width = np.log(float(values[0]) / float(values[-1])) / num_shells
    np.testing.assert_allclose(np.diff(logs), width, rtol=1e-3)
    geometric = np.exp((logs[1:] + logs[:-1]) / 2)
    np.testing.assert_allclose(shells.centers, geometric, rtol=1e-5)
    # The ends are met exactly, and index 0 is the smallest value.
    assert shells.edges[0] == values[-1]
    assert shells.edges[-1] == values[0]
    assert shells.index[-1] == 0
    assert shells.index[0] == num_shells - 1


@pytest.mark.parametrize("num_shells", [3, 50])
def test_extremes_are_in_the_first_and_last_shell(num_shells):
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = (10.0 ** rng.uniform(-8, 8, 30)).astype(np.float32)
        shells = log_shells(values, num_shells)
        check_consistent(values, shells, num_shells, np.ones(30, bool))
        assert shells.index[np.argmin(values)] == 0
        assert shells.index[np.argmax(values)] == num_shells - 1


def test_matches_a_loop_over_the_definition():
    values = spectrum(50)
    shells = log_shells(values, 6)
    low, high = np.log(values.min()), np.log(values.max())
    width = (high - low) / 6
    for value, got in zip(values, np.asarray(shells.index), strict=True):
        assert got == min(int((np.log(value) - low) / width), 5)


def test_masked_and_unusable_values_are_left_out():
    values = np.array([0.0, -1.0, np.nan, np.inf, 5.0, 1e-3, 1.0, 1e9], np.float32)
    mask = np.array([True] * 7 + [False])
    shells = log_shells(values, 4, mask=mask)
    used = np.array([False] * 4 + [True] * 3 + [False])
    check_consistent(values, shells, 4, used)
    # As if the others had never been there.
    alone = log_shells(values[4:7], 4)
    np.testing.assert_array_equal(shells.edges, alone.edges)
    np.testing.assert_array_equal(shells.index[4:7], alone.index)


@pytest.mark.parametrize("value", [1e-30, 1e-6, 1.0, 1e6, 3e38])
@pytest.mark.parametrize("num_shells", [1, 5])
def test_equal_values_share_one_shell(value, num_shells):
    values = np.full(9, value, np.float32)
    shells = log_shells(values, num_shells)
    check_consistent(values, shells, num_shells, np.ones(9, bool))
    assert shells.counts.max() == 9
    assert shells.edges[-1] / shells.edges[0] < 1 + 1e-3


def test_values_equal_to_rounding_are_kept_together_or_apart_but_never_lost():
    values = np.array([1.0, np.nextafter(np.float32(1), np.float32(2))], np.float32)
    shells = log_shells(values, 5)
    check_consistent(values, shells, 5, np.ones(2, bool))


@pytest.mark.parametrize("size", [0, 6])
def test_everything_masked(size):
    values = np.full(size, 3.0, np.float32)
    shells = log_shells(values, 3, mask=np.zeros(size, bool))
    check_consistent(values, shells, 3, np.zeros(size, bool))
    assert shells.counts.sum() == 0
    result = shell_coupling(
        jnp.ones((size, size), jnp.float32), values, shells, renormalize=True
    )
    assert not result.mask.any()
    assert not result.matrix.any()


def test_float64(x64):
    values = 10.0 ** np.linspace(-200, 200, 41)
    shells = log_shells(values, 10)
    assert shells.edges.dtype == shells.centers.dtype == np.float64
    assert shells.index.dtype == shells.counts.dtype == np.int32
    np.testing.assert_allclose(np.diff(np.log10(shells.edges)), 40.0, rtol=1e-12)


def test_nothing_is_nan_on_the_way():
    values = np.array([-3.0, -1.0, 0.0, 2.0, 2.0], np.float32)
    coupling = jnp.ones((5, 5), jnp.float32)
    with no_nan():
        for mask in (np.ones(5, bool), np.zeros(5, bool)):
            shells = log_shells(values, 3, mask=mask)
            for renormalize in (False, True):
                shell_coupling(coupling, values, shells, renormalize=renormalize)


def oracle_coupling(coupling, values, shells, *, renormalize):
    """The means over pairs of shells, entry by entry, in float64; NaN where empty."""
    index, size = np.asarray(shells.index), shells.counts.shape[0]
    matrix = np.full((size, size), np.nan)
    coupling, values = np.asarray(coupling, np.float64), np.asarray(values, np.float64)
    for a in range(size):
        for b in range(size):
            terms = [
                coupling[i, j] ** 2 / (values[i] * values[j] if renormalize else 1.0)
                for i in np.flatnonzero(index == a)
                for j in np.flatnonzero(index == b)
            ]
            if terms:
                matrix[a, b] = np.mean(terms)
    return matrix


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("renormalize", [False, True])
def test_coupling_is_the_mean_over_pairs_of_shells(renormalize, scale):
    rng = np.random.default_rng(1)
    values = spectrum(40, scale=scale)
    # A gap in the spectrum leaves shells empty; NaN hides in what is masked.
    mask = ~((np.arange(40) > 12) & (np.arange(40) < 25))
    coupling = (scale * rng.standard_normal((40, 40))).astype(np.float32)
    shells = log_shells(values, 9, mask=mask)
    assert (np.asarray(shells.counts) == 0).any()
    expected = oracle_coupling(coupling, values, shells, renormalize=renormalize)
    coupling[~mask] = np.nan
    coupling[:, ~mask] = np.inf
    result = shell_coupling(coupling, values, shells, renormalize=renormalize)
    np.testing.assert_array_equal(result.mask, np.isfinite(expected))
    np.testing.assert_allclose(
        np.asarray(result.matrix)[result.mask], expected[result.mask], rtol=1e-5
    )
    assert (np.asarray(result.matrix)[~result.mask] == 0).all()


def test_shells_with_few_values_are_masked():
    values = np.array([1.0, 1.1, 10.0, 100.0, 101.0, 102.0], np.float32)
    shells = log_shells(values, 3)
    np.testing.assert_array_equal(shells.counts, [2, 1, 3])
    coupling = jnp.ones((6, 6), jnp.float32)
    for min_count, kept in [(1, [1, 1, 1]), (2, [1, 0, 1]), (3, [0, 0, 1])]:
        result = shell_coupling(
            coupling, values, shells, renormalize=False, min_count=min_count
        )
        np.testing.assert_array_equal(result.mask, np.outer(kept, kept).astype(bool))
        np.testing.assert_array_equal(result.matrix, np.outer(kept, kept))


def test_renormalised_coupling_keeps_what_literal_squares_would_lose():
    values = np.full(4, 1e-25, np.float32)
    coupling = jnp.full((4, 4), 1e-25, jnp.float32)  # squares are below the smallest
    shells = log_shells(values, 1)
    result = shell_coupling(coupling, values, shells, renormalize=True)
    np.testing.assert_allclose(result.matrix, 1.0, rtol=1e-5)


def planted_coupling(values, kappa):
    """A coupling with ``|coupling_ij|^2 = lambda_i lambda_j kappa(s_i - s_j)``."""
    logs = np.log(values.astype(np.float64))
    squares = np.outer(values, values) * kappa(logs[:, None] - logs[None, :])
    return np.sqrt(squares).astype(np.float32)


def test_planted_shift_invariance_shows_in_the_renormalised_residual_alone():
    # Evenly spaced in the logarithm, so that every shell sees the same offsets.
    values = np.exp(np.linspace(0, -9, 400)).astype(np.float32)
    coupling = planted_coupling(values, lambda offset: np.exp(-np.abs(offset)))
    shells = log_shells(values, 10)
    renormalised = shell_coupling(coupling, values, shells, renormalize=True)
    literal = shell_coupling(coupling, values, shells, renormalize=False)
    assert toeplitz_residual(*renormalised) < 0.01
    assert toeplitz_residual(*literal) > 0.5


def test_planted_shift_invariance_survives_random_spacing():
    values = spectrum(400, seed=3)
    coupling = planted_coupling(values, lambda offset: 1 / (1 + offset**2))
    shells = log_shells(values, 10)
    renormalised = shell_coupling(coupling, values, shells, renormalize=True)
    literal = shell_coupling(coupling, values, shells, renormalize=False)
    assert toeplitz_residual(*renormalised) < 0.05
    assert toeplitz_residual(*literal) > 0.5


def test_vmap_and_jit_over_checkpoints():
    values = np.stack([spectrum(30, seed=seed) for seed in range(3)])
    mask = values > 1e-3
    coupling = np.random.default_rng(0).standard_normal((3, 30, 30)).astype(np.float32)

    def measure(coupling, values, mask):
        shells = log_shells(values, 5, mask=mask)
        return shells, shell_coupling(coupling, values, shells, renormalize=True)

    together = jax.jit(jax.vmap(measure))(coupling, values, mask)
    for k in range(3):
        alone = measure(coupling[k], values[k], mask[k])
        for got, want in zip(
            jax.tree.leaves(together), jax.tree.leaves(alone), strict=True
        ):
            np.testing.assert_allclose(got[k], want, rtol=1e-5)


@pytest.mark.parametrize("num_shells", [0, -1, 2.0, True])
def test_rejects_num_shells(num_shells):
    with pytest.raises(ValueError, match="num_shells: expected an integer >= 1"):
        log_shells(spectrum(5), num_shells)


def test_rejects_wrong_arrays():
    values = spectrum(5)
    shells = log_shells(values, 2)
    square = jnp.ones((5, 5), jnp.float32)
    with pytest.raises(ValueError, match=r"values: expected shape \[any\]"):
        log_shells(square, 2)
    with pytest.raises(ValueError, match="values: expected a real floating dtype"):
        log_shells(jnp.arange(5), 2)
    with pytest.raises(ValueError, match=r"mask: expected shape \[5\], got \[4\]"):
        log_shells(values, 2, mask=np.ones(4, bool))
    with pytest.raises(ValueError, match="mask: expected a bool dtype, got int32"):
        log_shells(values, 2, mask=np.ones(5, np.int32))
    with pytest.raises(ValueError, match=r"coupling: expected shape \[5, 5\]"):
        shell_coupling(square[:4], values, shells, renormalize=True)
    with pytest.raises(ValueError, match=r"shells.index: expected shape \[3\]"):
        shell_coupling(square[:3, :3], values[:3], shells, renormalize=True)
    with pytest.raises(ValueError, match="renormalize: expected True or False"):
        shell_coupling(square, values, shells, renormalize="yes")
    with pytest.raises(ValueError, match="min_count: expected an integer >= 1"):
        shell_coupling(square, values, shells, renormalize=True, min_count=0)
    with pytest.raises(TypeError):
        shell_coupling(square, values, shells)


def test_fields():
    assert Shells._fields == ("edges", "centers", "index", "counts")


@pytest.mark.not_in_mode("debug_nans")
def test_values_are_put_into_given_shells():
    values = jnp.asarray([0.5, 1.0, 1.9, 2.0, 4.0, 5.0, jnp.nan])
    edges = jnp.asarray([1.0, 2.0, 4.0])
    mask = jnp.asarray([True, True, False, True, True, True, True])
    closed = module.assign_shells(values, edges, mask=mask)
    np.testing.assert_array_equal(closed.index, [-1, 0, -1, 1, 1, -1, -1])
    np.testing.assert_array_equal(closed.counts, [1, 2])
    opened = module.assign_shells(values, edges, mask=mask, open_ends=True)
    np.testing.assert_array_equal(opened.index, [0, 0, -1, 1, 1, 1, -1])
    np.testing.assert_array_equal(opened.edges, edges)


def test_values_lie_in_their_own_shells():
    values = jnp.asarray(np.geomspace(0.3, 7, 25), jnp.float32)
    shells = module.log_shells(values, 6)
    again = module.assign_shells(values, shells.edges)
    for got, want in zip(again, shells, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.not_in_mode("debug_nans")
@pytest.mark.parametrize(
    "edges",
    [[1.0, 50, 10, 100], [1, np.nan, 100], [100, 10, 1], [-1, 10, 100], [1e-50, 1, 9]],
)
def test_edges_that_cut_no_shells_hold_no_value(edges):
    values = jnp.asarray([3.0, 30.0], jnp.float32)
    edges = np.asarray(edges, np.float64)
    for known in (edges, edges.astype(np.float32)):
        with pytest.raises(ValueError, match="edges: expected positive, increasing"):
            module.assign_shells(values, known, open_ends=True)
    found = jax.jit(lambda e: module.assign_shells(values, e, open_ends=True))(edges)
    np.testing.assert_array_equal(found.index, [-1, -1])
    assert not found.counts.any()


@pytest.mark.parametrize("open_ends", [False, True])
def test_shells_of_other_values_are_refused(open_ends):
    values = jnp.asarray([1.0, 3.0, 10.0, 30.0])
    edges = np.asarray([2.0, 5.0, 20.0], np.float32)
    moved = values.at[1].set(6.0)
    shells = module.assign_shells(values, edges, open_ends=open_ends)
    assert int(shells.index[1]) != np.digitize(moved[1], edges) - 1
    module.check_shells_of(values, shells)
    coupling = jnp.eye(4)
    for refused in (
        lambda: module.shell_coupling(coupling, moved, shells, renormalize=False),
        lambda: shell_dynamics(moved, values, coupling, shells, loss_constant=1.0),
    ):
        with pytest.raises(ValueError, match=r"^shells: expected those .* values\[1\]"):
            refused()


def test_given_shells_that_do_not_fit_are_named():
    values = jnp.ones(3)
    with pytest.raises(ValueError, match=r"len\(edges\): expected an integer >= 2"):
        module.assign_shells(values, jnp.ones(1))
    with pytest.raises(ValueError, match="open_ends: expected True or False"):
        module.assign_shells(values, jnp.asarray([1.0, 2.0]), open_ends=1)
