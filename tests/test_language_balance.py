"""The balance of a language model's tokens, and the script that records it."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grsd_jax import Problem, make_probe
from grsd_jax.dynamics import KrylovSteps
from grsd_jax.shells import SoftShells
from oracles import cast, dense_kernel
from test_between_ends import assert_within_errors
from test_exact_balance import by_definition, snapshot_of

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
gpt = importlib.import_module("gpu.gpt")
script = importlib.import_module("language_balance")

EDGES = np.geomspace(0.3, 300, 7)


def in_double(problem, params):
    """Returns kernel and error in float64, by NumPy."""
    with jax.enable_x64(True):
        params = cast(params, jnp.float64)
        batch = jax.tree.map(lambda leaf: leaf[0], problem.batches)
        error = np.asarray(problem.error(params, batch)).reshape(-1)
        return snapshot_of(np.asarray(dense_kernel(problem, params)), error)


@pytest.mark.scheduled
@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_balance_of_tokens_is_right_within_its_errors():
    size = gpt.Size(layers=1, width=8, vocabulary=16, positions=4, examples=4)
    assert size.dimension == 256
    params, optimizer = gpt.make_params(size), optax.adamw(3e-3)
    problem = Problem(gpt.logits, gpt.make_batches(size))
    probe = make_probe(
        problem,
        every=3,
        solver=KrylovSteps(32),
        shells=SoftShells(jnp.asarray(EDGES, jnp.float32)),
        schedule=0.1,
    )
    gradient = jax.jit(jax.grad(problem.loss))
    state, own = probe.init(jax.random.key(0), params), optimizer.init(params)
    ends = []
    for step in range(4):
        state, record = probe.update(state, params, step)
        ends.append(params)
        updates, own = optimizer.update(gradient(params), own, params)
        params = optax.apply_updates(params, updates)
    oracle = [in_double(problem, ends[step]) for step in (0, 3)]
    assert (record.start_step, record.step) == (0, 3)
    assert_within_errors(record.balance, by_definition(*oracle, EDGES, 0.5))
    assert record.num_resolved >= 3


@pytest.mark.scheduled
@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_script_is_rehearsed(tmp_path, capsys):
    script.main(["--rehearse", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "language_balance.json").read_text())
    assert report["dimension"] == 4 * 256
    ends = [(line["start_step"], line["step"]) for line in report["records"]]
    assert ends == [(0, 1), (0, 2), (2, 3), (2, 4)]
    for line in report["records"]:
        assert line["finite"]
        assert line["cpu_seconds"] > 0
        assert len(line["counting_error"]) == len(line["edges"])
        shift = np.array(line["flux"], float) / np.array(line["density"], float)
        np.testing.assert_allclose(np.array(line["shift"], float), shift, rtol=1e-5)
    told = capsys.readouterr().out
    assert "Steps 2 to 4: |e|^2" in told
    assert "n = 1024" in told


def test_probe_predicts_the_byte_that_follows():
    text = np.frombuffer(script.text_of_topics(), np.uint8)
    size = gpt.Size(layers=1, width=8, vocabulary=256, positions=6, examples=3)
    batches = script.probe_sequences(text, size)
    tokens, label = (np.asarray(batches[name]) for name in ("tokens", "label"))
    assert tokens.shape == label.shape == (1, 3, 6)
    np.testing.assert_array_equal(tokens[..., 1:], label[..., :-1])
    whole = bytes(text)
    for row, following in zip(tokens[0], label[0], strict=True):
        assert bytes(row.astype(np.uint8)) + bytes([following[-1]]) in whole
