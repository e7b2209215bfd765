import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block_problems
from grsd_jax import (
    Check,
    InfluenceProfile,
    PathPoint,
    Thresholds,
    Verdict,
    condition_report,
    distance_totals,
    gradient_flow_direction,
    partition_by_prefix,
    smallest_band,
)
from grsd_jax.conditions.checks import locality_checks
from oracles import problem

KEY = jax.random.key(0)
COUPLING = {
    "num_shells": 4,
    "window": 3,
    "num_bootstrap": 0,
    "solver": "dense",
    "block_size": 4,
}
LENIENT = Thresholds(max_tail_sum=10.0)
OPTIONS = {"key": KEY, "num_leading": 2, "coupling_options": COUPLING}


def path(error_fn, params, direction, times=(0.0, 0.1)):
    """Returns points along a straight line."""
    return [
        PathPoint(
            time,
            error_fn,
            jax.tree.map(lambda p, d, t=time: p + t * d, params, direction),
            direction,
        )
        for time in times
    ]


@pytest.fixture(scope="module")
def mlp_report():
    error_fn, params, batches, loss_fn = problem("mlp", jnp.float32)
    direction = gradient_flow_direction(loss_fn, params, batches)
    blocks = partition_by_prefix(params, {"in": ["Dense_0"], "out": ["Dense_1"]})
    points = path(error_fn, params, direction, times=(0.0, 0.5, 1.0))
    said = []
    report = condition_report(points, batches, blocks, progress=said.append, **OPTIONS)
    return report, said


def test_a_report_holds_every_condition_at_its_points(mlp_report):
    report, said = mlp_report
    assert report.times == [0.0, 0.5, 1.0]
    assert report.condition1.times == [0.0, 1.0]
    assert [p.influence.shape for p in report.condition1.profiles] == [(2, 2)] * 2
    for shares in report.condition1.shares:
        np.testing.assert_allclose(jnp.sum(shares), 1, rtol=1e-5)
    assert report.condition2.coherence.products.shape == (2, 2)
    assert len(report.condition3.norms) == 3
    assert len(report.condition3.leading_drift) == 2
    assert report.condition3.shell_drift.drift.shape == (2, 4)
    assert len(report.condition4.measurements) == 3
    assert len(said) == 5


def test_every_verdict_shows_numbers_and_thresholds(mlp_report):
    report, _ = mlp_report
    assert list(report.verdicts) == [f"condition{i}" for i in range(1, 5)]
    numbers = {
        check.name: check.number
        for verdict in report.verdicts.values()
        for check in verdict.checks
    }
    norms = [float(n.jacobian) for n in report.condition3.norms]
    assert numbers["growth of the norm of J"] == pytest.approx(max(norms) / norms[0])
    fit = report.condition4.measurements[-1].diagonal_fit
    slope_error = abs(float(fit.exponent) - 1)
    assert numbers["distance of the slope to 1"] == pytest.approx(slope_error)
    assert numbers["R^2 of the diagonal"] == pytest.approx(float(fit.r_squared))
    tail = float(report.condition2.coherence.coherence[0, 1])
    assert numbers["tail sum of the coherence"] == pytest.approx(tail)
    drifts = [float(d.frobenius) for d in report.condition3.leading_drift]
    assert numbers["drift of the leading 2"] == pytest.approx(max(drifts))


def test_separate_branches_meet_conditions_1_and_2():
    error_fn, params, batches, blocks = block_problems.branches()
    points = path(error_fn, params, params)
    report = condition_report(points, batches, blocks, num_probes=None, **OPTIONS)
    assert report.verdicts["condition1"].holds
    assert report.verdicts["condition2"].holds
    assert report.condition1.bands == [0, 0]
    assert report.condition2.flagged == []


def test_a_planted_pair_is_flagged():
    error_fn, params, batches, blocks = block_problems.planted_pair()
    points = path(error_fn, params, params)
    report = condition_report(points, batches, blocks, **OPTIONS)
    verdict = report.verdicts["condition2"]
    assert not verdict.holds
    ((first, second, coherence),) = report.condition2.flagged
    assert (first, second) == (0, 4)
    assert coherence == pytest.approx(1, rel=1e-3)
    distant = verdict.checks[1]
    assert distant.number == pytest.approx(1, rel=1e-3)
    assert not distant.holds
    lenient = Thresholds(max_distant_coherence=1.1, max_tail_sum=1.1)
    report = condition_report(points, batches, blocks, thresholds=lenient, **OPTIONS)
    assert report.verdicts["condition2"].holds


def test_a_chain_influences_and_overlaps_at_every_distance():
    error_fn, params, batches, blocks = block_problems.chain(weights=(1.0, -1.0, 1.0))
    direction = jax.tree.map(jnp.ones_like, params)
    report = condition_report(
        path(error_fn, params, direction),
        batches,
        blocks,
        num_probes=None,
        thresholds=Thresholds(influence_share=0.99),
        **OPTIONS,
    )
    # R_lm = |e| off the diagonal, 0 on it: 4 of 6 at distance 1, 2 of 6 at distance 2.
    np.testing.assert_allclose(
        report.condition1.shares[0], [0, 2 / 3, 1 / 3], rtol=1e-4
    )
    assert report.condition1.bands[0] == 2
    assert not report.verdicts["condition1"].holds
    assert not report.verdicts["condition2"].holds


def test_one_point_leaves_drift_undefined_and_unmet():
    error_fn, params, batches, blocks = block_problems.branches()
    report = condition_report(
        path(error_fn, params, params, times=(0.0,)), batches, blocks, **OPTIONS
    )
    assert len(report.condition1.profiles) == 1
    checks = {c.name: c for c in report.verdicts["condition3"].checks}
    assert np.isnan(checks["drift of the leading 2"].number)
    assert not report.verdicts["condition3"].holds


def test_checks():
    assert Check("a", 1.0, 1.0).holds
    assert not Check("a", 1.1, 1.0).holds
    assert Check("a", 1.0, 1.0, ">=").holds
    assert not Check("a", 0.9, 1.0, ">=").holds
    assert not Check("a", float("nan"), 1.0).holds
    assert not Check("a", 0.5, 1.0, converged=False).holds
    assert Check("a", 0.5, 1.0, error=0.9).holds
    assert str(Check("a", 0.5, 1.0)) == "a: 0.5 <= 1 holds"
    told = str(Check("a", 0.5, 1.0, error=0.125, converged=False))
    assert told == "a: 0.5 +- 0.12 <= 1 fails (not converged)"
    assert not Verdict((Check("a", 1.0, 1.0), Check("b", 2.0, 1.0))).holds


def test_checks_tell_how_far_off_they_may_be_and_what_did_not_converge():
    error_fn, params, batches, loss_fn = problem("mlp", jnp.float32)
    direction = gradient_flow_direction(loss_fn, params, batches)
    blocks = partition_by_prefix(params, {"in": ["Dense_0"], "out": ["Dense_1"]})
    points = path(error_fn, params, direction)

    def checks(**options):
        report = condition_report(points, batches, blocks, **OPTIONS, **options)
        found = [c for v in report.verdicts.values() for c in v.checks]
        return report, {check.name: check for check in found}

    power = {"method": "power_iteration", "tolerance": 1e-3}
    report, found = checks(coherence_options=power, thresholds=LENIENT)
    coherence = report.condition2.coherence
    tail = found["tail sum of the coherence"]
    assert tail.converged
    assert tail.holds
    residuals = np.asarray(coherence.residuals, np.float64)
    relative = residuals[0, 1] / 2 + (residuals[0, 0] + residuals[1, 1]) / 4
    assert tail.error == pytest.approx(tail.number * relative)
    assert 0 < tail.error < 1e-3
    fit = report.condition4.measurements[-1].diagonal_fit
    slope = found["distance of the slope to 1"]
    assert slope.error == pytest.approx(float(fit.exponent_stderr))
    assert 0 < found["growth of the norm of J"].error < 1e-2
    short = power | {"tolerance": 1e-9, "max_iterations": 1}
    _, found = checks(coherence_options=short, thresholds=LENIENT)
    assert not found["tail sum of the coherence"].converged
    assert not found["tail sum of the coherence"].holds


def test_nothing_that_rests_on_coupled_examples_holds():
    error_fn, params, batches, loss_fn = problem("mlp", jnp.float32)
    direction = gradient_flow_direction(loss_fn, params, batches)
    blocks = partition_by_prefix(params, {"in": ["Dense_0"], "out": ["Dense_1"]})

    def coupled(p, batch):
        error = error_fn(p, batch)
        return error - jnp.mean(error, axis=0, keepdims=True)

    points = path(coupled, params, direction)
    report = condition_report(points, batches, blocks, thresholds=LENIENT, **OPTIONS)
    checks = [c for v in report.verdicts.values() for c in v.checks]
    undefined = {check.name for check in checks if np.isnan(check.number)}
    assert undefined == {check.name for check in checks} - {
        "band with 90% of the influence",
        "growth of the norm of J",
        "growth of the norm of Jdot",
    }


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


def test_bad_input_is_named():
    error_fn, params, batches, blocks = block_problems.branches()
    with pytest.raises(ValueError, match=r"len\(points\): expected an integer >= 1"):
        condition_report([], batches, blocks, key=KEY)
    with pytest.raises(ValueError, match="num_leading: expected an integer >= 1"):
        condition_report(
            path(error_fn, params, params), batches, blocks, key=KEY, num_leading=0
        )


@pytest.mark.parametrize("method", ["dense", "power_iteration"])
def test_no_verdict_holds_of_parameters_that_are_not_finite(method):
    error_fn, params, batches, loss_fn = problem("mlp", jnp.float32)
    direction = gradient_flow_direction(loss_fn, params, batches)
    blocks = partition_by_prefix(params, {"in": ["Dense_0"], "out": ["Dense_1"]})
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), params)
    points = path(error_fn, broken, direction)
    report = condition_report(
        points, batches, blocks, coherence_options={"method": method}, **OPTIONS
    )
    for verdict in report.verdicts.values():
        assert not any(check.holds for check in verdict.checks), verdict
