"""Arguments of another kind than those meant: refused in one sentence.

Every public function that has an argument of the name is called, so that a new one
cannot forget its check.
"""

import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax as grsd
from grsd_jax import PathPoint, Problem
from grsd_jax.shells import SoftShells
from test_public_api import PUBLIC

KEY = jax.random.key(0)
PARAMS = {"v": jnp.ones((4, 2)), "w": jnp.ones((3, 4))}
BATCHES = {"label": jnp.zeros((1, 2), jnp.int32), "x": jnp.ones((1, 2, 3))}


def network(params, batch):
    return jnp.tanh(batch["x"] @ params["w"]) @ params["v"]


PROBLEM = Problem(network, BATCHES)
BLOCKS = grsd.partition(PARAMS, lambda path: path[0], ["v", "w"])
MATRIX = jnp.eye(4)
SHELLS = SoftShells(jnp.array([0.1, 1.0]), width=0.5)
END = (PROBLEM, PARAMS)

#: Arguments that fit, by their names.
FITTING = {
    "after": END,
    "before": END,
    "block": MATRIX,
    "blocks": BLOCKS,
    "derivative": lambda block: block,
    "direction": PARAMS,
    "edges": jnp.ones(4),
    "every": 1,
    "key": KEY,
    "maps": [lambda state: state],
    "matmat": lambda block: block,
    "num_columns": 1,
    "num_pairs": 2,
    "num_steps": 2,
    "params": PARAMS,
    "points": [PathPoint(0.0, PROBLEM, PARAMS, None)],
    "problem": PROBLEM,
    "scale": 2.0,
    "shells": SHELLS,
    "start_block": MATRIX,
    "state": jnp.ones((2, 3)),
    "time": 0.1,
    "values": jnp.ones(4),
    "vectors": MATRIX,
    "velocity": jnp.ones(4),
    "x": jnp.ones(4),
    "y": jnp.ones(4),
}

#: What makes optional keys needed, and arguments that fit one function alone.
NEEDS_A_KEY = {
    "exact_balance": {"solver": grsd.dynamics.KrylovSteps(4)},
    "fit_power_law": {"num_bootstrap": 2},
    "midpoint_flux": {
        "solver": grsd.dynamics.KrylovSteps(4),
        "before": PARAMS,
        "after": PARAMS,
    },
    "spectral_snapshot": {"num_pairs": 2},
    "velocity_fit": {"num_bootstrap": 2},
}

FUNCTIONS = {
    name: value
    for topic, name in PUBLIC
    if inspect.isfunction(value := getattr(importlib.import_module(topic), name))
}


def having(argument):
    return [
        name
        for name, function in FUNCTIONS.items()
        if argument in inspect.signature(function).parameters
    ]


def call(name, **others):
    """Calls a function with arguments that fit, but for the others."""
    function, given = FUNCTIONS[name], {**NEEDS_A_KEY.get(name, {}), **others}
    for argument, parameter in inspect.signature(function).parameters.items():
        if parameter.default is inspect.Parameter.empty or argument == "direction":
            given.setdefault(argument, FITTING[argument])
    return function(**given)


@pytest.mark.parametrize("name", having("problem"))
def test_a_problem_comes_before_its_parameters(name):
    with pytest.raises(ValueError, match=r"^problem: expected a Problem before params"):
        call(name, problem=PARAMS)
    if "params" in inspect.signature(FUNCTIONS[name]).parameters:
        sentence = "^params: expected parameters, got a Problem"
        if name == "covariance_check":  # which needs float32 or float64
            sentence = "^params.*: expected dtype float32 or float64, got int32"
        with pytest.raises(ValueError, match=sentence):
            call(name, params=PROBLEM)


WRONG_KEYS = {
    "0": 0,
    "None": None,
    "shape [] of int32": np.int32(3),
    "shape [2] of key<fry>": jax.random.split(jax.random.key(1)),
    "shape [2] of float32": jnp.ones(2, jnp.float32),
}


@pytest.mark.parametrize("name", having("key"))
def test_a_key_is_a_key(name):
    for text, key in WRONG_KEYS.items():
        sentence = r"^key: expected a PRNG key.* got " + re.escape(f"{text}.")
        with pytest.raises(ValueError, match=sentence):
            call(name, key=key)


def test_keys_of_both_kinds_serve():
    probe = grsd.make_probe(PROBLEM, every=1)
    for key in (KEY, jax.random.PRNGKey(0), np.zeros(2, np.uint32)):
        assert probe.init(key, PARAMS).active
    with pytest.raises(ValueError, match=r"^key: expected a PRNG key, such as"):
        probe.init(0, PARAMS)


@pytest.mark.parametrize(
    ("leaves", "sentence"),
    [
        (
            {"label": jnp.zeros(5, jnp.int32), "x": jnp.ones((5, 3))},
            "batches['label']: expected leading axes [K, N], got shape [5]; axes are "
            "[K, N, ...], K = 1 for a single batch.",
        ),
        (
            {"label": jnp.zeros((5, 4)), "x": jnp.ones((5, 3))},
            "batches['x']: expected leading axes [5, 4] as in the first leaf, got "
            "[5, 3]; axes are [K, N, ...], K = 1 for a single batch.",
        ),
    ],
)
def test_a_batch_without_its_first_axis_is_told_of_it(leaves, sentence):
    with pytest.raises(ValueError, match="^" + re.escape(sentence) + "$"):
        grsd.kernel_dense(Problem(network, leaves), PARAMS)


def test_squares_are_never_of_every_pair_of_examples():
    column = {**BATCHES, "label": jnp.ones((1, 2, 1))}
    row = {**BATCHES, "label": jnp.ones((1, 2))}

    def single(params, batch):
        return network(params, batch)[:, :1]

    def flat(params, batch):
        return single(params, batch)[:, 0]

    def of_one_example(output, target):
        return (output - target) ** 2

    right = grsd.kernel_dense(Problem(single, column, loss="squared"), PARAMS)
    same = grsd.kernel_dense(Problem(flat, row, loss="squared"), PARAMS)
    np.testing.assert_allclose(same, right, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^targets: expected shape \[2\], got \[2, 1"):
        grsd.kernel_dense(Problem(flat, column, loss="squared"), PARAMS)
    with pytest.raises(ValueError, match=r"^targets: expected shape \[2, 1\], got \[2"):
        grsd.kernel_dense(Problem(single, row, loss="squared"), PARAMS)
    for outputs, batches in ((flat, column), (single, row)):
        with pytest.raises(ValueError, match=r"^loss: expected a scalar of every"):
            grsd.kernel_dense(Problem(outputs, batches, loss=of_one_example), PARAMS)
