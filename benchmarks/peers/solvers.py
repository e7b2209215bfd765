"""Eigensolvers of others on the operator of this package, its columns counted.

Each solver's settings are searched first, on the dense matrix of the reference: of
those that reach the accuracy the one with the fewest columns is run; should it miss by
rounding on the operator itself, the next one. The search is not timed, so that no
solver loses by a tolerance that means something else to it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jax.experimental.sparse.linalg import lobpcg_standard
from matfree import decomp, eig

from comparison.agreement import pair_error
from comparison.grid import NUM_PAIRS, PAIR_TOLERANCE
from comparison.harness import Case, Job
from comparison.inputs import load
from peers.counting import CountedOperator
from peers.grsd import linearized
from peers.jax_tools import counters

Pairs = tuple[np.ndarray, np.ndarray]
Setting = dict[str, Any]


class Solver(NamedTuple):
    """A solver and the settings to choose from.

    Attributes:
        solve: ``solve(operator, size, largest, **setting) -> (values, vectors)``.
        settings: From ``size``, the settings to try.
        ascending: Whether they come in order of columns, so that the first that
            reaches the accuracy is the best.
    """

    solve: Callable[..., Pairs]
    settings: Callable[[int], list[Setting]]
    ascending: bool


def make_case(job: Job) -> Case:
    """Returns the case of a solver."""
    loaded = load(job.spec, job.inputs)
    with np.load(job.folder / "reference.npz") as file:
        kernel = file["kernel"]
    solver = _SOLVERS[job.variant]
    largest = float(np.linalg.eigvalsh(kernel)[-1])
    settings = _search(solver, kernel, largest)
    kernels: list[Any] = []

    def matmat(block: np.ndarray) -> np.ndarray:
        return np.asarray(kernels[-1].matmat(jnp.asarray(block, jnp.float32)))

    operator = CountedOperator(matmat)  # one object, so that loops compile once

    def prepare() -> None:
        kernels[:] = [linearized(loaded)]
        for width in _WIDTHS[job.variant]:  # compiles
            matmat(job.inputs["block"][:, :width])

    def solve() -> Pairs:
        if not settings:
            raise RuntimeError("no setting of the solver reaches the accuracy")
        operator.reset()
        return solver.solve(operator, job.spec.size, largest, **settings[0])

    confirmed: list[bool] = []

    def run(_: None) -> Pairs:
        pairs = solve()
        while not confirmed:  # in the first call alone
            if _error(pairs, kernel) <= PAIR_TOLERANCE:
                confirmed.append(True)
            else:
                settings.pop(0)
                pairs = solve()
        return pairs

    return Case(
        prepare=prepare,
        run=run,
        warm=job.variant in ("eigsh", "lobpcg"),
        arrays=_leading,
        details=lambda: {
            **operator.counts,
            "setting": ", ".join(f"{k} {v:.3g}" for k, v in settings[0].items()),
        },
        **counters(job.device),
    )


def _leading(pairs: Pairs) -> dict[str, np.ndarray]:
    values, vectors = pairs
    order = np.argsort(values)[::-1][:NUM_PAIRS]
    return {"values": values[order], "vectors": vectors[:, order]}


def _error(pairs: Pairs, kernel: np.ndarray) -> float:
    """Returns the error by which pairs are judged."""
    return pair_error(**_leading(pairs), kernel=kernel)


def _search(solver: Solver, kernel: np.ndarray, largest: float) -> list[Setting]:
    """Returns the settings that reach the accuracy, those of few columns first.

    Where settings come in order of columns, the search ends at the first that does, and
    those after it are returned untried.
    """
    matrix = kernel.astype(np.float32)
    operator = CountedOperator(lambda block: matrix @ np.asarray(block))
    settings, found = solver.settings(len(matrix)), []
    for index, setting in enumerate(settings):
        operator.reset()
        pairs = solver.solve(operator, len(matrix), largest, **setting)
        if _error(pairs, kernel) <= PAIR_TOLERANCE:
            if solver.ascending:
                return settings[index:]
            found.append((operator.counts["columns"], index, setting))
    return [setting for _, _, setting in sorted(found)]


def _start(size: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(size, width)).astype(np.float32)


def _eigsh(
    operator: CountedOperator, size: int, largest: float, *, ncv: int, tol: float
) -> Pairs:
    del largest
    linear = scipy.sparse.linalg.LinearOperator(
        (size, size),
        matvec=lambda v: operator(v.reshape(-1, 1)).reshape(-1),
        dtype=np.float32,
    )
    return scipy.sparse.linalg.eigsh(
        linear, k=NUM_PAIRS, which="LA", ncv=ncv, tol=tol, v0=_start(size, 1)[:, 0]
    )


def _lobpcg(
    operator: CountedOperator, size: int, largest: float, *, width: int, tol: float
) -> Pairs:
    linear = scipy.sparse.linalg.LinearOperator(
        (size, size), matvec=operator, matmat=operator, dtype=np.float32
    )
    return scipy.sparse.linalg.lobpcg(
        linear, _start(size, width), tol=tol * largest, maxiter=200, largest=True
    )


@functools.cache
def _from_jax(operator: CountedOperator) -> Callable[[jax.Array], jax.Array]:
    """Lets a loop of JAX call the operator on the host.

    Inside the loop XLA would run the convolutions on its slow path on CPU. One function
    for each operator, as both solvers compile for the function that they are given.
    """

    def call(block: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(block.shape, jnp.float32)
        return jax.pure_callback(lambda v: operator(np.asarray(v)), shape, block)

    return call


def _matfree(
    operator: CountedOperator, size: int, largest: float, *, depth: int
) -> Pairs:
    del largest
    values, vectors = _matfree_program(operator, depth)(_start(size, 1)[:, 0])
    return np.asarray(values), np.asarray(vectors).T


@functools.cache
def _matfree_program(operator: CountedOperator, depth: int) -> Callable[..., Any]:
    call = _from_jax(operator)
    decompose = eig.eigh_partial(decomp.tridiag_sym(depth))
    return jax.jit(lambda start: decompose(lambda v: call(v[:, None])[:, 0], start))


def _jax_lobpcg(
    operator: CountedOperator, size: int, largest: float, *, tol: float
) -> Pairs:
    del largest
    start = jnp.asarray(_start(size, NUM_PAIRS))
    values, vectors, _ = lobpcg_standard(_from_jax(operator), start, m=200, tol=tol)
    return np.asarray(values), np.asarray(vectors)


def _eigsh_settings(size: int) -> list[Setting]:
    widths = sorted({min(ncv, size - 1) for ncv in (30, 41, 50, 60, 80, 100, 120, 160)})
    tolerances = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
    return [{"ncv": ncv, "tol": tol} for ncv in widths for tol in tolerances]


def _lobpcg_settings(size: int) -> list[Setting]:
    widths = [width for width in (20, 25, 30) if 5 * width < size]
    return [{"width": w, "tol": t * PAIR_TOLERANCE} for w in widths for t in (0.8, 0.4)]


def _matfree_settings(size: int) -> list[Setting]:
    depths = [round(30 * 1.05**power) for power in range(80)]
    return [{"depth": depth} for depth in depths if depth <= size]


def _jax_lobpcg_settings(size: int) -> list[Setting]:
    scale = PAIR_TOLERANCE / (20 * size)
    return [{"tol": scale * factor} for factor in (100, 30, 10, 5, 2, 1, 0.5, 0.2)]


_SOLVERS = {
    "eigsh": Solver(_eigsh, _eigsh_settings, ascending=False),
    "lobpcg": Solver(_lobpcg, _lobpcg_settings, ascending=False),
    "matfree": Solver(_matfree, _matfree_settings, ascending=True),
    "jax_lobpcg": Solver(_jax_lobpcg, _jax_lobpcg_settings, ascending=True),
}

#: Widths of the products that a solver asks for, compiled before it is timed.
_WIDTHS = {
    "eigsh": (1,),
    "lobpcg": (20,),
    "matfree": (1,),
    "jax_lobpcg": (NUM_PAIRS, 3 * NUM_PAIRS),
}
