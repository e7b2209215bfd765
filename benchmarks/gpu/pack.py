"""Packs what must travel to a machine without a network, within so many bytes.

Writes a subset of CIFAR-10 (the first images of each class, in the order of the data
set) and, if asked, wheels; ``pack.json`` says which.

Example:
  python benchmarks/gpu/pack.py --out runs/packed --max_bytes 60000000
  python benchmarks/gpu/science.py --data_dir runs/packed --out runs/gpu
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import packed
from grsd_jax.experiments.common import data
from grsd_jax.experiments.common.config import UserError


def main() -> None:
    """Packs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--max_bytes", required=True, type=int)
    parser.add_argument("--data_dir", help="TFDS data; default: TFDS_DATA_DIR.")
    parser.add_argument("--wheels", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--python", default="3.12", help="Python of the wheels.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        wheels = download(options.wheels, options.out / "wheels", options.python)
        left = options.max_bytes - sum(wheels.values())
        about = {"wheels": wheels, **pack_images(options.out, left, options.data_dir)}
    except (UserError, ValueError) as error:
        sys.exit(str(error))
    common.write_json(options.out / "pack.json", about)
    total = about["bytes"] + sum(wheels.values())
    kept = {name: len(indices) for name, indices in about["indices"].items()}
    print(f"{total} bytes in {options.out}: images {kept}, wheels {list(wheels)}")


def pack_images(out: Path, max_bytes: int, data_dir: str | None) -> dict[str, Any]:
    """Writes the images; returns their file, its bytes and the images' indices."""
    splits = data.read_cifar10(data_dir)
    chosen = packed.write(out / packed.FILE, splits, max_bytes)
    return {
        "file": packed.FILE,
        "bytes": (out / packed.FILE).stat().st_size,
        "chosen": "the first images of each class, in the order of the data set",
        "indices": {name: indices.tolist() for name, indices in chosen.items()},
    }


def download(names: list[str], folder: Path, python: str) -> dict[str, int]:
    """Downloads wheels for 64-bit Linux, without what they depend on.

    Returns:
        Their bytes, by file.
    """
    if not names:
        return {}
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--python-version", python]
    command += ["--platform", "manylinux_2_28_x86_64", "--platform", "any"]
    subprocess.run([*command, "--dest", str(folder), *names], check=True)
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}


if __name__ == "__main__":
    main()
