import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import (
    Binning,
    Derivative,
    Lanczos,
    Problem,
    Window,
    gradient_flow_direction,
    measure_coupling,
)
from grsd_jax.kernel import products
from grsd_jax.kernel.dense import dense_at
from grsd_jax.shells import fit_power_law, measurement
from grsd_jax.shells.diagnostics import caveats
from oracles import dense_kernel, network_problem, plain, random_batches, relative_error

LANCZOS = Lanczos(block_size=4, num_steps=6)
SHELLS = Binning(num_shells=5, window=3)


@pytest.fixture(scope="module")
def mlp():
    problem, params = network_problem("mlp", jnp.float32, reduction="mean")
    problem = problem.replace(batches=random_batches(2, 20, (4,), 3))
    return problem, params, gradient_flow_direction(problem, params)


def measure(mlp, **options):
    checked = Derivative(cross_checked=True)
    options = {"solver": LANCZOS, "shells": SHELLS, "derivative": checked, **options}
    return measure_coupling(*mlp, key=jax.random.key(0), **options)


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_dense_solver_against_the_oracle(mlp, reduction):
    problem, params, direction = mlp
    problem = problem.replace(reduction=reduction)
    got = measure((problem, params, direction), solver="dense")
    kernel, moved = jax.jvp(lambda p: dense_kernel(problem, p), (params,), (direction,))
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


@pytest.mark.parametrize("solver", [LANCZOS, "dense"])
def test_cross_checks_change_nothing_else_and_are_made_if_asked_for(
    mlp, monkeypatch, solver
):
    checked = measure(mlp, solver=solver)
    monkeypatch.setattr(measurement, "project_kernel", None)
    plainly = measure(mlp, solver=solver, derivative=Derivative())
    compared = {"secant_disagreement": None, "operator_disagreement": None}
    for name in compared:
        assert np.isfinite(getattr(checked, name))
        assert np.isnan(getattr(plainly, name))
    assert "n/a: undefined, or not cross-checked" in repr(plainly)
    chex.assert_trees_all_equal(
        dataclasses.replace(plainly, **compared),
        dataclasses.replace(checked, **compared),
    )


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_a_kernel_of_other_parameters_disagrees(mlp, monkeypatch, reduction):
    problem, params, direction = mlp
    problem = problem.replace(reduction=reduction)

    def of_others(point):
        return dense_at(point.moved(jax.tree.map(lambda leaf: 1.01 * leaf, params)))

    monkeypatch.setattr(measurement, "dense_at", of_others)
    got = measure((problem, params, direction), solver="dense")
    assert 1e-3 < got.operator_disagreement < 1


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_solvers_agree_on_the_leading_pairs(mlp, reduction):
    problem, *rest = mlp
    arguments = (problem.replace(reduction=reduction), *rest)
    dense, lanczos = (measure(arguments, solver=s) for s in ("dense", LANCZOS))
    assert (dense.solver, lanczos.solver) == ("dense", "lanczos")
    assert dense.reduction == lanczos.reduction == reduction
    top = float(dense.values[0])
    np.testing.assert_allclose(lanczos.values[:6], dense.values[:6], atol=1e-4 * top)
    np.testing.assert_allclose(
        np.abs(np.diag(lanczos.coupling))[:3],
        np.abs(np.diag(dense.coupling))[:3],
        rtol=1e-2,
    )


def test_the_form_of_the_jacobian_is_told_and_changes_nothing(mlp):
    problem, *rest = mlp
    hidden = (plain(problem), *rest)
    for solver in ("dense", LANCZOS):
        factored, own = (measure(m, solver=solver) for m in (mlp, hidden))
        assert (factored.jacobian, own.jacobian) == ("factored", "plain")
        top = float(own.values[0])
        np.testing.assert_allclose(factored.values, own.values, atol=1e-5 * top)


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_little_memory_streams_the_same_products(mlp, monkeypatch, reduction):
    problem, *rest = mlp
    arguments = (problem.replace(reduction=reduction), *rest)
    held = measure(arguments)
    monkeypatch.setattr(products, "default_bytes", lambda: 1)
    monkeypatch.setattr(products, "linearize_point", None)  # nothing may be held
    streamed = measure(arguments)
    assert (held.jacobian, streamed.jacobian) == ("factored", "plain")
    top = float(held.values[0])
    np.testing.assert_allclose(streamed.values, held.values, atol=1e-5 * top)
    leading = (slice(None, 3), slice(None, 3))
    scale = float(jnp.abs(held.coupling).max())
    np.testing.assert_allclose(
        np.abs(streamed.coupling[leading]),
        np.abs(held.coupling[leading]),
        atol=1e-3 * scale,
    )


def test_auto_takes_the_dense_solver_where_lanczos_would_span_the_space(mlp):
    assert measure(mlp, solver="auto").solver == "dense"  # r = 60 = n


def test_lanczos_by_name_fits_its_block_to_the_space(mlp):
    problem, params, _ = mlp
    one = jax.tree.map(lambda leaf: leaf[:1, :1], problem.batches)
    for batches, block_size in ((problem.batches, 8), (one, 3)):
        point = problem.replace(batches=batches).at(params)
        chosen = measurement._resolved("lanczos", point, Window())
        assert chosen == Lanczos(block_size)


@pytest.mark.parametrize("solver", ["dense", LANCZOS])
def test_finite_difference_agrees_for_a_smooth_network(mlp, solver):
    exact = measure(mlp, solver=solver)
    difference = measure(
        mlp,
        solver=solver,
        derivative=Derivative("finite_difference", cross_checked=True),
    )
    scale = float(jnp.abs(exact.coupling).max())
    np.testing.assert_allclose(
        difference.coupling[:3, :3], exact.coupling[:3, :3], atol=5e-2 * scale
    )
    assert difference.derivative == "finite_difference"


def test_the_direction_is_the_gradient_flow_by_default(mlp):
    problem, params, _ = mlp
    got, expected = measure((problem, params)), measure(mlp)
    np.testing.assert_array_equal(got.coupling, expected.coupling)


def test_one_trace_over_three_steps_of_a_users_loop(mlp):
    problem, params, _ = mlp

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params):
        direction = gradient_flow_direction(problem, params)
        measured = measure_coupling(
            problem,
            params,
            direction,
            key=jax.random.key(0),
            solver=LANCZOS,
            shells=Binning(num_shells=5, window=3, num_bootstrap=10),
        )
        moved = jax.tree.map(lambda p, d: p + 0.1 * d, params, direction)
        return moved, measured

    values = []
    for _ in range(3):
        params, measured = step(params)
        values.append(float(measured.values[0]))
    assert len(set(values)) == 3
    assert measured.solver == "lanczos"
    # No NaN, which would stop a program under `jax_debug_nans`.
    assert np.isinf(
        [measured.secant_disagreement, measured.operator_disagreement]
    ).all()


def test_eager_calls_trace_the_error_function_no_more_after_the_first(mlp):
    problem, params, direction = mlp
    traces = 0

    def counted(p, batch):
        nonlocal traces
        traces += 1
        return problem.error(p, batch)

    own = Problem.from_error(counted, problem.batches)
    for scale in (1.0, 1.1, 1.2):
        before = traces
        moved = jax.tree.map(lambda leaf, s=scale: leaf * np.float32(s), params)
        measure((own, moved, direction))
    assert traces == before > 0


@pytest.mark.parametrize("solver", ["dense", LANCZOS])
def test_residuals_bound_those_in_float64(mlp, solver):
    got = measure(mlp, solver=solver)
    with jax.enable_x64(True):
        problem, params, _ = jax.tree.map(
            lambda leaf: (
                np.asarray(leaf, np.float64) if leaf.dtype == np.float32 else leaf
            ),
            mlp,
        )
        kernel = np.asarray(dense_kernel(problem, params))
    values, vectors = np.asarray(got.values, float), np.asarray(got.vectors, float)
    true = np.linalg.norm(kernel @ vectors - vectors * values, axis=0)
    assert np.all(true <= np.asarray(got.residuals))
    resolved = np.asarray(got.resolved)
    assert resolved.sum() > 5
    assert np.all(true[resolved] <= 0.05 * values[resolved])


@pytest.mark.not_in_mode("debug_nans")
def test_what_is_not_finite_is_flagged_and_resolves_nothing(mlp):
    problem, params, direction = mlp
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), params)
    for solver in ("dense", LANCZOS):
        got = measure((problem, broken, direction), solver=solver)
        assert not got.finite
        assert not np.any(got.resolved)


@pytest.mark.filterwarnings("ignore:grsd_jax. the examples:RuntimeWarning")
def test_coupled_examples_are_named_and_leave_the_solver_to_lanczos():
    def coupled(params, batch):
        z = batch["x"] @ params["w"]
        return z - jnp.mean(z, axis=0, keepdims=True)

    params = {"w": jax.random.normal(jax.random.key(0), (3, 2))}
    batches = {"x": jax.random.normal(jax.random.key(1), (1, 6, 3))}
    problem = Problem.from_error(coupled, batches)
    with pytest.raises(ValueError, match="problem: expected an error whose examples"):
        measure((problem, params, params), solver="dense")
    got = measure((problem, params, params), solver="auto")
    assert got.coupled
    assert (got.solver, got.jacobian) == ("lanczos", "plain")
    kernel = dense_kernel(problem, params)
    assert relative_error(got.values[:4], np.linalg.eigvalsh(kernel)[::-1][:4]) < 1e-5


def test_one_missing_pair_is_one():
    said = [caveats(num_missing=k, unresolved_share=0.0) for k in range(3)]
    assert said == [
        (),
        ("At least 1 pair of the spectral window is not resolved.",),
        ("At least 2 pairs of the spectral window are not resolved.",),
    ]


def test_what_is_not_finite_is_a_caveat():
    assert caveats(num_missing=0, unresolved_share=0.0) == ()
    (said,) = caveats(num_missing=0, unresolved_share=np.nan, finite=False)
    assert "not finite" in said


def test_bad_input_is_named(mlp):
    problem, params, _ = mlp
    with pytest.raises(ValueError, match=r"block_size: expected at most .* n = 60"):
        measure(mlp, solver=Lanczos(block_size=61))
    with pytest.raises(ValueError, match="solver: expected one of 'auto'"):
        measure(mlp, solver="eigh")
    with pytest.raises(ValueError, match="direction: expected the tree of params"):
        measure((problem, params, {}))
    with pytest.raises(ValueError, match="key: expected a PRNG key"):
        fit_power_law(jnp.ones(3), jnp.ones(3), num_bootstrap=5)


@pytest.mark.not_in_mode("debug_nans")
def test_nothing_is_read_where_no_pair_is_resolved():
    problem, params = network_problem("mlp", jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), params)
    measured = measure_coupling(problem, params, key=jax.random.key(0), solver="dense")
    assert not measured.any_resolved
    shells = measured.to_pandas()
    assert shells["shells_centers"].isna().all()
    assert measured.to_pandas("pair")["values"].isna().all()
    assert "edges n/a" in repr(measured)
