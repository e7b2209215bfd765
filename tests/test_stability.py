"""Norms of J and Jdot, drifts and exponents, against matrices and closed forms."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block_problems
from grsd_jax import Binning, gradient_flow_direction, measure_coupling
from grsd_jax.conditions import (
    log_lipschitz,
    operator_norms,
    projector_drift,
    shell_drift,
)
from oracles import dense_jacobians, network_problem

KEY = jax.random.key(0)


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_norms_are_the_largest_singular_values(reduction):
    problem, params = network_problem("mlp", jnp.float32, reduction=reduction)
    direction = gradient_flow_direction(problem, params)

    def jacobian(p):
        parts = dense_jacobians(problem, p)
        if reduction == "stack":
            return jnp.concatenate(parts)
        return jnp.concatenate(parts, axis=1) / 2**0.5

    dense, moved = jax.jit(lambda p, d: jax.jvp(jacobian, (p,), (d,)))(
        params, direction
    )
    got = operator_norms(problem, params, direction, key=KEY)
    assert bool(jnp.all(got.converged))
    for value, matrix, residual in zip(
        (got.jacobian, got.derivative), (dense, moved), got.residuals, strict=True
    ):
        expected = np.linalg.norm(np.asarray(matrix, np.float64), 2)
        assert abs(float(value) - expected) <= (residual + 1e-5) * expected
        assert residual < 1e-3


def test_norms_that_have_not_converged_are_marked():
    problem, params = network_problem("mlp", jnp.float32, reduction="mean")
    direction = gradient_flow_direction(problem, params)
    got = operator_norms(problem, params, direction, key=KEY, max_steps=1)
    assert not bool(jnp.any(got.converged))
    assert bool(jnp.all(got.residuals > 1e-3))


def test_orthogonal_layers_have_a_norm_of_the_root_of_their_number():
    problem, params, _ = block_problems.orthogonal_layers(num_blocks=4)
    got = operator_norms(problem, params, params, key=KEY)
    np.testing.assert_allclose(got.jacobian, 2.0, rtol=1e-5)
    # J is homogeneous of degree 3 in the weights, and d are the weights.
    np.testing.assert_allclose(got.derivative, 3 * 2.0, rtol=1e-5)


def plane(angle, dtype=np.float32):
    """Returns two columns in R^3; the second turns out of the plane by an angle."""
    columns = [[1, 0, 0], [0, np.cos(angle), np.sin(angle)]]
    return np.array(columns, dtype).T


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.3, np.pi / 2])
def test_drift_is_the_sine_of_the_angle(angle):
    got = projector_drift(plane(0), plane(angle))
    np.testing.assert_allclose(got.operator, np.sin(angle), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        got.frobenius, np.sin(angle) / 2**0.5, rtol=1e-5, atol=1e-7
    )


def test_drift_depends_on_the_subspaces_alone():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32)
    spun = basis[:, :3] @ np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32)
    np.testing.assert_allclose(projector_drift(basis[:, :3], spun), 0, atol=1e-6)
    chosen, other = np.arange(6) < 2, np.arange(6) >= 2
    got = projector_drift(basis, basis, chosen=chosen, others_chosen=other)
    np.testing.assert_allclose(got, 1, rtol=1e-5)
    inside = projector_drift(basis[:, :2], basis[:, :3])
    np.testing.assert_allclose(inside.operator, 1, rtol=1e-5)  # other dimensions
    np.testing.assert_allclose(inside.frobenius, (1 / 5) ** 0.5, rtol=1e-5)
    nothing = projector_drift(basis, basis, chosen=chosen & other, others_chosen=None)
    assert nothing.operator == pytest.approx(1, rel=1e-5)


def test_lipschitz_constant_of_a_power_is_its_exponent():
    centers = np.array([1e-6, 1e-4, 1e-2, 1.0], np.float32)
    statistic = 7e-9 * centers**-1.5
    np.testing.assert_allclose(log_lipschitz(statistic, centers), 1.5, rtol=1e-4)
    bent = statistic * np.array([1, 1, 100, 1], np.float32)
    np.testing.assert_allclose(log_lipschitz(bent, centers), 2.5, rtol=1e-4)
    mask = np.array([True, True, False, True])
    np.testing.assert_allclose(log_lipschitz(bent, centers, mask), 1.5, rtol=1e-4)
    assert np.isnan(log_lipschitz(bent, centers, np.array([True, False] * 2)))
    assert np.isnan(log_lipschitz(0 * bent, centers))


def test_shells_do_not_drift_when_nothing_moves():
    problem, params = network_problem("mlp", jnp.float32, reduction="mean")
    direction = gradient_flow_direction(problem, params)
    shells = Binning(num_shells=4, window=3, num_bootstrap=0)
    here, there = (
        measure_coupling(problem, p, direction, key=KEY, solver="dense", shells=shells)
        for p in (params, jax.tree.map(lambda leaf: 1.5 * leaf, params))
    )
    still = shell_drift([here, here])
    assert still.drift.shape == (1, 4)
    filled = ~np.isnan(still.drift)
    assert filled.any()
    np.testing.assert_allclose(still.drift[filled], 0, atol=1e-5)
    moved = shell_drift([here, here, there])
    assert moved.drift.shape == (2, 4)
    assert float(jnp.nanmax(moved.drift[1])) > 0.1
    lowest = min(float(m.values[m.resolved].min()) for m in (here, there))
    assert float(moved.edges[0]) == pytest.approx(lowest, rel=1e-5)


def test_a_mode_that_crosses_an_edge_is_drift():
    def still(values):
        return types.SimpleNamespace(
            values=jnp.asarray(values, jnp.float32),
            resolved=jnp.array([True, True, False]),
            vectors=jnp.eye(3),
            shells=types.SimpleNamespace(counts=jnp.zeros(3, jnp.int32)),
        )

    # The shells of [1e-6, 1] end at 1e-4 and 1e-2; the third mode is not resolved.
    got = shell_drift([still([1.0, 1e-6, 7.0]), still([1e-6, 1.0, 7.0])])
    np.testing.assert_allclose(got.drift, [[1, np.nan, 1]])
    got = shell_drift([still([1.0, 1e-6, 7.0]), still([1.0, 1e-3, 7.0])])
    np.testing.assert_allclose(got.drift, [[1, 1, 0]])
    np.testing.assert_allclose(got.edges, [1e-6, 1e-4, 1e-2, 1], rtol=1e-5)


def test_columns_that_are_no_basis_have_no_drift():
    """They would count a direction twice: of one subspace the drift came out as 1."""
    first, second = np.eye(4, 2, dtype=np.float32).T
    for other in (first, (first + second) / np.float32(2) ** 0.5):
        columns = np.stack([first, other], axis=1)
        got = projector_drift(columns, columns)
        assert np.isnan(got.operator)
        assert np.isnan(got.frobenius)
        chosen = projector_drift(columns, columns, chosen=[True, False])
        assert np.isnan(chosen.operator)
        alone = np.array([True, False])
        both = projector_drift(columns, columns, chosen=alone, others_chosen=alone)
        np.testing.assert_allclose(both, 0, atol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"others: expected shape \[3, any\]"):
        projector_drift(plane(0), plane(0).T)
    with pytest.raises(ValueError, match=r"centers: expected shape \[2\]"):
        log_lipschitz(np.ones(2, np.float32), np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"len\(measurements\): expected an integer"):
        shell_drift([])
