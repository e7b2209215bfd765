"""This package on its plain path, as for an error function without linen layers."""

from peers.grsd import make_plain_case as make_case

__all__ = ["make_case"]
