"""The power law of the velocity: recovered where there is one, rejected where not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import dynamics
from grsd_jax.results import with_undefined
from modes import no_nan

compiled = jax.jit(dynamics.velocity_fit, static_argnames="num_bootstrap")


def velocity_fit(*points, **options):
    return with_undefined(compiled(*points, **options))


EDGES = np.geomspace(1e-3, 10, 17)


def noisy(law, seed, size=0.1):
    noise = np.random.default_rng(seed).normal(size=len(EDGES))
    return jnp.asarray(law(EDGES) * np.exp(size * noise))


def broken(x):
    return 2 * x * np.where(x < 0.1, 1, (x / 0.1) ** 0.5)


@pytest.mark.usefixtures("x64")
def test_noisy_power_laws_are_recovered_and_not_rejected_too_often():
    exponents, inside, p_values = [], 0, []
    for seed in range(100):
        found = velocity_fit(
            jnp.asarray(EDGES),
            noisy(lambda x: -2 * x**1.2, seed),
            num_bootstrap=200,
            key=jax.random.key(seed),
        )
        assert found.sign == -1
        exponents.append(float(found.fit.exponent))
        low, high = found.fit.interval
        inside += float(low) <= 1.2 <= float(high)
        p_values.append(float(found.p_value))
    np.testing.assert_allclose(np.mean(exponents), 1.2, atol=0.005)
    assert 80 <= inside <= 100
    # Under the law the p-values are uniform.
    ordered = np.sort(p_values)
    distance = np.max(np.abs(ordered - (np.arange(100) + 0.5) / 100))
    assert distance < 0.16  # Kolmogorov and Smirnov at one percent


@pytest.mark.usefixtures("x64")
def test_broken_laws_are_rejected_although_they_fit_well():
    for seed in range(5):
        found = velocity_fit(jnp.asarray(EDGES), noisy(broken, seed))
        assert found.fit.r_squared > 0.97
        assert found.p_value < 1e-3
        assert found.curvature > 3 * found.curvature_stderr


@pytest.mark.usefixtures("x64")
def test_curvature_is_the_quadratic_term_of_a_polynomial_fit():
    velocity = noisy(broken, 7)
    found = velocity_fit(jnp.asarray(EDGES), velocity)
    coefficients, covariance = np.polyfit(
        np.log(EDGES), np.log(np.asarray(velocity)), 2, cov=True
    )
    np.testing.assert_allclose(found.curvature, coefficients[0], rtol=1e-8)
    np.testing.assert_allclose(
        found.curvature_stderr, np.sqrt(covariance[0, 0]), rtol=1e-8
    )


@pytest.mark.usefixtures("x64")
def test_p_value_is_that_of_students_t():
    # With 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2).
    found = velocity_fit(jnp.asarray(EDGES[:5]), noisy(broken, 3)[:5])
    t = abs(float(found.curvature / found.curvature_stderr))
    np.testing.assert_allclose(found.p_value, 1 - t / np.sqrt(2 + t * t), rtol=1e-8)


def test_the_prevailing_sign_is_fitted_and_its_share_told():
    velocity = EDGES**1.5
    velocity[[2, 5, 6]] *= -1
    found = velocity_fit(
        jnp.asarray(EDGES, jnp.float32), jnp.asarray(velocity, jnp.float32)
    )
    assert found.sign == 1
    assert found.fit.num_points == 14
    np.testing.assert_allclose(found.sign_share, 14 / 17, rtol=1e-6)
    np.testing.assert_allclose(found.fit.exponent, 1.5, rtol=1e-5)
    # As many of each: the sign of the larger ones.
    found = velocity_fit(jnp.asarray(EDGES[:2]), jnp.asarray([1.0, -3.0]))
    assert found.sign == -1
    assert found.sign_share == 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_exact_laws_are_not_rejected_for_their_rounding(dtype, x64):
    edges = jnp.asarray(EDGES, dtype)
    for exponent in np.linspace(-2, 2, 9):
        found = velocity_fit(edges, 3 * edges ** jnp.asarray(exponent, dtype))
        assert found.p_value > 0.05
        assert found.p_value.dtype == dtype
        assert found.fit.exponent.dtype == dtype


def test_points_that_say_nothing_are_left_out():
    edges = jnp.asarray(EDGES, jnp.float32)
    velocity = 2 * edges
    spoilt = velocity.at[3].set(jnp.nan).at[4].set(0).at[5].set(jnp.inf)
    mask = jnp.ones(17, bool).at[3:7].set(False)
    for found in (
        velocity_fit(edges, spoilt),
        velocity_fit(edges, velocity.at[6].set(9e9), mask),
    ):
        np.testing.assert_allclose(found.fit.exponent, 1, rtol=1e-5)
        assert found.sign_share == 1
    three = velocity_fit(edges[:3], velocity[:3])
    assert np.isfinite(three.fit.exponent)
    assert np.isnan(three.p_value)
    nothing = velocity_fit(edges, 0 * velocity)
    assert nothing.sign == 0
    assert nothing.fit.num_points == 0
    assert nothing.sign_share == 0
    assert np.isnan(nothing.p_value)
    same = velocity_fit(jnp.ones(6), velocity[:6])
    assert np.isnan(same.curvature)
    # Nor do they settle which of two signs with as many points prevails.
    tied = jnp.asarray([1.0, -3.0, jnp.nan], jnp.float32)
    for settled in (
        velocity_fit(edges[:3], tied),
        jax.jit(velocity_fit)(edges[:3], tied),
    ):
        assert settled.sign == -1
        assert settled.sign_share == 0.5


def test_what_is_undefined_is_infinite_in_programs_and_nan_outside():
    edges = jnp.asarray(EDGES[:3], jnp.float32)
    with no_nan():
        inside = compiled(edges, 2 * edges)
        outside = dynamics.velocity_fit(edges, 2 * edges)
    for name in ("curvature", "curvature_stderr", "p_value"):
        assert np.isposinf(getattr(inside, name))
        assert np.isnan(getattr(outside, name))
    np.testing.assert_array_equal(inside.fit.exponent, outside.fit.exponent)


def test_fits_map_over_time():
    exponents = jnp.asarray([0.5, 1.0, 2.0])
    edges = jnp.asarray(EDGES, jnp.float32)
    velocities = edges[None, :] ** exponents[:, None]
    found = jax.vmap(velocity_fit, (None, 0))(edges, velocities)
    np.testing.assert_allclose(found.fit.exponent, exponents, rtol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="velocity: expected shape"):
        velocity_fit(jnp.ones(3), jnp.ones(4))
