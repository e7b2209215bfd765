"""Partitions of the parameters: which leaf is in which block, and what they sum to."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import Problem, kernel_dense, layer_kernels, models, partition
from grsd_jax.conditions import partition_by_prefix, restrict_to_block
from grsd_jax.kernel import linearize_block_kernels
from oracles import MLP, network_problem, relative_error

PARAMS = {
    "head": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))},
    "stage1": {"conv": {"kernel": jnp.ones(3)}, "conv2": {"kernel": jnp.ones(4)}},
    "stem": [jnp.ones(5)],
}
NAMES = ["stem", "stage1", "head"]


def test_blocks_keep_the_order_of_depth_and_index_the_leaves():
    blocks = partition(PARAMS, lambda path: path[0], NAMES)
    assert blocks.names == ("stem", "stage1", "head")
    assert blocks.paths == (
        ("head", "bias"),
        ("head", "kernel"),
        ("stage1", "conv", "kernel"),
        ("stage1", "conv2", "kernel"),
        ("stem", "0"),
    )
    assert blocks.index == (2, 2, 1, 1, 0)
    assert blocks.labels == ("head", "head", "stage1", "stage1", "stem")
    assert blocks.leaves_of(1) == (2, 3)
    assert blocks.block_of(("head", "bias")) == "head"
    assert blocks == partition_by_prefix(PARAMS, {name: [name] for name in NAMES})
    assert jax.tree.leaves(blocks) == []
    hash(blocks)


def test_a_prefix_is_whole_names():
    prefixes = {"stem": ["stem"], "a": ["stage1/conv"], "b": ["stage1/conv2", "head"]}
    blocks = partition_by_prefix(PARAMS, prefixes)
    assert blocks.index == (2, 2, 1, 2, 0)


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (
            {"stem": ["stem"], "head": ["head"]},
            "block_of: expected each parameter in one of 'stem', 'head', got "
            "'stage1/conv/kernel' in none; 'stage1/conv2/kernel' in none.",
        ),
        (
            {"stem": ["stem"], "a": ["stage1", "head"], "b": ["head/bias"]},
            "got 'head/bias' in 'a' and 'b'.",
        ),
        (
            {"stem": ["stem"], "a": ["stage1", "head"], "b": ["tail"]},
            "names: expected a parameter in every block, got none in 'b'.",
        ),
    ],
)
def test_parameters_in_no_block_or_two_are_named(prefixes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        partition_by_prefix(PARAMS, prefixes)


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="got 'stem/0' in 'trunk'"):
        partition(
            PARAMS, lambda path: "trunk" if path[0] == "stem" else "head", ["head"]
        )
    with pytest.raises(ValueError, match="names: expected one or more different names"):
        partition(PARAMS, lambda path: path[0], ["stem", "stem"])
    with pytest.raises(ValueError, match="'stem/0' in none"):
        partition(PARAMS, lambda path: None if path[0] == "stem" else path[0], NAMES)
    blocks = partition(PARAMS, lambda path: path[0], NAMES)
    with pytest.raises(ValueError, match="blocks: expected a partition of the leaves"):
        restrict_to_block({"stem": PARAMS["stem"]}, blocks, 0)


def test_blocks_and_parameters_that_do_not_exist_are_no_zeros():
    blocks = partition_by_prefix(PARAMS, {name: [name] for name in PARAMS})
    for block in (-1, len(PARAMS), 0.0):
        with pytest.raises(ValueError, match=r"^block: expected"):
            restrict_to_block(PARAMS, blocks, block)
        with pytest.raises(ValueError, match=r"^block: expected"):
            blocks.leaves_of(block)
    with pytest.raises(ValueError, match=r"^path: expected that of a parameter"):
        blocks.block_of(("no", "parameter"))


def test_restriction_keeps_one_block():
    blocks = partition(PARAMS, lambda path: path[0], NAMES)
    parts = [restrict_to_block(PARAMS, blocks, block) for block in range(3)]
    assert [float(part["stem"][0].sum()) for part in parts] == [5, 0, 0]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    jax.tree.map(np.testing.assert_array_equal, total, PARAMS)


@pytest.mark.parametrize("make", [models.ResNet18, models.PlainNet18])
def test_bundled_networks_have_blocks_by_depth(make):
    model = make(width=2)
    images = jnp.zeros((1, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    blocks = models.depth_blocks(model, variables["params"])
    stages = [f"stage{s}_block{b}" for s in range(1, 5) for b in (1, 2)]
    assert blocks.names == ("stem", *stages, "head")


def test_a_model_without_blocks_is_named():
    with pytest.raises(ValueError, match=r"model: expected one with .* got MLP"):
        models.depth_blocks(MLP(), PARAMS)


def test_kernels_of_the_blocks_add_up():
    problem, params = network_problem("mlp", jnp.float32)
    blocks = partition_by_prefix(params, {"in": ["Dense_0"], "out": ["Dense_1"]})
    for reduction in ("mean", "stack"):
        given = problem.replace(reduction=reduction)
        parts = layer_kernels(given, params, layer_of=blocks.block_of)
        assert set(parts) == {"in", "out"}
        expected = kernel_dense(given, params)
        assert relative_error(parts["in"] + parts["out"], expected) < 1e-6


def test_kernels_of_blocks_with_integer_leaves_are_those_of_the_other_leaves():
    network, params = network_problem("mlp", jnp.float32)
    outputs_fn = network.objective.outputs_fn
    turns = {"count": jnp.arange(3, dtype=jnp.int32)}
    held = {"frozen": jnp.int32(2), "net": params, "turns": turns}

    def scaled(params, batch):
        steps = params["frozen"] + params["turns"]["count"][1]
        return outputs_fn(params["net"], batch) * steps.astype(jnp.float32)

    problem = Problem(scaled, network.batches)
    blocks = partition_by_prefix(
        held,
        {"in": ["net/Dense_0", "turns"], "fixed": ["frozen"], "out": ["net/Dense_1"]},
    )
    kept = blocks.over(problem.at(held).params)
    assert kept.names == blocks.names
    assert len(kept.index) == len(jax.tree.leaves(params))
    eye = jnp.eye(problem.dimension(held), dtype=jnp.float32)
    found = [
        kernel.matmat(eye) for kernel in linearize_block_kernels(problem, held, blocks)
    ]
    expected = layer_kernels(problem, held, layer_of=blocks.block_of)
    assert set(expected) == {"in", "out"}
    for name, kernel in zip(blocks.names, found, strict=True):
        wanted = expected.get(name, 0 * eye)
        np.testing.assert_allclose(
            kernel, wanted, atol=1e-6 * float(jnp.max(jnp.abs(expected["in"])))
        )
