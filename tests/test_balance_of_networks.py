"""Shell dynamics of networks, against closed forms and their own gradient flow."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from block_problems import batches_of
from grsd_jax import Problem, dynamics, gradient_flow_direction, kernel_dense
from grsd_jax.linalg import block_lanczos, ritz_pairs
from grsd_jax.shells import assign_shells, binning
from oracles import network_problem

NUM_SHELLS = 5
LOSSES = ["squared", "softmax_cross_entropy"]


class Moment(NamedTuple):
    """What the dynamics need of one set of parameters, densely, all n pairs."""

    values: jax.Array
    vectors: jax.Array
    error: jax.Array
    error_rate: jax.Array
    coupling: jax.Array


@jax.jit
def moment(problem, params):
    direction = gradient_flow_direction(problem, params)
    kernel, moved = kernel_dense(problem, params, direction)

    def error_of(p):
        return jnp.concatenate(
            [problem.error(p, batch).reshape(-1) for batch in batches_of(problem)]
        )

    error, error_rate = jax.jvp(error_of, (params,), (direction,))
    values, vectors = jnp.linalg.eigh(kernel)
    return Moment(values, vectors, error, error_rate, vectors.T @ moved @ vectors)


log_shells = jax.jit(binning.log_shells, static_argnums=1)
shell_dynamics = jax.jit(dynamics.shell_dynamics, static_argnames="gap")


def balance(now, shells, **options):
    options = {"rate_projections": now.vectors.T @ now.error_rate, **options}
    projections = now.vectors.T @ now.error
    return shell_dynamics(now.values, projections, now.coupling, shells, **options)


def resolved_shells(values, num_shells=NUM_SHELLS):
    return log_shells(values, num_shells, mask=values > 1e-9 * values.max())


@jax.jit
def flow_step(problem, params, step):
    field = partial(gradient_flow_direction, problem)
    return dynamics.flow_step(field, params, step)


def energies_of(now, index, num_shells=NUM_SHELLS):
    """Sums energies over the pairs that had the given shells before, in order."""
    energies = np.zeros(num_shells)
    squares = np.asarray(now.vectors.T @ now.error) ** 2
    np.add.at(energies, index[index >= 0], squares[index >= 0])
    return energies


def linear(params, batch):
    return batch["x"] @ params


def deep_linear(params, batch):
    return batch["x"] @ params[0] @ params[1]


@pytest.mark.usefixtures("x64")
def test_linear_model_decays_mode_by_mode_without_any_transfer():
    rng = np.random.default_rng(0)
    batches = {
        "x": jnp.asarray(rng.normal(size=(2, 3, 8)) * np.geomspace(0.1, 2, 8)),
        "y": jnp.asarray(rng.normal(size=(2, 3, 2))),
    }
    params = jnp.asarray(rng.normal(size=(8, 2)))
    problem = Problem(linear, batches, loss="squared", target="y")
    now = moment(problem, params)
    shells = resolved_shells(now.values)
    result = balance(now, shells)
    assert np.max(np.abs(now.coupling)) == 0
    assert np.max(np.abs(result.flux)) == 0
    assert np.max(np.abs(result.leak)) == 0
    # The mean over 6 examples: e_dot = -M e / 6.
    constant = balance(now, shells, rate_projections=None, loss_constant=1 / 6)
    np.testing.assert_allclose(constant.dissipation, result.dissipation, rtol=1e-10)

    time = 0.2
    (later,) = dynamics.integrate_flow(
        partial(gradient_flow_direction, problem),
        params,
        step=time,
        num_steps=1,
        substeps=64,
    )[1:]
    then = moment(problem, later)
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

    problem = Problem(deep_linear, batches, loss="squared", target="y")
    layers = jnp.diag(jnp.sqrt(jnp.asarray(start)))
    path = dynamics.integrate_flow(
        partial(gradient_flow_direction, problem),
        (layers, layers),
        step=1.0,
        num_steps=8,
        substeps=64,
    )
    for time in range(9):
        params = jax.tree.map(lambda leaf, t=time: leaf[t], path)
        now = moment(problem, params)
        a = products(time)
        rate = 2 * a * (targets - a) / size
        pairs = a[:, None] + a[None, :]
        order = np.argsort(pairs.ravel())
        np.testing.assert_allclose(now.values, pairs.ravel()[order], rtol=1e-7)
        # Off-diagonal pairs come twice, so the drift is compared cluster by cluster.
        drifts = (rate[:, None] + rate[None, :]).ravel()[order]
        drift = np.asarray(dynamics.eigenvalue_drift(now.coupling))
        clusters = np.asarray(
            dynamics.basis_rotation(now.values, now.coupling, gap=1e-9).clusters
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
@pytest.mark.parametrize("loss", LOSSES)
def test_predicted_rates_of_a_network_are_the_measured_ones(loss):
    problem, params = network_problem("mlp", jnp.float64, loss=loss)
    now = moment(problem, params)
    shells = resolved_shells(now.values)
    result = balance(now, shells)
    # Transfers matter here, so that dissipation alone does not close the balance.
    gains = np.sum(np.asarray(result.transfers), axis=1)
    assert np.linalg.norm(gains) > 0.05 * np.linalg.norm(result.energy_rate)

    def moved(step):
        there = moment(problem, flow_step(problem, params, step))
        return jnp.asarray(energies_of(there, np.asarray(shells.index)))

    def total_error(before, after, elapsed):
        found = dynamics.closure_error(result.energy_rate, before, after, elapsed)
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
    problem, params = network_problem("mlp", jnp.float64)
    now = moment(problem, params)
    shells = resolved_shells(now.values)
    assumed = balance(now, shells, rate_projections=None, loss_constant=1 / 10)
    true = balance(now, shells)
    np.testing.assert_array_equal(assumed.transfers, true.transfers)
    gap = np.linalg.norm(assumed.dissipation - true.dissipation)
    assert gap > 0.1 * np.linalg.norm(true.dissipation)

    problem, params = network_problem("mlp", jnp.float64, loss="squared")
    now = moment(problem, params)
    shells = resolved_shells(now.values)
    assumed = balance(now, shells, rate_projections=None, loss_constant=1 / 10)
    true = balance(now, shells)
    np.testing.assert_allclose(assumed.dissipation, true.dissipation, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", LOSSES)
def test_balance_sums_to_rounding(loss):
    problem, params = network_problem("mlp", jnp.float64, loss=loss)
    now = moment(problem, params)
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
    problem, params = network_problem("mlp", jnp.float64)
    now = moment(problem, params)
    leading = jnp.arange(len(now.values)) >= len(now.values) - 9
    shells = log_shells(now.values, 3, mask=leading)
    whole = balance(now, shells)
    omega = np.asarray(dynamics.basis_rotation(now.values, now.coupling).matrix)
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
        assign_shells(kept.values, shells.edges),
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
    run = block_lanczos(
        lambda block: kernel @ block, rest[:, None], 8, key=jax.random.key(0)
    )
    ritz = ritz_pairs(run)
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
    shells = assign_shells(extended.values, shells.edges, mask=mask)
    np.testing.assert_allclose(balance(extended, shells).leak, leak, rtol=1e-6)
