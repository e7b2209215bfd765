"""The commands, ``grsd NAME``: each a module with `define` (its flags) and `main`.

The docstring of the module is what ``grsd NAME --help`` says. A module may say more:
``SETTINGS``, the dataclass of its flags; ``POSITIONAL``, the flag that may be given
without its name; ``READS_RUN``, that flags not given are read from a training's
config.json.
"""

import contextlib
import importlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

#: What each command does, in the order in which people need them.
COMMANDS = {
    "reproduce": "run the main job: train both networks, measure them, draw figures",
    "train": "train a network",
    "measure": "measure the shell coupling of a trained network",
    "track": "train networks and record the shell dynamics on the way",
    "conditions": "test the four conditions of the theory on a network",
    "sweep": "sweep networks over depth, width, activation, branch scale and seed",
    "study": "test the paper's claims on both networks, over seeds",
    "transport": "test the law of energy transport on paired networks, over seeds",
    "plot": "draw the figures of a measurement or of a tracked training",
    "report": "make one HTML page of any run",
    "benchmark": "time the operations on an untrained network",
}


@contextlib.contextmanager
def _while_read() -> Iterator[None]:
    """Ends the process quietly if the reader of its output has gone, as ``head``."""
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer is written at exit, to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@_while_read()
def run(name: str) -> None:
    """Runs a command with the arguments of ``sys.argv``.

    Args:
        name: One of `COMMANDS`.
    """
    # Only the command that is asked for is imported: some need more packages.
    from grsd_jax.experiments.common import flags

    module = importlib.import_module(f"{__name__}.{name}")
    module.define()
    keep_compilations()
    flags.run_main(
        module.main,
        description=module.__doc__ or "",
        settings=getattr(module, "SETTINGS", flags.Config),
        positional=getattr(module, "POSITIONAL", None),
        reads_run=getattr(module, "READS_RUN", False),
    )


def keep_compilations() -> None:
    """Lets JAX keep compiled programs for the next run, unless it is told where.

    In ``grsd_jax`` of the user's cache folder. ``JAX_COMPILATION_CACHE_DIR`` names
    another, and ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps none.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "grsd_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@_while_read()
def main() -> None:
    """Runs ``grsd NAME --flags``."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"grsd {name}"]
        run(name)
    elif name in ("--help", "-h", "help"):
        print(_overview())
    else:
        listed = ", ".join(COMMANDS)
        print(
            f"error: command: expected one of {listed}, got {name!r}.", file=sys.stderr
        )
        sys.exit(1)


def say_end(
    *places: str | os.PathLike[str], then: str | Sequence[str | os.PathLike[str]]
) -> None:
    """Prints what every command ends with: where things are, and what comes next.

    Args:
        *places: Files and folders, a line each.
        then: What comes next: a text, or the words of a command, which are quoted so
            that a shell takes them as they are.
    """
    if not isinstance(then, str):
        then = shlex.join([os.fspath(word) for word in then])
    print(*places, f"next: {then}", sep="\n")


def _overview() -> str:
    lines = ["usage: grsd COMMAND [--flags]", ""]
    lines += [f"  {name:12}{what}" for name, what in COMMANDS.items()]
    lines += ["", "Run grsd COMMAND --help for its purpose, outputs and flags."]
    return "\n".join(lines)
