"""The records of a probe on disk, in a bare loop that is killed and goes on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax as grsd
import oracles
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.track.log import ProbeLog

CLOCK = ("seconds", "gradient_seconds", "cost")
AMOUNTS = {"energies", "lost", "moved", "flux", "rotation", "density"}


@pytest.fixture(scope="module")
def training():
    """Returns a function that trains from a checkpoint to a step, and the start."""
    problem, params = oracles.network_problem("mlp", jnp.float32)
    instantaneous = grsd.dynamics.Instantaneous(num_bootstrap=0)
    probe = grsd.make_probe(
        problem, every=2, shells=4, schedule=0.1, instantaneous=instantaneous
    )

    def train(log, checkpoint, last_step, save_every=3):
        step, params, state = checkpoint
        log.rewind(int(state.last_step))
        while step <= last_step:
            state, record = probe.update(state, params, step)
            if record is not None:
                log.append(record, width=7)
            direction = grsd.gradient_flow_direction(problem, params)
            move = lambda p, d: p + jnp.asarray(0.1, p.dtype) * d  # noqa: E731
            params = jax.tree.map(move, params, direction)
            step += 1
            if step % save_every == 0:
                checkpoint = step, params, state
        return checkpoint

    return train, (0, params, probe.init(jax.random.key(0), params))


def timeless(log):
    return [{k: v for k, v in x.items() if k not in CLOCK} for x in log.read()]


def test_a_killed_loop_leaves_the_lines_of_a_whole_one(training, tmp_path):
    train, start = training
    whole, broken = ProbeLog(tmp_path / "whole"), ProbeLog(tmp_path / "broken")
    train(whole, start, 10)
    assert [line["step"] for line in whole.read()] == [0, 2, 4, 6, 8, 10]
    assert whole.read()[0]["width"] == 7
    checkpoint = start
    for last_step in (0, 4, 5, 8):  # killed there, to go on from the last checkpoint
        checkpoint = train(broken, checkpoint, last_step)
        with open(tmp_path / "broken", "a", encoding="utf-8") as file:
            file.write('{"step": 9, "energ')
    train(broken, checkpoint, 10)
    assert timeless(broken) == timeless(whole)


def test_a_line_is_strict_json_with_every_part_of_the_record(training, tmp_path):
    train, start = training
    log = ProbeLog(tmp_path / "lines")
    train(log, start, 2)

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "lines").read_text()
    first, line = [json.loads(x, parse_constant=refuse) for x in text.splitlines()]
    assert (line.pop("line"), len(line.pop("crc32"))) == (2, 8)
    assert line == log.read()[1]
    assert set(line) == set(first) - {"line", "crc32"}
    assert set(line) >= AMOUNTS | {"velocity", "counting_velocity", "velocity_mask"}
    assert set(line) >= {"elapsed", "effective_time", "num_resolved", "converged"}
    assert set(line) >= {"step", "start_step", "edges", "floor", "cost", "values"}
    errors = {"flux_error", "energy_error", "lost_error", "moved_error"}
    assert set(line) >= errors | {"velocity_error", "density_error"}
    assert (line["start_step"], line["step"]) == (0, 2)
    assert np.shape(line["moved"]) == (4, 4)
    assert np.shape(line["flux"]) == (3,)
    # Before there are two ends there are rates alone.
    assert first["flux"] is first["edges"] is None
    dynamics = set(grsd.dynamics.ShellDynamics._fields)
    for rates in (first["instantaneous"], line["instantaneous"]):
        assert set(rates) >= dynamics | {"exponent", "closure_error"}
        assert np.shape(rates["transfers"]) == (4, 4)


def test_balance_of_a_line_adds_up(training, tmp_path):
    train, start = training
    log = ProbeLog(tmp_path / "lines")
    train(log, start, 4)
    for line in log.read()[1:]:
        before, after = np.array(line["energies"])
        gained = np.sum(line["moved"], axis=1) - np.array(line["lost"])
        np.testing.assert_allclose(after - before, gained, atol=1e-5 * before.sum())
        flux = [np.sum(np.array(line["moved"])[k + 1 :, : k + 1]) for k in range(3)]
        np.testing.assert_allclose(line["flux"], flux, atol=1e-5 * before.sum())


def test_a_log_that_is_not_one_is_named(tmp_path):
    path = tmp_path / "lines"
    path.write_text("something else\n")
    with pytest.raises(UserError, match="a JSON object on every line, got: line 1"):
        ProbeLog(path).rewind(3)
    assert path.read_text() == "something else\n"
