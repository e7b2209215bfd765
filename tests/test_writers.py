"""Records as named numbers, and the writers over them."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import writers
from grsd_jax.dynamics import ClosureError, ProbeRecord
from random_results import random_result


def test_numbers_have_the_names_of_their_fields():
    record = random_result(ProbeRecord)
    numbers = writers.scalars(record, "probe")
    assert numbers["probe/effective_time"] == float(record.effective_time)
    assert all(isinstance(value, float) for value in numbers.values())
    shells = [
        name for name in numbers if "shell_errors/" in name or "energies/" in name
    ]
    assert shells
    assert all(name.rpartition("/")[2].isdigit() for name in shells)


def test_what_is_undefined_is_left_out():
    # From the host: computed, a NaN is an error under jax_debug_nans.
    rates = jax.device_put(np.asarray([1.0, math.nan], np.float32))
    total = jax.device_put(np.float32(math.nan))
    closure = ClosureError(rates, rates, total, jnp.asarray(True))
    assert set(writers.scalars(closure)) == {
        "grsd/measured_rate/00",
        "grsd/shell_errors/00",
        "grsd/defined",
    }
    masked = closure._replace(defined=jnp.asarray(False))
    assert writers.scalars(masked) == {"grsd/defined": 0.0}


def test_callbacks_get_the_step_and_the_numbers():
    got = []
    writer = writers.CallbackWriter(lambda *both: got.append(both))
    record = random_result(ProbeRecord)
    writer.write(3, None)
    writer.write(4, record)
    assert got == [(4, writers.scalars(record))]


def test_a_run_is_logged_to_by_its_log():
    class Run:
        def log(self, data, *, step):
            self.got = (data, step)

    run, record = Run(), random_result(ProbeRecord)
    writers.WandbWriter(run, "p").write(7, record)
    assert run.got == (writers.scalars(record, "p"), 7)


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboardX")
    record = random_result(ProbeRecord)
    writer = writers.TensorBoardWriter(tmp_path / "events")
    writer.write(2, record)
    writer.close()
    numbers = writers.scalars(record)
    found = dict(read_events(tmp_path / "events"))
    assert set(found) == {(name, 2) for name in numbers}
    for name, value in numbers.items():
        np.testing.assert_allclose(found[name, 2], value, rtol=1e-6)


def read_events(folder):
    """Yields ``((name, step), value)`` of an event file, by its wire format alone."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.iterdir()
    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            yield (value.tag, event.step), value.simple_value


def test_a_missing_tensorboard_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'grsd-jax\[tensorboard\]'"):
        writers.TensorBoardWriter(tmp_path)


@pytest.mark.parametrize("wrong", [None, "record", {"step": 1}])
def test_what_is_no_result_has_no_scalars(wrong):
    with pytest.raises(ValueError, match="record: expected a result, got a "):
        writers.scalars(wrong)
