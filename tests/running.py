"""Scripts within the test's own process or in one of their own, on small networks."""

import contextlib
import functools
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from absl import app, flags, logging
from flax import linen as nn
from matplotlib.figure import Figure

from grsd_jax import models
from grsd_jax.experiments import commands
from grsd_jax.experiments.common import data, runs

SCRIPTS = Path(__file__).parents[1] / "scripts"


class Done(NamedTuple):
    """How a script ended: exit status and what it printed."""

    code: int
    out: str
    err: str


def run_script(script, *arguments):
    """Runs a script here, as `__main__` and with its flags, and returns how it ended.

    It saves an interpreter, the imports and the compilations of what ran before.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with (
                _as_command(SCRIPTS / script, arguments),
                pytest.MonkeyPatch.context() as patch,
            ):
                patch.setattr(commands, "keep_compilations", lambda: None)
                runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code or 0
    return Done(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _as_command(path, arguments):
    """Gives a script its command line, and takes back all that it sets globally."""
    app.define_help_flags()  # absl's own flags, defined once in a process
    known, argv, verbosity = set(flags.FLAGS), sys.argv, logging.get_verbosity()
    precision = jax.config.jax_default_matmul_precision
    try:
        sys.argv = [str(path), *map(str, arguments)]
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        sys.argv = argv
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        logging.set_verbosity(verbosity)
        jax.config.update("jax_default_matmul_precision", precision)


def start_script(script, *arguments, env=os.environ):
    """Starts a script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**env, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )


def finish(process, seconds=300):
    """Waits for a process, and returns how it ended."""
    out, err = process.communicate(timeout=seconds)
    return Done(process.returncode, out, err)


class Twin(nn.Module):
    """A small network with the arguments of the ResNet-18 and the tree of its twin."""

    num_classes: int
    width: int
    activation: str
    residual: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        activate = getattr(jax.nn, self.activation)
        x = x[:, ::8, ::8].reshape(len(x), -1)
        x = nn.Dense(self.width, name="stem")(x)
        y = activate(nn.BatchNorm(not train, momentum=0.9, name="norm")(x))
        y = nn.Dense(self.width, name="branch")(y)
        return nn.Dense(self.num_classes, name="head")(x + y if self.residual else y)


_textures, _join = data.synthetic_textures, runs.join_processes


@functools.cache
def small_textures():
    """The embedded data set with few images."""
    return _textures(num_train=64, num_test=32)


@contextlib.contextmanager
def small(*, textures=True):
    """Puts small networks and few images in the place of what scripts and runs take.

    Without ``textures`` the images are those that a script in another process takes.
    """
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(models, "ResNet18", Twin)
        patch.setattr(models, "PlainNet18", functools.partial(Twin, residual=False))
        if textures:
            patch.setattr(data, "synthetic_textures", small_textures)
        # What figures show is tested where they are drawn.
        patch.setattr(Figure, "savefig", lambda _, path, **_o: path.write_bytes(b"x"))
        # The tests have eight devices; a script takes one.
        patch.setattr(runs, "join_processes", lambda: _join() and None)
        yield
