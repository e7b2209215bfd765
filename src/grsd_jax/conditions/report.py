"""The four conditions of the theory, measured along a training path in one call.

Conditions 1 to 3 make a shell description exist and stay stable; Condition 4 makes it
free of scale (paper 3.2, 5). Each is measured by a module of its own; here they are put
together and held against thresholds.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import divisor, magnitude
from grsd_jax._checks import check_at_least, check_key
from grsd_jax._memory import waits_for_memory
from grsd_jax._typing import PyTree
from grsd_jax.conditions.checks import (
    drift_check,
    growth_checks,
    incoherence_checks,
    invariance_checks,
    lipschitz_check,
    locality_checks,
    trusted,
)
from grsd_jax.conditions.incoherence import BlockCoherence, block_coherence
from grsd_jax.conditions.locality import (
    InfluenceProfile,
    distance_totals,
    influence_profile,
    smallest_band,
)
from grsd_jax.conditions.stability import (
    OperatorNorms,
    ProjectorDrift,
    ShellDrift,
    coupling_exponent,
    operator_norms,
    projector_drift,
    shell_drift,
)
from grsd_jax.conditions.verdicts import Thresholds, Verdict, check_thresholds
from grsd_jax.dynamics.fingerprint import fingerprint
from grsd_jax.kernel.derivative import (
    Derivative,
    gradient_flow_direction,
    usable_step,
)
from grsd_jax.objective import moving_part
from grsd_jax.parameter_blocks import ParameterBlocks
from grsd_jax.problem import Problem
from grsd_jax.results import NamedResult, result
from grsd_jax.results.text import MISSING, told_apart
from grsd_jax.shells.diagnostics import CouplingMeasurement
from grsd_jax.shells.measurement import Solver, measure_coupling
from grsd_jax.shells.options import Binning, Window
from grsd_jax.shells.toeplitz import centre_toeplitz_residual

#: Eigenvectors of the leading projector, whose drift is measured.
_NUM_LEADING = 8


class PathPoint(NamedTuple):
    """One point of a training path.

    Attributes:
        time: When, in steps or in any other unit; for the record.
        problem: The problem with the state of that time, the same batches at every
            point of a path.
        params: Parameters.
        direction: How training moves them; the gradient flow of the problem's loss if
            None.
    """

    time: float
    problem: Problem
    params: PyTree
    direction: PyTree | None = None


@result()
class Locality(NamedResult):
    """Condition 1.

    Attributes:
        times: Where on the path the influence was measured.
        profiles: The influence there.
        shares: ``[L]`` each, the share of the squared influence at each distance.
        bands: The smallest band at each time that holds the share of the thresholds.
        verdict: The widest band against its threshold.
    """

    times: list[float]
    profiles: list[InfluenceProfile]
    shares: list[jax.Array]
    bands: list[int]
    verdict: Verdict


@result()
class Incoherence(NamedResult):
    """Condition 2, at the first point of the path.

    Attributes:
        coherence: The overlap of every two blocks.
        flagged: ``(l, m, coherence)`` of the distant blocks that are too coherent.
        verdict: The tail sum and the largest distant coherence.
    """

    coherence: BlockCoherence
    flagged: list[tuple[int, int, float]]
    verdict: Verdict


@result()
class Stability(NamedResult):
    """Condition 3, along the whole path.

    Attributes:
        norms: ``|J|_op`` and ``|Jdot|_op`` at each point.
        leading_drift: Drift of the leading projector, from each point to the next.
        shell_drift: Drift of each shell's projector, from each point to the next.
        lipschitz: Of the root of the diagonal renormalized coupling, at each point.
        verdict: Growth of both norms, largest leading drift, largest exponent.
    """

    norms: list[OperatorNorms]
    leading_drift: list[ProjectorDrift]
    shell_drift: ShellDrift
    lipschitz: list[float]
    verdict: Verdict


@result()
class ShiftInvariance(NamedResult):
    """Condition 4, at each point; the verdict is that of the last.

    Attributes:
        measurements: The shell coupling at each point.
        central_residuals: The renormalized coupling's `centre_toeplitz_residual`, at
            each point.
        verdict: Residual, slope and R^2 at the last point.
    """

    measurements: list[CouplingMeasurement]
    central_residuals: list[float]
    verdict: Verdict


@result()
class ConditionReport(NamedResult):
    """All four conditions of one training path.

    Attributes:
        times: The T points.
        blocks: The partition of the parameters.
        condition1: Locality of the Jacobian's motion.
        condition2: Incoherence of the blocks at the first point.
        condition3: Stability along the path.
        condition4: Log-shift invariance along the path.
    """

    times: list[float]
    blocks: ParameterBlocks
    condition1: Locality
    condition2: Incoherence
    condition3: Stability
    condition4: ShiftInvariance

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """The verdicts by the names of the conditions."""
        return {
            "condition1": self.condition1.verdict,
            "condition2": self.condition2.verdict,
            "condition3": self.condition3.verdict,
            "condition4": self.condition4.verdict,
        }

    def _headline(self) -> list[tuple[str, str]]:
        rows = []
        for name, verdict in self.verdicts.items():
            checks = [("", str(check)) for check in verdict.checks]
            rows += [(name, verdict.outcome), *checks]
        return rows

    def _tables(self) -> dict[str, dict[str, list[Any]]]:
        pairs = [(n, check) for n, v in self.verdicts.items() for check in v.checks]
        checks = [check for _, check in pairs]
        sides = [told_apart([check.number, check.threshold]) for check in checks]
        return {
            "checks": {
                "condition": [name for name, _ in pairs],
                "check": [check.name for check in checks],
                "number": [
                    MISSING if math.isnan(check.number) else told
                    for check, (told, _) in zip(checks, sides, strict=True)
                ],
                "error": [check.error for check in checks],
                "threshold": [
                    f"{check.relation} {told}"
                    for check, (_, told) in zip(checks, sides, strict=True)
                ],
                "outcome": [check.outcome for check in checks],
                "of": [
                    MISSING if check.count is None else check.count for check in checks
                ],
            }
        }


@waits_for_memory("num_probes", "window.num_pairs", "batches")
def condition_report(
    points: Sequence[PathPoint],
    blocks: ParameterBlocks,
    *,
    key: jax.Array,
    thresholds: Thresholds = Thresholds(),
    solver: Solver = "auto",
    window: Window = Window(),
    shells: Binning = Binning(),
    num_probes: int | None = 16,
    progress: Callable[[str], None] | None = None,
) -> ConditionReport:
    """Measures all four conditions along a training path, with verdicts.

    Condition 1 at the first and the last point; Condition 2 at the first, which should
    be the initialization; Conditions 3 and 4 at all of them.

    Args:
        points: The path, in order of time. With a single point the growth and the drift
            of Condition 3 are NaN and their checks undecided.
        blocks: The partition of the parameters by depth.
        key: Consumed for probes, start vectors and bootstraps.
        thresholds: What the numbers are held against.
        solver: Of `measure_coupling`.
        window: Of `measure_coupling`.
        shells: Of `measure_coupling`.
        num_probes: Of `influence_profile`; None for the exact influence.
        progress: Called with a description of what comes next.

    Returns:
        A `ConditionReport`.

    Raises:
        ValueError: If there is no point, points are not in order, or differ in
            examples, targets or loss, a threshold is not a finite number >= 0 or a
            share above 1, a parameter is of less than single precision, or a shape,
            tree, dtype, leading axis, partition or option does not fit.
        MemoryError: If the device runs out of memory; it names what to lower.

    References:
        Paper 3.2, 5 and A.2; how each condition is made a number is ours.
    """
    check_at_least("len(points)", len(points), 1)
    check_key(key)
    check_thresholds(thresholds)
    _check_path(points)
    points = [_with_direction(point) for point in points]
    tell = progress or (lambda _: None)
    influence_key, coherence_key, *keys = jax.random.split(key, 4)
    ends = points if len(points) == 1 else [points[0], points[-1]]
    tell("condition 1: influence")
    locality = _locality(ends, blocks, influence_key, thresholds, num_probes)
    tell("condition 2: coherence")
    first = points[0]
    coherence = block_coherence(first.problem, first.params, blocks, key=coherence_key)
    norms, measurements = [], []
    for number, point in enumerate(points):
        tell(f"conditions 3 and 4: time {point.time:g}")
        where = (point.problem, point.params, point.direction)
        norms_key, coupling_key = (jax.random.fold_in(k, number) for k in keys)
        norms.append(operator_norms(*where, key=norms_key))
        measurements.append(
            measure_coupling(
                *where,
                key=coupling_key,
                solver=solver,
                window=window,
                shells=shells,
                derivative=Derivative(cross_checked=True),
            )
        )
    known = bool(jnp.isfinite(locality.profiles[0].influence).all())
    known = known and trusted(measurements[0])
    return ConditionReport(
        times=[point.time for point in points],
        blocks=blocks,
        condition1=locality,
        condition2=_incoherence(coherence, thresholds, known=known),
        condition3=_stability(norms, measurements, thresholds),
        condition4=_shift_invariance(measurements, thresholds),
    )


def _check_path(points: Sequence[PathPoint]) -> None:
    """Raises ValueError unless all points can be measured, and compared."""
    times = np.array([point.time for point in points], np.float64)
    if not np.all(times[1:] >= times[:-1]) or np.any(np.isnan(times)):
        raise ValueError(
            "points: expected times that do not fall, since growth is over the first "
            f"point, got {times.tolist()}."
        )
    first = None
    for point in points:
        usable_step(moving_part(point.params), None)  # as the cross-check does
        found = np.asarray(fingerprint(point.problem))
        first = found if first is None else first
        if np.any(found != first):
            raise ValueError(
                "points: expected the same examples and targets, in the same order, "
                f"and the same loss at every time, got others at {point.time}."
            )


def _with_direction(point: PathPoint) -> PathPoint:
    if point.direction is not None:
        return point
    return point._replace(
        direction=gradient_flow_direction(point.problem, point.params)
    )


def _locality(
    points: Sequence[PathPoint],
    blocks: ParameterBlocks,
    key: jax.Array,
    thresholds: Thresholds,
    num_probes: int | None,
) -> Locality:
    profiles = [
        influence_profile(
            point.problem,
            point.params,
            point.direction,
            blocks,
            key=jax.random.fold_in(key, number),
            num_probes=num_probes,
        )
        for number, point in enumerate(points)
    ]
    totals = [
        distance_totals(jnp.square(one / magnitude(one)))  # shares have no units
        for one in (profile.influence for profile in profiles)
    ]
    bands = [int(smallest_band(t, thresholds.influence_share)) for t in totals]
    return Locality(
        times=[point.time for point in points],
        profiles=profiles,
        shares=[total / divisor(jnp.sum(total)) for total in totals],
        bands=bands,
        verdict=Verdict(locality_checks(profiles, bands, thresholds)),
    )


def _incoherence(
    coherence: BlockCoherence, thresholds: Thresholds, *, known: bool
) -> Incoherence:
    """Judges the coherence, undefined if the network cannot be trusted there."""
    matrix = np.asarray(coherence.coherence)
    far = np.triu(matrix > thresholds.max_distant_coherence, max(thresholds.distant, 1))
    flagged = [(int(i), int(j), float(matrix[i, j])) for i, j in np.argwhere(far)]
    verdict = Verdict(incoherence_checks(coherence, thresholds, known=known))
    return Incoherence(coherence, flagged, verdict)


def _stability(
    norms: list[OperatorNorms],
    measurements: list[CouplingMeasurement],
    thresholds: Thresholds,
) -> Stability:
    leading = [
        projector_drift(a.vectors[:, :_NUM_LEADING], b.vectors[:, :_NUM_LEADING])
        for a, b in itertools.pairwise(measurements)
    ]
    lipschitz = [float(coupling_exponent(measured)) for measured in measurements]
    checks = (
        *growth_checks(norms, thresholds),
        drift_check(leading, measurements, _NUM_LEADING, thresholds),
        lipschitz_check(lipschitz, measurements, thresholds),
    )
    return Stability(
        norms, leading, shell_drift(measurements), lipschitz, Verdict(checks)
    )


def _shift_invariance(
    measurements: list[CouplingMeasurement], thresholds: Thresholds
) -> ShiftInvariance:
    central = [
        centre_toeplitz_residual(
            found.renormalized.windows, found.renormalized.degrees_of_freedom
        )
        for found in measurements
    ]
    checks = invariance_checks(central[-1], measurements[-1], thresholds)
    return ShiftInvariance(measurements, central, Verdict(checks))
