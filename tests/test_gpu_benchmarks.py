"""The stages for an accelerator, rehearsed on a CPU, and what they are built from."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import test_gpu
from grsd_jax.experiments.common.data import make_dataset

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "benchmarks" / "gpu"
sys.path.append(str(GPU))
common, correctness, gpt, packed, speed = map(
    importlib.import_module, ("common", "correctness", "gpt", "packed", "speed")
)


def rehearse(stage, out, minutes):
    command = [sys.executable, GPU / f"{stage}.py", "--out", out, "--rehearse"]
    done = subprocess.run(
        [*map(str, command), "--minutes", str(minutes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / f"{stage}.json").read_text()), done.stdout


@pytest.mark.scheduled
def test_correctness_is_rehearsed(tmp_path):
    report, told = rehearse("correctness", tmp_path, 30)
    assert report["header"]["versions"]["jax"] == jax.__version__
    assert report["header"]["rehearsal"]
    tests = report["gpu"]["tests"]
    name = "tests/test_gpu.py::test_shell_statistics"
    assert tests[name]["outcome"] == "passed"
    assert 0 < tests[name]["measured"]["shells"] < test_gpu.BOUND
    assert report["ordinary"]["complete"]
    assert report["ordinary"]["tests"]
    assert "0 failed" in told


def test_the_last_word_on_each_test_counts(tmp_path):
    record = tmp_path / "tests.jsonl"
    lines = [
        {"test": "a", "outcome": "failed", "lines": ["E  one", "E  two", "E  three"]},
        {"test": "b", "outcome": "failed", "lines": ["E  four"]},
        {"test": "a", "outcome": "passed"},
    ]
    record.write_text("\n".join(map(json.dumps, lines)) + '\n{"test": "c", "outc')
    tests = correctness.read_tests(record)
    assert {name: about["outcome"] for name, about in tests.items()} == {
        "a": "passed",
        "b": "failed",
    }
    told = correctness.told("gpu", {"tests": tests, "complete": False})
    assert told.startswith("gpu: 1 passed, 1 failed of 2 that ended; the time was up")
    assert told.endswith("  b\n    E  four")


@pytest.mark.scheduled
def test_speed_is_rehearsed_and_resumed(tmp_path):
    report, _ = rehearse("speed", tmp_path, 6)
    assert not report["failures"]
    assert all(told.endswith(": not installed") for told in report["left_out"])
    found = report["measurements"]
    for name in (
        "mlp_k4n4_dense_highest",
        "mlp_k4n4_block4_prepared_highest",
        "mlp_k4n4_derivative4_tf32",
        "gpt10_block8_highest",
        "gpt124_block8_tf32",
    ):
        assert 0 < found[name]["error"] < 1e-4, name
        assert found[name]["seconds"]["minimum"] > 0
        assert found[name]["operations"] > 0
    assert found["mlp_k4n4_measurement_highest"]["told"]["solver"] == "dense"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("speed/*_*.json")}
    rehearse("speed", tmp_path, 6)
    kept = [path for path in before if "left_out" not in path.name]
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)


@pytest.mark.scheduled
def test_science_is_rehearsed(tmp_path):
    report, told = rehearse("science", tmp_path, 4)
    assert report["left_out"] == []
    for name in ("resnet18", "plainnet18", "plainnet18_shared"):
        assert report[name]["reduction"] == "stack"
        assert report[name]["n"] == 40
        assert np.isfinite(report[name]["quantities"]["slope"])
        assert name in told
    assert report["plainnet18_shared"]["weights_of"] == "resnet18"
    assert report["resnet18_training"]["steps"] > 10


def test_a_measurement_is_made_once_and_a_failure_is_told(tmp_path):
    made = []

    def measure():
        made.append(1)
        return {"value": 3}

    def fail():
        raise MemoryError("out of memory")

    results = common.Results(tmp_path, common.Clock(1))
    results.measure("good", measure)
    results.measure("good", measure)
    results.measure("bad", fail)
    assert made == [1]
    assert common.read_json(tmp_path / "good.json")["value"] == 3
    assert common.read_json(tmp_path / "bad.failed.json")["error"] == "MemoryError"
    results.measure("bad", measure)  # a later attempt may succeed
    assert not (tmp_path / "bad.failed.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "good.json"]


def test_nothing_is_started_when_the_time_is_nearly_up(tmp_path):
    results = common.Results(tmp_path, common.Clock(0.1))
    results.measure("late", lambda: {}, needs=7)
    assert results.left_out == ["late"]
    assert not (tmp_path / "late.json").exists()


def test_what_a_process_did_not_survive_is_not_tried_again(tmp_path):
    (tmp_path / "fatal.running").touch()
    results = common.Results(tmp_path, common.Clock(1))
    results.measure("fatal", lambda: {})
    assert common.read_json(tmp_path / "fatal.failed.json")["error"] == "crash"
    assert not (tmp_path / "fatal.json").exists()


def test_a_folder_holds_one_kind_of_run(tmp_path):
    common.claim(tmp_path, "speed", {"rehearse": True})
    common.claim(tmp_path, "speed", {"rehearse": True})
    with pytest.raises(SystemExit, match="holds a run with"):
        common.claim(tmp_path, "speed", {"rehearse": False})


def test_timed_tells_the_first_call_from_the_others():
    calls = []
    result, times = common.timed(lambda: calls.append(1) or len(calls), repeats=3)
    assert len(calls) == 4
    assert result == 4
    assert len(times["seconds"]["repeats"]) == 3
    assert times["seconds"]["minimum"] <= times["seconds"]["median"]


def test_plain_operations_are_those_of_the_closed_form():
    forward = {"name": "operations_resnet_k4n8_forward", "operations": 80.0}
    parameters = {"operations": 7}

    def operations(work):
        return speed.plain_operations(work, forward, parameters)

    # A pass over an image takes 10.
    assert operations("resnet_k4n8_block16_prepared") == 4 * 320 * 16
    assert operations("torch_k4n8_block_16") == 4 * 320 * 16
    assert operations("resnet_k4n8_derivative16") == 6 * 320 * 16
    assert operations("resnet_k1n2_dense") == 2 * 10 * 20 + 2 * 20**2 * 7
    assert operations("gpt10_block8") is None
    assert operations("resnet_k4n8_measurement") is None


def test_errors_and_shares_of_the_peak_are_collected(tmp_path):
    seconds = common.summary([0.5])
    records = {
        "matmul_tf32": {"operations": 200.0, "seconds": seconds},
        "resnet_k1n1_dense_tf32": {"seconds": seconds},
        "resnet_k1n2_block4_prepared_tf32": {"seconds": seconds},
        "operations_resnet_k1n1_dense": {"operations": 50, "bytes_before_fusion": 1},
        "torch_k1n2_dense_tf32.failed": {"error": "OutOfMemoryError"},
    }
    for name, record in records.items():
        common.write_json(tmp_path / f"{name}.json", record)
    columns = np.arange(1.0, 161).reshape(20, 8)
    np.savez(tmp_path / "reference.npz", columns=columns)
    dense, product = np.split(columns, 2, axis=1)
    np.savez(tmp_path / "resnet_k1n1_dense_tf32.npz", columns=dense[:10] * 1.25)
    np.savez(tmp_path / "resnet_k1n2_block4_prepared_tf32.npz", columns=product)
    report = speed.collect(tmp_path)
    found = report["measurements"]["resnet_k1n1_dense_tf32"]
    assert found["error"] == 0.25
    assert found["share_of_peak"] == 0.25
    assert report["measurements"]["resnet_k1n2_block4_prepared_tf32"]["error"] == 0
    assert list(report["failures"]) == ["torch_k1n2_dense_tf32.failed"]


def test_packed_images_fit_and_are_those_that_are_named(tmp_path):
    noise = np.random.default_rng(0)
    splits = {
        name: (
            noise.integers(0, 256, (count, 32, 32, 3), np.uint8),
            noise.permutation(np.arange(count) % 10),
        )
        for name, count in (("train", 200), ("test", 40))
    }
    path, limit = tmp_path / packed.FILE, 500_000
    chosen = packed.write(path, splits, limit)
    assert 0.8 * limit < path.stat().st_size <= limit
    raw = {name: (x[chosen[name]], y[chosen[name]]) for name, (x, y) in splits.items()}
    for name, (_, labels) in raw.items():
        assert set(np.bincount(labels)) == {len(labels) // 10}
        for label in range(10):
            first = np.flatnonzero(splits[name][1] == label)[: len(labels) // 10]
            assert set(first) <= set(chosen[name])
    expected = make_dataset("cifar10_subset", raw["train"], raw["test"], 10)
    got = packed.read(path)
    assert got.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(got.test_images, expected.test_images)
    with pytest.raises(ValueError, match="max_bytes: expected room"):
        packed.write(path, splits, 20_000)


@pytest.mark.parametrize(("name", "millions"), [("gpt10", 10), ("gpt124", 124)])
def test_gpts_have_the_stated_parameters(name, millions):
    shapes = jax.eval_shape(lambda: gpt.make_params(gpt.SIZES[name]))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert abs(count / 1e6 / millions - 1) < 0.05


@pytest.fixture
def tiny():
    with jax.numpy_rank_promotion("allow"), jax.enable_x64(True):
        params = gpt.make_params(gpt.TINY)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        batch = jax.tree.map(lambda leaf: leaf[0], gpt.make_batches(gpt.TINY))
        yield params, batch


def test_gpt_is_causal(tiny):
    params, batch = tiny
    tokens = batch["tokens"]
    moved = {**batch, "tokens": tokens.at[:, 5].set((tokens[:, 5] + 1) % 32)}
    before, after = gpt.logits(params, batch), gpt.logits(params, moved)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert jnp.all(jnp.any(before[:, 5:] != after[:, 5:], axis=-1))


def test_gauss_newton_product_is_that_of_the_dense_factors(tiny):
    params, batch = tiny
    flat, unflatten = ravel_pytree(params)
    outputs = gpt.logits(params, batch)
    jacobian = jax.jacrev(lambda p: gpt.logits(unflatten(p), batch).reshape(-1, 32))
    rows = np.asarray(jacobian(flat))  # [N T, V, P]
    chances = np.asarray(jax.nn.softmax(outputs)).reshape(-1, 32)
    hessians = np.stack([np.diag(p) - np.outer(p, p) for p in chances])
    vector = np.random.default_rng(0).normal(size=flat.shape)
    moved = np.einsum("nuv,nv->nu", hessians, rows @ vector) / len(chances)
    expected = np.einsum("nvp,nv->p", rows, moved)
    stacked = jax.vmap(unflatten)(jnp.asarray(vector)[None])
    got = ravel_pytree(gpt.gauss_newton(params, batch, stacked))[0]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_a_product_of_low_precision_is_found():
    square = jnp.ones((4, 4))
    for precision, low in (("highest", 0), ("high", 1), ("default", 1)):
        program = jax.jit(lambda x, p=precision: jnp.matmul(x, x, precision=p))
        lowered = program.lower(square)
        products, found = test_gpu.imprecise(lowered.as_text())
        assert len(products) == 1
        assert len(found) == low
    call = 'custom_call_target="__cublas$gemm", {"operand_precision":["%s","%s"]}'
    assert test_gpu.imprecise_compiled(call % ("DEFAULT", "DEFAULT"))
    assert not test_gpu.imprecise_compiled(call % ("HIGHEST", "HIGHEST"))
    dot = "  %d = f32[4,4] dot(%a, %b), operand_precision={%s,%s}"
    assert test_gpu.imprecise_compiled(dot.replace("%s", "high"))
    assert not test_gpu.imprecise_compiled(dot.replace("%s", "highest"))
