"""Shell dynamics against closed forms, identities, and the flow of small networks."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax
from grsd_jax._jacobian import as_pytree
from oracles import problem

NUM_SHELLS = 5


class Moment(NamedTuple):
    """What the dynamics need of one set of parameters, densely, all n pairs."""

    values: jax.Array
    vectors: jax.Array
    error: jax.Array
    error_rate: jax.Array
    coupling: jax.Array


def moment(error_fn, loss_fn, params, batches):
    return _moment(as_pytree(error_fn), as_pytree(loss_fn), params, batches)


@jax.jit
def _moment(error_fn, loss_fn, params, batches):
    direction = grsd_jax.gradient_flow_direction(loss_fn, params, batches)
    kernel, moved = grsd_jax.kernel_with_derivative_dense(
        error_fn, params, batches, direction, reduction="stack"
    )

    def error_of(p):
        num_batches = jax.tree.leaves(batches)[0].shape[0]
        parts = [
            error_fn(p, jax.tree.map(lambda leaf, k=k: leaf[k], batches)).reshape(-1)
            for k in range(num_batches)
        ]
        return jnp.concatenate(parts)

    error, error_rate = jax.jvp(error_of, (params,), (direction,))
    values, vectors = jnp.linalg.eigh(kernel)
    return Moment(values, vectors, error, error_rate, vectors.T @ moved @ vectors)


shell_dynamics = jax.jit(grsd_jax.shell_dynamics, static_argnames="gap")


def balance(now, shells, **options):
    options = {"rate_projections": now.vectors.T @ now.error_rate, **options}
    projections = now.vectors.T @ now.error
    return shell_dynamics(now.values, projections, now.coupling, shells, **options)


def resolved_shells(values, num_shells=NUM_SHELLS):
    return grsd_jax.log_shells(values, num_shells, mask=values > 1e-9 * values.max())


@jax.jit
def flow_step(loss_fn, params, batches, step):
    def field(p):
        return grsd_jax.gradient_flow_direction(loss_fn, p, batches)

    return grsd_jax.flow_step(field, params, step)


def energies_of(now, index, num_shells=NUM_SHELLS):
    """Sums energies over the pairs that had the given shells before, in order."""
    energies = np.zeros(num_shells)
    squares = np.asarray(now.vectors.T @ now.error) ** 2
    np.add.at(energies, index[index >= 0], squares[index >= 0])
    return energies


def linear_error(params, batch):
    return grsd_jax.squared_error(batch["x"] @ params, batch["y"])


def linear_loss(params, batch):
    outputs = batch["x"] @ params
    return jnp.mean(grsd_jax.half_squared_loss(outputs, batch["y"]))


def deep_linear_error(params, batch):
    return grsd_jax.squared_error(batch["x"] @ params[0] @ params[1], batch["y"])


def deep_linear_loss(params, batch):
    outputs = batch["x"] @ params[0] @ params[1]
    return jnp.mean(grsd_jax.half_squared_loss(outputs, batch["y"]))


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
    shells = grsd_jax.assign_shells(values, jnp.asarray(edges))
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
        grsd_jax.assign_shells(values, edges),
        rate_projections=jnp.zeros(3, dtype),
    )


@pytest.mark.usefixtures("x64")
def test_linear_model_decays_mode_by_mode_without_any_transfer():
    rng = np.random.default_rng(0)
    batches = {
        "x": jnp.asarray(rng.normal(size=(2, 3, 8)) * np.geomspace(0.1, 2, 8)),
        "y": jnp.asarray(rng.normal(size=(2, 3, 2))),
    }
    params = jnp.asarray(rng.normal(size=(8, 2)))
    now = moment(linear_error, linear_loss, params, batches)
    shells = resolved_shells(now.values)
    result = balance(now, shells)
    assert np.max(np.abs(now.coupling)) == 0
    assert np.max(np.abs(result.flux)) == 0
    assert np.max(np.abs(result.leak)) == 0
    # The mean over 6 examples: e_dot = -M e / 6.
    constant = balance(now, shells, rate_projections=None, loss_constant=1 / 6)
    np.testing.assert_allclose(constant.dissipation, result.dissipation, rtol=1e-10)

    def field(p):
        return grsd_jax.gradient_flow_direction(linear_loss, p, batches)

    time = 0.2
    (later,) = grsd_jax.integrate_flow(
        field, params, step=time, num_steps=1, substeps=64
    )[1:]
    then = moment(linear_error, linear_loss, later, batches)
    squares = np.asarray(now.vectors.T @ now.error) ** 2
    expected = squares * np.exp(-2 * np.asarray(now.values) * time / 6)
    got = np.asarray(now.vectors.T @ then.error) ** 2
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-12)
    index = np.asarray(shells.index)
    rates = np.zeros(NUM_SHELLS)
    np.add.at(rates, index, -2 * np.asarray(now.values) / 6 * squares)
    np.testing.assert_allclose(result.energy_rate, rates, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_two_layer_linear_network_follows_its_closed_form():
    # W2 W1 = diag(a), balanced, inputs the unit vectors, targets diag(s): the mean over
    # d examples gives a_dot = 2 a (s - a) / d, and M has the pairs a_c + a_i, e_c e_i'.
    targets = np.array([3.0, 1.5, 0.6, 0.25])
    start = np.array([0.02, 0.05, 0.03, 0.08])
    size = len(targets)
    batches = {"x": jnp.eye(size)[None], "y": jnp.diag(jnp.asarray(targets))[None]}

    def products(time):
        return targets / (
            1 + (targets / start - 1) * np.exp(-2 * targets * time / size)
        )

    def field(p):
        return grsd_jax.gradient_flow_direction(deep_linear_loss, p, batches)

    layers = jnp.diag(jnp.sqrt(jnp.asarray(start)))
    path = grsd_jax.integrate_flow(
        field, (layers, layers), step=1.0, num_steps=8, substeps=64
    )
    for time in range(9):
        params = jax.tree.map(lambda leaf, t=time: leaf[t], path)
        now = moment(deep_linear_error, deep_linear_loss, params, batches)
        a = products(time)
        rate = 2 * a * (targets - a) / size
        pairs = a[:, None] + a[None, :]
        order = np.argsort(pairs.ravel())
        np.testing.assert_allclose(now.values, pairs.ravel()[order], rtol=1e-7)
        # Off-diagonal pairs come twice, so the drift is compared cluster by cluster.
        drifts = (rate[:, None] + rate[None, :]).ravel()[order]
        drift = np.asarray(grsd_jax.eigenvalue_drift(now.coupling))
        clusters = np.asarray(
            grsd_jax.basis_rotation(now.values, now.coupling, gap=1e-9).clusters
        )
        sums = partial(np.bincount, clusters)
        np.testing.assert_allclose(sums(weights=drift), sums(weights=drifts), rtol=1e-6)
        # The eigenvectors stand still, whatever crosses.
        result = balance(now, resolved_shells(now.values), gap=1e-9)
        assert np.max(np.abs(result.transfers)) < 1e-10
        energies = (a - targets) ** 2
        np.testing.assert_allclose(np.sum(result.energies), np.sum(energies), rtol=1e-7)
        rates = 2 * (a - targets) * rate
        np.testing.assert_allclose(np.sum(result.energy_rate), np.sum(rates), rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("error", [grsd_jax.squared_error, grsd_jax.softmax_error])
def test_predicted_rates_of_a_network_are_the_measured_ones(error):
    error_fn, params, batches, loss_fn = problem("mlp", jnp.float64, error=error)
    now = moment(error_fn, loss_fn, params, batches)
    shells = resolved_shells(now.values)
    result = balance(now, shells)
    # Transfers matter here, so that dissipation alone does not close the balance.
    gains = np.sum(np.asarray(result.transfers), axis=1)
    assert np.linalg.norm(gains) > 0.05 * np.linalg.norm(result.energy_rate)

    def moved(step):
        there = flow_step(loss_fn, params, batches, step)
        there = moment(error_fn, loss_fn, there, batches)
        return jnp.asarray(energies_of(there, np.asarray(shells.index)))

    def total_error(before, after, elapsed):
        found = grsd_jax.closure_error(result.energy_rate, before, after, elapsed)
        assert found.defined
        return float(found.total_error)

    steps = [0.005, 0.0025, 0.00125]
    forward = [total_error(result.energies, moved(h), h) for h in steps]
    central = [total_error(moved(-h), moved(h), 2 * h) for h in steps]
    orders = np.log2(np.divide(forward[:-1], forward[1:]))
    np.testing.assert_allclose(orders, 1, atol=0.1)
    orders = np.log2(np.divide(central[:-1], central[1:]))
    np.testing.assert_allclose(orders, 2, atol=0.2)
    assert central[-1] < 1e-4


@pytest.mark.usefixtures("x64")
def test_squared_loss_constant_is_not_that_of_the_softmax_error():
    error_fn, params, batches, loss_fn = problem("mlp", jnp.float64)
    now = moment(error_fn, loss_fn, params, batches)
    shells = resolved_shells(now.values)
    assumed = balance(now, shells, rate_projections=None, loss_constant=1 / 10)
    true = balance(now, shells)
    np.testing.assert_array_equal(assumed.transfers, true.transfers)
    gap = np.linalg.norm(assumed.dissipation - true.dissipation)
    assert gap > 0.1 * np.linalg.norm(true.dissipation)

    error_fn, params, batches, loss_fn = problem(
        "mlp", jnp.float64, error=grsd_jax.squared_error
    )
    now = moment(error_fn, loss_fn, params, batches)
    shells = resolved_shells(now.values)
    assumed = balance(now, shells, rate_projections=None, loss_constant=1 / 10)
    true = balance(now, shells)
    np.testing.assert_allclose(assumed.dissipation, true.dissipation, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("error", [grsd_jax.squared_error, grsd_jax.softmax_error])
def test_balance_sums_to_rounding(error):
    error_fn, params, batches, loss_fn = problem("mlp", jnp.float64, error=error)
    now = moment(error_fn, loss_fn, params, batches)
    result = balance(now, resolved_shells(now.values))
    transfers = np.asarray(result.transfers)
    np.testing.assert_array_equal(transfers, -transfers.T)
    energy = float(now.error @ now.error)
    rate = 2 * float(now.error @ now.error_rate)
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
    close(np.sum(result.energies) + result.unresolved_energy, energy)
    close(np.sum(result.dissipation) + result.unresolved_dissipation, -rate)
    close(np.sum(result.energy_rate), np.sum(result.leak) - np.sum(result.dissipation))
    # Flux differences are the transfers of each shell.
    flux = np.concatenate([[0], np.asarray(result.flux), [0]])
    close(flux[:-1] - flux[1:], np.sum(transfers, axis=1))
    by_hand = [transfers[a + 1 :, : a + 1].sum() for a in range(NUM_SHELLS - 1)]
    close(result.flux, by_hand)
    close(result.nearest_flux, [transfers[a + 1, a] for a in range(NUM_SHELLS - 1)])
    distance = np.abs(np.subtract.outer(range(NUM_SHELLS), range(NUM_SHELLS)))
    share = np.abs(transfers)[distance > 1].sum() / np.abs(transfers).sum()
    close(result.non_adjacent_share, share)


@pytest.mark.usefixtures("x64")
def test_what_is_not_resolved_is_a_leak_and_a_number():
    error_fn, params, batches, loss_fn = problem("mlp", jnp.float64)
    now = moment(error_fn, loss_fn, params, batches)
    leading = jnp.arange(len(now.values)) >= len(now.values) - 9
    shells = grsd_jax.log_shells(now.values, 3, mask=leading)
    whole = balance(now, shells)
    omega = np.asarray(grsd_jax.basis_rotation(now.values, now.coupling).matrix)
    g = np.asarray(now.vectors.T @ now.error)
    index = np.asarray(shells.index)
    leak = np.zeros(3)
    for i in np.flatnonzero(index >= 0):
        outside = np.flatnonzero(index < 0)
        leak[index[i]] += 2 * g[i] * np.sum(omega[outside, i] * g[outside])
    np.testing.assert_allclose(whole.leak, leak, rtol=1e-9)
    assert np.max(np.abs(leak)) > 1e-4

    kept = Moment(
        now.values[leading],
        now.vectors[:, leading],
        now.error,
        now.error_rate,
        now.coupling[leading][:, leading],
    )
    part = balance(
        kept,
        grsd_jax.assign_shells(kept.values, shells.edges),
        total_energy=now.error @ now.error,
        total_dissipation=-2 * now.error @ now.error_rate,
    )
    np.testing.assert_allclose(part.unresolved_energy, whole.unresolved_energy)
    np.testing.assert_allclose(
        part.unresolved_dissipation, whole.unresolved_dissipation, rtol=1e-9
    )
    np.testing.assert_allclose(part.transfers, whole.transfers, rtol=1e-9)
    assert np.max(np.abs(part.leak)) == 0
    np.testing.assert_allclose(whole.energy_rate - part.energy_rate, leak, rtol=1e-9)

    # Ritz pairs of the Krylov space of what is left stand in for all the pairs there.
    rest = now.error - kept.vectors @ (kept.vectors.T @ now.error)
    deflated = now.vectors[:, ~leading]
    kernel = deflated @ jnp.diag(now.values[~leading]) @ deflated.T
    run = grsd_jax.block_lanczos(
        lambda block: kernel @ block, rest[:, None], 8, key=jax.random.key(0)
    )
    ritz = grsd_jax.ritz_pairs(run)
    vectors = jnp.concatenate([kept.vectors, ritz.vectors], axis=1)
    moved = now.vectors @ now.coupling @ now.vectors.T
    extended = Moment(
        jnp.concatenate([kept.values, ritz.values]),
        vectors,
        now.error,
        now.error_rate,
        vectors.T @ moved @ vectors,
    )
    mask = jnp.arange(len(extended.values)) < 9
    shells = grsd_jax.assign_shells(extended.values, shells.edges, mask=mask)
    np.testing.assert_allclose(balance(extended, shells).leak, leak, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_rotation_of_a_turning_matrix_is_its_generator():
    rng = np.random.default_rng(1)
    values = jnp.asarray([0.1, 0.7, 0.7, 2.0, 5.0])
    basis, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    generator = rng.normal(size=(5, 5))
    generator -= generator.T
    matrix = (basis * np.asarray(values)) @ basis.T
    moved = generator @ matrix - matrix @ generator
    result = grsd_jax.basis_rotation(values, jnp.asarray(basis.T @ moved @ basis))
    expected = basis.T @ generator @ basis
    expected[1, 2] = expected[2, 1] = 0  # a gauge
    np.testing.assert_allclose(result.matrix, expected, atol=1e-12)
    np.testing.assert_array_equal(result.matrix, -result.matrix.T)
    np.testing.assert_array_equal(result.clusters, [0, 1, 1, 2, 3])
    assert result.num_degenerate == 2
    np.testing.assert_allclose(
        grsd_jax.eigenvalue_drift(jnp.asarray(basis.T @ moved @ basis)), 0, atol=1e-12
    )


def test_clusters_do_not_depend_on_the_order_of_the_values():
    values = jnp.asarray([5.0, 1.0, 3.0, 1.00001, 0.99999])
    result = grsd_jax.basis_rotation(values, jnp.ones((5, 5)), gap=1e-5)
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
    fit = grsd_jax.velocity_fit(jnp.asarray(edges), result.velocity)
    np.testing.assert_allclose(fit.fit.exponent, 1.5, rtol=1e-10)
    np.testing.assert_allclose(fit.fit.prefactor, 0.3, rtol=1e-10)
    assert fit.sign == -1
    assert fit.sign_share == 1
    assert fit.p_value > 0.01

    edges, _, result = planted(12, lambda x: 0.3 * x * (1 + x))
    fit = grsd_jax.velocity_fit(jnp.asarray(edges), result.velocity)
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
    shells = grsd_jax.log_shells(values, 6)
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

    nothing = grsd_jax.log_shells(values, 3, mask=jnp.zeros(4, bool))
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
        shells = grsd_jax.log_shells(values, num_shells)
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
        grsd_jax.log_shells(values, 3),
        rate_projections=jnp.zeros(4),
    )
    for name in ("dissipation", "transfers", "leak", "energy_rate", "flux", "velocity"):
        assert np.max(np.abs(getattr(result, name))) == 0
    assert result.non_adjacent_share == 0
    assert result.finite
    fit = grsd_jax.velocity_fit(jnp.asarray([2.0, 4.0]), result.velocity)
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
        shells = grsd_jax.log_shells(given["values"], 3, mask=mask)
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
        shells = grsd_jax.assign_shells(values, edges)
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
    shells = grsd_jax.log_shells(values, 3)

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
    shells = grsd_jax.log_shells(values, 2)
    matrix, ones = jnp.ones((3, 3)), jnp.ones(3)
    dynamics = grsd_jax.shell_dynamics
    with pytest.raises(ValueError, match=r"loss_constant: .* got neither\."):
        dynamics(values, ones, matrix, shells)
    with pytest.raises(ValueError, match=r"loss_constant: .* got both\."):
        dynamics(values, ones, matrix, shells, loss_constant=1, rate_projections=ones)
    with pytest.raises(ValueError, match=r"coupling: expected shape \[3, 3\]"):
        dynamics(values, ones, matrix[:2], shells, loss_constant=1)
    with pytest.raises(ValueError, match=r"projections: expected shape \[3\]"):
        dynamics(values, ones[:2], matrix, shells, loss_constant=1)
    with pytest.raises(ValueError, match=r"shells\.index"):
        dynamics(values[:2], ones[:2], matrix[:2, :2], shells, loss_constant=1)
    with pytest.raises(ValueError, match="gap: expected a finite number > 0"):
        dynamics(values, ones, matrix, shells, loss_constant=1, gap=-1.0)
    with pytest.raises(ValueError, match=r"total_energy: expected shape \[\]"):
        dynamics(values, ones, matrix, shells, loss_constant=1, total_energy=ones)
    with pytest.raises(ValueError, match="coupling: expected shape"):
        grsd_jax.eigenvalue_drift(jnp.ones((2, 3)))
