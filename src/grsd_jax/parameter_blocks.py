"""Parameters cut into blocks by depth: ``J = [J_1 .. J_L]``, column block by block.

A block is a set of whole parameter leaves. The conditions of the theory speak of how
blocks influence and overlap each other against their distance ``|l - m|``, so the order
of the blocks, from input to output, is part of the partition.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grsd_jax._checks import check_at_least
from grsd_jax._typing import PyTree
from grsd_jax.results import Result, result

#: The names along a parameter's path, such as ``("head", "kernel")``.
Path = tuple[str, ...]


@result()
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ParameterBlocks(Result):
    """A partition of the parameters' leaves into named blocks, ordered by depth.

    It is static: hashable, and without leaves as a pytree.

    Attributes:
        names: The L blocks, from input to output.
        index: The block of each leaf, from 0 to ``L - 1``, in the tree's order.
        paths: The names along each leaf's path.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    paths: tuple[Path, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each leaf's block, in the tree's order."""
        return tuple(self.names[block] for block in self.index)

    def leaves_of(self, block: int) -> tuple[int, ...]:
        """Returns the positions of a block's leaves in the tree's order.

        Args:
            block: l, from 0 to ``L - 1``.

        Returns:
            Positions, ascending.

        Raises:
            ValueError: If there is no such block.
        """
        _check_block(block, self)
        return tuple(i for i, owner in enumerate(self.index) if owner == block)

    def over(self, params: PyTree) -> "ParameterBlocks":
        """Returns the partition of the leaves that ``params`` still has.

        Args:
            params: The partitioned tree, None in place of some leaves.

        Returns:
            The partition; blocks may be empty.
        """
        paths = parameter_paths(params)
        if paths == self.paths:
            return self
        owners = dict(zip(self.paths, self.index, strict=True))
        return ParameterBlocks(self.names, tuple(owners[p] for p in paths), paths)

    def block_of(self, path: Path) -> str:
        """Returns the block of a parameter; fits ``layer_of`` of `layer_kernels`.

        Args:
            path: The names along its path.

        Returns:
            The block's name.

        Raises:
            ValueError: If there is no such parameter.
        """
        if tuple(path) not in self.paths:
            raise ValueError(
                f"path: expected that of a parameter in blocks, got {path!r}."
            )
        return self.labels[self.paths.index(tuple(path))]


def parameter_paths(params: PyTree) -> tuple[Path, ...]:
    """Returns the names along the path of every leaf, in the tree's order.

    Args:
        params: A pytree.

    Returns:
        One tuple of names for each leaf.
    """
    found = jax.tree_util.tree_leaves_with_path(params)
    return tuple(tuple(_key_name(key) for key in path) for path, _ in found)


def partition(
    params: PyTree,
    block_of: Callable[[Path], str | Sequence[str] | None],
    names: Sequence[str],
) -> ParameterBlocks:
    """Cuts the parameters into blocks by a function of their paths.

    Args:
        params: Parameters, a pytree; shapes alone are enough.
        block_of: ``block_of(path) -> name`` from the names along a parameter's path.
            None, or an empty sequence, says that it is in no block; a sequence lists
            all the blocks that claim it.
        names: The L blocks in order of depth, from input to output. The order cannot
            be told from the tree: dictionaries are sorted by name.

    Returns:
        The partition.

    Raises:
        ValueError: If a parameter falls into no block or into two, a block is not one
            of ``names`` or holds no parameter, or ``names`` has a double; it says
            which.

    References:
        Paper 4.1, ``J = [J_1 .. J_L]``.
    """
    names = tuple(names)
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"names: expected one or more different names, got {list(names)}."
        )
    paths = parameter_paths(params)
    claims = [_claims(block_of(path)) for path in paths]
    known = "each parameter in one of " + ", ".join(map(repr, names))
    for got in (
        [p for p, c in zip(paths, claims, strict=True) if not c],
        [p for p, c in zip(paths, claims, strict=True) if len(c) > 1],
        [p for p, c in zip(paths, claims, strict=True) if c and c[0] not in names],
    ):
        if got:
            listed = "; ".join(
                f"'{'/'.join(path)}' in {_listed(claims[paths.index(path)])}"
                for path in got
            )
            raise ValueError(f"block_of: expected {known}, got {listed}.")
    index = tuple(names.index(found[0]) for found in claims)
    empty = [name for block, name in enumerate(names) if block not in index]
    if empty:
        raise ValueError(
            f"names: expected a parameter in every block, got none in {_listed(empty)}."
        )
    return ParameterBlocks(names, index, paths)


def partition_by_prefix(
    params: PyTree, prefixes: Mapping[str, Sequence[str]]
) -> ParameterBlocks:
    """Cuts the parameters into blocks by where their paths begin.

    Args:
        params: Parameters, a pytree; shapes alone are enough.
        prefixes: ``{name: prefixes}`` of the L blocks in order of depth. A prefix is
            whole names joined by ``/``: ``"stage1/conv"`` holds ``stage1/conv/kernel``
            and not ``stage1/conv2/kernel``.

    Returns:
        The partition.

    Raises:
        ValueError: As for `partition`.
    """
    split = {
        name: [tuple(prefix.split("/")) for prefix in starts]
        for name, starts in prefixes.items()
    }

    def block_of(path: Path) -> list[str]:
        return [
            name
            for name, starts in split.items()
            if any(path[: len(start)] == start for start in starts)
        ]

    return partition(params, block_of, tuple(prefixes))


def check_blocks(blocks: ParameterBlocks, params: PyTree) -> None:
    """Raises ValueError unless ``blocks`` is a partition of ``params``."""
    paths = parameter_paths(params)
    if blocks.paths != paths:
        other = sorted(set(paths) ^ set(blocks.paths))
        listed = ", ".join("/".join(path) for path in other) or "another order"
        raise ValueError(
            "blocks: expected a partition of the leaves of params, got one that "
            f"differs in {listed}."
        )


def restrict_to_block(tree: PyTree, blocks: ParameterBlocks, block: int) -> PyTree:
    """Returns a params tree with zeros outside one block.

    Args:
        tree: A params tree, such as a direction.
        blocks: The partition.
        block: l, from 0 to ``L - 1``.

    Returns:
        A tree like ``tree``.

    Raises:
        ValueError: If ``blocks`` is not a partition of the tree, or there is no such
            block.
    """
    check_blocks(blocks, tree)
    _check_block(block, blocks)
    leaves, structure = jax.tree.flatten(tree)
    kept = [
        leaf if owner == block else jnp.zeros_like(leaf)
        for leaf, owner in zip(leaves, blocks.index, strict=True)
    ]
    return structure.unflatten(kept)


def _check_block(block: int, blocks: ParameterBlocks) -> None:
    """Raises ValueError unless a block is one of a partition."""
    number = len(blocks.names)
    check_at_least("block", block, 0)
    if block >= number:
        raise ValueError(f"block: expected at most L - 1 = {number - 1}, got {block}.")


def _claims(found: str | Sequence[str] | None) -> list[str]:
    if found is None:
        return []
    return [found] if isinstance(found, str) else list(found)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names)) if names else "none"


def _key_name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)
