"""From ``results.json`` and ``arrays.npz`` to the tables, and to what figures show.

A result holds one measurement (under ``model``) or those of several networks and
protocols (under ``models`` and ``protocols``). A number that was undefined or masked is
null there, and None here.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import (
    MODELS,
    PROTOCOLS,
    TITLES,
    UserError,
)
from grsd_jax.experiments.common.quantities import edge_residual
from grsd_jax.experiments.common.tables import (
    MISSING,
    Legend,
    finite,
    number,
    with_legend,
)
from grsd_jax.results import percent
from grsd_jax.shells import (
    CouplingMeasurement,
    PowerLawFit,
    ShellCoupling,
    Shells,
    ToeplitzDiagnostics,
    Window,
    centre_toeplitz_residual,
)
from grsd_jax.shells.diagnostics import caveats

#: Names of the arrays of one measurement, and their shapes in r modes and S shells.
_SHAPES = {
    "values": "r",
    "resolved": "r",
    "coupling_diagonal": "r",
    "shell_edges": "S+1",
    "shell_centers": "S",
    "shell_counts": "S",
    "literal": "SS",
    "literal_mask": "SS",
    "renormalized": "SS",
    "renormalized_mask": "SS",
}


class Entry(NamedTuple):
    """One measurement in a result.

    Attributes:
        name: The network, such as ``"resnet18"``.
        protocol: Where its weights came from, such as ``"shared"``.
        fields: The entry of ``results.json``.
    """

    name: str
    protocol: str
    fields: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The network as it is written in print."""
        return TITLES.get(self.name, self.name)

    @property
    def label(self) -> str:
        """The network and, where there is a choice, the protocol."""
        if self.name == "plainnet18":
            return f"{self.title} ({self.protocol})"
        return self.title

    def number(self, *path: str) -> float | None:
        """Returns the number at the end of a path of keys, None if there is none."""
        value: Any = self.fields
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return finite(value)

    def windows(self, kind: str) -> list[tuple[float, float]]:
        """Returns position and residual of each window of a coupling, NaN for null.

        Args:
            kind: ``"literal"`` or ``"renormalized"``.
        """
        value = self.fields.get("toeplitz")
        value = value.get(kind) if isinstance(value, Mapping) else None
        value = value.get("windows") if isinstance(value, Mapping) else None
        found = []
        for window in value if isinstance(value, list) else []:
            if not isinstance(window, Mapping):
                continue
            position = finite(window.get("position"))
            residual = finite(window.get("residual"))
            if position is not None:
                found.append((position, math.nan if residual is None else residual))
        return sorted(found)


#: What a results.json says of the arrays.npz that was written with it.
ARRAYS_CHECKSUM = "arrays_sha256"


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads a result and its arrays, and verifies that they were written together.

    Args:
        folder: The folder of ``results.json`` and ``arrays.npz``.

    Returns:
        The contents of both.

    Raises:
        UserError: If one is missing or damaged, or they are not of one measurement.
    """
    results = records.read_json(folder / "results.json")
    arrays = records.read_npz(folder / "arrays.npz")
    told = results.pop(ARRAYS_CHECKSUM, None)  # none in older files
    if told not in (None, files.checksum(folder / "arrays.npz")):
        wanted = "the arrays that results.json was written with"
        raise files.cannot_read(folder / "arrays.npz", wanted, "others")
    return results, arrays


def list_entries(results: Any) -> list[Entry]:
    """Lists the measurements of a result, each of them once.

    Args:
        results: The contents of ``results.json``, of one measurement or of several.

    Returns:
        The networks in the order of `MODELS`, each in that of `PROTOCOLS`, however the
        file is sorted.

    Raises:
        UserError: If there is no measurement in it.
    """
    found = []
    results = results if isinstance(results, Mapping) else {}
    one = results.get("model")
    if isinstance(one, Mapping):
        found.append((str(one.get("name", one.get("arrays", "model"))), one))
    models, protocols = results.get("models"), results.get("protocols")
    if isinstance(models, Mapping):
        found += models.items()
    if isinstance(protocols, Mapping):
        found += [("plainnet18", fields) for fields in protocols.values()]
    entries: dict[tuple[str, str], Entry] = {}
    for name, fields in found:
        if isinstance(fields, Mapping):
            protocol = str(fields.get("protocol", "n/a"))
            entries.setdefault((name, protocol), Entry(name, protocol, fields))
    if not entries:
        raise UserError(
            "results.json: expected measurements under 'model' or 'models', got none."
        )
    return sorted(
        entries.values(),
        key=lambda x: (_place(x.name, MODELS), _place(x.protocol, PROTOCOLS)),
    )


def _place(name: str, order: Sequence[str]) -> int:
    """Returns where a name stands in an order, after all others if it does not."""
    return order.index(name) if name in order else len(order)


def entry_arrays(
    entry: Entry, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Picks the arrays of one measurement, and checks that they fit together.

    Args:
        entry: The measurement.
        arrays: The contents of ``arrays.npz``.

    Returns:
        The arrays by name, without their prefix.

    Raises:
        UserError: If one is missing, is not numeric, or its shape does not fit.
    """
    prefix = entry.fields.get("arrays", entry.name)
    sizes: dict[str, int] = {}
    found = {}
    for name, letters in _SHAPES.items():
        key = f"{prefix}/{name}"
        if key not in arrays:
            raise UserError(f"arrays.npz: expected an array {key!r}, got none.")
        array = np.asarray(arrays[key])
        if array.dtype.kind not in "biuf":
            raise UserError(
                f"arrays.npz: expected real numbers in {key!r}, got {array.dtype}."
            )
        axes = [letters] if letters == "S+1" else list(letters)
        if array.ndim == len(axes):
            for axis, size in zip(axes, array.shape, strict=True):
                letter = axis[0]
                sizes.setdefault(letter, size - (axis == "S+1"))
        expected = [sizes.get(axis[0], 0) + (axis == "S+1") for axis in axes]
        if list(array.shape) != expected:
            raise UserError(
                f"arrays.npz: expected {key!r} of shape {expected}, "
                f"got {list(array.shape)}."
            )
        found[name] = array
    return found


def as_measurement(
    entry: Entry, arrays: Mapping[str, np.ndarray]
) -> CouplingMeasurement:
    """Returns a measurement as far as the files hold it, for the public figures.

    The eigenvectors, and the coupling off its diagonal, are not in the files: the
    measurement has no vectors, and a diagonal coupling.

    Args:
        entry: The measurement.
        arrays: The contents of ``arrays.npz``.

    Returns:
        The measurement, with NaN for what is null.

    Raises:
        UserError: As for `entry_arrays`.
    """
    found = entry_arrays(entry, arrays)
    values, nan = found["values"], np.float32(np.nan)
    labels = ("solver", "jacobian", "derivative", "reduction")
    fields: dict[str, Any] = {
        "values": values,
        "vectors": np.zeros((0, values.size), values.dtype),
        "residuals": np.full_like(values, nan),
        "resolved": found["resolved"].astype(bool),
        "coupling": np.diag(found["coupling_diagonal"]),
        "shells": _shells(found),
        "literal": _diagnostics(entry, found, "literal"),
        "renormalized": _diagnostics(entry, found, "renormalized"),
        "diagonal_fit": _fit(entry, "diagonal_fit"),
        "shell_fit": _fit(entry, "shell_fit"),
        "secant_disagreement": nan,
        "operator_disagreement": nan,
        "unresolved_share": np.float64(_or_nan(entry.number("unresolved_share"))),
        "num_missing": np.int32(entry.number("num_missing") or 0),
        "num_misfits": np.int32(0),  # refused outside of jit
        "window": Window(num_pairs=int(entry.number("num_pairs") or values.size)),
        "finite": np.bool_(True),
        "complete": np.bool_(_is_complete(entry)),
        "coupled": None,
        **{label: str(entry.fields.get(label)) for label in labels},
    }
    return CouplingMeasurement(**fields)


def _shells(arrays: Mapping[str, Any]) -> Shells:
    return Shells(
        edges=arrays["shell_edges"],
        centers=arrays["shell_centers"],
        index=jnp.full(arrays["values"].shape, -1, jnp.int32),
        counts=arrays["shell_counts"],
    )


def _diagnostics(
    entry: Entry, arrays: Mapping[str, Any], kind: str
) -> ToeplitzDiagnostics:
    """Returns the diagnostics; windows that are null have no degree of freedom."""
    windows = np.array([residual for _, residual in entry.windows(kind)])
    residual = entry.number("toeplitz", kind, "residual")
    fields: dict[str, Any] = {
        "coupling": ShellCoupling(arrays[kind], arrays[f"{kind}_mask"].astype(bool)),
        "residual": np.float64(_or_nan(residual)),
        "windows": windows,
        "degrees_of_freedom": np.isfinite(windows).astype(np.int32),
    }
    return ToeplitzDiagnostics(**fields)


def _fit(entry: Entry, name: str) -> PowerLawFit:
    fields: dict[str, Any] = {}
    for field in PowerLawFit._fields:
        fields[field] = np.float64(_or_nan(entry.number(name, field)))
    return PowerLawFit(**fields | {"interval": None})


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


#: What the columns of the tables mean.
LEGEND: Legend = (
    "Pairs: those that are resolved, of those asked for; energy: their share of |e|^2.",
    "Slope: of |Mdot_ii| against lambda_i, in logarithms, with its 95% interval. The "
    "theory predicts 1. Shell slope: of the coupling within shells, by their centers.",
    "Residual: distance of the shell coupling to the nearest that is constant along "
    "each diagonal, as a share of its size: 0 if it is log-shift invariant, at most 1.",
    "Edge -> center: the same of windows of shells, at the ends and in the middle.",
    "Secant disagreement: of the exact derivative and a finite difference, as a share.",
)


def format_table(results: Any) -> str:
    """Writes a result as two aligned tables, valid as Markdown too.

    The first says what was measured, the resolved pairs out of those asked for and
    their share of the error's energy, and how the diagonal scales: the slope of
    ``|Mdot_ii|`` against ``lambda_i`` with its standard error and bootstrap interval,
    and the slope over shells. The second holds the Toeplitz residuals: of the whole
    coupling, and from the edges (`edge_residual`) to the center
    (`centre_toeplitz_residual`).

    Args:
        results: The contents of ``results.json``, of one measurement or of several.

    Returns:
        The tables, one row for each network and protocol, with their legend and the
        caveats below them; what is undefined is "n/a".

    Raises:
        UserError: If there is no measurement in ``results``.
    """
    tables = with_legend(result_tables(results), LEGEND)
    return "\n\n".join([tables, *result_caveats(results)])


def result_caveats(results: Any) -> list[str]:
    """Returns what a reader of the tables must know of single rows.

    Args:
        results: The contents of ``results.json``, of one measurement or of several.

    Returns:
        Sentences, each after the name of its row.

    Raises:
        UserError: If there is no measurement in ``results``.
    """
    return [
        f"{entry.label}: {sentence}"
        for entry in list_entries(results)
        for sentence in caveats(
            num_missing=int(entry.number("num_missing") or 0),
            unresolved_share=entry.number("unresolved_share") or 0.0,
            complete=_is_complete(entry),
        )
    ]


def _is_complete(entry: Entry) -> bool:
    """Returns whether copies are not known to be missing; older files do not say."""
    return entry.fields.get("complete") is not False


def result_tables(results: Any) -> list[list[list[str]]]:
    """Returns the cells of the tables of `format_table`, headings first.

    Args:
        results: The contents of ``results.json``, of one measurement or of several.

    Returns:
        The tables, as rows of cells.

    Raises:
        UserError: If there is no measurement in ``results``.
    """
    entries = list_entries(results)
    return [
        [["model", "protocol", *headings], *rows]
        for headings, rows in (
            (_SCALING, [[e.title, e.protocol, *_scaling(e)] for e in entries]),
            (_TOEPLITZ, [[e.title, e.protocol, *_toeplitz(e)] for e in entries]),
        )
    ]


_SCALING = (
    "accuracy",
    "n",
    "pairs",
    "energy",
    "solver",
    "slope +- stderr [interval]",
    "R^2",
    "shell slope",
)


def _scaling(entry: Entry) -> list[str]:
    """The cells of the first table."""
    resolved, pairs = entry.number("num_resolved"), entry.number("num_pairs")
    outside = entry.number("unresolved_share")
    return [
        number(entry.number("test_accuracy")),
        number(entry.number("n"), ".0f"),
        f"{number(resolved, '.0f')}/{number(pairs, '.0f')}",
        MISSING if outside is None else percent(1 - outside),
        str(entry.fields.get("solver") or MISSING),
        _slope(entry, "diagonal_fit", interval=True),
        number(entry.number("diagonal_fit", "r_squared")),
        _slope(entry, "shell_fit", interval=False),
    ]


_TOEPLITZ = (
    "literal residual",
    "edge -> center",
    "renormalized residual",
    "edge -> center",
    "secant disagreement",
)


def _toeplitz(entry: Entry) -> list[str]:
    """The cells of the second table."""
    cells = []
    for kind in ("literal", "renormalized"):
        residuals = np.array([residual for _, residual in entry.windows(kind)])
        edge, center = edge_residual(residuals), centre_toeplitz_residual(residuals)
        cells.append(number(entry.number("toeplitz", kind, "residual")))
        cells.append(f"{number(edge)} -> {number(center)}")
    return [*cells, number(entry.number("secant_disagreement"), ".2g")]


def _slope(entry: Entry, fit: str, *, interval: bool) -> str:
    slope = entry.number(fit, "exponent")
    if slope is None:
        return MISSING
    text = f"{number(slope)} +- {number(entry.number(fit, 'exponent_stderr'))}"
    if not interval:
        return text
    ends = _interval(entry, fit)
    return f"{text} [{number(ends[0])}, {number(ends[1])}]"


def _interval(entry: Entry, fit: str) -> tuple[float | None, float | None]:
    fields = entry.fields.get(fit)
    ends = fields.get("interval") if isinstance(fields, dict) else None
    if not isinstance(ends, list) or len(ends) != 2:
        return None, None
    return finite(ends[0]), finite(ends[1])
