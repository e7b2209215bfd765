"""Makes the virtual environments of the peers, each pinned to the last package.

The requirements list every package that is installed, and pip is told to look for no
others: some peers ask for packages that what is measured here does not need.

Example:
  python benchmarks/environments.py
  python benchmarks/environments.py --only torch
"""

import argparse
import subprocess
import sys
from pathlib import Path

from comparison.grid import PEERS

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / ".venv-benchmarks"

#: On a GPU machine: what gives each environment its CUDA libraries.
_CUDA = {
    "grsd_jax": ["jax[cuda13]"],
    "neural_tangents": ["jax[cuda12]"],
    "torch": ["torch"],
    "curvlinops": ["torch"],
}


def interpreter(name: str, folder: Path = FOLDER) -> Path:
    """Returns the Python of an environment."""
    return folder / name / "bin" / "python"


def requirements(name: str) -> Path:
    """Returns the file that pins an environment."""
    return HERE / "requirements" / f"{name}.txt"


def make_environment(name: str, folder: Path, device: str) -> None:
    """Makes or completes one environment.

    Args:
        name: Its name, that of its requirements.
        folder: The folder of all environments.
        device: ``cpu``, or ``gpu`` to let pip add the CUDA libraries.

    Raises:
        subprocess.CalledProcessError: If pip fails.
    """
    python = interpreter(name, folder)
    if not python.exists():
        _run(sys.executable, "-m", "venv", folder / name)
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    _run(*pip, "--no-deps", "--requirement", requirements(name))
    if name == "grsd_jax":
        _run(*pip, "--no-deps", "--editable", HERE.parent)
    if device == "gpu":
        _run(*pip, "--constraint", requirements(name), *_CUDA[name])


def main() -> None:
    """Makes the environments that the command line names."""
    names = sorted({peer.environment for peer in PEERS.values()})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=names, nargs="+", default=names)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    options = parser.parse_args()
    for name in options.only:
        print(f"{name} ...", flush=True)
        make_environment(name, options.folder, options.device)


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    main()
