"""Checks that an installed package works, extra by extra, without the clone.

    python .ci/smoke.py dist/grsd_jax-0.2.0-py3-none-any.whl dist/grsd_jax-0.2.0.tar.gz

makes an environment of this Python in a temporary folder, installs the wheel there,
first alone, then with one extra after the other, and runs the check of each from that
folder. The sdist is built and checked alone, since its extras are those of the wheel.
With names, such as `core tables`, the checks run in this environment.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
from pathlib import Path


def measured():
    """Returns the problem, the parameters and a measurement of a small function."""
    import jax

    import grsd_jax as grsd

    def outputs_fn(params, batch):
        return jax.nn.gelu(batch["image"] @ params["hidden"]) @ params["out"]

    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "hidden": jax.random.normal(keys[0], (6, 16)) / 6**0.5,
        "out": jax.random.normal(keys[1], (16, 3)) / 4,
    }
    batches = {
        "image": jax.random.normal(keys[2], (2, 6, 6)),
        "label": jax.random.randint(keys[3], (2, 6), 0, 3),
    }
    problem = grsd.Problem(outputs_fn, batches)
    result = grsd.measure_coupling(problem, params, key=keys[4])
    assert bool(result.finite), result
    return problem, params, result


def check_long_description():
    """Checks that the page on PyPI has neither a figure nor a link of the clone."""
    text = importlib.metadata.metadata("grsd-jax")["Description"]
    assert "# grsd_jax" in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links, "expected the link to the paper"
    for link in links:
        assert link.startswith("https://"), f"expected no relative link, got {link}"
    assert "![" not in text, "expected no figure"
    assert "<img" not in text, "expected no figure"


def core():
    """The metadata, products, the dense kernel, a measurement, and its file."""
    import importlib.util

    import jax
    import numpy as np

    import grsd_jax as grsd

    assert Path(grsd.__file__).is_relative_to(sys.prefix), grsd.__file__
    check_long_description()
    for extra in ("flax", "optax", "matplotlib", "pandas"):
        if importlib.util.find_spec(extra):
            print(f"  {extra} is installed too")
    problem, params, result = measured()
    dense = grsd.kernel_dense(problem, params)
    block = jax.random.normal(jax.random.key(1), (problem.dimension(params), 2))
    product = grsd.kernel_matmat(problem, params, block)
    np.testing.assert_allclose(product, dense @ block, rtol=1e-4, atol=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "measured.npz")
        again = grsd.load(Path(folder) / "measured.npz")
    np.testing.assert_array_equal(again.coupling, result.coupling)
    print(
        f"  grsd_jax {grsd.__version__}, jax {jax.__version__}, numpy {np.__version__}"
    )


def models():
    """A network of Flax NNX, as a problem."""
    import jax
    import numpy as np
    from flax import nnx

    import grsd_jax as grsd
    from grsd_jax.models import nnx_outputs

    outputs_fn, params = nnx_outputs(nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(0), (1, 4, 6))
    batches = {"image": images, "label": np.zeros((1, 4), int)}
    kernel = grsd.kernel_dense(grsd.Problem(outputs_fn, batches), params)
    assert kernel.shape == (12, 12)


def experiments():
    """The command and the help of each of its parts."""
    from grsd_jax.experiments.commands import COMMANDS

    grsd = Path(sys.executable).with_name("grsd")
    for arguments in ([], *([name] for name in COMMANDS)):
        command = [grsd, *arguments, "--help"]
        text = subprocess.run(command, check=True, capture_output=True).stdout
        assert text, command


def tables():
    """A data frame and a dataset."""
    *_, result = measured()
    assert len(result.to_pandas()) == 12  # shells
    assert result.to_xarray()["coupling"].dims == ("pair", "other_pair")


def plots():
    """A figure, without a display."""
    from matplotlib.figure import Figure

    from grsd_jax import plotting

    *_, result = measured()
    figure = Figure()
    plotting.coupling(result, figure.subplots())
    with tempfile.TemporaryDirectory() as folder:
        figure.savefig(Path(folder) / "coupling.png")


def tensorboard():
    """Events of a measurement."""
    from grsd_jax import writers

    *_, result = measured()
    with tempfile.TemporaryDirectory() as folder:
        writers.TensorBoardWriter(folder).write(0, result)
        assert list(Path(folder).glob("events*"))


#: In the order in which the extras are installed; the first needs none.
CHECKS = {
    check.__name__: check
    for check in (core, models, tables, plots, tensorboard, experiments)
}


def in_new_environment(built: Path, names: Iterable[str]) -> None:
    """Installs a wheel or an sdist with one extra after the other, and checks each."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python, script = Path(folder) / "bin" / "python", Path(__file__).resolve()
        for name in names:
            target = str(built) if name == "core" else f"{built}[{name}]"
            subprocess.run([python, "-m", "pip", "install", "-q", target], check=True)
            subprocess.run([python, script, name], check=True, cwd=folder)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if argument.endswith(".whl"):
            in_new_environment(Path(argument).resolve(), CHECKS)
        elif argument.endswith(".tar.gz"):
            in_new_environment(Path(argument).resolve(), ["core"])
        else:
            CHECKS[argument]()
            print(f"{argument}: works")
