"""The study: quantities against plain NumPy, controls, verdicts, tables, figures."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import fit_power_law, log_shells, shell_coupling
from grsd_jax.experiments.claims import claims as study_claims
from grsd_jax.experiments.claims import depth as study_depth
from grsd_jax.experiments.claims import figures as study_figures
from grsd_jax.experiments.claims import run as study
from grsd_jax.experiments.claims import tables as study_tables
from grsd_jax.experiments.claims.cells import (
    QUANTITIES,
    cell_of,
    controlled,
    inter_over_intra,
)
from grsd_jax.experiments.claims.plan import (
    BINNINGS,
    CONTROLS,
    NETWORKS,
    VARIATIONS,
    cell_name,
)
from grsd_jax.experiments.common import reporting
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import synthetic_textures

KEY = jax.random.key(0)
SHELLS = {"num_shells": 8, "window": 3}


def measured(kind="planted", size=60, unresolved=10):
    """Something like a measurement, with a planted coupling."""
    values = jnp.asarray(np.geomspace(10, 1e-3, size), jnp.float32)
    resolved = jnp.arange(size) < size - unresolved
    zeros = jnp.zeros((size, size), jnp.float32)
    coupling = controlled(zeros, values, resolved, KEY, kind=kind)
    return SimpleNamespace(values=values, resolved=resolved, coupling=coupling)


def quantities(cell):
    return dict(zip(QUANTITIES, cell["quantities"], strict=True))


@pytest.fixture(scope="module")
def planted():
    return cell_of(measured(), **SHELLS, num_replicates=40, key=KEY)


def test_quantities_are_those_of_the_library(planted):
    found, given = quantities(planted), measured()
    fit = fit_power_law(given.values, jnp.abs(jnp.diag(given.coupling)), given.resolved)
    assert found["slope"] == pytest.approx(float(fit.exponent), rel=1e-5)
    shells = log_shells(given.values, 8, mask=given.resolved)
    binned = shell_coupling(given.coupling, given.values, shells, renormalize=True)
    away = np.asarray(binned.matrix)
    toeplitz = np.zeros_like(away)
    for k in range(-7, 8):
        toeplitz += np.diag(np.full(8 - abs(k), np.diagonal(away, k).mean()), k)
    expected = np.linalg.norm(away - toeplitz) / np.linalg.norm(away)
    assert found["renormalized"] == pytest.approx(expected, rel=1e-3)


def test_a_planted_coupling_passes_and_its_literal_reading_does_not(planted):
    found = quantities(planted)
    assert found["slope"] == pytest.approx(1, abs=1e-4)
    assert found["r_squared"] == pytest.approx(1, abs=1e-4)
    assert found["renormalized"] < 0.05
    assert found["literal"] > 0.5


def test_random_and_shuffled_couplings_have_no_exponent():
    for kind in ("random", "shuffled"):
        binning = next(control for control in CONTROLS if control.control == kind)
        cell = cell_of(measured(), **SHELLS, num_replicates=2, key=KEY, binning=binning)
        found = quantities(cell)
        assert abs(found["slope"]) < 0.3
        assert found["r_squared"] < 0.1


def test_a_shuffle_moves_used_pairs_among_themselves():
    given = measured()
    moved = controlled(
        given.coupling, given.values, given.resolved, KEY, kind="shuffled"
    )
    before, after = (np.diag(x) for x in (given.coupling, moved))
    used = np.asarray(given.resolved)
    np.testing.assert_array_equal(np.sort(before[used]), np.sort(after[used]))
    np.testing.assert_array_equal(before[~used], after[~used])
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(moved, moved.T)


def test_halves_have_the_spread_of_the_estimate():
    """The exponent of noisy points: the halves' variance is the squared stderr."""
    rng = np.random.default_rng(0)
    given = measured()
    noise = np.exp(0.5 * rng.normal(size=60)).astype(np.float32)
    coupling = given.coupling * jnp.asarray(np.sqrt(noise[:, None] * noise[None]))
    given.coupling = coupling
    cell = cell_of(given, **SHELLS, num_replicates=2000, key=KEY)
    fit = fit_power_law(given.values, jnp.abs(jnp.diag(coupling)), given.resolved)
    spread = cell["replicates"][:, QUANTITIES.index("slope")].std()
    assert spread == pytest.approx(float(fit.exponent_stderr), rel=0.15)


def test_other_bins_and_floors_are_used():
    shells = {b.name: b for b in BINNINGS}
    found = {
        name: cell_of(
            measured(), **SHELLS, num_replicates=1, key=KEY, binning=shells[name]
        )
        for name in ("shells_16", "window_7", "floor_1e-3")
    }
    assert found["shells_16"]["windows"].shape == (2, 16 - 3 + 1)
    assert found["window_7"]["windows"].shape == (2, 8 - 7 + 1)
    assert found["floor_1e-3"]["used"].sum() == 45


def test_neighbours_against_inside_by_hand():
    matrix = np.array([[4.0, 1.0, 9.0], [1.0, 1.0, 0.5], [9.0, 0.5, 1.0]])
    mask = np.ones((3, 3), bool)
    assert inter_over_intra(matrix, mask) == pytest.approx((1 / 2 + 0.5) / 2)
    mask[2] = mask[:, 2] = False
    assert inter_over_intra(matrix, mask) == pytest.approx(0.5)
    assert np.isnan(inter_over_intra(matrix, np.zeros((3, 3), bool)))


def planted_study(slopes, spread=0.01, seeds=(0, 1, 2)):
    """A study whose numbers are known: slope by network, the rest fixed."""
    rng = np.random.default_rng(1)
    known = (0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.6, 0.3, 0.2)
    numbers = dict(zip(QUANTITIES, known, strict=True))
    arrays, cells = {}, []
    names = [v.name for v in (*VARIATIONS, *BINNINGS, *CONTROLS)]
    for seed in seeds:
        for network in NETWORKS:
            for name in names:
                slope = slopes.get((network, name), slopes[network, "base"])
                centre = np.array([*(numbers | {"slope": slope}).values()])
                cell = cell_name(seed, network, name)
                cells.append(cell)
                noise = spread * rng.normal(size=(50, len(QUANTITIES)))
                parts = {
                    "quantities": centre + spread * rng.normal(size=len(QUANTITIES)),
                    "replicates": centre + noise,
                    "windows": np.tile([0.6, 0.3, 0.6], (2, 1)),
                    "values": np.geomspace(10, 0.1, 20),
                    "diagonal": np.geomspace(10, 0.1, 20),
                    "used": np.arange(20) < 15,
                }
                arrays |= {f"{cell}/{key}": value for key, value in parts.items()}
    accuracies = {f"seed{s}-{n}": 0.7 for s in seeds for n in NETWORKS}
    info = {
        "config": {},
        "cells": cells,
        "seeds": list(seeds),
        "quantities": list(QUANTITIES),
        "num_replicates": 50,
        "test_accuracy": accuracies,
    }
    return study_claims.Study(info, arrays, seeds)


def base_words(found):
    return {name: verdict.word for name, verdict in found["base"].items()}


def test_verdicts_follow_the_numbers():
    near, far = 1.0, 0.5
    told = base_words(
        study_claims.verdicts(
            planted_study({("resnet18", "base"): near, ("plainnet18", "base"): far})
        )
    )
    assert told["diagonal"] == "reproduced"
    assert told["toeplitz"] == told["edges"] == told["mixing"] == "reproduced"
    assert told["insensitive"] == "not reproduced"  # both fall by half
    other = base_words(
        study_claims.verdicts(
            planted_study({("resnet18", "base"): far, ("plainnet18", "base"): near})
        )
    )
    assert other["diagonal"] == other["contrast"] == "not reproduced"
    wide = planted_study(
        {("resnet18", "base"): 0.9, ("plainnet18", "base"): far}, spread=0.2
    )
    assert base_words(study_claims.verdicts(wide))["diagonal"] == "undecided"


def test_a_choice_that_turns_a_verdict_is_named():
    turned = planted_study(
        {
            ("resnet18", "base"): 1.0,
            ("plainnet18", "base"): 0.5,
            ("resnet18", "lanczos"): 0.5,
        }
    )
    found = study_claims.verdicts(turned)
    other = "not reproduced"
    assert study_claims.depends_on(found, "diagonal") == {other: ["lanczos"]}
    assert study_claims.depends_on(found, "toeplitz") == {
        other: ["literal"]
    }  # 0.8, 0.7
    assert study_claims.depends_on(found, "mixing") == {}
    text = study_tables.format_study(turned)
    told = "reproduced; depends on: not reproduced with leading pairs by Lanczos"
    assert told in text


def test_choices_that_decide_what_the_base_does_not_are_named():
    words = {
        "base": "undecided",
        "shells_8": "reproduced",
        "shells_16": "undecided",
        "lanczos": "not reproduced",
        "stack": "not reproduced",
    }
    found = {
        name: {"x": study_claims.Verdict(word, ())} for name, word in words.items()
    }
    assert study_claims.depends_on(found, "x") == {
        "reproduced": ["shells_8"],
        "not reproduced": ["lanczos", "stack"],
    }


def test_intervals_cover_the_mean_over_seeds():
    """With seeds that differ, the interval is that of the seeds' bootstrap."""
    few = planted_study({(n, "base"): 1.0 for n in NETWORKS}, spread=0.1)
    draws = study_claims.draws_of(few, "base")
    number = study_claims.interval_of(draws("slope", "resnet18"))
    cells = [
        few.arrays[f"{cell_name(s, 'resnet18', 'base')}/quantities"][0]
        for s in (0, 1, 2)
    ]
    assert number.estimate == pytest.approx(np.mean(cells))
    expected = np.sqrt((np.var(cells) + 0.1**2) / 3)
    assert (number.high - number.low) / 3.92 == pytest.approx(expected, rel=0.25)


def test_tables_and_figures_come_from_the_files_alone(tmp_path):
    given = planted_study({(n, "base"): 1.0 for n in NETWORKS})
    (tmp_path / "study.json").write_text(json.dumps(given.info))
    np.savez(tmp_path / "study.npz", **given.arrays)
    read = study_claims.read_study(tmp_path)
    assert study_tables.format_study(read) == study_tables.format_study(given)
    paths = study_figures.write_study_figures(read, tmp_path / "figures")
    names = {"study_windows", "study_diagonal", "study_choices", "study_verdicts"}
    assert {path.stem for path in paths} == names
    (section,) = reporting.find_sections(tmp_path)
    assert section.tables == study_tables.study_tables(given)
    assert len(section.figures) == 4
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match="expected the cells of a study, got none"):
        study_claims.read_study(tmp_path)


def sweep_rows(model, scale, seeds):
    """A network whose residual falls with depth in the seeds that are given True."""
    return [
        {
            "model": model,
            "branch_scale": scale,
            "width": 16,
            "activation": "gelu",
            "depth": depth,
            "seed": seed,
            "toeplitz_center": 1 / depth if falls else depth / 100,
            "slope": 1 + 1 / depth,
            "r_squared": None if depth == 2 else 0.9 + depth / 1000,
        }
        for depth in (2, 4, 8, 16)
        for seed, falls in enumerate(seeds)
    ]


def test_depth_is_told_by_ranks():
    rows = study_depth.depth_rows(
        {
            "rows": [
                *sweep_rows("rescnn", 0.1, (True, True, True)),
                *sweep_rows("rescnn", 0.3, (True, False, True)),
                *sweep_rows("cnn", None, (False, False)),
            ]
        }
    )
    assert [row[4] for row in rows[1::3]] == [
        "reproduced",
        "undecided",
        "not reproduced",
    ]
    up, down = "1.000 [1.000, 1.000]", "-1.000 [-1.000, -1.000]"
    assert [row[2] for row in rows[1:4]] == [down, down, up]
    assert rows[4][2] == "-0.333 [-1.000, 1.000]"
    assert rows[7][2] == up
    assert "s = 0.1" in rows[1][0]
    assert "2, 4, 8, 16 (Theorem 2)" in rows[1][0]
    assert "not claimed" in rows[7][0]


def test_rank_correlation_leaves_out_what_is_undefined():
    assert study_depth.rank_correlation([1, 2, 3, 4], [4.0, None, 3.0, 2.0]) == -1
    assert np.isnan(study_depth.rank_correlation([1, 2, 3], [None, 1.0, 2.0]))
    assert np.isnan(study_depth.rank_correlation([1, 2, 3], [0.5, 0.5, 0.5]))
    assert study_depth.rank_correlation([2, 2, 4, 4], [1.0, 2.0, 1.0, 2.0]) == 0


def test_a_seed_that_is_not_done_leaves_depth_undecided():
    rows = sweep_rows("rescnn", 0.1, (True, True, True))
    unfinished = [row for row in rows if row["seed"] < 2 or row["depth"] == 2]
    told = study_depth.depth_rows({"rows": unfinished})
    assert (told[1][2], told[1][4]) == ("n/a", "undecided")


def test_widths_are_judged_apart():
    rows = sweep_rows("rescnn", 0.1, (True, True, True))
    rows += [
        row | {"width": 8} for row in sweep_rows("rescnn", 0.1, (False, False, False))
    ]
    told = study_depth.depth_rows({"rows": rows})
    assert ["w = 16" in told[1][0], "w = 8" in told[4][0]] == [True, True]
    assert (told[1][4], told[4][4]) == ("reproduced", "not reproduced")


@pytest.mark.slow
def test_a_small_study_runs_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "NUM_REPLICATES", 3)
    kept = {"base", "shared", "half_n", "untrained"}
    few = tuple(v for v in VARIATIONS if v.name in kept)
    monkeypatch.setattr(study, "VARIATIONS", few)
    dataset = synthetic_textures(num_train=32, num_test=16)
    config = Config(
        workdir=str(tmp_path),
        width=1,
        epochs=1,
        train_batch_size=16,
        batch_size=4,
        num_batches=1,
        num_shells=8,
        window=3,
        solver="dense",
    )
    with jax.numpy_dtype_promotion("standard"):
        study.run_study(dataset, config, [3])
        found = study_claims.read_study(tmp_path)
        assert found.seeds == (3,)
        base = found.arrays["seed3-resnet18-base/quantities"]
        assert np.isfinite(base[QUANTITIES.index("slope")])
        shared = found.arrays["seed3-plainnet18-shared/values"]
        assert not np.array_equal(shared, found.arrays["seed3-plainnet18-base/values"])
        assert len(found.arrays["seed3-resnet18-half_n/values"]) == 20
        assert "seed3-resnet18-shared" not in found.info["cells"]

        def never(*_):
            raise AssertionError("measured again")

        monkeypatch.setattr(study, "_measured", never)
        study.run_study(dataset, config, [3])
        other = dataclasses.replace(config, window=4)
        with pytest.raises(UserError, match="--workdir: expected a study under these"):
            study.run_study(dataset, other, [3])
        with pytest.raises(UserError, match="--solver: expected 'dense' or 'lanczos'"):
            study.run_study(dataset, dataclasses.replace(config, solver="auto"), [3])
        small = dataclasses.replace(config, num_shells=6)
        with pytest.raises(UserError, match="--num_shells: expected at least 7"):
            study.run_study(dataset, small, [3])
