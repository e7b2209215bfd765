"""Toeplitz residuals, against loops over the diagonals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.shells import centre_toeplitz_residual
from grsd_jax.shells import toeplitz as module
from modes import no_nan

toeplitz_approximation = jax.jit(module.toeplitz_approximation)
toeplitz_degrees_of_freedom = jax.jit(module.toeplitz_degrees_of_freedom)
toeplitz_residual = jax.jit(module.toeplitz_residual)
windowed_toeplitz_degrees_of_freedom = jax.jit(
    module.windowed_toeplitz_degrees_of_freedom, static_argnums=1
)
windowed_toeplitz_residual = jax.jit(
    module.windowed_toeplitz_residual, static_argnums=1
)


def random_matrix(size, seed=0):
    return np.random.default_rng(seed).standard_normal((size, size)).astype(np.float32)


def random_mask(size, seed=0, share=0.7):
    return np.random.default_rng(seed + 100).uniform(size=(size, size)) < share


def toeplitz(size, seed=0):
    diagonals = np.random.default_rng(seed).standard_normal(2 * size - 1)
    return np.array(
        [[diagonals[j - i + size - 1] for j in range(size)] for i in range(size)],
        np.float32,
    )


def oracle_approximation(matrix, mask):
    size = matrix.shape[0]
    result = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            on_diagonal = [
                float(matrix[k, k + j - i])
                for k in range(size)
                if 0 <= k + j - i < size and mask[k, k + j - i]
            ]
            result[i, j] = np.mean(on_diagonal) if on_diagonal else 0.0
    return result


def oracle_residual(matrix, mask):
    rest = (matrix - oracle_approximation(matrix, mask))[mask]
    return np.linalg.norm(rest) / np.linalg.norm(matrix[mask].astype(np.float64))


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.2])
def test_matches_a_loop_over_the_diagonals(size, share):
    matrix, mask = random_matrix(size), random_mask(size, share=share)
    mask[0, 0] = True
    np.testing.assert_allclose(
        toeplitz_approximation(matrix, mask),
        oracle_approximation(matrix, mask),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        toeplitz_residual(matrix, mask), oracle_residual(matrix, mask), atol=1e-6
    )


def test_no_mask_is_a_full_mask():
    matrix, mask = random_matrix(6), np.ones((6, 6), bool)
    assert toeplitz_residual(matrix) == toeplitz_residual(matrix, mask)
    np.testing.assert_array_equal(
        toeplitz_approximation(matrix), toeplitz_approximation(matrix, mask)
    )
    np.testing.assert_array_equal(
        windowed_toeplitz_residual(matrix, 3),
        windowed_toeplitz_residual(matrix, 3, mask),
    )


@pytest.mark.parametrize("size", [1, 6, 30])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_residual_of_a_toeplitz_matrix_is_zero(size, scale):
    matrix = toeplitz(size) * np.float32(scale)
    np.testing.assert_allclose(toeplitz_approximation(matrix), matrix, rtol=1e-5)
    assert toeplitz_residual(matrix) < 1e-6
    assert (
        toeplitz_residual(matrix, random_mask(size) | np.eye(size, dtype=bool)) < 1e-6
    )


def test_the_approximation_is_a_projection():
    # Idempotent, and the rest is orthogonal to every Toeplitz matrix: the nearest one.
    matrix, mask = random_matrix(6), random_mask(6)
    nearest = np.asarray(toeplitz_approximation(matrix, mask))
    again = toeplitz_approximation(nearest, mask)
    np.testing.assert_allclose(
        np.where(mask, again, 0), np.where(mask, nearest, 0), atol=1e-6
    )
    rest = np.where(mask, matrix - nearest, 0)
    for seed in range(3):
        assert abs(np.sum(rest * toeplitz(6, seed))) < 1e-4


@pytest.mark.parametrize("power", [-98, -20, 20, 98])
def test_residual_is_scale_invariant_to_the_last_bit(power):
    matrix = random_matrix(6)
    scaled = np.ldexp(matrix, power)
    assert toeplitz_residual(scaled) == toeplitz_residual(matrix)
    np.testing.assert_array_equal(
        windowed_toeplitz_residual(scaled, 4), windowed_toeplitz_residual(matrix, 4)
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30, -3.0])
def test_residual_is_scale_invariant(scale):
    matrix = random_matrix(6)
    np.testing.assert_allclose(
        toeplitz_residual(matrix * np.float32(scale)),
        toeplitz_residual(matrix),
        rtol=1e-6,
    )


def test_known_value():
    # Diagonal (1, -1): mean 0, nothing is left.
    assert toeplitz_residual(np.diag(np.float32([1, -1]))) == 1.0
    # Diagonal (1, 3): mean 2, the rest is sqrt(2) of sqrt(10).
    np.testing.assert_allclose(
        toeplitz_residual(np.diag(np.float32([1, 3]))), np.sqrt(0.2), rtol=1e-6
    )


def test_zero_and_empty():
    zero = np.zeros((4, 4), np.float32)
    nothing = np.zeros((4, 4), bool)
    for case in ((zero,), (random_matrix(4), nothing)):
        # Nothing is not a Toeplitz matrix found.
        assert np.isnan(module.toeplitz_residual(*case))
        assert np.isposinf(toeplitz_residual(*case))
    assert not toeplitz_approximation(random_matrix(4), nothing).any()
    with no_nan():
        toeplitz_residual(zero + 1, ~nothing)
        toeplitz_residual(random_matrix(4), np.eye(4, dtype=bool))


@pytest.mark.parametrize("hidden", [np.nan, np.inf, 1e38])
def test_masked_entries_have_no_effect(hidden):
    matrix, mask = random_matrix(6), random_mask(6)
    spoiled = np.where(mask, matrix, np.float32(hidden))
    for fn in (
        toeplitz_approximation,
        toeplitz_residual,
        lambda a, m: windowed_toeplitz_residual(a, 3, m),
    ):
        np.testing.assert_array_equal(fn(spoiled, mask), fn(matrix, mask))


@pytest.mark.parametrize("window", [1, 2, 9])
def test_windows_are_the_residuals_of_the_blocks(window):
    matrix, mask = random_matrix(9), random_mask(9)
    mask[3:6, 3:6] = False
    windows = windowed_toeplitz_residual(matrix, window, mask)
    freedoms = windowed_toeplitz_degrees_of_freedom(mask, window)
    assert windows.shape == freedoms.shape == (9 - window + 1,)
    for start in range(9 - window + 1):
        block = (slice(start, start + window),) * 2
        want = toeplitz_residual(matrix[block], mask[block])
        np.testing.assert_allclose(windows[start], want, rtol=1e-6)
        assert freedoms[start] == toeplitz_degrees_of_freedom(mask[block])
    outside = module.windowed_toeplitz_residual(matrix, window, mask)
    np.testing.assert_array_equal(np.isnan(outside), np.isinf(windows))
    if window == 2:
        assert np.isposinf(windows[3])


@pytest.mark.not_in_mode("x64")
def test_degrees_of_freedom_count_entries_less_diagonals():
    for share in (0.0, 0.1, 0.6, 1.0):
        mask = random_mask(7, share=share)
        diagonals = {(j - i) for i, j in zip(*np.nonzero(mask), strict=True)}
        freedom = toeplitz_degrees_of_freedom(mask)
        assert freedom == mask.sum() - len(diagonals)
        assert freedom.dtype == np.int32


def test_no_degrees_of_freedom_means_a_residual_of_zero():
    mask = np.zeros((5, 5), bool)
    mask[0] = mask[:, 0] = True  # one entry on every diagonal
    assert toeplitz_degrees_of_freedom(mask) == 0
    assert toeplitz_residual(random_matrix(5), mask) == 0
    mask[1, 1] = True
    assert toeplitz_degrees_of_freedom(mask) == 1
    assert toeplitz_residual(random_matrix(5), mask) > 0


def test_gradient_matches_differences_and_is_finite_at_zero(x64):
    matrix, mask = random_matrix(6).astype(np.float64), random_mask(6)
    grad = jax.jit(jax.grad(module.toeplitz_residual))
    gradient = grad(matrix, mask)
    step = random_matrix(6, seed=1).astype(np.float64)
    ahead, behind = (toeplitz_residual(matrix + h * step, mask) for h in (1e-6, -1e-6))
    np.testing.assert_allclose(
        np.sum(gradient * step), (ahead - behind) / 2e-6, rtol=1e-6
    )
    for flat in (jnp.zeros((6, 6)), jnp.ones((6, 6))):
        assert not grad(flat, mask).any()


def test_float64(x64):
    residual = toeplitz_residual(toeplitz(9).astype(np.float64))
    assert residual.dtype == np.float64
    assert residual < 1e-14


def test_vmap_jit_and_one_trace():
    matrices = np.stack([random_matrix(6, seed) for seed in range(4)])
    masks = np.stack([random_mask(6, seed) for seed in range(4)])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def measure(matrices, masks):
        windows = jax.vmap(lambda a, m: windowed_toeplitz_residual(a, 3, m))
        return jax.vmap(toeplitz_residual)(matrices, masks), windows(matrices, masks)

    for _ in range(2):
        residuals, windows = measure(matrices, masks)
    for k in range(4):
        want = toeplitz_residual(matrices[k], masks[k])
        np.testing.assert_allclose(residuals[k], want, rtol=1e-5, atol=1e-6)
        want = windowed_toeplitz_residual(matrices[k], 3, masks[k])
        np.testing.assert_allclose(windows[k], want, rtol=1e-5, atol=1e-6)


def test_the_centre_is_that_of_the_defined_windows():
    windows = np.float32([0.9, 0.25, 0.5, 0.125, 0.75, 0.625])
    assert centre_toeplitz_residual(windows) == (0.5 + 0.125) / 2
    assert centre_toeplitz_residual(windows, np.ones(6, np.int32)) == 0.3125
    assert centre_toeplitz_residual(windows, np.int32([3, 1, 0, 2, 1, 1])) == 0.125
    assert centre_toeplitz_residual(windows, np.int32([3, 1, 0, 0, 1, 1])) == 0.5
    windows[3] = np.nan
    assert centre_toeplitz_residual(windows) == 0.5
    assert np.isnan(centre_toeplitz_residual(windows, np.int32([1, 0, 0, 1, 0, 1])))
    assert np.isnan(centre_toeplitz_residual(windows[:2]))


def test_rejects_bad_arguments():
    matrix, mask = random_matrix(4), random_mask(4)
    for window in (0, -1, 1.5):
        with pytest.raises(ValueError, match="window: expected an integer >= 1"):
            windowed_toeplitz_residual(matrix, window)
        with pytest.raises(ValueError, match="window: expected an integer >= 1"):
            windowed_toeplitz_degrees_of_freedom(mask, window)
    for call in (
        lambda: windowed_toeplitz_residual(matrix, 5),
        lambda: windowed_toeplitz_degrees_of_freedom(mask, 5),
    ):
        with pytest.raises(ValueError, match=r"window: expected at most .* 4, got 5"):
            call()
    for fn in (toeplitz_residual, toeplitz_approximation):
        with pytest.raises(ValueError, match=r"matrix: expected shape \[4, 4\]"):
            fn(matrix[:, :3])
        with pytest.raises(ValueError, match="matrix: expected a real floating dtype"):
            fn(mask)
        with pytest.raises(ValueError, match="mask: expected a bool dtype"):
            fn(matrix, matrix)
        with pytest.raises(ValueError, match=r"mask: expected shape \[4, 4\]"):
            fn(matrix, mask[:3, :3])
    with pytest.raises(ValueError, match=r"mask: expected shape \[4, 4\]"):
        toeplitz_degrees_of_freedom(mask[:, :3])
