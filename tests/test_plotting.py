"""Public figures: what they show, on whose axes, legible at the width of a column."""

import dataclasses
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

mpl = pytest.importorskip("matplotlib")

from matplotlib.figure import Figure  # noqa: E402

import example_results  # noqa: E402
from grsd_jax import plotting, shells  # noqa: E402
from grsd_jax.dynamics import ExactBalance, ProbeRecord  # noqa: E402
from grsd_jax.experiments.reproduce.analyse import (  # noqa: E402
    as_measurement,
    list_entries,
)
from grsd_jax.shells.toeplitz import (  # noqa: E402
    windowed_toeplitz_degrees_of_freedom,
    windowed_toeplitz_residual,
)
from random_results import random_result  # noqa: E402


@pytest.fixture(scope="module")
def measured():
    results, arrays = example_results.one_model()
    return as_measurement(list_entries(results)[0], arrays)


def axes(width=3.3):
    return Figure(figsize=(width, 2.4), layout="constrained").subplots()


def positive(tree):
    """Returns a random result with sizes in place of signed numbers."""
    floating = jnp.floating
    return jax.tree.map(
        lambda x: (
            jnp.abs(x) + 0.1 if jnp.issubdtype(jnp.result_type(x), floating) else x
        ),
        tree,
    )


def balance(seed):
    made = positive(random_result(ExactBalance, 2 * seed))
    edges = shells.SoftShells(jnp.asarray([0.1, 0.2, 0.4, 0.8, 1.6]), 0.5)
    wide = {"energies": jnp.outer(jnp.asarray([seed, seed + 1.0]), jnp.ones(6))}
    sound = {"finite": jnp.bool_(True), "in_range": jnp.bool_(True)}
    return type(made)(**{**vars(made), "shells": edges, **wide, **sound})


class Record(dict):
    """One line of the file of a probe."""


def lines():
    names = {"energies": [1.0, 2.0], "edges": [0.1, 1.0, 10.0], "values": [9.0, 0.5]}
    return [Record(effective_time=float(k), **names) for k in range(3)]


DRAWINGS = {
    "spectrum": lambda m, ax: plotting.spectrum(m, ax),
    "diagonal": lambda m, ax: plotting.diagonal(m, ax),
    "literal": lambda m, ax: plotting.coupling(m, ax, kind="literal"),
    "renormalized": lambda m, ax: plotting.coupling(m, ax),
    "windows": lambda m, ax: plotting.windows(m, ax, label="MLP"),
    "energies": lambda m, ax: plotting.energies(lines(), ax),
    "eigenvalues": lambda m, ax: plotting.eigenvalues(lines(), ax),
    "flux": lambda m, ax: plotting.flux([balance(1), balance(2)], ax),
    "velocity": lambda m, ax: plotting.velocity(balance(1), ax, labels=["start"]),
}

by_drawing = pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)


@by_drawing
@pytest.mark.parametrize("width", [3.3, 6.9])
def test_everything_is_inside_the_figure_and_labeled(draw, width, measured):
    """Text may reach the margin of 0.04 inches, which rounding of the layout takes."""
    ax = axes(width)
    assert draw(measured, ax) is ax
    figure = ax.get_figure()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert box.x0 > -0.03
    assert box.x1 < width + 0.03
    assert box.y0 > -0.03
    assert box.y1 < 2.43
    assert all(each.get_ylabel() for each in [ax, *ax.child_axes])
    assert ax.get_xlabel()
    legend = ax.get_legend()
    if legend is not None:
        frame = legend.get_window_extent()
        assert frame.width <= 1.02 * ax.get_window_extent().width
    assert all(text.get_fontsize() >= 6 for text in figure.findobj(mpl.text.Text))


def test_new_axes_are_made_and_settings_kept(measured, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    settings = dict(mpl.rcParams)
    ax = plotting.spectrum(measured)
    assert ax.get_figure().number in pyplot.get_fignums()
    pyplot.close(ax.get_figure())
    assert dict(mpl.rcParams) == settings


def test_without_matplotlib_it_says_what_to_install(measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'grsd-jax\[plots\]'"):
        plotting.spectrum(measured)


@pytest.mark.parametrize(("share", "told"), [(0.74, True), (0.3, False)])
def test_a_slope_of_little_of_the_error_says_so(measured, share, told):
    little = dataclasses.replace(measured, unresolved_share=np.float32(share))
    texts = [x.get_text() for x in plotting.diagonal(little, axes()).legend_.texts]
    assert (r"the modes hold only 26% of $|e\,|^2$" in texts) == told


@pytest.mark.parametrize(
    ("stderr", "r_squared", "told"),
    [
        (0.02, 0.97, "± 0.02, $R^2$ = 0.97"),
        (4e-4, 0.9991, "± 0.0004, $R^2$ = 0.999"),
        (0.0, 1.0, "± 0.00, $R^2$ = 1.00"),
        (0.02, 0.001, "± 0.02, $R^2$ = 0.001"),
    ],
)
def test_a_fit_is_called_exact_only_where_it_is(measured, stderr, r_squared, told):
    fit = measured.diagonal_fit._replace(exponent_stderr=stderr, r_squared=r_squared)
    ax = plotting.diagonal(dataclasses.replace(measured, diagonal_fit=fit), axes())
    assert ax.get_legend().get_texts()[0].get_text().endswith(told)


def test_one_color_bar_for_several(measured):
    low, high = plotting.coupling_limits([measured, measured], "literal")
    pairs = measured.literal.coupling
    inside = pairs.matrix[pairs.mask]
    assert (low, high) == (inside[inside > 0].min(), inside.max())
    ax = plotting.coupling(measured, axes(), kind="literal", limits=(low / 2, high))
    assert ax.collections[0].norm.vmin == low / 2


def test_a_stochastic_coupling_is_drawn_by_the_number_of_the_shell():
    found = positive(random_result(shells.StochasticCoupling))
    ax = plotting.coupling(found, axes())
    shown = ax.collections[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), ~np.asarray(found.mask))
    assert ax.get_xscale() == "linear"
    assert ax.get_xlim() == (0, 4)


def test_energies_are_those_after_each_interval():
    records = [
        positive(random_result(ProbeRecord))._replace(effective_time=jnp.float32(k))
        for k in range(2)
    ]
    plain = plotting.energies(lines(), axes()).lines
    np.testing.assert_array_equal(plain[0].get_ydata(), [1, 1, 1])
    np.testing.assert_array_equal(plain[-1].get_ydata(), [3, 3, 3])
    ends = [{"effective_time": k, **vars_of(balance(k))} for k in (1, 2)]
    after = plotting.energies(ends, axes()).lines
    np.testing.assert_array_equal(after[0].get_ydata(), [2, 3])
    assert plotting.energies(records, axes()) is not None


def test_a_record_without_an_energy_leaves_a_gap_in_the_sum():
    """Neither a part of the shells nor 0, which a log axis draws as a fall."""
    records = lines()
    for gap in ([None, 2.0], [None, None], [0.0, 0.0]):
        records[1] = records[1] | {"energies": gap}
        whole = plotting.energies(records, axes()).lines[-1].get_ydata()
        np.testing.assert_array_equal(whole, [3, np.nan, 3])


def test_a_flux_whose_error_is_infinite_is_hollow_and_a_single_band_is_seen():
    line = {"edges": [1.0, 10.0, 100.0], "flux": [1.0, 2.0, 3.0]}
    for infinite in (None, np.inf):
        ax = plotting.flux(line | {"flux_error": [infinite, 0.5, infinite]}, axes())
        _, shown, hollow = ax.lines
        np.testing.assert_array_equal(shown.get_ydata(), line["flux"])
        np.testing.assert_array_equal(hollow.get_ydata(), [1, np.nan, 3])
        assert hollow.get_markerfacecolor() == "white"
        (band,) = ax.collections
        (path,) = band.get_paths()
        assert path.vertices[:, 1].min() == 1.5
        assert path.vertices[:, 1].max() == 2.5
        assert band.get_linewidth() > 0  # without it, a band of no width is not seen
    assert len(plotting.flux(line, axes()).lines) == 2  # without any error


def unknown_times(times, steps=(10, 20, 30)):
    return [
        line | {"effective_time": time, "step": step}
        for line, time, step in zip(lines(), times, steps, strict=True)
    ]


@pytest.mark.parametrize("times", [(None, 1.0, 2.0), (0.0, np.nan, None), (None,) * 3])
@pytest.mark.parametrize("draw", [plotting.energies, plotting.eigenvalues])
def test_records_whose_time_is_not_known_are_drawn_over_steps(draw, times):
    ax = draw(unknown_times(times), axes())
    assert ax.get_xlabel() == "training step (not all times are known)"
    assert not ax.texts
    for line in ax.lines:
        np.testing.assert_array_equal(line.get_xdata(), [10, 20, 30])
    known = draw(unknown_times((0.0, 1.0, 2.0)), axes())
    assert known.get_xlabel() == r"effective time $\tau$"
    np.testing.assert_array_equal(known.lines[0].get_xdata(), [0, 1, 2])


def test_a_result_without_a_time_is_named_by_its_step():
    results = [
        {"edges": [1.0, 2.0], "flux": [1.0, 2.0], "effective_time": time, "step": 7}
        for time in (None, 0.5)
    ]
    legend = plotting.flux(results, axes()).get_legend()
    assert [x.get_text() for x in legend.get_texts()] == ["step 7", r"$\tau$ = 0.5"]


@pytest.mark.parametrize("undefined", ["due", "finite", "timed"])
def test_what_a_record_of_a_jitted_loop_leaves_at_0_is_not_drawn(undefined):
    """Inside of `jit` what is undefined is 0, and a mask says so."""
    sound = dict.fromkeys(("due", "finite", "timed"), jnp.bool_(True))
    record = random_result(ProbeRecord)._replace(
        balance=balance(1), values=jnp.ones(2), **sound
    )
    first, broken = (
        record._replace(effective_time=jnp.float32(time), step=step, **mask)
        for time, step, mask in ((3, 5, {}), (0, 9, {undefined: jnp.bool_(False)}))
    )
    ax = plotting.energies([first, broken], axes())
    found = [
        np.isfinite(x.get_xdata()) & np.isfinite(x.get_ydata()) for x in ax.lines[:-1]
    ]
    if undefined == "timed":
        assert np.all(found)
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), [5, 9])
    else:
        np.testing.assert_array_equal(found, [[True, False]] * len(found))
        assert len(plotting.flux([first, broken], axes()).collections) == 1


def test_energies_of_other_shells_are_refused():
    records = lines()
    records[2] = records[2] | {"edges": [0.1, 1.0, 100.0]}
    with pytest.raises(ValueError, match="expected the same edges in all"):
        plotting.energies(records, axes())
    records[2] = records[2] | {"energies": [1.0], "edges": [0.1, 1.0]}
    with pytest.raises(ValueError, match=r"energies of one shape in all, got \[\(1,\)"):
        plotting.energies(records, axes())


def test_a_large_eigenvalue_of_one_record_hides_none_of_another():
    records = lines()
    records[1] = records[1] | {"values": [1e30, 0.5]}
    largest, smallest = plotting.eigenvalues(records, axes()).lines
    np.testing.assert_array_equal(largest.get_ydata(), [9, 1e30, 9])
    np.testing.assert_array_equal(smallest.get_ydata(), [0.5, np.nan, 0.5])


def test_a_legend_says_which_result_is_undefined():
    line = {"edges": [1.0, 2.0], "flux": [1.0, 2.0], "velocity": [None, None]}
    whole = line | {"velocity": [0.5, 0.6]}
    ax = plotting.velocity([line, whole], axes(), labels=["a", "b"])
    assert [x.get_text() for x in ax.get_legend().get_texts()] == ["b", "a: undefined"]
    (text,) = plotting.velocity([line, line], axes()).texts
    assert text.get_text() == "nothing defined was recorded"


def test_a_velocity_whose_error_is_not_known_is_hollow():
    line = {"edges": [1.0, 2.0], "flux": [1.0, 2.0], "velocity": [0.5, 0.6]}
    ax = plotting.velocity(line | {"velocity_error": [0.1, None]}, axes())
    np.testing.assert_array_equal(ax.lines[2].get_ydata(), [np.nan, 0.6])
    assert ax.lines[2].get_markerfacecolor() == "white"


def test_energies_of_neighbors_and_the_order_of_eigenvalues_can_be_told():
    first, second, _ = plotting.energies(lines(), axes()).lines
    assert first.get_color() != second.get_color()
    assert first.get_marker() != second.get_marker()
    ax = plotting.eigenvalues(lines(), axes())
    (bar,) = ax.child_axes
    assert bar.get_ylabel() == "index $i$"
    assert bar.get_ylim() == (2, 1)  # the largest, on top, is the first
    largest, smallest = ax.lines
    assert largest.get_ydata()[0] > smallest.get_ydata()[0]
    np.testing.assert_allclose(smallest.get_color(), mpl.colormaps["viridis"](0))


def vars_of(result):
    return {"energies": result.energies, "edges": result.shells.edges}


def test_velocity_shows_its_error_its_null_and_what_cannot_be_used():
    result = balance(1)
    ax = plotting.velocity(result, axes())
    shown, hollow, null = ax.lines[1:4]
    np.testing.assert_allclose(shown.get_ydata(), result.velocity, rtol=1e-6)
    np.testing.assert_array_equal(
        np.isnan(hollow.get_ydata()), np.asarray(result.velocity_mask)
    )
    np.testing.assert_allclose(null.get_ydata(), result.counting_velocity, rtol=1e-6)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[-1] == "null: growth alone"


def test_a_velocity_that_cannot_be_used_does_not_squeeze_the_others():
    line = {
        "edges": [1.0, 10.0, 100.0],
        "flux": [1.0, 1.0, 1.0],
        "velocity": [50.0, 1.0, 2.0],
        "velocity_error": [90.0, 0.5, 0.1],
        "velocity_mask": [False, True, True],
        "counting_velocity": [40.0, 0.2, -0.4],
    }
    low, high = plotting.velocity(line, axes()).get_ylim()
    assert -0.8 < low < -0.4  # of the null
    assert 2.1 < high < 4  # with the room for the legend
    line["velocity_mask"] = [True, True, True]
    assert plotting.velocity(line, axes()).get_ylim()[1] > 140
    line["velocity_mask"] = [False, False, False]
    assert plotting.velocity(line, axes()).get_ylim()[1] > 50


def test_a_legend_hides_no_velocity_that_is_near():
    line = {
        "edges": [1.0, 10.0, 100.0],
        "flux": [1.0, 1.0, 1.0],
        "velocity": [3.0, 1.0, 2.0],
        "velocity_mask": [False, True, True],
    }
    times = [line | {"effective_time": float(t)} for t in range(6)]
    ax = plotting.velocity(times, axes())
    ax.figure.draw_without_rendering()
    bottom = ax.get_legend().get_window_extent().y0
    assert bottom > ax.transData.transform((1.0, 3.0))[1]


@pytest.mark.parametrize(
    "draw", [plotting.spectrum, plotting.diagonal, plotting.coupling, plotting.windows]
)
def test_what_is_no_measurement_is_named(draw):
    with pytest.raises(ValueError, match=r"measured: expected a CouplingMeas.* a dict"):
        draw({}, axes())


@pytest.mark.parametrize(
    "draw", [plotting.energies, plotting.eigenvalues, plotting.flux, plotting.velocity]
)
@pytest.mark.parametrize("wrong", ["log.jsonl", 3, None, [None]])
def test_what_is_no_record_is_named(draw, wrong):
    with pytest.raises(ValueError, match=r"expected records of a probe.*, got a "):
        draw(wrong, axes())


def test_every_result_has_a_label_or_none_has():
    with pytest.raises(ValueError, match=r"labels: expected 2.*, got 1"):
        plotting.flux([{}, {}], axes(), labels=["a"])


@pytest.mark.parametrize("nothing", [[], [{}], [{"effective_time": 1.0}]])
def test_nothing_recorded_is_said(nothing):
    for draw in (plotting.energies, plotting.eigenvalues, plotting.flux):
        (text,) = draw(nothing, axes()).texts
        assert text.get_text().startswith(("no", "nothing"))


@pytest.mark.parametrize("first", [True, False])
def test_a_network_without_a_defined_window_stays_in_the_legend(measured, first):
    free = np.zeros_like(measured.renormalized.degrees_of_freedom)
    part = measured.renormalized._replace(degrees_of_freedom=free)
    none = dataclasses.replace(measured, renormalized=part)
    ax = axes()
    for label, result in sorted({"A": measured, "B": none}.items(), reverse=first):
        plotting.windows(result, ax, label=label, noise_floor=False)
    labels = ax.get_legend_handles_labels()[1]
    assert sorted(labels) == ["A", "B: undefined"]
    assert not ax.texts


def test_values_that_are_not_finite_are_not_said_to_lie_below(measured):
    values = np.array(measured.values)
    values[[0, 5]] = np.inf, np.nan
    ax = plotting.spectrum(dataclasses.replace(measured, values=values), axes())
    _, resolved = ax.lines
    assert len(resolved.get_xdata()) == 126
    assert resolved.get_label().startswith("resolved (128, 2 not finite, ")


def test_the_noise_floor_is_the_residual_of_sampled_toeplitz_couplings():
    """Against samples: Gaussian entries whose variance depends on a - b alone."""
    rng = np.random.default_rng(0)
    counts = np.array([6, 9, 14, 8, 11, 7])
    shell = np.repeat(np.arange(6), counts)
    variance = np.exp(-0.5 * np.abs(np.arange(6)[:, None] - np.arange(6)[None]))
    one_hot = (shell[:, None] == np.arange(6)).astype(float)
    mask = jnp.ones((6, 6), bool).at[0, 4].set(False).at[4, 0].set(False)
    samples = []
    for _ in range(300):
        entries = rng.normal(size=(shell.size,) * 2)
        upper = np.triu(entries)
        entries = upper + np.triu(entries, 1).T
        entries *= np.sqrt(variance[shell[:, None], shell[None]])
        means = one_hot.T @ entries**2 @ one_hot / np.outer(counts, counts)
        samples.append(means.astype(np.float32))
    residuals = jax.jit(jax.vmap(lambda x: windowed_toeplitz_residual(x, 4, mask)))
    sampled = np.sqrt(np.mean(residuals(np.stack(samples)) ** 2, axis=0))
    coupling = shells.ShellCoupling(jnp.asarray(variance, jnp.float32), mask)
    blank = random_result(shells.CouplingMeasurement)
    diagnostics = blank.literal._replace(
        coupling=coupling,
        windows=jnp.asarray(sampled),
        degrees_of_freedom=windowed_toeplitz_degrees_of_freedom(mask, 4),
    )
    binned = blank.shells._replace(counts=jnp.asarray(counts, jnp.int32))
    whole = type(blank)(**{**vars(blank), "literal": diagnostics, "shells": binned})
    floor = plotting.noise_floor_of(whole, "literal")
    np.testing.assert_allclose(floor, sampled, rtol=0.06)
    by_signs = random_result(shells.StochasticCoupling)._replace(
        matrix=coupling.matrix, mask=mask, counts=jnp.asarray(counts, jnp.float32)
    )
    floor = plotting.noise_floor_of(by_signs, window=4)
    np.testing.assert_allclose(floor, sampled, rtol=0.06)


def test_of_many_records_six_are_drawn():
    several = [balance(k) for k in range(1, 10)]
    assert len(plotting.flux(several, axes()).collections) == 6
    labels = list("abcdefghi")
    assert len(plotting.flux(several, axes(), labels=labels).collections) == 9
