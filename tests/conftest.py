"""Strict JAX for every test: nothing may lean on silent promotion or on 64 bits."""

import os
import signal

# A shell makes what runs in its background deaf to the Ctrl-C that some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of OpenBLAS spin between their short turns, and take a core from the others.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# The suite is bound by compilation of tiny programs: XLA's costly optimizations, its
# newer emitters of fusions and threads within one program only slow it down. On an
# accelerator the programs are to be those that a user gets.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_backend_optimization_level=0",
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
            "--xla_cpu_parallel_codegen_split_count=1",
            "--xla_cpu_multi_thread_eigen=false",
        ]
    )

from pathlib import Path

import jax
import pytest

#: What tests share asserts too, and has to under ``python -O``.
_HELPERS = [
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if not path.stem.startswith(("test_", "conftest"))
]
pytest.register_assert_rewrite(*_HELPERS)

from modes import FILES, MODES  # noqa: E402

jax.config.update("jax_include_full_tracebacks_in_locations", False)  # to lower faster
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; arrays stay on the first
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--mode", choices=sorted(MODES), help="see tests/modes.py")


def pytest_configure(config):
    """Sets the mode, before any test module makes an array."""
    for name, value in MODES[config.getoption("--mode") or "optimized"].items():
        jax.config.update(name, value)


def _listed(name):
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return frozenset(text.splitlines())


#: Tests by their marks. The gate runs what is slow; a scheduled job runs variants of
#: what the gate checks with a sibling. CONTRIBUTING.md says how the lists are made.
_MARKED = {name: _listed(f"{name}.txt") for name in ("slow", "scheduled")}


#: The key of what `_unknown` returns. Raised at once, it would end the workers of
#: pytest-xdist without a word.
UNKNOWN = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)  # before `-m` reads the marks
def pytest_collection_modifyitems(config, items):
    """Marks the tests that are listed, and keeps those of the mode.

    These are all of its files, without those that it contradicts.
    """
    for item in items:
        for mark, listed in _MARKED.items():
            if item.nodeid in listed:
                item.add_marker(getattr(pytest.mark, mark))
    config.stash[UNKNOWN] = _unknown({item.nodeid for item in items})
    mode = config.getoption("--mode")
    if mode is None:
        return
    kept, others = [], []
    for item in items:
        exempt = any(mode in mark.args for mark in item.iter_markers("not_in_mode"))
        runs = item.path.stem in FILES and not exempt
        (kept if runs else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept


def _unknown(collected):
    """Returns the listed tests that do not exist, as after a renaming, of these files.

    Files without any test are passed over: their optional package may be absent.
    """
    files = {node.partition("::")[0] for node in collected}
    return [
        f"tests/{mark}.txt: there is no test {node}"
        for mark, listed in _MARKED.items()
        for node in sorted(listed - collected)
        if node.partition("::")[0] in files
    ]


@pytest.fixture
def unknown_tests(request):
    """What the lists of marked tests name that does not exist, if all was collected."""
    if request.config.args != request.config.getini("testpaths"):
        pytest.skip("only part of the tests was collected")
    return request.config.stash[UNKNOWN]


#: Compiled programs kept from test to test; each holds more than a mebibyte.
_MANY_PROGRAMS = 1000

_compiled = []


def _count_program(event, duration, **details):
    if event.endswith("backend_compile_duration"):
        _compiled.append(duration)


jax.monitoring.register_event_duration_secs_listener(_count_program)


@pytest.fixture(autouse=True)
def _forget_programs():
    """Frees compiled programs between tests, when there are many of them."""
    yield
    if len(_compiled) > _MANY_PROGRAMS:
        _compiled.clear()
        jax.clear_caches()


@pytest.fixture
def x64():
    """Runs one test with 64-bit types, and puts the setting back whatever happens."""
    with jax.enable_x64(True):
        yield
