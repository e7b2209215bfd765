"""The exact null space that an error's constraints give M, whatever the parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._typing import ErrorFn, PyTree
from grsd_jax.jacobian.autodiff import as_pytree, check_problem, split_batches
from grsd_jax.jacobian.factored import uses_factors


def class_sums_vanish(
    error_fn: ErrorFn, params: PyTree, batches: PyTree, key: jax.Array
) -> jax.Array:
    """Finds out whether ``sum_c de_ic / dtheta = 0``, as for a softmax error.

    Then the constant over classes is an exact null vector of M for every example. An
    error function whose outputs lie in fewer directions says so itself. Else a random
    tangent u decides it: ``sum_c (J u)_ic`` vanishes with probability one only if every
    row sum does.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters.
        batches: A pytree with leading axes ``[K, N]``; the first batch is used.
        key: Consumed for the tangent.

    Returns:
        [] bool.

    References:
        Paper 7.1; the observation is ours.
    """
    if uses_factors(error_fn, "auto"):
        num_outputs = check_problem(error_fn, params, batches).shape[1]
        if error_fn.output_basis(num_outputs).shape[1] < num_outputs:
            return jnp.asarray(True)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    tangent = [
        jax.random.normal(k, np.shape(leaf), jnp.result_type(leaf))
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return _class_sums_vanish(
        as_pytree(error_fn),
        params,
        split_batches(batches)[0],
        jax.tree.unflatten(tree, tangent),
    )


@jax.jit
def _class_sums_vanish(
    error_fn: ErrorFn, params: PyTree, batch: PyTree, tangent: PyTree
) -> jax.Array:
    # J u as the transpose of the pullback, which custom VJPs have and JVPs lack.
    error, pullback = jax.vjp(lambda p: error_fn(p, batch), params)
    moved = jax.linear_transpose(lambda u: pullback(u)[0], error)(tangent)[0]
    tolerance = 100 * jnp.finfo(moved.dtype).eps * jnp.max(jnp.abs(moved))
    return jnp.max(jnp.abs(jnp.sum(moved, axis=1))) <= tolerance
