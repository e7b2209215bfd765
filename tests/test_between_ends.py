"""The exact balance between two points of a training, by every solver."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grsd_jax import Problem, dynamics
from grsd_jax._arrays import matmul
from grsd_jax.dynamics import KrylovSteps, exact_balance, measured_time, spectra
from grsd_jax.dynamics.between_ends import count_by_quadrature
from grsd_jax.dynamics.fingerprint import fingerprint
from grsd_jax.linalg import block_lanczos, leading_eigenpairs
from grsd_jax.shells import SoftShells
from oracles import cast, dense_kernel, symmetric_with_spectrum
from test_compiles import compilations
from test_exact_balance import by_definition, snapshot_of

KEY = jax.random.key(0)
EDGES = np.geomspace(1e-3, 10, 6)
# Few sizes, since every one of them is compiled.
LONG, SHORT = KrylovSteps(24), KrylovSteps(8)
# Krylov spaces of a third and half of all dimensions, where Lanczos has an error.
PARTIAL = SHORT, KrylovSteps(12)
MEAN = KrylovSteps(16, start="mean")
AMOUNTS = {
    "energies": "energy_error",
    "lost": "lost_error",
    "moved": "moved_error",
    "flux": "flux_error",
    "density": "density_error",
}


def outputs(activation, params, batch):
    hidden = getattr(jax.nn, activation)(batch["image"] @ params["in"])
    return hidden @ params["out"]


OUTPUTS = {name: functools.partial(outputs, name) for name in ("relu", "gelu", "tanh")}


def make_problem(activation="gelu", num_examples=16):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, num_examples, 5)).astype(np.float32)
    label = rng.integers(0, 3, size=(1, num_examples))
    batches = {"image": jnp.asarray(image), "label": jnp.asarray(label, jnp.int32)}
    params = {
        name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
        for name, shape in (("in", (5, 12)), ("out", (12, 3)))
    }
    return Problem(OUTPUTS[activation], batches), params


def train(problem, params, optimizer, steps):
    """Returns the parameters after each number of steps."""
    gradient, state, found = jax.jit(jax.grad(problem.loss)), None, [params]
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        for step in range(1, steps[-1] + 1):
            updates, state = optimizer.update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
            if step in steps:
                found.append(params)
    return found


def in_double(problem, params):
    """Returns a snapshot of the oracle: kernel and error in float64, by NumPy."""
    with jax.enable_x64(True):
        image = problem.batches["image"].astype(jnp.float64)
        wide = problem.replace(batches=problem.batches | {"image": image})
        params = cast(params, jnp.float64)
        batch = jax.tree.map(lambda leaf: leaf[0], wide.batches)
        error = np.asarray(wide.error(params, batch)).reshape(-1)
        return snapshot_of(np.asarray(dense_kernel(wide, params)), error)


def shells(edges=EDGES, width=0.5):
    return SoftShells(jnp.asarray(edges, jnp.float32), width=width)


def assert_amounts_within_errors(found, expected):
    for name, error in AMOUNTS.items():
        if name == "density" and not found.shells.width:
            continue  # of sharp shells there is none
        off = np.abs(np.asarray(getattr(found, name), np.float64) - expected[name])
        assert np.all(off <= np.asarray(getattr(found, error))), name


def assert_within_errors(found, expected, num_used=1):
    assert_amounts_within_errors(found, expected)
    shift = expected["flux"] / expected["density"] / float(found.elapsed)
    off = np.abs(np.asarray(found.velocity, np.float64) - shift)
    used = np.asarray(found.velocity_mask)
    assert np.all(off[used] <= np.asarray(found.velocity_error)[used])
    assert np.sum(used) >= num_used
    assert found.finite


def assert_converged_within_errors(found, expected, num_converged=2):
    """Compares what part of the space tells, velocities at every converged edge."""
    assert_within_errors(found, expected, num_used=0)
    known = np.asarray(found.converged)
    assert np.sum(known) >= num_converged
    shift = expected["flux"] / expected["density"] / float(found.elapsed)
    off = np.abs(np.asarray(found.velocity, np.float64) - shift)
    error = np.asarray(found.velocity_error)
    assert np.all(off[known] <= error[known])
    # The errors tell something, and what fewer steps change counts among them.
    assert np.all(error[known] < 0.5 * np.max(np.abs(shift)))
    assert np.all(np.asarray(found.flux_error)[known] > found.floor[known])


def assert_growth_within_errors(found, whole):
    known = np.asarray(found.grows & whole.grows)
    off = np.abs(found.growth - whole.growth)
    assert np.all((off <= found.growth_error + whole.growth_error)[known])
    return np.isfinite(np.asarray(found.growth_error)[known])


@pytest.mark.parametrize(
    ("activation", "optimizer"),
    [
        ("relu", optax.sgd(0.1, momentum=0.9)),
        ("gelu", optax.sgd(0.3)),
        ("gelu", optax.adamw(0.01)),
    ],
)
def test_balance_of_a_training_is_right_within_its_errors(activation, optimizer):
    problem, params = make_problem(activation)
    points = train(problem, params, optimizer, [1, 8, 40])
    for before, after in itertools.pairwise(points):
        oracle = in_double(problem, before), in_double(problem, after)
        expected = by_definition(*oracle, EDGES, 0.5)
        ends = (problem, before), (problem, after)
        dense = exact_balance(*ends, shells(), solver="dense", elapsed=0.5)
        assert_within_errors(dense, expected)
        assert np.all(dense.converged)
        resolved = np.abs(expected["flux"]) > 10 * dense.flux_error
        assert np.sum(resolved) >= 3
        found = exact_balance(*ends, shells(), solver=LONG, elapsed=0.5, key=KEY)
        assert_within_errors(found, expected)
        assert np.sum(assert_growth_within_errors(found, dense)) >= 3
        assert np.sum(found.converged) >= 3
        for steps in PARTIAL:
            found = exact_balance(*ends, shells(), solver=steps, elapsed=0.5, key=KEY)
            assert_converged_within_errors(found, expected)


def barely_moved(way, dtype):
    """Returns two ends whose errors differ by 1e-5 of their size."""
    problem, params = make_problem()
    labels = problem.batches["label"]
    if way == "along":
        labels = jnp.zeros((*labels.shape, 3), dtype)
        problem = problem.replace(loss="squared")
    image = problem.batches["image"].astype(dtype)
    problem = problem.replace(batches={"image": image, "label": labels})
    params = cast(params, dtype)
    if way == "along":  # e is linear in these parameters, and M is not
        after = params | {"out": params["out"] * jnp.asarray(1 + 1e-5, dtype)}
    else:
        after = train(problem, params, optax.sgd(4.3e-5), [1])[1]
    return (problem, params), (problem, after)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("way", ["aside", "along"])
def test_a_block_of_the_error_and_a_tiny_change_is_right(way, dtype):
    """``delta`` is 1e-5 of ``e``, or lies along it up to rounding: no second column."""
    single = dtype == "float32"
    with jax.enable_x64(not single):
        ends = barely_moved(way, dtype)
        oracle = [in_double(*end) for end in ends]
        first, second = (np.asarray(end.error) for end in oracle)
        size = np.linalg.norm(second - first) / np.linalg.norm(first)
        assert size == pytest.approx(1e-5, rel=0.01)
        expected = by_definition(*oracle, EDGES, 0.5)
        edges = SoftShells(jnp.asarray(EDGES, dtype))
        found = exact_balance(*ends, edges, solver=PARTIAL[1], elapsed=1.0, key=KEY)
        assert_within_errors(found, expected, num_used=0)
    top = np.asarray(found.converged)
    assert np.sum(top) >= (1 if way == "along" else 2)
    # Rounding of the errors leaves two digits of their difference in float32.
    lost, flux = (expected[name] for name in ("lost", "flux"))
    off = np.abs(np.asarray(found.lost) - lost)[1:][top]
    assert np.max(off) <= (1e-2 if single else 1e-4) * np.max(np.abs(lost))
    if not single:
        off = np.abs(np.asarray(found.flux) - flux)[top]
        assert np.max(off) <= 1e-4 * np.max(np.abs(flux))
        assert np.max(np.asarray(found.flux_error)[top]) <= 0.02 * np.max(np.abs(flux))


def test_a_short_run_says_which_edges_it_has_reached():
    problem, params = make_problem()
    _, after = train(problem, params, optax.sgd(0.3), [4])
    ends = (problem, params), (problem, after)
    expected = by_definition(*(in_double(*end) for end in ends), EDGES, 0.5)
    whole = exact_balance(*ends, shells(), solver="dense", elapsed=1.0)
    for steps in (SHORT, MEAN):
        found = exact_balance(*ends, shells(), solver=steps, elapsed=1.0, key=KEY)
        assert_within_errors(found, expected, num_used=0)
        assert assert_growth_within_errors(found, whole).any()
        assert not found.converged[0]
        assert found.converged[-1]
        # Once an edge has not converged, none below it counts.
        assert np.all(np.diff(np.asarray(found.converged).astype(int)) >= 0)
        assert np.all(np.isinf(found.flux_error[~np.asarray(found.converged)]))


def test_start_from_the_mean_leaves_out_what_is_quadratic():
    problem, params = make_problem()
    _, after = train(problem, params, optax.sgd(0.02), [1])
    ends = (problem, params), (problem, after)
    found = exact_balance(*ends, shells(), solver=MEAN, elapsed=1.0, key=KEY)
    whole = exact_balance(*ends, shells(), solver="dense", elapsed=1.0)
    top = np.asarray(found.converged)
    np.testing.assert_allclose(found.flux[top], whole.flux[top], rtol=2e-3)
    np.testing.assert_allclose(
        found.lost[1:][top], whole.lost[1:][top], rtol=2e-3, atol=1e-6
    )
    after = train(problem, params, optax.sgd(3.0), [4])[1]
    ends = (problem, params), (problem, after)
    large = exact_balance(*ends, shells(), solver=MEAN, elapsed=1.0, key=KEY)
    oracle = [in_double(*end) for end in ends]
    mean = sum(np.asarray(end.error) for end in oracle) / 2
    alone = by_definition(*(end._replace(error=mean) for end in oracle), EDGES, 0.5)
    top = np.asarray(large.converged)
    np.testing.assert_allclose(large.flux[top], alone["flux"][top], rtol=1e-3)
    expected = by_definition(*oracle, EDGES, 0.5)
    assert np.all(np.abs(expected["flux"] / alone["flux"] - 1)[top] > 5e-3)
    off = np.abs(large.energies - expected["energies"])
    assert np.max(off) > 1e-2  # so the error has to say so
    assert np.all(off <= large.energy_error)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_start_from_the_mean_says_what_it_may_not_see(share):
    """The modes of M that ``delta`` lies in are not those of ``e_m``."""
    rng, size = np.random.default_rng(0), 90
    even = np.arange(size) % 2 == 0
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    roots = np.sqrt(np.geomspace(10, 1e-3, size))
    mean, change = (np.where(part, rng.normal(size=size), 0) for part in (even, ~even))
    change *= share * np.linalg.norm(mean) / np.linalg.norm(change)
    mean, change = left @ mean, right @ (change / roots)
    batches = {
        "x": jnp.asarray(((left * roots) @ right.T)[None], jnp.float32),
        "label": jnp.asarray(-mean[None, :, None], jnp.float32),
    }
    problem = Problem(lambda p, b: b["x"] @ p, batches, loss="squared")
    ends = [
        (problem, jnp.asarray(sign * change[:, None] / 2, jnp.float32))
        for sign in (-1, 1)
    ]
    found = exact_balance(*ends, shells(), solver=MEAN, key=KEY)
    whole = exact_balance(*ends, shells(), solver="dense")
    assert found.converged.any()
    for name, error in AMOUNTS.items():
        off = np.abs(getattr(found, name) - getattr(whole, name))
        assert np.all(off <= getattr(found, error) + getattr(whole, error)), name
    assert_growth_within_errors(found, whole)
    known = np.isfinite(found.energy_error)
    assert np.max(np.abs(found.energies - whole.energies)[known]) > share**2


def test_a_start_from_the_mean_does_not_converge_for_a_distant_end():
    """The mean of two errors says little of them if they are opposite."""
    rng = np.random.default_rng(0)
    batches = {"x": jnp.asarray(rng.normal(size=(1, 30, 4)), jnp.float32)}
    batches["label"] = jnp.zeros((1, 30, 1))
    problem = Problem(lambda p, b: jnp.tanh(b["x"] @ p), batches, loss="squared")
    params = jnp.asarray(rng.normal(size=(4, 1)), jnp.float32)
    for share, near in ((0.98, True), (-0.9, False)):
        ends = (problem, params), (problem, share * params)
        found = exact_balance(*ends, shells(), solver=MEAN, key=KEY)
        assert found.converged.any() == near
        for name in AMOUNTS.values():
            assert np.isfinite(getattr(found, name)).any() == near, name


@pytest.mark.scheduled
@pytest.mark.usefixtures("x64")
def test_krylov_that_fills_the_space_is_the_dense_balance():
    problem, params = make_problem(num_examples=6)
    problem = problem.replace(
        batches=problem.batches | {"image": problem.batches["image"].astype(float)}
    )
    params = cast(params, jnp.float64)
    _, after = train(problem, params, optax.sgd(0.5), [3])
    ends = (problem, params), (problem, after)
    edges = SoftShells(jnp.asarray(EDGES))
    dense = exact_balance(*ends, edges, solver="dense")
    krylov = exact_balance(*ends, edges, solver=KrylovSteps(12), key=KEY)
    for name in ("energies", "lost", "moved", "flux", "density", "growth"):
        np.testing.assert_allclose(
            getattr(krylov, name), getattr(dense, name), rtol=1e-8, atol=1e-12
        )
    assert krylov.rotation is None
    np.testing.assert_allclose(dense.rotation + dense.drift, dense.flux, rtol=1e-12)


def test_counts_from_as_many_vectors_as_dimensions_are_exact():
    problem, params = make_problem()
    _, after = train(problem, params, optax.sgd(0.5), [10])
    ends = (problem, params), (problem, after)
    dense = exact_balance(*ends, shells(), solver="dense").counting
    places = [np.maximum(in_double(*end).values, 1e-30)[:, None] for end in ends]
    above = [np.sum(1 / (1 + (EDGES / place) ** 2), axis=0) for place in places]
    np.testing.assert_allclose(dense.moved, above[1] - above[0], atol=2e-3)
    steps = KrylovSteps(4, num_probes=48)
    found = exact_balance(*ends, shells(), solver=steps, key=KEY).counting
    assert np.all(dense.error == 0)
    assert np.all(dense.converged)
    np.testing.assert_allclose(found.density, dense.density, rtol=1e-3)
    np.testing.assert_allclose(found.moved, dense.moved, atol=2e-3)


def test_counts_of_few_steps_say_what_more_of_them_would_change():
    size, width, num_steps = 300, 8, 8
    rng = np.random.default_rng(0)
    first, _ = symmetric_with_spectrum(np.geomspace(1e-5, 5, size), 0)
    turn = np.eye(size) + 0.15 / np.sqrt(size) * rng.normal(size=(size, size))
    kernels = first, turn @ first @ turn.T
    edges = np.geomspace(1e-3, 3, 6)
    values = [np.linalg.eigvalsh(kernel)[:, None] for kernel in kernels]
    above = [1 / (1 + (edges / np.maximum(x, 1e-30)) ** 2) for x in values]
    density = sum(np.sum(up * (1 - up), axis=0) for up in above)  # 1/w is 2, halved
    expected = np.sum(above[1] - above[0], axis=0) / density
    start = jax.random.normal(KEY, (size, width))
    matmats = (functools.partial(matmul, jnp.asarray(k, start.dtype)) for k in kernels)
    runs = [block_lanczos(f, start, num_steps, key=KEY, driver="scan") for f in matmats]
    found = count_by_quadrature(*runs, shells(edges))
    off = np.abs(found.moved / found.density - expected)
    assert np.all(off <= 3 * found.error)
    # The vectors alone do not tell: at low edges eight steps are too few.
    assert np.all((off > 3 * found.stderr)[:2])
    np.testing.assert_array_equal(found.converged, np.arange(6) >= 2)
    np.testing.assert_allclose(found.error[-1], found.stderr[-1], rtol=0.01)


@pytest.mark.scheduled
def test_counts_by_quadrature_are_right_within_their_errors():
    problem, params = make_problem()
    _, after = train(problem, params, optax.sgd(0.5), [10])
    ends = (problem, params), (problem, after)
    dense = exact_balance(*ends, shells(), solver="dense", elapsed=1.0)
    steps = KrylovSteps(8, num_probes=16)
    found = exact_balance(*ends, shells(), solver=steps, elapsed=1.0, key=KEY)
    off = np.abs(found.counting_velocity - dense.counting_velocity)[2:]
    assert np.all(off <= 4 * found.counting.stderr[2:])
    assert np.all(found.counting.stderr[2:] < 0.5 * np.abs(dense.velocity[2:]).max())
    one = KrylovSteps(8, num_probes=1)
    alone = exact_balance(*ends, shells(), solver=one, elapsed=1.0, key=KEY)
    assert np.all(np.isinf(alone.counting.stderr))


def test_leading_pairs_leave_the_rest_in_the_lowest_shell():
    problem, params = make_problem()
    _, after = train(problem, params, optax.sgd(0.5), [10])
    first, second = (
        dynamics.spectral_snapshot(problem, p, num_pairs=9, key=KEY)
        for p in (params, after)
    )
    edges = np.geomspace(float(max(first.values[-1], second.values[-1])), 10, 5)
    edges[0] *= 1.01
    found = exact_balance(first, second, shells(edges, width=0), elapsed=1.0)
    whole = exact_balance(
        (problem, params), (problem, after), shells(edges, width=0), solver="dense"
    )
    oracle = in_double(problem, params), in_double(problem, after)
    assert_amounts_within_errors(found, by_definition(*oracle, edges, 0))
    np.testing.assert_allclose(found.rotation, whole.rotation, atol=1e-4)
    assert np.all(found.converged)
    assert found.counting is None  # which takes all pairs
    lower = exact_balance(first, second, shells(edges / 2, width=0), elapsed=1.0)
    assert not lower.converged[0]
    assert np.isinf(lower.energy_error[0, 0])
    # A pair that is missing may lie anywhere below the last one that was found.
    gap = first._replace(
        values=first.values.at[4].set(0), vectors=first.vectors.at[:, 4].set(0)
    )
    places = float(first.values[3]) * np.array([0.5, 1.01])
    holed = exact_balance(gap, second, shells(places, width=0), elapsed=1.0)
    np.testing.assert_array_equal(holed.converged, [False, True])
    # A point beside a snapshot is taken in the same form.
    mixed = exact_balance(first, (problem, after), shells(edges, width=0), key=KEY)
    np.testing.assert_allclose(mixed.flux, found.flux, atol=1e-4)
    dense = dynamics.spectral_snapshot(problem, params)
    mixed = exact_balance(dense, (problem, after), shells(edges, width=0))
    np.testing.assert_allclose(mixed.flux, whole.flux, atol=1e-6)


def rows_error(root, params, batch):
    return (root[batch["row"]] @ params - batch["target"])[:, None]


def test_errors_cover_the_residuals_of_leading_pairs(monkeypatch):
    """A vector above an edge is turned into the rest by the largest residual."""
    values = np.array([5.0, 3.0, 2.0, 1.05, 1.02, 1.01, 0.5, 0.2])
    size, rank, residual = len(values), 5, 1e-5 * values[3]
    error = np.where(np.arange(size) == 4, 0, 1.0)  # none that the edge sees beside it
    batches = {
        "row": jnp.arange(size, dtype=jnp.int32)[None],
        "target": -jnp.asarray(error, jnp.float32)[None],
    }
    root = jnp.diag(jnp.sqrt(jnp.asarray(values, jnp.float32)))
    problem = Problem.from_error(jax.tree_util.Partial(rows_error, root), batches)
    angle = residual / (values[3] - values[5])
    vectors = np.eye(size)[:, :rank]
    vectors[[3, 5], 3] = np.cos(angle), np.sin(angle)

    def found(*args, **options):
        result = leading_eigenpairs(*args, **options)
        return result._replace(
            values=jnp.asarray(values[:rank], jnp.float32),
            vectors=jnp.asarray(vectors, jnp.float32),
            residuals=jnp.full(rank, residual, jnp.float32),
        )

    monkeypatch.setattr(spectra, "leading_eigenpairs", found)
    params = jnp.zeros(size)
    turned = dynamics.spectral_snapshot(problem, params, num_pairs=rank, key=KEY)
    assert turned.rounding >= residual / 2 / values[0]
    edges = np.array([1.03, 4.0])
    exact = snapshot_of(np.diag(values), error, jnp.float32)
    expected = by_definition(exact, exact, edges, 0)
    before = turned._replace(vectors=jnp.eye(size, rank))
    balance = exact_balance(before, turned, shells(edges, width=0))
    assert_amounts_within_errors(balance, expected)
    assert np.abs(balance.flux[0] - expected["flux"][0]) > 1e-4


def repeated_top():
    """Returns a problem of n = 200 whose largest eigenvalue has twelve copies."""
    values = np.r_[np.full(12, 5.0), 4, 3.5, 3, 2.5, np.linspace(1, 0.1, 184)]
    size = len(values)
    target = jnp.asarray(np.random.default_rng(0).normal(size=(1, size)), jnp.float32)
    batches = {"row": jnp.arange(size, dtype=jnp.int32)[None], "target": target}
    root = jnp.diag(jnp.sqrt(jnp.asarray(values, jnp.float32)))
    error_fn = jax.tree_util.Partial(rows_error, root)
    return Problem.from_error(error_fn, batches), size


def test_missing_copies_of_an_eigenvalue_leave_no_edge_converged():
    problem, size = repeated_top()
    found = dynamics.spectral_snapshot(problem, jnp.zeros(size), num_pairs=10, key=KEY)
    assert np.sum(np.abs(found.values - 5) < 1e-3) < 12  # the block is too narrow
    assert not found.complete
    edges = np.array([4.5, 6.0])
    whole = dynamics.spectral_snapshot(problem, jnp.zeros(size))
    assert whole.complete
    balance = exact_balance(whole, found, shells(edges, width=0))
    np.testing.assert_array_equal(balance.converged, [False, True])
    assert np.all(np.isinf(balance.energy_error[:, :2]))
    # Nothing moved, and the missing copies would pass for what did.
    believed = found._replace(complete=jnp.bool_(True))
    wrong = exact_balance(whole, believed, shells(edges, width=0))
    assert wrong.converged[0]
    assert np.abs(wrong.flux[0]) > 10 * wrong.flux_error[0]


@pytest.mark.parametrize(
    "solver", ["dense", pytest.param(SHORT, marks=pytest.mark.scheduled)]
)
def test_balance_is_pure_and_maps_over_runs(solver):
    problem, params = make_problem()
    points = train(problem, params, optax.sgd(0.5), [2, 4])

    @jax.jit
    @jax.vmap
    def run(before, after):
        ends = (problem, before), (problem, after)
        return exact_balance(*ends, shells(), solver=solver, elapsed=0.5, key=KEY)

    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    together = run(jax.tree.map(stack, *points[:2]), jax.tree.map(stack, *points[1:]))
    for index in range(2):
        ends = ((problem, point) for point in points[index : index + 2])
        alone = exact_balance(*ends, shells(), solver=solver, elapsed=0.5, key=KEY)
        top = np.asarray(alone.converged)
        np.testing.assert_allclose(
            together.flux[index][top], alone.flux[top], rtol=1e-2, atol=1e-4
        )
        assert together.comparable[index]


@pytest.mark.parametrize("solver", ["dense", SHORT])
def test_nothing_compiles_after_the_first_balance(solver):
    problem, params = make_problem()
    points = train(problem, params, optax.sgd(0.5), [1, 2, 3])
    counts = []
    for index in range(3):
        ends = ((problem, point) for point in points[index : index + 2])
        time = measured_time(problem, *points[index : index + 2])
        edges = shells(EDGES * 1.1**index)
        with compilations() as found:
            exact_balance(*ends, edges, solver=solver, elapsed=time, key=KEY)
        counts.append(len(found))
    assert counts[1:] == [0, 0]


def test_other_losses_and_targets_of_the_same_examples_are_refused():
    problem, params = make_problem()
    labels = problem.batches["label"]
    problem = problem.replace(batches=problem.batches | {"teacher": (labels + 1) % 3})
    squared = problem.replace(loss="squared")
    own = problem.replace(loss=optax.losses.softmax_cross_entropy_with_integer_labels)
    other_key = problem.replace(target="teacher")
    first = dynamics.spectral_snapshot(problem, params)
    run = jax.jit(lambda *ends: exact_balance(*ends, shells(), elapsed=1.0))
    assert np.any(run(first, first).velocity_mask)
    for other in (squared, own, other_key):
        second = first._replace(fingerprint=fingerprint(other))
        for pair in ((first, second), ((problem, params), (other, params))):
            with pytest.raises(ValueError, match="and its loss, got others"):
                exact_balance(*pair, shells(), solver="dense")
        assert not run(first, second).comparable
        assert not np.any(run(first, second).velocity_mask)
    assert np.all(fingerprint(own) == fingerprint(own.replace(batches=own.batches)))

    def smoothed(logits, label, share):
        return share * jnp.mean(logits) - logits[label]

    def bound(share):
        return functools.partial(smoothed, share=share)

    def closed_over(share, loss=smoothed):
        return lambda logits, label: loss(logits, label, share)

    def twice(logits, label, share):
        return 2 * smoothed(logits, label, share)

    @dataclasses.dataclass(frozen=True)
    class Smoothed:
        share: float

        def __call__(self, logits, label):
            return smoothed(logits, label, self.share)

        def method(self, logits, label):
            return smoothed(logits, label, self.share)

    alike = [
        (bound(0.1), bound(0.1)),
        (Smoothed(0.1), Smoothed(0.1)),
        (Smoothed(0.1).method, Smoothed(0.1).method),
        (closed_over(0.1), closed_over(0.1)),
        (jax.jit(closed_over(0.1)), jax.jit(closed_over(0.1))),
    ]
    different = [
        (bound(0.1), bound(0.2)),
        (Smoothed(0.1), Smoothed(0.2)),
        (Smoothed(0.1).method, Smoothed(0.2).method),
        (closed_over(0.1), closed_over(0.2)),
        (closed_over(0.1), closed_over(0.1, twice)),
        (jax.jit(closed_over(0.1)), jax.jit(closed_over(0.2))),
        (lambda logits, label: logits[label], lambda logits, label: -logits[label]),
        (lambda x, y: [z for z in x][y], lambda x, y: [z + 1 for z in x][y]),
    ]
    for equal, pairs in ((True, alike), (False, different)):
        for pair in pairs:
            first, second = (fingerprint(problem.replace(loss=loss)) for loss in pair)
            assert np.all(first == second) == equal


def test_an_infinite_time_has_no_velocity():
    problem, params = make_problem()
    snapshot = dynamics.spectral_snapshot(problem, params)
    with pytest.raises(ValueError, match=r"^elapsed: expected a finite time above 0"):
        exact_balance(snapshot, snapshot, shells(), elapsed=np.inf)
    with pytest.raises(ValueError, match=r"^elapsed: expected real numbers, got comp"):
        exact_balance(snapshot, snapshot, shells(), elapsed=0.3 + 1j)
    run = jax.jit(
        lambda time: exact_balance(snapshot, snapshot, shells(), elapsed=time)
    )
    assert not run(jnp.inf).timed
    assert not np.any(run(jnp.inf).velocity_mask)
    assert np.any(run(2.0).velocity_mask)


def test_other_examples_are_refused_and_other_statistics_are_not():
    problem, params = make_problem()
    flipped = jax.tree.map(lambda leaf: leaf[:, ::-1], problem.batches)
    relabelled = problem.batches | {"label": (problem.batches["label"] + 1) % 3}
    for batches in (flipped, relabelled):
        other = problem.replace(batches=batches)
        ends = (problem, params), (other, params)
        for solver in ("dense", SHORT):
            with pytest.raises(ValueError, match="after: expected the examples"):
                exact_balance(*ends, shells(), solver=solver, key=KEY)
        run = jax.jit(
            lambda *ends: exact_balance(*ends, shells(), solver="dense", elapsed=1.0)
        )
        assert run((problem, params), (problem, params)).comparable
        assert np.any(run((problem, params), (problem, params)).velocity_mask)
        assert not run(*ends).comparable
        assert not np.any(run(*ends).velocity_mask)
    statistics = problem.replace(
        outputs_fn=jax.tree_util.Partial(scaled_outputs, jnp.float32(1.1))
    )
    ends = (problem, params), (statistics, params)
    assert exact_balance(*ends, shells(), solver="dense").comparable
    by_function = problem.replace(target=lambda batch: batch["label"])
    shifted = problem.replace(target=lambda batch: (batch["label"] + 1) % 3)
    with pytest.raises(ValueError, match="after: expected the examples"):
        exact_balance(
            (by_function, params), (shifted, params), shells(), solver="dense"
        )


def scaled_outputs(scale, params, batch):
    return scale * outputs("gelu", params, batch)


def test_bad_input_is_told_in_one_sentence():
    problem, params = make_problem()
    fewer, _ = make_problem(num_examples=4)
    end, key = (problem, params), KEY
    for solver in ("dense", SHORT):
        with pytest.raises(ValueError, match="after: expected n = 48 as before"):
            exact_balance(end, (fewer, params), shells(), solver=solver, key=key)
    for elapsed in (0, -1.0, jnp.float32(0)):
        with pytest.raises(ValueError, match="elapsed: expected a finite time above 0"):
            exact_balance(end, end, shells(), solver="dense", elapsed=elapsed)
    with pytest.raises(ValueError, match=r"shells\.width: expected 1/2 or 1/3"):
        exact_balance(end, end, shells(width=0.4), solver=SHORT, key=key)
    with pytest.raises(ValueError, match="key: expected a PRNG key for KrylovSteps"):
        exact_balance(end, end, shells(), solver=SHORT)
    with pytest.raises(ValueError, match="key: expected a PRNG key for leading"):
        dynamics.spectral_snapshot(problem, params, num_pairs=4)
    with pytest.raises(ValueError, match="solver: expected one of"):
        exact_balance(end, end, shells(), solver="sparse")
    with pytest.raises(ValueError, match="start: expected one of"):
        KrylovSteps(start="end")
    with pytest.raises(ValueError, match="num_steps: expected an integer >= 4"):
        KrylovSteps(2)
    two = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[2:]), fewer.batches)
    mean = fewer.replace(batches=two, reduction="mean")
    with pytest.raises(ValueError, match=r"problem\.reduction: expected one of"):
        exact_balance((mean, params), (mean, params), shells(), solver="dense")


def test_nothing_moves_between_a_point_and_itself():
    problem, params = make_problem()
    ends = (problem, params), (problem, params)
    time = measured_time(problem, params, params)
    for solver in ("dense", SHORT):
        found = exact_balance(*ends, shells(), solver=solver, elapsed=time, key=KEY)
        assert np.all(np.abs(found.flux) <= found.flux_error)
        assert np.all(np.abs(found.lost) <= found.lost_error)
        assert found.finite
        assert np.all(np.isnan(found.velocity))
        assert not np.any(found.velocity_mask)
    point = dynamics.spectral_snapshot(problem, params)
    backwards = jax.jit(lambda t: exact_balance(point, point, shells(), elapsed=t))
    assert np.all(np.isnan(backwards(-1.0).velocity))


def test_parameters_that_are_not_finite_are_told():
    problem, params = make_problem()
    spoilt = params | {"out": params["out"].at[0, 0].set(jnp.nan)}
    # A root at zero: the outputs are finite, and their Jacobian is not.
    rooted = Problem(rooted_outputs, problem.batches)
    zero = params | {"root": jnp.zeros(())}
    one = params | {"root": jnp.ones(())}
    for solver, ends in itertools.product(
        ("dense", SHORT),
        [((problem, params), (problem, spoilt)), ((rooted, one), (rooted, zero))],
    ):
        found = exact_balance(*ends, shells(), solver=solver, elapsed=1.0, key=KEY)
        assert not found.finite
        assert not np.any(found.velocity_mask)


def rooted_outputs(params, batch):
    return outputs("gelu", params, batch) + jnp.sqrt(params["root"])


def coarse_outputs(params, batch):
    half = lambda array: array.astype(jnp.bfloat16)  # noqa: E731
    hidden = jnp.tanh(half(batch["image"]) @ half(params["in"])).astype(jnp.float32)
    return hidden @ params["out"]


@pytest.mark.parametrize("solver", ["dense", SHORT])
def test_products_in_reduced_precision_are_seen(solver):
    problem, params = make_problem("tanh")
    coarse = problem.replace(outputs_fn=coarse_outputs)
    _, after = train(problem, params, optax.sgd(0.5), [2])
    eps = float(jnp.finfo(jnp.float32).eps)
    found = {}
    for which in (problem, coarse):
        ends = (which, params), (which, after)
        found[which] = exact_balance(*ends, shells(), solver=solver, key=KEY)
    assert found[problem].rounding < 20 * eps
    assert found[coarse].rounding > 1000 * eps
    assert np.all(found[coarse].floor > 100 * found[problem].floor)


@pytest.mark.parametrize("num_pairs", [None, 5])
def test_snapshots_in_reduced_precision_are_seen(num_pairs):
    problem, params = make_problem("tanh")
    coarse = problem.replace(outputs_fn=coarse_outputs)
    eps = float(jnp.finfo(jnp.float32).eps)
    fine, other = (
        dynamics.spectral_snapshot(which, params, num_pairs=num_pairs, key=KEY)
        for which in (problem, coarse)
    )
    assert fine.rounding < 20 * eps
    assert other.rounding > 1000 * eps
    sharp = shells(EDGES[-3:], width=0)
    # The larger rounding of both ends counts, whether they are snapshots or points.
    ends = itertools.product((fine, other), (fine, other, (coarse, params)))
    for before, after in ends:
        found = exact_balance(before, after, sharp, key=KEY)
        worst = fine if before is fine and after is fine else other
        np.testing.assert_allclose(found.rounding, worst.rounding, rtol=1e-6)


def test_the_rounding_beside_an_error_of_zero_is_that_of_every_pair():
    values, vectors = np.array([3.0, 1.0], np.float32), np.eye(4, dtype=np.float32)
    column, product = spectra._spectral_product(
        *map(jnp.asarray, (values, vectors[:, :2])), jnp.zeros(4)
    )
    # Ones, and the values, both of norm one.
    expected = np.ones(2) / np.sqrt(2) + values / np.sqrt(10)
    np.testing.assert_allclose(column[:2], expected, rtol=1e-6)
    np.testing.assert_allclose(product[:2], values * expected, rtol=1e-6)
    assert not np.any(column[2:]) | np.any(product[2:])


def test_measured_time_is_that_of_the_steps():
    problem, params = make_problem()
    rate = 0.01
    points = train(problem, params, optax.sgd(rate), [1, 20])
    time = measured_time(problem, *points[:2])
    np.testing.assert_allclose(time.start, rate, rtol=1e-4)
    np.testing.assert_allclose(time.elapsed, rate, rtol=1e-2)
    assert time.meaningful
    np.testing.assert_allclose(
        measured_time(problem, *points[1:]).elapsed, 19 * rate, rtol=0.05
    )
    settled = train(problem, params, optax.sgd(rate / 20, momentum=0.9), [60, 61])
    np.testing.assert_allclose(
        measured_time(problem, *settled[1:]).elapsed, rate / 2, rtol=0.1
    )


def tanh_gradient(problem, params):
    """Returns the gradient of the mean cross-entropy, flat, by NumPy in float64."""
    image, label = (np.asarray(problem.batches[k][0]) for k in ("image", "label"))
    first, last = (np.asarray(params[name], np.float64) for name in ("in", "out"))
    hidden = np.tanh(image @ first)
    shares = np.exp(hidden @ last)
    errors = shares / shares.sum(axis=1, keepdims=True) - np.eye(3)[label]
    back = (errors @ last.T) * (1 - hidden**2)
    parts = image.T @ back, hidden.T @ errors
    return np.concatenate([part.ravel() for part in parts]) / len(image)


@pytest.mark.parametrize(
    ("decay", "verdicts"), [(1e-4, [True, True, False, True]), (10.0, 4 * [False])]
)
def test_time_of_an_adaptive_optimizer_is_that_of_its_definition(decay, verdicts):
    """AdamW may follow the flow, but not over many steps or while weights decay."""
    problem, params = make_problem("tanh")
    optimizer = optax.adamw(0.003, weight_decay=decay)
    points = train(problem, params, optimizer, [1, 4, 60, 64])
    for (before, after), verdict in zip(
        itertools.pairwise(points), verdicts, strict=True
    ):
        first, second = (
            np.concatenate([np.ravel(end[name]) for name in ("in", "out")])
            for end in (before, after)
        )
        motion = second.astype(float) - first.astype(float)
        slopes = [tanh_gradient(problem, end) for end in (before, after)]
        times = [-motion @ slope / (slope @ slope) for slope in slopes]
        lengths = np.linalg.norm(motion) * np.linalg.norm(slopes, axis=1)
        cosine = np.min(-np.dot(slopes, motion) / lengths)
        agree = 0 < max(times) <= 2 * min(times)
        assert (agree and cosine >= 0.5) == verdict
        found = measured_time(problem, before, after)
        np.testing.assert_allclose([found.start, found.end], times, rtol=1e-3)
        np.testing.assert_allclose(found.alignment, cosine, rtol=1e-3)
        assert found.meaningful == verdict
        expected = np.mean(times) if verdict else np.nan
        np.testing.assert_allclose(found.elapsed, expected, rtol=1e-3)


def test_time_of_a_parabola_has_its_closed_form():
    # One step of L = x^2 / 2 at rate eta: eta by its start, eta / (1 - eta) by its end.
    problem = Problem.from_error(
        lambda x, batch: x * batch, jnp.ones((1, 2, 1)), loss_fn=parabola
    )
    for rate, meaningful in ((0.3, True), (0.6, False), (1.5, False), (0.0, False)):
        time = measured_time(problem, jnp.float32(2), jnp.float32(2 * (1 - rate)))
        np.testing.assert_allclose(time.start, rate, rtol=1e-6)
        np.testing.assert_allclose(time.end, rate / (1 - rate), rtol=1e-6)
        assert time.meaningful == meaningful
        assert np.isfinite(time.elapsed) == meaningful


def parabola(x, batch):
    return x**2 / 2


@pytest.mark.parametrize("angle", [0.0, 0.9, 1.2, 1.55, 2.0])
def test_time_of_a_motion_aside_has_no_meaning(angle):
    # On an inclined plane both ends agree, however little of the motion is downhill.
    slope = 3.0
    problem = Problem.from_error(
        lambda x, batch: x[0] * batch,
        jnp.ones((1, 2, 1)),
        loss_fn=lambda x, batch: slope * x[0],
    )
    way = 0.7 * jnp.asarray([-np.cos(angle), np.sin(angle)], jnp.float32)
    start = jnp.asarray([2.0, 1.0], jnp.float32)
    time = measured_time(problem, start, start + way)
    expected = 0.7 * np.cos(angle) / slope
    np.testing.assert_allclose([time.start, time.end], expected, rtol=1e-4)
    np.testing.assert_allclose(time.alignment, np.cos(angle), rtol=1e-4)
    assert time.meaningful == (np.cos(angle) > 0.5)


def test_time_has_no_meaning_against_the_flow_or_where_its_ends_disagree():
    problem, params = make_problem()
    _, after = train(problem, params, optax.sgd(0.01), [1])
    back = measured_time(problem, after, params)
    assert back.start < 0
    assert not back.meaningful
    assert np.isnan(back.elapsed)
    far = train(problem, params, optax.sgd(20.0), [1])[1]
    assert not measured_time(problem, params, far).meaningful
    with pytest.raises(ValueError, match="after: expected the tree of before"):
        measured_time(problem, params, {"in": params["in"]})
