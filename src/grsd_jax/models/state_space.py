"""A linear state-space model of controlled spectral radius, unrolled in time."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from grsd_jax._checks import check_positive, make_plain
from grsd_jax._typing import PyTree
from grsd_jax.models.chain import DepthChain


class StateSpaceStep(nn.Module):
    """The parameters of one time step, ``B_t`` and ``C_t``.

    Attributes:
        num_classes: Outputs C.
        width: Features of the state.
    """

    num_classes: int
    width: int

    def setup(self) -> None:
        """Makes the layers."""
        self.inputs = nn.Dense(self.width, use_bias=False)
        self.readout = nn.Dense(self.num_classes, use_bias=False)

    def __call__(self, state: jax.Array) -> jax.Array:
        """Returns what the step adds to the outputs, ``C_t h_t``."""
        return self.readout(state)

    def drive(self, x: jax.Array) -> jax.Array:
        """Returns what the input adds to the state, ``B_t x_t``."""
        return self.inputs(x)


class LinearStateSpace(DepthChain):
    r"""Linear state-space model, unrolled over L time steps, of spectral radius rho.

    .. math:: h_t = A h_{t-1} + B_t x_t, \qquad y = \sum_t C_t h_t, \qquad A = \rho Q

    with a fixed orthogonal Q (a cyclic shift), so that ``|A^k| = rho^k`` exactly. Every
    step is a block with its own ``B_t`` and ``C_t``, since the blocks of Proposition 2
    are pieces of the unrolled computation graph; there is no stem and no head. The
    input is cut into L equal pieces ``x_t``; one of shape ``[N, L, features]`` is cut
    along its second axis.

    Attributes:
        num_classes: Outputs C.
        depth: Time steps L.
        width: Features of the state.
        rho: Spectral radius; 1 and above is outside the condition of Proposition 2.

    References:
        Paper 6.4, and Proposition 2 in A.1.
    """

    rho: float = 0.9

    def __post_init__(self) -> None:
        """Checks the attributes."""
        make_plain(self)
        check_positive("rho", self.rho)
        super().__post_init__()

    def setup(self) -> None:
        """Makes the layers."""
        self._set_blocks(lambda: StateSpaceStep(self.num_classes, self.width))

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps inputs ``[N, ...]`` to outputs ``[N, C]``; ``train`` has no effect."""
        del train
        state, parts = self.first_state(x), []
        for index in range(self.depth):
            state = self.next_state(state, index, x)
            parts.append(getattr(self, f"block{index + 1}")(state))
        return functools.reduce(jnp.add, parts)

    def first_state(self, x: jax.Array) -> jax.Array:
        """Returns ``h_0 = 0``, ``[N, width]``."""
        return jnp.zeros((x.shape[0], self.width), x.dtype)

    def next_state(self, state: jax.Array, index: int, x: jax.Array) -> jax.Array:
        """Returns ``A h + B_t x_t`` for ``t = index + 1``."""
        driven = getattr(self, f"block{index + 1}").drive(self.pieces(x)[:, index])
        return self.rho * jnp.roll(state, 1, axis=-1) + driven

    @nn.nowrap
    def pieces(self, x: jax.Array) -> jax.Array:
        """Cuts inputs ``[N, ...]`` into L pieces, ``[N, L, features]``."""
        if math.prod(x.shape[1:]) % self.depth:
            raise ValueError(
                f"x: expected a multiple of depth = {self.depth} features, "
                f"got shape {list(x.shape)}."
            )
        return x.reshape(x.shape[0], self.depth, -1)

    @nn.nowrap
    def block_prefixes(self) -> dict[str, tuple[str, ...]]:
        """Returns the blocks by time step, for `grsd_jax.models.depth_blocks`."""
        return {f"block{i + 1}": (f"block{i + 1}",) for i in range(self.depth)}

    @nn.nowrap
    def influence_constant(self, direction: PyTree, x: jax.Array) -> jax.Array:
        r"""The constant c of Proposition 2 for the squared error, from local norms.

        The derivative of ``J_l`` along block m is ``Cdot_m A^{m-l} (.) x_l`` for
        ``m >= l`` and ``A^{l-m} Bdot_m x_m`` (in each output) for ``m <= l``, so that

        .. math:: R_{lm} \le c \rho^{|l - m|}, \quad c^2 =
            \max_l |X_l|_F^2 \max_m |\dot C_m|_F^2 + C \max_m |X_m \dot B_m|_F^2

        Args:
            direction: How the parameters move, the tangent d.
            x: Inputs ``[N, ...]``.

        Returns:
            [], c.

        References:
            Paper A.1, "uniform boundedness of local Jacobians".
        """
        pieces, readouts, drives = self.pieces(x), [], []
        for index in range(self.depth):
            block = direction[f"block{index + 1}"]
            readouts.append(jnp.sum(block["readout"]["kernel"] ** 2))
            moved = jnp.matmul(
                pieces[:, index],
                block["inputs"]["kernel"],
                precision=jax.lax.Precision.HIGHEST,
            )
            drives.append(jnp.sum(moved**2))
        inputs = jnp.max(jnp.sum(pieces**2, axis=(0, 2)))
        square = inputs * jnp.max(jnp.stack(readouts))
        return jnp.sqrt(square + self.num_classes * jnp.max(jnp.stack(drives)))
