"""The claims: intervals over seeds, the table and figure, and a run that goes on."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from grsd_jax.experiments.claims import analyse, figures, run
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.intervals import t_interval
from grsd_jax.experiments.report import page
from running import run_script, small, small_textures


def planted(seeds=(0, 1, 2, 3), gap=0.1):
    """The contents of claims.json, the plain network ``gap`` below at every seed."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in seeds:
        for reduction in run.REDUCTIONS:
            numbers = {name: rng.normal(0.8, 0.1) for name in analyse.QUANTITIES}
            for network, off in (("resnet18", 0.0), ("plainnet18", gap)):
                cell = {"seed": seed, "network": network, "reduction": reduction}
                rows.append(cell | {k: x - off for k, x in numbers.items()})
    return {"config": {}, "rows": rows}


def test_an_interval_is_the_one_of_the_t_test():
    values = np.random.default_rng(1).normal(2, 0.5, 8)
    found = t_interval(values)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found == pytest.approx((values.mean(), expected.low, expected.high))
    alone = t_interval(values[:1])
    assert np.isnan([alone.low, alone.high]).all()
    assert str(alone) == f"{alone.mean:.3f} [n/a]"
    assert str(t_interval(np.array([1.0, np.nan]))) == "n/a"


def test_differences_are_taken_within_a_seed():
    rows = analyse.claim_rows(planted())
    assert rows[0][2:4] == ["ResNet-18", "PlainNet-18"]
    assert len(rows) == 1 + len(run.REDUCTIONS) * len(analyse.QUANTITIES)
    for row in rows[1:]:
        assert row[4] == "0.100 [0.100, 0.100]"  # the seeds themselves scatter
        assert row[2] != row[3]


@pytest.mark.parametrize(("seeds", "told"), [((4,), "1 paired seed."), ((1, 2), "2 p")])
def test_the_table_says_how_many_seeds_it_stands_on(seeds, told):
    assert analyse.format_claims(planted(seeds)).split("\n")[-1].startswith(told)


def test_the_figure_says_where_a_mean_is_undefined():
    results = planted()
    results["rows"][0]["slope"] = None
    slope, r_squared, *_ = figures._pairs(results).axes
    (text,) = slope.texts
    assert (text.get_text(), text.get_position()[0]) == ("n/a", 0)  # of ResNet-18
    assert not r_squared.texts


def test_networks_of_other_seeds_or_undefined_numbers_are_told():
    results = planted()
    results["rows"][0]["slope"] = None
    slope = analyse.claim_rows(results)[1]
    assert (slope[2], slope[4]) == ("n/a", "n/a")
    by_network = analyse.values_by_seed(results, "stack", "slope")
    assert np.isnan(by_network["resnet18"]).sum() == 1
    assert np.isfinite(by_network["plainnet18"]).all()
    del results["rows"][1]
    with pytest.raises(
        UserError, match="both networks under 'stack' at the same seeds"
    ):
        analyse.claim_rows(results)
    with pytest.raises(UserError, match="expected both networks"):
        analyse.claim_rows({})


def test_report_has_the_table_and_the_figure(tmp_path):
    results = planted()
    records.write_json(tmp_path / "claims.json", results)
    paths = figures.write_claims_figure(results, tmp_path / "figures")
    assert [path.name for path in paths] == ["claims.png", "claims.pdf"]
    (section,) = page.find_sections(tmp_path)
    assert section.tables == [analyse.claim_rows(results)]
    assert len(section.figures) == 1


def test_a_small_study_runs_and_goes_on_where_it_was(tmp_path, monkeypatch):
    config = Config(
        workdir=str(tmp_path),
        width=2,
        epochs=1,
        train_batch_size=32,
        batch_size=2,
        num_batches=2,
        num_shells=4,
        window=2,
        solver="dense",
    )
    with small():
        dataset = small_textures()
        results = run.run_claims(dataset, config, [3])
        cells = [[row[name] for name in run.Cell._fields] for row in results["rows"]]
        assert cells == [[3, n, r] for n in run.NETWORKS for r in run.REDUCTIONS]
        assert all(np.isfinite(row["slope"]) for row in results["rows"])
        assert records.read_json(tmp_path / "claims.json")["rows"] == results["rows"]
        sizes = {
            reduction: len(records.read_npz(path)["values"])
            for reduction in run.REDUCTIONS
            for path in [tmp_path / "cells" / f"seed3-resnet18-{reduction}.npz"]
        }
        assert sizes == {"stack": 40, "mean": 20}

        def never(*_):
            raise AssertionError("measured again")

        monkeypatch.setattr(run, "measure_cell", never)
        assert run.run_claims(dataset, config, [3])["rows"] == results["rows"]
        with pytest.raises(AssertionError, match="measured again"):
            run.run_claims(dataset, dataclasses.replace(config, window=3), [3])
        with pytest.raises(UserError, match="--solver: expected 'dense' or 'lanczos'"):
            run.run_claims(dataset, dataclasses.replace(config, solver="auto"), [3])


def test_script_makes_the_table_again(tmp_path):
    records.write_json(tmp_path / "claims.json", planted())
    done = run_script("study.py", f"--workdir={tmp_path}", "--report_only")
    assert done.code == 0, done.err
    table, legend = analyse.format_claims(planted()).split("\n\n")
    places = f"{tmp_path / 'claims.json'}\n{tmp_path / 'figures'}"
    ending = f"{places}\nnext: grsd report {tmp_path}\n"
    assert done.out == f"{table}\n\n{legend}\n{ending}"
    assert " ".join(legend.split()) == " ".join([*analyse.LEGEND, "4 paired seeds."])
    wrong = run_script("study.py", f"--workdir={tmp_path}", "--seeds=one")
    assert wrong.code == 1
    assert "--seeds: expected a list of integers" in wrong.err
