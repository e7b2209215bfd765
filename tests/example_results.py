"""Results as a measurement writes them, planted so that the answers are known."""

import functools

import jax
import numpy as np

from grsd_jax.shells.binning import log_shells, shell_coupling
from grsd_jax.shells.power_law import fit_power_law
from grsd_jax.shells.toeplitz import (
    toeplitz_residual,
    windowed_toeplitz_degrees_of_freedom,
    windowed_toeplitz_residual,
)

NUM_MODES, NUM_SHELLS, WINDOW = 160, 12, 5

PROTOCOLS = ("shared", "recalibrated", "own")


@functools.cache
def measurement(seed=0, slope=1.0, noise=0.3, decades=4.0):
    """The entry and the arrays of one measurement, without prefix."""
    rng = np.random.default_rng(seed)
    logs = -decades * np.sort(rng.beta(2.5, 1.2, NUM_MODES))
    values = (10.0**logs * rng.uniform(1, 1.02)).astype(np.float32)
    resolved = np.arange(NUM_MODES) < int(0.8 * NUM_MODES)
    values[-3:] = [0, -1e-8, -2e-8]
    return _measure(
        _coupling(rng, np.abs(values) + 1e-9, slope, noise), values, resolved
    )


def _coupling(rng, values, slope, noise):
    s = np.log(values.astype(np.float64))
    amplitude = np.exp(slope * (s[:, None] + s[None, :]) / 2)
    amplitude = amplitude * np.exp(-0.4 * np.abs(s[:, None] - s[None, :]))
    factor = np.exp(noise * rng.standard_normal(amplitude.shape))
    return (amplitude * (factor + factor.T) / 2).astype(np.float32)


@functools.partial(jax.jit, static_argnames="renormalize")
def _diagnostics(coupling, values, shells, *, renormalize):
    matrix, mask = shell_coupling(coupling, values, shells, renormalize=renormalize)
    return (
        (matrix, mask),
        toeplitz_residual(matrix, mask),
        windowed_toeplitz_residual(matrix, WINDOW, mask),
        windowed_toeplitz_degrees_of_freedom(mask, WINDOW),
    )


_shells = jax.jit(log_shells, static_argnums=1)
_fit = jax.jit(functools.partial(fit_power_law, num_bootstrap=100))


def _measure(coupling, values, resolved):
    shells = _shells(values, NUM_SHELLS, mask=resolved)
    arrays = {
        "values": values,
        "resolved": resolved,
        "residuals": np.full(NUM_MODES, 1e-6, np.float32),
        "coupling": coupling,
        "coupling_diagonal": np.abs(np.diag(coupling)),
        "shell_edges": np.asarray(shells.edges),
        "shell_centers": np.asarray(shells.centers),
        "shell_counts": np.asarray(shells.counts),
    }
    toeplitz = {}
    for kind in ("literal", "renormalized"):
        (matrix, mask), residual, windows, freedom = _diagnostics(
            coupling, values, shells, renormalize=kind == "renormalized"
        )
        arrays[kind], arrays[f"{kind}_mask"] = np.asarray(matrix), np.asarray(mask)
        toeplitz[kind] = {
            "residual": float(residual),
            "windows": [
                {
                    "start": k,
                    "stop": k + WINDOW,
                    "lambda_center": float(shells.centers[k + WINDOW // 2]),
                    "position": k / (len(windows) - 1),
                    "residual": float(windows[k]) if freedom[k] > 0 else None,
                    "degrees_of_freedom": int(freedom[k]),
                }
                for k in range(len(windows))
            ],
        }
    root = np.sqrt(np.diag(arrays["literal"]))
    return {
        "n": NUM_MODES * 2,
        "num_pairs": NUM_MODES,
        "num_resolved": int(resolved.sum()),
        "solver": "dense",
        "derivative": "exact",
        "reduction": "mean",
        "test_accuracy": 0.8125,
        "diagonal_fit": _fields(
            _fit(values, arrays["coupling_diagonal"], resolved, key=jax.random.key(0))
        ),
        "shell_fit": _fields(
            _fit(arrays["shell_centers"], root, root > 0, key=jax.random.key(0))
        ),
        "toeplitz": toeplitz,
        "secant_disagreement": 0.1534,
    }, arrays


def _fields(fit):
    fields = {
        name: float(value)
        for name, value in fit._asdict().items()
        if name != "interval"
    }
    return fields | {"interval": [float(end) for end in fit.interval]}


def one_model():
    """The contents of results.json and arrays.npz of one measurement."""
    entry, arrays = measurement()
    entry = entry | {"name": "resnet18", "protocol": "own", "arrays": "resnet18"}
    return (
        {"config": {}, "environment": {}, "model": entry},
        {f"resnet18/{name}": array for name, array in arrays.items()},
    )


def several_models(protocols=PROTOCOLS):
    """The contents of results.json and arrays.npz of the whole comparison."""
    runs = {"resnet18": ("own", {})}
    for k, protocol in enumerate(protocols):
        options = {"seed": k + 1, "slope": 0.7 - 0.1 * k, "noise": 0.9}
        runs[f"plainnet18.{protocol}"] = (protocol, options)
    entries, arrays = {}, {}
    for prefix, (protocol, options) in runs.items():
        entry, found = measurement(**options)
        entries[prefix] = entry | {"protocol": protocol, "arrays": prefix}
        arrays |= {f"{prefix}/{name}": array for name, array in found.items()}
    by_protocol = {p: entries[f"plainnet18.{p}"] for p in protocols}
    models = {
        "resnet18": entries["resnet18"],
        "plainnet18": by_protocol[protocols[0]],
    }
    header = {"config": {}, "environment": {}}
    return header | {"models": models, "protocols": by_protocol}, arrays
