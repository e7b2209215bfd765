"""Problems over blocks whose influence and overlap are known in closed form.

Each function returns ``(problem, params, blocks)``.
"""

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax import Problem, partition


def in_order(num_blocks):
    """Returns ``(params -> blocks)`` of parameters ``{"b0": ..., "b1": ...}``."""
    names = [f"b{i}" for i in range(num_blocks)]
    return lambda params: partition(params, lambda path: path[0], names)


def branches_error(params, batch):
    """Every block makes outputs of its own: J is block diagonal."""
    parts = [jnp.tanh(batch["x"] @ w) for _, w in sorted(params.items())]
    return jnp.concatenate(parts, axis=1)


def branches(num_blocks=4, *, error_fn=branches_error, reduction="stack"):
    keys = jax.random.split(jax.random.key(0), num_blocks + 1)
    params = {f"b{i}": jax.random.normal(keys[i], (3, 2)) for i in range(num_blocks)}
    batches = {"x": jax.random.normal(keys[-1], (2, 4, 3))}
    problem = Problem.from_error(error_fn, batches, reduction=reduction)
    return problem, params, in_order(num_blocks)(params)


def planted_error(params, batch):
    """As `branches_error`, but the first and the last block share their output."""
    parts = [batch["x"] @ w for _, w in sorted(params.items())]
    return jnp.concatenate([parts[0] + parts[-1], *parts[1:-1]], axis=1)


def planted_pair(num_blocks=5, *, reduction="stack"):
    """Returns a problem with one coherent pair: coherence 1 between both ends."""
    return branches(num_blocks, error_fn=planted_error, reduction=reduction)


def chain_error(params, batch):
    """``e_i = w_{L-1} ... w_0 x_i``, all scalars."""
    product = jnp.prod(jnp.stack([w for _, w in sorted(params.items())]))
    return product * batch["x"]


def chain(weights=(0.5, -2.0, 1.5, 0.8)):
    """Returns the chain, whose ``J_l = e / w_l``."""
    params = {f"b{i}": jnp.asarray(w, jnp.float32) for i, w in enumerate(weights)}
    x = np.random.default_rng(0).normal(size=(1, 6, 1)).astype(np.float32)
    problem = Problem.from_error(chain_error, {"x": jnp.asarray(x)})
    return problem, params, in_order(len(weights))(params)


def layers_error(params, batch):
    """A deep linear network ``e = W_{L-1} ... W_0 x``."""
    z = batch["x"]
    for _, w in sorted(params.items()):
        z = jnp.matmul(z, w.T, precision="highest")
    return z


def orthogonal_layers(num_blocks=4, width=5):
    """Returns orthogonal layers and one unit input: every ``M_l`` is the identity."""
    rng = np.random.default_rng(0)
    params = {
        f"b{i}": jnp.asarray(
            np.linalg.qr(rng.normal(size=(width, width)))[0], "float32"
        )
        for i in range(num_blocks)
    }
    x = rng.normal(size=(1, 1, width))
    batches = {"x": jnp.asarray(x / np.linalg.norm(x), "float32")}
    problem = Problem.from_error(layers_error, batches)
    return problem, params, in_order(num_blocks)(params)


def batches_of(problem):
    """Returns the K batches one by one."""
    num_batches = jax.tree.leaves(problem.batches)[0].shape[0]
    return [
        jax.tree.map(lambda leaf, k=k: leaf[k], problem.batches)
        for k in range(num_batches)
    ]


def block_jacobians(problem, params, blocks):
    """Returns ``[J_1, .., J_L]`` with ``J J^T = M``, dense, in float64."""
    rows_of = jax.jit(jax.jacrev(lambda p, x: problem.error(p, x).reshape(-1)))
    parts = []
    for batch in batches_of(problem):
        leaves = [
            np.asarray(x, np.float64) for x in jax.tree.leaves(rows_of(params, batch))
        ]
        leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in leaves]
        parts.append(
            [
                np.concatenate([leaves[i] for i in blocks.leaves_of(block)], axis=1)
                for block in range(len(blocks.names))
            ]
        )
    if problem.reduction == "stack":
        return [
            np.concatenate(of_block, axis=0) for of_block in zip(*parts, strict=True)
        ]
    scale = len(parts) ** -0.5
    return [
        scale * np.concatenate(of_block, axis=1)
        for of_block in zip(*parts, strict=True)
    ]
