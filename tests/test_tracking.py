"""Training with the probe on: its records, their figures, and what a kill leaves."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from matplotlib.figure import Figure

from grsd_jax.experiments.common import data, records, training
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.track import figures as tracking_figures
from grsd_jax.experiments.track import run as tracking


class TinyNet(nn.Module):
    """One convolution with BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=4, use_bias=False)(x)
        x = jax.nn.gelu(nn.BatchNorm(not train, momentum=0.6)(x))
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


CONFIG = Config(
    train_batch_size=16,
    epochs=2,
    checkpoint_every=5,
    log_every=4,
    record_every=3,
    batch_size=6,
    num_batches=1,
    num_shells=4,
    window=4,
    solver="dense",
)  # 100 // 16 = 6 steps an epoch
STEPS = [0, 3, 6, 9, 12]
TINY_RANGE = (1e-5, 1.0)
#: What a line says of the clock, and so the only things in it that no run repeats.
CLOCK = ("seconds", "gradient_seconds", "cost", "train_step_seconds", "cost_in_steps")


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's schedules divide an integer count by a float."""
    with jax.numpy_dtype_promotion("standard"):
        yield


cached_optimizer = functools.cache(training.make_optimizer)


@pytest.fixture(autouse=True)
def one_optimizer(monkeypatch):
    """Gives equal settings one optimiser, so that a test compiles nothing again."""
    monkeypatch.setattr(training, "make_optimizer", cached_optimizer)
    monkeypatch.setattr(tracking, "LAMBDA_RANGE", TINY_RANGE)  # where TinyNet's lie


@pytest.fixture(scope="module")
def dataset():
    return data.synthetic_textures(num_train=100, num_test=30)


def track(dataset, workdir, *, config=CONFIG, kill_at=None):
    model = TinyNet()
    path = workdir / "tiny" / "records.jsonl"
    tracker = tracking.Tracker(model, dataset, config, path)
    if kill_at is not None:
        update = tracker.update

        def killed(own, state, step):
            own = update(own, state, step)
            if step == kill_at:
                raise KeyboardInterrupt
            return own

        tracker.update = killed
    training.train(model, dataset, config, workdir, name="tiny", callback=tracker)
    return path


def lines_of(path):
    lines = records.read_jsonl(path)
    return [{k: v for k, v in x.items() if k not in CLOCK} for x in lines]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The records of a run without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_optimizer", cached_optimizer)
        patch.setattr(tracking, "LAMBDA_RANGE", TINY_RANGE)
        with jax.numpy_dtype_promotion("standard"):
            return track(dataset, tmp_path_factory.mktemp("whole"))


def test_a_line_a_record_with_what_it_promises(whole):
    lines = records.read_jsonl(whole)
    assert [line["step"] for line in lines] == STEPS
    expected = {"effective_time", "energies", "dissipation", "flux", "exponent"}
    expected |= {"exponent_interval", "closure_error", "num_resolved", "velocity"}
    expected |= {"nearest_flux", "non_adjacent_share", "drift", "unresolved_energy"}
    expected |= {"crossings_up", "crossings_down", "cost", "finite", "density"}
    for line in lines:
        assert set(line) >= expected
        assert len(line["energies"]) == 4
        assert len(line["flux"]) == 3
        assert sum(count > 0 for count in line["counts"]) >= 3
        assert line["finite"]
        # In float32 the vectors of the lowest shell, near the floor, are noisy.
        assert max(line["closure_errors"][1:]) < 0.05
    # Momentum 0.9 goes ten times as far as the rate of 0.05 says.
    assert lines[-1]["effective_time"] == pytest.approx(12 * 0.05 / 0.1)
    assert lines[-1]["cost_in_steps"] > 0
    assert lines[0]["cost_in_steps"] is None


@pytest.mark.parametrize("kill_at", [2, 6, 9])
def test_a_killed_run_leaves_the_records_of_a_whole_one(
    dataset, whole, tmp_path, kill_at
):
    with pytest.raises(KeyboardInterrupt):
        track(dataset, tmp_path, kill_at=kill_at)
    path = tmp_path / "tiny" / "records.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 9, "energ')  # killed in mid-write
    track(dataset, tmp_path)
    assert lines_of(path) == lines_of(whole)
    before = path.read_bytes()
    track(dataset, tmp_path)  # complete already
    assert path.read_bytes() == before


def test_a_broken_training_goes_on_and_one_record_says_so(dataset, tmp_path):
    wild = Config(**{**CONFIG.__dict__, "learning_rate": 1e20})
    lines = records.read_jsonl(track(dataset, tmp_path, config=wild))
    assert [line["finite"] for line in lines] == [True, False]
    metrics = records.read_jsonl(tmp_path / "tiny" / "metrics.jsonl")
    assert metrics[-1]["step"] == STEPS[-1]
    assert metrics[-1]["loss"] is None


def test_a_run_resumes_under_its_own_settings_only(dataset, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        track(dataset, tmp_path, kill_at=1)
    other = Config(**{**CONFIG.__dict__, "record_every": 4})
    with pytest.raises(UserError, match=r"^--record_every: expected 3 .*got 4"):
        track(dataset, tmp_path, config=other)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_records_lost_before_a_checkpoint_are_noticed(dataset, tmp_path, kept):
    with pytest.raises(KeyboardInterrupt):
        track(dataset, tmp_path, kill_at=11)  # the newest checkpoint is of step 10
    path = tmp_path / "tiny" / "records.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    with pytest.raises(
        UserError, match=r"records.jsonl': expected the record of step 9"
    ):
        track(dataset, tmp_path)


def test_training_without_a_callback_reads_the_same_checkpoints(dataset, tmp_path):
    track(dataset, tmp_path)
    result = training.train(TinyNet(), dataset, CONFIG, tmp_path, name="tiny")
    assert result.resumed_from == STEPS[-1]


def test_summary_counts_and_takes_medians(whole):
    summary = tracking.summary(records.read_jsonl(whole))
    assert summary["num_records"] == 5
    assert summary["finite"]
    assert summary["cost_in_steps_median"] > 0


def test_figures_are_drawn_from_the_lines_alone(whole, tmp_path, monkeypatch):
    lines = records.read_jsonl(whole)
    broken = {name: None for name in lines[-1]} | {"finite": False, "step": 15}
    still = lines[0] | {"velocity": [0.0] * 3, "flux": [0.0] * 3, "closure_error": 0.0}
    tracks = {"plainnet18": [still], "resnet18": [*lines, broken]}
    paths = tracking_figures.write_tracking_figures(tracks, tmp_path)
    names = {"energies", "profiles", "exponent", "non_adjacent", "eigenvalues"}
    assert {path.stem for path in paths} == {f"track_{n}" for n in names | {"closure"}}
    assert len(list(tmp_path.glob("*.pdf"))) == len(list(tmp_path.glob("*.png"))) == 6
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **_o: path.write_bytes(b"x"))
    tracking_figures.write_tracking_figures({"resnet18": [still]}, tmp_path)
    with pytest.raises(UserError, match="resnet18: expected records"):
        tracking_figures.write_tracking_figures({"resnet18": [broken]}, tmp_path)
