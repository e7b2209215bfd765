"""What the package promises to those who import it."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grsd_jax

ROOT = Path(__file__).parents[1]
PACKAGE = Path(grsd_jax.__file__).parent
MODULES = sorted(PACKAGE.glob("*.py"))
SOURCES = sorted(PACKAGE.rglob("*.py"))
FLAX = {
    "architectures.py",
    "depth_chain.py",
    "linen_checks.py",
    "linen_factors.py",
    "linen_layers.py",
    "models.py",
    "state_space.py",
}
NUMERICAL = [path for path in MODULES if path.name not in FLAX]

#: Names other programs rely on: add to them, never take one away.
CONTRACT = {
    "softmax_error",
    "squared_error",
    "kernel_matmat",
    "linearize_kernel",
    "kernel_dense",
    "gradient_flow_direction",
    "kernel_derivative",
    "kernel_derivative_dense",
    "block_lanczos",
    "ritz_pairs",
    "spectral_density",
    "log_shells",
    "shell_coupling",
    "toeplitz_approximation",
    "toeplitz_residual",
    "windowed_toeplitz_residual",
    "fit_power_law",
    "measure_coupling",
}
MODELS_CONTRACT = ["ResNet18", "PlainNet18", "linen_error_fn"]

#: Everything the experiments need, and the import of the package must not.
EXTRAS = [
    "PIL",
    "absl",
    "array_record",
    "chex",
    "flax",
    "matplotlib",
    "optax",
    "orbax",
    "tensorflow",
    "tensorflow_datasets",
    "tqdm",
]


def imports(path: Path) -> set[str]:
    """Returns the dotted names a source file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_all_is_sorted_and_unique():
    assert list(grsd_jax.__all__) == sorted(set(grsd_jax.__all__))


@pytest.mark.parametrize("name", grsd_jax.__all__)
def test_public_name_has_a_docstring(name):
    value = getattr(grsd_jax, name)
    assert isinstance(value, str) or (value.__doc__ or "").strip()
    # A class without a docstring of its own would show its base's or a generated one.
    assert not (value.__doc__ or "").startswith(f"{name}(")


def test_contract_is_kept():
    assert set(grsd_jax.__all__) >= CONTRACT
    models = importlib.import_module("grsd_jax.models.resnet")
    assert all(hasattr(models, name) for name in MODELS_CONTRACT)


@pytest.mark.parametrize("name", [*grsd_jax.__all__, *MODELS_CONTRACT])
def test_public_name_is_documented(name):
    directives = re.findall(
        r"^\.\. auto\w+:: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.M
    )
    assert name in {directive.rpartition(".")[2] for directive in directives}


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def test_import_needs_jax_numpy_and_scipy_alone_and_leaves_the_config_as_it_is():
    outcome = run_python(
        BLOCKER
        + """
import jax
before = dict(jax.config.values)
import grsd_jax
after = dict(jax.config.values)
changed = [name for name in before if before[name] != after[name]]
assert not changed, changed
assert "grsd_jax.models.resnet" not in sys.modules
assert not [name for name in sys.modules if name.startswith("grsd_jax.experiments")]
"""
    )
    assert outcome.returncode == 0, outcome.stderr


def test_models_without_flax_say_what_to_install():
    outcome = run_python(BLOCKER + "import grsd_jax.models.resnet")
    assert outcome.returncode != 0
    assert "pip install 'grsd-jax[models]'" in outcome.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_only_public_jax_is_used(path):
    names = r"(?:_src|core|util|interpreters)\b"
    pattern = rf"\bjax\.{names}|\bfrom jax import [^\n]*\b{names}"
    private = re.findall(pattern, path.read_text())
    assert not private


@pytest.mark.parametrize("path", NUMERICAL, ids=lambda path: path.stem)
def test_numerical_modules_import_jax_numpy_and_scipy_alone(path):
    allowed = {"jax", "numpy", "scipy", "grsd_jax", *sys.stdlib_module_names}
    assert top_level(path) <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_library_does_not_import_experiments_or_models(path):
    upward = [
        name
        for name in imports(path)
        if name.startswith(("grsd_jax.experiments", "grsd_jax.models.resnet"))
    ]
    assert not upward


def test_lanczos_knows_no_jacobian():
    below = {"grsd_jax._typing", "grsd_jax._checks", "grsd_jax._arrays"}
    ours = {
        name.rpartition(".")[0]
        for name in imports(PACKAGE / "lanczos.py")
        if name.startswith("grsd_jax")
    }
    assert ours <= below


def test_library_modules_have_no_import_cycle():
    graph = {
        path.stem: {
            name.split(".")[1] for name in imports(path) if name.startswith("grsd_jax.")
        }
        & {other.stem for other in MODULES}
        for path in MODULES
        if path.stem != "__init__"
    }
    while graph:
        free = {name for name, needs in graph.items() if not needs & set(graph)}
        assert free, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_library_leaves_the_configuration_alone(path):
    assert "config.update" not in path.read_text()
