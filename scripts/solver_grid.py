"""Times the dense solver and Lanczos on a grid, beside what solver="auto" chooses.

Each point goes to WORKDIR/points.jsonl as it is done, and a killed run goes on where it
was. At the end solver_grid.json holds all of them, and solver_grid.png and .pdf show
the predicted against the measured ratio. Nothing else should run on the machine.

Example:
  python scripts/solver_grid.py --workdir=runs/solver_grid
"""

from pathlib import Path

from grsd_jax.experiments.benchmark import solver_grid
from grsd_jax.experiments.common import flags, records
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.common.progress import progress_bar


def main(config: Config) -> None:
    with records.workdir_lock(Path(config.workdir)) as folder:
        log = folder / "points.jsonl"
        done = records.read_jsonl(log)
        points = solver_grid.grid()
        known = {tuple(row[name] for name in solver_grid.Point._fields) for row in done}
        left = [point for point in points if tuple(point) not in known]
        for point in progress_bar(left, unit="point"):
            records.append_jsonl(log, solver_grid.measure_point(point))
        rows = records.read_jsonl(log)
        environment = records.environment(precision=config.precision)
        records.write_json(
            folder / "solver_grid.json", {"environment": environment, "rows": rows}
        )
        solver_grid.draw_grid(rows, folder)
    print(solver_grid.format_grid(rows))
    worst = max(solver_grid.loss_of_choice(row) for row in rows)
    print(f"worst time of the choice over the faster solver: {worst:.2f}")


if __name__ == "__main__":
    flags.define_flags(only=["workdir", "precision"], workdir="runs/solver_grid")
    flags.run_main(main)
