"""What the peers in JAX share, whichever version of it they run on."""

from typing import Any

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def counters(device: str) -> dict[str, Any]:
    """Returns what a `Case` asks of JAX: programs compiled from now on, and memory.

    Args:
        device: ``cpu`` or ``gpu``; a CPU has no memory of its own to tell.

    Returns:
        The fields ``compilations`` and ``peak_device_bytes``.
    """
    seen = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == _COMPILE_EVENT:
            seen.append(duration)

    def peak_bytes() -> int:
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]

    jax.monitoring.register_event_duration_secs_listener(listen)
    return {
        "compilations": lambda: len(seen),
        "peak_device_bytes": None if device == "cpu" else peak_bytes,
    }
