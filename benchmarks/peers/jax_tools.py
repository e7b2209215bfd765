"""What the peers in JAX share, whichever version of it they run on."""

from collections.abc import Callable
from typing import Any

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def compilation_counter() -> Callable[[], int]:
    """Returns a function that tells how many programs JAX has compiled since."""
    seen = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == _COMPILE_EVENT:
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: len(seen)


def peak_device_bytes(device: str) -> Callable[[], int] | None:
    """Returns a function that tells an accelerator's peak memory; None on CPU."""
    if device == "cpu":
        return None
    return lambda: jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
