"""The command `grsd transport`, from a clone; --help says what it does."""

from grsd_jax.experiments.commands import run

if __name__ == "__main__":
    run("transport")
