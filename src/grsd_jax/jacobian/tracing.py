"""Where the parameters of an error meet its activations, found by walking its jaxpr.

The error of one example is traced once. What depends on parameters and constants alone
is a *weight*; an equation that takes a weight and an activation is a *meeting*. The
walk lists the meetings. The program can then be run again with a perturbation added to
the result of every meeting, or for its weights alone.

Calls are entered only where a parameter enters them, so that the custom derivatives of
activations stay. The body of a `lax.scan` is entered as well: its meetings happen once
a step. Parameters that reach an activation in another way (a `cond`, a `while`, a call
with a custom derivative) are named with the reason.

This is the one module that imports `jax.extend.core`, about which JAX makes no promise
of compatibility; `independence`, `batch_size`, `raised` and `adjoint` read jaxprs by
its functions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

#: Calls that are the same program when they are written out.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")

#: Calls with a derivative of their own.
_CUSTOM = ("custom_jvp_call", "custom_vjp_call")

#: Equations that move the entries of their first operand and compute nothing.
MOVES = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "dynamic_slice",
    "expand_dims",
    "optimization_barrier",
    "reshape",
    "rev",
    "slice",
    "split",
    "squeeze",
    "transpose",
    "unstack",
)

_ELEMENTWISE = ("mul", "add", "add_any", "sub", "div")


class Move(NamedTuple):
    """A step from a parameter leaf to what an equation sees of it.

    Attributes:
        equation: An equation that moves entries, or None for a scan, whose body sees
            one entry of the leading axis at a time.
        output: Which of its results is meant.
    """

    equation: Any
    output: int


@dataclasses.dataclass(frozen=True)
class Weight:
    """A value that depends on parameters and constants alone.

    Attributes:
        leaves: The parameter leaves it depends on, by position; none for a constant
            that changes with the steps of a scan.
        moves: How it is moved out of its one leaf; None if it is computed.
        scanned: For each scan around it, outermost first, whether it is another one in
            each step.
    """

    leaves: frozenset[int]
    moves: tuple[Move, ...] | None
    scanned: tuple[bool, ...]


class Use(NamedTuple):
    """A weight that is one operand of a meeting.

    Attributes:
        meeting: Which meeting.
        operand: Which of its operands.
        weight: The weight.
    """

    meeting: int
    operand: int
    weight: Weight


@dataclasses.dataclass(frozen=True, eq=False)
class Meeting:
    """An equation whose operands are weights and activations.

    Attributes:
        equation: The equation; None where a weight becomes an activation as it is (the
            first carry of a scan, a result of its body, an output).
        kind: ``"outer"``, ``"lookup"``, ``"elementwise"``, ``"local"`` or ``"entry"``.
        recorded: The operands that are recorded.
        shape: Shape of the result in one example.
        dtype: Its dtype.
        loops: The lengths of the scans around it, outermost first.
    """

    equation: Any
    kind: str
    recorded: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    loops: tuple[int, ...]


_ACTIVATION = "activation"

#: A weight, an activation, or a constant.
_Value = Weight | str | None


@dataclasses.dataclass(eq=False)
class _Frame:
    """A jaxpr with what is done at each of its equations.

    Attributes:
        jaxpr: The jaxpr, open.
        consts: Its constants.
        steps: For each equation a `_Plain`, `_Call` or `_Loop`.
        entries: Uses of results that are weights, by position.
    """

    jaxpr: Any
    consts: Sequence[Any]
    steps: list[Any] = dataclasses.field(default_factory=list)
    entries: dict[int, int] = dataclasses.field(default_factory=dict)


class _Plain(NamedTuple):
    """An equation that is run as it is, and may be a meeting."""

    active: bool
    meeting: int | None = None


class _Call(NamedTuple):
    """A call that is entered."""

    frame: _Frame


class _Loop(NamedTuple):
    """A scan whose body is entered.

    Attributes:
        frame: Its body.
        num_consts: How many operands are the same in every step.
        num_carry: How many are carried.
        entries: Uses of first carries that are weights, by position in the carry.
        meetings: The meetings inside.
        uses: For every use inside whether its weight changes with the step.
    """

    frame: _Frame
    num_consts: int
    num_carry: int
    entries: dict[int, int]
    meetings: tuple[int, ...]
    uses: dict[int, bool]


@dataclasses.dataclass(eq=False)
class Program:
    """The error of one example, walked.

    Attributes:
        meetings: The meetings, in the order of the program.
        uses: Their weights.
        refused: The leaves that must be differentiated plainly, each with the reason.
        eps: The largest rounding of any floating number in it.
        custom: Whether a parameter enters a call with a derivative of its own.
    """

    meetings: list[Meeting]
    uses: list[Use]
    refused: dict[int, str]
    eps: float
    _frame: _Frame
    custom: bool = False

    def perturbed(
        self,
        state: Sequence[Any],
        leaves: Sequence[Any],
        example: Sequence[Any],
        perturbations: Sequence[Any],
    ) -> tuple[jax.Array, list[tuple[Any, ...]]]:
        """Runs the program with something added to the result of every meeting.

        Args:
            state: Leaves of what the error function holds.
            leaves: The parameter leaves.
            example: Leaves of one example.
            perturbations: For each meeting, ``[*loops, *shape]``.

        Returns:
            The error ``[1, C]``, and for each meeting its recorded operands, with the
            axes of the loops in front.
        """
        records: dict[int, tuple[Any, ...]] = {}
        run = _Perturbed(dict(enumerate(perturbations)), records, self)
        (error,) = _run(self._frame, [*state, *leaves, *example], run)
        return error, [records[index] for index in range(len(self.meetings))]

    def weights(
        self, state: Sequence[Any], leaves: Sequence[Any], uses: Sequence[int]
    ) -> list[Any]:
        """Computes weights from the parameters, each ``[*scanned loops, *shape]``.

        Args:
            state: Leaves of what the error function holds.
            leaves: The parameter leaves.
            uses: Which uses' weights.
        """
        found: dict[int, Any] = {}
        unknown = [None] * (len(self._frame.jaxpr.invars) - len(state) - len(leaves))
        _run(self._frame, [*state, *leaves, *unknown], _WeightsAlone(found, self))
        return [found[use] for use in uses]


def walk(closed: Any, num_state: int, num_leaves: int) -> Program:
    """Lists where the parameters of a traced error meet its activations.

    Args:
        closed: The jaxpr of ``(*state, *leaves, *example) -> error``.
        num_state: The number of its leading operands that are constants.
        num_leaves: The number of parameter leaves, which follow.

    Returns:
        The program.
    """
    frame = _Frame(*opened(closed))
    program = Program([], [], {}, largest_eps(closed), frame)
    num_inputs = len(program._frame.jaxpr.invars)
    ins: list[_Value] = [None] * num_state
    ins += [Weight(frozenset([i]), (), ()) for i in range(num_leaves)]
    ins += [_ACTIVATION] * (num_inputs - len(ins))
    walker = _Walk(program)
    walker.enter(program._frame, ins, (), leaving=True)
    for use in program.uses:
        if jnp.issubdtype(program.meetings[use.meeting].dtype, jnp.complexfloating):
            walker.refuse(use.weight.leaves, "meets activations in complex numbers")
    return program


class _Walk:
    """Goes through the equations once, and fills in frames, meetings and uses."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def enter(
        self,
        frame: _Frame,
        ins: Sequence[_Value],
        loops: tuple[int, ...],
        *,
        leaving: bool,
    ) -> list[_Value]:
        """Walks a jaxpr; its weights become activations if they are ``leaving``."""
        known: dict[Any, _Value] = dict(zip(frame.jaxpr.invars, ins, strict=True))

        def read(atom: Any) -> _Value:
            value = None if is_literal(atom) else known.get(atom)
            # Nothing depends on a weight without entries: a constant.
            return None if _is_weight(value) and not atom.aval.size else value

        for equation in frame.jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            step, outs = self.equation(equation, values, loops)
            frame.steps.append(step)
            known.update(zip(equation.outvars, outs, strict=True))
        outs = [read(atom) for atom in frame.jaxpr.outvars]
        if leaving:
            for index, value in enumerate(outs):
                if _is_weight(value):
                    aval = frame.jaxpr.outvars[index].aval
                    frame.entries[index] = self.entry(aval, value, loops)
        return outs

    def equation(
        self, equation: Any, values: list[_Value], loops: tuple[int, ...]
    ) -> tuple[Any, list[_Value]]:
        """Returns what is done at an equation, and what its results are."""
        weights = {i: v for i, v in enumerate(values) if _is_weight(v)}
        active = _ACTIVATION in values
        name = equation.primitive.name
        num_outs = len(equation.outvars)
        if not weights:
            still = None if active else _constant(values)
            return _Plain(active), [_ACTIVATION if active else still] * num_outs
        self.program.custom |= _is_custom(equation)
        if name in _CALLS and body_of(equation) is not None:
            frame = _Frame(*opened(body_of(equation)))
            return _Call(frame), self.enter(frame, values, loops, leaving=False)
        if not active and not _is_step_from_constant(equation, values):
            made = [_made(equation, values, k, loops) for k in range(num_outs)]
            return _Plain(active=False), [*made]
        if name == "scan" and equation.params["length"]:
            return self.loop(equation, values, loops), [_ACTIVATION] * num_outs
        if not any(out.aval.size for out in equation.outvars):
            return _Plain(active=True), [_ACTIVATION] * num_outs
        kind = _kind(equation, values)
        if kind is None:
            for weight in weights.values():
                self.refuse(weight.leaves, f"enters {name} together with activations")
            return _Plain(active=True), [_ACTIVATION] * num_outs
        recorded = _recorded(equation, kind, tuple(weights))
        meeting = self.meeting(
            equation, kind, recorded, equation.outvars[0].aval, loops
        )
        for operand, weight in weights.items():
            self.program.uses.append(Use(meeting, operand, weight))
        return _Plain(active=True, meeting=meeting), [_ACTIVATION]

    def loop(
        self, equation: Any, values: list[_Value], loops: tuple[int, ...]
    ) -> _Loop:
        """Enters the body of a scan."""
        length = equation.params["length"]
        num_consts, num_carry = scan_counts(equation)
        frame = _Frame(*opened(equation.params["jaxpr"]))
        entries = {}
        inner: list[_Value] = []
        for index, value in enumerate(values):
            carry = index - num_consts
            if 0 <= carry < num_carry:
                if _is_weight(value):
                    aval = equation.invars[index].aval
                    entries[carry] = self.entry(aval, value, loops)
                value = _ACTIVATION
            elif isinstance(value, Weight) or (value is None and carry >= 0):
                value = value or Weight(frozenset(), None, (False,) * len(loops))
                value = _inside(value, scanned=carry >= num_carry)
            inner.append(value)
        first = len(self.program.meetings), len(self.program.uses)
        self.enter(frame, inner, (*loops, length), leaving=True)
        meetings = tuple(range(first[0], len(self.program.meetings)))
        uses = {
            use: self.program.uses[use].weight.scanned[len(loops)]
            for use in range(first[1], len(self.program.uses))
        }
        return _Loop(frame, num_consts, num_carry, entries, meetings, uses)

    def entry(self, aval: Any, weight: Weight, loops: tuple[int, ...]) -> int:
        """Adds a place where a weight becomes an activation as it is."""
        meeting = self.meeting(None, "entry", (), aval, loops)
        self.program.uses.append(Use(meeting, 0, weight))
        return len(self.program.uses) - 1

    def meeting(
        self,
        equation: Any,
        kind: str,
        recorded: tuple[int, ...],
        aval: Any,
        loops: tuple[int, ...],
    ) -> int:
        """Adds a meeting and returns its index."""
        found = Meeting(equation, kind, recorded, tuple(aval.shape), aval.dtype, loops)
        self.program.meetings.append(found)
        return len(self.program.meetings) - 1

    def refuse(self, leaves: frozenset[int], reason: str) -> None:
        """Notes that leaves must be differentiated plainly."""
        for leaf in leaves:
            self.program.refused.setdefault(leaf, reason)


def _is_weight(value: _Value) -> TypeGuard[Weight]:
    """Whether a value depends on a parameter, and on no activation."""
    return isinstance(value, Weight) and bool(value.leaves)


def _constant(values: list[_Value]) -> _Value:
    """Returns what constants alone make: one that changes with the steps, or None."""
    changing = [value for value in values if isinstance(value, Weight)]
    if not changing:
        return None
    levels = zip(*(value.scanned for value in changing), strict=True)
    return Weight(frozenset(), None, tuple(any(level) for level in levels))


def _made(
    equation: Any, values: list[_Value], output: int, loops: tuple[int, ...]
) -> Weight:
    """Returns the weight that an equation without activations makes of weights."""
    weights = [value for value in values if isinstance(value, Weight)]
    leaves = frozenset[int]().union(*(weight.leaves for weight in weights))
    scanned = tuple(
        any(weight.scanned[level] for weight in weights) for level in range(len(loops))
    )
    first = values[0]
    moved = equation.primitive.name in MOVES and all(
        is_literal(atom) for atom in equation.invars[1:]
    )
    # An integer has no derivative, whatever it is made of and becomes.
    moved &= jnp.issubdtype(equation.outvars[output].aval.dtype, jnp.inexact)
    if not isinstance(first, Weight) or first.moves is None or not moved:
        return Weight(leaves, None, scanned)
    return Weight(leaves, (*first.moves, Move(equation, output)), scanned)


def _inside(weight: Weight, *, scanned: bool) -> Weight:
    """Returns a weight as the body of a scan sees it."""
    moves = weight.moves
    if scanned and moves is not None:
        moves = (*moves, Move(None, 0))
    return Weight(weight.leaves, moves, (*weight.scanned, scanned))


def scan_counts(equation: Any) -> tuple[int, int]:
    """Returns how many operands of a scan are constants, and how many are carried.

    From the axes of what goes in and out, since the names of the parameters that say so
    have changed with JAX: what is scanned has one axis more outside of the body.
    """
    body = opened(equation.params["jaxpr"])[0]

    def same(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    num_carry = same(equation.outvars, body.outvars)
    return same(equation.invars, body.invars) - num_carry, num_carry


def _is_step_from_constant(equation: Any, values: list[_Value]) -> bool:
    """Whether a product with a constant vector counts as one with an activation.

    The first step of an unrolled recurrence multiplies a constant state. It belongs to
    the later ones, whose products have the same form.
    """
    if equation.primitive.name != "dot_general":
        return False
    (contracted, batch) = equation.params["dimension_numbers"]
    constants = [i for i, value in enumerate(values) if not _is_weight(value)]
    if len(constants) != 1:
        return False
    index = constants[0]
    used = (*contracted[index], *batch[index])
    shape = equation.invars[index].aval.shape
    free = [size for axis, size in enumerate(shape) if axis not in used]
    return not batch[index] and int(np.prod(free)) == 1


def _kind(equation: Any, values: list[_Value]) -> str | None:
    """Returns the kind of a meeting, or None where there is none."""
    name = equation.primitive.name
    weights = [i for i, value in enumerate(values) if _is_weight(value)]
    if len(equation.outvars) != 1:
        return None
    if _has_body(equation):
        # Rows that take more memory than the deltas would be a gradient of the call by
        # its weights, example by example.
        size = sum(equation.invars[i].aval.size for i in weights)
        small = size <= equation.outvars[0].aval.size
        return "local" if small and name in _CUSTOM else None
    if name == "dot_general":
        return "outer"
    if name == "conv_general_dilated" and weights == [1]:
        return "outer" if equation.params["batch_group_count"] == 1 else "local"
    if name == "gather" and weights == [0] and _reads_rows(equation):
        return "lookup"
    if name in _ELEMENTWISE and (name != "div" or weights == [0]):
        return "elementwise"
    return "local"


def _recorded(equation: Any, kind: str, weights: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the operands without which the weight's part cannot be computed."""
    if kind == "elementwise" and equation.primitive.name not in ("mul", "div"):
        return ()
    if kind == "local":
        return tuple(range(len(equation.invars)))
    return tuple(i for i in range(len(equation.invars)) if i not in weights)


def _reads_rows(equation: Any) -> bool:
    """Whether a gather reads whole rows of a table."""
    numbers = equation.params["dimension_numbers"]
    table = equation.invars[0].aval.shape
    return (
        tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and not numbers.operand_batching_dims
        and tuple(equation.params["slice_sizes"][1:]) == tuple(table[1:])
    )


def is_literal(atom: Any) -> bool:
    """Whether an operand is a number of the program itself."""
    return isinstance(atom, core.Literal)


def is_call(equation: Any) -> bool:
    """Whether an equation calls one program, perhaps with a derivative of its own."""
    known = equation.primitive.name in (*_CALLS, *_CUSTOM)
    return known and body_of(equation) is not None


def body_of(equation: Any) -> Any:
    """Returns the jaxpr of a call, None if there is none."""
    for name in ("jaxpr", "call_jaxpr"):
        if name in equation.params:
            return equation.params[name]
    return None


def _has_body(equation: Any) -> bool:
    """Whether an equation holds a program of its own."""
    return bool(bodies(equation))


def bodies(equation: Any) -> list[Any]:
    """Returns the jaxprs among the parameters of an equation."""

    def programs(value: Any) -> list[Any]:
        if isinstance(value, list | tuple):
            return [found for part in value for found in programs(part)]
        is_program = hasattr(value, "eqns") or hasattr(value, "jaxpr")
        return [value] if is_program else []

    return [found for value in equation.params.values() for found in programs(value)]


def _is_custom(equation: Any) -> bool:
    """Whether an equation is or holds a call with a derivative of its own."""
    if equation.primitive.name in _CUSTOM:
        return True
    inner = [opened(body)[0] for body in bodies(equation)]
    return any(_is_custom(each) for jaxpr in inner for each in jaxpr.eqns)


def largest_eps(jaxpr: Any) -> float:
    """Returns the largest rounding of any floating number that a program computes."""
    jaxpr = opened(jaxpr)[0]
    rounding = [
        equation
        for equation in jaxpr.eqns
        if equation.primitive.name not in MOVES
        or equation.primitive.name == "convert_element_type"
    ]
    avals = [out.aval for equation in rounding for out in equation.outvars]
    dtypes = {aval.dtype for aval in avals if hasattr(aval, "dtype")}
    inexact = [each for each in dtypes if jnp.issubdtype(each, jnp.inexact)]
    largest = max((float(jnp.finfo(each).eps) for each in inexact), default=0.0)
    for equation in jaxpr.eqns:
        for body in bodies(equation):
            largest = max(largest, largest_eps(body))
    return largest


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Returns a jaxpr and its constants."""
    consts = getattr(jaxpr, "consts", ())
    return getattr(jaxpr, "jaxpr", jaxpr), consts


class _Perturbed:
    """Runs every equation, adds perturbations and keeps records."""

    def __init__(
        self,
        perturbations: Mapping[int, Any],
        records: dict[int, tuple[Any, ...]],
        program: Program,
    ) -> None:
        self.perturbations, self.records = perturbations, records
        self.program = program

    def equation(self, equation: Any, step: _Plain, values: list[Any]) -> list[Any]:
        outs = bind(equation, values)
        if step.meeting is None:
            return outs
        meeting = self.program.meetings[step.meeting]
        self.records[step.meeting] = tuple(values[i] for i in meeting.recorded)
        return [outs[0] + self.perturbations[step.meeting]]

    def entry(self, use: int, value: Any) -> Any:
        meeting = self.program.uses[use].meeting
        self.records[meeting] = ()
        return value + self.perturbations[meeting]

    def loop(self, equation: Any, step: _Loop, values: list[Any]) -> list[Any]:
        last = step.num_consts + step.num_carry
        consts, scanned = values[: step.num_consts], values[last:]
        carry = list(values[step.num_consts : last])
        for index, use in step.entries.items():
            carry[index] = self.entry(use, carry[index])

        def body(carry: Any, each: Any) -> Any:
            scanned, perturbations = each
            records: dict[int, tuple[Any, ...]] = {}
            inner = _Perturbed(perturbations, records, self.program)
            outs = _run(step.frame, [*consts, *carry, *scanned], inner)
            split = step.num_carry
            return outs[:split], (outs[split:], records)

        own = {index: self.perturbations[index] for index in step.meetings}
        params = equation.params
        carry, (outs, records) = jax.lax.scan(
            body,
            carry,
            (scanned, own),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params.get("unroll", 1),
        )
        self.records.update(records)
        return [*carry, *outs]


class _WeightsAlone:
    """Runs the equations without activations, and keeps the weights of the meetings."""

    def __init__(self, found: dict[int, Any], program: Program) -> None:
        self.found, self.program = found, program
        self.uses: dict[int, list[int]] = {}
        for index, use in enumerate(program.uses):
            self.uses.setdefault(use.meeting, []).append(index)

    def equation(self, equation: Any, step: _Plain, values: list[Any]) -> list[Any]:
        if step.meeting is not None:
            for use in self.uses[step.meeting]:
                self.found[use] = values[self.program.uses[use].operand]
        if step.active:
            return [None] * len(equation.outvars)
        return bind(equation, values)

    def entry(self, use: int, value: Any) -> Any:
        self.found[use] = value

    def loop(self, equation: Any, step: _Loop, values: list[Any]) -> list[Any]:
        last = step.num_consts + step.num_carry
        consts, scanned = values[: step.num_consts], values[last:]
        for index, use in step.entries.items():
            self.entry(use, values[step.num_consts + index])

        def body(scanned: list[Any]) -> dict[int, Any]:
            found: dict[int, Any] = {}
            unknown = [None] * step.num_carry
            inner = _WeightsAlone(found, self.program)
            _run(step.frame, [*consts, *unknown, *scanned], inner)
            return found

        if jax.tree.leaves(scanned):
            axes = {use: 0 if scanned else None for use, scanned in step.uses.items()}
            body = jax.vmap(body, out_axes=axes)
        self.found.update(body(scanned))
        return [None] * len(equation.outvars)


def _run(frame: _Frame, values: Sequence[Any], run: Any) -> list[Any]:
    """Runs a frame; ``run`` says how equations, loops and entries are run."""
    known: dict[Any, Any] = {}
    known.update(zip(frame.jaxpr.constvars, frame.consts, strict=True))
    known.update(zip(frame.jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else known[atom]

    for equation, step in zip(frame.jaxpr.eqns, frame.steps, strict=True):
        operands = [read(atom) for atom in equation.invars]
        if isinstance(step, _Call):
            outs = _run(step.frame, operands, run)
        elif isinstance(step, _Loop):
            outs = run.loop(equation, step, operands)
        else:
            outs = run.equation(equation, step, operands)
        known.update(zip(equation.outvars, outs, strict=True))
    outs = [read(atom) for atom in frame.jaxpr.outvars]
    return [
        run.entry(frame.entries[i], value) if i in frame.entries else value
        for i, value in enumerate(outs)
    ]


def bind(equation: Any, values: Sequence[Any], **changes: Any) -> list[Any]:
    """Runs one equation, with changes of its parameters."""
    found = equation.primitive.get_bind_params(equation.params | changes)
    # A dictionary since JAX 0.9.2, before that a pair with it.
    functions, params = found if isinstance(found, tuple) else ((), found)
    out = equation.primitive.bind(*functions, *values, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def run_jaxpr(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr."""
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*args)


def applied(equation: Any, values: Sequence[Any]) -> Any:
    """Returns the one result of an equation of a `Meeting`."""
    (out,) = bind(equation, values)
    return out


def entries_of(weight: Weight, shape: tuple[int, ...]) -> np.ndarray:
    """Returns which entry of its leaf each entry of a moved weight is.

    Args:
        weight: A weight whose moves are known.
        shape: The shape of its leaf.

    Returns:
        Positions in the flat leaf, ``[*scanned loops, *shape of the weight]``.
    """
    assert weight.moves is not None
    positions = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    with jax.ensure_compile_time_eval():
        return _moved(positions, weight.moves)


def _moved(positions: np.ndarray, moves: tuple[Move, ...]) -> np.ndarray:
    for index, (equation, output) in enumerate(moves):
        if equation is None:
            rest = moves[index + 1 :]
            return np.stack([_moved(part, rest) for part in positions])
        if equation.primitive.name == "convert_element_type":
            continue
        others = [atom.val for atom in equation.invars[1:]]
        positions = np.asarray(bind(equation, [positions, *others])[output])
    return positions


def is_injective(weight: Weight) -> bool:
    """Whether no entry of the leaf stands twice in a moved weight."""
    assert weight.moves is not None
    return all(
        equation is None
        or equation.primitive.name != "broadcast_in_dim"
        or equation.outvars[0].aval.size == equation.invars[0].aval.size
        for equation, _ in weight.moves
    )
