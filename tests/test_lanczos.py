import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import linalg
from grsd_jax.linalg import (
    block_lanczos,
    lanczos,
    lanczos_block,
    lanczos_finish,
    lanczos_init,
    lanczos_step,
)
from lanczos_runs import run, scanned
from modes import no_nan
from oracles import symmetric_with_spectrum

ritz_pairs = jax.jit(linalg.ritz_pairs)

SIZE = 200
INDEX = np.arange(1.0, SIZE + 1)
SPECTRA = {
    "identity": np.ones(SIZE),
    "zero": np.zeros(SIZE),
    "rank 10": np.r_[np.linspace(2, 1, 10), np.zeros(SIZE - 10)],
    "two values": np.r_[np.full(SIZE // 2, 50.0), np.ones(SIZE // 2)],
    "12-fold top": np.r_[np.full(12, 3.0), 1 / np.arange(1.0, SIZE - 11)],
    "power -2": INDEX**-2,
    "power -4": INDEX**-4,
    "zeros": np.r_[1 / np.arange(1.0, SIZE * 9 // 10 + 1), np.zeros(SIZE // 10)],
}


def check(result, matrix, spectrum):
    """Checks a run in float64 against the matrix and its spectrum, descending."""
    basis, projected = (
        np.asarray(array, np.float64) for array in (result.basis, result.tridiagonal)
    )
    used = np.linalg.norm(basis, axis=0) > 0
    assert used.sum() == min(basis.shape)
    expected = np.diag(used.astype(float))
    assert np.max(np.abs(basis.T @ basis - expected)) <= 1e-6
    top = max(spectrum.max(), 1e-30)
    projected = projected[np.ix_(used, used)]
    pairs = ritz_pairs(result)
    for values in (np.linalg.eigvalsh(projected)[::-1], np.asarray(pairs.values)):
        assert np.max(np.abs(values[:20] - spectrum[:20])) <= 2e-6 * top
        assert spectrum.min() - 1e-5 * top <= values.min()
        assert values.max() <= spectrum.max() + 1e-5 * top
    vectors = np.asarray(pairs.vectors, np.float64)
    true = np.linalg.norm(
        np.asarray(matrix, np.float64) @ vectors
        - vectors * np.asarray(pairs.values, np.float64),
        axis=0,
    )
    assert np.all(true <= np.asarray(pairs.residuals, np.float64) * (1 + 1e-6))
    distance = np.min(np.abs(np.asarray(pairs.values)[:, None] - spectrum), axis=1)
    assert np.all(distance <= np.asarray(pairs.residuals))
    resolved = np.asarray(pairs.resolved)
    assert np.all(true[resolved] <= 0.05 * np.asarray(pairs.values)[resolved])
    norms = np.linalg.norm(vectors, axis=0)
    np.testing.assert_allclose(norms, np.arange(len(norms)) < used.sum(), atol=1e-5)
    for leaf in jax.tree.leaves((result, pairs)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_hard_spectra_in_float32(block_size, scale):
    num_steps = {1: 60, 3: 50, 8: 20}[block_size]
    for spectrum in SPECTRA.values():
        dense, _ = symmetric_with_spectrum(spectrum * scale)
        matrix = jnp.asarray(dense, jnp.float32)
        check(scanned(matrix, block_size, num_steps), dense, spectrum * scale)


@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_more_columns_than_dimensions(block_size):
    spectrum = np.arange(30.0, 0.0, -1.0)
    dense, _ = symmetric_with_spectrum(spectrum)
    matrix = jnp.asarray(dense, jnp.float32)
    result = run(matrix, block_size, 45 // block_size)
    check(result, dense, spectrum)
    pairs = ritz_pairs(result)
    assert int(jnp.sum(pairs.resolved)) == 30
    assert int(jnp.sum(result.live_counts)) <= 30


@pytest.mark.parametrize("name", SPECTRA)
def test_scan_and_host_loop_agree(name):
    dense, _ = symmetric_with_spectrum(SPECTRA[name])
    matrix = jnp.asarray(dense, jnp.float32)
    scan, host = scanned(matrix, 4, 20), run(matrix, 4, 20, "host")
    check(host, dense, SPECTRA[name])
    values = [np.asarray(ritz_pairs(result).values) for result in (scan, host)]
    np.testing.assert_allclose(*values, atol=2e-6 * SPECTRA[name].max())
    np.testing.assert_array_equal(scan.live_counts[:2], host.live_counts[:2])


def test_under_debug_nans():
    with no_nan():
        for spectrum in SPECTRA.values():
            dense, _ = symmetric_with_spectrum(spectrum)
            check(scanned(jnp.asarray(dense, jnp.float32), 3, 50), dense, spectrum)


@pytest.mark.usefixtures("x64")
def test_recurrence_and_projection_in_float64():
    dense, _ = symmetric_with_spectrum(SPECTRA["power -2"])
    result = run(jnp.asarray(dense), 3, 8)
    basis, projected = np.asarray(result.basis), np.asarray(result.tridiagonal)
    np.testing.assert_allclose(basis.T @ dense @ basis, projected, atol=1e-13)
    rest = dense @ basis - basis @ projected
    np.testing.assert_allclose(rest[:, :-3], 0, atol=1e-13)
    residual = np.asarray(result.residual_block)
    np.testing.assert_allclose(
        rest[:, -3:].T @ rest[:, -3:], residual.T @ residual, atol=1e-13
    )
    far = np.abs(np.subtract.outer(*[np.arange(24) // 3] * 2)) > 1
    np.testing.assert_array_equal(projected[far], 0)
    assert result.basis.dtype == jnp.float64


@pytest.mark.not_in_mode("x64")
def test_steps_by_hand_are_the_driver():
    dense, _ = symmetric_with_spectrum(SPECTRA["power -2"])
    matrix = jnp.asarray(dense, jnp.float32)
    start = jax.random.normal(jax.random.key(7), (SIZE, 4))
    state = lanczos_init(start, 5, key=jax.random.key(1))
    for _ in range(5):
        block = lanczos_block(state, 4)
        state = lanczos_step(state, jnp.matmul(matrix, block, precision="highest"))
    by_hand, driven = lanczos_finish(state, 4), scanned(matrix, 4, 5)
    np.testing.assert_allclose(by_hand.tridiagonal, driven.tridiagonal, atol=1e-6)


def test_composes_with_jit_and_traces_the_operator_once():
    @chex.assert_max_traces(n=1)
    def matmat(block):
        return 2.0 * block

    def values(start):
        result = block_lanczos(matmat, start, 6, key=jax.random.key(0))
        return ritz_pairs(result).values

    got = jax.jit(values)(jax.random.normal(jax.random.key(1), (20, 2)))
    np.testing.assert_allclose(got, 2.0, rtol=1e-6)


def test_progress_is_told_of_every_step():
    seen = []
    block_lanczos(
        lambda block: block,
        jnp.eye(5, 2),
        3,
        key=jax.random.key(0),
        driver="host",
        progress=seen.append,
    )
    assert seen == [1, 2, 3]


def test_low_precision_and_wrong_operators_show_in_the_asymmetry():
    matrix = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)
    assert scanned(jnp.asarray(matrix), 4, 5).asymmetry > 0.1
    assert scanned(jnp.asarray(matrix @ matrix.T), 4, 5).asymmetry < 1e-5


def test_products_that_are_not_finite_are_flagged_and_do_not_spread():
    def matmat(block):
        return block.at[0, 0].set(jnp.nan)

    result = block_lanczos(matmat, jnp.eye(6, 2), 2, key=jax.random.key(0))
    assert not result.finite
    for leaf in jax.tree.leaves(result):
        assert np.all(np.isfinite(leaf))
    assert not np.any(ritz_pairs(result).resolved)


def test_every_dot_is_at_highest_precision():
    def whole(matrix, start):
        result = block_lanczos(
            lambda block: jnp.matmul(matrix, block, precision="highest"),
            start,
            3,
            key=jax.random.key(0),
        )
        return ritz_pairs(result)

    shapes = jnp.ones((20, 20)), jnp.ones((20, 2))
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(whole).lower(*shapes).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) > 8
    for dot in dots:
        assert re.search(r"precision = \[HIGHEST, HIGHEST\]", dot), dot


@pytest.mark.not_in_mode("x64")
def test_bad_input_is_named():
    key = jax.random.key(0)

    def identity(block):
        return block

    with pytest.raises(ValueError, match="start_block: expected 1 <= b <= n columns"):
        block_lanczos(identity, jnp.ones((3, 4)), 1, key=key)
    with pytest.raises(
        ValueError, match="start_block: expected dtype float32 or float64"
    ):
        block_lanczos(identity, jnp.ones((4, 2), jnp.int32), 1, key=key)
    with pytest.raises(ValueError, match="num_steps: expected an integer >= 1"):
        block_lanczos(identity, jnp.ones((4, 2)), 0, key=key)
    with pytest.raises(ValueError, match=r"matmat\(block\): expected shape \[4, 2\]"):
        block_lanczos(lambda block: block[:3], jnp.ones((4, 2)), 1, key=key)
    with pytest.raises(ValueError, match=r"matmat\(block\): expected dtype float32"):
        block_lanczos(
            lambda block: block.astype(jnp.bfloat16), jnp.ones((4, 2)), 1, key=key
        )
    with pytest.raises(ValueError, match="driver: expected one of 'scan', 'host'"):
        block_lanczos(identity, jnp.ones((4, 2)), 1, key=key, driver="loop")
    with pytest.raises(ValueError, match="progress: expected driver='host'"):
        block_lanczos(identity, jnp.ones((4, 2)), 1, key=key, progress=print)


@pytest.mark.parametrize(
    ("size", "width"), [(257, 1), (513, 8), (1600, 32), (1600, 100), (300, 200)]
)
def test_tall_blocks_are_factorised_in_pieces(size, width):
    block = jax.random.normal(jax.random.key(size), (size, width))
    if width > 3:  # dependent columns, and pieces of zeros
        block = block.at[:, 3].set(2 * block[:, 1]).at[:, 2].set(0)
        block = block.at[: size // 2].set(0)
    orthonormal, triangular = map(np.asarray, lanczos._tall_qr(block))
    assert orthonormal.shape == (size, width)
    eye = np.eye(width)
    np.testing.assert_allclose(orthonormal.T @ orthonormal, eye, atol=3e-6)
    scale = np.linalg.norm(block, 2)
    np.testing.assert_allclose(orthonormal @ triangular, block, atol=1e-6 * scale)
    np.testing.assert_array_equal(triangular, np.triu(triangular))


@pytest.mark.parametrize("name", ["rank 10", "12-fold top", "power -4"])
def test_hard_spectra_with_blocks_in_pieces(name, monkeypatch):
    monkeypatch.setattr(lanczos, "_QR_ROWS", 48)
    dense, _ = symmetric_with_spectrum(SPECTRA[name])
    matrix = jnp.asarray(dense, jnp.float32)
    check(jax.jit(run, static_argnums=(1, 2))(matrix, 8, 12), dense, SPECTRA[name])


def test_directions_die_alike_in_operators_of_any_size():
    values = np.r_[3.0, 2.0, 1.0, np.zeros(27)]
    dense, _ = symmetric_with_spectrum(values)
    expected = scanned(jnp.asarray(dense, jnp.float32), 2, 4).live_counts
    for size in (2.0**-100, 2.0**100):
        result = scanned(jnp.asarray(size * dense, jnp.float32), 2, 4)
        np.testing.assert_array_equal(result.live_counts, expected)
        assert result.finite
