"""The comparison with peers: all that needs no environment of theirs."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from grsd_jax.jacobian.plan import plan_of

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

pytest.importorskip("flax")
sys.path.append(str(BENCHMARKS))
agreement = importlib.import_module("comparison.agreement")
compare = importlib.import_module("compare")
grid = importlib.import_module("comparison.grid")
harness = importlib.import_module("comparison.harness")
inputs_of = importlib.import_module("comparison.inputs")
machine = importlib.import_module("comparison.machine")
targets = importlib.import_module("comparison.targets")

SMALL = "mlp_w4_n12"


@pytest.fixture(scope="module")
def problem():
    return grid.parse_problem(SMALL)


@pytest.fixture(scope="module")
def inputs(problem):
    return inputs_of.make_inputs(problem)


@pytest.fixture(scope="module")
def reference(problem, inputs):
    return inputs_of.make_reference(problem, inputs, derivative=True)


# What is compared


def test_parse_problem_reads_names_and_names_what_it_expected():
    assert grid.parse_problem("resnet18_w16_n32") == (
        "resnet18_w16_n32",
        "resnet18",
        16,
        32,
    )
    for wrong in ("resnet18_w0_n2", "vgg_w1_n1", "mlp_w4"):
        with pytest.raises(ValueError, match=r"problem: expected .*_nEXAMPLES"):
            grid.parse_problem(wrong)


def test_every_peer_is_measured_or_has_a_reason():
    for name, tasks in grid.PLAN.items():
        for task in tasks:
            for peer in grid.entrants(task):
                reason = grid.why_not(peer, grid.parse_problem(name), task)
                if reason is None:
                    assert grid.variants(peer, grid.parse_problem(name), task)
                else:
                    assert reason[0] in ("cannot", "skipped")


def test_eigensolvers_enter_for_eigenpairs_alone():
    assert "scipy_eigsh" in grid.entrants("eigenpairs")
    assert "scipy_eigsh" not in grid.entrants("dense")


def test_every_target_is_in_the_default_plan():
    for outcome in targets.outcomes([]):
        assert outcome.task in grid.PLAN[outcome.problem]


@pytest.mark.parametrize(
    "environment", sorted({peer.environment for peer in grid.PEERS.values()})
)
def test_requirements_pin_every_package(environment):
    file = BENCHMARKS / "requirements" / f"{environment}.txt"
    lines = [line for line in file.read_text().splitlines() if line[:1] != "#"]
    assert lines
    assert all(line.count("==") == 1 for line in lines)


def test_every_peer_has_a_module():
    for peer in grid.PEERS.values():
        assert (BENCHMARKS / "peers" / f"{peer.module}.py").exists()


# Inputs and reference


def test_inputs_are_the_same_each_time_and_their_digest_sees_a_change(problem, inputs):
    again = inputs_of.make_inputs(problem)
    assert inputs_of.digest(again) == inputs_of.digest(inputs)
    again["params/head/bias"] = again["params/head/bias"] + np.float32(1e-6)
    assert inputs_of.digest(again) != inputs_of.digest(inputs)


def test_blocks_are_orthonormal_and_vectors_are_neither_zero_nor_one(inputs):
    block = inputs["block"]
    assert block.shape == (120, 120)
    np.testing.assert_allclose(block.T @ block, np.eye(120), atol=1e-5)
    assert np.all(inputs["params/head/bias"] != 0)


def test_loaded_problem_evaluates_the_softmax_error(problem, inputs):
    loaded = inputs_of.load(problem, inputs)
    batch = jax.tree.map(lambda leaf: leaf[0], loaded.batches)
    error = loaded.problem().error(loaded.params, batch)
    jax_network = importlib.import_module("peers.jax_network")
    params = {k: jnp.asarray(v) for k, v in harness.subtree(inputs, "params").items()}
    with jax.numpy_rank_promotion("allow"):  # a peer's code keeps its own habits
        logits = jax_network.make_logits(problem, {})(params, batch["image"])
    expected = jax.nn.softmax(logits) - np.eye(10, dtype=np.float32)[inputs["labels"]]
    np.testing.assert_allclose(error, expected, atol=1e-6)


@pytest.mark.slow
def test_resnet_of_the_peers_is_that_of_the_package():
    problem = grid.parse_problem("resnet18_w2_n2")
    inputs = inputs_of.make_inputs(problem)
    loaded = inputs_of.load(problem, inputs)
    variables = {**loaded.state, "params": loaded.params}
    expected = loaded.model.apply(variables, inputs["images"])
    jax_network = importlib.import_module("peers.jax_network")
    statistics = harness.subtree(inputs, "batch_stats")
    assert all(np.all(statistics[name] != 0) for name in statistics)
    with jax.numpy_rank_promotion("allow"):
        logits = jax_network.make_logits(problem, statistics)(
            harness.subtree(inputs, "params"), inputs["images"]
        )
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_reference_is_that_of_the_whole_jacobian(problem, inputs, reference, x64):
    double = {
        name: array.astype(np.float64) if array.dtype == np.float32 else array
        for name, array in inputs.items()
    }
    loaded = inputs_of.load(problem, double)

    @jax.jit
    def moved(step):
        params = jax.tree.map(
            lambda p, d: p + step * d, loaded.params, loaded.direction
        )
        return oracles.dense_kernel(loaded.problem(), params)

    expected = moved(0.0)
    np.testing.assert_allclose(reference["kernel"], expected, rtol=1e-9, atol=1e-11)
    h = 1e-6
    difference = (moved(h) - moved(-h)) / (2 * h)
    scale = np.max(np.abs(difference))
    np.testing.assert_allclose(reference["derivative"], difference, atol=1e-5 * scale)


# Our own columns


def test_the_plain_path_has_no_factors(problem, inputs):
    loaded = inputs_of.load(problem, inputs)
    for plain in (False, True):
        point = loaded.problem(plain=plain).at(loaded.params)
        assert (plan_of(point) is None) is plain


@pytest.mark.parametrize(
    ("peer", "task", "variant"),
    [
        ("grsd_jax", "dense", "exact"),
        ("grsd_jax", "block_8", "prepared"),
        ("grsd_jax", "eigenpairs", "b = 4"),
        ("grsd_jax_plain", "block_8", "prepared"),
        ("grsd_jax_plain", "derivative_8", "exact"),
        pytest.param("grsd_jax", "derivative_8", "exact", marks=pytest.mark.slow),
        pytest.param("grsd_jax", "measurement", "auto", marks=pytest.mark.slow),
    ],
)
def test_our_results_agree_with_the_reference(
    peer, task, variant, problem, inputs, reference, tmp_path
):
    job = harness.Job(peer, problem, task, variant, "cpu", inputs, tmp_path)
    case = importlib.import_module("peers.grsd").make_case(job)
    record, result = harness.measure(case, repeats=1, seconds=1.0)
    error = agreement.disagreement(task, result, inputs, reference)
    assert error <= agreement.tolerance(task)
    assert record["recompilations"] == 0
    for name in ("beside_seconds", "details"):
        assert bool(record.get(name)) is bool(getattr(case, name.partition("_")[0]))


# Agreement


def test_agreement_of_matrices(inputs, reference):
    kernel, block = reference["kernel"], inputs["block"][:, :8].astype(np.float64)
    exact = {
        "dense": kernel,
        "block_8": kernel @ block,
        "derivative_8": block.T @ reference["derivative"] @ block,
    }
    for task, matrix in exact.items():
        rounded = {"matrix": matrix.astype(np.float32)}
        wrong = {"matrix": matrix * (1 + 2 * agreement.tolerance(task))}
        limit = agreement.tolerance(task)
        assert agreement.disagreement(task, rounded, inputs, reference) < limit / 10
        assert agreement.disagreement(task, wrong, inputs, reference) > limit


@pytest.mark.parametrize("matrix", [np.full((120, 120), np.nan), np.zeros((3, 3))])
def test_agreement_is_infinitely_far_from_what_is_no_result(matrix, inputs, reference):
    result = {"matrix": matrix}
    assert agreement.disagreement("dense", result, inputs, reference) == np.inf


def leading(reference, members=range(grid.NUM_PAIRS)):
    values, vectors = np.linalg.eigh(reference["kernel"])
    members = list(members)
    return {
        "values": values[::-1][members],
        "vectors": vectors[:, ::-1][:, members],
    }


def test_agreement_of_eigenpairs_sees_a_missed_one_and_a_repeated_one(reference):
    def error(members):
        result = leading(reference, members)
        return agreement.disagreement("eigenpairs", result, {}, reference)

    assert error(range(20)) < 1e-10
    assert error([*range(3), *range(4, 21)]) > agreement.tolerance("eigenpairs")
    assert error([0, 0, *range(2, 20)]) > agreement.tolerance("eigenpairs")


def test_agreement_of_eigenpairs_sees_a_residual(reference):
    result = leading(reference)
    result["vectors"][:, 0] += 1e-2 * result["vectors"][:, 19]
    error = agreement.disagreement("eigenpairs", result, {}, reference)
    assert error > agreement.tolerance("eigenpairs")


def test_agreement_of_a_measurement_does_not_mind_signs(reference):
    pairs = leading(reference, range(120))
    coupling = pairs["vectors"].T @ reference["derivative"] @ pairs["vectors"]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], 120)
    result = {
        "values": pairs["values"],
        "coupling": signs * coupling * signs[:, None],
    }

    def error():
        return agreement.disagreement("measurement", result, {}, reference)

    assert error() < 1e-10
    result["coupling"][0, 0] *= 1.1
    assert error() > agreement.tolerance("measurement")


# Timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a case moves it."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    return now


def taking(clock, *seconds):
    """Returns a function whose calls take the given times, the last one for ever."""
    left = list(seconds)

    def call(*_):
        clock[0] += left.pop(0) if len(left) > 1 else left[0]
        return "result"

    return call


def arrays(result):
    return {"result": np.array(result)}


def test_measure_separates_preparation_first_call_and_repeats(clock):
    case = harness.Case(
        prepare=taking(clock, 5.0, 2.0), run=taking(clock, 4.0, 1.5, 1.0), arrays=arrays
    )
    record, result = harness.measure(case, repeats=3, seconds=60.0)
    assert result["result"] == "result"
    assert record["seconds"]["repeats"] == [1.5, 1.0, 1.0]
    assert record["seconds"]["minimum"] == record["seconds"]["median"] == 1.0
    assert record["prepare_seconds"] == 2.0
    assert record["first_seconds"] == 9.0
    assert record["compile_seconds"] == 9.0 - 3.0
    assert record["peak_mib"] > 0


@pytest.mark.parametrize(
    ("first", "warm", "repeats"), [(4.0, False, 3), (30.0, False, 3), (30.0, True, 1)]
)
def test_measure_repeats_as_the_time_allows(clock, first, warm, repeats):
    case = harness.Case(run=taking(clock, first, 2.0), arrays=arrays, warm=warm)
    record, _ = harness.measure(case, repeats=5, seconds=7.0)
    assert len(record["seconds"]["repeats"]) == repeats
    assert record["seconds"]["minimum"] == (first if warm else 2.0)


def test_measure_times_the_other_function_in_turn(clock):
    case = harness.Case(
        run=taking(clock, 1.0), beside=taking(clock, 9.0, 2.0), arrays=arrays
    )
    record, _ = harness.measure(case, repeats=2, seconds=60.0)
    assert record["beside_seconds"]["repeats"] == [2.0, 2.0]


def test_measure_counts_what_other_weights_compile(clock):
    programs = [7]

    def other_weights():
        programs[0] += 1

    case = harness.Case(
        run=taking(clock, 1.0),
        arrays=arrays,
        compilations=lambda: programs[0],
        other_weights=other_weights,
    )
    record, _ = harness.measure(case, repeats=1, seconds=60.0)
    assert (record["programs"], record["recompilations"]) == (7, 1)


def test_the_first_result_counts_from_the_start_of_the_process(clock):
    case = harness.Case(
        run=taking(clock, 1.0), compile=taking(clock, 4.0), prepare=taking(clock, 2.0)
    )
    clock[0] += 3.0  # imports
    assert harness.first_result_seconds(case, 0.0) == 10.0


# The driver


@pytest.fixture
def options(tmp_path):
    (tmp_path / "measurements").mkdir()
    return Namespace(
        out=tmp_path,
        environments=tmp_path,
        device="cpu",
        repeats=2,
        seconds=1.0,
    )


def test_a_measurement_is_not_repeated_unless_its_inputs_change(
    problem, options, monkeypatch
):
    ran = []

    def run(row, *_):
        ran.append(row["variant"])
        return {**row, "status": "ok"}

    monkeypatch.setattr(compare, "run_measurement", run)

    def measure(about):
        rows = compare.measure_task("torch_func", problem, "dense", about, options)
        for row in rows:
            compare.write_row(options.out, row)

    measure({"inputs": "a"})
    assert ran == list(grid.PEERS["torch_func"].variants["dense"])
    measure({"inputs": "a"})
    assert len(ran) == 2
    measure({"inputs": "b"})
    assert len(ran) == 4


def test_what_cannot_be_done_is_a_row_with_a_reason(problem, options):
    (row,) = compare.measure_task("torch_func", problem, "eigenpairs", {}, options)
    assert row["status"] == "cannot"
    assert row["reason"] in compare.summary(row)


def test_a_time_taken_on_a_busy_machine_does_not_count_and_is_taken_again(
    problem, options, monkeypatch
):
    folder = compare.problem_folder(problem, options)
    folder.mkdir(parents=True)
    np.savez(folder / "inputs.npz", images=np.zeros(3))
    np.savez(folder / "reference.npz", kernel=np.eye(3))
    busy = iter([0.0, 1e6, 0.0, 0.0])
    ran, first = [], []

    def run(command, **environ):
        out = options.out / "measurements" / "current"
        if "--first" in command:
            first.append(environ["env"]["JAX_COMPILATION_CACHE_DIR"])
            out.with_name("current_first.json").write_text(f"{9.0 - len(first)}")
            return Namespace(returncode=0)
        ran.append(command)
        np.savez(out.with_suffix(".npz"), matrix=np.eye(3))
        out.with_suffix(".json").write_text('{"seconds": {"minimum": 1.0}}')
        return Namespace(returncode=0)

    monkeypatch.setattr(compare, "others_seconds", lambda: next(busy))
    monkeypatch.setattr(compare.subprocess, "run", run)
    for status in ("busy", "ok", "ok"):
        (row,) = compare.measure_task(
            "grsd_jax", problem, "dense", {"inputs": "a"}, options
        )
        compare.write_row(options.out, row)
        assert row["status"] == status
    assert len(ran) == 2
    # Each time a new cache, empty for the first process and filled for the second.
    assert (first[0], first[2]) == (first[1], first[3])
    assert first[0] != first[2]
    assert row["first_result_seconds"] == 6.0
    assert row["first_result_seconds_cached"] == 5.0


def test_others_are_the_machine_without_the_children(monkeypatch):
    everyone = machine.others_seconds()
    children = Namespace(ru_utime=1e4, ru_stime=1e3)
    monkeypatch.setattr(machine.resource, "getrusage", lambda _: children)
    assert machine.others_seconds() < everyone - 1e4


def test_a_failing_peer_is_told_and_not_raised(problem, options, monkeypatch):
    folder = compare.problem_folder(problem, options)
    folder.mkdir(parents=True)
    np.savez(folder / "inputs.npz", images=np.zeros(3))
    monkeypatch.setattr(compare, "interpreter", lambda *_: Path(sys.executable))
    row = {"peer": "torch_func", "problem": SMALL, "task": "dense", "variant": "none"}
    done = compare.run_measurement({**row, "device": "cpu"}, problem, options)
    assert done["status"] == "failed"
    assert "seconds" not in done
    monkeypatch.setattr(compare, "TIME_LIMIT", 1e-3)
    done = compare.run_measurement({**row, "device": "cpu"}, problem, options)
    assert done["status"] == "timeout"


def test_results_come_in_the_order_of_the_grid(options):
    for task, peer in (("dense", "torch_func"), ("dense", "grsd_jax")):
        row = {"problem": SMALL, "task": task, "peer": peer, "variant": "a"}
        compare.write_row(options.out, {**row, "device": "cpu"})
    rows = compare.collect(options.out)["rows"]
    assert [row["peer"] for row in rows] == ["grsd_jax", "torch_func"]


def test_margins_are_those_of_the_units(problem, inputs):
    """Of the MLP, by hand in NumPy."""
    variables = {"params": {}}
    for name, array in inputs.items():
        _, *path = name.split("/")
        if name.startswith("params/"):
            variables["params"].setdefault(path[0], {})[path[1]] = array
    state = inputs["images"].reshape(len(inputs["images"]), -1).astype(np.float64)
    expected = np.full(len(state), np.inf)
    for start in range(0, len(state), 8):
        part = state[start : start + 8]
        for index in (1, 2, 3):
            layer = variables["params"][f"hidden{index}"]
            part = part @ layer["kernel"].astype(np.float64) + layer["bias"]
            smallest = np.abs(part).min(axis=1) / np.sqrt(np.mean(part**2))
            chosen = slice(start, start + 8)
            expected[chosen] = np.minimum(expected[chosen], smallest)
            part = np.maximum(part, 0)
    model = inputs_of.make_model(problem)
    found = inputs_of.sign_margins(model, variables, inputs["images"])
    np.testing.assert_allclose(found, expected, rtol=1e-9)
