"""The networks by name: their sizes, and every one through the same reports."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import models
from grsd_jax.experiments.common.config import (
    CHAINS,
    MODELS,
    RESIDUAL,
    Config,
    UserError,
)
from grsd_jax.experiments.common.networks import make_model
from grsd_jax.experiments.common.training import train
from grsd_jax.experiments.conditions import run as conditions
from grsd_jax.experiments.conditions.analyse import format_conditions
from grsd_jax.experiments.reproduce.run import measure
from running import small_textures

TINY = Config(
    width=4,
    depth=2,
    activation="gelu",
    epochs=1,
    train_batch_size=32,
    learning_rate=0.01,
    checkpoint_every=2,
    keep_checkpoints=10,
    batch_size=4,
    num_batches=1,
    num_shells=4,
    window=2,
    protocol=("own",),
)


def shapes(model):
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return variables, jax.eval_shape(model.apply, variables, images)


@pytest.mark.parametrize("name", MODELS)
def test_every_network_has_its_outputs_and_its_blocks(name):
    model = make_model(name, 7, TINY)
    variables, logits = shapes(model)
    assert logits.shape == (2, 7)
    blocks = models.depth_blocks(model, variables["params"])
    inner = [block for block in blocks.names if block.startswith("block")]
    assert name not in CHAINS or len(inner) == TINY.depth
    wider, _ = shapes(make_model(name, 7, dataclasses.replace(TINY, width=8)))
    assert jax.tree.structure(wider) == jax.tree.structure(variables)
    assert tree_size(wider["params"]) > tree_size(variables["params"])


def tree_size(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", CHAINS)
def test_every_setting_reaches_the_network(name):
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    model = make_model(name, 7, TINY)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def moved(**changes):
        other = make_model(name, 7, dataclasses.replace(TINY, **changes))
        difference = other.apply(variables, images) - model.apply(variables, images)
        return float(jnp.max(jnp.abs(difference))) > 1e-4

    assert moved(activation="tanh") == (name != "ssm")
    assert moved(branch_scale=0.5) == (name in RESIDUAL)
    assert moved(rho=0.5) == (name == "ssm")


def test_sizes_that_a_network_cannot_have_are_named():
    odd = dataclasses.replace(TINY, width=3)
    with pytest.raises(
        UserError, match="network transformer: --width: expected a mult"
    ):
        make_model("transformer", 10, odd)
    still = dataclasses.replace(TINY, rho=0.0)
    with pytest.raises(UserError, match="network ssm: --rho: expected"):
        make_model("ssm", 10, still)


@pytest.mark.parametrize(
    "name",
    [
        # The residual twins of these two run the same code, and more.
        pytest.param(name, marks=[pytest.mark.scheduled] * (name in ("mlp", "cnn")))
        for name in CHAINS
    ],
)
def test_every_network_is_trained_and_measured(name, tmp_path):
    dataset = small_textures()
    config = dataclasses.replace(TINY, model=name, workdir=str(tmp_path))
    model = make_model(name, dataset.num_classes, config)
    with jax.numpy_dtype_promotion("standard"):
        train(model, dataset, config, tmp_path, name=name)
        entry, arrays = measure(name, "own", dataset, config)
    assert entry["n"] == 40
    assert entry["num_resolved"] > 10
    assert entry["operator_disagreement"] < 1e-4
    assert np.all(np.isfinite(arrays["coupling"]))
    deeper = dataclasses.replace(config, depth=3)
    with pytest.raises(UserError, match="--depth: expected 2 as in the run"):
        measure(name, "own", dataset, deeper)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("resmlp", marks=pytest.mark.scheduled),
        pytest.param("transformer", marks=pytest.mark.scheduled),
        pytest.param("ssm", marks=pytest.mark.slow),
    ],
)
def test_the_conditions_of_a_network_without_batch_norm(name, tmp_path):
    dataset = small_textures()
    config = dataclasses.replace(TINY, model=name, workdir=str(tmp_path))
    options = conditions.Options(num_probes=2, num_points=2)
    with jax.numpy_dtype_promotion("standard"):
        found = conditions.run_conditions(dataset, config, options)
    assert found["steps"] == [0, 2]
    assert len(found["layers"]["blocks"]) == len(found["blocks"])
    told = format_conditions(found)
    assert "4 log-shift invariance" in told
    assert ("Proposition 2, rho = 0.9" in told) == (name == "ssm")
    if name == "ssm":
        assert found["propagation"]["below_bound"]
        assert found["propagation"]["measured_range"] is not None or (
            found["propagation"]["predicted_range"] >= config.depth
        )
