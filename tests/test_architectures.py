"""The networks of section 6: their shapes, their Jacobians, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from grsd_jax import (
    Problem,
    gradient_flow_direction,
    kernel_dense,
    linearize_kernel,
    models,
)
from grsd_jax.models.chains import (
    MLP,
    ConvNet,
    LinearStateSpace,
    Transformer,
    linen_chain,
)
from oracles import cast, dense_kernel, plain, relative_error

K, N, C = 2, 3, 3
MODELS = {
    "mlp": MLP(C, 2, 5, "gelu"),
    "residual mlp": MLP(C, 1, 5, "gelu", residual=True, branch_scale=0.5),
    "cnn": ConvNet(C, 2, 3, "softplus", stem_strides=2),
    "residual cnn": ConvNet(C, 1, 3, "silu", residual=True, branch_scale=0.5),
    "transformer": Transformer(C, 1, 4, branch_scale=0.5, patch_size=3),
    "state space": LinearStateSpace(C, 3, 3, rho=0.7),
}


@pytest.fixture
def _float64():
    # Some of flax's own layers promote ranks and dtypes.
    promotion = jax.numpy_dtype_promotion("standard")
    with jax.enable_x64(True), promotion, jax.numpy_rank_promotion("allow"):
        yield


def make(name, shape=(6, 6, 3), dtype=None):
    """Returns a problem, parameters without zeros and a direction."""
    dtype = dtype or jnp.zeros(()).dtype
    keys = jax.random.split(jax.random.key(0), 3)
    image = jax.random.normal(keys[0], (K, N, *shape), dtype)
    model = MODELS[name]
    shapes = jax.eval_shape(model.init, keys[1], image[0])["params"]
    noise = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.5 * noise.normal(size=leaf.shape), dtype)

    params, direction = jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)
    batches = {"image": image, "label": jax.random.randint(keys[2], (K, N), 0, C)}
    return Problem(models.linen_outputs(model, {}), batches), params, direction


def close(got, expected):
    return np.max(np.abs(got - expected)) <= 1e-11 * np.max(np.abs(expected))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "transformer" else [])
        for name in MODELS
    ],
)
def test_factored_jacobian_covers_every_layer_and_agrees_with_the_plain_path(name):
    problem, params, direction = make(name)
    explained = problem.explain(params)
    assert explained.num_factored == explained.num_leaves
    kernel, moved = kernel_dense(plain(problem), params, direction)
    got = kernel_dense(problem, params, direction)
    assert close(got[0], kernel)
    assert close(got[1], moved)
    block = jnp.asarray(np.random.default_rng(1).normal(size=(len(kernel), 2)))
    assert close(linearize_kernel(problem, params).matmat(block), kernel @ block)


@pytest.mark.usefixtures("_float64")
def test_factored_jacobian_of_a_sequence():
    class OnSequence(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Dense(4, name="in")(x))
            return nn.Dense(C, name="out")(nn.LayerNorm(name="norm")(x)[:, -1])

    model = OnSequence()
    batches = {
        "image": jax.random.normal(jax.random.key(0), (1, N, 5, 2), jnp.float32),
        "label": jnp.zeros((1, N), jnp.int32),
    }
    params = model.init(jax.random.key(1), batches["image"][0])["params"]
    params = cast(params, jnp.float64)
    problem = Problem(models.linen_outputs(model, {}), batches)
    got = kernel_dense(problem, params)
    assert close(got, kernel_dense(plain(problem), params))
    # The state-space model takes a sequence [N, L, features] as its pieces.
    x = batches["image"][0]
    np.testing.assert_array_equal(LinearStateSpace(depth=5).pieces(x), x)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_ordered_by_depth_and_states_chain_to_the_outputs(name):
    problem, params, _ = make(name, dtype=jnp.float32)
    model, x = MODELS[name], problem.batches["image"][0]
    blocks = models.depth_blocks(model, params)
    inner = [f"block{i + 1}" for i in range(model.depth)]
    outer = [] if name == "state space" else ["stem", "head"]
    assert [n for n in blocks.names if n in inner] == inner
    assert set(blocks.names) == {*inner, *outer}
    state, maps = linen_chain(model, params, x)
    assert len(maps) == model.depth
    states = [state]
    for advance in maps:
        assert advance(states[-1]).shape == state.shape
        states.append(advance(states[-1]))
    if name == "state space":
        outputs = sum(
            h @ params[f"block{t}"]["readout"]["kernel"]
            for t, h in enumerate(states[1:], start=1)
        )
    else:
        outputs = model.apply({"params": params}, states[-1], method="outputs")
    np.testing.assert_allclose(
        model.apply({"params": params}, x), outputs, rtol=1e-5, atol=1e-5
    )


def test_plain_and_residual_nets_share_a_tree_and_differ_by_the_skip():
    x = jax.random.normal(jax.random.key(0), (N, 6, 6, 3), jnp.float32)
    for make_model in (MLP, ConvNet):
        plain, residual = (
            make_model(C, 1, 4, residual=skip, branch_scale=0.5)
            for skip in (False, True)
        )
        variables = plain.init(jax.random.key(1), x)
        before, (plain_map,) = linen_chain(plain, variables["params"], x)
        _, (residual_map,) = linen_chain(residual, variables["params"], x)
        np.testing.assert_allclose(
            residual_map(before), before + 0.5 * plain_map(before), atol=1e-6
        )


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_initial_weights_keep_the_second_moment_of_a_plain_net(activation):
    x = jnp.sign(jax.random.normal(jax.random.key(0), (4, 16), jnp.float32))
    model = MLP(C, 2, 1024, activation)
    params = model.init(jax.random.key(1), x)["params"]
    state, maps = linen_chain(model, params, x)
    for advance in maps:
        state = advance(state)
    assert float(jnp.mean(state**2)) == pytest.approx(1.0, rel=0.2)


def test_state_space_norm_is_exact():
    model = LinearStateSpace(C, 4, 5, rho=0.7)
    params = model.init(jax.random.key(1), jnp.zeros((1, 8), jnp.float32))["params"]
    state, maps = linen_chain(model, params, jnp.zeros((1, 8), jnp.float32))
    jacobian = jax.jacobian(lambda h: maps[1](maps[0](h)))(state)[0, :, 0, :]
    singular = np.linalg.svd(jacobian, compute_uv=False)
    np.testing.assert_allclose(singular, 0.49, rtol=1e-6)


class ByName(nn.Module):
    """A layer that is given its input by name."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.layer(x=x)


class EachExample(nn.Module):
    """A normalization mapped over the examples."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(
            nn.LayerNorm, variable_axes={"params": None}, split_rngs={"params": False}
        )
        return mapped()(x)


class Layers(nn.Module):
    """One layer that may couple examples or draw random numbers, and a Dense."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(C, name="head")(self.layer(x))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.5, deterministic=False), "expected dropout with deterministic"),
        (
            nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False),
            "expected dropout with deterministic",
        ),
        (nn.BatchNorm(use_running_average=False), "expected BatchNorm on stored"),
        (nn.LayerNorm(reduction_axes=(0, 1)), "reduction_axes without axis 0"),
        (nn.RMSNorm(reduction_axes=-2), "reduction_axes without axis 0"),
        (ByName(nn.LayerNorm(reduction_axes=(0, 1))), "reduction_axes without axis 0"),
    ],
)
@pytest.mark.parametrize("layers_known", [True, False])
def test_coupled_or_random_examples_are_refused(layer, message, layers_known):
    x = jax.random.normal(jax.random.key(0), (1, N, 4), jnp.float32)
    model = Layers(layer)
    keys = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    with jax.numpy_rank_promotion("allow"):
        state = dict(model.init(keys, x[0]))
        params = state.pop("params")
        batches = {"image": x, "label": jnp.zeros((1, N), jnp.int32)}
        problem = Problem(models.linen_outputs(model, state), batches)
        problem = problem if layers_known else plain(problem)
        with pytest.raises(ValueError, match=f"model: .*{message}.*'layer"):
            kernel_dense(problem, params)
        with pytest.raises(ValueError, match=message):
            gradient_flow_direction(problem, params)


def test_what_a_problem_refuses_passes_elsewhere():
    x = jax.random.normal(jax.random.key(0), (N, 4), jnp.float32)
    drawing, key = nn.Dropout(0.5, deterministic=False), jax.random.key(1)
    outputs = models.linen_outputs(drawing, {})
    for _ in range(3):
        with pytest.raises(ValueError, match="expected dropout with deterministic"):
            outputs({}, {"image": x})
        assert (drawing.apply({}, x, rngs={"dropout": key}) == 0).any()


class Attention(nn.Module):
    """Attention whose dropout is told by position not to draw."""

    @nn.compact
    def __call__(self, x):
        attention = nn.SelfAttention(2, dropout_rate=0.1, name="attention")
        return attention(x[:, None], None, True)[:, 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SelfAttention
@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.0, deterministic=False),
        Attention(),
        nn.Dropout(0.5, deterministic=True),
        nn.BatchNorm(use_running_average=True),
        nn.LayerNorm(),
        EachExample(),
    ],
)
def test_the_same_layers_pass_where_examples_are_independent(layer):
    x = jax.random.normal(jax.random.key(0), (1, N, 4), jnp.float32)
    model = Layers(layer)
    with jax.numpy_rank_promotion("allow"):
        state = dict(model.init(jax.random.key(1), x[0]))
        params = state.pop("params")
        batches = {"image": x, "label": jnp.zeros((1, N), jnp.int32)}
        problem = Problem(models.linen_outputs(model, state), batches)
        kernel = kernel_dense(problem, params)
        expected = dense_kernel(problem, params)
    assert relative_error(kernel, expected) < 1e-5


def test_bad_arguments_are_named():
    images = jnp.ones((1, 6, 6, 3), jnp.float32)
    with pytest.raises(ValueError, match="depth: expected an integer >= 1"):
        MLP(depth=0)
    with pytest.raises(ValueError, match="activation: expected one of 'relu'"):
        ConvNet(activation="sine")
    with pytest.raises(ValueError, match="branch_scale: expected a finite number > 0"):
        Transformer(branch_scale=-1.0)
    with pytest.raises(ValueError, match="width: expected a multiple of num_heads = 2"):
        Transformer(width=3)
    with pytest.raises(ValueError, match="rho: expected a finite number > 0"):
        LinearStateSpace(rho=0.0)
    with pytest.raises(ValueError, match="sides are multiples of 4"):
        Transformer(patch_size=4).init(jax.random.key(0), images)
    with pytest.raises(ValueError, match="a multiple of depth = 5 features"):
        LinearStateSpace(depth=5).init(jax.random.key(0), images)
    with pytest.raises(ValueError, match=r"x: expected images \[N, H, W, channels\]"):
        ConvNet().init(jax.random.key(0), images[0])


def test_modules_are_public():
    assert set(models.__all__) == {
        "ACTIVATIONS",
        "MLP",
        "ConvNet",
        "EquinoxOutputs",
        "HaikuOutputs",
        "LinearStateSpace",
        "LinenOutputs",
        "NNXOutputs",
        "PlainNet18",
        "ResNet",
        "ResNet18",
        "Transformer",
        "depth_blocks",
        "equinox_outputs",
        "haiku_outputs",
        "linen_chain",
        "linen_outputs",
        "nnx_outputs",
    }
