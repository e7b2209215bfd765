"""The conditions of a training run: the file, the table and the figure page."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags

from grsd_jax import (
    Check,
    PathPoint,
    Thresholds,
    condition_report,
    gradient_flow_direction,
    measure_layers,
    partition_by_prefix,
)
from grsd_jax.experiments.common import flags, records, reporting
from grsd_jax.experiments.common.config import TRAINING_FIELDS, Config, UserError
from grsd_jax.experiments.common.data import synthetic_textures
from grsd_jax.experiments.conditions import figures as condition_figures
from grsd_jax.experiments.conditions import results as condition_results
from grsd_jax.experiments.conditions import run as conditions
from oracles import problem

CONFIG = Config(num_shells=4, window=3)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Returns the contents of a conditions.json that was written and read back."""
    error_fn, params, batches, loss_fn = problem("mlp", jnp.float32)
    direction = gradient_flow_direction(loss_fn, params, batches)
    blocks = partition_by_prefix(params, {"in": ["Dense_0"], "out": ["Dense_1"]})
    shells = {"num_shells": 4, "window": 3, "num_bootstrap": 0}
    points = [
        PathPoint(
            time,
            error_fn,
            jax.tree.map(lambda p, d, t=time: p + t * d, params, direction),
            direction,
        )
        for time in (0.0, 1.0)
    ]
    key = jax.random.key(0)
    report = condition_report(
        points,
        batches,
        blocks,
        key=key,
        thresholds=Thresholds(max_distant_coherence=0.0, distant=1),
        coupling_options=shells,
    )
    layers = measure_layers(
        error_fn,
        params,
        batches,
        direction,
        key=key,
        layer_of=blocks.block_of,
        **shells,
    )
    written = {
        "blocks": list(blocks.names),
        "steps": [0, 1],
        "options": {"thresholds": Thresholds()._asdict()},
        **condition_results.report_entry(report, CONFIG),
        "layers": condition_results.layers_entry(layers, blocks, CONFIG),
    }
    folder = tmp_path_factory.mktemp("conditions")
    read = condition_results.write_conditions(folder, written)
    assert read == records.read_json(folder / "conditions.json")
    return read


def test_file_holds_every_condition_with_its_verdict(found):
    for name in ("condition1", "condition2", "condition3", "condition4"):
        verdict = found[name]["verdict"]
        assert verdict["holds"] == all(c["holds"] for c in verdict["checks"])
        for check in verdict["checks"]:
            assert set(check) == {*Check._fields, "holds"}
    ((first, second, coherence),) = found["condition2"]["flagged"]
    assert (first, second) == ("in", "out")
    assert coherence == pytest.approx(found["condition2"]["coherence"][0][1])
    assert [layer["name"] for layer in found["layers"]["blocks"]] == ["in", "out"]
    assert len(found["condition4"]["measurements"]) == 2


def test_table_has_a_row_for_every_check(found):
    lines = condition_results.format_conditions(found).split("\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    checks = [
        c for name in condition_results.TITLES for c in found[name]["verdict"]["checks"]
    ]
    assert [row[1] for row in rows[2:]] == [check["name"] for check in checks]
    assert [row[4] == "holds" for row in rows[2:]] == [c["holds"] for c in checks]
    assert len({len(line) for line in lines}) == 1
    broken = json.loads(json.dumps(found))
    broken["condition3"]["verdict"]["checks"][2] |= {"number": None, "error": None}
    broken["condition2"]["verdict"]["checks"][0] |= {
        "number": 0.5,
        "error": 0.02,
        "converged": False,
        "holds": False,
    }
    table = condition_results.format_conditions(broken)
    assert "n/a" in table
    assert "0.5 +- 0.02" in table
    assert "fails, not converged" in table


def test_table_says_what_proposition_2_does_of_a_state_space_model(found):
    report = {
        "rho": 0.5,
        "in_condition": True,
        "below_bound": True,
        "predicted_range": 4,
        "measured_range": 3,
        "epsilon": 0.25,
    }
    told = condition_results.format_conditions(found | {"propagation": report})
    assert "under the bound" in told
    assert "below 0.25 at 3 blocks, predicted 4" in told
    beyond = condition_results.format_propagation(report | {"measured_range": None})
    assert "beyond the depth" in beyond
    above = condition_results.format_propagation(report | {"below_bound": False})
    assert "NOT under the bound" in above
    outside = report | {"rho": 1.0, "in_condition": False, "predicted_range": None}
    assert "outside the condition" in condition_results.format_propagation(outside)


def test_page_draws_every_check_over_its_threshold(found, tmp_path, monkeypatch):
    drawn = []

    def keep(drawings, folder):
        drawn.extend(draw() for draw in drawings.values())
        return []

    monkeypatch.setattr(condition_figures, "save_figures", keep)
    condition_figures.write_condition_page(found, tmp_path)
    (page,) = drawn
    axis = page.subfigs[0].axes[0]
    checks = [
        check
        for name in condition_results.TITLES
        for check in found[name]["verdict"]["checks"]
    ]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert [label[3:] for label in labels] == [check["name"] for check in checks]
    told = [text.get_text() for text in axis.texts]
    assert ["holds" in text for text in told] == [check["holds"] for check in checks]
    dots = {
        line.get_ydata()[0]: line.get_xdata()[0]
        for line in axis.lines
        if line.get_marker() == "o"
    }
    for row, check in enumerate(reversed(checks)):
        if row in dots:
            assert (dots[row] <= 1) == check["holds"], check


def test_report_has_the_table(found, tmp_path):
    records.write_json(tmp_path / "conditions.json", found | {"config": {"seed": 1}})
    (section,) = reporting.find_sections(tmp_path)
    assert section.tables == [condition_results.condition_rows(found)]


def test_page_is_drawn_from_the_file_alone(found, tmp_path):
    paths = condition_figures.write_condition_page(found, tmp_path / "figures")
    assert [path.name for path in paths] == ["conditions.png", "conditions.pdf"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes().startswith(b"%PDF")


def test_page_survives_undefined_numbers(found, tmp_path):
    holes = json.loads(json.dumps(found))
    holes["condition1"]["influence"][-1] = [[0.0, 0.0], [0.0, 0.0]]
    holes["condition3"]["shell_drift"]["drift"] = [[None] * 4]
    holes["condition4"]["central_residuals"] = [None, None]
    holes["layers"]["depth_average"]["residual"] = None
    assert condition_figures.write_condition_page(holes, tmp_path)


def test_every_threshold_has_a_flag():
    values = absl_flags.FlagValues()
    flags.define_threshold_flags(values)
    values(["script"])
    assert flags.thresholds_from_flags(values) == Thresholds()
    values = absl_flags.FlagValues()
    flags.define_threshold_flags(values)
    values(["script", "--max_band=2", "--max_drift=0.25"])
    expected = Thresholds(max_band=2, max_drift=0.25)
    assert flags.thresholds_from_flags(values) == expected


def test_a_run_is_gone_on_with_under_its_own_settings_alone(tmp_path):
    config = Config(workdir=str(tmp_path))
    assert conditions.starts_here(tmp_path, config)
    settings = {name: getattr(config, name) for name in TRAINING_FIELDS}
    records.write_json(tmp_path / "config.json", settings)
    assert conditions.starts_here(tmp_path, config)
    longer = dataclasses.replace(config, epochs=config.epochs + 1)
    assert not conditions.starts_here(tmp_path, longer)


@pytest.mark.slow
def test_a_run_is_trained_measured_and_recognised(tmp_path):
    dataset = synthetic_textures(num_train=64, num_test=32)
    config = Config(
        workdir=str(tmp_path),
        width=2,
        epochs=2,
        train_batch_size=16,
        checkpoint_every=2,
        keep_checkpoints=10,
        batch_size=4,
        num_batches=1,
        num_shells=4,
        window=2,
        activation="gelu",
    )
    options = conditions.Options(num_probes=2, num_points=4)
    with jax.numpy_dtype_promotion("standard"):
        found = conditions.measure_conditions(dataset, config, options)
        assert found["steps"] == [0, 2, 6, 8]
        assert found["blocks"][0] == "stem"
        assert np.shape(found["condition1"]["influence"][0]) == (10, 10)
        assert found["config"]["width"] == 2
        assert found["options"]["thresholds"]["max_drift"] == 0.5
        other = dataclasses.replace(config, width=3)
        message = re.escape("--width: expected 2 as in the run")
        with pytest.raises(UserError, match=message):
            conditions.measure_conditions(dataset, other, options)
