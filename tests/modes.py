"""Other settings of JAX and Python, under which a part of the tests has to pass too.

``pytest --mode=MODE`` sets one and runs that part. Strict promotion, and warnings as
errors, are on in every run.
"""

#: What each mode sets of `jax.config`; `optimized` is run with ``PYTHONOPTIMIZE=1``.
MODES = {
    "debug_nans": {"jax_debug_nans": True},
    "debug_key_reuse": {"jax_debug_key_reuse": True},
    "x64": {"jax_enable_x64": True},
    "matmul_precision": {"jax_default_matmul_precision": "bfloat16"},
    "optimized": {},
}

#: The files whose tests run in every mode, without what `not_in_mode` exempts.
FILES = (
    "test_binning",
    "test_closure",
    "test_dense",
    "test_density",
    "test_errors",
    "test_lanczos",
    "test_options",
    "test_power_law",
    "test_ritz",
    "test_solvers",
    "test_targets",
    "test_toeplitz",
)
