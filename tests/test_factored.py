"""The factored Jacobian against plain differentiation, in float64, on many layers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from grsd_jax import (
    Problem,
    kernel_dense,
    kernel_derivative,
    kernel_matmat,
    layer_kernels,
    linearize_kernel,
)
from grsd_jax.jacobian import factors, plan
from grsd_jax.jacobian.plan import plan_of
from grsd_jax.kernel import dense
from grsd_jax.models import PlainNet18, ResNet, ResNet18, linen_outputs
from oracles import plain

K, N = 2, 3


class MLP(nn.Module):
    """Nothing but Dense layers, with and without a bias."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(5, name="first")(x.reshape(len(x), -1)))
        x = nn.gelu(nn.Dense(4, use_bias=False, name="second")(x))
        return nn.Dense(3, name="head")(x)


class ConvNet(nn.Module):
    """Every option of a convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2, name="strided")(x)
        x = nn.gelu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = nn.Conv(4, (3, 2), padding=1, kernel_dilation=(1, 2), name="dilated")(x)
        x = nn.Conv(4, (2, 2), padding=((0, 1), (1, 0)), use_bias=False, name="pad")(x)
        x = nn.gelu(nn.GroupNorm(2, name="groups")(x))
        x = nn.Conv(4, (3, 3), feature_group_count=2, name="grouped")(x)
        x = nn.Conv(4, (3, 3), padding="CIRCULAR", name="circular")(x)
        return nn.Dense(3, name="head")(x.reshape(len(x), -1))


class Scale(nn.Module):
    """A layer that is not affine in its parameter."""

    @nn.compact
    def __call__(self, x):
        return x * jnp.exp(self.param("log", nn.initializers.normal(0.5), x.shape[-1:]))


class Shared(nn.Module):
    """A layer used twice, one that is not affine, and one whose output is unused."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)[:, :6]
        layer = nn.Dense(6, name="twice")
        norm = nn.LayerNorm(name="norm")
        nn.Dense(2, name="unused")(x)
        x = nn.tanh(norm(layer(nn.tanh(norm(layer(x))))))
        return nn.Dense(3, name="head")(Scale(name="scale")(x))


class Transformer(nn.Module):
    """Token and position embeddings, attention, and a remat'd block."""

    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(5, 4, name="tokens")
        length = tokens.shape[1]
        # As many positions as examples: the leading axis is not the examples'.
        places = nn.Embed(length, 4, name="places")(jnp.arange(length))
        table = self.param("table", nn.initializers.normal(0.5), (length, 4))
        x = embed(tokens) + places + table
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.RMSNorm()(x))
        x = x + nn.remat(nn.Dense)(4, name="remat")(x)
        x = jnp.mean(x, axis=1)
        return embed.attend(x)[:, :3] if self.tied else nn.Dense(3, name="head")(x)


@functools.cache
def make(name):
    """Returns a problem, parameters and a direction, all in float64."""
    keys = jax.random.split(jax.random.key(0), 3)
    if name in ("transformer", "tied"):
        image = jax.random.randint(keys[0], (K, N, N), 0, 5)
        model = Transformer(tied=name == "tied")
    else:
        image = jax.random.normal(keys[0], (K, N, 8, 8, 3))
        model = {
            "mlp": MLP(),
            "conv": ConvNet(),
            "shared": Shared(),
            "resnet": ResNet(3, 2, "gelu", stage_sizes=(1, 1)),
            "plain": ResNet(3, 2, "gelu", stage_sizes=(1, 1), residual=False),
            "resnet18": ResNet18(3, 1, "gelu"),
            "plain18": PlainNet18(3, 1, "gelu"),
            "linear": Flat(),
        }[name]
    noise = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(noise.normal(size=leaf.shape))

    shapes = dict(jax.eval_shape(model.init, keys[1], image[0]))
    shape = shapes.pop("params")
    params = jax.tree.map(lambda leaf: 0.3 * draw(leaf), shape)
    state = jax.tree.map(lambda leaf: 0.5 + jnp.abs(draw(leaf)), shapes)
    batches = {"image": image, "label": jax.random.randint(keys[2], (K, N), 0, 3)}
    problem = Problem(linen_outputs(model, state), batches)
    return problem, params, jax.tree.map(draw, shape)


@functools.cache
def plain_matrices(name, reduction):
    """Returns M and Mdot by the plain path."""
    problem, params, direction = make(name)
    if reduction == "stack":
        return kernel_dense(plain(problem), params, direction)
    # The mean is that of the stack's blocks on the diagonal.
    blocks = [
        matrix.reshape(K, len(matrix) // K, K, -1)
        for matrix in plain_matrices(name, "stack")
    ]
    return tuple(sum(block[k, :, k] for k in range(K)) / K for block in blocks)


class Flat(nn.Module):
    """A single product with a parameter of its own."""

    @nn.compact
    def __call__(self, x):
        return x.reshape(len(x), -1) @ self.param(
            "w", nn.initializers.normal(), (192, 3)
        )


def close(got, expected, tolerance=1e-11):
    return np.max(np.abs(got - expected)) <= tolerance * np.max(np.abs(expected))


#: Networks that compile fast enough for the default tests; all are in the slow ones.
QUICK = ("shared", "resnet", "mlp", "linear")

#: How the leaves of a network come, other than by products and single numbers.
OTHERS = {
    "mlp": {},
    "conv": {},
    "shared": {},
    "transformer": {"tokens/embedding": "lookup"},
    "tied": {"tokens/embedding": "composite"},
    "resnet": {},
    "plain": {},
    "linear": {},
}


@pytest.fixture(autouse=True)
def _float64():
    # Some of flax's own layers promote ranks and dtypes.
    promotion = jax.numpy_dtype_promotion("standard")
    with jax.enable_x64(True), promotion, jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", OTHERS)
def test_every_leaf_is_factored(name):
    problem, params, _ = make(name)
    explained = problem.explain(params)
    assert explained.num_factored == explained.num_leaves
    assert explained.coupled is False
    usual = ("outer", "elementwise", "rows")
    others = {row.path: row.how for row in explained.rows if row.how not in usual}
    assert others == OTHERS[name]


def marks_of(name, reduction):
    # The reductions differ in how batches are joined, not in a network's factors; and
    # those of "plain" and "tied" are among the others' and the networks of users.
    joined = reduction == "mean" and name not in ("conv", "mlp")
    if joined or name in ("plain", "tied"):
        return [pytest.mark.scheduled]
    return [] if name in QUICK else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        pytest.param(name, reduction, marks=marks_of(name, reduction))
        for name in OTHERS
        for reduction in ("mean", "stack")
    ],
)
def test_every_operation_agrees_with_the_plain_path(monkeypatch, name, reduction):
    problem, params, direction = make(name)
    problem = problem.replace(reduction=reduction)
    kernel, moved = plain_matrices(name, reduction)

    def halves(sizes, _):
        count = range(len(sizes))
        return [
            tuple(i for i in count if i % 2 == half) for half in (0, 1) if half in count
        ]

    monkeypatch.setattr(dense, "_leaf_groups", halves)
    got = kernel_dense(problem, params, direction, example_chunk=2)
    assert close(got[0], kernel)
    assert close(got[1], moved)
    block = jnp.asarray(np.random.default_rng(1).normal(size=(len(kernel), 5)))
    linearized = linearize_kernel(problem, params)
    assert close(linearized.matmat(block), kernel @ block)
    assert close(kernel_matmat(problem, params, block), kernel @ block)
    projected = kernel_derivative(problem, params, direction, block, column_chunk=3)
    assert close(projected, block.T @ moved @ block)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("resnet18", marks=pytest.mark.scheduled),
        pytest.param("plain18", marks=pytest.mark.scheduled),
    ],
)
def test_whole_networks_agree_with_the_plain_path(name):
    problem, params, direction = make(name)
    problem = problem.replace(reduction="mean")
    kernel, moved = kernel_dense(plain(problem), params, direction)
    got = kernel_dense(problem, params, direction)
    assert close(got[0], kernel)
    assert close(got[1], moved)
    block = jnp.asarray(np.random.default_rng(1).normal(size=(len(kernel), 5)))
    assert close(linearize_kernel(problem, params).matmat(block), kernel @ block)
    projected = kernel_derivative(problem, params, direction, block)
    assert close(projected, block.T @ moved @ block)


@pytest.mark.parametrize("backend", ["cpu", "an accelerator"])
def test_gram_products_of_factors_are_those_of_their_rows(monkeypatch, backend):
    # What lies between for two examples of four, in float64.
    monkeypatch.setattr(factors, "_SPREAD_BYTES", 2 * (2 * 16 * 2 * 32 * 8))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    noise = np.random.default_rng(0)
    left, right = (
        factors.Outer(
            jnp.asarray(noise.normal(size=(count, 16, 5))),
            jnp.asarray(noise.normal(size=(count, 2, 16, 32))),
        )
        for count in (4, 2)
    )
    got = factors.inner(left, right)
    assert close(got, factors.inner(left.as_rows(), right.as_rows()))


@pytest.mark.parametrize(
    ("count", "fits", "expected"), [(4, 3, 2), (5, 4, 1), (6, 9, 6), (3, 0, 1)]
)
def test_an_accelerator_contracts_what_fits(monkeypatch, count, fits, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: "an accelerator")
    monkeypatch.setattr(factors, "_SPREAD_BYTES", 10 * fits)
    assert factors._at_once(count, 10) == expected


def outer(count, positions, inputs, outputs, q=2):
    noise = np.random.default_rng(0)
    return factors.Outer(
        jnp.asarray(noise.normal(size=(count, positions, inputs))),
        jnp.asarray(noise.normal(size=(count, q, positions, outputs))),
    )


@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        ((3, 2, 40, 5), "similarity"),  # 6 positions in all, 40 inputs
        ((9, 1, 4, 5), "factors"),
        ((3, 16, 5, 8), "rows"),
    ],
)
def test_products_of_every_form_are_those_of_the_rows(sizes, form):
    block = outer(*sizes)
    ready = factors.for_products(block, multiplied=True)
    chosen = {
        "rows": isinstance(ready, factors.Rows),
        "similarity": getattr(ready, "similarity", None) is not None,
    }
    assert chosen == {name: name == form for name in chosen}
    columns = jnp.asarray(np.random.default_rng(1).normal(size=(sizes[0], 2, 4)))
    whole = block.as_rows().rows.reshape(2 * sizes[0], -1)
    expected = (whole @ whole.T @ columns.reshape(-1, 4)).reshape(columns.shape)
    assert close(ready.multiply(columns), expected)
    assert close(ready.push(ready.pull(columns)), expected)
    pulled = factors.for_products(block)
    assert getattr(pulled, "similarity", None) is None
    costs = factors._product_costs(block)
    assert ["rows", "factors", "similarity"][int(np.argmin(costs))] == form


def test_layer_kernels_add_up_and_are_those_of_their_parameters():
    problem, params, _ = make("shared")
    problem = problem.replace(reduction="mean")
    layers = layer_kernels(problem, params)
    assert set(layers) == {"twice", "norm", "unused", "head", "scale"}
    whole, _ = plain_matrices("shared", "mean")
    assert close(sum(layers.values()), whole)
    for name, layer in layers.items():

        def restricted(own, batch, name=name):
            return problem.error({**params, name: own}, batch)

        own = Problem.from_error(restricted, problem.batches, reduction="mean")
        expected = kernel_dense(own, params[name])
        assert np.max(np.abs(layer - expected)) <= 1e-11 * np.max(np.abs(whole))
    halves = layer_kernels(
        problem, params, layer_of=lambda path: "ab"[path[0] == "head"]
    )
    assert close(halves["b"], layers["head"])


def test_other_errors_keep_all_their_outputs():
    problem, params, _ = make("conv")
    problem = problem.replace(loss="squared")
    assert close(kernel_dense(problem, params), kernel_dense(plain(problem), params))


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_linearized_kernels_cross_jit_without_retracing(reduction):
    problem, params, _ = make("resnet")
    problem = problem.replace(loss="squared", reduction=reduction)
    traces = 0

    @jax.jit
    def product(kernel, block):
        nonlocal traces
        traces += 1
        return kernel.matmat(block)

    size = problem.dimension(params)
    block = jnp.asarray(np.random.default_rng(1).normal(size=(size, 2)))
    for scale in (1.0, 1.1):
        scaled = jax.tree.map(lambda p, s=scale: s * p, params)
        kernel = linearize_kernel(problem, scaled)
        assert close(product(kernel, block), kernel_matmat(problem, scaled, block))
    assert traces == 1


def test_functions_of_the_users_own_are_factored():
    problem, params, _ = make("mlp")
    own = Problem.from_error(problem.error, problem.batches)
    assert plan_of(problem.at(params)) is not None
    assert plan_of(own.at(params)) is not None
    assert plan_of(plain(problem).at(params)) is None


def test_many_outputs_are_left_to_plain_products(monkeypatch):
    problem, params, _ = make("mlp")
    monkeypatch.setattr(plan, "_MOST_OUTPUTS", 2)
    assert plan_of(problem.at(params)) is None


def test_products_by_rows_are_kept_apart():
    # XLA would transpose the rows for a layout that suits the second product alone.
    block = factors.Rows(jnp.ones((4, 3, 1024)))
    columns = jnp.ones((4, 3, 2))
    product = jax.jit(lambda block, columns: block.multiply(columns))
    lowered = product.lower(block, columns)
    assert "optimization_barrier" in lowered.as_text()
    expected = block.push(block.pull(columns))
    chex.assert_trees_all_close(product(block, columns), expected)
    gradient = jax.grad(lambda v: jnp.sum(product(block, v) ** 2))(columns)
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize(("left", "right"), [(1, 1), (1, 2), (2, 2)])
def test_few_positions_are_contracted_as_many(monkeypatch, left, right):
    def block(num_examples, positions, seed):
        rng = np.random.default_rng(seed)
        inputs = rng.normal(size=(num_examples, positions, 6))
        deltas = rng.normal(size=(num_examples, 3, positions, 4))
        return factors.Outer(jnp.asarray(inputs), jnp.asarray(deltas))

    a, b = block(5, left, 0), block(2, right, 1)
    rows = factors.inner(a.as_rows(), b.as_rows())
    chex.assert_trees_all_close(factors.inner(a, b), rows, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(factors, "_FEW_POSITIONS", 0)
    chex.assert_trees_all_close(factors.inner(a, b), rows, rtol=1e-5, atol=1e-5)
