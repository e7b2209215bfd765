"""What `Problem.explain` says: how J comes for every parameter leaf, and its cost."""

import dataclasses
from collections.abc import Sequence

import jax

from grsd_jax._memory import tree_bytes
from grsd_jax._typing import PyTree
from grsd_jax.jacobian.autodiff import linearize
from grsd_jax.jacobian.factored import product_blocks
from grsd_jax.jacobian.factors import Composite, Factor, product_operations
from grsd_jax.jacobian.plan import Plan, verdict_of
from grsd_jax.jacobian.tracing import Program, Use
from grsd_jax.problem import Point
from grsd_jax.results import Result, result
from grsd_jax.results.text import MISSING

#: What a leaf that meets activations in one way is called.
_NAMES = {"local": "rows", "entry": "rows"}

_UNITS = ("", "k", "M", "G", "T", "P")


@result()
@dataclasses.dataclass(frozen=True)
class LeafForm(Result):
    """How J comes for one leaf, an array of the parameters.

    Attributes:
        path: The leaf's path.
        how: ``"outer"`` (inputs and deltas of products and convolutions), ``"lookup"``
            (of a table's rows), ``"elementwise"`` or ``"rows"`` (its rows are held),
            ``"composite"`` (several of these, or a weight computed from the leaf),
            ``"unused"``, or ``"plain"`` (differentiated through the network).
        why: Where the leaf meets activations, or why it has no factors.
        bytes: Held for products, for all batches; 0 if plain.
        flops: Floating-point operations that one column of a product ``M V`` takes for
            this leaf, all batches together. A product of plain leaves passes through
            the network once for all of them, so each has those of the whole pass, or
            None where the compiler does not tell them.
    """

    path: str
    how: str
    why: str
    bytes: int
    flops: int | None


@result()
@dataclasses.dataclass(frozen=True)
class Explanation(Result):
    """How J comes for every parameter leaf; prints as a table.

    Attributes:
        rows: A `LeafForm` for every leaf, in the order of the tree.
        coupled: Whether the examples are coupled, so that there are no factors; None
            if that was not checked.
    """

    rows: tuple[LeafForm, ...]
    coupled: bool | None

    @property
    def num_leaves(self) -> int:
        """The number of leaves."""
        return len(self.rows)

    @property
    def num_factored(self) -> int:
        """The number of leaves that are not differentiated through the network."""
        return sum(row.how != "plain" for row in self.rows)

    @property
    def bytes(self) -> int:
        """The bytes held of all factors."""
        return sum(row.bytes for row in self.rows)

    @property
    def flops(self) -> int | None:
        """The operations of one column of a product, the plain pass counted once.

        None if those of a leaf are not known.
        """
        total, plain = 0, 0
        for row in self.rows:
            if row.flops is None:
                return None
            if row.how == "plain":
                plain = row.flops
            else:
                total += row.flops
        return total + plain

    def _headline(self) -> list[tuple[str, str]]:
        total = f"{self.num_factored} of {self.num_leaves} leaves factored"
        sizes = f"{_short(self.bytes)} bytes, {_short(self.flops)} flops a column"
        leaves = [(row.path, f"{row.how}: {row.why}") for row in self.rows]
        return [("all", f"{total}, {sizes}"), *leaves]

    def __str__(self) -> str:
        """Returns the table, one line a leaf, and the totals."""
        head = ("leaf", "how", "bytes", "flops", "why")
        total = f"{self.num_factored} of {self.num_leaves} leaves factored"
        lines = [
            (row.path, row.how, _short(row.bytes), _short(row.flops), row.why)
            for row in self.rows
        ]
        lines = [head, *lines, (total, "", _short(self.bytes), _short(self.flops), "")]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(_line(line, widths) for line in lines)


def explain_point(point: Point) -> Explanation:
    """Returns how J of a problem comes, see `grsd_jax.Problem.explain`."""
    verdict = verdict_of(point)
    leaves = jax.tree_util.tree_leaves_with_path(point.params)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves
    ]
    plan = verdict.plan
    reasons = dict.fromkeys(range(len(paths)), verdict.reason)
    blocks: Sequence[Factor | None] = [None] * len(paths)
    if plan is not None:
        reasons = plan.reasons
        blocks = _block_shapes(point, plan)
    passes = _plain_operations(point) if any(b is None for b in blocks) else None
    rows = []
    for leaf, (path, block) in enumerate(zip(paths, blocks, strict=True)):
        if plan is None or block is None:
            rows.append(LeafForm(path, "plain", reasons[leaf], 0, passes))
            continue
        how, why = _form(plan.program, leaf, paths)
        how = "composite" if isinstance(block, Composite) else how
        size = tree_bytes(block) * point.num_batches
        flops = product_operations(block) * point.num_batches
        rows.append(LeafForm(path, how, why, size, flops))
    return Explanation(tuple(rows), verdict.coupled)


def _block_shapes(point: Point, plan: Plan) -> list[Factor | None]:
    """Returns the shapes of the blocks that products take."""
    once = point.copies == 1
    blocks, _ = product_blocks.eval_shape(
        point.error_fn, point.params, point.parts[0], plan=plan, multiplied=once
    )
    return blocks


def _form(program: Program, leaf: int, paths: Sequence[str]) -> tuple[str, str]:
    """Returns how a leaf comes, and where it meets activations."""
    uses = [use for use in program.uses if leaf in use.weight.leaves]
    if not uses:
        return "unused", "no output depends on it"
    kinds = {program.meetings[use.meeting].kind for use in uses}
    computed = [use for use in uses if use.weight.moves is None]
    where = dict.fromkeys(_place(program, use) for use in uses)
    why = ", ".join(where)
    if computed:
        others = frozenset[int]().union(*(use.weight.leaves for use in computed))
        names = [paths[other] for other in sorted(others - {leaf})]
        source = f"it and {', '.join(names)}" if names else "it"
        why += f", of what is computed from {source}"
    names = {_NAMES.get(kind, kind) for kind in kinds}
    return (names.pop() if len(names) == 1 else "rows"), why


def _place(program: Program, use: Use) -> str:
    """Returns the name of the equation of a use."""
    meeting = program.meetings[use.meeting]
    name = "as it is" if meeting.equation is None else meeting.equation.primitive.name
    if meeting.loops:
        name += f" in a scan of {' x '.join(map(str, meeting.loops))}"
    return name


def _plain_operations(point: Point) -> int | None:
    """Returns the operations of one column of a plain product, None if unknown."""

    def product(params: PyTree, batch: PyTree, column: jax.Array) -> jax.Array:
        return linearize(point.error_fn, params, batch).multiply(column)

    shape = (*point.error.shape, 1)
    column = jax.ShapeDtypeStruct(shape, point.error.dtype)
    lowered = jax.jit(product).lower(point.params, point.batch_shapes, column)
    count = (lowered.cost_analysis() or {}).get("flops")
    return None if count is None else int(count) * point.num_batches


def _short(count: int | None) -> str:
    """Returns a count in at most five characters, ``n/a`` if it is not known."""
    if count is None:
        return MISSING
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g}{_UNITS[unit]}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    path, how, size, flops, why = cells
    left = f"{path:<{widths[0]}}  {how:<{widths[1]}}"
    right = f"{size:>{widths[2]}}  {flops:>{widths[3]}}"
    return f"{left}  {right}  {why}".rstrip()
