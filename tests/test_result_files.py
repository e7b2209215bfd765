"""Results in files: every bit comes back, and what is no such file is said so."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax as grsd
from grsd_jax import _files, shells
from grsd_jax.results import storage
from random_results import public_classes, random_result

CLASSES = public_classes()
NAN = np.frombuffer(np.uint32(0x7FC12345).tobytes(), np.float32)[0]


def assert_same(value, other):
    """Asserts the same types, dtypes and bits, all the way down."""
    assert type(value) is type(other)
    if isinstance(value, jax.Array) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        assert value.dtype == other.dtype
        value, other = jax.random.key_data(value), jax.random.key_data(other)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        assert (value.dtype, value.shape) == (other.dtype, other.shape)
        assert np.asarray(value).tobytes() == np.asarray(other).tobytes()
    elif hasattr(value, "_fields") or dataclasses.is_dataclass(value):
        names = getattr(value, "_fields", None) or [
            field.name for field in dataclasses.fields(value)
        ]
        for name in names:
            assert_same(getattr(value, name), getattr(other, name))
    elif isinstance(value, dict):
        assert list(value) == list(other)
        for key, item in value.items():
            assert_same(item, other[key])
    elif isinstance(value, list | tuple):
        assert len(value) == len(other)
        for pair in zip(value, other, strict=True):
            assert_same(*pair)
    else:
        assert repr(value) == repr(other)


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_result_comes_back_bit_for_bit(kind, seed, tmp_path):
    result = random_result(kind, seed, jnp.float32 if seed else jnp.bfloat16)
    result.save(tmp_path / "result.npz")
    loaded = grsd.load(tmp_path / "result.npz")
    assert_same(result, loaded)
    assert jax.tree.structure(loaded) == jax.tree.structure(result)


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1 / 3),
        np.asarray(NAN),
        np.asarray([1 / 3, -0.0, np.inf]),
        np.arange(6, dtype=np.int8).reshape(2, 3).T,
        np.asarray(True),
        np.zeros((0, 3), np.uint32),
        np.asarray(1 + 2j),
        jnp.asarray(1.5, jnp.float16),
        jnp.asarray([0.5, 2], jnp.float8_e4m3fn),
        jax.random.key(3),
        float("nan"),
        -0.0,
        1 / 3,
        1e300,
        2**70,
        None,
        {"b": (1, [2.5, None]), "a": {}},
    ],
    ids=repr,
)
def test_every_kind_of_value_comes_back(value, tmp_path):
    holder = shells.ShellCoupling(value, mask=None)
    holder.save(tmp_path / "holder.npz")
    assert_same(holder, grsd.load(tmp_path / "holder.npz"))


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">c16", "<f8"])
def test_numbers_in_another_byte_order_are_the_same_numbers(dtype, tmp_path):
    numbers = np.asarray([1.5, -2, 300], dtype)
    shells.ShellCoupling(numbers, mask=None).save(tmp_path / "holder.npz")
    matrix = grsd.load(tmp_path / "holder.npz").matrix
    assert matrix.dtype == numbers.dtype.newbyteorder("=")
    assert matrix.tolist() == numbers.tolist()


def test_a_masked_array_is_refused(tmp_path):
    numbers = np.ma.masked_array([1.0, 2.0], [False, True])
    with pytest.raises(ValueError, match="expected an array without a mask"):
        shells.ShellCoupling(numbers, mask=None).save(tmp_path / "holder.npz")
    assert not (tmp_path / "holder.npz").exists()


@pytest.mark.usefixtures("x64")
def test_64_bits_come_back_with_and_without_them_enabled(tmp_path):
    fit = random_result(shells.PowerLawFit, dtype=jnp.float64)
    fit.save(tmp_path / "fit.npz")
    assert_same(fit, grsd.load(tmp_path / "fit.npz"))
    with jax.enable_x64(False):
        plain = grsd.load(tmp_path / "fit.npz")
    assert type(plain.exponent) is np.ndarray
    assert plain.exponent.tobytes() == np.asarray(fit.exponent).tobytes()


def test_what_no_result_holds_is_refused(tmp_path):
    holder = random_result(shells.ShellCoupling)
    path = tmp_path / "holder.npz"
    with pytest.raises(
        ValueError, match=r"ShellCoupling\.mask\.f: expected .*function"
    ):
        holder._replace(mask={"f": lambda: 0}).save(path)
    with pytest.raises(ValueError, match=r"ShellCoupling\.matrix: .*traced"):
        jax.jit(lambda x: (x.save(path), x)[1])(holder)
    assert not path.exists()


def a_file(tmp_path):
    path = tmp_path / "fit.npz"
    random_result(shells.PowerLawFit).save(path)
    return path


def message(path, kind=ValueError):
    """Returns why a file cannot be loaded: one sentence that names it."""
    with pytest.raises(kind) as caught:
        grsd.load(path)
    text = str(caught.value)
    assert text.startswith(f"'{path}': expected a saved result, got: ")
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_damaged_files_are_noticed(tmp_path):
    path = a_file(tmp_path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place])
        message(path)
        changed = bytearray(whole)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        message(path)


def test_foreign_files_are_noticed(tmp_path):
    path = tmp_path / "foreign.npz"
    foreign = "a file that grsd_jax did not save"
    np.savez(path, x=np.ones(3))
    assert foreign in message(path)
    path.write_bytes(_files.packed({"header": np.frombuffer(b"[1]", np.uint8)}))
    assert foreign in message(path)
    for contents in (b"", b"text", b"PK\x03\x04" + bytes(60)):
        path.write_bytes(contents)
        message(path)
    message(tmp_path / "missing.npz", FileNotFoundError)
    message(tmp_path, OSError)


def rewritten(path, change):
    """Changes the header of a file, and keeps its checksum right."""
    arrays = _files.unpacked(path.read_bytes())
    header = json.loads(arrays["header"].tobytes())
    change(header)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    path.write_bytes(_files.packed(arrays))


def test_files_of_other_versions_are_noticed(tmp_path):
    path = a_file(tmp_path)
    rewritten(path, lambda header: header.update(version=storage._VERSION + 1))
    assert f"version {storage._VERSION + 1} of the format" in message(path)
    path = a_file(tmp_path)
    rewritten(path, lambda header: header["result"].update({"class": "Other"}))
    assert "an Other of another version" in message(path).replace(" a O", " an O")
    path = a_file(tmp_path)
    rewritten(path, lambda header: header["result"]["fields"].update(more=None))
    assert "a PowerLawFit of another version" in message(path)
    path = a_file(tmp_path)  # what has a default need not be there
    rewritten(path, lambda header: header["result"]["fields"].pop("interval"))
    assert grsd.load(path).interval is None


def test_who_reads_the_old_file_goes_on_reading_it(tmp_path):
    path = a_file(tmp_path)
    before = path.read_bytes()
    with open(path, "rb") as file:
        random_result(shells.PowerLawFit, 2).save(path)
        assert file.read() == before
    assert path.read_bytes() != before


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = a_file(tmp_path)
    before = path.read_bytes()

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=r"fit\.npz': expected .* write it, got: No spa"):
        random_result(shells.PowerLawFit, 2).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["fit.npz"]
