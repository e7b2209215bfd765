"""Other settings of JAX and Python, under which a part of the tests has to pass too.

``pytest --mode=MODE`` sets one and runs that part. Strict promotion, and warnings as
errors, are on in every run.
"""

import contextlib

import jax

#: What each mode sets of `jax.config`; `optimized` is run with ``PYTHONOPTIMIZE=1``.
MODES = {
    "debug_nans": {"jax_debug_nans": True},
    "debug_key_reuse": {"jax_debug_key_reuse": True},
    "x64": {"jax_enable_x64": True},
    "matmul_precision": {"jax_default_matmul_precision": "bfloat16"},
    "optimized": {},
}

#: The files whose tests run in every mode, without what `not_in_mode` exempts. They are
#: a quarter of the fast tests, and every public name is in one of them (`test_modes`).
FILES = (
    "test_architectures",
    "test_arguments",
    "test_binning",
    "test_closure",
    "test_condition_report",
    "test_dense",
    "test_density",
    "test_derivative",
    "test_errors",
    "test_healthy_values",
    "test_instantaneous",
    "test_kernel",
    "test_lanczos",
    "test_measurement",
    "test_modes",
    "test_options",
    "test_parameter_blocks",
    "test_plotting",
    "test_power_law",
    "test_probe",
    "test_products",
    "test_result_files",
    "test_result_text",
    "test_ritz",
    "test_soft_shells",
    "test_solvers",
    "test_stochastic",
    "test_targets",
    "test_toeplitz",
    "test_units",
    "test_velocity_law",
    "test_writers",
)


@contextlib.contextmanager
def no_nan():
    """Sets `jax_debug_nans`, where the mode does not.

    In a thread that has left `jax.debug_nans`, whatever is set for all threads, JAX
    looks for NaN only at the first call of a compiled function.
    """
    on = jax.config.jax_debug_nans
    with contextlib.nullcontext() if on else jax.debug_nans(True):
        yield
