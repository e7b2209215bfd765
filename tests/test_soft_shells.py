"""Soft and sharp shells: a partition of unity, its steps and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grsd_jax.shells import SoftShells

EDGES = np.geomspace(1e-3, 10, 5)
VALUES = np.concatenate([[0.0, -1e-9], np.geomspace(1e-7, 1e5, 200)])


find_members = jax.jit(SoftShells.members)


def checked(edges=EDGES, *, width=0.5, dtype=jnp.float64):
    return SoftShells(jnp.asarray(edges, dtype), width=width).checked(dtype)


def steps(values, edges, width):
    """Returns ``up_k`` by its definition."""
    values = np.maximum(values, 1e-60)[:, None]
    if not width:
        return (values >= edges).astype(float)
    return 1 / (1 + (edges / values) ** (1 / width))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("width", [1 / 2, 1 / 3, 0.7, 0])
def test_steps_and_shells_are_their_definitions(width):
    shells, expected = checked(width=width), steps(VALUES, EDGES, width)
    np.testing.assert_allclose(shells.above(jnp.asarray(VALUES)), expected, atol=1e-14)
    padded = np.pad(expected, ((0, 0), (1, 1)))
    padded[:, 0] = 1
    members = shells.members(jnp.asarray(VALUES))
    np.testing.assert_allclose(members, -np.diff(padded, axis=1), atol=1e-14)
    np.testing.assert_allclose(np.sum(members, axis=1), 1, rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_value_on_a_sharp_edge_lies_above_it_in_programs_too(dtype):
    # For some of these numbers the product with the reciprocal is less than one.
    edges = np.geomspace(1e-3, 10, 60)
    with jax.enable_x64(dtype == jnp.float64):
        shells = checked(edges, width=0, dtype=dtype)
        members = find_members(shells, shells.edges)
        np.testing.assert_array_equal(members, np.eye(61)[1:])


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.floats(-12, 6), min_size=4, max_size=4, unique_by=lambda x: round(x, 3)
    ),
    st.sampled_from([0, 1 / 3, 1 / 2, 2.0]),
)
def test_shells_add_up_to_one_and_are_not_negative(exponents, width):
    edges = 10 ** (np.sort(exponents) / 10)
    shells = checked(edges, width=width, dtype=jnp.float32)
    members = find_members(shells, jnp.asarray(VALUES, jnp.float32))
    assert np.min(members) >= 0
    np.testing.assert_allclose(np.sum(members, axis=1), 1, rtol=1e-6)


def test_members_far_from_their_shell_do_not_cancel():
    shells = checked(dtype=jnp.float32)
    found = shells.members(jnp.asarray([1e4, 1e-6], jnp.float32))
    # Far above: (lambda_a^2 - lambda_{a-1}^2) / lambda^2; far below: the inverse.
    squares = np.append(0, EDGES**2)
    np.testing.assert_allclose(found[0, :-1], np.diff(squares) / 1e8, rtol=1e-4)
    inverse = np.append(1 / EDGES**2, 0)
    np.testing.assert_allclose(found[1, 1:], -np.diff(inverse) * 1e-12, rtol=1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("width", [1 / 2, 1 / 3])
def test_windows_are_derivatives_in_log_lambda(width):
    shells, values, h = checked(width=width), jnp.asarray(VALUES[2:]), 1e-5
    slope = (shells.above(values, h) - shells.above(values, -h)) / (2 * h)
    np.testing.assert_allclose(shells.windows(values), slope, atol=1e-9)
    np.testing.assert_allclose(
        shells.above(values, h), shells.above(values * jnp.exp(h)), rtol=1e-10
    )
    assert np.all(shells.windows(jnp.zeros(1)) == 0)


@pytest.mark.usefixtures("x64")
def test_windows_of_sharp_edges_are_the_mean_of_both_shells():
    shells = checked([1.0, 2.0, 8.0], width=0)
    values = jnp.asarray([0.5, 1.0, 1.9, 2.0, 7.9, 8.0])
    inside = np.array([0, 1, 1, 1, 1, 0]) / np.log(8)
    np.testing.assert_allclose(shells.windows(values)[:, 1], inside, rtol=1e-12)
    assert np.all(shells.windows(values)[:, [0, 2]] == 0)
    np.testing.assert_array_equal(shells.reach()[np.array([0, 2])], 0)
    assert np.all(checked([1.0], width=0).windows(values) == 0)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e28])
@pytest.mark.parametrize("width", [0, 1 / 3, 1 / 2])
def test_shells_follow_the_scale_of_the_spectrum(scale, width):
    values = jnp.asarray(VALUES, jnp.float32)
    edges = jnp.asarray(EDGES, jnp.float32)
    plain = checked(edges, width=width, dtype=jnp.float32)
    scaled = checked(edges * scale, width=width, dtype=jnp.float32)
    for name in ("above", "members", "windows", "offsets"):
        found = getattr(scaled, name)(values * scale)
        expected = getattr(plain, name)(values)
        assert np.all(np.isfinite(found))
        if width:  # a value on a sharp edge may fall on its other side
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


def test_only_wide_or_sharp_shells_are_wide():
    assert checked(np.exp([0.0, 4.0]), width=0.5, dtype=jnp.float32).are_wide()
    assert not checked(np.exp([0.0, 3.99]), width=0.5, dtype=jnp.float32).are_wide()
    assert checked(np.exp([0.0, 0.1]), width=0, dtype=jnp.float32).are_wide()


def test_shells_are_data_and_their_width_is_not():
    shells = SoftShells(jnp.asarray(EDGES, jnp.float32), width=1 / 3)
    again = jax.jit(lambda s: s)(shells)
    assert again.width == 1 / 3
    np.testing.assert_array_equal(again.edges, shells.edges)


@pytest.mark.parametrize(
    "edges",
    [
        [1.0, 1.0],
        [2.0, 1.0],
        [0.0, 1.0],
        [1.0, np.inf],
        pytest.param([np.nan, 1.0], marks=pytest.mark.not_in_mode("debug_nans")),
        [-1.0],
    ],
)
def test_edges_that_do_not_rise_are_refused(edges):
    message = r"shells\.edges: expected positive, finite"
    with pytest.raises(ValueError, match=message):
        checked(edges, dtype=jnp.float32)
    shells = SoftShells(jnp.asarray(edges, jnp.float32))
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda: shells.checked(jnp.float32).edges)()


def test_other_bad_shells_are_refused():
    with pytest.raises(ValueError, match="width: expected a finite number >= 0"):
        SoftShells(jnp.ones(1), width=-0.5)
    with pytest.raises(ValueError, match=r"shells\.edges: expected a real floating"):
        SoftShells(jnp.asarray([1, 2])).checked(jnp.float32)
    with pytest.raises(ValueError, match=r"shells\.edges: expected shape"):
        SoftShells(jnp.ones((2, 2))).checked(jnp.float32)
    with pytest.raises(ValueError, match=r"len\(shells\.edges\)"):
        SoftShells(jnp.ones(0)).checked(jnp.float32)
