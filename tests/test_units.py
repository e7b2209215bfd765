"""Results in other units: of M -> s M and e -> s e, as far as the dtype reaches.

Every number of a result is homogeneous: at two moderate scales one reads off its
degree p, and at extreme ones it has to be ``s^p`` times as large. Where ``s^p`` leaves
the dtype, the result has to say so.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block_problems
from called_names import used_names
from grsd_jax import (
    Binning,
    Lanczos,
    Problem,
    Window,
    conditions,
    dynamics,
    errors,
    kernel,
    linalg,
    shells,
)
from oracles import degree, symmetric_with_spectrum

#: The dtype and its reach: float64 in the mode x64, else float32.
FLOAT = jnp.zeros(()).dtype.type
WIDE = np.float64 == FLOAT

SIZE = 24
RNG = np.random.default_rng(0)
SPECTRUM = np.geomspace(1, 1e-3, SIZE)
MATRIX, _ = symmetric_with_spectrum(SPECTRUM)
MATRIX = MATRIX.astype(FLOAT)
SYMMETRIC = RNG.normal(size=(SIZE, SIZE)) * np.sqrt(np.outer(SPECTRUM, SPECTRUM))
SYMMETRIC = (SYMMETRIC + SYMMETRIC.T).astype(FLOAT)
VALUES = SPECTRUM.astype(FLOAT)
G = RNG.normal(size=SIZE).astype(FLOAT)
START = jax.random.normal(jax.random.key(0), (SIZE, 2))

#: Powers of two: in float32 1e-30 to 1e30, and 1e-15 to 1e15 for what is quadratic.
EXPONENTS = tuple((4 if WIDE else 1) * power for power in (-100, -50, 50, 100))

#: The power of two up to which squares without a flag are followed: that of the result,
#: not of the unit.
MOST = 900 if WIDE else 100

#: Scales are powers of two, which change no digit but where sums are cut off.
RTOL = 1e-10 if WIDE else 2e-5


@jax.jit
def _matmul(matrix, block):
    return jnp.matmul(matrix, block, precision="highest")


_lanczos = jax.jit(
    lambda matrix, start: linalg.block_lanczos(
        functools.partial(_matmul, matrix), start, 5, key=jax.random.key(1)
    )
)
_shells = functools.partial(shells.log_shells, num_shells=6)


def _ritz(s, t):
    return linalg.ritz_pairs(_lanczos(s * MATRIX, t * START))


@functools.cache
def _by_hand(s, t):
    state = linalg.lanczos_init(t * START, 2, key=jax.random.key(1))
    for _ in range(2):
        product = _matmul(s * MATRIX, linalg.lanczos_block(state, 2))
        state = linalg.lanczos_step(state, product)
    return linalg.lanczos_finish(state, 2)


def _leading(s, t):
    product = functools.partial(_matmul, s * MATRIX)
    return linalg.leading_eigenpairs(product, t * START, 4, key=jax.random.key(1))


def _dynamics(s, t):
    return dynamics.shell_dynamics(
        s * VALUES, t * G, s * SYMMETRIC, _shells(s * VALUES), loss_constant=1.0 / s
    )


def _scaled_problem(s):
    """Returns a problem with the error and J in units of s: one program for all."""
    _, params, blocks = block_problems.branches()
    x = jax.random.normal(jax.random.key(2), (2, 4, 3))
    batches = {"x": x, "s": jnp.full((2, 4, 1), s, FLOAT)}
    problem = Problem.from_error(_scaled_error, batches, loss_fn=_scaled_loss)
    return problem, params, blocks


def _scaled_loss(params, batch):
    return jnp.mean(jnp.square(_scaled_error(params, batch)))


def _scaled_error(params, batch):
    shared = block_problems.branches_error(params, batch)
    return (shared + jnp.roll(shared, 2, axis=1) / 4) * batch["s"]


def _block_coherence(s, method):
    problem, params, blocks = _scaled_problem(s)
    found = conditions.block_coherence(
        problem, params, blocks, key=jax.random.key(1), method=method, tolerance=1e-4
    )
    sure = found.coherence > 1e-3  # below the root of eps it is rounding
    return (
        jnp.where(sure, found.products, 0),
        found.norms,
        jnp.where(sure, found.coherence, 0),
        found.converged,
    )


def _measure(s, solver):
    problem, params, _ = _scaled_problem(s)
    found = shells.measure_coupling(
        problem,
        params,
        params,
        key=jax.random.key(1),
        solver=solver,
        shells=Binning(num_shells=4, window=3, num_bootstrap=0),
    )
    lead = found.resolved  # below it values are rounding
    return (
        jnp.where(lead, found.values, 0),
        jnp.where(lead, jnp.abs(jnp.diag(found.coupling)), 0),
        found.literal,
        found.renormalized,
        found.diagonal_fit,
        found.shell_fit,
        conditions.coupling_exponent(found),
    )


def _layers(s):
    problem, params, _ = _scaled_problem(s)
    bins = Binning(num_shells=4, window=3, num_bootstrap=0)
    found = shells.measure_layers(
        problem,
        params,
        params,
        key=jax.random.key(1),
        window=Window(floor=0.01),  # below it values are rounding
        shells=bins,
    )
    lead = found.total.resolved
    of_layers = [layer.values[:2] for layer in found.layers.values()]
    return jnp.where(lead, found.total.values, 0), found.average, of_layers


#: Edges for problems of unit scale, and the parameters of a step.
EDGES = np.array([0.5, 2.0, 5.0], FLOAT)


def _moved(params, by=1.01):
    return jax.tree.map(lambda leaf: FLOAT(by) * leaf, params)


def _midpoint(s):
    problem, params, _ = _scaled_problem(s)
    soft = shells.SoftShells(jnp.asarray(EDGES * s * s), 1 / 2)
    ends = params, _moved(params)
    return dynamics.midpoint_flux(problem, *ends, soft, solver="dense").flux


def _sharp(s):
    problem, params, _ = _scaled_problem(s)
    ends = (problem, params), (problem, _moved(params))
    key = jax.random.key(1)
    return dynamics.sharp_flux_bounds(*ends, EDGES * s * s, num_steps=6, key=key)


def _snapshot(s):
    found = dynamics.spectral_snapshot(*_scaled_problem(s)[:2])
    return found.values[:8], jnp.sort(jnp.abs(found.error))[-3:]


def _time(s):
    problem, params, _ = _scaled_problem(s)
    flow = kernel.gradient_flow_direction(problem, params)
    moved = jax.tree.map(lambda p, d: p + d / (FLOAT(50) * s * s), params, flow)
    return dynamics.measured_time(problem, params, moved)


def _record(s):
    problem, params, _ = _scaled_problem(s)
    soft = shells.SoftShells(jnp.asarray(EDGES * s * s), 1 / 2)
    probe = dynamics.make_probe(
        problem, every=1, shells=soft, solver="dense", schedule=1.0
    )
    state, _ = probe.update(probe.init(jax.random.key(1), params), params, 0)
    _, record = probe.update(state, _moved(params, 1.5), 1)
    balance = record.balance
    assert record.finite
    return record.values[:8], balance.energies, balance.flux, record.effective_time


def _law(s, t):
    ends = [
        dynamics.SpectralSnapshot(
            jnp.asarray(s * FLOAT(growth) * VALUES),
            jnp.eye(SIZE, dtype=FLOAT),
            jnp.asarray(t * np.abs(G)),
            jnp.zeros(2, jnp.uint32),
            jnp.asarray(np.finfo(FLOAT).eps, FLOAT),
            jnp.bool_(True),
        )
        for growth in (1.0, 1.1, 1.3)
    ]
    soft = shells.SoftShells(s * np.array([0.01, 0.05, 0.2], FLOAT), 1 / 2)
    balances = [
        dynamics.exact_balance(*pair, soft, elapsed=1.0)
        for pair in (ends[:2], ends[1:])
    ]
    law = dynamics.velocity_law(balances, [1.0, 2.0])
    # Each fit's prefactor has a degree of its own.
    fits = law.fits.fit.exponent, law.decay.exponent
    energies = [balance.energies for balance in balances]
    return law.times, law.rates, law.products, law.num_edges, fits, energies


def _along(s):
    """Returns the increments of a state in units of s, by maps without a unit."""
    weight = jnp.asarray(MATRIX[:4, :4] + np.eye(4, dtype=FLOAT))
    maps = [lambda h: jax.nn.relu(_matmul(h, weight)) + h / 2] * 3
    state = s * jnp.asarray(MATRIX[:5, :4])
    return conditions.state_increments(maps, state, key=jax.random.key(1))


def _field(s):
    return lambda tree: jax.tree.map(lambda p: -s * p, tree)


def _by_blocks(s):
    problem, params, blocks = _scaled_problem(s)
    found = kernel.linearize_block_kernels(problem, params, blocks)
    return [one.matmat(COLUMNS) for one in found]


def _on_problem(function, *arguments):
    """Returns a row: a function of the problem, its parameters, and a direction."""
    return lambda t: function(*_scaled_problem(t)[:2], *arguments)


def _along_itself(function, *arguments):
    return lambda t: function(
        *_scaled_problem(t)[:2], _scaled_problem(t)[1], *arguments
    )


def _signs(s):
    problem, params, _ = _scaled_problem(s)
    soft = shells.SoftShells(jnp.asarray(EDGES[:2] * s * s), 1 / 2)
    found = shells.measure_stochastic_coupling(
        problem,
        params,
        params,
        key=jax.random.key(1),
        shells=soft,
        num_pairs=3,
        signs=shells.Signs(2, 4),
        renormalize=False,
    )
    return found.matrix, found.mask, found.edges, found.relative_drift


#: Columns of the size of the scaled problem.
COLUMNS = jnp.eye(64, 2, dtype=FLOAT)


#: Calls by the name of the function, several in a list: of s, the unit of the operator,
#: and t, that of the vectors, or of the error and with it of J.
ROWS = {
    "block_lanczos": lambda s, t: _lanczos(s * MATRIX, t * START),
    "lanczos_init": _by_hand,
    "lanczos_step": _by_hand,
    "lanczos_finish": _by_hand,
    "lanczos_block": _by_hand,
    "ritz_pairs": _ritz,
    "leading_eigenpairs": _leading,
    "resolved_pairs": lambda s: linalg.resolved_pairs(s * VALUES, s * 0.02 * VALUES),
    "spectral_density": lambda s, t: linalg.spectral_density(
        _lanczos(s * MATRIX, t * START), SIZE, num_points=32
    ),
    "log_shells": lambda s: _shells(s * VALUES),
    "assign_shells": lambda s: shells.assign_shells(
        s * VALUES, s * np.geomspace(1e-3, 1, 6).astype(FLOAT)
    ),
    "shell_coupling": [
        lambda s: shells.shell_coupling(
            s * SYMMETRIC, s * VALUES, _shells(s * VALUES), renormalize=False
        ),
        lambda s: shells.shell_coupling(
            s * SYMMETRIC, s * VALUES, _shells(s * VALUES), renormalize=True
        ),
    ],
    "toeplitz_approximation": lambda s: shells.toeplitz_approximation(s * MATRIX),
    "toeplitz_residual": lambda s: shells.toeplitz_residual(s * MATRIX),
    "windowed_toeplitz_residual": lambda s: shells.windowed_toeplitz_residual(
        s * MATRIX, 5
    ),
    "fit_power_law": lambda s, t: shells.fit_power_law(
        s * VALUES, t * np.abs(G) * VALUES
    ),
    "measure_coupling": [
        lambda t: _measure(t, "dense"),
        lambda t: _measure(t, Lanczos(4, 6)),
    ],
    "basis_rotation": lambda s: dynamics.basis_rotation(s * VALUES, s * SYMMETRIC),
    "eigenvalue_drift": lambda s: dynamics.eigenvalue_drift(s * SYMMETRIC),
    "shell_dynamics": _dynamics,
    "closure_error": lambda t: dynamics.closure_error(
        t * G, jnp.zeros(SIZE), t * np.abs(G), 1.0
    ),
    "edge_crossings": lambda s, t: dynamics.edge_crossings(
        s * VALUES, s * VALUES[::-1], t * G, s * FLOAT([1e-3, 1e-2, 1])
    ),
    "velocity_fit": lambda s, t: dynamics.velocity_fit(
        s * VALUES, t * np.abs(G) * VALUES
    ),
    "block_coherence": [
        lambda t: _block_coherence(t, "dense"),
        lambda t: _block_coherence(t, "power_iteration"),
    ],
    "influence_profile": lambda t: conditions.influence_profile(
        *_scaled_problem(t)[:2], *_scaled_problem(t)[1:], key=jax.random.key(1)
    ),
    "operator_norms": lambda t: conditions.operator_norms(
        *_scaled_problem(t)[:2], _scaled_problem(t)[1], key=jax.random.key(1)
    ),
    "distance_totals": lambda s: conditions.distance_totals(s * np.abs(MATRIX)),
    "distance_maxima": lambda s: conditions.distance_maxima(s * MATRIX),
    "smallest_band": lambda s: conditions.smallest_band(s * VALUES, 0.7),
    "log_lipschitz": lambda s, t: conditions.log_lipschitz(t * np.abs(G), s * VALUES),
    "propagation_report": lambda s: conditions.propagation_report(
        s * np.abs(SYMMETRIC), constant=float(s), rho=0.9, epsilon=0.01 * float(s)
    ),
    "interaction_range": lambda s: conditions.interaction_range(
        float(s), 0.9, 0.01 * float(s)
    ),
    "projector_drift": lambda t: conditions.projector_drift(
        *(jnp.linalg.qr(t * START)[0], jnp.eye(SIZE, 2))
    ),
    "squared_error": lambda t: errors.squared_error(
        t * START, t * jnp.ones_like(START)
    ),
    "half_squared_loss": lambda t: errors.half_squared_loss(
        t * START, t * jnp.ones_like(START)
    ),
    "measure_layers": lambda t: _layers(t),
    "measure_stochastic_coupling": lambda t: _signs(t),
    "midpoint_flux": lambda t: _midpoint(t),
    "sharp_flux_bounds": lambda t: _sharp(t),
    "spectral_snapshot": lambda t: _snapshot(t),
    "measured_time": lambda t: _time(t),
    "make_probe": lambda t: _record(t),
    "velocity_law": _law,
    "state_increments": lambda s: _along(s),
    "increment_statistics": lambda s: conditions.increment_statistics(
        _along(s).increments
    ),
    "flow_step": lambda s, t: dynamics.flow_step(
        _field(s), {"w": t * jnp.asarray(G)}, FLOAT(0.1) / s
    ),
    "integrate_flow": lambda s, t: dynamics.integrate_flow(
        _field(s), {"w": t * jnp.asarray(G)}, step=FLOAT(0.1) / s, num_steps=2
    ),
    "effective_time": lambda s: dynamics.effective_time(
        lambda step: s * jnp.asarray(VALUES)[step], SIZE
    ),
    "covariance_check": lambda t: dynamics.covariance_check(
        *_scaled_problem(t)[:2], scale=2.0, time=0.01 / float(t) ** 2, num_steps=1
    ).scaled[:, -8:],
    "kernel_dense": _on_problem(kernel.kernel_dense),
    "layer_kernels": _on_problem(kernel.layer_kernels),
    "kernel_matmat": _on_problem(kernel.kernel_matmat, COLUMNS),
    "linearize_kernel": lambda t: kernel.linearize_kernel(
        *_scaled_problem(t)[:2]
    ).matmat(COLUMNS),
    "linearize_block_kernels": lambda t: _by_blocks(t),
    "linearize_derivative": lambda t: _along_itself(kernel.linearize_derivative)(
        t
    ).matmat(COLUMNS),
    "gradient_flow_direction": _on_problem(kernel.gradient_flow_direction),
    "kernel_derivative": _along_itself(kernel.kernel_derivative, COLUMNS),
    "kernel_derivative_matmat": _along_itself(kernel.kernel_derivative_matmat, COLUMNS),
    "central_difference": lambda s, t: kernel.central_difference(
        lambda p: t * jnp.sin(p / s), jnp.asarray(s * G), jnp.asarray(s * VALUES)
    ),
}

#: Nothing in them has a unit: counts, dimensionless numbers, or calls of the others.
WITHOUT_UNITS = {
    "centre_toeplitz_residual",
    "choose_solver",
    "condition_report",
    "correlation_time",
    "coupling_exponent",
    "default_floor",
    "default_step",
    "direction_memory",
    "partition",
    "partition_by_prefix",
    "restrict_to_block",
    "shard_batches",
    "shell_drift",
    "softmax_basis",
    "softmax_cross_entropy",
    "softmax_error",
    "toeplitz_degrees_of_freedom",
    "windowed_toeplitz_degrees_of_freedom",
}

#: Scaled by tests of other files.
ELSEWHERE = {
    "exact_balance": "test_exact_balance::test_balance_follows_the_scales",
    "stochastic_shell_coupling": "test_stochastic::test_scales_drop_out",
}

#: Squares without a flag: what leaves the dtype is 0 or infinite, as in any product.
PLAIN_SQUARES = {
    "edge_crossings",
    "half_squared_loss",
    "kernel_dense",
    "kernel_derivative",
    "measure_coupling",
    "measure_layers",
    "measure_stochastic_coupling",
    "block_coherence",
    "covariance_check",
    "gradient_flow_direction",
    "kernel_derivative_matmat",
    "kernel_matmat",
    "layer_kernels",
    "linearize_block_kernels",
    "linearize_derivative",
    "linearize_kernel",
    "make_probe",
    "measured_time",
    "midpoint_flux",
    "sharp_flux_bounds",
    "spectral_snapshot",
    "velocity_law",
    "operator_norms",
    "fit_power_law",
    "velocity_fit",
}

CASES = [
    pytest.param(row, which, name in PLAIN_SQUARES, id=f"{name}-{number}-{which}")
    for name, rows in ROWS.items()
    for number, row in enumerate(rows if isinstance(rows, list) else [rows])
    for which in inspect.signature(row).parameters
]


def public_functions():
    modules = (kernel, linalg, shells, dynamics, conditions)
    names = {name for module in modules for name in module.__all__}
    names |= {name for name, value in vars(errors).items() if _is_public(name, value)}
    return {name for name in names if not name[0].isupper()}


def _is_public(name, value):
    return getattr(value, "__module__", None) == errors.__name__ and name[0] != "_"


def test_every_public_function_is_scaled_or_has_no_units():
    named = [*ROWS, *WITHOUT_UNITS, *ELSEWHERE]
    assert sorted(named) == sorted(public_functions())


@pytest.mark.parametrize(("name", "place"), ELSEWHERE.items())
def test_what_has_no_row_is_scaled_where_it_is_said(name, place):
    file, _, test = place.partition("::")
    assert name in used_names(file, test=test)


def _numbers(result):
    """Returns the leaves in float64, and which are not floating."""
    leaves = [
        leaf
        for leaf in jax.tree.leaves(result)
        if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    ]
    plain = [not jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
    return [np.asarray(leaf, np.float64) for leaf in leaves], plain


def exponents_for(degrees, plain_squares):
    """Returns the exponents to follow, some of which hold the largest power."""
    largest = max(map(abs, degrees))
    if largest == 0:
        return EXPONENTS[::3]
    reach = int(MOST // largest)
    if plain_squares and EXPONENTS[-1] > reach:  # squares without a flag stay within it
        return (-reach, -(reach // 2), reach // 2, reach)
    return EXPONENTS if reach >= EXPONENTS[2] else (*EXPONENTS, -reach, reach)


@pytest.mark.parametrize(("row", "which", "plain_squares"), CASES)
def test_results_follow_their_units(row, which, plain_squares):
    others = dict.fromkeys(inspect.signature(row).parameters, FLOAT(1))

    def at(exponent):
        return _numbers(row(**others | {which: FLOAT(2.0**exponent)}))

    one, plain = at(0)
    two, _ = at(8)
    degrees = [
        0.0 if fixed else degree(a, b)
        for a, b, fixed in zip(one, two, plain, strict=True)
    ]
    followed = np.array(plain)
    for exponent in exponents_for(degrees, plain_squares):
        found, _ = at(exponent)
        left = False
        each = zip(one, found, degrees, plain, strict=True)
        for leaf, (a, b, p, fixed) in enumerate(each):
            if fixed:
                continue
            expected = a * 2.0 ** (p * exponent)
            size = np.max(np.abs(expected), where=np.isfinite(expected), initial=0)
            least = np.min(np.abs(expected), where=expected != 0, initial=np.inf)
            small = least < np.finfo(FLOAT).tiny and not plain_squares
            if size > 0.3 * np.finfo(FLOAT).max or small:
                left = True
                continue
            np.testing.assert_allclose(b, expected, rtol=RTOL, atol=RTOL * size)
            followed[leaf] = True
        same = all(
            np.array_equal(a, b)
            for a, b, fixed in zip(one, found, plain, strict=True)
            if fixed
        )
        assert same != left, (exponent, left)
    assert followed.all(), followed
