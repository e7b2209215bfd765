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
    PathPoint,
    Thresholds,
    condition_report,
    gradient_flow_direction,
    measure_layers,
    partition_by_prefix,
)
from grsd_jax.experiments import condition_figures, conditions, flags, records
from grsd_jax.experiments.config import TRAINING_FIELDS, Config, UserError
from grsd_jax.experiments.data import synthetic_textures
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
        **conditions.report_entry(report, CONFIG),
        "layers": conditions.layers_entry(layers, blocks, CONFIG),
    }
    folder = tmp_path_factory.mktemp("conditions")
    read = conditions.write_conditions(folder, written)
    assert read == records.read_json(folder / "conditions.json")
    return read


def test_file_holds_every_condition_with_its_verdict(found):
    for name in ("condition1", "condition2", "condition3", "condition4"):
        verdict = found[name]["verdict"]
        assert verdict["holds"] == all(c["holds"] for c in verdict["checks"])
        for check in verdict["checks"]:
            assert set(check) == {"name", "number", "threshold", "relation", "holds"}
    ((first, second, coherence),) = found["condition2"]["flagged"]
    assert (first, second) == ("in", "out")
    assert coherence == pytest.approx(found["condition2"]["coherence"][0][1])
    assert [layer["name"] for layer in found["layers"]["blocks"]] == ["in", "out"]
    assert len(found["condition4"]["measurements"]) == 2


def test_table_has_a_row_for_every_check(found):
    lines = conditions.format_conditions(found).split("\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    checks = [c for name in conditions.TITLES for c in found[name]["verdict"]["checks"]]
    assert [row[1] for row in rows[2:]] == [check["name"] for check in checks]
    assert [row[4] == "holds" for row in rows[2:]] == [c["holds"] for c in checks]
    assert len({len(line) for line in lines}) == 1
    broken = json.loads(json.dumps(found))
    broken["condition3"]["verdict"]["checks"][2]["number"] = None
    assert "n/a" in conditions.format_conditions(broken)


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
