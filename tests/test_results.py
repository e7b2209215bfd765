"""Reading of results: each measurement once, nulls as None, misfits as a sentence."""

import json
import math

import numpy as np
import pytest

import example_results
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.reproduce.analyse import Entry, entry_arrays, list_entries


def test_entries_of_one_model():
    results, _ = example_results.one_model()
    (entry,) = list_entries(json.loads(json.dumps(results)))
    assert (entry.name, entry.protocol, entry.label) == ("resnet18", "own", "ResNet-18")
    assert entry.number("diagonal_fit", "exponent") == pytest.approx(1.0, abs=0.1)


def test_entries_of_several_models_are_listed_once():
    results, _ = example_results.several_models()
    # From a file, the two places that hold a measurement are no longer one object.
    results = json.loads(json.dumps(results, sort_keys=True))
    assert [entry.label for entry in list_entries(results)] == [
        "ResNet-18",
        "PlainNet-18 (shared)",
        "PlainNet-18 (recalibrated)",
        "PlainNet-18 (own)",
    ]


@pytest.mark.parametrize("results", [None, [], 3, {}, {"models": {}}, {"model": None}])
def test_no_entries(results):
    with pytest.raises(UserError, match=r"results\.json: expected measurements"):
        list_entries(results)


@pytest.mark.parametrize("value", [None, "1.0", math.nan, math.inf, True, [1.0], {}])
def test_what_is_no_number_is_none(value):
    entry = Entry("resnet18", "own", {"n": value, "fit": {"exponent": value}})
    assert entry.number("n") is None
    assert entry.number("fit", "exponent") is None
    assert entry.number("absent") is None
    assert entry.number("n", "deeper") is None


def test_windows_are_in_order_of_position_with_nan_for_null():
    windows = [
        {"position": 1.0, "residual": 0.3},
        {"position": 0.0, "residual": 0.1},
        {"position": 0.5, "residual": None},
        {"position": None, "residual": 0.7},
    ]
    entry = Entry("a", "own", {"toeplitz": {"literal": {"windows": windows}}})
    np.testing.assert_array_equal(
        entry.windows("literal"), [(0.0, 0.1), (0.5, np.nan), (1.0, 0.3)]
    )
    assert entry.windows("renormalized") == []
    assert Entry("a", "own", {"toeplitz": None}).windows("literal") == []


def test_arrays_are_found_under_their_prefix():
    results, arrays = example_results.several_models()
    for entry in list_entries(results):
        found = entry_arrays(entry, arrays)
        np.testing.assert_array_equal(
            found["values"], arrays[f"{entry.fields['arrays']}/values"]
        )


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("literal", None, "expected an array 'resnet18/literal', got none"),
        ("values", np.array(["a"]), "expected real numbers in 'resnet18/values'"),
        ("resolved", np.ones(3, bool), r"'resnet18/resolved' of shape \[160\], got"),
        ("shell_edges", np.ones(7), r"'resnet18/shell_centers' of shape \[6\], got"),
        ("literal", np.ones((12, 3)), r"of shape \[12, 12\], got \[12, 3\]"),
        ("values", np.ones((2, 2)), r"'resnet18/values'"),
    ],
)
def test_arrays_that_do_not_fit(name, array, message):
    results, arrays = example_results.one_model()
    if array is None:
        del arrays[f"resnet18/{name}"]
    else:
        arrays[f"resnet18/{name}"] = array
    (entry,) = list_entries(results)
    with pytest.raises(UserError, match=message):
        entry_arrays(entry, arrays)
