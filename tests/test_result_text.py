"""The text of results: a screenful, right numbers, and n/a for what is undefined."""

import dataclasses
import re
import typing
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import dynamics, shells
from grsd_jax.jacobian.explain import Explanation, LeafForm
from grsd_jax.results import headline, percent
from grsd_jax.results.fields import field_of, names_of
from random_results import public_classes, random_result

CLASSES = public_classes()

by_class = pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)


def is_screenful(text):
    lines = text.splitlines()
    return len(lines) <= 24 and max(map(len, lines)) <= 100


@by_class
def test_every_result_offers_text_files_and_tables(kind):
    methods = ("summary", "save", "to_xarray", "to_pandas", "_repr_html_")
    assert not [name for name in methods if not callable(getattr(kind, name, None))]


@by_class
def test_docstrings_state_the_shape_of_every_array(kind):
    hints = typing.get_type_hints(kind)
    arrays = [x for x in names_of(kind) if hints[x] in (jax.Array, np.ndarray)]
    keys = {"key", "key_data"}
    assert not [x for x in arrays if field_of(kind, x).axes is None and x not in keys]


@by_class
@pytest.mark.parametrize("seed", [0, 1])
def test_text_is_a_screenful_and_names_its_class(kind, seed):
    result = random_result(kind, seed)
    text = repr(result)
    assert is_screenful(text)
    assert text.startswith(kind.__name__)
    assert max(map(len, result.summary().splitlines())) <= 100


def undefined(leaf):
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    nan = np.full(leaf.shape, np.nan, leaf.dtype) if floating else leaf
    return jax.device_put(nan)  # computed, it is an error under jax_debug_nans


def arrays_of(result):
    return [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]


@by_class
def test_undefined_numbers_are_na(kind):
    result = jax.tree.map(
        lambda x: undefined(x) if isinstance(x, jax.Array) else x, random_result(kind)
    )
    for text in (repr(result), result.summary(), result._repr_html_()):
        assert not re.search(r"\bnan\b", text, re.I)
    assert is_screenful(repr(result))


@by_class
def test_text_of_what_has_no_numbers(kind):
    """Inside `jit` and `vmap`, and of trees of other things, text does not fail."""
    result = random_result(kind)
    found = []

    def look(arrays):
        found.append(repr(jax.tree.unflatten(structure, arrays)))
        return arrays

    leaves, structure = jax.tree.flatten(result)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    if len(arrays) == len(leaves) > 0:
        jax.jit(look)(arrays)
        stacked = [jnp.stack([leaf, leaf]) for leaf in arrays]
        jax.vmap(look)(stacked)
        found.append(repr(jax.tree.unflatten(structure, stacked)))
        shapes = jax.eval_shape(lambda x: x, result)
        found.append(repr(shapes))
        assert "traced" in found[0]
    found += [repr(jax.tree.map(lambda leaf, x=x: x, result)) for x in (object(), True)]
    assert all(is_screenful(text) for text in found)


@by_class
def test_html_is_well_formed_and_holds_the_text(kind):
    html = random_result(kind)._repr_html_()
    opened = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, _):
            opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Parser().feed(html)
    assert not opened
    assert kind.__name__ in html


def test_html_escapes():
    check = CLASSES["Check"]("<b>&", 1.0, 2.0)
    assert "&lt;b&gt;&amp;" in check._repr_html_()


def fit(exponent, **more):
    numbers = {"prefactor": 2.0, "r_squared": 0.9, "exponent_stderr": 0.05}
    numbers = {k: jnp.float32(v) for k, v in (numbers | more).items()}
    points = jnp.int32(7)
    return shells.PowerLawFit(jnp.float32(exponent), num_points=points, **numbers)


def test_a_fit_shows_its_interval_or_its_error():
    assert "exponent   0.780 ± 0.050" in repr(fit(0.78))
    interval = jnp.asarray([0.7261, 0.831], jnp.float32)
    assert "0.780 [0.726, 0.831]" in repr(fit(0.78)._replace(interval=interval))


def test_an_undefined_fit_says_why():
    few = shells.fit_power_law(jnp.ones(1), jnp.ones(1))
    assert "n/a (fewer than 2 points, or a single x)" in repr(few)


def test_options_are_shown_with_their_values():
    result = random_result(CLASSES["CouplingMeasurement"], 0)
    window = shells.Window(num_pairs=7)
    # No caveats, which need lines.
    fitting = {"num_misfits": jnp.zeros_like(result.num_misfits)}
    fitting |= {"complete": jnp.bool_(True)}
    text = repr(dataclasses.replace(result, window=window, **fitting))
    assert re.search(rf"^  window +{re.escape(repr(window))}$", text, re.M)


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (0, "0%"),
        (1, "100%"),
        (0.264, "26%"),
        (0.996, "99.6%"),
        (0.004, "0.4%"),
        (0.00003, "0.003%"),
        (0.005, "0.5%"),
        (0.995, "99.5%"),
        (-1e-9, "0%"),
        (0.99996, "99.996%"),
        (1 - 1e-8, "100%"),
        (np.nan, "n/a"),
    ],
)
def test_a_share_is_whole_or_nothing_only_where_it_is(share, told):
    assert percent(share) == told


def test_a_caveat_is_not_cut():
    result = random_result(CLASSES["CouplingMeasurement"], 0)
    result = dataclasses.replace(result, unresolved_share=jnp.float32(0.91))
    (caveat,) = [x for x in result.caveats if "91% of the error's energy" in x]
    assert len(caveat) > 100
    for text in (repr(result), result.summary()):
        assert caveat in " ".join(text.split())


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ([0.1, np.inf, 0.2, 0.1, 0.1], "1 to 3 |e|^2, 1 of 5 edges not converged"),
        ([np.inf] * 5, "n/a, 5 of 5 edges not converged"),
        ([0.1] * 5, "1 to 1e+06 |e|^2"),
    ],
)
def test_a_flux_that_has_not_converged_is_not_in_its_span(errors, told):
    balance = dataclasses.replace(
        random_result(CLASSES["ExactBalance"], 0),
        finite=jnp.bool_(True),
        in_range=jnp.bool_(True),
        flux=jnp.asarray([1.0, 1e6, 3.0, 2.0, 2.0]),
        flux_error=jnp.asarray(errors),
    )
    assert dict(headline(balance))["flux past the edges"] == told


def test_a_fit_to_two_points_has_no_share_that_it_explains():
    x, y = jnp.asarray([1.0, 10.0]), jnp.asarray([3.0, 0.2])
    fit = shells.fit_power_law(x, y)
    assert float(fit.exponent) == pytest.approx(np.log10(0.2 / 3))
    assert dict(headline(fit))["R^2"] == "n/a"
    third = shells.fit_power_law(jnp.asarray([*x, 4.0]), jnp.asarray([*y, 1.0]))
    logs = np.log([[1, 10, 4], [3, 0.2, 1]])
    assert float(third.r_squared) == pytest.approx(np.corrcoef(logs)[0, 1] ** 2)


def test_masked_placeholders_are_not_shown():
    matrix = jnp.asarray([[0.0, 3.0], [3.0, 5.0]])
    mask = matrix > 0
    assert "matrix  3 to 5" in repr(shells.ShellCoupling(matrix, mask))
    zeros = jnp.zeros(3)
    closure = dynamics.ClosureError(zeros, zeros, zeros[0], jnp.asarray(False))
    assert "total_error    n/a" in repr(closure)
    assert f"measured_rate  [3] {zeros.dtype}, n/a" in repr(closure)


def test_ranges_are_those_of_the_numbers():
    result = random_result(CLASSES["StateIncrements"])
    low, high = np.min(result.increments), np.max(result.increments)
    assert f"{low:.4g} to {high:.4g}" in repr(result)


def test_a_large_array_is_not_fetched(monkeypatch):
    big = jnp.zeros((2**20 + 1, 1))
    pairs = random_result(CLASSES["RitzPairs"])._replace(vectors=big)
    fetch = np.asarray

    def asarray(value, *more):
        assert value is not big
        return fetch(value, *more)

    monkeypatch.setattr(np, "asarray", asarray)
    assert f"[1048577, 1] {big.dtype}\n" in repr(pairs)


def test_deleted_arrays_have_a_shape():
    result = random_result(CLASSES["ProjectorDrift"], dtype=jnp.float32)
    result.operator.delete()
    assert "operator   [] float32, without numbers" in repr(result)


def test_a_summary_has_the_tables_of_what_is_inside():
    result = random_result(shells.LayerMeasurements)
    text = result.summary()
    for line in result.total.summary().partition("shells, from")[2].splitlines():
        assert line in text
    assert "total: shells, from small to large lambda:" in text


def test_the_reason_for_na_comes_from_the_docstring():
    result = random_result(CLASSES["IncrementStatistics"])
    nan = jax.device_put(np.float32(np.nan))
    text = repr(result._replace(normal_distance=nan))
    assert "n/a (where the sums do not vary)" in text
    assert "`" not in text


def test_reading_a_result_leaves_the_search_for_nan_on():
    result, log = random_result(CLASSES["ExactBalance"], 0), jax.jit(jnp.log)

    def read():
        for _ in range(3):
            log(jnp.ones(2))
        repr(result)
        with pytest.raises(FloatingPointError):
            log(-jnp.ones(2))

    before = jax.config.jax_debug_nans
    jax.config.update("jax_debug_nans", True)
    try:
        with ThreadPoolExecutor(1) as thread:  # others may have left `jax.debug_nans`
            thread.submit(read).result()
    finally:
        jax.config.update("jax_debug_nans", before)


@pytest.mark.parametrize(("flops", "told"), [(None, "n/a"), (1200, "1.2k")])
def test_operations_that_the_compiler_does_not_tell_are_not_0(flops, told):
    rows = (
        LeafForm("w", "outer", "dot_general", 64, 500),
        LeafForm("b", "plain", "a fallback", 0, flops),
    )
    found = Explanation(rows, coupled=False)
    *_, plain, total = [line.split() for line in str(found).splitlines()]
    assert plain[:4] == ["b", "plain", "0", told]
    assert total[-1] == ("n/a" if told == "n/a" else "1.7k")
    assert f"{total[-1]} flops a column" in repr(found)
