"""Networks over time in plain JAX: decoder-only transformers and recurrent networks.

Each function returns ``(outputs_fn, params, batch)``.
"""

import jax
import jax.numpy as jnp

from network_parts import layer_norm, normals, rms_norm, tokens, vectors

HEADS, WIDTH, HIDDEN = 2, 4, 3


def _rotate(x):
    """Rotary positions for ``[N, T, H, 2]``, one frequency."""
    angle = jnp.arange(x.shape[1], dtype=x.dtype)[:, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = x[..., 0], x[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)


def _attention(x, qkv, out):
    """Causal attention with one matrix for queries, keys and values."""
    split = (x @ qkv).reshape(*x.shape[:-1], 3, HEADS, WIDTH // HEADS)
    q, k, v = _rotate(split[:, :, 0]), _rotate(split[:, :, 1]), split[:, :, 2]
    scores = jnp.einsum("nthd,nshd->nhts", q, k) / (WIDTH // HEADS) ** 0.5
    causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e30))
    return jnp.einsum("nhts,nshd->nthd", weights, v).reshape(x.shape) @ out


def _swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def _block(x, own):
    x = x + _attention(rms_norm(x, own["norm1"]), own["qkv"], own["proj"])
    return x + _swiglu(rms_norm(x, own["norm2"]), own["gate"], own["up"], own["down"])


def _block_params(seed, *stack):
    return normals(
        seed,
        norm1=(*stack, WIDTH),
        qkv=(*stack, WIDTH, 3 * WIDTH),
        proj=(*stack, WIDTH, WIDTH),
        norm2=(*stack, WIDTH),
        gate=(*stack, WIDTH, HIDDEN),
        up=(*stack, WIDTH, HIDDEN),
        down=(*stack, HIDDEN, WIDTH),
    )


def _ends():
    return normals(100, embedding=(3, WIDTH), norm=(WIDTH,))


def _tied_logits(p, x):
    return rms_norm(x, p["norm"]) @ p["embedding"].T


def gpt():
    """Tied embedding, RMSNorm, fused QKV, rotary positions, SwiGLU, causal mask."""
    params = _ends() | {"blocks": [_block_params(101), _block_params(102)]}

    def outputs_fn(p, batch):
        x = p["embedding"][batch["x"]]
        for own in p["blocks"]:
            x = _block(x, own)
        return _tied_logits(p, x)

    return outputs_fn, params, tokens()


def _stacked_gpt(block):
    params = _ends() | {"blocks": _block_params(103, 2)}

    def outputs_fn(p, batch):
        x = jnp.take(p["embedding"], batch["x"], axis=0)
        x, _ = jax.lax.scan(lambda x, own: (block(x, own), None), x, p["blocks"])
        return _tied_logits(p, x)

    return outputs_fn, params, tokens()


def gpt_scanned():
    return _stacked_gpt(_block)


def gpt_scanned_and_remat():
    return _stacked_gpt(jax.checkpoint(_block))


def gpt_remat():
    params = _ends() | {"blocks": [_block_params(104), _block_params(105)]}

    def outputs_fn(p, batch):
        x = jax.nn.one_hot(batch["x"], 3, dtype=p["norm"].dtype) @ p["embedding"]
        for own in p["blocks"]:
            x = jax.checkpoint(_block)(x, own)
        return _tied_logits(p, x)

    return outputs_fn, params, tokens()


def gpt2_style():
    """Learned positions, LayerNorm, biases, separate heads in the weights, GELU."""
    params = normals(
        106, embedding=(3, 4), position=(6, 4), gain=(4,), shift=(4,), head=(4, 3)
    ) | normals(
        107, q=(4, 2, 2), k=(4, 2, 2), v=(4, 2, 2), o=(2, 2, 4), bias=(2, 2), up=(4, 5),
        up_shift=(5,), down=(5, 4),
    )  # fmt: skip

    def outputs_fn(p, batch):
        x = p["embedding"][batch["x"]] + p["position"][: batch["x"].shape[1]]
        normed = layer_norm(x, p["gain"], p["shift"])
        heads = [jnp.einsum("ntd,dhk->nthk", normed, p[n]) for n in "qkv"]
        q, k, v = heads[0] + p["bias"], heads[1], heads[2]
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + jnp.einsum("nthk,hkd->ntd", mixed, p["o"])
        x = x + jax.nn.gelu(x @ p["up"] + p["up_shift"]) @ p["down"]
        return x @ p["head"]

    return outputs_fn, params, tokens()


def _rnn_cell(p, h, x):
    return jnp.tanh(x @ p["inward"] + h @ p["across"] + p["shift"])


def _rnn_params(seed):
    return normals(seed, inward=(2, 3), across=(3, 3), shift=(3,), out=(3, 2))


def _sequences():
    return vectors(4, 2, num_classes=2)


def rnn_unrolled():
    def outputs_fn(p, batch):
        h = jnp.zeros((batch["x"].shape[0], 3), batch["x"].dtype)
        for t in range(batch["x"].shape[1]):
            h = _rnn_cell(p, h, batch["x"][:, t])
        return h @ p["out"]

    return outputs_fn, _rnn_params(110), _sequences()


def rnn_scanned():
    """The parameters are constants of the scan; the outputs are at every step."""

    def outputs_fn(p, batch):
        def step(h, x):
            h = _rnn_cell(p, h, x)
            return h, h @ p["out"]

        h = jnp.zeros((batch["x"].shape[0], 3), batch["x"].dtype)
        _, outputs = jax.lax.scan(step, h, jnp.moveaxis(batch["x"], 1, 0))
        return jnp.moveaxis(outputs, 0, 1)

    batch = _sequences()
    batch["label"] = (batch["x"][..., 0] > 0).astype(jnp.int32)
    return outputs_fn, _rnn_params(111), batch


def rnn_scanned_with_a_learned_start():
    """Backward in time, the first state a parameter, the parameters in the carry."""
    params = _rnn_params(112) | normals(113, start=(3,))

    def outputs_fn(p, batch):
        def step(carry, x):
            h, own = carry
            return (_rnn_cell(own, h, x), own), None

        start = jnp.broadcast_to(p["start"], (batch["x"].shape[0], 3))
        xs = jnp.moveaxis(batch["x"], 1, 0)
        (h, _), _ = jax.lax.scan(step, (start, p), xs, reverse=True)
        return h @ p["out"]

    return outputs_fn, params, _sequences()


def _gru_cell(p, h, x):
    update, reset, new = jnp.split(x @ p["inward"] + p["shift"], 3, -1)
    held_update, held_reset, held = jnp.split(h @ p["across"], 3, -1)
    update = jax.nn.sigmoid(update + held_update)
    new = jnp.tanh(new + jax.nn.sigmoid(reset + held_reset) * held)
    return (1 - update) * new + update * h


def _gru_params(seed):
    return normals(seed, inward=(2, 9), across=(3, 9), shift=(9,), out=(3, 2))


def gru_unrolled():
    def outputs_fn(p, batch):
        h = jnp.zeros((batch["x"].shape[0], 3), batch["x"].dtype)
        for t in range(batch["x"].shape[1]):
            h = _gru_cell(p, h, batch["x"][:, t])
        return h @ p["out"]

    return outputs_fn, _gru_params(114), _sequences()


def gru_scanned():
    """One example at a time: the scan is inside a vmap over examples."""

    def outputs_fn(p, batch):
        def one(xs):
            step = jax.checkpoint(lambda h, x: (_gru_cell(p, h, x), None))
            return jax.lax.scan(step, jnp.zeros(3, xs.dtype), xs)[0] @ p["out"]

        return jax.vmap(one)(batch["x"])

    return outputs_fn, _gru_params(115), _sequences()


def recurrent_layers_scanned():
    """A scan over stacked layers, each a scan over time."""
    params = normals(
        116, inward=(2, 3, 3), across=(2, 3, 3), shift=(2, 3), first=(2, 3), out=(3, 2)
    )

    def outputs_fn(p, batch):
        def layer(xs, own):
            step = lambda h, x: (_rnn_cell(own, h, x),) * 2  # noqa: E731
            return jax.lax.scan(step, jnp.zeros_like(xs[0]), xs)[1], None

        own = {name: p[name] for name in ("inward", "across", "shift")}
        xs = jnp.moveaxis(batch["x"] @ p["first"], 1, 0)
        xs, _ = jax.lax.scan(layer, xs, own)
        return xs[-1] @ p["out"]

    return outputs_fn, params, _sequences()


def linear_state_space():
    """A diagonal recurrence by an associative scan, its decay from a parameter."""
    params = normals(117, decay=(3,), inward=(2, 3), out=(3, 2))

    def outputs_fn(p, batch):
        drive = batch["x"] @ p["inward"]
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), drive.shape)

        def join(left, right):
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, states = jax.lax.associative_scan(join, (decay, drive), axis=1)
        return jnp.tanh(states[:, -1]) @ p["out"]

    return outputs_fn, params, _sequences()
