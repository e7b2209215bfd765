"""Shell dynamics by identities: rotation, planted transport, degenerate cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import dynamics
from grsd_jax.shells import binning

shell_dynamics = jax.jit(dynamics.shell_dynamics, static_argnames="gap")
basis_rotation = jax.jit(dynamics.basis_rotation, static_argnames="gap")
velocity_fit = jax.jit(dynamics.velocity_fit)
assign_shells = jax.jit(binning.assign_shells)
log_shells = jax.jit(binning.log_shells, static_argnums=1)


def planted(num_shells, velocities):
    """Returns one pair a shell whose transport has the given velocity at each edge."""
    edges = np.geomspace(1e-3, 1e2, num_shells + 1)
    values = np.sqrt(edges[1:] * edges[:-1])
    projections = np.random.default_rng(4).uniform(0.5, 1.5, num_shells)
    width = np.log(edges[1] / edges[0])
    pair_energy = projections[1:] ** 2 + projections[:-1] ** 2
    flux = velocities(edges[1:-1]) * pair_energy / (2 * width * edges[1:-1])
    coupling = np.zeros((num_shells, num_shells))
    lower = np.arange(num_shells - 1)
    coupling[lower, lower + 1] = coupling[lower + 1, lower] = (
        flux * np.diff(values) / (2 * projections[1:] * projections[:-1])
    )
    values, projections, coupling = map(jnp.asarray, (values, projections, coupling))
    shells = assign_shells(values, jnp.asarray(edges))
    result = shell_dynamics(values, projections, coupling, shells, loss_constant=1.0)
    return edges[1:-1], flux, result


def two_pairs(distance, coupling=1.0, dtype=jnp.float32):
    """Returns the balance of two pairs around an edge at 1, ``distance`` apart."""
    values = jnp.asarray([1 - distance / 2, 1 + distance / 2, 10.0], dtype)
    edges = jnp.asarray([0.1, 1.0, 10.0], dtype)
    matrix = jnp.zeros((3, 3), dtype).at[0, 1].set(coupling).at[1, 0].set(coupling)
    return shell_dynamics(
        values,
        jnp.ones(3, dtype),
        matrix,
        assign_shells(values, edges),
        rate_projections=jnp.zeros(3, dtype),
    )


@pytest.mark.usefixtures("x64")
def test_rotation_of_a_turning_matrix_is_its_generator():
    rng = np.random.default_rng(1)
    values = jnp.asarray([0.1, 0.7, 0.7, 2.0, 5.0])
    basis, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    generator = rng.normal(size=(5, 5))
    generator -= generator.T
    matrix = (basis * np.asarray(values)) @ basis.T
    moved = generator @ matrix - matrix @ generator
    result = basis_rotation(values, jnp.asarray(basis.T @ moved @ basis))
    expected = basis.T @ generator @ basis
    expected[1, 2] = expected[2, 1] = 0  # a gauge
    np.testing.assert_allclose(result.matrix, expected, atol=1e-12)
    np.testing.assert_array_equal(result.matrix, -result.matrix.T)
    np.testing.assert_array_equal(result.clusters, [0, 1, 1, 2, 3])
    assert result.num_degenerate == 2
    np.testing.assert_allclose(
        dynamics.eigenvalue_drift(jnp.asarray(basis.T @ moved @ basis)), 0, atol=1e-12
    )


def test_clusters_do_not_depend_on_the_order_of_the_values():
    values = jnp.asarray([5.0, 1.0, 3.0, 1.00001, 0.99999])
    result = basis_rotation(values, jnp.ones((5, 5)), gap=1e-5)
    np.testing.assert_array_equal(result.clusters, [2, 0, 1, 0, 0])
    assert result.num_degenerate == 3


@pytest.mark.usefixtures("x64")
def test_planted_transport_has_its_velocity():
    edges, flux, result = planted(12, lambda x: -0.3 * x**1.5)
    np.testing.assert_allclose(result.flux, flux, rtol=1e-10)
    np.testing.assert_allclose(result.velocity, -0.3 * edges**1.5, rtol=1e-10)
    assert result.non_adjacent_share == 0
    np.testing.assert_array_equal(result.flux, result.nearest_flux)
    np.testing.assert_allclose(
        result.dissipation,
        2
        * result.energies
        * np.asarray(
            np.sqrt(np.geomspace(1e-3, 1e2, 13)[1:] * np.geomspace(1e-3, 1e2, 13)[:-1])
        ),
        rtol=1e-10,
    )
    fit = velocity_fit(jnp.asarray(edges), result.velocity)
    np.testing.assert_allclose(fit.fit.exponent, 1.5, rtol=1e-10)
    np.testing.assert_allclose(fit.fit.prefactor, 0.3, rtol=1e-10)
    assert fit.sign == -1
    assert fit.sign_share == 1
    assert fit.p_value > 0.01

    edges, _, result = planted(12, lambda x: 0.3 * x * (1 + x))
    fit = velocity_fit(jnp.asarray(edges), result.velocity)
    assert fit.fit.r_squared > 0.98
    assert fit.p_value < 1e-4


def test_near_degenerate_pairs_over_an_edge_are_reported_and_do_not_blow_up():
    apart = two_pairs(0.1)
    np.testing.assert_allclose(apart.flux, [2 / 0.1], rtol=1e-4)
    assert apart.num_ambiguous == 0
    assert np.max(apart.ambiguous_rate) == 0
    for distance in (1e-6, 2.5e-7, 0.0):
        together = two_pairs(distance)
        assert np.max(np.abs(together.transfers)) == 0
        if distance:
            assert together.num_ambiguous == 2
            tolerance = 4 * 10 * np.finfo(np.float32).eps
            np.testing.assert_allclose(
                together.ambiguous_rate, [2 / tolerance] * 2, rtol=1e-5
            )
        assert np.all(np.isfinite(np.concatenate([together.energy_rate, apart.flux])))
        assert together.finite


@pytest.mark.usefixtures("x64")
def test_the_balance_goes_smoothly_through_a_crossing_without_coupling():
    rates = [
        np.asarray(two_pairs(d, coupling=0.0, dtype=jnp.float64).energy_rate)
        for d in (1e-3, 1e-17, -1e-3)
    ]
    assert all(np.array_equal(rate, rates[0]) for rate in rates)


def test_empty_shells_have_no_energy_and_edges_without_any_no_velocity():
    values = jnp.asarray([1.0, 1.1, 900.0, 1000.0])
    shells = log_shells(values, 6)
    result = shell_dynamics(
        values, jnp.ones(4), jnp.ones((4, 4)), shells, loss_constant=1.0
    )
    np.testing.assert_array_equal(result.mask, [1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(result.velocity_mask, [1, 0, 0, 0, 1])
    # Energy passes an empty shell all the same.
    np.testing.assert_allclose(result.flux, np.full(5, result.flux[0]), rtol=1e-5)
    assert result.flux[0] > 0
    np.testing.assert_array_equal(result.velocity[1:4], 0)
    assert result.non_adjacent_share == 1
    assert all(np.all(np.isfinite(leaf)) for leaf in result)

    nothing = log_shells(values, 3, mask=jnp.zeros(4, bool))
    result = shell_dynamics(
        values, jnp.ones(4), jnp.ones((4, 4)), nothing, loss_constant=1.0
    )
    assert not np.any(result.mask)
    assert not np.any(result.velocity_mask)
    assert result.unresolved_energy == 4
    assert all(np.all(np.isfinite(leaf)) for leaf in result)


def test_shells_that_merge_and_a_single_shell_stay_finite():
    values = jnp.full(4, 2.0)
    matrix = jnp.ones((4, 4))
    for num_shells in (1, 3):
        shells = log_shells(values, num_shells)
        result = shell_dynamics(values, jnp.ones(4), matrix, shells, loss_constant=0.5)
        assert result.flux.shape == (num_shells - 1,)
        assert all(np.all(np.isfinite(leaf)) for leaf in result)
        np.testing.assert_allclose(np.sum(result.energy_rate), -8)


def test_no_motion_changes_nothing():
    values = jnp.asarray([1.0, 2.0, 4.0, 8.0])
    zeros = jnp.zeros((4, 4))
    result = shell_dynamics(
        values,
        jnp.ones(4),
        zeros,
        log_shells(values, 3),
        rate_projections=jnp.zeros(4),
    )
    for name in ("dissipation", "transfers", "leak", "energy_rate", "flux", "velocity"):
        assert np.max(np.abs(getattr(result, name))) == 0
    assert result.non_adjacent_share == 0
    assert result.finite
    fit = velocity_fit(jnp.asarray([2.0, 4.0]), result.velocity)
    assert fit.sign == 0
    assert fit.fit.num_points == 0


@pytest.mark.parametrize(
    "where", ["values", "projections", "coupling", "rates", "energy", "outside"]
)
def test_what_is_not_finite_is_flagged_and_does_not_spread(where):
    values = jnp.asarray([0.5, 1.0, 2.0, 4.0, 8.0])
    inputs = {
        "values": values,
        "projections": jnp.ones(5),
        "coupling": jnp.ones((5, 5)),
        "rates": jnp.ones(5),
        "energy": jnp.asarray(5.0),
    }
    index = {"coupling": (2, 3), "energy": (), "outside": 0}.get(where, 2)
    broken = {"outside": "projections"}.get(where, where)
    mask = jnp.arange(5) >= 1
    for bad in (jnp.nan, jnp.inf):
        given = dict(inputs)
        given[broken] = given[broken].at[index].set(bad)
        shells = log_shells(given["values"], 3, mask=mask)
        result = shell_dynamics(
            given["values"],
            given["projections"],
            given["coupling"],
            shells,
            rate_projections=given["rates"],
            total_energy=given["energy"],
        )
        assert not result.finite
        fields = result._asdict()
        if where == "energy":
            del fields["unresolved_energy"]
        assert all(np.all(np.isfinite(leaf)) for leaf in fields.values())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_jit_vmap_over_time_and_dtypes(dtype, x64):
    rng = np.random.default_rng(2)
    values = jnp.asarray(np.sort(rng.uniform(0.1, 9, (3, 7))), dtype)
    projections = jnp.asarray(rng.normal(size=(3, 7)), dtype)
    coupling = jnp.asarray(rng.normal(size=(3, 7, 7)), dtype)
    edges = jnp.asarray(np.geomspace(0.1, 9, 5), dtype)

    def at(values, projections, coupling):
        shells = assign_shells(values, edges)
        return shell_dynamics(values, projections, coupling, shells, loss_constant=0.1)

    mapped = jax.jit(jax.vmap(at))(values, projections, coupling)
    for time in range(3):
        single = at(values[time], projections[time], coupling[time])
        for name, got in mapped._asdict().items():
            want = getattr(single, name)
            assert got.dtype == want.dtype
            if jnp.issubdtype(want.dtype, jnp.floating):
                assert want.dtype == dtype
            scale = 1 + np.max(np.abs(want), initial=0)
            np.testing.assert_allclose(
                got[time], want, atol=200 * float(jnp.finfo(dtype).eps) * scale
            )


@pytest.mark.usefixtures("x64")
def test_gradients_pass_through():
    rng = np.random.default_rng(3)
    values = jnp.asarray([0.2, 0.2, 0.9, 3.0, 3.0, 8.0])
    coupling = jnp.asarray(rng.normal(size=(6, 6)))
    shells = log_shells(values, 3)

    def total(values, projections, coupling):
        result = shell_dynamics(
            values, projections, coupling, shells, loss_constant=1.0
        )
        return jnp.sum(jnp.square(result.energy_rate)) + jnp.sum(result.velocity)

    args = (values, jnp.asarray(rng.normal(size=6)), coupling)
    grads = jax.grad(total, argnums=(0, 1, 2))(*args)
    for place, grad in enumerate(grads):
        assert np.all(np.isfinite(grad))
        if place == 0:
            continue
        step = 1e-6 * rng.normal(size=grad.shape)
        ends = [
            total(*(a + s * step if i == place else a for i, a in enumerate(args)))
            for s in (1, -1)
        ]
        np.testing.assert_allclose(
            (ends[0] - ends[1]) / 2, np.sum(grad * step), rtol=1e-6
        )


def test_arguments_that_do_not_fit_are_named():
    values = jnp.asarray([1.0, 2.0, 4.0])
    shells = log_shells(values, 2)
    matrix, ones = jnp.ones((3, 3)), jnp.ones(3)
    balance = dynamics.shell_dynamics
    with pytest.raises(ValueError, match=r"loss_constant: .* got neither\."):
        balance(values, ones, matrix, shells)
    with pytest.raises(ValueError, match=r"loss_constant: .* got both\."):
        balance(values, ones, matrix, shells, loss_constant=1, rate_projections=ones)
    with pytest.raises(ValueError, match=r"coupling: expected shape \[3, 3\]"):
        balance(values, ones, matrix[:2], shells, loss_constant=1)
    with pytest.raises(ValueError, match=r"projections: expected shape \[3\]"):
        balance(values, ones[:2], matrix, shells, loss_constant=1)
    with pytest.raises(ValueError, match=r"shells\.index"):
        balance(values[:2], ones[:2], matrix[:2, :2], shells, loss_constant=1)
    with pytest.raises(ValueError, match="gap: expected a finite number > 0"):
        balance(values, ones, matrix, shells, loss_constant=1, gap=-1.0)
    with pytest.raises(ValueError, match=r"total_energy: expected shape \[\]"):
        balance(values, ones, matrix, shells, loss_constant=1, total_energy=ones)
    with pytest.raises(ValueError, match="coupling: expected shape"):
        dynamics.eigenvalue_drift(jnp.ones((2, 3)))
