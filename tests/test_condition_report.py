"""The report of all four conditions: its numbers, its verdicts and what spoils them."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block_problems
from grsd_jax import (
    Binning,
    PathPoint,
    Problem,
    condition_report,
    gradient_flow_direction,
)
from grsd_jax.conditions import (
    Check,
    ConditionReport,
    InfluenceProfile,
    Thresholds,
    Verdict,
    block_coherence,
    distance_totals,
    partition_by_prefix,
    report,
    smallest_band,
)
from grsd_jax.conditions.checks import drift_check, locality_checks
from oracles import dense_kernel, network_problem

LENIENT = Thresholds(max_tail_sum=10.0)


def quick():
    """Returns options of a small report, with a key that is not used yet."""
    return {
        "key": jax.random.key(0),
        "solver": "dense",
        "shells": Binning(num_shells=5, window=3, num_bootstrap=0),
    }


@pytest.fixture(autouse=True, scope="module")
def _two_leading():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_NUM_LEADING", 2)
        yield


def path(problem, params, direction, times=(0.0, 0.1)):
    """Returns points along a straight line."""
    return [
        PathPoint(
            time,
            problem,
            jax.tree.map(lambda p, d, t=time: p + t * d, params, direction),
            direction,
        )
        for time in times
    ]


@pytest.fixture(scope="module")
def mlp():
    """Returns ``(problem, params, direction, blocks)``."""
    problem, params = network_problem("mlp", jnp.float32, reduction="mean")
    direction = gradient_flow_direction(problem, params)
    blocks = partition_by_prefix(params, {"in": ["Dense_0"], "out": ["Dense_1"]})
    return problem, params, direction, blocks


@pytest.fixture(scope="module")
def mlp_report(mlp):
    *point, blocks = mlp
    told = []
    points = path(*point, times=(0.0, 0.5, 1.0))
    return condition_report(points, blocks, progress=told.append, **quick()), told


def test_a_report_holds_every_condition_at_its_points(mlp_report):
    got, told = mlp_report
    assert got.times == [0.0, 0.5, 1.0]
    assert got.condition1.times == [0.0, 1.0]
    assert [p.influence.shape for p in got.condition1.profiles] == [(2, 2)] * 2
    for shares in got.condition1.shares:
        np.testing.assert_allclose(jnp.sum(shares), 1, rtol=1e-5)
    assert got.condition2.coherence.products.shape == (2, 2)
    assert len(got.condition3.norms) == 3
    assert len(got.condition3.leading_drift) == 2
    assert got.condition3.shell_drift.drift.shape == (2, 5)
    assert len(got.condition4.measurements) == 3
    assert len(told) == 5


def test_every_verdict_shows_numbers_and_thresholds(mlp_report):
    got, _ = mlp_report
    assert list(got.verdicts) == [f"condition{i}" for i in range(1, 5)]
    numbers = {
        check.name: check.number
        for verdict in got.verdicts.values()
        for check in verdict.checks
    }
    norms = [float(n.jacobian) for n in got.condition3.norms]
    assert numbers["growth of the norm of J"] == pytest.approx(max(norms) / norms[0])
    fit = got.condition4.measurements[-1].diagonal_fit
    slope_error = abs(float(fit.exponent) - 1)
    assert numbers["distance of the slope to 1"] == pytest.approx(slope_error)
    assert numbers["R^2 of the diagonal"] == pytest.approx(float(fit.r_squared))
    centre = got.condition4.central_residuals[-1]
    assert 0 < centre < 1
    assert numbers["Toeplitz residual at the center"] == centre
    tail = float(got.condition2.coherence.coherence[0, 1])
    assert numbers["tail sum of the coherence"] == pytest.approx(tail)
    drifts = [float(d.frobenius) for d in got.condition3.leading_drift]
    assert numbers["drift of the leading 2"] == pytest.approx(max(drifts))


def test_separate_branches_meet_conditions_1_and_2():
    problem, params, blocks = block_problems.branches()
    points = path(problem, params, params)
    got = condition_report(points, blocks, num_probes=None, **quick())
    assert got.verdicts["condition1"].holds
    assert got.verdicts["condition2"].holds
    assert got.condition1.bands == [0, 0]
    assert got.condition2.flagged == []


def test_a_planted_pair_is_flagged():
    problem, params, blocks = block_problems.planted_pair()
    points = path(problem, params, params)
    got = condition_report(points, blocks, **quick())
    verdict = got.verdicts["condition2"]
    assert not verdict.holds
    ((first, second, coherence),) = got.condition2.flagged
    assert (first, second) == (0, 4)
    assert coherence == pytest.approx(1, rel=1e-3)
    distant = verdict.checks[1]
    assert distant.number == pytest.approx(1, rel=1e-3)
    assert not distant.holds
    lenient = Thresholds(max_distant_coherence=1.0, max_tail_sum=1.1)
    got = condition_report(points, blocks, thresholds=lenient, **quick())
    assert got.verdicts["condition2"].holds


def test_a_chain_influences_and_overlaps_at_every_distance():
    problem, params, blocks = block_problems.chain(weights=(1.0, -1.0, 1.0))
    direction = jax.tree.map(jnp.ones_like, params)
    got = condition_report(
        path(problem, params, direction),
        blocks,
        num_probes=None,
        thresholds=Thresholds(influence_share=0.99),
        **quick(),
    )
    # R_lm = |e| off the diagonal, 0 on it: 4 of 6 at distance 1, 2 of 6 at distance 2.
    np.testing.assert_allclose(got.condition1.shares[0], [0, 2 / 3, 1 / 3], rtol=1e-4)
    assert got.condition1.bands[0] == 2
    assert not got.verdicts["condition1"].holds
    assert not got.verdicts["condition2"].holds


def test_one_point_leaves_drift_undefined_and_unmet():
    problem, params, blocks = block_problems.branches()
    points = path(problem, params, params, times=(0.0,))
    got = condition_report(points, blocks, **quick())
    assert len(got.condition1.profiles) == 1
    checks = {c.name: c for c in got.verdicts["condition3"].checks}
    assert np.isnan(checks["drift of the leading 2"].number)
    assert not got.verdicts["condition3"].holds


def test_checks():
    assert Check("a", 1.0, 1.0).holds
    assert not Check("a", 1.1, 1.0).holds
    assert Check("a", 1.0, 1.0, ">=").holds
    assert not Check("a", 0.9, 1.0, ">=").holds
    assert not Check("a", float("nan"), 1.0).holds
    assert not Check("a", 0.5, 1.0, converged=False).holds
    assert Check("a", 0.5, 1.0, error=0.9).holds
    assert str(Check("a", 0.5, 1.0)) == "a: 0.5 <= 1 holds"
    assert Check("a", 0.5, float("nan")).outcome == "undecided"
    with pytest.raises(ValueError, match="relation: expected one of '<=', '>='"):
        assert Check("a", 0.5, 1.0, "<").outcome
    told = str(Check("a", 0.5, 1.0, error=0.125, converged=False))
    assert told == "a: 0.5 +- 0.12 <= 1 undecided (not converged)"
    assert str(Check("a", 0.5, 1.0, count=7)) == "a: 0.5 <= 1 holds (of 7)"
    told = str(Check("a", float("nan"), 1.0, reason="one point"))
    assert told == "a: n/a, undecided (one point)"


@pytest.mark.parametrize(
    ("number", "threshold", "relation"),
    [(0.89996, 0.9, ">="), (0.50004, 0.5, "<="), (1 + 1e-12, 1.0, "<=")],
)
def test_a_check_is_told_with_the_digits_that_decide_it(number, threshold, relation):
    check = Check("a", number, threshold, relation)
    left, right = str(check).removeprefix("a: ").removesuffix(" fails").split(relation)
    assert (float(left) - float(right)) * (number - threshold) > 0
    assert str(Check("a", 0.134, 0.2)) == "a: 0.134 <= 0.2 holds"


def test_the_table_of_a_report_has_the_digits_that_decide_and_the_counts():
    checks = (
        Check("a", 0.89996, 0.9, ">=", count=7),
        Check("b", float("nan"), 1.0, reason="one point"),
    )
    found = SimpleNamespace(verdicts={"condition1": Verdict(checks)})
    columns = ConditionReport._tables(found)["checks"]
    first, second = (
        [columns[name][k] for name in ("number", "threshold", "outcome", "of")]
        for k in (0, 1)
    )
    assert first == ["0.89996", ">= 0.9", "fails", 7]
    assert second == ["n/a", "<= 1", "undecided", "n/a"]


def test_an_undefined_drift_is_not_called_a_single_point():
    resolved = jnp.ones(2, bool)
    point = SimpleNamespace(finite=True, operator_disagreement=0.0, resolved=resolved)
    drifts = [SimpleNamespace(frobenius=x) for x in (0.25, np.nan)]
    check = drift_check(drifts, [point] * 3, 2, Thresholds())
    assert (check.outcome, check.reason) == ("undecided", "a drift is undefined")
    assert drift_check([], [point], 2, Thresholds()).reason == "one point"


def test_a_verdict_without_evidence_is_undecided():
    holds, fails = Check("a", 1.0, 1.0), Check("b", 2.0, 1.0)
    undecided = Check("c", float("nan"), 1.0, reason="one point")
    for checks, outcome in (
        ((holds, holds), "holds"),
        ((holds, fails, undecided), "fails"),
        ((holds, undecided), "undecided"),
        ((holds, Check("d", 0.5, 1.0, converged=False)), "undecided"),
        ((), "undecided"),
    ):
        verdict = Verdict(checks)
        assert verdict.outcome == outcome
        assert verdict.holds == (outcome == "holds")
    assert str(Verdict((holds,))) == "holds\n  a: 1 <= 1 holds"


def test_a_network_that_does_not_move_decides_nothing():
    def still(params, batch):
        return 0 * block_problems.branches_error(params, batch) + 1

    problem, params, blocks = block_problems.branches(error_fn=still)
    got = condition_report(path(problem, params, params), blocks, **quick())
    for verdict in got.verdicts.values():
        assert verdict.outcome == "undecided"
        for check in verdict.checks:
            assert np.isnan(check.number), check
            assert check.reason
    assert np.isnan(got.condition4.measurements[0].literal.residual)


def test_distances_that_do_not_occur_are_undecided(mlp_report):
    got, _ = mlp_report  # of two blocks
    tail, distant = got.verdicts["condition2"].checks
    assert tail.count == 1
    assert distant.outcome == "undecided"
    assert distant.reason == "no two blocks so far apart have a Jacobian"


def test_checks_tell_how_far_off_they_may_be_and_what_did_not_converge(
    mlp, monkeypatch
):
    *point, blocks = mlp
    points = path(*point)

    def checks(**options):
        by_power = partial(block_coherence, method="power_iteration", **options)
        monkeypatch.setattr(report, "block_coherence", by_power)
        got = condition_report(points, blocks, thresholds=LENIENT, **quick())
        found = [c for v in got.verdicts.values() for c in v.checks]
        return got, {check.name: check for check in found}

    got, found = checks(tolerance=1e-3)
    coherence = got.condition2.coherence
    tail = found["tail sum of the coherence"]
    assert tail.converged
    assert tail.holds
    residuals = np.asarray(coherence.residuals, np.float64)
    relative = residuals[0, 1] / 2 + (residuals[0, 0] + residuals[1, 1]) / 4
    assert tail.error == pytest.approx(tail.number * relative)
    assert 0 < tail.error < 1e-3
    fit = got.condition4.measurements[-1].diagonal_fit
    slope = found["distance of the slope to 1"]
    assert slope.error == pytest.approx(float(fit.exponent_stderr))
    assert 0 < found["growth of the norm of J"].error < 1e-2
    _, found = checks(tolerance=1e-9, max_iterations=1)
    assert not found["tail sum of the coherence"].converged
    assert not found["tail sum of the coherence"].holds


@pytest.mark.filterwarnings("ignore:grsd_jax. the examples:RuntimeWarning")
def test_coupled_examples_are_refused(mlp):
    problem, params, direction, blocks = mlp

    def coupled(p, batch):
        error = problem.error(p, batch)
        return error - jnp.mean(error, axis=0, keepdims=True)

    coupled = Problem.from_error(coupled, problem.batches, reduction="mean")
    points = path(coupled, params, direction)
    with pytest.raises(ValueError, match="problem: expected an error whose examples"):
        condition_report(points, blocks, thresholds=LENIENT, **quick())


def test_the_band_of_an_estimate_has_an_error_where_probes_disagree():
    size = 6
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    influence = jnp.asarray(0.5**distance, jnp.float32)
    thresholds = Thresholds(influence_share=0.95)
    band = int(smallest_band(distance_totals(influence**2), 0.95))

    def error(relative, num_probes=4):
        found = InfluenceProfile(influence, relative * influence, num_probes)
        (check,) = locality_checks([found], [band], thresholds)
        assert check.number == band
        return check.error

    assert error(0.0, num_probes=0) == 0
    assert error(1e-6) == 0
    assert error(0.5) > 0.1


def test_a_path_over_other_examples_or_losses_is_refused(mlp):
    problem, params, _, blocks = mlp
    turned = jax.tree.map(lambda leaf: leaf[:, ::-1], problem.batches)
    vectors = []
    for other in (problem, problem.replace(batches=turned)):
        kernel = np.asarray(dense_kernel(other, params), np.float64)
        vectors.append(np.linalg.eigh(kernel)[1][:, -2:])
    # Nothing moves, and yet the leading projector would.
    assert np.linalg.norm(vectors[0] @ vectors[0].T - vectors[1] @ vectors[1].T) > 0.5
    for other in (problem.replace(batches=turned), problem.replace(loss="squared")):
        points = [PathPoint(t, p, params) for t, p in enumerate((problem, other))]
        with pytest.raises(ValueError, match=r"^points: expected .* others at 1"):
            condition_report(points, blocks, **quick())


def test_a_path_that_goes_back_in_time_is_refused(mlp):
    """Growth would be over the last point, and incoherence not at the start."""
    *point, blocks = mlp
    for times in ((0.1, 0.0), (0.0, np.nan)):
        points = path(*point, times)
        with pytest.raises(ValueError, match="points: expected times that do not fall"):
            condition_report(points, blocks, **quick())


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("distant", 0, "an integer >= 1"),  # every block is coherent with itself
        ("distant", -1, "an integer >= 1"),
        ("max_band", 1.5, "an integer >= 0"),
        ("max_growth", np.nan, "a finite number >= 0, got nan"),
        ("max_growth", "x", "a finite number >= 0, got 'x'"),
        ("max_growth", -1.0, "a finite number >= 0, got -1.0"),
        ("max_residual", np.inf, "a finite number >= 0, got inf"),
        ("influence_share", 2.0, "a number <= 1, got 2.0"),
    ],
)
def test_thresholds_that_would_decide_wrongly_are_refused(mlp, name, value, sentence):
    *point, blocks = mlp
    thresholds = Thresholds()._replace(**{name: value})
    with pytest.raises(ValueError, match=f"^thresholds.{name}: expected {sentence}"):
        condition_report(path(*point), blocks, thresholds=thresholds, **quick())


def test_bad_input_is_named():
    problem, params, blocks = block_problems.branches()
    with pytest.raises(ValueError, match=r"len\(points\): expected an integer >= 1"):
        condition_report([], blocks, key=jax.random.key(0))
    with pytest.raises(ValueError, match="loss_fn: expected one for the loss or its"):
        condition_report(
            [PathPoint(0.0, problem, params)], blocks, key=jax.random.key(0)
        )


def test_a_point_without_a_direction_follows_the_gradient_flow(mlp):
    problem, params, direction, blocks = mlp
    given, derived = (
        condition_report([PathPoint(0.0, problem, params, way)], blocks, **quick())
        for way in (direction, None)
    )
    jax.tree.map(np.testing.assert_array_equal, derived, given)


@pytest.mark.not_in_mode("debug_nans")
@pytest.mark.parametrize("method", ["dense", "power_iteration"])
def test_no_verdict_holds_of_parameters_that_are_not_finite(mlp, method, monkeypatch):
    problem, params, direction, blocks = mlp
    by_method = partial(block_coherence, method=method)
    monkeypatch.setattr(report, "block_coherence", by_method)
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), params)
    got = condition_report(path(problem, broken, direction), blocks, **quick())
    for verdict in got.verdicts.values():
        assert not any(check.holds for check in verdict.checks), verdict
