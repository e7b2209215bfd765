"""The factored Jacobian against plain differentiation, in float64, on many layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import grsd_jax
from grsd_jax import (
    kernel_dense,
    kernel_derivative,
    kernel_matmat,
    kernel_with_derivative_dense,
    layer_kernels,
    linearize_kernel,
)
from grsd_jax.jacobian import factors
from grsd_jax.models.resnet import PlainNet18, ResNet, ResNet18, linen_error_fn

K, N = 2, 3


class MLP(nn.Module):
    """Nothing but Dense layers, with and without a bias."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(5, name="first")(x.reshape(len(x), -1)))
        x = nn.gelu(nn.Dense(4, use_bias=False, name="second")(x))
        return nn.Dense(3, name="head")(x)


class ConvNet(nn.Module):
    """Every option of a convolution that is factored, and some that are not."""

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
    """A layer that is not affine in its parameters."""

    @nn.compact
    def __call__(self, x):
        return x * jnp.exp(self.param("log", nn.initializers.normal(0.5), x.shape[-1:]))


class Shared(nn.Module):
    """A layer used twice, one that nobody knows, and one whose output is unused."""

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


def make(name, error=grsd_jax.softmax_error):
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
    variables = model.init(keys[1], image[0])
    leaves, tree = jax.tree.flatten(variables)
    noise = np.random.default_rng(0)
    leaves = [
        jnp.asarray(leaf) + 0.1 * np.abs(noise.normal(size=leaf.shape))
        for leaf in leaves
    ]
    variables = dict(jax.tree.unflatten(tree, leaves))
    params = variables.pop("params")
    batches = {"image": image, "label": jax.random.randint(keys[2], (K, N), 0, 3)}
    direction = jax.tree.map(lambda p: jnp.asarray(noise.normal(size=p.shape)), params)
    return linen_error_fn(model, variables, error=error), params, batches, direction


class Flat(nn.Module):
    """A model no layer of which is factored: everything is left to the plain path."""

    @nn.compact
    def __call__(self, x):
        return x.reshape(len(x), -1) @ self.param(
            "w", nn.initializers.normal(), (192, 3)
        )


def close(got, expected, tolerance=1e-11):
    return np.max(np.abs(got - expected)) <= tolerance * np.max(np.abs(expected))


#: Networks that compile fast enough for the default tests; all are in the slow ones.
QUICK = ("shared", "resnet", "mlp", "linear")

LEFT_OUT = {
    "mlp": set(),
    "conv": {"grouped/bias", "grouped/kernel", "circular/bias", "circular/kernel"},
    "shared": {"scale/log"},
    "transformer": {"places/embedding", "table"},
    "tied": {"places/embedding", "table", "tokens/embedding"},
    "resnet": set(),
    "plain": set(),
    "linear": {"w"},
}


@pytest.fixture(autouse=True)
def _float64():
    # Some of flax's own layers promote ranks and dtypes.
    promotion = jax.numpy_dtype_promotion("standard")
    with jax.enable_x64(True), promotion, jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", LEFT_OUT)
def test_layers_that_can_be_factored_are(name):
    error_fn, params, batches, _ = make(name)
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    blocks = error_fn.jacobian_factors(params, batch, jnp.asarray(np.eye(3)))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    left = {n for n, block in zip(names, blocks, strict=True) if block is None}
    assert left == LEFT_OUT[name]


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        pytest.param(name, reduction, marks=[] if name in QUICK else pytest.mark.slow)
        for name in LEFT_OUT
        for reduction in ("mean", "stack")
    ],
)
def test_every_operation_agrees_with_the_plain_path(name, reduction):
    error_fn, params, batches, direction = make(name)
    kernel, moved = kernel_with_derivative_dense(
        error_fn, params, batches, direction, reduction=reduction, jacobian="plain"
    )
    got = kernel_with_derivative_dense(
        error_fn,
        params,
        batches,
        direction,
        reduction=reduction,
        jacobian="factored",
        example_chunk=2,
        max_jacobian_bytes=10_000,  # two groups of leaves at least
    )
    assert close(got[0], kernel)
    assert close(got[1], moved)
    block = jnp.asarray(np.random.default_rng(1).normal(size=(len(kernel), 5)))
    linearized = linearize_kernel(
        error_fn, params, batches, reduction=reduction, jacobian="factored"
    )
    product = kernel_matmat(error_fn, params, batches, block, reduction=reduction)
    assert close(linearized.matmat(block), product)
    projected = kernel_derivative(
        error_fn,
        params,
        batches,
        direction,
        block,
        reduction=reduction,
        jacobian="factored",
        column_chunk=3,
    )
    assert close(projected, block.T @ moved @ block)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "plain18"])
def test_whole_networks_agree_with_the_plain_path(name):
    error_fn, params, batches, direction = make(name)
    arguments = (error_fn, params, batches)
    kernel, moved = kernel_with_derivative_dense(
        *arguments, direction, jacobian="plain"
    )
    got = kernel_with_derivative_dense(*arguments, direction, jacobian="factored")
    assert close(got[0], kernel)
    assert close(got[1], moved)
    block = jnp.asarray(np.random.default_rng(1).normal(size=(len(kernel), 4)))
    linearized = linearize_kernel(*arguments, jacobian="factored")
    assert close(linearized.matmat(block), kernel @ block)
    projected = kernel_derivative(*arguments, direction, block, jacobian="factored")
    assert close(projected, block.T @ moved @ block)


def test_gram_products_of_factors_are_those_of_their_rows():
    noise = np.random.default_rng(0)
    left, right = (
        factors.Outer(
            jnp.asarray(noise.normal(size=(count, 16, 5))),
            jnp.asarray(noise.normal(size=(count, 2, 16, 32))),
        )
        for count in (3, 2)
    )
    got = factors.inner(left, right)
    assert close(got, factors.inner(left.as_rows(), right.as_rows()))


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
    costs = [
        factors.product_cost(one)
        for one in (block.as_rows(), block, block.with_similarity())
    ]
    assert factors.product_cost(ready) == min(costs)


def test_layer_kernels_add_up_and_are_those_of_their_parameters():
    error_fn, params, batches, _ = make("shared")
    layers = layer_kernels(error_fn, params, batches, jacobian="factored")
    assert set(layers) == {"twice", "norm", "unused", "head", "scale"}
    whole = kernel_dense(error_fn, params, batches, jacobian="plain")
    assert close(sum(layers.values()), whole)
    for name, layer in layers.items():

        def restricted(own, batch, name=name):
            return error_fn({**params, name: own}, batch)

        expected = kernel_dense(restricted, params[name], batches)
        assert np.max(np.abs(layer - expected)) <= 1e-11 * np.max(np.abs(whole))
    halves = layer_kernels(
        error_fn, params, batches, layer_of=lambda path: "ab"[path[0] == "head"]
    )
    assert close(halves["b"], layers["head"])


def test_other_errors_keep_all_their_outputs():
    error_fn, params, batches, _ = make("conv", error=grsd_jax.squared_error)
    got = kernel_dense(error_fn, params, batches, jacobian="factored")
    assert close(got, kernel_dense(error_fn, params, batches, jacobian="plain"))


def test_linearized_kernels_cross_jit_without_retracing():
    error_fn, params, batches, _ = make("resnet", error=grsd_jax.squared_error)

    @jax.jit
    @chex.assert_max_traces(1)
    def product(kernel, block):
        return kernel.matmat(block)

    block = jnp.asarray(np.random.default_rng(1).normal(size=(9, 2)))
    for scale in (1.0, 1.1):
        scaled = jax.tree.map(lambda p, s=scale: s * p, params)
        kernel = linearize_kernel(error_fn, scaled, batches, jacobian="factored")
        expected = kernel_matmat(error_fn, scaled, batches, block)
        assert close(product(kernel, block), expected)


def test_factors_are_refused_where_there_are_none():
    params, batches = {"w": jnp.ones((2, 3))}, {"x": jnp.ones((1, 2, 2))}
    with pytest.raises(ValueError, match="jacobian: expected 'auto' or 'plain'"):
        linearize_kernel(
            lambda p, b: b["x"] @ p["w"], params, batches, jacobian="factored"
        )
    with pytest.raises(ValueError, match="jacobian: expected one of"):
        kernel_dense(lambda p, b: b["x"] @ p["w"], params, batches, jacobian="fast")


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
