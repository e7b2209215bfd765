"""Networks in plain JAX without a time axis: dense, convolutional, derived weights.

Each function returns ``(outputs_fn, params, batch)``.
"""

from functools import partial

import jax
import jax.numpy as jnp

from network_parts import layer_norm, normals, vectors

# Dense layers, and what JAX wraps around them.


def mlp_with_gain():
    params = normals(0, hidden=(4, 5), shift=(5,), gain=(), out=(5, 3))

    def outputs_fn(p, batch):
        hidden = jnp.tanh(p["gain"] * (batch["x"] @ p["hidden"] + p["shift"]))
        return hidden @ p["out"]

    return outputs_fn, params, vectors(4)


def jit_inside():
    params = normals(1, first=(4, 4), second=(4, 4), shift=(4,), out=(4, 3))

    @jax.jit
    def layer(weight, shift, x):
        return jax.nn.gelu(x @ weight + shift)

    def outputs_fn(p, batch):
        # Two calls of one jitted layer share their jaxpr, and here also the shift.
        hidden = layer(
            p["second"], p["shift"], layer(p["first"], p["shift"], batch["x"])
        )
        return jax.jit(jnp.matmul)(hidden, p["out"])

    return outputs_fn, params, vectors(4)


@jax.custom_jvp
def custom_softplus(x):
    return jnp.logaddexp(x, jnp.zeros_like(x))


@custom_softplus.defjvp
def custom_softplus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return custom_softplus(x), 0.9 * jax.nn.sigmoid(x) * dx  # not the true derivative


def custom_jvp_activation():
    params = normals(2, hidden=(4, 5), out=(5, 3))

    def outputs_fn(p, batch):
        return custom_softplus(batch["x"] @ p["hidden"]) @ p["out"]

    return outputs_fn, params, vectors(4)


@jax.custom_vjp
def custom_square(x):
    return x * x


def custom_square_fwd(x):
    return x * x, x


def custom_square_bwd(x, cotangent):
    return (1.8 * x * cotangent,)  # not the true derivative


custom_square.defvjp(custom_square_fwd, custom_square_bwd)


def custom_vjp_activation():
    params = normals(3, hidden=(4, 5), out=(5, 3))

    def outputs_fn(p, batch):
        return custom_square(batch["x"] @ p["hidden"]) @ p["out"]

    return outputs_fn, params, vectors(4)


@jax.custom_jvp
def _custom_affine(weight, x):
    return x @ weight


@_custom_affine.defjvp
def _custom_affine_jvp(primals, tangents):
    (weight, x), (dw, dx) = primals, tangents
    return x @ weight, 0.5 * (x @ dw) + dx @ weight  # half the gradient of the weight


def custom_jvp_with_a_parameter():
    params = normals(4, hidden=(4, 5), out=(5, 3))

    def outputs_fn(p, batch):
        return jnp.tanh(_custom_affine(p["hidden"], batch["x"])) @ p["out"]

    return outputs_fn, params, vectors(4)


@jax.custom_jvp
def _rounded(weight):
    return jnp.round(4 * weight) / 4


@_rounded.defjvp
def _straight_through(primals, tangents):
    return _rounded(*primals), tangents[0]


def quantised_weights():
    params = normals(5, hidden=(4, 5), out=(5, 3))

    def outputs_fn(p, batch):
        hidden = jnp.tanh(batch["x"] @ _rounded(p["hidden"]))
        return _rounded(hidden) @ _rounded(p["out"])

    return outputs_fn, params, vectors(4)


def stopped_gradient():
    params = normals(5, hidden=(4, 4), out=(4, 3))

    def outputs_fn(p, batch):
        x = batch["x"]
        target = jnp.tanh(x @ jax.lax.stop_gradient(p["hidden"]))
        hidden = jnp.tanh(x @ p["hidden"] + jax.lax.stop_gradient(target) * x)
        return hidden @ p["out"]

    return outputs_fn, params, vectors(4)


def checkpointed_mlp():
    params = normals(6, first=(4, 5), second=(5, 5), out=(5, 3))

    @jax.checkpoint
    def block(weight, x):
        return jnp.tanh(x @ weight)

    def outputs_fn(p, batch):
        return block(p["second"], block(p["first"], batch["x"])) @ p["out"]

    return outputs_fn, params, vectors(4)


def named_call_mlp():
    params = normals(7, hidden=(4, 5), shift=(5,), out=(5, 3))

    def dense(weight, shift, x):
        return x @ weight + shift

    def outputs_fn(p, batch):
        named = jax.named_call(dense, name="dense")
        with jax.named_scope("head"):
            return jnp.tanh(named(p["hidden"], p["shift"], batch["x"])) @ p["out"]

    return outputs_fn, params, vectors(4)


def vmap_over_examples():
    params = normals(8, hidden=(4, 5), shift=(5,), out=(5, 3))

    def one(p, x):
        return p["out"].T @ jnp.tanh(p["hidden"].T @ x + p["shift"])

    def outputs_fn(p, batch):
        return jax.vmap(one, (None, 0))(p, batch["x"])

    return outputs_fn, params, vectors(4)


def vmap_over_parameters():
    """An ensemble: the layers are stacked, and vmap maps them over one input."""
    params = normals(9, hidden=(2, 4, 5), out=(2, 5, 3))

    def one(hidden, out, x):
        return jnp.tanh(x @ hidden) @ out

    def outputs_fn(p, batch):
        members = jax.vmap(one, (0, 0, None))(p["hidden"], p["out"], batch["x"])
        return jnp.mean(members, 0)

    return outputs_fn, params, vectors(4)


def constants_closed_over():
    params = normals(10, hidden=(4, 5), out=(5, 3))
    held = normals(11, mask=(4, 5), mean=(4,), mixing=(5, 5))

    def outputs_fn(p, batch):
        x = batch["x"] - held["mean"]
        hidden = jnp.tanh(x @ (p["hidden"] * held["mask"]) @ held["mixing"])
        return hidden @ p["out"] / 1.7

    return outputs_fn, params, vectors(4)


def integer_and_bool_inputs():
    params = normals(12, table=(6, 4), scale=(4,), out=(4, 3))
    batch = vectors(5) | {
        "ids": jnp.array([[0, 5, 2, 2], [1, 1, 1, 4], [3, 0, 5, -1]], jnp.int32),
        "mask": jnp.array(
            [[True, True, False, True], [False, True, True, False], [True] * 4]
        ),
        "pixels": jnp.array(
            [[3, 200, 17, 90], [0, 255, 1, 2], [9, 8, 7, 6]], jnp.uint8
        ),
    }

    def outputs_fn(p, batch):
        rows = jnp.where(batch["mask"][..., None], p["table"][batch["ids"]], 0)
        pooled = jnp.sum(rows, 1) / jnp.sum(batch["mask"], 1)[:, None]
        pixels = batch["pixels"].astype(p["scale"].dtype) / 255
        return jnp.tanh(pooled + p["scale"] * pixels) @ p["out"]

    return outputs_fn, params, batch


def dictionaries_and_lists_of_layers():
    """Parameters in nested containers, with a residual stream and a layer norm."""
    layers = [normals(s, w=(4, 4), b=(4,), gain=(4,), shift=(4,)) for s in (13, 14)]
    params = {"layers": layers, "head": (normals(15, w=(4, 3))["w"],)}

    def outputs_fn(p, batch):
        x = batch["x"]
        for layer in p["layers"]:
            normed = layer_norm(x, layer["gain"], layer["shift"])
            x = x + jax.nn.silu(normed @ layer["w"] + layer["b"])
        return x @ p["head"][0]

    return outputs_fn, params, vectors(4)


# Convolutions.


def _head(x, weight):
    return jnp.mean(x, (1, 2)) @ weight


def _conv(
    x, kernel, dims=("NHWC", "HWIO", "NHWC"), stride=1, padding="SAME", **options
):
    strides = (stride,) * (x.ndim - 2)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dims, **options
    )


def cnn_strided():
    params = normals(20, stem=(3, 3, 2, 4), shift=(4,), conv=(3, 2, 4, 3), out=(3, 3))

    def outputs_fn(p, batch):
        x = jax.nn.gelu(_conv(batch["x"], p["stem"], stride=2) + p["shift"])
        return _head(jnp.tanh(_conv(x, p["conv"], padding="VALID")), p["out"])

    return outputs_fn, params, vectors(6, 5, 2)


def cnn_dilated():
    params = normals(21, stem=(3, 3, 2, 3), out=(3, 3))

    def outputs_fn(p, batch):
        x = _conv(batch["x"], p["stem"], rhs_dilation=(2, 1), padding=((2, 1), (0, 2)))
        return _head(jnp.tanh(x), p["out"])

    return outputs_fn, params, vectors(6, 5, 2)


def cnn_grouped():
    params = normals(22, stem=(3, 3, 2, 6), shift=(6,), out=(6, 3))

    def outputs_fn(p, batch):
        x = _conv(batch["x"], p["stem"], feature_group_count=2, stride=2) + p["shift"]
        return _head(jnp.tanh(x), p["out"])

    return outputs_fn, params, vectors(5, 5, 4)


def cnn_depthwise():
    params = normals(23, depth=(3, 3, 1, 4), point=(1, 1, 4, 3), out=(3, 3))

    def outputs_fn(p, batch):
        x = _conv(batch["x"], p["depth"], feature_group_count=4)
        return _head(jnp.tanh(_conv(x, p["point"])), p["out"])

    return outputs_fn, params, vectors(4, 5, 4)


def cnn_channels_first():
    params = normals(24, stem=(3, 2, 3, 3), shift=(3,), out=(3, 3))

    def outputs_fn(p, batch):
        x = _conv(batch["x"], p["stem"], dims=("NCHW", "OIHW", "NCHW"), stride=2)
        x = jnp.tanh(x + p["shift"][:, None, None])
        return jnp.mean(x, (2, 3)) @ p["out"]

    return outputs_fn, params, vectors(2, 5, 6)


def cnn_transposed():
    params = normals(25, down=(2, 2, 2, 3), up=(3, 3, 3, 2), out=(2, 3))

    def outputs_fn(p, batch):
        x = jnp.tanh(_conv(batch["x"], p["down"], stride=2))
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_transpose(x, p["up"], (2, 2), "SAME", dimension_numbers=dims)
        return _head(jnp.tanh(x), p["out"])

    return outputs_fn, params, vectors(4, 4, 2)


def cnn_causal_in_time():
    params = normals(26, conv=(3, 2, 4), shift=(4,), out=(4, 3))

    def outputs_fn(p, batch):
        dims = ("NTC", "TIO", "NTC")
        x = _conv(batch["x"], p["conv"], dims=dims, padding=((2, 0),))
        return jnp.tanh(x + p["shift"]) @ p["out"]

    batch = vectors(4, 2)
    batch["label"] = jnp.array([[0, 1, 2, 0], [1, 1, 2, 0], [2, 2, 1, 0]], jnp.int32)
    return outputs_fn, params, batch


def cnn_pooled():
    """Max and average pooling, and a batch normalization with stored statistics."""
    params = normals(27, stem=(3, 3, 2, 3), scale=(3,), shift=(3,), out=(3, 3))
    held = normals(28, mean=(3,), var=(3,))

    def outputs_fn(p, batch):
        x = _conv(batch["x"], p["stem"])
        x = (x - held["mean"]) / jnp.sqrt(held["var"] ** 2 + 0.5)
        x = jnp.tanh(x * p["scale"] + p["shift"])
        window = (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "SAME")
        return _head(x, p["out"])

    return outputs_fn, params, vectors(6, 6, 2)


# The ways in which a parameter reaches an activation.


def shared_by_layers():
    params = normals(30, square=(4, 4), shift=(4,), out=(4, 3))

    def outputs_fn(p, batch):
        x = batch["x"]
        for _ in range(3):
            x = jnp.tanh(x @ p["square"] + p["shift"])
        return x @ p["out"]

    return outputs_fn, params, vectors(4)


def shared_in_two_roles():
    """One matrix as it is and transposed, one vector as a shift and as a scale."""
    params = normals(31, weight=(4, 5), vector=(5,), out=(4, 3))

    def outputs_fn(p, batch):
        hidden = jnp.tanh(batch["x"] @ p["weight"] + p["vector"]) * p["vector"]
        return jnp.tanh(hidden @ p["weight"].T) @ p["out"]

    return outputs_fn, params, vectors(4)


def shared_with_learned_queries():
    """One layer applied to the examples and to parameters, then attention."""
    params = normals(32, dense=(4, 5), queries=(3, 4), out=(5, 3))

    def outputs_fn(p, batch):
        values = jnp.tanh(p["queries"] @ p["dense"])
        weights = jax.nn.softmax(jnp.tanh(batch["x"] @ p["dense"]) @ values.T)
        return weights @ values @ p["out"]

    return outputs_fn, params, vectors(4)


def slices_of_one_vector():
    """All parameters in one flat vector, as `ravel_pytree` makes it."""
    params = normals(33, flat=(4 * 5 + 5 + 5 * 3,))

    def outputs_fn(p, batch):
        flat = p["flat"]
        hidden, shift, out = flat[:20], flat[20:25], flat[25:]
        x = jnp.tanh(batch["x"] @ hidden.reshape(4, 5) + shift)
        return x @ out.reshape(5, 3)

    return outputs_fn, params, vectors(4)


def concatenated_and_stacked():
    params = normals(34, left=(4, 2), right=(4, 3), a=(5,), b=(5,), out=(5, 3))

    def outputs_fn(p, batch):
        weight = jnp.concatenate([p["left"], p["right"]], 1)
        affine = jnp.stack([p["a"], p["b"]])
        x = batch["x"] @ weight
        return jnp.tanh(x * affine[0] + affine[1]) @ p["out"]

    return outputs_fn, params, vectors(4)


def split_after_one_product():
    """A gated unit: one product whose result is split, then multiplied."""
    params = normals(35, gate_and_value=(4, 10), out=(5, 3))

    def outputs_fn(p, batch):
        gate, value = jnp.split(batch["x"] @ p["gate_and_value"], 2, -1)
        return (jax.nn.silu(gate) * value) @ p["out"]

    return outputs_fn, params, vectors(4)


def transposed_and_reshaped():
    params = normals(36, hidden=(5, 2, 2), out=(3, 5), shift=(1, 5, 1))

    def outputs_fn(p, batch):
        weight = jnp.transpose(p["hidden"], (2, 1, 0)).reshape(4, 5)
        shift = jnp.flip(jnp.squeeze(p["shift"]))
        return jnp.tanh(batch["x"] @ weight + shift) @ p["out"].T

    return outputs_fn, params, vectors(4)


def broadcast_rows():
    """A row that serves every input, and one column of a broadcast."""
    params = normals(37, row=(5,), column=(4, 1), hidden=(4, 5), out=(5, 3))

    def outputs_fn(p, batch):
        rank_one = jnp.broadcast_to(p["row"], (4, 5))
        x = batch["x"] * jnp.broadcast_to(p["column"], (4, 4))[:, 1]
        return jnp.tanh(x @ rank_one + x @ p["hidden"]) @ p["out"]

    return outputs_fn, params, vectors(4)


def bfloat16_compute():
    """Single-precision parameters cast to bfloat16, the logits in single again."""
    params = normals(49, hidden=(4, 5), shift=(5,), square=(5, 5), out=(5, 3))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def outputs_fn(p, batch):
        p = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)
        x = batch["x"].astype(jnp.bfloat16) @ p["hidden"] + p["shift"]
        x = jax.nn.gelu(jax.nn.gelu(x) @ p["square"])
        return (x @ p["out"]).astype(jnp.float32)

    return outputs_fn, params, vectors(4)


def einsum_weights():
    params = normals(38, q=(4, 2, 3), k=(2, 3, 4), mix=(2, 2), out=(3, 2, 3))

    def outputs_fn(p, batch):
        x = batch["x"]
        q = jnp.einsum("ntd,dhk->nthk", x, p["q"])
        k = jnp.einsum("hkd,nsd->nhks", p["k"], x)
        scores = jax.nn.softmax(jnp.einsum("nthk,nhks,hg->ngts", q, k, p["mix"]))
        mixed = jnp.einsum("ngts,nshk->ntgk", scores, q)
        return jnp.einsum("ntgk,kgc->nc", mixed, p["out"])

    return outputs_fn, params, vectors(3, 4)


def bilinear_form():
    params = normals(39, form=(3, 4, 4), out=(3, 3))

    def outputs_fn(p, batch):
        x = batch["x"]
        return jnp.tanh(jnp.einsum("ni,hij,nj->nh", x, p["form"], x)) @ p["out"]

    return outputs_fn, params, vectors(4)


def learned_position():
    params = normals(40, position=(8, 4), token=(1, 1, 4), hidden=(4, 4), out=(4, 3))

    def outputs_fn(p, batch):
        x = batch["x"] + p["position"][:3]
        token = jnp.broadcast_to(p["token"], (x.shape[0], 1, 4))
        x = jnp.concatenate([token, x], 1)
        x = x + p["position"][None, jnp.arange(4) + 2]
        return jnp.mean(jnp.tanh(x @ p["hidden"]), 1) @ p["out"]

    return outputs_fn, params, vectors(3, 4)


def temperature():
    params = normals(41, hidden=(4, 5), out=(5, 3)) | {
        "temperature": jnp.asarray(1.3, float)
    }

    def outputs_fn(p, batch):
        return jnp.tanh(batch["x"] @ p["hidden"]) @ p["out"] / p["temperature"]

    return outputs_fn, params, vectors(4)


def quadratic_in_a_parameter():
    params = normals(42, w=(4,), hidden=(4, 5), out=(5, 3))

    def outputs_fn(p, batch):
        return jnp.tanh((p["w"] * p["w"] * batch["x"]) @ p["hidden"]) @ p["out"]

    return outputs_fn, params, vectors(4)


def product_of_two_parameters():
    params = normals(43, w=(4, 5), gate=(5,), out=(5, 3))

    def outputs_fn(p, batch):
        weight = p["w"] * jax.nn.sigmoid(p["gate"])
        return jnp.tanh(batch["x"] @ weight) @ p["out"]

    return outputs_fn, params, vectors(4)


def exponential_scale():
    params = normals(44, log_scale=(4,), hidden=(4, 5), out=(5, 3))

    def outputs_fn(p, batch):
        x = jnp.exp(p["log_scale"]) * batch["x"]
        return jnp.tanh(x @ p["hidden"]) @ p["out"]

    return outputs_fn, params, vectors(4)


def symmetrised_weight():
    params = normals(45, w=(4, 4), out=(4, 3))

    def outputs_fn(p, batch):
        return jnp.tanh(batch["x"] @ (p["w"] + p["w"].T)) @ p["out"]

    return outputs_fn, params, vectors(4)


def unused_parameter():
    params = normals(46, hidden=(4, 5), unused=(3, 2), out=(5, 3))

    def outputs_fn(p, batch):
        return jnp.tanh(batch["x"] @ p["hidden"]) @ p["out"]

    return outputs_fn, params, vectors(4)


def parameter_as_output():
    """A bias of the logits, which meets no input."""
    params = normals(47, bias=(3,), hidden=(4, 3))

    def outputs_fn(p, batch):
        logits = jnp.zeros((batch["x"].shape[0], 3)) + p["bias"]
        return logits + jnp.tanh(batch["x"] @ p["hidden"])

    return outputs_fn, params, vectors(4)


def selected_parameters():
    """`where` between parameters, a maximum with one, and PReLU."""
    params = normals(48, a=(5,), b=(5,), slope=(5,), hidden=(4, 5), out=(5, 3))

    def outputs_fn(p, batch):
        x = batch["x"] @ p["hidden"]
        x = jnp.where(x > 0, p["a"] * x, p["b"] + x)
        return jnp.where(x > 0, x, p["slope"] * x) @ p["out"]

    return outputs_fn, params, vectors(4)


# Derived weights.


def lora():
    params = normals(50, a=(4, 1), b=(1, 5), out=(5, 3))
    held = normals(51, w=(4, 5))

    def outputs_fn(p, batch):
        weight = held["w"] + 2.0 * (p["a"] @ p["b"])
        return jnp.tanh(batch["x"] @ weight) @ p["out"]

    return outputs_fn, params, vectors(4)


def lora_with_the_weight_trained():
    params = normals(52, w=(4, 5), a=(4, 2), b=(2, 5), out=(5, 3))

    def outputs_fn(p, batch):
        return jnp.tanh(batch["x"] @ (p["w"] + p["a"] @ p["b"])) @ p["out"]

    return outputs_fn, params, vectors(4)


def lora_by_activations():
    """The cheap order, ``x W + (x A) B``."""
    params = normals(53, a=(4, 2), b=(2, 5), out=(5, 3))
    held = normals(54, w=(4, 5))

    def outputs_fn(p, batch):
        x = batch["x"]
        return jnp.tanh(x @ held["w"] + (x @ p["a"]) @ p["b"]) @ p["out"]

    return outputs_fn, params, vectors(4)


def weight_norm():
    params = normals(55, v=(4, 5), g=(5,), shift=(5,), out=(5, 3))

    def outputs_fn(p, batch):
        weight = p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0)
        return jnp.tanh(batch["x"] @ weight + p["shift"]) @ p["out"]

    return outputs_fn, params, vectors(4)


def weight_standardisation():
    """A convolution whose kernel is centered and scaled before it is used."""
    params = normals(56, kernel=(3, 3, 2, 3), gain=(3,), out=(3, 3))

    def outputs_fn(p, batch):
        mean = jnp.mean(p["kernel"], (0, 1, 2), keepdims=True)
        var = jnp.var(p["kernel"], (0, 1, 2), keepdims=True)
        kernel = (p["kernel"] - mean) / jnp.sqrt(var + 1e-4) * p["gain"]
        return _head(jnp.tanh(_conv(batch["x"], kernel)), p["out"])

    return outputs_fn, params, vectors(4, 4, 2)


def spectral_norm():
    """One power iteration from a stored vector, differentiated through."""
    params = normals(57, w=(4, 5), out=(5, 3))
    start = normals(58, u=(4,))["u"]

    def outputs_fn(p, batch):
        v = p["w"].T @ start
        v = v / jnp.linalg.norm(v)
        u = p["w"] @ v
        sigma = jnp.dot(u / jnp.linalg.norm(u), p["w"] @ v)
        return jnp.tanh(batch["x"] @ (p["w"] / sigma)) @ p["out"]

    return outputs_fn, params, vectors(4)


def orthogonal_weight():
    """A Cayley transform: the derived weight needs a linear solve."""
    params = normals(59, a=(4, 4), out=(4, 3))

    def outputs_fn(p, batch):
        skew = p["a"] - p["a"].T
        eye = jnp.eye(4, dtype=skew.dtype)
        return (
            jnp.tanh(batch["x"] @ jnp.linalg.solve(eye + skew, eye - skew)) @ p["out"]
        )

    return outputs_fn, params, vectors(4)


def mixture_of_experts():
    """Dense routing: every expert sees every example, the router weighs them."""
    params = normals(60, router=(4, 3), up=(3, 4, 5), shift=(3, 5), down=(3, 5, 3))

    def outputs_fn(p, batch):
        x = batch["x"]
        weights = jax.nn.softmax(x @ p["router"])
        hidden = jax.nn.gelu(jnp.einsum("nd,edf->nef", x, p["up"]) + p["shift"])
        return jnp.einsum("nef,efc,ne->nc", hidden, p["down"], weights)

    return outputs_fn, params, vectors(4)


def mixture_of_experts_top_one():
    """Routing by the largest weight: the expert's matrices are gathered."""
    params = normals(61, router=(4, 3), up=(3, 4, 5), down=(3, 5, 3))

    def outputs_fn(p, batch):
        def one(x):
            weights = jax.nn.softmax(x @ p["router"])
            chosen = jnp.argmax(weights)
            hidden = jnp.tanh(x @ p["up"][chosen])
            return weights[chosen] * (hidden @ p["down"][chosen])

        return jax.vmap(one)(batch["x"])

    return outputs_fn, params, vectors(4)


def layers_stacked_under_scan():
    params = normals(62, w=(3, 4, 4), b=(3, 4), out=(4, 3))

    def outputs_fn(p, batch):
        def layer(x, own):
            return x + jnp.tanh(x @ own["w"] + own["b"]), None

        stacked = {name: p[name] for name in ("w", "b")}
        x, _ = jax.lax.scan(layer, batch["x"], stacked)
        return x @ p["out"]

    return outputs_fn, params, vectors(4)


def fori_loop_over_layers():
    """A loop with a fixed count that reads its layer by a dynamic slice."""
    params = normals(63, w=(3, 4, 4), out=(4, 3))

    def outputs_fn(p, batch):
        def layer(index, x):
            return jnp.tanh(
                x @ jax.lax.dynamic_index_in_dim(p["w"], index, keepdims=False)
            )

        return jax.lax.fori_loop(0, 3, layer, batch["x"]) @ p["out"]

    return outputs_fn, params, vectors(4)


# Beyond what is asked to be factored: these have to be right, leaf by leaf.


def branch_on_data():
    params = normals(70, a=(4, 5), b=(4, 5), out=(5, 3))

    def outputs_fn(p, batch):
        def one(x):
            branches = (lambda z: jnp.tanh(z @ p["a"]), lambda z: z @ p["b"])
            return jax.lax.cond(x[0] > 0, *branches, x) @ p["out"]

        return jax.lax.map(one, batch["x"])

    return outputs_fn, params, vectors(4)


def switch_on_a_constant():
    params = normals(71, a=(4, 3), b=(4, 3))

    def outputs_fn(p, batch):
        heads = [lambda x: jnp.tanh(x @ p["a"]), lambda x: jnp.sin(x @ p["b"])]
        return jax.lax.switch(jnp.asarray(1), heads, batch["x"])

    return outputs_fn, params, vectors(4)


def derivative_of_a_network():
    """The outputs are the derivative of an inner network along a direction."""
    params = normals(72, hidden=(4, 5), out=(5, 3))

    def inner(p, x):
        return jnp.tanh(x @ p["hidden"]) @ p["out"]

    def outputs_fn(p, batch):
        x = batch["x"]
        return jax.jvp(partial(inner, p), (x,), (jnp.ones_like(x),))[1]

    return outputs_fn, params, vectors(4)


def gradient_of_an_energy():
    params = normals(73, hidden=(3, 5), out=(5,))

    def energy(p, x):
        return jnp.dot(jnp.tanh(x @ p["hidden"]), p["out"])

    def outputs_fn(p, batch):
        return jax.vmap(jax.grad(partial(energy, p)))(batch["x"])

    return outputs_fn, params, vectors(3)


def distances_to_prototypes():
    """Radial units: a parameter inside a square, not linear in it."""
    params = normals(74, centres=(5, 4), width=(5,), out=(5, 3))

    def outputs_fn(p, batch):
        squares = jnp.sum((batch["x"][:, None] - p["centres"]) ** 2, -1)
        return jnp.exp(-squares * p["width"] ** 2) @ p["out"]

    return outputs_fn, params, vectors(4)


def power_by_a_parameter():
    params = normals(75, exponent=(4,), hidden=(4, 5), out=(5, 3))

    def outputs_fn(p, batch):
        x = jnp.abs(batch["x"]) ** (1 + p["exponent"] ** 2)
        return jnp.tanh(x @ p["hidden"]) @ p["out"]

    return outputs_fn, params, vectors(4)
