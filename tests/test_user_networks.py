"""Networks as users bring them: every kernel against `jax.jacrev` in float64."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax as grsd
from oracles import relative_error
from user_networks import (
    BEYOND,
    FACTORED,
    LOW_PRECISION,
    NETWORKS,
    SLOW,
    framework,
    plain,
    sequence,
)

TOLERANCE = 1e-11


@pytest.fixture(autouse=True)
def _as_users_run_it(x64):
    """64 bits for the oracle, and the promotions that users' networks rely on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def two_batches(batch):
    """Returns K = 2 batches; the second has every last axis reversed."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.flip(leaf, -1)]), batch)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def jacobians(outputs_fn, params, direction, batches):
    """Returns J and its derivative along the direction, ``[K, N C]`` by leaf."""

    def error(params, batch):
        outputs = outputs_fn(params, batch)
        classes = jnp.arange(outputs.shape[-1])
        exponentials = jnp.exp(outputs)
        softmax = exponentials / jnp.sum(exponentials, -1, keepdims=True)
        return (softmax - (batch["label"][..., None] == classes)).reshape(-1)

    @jax.jit
    def both(params, direction, batch):
        jacobian = jax.jacrev(lambda p: error(p, batch))
        return jax.jvp(jacobian, (params,), (direction,))

    num_batches = len(batches["label"])
    parts = [jax.tree.map(lambda x, k=k: x[k], batches) for k in range(num_batches)]
    pairs = [both(params, direction, part) for part in parts]

    def rows(*leaves):
        leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
        return np.stack([leaf.reshape(leaf.shape[0], -1) for leaf in leaves])

    return tuple(jax.tree.map(rows, *half) for half in zip(*pairs, strict=True))


class Expected:
    """M and Mdot of the two reductions, by leaf, from dense Jacobians."""

    def __init__(self, outputs_fn, params, direction, batches):
        jacobian, moved = jacobians(outputs_fn, params, direction, batches)
        flat, _ = jax.tree_util.tree_flatten_with_path(jacobian)
        self.paths = [jax.tree_util.keystr(path) for path, _ in flat]
        self.pairs = list(
            zip([leaf for _, leaf in flat], jax.tree.leaves(moved), strict=True)
        )

    def kernels(self, reduction):
        """Returns ``(M, Mdot)`` of every leaf."""
        if reduction == "stack":
            return [
                self._kernels(np.concatenate(a), np.concatenate(b))
                for a, b in self.pairs
            ]
        each = [
            [self._kernels(a[k], b[k]) for k in range(len(a))] for a, b in self.pairs
        ]
        return [tuple(np.mean(pair, 0)) for pair in map(np.array, each)]

    def total(self, reduction):
        """Returns ``(M, Mdot)`` of the network."""
        return tuple(sum(half) for half in zip(*self.kernels(reduction), strict=True))

    @staticmethod
    def _kernels(a, b):
        product = b @ a.T
        return a @ a.T, product + product.T


def stated(name):
    """Returns the problem of a network, with its parameters, d and what is expected."""
    outputs_fn, params, batch = NETWORKS[name]()
    batches, direction = two_batches(batch), random_like(params, 1)
    expected = Expected(outputs_fn, params, direction, batches)
    return grsd.Problem(outputs_fn, batches), params, direction, expected


def agree(got, wanted, scale=None):
    """Asserts float64 and a difference within rounding of the scale."""
    assert got.dtype == jnp.float64
    scale = np.max(np.abs(wanted)) if scale is None else scale
    assert np.max(np.abs(got - wanted)) < TOLERANCE * scale


def marks_of(name):
    return [pytest.mark.slow] if name in SLOW else []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks_of(name)) for name in NETWORKS]
)
def test_kernels_agree_with_jacrev(name):
    problem, params, direction, expected = stated(name)
    totals = expected.total("stack")
    dense = grsd.kernel_dense(problem, params, direction)
    for got, wanted in zip(dense, totals, strict=True):
        agree(got, wanted)

    layers = grsd.layer_kernels(problem, params, direction, layer_of="/".join)
    leaves = expected.kernels("stack")
    for layer, leaf in zip(layers.values(), leaves, strict=True):
        for got, wanted, total in zip(layer, leaf, totals, strict=True):
            agree(got, wanted, np.max(np.abs(total)))


#: Networks of which the gate holds the mean and all products to `jax.jacrev` too.
PRODUCTS = (
    "mlp_with_gain",
    "cnn_grouped",
    "rnn_scanned",
    "shared_in_two_roles",
    "linen_remat",
    "lora",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in PRODUCTS else pytest.mark.scheduled)
        for name in NETWORKS
    ],
)
def test_products_agree_with_jacrev(name):
    problem, params, direction, expected = stated(name)
    for reduction in ("stack", "mean"):
        problem = problem.replace(reduction=reduction)
        kernel, moved = expected.total(reduction)
        dense = grsd.kernel_dense(problem, params, direction)
        for got, wanted in zip(dense, (kernel, moved), strict=True):
            agree(got, wanted)
        agree(grsd.kernel_dense(problem, params), kernel)
        block = random_like(jnp.zeros((len(kernel), 8)), 2)
        agree(grsd.kernel_matmat(problem, params, block), kernel @ block)
        linearized = grsd.linearize_kernel(problem, params)
        agree(linearized.matmat(block), kernel @ block)
        projected = grsd.kernel_derivative(problem, params, direction, block)
        agree(projected, block.T @ moved @ block)


def by_build(builds):
    return pytest.mark.parametrize("build", builds, ids=lambda build: build.__name__)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "rounding"),
    [
        (plain.bfloat16_compute, jnp.bfloat16),
        (sequence.gpt2_style, jnp.float32),
        (framework.nnx_transformer, jnp.float32),
    ],
    ids=lambda value: value.__name__,
)
def test_kernels_agree_with_jacrev_to_the_rounding_inside(build, rounding):
    outputs_fn, params, batch = build()
    batches, direction = two_batches(batch), random_like(params, 1)
    expected = Expected(outputs_fn, params, direction, batches)
    problem = grsd.Problem(outputs_fn, batches)
    kernel, moved = expected.total("stack")
    tolerance = 4 * float(jnp.finfo(rounding).eps)
    got, got_moved = grsd.kernel_dense(problem, params, direction)
    assert relative_error(got, kernel) < tolerance
    assert relative_error(got_moved, moved) < tolerance
    block = random_like(jnp.zeros((len(kernel), 2), got.dtype), 2)
    linearized = grsd.linearize_kernel(problem, params)
    assert relative_error(linearized.matmat(block), kernel @ block) < tolerance


@by_build([*FACTORED, *BEYOND, *LOW_PRECISION])
def test_the_networks_have_the_leaves_of_the_table(build):
    _, params, batch = build()
    leaves = jax.tree.leaves(params)
    assert len(leaves) == (FACTORED | BEYOND | LOW_PRECISION)[build]
    expected = "float32" if build is plain.bfloat16_compute else "float64"
    assert {leaf.dtype.name for leaf in leaves} == {expected}
    assert sum(leaf.size for leaf in leaves) < 12_000
    assert len(batch["label"]) in (3, 4)


@by_build([*FACTORED, *LOW_PRECISION])
def test_every_leaf_is_factored(build):
    leaves = (FACTORED | LOW_PRECISION)[build]
    outputs_fn, params, batch = build()
    explained = grsd.Problem(outputs_fn, two_batches(batch)).explain(params)
    plain = {row.path: row.why for row in explained.rows if row.how == "plain"}
    assert not plain
    assert explained.num_leaves == explained.num_factored == leaves
    assert len(explained.rows) == leaves


#: Leaves with factors of the networks beyond, where some have none.
PARTLY = {
    plain.custom_jvp_with_a_parameter: 1,
    plain.branch_on_data: 1,
    plain.switch_on_a_constant: 0,
}


@by_build(BEYOND)
def test_a_leaf_without_factors_leaves_them_to_the_others(build):
    outputs_fn, params, batch = build()
    explained = grsd.Problem(outputs_fn, two_batches(batch)).explain(params)
    assert explained.num_leaves == BEYOND[build]
    assert explained.num_factored == PARTLY.get(build, BEYOND[build])


def test_the_page_says_how_many_leaves_have_factors():
    page = Path(__file__).parent.parent / "docs" / "your_own_network.md"
    pattern = r"^\|.*\| `(\w+)` \| (\d+) of (\d+) \|$"
    rows = re.findall(pattern, page.read_text(), re.MULTILINE)
    builds = {b.__name__: b for b in FACTORED | BEYOND | LOW_PRECISION}
    leaves = FACTORED | BEYOND | LOW_PRECISION
    assert len(rows) > 20
    for name, factored, total in rows:
        build = builds[name]
        assert int(total) == leaves[build]
        assert int(factored) == PARTLY.get(build, leaves[build])
