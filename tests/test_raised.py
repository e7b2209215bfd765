"""Half precision raised to float32: the same program, as if it were written in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.jacobian.raised import RaisedErrorFn

RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32),
    "k": jnp.asarray(RNG.normal(size=(3, 1, 1)), jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)


@jax.custom_jvp
def cube(x):
    return x * x * x


@cube.defjvp
def _cube_jvp(primals, tangents):
    return cube(*primals), 3 * primals[0] ** 2 * tangents[0]


def loop(x, w):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), c), x, None, length=2)


def until(x, w):
    return jax.lax.while_loop(
        lambda c: c[1] < 2, lambda c: (jnp.tanh(c[0] @ w), c[1] + 1), (x, 0)
    )[0]


#: From ``x`` and ``w`` in a dtype, a value in that dtype.
STEPS = {
    "product": lambda x, w: jnp.tanh(x @ w) * 0.125 + 1,
    "sum": lambda x, w: jnp.exp(x) / jnp.sum(jnp.exp(x @ w), -1, keepdims=True),
    "preferred": lambda x, w: jnp.dot(x, w, preferred_element_type=x.dtype),
    "iota": lambda x, w: x * jnp.arange(4, dtype=x.dtype)[None],
    "scan": lambda x, w: sum(map(jnp.sum, loop(x, w))) * x,
    "while": until,
    "cond": lambda x, w: jax.lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, x @ w),
    "remat": jax.checkpoint(lambda x, w: jnp.sin(x @ w)),
    "jit": jax.jit(lambda x, w: jnp.sin(x @ w)),
    "custom": lambda x, w: cube(x) @ w,
    "softmax": lambda x, w: jax.nn.softmax(jax.nn.relu(x @ w)),
    "rounded": lambda x, w: (
        jax.lax.reduce_precision(x @ w, 8, 7) if is_half(x) else x @ w
    ),
}


def is_half(x):
    return x.dtype == jnp.bfloat16


def error_in(dtype, step):
    def error(params, batch):
        x, w = batch["x"].astype(dtype), params["w"].astype(dtype)
        return jnp.sum(step(x, w).astype(dtype) * x, -1, keepdims=True)

    return jax.tree_util.Partial(error)


@pytest.mark.parametrize("held", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_a_raised_program_is_the_one_in_single_precision(name, held):
    given = jax.tree.map(lambda leaf: leaf.astype(held), PARAMS)
    raised, params = RaisedErrorFn.of(error_in(jnp.bfloat16, STEPS[name]), given)
    expected = error_in(jnp.float32, STEPS[name])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    def both(params):
        return raised(params, {"x": X}), expected(params, {"x": X})

    tangent = jax.tree.map(jnp.ones_like, params)
    values, tangents = jax.jvp(jax.jit(both), (params,), (tangent,))
    for got, wanted in (values, tangents):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)
    rough = error_in(jnp.bfloat16, STEPS[name])(given, {"x": X})
    assert not np.allclose(values[0], rough, rtol=1e-4, atol=1e-4)


def test_a_bit_pattern_cannot_be_raised():
    def bits(x, w):
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(x.dtype) @ w

    raised, params = RaisedErrorFn.of(error_in(jnp.bfloat16, bits), PARAMS)
    with pytest.raises(NotImplementedError, match="bitcast_convert_type of half"):
        raised(params, {"x": X})
