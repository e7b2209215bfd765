"""Power-law fits, against numpy.polyfit, closed forms and planted laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.results import with_undefined
from grsd_jax.shells import power_law
from modes import no_nan

compiled = jax.jit(
    power_law.fit_power_law, static_argnames=("num_bootstrap", "confidence")
)


def fit_power_law(*points, **options):
    return with_undefined(compiled(*points, **options))


def planted(exponent, prefactor, noise, size=40, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = 10.0 ** rng.uniform(-4, 0, size)
    y = prefactor * x**exponent * np.exp(noise * rng.standard_normal(size))
    return x.astype(dtype), y.astype(dtype)


def oracle(x, y):
    """Slope, prefactor, R^2 and standard error by the textbook, in float64."""
    u, v = np.log(x.astype(np.float64)), np.log(y.astype(np.float64))
    slope, intercept = np.polyfit(u, v, 1)
    rest = np.sum((v - intercept - slope * u) ** 2)
    r_squared = 1 - rest / np.sum((v - v.mean()) ** 2)
    stderr = np.sqrt(rest / (u.size - 2) / np.sum((u - u.mean()) ** 2))
    return slope, np.exp(intercept), r_squared, stderr


@pytest.mark.parametrize("exponent", [-2.0, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_matches_polyfit_and_the_analytic_standard_error(exponent, noise):
    x, y = planted(exponent, 3.0, noise)
    fit = fit_power_law(x, y)
    slope, prefactor, r_squared, stderr = oracle(x, y)
    np.testing.assert_allclose(fit.exponent, slope, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fit.prefactor, prefactor, rtol=1e-4)
    np.testing.assert_allclose(fit.r_squared, r_squared, atol=1e-5)
    np.testing.assert_allclose(fit.exponent_stderr, stderr, rtol=1e-3)
    assert fit.num_points == 40
    assert fit.num_points.dtype == np.int32
    assert fit.interval is None


@pytest.mark.parametrize("exponent", [-1.5, 1.0, 3.0])
@pytest.mark.parametrize("prefactor", [1e-6, 1.0, 1e6])
def test_exact_power_law(exponent, prefactor):
    fit = fit_power_law(*planted(exponent, prefactor, noise=0.0))
    np.testing.assert_allclose(fit.exponent, exponent, rtol=2e-6)
    np.testing.assert_allclose(fit.prefactor, prefactor, rtol=1e-4)
    np.testing.assert_allclose(fit.r_squared, 1.0, rtol=1e-6)
    assert fit.exponent_stderr < 1e-6


def test_float64_is_exact_to_rounding(x64):
    x, y = planted(1.25, 2.0, 0.3, dtype=np.float64)
    fit = fit_power_law(x, y)
    got = (fit.exponent, fit.prefactor, fit.r_squared, fit.exponent_stderr)
    np.testing.assert_allclose(got, oracle(x, y), rtol=1e-12)
    assert fit.exponent.dtype == np.float64


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_units_change_the_prefactor_alone(scale):
    x, y = planted(0.8, 1.0, 0.4)
    plain, scaled = (
        fit_power_law(x * by, y * by, num_bootstrap=30, key=jax.random.key(0))
        for by in np.float32([1, scale])
    )
    for name in ("exponent", "r_squared", "exponent_stderr", "interval"):
        got, want = getattr(scaled, name), getattr(plain, name)
        np.testing.assert_allclose(got, want, rtol=1e-4)
    np.testing.assert_allclose(
        scaled.prefactor, plain.prefactor * scale ** (1 - plain.exponent), rtol=1e-3
    )


def test_narrow_range_in_float32():
    # The logarithms differ in their last digits only: centering comes before squaring.
    x = np.float32(1e6) * (1 + np.linspace(0, 1e-2, 30, dtype=np.float32))
    y = np.square(x.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(fit_power_law(x, y).exponent, 2.0, rtol=1e-3)


def test_unusable_points_are_left_out():
    x, y = planted(1.0, 1.0, 0.2, size=30)
    bad = np.float32([np.nan, np.inf, 0.0, -1.0, 1e-42])
    want = fit_power_law(x, y, num_bootstrap=200, key=jax.random.key(1))
    padded_x = np.concatenate([bad, np.ones(5, np.float32), x, np.float32([7.0])])
    padded_y = np.concatenate([np.ones(5, np.float32), bad, y, np.float32([1e9])])
    mask = np.arange(41) < 40
    fit = fit_power_law(
        padded_x, padded_y, mask, num_bootstrap=200, key=jax.random.key(1)
    )
    assert fit.num_points == 30
    np.testing.assert_allclose(fit.exponent, want.exponent, rtol=1e-5)
    np.testing.assert_allclose(fit.exponent_stderr, want.exponent_stderr, rtol=1e-4)
    # Another length, so other draws of the same law.
    np.testing.assert_allclose(fit.interval, want.interval, atol=0.02)


@pytest.mark.parametrize("size", [0, 1])
def test_too_few_points(size):
    x, y = planted(1.0, 1.0, 0.1, size=5)
    mask = np.arange(5) < size
    fit = fit_power_law(x, y, mask, num_bootstrap=10, key=jax.random.key(0))
    assert fit.num_points == size
    for value in (fit.exponent, fit.prefactor, fit.r_squared, fit.exponent_stderr):
        assert np.isnan(value)
    assert np.isnan(fit.interval).all()


def test_two_points_have_a_slope_but_no_error():
    x, y = np.float32([1, 10]), np.float32([2, 200])
    fit = fit_power_law(x, y, num_bootstrap=20, key=jax.random.key(0))
    np.testing.assert_allclose(fit.exponent, 2.0, rtol=1e-6)
    np.testing.assert_allclose(fit.prefactor, 2.0, rtol=1e-6)
    assert np.isnan(fit.exponent_stderr)
    assert np.isnan(fit.interval).all()


@pytest.mark.parametrize("size", [2, 7, 33])
@pytest.mark.parametrize("value", [1e-7, 0.3, 12345.678])
def test_no_spread(size, value):
    same = np.full(size, value, np.float32)
    _, y = planted(1.0, 1.0, 0.5, size=size)
    for fit in (power_law.fit_power_law(same, y), fit_power_law(same, y)):
        assert np.isnan(fit.exponent)
        assert np.isnan(fit.prefactor)
        assert fit.num_points == size
    # A constant y is a law of exponent 0, with no variance to explain.
    for fit in (power_law.fit_power_law(y, same), fit_power_law(y, same)):
        assert fit.exponent == 0
        np.testing.assert_allclose(fit.prefactor, value, rtol=1e-5)
        assert np.isnan(fit.r_squared)


def test_interval_covers_the_planted_exponent_as_often_as_it_says():
    points = [planted(1.0, 2.0, 0.5, size=50, seed=seed) for seed in range(300)]
    x, y = (np.stack(side) for side in zip(*points, strict=True))
    keys = jax.random.split(jax.random.key(0), 300)

    @jax.jit
    @jax.vmap
    def interval(x, y, key):
        fit = fit_power_law(x, y, num_bootstrap=300, key=key, confidence=0.8)
        return fit.interval

    low, high = np.asarray(interval(x, y, keys)).T
    assert (low < high).all()
    assert 0.72 < np.mean((low < 1.0) & (high > 1.0)) < 0.86


def test_interval_is_that_of_a_numpy_bootstrap():
    x, y = planted(1.0, 1.0, 0.5)
    got = fit_power_law(x, y, num_bootstrap=4000, key=jax.random.key(2)).interval
    rng = np.random.default_rng(0)
    slopes = []
    for _ in range(4000):
        draw = rng.integers(0, 40, 40)
        slopes.append(np.polyfit(np.log(x[draw]), np.log(y[draw]), 1)[0])
    want = np.quantile(slopes, [0.025, 0.975])
    np.testing.assert_allclose(got, want, atol=0.1 * (want[1] - want[0]))


def test_degenerate_resamples_do_not_poison_the_interval():
    # Of three points, one resample in nine draws a single one three times.
    x, y = np.float32([1, 10, 100]), np.float32([1.0, 11.0, 98.0])
    fit = fit_power_law(x, y, num_bootstrap=500, key=jax.random.key(0))
    slopes = np.log10([11.0, 98.0 / 11.0])
    np.testing.assert_allclose(fit.interval, [slopes.min(), slopes.max()], rtol=1e-4)
    # Two distinct x, one of them rare.
    x = np.float32([1.0] * 9 + [10.0])
    y = np.float32([1.0, 1.1] * 4 + [1.0, 10.0])
    fit = fit_power_law(x, y, num_bootstrap=500, key=jax.random.key(0))
    assert np.isfinite(fit.interval).all()
    assert fit.interval[0] <= fit.exponent <= fit.interval[1]


def test_nothing_is_nan_on_the_way():
    x, y = np.float32([0, -1, 1, 10, 100]), np.float32([1, 1, 1, 11, 98])
    with no_nan():
        for fit in (power_law.fit_power_law, compiled):
            fit(x, y, num_bootstrap=30, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("x", "y", "finite"),
    [
        ([1], [2], ()),
        ([3, 3, 3], [1, 2, 4], ()),
        ([1, 10], [2, 200], ("exponent", "prefactor")),
        (
            [1, 10, 100],
            [3, 3, 3],
            ("exponent", "prefactor", "exponent_stderr", "interval"),
        ),
    ],
)
def test_what_is_undefined_is_infinite_in_programs_and_nan_outside(x, y, finite):
    x, y = np.float32(x), np.float32(y)
    with no_nan():
        inside, outside = (
            fit(x, y, num_bootstrap=30, key=jax.random.key(0))
            for fit in (compiled, power_law.fit_power_law)
        )
    read = with_undefined(inside)
    for name in set(inside._fields) - {"num_points"}:
        got, expected = (np.asarray(getattr(f, name)) for f in (inside, outside))
        np.testing.assert_array_equal(getattr(read, name), expected)
        if name in finite:
            np.testing.assert_array_equal(got, expected)
            assert np.isfinite(got).all(), name
        else:
            assert np.isinf(got).all(), name
            assert np.isnan(expected).all(), name


def test_vmap_and_jit():
    points = [planted(1.0, 2.0, 0.3, seed=seed) for seed in range(3)]
    x, y = (np.stack(side) for side in zip(*points, strict=True))
    mask = x > np.float32(1e-3)
    keys = jax.random.split(jax.random.key(0), 3)

    def fit(x, y, mask, key):
        return fit_power_law(x, y, mask, num_bootstrap=30, key=key)

    together = jax.jit(jax.vmap(fit))(x, y, mask, jax.random.clone(keys))
    for k in range(3):
        alone = fit(x[k], y[k], mask[k], keys[k])
        for got, want in zip(together, alone, strict=True):
            np.testing.assert_allclose(got[k], want, rtol=1e-4)


def test_compute_in_operations_with_zeros_and_gaps():
    x = np.geomspace(1e18, 1e25, 15)
    y = 3.0 * (x / 1e20) ** -0.05
    y[4], y[9] = 0.0, np.nan
    for unit in (1.0, 100.0, 1e-30):
        fit = fit_power_law(np.float32(x * unit), np.float32(y))
        assert abs(fit.exponent + 0.05) < 1e-6
        assert fit.num_points == 13
    with pytest.raises(ValueError, match="x: expected a real floating dtype"):
        fit_power_law([1, 10, 100], [1.0, 2.0, 4.0])


def test_gradient_of_the_exponent(x64):
    x, y = planted(1.0, 2.0, 0.3, dtype=np.float64)
    gradient = jax.grad(lambda y: fit_power_law(x, y).exponent)(y)
    u = np.log(x) - np.log(x).mean()
    np.testing.assert_allclose(gradient, u / np.sum(u**2) / y, rtol=1e-9)


def test_gradients_are_finite_at_a_perfect_fit(x64):
    x = np.array([1.0, 2.0, 4.0])
    gradient = jax.grad(lambda y: fit_power_law(x, y).exponent_stderr)(x * x)
    np.testing.assert_array_equal(gradient, np.zeros(3))


def test_rejects_bad_arguments():
    x, y = planted(1.0, 1.0, 0.1, size=4)
    with pytest.raises(ValueError, match=r"y: expected shape \[4\], got \[3\]"):
        fit_power_law(x, y[:3])
    with pytest.raises(ValueError, match=r"x: expected shape \[any\]"):
        fit_power_law(x[None], y[None])
    with pytest.raises(ValueError, match="x: expected a real floating dtype"):
        fit_power_law(jnp.arange(4), y)
    with pytest.raises(ValueError, match="mask: expected a bool dtype"):
        fit_power_law(x, y, x)
    with pytest.raises(ValueError, match=r"key: expected a PRNG key .* got None"):
        fit_power_law(x, y, num_bootstrap=10)
    with pytest.raises(ValueError, match="num_bootstrap: expected an integer >= 0"):
        power_law.fit_power_law(x, y, num_bootstrap=-1)
    for confidence in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match="confidence: expected a number between"):
            fit_power_law(x, y, confidence=confidence)
