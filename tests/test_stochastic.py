"""Couplings by random signs, against the same sums over all pairs in float64."""

import functools
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from grsd_jax import Problem, gradient_flow_direction, kernel_dense, models
from grsd_jax.linalg import leading_eigenpairs
from grsd_jax.shells import (
    Signs,
    SoftShells,
    StochasticCoupling,
    measure_stochastic_coupling,
    stochastic,
    stochastic_shell_coupling,
    toeplitz_residual,
    windowed_toeplitz_residual,
)
from oracles import cast

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
gpt = importlib.import_module("gpu.gpt")

pytestmark = pytest.mark.usefixtures("x64")


class Dense:
    """The coupling of a spectrum by its definition, in NumPy."""

    def __init__(self, values, coupling, shells, *, renormalize):
        edges, width = np.asarray(shells.edges), shells.width
        ratio = np.where(values > 0, values, 1e-300)[:, None] / edges
        above = scipy.special.expit(np.log(ratio) / width)
        members = above - np.concatenate([above[:, 1:], 0 * above[:, :1]], 1)
        weights = (
            members / np.maximum(values, 1e-300)[:, None] if renormalize else members
        )
        diagonal = np.diag(coupling)
        self.drift = weights.T @ diagonal / (weights.T @ values)
        middles = np.log(edges) + np.diff(np.log(edges), append=np.nan) / 2
        middles[-1] = 1.5 * np.log(edges[-1]) - 0.5 * np.log(edges[-2])
        relative = np.interp(np.log(ratio[:, 0] * edges[0]), middles, self.drift)
        rest = coupling - np.diag(values * relative)
        self.counts = members.sum(0)
        self.matrix = weights.T @ rest**2 @ weights
        self.matrix /= self.counts[:, None] * self.counts


def planted(size, seed, scale=1.0):
    """Returns a power law, random vectors, and couplings that fall with distance."""
    rng = np.random.default_rng(seed)
    values = np.arange(1, size + 1) ** -1.5
    vectors, _ = np.linalg.qr(rng.normal(size=(size, size)))
    entries = rng.normal(size=(size, size)) / 10
    distance = np.abs(np.log(values)[:, None] - np.log(values))
    coupling = (entries + entries.T) * np.sqrt(values[:, None] * values)
    coupling = coupling * np.exp(-distance / 2) + np.diag(0.3 * values)
    return scale * values, vectors, scale * coupling


@functools.partial(jax.jit, static_argnames=("signs", "renormalize"))
def estimate(kernel, moved, values, vectors, shells, key, **options):
    return stochastic_shell_coupling(
        lambda block: kernel @ block,
        lambda block: moved @ block,
        values,
        vectors,
        shells,
        key=key,
        **options,
    )


def estimated(case, shells, num_pairs, key, **options):
    values, vectors, coupling = case
    kernel = jnp.asarray((vectors * values) @ vectors.T)
    moved = jnp.asarray(vectors @ coupling @ vectors.T)
    leading = jnp.asarray(values[:num_pairs]), jnp.asarray(vectors[:, :num_pairs])

    def run(key):
        return estimate(kernel, moved, *leading, shells, key, **options)

    return run(key) if key.ndim == 0 else [run(one) for one in key]


@pytest.fixture
def shells(x64):
    return SoftShells(jnp.asarray(np.geomspace(3e-3, 0.3, 4)), 1 / 3)


@pytest.mark.parametrize(
    "renormalize", [pytest.param(False, marks=pytest.mark.scheduled), True]
)
def test_all_pairs_given_it_is_exact(shells, renormalize):
    case = planted(60, 0)
    dense = Dense(case[0], case[2], shells, renormalize=renormalize)
    found = estimated(
        case, shells, 60, jax.random.key(0), signs=Signs(2, 4), renormalize=renormalize
    )
    assert found.mask.all()
    np.testing.assert_allclose(found.matrix, dense.matrix, rtol=1e-9)
    np.testing.assert_allclose(found.counts, dense.counts, rtol=1e-9)
    np.testing.assert_allclose(found.relative_drift, dense.drift, rtol=1e-9)
    assert np.max(found.log_error) < 1e-6
    assert np.max(found.lanczos_error) < 1e-6


def test_all_pairs_given_the_residual_is_exact(shells):
    case = planted(60, 0)
    matrix = Dense(case[0], case[2], shells, renormalize=True).matrix
    found = estimated(
        case, shells, 60, jax.random.key(0), signs=Signs(2, 4), renormalize=True
    ).toeplitz(3)
    np.testing.assert_allclose(found.residual, toeplitz_residual(matrix), rtol=1e-6)
    windows = windowed_toeplitz_residual(jnp.asarray(matrix), 3)
    np.testing.assert_allclose(found.windows, windows, rtol=1e-5)
    assert abs(found.residual_of_signs) < 1e-6
    assert max(found.residual_error, *found.windows_error) < 1e-6
    np.testing.assert_array_equal(found.degrees_of_freedom, [4, 4])


def test_the_residual_is_within_its_error_and_free_of_the_signs_own_scatter():
    shells = SoftShells(jnp.asarray(np.geomspace(3e-3, 0.3, 4)), 1 / 3)
    case = planted(120, 1)
    keys = jax.random.split(jax.random.key(3), 12)
    found = estimated(case, shells, 10, keys, signs=Signs(8, 8), renormalize=True)
    found = [one.toeplitz(4) for one in found]
    residual, error, of_signs = (
        np.array([getattr(one, name) for one in found])
        for name in ("residual", "residual_error", "residual_of_signs")
    )
    matrix = Dense(case[0], case[2], shells, renormalize=True).matrix
    off = residual - float(toeplitz_residual(matrix))
    assert np.mean(np.abs(off) < 2.36 * error) > 0.8  # Student t at 7 degrees: 95%
    assert np.std(off) / 2 < np.mean(error) < 2 * np.std(off)
    assert np.abs(np.mean(off)) < np.abs(np.mean(off + of_signs))


def covered(case, shells, num_pairs, num_keys, seed, **options):
    """Returns whether each cell is inside of its interval, and its log error."""
    inside, errors = [], []
    renormalize = options["renormalize"]
    dense = Dense(case[0], case[2], shells, renormalize=renormalize)
    keys = jax.random.split(jax.random.key(seed), num_keys)
    for found in estimated(case, shells, num_pairs, keys, **options):
        assert found.mask.all()
        assert np.max(found.lanczos_error) < 0.1
        low, high = found.interval(0.95)
        inside.append((low <= dense.matrix) & (dense.matrix <= high))
        errors.append(np.log(found.matrix / dense.matrix))
    return inside, errors


def coverage(shells, num_pairs, num_keys, size, **options):
    """Returns the share of cells inside of their interval, and the log errors."""
    found = [
        covered(planted(size, seed), shells, num_pairs, num_keys, seed, **options)
        for seed in range(2)
    ]
    inside, errors = map(np.concatenate, zip(*found, strict=True))
    return np.mean(inside), errors


@pytest.mark.parametrize(("renormalize", "num_pairs"), [(False, 0), (True, 10)])
def test_the_intervals_hold_what_they_should(shells, renormalize, num_pairs):
    share, errors = coverage(
        shells, num_pairs, 4, 120, signs=Signs(8, 8), renormalize=renormalize
    )
    assert share > 0.85
    assert np.sqrt(np.mean(errors**2)) < (0.35 if num_pairs == 0 else 0.12)


@pytest.mark.scheduled
@pytest.mark.parametrize("renormalize", [False, True])
def test_coverage_is_within_90_and_98_percent(renormalize):
    shells = SoftShells(jnp.asarray(np.geomspace(3e-4, 0.3, 7)), 1 / 3)
    share, errors = coverage(
        shells, 20, 40, 400, signs=Signs(8, 20), renormalize=renormalize
    )
    assert 0.90 < share < 0.98
    assert np.sqrt(np.mean(errors**2)) < 0.06


def _teacher_batches(num_examples, shape, num_classes):
    """Returns inputs, and the classes that a random linear map gives them."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(num_examples, *shape))
    teacher = rng.normal(size=(np.prod(shape), num_classes))
    label = np.argmax(inputs.reshape(num_examples, -1) @ teacher, -1)
    return jax.tree.map(jnp.asarray, {"x": inputs[None], "label": label[None]})


def _mlp():
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [(10, 32), (32, 32), (32, 6)]
    weights = [
        jax.random.normal(key, size) / size[0] ** 0.5
        for key, size in zip(keys, sizes, strict=True)
    ]

    def outputs_fn(params, batch):
        x = batch["x"]
        for weight in params[:-1]:
            x = jnp.tanh(x @ weight)
        return x @ params[-1]

    return Problem(outputs_fn, _teacher_batches(60, (10,), 6)), weights


def _resnet():
    batches = _teacher_batches(60, (8, 8, 3), 6)
    model = models.ResNet18(6, width=2, activation="gelu")
    images = batches["x"][0].astype(jnp.float32)
    state = cast(dict(jax.jit(model.init)(jax.random.key(0), images)), jnp.float64)
    params = state.pop("params")
    outputs = models.linen_outputs(model, state)
    return Problem(lambda p, b: outputs(p, {"image": b["x"]}), batches), params


def _gpt():
    size = gpt.Size(layers=2, width=16, vocabulary=6, positions=6, examples=10)
    tokens = np.random.default_rng(0).integers(0, 6, (1, 10, 6))
    # The next token follows from the two before it.
    label = (tokens + np.roll(tokens, 1, -1)) % 6
    problem = Problem(gpt.logits, {"tokens": tokens, "label": label})
    return problem, cast(gpt.make_params(size), jnp.float64)


@pytest.fixture
def lax_promotion():
    """Networks keep the habits of those who wrote them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.scheduled
@pytest.mark.usefixtures("lax_promotion")
@pytest.mark.parametrize("make", [_mlp, _resnet, _gpt])
def test_coverage_on_the_kernels_of_networks(make):
    problem, params = make()
    gradient = jax.jit(jax.grad(problem.loss))
    for _ in range(40):
        step = gradient(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, step)
    direction = jax.tree.map(jnp.negative, gradient(params))
    kernel, moved = map(np.asarray, kernel_dense(problem, params, direction))
    values, vectors = np.linalg.eigh(kernel)
    vectors = vectors[:, ::-1]
    case = np.maximum(values[::-1], 0), vectors, vectors.T @ moved @ vectors
    edges = values[-1] * np.exp(-1.0 - np.arange(6))[::-1]
    shells = SoftShells(jnp.asarray(edges), 1 / 3)
    inside, errors = covered(
        case, shells, 20, 40, 0, signs=Signs(8, 20), renormalize=True
    )
    assert 0.90 < np.mean(inside) < 0.98
    assert np.sqrt(np.mean(np.square(errors))) < 0.25


@pytest.mark.parametrize(("renormalize", "scale"), [(True, 1e-12), (False, 1e12)])
def test_scales_drop_out_in_float32(shells, renormalize, scale):
    options = {"signs": Signs(4, 6), "renormalize": renormalize}
    found = []
    for factor in (1.0, scale):
        values, vectors, coupling = planted(60, 0, factor)
        case = values.astype(np.float32), vectors.astype(np.float32)
        edges = jnp.asarray(factor * np.asarray(shells.edges), jnp.float32)
        scaled = SoftShells(edges, 1 / 3)
        case = (*case, coupling.astype(np.float32))
        found.append(estimated(case, scaled, 5, jax.random.key(0), **options))
    unit = 1.0 if renormalize else scale**2
    assert found[1].mask.all()
    np.testing.assert_allclose(
        np.asarray(found[1].matrix, np.float64) / unit, found[0].matrix, rtol=2e-3
    )


def test_empty_shells_are_masked():
    case = planted(60, 0)
    shells = SoftShells(jnp.asarray([1e-2, 1e-1, 1e3]), 1 / 3)
    found = estimated(case, shells, 5, jax.random.key(0), signs=Signs(4, 6))
    assert found.mask.sum() == 4
    assert not found.mask[-1].any()
    windows = found.toeplitz(1)
    assert np.isfinite(windows.residual)
    assert list(np.isfinite(windows.windows)) == [True, True, False]
    assert list(np.isfinite(windows.windows_error)) == [True, True, False]
    assert np.all(np.where(found.mask, 0, found.matrix) == 0)
    assert bool(found.finite)


def test_shells_below_the_rounding_are_masked_and_spoil_no_others():
    values, vectors, coupling = planted(30, 0)
    values[15:] = 0
    coupling[15:], coupling[:, 15:] = 0, 0
    low = SoftShells(jnp.asarray([1e-25, 5e-2, 0.3]), 1 / 3)
    dense = Dense(values, coupling, low, renormalize=True)
    options = {"signs": Signs(4, 7), "renormalize": True}
    kernel = jnp.asarray((vectors * values) @ vectors.T, jnp.float32)
    moved = jnp.asarray(vectors @ coupling @ vectors.T, jnp.float32)
    pairs = (
        jnp.asarray(values[:6], jnp.float32),
        jnp.asarray(vectors[:, :6], jnp.float32),
    )
    found = estimate(kernel, moved, *pairs, low, jax.random.key(0), **options)
    np.testing.assert_array_equal(found.mask[0], False)
    assert found.mask[1:, 1:].all()
    np.testing.assert_allclose(found.matrix[1:, 1:], dense.matrix[1:, 1:], rtol=0.5)
    beyond = SoftShells(jnp.asarray([5e-2, 0.3, 1e30]), 1 / 3)
    found = estimate(kernel, moved, *pairs, beyond, jax.random.key(0), **options)
    assert np.all(np.isfinite(np.where(found.mask, found.matrix, 0)))


@pytest.mark.not_in_mode("debug_nans")
def test_bad_products_are_said():
    case = planted(60, 0)
    shells = SoftShells(jnp.asarray([1e-2, 1e-1, 1e3]), 1 / 3)
    case[2][0, 0] = np.nan
    found = estimated(case, shells, 5, jax.random.key(0), signs=Signs(4, 6))
    assert not found.finite
    assert not found.mask.any()
    assert np.all(found.matrix == 0)


def test_nothing_is_left_of_a_coupling_without_its_leading_pairs(shells, monkeypatch):
    def unconverged(*args, **options):
        found = leading_eigenpairs(*args, **options)
        return found._replace(converged=found.converged & False)

    monkeypatch.setattr(stochastic, "leading_eigenpairs", unconverged)
    found, _ = measured_at(np.random.default_rng(1).normal(size=(1, 12, 6)), shells)
    assert not found.finite
    assert not found.mask.any()
    for numbers in (found.matrix, found.replicates, found.log_error):
        assert np.all(numbers == 0)


def test_shells_lie_below_the_largest_eigenvalue_where_none_are_given():
    inputs = np.random.default_rng(1).normal(size=(1, 12, 6))
    found, kernel = measured_at(inputs, None)
    assert found.finite
    largest = np.linalg.eigvalsh(np.asarray(kernel, np.float64))[-1]
    np.testing.assert_allclose(
        found.edges, largest * np.exp(-np.arange(8, 0, -1.0)), 1e-5
    )


def test_a_kernel_without_an_eigenvalue_that_places_shells_has_no_coupling():
    found, _ = measured_at(np.zeros((1, 12, 6)), None)
    assert not found.finite
    assert not found.mask.any()
    text = str(found).splitlines()
    assert any("edges" in line and "n/a" in line for line in text)


def measured_at(inputs, shells):
    """Returns the coupling of ``sin(x p)`` at given inputs x, with the kernel."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
    batches = {"x": jnp.asarray(inputs)}
    problem = Problem.from_error(lambda p, batch: jnp.sin(batch["x"] @ p), batches)
    found = measure_stochastic_coupling(
        problem,
        weights,
        jnp.ones_like(weights),
        key=jax.random.key(0),
        shells=shells,
        num_pairs=2,
        signs=Signs(2, 4),
    )
    return found, kernel_dense(problem, weights)


@pytest.mark.parametrize("formed", [True, False])
def test_a_network_against_its_dense_kernel(formed, monkeypatch):
    monkeypatch.setattr(stochastic, "matrices_are_cheaper", lambda *_: formed)
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(6, 12))),
        "v": jnp.asarray(rng.normal(size=(12, 3)) / 3),
    }
    batches = {
        "x": jnp.asarray(rng.normal(size=(2, 20, 6))),
        "label": jnp.asarray(rng.integers(0, 3, (2, 20))),
    }

    def outputs_fn(p, batch):
        return jnp.tanh(batch["x"] @ p["w"]) @ p["v"]

    problem = Problem(outputs_fn, batches)
    direction = gradient_flow_direction(problem, params)
    kernel, moved = (np.asarray(x) for x in kernel_dense(problem, params, direction))
    values, vectors = np.linalg.eigh(kernel)
    found = measure_stochastic_coupling(
        problem,
        params,
        key=jax.random.key(0),
        shells=SoftShells(jnp.asarray(values[-1] * np.exp([-5.0, -4, -3, -2])), 1 / 3),
        num_pairs=12,
        signs=Signs(8, 12),
    )
    shells = SoftShells(jnp.asarray(values[-1] * np.exp([-5.0, -4, -3, -2])), 1 / 3)
    dense = Dense(values, vectors.T @ moved @ vectors, shells, renormalize=True)
    low, high = found.interval(0.99)
    assert found.finite
    assert found.mask.all()
    assert np.mean((low <= dense.matrix) & (dense.matrix <= high)) > 0.8
    np.testing.assert_allclose(found.counts, dense.counts, rtol=0.2)


def single_cell():
    """Returns a coupling of one shell."""
    one = jnp.ones((1, 1))
    return StochasticCoupling(
        matrix=one,
        mask=one > 0,
        replicates=jnp.ones((4, 1, 1)),
        log_error=one,
        lanczos_error=one,
        edges=one[0],
        counts=one[0],
        relative_drift=one[0],
        finite=jnp.bool_(True),
    )


def test_a_masked_cell_has_no_interval():
    """The 0 that stands there would have one from 0 to 0."""
    masked = single_cell()._replace(
        matrix=jnp.zeros((1, 1)), mask=jnp.zeros((1, 1)) > 0
    )
    assert np.isnan(masked.interval()).all()
    assert np.isinf(jax.jit(lambda found: found.interval())(masked)).all()


def test_a_level_that_is_no_probability_is_refused():
    found = single_cell()
    low, high = found.interval(0.5)
    assert low < 1 < high
    for level in (-0.5, 0.0, 1.0, 95):
        with pytest.raises(ValueError, match="confidence: expected a number between"):
            found.interval(level)


def test_blocks_too_wide_for_two_steps_are_refused(shells):
    """A single step cannot be compared with fewer: its error would read 0."""
    key, case = jax.random.key(0), planted(30, 0)
    for num_signs in (16, 31):
        with pytest.raises(ValueError, match=r"signs\.num_signs: expected"):
            estimated(case, shells, 2, key, signs=Signs(num_signs, 4))
    dense = Dense(case[0], case[2], shells, renormalize=False)
    spanned = estimated(case, shells, 14, key, signs=Signs(16, 4))
    np.testing.assert_allclose(spanned.counts.sum(), dense.counts.sum(), rtol=0.1)
    assert np.max(spanned.lanczos_error) < 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_signs": 1}, "num_signs: expected"),
        ({"num_steps": 3}, "num_steps: expected"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        Signs(**options)
