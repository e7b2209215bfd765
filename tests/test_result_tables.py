"""Results as xarray datasets and pandas data frames."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import shells
from grsd_jax.results.tables import frame_of_lines
from random_results import public_classes, random_result

xarray = pytest.importorskip("xarray")
pandas = pytest.importorskip("pandas")

CLASSES = public_classes()


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_every_result_has_both_tables(kind):
    for seed, dtype in ((0, jnp.float32), (1, jnp.bfloat16)):
        result = random_result(kind, seed, dtype)
        dataset, frame = result.to_xarray(), result.to_pandas()
        assert dataset.attrs["result"] == kind.__name__
        assert isinstance(frame, pandas.DataFrame)


def measurement():
    result = random_result(shells.CouplingMeasurement)
    mask = jnp.asarray(np.arange(16).reshape(4, 4) % 3 > 0)
    coupling = result.literal.coupling._replace(mask=mask)
    literal = result.literal._replace(coupling=coupling)
    return jax.tree.map(lambda x: x, result).__class__(
        **{**vars(result), "literal": literal}
    )


def test_a_dataset_has_named_dimensions_and_coordinates():
    result = measurement()
    dataset = result.to_xarray()
    assert dataset.coupling.dims == ("pair", "other_pair")
    assert dataset.literal_windows.dims == ("window",)
    assert dataset.vectors.dims == ("entry", "pair")
    assert set(dataset.coords) == {"shells_centers", "shells_edges"}
    assert dataset.attrs["solver"] == "<="
    assert dataset["values"].attrs["units"] == "units of M"
    np.testing.assert_array_equal(dataset.coupling, result.coupling)
    np.testing.assert_array_equal(dataset.shells_centers, result.shells.centers)
    literal = result.literal.coupling
    expected = np.where(literal.mask, literal.matrix, np.nan)
    np.testing.assert_array_equal(dataset.literal_coupling_matrix, expected)


def test_a_frame_has_one_row_a_shell_or_a_pair():
    result = measurement()
    frame = result.to_pandas()
    assert frame.index.name == "shell"
    assert len(frame) == 4
    mask, matrix = result.literal.coupling.mask, result.literal.coupling.matrix
    expected = np.where(np.diag(mask), np.diag(matrix), np.nan)
    np.testing.assert_array_equal(frame.literal_coupling_matrix_diagonal, expected)
    pairs = result.to_pandas("pair")
    np.testing.assert_array_equal(pairs["values"], result.values)
    np.testing.assert_array_equal(pairs.coupling_diagonal, np.diag(result.coupling))
    with pytest.raises(ValueError, match=r"axis: expected one of .*'shell'.*, got 'x'"):
        result.to_pandas("x")


def test_a_frame_of_square_arrays_alone_has_their_diagonals():
    matrix = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    mask = jnp.asarray([[True, True], [True, False]])
    frame = shells.ShellCoupling(matrix, mask).to_pandas()
    assert frame.index.name == "shell"
    np.testing.assert_array_equal(frame.matrix_diagonal, [1, np.nan])


def test_masks_keep_to_their_axes():
    """Also where the sizes of different axes agree, and under a `vmap`."""
    result = random_result(shells.StochasticCoupling)
    mask = np.asarray([[True, False], [True, True]])
    square = jnp.ones((2, 2))
    errors = {"log_error": square, "lanczos_error": square, "matrix": square}
    result = result._replace(
        mask=jnp.asarray(mask), replicates=jnp.ones((2, 2, 2)), **errors
    )
    replicates = result.to_xarray().replicates
    assert replicates.dims == ("sign", "shell", "other_shell")
    np.testing.assert_array_equal(np.isnan(replicates), [~mask, ~mask])
    closure = random_result(CLASSES["ClosureError"])
    stacked = jax.tree.map(lambda x: jnp.stack([x, x, x, x]), closure)
    defined = jnp.asarray([True, False, True, True])
    rates = stacked._replace(defined=defined).to_xarray().measured_rate
    assert rates.dims == ("batch", "shell")
    np.testing.assert_array_equal(np.isnan(rates).all("shell"), ~defined)


def test_axes_of_one_name_and_other_sizes_are_kept_apart():
    result = random_result(shells.LayerMeasurements)
    average = result.average._replace(windows=jnp.ones(5))
    dataset = result._replace(average=average).to_xarray()
    assert dataset.total_literal_windows.dims == ("window",)
    assert dataset.average_windows.dims == ("window_5",)


def test_derived_quantities_are_columns():
    balance = dataclasses.replace(
        random_result(CLASSES["ExactBalance"]),
        elapsed=jnp.ones(()),
        finite=jnp.bool_(True),
        in_range=jnp.bool_(True),
    )
    frame = balance.to_pandas("edge")
    np.testing.assert_allclose(frame.velocity, balance.velocity, rtol=1e-6)
    broken = dataclasses.replace(balance, finite=jnp.bool_(False)).to_pandas("edge")
    assert broken.velocity.isna().all()


@pytest.mark.parametrize("name", ["xarray", "pandas"])
def test_a_missing_library_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    result = random_result(shells.PowerLawFit)
    with pytest.raises(ImportError, match=rf"needs {name}: pip install 'grsd-jax\[tab"):
        getattr(result, f"to_{name}")()


def test_traced_results_are_refused():
    fit = random_result(shells.PowerLawFit)
    with pytest.raises(ValueError, match="exponent: expected an array whose numbers"):
        jax.jit(lambda x: (x.to_xarray(), x)[1])(fit)


def test_the_file_of_a_probe_is_a_frame(tmp_path):
    log = pytest.importorskip("grsd_jax.experiments.track.log")
    lines = [
        {
            "step": step,
            "finite": True,
            "exponent": None if step else 0.5,
            "energies": [1.0, None, 3.0 + step],
            "ends": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
            "moved": [[0.0, 1.0], [2.0, 3.0]],
            "measured_time": {"start": 0.25},
        }
        for step in (0, 10)
    ]
    path = tmp_path / "records.jsonl"
    log.records.write_jsonl(path, lines)
    frame = log.ProbeLog(path).to_pandas()
    assert list(frame.index) == [0, 10]
    assert list(frame.energies_02) == [3, 13]
    assert frame.energies_01.isna().all()
    assert list(frame.exponent.isna()) == [False, True]
    assert list(frame.ends_01_02) == [6, 6]
    assert list(frame.measured_time_start) == [0.25, 0.25]
    assert not [name for name in frame if name.startswith("moved")]


def test_a_frame_of_two_shells_has_the_energies_of_both_ends():
    line = {"step": 3, "energies": [[4.0, 5.0], [1.0, 2.0]]}
    line |= {"energy_error": [[0.1, 0.2], [0.3, 0.4]], "moved": [[0.0, 1.0], [-1, 0]]}
    frame = frame_of_lines([line])
    assert frame.filter(like="energies").to_numpy().tolist() == [[4, 5, 1, 2]]
    errors = frame.filter(like="energy_error").to_numpy()
    assert errors.tolist() == [[0.1, 0.2, 0.3, 0.4]]
    assert not frame.filter(like="moved").size
