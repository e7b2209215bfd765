"""How J of a problem comes: which leaves have factors, checked once.

Factors see one example at a time, and rest on the walk of a jaxpr. One check serves
both: for a random u, ``J_l^T u`` from the factors is compared, leaf by leaf, with the
gradient of the user's function on the whole batch. A coupling of the examples, a use
that was missed and a wrong rule all show there. It is made once for each structure; in
a caller's `jit`, where there are no values, on random arrays of the same shapes. Where
the program itself does not prove that examples are independent (see `independence`),
they are compared at every new set of values.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import Seen, all_finite, is_traced
from grsd_jax._batches import split_batches
from grsd_jax._checks import check_not_explicit
from grsd_jax._typing import PyTree
from grsd_jax.jacobian.blocks import LeafTangents, count_strays, leaf_tangents
from grsd_jax.jacobian.independence import what_may_mix
from grsd_jax.jacobian.raised import RaisedErrorFn
from grsd_jax.jacobian.tracing import Program, largest_eps, walk
from grsd_jax.objective import Objective, evaluate
from grsd_jax.parameter_blocks import parameter_paths
from grsd_jax.problem import Point

#: Outputs C of an example up to which J comes as factors. They take C backward passes
#: and a basis ``[C, C]``; a block of fewer than C / 4 columns is cheaper without them.
_MOST_OUTPUTS = 2048

#: Batches that are looked at: a coupling may show in some of them alone.
_MOST_BATCHES = 4

#: Why an error has no jaxpr of one example.
_NOT_ALONE, _CLOSES = "cannot be traced for one example", "closes over traced arrays"

#: How many roundings of the largest leaf's gradient another leaf's may be off by.
_CANCELED = 30

#: How many times a change of the last digits two orders of the same sums may differ.
_MOST_NOISE = 10

#: What has XLA compile fast, by backend.
_HASTY = {
    "cpu": {"xla_backend_optimization_level": 0},
    "gpu": {"xla_gpu_autotune_level": 0},
}

#: The rounding of single precision.
_SINGLE = float(jnp.finfo(jnp.float32).eps)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The factors of J of a problem; compared by identity, so that it can be static.

    Attributes:
        program: The walked error of one example.
        reasons: Why a leaf is differentiated plainly, by its position.
    """

    program: Program
    reasons: dict[int, str]

    @property
    def plain(self) -> frozenset[int]:
        """The leaves that are differentiated plainly."""
        return frozenset(self.reasons)


class Verdict(NamedTuple):
    """What is known of a problem's structure.

    Attributes:
        plan: How J comes as factors, None where it is differentiated plainly.
        coupled: Whether the error of an example depends on the other examples; None
            where that was not asked.
        reason: Why there is no plan.
    """

    plan: Plan | None
    coupled: bool | None
    reason: str = ""


def plan_of(point: Point) -> Plan | None:
    """Returns how J of a problem comes as factors, None if plainly."""
    return verdict_of(point).plan


def stray_rows(point: Point) -> jax.Array:
    """Counts how often rows are read that a table of the network does not have.

    Those where JAX leaves undefined what is read; all batches together, [] int32. Only
    whole rows are looked at, and none where J comes plainly.
    """
    plan = plan_of(point)
    if plan is None or all(m.kind != "lookup" for m in plan.program.meetings):
        return jnp.int32(0)
    counts = [
        _stray_rows(point.error_fn, point.params, batch, plan=plan)
        for batch in point.parts
    ]
    return sum(counts, jnp.int32(0))


@partial(jax.jit, static_argnames="plan")
def _stray_rows(
    error_fn: Objective, params: PyTree, batch: PyTree, *, plan: Plan
) -> jax.Array:
    return count_strays(plan.program, error_fn, params, batch)


def are_coupled(point: Point) -> bool:
    """Whether the error of an example depends on the other examples of its batch.

    An error that cannot be evaluated for one example counts as coupled. One that closes
    over traced arrays cannot be checked: it is taken to be independent, with a warning.
    """
    coupled = verdict_of(point).coupled
    if coupled is not None:
        return coupled
    key = _key(point)
    if key[1] == _CLOSES:
        _warn(f"the error {_CLOSES}; its examples are taken to be independent")
        return False
    if key[1]:
        return True
    if key not in _COUPLED:
        compared = _compared(point, key, _values(point))
        if compared is None:
            return False
        _remember(_COUPLED, key, compared)
        _note_first(point, key, coupled=compared)
    elif not _COUPLED[key] and _couple_now(point, key):
        _remember(_COUPLED, key, value=True)
    return _COUPLED[key]


def check_independent(point: Point) -> None:
    """Raises ValueError if the examples of a problem are coupled."""
    reason = verdict_of(point).reason
    if reason.startswith(_NOT_ALONE):
        raise ValueError(
            "problem: expected an error that can be evaluated for any number of "
            f"examples, got one that {reason}; kernel_matmat and the Lanczos solver "
            "can take it."
        )
    if are_coupled(point):
        raise ValueError(
            "problem: expected an error whose examples are independent, got one whose "
            "examples are coupled (is the network in training mode: BatchNorm, "
            "dropout?) or depend on how many there are; kernel_matmat and the Lanczos "
            "solver can take it."
        )


def verdict_of(point: Point) -> Verdict:
    """Returns what is known of a problem, checked once for its structure."""
    check_not_explicit(point.batches)
    if point.error.shape[1] > _MOST_OUTPUTS:
        return Verdict(None, None, f"{point.error.shape[1]} outputs an example")
    key = _key(point)
    if key not in _VERDICTS:
        verdict, settled = _verdict(point)
        if not settled:
            return verdict
        _remember(_VERDICTS, key, verdict)
        _note_first(point, key, coupled=verdict.coupled)
    elif _VERDICTS[key].coupled is False and _couple_now(point, key):
        _remember(_VERDICTS, key, _COUPLED_VERDICT)
    return _VERDICTS[key]


_COUPLED_VERDICT = Verdict(None, coupled=True, reason="the examples are coupled")

#: What was found, by jaxpr and shapes; the oldest is forgotten.
_VERDICTS: dict[Any, Verdict] = {}
_COUPLED: dict[Any, bool] = {}
_MAY_MIX: dict[Any, str] = {}
_COMPARISONS: dict[Any, Callable[[Any], tuple[Any, Any]]] = {}
_MOST_REMEMBERED = 64

#: The values at which the examples were compared.
_SEEN = Seen()


def _data(point: Point) -> PyTree:
    return point.error_fn, point.params, point.batches


def _couple_now(point: Point, key: Any) -> bool:
    """Whether a program that may mix its examples does so at the values at hand.

    Asked once for each set of values, by one gradient and its sum over the examples.
    """
    data = _data(point)
    if is_traced(data) or _SEEN.knows(key, data):
        return False
    compared = _compared(point, key, _held(point)) if _may_mix(point, key) else False
    _SEEN.note(key, data)
    return bool(compared)


def _note_first(point: Point, key: Any, *, coupled: bool | None) -> None:
    """Notes the first values, and reads the program, so that later ones trace nothing.

    Nothing is read of a program whose examples are known to be coupled.
    """
    if coupled is False and not is_traced(_data(point)):
        _may_mix(point, key)
    _SEEN.note(key, _data(point))


def _may_mix(point: Point, key: Any) -> str:
    if key not in _MAY_MIX:
        _remember(_MAY_MIX, key, _what_may_mix(point))
    return _MAY_MIX[key]


def _what_may_mix(point: Point) -> str:
    """Returns what in the derivative of a batch may mix its examples, "" if nothing."""
    held = (point.error_fn, point.params, point.params)
    held = jax.tree.map(_placeless, held)
    num_held, batch = len(jax.tree.leaves(held)), point.batch_shapes
    sizes = [jax.tree.map(partial(_resized, by), batch) for by in (1, 2)]
    try:
        whole, larger = (_moved.trace(*held, size).jaxpr for size in sizes)
        one = _moved_alone.trace(*held, jax.tree.map(_first, batch)).jaxpr
        return what_may_mix(whole, larger, one, num_held, point.error.shape[0])
    except Exception as error:  # jaxprs are JAX's own affair, and change
        return f"its program could not be read: {error!r}"


@jax.jit
def _moved(
    error_fn: Objective, params: PyTree, direction: PyTree, batch: PyTree
) -> jax.Array:
    """Computes ``J d`` of a batch."""
    return jax.jvp(lambda p: error_fn(p, batch), (params,), (direction,))[1]


@jax.jit
def _moved_alone(
    error_fn: Objective, params: PyTree, direction: PyTree, example: PyTree
) -> jax.Array:
    batch = jax.tree.map(lambda leaf: leaf[None], example)
    return jax.jvp(lambda p: error_fn(p, batch), (params,), (direction,))[1]


def _resized(by: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the shape of so many times as many examples."""
    return leaf.update(shape=(by * leaf.shape[0], *leaf.shape[1:]))


def _first(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the shape of one example."""
    return leaf.update(shape=leaf.shape[1:])


def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if key not in memory and len(memory) >= _MOST_REMEMBERED:
        del memory[next(iter(memory))]
    memory[key] = value


def _key(point: Point) -> Any:
    """Returns what a problem has in common with others of its structure."""
    leaves, tree = jax.tree.flatten((point.error_fn, point.params, point.batches))
    shapes = tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)
    closed, reason = _closed(point)
    return closed, reason, tree, shapes


def _closed(point: Point) -> tuple[Any, str]:
    """Returns the jaxpr of the error of one example, or None and why there is none."""
    example = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[2:], jnp.result_type(leaf)),
        point.batches,
    )
    held = jax.tree.map(_placeless, (point.error_fn, point.params))
    args = (*held, example)
    try:
        closed = _error_of_one.trace(*args).jaxpr  # cached by JAX
    except Exception as error:  # a function may run on N examples, but not on one
        return None, f"{_NOT_ALONE}: {error!r}"
    if len(closed.in_avals) != len(jax.tree.leaves(args)):
        return None, _CLOSES
    return closed, ""


def _placeless(leaf: Any) -> Any:
    """Returns the shape of an array: where it lies would stay in the jaxpr."""
    if not isinstance(leaf, jax.Array):
        return leaf
    weak = getattr(leaf, "weak_type", False)  # keys have none
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)


@jax.jit
def _error_of_one(error_fn: Objective, params: PyTree, example: PyTree) -> jax.Array:
    return error_fn(params, jax.tree.map(lambda leaf: leaf[None], example))


def _verdict(point: Point) -> tuple[Verdict, bool]:
    """Returns what walk and check find, and whether that is settled."""
    closed, reason = _closed(point)
    if closed is None:
        return Verdict(None, None, reason), True
    try:
        program = _walked(point, closed)
        if len(program.refused) == len(jax.tree.leaves(point.params)):
            return Verdict(None, None, _listed(program.refused)), True
        return _checked(point, Plan(program, dict(program.refused)))
    except Warning:  # a caller's filter that raises it
        raise
    except Exception as error:  # jaxprs are JAX's own affair, and change
        reason = f"the jaxpr of the error could not be walked: {error!r}"
        _warn(f"{reason}; every parameter leaf is differentiated plainly")
        return Verdict(None, None, reason), True


def _walked(point: Point, closed: Any) -> Program:
    num_state = len(jax.tree.leaves(point.error_fn))
    return walk(closed, num_state, len(jax.tree.leaves(point.params)))


def _listed(reasons: dict[int, str]) -> str:
    return "; ".join(dict.fromkeys(reasons.values()))


class _Comparison(NamedTuple):
    """What the factors show beside `jax.vjp`.

    Attributes:
        settled: Whether any gradient was finite and not zero.
        wrong: The leaves that differ.
        coupled: Whether the examples alone differ as well.
        strays: For leaves that are looked up at a row which they do not have, its index
            and the number of rows.
    """

    settled: bool
    wrong: set[int]
    coupled: bool
    strays: dict[int, tuple[int, int]]


def _checked(point: Point, plan: Plan) -> tuple[Verdict, bool]:
    """Returns the plan without the leaves whose factors fail, and whether settled."""
    settled, wrong, coupled, strays = _beside_vjp(
        point, plan, _rounding(plan.program.eps, point)
    )
    if strays and _are_given(point):  # else they are of random indices
        _warn_of(strays, point)
    sharp = None if coupled else _sharp(point, plan.program.eps)
    if sharp is not None:
        program = _walked(*sharp)
        raised = Plan(program, plan.reasons | program.refused)
        rounding = _rounding(program.eps, sharp[0])
        _, more, coupled, _ = _beside_vjp(sharp[0], raised, rounding)
        wrong |= more
    if coupled:
        _warn("the examples of the error are coupled; products are taken plainly")
        return _COUPLED_VERDICT, True
    if not wrong:
        return Verdict(plan, coupled=False if settled else None), settled
    paths = ["/".join(path) for path in parameter_paths(point.params)]
    named = ", ".join(paths[leaf] for leaf in sorted(wrong))
    _warn(
        f"the factors of {named} do not agree with jax.vjp; "
        "these parameter leaves are differentiated plainly, through the network"
    )
    reasons = {**plan.reasons, **dict.fromkeys(wrong, "factors disagree with jax.vjp")}
    if len(reasons) == len(paths):
        return Verdict(None, coupled=False, reason=_listed(reasons)), True
    return Verdict(Plan(plan.program, reasons), coupled=False), True


def _beside_vjp(point: Point, plan: Plan, rounding: float) -> _Comparison:
    """Compares ``J_l^T u`` from the factors with `jax.vjp`."""
    settled, wrong, strays = False, set[int](), dict[int, tuple[int, int]]()
    sets = _values(point)
    run = _compiled(_tangents, sets[0], plan=plan)
    for values in sets:
        found, wanted = run(values)
        strays |= {
            leaf: (int(row), int(size))
            for leaf, (some, row, size) in found.strays.items()
            if some
        }
        differing = _disagreeing(found, wanted, rounding)
        if differing is None:  # not finite: says nothing of the structure
            continue
        settled = True
        if not differing:
            continue
        noise = _noise(run(_nudged(values))[1], wanted)
        alone = _compiled(_tangents_alone, values)(values)
        if _differing(alone, wanted, rounding, noise=noise):
            return _Comparison(settled, wrong, coupled=True, strays=strays)
        wrong |= set(_disagreeing(found, wanted, rounding, noise) or ())
    return _Comparison(settled, wrong, coupled=False, strays=strays)


def _warn_of(strays: dict[int, tuple[int, int]], point: Point) -> None:
    """Warns of tables that are read at rows which they do not have."""
    for leaf, (row, size) in strays.items():
        path = "/".join(parameter_paths(point.params)[leaf])
        _warn(
            f"a table from {path} is read at rows that it does not have, such as {row} "
            f"of {size}; what JAX gives there is undefined, and so is what is measured",
            stacklevel=7,
        )


def _disagreeing(
    found: LeafTangents,
    wanted: list[Any],
    rounding: float,
    noise: Sequence[float] | None = None,
) -> list[int] | None:
    """Returns the leaves whose ``J^T u``, or its norm, is not that of `jax.vjp`."""
    differing = _differing(found.tangents, wanted, rounding, noise=noise)
    if differing == []:
        norms = [None if s is None else np.sqrt(np.abs(s)) for s in found.squares]
        expected = [np.linalg.norm(np.asarray(leaf, float)) for leaf in wanted]
        dtypes = [np.asarray(leaf).dtype for leaf in wanted]
        differing = _differing(norms, expected, rounding, dtypes, noise)
    return differing


def _nudged(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the values with the last digits of the parameters changed."""
    rng = np.random.default_rng(2)

    def nudge(leaf: Any) -> Any:
        if not _is_floating(leaf):
            return leaf
        eps = float(jnp.finfo(leaf.dtype).eps)
        factors = 1 + 2 * eps * rng.choice((-1, 1), leaf.shape)
        return leaf * jnp.asarray(factors, leaf.dtype)

    error_fn, params, *rest = values
    with jax.ensure_compile_time_eval():
        return (error_fn, jax.tree.map(nudge, params), *rest)


def _noise(nudged: Sequence[Any], wanted: Sequence[Any]) -> list[float]:
    """Returns how far rounding moves each leaf's gradient, 0 where that is unknown.

    Where a unit is saturated its slope is what is left of 1 - 1, and a gradient behind
    it has few digits.
    """
    norms = (
        float(np.linalg.norm(np.asarray(a, float) - np.asarray(b, float)))
        for a, b in zip(nudged, wanted, strict=True)
    )
    return [_MOST_NOISE * norm if np.isfinite(norm) else 0.0 for norm in norms]


def _sharp(point: Point, eps: float) -> tuple[Point, Any] | None:
    """Returns a problem with its half precision raised, and its jaxpr.

    None if no number is rounded to half precision, or it cannot be raised.
    """
    if max(eps, float(jnp.finfo(point.error.dtype).eps)) <= _SINGLE:
        return None
    error_fn, params = RaisedErrorFn.of(point.error_fn, point.params)
    try:
        error = evaluate.eval_shape(error_fn, params, point.batch_shapes)
    except Exception:  # jaxprs are JAX's own affair, and change
        return None
    raised = dataclasses.replace(point, error_fn=error_fn, params=params, error=error)
    closed, _ = _closed(raised)
    return None if closed is None else (raised, closed)


def _compared(point: Point, key: Any, sets: list[tuple[Any, ...]]) -> bool | None:
    """Whether the gradient of the whole batch differs from that of its examples.

    None if nothing is finite, which says nothing of the structure.
    """
    eps = largest_eps(key[0])
    sharp = _sharp(point, eps)
    if sharp is not None:
        point, closed = sharp
        eps = largest_eps(closed)
        sets = [(*RaisedErrorFn.of(fn, p), *rest) for fn, p, *rest in sets]
    rounding = _rounding(eps, point)
    arrays = [x for x in jax.tree.leaves(sets[0]) if isinstance(x, jax.Array)]
    placed = (key, *(array.sharding for array in arrays))
    if placed not in _COMPARISONS:
        _remember(_COMPARISONS, placed, _compiled(_tangents_both, sets[0]))
    compare = _COMPARISONS[placed]
    found = [_apart(compare, each, rounding) for each in sets]
    if any(found):
        _warn("the examples of the error are coupled")
        return True
    return None if all(differing is None for differing in found) else False


def _apart(
    compare: Callable[[Any], tuple[Any, Any]], values: tuple[Any, ...], rounding: float
) -> list[int] | None:
    """Returns the leaves whose gradient is not that of the examples alone."""
    alone, wanted = compare(values)
    differing = _differing(alone, wanted, rounding)
    if not differing:
        return differing
    noise = _noise(compare(_nudged(values))[1], wanted)
    return _differing(alone, wanted, rounding, noise=noise)


def _compiled(fn: Any, values: tuple[Any, ...], **static: Any) -> Callable[..., Any]:
    """Returns a jitted function that runs also while something else is being traced.

    Without XLA's costly optimizations, since it is hardly run again: on a CPU those of
    the code, on a GPU its trials of kernels.
    """
    arrays = [leaf for leaf in jax.tree.leaves(values) if isinstance(leaf, jax.Array)]
    if any(len(array.sharding.device_set) > 1 for array in arrays):
        return lambda values: jax.device_get(fn(*values, **static))  # places them
    options = _HASTY.get(jax.default_backend())
    compiled = fn.lower(*values, **static).compile(compiler_options=options)
    return lambda values: jax.device_get(compiled(*values))


def _values(point: Point) -> list[tuple[Any, ...]]:
    """Returns sets of error function, params, one batch, and factors of a random u.

    The arrays themselves, with every batch up to a few, and others near them with the
    signs of the parameters turned, since a gate that is shut or a head of zeros would
    hide what is behind it. If they are traced or not finite, random ones of the same
    shapes.
    """
    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():
        first, *others = _held(point)
        held = first[:3]
        if not _are_given(point):
            sets = [jax.tree.map(partial(_random_like, rng), held) for _ in range(2)]
            return [(*each, *first[3:]) for each in sets]
        params = jax.tree.map(partial(_near, rng, sign=-1.0), point.params)
        varied = jax.tree.map(partial(_near, rng, sign=1.0), held[2])
        return [first, (point.error_fn, params, varied, *first[3:]), *others]


def _are_given(point: Point) -> bool:
    """Whether the first values looked at are those of the problem, not random ones."""
    with jax.ensure_compile_time_eval():
        held = _held(point)[0][:3]
        numbers = [x for x in jax.tree.leaves(held) if _is_floating(x)]
        return not is_traced(held) and bool(all_finite(numbers))


def _held(point: Point) -> list[tuple[Any, ...]]:
    """Returns the values at hand, with every batch up to a few, and factors of u."""
    with jax.ensure_compile_time_eval():
        ends = _ends(point)
        batches = split_batches(point.batches, _MOST_BATCHES)
    return [(point.error_fn, point.params, batch, *ends) for batch in batches]


def _ends(point: Point) -> list[np.ndarray]:
    """Returns two factors ``[C, 1]`` and ``[N, 1, 1]`` of a random u."""
    rng = np.random.default_rng(1)
    num_examples, num_outputs = point.error.shape
    shapes = ((num_outputs, 1), (num_examples, 1, 1))
    return [rng.normal(size=s).astype(point.error.dtype) for s in shapes]


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _near(rng: np.random.Generator, leaf: Any, *, sign: float) -> Any:
    """Returns an array near ``sign`` times the given one; other types as they are.

    By NumPy, since JAX would compile five operations for every shape. An array that
    lies on several devices stays with JAX.
    """
    if not _is_floating(leaf) or not leaf.size:
        return leaf
    spread = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
    xp: Any = jnp if spread else np
    values = leaf if spread else np.asarray(leaf, np.float64)
    noise = xp.asarray(rng.normal(size=leaf.shape), values.dtype)
    size = xp.sqrt(xp.mean(xp.square(values)))
    near = sign * values + xp.where(size > 0, 0.3 * size, 0.1) * noise
    return near.astype(jnp.result_type(leaf))


def _random_like(rng: np.random.Generator, leaf: Any) -> Any:
    """Returns values for which most networks are finite and far from constant."""
    shape, dtype = np.shape(leaf), jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        key = jax.random.key(0, impl=jax.random.key_impl(leaf))
        return jnp.broadcast_to(key, shape)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return rng.integers(0, 2, shape).astype(dtype)  # as indices, inside any table
    if len(shape) < 2:  # scales, biases, variances
        return rng.uniform(0.5, 1.5, shape).astype(dtype)
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(dtype)


@partial(jax.jit, static_argnames="plan")
def _tangents(
    error_fn: Objective,
    params: PyTree,
    batch: PyTree,
    column: jax.Array,
    weights: jax.Array,
    *,
    plan: Plan,
) -> tuple[LeafTangents, list[jax.Array]]:
    """Returns ``J_l^T u`` of all leaves by the factors, and by `jax.vjp`."""
    found = leaf_tangents(
        plan.program, plan.plain, error_fn, params, batch, column, weights
    )
    return found, _tangents_together(error_fn, params, batch, column, weights)


@jax.jit
def _tangents_together(
    error_fn: Objective,
    params: PyTree,
    batch: PyTree,
    column: jax.Array,
    weights: jax.Array,
) -> list[jax.Array]:
    """Returns ``J_l^T u`` of all leaves by `jax.vjp` of the whole batch."""
    error, pullback = jax.vjp(lambda p: error_fn(p, batch), params)
    seed = (weights[:, 0] * column.T).astype(error.dtype)
    return jax.tree.leaves(pullback(seed)[0])


@jax.jit
def _tangents_alone(
    error_fn: Objective,
    params: PyTree,
    batch: PyTree,
    column: jax.Array,
    weights: jax.Array,
) -> list[jax.Array]:
    """Returns ``J_l^T u`` of all leaves by `jax.grad`, each example alone."""

    def one(p: PyTree, example: PyTree, weight: jax.Array) -> jax.Array:
        error = error_fn(p, jax.tree.map(lambda leaf: leaf[None], example))
        return jnp.sum(error * weight * column.T)

    def total(p: PyTree) -> jax.Array:
        return jnp.sum(jax.vmap(one, in_axes=(None, 0, 0))(p, batch, weights))

    return jax.tree.leaves(jax.grad(total)(params))


@jax.jit
def _tangents_both(*values: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    return _tangents_alone(*values), _tangents_together(*values)


def _differing(
    found: Sequence[Any],
    wanted: Sequence[Any],
    tolerance: float,
    dtypes: Sequence[Any] | None = None,
    noise: Sequence[float] | None = None,
) -> list[int] | None:
    """Returns the leaves that differ beyond rounding, of the program and of the leaf.

    None if one is not finite or all are zero, which says nothing. A small gradient may
    be what is left of large terms, so that its rounding is counted in those of the
    largest leaf.
    """
    largest = [np.max(np.abs(np.asarray(leaf, float)), initial=0) for leaf in wanted]
    if not np.all(np.isfinite(largest)):
        return None
    dtypes = [np.asarray(leaf).dtype for leaf in wanted] if dtypes is None else dtypes
    floor = _CANCELED * tolerance * max(largest, default=0.0)
    wrong = []
    for leaf, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a is None:
            continue
        apart = np.max(np.abs(np.asarray(a, float) - np.asarray(b, float)), initial=0)
        own = max(tolerance, float(jnp.finfo(dtypes[leaf]).eps) ** 0.5)
        allowed = 0.0 if noise is None else noise[leaf]
        if not apart <= own * (largest[leaf] + floor) + allowed:
            wrong.append(leaf)
    return wrong if wrong or any(largest) else None


def _rounding(eps: float, point: Point) -> float:
    """Returns what two orders of the same sums may differ by: half of the digits."""
    eps = max(eps, float(jnp.finfo(point.error.dtype).eps))
    if jax.default_backend() != "cpu":
        eps = max(eps, 2.0**-10)  # the default precision of products
    return eps**0.5


def _warn(message: str, stacklevel: int = 6) -> None:
    warnings.warn(f"grsd_jax: {message}.", RuntimeWarning, stacklevel=stacklevel)
