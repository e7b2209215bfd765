import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax
from grsd_jax import gradient_flow_direction, measure_coupling
from oracles import dense_kernel, problem, random_batches

OPTIONS = {"block_size": 4, "num_steps": 6, "num_shells": 5, "window": 3}


@pytest.fixture(scope="module")
def mlp():
    error_fn, params, _, loss_fn = problem("mlp", jnp.float32)
    batches = random_batches(2, 20, (4,), 3)
    direction = gradient_flow_direction(loss_fn, params, batches)
    return error_fn, params, batches, direction


def measure(mlp, **options):
    return measure_coupling(*mlp, key=jax.random.key(0), **{**OPTIONS, **options})


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_dense_solver_against_the_oracle(mlp, reduction):
    error_fn, params, batches, direction = mlp
    got = measure(mlp, solver="dense", reduction=reduction)
    kernel, moved = jax.jvp(
        lambda p: dense_kernel(error_fn, p, batches, reduction),
        (params,),
        (direction,),
    )
    vectors = np.asarray(got.vectors)
    top = float(got.values[0])
    expected = np.linalg.eigvalsh(np.asarray(kernel, np.float64))[::-1]
    np.testing.assert_allclose(got.values, expected, atol=2e-6 * top)
    projected = vectors.T @ np.asarray(moved) @ vectors
    np.testing.assert_allclose(
        got.coupling, projected, atol=1e-4 * np.abs(projected).max()
    )
    assert got.operator_disagreement < 1e-5
    assert got.secant_disagreement < 2e-2
    assert got.finite
    # At least one null vector for each example of a softmax error.
    examples = 20 if reduction == "mean" else 40
    assert int(got.resolved.sum()) <= len(expected) - examples
    assert int(got.shells.counts.sum()) == int(got.resolved.sum())


def test_solvers_agree_on_the_leading_pairs(mlp):
    dense, lanczos = (measure(mlp, solver=s) for s in ("dense", "lanczos"))
    assert (dense.solver, lanczos.solver) == ("dense", "lanczos")
    top = float(dense.values[0])
    np.testing.assert_allclose(lanczos.values[:6], dense.values[:6], atol=1e-4 * top)
    np.testing.assert_allclose(
        np.abs(np.diag(lanczos.coupling))[:3],
        np.abs(np.diag(dense.coupling))[:3],
        rtol=1e-2,
    )


def test_auto_takes_the_dense_solver_where_lanczos_would_span_the_space(mlp):
    assert measure(mlp, solver="auto", num_steps=100).solver == "dense"


@pytest.mark.parametrize("solver", ["dense", "lanczos"])
def test_finite_difference_agrees_for_a_smooth_network(mlp, solver):
    exact = measure(mlp, solver=solver)
    difference = measure(mlp, solver=solver, derivative="finite_difference")
    scale = float(jnp.abs(exact.coupling).max())
    np.testing.assert_allclose(
        difference.coupling[:3, :3], exact.coupling[:3, :3], atol=5e-2 * scale
    )
    assert difference.derivative == "finite_difference"


def test_one_trace_over_three_steps_of_a_users_loop(mlp):
    error_fn, params, batches, _ = mlp
    loss_fn = problem("mlp", jnp.float32)[3]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params):
        direction = gradient_flow_direction(loss_fn, params, batches)
        measured = measure_coupling(
            error_fn,
            params,
            batches,
            direction,
            key=jax.random.key(0),
            solver="lanczos",
            num_bootstrap=10,
            **OPTIONS,
        )
        moved = jax.tree.map(lambda p, d: p + 0.1 * d, params, direction)
        return moved, measured

    values = []
    for _ in range(3):
        params, measured = step(params)
        values.append(float(measured.values[0]))
    assert len(set(values)) == 3
    assert measured.solver == "lanczos"


def test_eager_calls_trace_the_error_function_no_more_after_the_first(mlp):
    error_fn, params, batches, direction = mlp
    traces = 0

    def counted(p, batch):
        nonlocal traces
        traces += 1
        return error_fn(p, batch)

    for scale in (1.0, 1.1, 1.2):
        before = traces
        moved = jax.tree.map(lambda leaf, s=scale: leaf * np.float32(s), params)
        measure((counted, moved, batches, direction), solver="lanczos")
    assert traces == before > 0


@pytest.mark.parametrize("solver", ["dense", "lanczos"])
def test_residuals_bound_those_in_float64(mlp, solver):
    got = measure(mlp, solver=solver)
    with jax.enable_x64(True):
        error_fn, params, batches, _ = (
            jax.tree.map(
                lambda leaf: (
                    np.asarray(leaf, np.float64)
                    if np.asarray(leaf).dtype == np.float32
                    else leaf
                ),
                part,
            )
            for part in mlp
        )
        kernel = np.asarray(dense_kernel(error_fn, params, batches, "mean"))
    values, vectors = np.asarray(got.values, float), np.asarray(got.vectors, float)
    true = np.linalg.norm(kernel @ vectors - vectors * values, axis=0)
    assert np.all(true <= got.residuals)
    resolved = np.asarray(got.resolved)
    assert resolved.sum() > 5
    assert np.all(true[resolved] <= 0.05 * values[resolved])


def test_what_is_not_finite_is_flagged_and_resolves_nothing(mlp):
    error_fn, params, batches, direction = mlp
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), params)
    for solver in ("dense", "lanczos"):
        got = measure((error_fn, broken, batches, direction), solver=solver)
        assert not got.finite
        assert not np.any(got.resolved)


def test_coupled_examples_show_in_the_operator_disagreement():
    def coupled(params, batch):
        z = batch["x"] @ params["w"]
        return z - jnp.mean(z, axis=0, keepdims=True)

    params = {"w": jax.random.normal(jax.random.key(0), (3, 2))}
    batches = {"x": jax.random.normal(jax.random.key(1), (1, 6, 3))}
    got = measure((coupled, params, batches, params), solver="dense")
    assert got.operator_disagreement > 1e-2


def test_bad_input_is_named(mlp):
    error_fn, params, batches, _ = mlp
    with pytest.raises(ValueError, match=r"block_size: expected at most .* n = 60"):
        measure(mlp, block_size=61)
    with pytest.raises(ValueError, match="solver: expected one of 'auto'"):
        measure(mlp, solver="eigh")
    with pytest.raises(ValueError, match="driver: expected one of 'auto'"):
        measure(mlp, driver="loop")
    with pytest.raises(ValueError, match="direction: expected the tree of params"):
        measure((error_fn, params, batches, {}))
    with pytest.raises(ValueError, match="window: expected at most"):
        measure(mlp, window=6)
    with pytest.raises(ValueError, match="num_shells: expected an integer >= 1"):
        measure(mlp, num_shells=0)
    for name in ("tolerance", "floor", "step"):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number > 0"):
            measure(mlp, **{name: 0.0})
    with pytest.raises(ValueError, match="key: expected a PRNG key"):
        grsd_jax.fit_power_law(jnp.ones(3), jnp.ones(3), num_bootstrap=5)
