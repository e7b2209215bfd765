"""The flux of a small step halfway, against the exact one in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grsd_jax import gradient_flow_direction
from grsd_jax.dynamics import KrylovSteps, exact_balance, midpoint_flux
from grsd_jax.dynamics import midpoint as module
from grsd_jax.results import with_undefined
from grsd_jax.shells import SoftShells
from oracles import cast
from test_between_ends import EDGES, in_double, make_problem, shells, train
from test_exact_balance import by_definition

KEY = jax.random.key(0)


def small_step(rate):
    """Returns a problem and both ends of one step of descent from a trained point."""
    problem, params = make_problem("gelu")
    begun = train(problem, params, optax.sgd(0.3), [8])[-1]
    return problem, begun, train(problem, begun, optax.sgd(rate), [1])[-1]


def exact(problem, before, after, width):
    oracle = in_double(problem, before), in_double(problem, after)
    return by_definition(*oracle, EDGES, width)["flux"]


@pytest.mark.parametrize("width", [1 / 2, 1 / 3])
def test_a_small_step_in_float32_is_right_where_the_difference_drowns(width):
    ends = small_step(1e-4)
    expected = exact(*ends, width)
    found = midpoint_flux(*ends, shells(width=width), solver="dense")
    off = np.abs(found.flux - expected)
    assert np.all(off <= found.flux_error)
    assert np.all(off <= 1e-3 * np.abs(expected))
    assert np.all(found.flux_error <= 0.1 * np.abs(expected))
    assert np.all(found.converged)
    assert found.finite
    problem, before, after = ends
    differ = exact_balance(
        (problem, before), (problem, after), shells(width=width), solver="dense"
    )
    lost = np.abs(differ.flux - expected)
    assert np.median(lost / np.abs(expected)) > 100 * np.median(off / np.abs(expected))


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_the_error_of_a_larger_step_covers_what_is_left_out(rate):
    ends = small_step(rate)
    expected = exact(*ends, 1 / 2)
    found = midpoint_flux(*ends, shells(), solver="dense")
    off = np.abs(found.flux - expected)
    assert np.all(off <= found.flux_error)
    assert np.any(off > found.floor)


@pytest.mark.parametrize("solver", ["dense", KrylovSteps(8)])
@pytest.mark.parametrize("step", [1.0, 10.0, 100.0, 1000.0])
def test_a_step_that_is_not_small_has_no_error_to_believe(solver, step):
    """Halfway the network is saturated: nothing moves there, whatever the ends do."""
    problem, params = make_problem("gelu")
    flow = gradient_flow_direction(problem, params)
    far = jax.tree.map(lambda p, d: p + step * d, params, flow)
    expected = exact(problem, params, far, 1 / 2)
    found = midpoint_flux(problem, params, far, shells(), solver=solver, key=KEY)
    off = np.abs(found.flux - expected)
    assert np.all(off <= found.flux_error)
    assert np.all(np.isinf(found.flux_error)) or step < 10


def test_an_error_that_turns_around_is_no_small_step():
    values, moved = jnp.asarray([1.0, 0.5]), jnp.asarray([[0.0, 0.1], [0.1, 0.0]])
    turned = jnp.asarray([[0.0, 1.0], [0.0, 1.0]])  # e_m = 0: nothing to move
    one = SoftShells(jnp.asarray([0.7]))
    found = module._by_all_pairs(values, jnp.eye(2), moved, turned, one)
    np.testing.assert_array_equal(found.flux, 0)
    assert np.isinf(found.flux_error)


def test_ends_that_hold_other_integers_are_refused():
    problem, params = make_problem("gelu")
    inner = problem.objective.outputs_fn
    times = problem.replace(
        outputs_fn=lambda p, b: p["by"].astype(jnp.float32) * inner(p["of"], b)
    )
    ends = [{"by": np.int32(by), "of": params} for by in (1, 2)]
    with pytest.raises(ValueError, match="after: expected what before holds beside"):
        midpoint_flux(times, *ends, shells(), solver="dense")
    still = midpoint_flux(times, ends[0], ends[0], shells(), solver="dense")
    np.testing.assert_array_equal(still.flux, 0)


def test_krylov_steps_are_right_within_their_errors():
    ends = small_step(1e-2)
    expected = exact(*ends, 1 / 2)
    dense = midpoint_flux(*ends, shells(), solver="dense")
    for steps, number in ((24, 4), (8, 2)):
        found = midpoint_flux(*ends, shells(), solver=KrylovSteps(steps), key=KEY)
        reached = np.asarray(found.converged)
        assert reached.sum() >= number
        off = np.abs(found.flux - dense.flux)
        assert np.all(off[reached] <= (found.flux_error + dense.flux_error)[reached])
        assert np.all(
            np.abs(found.flux - expected)[reached] <= found.flux_error[reached]
        )
        assert np.all(np.isinf(found.flux_error[~reached]))
        np.testing.assert_allclose(
            found.density[reached], dense.density[reached], rtol=0.05
        )


@pytest.mark.usefixtures("x64")
def test_what_is_left_out_falls_as_the_square_of_the_step():
    problem, before, after = small_step(0.02)
    batches = problem.batches
    problem = problem.replace(
        batches=batches | {"image": batches["image"].astype(jnp.float64)}
    )
    before, after = cast(before, jnp.float64), cast(after, jnp.float64)
    apart = []
    half = jax.tree.map(lambda p, q: (p + q) / 2, before, after)
    for end in (after, half):
        wide = SoftShells(jnp.asarray(EDGES))
        found = midpoint_flux(problem, before, end, wide, solver="dense").flux
        ends = (problem, before), (problem, end)
        difference = exact_balance(*ends, wide, solver="dense").flux
        apart.append(np.abs(found - difference) / np.abs(difference))
    ratio = np.median(apart[0] / apart[1])
    assert 3.5 < ratio < 4.5
    assert np.all(apart[1] < 0.01)


@pytest.mark.parametrize(("of_m", "of_e"), [(2.0**90, 1.0), (2.0**-90, 2.0**-40)])
def test_units_change_nothing(of_m, of_e):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(9, 9)))[0].astype(np.float32)
    values = np.geomspace(1e-2, 5, 9).astype(np.float32)
    moved = rng.normal(size=(9, 9)).astype(np.float32)
    moved, vectors = (moved + moved.T) / 20, rng.normal(size=(9, 2)).astype(np.float32)

    vectors[:, 1] /= 10  # a small step

    def found(unit, size):
        scaled = SoftShells(jnp.asarray(EDGES * unit, jnp.float32))
        parts = unit * values, basis, unit * moved, size * vectors
        return module._by_all_pairs(*map(jnp.asarray, parts), scaled)

    once, scaled = found(1.0, 1.0), found(of_m, of_e)
    for name in ("flux", "density", "floor", "flux_error"):
        np.testing.assert_allclose(
            getattr(scaled, name) / of_e**2, getattr(once, name), rtol=1e-5
        )
    assert np.all(scaled.in_range)
    for size in (1e-21, 1e21):
        lost = with_undefined(found(1.0, size))
        assert not np.any(lost.in_range)
        assert np.all(np.isnan([lost.flux, lost.floor, lost.flux_error]))


def test_what_does_not_fit_is_one_sentence():
    problem, params = make_problem("gelu")
    for width in (0.0, 0.4):
        with pytest.raises(ValueError, match=r"^shells\.width: expected 1/2 or 1/3"):
            midpoint_flux(problem, params, params, shells(width=width))
    with pytest.raises(ValueError, match=r"^key: expected a PRNG key"):
        midpoint_flux(problem, params, params, shells(), solver=KrylovSteps(8))
    with pytest.raises(ValueError, match=r"^solver: expected one of"):
        midpoint_flux(problem, params, params, shells(), solver="sparse")
    with pytest.raises(ValueError, match=r"^after: expected"):
        midpoint_flux(problem, params, {"in": params["in"]}, shells())
    rounded = problem.replace(
        outputs_fn=lambda p, b: problem.objective.outputs_fn(cast(p, jnp.float32), b)
    )
    half = cast(params, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"^before\['in'\]: expected dtype float32 or"):
        midpoint_flux(rounded, half, half, shells())
    still = midpoint_flux(problem, params, params, shells(), solver="dense")
    np.testing.assert_array_equal(still.flux, 0)
    assert still.finite
