"""Which programs are known to keep their examples apart, and which are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import Problem
from grsd_jax.jacobian import plan
from user_networks import NETWORKS, plain

N = 3


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def reason(outputs_fn, params, batch):
    """Returns what may mix the examples, as the check of the factors asks it."""
    batches = jax.tree.map(lambda leaf: leaf[None], batch)
    point = Problem(outputs_fn, batches).at(params)
    assert not plan._closed(point)[1]
    return plan._what_may_mix(point)


def values():
    noise = np.random.default_rng(0)
    params = {"w": jnp.asarray(noise.normal(size=(4, N, 2)))}
    x = jnp.asarray(noise.normal(size=(N, 4)))
    batch = {"x": x, "i": jnp.array([2, 0, 1]), "label": jnp.array([0, 1, 1])}
    return params, batch


def wide(x):
    """Returns ``[N, N]`` as ``[N, 4]``."""
    return jnp.pad(x, ((0, 0), (0, 4 - len(x))))


@jax.custom_jvp
def forward_rule(x):
    return x * x


@forward_rule.defjvp
def _forward_rule_jvp(primals, tangents):
    moved = tangents[0] - jnp.mean(tangents[0], 0)
    return forward_rule(*primals), 2 * primals[0] * moved


@jax.custom_vjp
def backward_rule(x):
    return x * x


backward_rule.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * (g - jnp.mean(g, 0)),))


#: From ``x [N, 4]``, with values ``i [N]``, and N in place of any other size.
APART = {
    "lookup": lambda x, i: jnp.eye(N, 4)[i] * x,
    "own_entry": lambda x, i: x * jnp.take_along_axis(x, i[:, None], 1),
    "merged": lambda x, i: jnp.tanh(x.reshape(-1, 2)).reshape(-1, 4),
    "merged_inside": lambda x, i: jnp.tanh(x.T.reshape(2, -1)).reshape(4, -1).T,
    "pairs_of_features": lambda x, i: jnp.einsum("ni,nj->n", x, x)[:, None] * x,
    "by_columns": lambda x, i: jax.lax.reshape(x, x.shape[::-1], (1, 0)).T,
    "mapped": lambda x, i: jax.lax.map(lambda row: row - jnp.mean(row), x),
    "by_vmap": lambda x, i: jax.vmap(lambda row, k: jnp.sort(row) * k)(x, i),
    "steps": lambda x, i: jax.lax.scan(lambda c, t: (c + t, c), x[:, 0], x.T)[1].T,
    "until": lambda x, i: jax.lax.fori_loop(0, 3, lambda _, c: jnp.sin(c), x),
    "branch": lambda x, i: jax.lax.cond(True, jnp.sin, jnp.zeros_like, x),
    "unstacked": lambda x, i: jnp.stack(jnp.unstack(x, axis=1)[::-1], 1),
    "windows": lambda x, i: jax.lax.reduce_window(
        x, 0.0, jax.lax.add, (1, 3), (1, 1), "SAME"
    ),
    "update": lambda x, i: jax.lax.dynamic_update_slice(x, 2 * x[:, :2], (0, 1)),
}

MIXING = {
    "mean": lambda x, i: x - jnp.mean(x, 0),
    "norm": lambda x, i: x / jnp.linalg.norm(x),
    "flip": lambda x, i: x[::-1],
    "shuffle": lambda x, i: x[i],
    "roll": lambda x, i: jnp.roll(x, 1, 0),
    "sort": lambda x, i: jnp.sort(x, 0),
    "cumulated": lambda x, i: jnp.cumsum(x, 0),
    "attention": lambda x, i: jax.nn.softmax(x @ x.T) @ x,
    "transposed": lambda x, i: x.T.reshape(x.shape),
    "reshaped": lambda x, i: jnp.flip(x.reshape(2, -1), 0).reshape(-1, 4),
    "carried": lambda x, i: jax.lax.scan(lambda c, r: (c + r, c), jnp.zeros(4), x)[1],
    "crossed": lambda x, i: wide(x[:, : len(x)] + x[:, : len(x)].T),
    "pairs": lambda x, i: wide(jnp.take(x.T, i, axis=0)),
    "rows": lambda x, i: jnp.stack(jnp.unstack(x)),
    "branches": lambda x, i: wide(
        jax.lax.cond(jnp.arange(2)[0] > 0, jnp.sin, jnp.transpose, x[:, : len(x)])
    ),
    "place": lambda x, i: x * jnp.arange(1.0, len(x) + 1)[:, None],
    "number": lambda x, i: x / x.shape[0],
    "first": lambda x, i: x + x[:1],
    "shut": lambda x, i: x + jnp.where(i[:1] > 9, jnp.mean(x, 0), 0.0),
    "window": lambda x, i: jax.lax.reduce_window(
        x, 0.0, jax.lax.add, (3, 1), (1, 1), "SAME"
    ),
    "chosen": lambda x, i: jax.lax.cond(i[0] > 9, jnp.sin, jnp.cos, x),
    "loop": lambda x, i: jax.lax.fori_loop(0, i[0], lambda _, c: jnp.sin(c), x),
    "noise": lambda x, i: x * jax.random.normal(jax.random.key(0), x.shape),
    "one_for_all": lambda x, i: x.at[i].add(x),
    "by_columns": lambda x, i: jnp.reshape(x.ravel(order="F"), x.shape),
    # No equation mixes examples, but each counts them.
    "number_repeated": lambda x, i: x * jnp.full(4, float(len(x))),
    "number_given": lambda x, i: jnp.where(x > 9, 0.0, len(x)) * x,
    "number_held": lambda x, i: jax.jit(lambda x: x * np.full(4, 1 / len(x)))(x),
    "number_of_ones": lambda x, i: x / jnp.sum(jnp.ones(len(x))),
    "number_contracted": lambda x, i: x * (jnp.ones(len(x)) @ jnp.ones(len(x))),
    "last_place": lambda x, i: x * jnp.max(jnp.arange(len(x)) + 1),
    "place_of_one": lambda x, i: x * jnp.flip(jnp.arange(len(x)))[i][:, None],
    "trace": lambda x, i: x * jnp.trace(jnp.eye(len(x))),
    "power": lambda x, i: x ** len(x),
    "times": lambda x, i: jax.lax.fori_loop(0, len(x), lambda _, c: jnp.sin(c), x),
    "as_many": lambda x, i: x * jnp.sum(jnp.arange(1.0, 4.0)[: len(x)]),
    "column": lambda x, i: x * x[:, len(x) - 1 : len(x)],
    "last_key": lambda x, i: (
        x * jax.random.normal(jax.random.split(jax.random.key(0), len(x))[-1], (4,))
    ),
}


#: Those whose derivatives alone mix the examples of ``x``.
RULES = {"forward_rule": forward_rule, "backward_rule": backward_rule}


def network(mixed):
    def outputs_fn(params, batch):
        x = mixed(batch["x"], batch["i"])
        return jnp.einsum("nd,dkc->nc", x, params["w"])

    return outputs_fn


@pytest.mark.parametrize("name", APART)
def test_examples_that_are_kept_apart_are_known(name):
    assert reason(network(APART[name]), *values()) == ""


@pytest.mark.parametrize("name", MIXING)
def test_examples_that_may_meet_are_not_taken_for_independent(name):
    assert reason(network(MIXING[name]), *values())


@pytest.mark.parametrize("name", RULES)
def test_the_rules_of_derivatives_are_read(name):
    params, batch = values()
    params["scale"] = jnp.ones(4)

    def outputs_fn(params, batch):
        x = RULES[name](batch["x"] * params["scale"])
        return jnp.einsum("nd,dkc->nc", x, params["w"])

    assert reason(outputs_fn, params, batch)


@pytest.mark.parametrize(
    "name", sorted(set(MIXING) - {"rows", "shut", "chosen", "loop"})
)
def test_the_mixing_programs_are_no_programs_of_one_example(name):
    """The list itself: what one example gives alone differs from its row."""
    params, batch = values()
    outputs_fn = network(MIXING[name])
    whole = outputs_fn(params, batch)
    alone = [
        outputs_fn(params, jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], batch))
        for k in range(N)
    ]
    assert not np.allclose(whole, jnp.concatenate(alone))


@pytest.mark.parametrize(
    "name",
    [name for name, build in NETWORKS.items() if build.__module__ == plain.__name__],
)
def test_networks_are_known_to_keep_their_examples_apart(name, x64):
    # A rule for backward passes alone cannot be read: its values are compared.
    expected = "custom_lin" if name == "custom_vjp_activation" else ""
    assert reason(*NETWORKS[name]()) == expected


def test_the_maxima_of_windows_keep_examples_apart_and_those_across_do_not():
    params, batch = values()
    params["scale"] = jnp.ones(4)

    def pooled(window):
        def outputs_fn(params, batch):
            x = batch["x"] * params["scale"]
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 1), "SAME")
            return jnp.einsum("nd,dkc->nc", x, params["w"])

        return outputs_fn

    assert reason(pooled((1, 3)), params, batch) == ""
    assert reason(pooled((3, 1)), params, batch)
