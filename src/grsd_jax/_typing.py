"""Types shared by the numerical modules, and the letters used everywhere.

``K`` fixed mini-batches, ``N`` examples each, ``C`` outputs per example, ``n = K N C``
the error dimension (``N C`` under the ``mean`` reduction), ``P`` parameters, ``b``
Lanczos block width, ``m`` Lanczos steps, ``r = m b`` Krylov dimension, ``S`` shells,
``L`` depth blocks.

Vectors of the error space are columns of ``[n, b]`` arrays, example-major and
class-minor; under ``stack`` the batch index is the slowest of the three.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

PyTree = Any

#: ``outputs_fn(params, batch) -> [N, ...]``.
OutputsFn = Callable[[PyTree, PyTree], jax.Array]

#: ``error_fn(params, batch) -> [N, C]``.
ErrorFn = Callable[[PyTree, PyTree], jax.Array]

#: ``loss_fn(params, batch) -> []``, the mean loss of one batch.
LossFn = Callable[[PyTree, PyTree], jax.Array]

#: ``matmat([n, b]) -> [n, b]``, a symmetric positive semidefinite operator.
Matmat = Callable[[jax.Array], jax.Array]

Reduction = Literal["mean", "stack"]
DerivativeMethod = Literal["exact", "finite_difference"]
