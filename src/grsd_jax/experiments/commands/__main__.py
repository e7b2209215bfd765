"""Runs the commands as ``python -m grsd_jax.experiments.commands``."""

from grsd_jax.experiments.commands import main

if __name__ == "__main__":
    main()
