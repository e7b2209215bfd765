"""The study of the velocity law: its statistic, planted laws, and a resumed run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from grsd_jax import Problem, models
from grsd_jax.dynamics import spectral_snapshot
from grsd_jax.experiments.common import data, networks, records, training
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.report import page
from grsd_jax.experiments.transport import (
    analyse,
    figures,
    protocol,
    quantities,
    run,
    snapshots,
)
from planted import energies, snapshot, turned
from running import run_script, small, small_textures

NETWORKS = ("resnet18", "plainnet18")
#: What the first reading found for seed 0, steps 16 to 512, with its own summary.
FIRST_READING = {
    "resnet": [
        [0.48, 0.82, 0.81, 0.73, 1.1, 1.0, 0.68, 0.24],
        [0.34, 0.25, 0.63, 0.67, 0.42, 0.52, 0.71, 1.1],
        [-0.20, 0.55, 0.72, 0.51, 0.48, 0.64, 0.88, 1.7],
        [0.77, 0.41, 0.52, 0.30, 0.39, 0.41, 0.63, 1.1],
        [0.16, 0.41, 0.49, 1.1, 0.93, 0.84, 0.64, 0.64],
    ],
    "plain": [
        [2.3, 5.4, 2.4, 1.3, 1.6, 1.1, -0.6, -0.5],
        [1.2, 1.3, 2.0, 1.7, 1.6, 1.2, 0.9, 0.4],
        [0.05, -0.07, 0.03, 0.1, 0.3, 0.5, 0.5, 0.6],
        [0.13, 0.36, 0.79, 1.1, 1.2, 0.75, 0.65, 1.0],
        [0.36, 0.09, 0.43, 0.83, 1.1, 1.6, 1.6, 1.6],
    ],
}


@pytest.mark.parametrize(
    ("network", "size", "edge_spread", "interval_spread"),
    [("resnet", 0.64, 0.26, 0.06), ("plain", 0.97, 0.47, 0.47)],
)
def test_the_statistic_is_the_one_of_the_first_reading(
    network, size, edge_spread, interval_spread
):
    products = np.array(FIRST_READING[network])
    found = quantities.statistics(products, min_edges=3)
    assert found["size"] == pytest.approx(size, abs=0.005)
    assert found["edge_spread"] == pytest.approx(edge_spread, abs=0.008)
    assert found["interval_spread"] == pytest.approx(interval_spread, abs=0.008)
    for name in ("edge_spread", "interval_spread"):
        assert found[f"relative_{name}"] == found[name] / found["size"]
    less = quantities.statistics(-10 * products, min_edges=3)
    assert less["relative_edge_spread"] == pytest.approx(found["relative_edge_spread"])


def test_edges_and_intervals_that_cannot_be_used_are_left_out():
    nan = np.nan
    products = np.array([[1, 3, nan, 2], [nan, nan, 9, 9], [2, 4, 6, nan]])
    found = quantities.statistics(products, min_edges=3)
    assert found["size"] == 3
    assert found["edge_spread"] == pytest.approx((np.sqrt(2 / 3) + np.sqrt(8 / 3)) / 2)
    assert found["interval_spread"] == 1
    alone = quantities.statistics(products[:2], min_edges=3)
    assert list(alone) == list(quantities.STATISTICS)
    assert np.isnan(list(alone.values())).all()


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=(8, 3))
    without = np.array([np.delete(values, i, 0).mean(0) for i in range(8)])
    expected = values.std(axis=0, ddof=1) / np.sqrt(8)
    np.testing.assert_allclose(quantities.jackknife_stderr(without), expected)
    assert np.isnan(quantities.jackknife_stderr(without[:1])).all()


VALUES = np.geomspace(1e-6, 1e4, 250)
LOGS = np.log(VALUES)
ENDS = [16, 32, 64, 128]
TIMES = 0.02 * np.arange(129)


def below(logs):
    """Returns the energy below each log lambda, of a Gaussian density."""
    return 100 * ndtr(logs / np.sqrt(30))


ENERGY = energies(LOGS, below)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "exponent", [0.0, 0.2, pytest.param(-0.3, marks=pytest.mark.scheduled)]
)
def test_planted_laws_are_recovered(exponent):
    rate = 0.02  # (v - v^N) tau = rate * lambda^exponent
    chain = {}
    for step in ENDS:
        flown = energies(LOGS, below, rate * np.log(step / 8), exponent)
        chain[step] = turned(VALUES, ENERGY, flown)
    law = quantities.law_of(chain, TIMES, ENDS, width=1 / 2, grid="top")
    off = np.abs(law.numbers["exponents"] - 1 - exponent)
    assert np.all(off <= law.numbers["exponent_errors"])
    assert np.all(off < 0.02)
    assert np.all(law.numbers["exponent_errors"] < 0.1)
    np.testing.assert_allclose(law.numbers["decay"], -1, atol=0.02)
    found = quantities.statistics(law.products["flux"], min_edges=3)
    if exponent == 0:
        assert found["size"] == pytest.approx(rate, rel=0.02)
        assert found["relative_edge_spread"] < 0.03
        assert found["relative_interval_spread"] < 0.01
        np.testing.assert_allclose(
            law.products["shift"], law.products["flux"], rtol=0.02
        )
    else:
        assert found["relative_edge_spread"] > 0.1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("growth", "bound"), [(0.01, 2e-4), (1.0, 0.1)])
def test_a_kernel_that_only_grows_has_no_velocity_beyond_its_null(growth, bound):
    rng, size = np.random.default_rng(1), len(VALUES)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    chain = {
        step: snapshot(
            VALUES * np.exp(growth * i), basis, basis @ np.sqrt(ENERGY) * (1 - 0.1 * i)
        )
        for i, step in enumerate(ENDS)
    }
    law = quantities.law_of(chain, TIMES, ENDS, width=1 / 2, grid="fixed")
    counted = law.numbers["counted"] * np.log(2)
    used = np.isfinite(law.products["flux"])
    assert used.sum() > 20
    assert np.all(np.abs(counted[used] - growth) < bound + 0.1 * growth)
    assert np.all(np.abs(law.products["flux"][used]) < bound)
    # The shift's null is exact, however far the kernel has grown.
    assert np.all(np.abs(law.products["shift"][used]) < 1e-6)


@pytest.mark.parametrize(("far", "share"), [(False, 0.0), (True, 1.0)])
def test_the_resolution_of_two_turning_modes_is_in_closed_form(far, share):
    values = np.array([1.0, 1e-2 if far else 0.3], np.float32)
    angle = 0.3
    cos, sin = np.cos(angle), np.sin(angle)
    basis = np.array([[cos, -sin], [sin, cos]], np.float32)
    ends = {
        step: snapshot(values[::-1], vectors[:, ::-1], np.array([0, 2], np.float32))
        for step, vectors in ((64, np.eye(2, dtype=np.float32)), (68, basis))
    }
    (found,) = quantities.resolution_of(ends, [(64, 4)])
    assert found["moved"] == pytest.approx(sin**2, rel=1e-5)
    assert found["lost"] == pytest.approx(0, abs=1e-6)
    assert found["non_adjacent_share"] == pytest.approx(share, abs=1e-5)
    edges = np.asarray(protocol.grid_of("top", 1.0, 0).edges)
    passed = np.sum((edges > values[1]) & (edges <= values[0])) / len(edges)
    assert found["flux"] == pytest.approx(passed * sin**2, rel=1e-5)


def test_a_snapshot_of_fewer_images_is_the_one_of_their_problem():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "hidden": jax.random.normal(keys[0], (5, 7)),
        "out": jax.random.normal(keys[1], (7, 3)),
    }
    batches = {
        "image": jax.random.normal(keys[2], (2, 4, 5)),
        "label": jax.random.randint(keys[3], (2, 4), 0, 3),
    }

    def outputs_fn(params, batch):
        return jnp.tanh(batch["image"] @ params["hidden"]) @ params["out"]

    whole = spectral_snapshot(Problem(outputs_fn, batches), params)
    kept = np.array([0, 3, 4, 5, 7])
    fewer = jax.tree.map(lambda x: x.reshape(1, 8, *x.shape[2:])[:, kept], batches)
    direct = spectral_snapshot(Problem(outputs_fn, fewer), params)
    found = snapshots.of_images(whole, kept, 8)
    top = float(direct.values[0])
    np.testing.assert_allclose(found.values, direct.values, atol=2e-6 * top)
    np.testing.assert_allclose(found.error, direct.error, rtol=1e-6)
    kernels = [x.vectors @ jnp.diag(x.values) @ x.vectors.T for x in (found, direct)]
    np.testing.assert_allclose(*kernels, atol=2e-6 * top)


def test_groups_of_images_are_left_out_in_turn():
    rng = np.random.default_rng(3)
    parts = rng.normal(size=(10, 10)), rng.normal(size=10)
    kernel = parts[0] @ parts[0].T
    values, vectors = np.linalg.eigh(kernel)
    found = snapshots.without_groups(
        {4: snapshot(values, vectors, parts[1])}, num_images=5, num_groups=2
    )
    for group, rows in zip(found, (slice(6, 10), slice(0, 6)), strict=True):
        np.testing.assert_allclose(group[4].error, parts[1][rows], rtol=1e-5)
        expected = np.linalg.eigvalsh(kernel[rows, rows])[::-1]
        np.testing.assert_allclose(group[4].values, expected, rtol=1e-4, atol=1e-4)
    assert snapshots.without_groups({}, num_images=1, num_groups=8) == []
    none = quantities.image_errors([], None, protocol.Protocol())
    assert np.isnan([*none["flux"].values(), *none["shift"].values()]).all()


def test_the_steps_are_those_of_doubling_time_and_of_every_start():
    usual = protocol.Protocol()
    assert usual.ends(520) == [16, 32, 64, 128, 256, 512]
    assert {start for start, _ in usual.looks(520)} == {64, 128, 256}
    assert usual.looks(100) == []
    assert usual.instants(130) == [16, 32, 64, 65, 66, 68, 72, 80, 96, 128]
    with pytest.raises(UserError, match=r"--epochs: expected at least 64 .*got 63"):
        usual.ends(63)


def test_arms_change_what_they_say():
    config = Config(momentum=0.0, learning_rate=0.02)
    assert protocol.arm_config("main", config) == config
    momentum = protocol.arm_config("momentum", config)
    assert momentum.learning_rate / (1 - momentum.momentum) == pytest.approx(0.02)
    assert protocol.arm_config("decay", config).schedule == "cosine_decay_schedule"
    assert protocol.arm_config("wide", config).width == 16
    assert protocol.arm_config("images", config).batch_size == 64
    top = protocol.grid_of("top", 100.0, 0.5)
    np.testing.assert_allclose(np.diff(np.log10(top.edges)), 4 / 9, rtol=1e-5)
    assert top.edges[-1] == pytest.approx(100 * 10 ** (-4 / 9))
    assert len(protocol.grid_of("fixed", 1.0, 0.5).edges) == 11


def planted(seeds=(0, 1, 2, 3), ratio=2.0):
    """The contents of transport.json, the plain network's spreads ``ratio`` larger."""
    rng, runs = np.random.default_rng(0), []
    for seed in seeds:
        products = 0.7 + 0.1 * rng.normal(size=(3, 8))
        for network, factor in zip(NETWORKS, (1, ratio), strict=True):
            wider = 0.7 + factor * (products - 0.7)
            found = quantities.statistics(wider, min_edges=3)
            intervals = {
                "products": wider.tolist(),
                "edges": [np.geomspace(1e-3, 1, 8).tolist()] * 3,
                "steps": [[16, 32], [32, 64], [64, 128]],
                "times": [0.5, 1.0, 2.0],
                "means": wider.mean(1).tolist(),
                "counted": [[0.1 * edge for edge in range(8)]] * 3,
                "exponents": [1.0, None, 1.2],
                "curvatures": [0.0, 0.1, 0.2],
                "decay": -1.0,
            }
            readings = [
                reading._asdict() | found | {"image_stderr": found} | intervals
                for reading in protocol.READINGS
            ]
            looks = [
                {"start": 64, "length": h, "non_adjacent_share": 0.1, "moved": h / 100}
                | {"lost": 0.0, "flux": h / 1000}
                for h in (1, 2)
            ]
            runs.append(
                {"arm": "main", "seed": seed, "network": network, "test_accuracy": 0.4}
                | {"readings": readings, "resolution": looks}
            )
    return {"config": {}, "networks": list(NETWORKS), "runs": runs}


def test_networks_are_compared_within_a_seed():
    results = planted()
    rows = {row[1]: row for row in analyse.arm_rows(results, "main")}
    paired = rows[analyse.HEADINGS["edge_spread"]][4]
    assert paired == "ratio 2.000 [2.000, 2.000]"  # the seeds themselves scatter
    of_exponents = rows[analyse.HEADINGS["exponent"]][2]
    assert of_exponents == "1.100 [1.100, 1.100] (8 of 12)"  # each has an undefined one
    assert "of" not in rows[analyse.HEADINGS["size"]][2]
    assert len(analyse.reading_rows(results, "main")) == 1 + len(protocol.READINGS)
    text = analyse.format_transport(results)
    assert "4 paired seeds" in text
    assert " ".join(analyse.LEGEND) in " ".join(text.split())


def test_quantities_say_of_how_many_intervals_they_are():
    results = planted()
    for read in results["runs"][0]["readings"]:  # too few edges in one of 4 x 3
        read["products"][1] = [0.5, None, None, None, None, None, None, 0.5]
    rows = {row[1]: row for row in analyse.arm_rows(results, "main")}
    size = rows[analyse.HEADINGS["size"]]
    assert size[2].endswith("] (11 of 12)")
    assert size[3].endswith("]")


def test_velocities_of_intervals_are_those_of_the_usable_edges():
    results = planted()
    for index, run_ in enumerate(results["runs"][0::2]):
        read = analyse.reading_of(run_)
        read["products"][0] = [None, 0.5, 0.5, 0.5, None, None, None, None]
        if index == 0:
            read["products"][1] = [None] * 6 + [0.5, 0.5]
    heads, *rows = analyse.interval_rows(results, "main")
    assert heads[3:] == ["v tau", "v^N tau", "(v - v^N) tau", "p"]
    assert [row[1] for row in rows[::2]] == ["16 to 32", "32 to 64", "64 to 128"]
    first, _, second, *_ = rows
    assert first[3:6] == [
        "0.700 [0.700, 0.700]",
        "0.200 [0.200, 0.200]",
        "0.500 [0.500, 0.500]",
    ]
    assert first[6] == "1.000 [1.000, 1.000]"
    assert all(cell.endswith("] (3 of 4)") for cell in second[3:6])
    assert second[6] == "n/a"


def test_means_of_some_seeds_are_hollow():
    runs = analyse.runs_by_network(planted(), "main")
    assert not figures._products(runs).get_supxlabel()
    read = analyse.reading_of(runs["resnet18"][0])
    read["products"][1][3] = None
    figure = figures._products(runs)
    assert "hollow" in figure.get_supxlabel()
    first, second = figure.axes
    (hollow,) = (x for x in first.lines if str(x.get_markerfacecolor()) == "white")
    values = [analyse.reading_of(run)["products"][1][3] for run in runs["resnet18"]]
    np.testing.assert_allclose(hollow.get_ydata(), [np.mean(values[1:])])
    assert all(str(x.get_markerfacecolor()) != "white" for x in second.lines)


def test_a_pair_that_is_there_twice_is_no_second_seed():
    with pytest.raises(UserError, match=r"each once, got \[0, 0\] and \[0, 0\]"):
        analyse.runs_by_network(planted(seeds=(0, 0)), "main")


def test_spreads_are_compared_over_the_edges_that_both_networks_can_use():
    results = planted()
    for found in results["runs"][1::2]:  # one edge of the plain network alone is wild
        for read in found["readings"]:
            for interval in read["products"]:
                interval[0] = 100.0
    for found in results["runs"][0::2]:
        for read in found["readings"]:
            for interval in read["products"]:
                interval[0] = None
    for row in analyse.reading_rows(results, "main")[1:]:
        assert row[-1] == "2.000 [2.000, 2.000]"


@pytest.mark.parametrize(
    ("number", "ratio", "verdict"),
    [
        (8, 2.0, "yes"),
        (8, 0.5, "no, less so"),
        (8, None, "undecided"),
        (7, 2.0, "too few seeds"),
    ],
)
def test_a_verdict_needs_eight_seeds_and_an_interval_beside_one(number, ratio, verdict):
    results = planted(range(number), 1.0 if ratio is None else ratio)
    if ratio is None:  # as often above as below
        for found, factor in zip(results["runs"][1::2], [0.5, 2.0] * 4, strict=True):
            for name in analyse.DECISIVE:
                found["readings"][0][name] *= factor
    found = analyse.verdicts(results, "main")
    assert found == dict.fromkeys(analyse.DECISIVE, verdict)
    assert verdict.capitalize() in analyse.format_transport(results)


def test_a_comparison_is_that_of_the_logarithms():
    rng = np.random.default_rng(2)
    first, second = np.exp(rng.normal(size=(2, 8)))
    found = analyse.compared("edge_spread", first, second)
    logs = analyse.t_interval(np.log(second) - np.log(first))
    assert found == pytest.approx(np.exp(logs))
    assert analyse.compared("size", first, second).mean == pytest.approx(
        np.mean(second - first)
    )
    assert np.isnan(analyse.compared("edge_spread", first * 0, second).mean)


def test_seeds_of_one_network_alone_are_told():
    results = planted()
    del results["runs"][0]
    with pytest.raises(UserError, match="both networks of arm 'main' at the same"):
        analyse.arm_rows(results, "main")
    with pytest.raises(UserError, match="expected a finished pair"):
        analyse.format_transport({"networks": NETWORKS, "runs": []})


def test_report_and_command_show_what_is_finished(tmp_path):
    results = planted()
    records.write_json(tmp_path / run.RESULTS, results)
    (section,) = page.find_sections(tmp_path)
    rows = analyse.arm_rows, analyse.interval_rows, analyse.reading_rows
    assert section.tables == [of(results, "main") for of in rows]
    with small():
        done = run_script("transport.py", f"--workdir={tmp_path}", "--report_only")
    assert done.code == 0, done.err
    places = f"{tmp_path / 'transport.json'}\n{tmp_path / 'figures'}"
    ending = f"{places}\nnext: grsd report {tmp_path}\n"
    assert done.out == f"{analyse.format_transport(results)}\n{ending}"
    names = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert names == {
        f"transport_{x}_main" for x in ("products", "spreads", "law", "resolution")
    }


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--arms=main,other", "--arms: expected a list of different entries out of"),
        ("--networks=mlp,mlp", "--networks: expected a list of different entries"),
        ("--networks=mlp", "--networks: expected two"),
        ("--seeds=one", "--seeds: expected a list of integers"),
        ("--report_only", "transport.json': expected a JSON file"),
        ("--optimizer=adamw", "--optimizer: expected 'sgd'"),
        ("--epochs=1", "--epochs: expected at least 64"),
    ],
)
def test_bad_input_is_one_sentence(flag, sentence, tmp_path):
    usual = (
        f"--workdir={tmp_path}/new",
        "--dataset=synthetic",
        "--networks=mlp,resmlp",
    )
    with small():
        done = run_script("transport.py", *usual, flag)
    assert done.code == 1
    assert sentence in done.err
    assert done.err.count("\n") == 1


CONFIG = Config(
    width=2,
    depth=1,
    epochs=1,
    train_batch_size=4,
    batch_size=2,
    num_batches=1,
    learning_rate=0.05,
    momentum=0.0,
    activation="gelu",
    checkpoint_every=5,
)  # 64 // 4 = 16 steps
SHORT = protocol.Protocol(
    first_step=2,
    lengths=(1, 2, 4),
    num_groups=0,
    min_edges=1,
    readings=protocol.READINGS[:1],
)


def study(folder, **changes):
    options = {"arms": ["main"], "seeds": [3], "networks": ["mlp"], "protocol": SHORT}
    config = dataclasses.replace(CONFIG, workdir=str(folder))
    with small():
        return run.run_transport(small_textures(), config, **options | changes)


def test_what_is_finished_stays_and_is_not_computed_again(tmp_path, monkeypatch):
    asked = []

    def run_cell(_, config, chosen):
        asked.append((config.width, config.seed, config.model))
        if config.seed == 5:
            raise KeyboardInterrupt
        return {"lines": [1], "readings": [config.seed], "asked": chosen.min_edges}, {}

    monkeypatch.setattr(run, "run_cell", run_cell)
    found = study(tmp_path, networks=NETWORKS)["runs"]
    assert [[x[name] for name in run.Cell._fields] for x in found] == [
        ["main", 3, network] for network in NETWORKS
    ]
    assert all("lines" not in x for x in found)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, networks=NETWORKS, seeds=[4, 5])
    whole = study(tmp_path, networks=NETWORKS, arms=["wide"])["runs"]
    assert asked == [
        *[(2, 3, network) for network in NETWORKS],
        *[(2, 4, network) for network in NETWORKS],
        (2, 5, NETWORKS[0]),
        *[(4, 3, network) for network in NETWORKS],
    ]
    assert records.read_json(tmp_path / run.RESULTS)["runs"] == whole
    assert [(x["arm"], x["seed"]) for x in whole[::2]] == [
        ("main", 3),
        ("main", 4),
        ("wide", 3),
    ]
    assert study(tmp_path, networks=NETWORKS)["runs"][:4] == whole[2:]
    assert len(asked) == 7
    for changes, sentence in (
        ({"protocol": dataclasses.replace(SHORT, min_edges=2)}, "the protocol of"),
        ({"networks": NETWORKS[::-1]}, "the networks of"),
    ):
        with pytest.raises(UserError, match=sentence):
            study(tmp_path, **{"networks": NETWORKS} | changes)


def test_a_writer_keeps_what_the_network_was_at_its_steps(tmp_path):
    with small():
        model = networks.make_model("mlp", 10, CONFIG)
        dataset = small_textures()
        writer = snapshots.SnapshotWriter(model, dataset, CONFIG, tmp_path, [2])
        weights = networks.init_weights(model, (32, 32, 3), 0)
        state = training.TrainState(jnp.int32(0), *weights, None)
        own = writer.init(state)
        own = writer.update(own, state, 1)
        assert int(own["taken"]) == 0
        assert int(writer.update(own, state, 2)["taken"]) == 1
        outputs_fn = models.linen_outputs(model, {"batch_stats": weights.batch_stats})
        problem = Problem(outputs_fn, data.measured_batches(dataset, CONFIG))
        expected = spectral_snapshot(problem, weights.params)
        broken = state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
        with pytest.raises(
            UserError, match=r"error and kernel are finite, .* at step 2"
        ):
            writer.update(own, broken, 2)
    found = snapshots.read_snapshot(tmp_path, 2)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(UserError, match=r"1\.npz': expected"):
        snapshots.read_snapshot(tmp_path, 1)
    older = {k: x for k, x in found._asdict().items() if k != "rounding"}
    records.write_npz(tmp_path / "3.npz", older)
    with pytest.raises(UserError, match=r"3\.npz': expected .* with its rounding"):
        snapshots.read_snapshot(tmp_path, 3)


@pytest.mark.scheduled
def test_a_killed_training_finds_what_a_whole_one_does(tmp_path, monkeypatch):
    whole = study(tmp_path / "whole")
    (found,) = whole["runs"]
    assert analyse.reading_of(found)["steps"] == [[2, 4], [4, 8], [8, 16]]
    # The time of plain gradient descent is the sum of its rates.
    times = analyse.reading_of(found)["times"]
    expected = 0.05 * np.array([2, 4, 8]) / np.log(2)
    np.testing.assert_allclose(times, expected, rtol=1e-5)
    assert [x["start"] for x in found["resolution"]] == [4] * 3 + [8] * 3
    assert all(0 < x["moved"] < 10 for x in found["resolution"])

    update = snapshots.SnapshotWriter.update

    def killed(self, own, state, step):
        if step == 9:
            raise KeyboardInterrupt
        return update(self, own, state, step)

    with monkeypatch.context() as patch:
        patch.setattr(snapshots.SnapshotWriter, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path / "killed")
    assert not (tmp_path / "killed" / run.RESULTS).exists()
    assert study(tmp_path / "killed")["runs"] == whole["runs"]


def test_figures_leave_out_what_was_not_looked_at(tmp_path):
    results = planted(seeds=[0])
    for found in results["runs"]:
        found["resolution"] = []
        found["readings"][0]["products"][0][0] = None
    with small():
        paths = figures.write_transport_figures(results, tmp_path)
    assert {path.stem for path in paths} == {
        f"transport_{name}_main" for name in ("products", "spreads", "law")
    }
