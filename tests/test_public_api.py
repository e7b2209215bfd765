"""What the package promises to those who import it, and how its parts may depend."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grsd_jax

ROOT = Path(__file__).parents[1]
PACKAGE = Path(grsd_jax.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
EXPERIMENTS = PACKAGE / "experiments"
LIBRARY = [path for path in SOURCES if EXPERIMENTS not in path.parents]

#: Names other programs rely on: add to them, never take one away.
CONTRACT = {
    "grsd_jax": {
        "Binning",
        "Derivative",
        "Lanczos",
        "PathPoint",
        "Problem",
        "Window",
        "condition_report",
        "gradient_flow_direction",
        "kernel_dense",
        "kernel_derivative",
        "kernel_matmat",
        "layer_kernels",
        "linearize_kernel",
        "load",
        "make_probe",
        "measure_coupling",
        "partition",
        "softmax_error",
        "squared_error",
    },
    "grsd_jax.kernel": {
        "choose_solver",
        "kernel_dense",
        "kernel_derivative",
        "kernel_matmat",
        "layer_kernels",
        "linearize_kernel",
        "shard_batches",
    },
    "grsd_jax.linalg": {
        "block_lanczos",
        "default_floor",
        "leading_eigenpairs",
        "ritz_pairs",
        "spectral_density",
    },
    "grsd_jax.shells": {
        "centre_toeplitz_residual",
        "fit_power_law",
        "log_shells",
        "measure_layers",
        "shell_coupling",
        "toeplitz_approximation",
        "toeplitz_residual",
        "windowed_toeplitz_residual",
    },
    "grsd_jax.dynamics": {
        "closure_error",
        "effective_time",
        "make_probe",
        "shell_dynamics",
        "velocity_fit",
    },
    "grsd_jax.conditions": {
        "PathPoint",
        "Thresholds",
        "block_coherence",
        "condition_report",
        "influence_profile",
        "operator_norms",
        "partition",
    },
    "grsd_jax.plotting": {
        "coupling",
        "diagonal",
        "eigenvalues",
        "energies",
        "flux",
        "spectrum",
        "velocity",
        "windows",
    },
    "grsd_jax.writers": {"CallbackWriter", "TensorBoardWriter", "WandbWriter"},
    "grsd_jax.models": {
        "PlainNet18",
        "ResNet18",
        "equinox_outputs",
        "haiku_outputs",
        "linen_outputs",
        "nnx_outputs",
    },
}

#: Topics that are no part of the package's own import.
ON_REQUEST = {"models", "plotting", "writers"}

PUBLIC = [
    (topic, name)
    for topic in CONTRACT
    for name in importlib.import_module(topic).__all__
]

#: Helpers that any module may import.
HELPERS = ("_typing", "_checks", "_arrays", "_batches", "_files", "_memory", "_targets")

#: What each part imports, besides helpers and itself: what is named here, and what
#: that may import. `linalg` knows nothing of networks, `models` nothing of kernels.
ARROWS = {
    "errors": set(),
    "results": set(),
    "linalg": {"results"},
    "parameter_blocks": {"results"},
    "objective": {"errors"},
    "problem": {"objective"},
    "jacobian": {"problem", "parameter_blocks"},
    "kernel": {"jacobian", "parameter_blocks"},
    "shells": {"kernel", "linalg"},
    "dynamics": {"shells"},
    "conditions": {"dynamics"},
    "__init__": {"conditions"},
    "models": {"parameter_blocks"},
    "plotting": {"dynamics"},
    "writers": {"results"},
}

#: Everything the experiments need, and the import of the package must not.
EXTRAS = [
    "PIL",
    "absl",
    "array_record",
    "chex",
    "equinox",
    "flax",
    "haiku",
    "matplotlib",
    "optax",
    "orbax",
    "pandas",
    "tabulate",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tqdm",
    "xarray",
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


def modules_imported(path: Path) -> set[str]:
    """Returns the dotted modules of this package that a source file imports.

    But for what `Problem.explain` imports when it is called.
    """
    found = set()
    for name in imports(path):
        if name.split(".")[0] == "grsd_jax":
            found.add(name if is_module(name) else name.rpartition(".")[0])
    late = {"problem": {"grsd_jax.jacobian.explain"}}
    return found - late.get(path.stem, set())


def is_module(name: str) -> bool:
    place = PACKAGE.parent / Path(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").exists()


def dotted(path: Path) -> str:
    """Returns the dotted name of a source file's module."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """Returns the folder or the module at the top that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def may_import(part: str) -> set[str]:
    """Returns the parts that a part may import, itself left out."""
    below = ARROWS.get(part, set())
    return below.union(*(may_import(other) for other in below))


by_name = pytest.mark.parametrize(
    ("topic", "name"), PUBLIC, ids=[".".join(pair) for pair in PUBLIC]
)


def by_path(paths):
    ids = [str(path.relative_to(PACKAGE)) for path in paths]
    return pytest.mark.parametrize("path", paths, ids=ids)


@pytest.mark.parametrize("topic", CONTRACT)
def test_contract_is_kept_and_all_is_sorted(topic):
    names = importlib.import_module(topic).__all__
    assert list(names) == sorted(set(names), key=lambda n: (not n.isupper(), n))
    assert set(names) >= CONTRACT[topic]


def test_few_names_are_at_the_top_and_the_topics_are_among_them():
    assert 15 <= len(grsd_jax.__all__) <= 25
    topics = {topic.partition(".")[2] for topic in CONTRACT} - {"", *ON_REQUEST}
    assert set(grsd_jax.__all__) >= topics
    # What needs more than JAX, NumPy and SciPy is imported by name.
    assert not ON_REQUEST & set(grsd_jax.__all__)


@by_name
def test_public_name_has_a_docstring(topic, name):
    value = getattr(importlib.import_module(topic), name)
    assert isinstance(value, str | tuple) or (value.__doc__ or "").strip()
    # A class without a docstring of its own would show its base's or a generated one.
    assert not (value.__doc__ or "").startswith(f"{name}(")


@by_name
def test_public_function_has_few_arguments(topic, name):
    value = getattr(importlib.import_module(topic), name)
    if inspect.isfunction(value):
        assert len(inspect.signature(value).parameters) <= 9


def documented() -> list[str]:
    """Returns the dotted names that the reference documents."""
    text = (ROOT / "docs" / "api.md").read_text()
    return re.findall(r"^\.\. auto\w+:: (\S+)", text, re.M)


def resolve(name: str) -> object:
    """Returns what a dotted name of this package stands for, None if nothing."""
    module = name
    while not is_module(module):
        module = module.rpartition(".")[0]
    value = importlib.import_module(module)
    for attribute in name[len(module) :].split(".")[1:]:
        value = getattr(value, attribute, None)
    return value


def test_every_public_name_is_documented_and_every_documented_name_is_there():
    found = {name: resolve(name) for name in documented()}
    assert [name for name, value in found.items() if value is None] == []
    identities = {id(value) for value in found.values()}
    missing = [
        f"{topic}.{name}"
        for topic, name in PUBLIC
        if id(getattr(importlib.import_module(topic), name)) not in identities
    ]
    assert missing == []


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

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
for name in ("models", "plotting", "writers"):
    assert f"grsd_jax.{name}" not in sys.modules
import grsd_jax.plotting, grsd_jax.writers
assert not [name for name in sys.modules if name.startswith("grsd_jax.experiments")]
ones = jax.numpy.ones
batches = {"x": ones((1, 2, 3)), "label": jax.numpy.zeros((1, 2), int)}
problem = grsd_jax.Problem(lambda w, batch: batch["x"] @ w, batches)
assert grsd_jax.kernel_dense(problem, ones((3, 2))).shape == (4, 4)
"""
    )
    assert outcome.returncode == 0, outcome.stderr


def test_models_import_no_framework_before_it_is_used():
    outcome = run_python(
        """
import sys
from grsd_jax.models import equinox_outputs, haiku_outputs, nnx_outputs
found = {"equinox", "flax", "haiku"} & set(sys.modules)
assert not found, found
from grsd_jax.models import linen_outputs
found = {"equinox", "flax", "haiku"} & set(sys.modules)
assert found == {"flax"}, found
"""
    )
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("name", ["ResNet18", "linen_outputs"])
def test_models_without_flax_say_what_to_install(name):
    outcome = run_python(BLOCKER + f"from grsd_jax.models import {name}")
    assert outcome.returncode != 0
    assert f"grsd_jax.models.{name} needs flax" in outcome.stderr
    assert "pip install 'grsd-jax[models]'" in outcome.stderr


@by_path(SOURCES)
def test_only_public_jax_is_used(path):
    names = r"(?:_src|core|util|interpreters)\b"
    pattern = rf"\bjax\.{names}|\bfrom jax import [^\n]*\b{names}"
    private = re.findall(pattern, path.read_text())
    assert not private


@by_path(LIBRARY)
def test_library_leaves_the_configuration_alone(path):
    assert not re.search(r"\bjax\.config\b|\bconfig\.update\b", path.read_text())


@by_path(LIBRARY)
def test_library_imports_jax_numpy_and_scipy_alone(path):
    allowed = {"jax", "numpy", "scipy", "grsd_jax", *sys.stdlib_module_names}
    if PACKAGE / "models" in path.parents:
        allowed |= {"equinox", "flax", "haiku"}
    if PACKAGE / "results" in path.parents:
        allowed |= {"pandas", "xarray"}
    if PACKAGE / "plotting" in path.parents:
        allowed |= {"matplotlib"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@by_path(LIBRARY)
def test_arrows_point_one_way(path):
    own = part_of(dotted(path))
    seen = {part_of(module) for module in modules_imported(path)} - {own}
    assert seen <= may_import(own) | set(HELPERS)


def test_helpers_import_helpers_alone():
    found = set().union(*(modules_imported(PACKAGE / f"{n}.py") for n in HELPERS))
    assert {part_of(module) for module in found} <= set(HELPERS)


@by_path(LIBRARY)
def test_nothing_but_the_models_needs_a_framework(path):
    if PACKAGE / "models" not in path.parents:
        found = modules_imported(path)
        assert not {name for name in found if name.startswith("grsd_jax.models")}


def test_modules_have_no_import_cycle():
    graph = {
        dotted(path): modules_imported(path) - {dotted(path)}
        for path in SOURCES
        if path.name != "__init__.py"
    }
    while graph:
        free = {name for name, needs in graph.items() if not needs & set(graph)}
        assert free, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


def bodies(path: Path):
    """Yields the name and the lines of every function, without its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            body = node.body[1:] if documented else node.body
            if body:
                yield node.name, node.end_lineno - body[0].lineno + 1


@by_path(SOURCES)
def test_functions_are_short(path):
    long = {name: lines for name, lines in bodies(path) if lines > 60}
    assert not long
