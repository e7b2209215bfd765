"""Networks as their users build them in Flax NNX, Flax linen, Equinox and Haiku.

Each function returns ``(outputs_fn, params, batch)``; state is held in the closure.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from network_parts import tokens, vectors


def _filled(shapes, positive=False):
    """Returns arrays of the given shapes, in the default float dtype.

    Scales that start at one and shifts that start at zero would hide errors.
    Statistics are positive, as a variance is.
    """
    rng = np.random.default_rng(0)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if positive or len(leaf.shape) < 2:
            return jnp.asarray(rng.uniform(0.3, 0.8, leaf.shape), float)
        fan_in = math.prod(leaf.shape[:-1])
        return jnp.asarray(rng.normal(size=leaf.shape) / fan_in**0.5, float)

    return jax.tree.map(fill, shapes)


# Flax NNX.


def _nnx_problem(make, batch):
    from flax import nnx

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    model.eval()
    structure, params, rest = nnx.split(model, nnx.Param, ...)
    rest = _filled(rest, positive=True)

    def outputs_fn(params, batch):
        return nnx.merge(structure, params, rest, copy=True)(batch["x"])

    return outputs_fn, _filled(params), batch


def nnx_mlp():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 5, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.out = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(self.dropout(nnx.gelu(self.hidden(x))))

    return _nnx_problem(Network, vectors(4))


def nnx_transformer():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(3, 4, dtype=float, rngs=rngs)
            self.norm1 = nnx.LayerNorm(4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
            self.norm2 = nnx.RMSNorm(4, rngs=rngs)
            self.up, self.down = (
                nnx.Linear(4, 5, rngs=rngs),
                nnx.Linear(5, 4, rngs=rngs),
            )

        def __call__(self, ids):
            x = self.embed(ids)
            x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(ids))
            x = x + self.down(nnx.gelu(self.up(self.norm2(x))))
            return self.embed.attend(x)

    return _nnx_problem(Network, tokens())


def nnx_cnn():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.depth = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
            self.group = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
            self.out = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.silu(self.norm(self.conv(x)))
            return self.out(jnp.mean(nnx.silu(self.group(self.depth(x))), (1, 2)))

    return _nnx_problem(Network, vectors(5, 5, 2))


def nnx_gru():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.GRUCell(2, 3, param_dtype=float, rngs=rngs))
            self.out = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(self.rnn(x)[:, -1])

    return _nnx_problem(Network, vectors(4, 2, num_classes=2))


def nnx_scanned_layers():
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.dense = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return x + nnx.tanh(self.dense(self.norm(x)))

    class Network(nnx.Module):
        def __init__(self, rngs):
            make = nnx.split_rngs(splits=3)(nnx.vmap(Block))
            self.blocks = make(rngs)
            self.out = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def forward(x, block):
                return block(x)

            return self.out(forward(x, self.blocks))

    return _nnx_problem(Network, vectors(4))


# Flax linen.


def _linen_problem(model, batch, **options):
    variables = jax.eval_shape(model.init, jax.random.key(0), batch["x"])
    rest = {name: variables[name] for name in variables if name != "params"}
    rest = _filled(rest, positive=True)

    def outputs_fn(params, batch):
        return model.apply({"params": params, **rest}, batch["x"], **options)

    return outputs_fn, _filled(variables["params"]), batch


def linen_resnet18():
    from grsd_jax import models

    images = vectors(6, 6, 2, num_classes=2)
    return _linen_problem(models.ResNet18(2, width=2), images, train=False)


def linen_vision_transformer():
    from grsd_jax import models

    model = models.Transformer(num_classes=3, depth=2, width=4, patch_size=4)
    return _linen_problem(model, vectors(8, 8, 2))


def _linen_block():
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            attention = nn.MultiHeadDotProductAttention(2)
            x = x + attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
            return x + nn.Dense(4)(nn.gelu(nn.Dense(5)(nn.RMSNorm()(x)))), None

    return Block


def _linen_decoder(apply_blocks):
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(3, 4)
            return embed.attend(apply_blocks(embed(ids)))

    return _linen_problem(Network(), tokens())


def linen_transformer():
    return _linen_decoder(lambda x: _linen_block()()(x, None)[0])


def linen_scanned_layers():
    from flax import linen as nn

    def apply_blocks(x):
        stack = nn.scan(
            _linen_block(), variable_axes={"params": 0}, split_rngs={"params": True},
            length=2,
        )  # fmt: skip
        return stack()(x, None)[0]

    return _linen_decoder(apply_blocks)


def linen_remat():
    from flax import linen as nn

    return _linen_decoder(lambda x: nn.remat(_linen_block())()(x, None)[0])


def linen_gru():
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.RNN(nn.GRUCell(3, param_dtype=float))(x)[:, -1])

    return _linen_problem(Network(), vectors(4, 2, num_classes=2))


def linen_weight_norm():
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.WeightNorm(nn.Dense(5))(x)
            return nn.Dense(3)(nn.tanh(x))

    return _linen_problem(Network(), vectors(4))


# Equinox.


def _equinox_problem(model, batch):
    import equinox as eqx

    model = eqx.nn.inference_mode(model)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def outputs_fn(params, batch):
        return jax.vmap(eqx.combine(params, static))(batch["x"])

    return outputs_fn, _filled(params), batch


def equinox_mlp():
    import equinox as eqx

    model = eqx.nn.MLP(4, 3, 5, depth=2, activation=jax.nn.gelu, key=jax.random.key(0))
    return _equinox_problem(model, vectors(4))


def equinox_cnn():
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 4)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.GroupNorm(2, 4),
            eqx.nn.Lambda(jax.nn.silu),
            eqx.nn.Conv2d(4, 4, 3, groups=4, key=keys[1]),
            eqx.nn.Lambda(eqx.nn.PReLU()),
            eqx.nn.Conv2d(4, 6, 1, groups=2, use_bias=False, key=keys[2]),
            eqx.nn.AdaptiveAvgPool2d(1),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Dropout(0.5),
            eqx.nn.Linear(6, 3, key=keys[3]),
        ]
    )
    return _equinox_problem(model, vectors(2, 6, 6))


def equinox_transformer():
    import equinox as eqx

    class Network(eqx.Module):
        embed: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        out: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.embed = eqx.nn.Embedding(3, 4, key=keys[0])
            self.norm = eqx.nn.LayerNorm(4)
            self.attention = eqx.nn.MultiheadAttention(2, 4, key=keys[1])
            self.out = eqx.nn.Linear(4, 3, key=keys[2])

        def __call__(self, ids):
            x = jax.vmap(self.embed)(ids)
            normed = jax.vmap(self.norm)(x)
            mask = jnp.tril(jnp.ones((len(ids),) * 2, bool))
            x = x + self.attention(normed, normed, normed, mask=mask)
            return jax.vmap(self.out)(x)

    return _equinox_problem(Network(jax.random.key(0)), tokens())


def equinox_gru():
    import equinox as eqx

    class Network(eqx.Module):
        cell: eqx.nn.GRUCell
        out: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key)
            self.cell = eqx.nn.GRUCell(2, 3, key=keys[0])
            self.out = eqx.nn.Linear(3, 2, key=keys[1])

        def __call__(self, xs):
            h = jnp.zeros(3, xs.dtype)
            h, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), h, xs)
            return self.out(h)

    return _equinox_problem(Network(jax.random.key(0)), vectors(4, 2, num_classes=2))


# Haiku.


def _haiku_problem(network, batch, **options):
    import haiku as hk

    transformed = hk.without_apply_rng(hk.transform_with_state(network))
    # BatchNorm makes its averages only where it trains.
    training = dict.fromkeys(options, True)
    params, state = jax.eval_shape(
        lambda x: transformed.init(jax.random.key(0), x, **training), batch["x"]
    )
    state = _filled(state, positive=True)

    def outputs_fn(params, batch):
        return transformed.apply(params, state, batch["x"], **options)[0]

    return outputs_fn, _filled(params), batch


def haiku_mlp():
    import haiku as hk

    return _haiku_problem(lambda x: hk.nets.MLP([5, 4, 3])(x), vectors(4))


def haiku_resnet():
    import haiku as hk

    def network(x, is_training):
        resnet = hk.nets.ResNet(
            blocks_per_group=(1, 1, 1, 1),
            num_classes=2,
            bottleneck=False,
            channels_per_group=(2, 2, 3, 3),
            use_projection=(False, True, True, True),
            initial_conv_config={"output_channels": 2},
        )
        return resnet(x, is_training)

    return _haiku_problem(network, vectors(8, 8, 2, num_classes=2), is_training=False)


def haiku_transformer():
    import haiku as hk

    def network(ids):
        x = hk.Embed(3, 4)(ids)
        mask = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1]), bool))
        normed = hk.LayerNorm(-1, True, True)(x)
        attention = hk.MultiHeadAttention(2, 2, w_init=hk.initializers.RandomNormal())
        x = x + attention(normed, normed, normed, mask=mask)
        return hk.Linear(3)(jax.nn.gelu(hk.Linear(5)(x)))

    return _haiku_problem(network, tokens())


def haiku_lstm():
    import haiku as hk

    def network(x):
        core = hk.LSTM(3)
        outputs, _ = hk.dynamic_unroll(
            core, x, core.initial_state(x.shape[0]), time_major=False
        )
        return hk.Linear(2)(outputs[:, -1])

    return _haiku_problem(network, vectors(4, 2, num_classes=2))


def haiku_layer_stack():
    import haiku as hk

    def network(x):
        stack = hk.experimental.layer_stack(3)
        return hk.Linear(3)(stack(lambda x: x + jnp.tanh(hk.Linear(4)(x)))(x))

    return _haiku_problem(network, vectors(4))
