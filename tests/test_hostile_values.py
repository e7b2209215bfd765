"""Hostile values: a right result, a field that says undefined, or one clear sentence.

Every argument of every public function is replaced, one at a time, by what a failed run
or a careless caller would pass. What may not happen is silence: a plausible result that
does not say anything.

For numbers of 1e-30 and 1e30, silence is a result that nothing in it calls undefined or
left out, and that is neither the healthy one in other units nor that of float64.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block_problems
from grsd_jax import (
    Binning,
    PathPoint,
    Problem,
    conditions,
    dynamics,
    errors,
    gradient_flow_direction,
    linalg,
)
from grsd_jax import shells as shells_
from grsd_jax.conditions import propagation_report
from oracles import degree

SIZE = 12
RNG = np.random.default_rng(0)
VALUES = np.geomspace(1, 1e-3, SIZE).astype(np.float32)
MATRIX = RNG.normal(size=(SIZE, SIZE)).astype(np.float32)
MATRIX = MATRIX + MATRIX.T
KERNEL = (MATRIX @ MATRIX).astype(np.float32)
OVERLAP = 0.5 ** np.abs(np.subtract.outer(np.arange(6), np.arange(6))).astype(
    np.float32
)
VECTOR = np.abs(RNG.normal(size=SIZE)).astype(np.float32) + 0.1
EDGES = np.geomspace(1e-3, 1, 5).astype(np.float32)
START = RNG.normal(size=(SIZE, 2)).astype(np.float32)
BASIS = np.linalg.qr(START)[0]
LOGITS = RNG.normal(size=(4, 3)).astype(np.float32)

FEW = Binning(num_shells=3, window=3, num_bootstrap=0)


def _key():
    """Returns the key of every row, made again since each is consumed."""
    return jax.random.key(0)


def _lanczos(matrix, start):
    return linalg.block_lanczos(
        lambda block: jnp.matmul(matrix, block), start, 3, key=_key()
    )


def _start(matrix):
    return _like(START[: len(matrix)], matrix)


def _step(start, product):
    state = linalg.lanczos_init(start, 2, key=_key())
    state = linalg.lanczos_step(state, product)
    return linalg.lanczos_finish(state, 2)


def _leading(matrix, start):
    return linalg.leading_eigenpairs(
        lambda block: jnp.matmul(matrix, block), start, min(2, len(start)), key=_key()
    )


def _coupling(coupling, values, renormalize):
    shells = shells_.log_shells(values, 3)
    found = shells_.shell_coupling(coupling, values, shells, renormalize=renormalize)
    return found, shells.index


def _balance(values, projections, coupling):
    return dynamics.shell_dynamics(
        values,
        projections,
        coupling,
        shells_.assign_shells(
            _like(VALUES[: len(values)], values), _like(EDGES, values)
        ),
        loss_constant=1.0,
    )


def _like(array, other):
    """Returns an array in the dtype of another, if that is a floating one."""
    dtype = np.asarray(other).dtype
    return jnp.asarray(array, dtype if dtype in (np.float32, np.float64) else None)


_, PARAMS, BLOCKS = block_problems.branches(3)


def _problem(x):
    features = np.shape(x)[-1]
    params = {name: _like(leaf[:features], x) for name, leaf in PARAMS.items()}
    batches = {"x": jnp.asarray(x)}
    problem = Problem.from_error(
        block_problems.branches_error,
        batches,
        loss_fn=lambda p, b: jnp.mean(block_problems.branches_error(p, b) ** 2),
    )
    return problem, params, BLOCKS


def _measure(x):
    problem, params, _ = _problem(x)
    found = shells_.measure_coupling(
        problem, params, params, key=_key(), shells=FEW, solver="dense"
    )
    return found, conditions.coupling_exponent(found)


def _layers(x):
    problem, params, _ = _problem(x)
    found = shells_.measure_layers(problem, params, params, key=_key(), shells=FEW)
    return found.total, found.average


def _report(x):
    problem, params, blocks = _problem(x)
    points = [PathPoint(t, problem, params, params) for t in (0.0, 1.0)]
    report = conditions.condition_report(points, blocks, key=_key(), shells=FEW)
    assert not any(v.holds for v in report.verdicts.values())
    return [c.number for v in report.verdicts.values() for c in v.checks]


def _drift(x):
    problem, params, _ = _problem(x)
    found = shells_.measure_coupling(
        problem, params, params, key=_key(), shells=FEW, solver="dense"
    )
    return conditions.shell_drift([found, found]).drift


def _ends(values, error):
    size, eps = len(values), np.finfo(VALUES.dtype).eps
    rest = jnp.zeros(2, jnp.uint32), _like(eps, values), jnp.bool_(True)
    basis = _like(np.linalg.qr(KERNEL[:size, :size])[0], values)
    first = dynamics.SpectralSnapshot(jnp.asarray(values), basis, error, *rest)
    second = dynamics.SpectralSnapshot(
        _like(1.2 * VALUES[:size], values),
        basis[:, ::-1],
        _like(0.9 * VECTOR[:size], values),
        *rest,
    )
    return first, second


def _exact(values, error):
    shells = shells_.SoftShells(_like(EDGES[1:-1], values), 1 / 2)
    return dynamics.exact_balance(*_ends(values, error), shells, elapsed=1.0)


def _law(values, error):
    return dynamics.velocity_law([_exact(values, error)] * 3, [1.0, 2.0, 3.0])


def _time(x):
    problem, params, _ = _problem(x)
    moved = jax.tree.map(
        lambda p, d: p + 0.01 * d, params, gradient_flow_direction(problem, params)
    )
    return dynamics.measured_time(problem, params, moved)


def _midpoint(x):
    problem, params, _ = _problem(x)
    direction = gradient_flow_direction(problem, params)
    moved = jax.tree.map(lambda p, d: p + 0.01 * d, params, direction)
    shells = shells_.SoftShells(_like(EDGES[1:-1], x), 1 / 2)
    return dynamics.midpoint_flux(problem, params, moved, shells, solver="dense")


def _sharp(x):
    problem, params, _ = _problem(x)
    moved = jax.tree.map(lambda p: 1.1 * p, params)
    edges = _like(EDGES[1:-1], x)
    ends = (problem, params), (problem, moved)
    return dynamics.sharp_flux_bounds(*ends, edges, num_steps=4, key=_key())


def _by_signs(kernel, moved):
    return shells_.stochastic_shell_coupling(
        lambda block: jnp.matmul(kernel, block),
        lambda block: jnp.matmul(moved, block),
        _like(np.zeros(0), kernel),
        _like(np.zeros((len(kernel), 0)), kernel),
        shells_.SoftShells(_like([1.0, 10.0], kernel), 1 / 2),
        key=_key(),
        signs=shells_.Signs(2, 4),
    )


def _measure_by_signs(x):
    problem, params, _ = _problem(x)
    return shells_.measure_stochastic_coupling(
        problem, params, params, key=_key(), num_pairs=3, signs=shells_.Signs(2, 4)
    )


def _on_blocks(function, x):
    problem, params, blocks = _problem(x)
    return function(problem, params, blocks)


X = np.asarray(jax.random.normal(jax.random.key(1), (1, 4, 3)))


#: Healthy arguments of every function, and a call with them.
ROWS = {
    "exact_balance": (_exact, {"values": VALUES, "error": VECTOR}),
    "velocity_law": (_law, {"values": VALUES, "error": VECTOR}),
    "measured_time": (_time, {"x": X}),
    "midpoint_flux": (_midpoint, {"x": X}),
    "sharp_flux_bounds": (_sharp, {"x": X}),
    "spectral_snapshot": (
        lambda x: dynamics.spectral_snapshot(*_problem(x)[:2]),
        {"x": X},
    ),
    "stochastic_shell_coupling": (_by_signs, {"kernel": KERNEL, "moved": MATRIX}),
    "measure_stochastic_coupling": (_measure_by_signs, {"x": X}),
    "block_lanczos": (_lanczos, {"matrix": KERNEL, "start": START}),
    "lanczos_init": (_step, {"start": START, "product": START}),
    "lanczos_block": (_step, {"start": START, "product": START}),
    "lanczos_step": (_step, {"start": START, "product": START}),
    "lanczos_finish": (_step, {"start": START, "product": START}),
    "leading_eigenpairs": (_leading, {"matrix": KERNEL, "start": START}),
    "resolved_pairs": (
        linalg.resolved_pairs,
        {"values": VALUES, "residuals": 0.01 * VALUES},
    ),
    "ritz_pairs": (
        lambda matrix: linalg.ritz_pairs(_lanczos(matrix, _start(matrix))),
        {"matrix": KERNEL},
    ),
    "spectral_density": (
        lambda matrix: linalg.spectral_density(
            _lanczos(matrix, _start(matrix)), len(matrix)
        ),
        {"matrix": KERNEL},
    ),
    "log_shells": (lambda values: shells_.log_shells(values, 3), {"values": VALUES}),
    "assign_shells": (shells_.assign_shells, {"values": VALUES, "edges": EDGES}),
    "shell_coupling": (
        lambda coupling, values: (
            _coupling(coupling, values, True),
            _coupling(coupling, values, False),
        ),
        {"coupling": MATRIX, "values": VALUES},
    ),
    "toeplitz_approximation": (shells_.toeplitz_approximation, {"matrix": MATRIX}),
    "toeplitz_residual": (shells_.toeplitz_residual, {"matrix": MATRIX}),
    "windowed_toeplitz_residual": (
        lambda matrix: shells_.windowed_toeplitz_residual(matrix, min(3, len(matrix))),
        {"matrix": MATRIX},
    ),
    "centre_toeplitz_residual": (
        lambda windows: shells_.centre_toeplitz_residual(windows),
        {"windows": VECTOR[:3]},
    ),
    "fit_power_law": (shells_.fit_power_law, {"x": VALUES, "y": VECTOR}),
    "measure_coupling": (_measure, {"x": X}),
    "coupling_exponent": (_measure, {"x": X}),
    "measure_layers": (_layers, {"x": X}),
    "basis_rotation": (
        dynamics.basis_rotation,
        {"values": VALUES, "coupling": MATRIX},
    ),
    "eigenvalue_drift": (dynamics.eigenvalue_drift, {"coupling": MATRIX}),
    "shell_dynamics": (
        _balance,
        {"values": VALUES, "projections": VECTOR, "coupling": MATRIX},
    ),
    "closure_error": (
        lambda rate, before, after: dynamics.closure_error(rate, before, after, 1.0),
        {"rate": VECTOR, "before": VECTOR, "after": 2 * VECTOR},
    ),
    "edge_crossings": (
        dynamics.edge_crossings,
        {
            "values_before": VALUES,
            "values_after": VALUES[::-1].copy(),
            "projections_after": VECTOR,
            "edges": EDGES,
        },
    ),
    "velocity_fit": (dynamics.velocity_fit, {"edges": VALUES, "velocity": VECTOR}),
    "effective_time": (
        lambda rates: dynamics.effective_time(
            lambda step: jnp.asarray(rates)[step], SIZE
        ),
        {"rates": VECTOR},
    ),
    "flow_step": (
        lambda params: dynamics.flow_step(jnp.negative, params, 0.1),
        {"params": VECTOR},
    ),
    "integrate_flow": (
        lambda params: dynamics.integrate_flow(
            jnp.negative, params, step=0.1, num_steps=2
        ),
        {"params": VECTOR},
    ),
    "covariance_check": (
        lambda x: dynamics.covariance_check(
            *_problem(x)[:2], scale=2.0, time=0.01, num_steps=1
        ),
        {"x": X},
    ),
    "correlation_time": (conditions.correlation_time, {"overlap": OVERLAP}),
    "direction_memory": (conditions.direction_memory, {"overlap": OVERLAP}),
    "increment_statistics": (
        conditions.increment_statistics,
        {"increments": RNG.normal(size=(3, 5)).astype(np.float32)},
    ),
    "state_increments": (
        lambda state: conditions.state_increments([jnp.sin], state, key=_key()),
        {"state": LOGITS},
    ),
    "block_coherence": (
        lambda x: _on_blocks(
            lambda p, w, b: (
                conditions.block_coherence(p, w, b, key=_key()),
                conditions.block_coherence(
                    p, w, b, key=_key(), method="power_iteration"
                ),
            ),
            x,
        ),
        {"x": X},
    ),
    "influence_profile": (
        lambda x: _on_blocks(
            lambda p, w, b: conditions.influence_profile(p, w, w, b, key=_key()), x
        ),
        {"x": X},
    ),
    "operator_norms": (
        lambda x: _on_blocks(
            lambda p, w, b: conditions.operator_norms(p, w, w, key=_key()), x
        ),
        {"x": X},
    ),
    "condition_report": (_report, {"x": X}),
    "shell_drift": (_drift, {"x": X}),
    "distance_totals": (conditions.distance_totals, {"matrix": MATRIX}),
    "distance_maxima": (conditions.distance_maxima, {"matrix": MATRIX}),
    "smallest_band": (
        lambda profile: conditions.smallest_band(profile, 0.9),
        {"profile": VECTOR},
    ),
    "log_lipschitz": (
        conditions.log_lipschitz,
        {"statistic": VECTOR, "centers": VALUES},
    ),
    "projector_drift": (
        conditions.projector_drift,
        {"vectors": BASIS, "others": BASIS[::-1].copy()},
    ),
    "propagation_report": (
        lambda influence: propagation_report(
            influence, constant=100.0, rho=0.9, epsilon=1e-3
        ),
        {"influence": np.abs(MATRIX)},
    ),
    "interaction_range": (
        lambda constant: conditions.interaction_range(constant, 0.9, 0.01),
        {"constant": np.float32(2.0)},
    ),
    "softmax_error": (
        lambda logits: errors.softmax_error(logits, np.zeros(len(logits), int)),
        {"logits": LOGITS},
    ),
    "softmax_cross_entropy": (
        lambda logits: errors.softmax_cross_entropy(logits, np.zeros(len(logits), int)),
        {"logits": LOGITS},
    ),
    "squared_error": (errors.squared_error, {"outputs": LOGITS, "targets": LOGITS + 1}),
    "half_squared_loss": (
        errors.half_squared_loss,
        {"outputs": LOGITS, "targets": LOGITS + 1},
    ),
}

#: They take no array of numbers.
WITHOUT_NUMBERS = {
    "default_floor",
    "make_probe",
    "partition",
    "partition_by_prefix",
    "restrict_to_block",
    "softmax_basis",
    "toeplitz_degrees_of_freedom",
    "windowed_toeplitz_degrees_of_freedom",
}

#: What is right for zeros: the result of a linear or a total function, or of arguments
#: of which one may well be zero.
ZERO_IS_RIGHT = {
    "basis_rotation coupling",
    "leading_eigenpairs start",  # a random one in its place
    "resolved_pairs residuals",
    "shell_dynamics coupling",
    "spectral_density matrix",  # all mass lies below
    "block_lanczos matrix",  # eigenvalues of zero; no direction is live
    "closure_error after",
    "closure_error before",
    "closure_error rate",
    "centre_toeplitz_residual windows",
    "correlation_time overlap",  # no memory
    "direction_memory overlap",
    "distance_maxima matrix",
    "distance_totals matrix",
    "edge_crossings projections_after",
    "effective_time rates",
    "eigenvalue_drift coupling",
    "exact_balance error",
    "flow_step params",
    "half_squared_loss outputs",
    "half_squared_loss targets",
    "integrate_flow params",
    "lanczos_block product",
    "lanczos_finish product",
    "midpoint_flux x",
    "sharp_flux_bounds x",
    "lanczos_init product",
    "lanczos_step product",
    "leading_eigenpairs matrix",
    "operator_norms x",
    "influence_profile x",
    "shell_coupling coupling",
    "smallest_band profile",
    "softmax_cross_entropy logits",
    "softmax_error logits",
    "squared_error outputs",
    "squared_error targets",
    "state_increments state",
    "toeplitz_approximation matrix",
}

#: An empty result of an empty argument.
EMPTY_IS_RIGHT = {
    "basis_rotation",
    "distance_maxima",
    "distance_totals",
    "eigenvalue_drift",
    "flow_step params",
    "integrate_flow params",
    "resolved_pairs residuals",
    "resolved_pairs values",
    "toeplitz_approximation",
}

#: Integers that are right as they are, or that the function says it converts.
INTEGER_IS_RIGHT = {
    "centre_toeplitz_residual windows",
    "effective_time rates",
    "half_squared_loss targets",
    "propagation_report influence",
    "squared_error targets",
}

#: Their result for tiny or huge numbers, in the words of `spoil`, is of no number that
#: float64 would find.
OTHER_IN_DOUBLE = {
    "edge_crossings projections_after tiny",  # plain squares, see test_units
    "state_increments state huge",  # other directions, and the sine of 1e30
    "state_increments state tiny",  # increments that are rounding
}

#: How many numbers of a result come before those of its rounding, of a random start, or
#: of directions that degenerate eigenvalues leave open: float64 finds others for them.
BEFORE_ROUNDING = {
    "block_coherence": 3,
    "covariance_check": 3,
    "exact_balance": 5,
    "influence_profile": 1,
    "leading_eigenpairs": 2,
    "midpoint_flux": 2,
    "operator_norms": 2,
    "sharp_flux_bounds": 1,
    "spectral_snapshot": 1,
}

#: What only the caller's own product or network sees: dtypes and shapes are its own.
OF_THE_CALLER = {"x", "rates", "state"}
SLOW = {"condition_report", "measure_layers", "shell_drift"}
PRODUCTS = {
    ("stochastic_shell_coupling", "kernel"),
    ("stochastic_shell_coupling", "moved"),
    ("block_lanczos", "matrix"),
    ("leading_eigenpairs", "matrix"),
    ("ritz_pairs", "matrix"),
    ("spectral_density", "matrix"),
}


def public_functions():
    names = set()
    for module in (linalg, shells_, dynamics, conditions):
        names |= {name for name in module.__all__ if not name[0].isupper()}
    for name, value in vars(errors).items():
        if getattr(value, "__module__", None) == errors.__name__ and name[0] != "_":
            names.add(name)
    return names


def test_every_public_function_has_a_row():
    assert public_functions() == set(ROWS) | WITHOUT_NUMBERS
    arguments = {
        f"{name} {argument}" for name, (_, a) in ROWS.items() for argument in a
    }
    assert arguments >= ZERO_IS_RIGHT | {x.rsplit(" ", 1)[0] for x in OTHER_IN_DOUBLE}


#: Powers of two, which round nothing; the moderate one shows the degree of a number.
SCALES = {"tiny": 2.0**-100, "huge": 2.0**100, "moderate": 2.0**8}


def spoil(array, kind):
    """Returns the array as a failed run or a careless caller might pass it."""
    if kind in ("nan", "inf"):
        spoilt = np.array(array)
        spoilt[(0,) * (spoilt.ndim > 0)] = np.float32(kind)  # the first row
        return spoilt
    if kind == "integer":
        return np.asarray(np.ceil(array), np.int32)
    if kind == "half":
        return jnp.asarray(array, jnp.bfloat16)
    if kind == "empty":
        return np.zeros((0,) * np.ndim(array), np.float32)
    if kind in SCALES:
        return array * np.float32(SCALES[kind])
    if kind == "one":
        return array[(slice(1),) * np.ndim(array)]
    return np.zeros_like(array)


def leaves(result):
    found = []
    for leaf in jax.tree.leaves(result):
        if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            found.append(np.asarray(leaf))
    return found


def says(result, healthy):
    """Whether a result tells that something is undefined or was left out."""
    found, expected = leaves(result), leaves(healthy)
    if any(not np.isfinite(x).all() for x in found if x.dtype.kind not in "biu"):
        return True
    if len(found) != len(expected):  # None in place of a number
        return True
    for x, y in zip(found, expected, strict=True):
        if x.dtype == bool and not np.all(x[y] if x.shape == y.shape else x):
            return True
        if x.dtype.kind in "iu" and not np.array_equal(x, y):
            return True
    return False


@functools.cache
def healthy(name):
    call, arguments = ROWS[name]
    return call(**arguments) if name != "condition_report" else [0.0]


def cases():
    for name, (_, arguments) in ROWS.items():
        for argument in arguments:
            kinds = ["nan", "inf", "zeros", "tiny", "huge"]
            if argument not in OF_THE_CALLER and (name, argument) not in PRODUCTS:
                kinds += ["empty", "integer"] + ["half"] * (argument != "params")
            # The report puts together what the others measure.
            marks = [pytest.mark.scheduled] if name in SLOW else []
            for kind in kinds:
                yield pytest.param(name, argument, kind, marks=marks)


def in_other_units(name, argument, kind, result):
    """Whether a result is the healthy one in units of the argument's scale."""
    arguments = ROWS[name][1]
    moderate = outcome(
        name, arguments | {argument: spoil(arguments[argument], "moderate")}
    )
    each = [leaves(x) for x in (healthy(name), moderate, result)]
    if isinstance(moderate, str) or len({len(x) for x in each}) > 1:
        return False
    exponent = np.log2(SCALES[kind])
    for one, two, found in zip(*each, strict=True):
        if found.dtype.kind not in "biu":
            one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
            if not agrees(found, one * 2.0 ** (degree(one, two) * exponent)):
                return False
    return True


def agrees(found, expected):
    """Whether numbers agree, as far as single precision and its sums reach."""
    size = np.max(np.abs(expected), initial=0)
    return np.allclose(found, expected, rtol=1e-3, atol=1e-3 * size)


def as_in_double(name, given, result):
    """Whether a result is that of the same arguments in float64."""
    with jax.enable_x64(True):
        double = outcome(name, {k: np.asarray(x, float)[()] for k, x in given.items()})
    if isinstance(double, str):
        return False
    each = list(zip(leaves(result), leaves(double), strict=True))
    return all(agrees(x, y) for x, y in each[: BEFORE_ROUNDING.get(name)])


def outcome(name, given):
    """Returns the result, or the sentence that refuses it."""
    try:
        return ROWS[name][0](**given)
    except ValueError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "argument", "kind"), list(cases()))
def test_nothing_is_silent(name, argument, kind):
    arguments = ROWS[name][1]
    given = arguments | {argument: spoil(arguments[argument], kind)}
    case, result = f"{name} {argument}", outcome(name, given)
    if isinstance(result, str):
        assert re.match(r"[\w.\[\]() :,']+: expected .+, got .+", result), result
    elif kind == "half":  # measured as what it is in single precision
        exact = arguments | {argument: np.asarray(given[argument], np.float32)}
        for x, y in zip(leaves(result), leaves(outcome(name, exact)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    elif kind == "integer":
        assert case in INTEGER_IS_RIGHT
    elif kind in SCALES and not says(result, healthy(name)):
        right = f"{case} {kind}" in OTHER_IN_DOUBLE
        right = right or in_other_units(name, argument, kind, result)
        assert right or as_in_double(name, given, result), result
    elif kind == "zeros" and case in ZERO_IS_RIGHT:
        assert all(np.isfinite(x).all() for x in leaves(result))
    elif kind == "empty" and {name, case} & EMPTY_IS_RIGHT:
        assert all(np.size(x) == 0 or not x.any() for x in leaves(result))
    else:
        assert says(result, healthy(name)), result


#: The edges of shells are not one number.
KEPT = {("assign_shells", "edges"), ("edge_crossings", "edges")}


def one_of_each(name):
    """Returns the arguments, each cut to one element along each of its axes."""
    return {
        argument: value if (name, argument) in KEPT else spoil(value, "one")
        for argument, value in ROWS[name][1].items()
    }


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.scheduled] * (x in SLOW)) for x in ROWS],
)
def test_one_element_is_answered_or_named(name):
    given = one_of_each(name)
    result = outcome(name, given)
    if isinstance(result, str):
        assert re.match(r"[\w.\[\]() :,']+: expected .+, got .+", result), result
    elif not says(result, result):
        assert as_in_double(name, given, result), result


def test_one_shell_is_answered():
    """It holds the mean square of the coupling, and no Toeplitz residual."""
    values, matrix = jnp.asarray(VALUES), jnp.asarray(MATRIX)
    shells = shells_.log_shells(values, 1)
    np.testing.assert_array_equal(shells.index, np.zeros(SIZE))
    exact, spectrum = MATRIX.astype(float), VALUES.astype(float)
    for renormalize, over in ((False, 1.0), (True, np.outer(spectrum, spectrum))):
        found = shells_.shell_coupling(matrix, values, shells, renormalize=renormalize)
        assert found.mask.all()
        np.testing.assert_allclose(found.matrix, [[np.mean(exact**2 / over)]], 1e-5)
        assert shells_.toeplitz_residual(found.matrix, found.mask) == 0
        assert shells_.toeplitz_degrees_of_freedom(found.mask) == 0


def test_one_shell_of_a_network_is_answered():
    problem, params, _ = _problem(X)
    options = {"key": _key(), "solver": "dense"}
    one = Binning(num_shells=1, window=1, num_bootstrap=0)
    found = shells_.measure_coupling(problem, params, params, shells=one, **options)
    kept = np.ix_(found.resolved, found.resolved)
    mean = np.mean(np.asarray(found.coupling, float)[kept] ** 2)
    np.testing.assert_allclose(found.literal.coupling.matrix, [[mean]], 1e-5)
    assert found.literal.degrees_of_freedom == 0
