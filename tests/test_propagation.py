"""Proposition 2 on the linear state-space model: bound, range, and outside of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import Problem, models
from grsd_jax.conditions import (
    influence_profile,
    interaction_range,
    propagation_report,
)
from grsd_jax.models import LinearStateSpace

C, DEPTH, N = 2, 13, 2


def exact_influence(model, problem, params, direction):
    """R by the library, without probes; tests/test_locality.py holds it to dense J."""
    blocks = models.depth_blocks(model, params)
    return influence_profile(
        problem, params, direction, blocks, num_probes=None
    ).influence


def moving_model(rho, *, depth=DEPTH, drive=1.0, read=1.0):
    """Returns c and R of a model under motions of equal norms at every step.

    ``X_t Bdot_t`` has the norm ``drive`` and ``Cdot_t`` the norm ``read``.
    """
    model = LinearStateSpace(C, depth, 3, rho=rho)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(N, depth, 2)).astype(np.float32)
    image /= np.linalg.norm(image, axis=(0, 2), keepdims=True)
    batches = {
        "image": jnp.asarray(image)[None],
        "label": jnp.zeros((1, N, C), jnp.float32),
    }
    params = model.init(jax.random.key(0), image)["params"]
    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    for index, name in enumerate(models.depth_blocks(model, params).names):
        block = direction[name]
        block["readout"]["kernel"] *= read / jnp.linalg.norm(block["readout"]["kernel"])
        moved = image[:, index] @ block["inputs"]["kernel"]
        block["inputs"]["kernel"] *= drive / jnp.linalg.norm(moved)
    direction = jax.tree.map(lambda p: p.astype(jnp.float32), direction)
    problem = Problem(models.linen_outputs(model, {}), batches, loss="squared")
    constant = float(model.influence_constant(direction, jnp.asarray(image)))
    return constant, exact_influence(model, problem, params, direction)


@pytest.mark.parametrize("moving", ["readouts", "inputs"])
@pytest.mark.parametrize(("rho", "share"), [(0.5, 0.01), (0.9, 0.4), (0.99, 0.9)])
def test_the_range_is_met_exactly_where_the_bound_is_tight(rho, share, moving):
    # Either the readouts or the inputs move, with equal norms: R = c rho^distance.
    motion = {"drive": float(moving == "inputs"), "read": float(moving == "readouts")}
    constant, influence = moving_model(rho, **motion)
    report = propagation_report(
        influence, constant=constant, rho=rho, epsilon=share * constant
    )
    assert report.in_condition
    assert report.below_bound
    np.testing.assert_allclose(report.profile, report.bound, rtol=1e-4)
    wanted = int(np.ceil(np.log(1 / share) / np.log(1 / rho)))
    assert report.predicted_range == report.measured_range == wanted


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
def test_influence_lies_under_the_bound_when_everything_moves(rho):
    constant, influence = moving_model(rho, depth=10)
    report = propagation_report(
        influence, constant=constant, rho=rho, epsilon=0.9 * constant
    )
    assert report.below_bound
    assert np.all(report.profile > 0)
    assert report.measured_range <= report.predicted_range
    half = propagation_report(influence, constant=constant / 4, rho=rho, epsilon=1.0)
    assert not half.below_bound


@pytest.mark.parametrize("rho", [1.0, 1.05])
def test_an_unstable_propagator_is_reported_as_outside(rho):
    constant, influence = moving_model(rho, depth=10, drive=0.0)
    report = propagation_report(
        influence, constant=constant, rho=rho, epsilon=0.5 * constant
    )
    assert not report.in_condition
    assert report.predicted_range is None
    assert report.measured_range is None
    np.testing.assert_allclose(report.profile, constant * rho ** np.arange(10), 1e-4)


def test_interaction_range_is_the_formula():
    assert interaction_range(1.0, 0.5, 0.25) == 2
    assert interaction_range(1.0, 0.9, 0.01) == 44
    assert interaction_range(125.0, 0.2, 1.0) == 3  # the logarithms' ratio is rounded
    assert interaction_range(1.0, 0.9, 2.0) == 0
    assert interaction_range(1e308, 0.5, 1e-308) == 2047  # 616 log2(10) = 2046.3
    assert interaction_range(1.0, 1.0, 0.1) is None


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="influence: expected a square matrix"):
        propagation_report(np.ones((2, 3)), constant=1.0, rho=0.5, epsilon=0.1)
    options = {"constant": 1.0, "rho": 0.5, "epsilon": 0.1}
    for influence, rounding, sentence in (
        (-5 * np.ones((3, 3)), 0.0, "influence: expected sizes, zero or above, got -5"),
        (1j * np.eye(3), 0.0, "influence: expected real numbers"),
        (np.eye(3), np.nan, "rounding: expected a finite number >= 0"),
        (np.eye(3), -0.5, "rounding: expected a finite number >= 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            propagation_report(influence, **options, rounding=rounding)
    with pytest.raises(ValueError, match="epsilon: expected a finite number > 0"):
        interaction_range(1.0, 0.5, 0.0)


@pytest.mark.parametrize("entry", [0.0, np.nan, np.inf])
def test_no_influence_lies_under_no_bound(entry):
    influence = np.zeros((3, 3))
    influence[2, 0] = entry
    got = propagation_report(influence, constant=1.0, rho=0.5, epsilon=0.1)
    assert not got.defined
    assert not got.below_bound
    assert got.measured_range is None
