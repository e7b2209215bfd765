"""Random small programs over one activation ``x`` of shape ``[N, 3]``.

A program is a tuple of steps. A step is a tuple: its name, the numbers of the
parameters that it uses, and its options, or the steps inside it. Steps that name the
same parameter share it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from plain_networks import custom_softplus, custom_square

SHAPES = {"matrix": (3, 3), "vector": (3,), "table": (4, 3), "flat": (12,)}

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "softplus": custom_softplus,
    "square": lambda x: custom_square(jnp.tanh(x)),
}


def dense(x, weight, order):
    operands = (x, weight) if order.startswith("n") else (weight, x)
    out = jnp.einsum(order, *operands)
    return out.T if order.endswith("en") else out


def joined(table, vector):
    return jnp.concatenate([table[1:3], vector[None]])


#: The parameters that a step uses, and what it computes from ``x``, from their values
#: and from its options.
SIMPLE = {
    "dense": (["matrix"], dense),
    "scale": (["vector"], lambda x, v: x * v),
    "divide": (["vector"], lambda x, v: x / (1 + v**2)),
    "exponential": (["vector"], lambda x, v: jnp.exp(v) * x),
    "shift": (["vector"], lambda x, v: x + v),
    "subtract": (["vector"], lambda x, v: v - x),
    "rows": (["table"], lambda x, t: x @ t[:3].T),
    "slice": (["flat"], lambda x, f, k: x @ f[k : k + 9].reshape(3, 3)),
    "short": (["flat"], lambda x, f, k: x + f[k : k + 3]),
    "gate": (["matrix"], lambda x, w: x * jax.nn.sigmoid(x @ w)),
    "product": (["matrix", "matrix"], lambda x, a, b: x @ (a @ b)),
    "sum": (["matrix", "matrix"], lambda x, a, b: x @ (a + b.T)),
    "columns": (["matrix", "vector"], lambda x, w, v: x @ (w * v)),
    "joined": (["table", "vector"], lambda x, t, v: x @ joined(t, v)),
    "activation": ([], lambda x, name: ACTIVATIONS[name](x)),
}


def run(program, x, ids, get):
    """Applies a program; ``get(kind, number)`` returns a parameter."""
    for name, *options in program:
        if name in AROUND:
            x = AROUND[name](*options, x, ids, get)
        elif name == "lookup":
            x = x + get("table", *options)[ids]
        else:
            kinds, apply = SIMPLE[name]
            values = [get(*key) for key in zip(kinds, options, strict=False)]
            x = apply(x, *values, *options[len(kinds) :])
    return x


def residual(body, x, ids, get):
    return x + run(body, x, ids, get)


def jit(body, x, ids, get):
    """Parameters as constants that the jitted function closes over."""
    return jax.jit(lambda x: run(body, x, ids, get))(x)


def remat(body, x, ids, get):
    """Parameters as arguments of the checkpointed function."""
    own = {key: get(*key) for key in sorted(used(body))}

    @jax.checkpoint
    def apply(own, x):
        return run(body, x, ids, lambda *key: own[key])

    return apply(own, x)


def by_example(body, x, ids, get):
    return jax.vmap(lambda x, i: run(body, x[None], i[None], get)[0])(x, ids)


def loop(body, x, ids, get):
    """Two steps of a scan with the parameters as its constants."""

    def step(x, _):
        return jnp.tanh(run(body, x, ids, get)), None

    return jax.lax.scan(step, x, None, length=2)[0]


def layers(body, x, ids, get):
    """A scan over two layers; a layer's parameters are slices of stacked ones."""
    keys = sorted(used(body))
    own = {key: jnp.stack([get(*key), jnp.flip(get(*key), 0)]) for key in keys}

    def step(x, layer):
        return jnp.tanh(run(body, x, ids, lambda *key: layer[key])), None

    return jax.lax.scan(step, x, own, length=2)[0]


#: The steps that have steps inside them.
AROUND = {
    "residual": residual,
    "jit": jit,
    "remat": remat,
    "vmap": by_example,
    "loop": loop,
    "layers": layers,
}

#: What a step is drawn with after the numbers of its parameters.
OPTIONS = {
    "dense": ("nd,de->ne", "nd,ed->ne", "de,nd->ne", "ed,nd->en"),
    "slice": range(4),
    "short": range(4),
    "activation": sorted(ACTIVATIONS),
}


def _simple(name, num_parameters):
    numbers = [st.integers(0, 1)] * num_parameters
    options = [st.sampled_from(OPTIONS[name])] if name in OPTIONS else []
    return st.tuples(st.just(name), *numbers, *options)


simple = st.one_of(
    _simple("lookup", 1), *[_simple(name, len(SIMPLE[name][0])) for name in SIMPLE]
)


def _lists(steps, min_size, max_size):
    return st.lists(steps, min_size=min_size, max_size=max_size).map(tuple)


def _around(steps):
    return st.tuples(st.sampled_from(sorted(AROUND)), _lists(steps, 1, 3))


def _either(first, second):
    """Both equally often; `one_of` would weigh them by their own alternatives."""
    return st.booleans().flatmap(lambda chosen: first if chosen else second)


#: A step that has others inside it, up to three deep, among simple ones.
wrapped = _around(_either(_around(_either(_around(simple), simple)), simple))

programs = st.tuples(_lists(simple, 0, 2), wrapped, _lists(simple, 0, 2)).map(
    lambda parts: (*parts[0], parts[1], *parts[2])
)


def used(program):
    """Returns the parameters of a program, ``{(kind, number)}``."""
    found = set()
    for name, *options in program:
        if name in AROUND:
            found |= used(*options)
        else:
            kinds = ["table"] if name == "lookup" else SIMPLE[name][0]
            found |= set(zip(kinds, options, strict=False))
    return found


def names(program):
    """Returns the names of a program's steps, those inside others too."""
    own = {name for name, *_ in program}
    inner = [names(*options) for name, *options in program if name in AROUND]
    return own.union(*inner)


def network(program):
    """Returns ``(outputs_fn, params, batch)`` of a program and a head, C = 2."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(0.5 * rng.normal(size=shape), float)

    keys = sorted(used(program))
    params = {f"{kind}{number}": normal(*SHAPES[kind]) for kind, number in keys}
    params["head"] = normal(3, 2)
    batch = {
        "x": normal(3, 3),
        "ids": jnp.array([3, 0, 3], jnp.int32),
        "label": jnp.array([1, 0, 0], jnp.int32),
    }

    def outputs_fn(params, batch):
        x = run(program, batch["x"], batch["ids"], lambda k, i: params[f"{k}{i}"])
        return x @ params["head"]

    return outputs_fn, params, batch
