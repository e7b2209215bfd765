"""Planted transport: energy that a known velocity has moved, in closed form."""

import jax.numpy as jnp
import numpy as np

from grsd_jax.dynamics import SpectralSnapshot


def flowed(logs, time, exponent):
    """Returns where ``d log lambda / dt = lambda^p`` takes each log lambda in a time.

    Infinite for what the flow takes there, or brought from there.
    """
    if not exponent:
        return logs + time
    left = np.exp(-exponent * logs) - exponent * time
    with np.errstate(divide="ignore"):
        return -np.log(np.maximum(left, 0)) / exponent


def energies(logs, cumulative, time=0.0, exponent=0.0):
    """Returns the energy near each log lambda after the flow, which loses none.

    Args:
        logs: Log lambda of the modes, evenly spaced; there was energy near them alone.
        cumulative: The energy below each log lambda before.
        time: That of the flow.
        exponent: p of its velocity.

    Returns:
        The energies, what flows beyond the last mode in the last.
    """
    half = (logs[1] - logs[0]) / 2
    between = np.concatenate([[-np.inf], logs[:-1] + half, [np.inf]])
    origins = flowed(between, -time, exponent)
    return np.diff(cumulative(np.clip(origins, logs[0] - half, logs[-1] + half)))


def snapshot(values, vectors, error):
    """Returns the snapshot of pairs in ascending order."""
    parts = [jnp.asarray(x) for x in (values[::-1], vectors[:, ::-1], error)]
    eps = jnp.asarray(jnp.finfo(parts[0].dtype).eps, parts[0].dtype)
    return SpectralSnapshot(*parts, jnp.zeros(2, jnp.uint32), eps, jnp.bool_(True))


def turned(values, energies, turned_energies):
    """Returns a kernel in which an error of some energies has others, by a mirror.

    Without any turning the error is the root of ``energies`` in the unit vectors.
    """
    error, other = np.sqrt(energies), np.sqrt(turned_energies)
    axis = (error - other) / np.linalg.norm(error - other)
    mirror = np.eye(len(values)) - 2 * np.outer(axis, axis)
    return snapshot(values, mirror, error)
