import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, eigsh

from grsd_jax.linalg import eigenpairs, leading_eigenpairs
from oracles import symmetric_with_spectrum

SIZE = 320
PAIRS = 20
EPS = float(np.finfo(np.float32).eps)


def spectra(size):
    index = np.arange(1.0, size + 1)
    tail = 3 * index[: size - 19] ** -1.2
    near = np.linspace(1, 0.5, 9)
    return {
        "power -1": 1 / index,
        "power -2": index**-2,
        "power -4": index**-4,
        "clusters": np.r_[100.0, 30 * near, 10 * near, tail],
        "power -0.5": index**-0.5,
        "identity": np.ones(size),
        "zero": np.zeros(size),
        "rank 10": np.r_[np.linspace(2, 1, 10), np.zeros(size - 10)],
        "10 equal": np.r_[np.ones(10), np.zeros(size - 10)],
        "two values": np.r_[np.full(size // 2, 50.0), np.ones(size - size // 2)],
        "12-fold top": np.r_[np.full(12, 3.0), 1 / index[: size - 12]],
    }


class Operator:
    """A dense float32 matrix that counts the columns it multiplies."""

    def __init__(self, name, size=SIZE):
        spectrum = spectra(size)[name]
        if size == SIZE:
            dense, _ = symmetric_with_spectrum(spectrum)
        else:  # a Gaussian start looks the same in every basis
            dense = np.diag(spectrum)
        self.matrix = dense.astype(np.float32)
        self.exact = self.matrix.astype(np.float64)
        self.spectrum = spectrum
        self.columns = 0

    def __call__(self, block):
        self.columns += 1 if block.ndim == 1 else block.shape[1]
        return self.matrix @ np.asarray(block)

    def true_residuals(self, values, vectors):
        values, vectors = (np.asarray(x, np.float64) for x in (values, vectors))
        return np.linalg.norm(self.exact @ vectors - vectors * values, axis=0)

    def eigsh(self, tol, seed=0):
        """Returns the true residuals of SciPy's pairs and the columns it took."""
        start = np.random.default_rng(seed).normal(size=len(self.matrix))
        self.columns = 0
        linear = LinearOperator(self.matrix.shape, matvec=self, dtype=np.float32)
        values, vectors = eigsh(linear, k=PAIRS, tol=tol, v0=start.astype(np.float32))
        return self.true_residuals(values, vectors)[::-1], self.columns


@functools.cache
def operator(name, size=SIZE):
    return Operator(name, size)


def run(matmat, width, num_pairs=PAIRS, size=SIZE, seed=3, **options):
    start = jax.random.normal(jax.random.key(seed), (size, width))
    return leading_eigenpairs(
        matmat, start, num_pairs, key=jax.random.key(1), **options
    )


@pytest.mark.parametrize("width", [1, 2, 4])
def test_hard_spectra_in_float32(width):
    for name in spectra(SIZE):
        if name == "12-fold top":
            continue
        matmat = operator(name)
        matmat.columns = 0
        pairs = run(matmat, width)
        assert matmat.columns == pairs.num_columns
        assert pairs.values.dtype == pairs.vectors.dtype == jnp.float32
        assert np.all(pairs.converged), name
        assert pairs.finite
        expected = np.linalg.eigvalsh(matmat.exact)[: -PAIRS - 1 : -1]
        top = max(matmat.spectrum[0], 1e-30)
        np.testing.assert_allclose(pairs.values, expected, atol=1e-6 * top, rtol=0)
        assert np.all(np.diff(pairs.values) <= 0)
        true = matmat.true_residuals(pairs.values, pairs.vectors)
        assert np.all(true <= np.asarray(pairs.residuals, np.float64)), name
        vectors = np.asarray(pairs.vectors, np.float64)
        off = np.max(np.abs(vectors.T @ vectors - np.eye(PAIRS)))
        assert off <= 2e-6
        assert abs(off - pairs.orthogonality) <= 1e-6
        assert pairs.asymmetry <= 1e-5


@pytest.mark.parametrize("size", [SIZE, 2000])
@pytest.mark.parametrize("name", ["power -1", "power -2", "power -4", "clusters"])
def test_fewer_columns_than_eigsh(name, size):
    # The same tolerance, and SciPy's may be loosened as far as its pairs still meet it.
    # With its own number of Lanczos vectors it never takes fewer than 42 columns.
    matmat = operator(name, size)
    pairs = run(matmat, 1, size=size)
    allowed = np.maximum(1e-4 * matmat.spectrum[:PAIRS], 5 * EPS * matmat.spectrum[0])
    true = matmat.true_residuals(pairs.values, pairs.vectors)
    assert np.all(true <= allowed)
    columns = [
        columns
        for residuals, columns in (matmat.eigsh(tol) for tol in (1e-4, 1e-3, 1e-2))
        if np.all(residuals <= allowed)
    ]
    assert columns
    assert pairs.num_columns < min(columns)
    # Blocks of two cost more columns: they win where few pairs stand out, not always.
    if name in ("power -4", "clusters") and size == SIZE:
        assert run(matmat, 2).num_columns < min(columns)


@pytest.mark.parametrize("name", ["power -1", "power -2", "power -4", "clusters"])
def test_fewer_columns_than_eigsh_at_its_own_residuals(name):
    # SciPy converges further than it was asked to, so ask for what it really reached.
    matmat = operator(name)
    residuals, columns = matmat.eigsh(1e-4)
    relative = np.max(residuals) / matmat.spectrum[0]
    pairs = run(matmat, 1, tolerance=relative, relative_to="largest")
    true = matmat.true_residuals(pairs.values, pairs.vectors)
    assert np.max(true) <= np.max(residuals)
    assert pairs.num_columns < columns


def first_convergence(matrix, start, num_pairs, tolerance, relative_to):
    """Returns the columns after which plain float64 block Lanczos has converged."""
    width = start.shape[1]
    basis, _ = np.linalg.qr(start)
    while True:
        product = matrix @ basis
        values, rotation = np.linalg.eigh(basis.T @ product)
        vectors = basis @ rotation[:, : -num_pairs - 1 : -1]
        values = values[: -num_pairs - 1 : -1]
        residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
        reference = values if relative_to == "value" else values[0]
        done = basis.shape[1]
        if done >= num_pairs and np.all(residuals <= tolerance * reference):
            return done
        rest = product[:, -width:]
        for _ in range(2):
            rest = rest - basis @ (basis.T @ rest)
        basis = np.hstack([basis, np.linalg.qr(rest)[0]])


@pytest.mark.parametrize("relative_to", ["value", "largest"])
@pytest.mark.parametrize(("name", "width"), [("power -1", 1), ("power -0.5", 2)])
def test_stops_as_soon_as_the_tolerance_is_met(name, width, relative_to):
    matmat = operator(name)
    start = np.asarray(jax.random.normal(jax.random.key(3), (SIZE, width)), np.float64)
    for tolerance in (1e-2, 1e-4):
        expected = first_convergence(matmat.exact, start, PAIRS, tolerance, relative_to)
        options = {"tolerance": tolerance, "relative_to": relative_to}
        every = run(matmat, width, check_every=1, **options).num_columns
        # Float32 may tip a residual over the edge of the tolerance.
        assert abs(every - expected) <= width
        assert every <= run(matmat, width, **options).num_columns <= every + 2 * width
    sparse = run(matmat, width, check_every=7)
    assert (sparse.num_columns // width - PAIRS // width) % 7 == 0


def test_what_has_not_converged_is_marked():
    matmat = operator("power -1")
    pairs = run(matmat, 1, max_steps=30)
    assert pairs.num_columns == 30
    assert 5 < np.sum(pairs.converged) < PAIRS
    good = np.asarray(pairs.converged)
    true = matmat.true_residuals(pairs.values, pairs.vectors)
    assert np.all(true[good] <= 1e-4 * matmat.spectrum[:PAIRS][good])
    assert np.all(true[~good] > 1e-4 * matmat.spectrum[:PAIRS][~good])
    assert np.all(true <= pairs.residuals)


def test_copies_of_a_value_in_a_rich_spectrum_need_a_wide_block():
    # What the docstring warns of; SciPy's eigsh misses them in the same way.
    matmat = operator("12-fold top")
    narrow, wide = (run(matmat, width) for width in (1, 12))
    assert np.sum(np.asarray(narrow.values) > 2.9) < 12
    np.testing.assert_allclose(wide.values, matmat.spectrum[:PAIRS], atol=3e-6, rtol=0)
    assert np.all(wide.converged)


def test_copies_are_found_when_the_krylov_space_closes():
    values = np.r_[np.repeat([5.0, 4.0, 3.0], 4), np.zeros(48)]
    diagonal = jnp.asarray(values, jnp.float32)[:, None]
    pairs = run(lambda block: diagonal * block, 1, 10, 60)
    np.testing.assert_allclose(pairs.values, values[:10], atol=1e-5)
    assert np.all(pairs.converged)
    # Four columns close the space, with one copy of each: sure, but not yet leading.
    cut = run(lambda block: diagonal * block, 1, 3, 60, max_steps=4)
    assert cut.num_columns == 4
    np.testing.assert_allclose(cut.values, [5, 4, 3], atol=1e-5)
    assert not np.any(cut.converged)


REPEATED = {
    "two": np.r_[np.full(6, 3.0), np.full(6, 2.0)],
    "mixed": np.r_[[3.0] * 6, 2.5, 2.2, [2.0] * 5, [1.0] * 3],
    "far apart": np.r_[np.full(6, 1.0), np.full(6, 1e-3), np.full(6, 1e-5)],
}


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("name", REPEATED)
def test_every_copy_is_found_or_said_to_be_missing(name, width):
    # Directions die at different steps, so that new random ones run beside old ones.
    values = np.r_[REPEATED[name], np.zeros(40 - len(REPEATED[name]))]
    diagonal = jnp.asarray(values, jnp.float32)[:, None]
    for num_pairs in (6, 12):
        pairs = run(jax.jit(lambda block: diagonal * block), width, num_pairs, 40)
        np.testing.assert_allclose(pairs.values, values[:num_pairs], atol=2e-6)
        assert np.all(pairs.converged)
        assert pairs.complete
    cut = run(lambda block: diagonal * block, width, 6, 40, max_steps=-(-10 // width))
    wrong = np.abs(cut.values - values[:6]) > 1e-3 * values[:6]
    assert not np.any(cut.converged & wrong)


def test_what_no_random_direction_has_shown_is_not_complete():
    simple = operator("power -1")
    assert run(simple, 2).complete  # a second copy of any value would have shown
    assert not run(simple, 1).complete  # one start holds one copy of each
    repeated = run(operator("12-fold top"), 4)
    assert np.all(repeated.converged)
    assert not repeated.complete


def test_room_is_enlarged_when_it_is_used_up():
    values = np.linspace(1.0, 0.9, 60)
    diagonal = jnp.asarray(values, jnp.float32)[:, None]
    pairs = run(lambda block: diagonal * block, 2, 3, 60, tolerance=1e-5)
    assert pairs.num_columns > 2 * eigenpairs._FIRST_BLOCKS
    assert pairs.num_columns > 3 * eigenpairs._FIRST_COLUMNS
    assert np.all(pairs.converged)
    np.testing.assert_allclose(pairs.values, values[:3], atol=1e-6)
    left_over = (diagonal - pairs.values[None]) * pairs.vectors
    true = np.linalg.norm(np.asarray(left_over, np.float64), axis=0)
    assert np.all(true <= pairs.residuals)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_as_many_pairs_as_dimensions(width):
    values = np.r_[np.arange(6.0, 0.0, -1.0), 0.0]
    dense, _ = symmetric_with_spectrum(values)
    matrix = jnp.asarray(dense, jnp.float32)
    pairs = run(lambda block: matrix @ block, width, 7, 7)
    assert np.all(pairs.converged)
    np.testing.assert_allclose(pairs.values, values, atol=1e-5)
    assert pairs.orthogonality <= 1e-6


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64():
    values = np.arange(1.0, 81.0) ** -2
    dense, _ = symmetric_with_spectrum(values)
    matrix = jnp.asarray(dense)
    start = jax.random.normal(jax.random.key(0), (80, 2), jnp.float64)
    pairs = leading_eigenpairs(
        lambda block: matrix @ block, start, 5, key=jax.random.key(1), tolerance=1e-11
    )
    assert pairs.values.dtype == pairs.vectors.dtype == jnp.float64
    assert np.all(pairs.converged)
    np.testing.assert_allclose(pairs.values, values[:5], rtol=1e-13)
    assert np.all(pairs.residuals <= 1e-11 * values[:5] + 1e-14)


def test_products_that_are_not_finite_are_flagged_and_do_not_spread():
    calls = []

    def matmat(block):
        calls.append(block)
        return 2 * block.at[0, 0].set(jnp.nan if len(calls) == 5 else 1.0)

    pairs = run(matmat, 2, 8, 30)
    assert len(calls) == 5
    assert not pairs.finite
    assert not np.any(pairs.converged)
    for leaf in jax.tree.leaves(pairs):
        assert np.all(np.isfinite(leaf))


def test_arguments_survive_and_the_result_repeats():
    start, key = jax.random.normal(jax.random.key(0), (30, 2)), jax.random.key(1)
    diagonal = jnp.arange(1.0, 31.0)[:, None]
    seen = []
    first, second = (
        leading_eigenpairs(
            lambda block: diagonal * block, start, 4, key=key, progress=seen.append
        )
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.vectors, second.vectors)
    steps = list(range(1, first.num_columns // 2 + 1))
    assert seen == steps + steps


@pytest.mark.parametrize("size", [1e-30, 1e20, 1e30])
def test_operators_of_any_size(size):
    values = size * np.geomspace(1, 1e-3, 40)
    dense, _ = symmetric_with_spectrum(values)
    matrix = jnp.asarray(dense, jnp.float32)
    pairs = run(jax.jit(lambda block: matrix @ block), 2, 4, 40)
    np.testing.assert_allclose(pairs.values, values[:4], rtol=1e-5)
    assert np.all(pairs.converged)
    found, vectors = (np.asarray(x, np.float64) for x in (pairs.values, pairs.vectors))
    true = np.asarray(matrix, np.float64) @ vectors - vectors * found
    assert np.all(np.linalg.norm(true, axis=0) <= np.asarray(pairs.residuals))


def test_values_that_leave_the_dtype_are_not_finite():
    start = jax.random.normal(jax.random.key(0), (30, 2))
    matrix = 3e38 * jnp.ones((30, 30))
    pairs = leading_eigenpairs(
        lambda block: matrix @ block, start, 2, key=jax.random.key(1)
    )
    assert not pairs.finite
    assert not np.any(pairs.converged)


@pytest.mark.usefixtures("x64")
def test_bounds_in_float64_hold_the_rounding_of_the_small_solver():
    values = np.r_[np.repeat([5.0, 4.0, 3.0], 6), np.zeros(62)]
    dense, _ = symmetric_with_spectrum(values)
    for size in (1.0, 1e-150, 1e150):
        matrix = size * (dense + dense.T) / 2
        pairs = leading_eigenpairs(
            functools.partial(jnp.matmul, matrix),
            jax.random.normal(jax.random.key(0), (80, 2), jnp.float64),
            8,
            key=jax.random.key(1),
            tolerance=1e-13,
        )
        exact = (matrix / size).astype(np.longdouble)
        found, vectors = (np.asarray(x) for x in (pairs.values / size, pairs.vectors))
        true = np.linalg.norm(
            (exact @ vectors - vectors * found).astype(np.float64), axis=0
        )
        assert np.all(true <= np.asarray(pairs.residuals) / size)
        np.testing.assert_allclose(found, values[:8], rtol=1e-13)


def test_wrong_operators_show_in_the_asymmetry():
    matrix = np.random.default_rng(0).normal(size=(30, 30)).astype(np.float32)
    assert run(lambda block: jnp.asarray(matrix) @ block, 2, 4, 30).asymmetry > 0.1


def test_every_dot_is_at_highest_precision():
    shapes = jnp.ones((20, 6)), jnp.ones((6, 3))
    with jax.default_matmul_precision("bfloat16"):
        text = eigenpairs._vectors.lower(*shapes).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 2
    for dot in dots:
        assert re.search(r"precision = \[HIGHEST, HIGHEST\]", dot), dot


@pytest.mark.parametrize(("width", "steps"), [(1, 30), (3, 1), (3, 9), (8, 5)])
def test_ritz_pairs_are_those_of_the_whole_matrix(width, steps):
    rng = np.random.default_rng(width)
    size = width * steps
    whole = np.zeros((size + width, size + width))
    for j in range(steps):
        at, following = (slice((j + i) * width, (j + 1 + i) * width) for i in (0, 1))
        block = rng.normal(size=(width, width))
        coupling = rng.normal(size=(width, width)) * (j != 4)  # a closed space
        whole[at, at] = block + block.T
        whole[following, at], whole[at, following] = coupling, coupling.T
    projected = whole[:, :size]
    for num_pairs in (1, min(7, size), size + 5):
        values, rotation, residuals = eigenpairs._leading(projected, num_pairs, width)
        expected = np.linalg.eigvalsh(projected[:size])[::-1][:num_pairs]
        np.testing.assert_allclose(values, expected, atol=1e-12 * abs(expected[0]))
        gram = rotation.T @ rotation
        np.testing.assert_allclose(gram, np.eye(len(values)), atol=1e-12)
        rest = projected @ rotation
        rest[:size] -= values * rotation
        np.testing.assert_allclose(
            np.linalg.norm(rest, axis=0), residuals, atol=1e-11 * abs(expected[0])
        )


@pytest.mark.parametrize("seed", range(5))
def test_copies_split_by_rounding_are_all_found(seed):
    rng = np.random.default_rng(seed)
    noise = np.tril(np.triu(rng.normal(size=(120, 120)), -2), 2)
    projected = np.vstack([np.eye(120) + 1e-17 * (noise + noise.T), np.zeros((2, 120))])
    values, rotation, residuals = eigenpairs._leading(projected, 10, 2)
    assert rotation.shape == (120, 10)
    np.testing.assert_allclose(values, 1)
    np.testing.assert_array_equal(residuals, 0)


def test_bad_input_is_named():
    def call(start, num_pairs, **options):
        leading_eigenpairs(
            lambda block: block, start, num_pairs, key=jax.random.key(0), **options
        )

    good = jnp.eye(6, 2)
    with pytest.raises(ValueError, match="num_pairs: expected at most n = 6, got 7"):
        call(good, 7)
    with pytest.raises(ValueError, match="num_pairs: expected an integer >= 1"):
        call(good, 0)
    with pytest.raises(ValueError, match="max_steps: expected an integer >= 3, got 2"):
        call(good, 5, max_steps=2)
    with pytest.raises(ValueError, match="check_every: expected an integer >= 1"):
        call(good, 2, check_every=0)
    with pytest.raises(ValueError, match="tolerance: expected a finite number > 0"):
        call(good, 2, tolerance=0.0)
    with pytest.raises(ValueError, match="relative_to: expected one of 'value'"):
        call(good, 2, relative_to="trace")
    with pytest.raises(ValueError, match="start_block: expected shape"):
        call(jnp.ones(6), 2)
    with pytest.raises(ValueError, match="start_block: expected 1 <= b <= n columns"):
        call(jnp.ones((3, 4)), 2)
    with pytest.raises(ValueError, match=r"start_block.shape\[1\]: expected"):
        call(jnp.ones((3, 0)), 2)
    with pytest.raises(
        ValueError, match="start_block: expected dtype float32 or float64"
    ):
        call(jnp.ones((4, 2), jnp.int32), 2)
    with pytest.raises(ValueError, match="start_block: expected finite numbers"):
        call(good.at[0, 0].set(jnp.nan), 2)


@pytest.mark.parametrize("share", [0.6, 3.9])
def test_residuals_of_a_short_run_hold_what_a_dead_direction_leaves_out(share):
    coupling = share * float(jnp.finfo(jnp.float32).eps)
    matrix = np.eye(4, dtype=np.float32)
    matrix[0, 1] = matrix[1, 0] = coupling
    start = jnp.eye(4, 1, dtype=jnp.float32)
    found = leading_eigenpairs(
        jax.jit(lambda block: jnp.matmul(matrix, block, precision="highest")),
        start,
        1,
        key=jax.random.key(0),
        max_steps=1,
    )
    vector = np.asarray(found.vectors, np.float64)[:, 0]
    residual = matrix.astype(np.float64) @ vector - float(found.values[0]) * vector
    assert np.linalg.norm(residual) <= found.residuals[0]


def test_inside_jit_the_search_says_that_it_must_be_outside():
    start = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)
    key = jax.random.key(0)
    diagonal = jnp.arange(1.0, 7.0, dtype=jnp.float32)[:, None]

    def of_start(block):
        return leading_eigenpairs(lambda v: diagonal * v, block, 1, key=key).values

    def of_operator(scale):
        matmat = lambda v: scale * diagonal * v  # noqa: E731
        return leading_eigenpairs(matmat, start, 1, key=key).values

    for function, traced in ((of_start, start), (of_operator, jnp.float32(2))):
        with pytest.raises(ValueError, match="call this outside of jit"):
            jax.jit(function)(traced)
