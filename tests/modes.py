"""Other settings of JAX and Python, under which a part of the tests has to pass too.

``pytest --mode=MODE`` sets one and runs that part: about a quarter of the fast tests,
which touch every public function. Strict promotion, and warnings as errors, are on in
every run.
"""

#: What each mode sets of `jax.config`; `optimized` is run with ``PYTHONOPTIMIZE=1``.
MODES = {
    "debug_nans": {"jax_debug_nans": True},
    "debug_key_reuse": {"jax_debug_key_reuse": True},
    "x64": {"jax_enable_x64": True},
    "matmul_precision": {"jax_default_matmul_precision": "bfloat16"},
    "optimized": {},
}

#: The files whose tests run in every mode.
FILES = (
    "test_balance",
    "test_binning",
    "test_closure",
    "test_dense",
    "test_density",
    "test_derivative",
    "test_eigenpairs",
    "test_errors",
    "test_flow",
    "test_incoherence",
    "test_kernel",
    "test_lanczos",
    "test_layers",
    "test_locality",
    "test_measurement",
    "test_models",
    "test_options",
    "test_parameter_blocks",
    "test_power_law",
    "test_probe",
    "test_propagation",
    "test_ritz",
    "test_solvers",
    "test_stability",
    "test_targets",
    "test_toeplitz",
    "test_velocity",
)
