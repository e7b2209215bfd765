import jax

from grsd_jax.experiments.benchmark import analyse
from grsd_jax.experiments.benchmark import run as benchmarking
from grsd_jax.experiments.common.config import Config


def test_every_case_runs_and_says_what_it_measured():
    config = Config(
        model="mlp",
        width=2,
        depth=1,
        batch_size=2,
        num_batches=1,
        block_size=2,
        num_pairs=12,
    )
    with jax.numpy_dtype_promotion("standard"):
        rows = [benchmarking.run_case(name, config) for name in benchmarking.CASES]
    for row in rows:
        assert row["first_seconds"] > 0
        assert row["seconds"] > 0
        assert row["peak_mib"] > 1
    table, legend = analyse.format_benchmark(rows).split("\n\n")
    assert table.count("\n") == len(rows) + 1
    assert legend == "\n".join(analyse.LEGEND)
    assert "in_bare_products" in table
    assert rows[-1]["solver"] == "dense"
