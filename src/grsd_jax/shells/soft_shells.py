"""Shells as a partition of unity of the spectrum: soft or sharp steps at given edges.

A soft step of width 1/2 or 1/3 is a rational function of the eigenvalue, so that a few
steps of Lanczos apply it to a vector. Sharp steps need eigenpairs.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import as_floating, is_traced
from grsd_jax._checks import check_at_least, check_not_negative, make_plain
from grsd_jax.results import Result, result

#: Widths at which a soft step is a rational function of lambda.
RATIONAL_WIDTHS = (1 / 2, 1 / 3)

#: Widths w apart at which soft shells overlap too little to be taken for transport.
_WIDE = 8

#: The part of the window of a sharp edge within which its effective edge has to lie: as
#: far, in standard deviations of the window, as w is for a soft edge.
_SHARP_REACH = 0.16


@result(units={"edges": "units of M"})
@partial(jax.tree_util.register_dataclass, data_fields=["edges"], meta_fields=["width"])
@dataclasses.dataclass(frozen=True, eq=False)
class SoftShells(Result):
    r"""Shells ``f_a(lambda)`` that add up to one, cut at the edges.

    .. math:: \mathrm{up}_k(\lambda) =
              \frac{1}{1 + (\lambda_k / \lambda)^{1/w}}, \qquad
              f_a = \mathrm{up}_{a-1} - \mathrm{up}_a

    with ``up_{-1} = 1`` and ``up_q = 0``: q edges make ``S = q + 1`` shells. Shell 0
    lies below all edges and holds the null space too; the last one is open above. Of
    width 0, ``up_k`` is a step: 0 below ``lambda_k``, 1 from there on.

    Attributes:
        edges: [q], ``lambda_k``, positive and increasing.
        width: w, in units of log lambda; 0 for sharp shells. Lanczos needs 1/2 or 1/3.

    References:
        Ours; ``docs/what_moved.md``.
    """

    edges: jax.Array
    width: float = 1 / 2

    def __post_init__(self) -> None:
        """Checks the width; edges may be placeholders here, see `checked`."""
        make_plain(self)
        check_not_negative("width", self.width)

    def checked(self, dtype: jax.typing.DTypeLike) -> "SoftShells":
        """Returns the shells with edges of a dtype.

        Args:
            dtype: That of the eigenvalues.

        Returns:
            The shells.

        Raises:
            ValueError: If the edges are not a floating [q] array of at least one, or
                are known here and not positive, finite and increasing in this dtype.
        """
        edges = as_floating("shells.edges", self.edges, [None])
        check_at_least("len(shells.edges)", len(edges), 1)
        if not is_traced(self.edges):
            known = np.asarray(self.edges).astype(dtype)
            positive = np.all(np.isfinite(known)) and known[0] > 0
            if not (positive and np.all(np.diff(known) > 0)):
                raise ValueError(
                    "shells.edges: expected positive, finite, increasing numbers, got "
                    f"{known}."
                )
        return dataclasses.replace(self, edges=edges.astype(dtype))

    def above(self, values: jax.Array, growth: jax.typing.ArrayLike = 0.0) -> jax.Array:
        """Returns ``up_k(e^u lambda)``.

        Args:
            values: [r], lambda; those that are not positive lie below all edges.
            growth: u, a number or ``[q]``, one for each edge.

        Returns:
            ``[r, q]``, from 0 to 1.
        """
        shift = jnp.broadcast_to(jnp.asarray(growth, values.dtype), self.edges.shape)
        return self._step(self._logs(values) + shift[None, :])

    def members(self, values: jax.Array) -> jax.Array:
        """Returns ``f_a(lambda)``, each without cancellation.

        Args:
            values: [r], lambda.

        Returns:
            ``[r, q + 1]``, not negative; rows add up to one.
        """
        logs = self._logs(values)
        up, down = self._step(logs), self._step(-logs)
        if not self.width:
            down = 1 - up
        # up_{a-1} - up_a = up_{a-1} (1 - up_a) (1 - (lambda_{a-1} / lambda_a)^(1/w)).
        inner = up[:, :-1] * down[:, 1:]
        if self.width:
            inner = inner * -jnp.expm1(-self._spacing() / self.width)[None, :]
        return jnp.concatenate([down[:, :1], inner, up[:, -1:]], axis=1)

    def windows(self, values: jax.Array) -> jax.Array:
        """Returns ``d up_k / d log lambda``, what counts as being at the edge.

        Sharp steps have no derivative: theirs is the mean over the two shells at the
        edge, per unit of log lambda, and 0 at the outermost edges, whose outer shell is
        open.

        Args:
            values: [r], lambda.

        Returns:
            ``[r, q]``, not negative.
        """
        if self.width:
            logs = self._logs(values)
            return self._step(logs) * self._step(-logs) / self.width
        members = self.members(values)
        spread = self._window_widths()[None, :]
        at_edge = members[:, :-1] + members[:, 1:]
        return jnp.where(spread > 0, at_edge / jnp.where(spread > 0, spread, 1), 0)

    def offsets(self, values: jax.Array) -> jax.Array:
        """Returns ``log(lambda / lambda_k)``, [r, q]; 0 where lambda <= 0."""
        logs = self._logs(values)
        return jnp.where(jnp.isfinite(logs), logs, 0)

    def reach(self) -> jax.Array:
        """Returns how far an edge's energy may lie from it, ``[q]`` in log lambda."""
        if self.width:
            return jnp.full_like(self.edges, self.width)
        return _SHARP_REACH * self._window_widths()

    def are_wide(self) -> jax.Array:
        """Returns whether all inner shells are sharp or at least 8 w wide, [] bool."""
        least = _WIDE * self.width * (1 - 1e-5)  # less the rounding of the edges
        return jnp.all(self._spacing() >= least, axis=-1)

    def _logs(self, values: jax.Array) -> jax.Array:
        """Returns ``log(lambda / lambda_k)``, minus infinity where lambda <= 0."""
        # The ratio first: logarithms of very small or large numbers are less accurate.
        values, edges = values[:, None], self.edges[None, :]
        ratios = jnp.maximum(values, 0) / edges
        if not self.width:
            # XLA turns the division into a product with 1 / edge, which may fall short.
            ratios = jnp.where(values == edges, 1, ratios)
        return jnp.where(jnp.isnan(values), jnp.nan, jnp.log(ratios))

    def _step(self, logs: jax.Array) -> jax.Array:
        if self.width:
            return jax.nn.sigmoid(logs / self.width)
        return jnp.where(jnp.isnan(logs), jnp.nan, (logs >= 0).astype(logs.dtype))

    def _spacing(self) -> jax.Array:
        return jnp.log(self.edges[..., 1:] / self.edges[..., :-1])

    def _window_widths(self) -> jax.Array:
        """Returns the width of the two shells at each edge, 0 if one is open."""
        spacing = self._spacing()
        widths = spacing[..., :-1] + spacing[..., 1:]
        ends = [(0, 0)] * (widths.ndim - 1) + [(1, 1)]
        return jnp.pad(widths, ends)[..., : self.edges.shape[-1]]
