"""The table on the terminal."""

import copy
import json
import re

import numpy as np
import pytest

import example_results
from grsd_jax.experiments.common import tables
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.common.intervals import Interval
from grsd_jax.experiments.common.quantities import (
    edge_residual,
    middle_third_residual,
)
from grsd_jax.experiments.common.tables import with_legend
from grsd_jax.experiments.reproduce.analyse import LEGEND, format_table
from grsd_jax.shells import centre_toeplitz_residual


def cells(table):
    """The rows of both tables, as lists of stripped cells."""
    blocks = [block for block in table.split("\n\n") if block[0] == "|"]
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        for lines in (block.split("\n") for block in blocks)
    ]


def test_rows_columns_and_alignment():
    results, _ = example_results.several_models()
    table = format_table(json.loads(json.dumps(results)))
    assert table.isascii()
    *blocks, legend = table.split("\n\n")
    assert " ".join(legend.split()) == " ".join(LEGEND)
    for block, rows in zip(blocks, cells(table), strict=True):
        lines = block.split("\n")
        assert len({len(line) for line in lines}) == 1
        assert len(lines[0]) <= 140
        assert len({len(row) for row in rows}) == 1
        assert [row[:2] for row in rows[2:]] == [
            ["ResNet-18", "own"],
            ["PlainNet-18", "shared"],
            ["PlainNet-18", "recalibrated"],
            ["PlainNet-18", "own"],
        ]
        # A Markdown rule, left for names and right for numbers.
        assert all(set(cell) == {"-", ":"} for cell in rows[1])
        assert [cell[0] == ":" for cell in rows[1][:3]] == [True, True, False]


def test_values_are_those_of_the_result():
    results, _ = example_results.one_model()
    entry = copy.deepcopy(results["model"])
    entry["test_accuracy"] = 0.8125
    entry["diagonal_fit"] |= {
        "exponent": 1.23456,
        "exponent_stderr": 0.0123,
        "r_squared": 0.9876,
        "interval": [1.1, 1.3],
    }
    entry["unresolved_share"] = 0.25
    entry["shell_fit"] |= {"exponent": 0.5, "exponent_stderr": 0.25}
    for kind, residual, ends in [("literal", 0.9, 0.8), ("renormalized", 0.2, 0.1)]:
        entry["toeplitz"][kind] = {
            "residual": residual,
            "windows": [
                {"position": p, "residual": r}
                for p, r in [(0, ends), (0.5, 0.05), (1, ends + 0.1)]
            ],
        }
    scaling, toeplitz = cells(format_table({"model": entry}))
    assert scaling[2][2:] == [
        "0.812",
        "320",
        "128/160",
        "75%",
        "dense",
        "1.235 +- 0.012 [1.100, 1.300]",
        "0.988",
        "0.500 +- 0.250",
    ]
    assert toeplitz[2][2:] == [
        "0.900",
        "0.850 -> 0.050",
        "0.200",
        "0.150 -> 0.050",
        "0.15",
    ]


def test_everything_undefined():
    fit = {"exponent": None, "interval": None}
    entry = {"diagonal_fit": fit, "shell_fit": None, "toeplitz": {"literal": None}}
    for fields in (entry, {}):
        scaling, toeplitz = cells(format_table({"models": {"mlp": fields}}))
        assert scaling[2] == ["MLP", *["n/a"] * 3, "n/a/n/a", *["n/a"] * 5]
        undefined = ["n/a", "n/a -> n/a"]
        assert toeplitz[2] == ["MLP", "n/a", *undefined, *undefined, "n/a"]


def test_slope_without_error_or_interval():
    fit = {"exponent": 2.0, "exponent_stderr": None, "interval": [None, None]}
    scaling, _ = cells(format_table({"model": {"diagonal_fit": fit}}))
    assert scaling[2][7] == "2.000 +- n/a [n/a, n/a]"


def test_caveats_stand_below_the_tables():
    good = {"num_missing": 0, "unresolved_share": 0.3}
    poor = {"num_missing": 7, "unresolved_share": 0.96}
    table = format_table({"models": {"mlp": good, "cnn": poor}})
    _, _, _, missing, outside = table.split("\n\n")
    assert missing.startswith("CNN: At least 7 pairs")
    assert outside.startswith("CNN: Ask for more pairs: 96% of the error's energy")
    assert "measure_stochastic_coupling(...).toeplitz()" in outside


def test_a_legend_stands_apart_from_its_table_in_lines_that_fit():
    sentences = ("Long: " + "word " * 30 + "end.", "Short.")
    text = with_legend([[["a", "b"], ["1", "2"]], [["c"], ["3"]]], sentences)
    first, second, legend = text.split("\n\n")  # else Markdown makes it a row
    assert first.startswith("| a")
    assert second.startswith("| c")
    assert " ".join(legend.split()) == " ".join(sentences)
    assert max(map(len, legend.split("\n"))) <= 88
    assert legend.split("\n")[-1] == "Short."


NAN = float("nan")


@pytest.mark.parametrize(
    ("windows", "edge", "centre", "middle"),
    [
        ([0.8, 0.5, 0.2, 0.4, 0.6], 0.7, 0.2, 1.1 / 3),
        ([0.8, 0.5, 0.3, 0.6], 0.7, 0.4, 0.4),
        ([NAN, 0.5, NAN, 0.3, 0.6], 0.55, 0.4, 0.4),
        ([0.8, 0.7, 0.5, 0.1, 0.4, 0.9, 0.6], 0.7, 0.1, 1.0 / 3),
        ([0.1, NAN, 0.2], NAN, NAN, NAN),
        ([0.1, 0.3], NAN, NAN, 0.2),
        ([], NAN, NAN, NAN),
    ],
)
def test_edge_centre_and_middle_third_are_three_quantities(
    windows, edge, centre, middle
):
    functions = (edge_residual, centre_toeplitz_residual, middle_third_residual)
    found = [function(windows) for function in functions]
    np.testing.assert_allclose(found, [edge, centre, middle], rtol=1e-12)


def test_not_a_result():
    with pytest.raises(UserError, match=r"results\.json: expected measurements"):
        format_table({"config": {}})


@pytest.mark.parametrize("value", [1e-30, -4e-5, 3.9e-4, 0.5, 12.0, 1e30, -2e17])
def test_a_number_reads_as_what_it_is(value):
    text = tables.number(value)
    assert float(text) == pytest.approx(value, rel=0.05, abs=5e-4 if value > 1 else 0)
    assert len(text) < 16
    assert tables.number(0.0) == "0.000"
    assert tables.number(10**12, ".0f") == "1000000000000"


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e30])
def test_an_interval_keeps_its_ends_apart_from_its_mean_and_from_0(scale):
    mean, low, high = re.findall(
        r"[-+.\de]+", str(Interval(2.5 * scale, -1e-4 * scale, 7 * scale))
    )
    assert float(low) < 0 < float(mean) < float(high)
    assert [float(mean), float(high)] == pytest.approx([2.5 * scale, 7 * scale], 0.05)
    assert len(mean) < 16


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        ((0.912, 0.871, 0.951), "0.912 [0.871, 0.951]"),
        ((1.3, 1.0002, 1.6), "1.3000 [1.0002, 1.6000]"),  # decided, above a ratio of 1
        ((0.1, 0.1 - 1e-17, 0.1 + 1e-17), "0.100 [0.100, 0.100]"),
        ((0.0, 0.0, 0.0), "0.000 [0.000, 0.000]"),
        ((0.5, np.nan, np.nan), "0.500 [n/a]"),
        ((np.nan, np.nan, np.nan), "n/a"),
    ],
)
def test_an_interval_has_the_digits_that_it_needs(interval, told):
    assert str(Interval(*interval)) == told
