"""Records what moved between the shells of a small GPT that learns bytes of English.

Trains on the text of Python's own help pages, `pydoc_data.topics`, by AdamW, with the
probe on: next-token outputs ``[N, T, V]``, all ``n = N T V`` of them unreduced. A
record is the exact balance between two steps of the training, by Krylov spaces of the
errors, with the error of every amount and the floor that rounding sets. Prints each
record as a table, and writes all of them with their cost.

Example:
  python benchmarks/language_balance.py --out docs/results/language_balance
  python benchmarks/language_balance.py --rehearse
"""

import argparse
import dataclasses
import pydoc_data.topics
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grsd_jax as grsd
import jax
import jax.numpy as jnp
import numpy as np
import optax
from grsd_jax.dynamics import KrylovSteps, ProbeRecord
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.runs import environment, progress_bar
from grsd_jax.experiments.common.tables import aligned
from grsd_jax.experiments.track.log import record_line
from grsd_jax.experiments.track.quantities import lost_share, moved_share

from comparison.machine import describe_machine
from gpu import gpt

#: Every byte is a token.
_VOCABULARY = 256

#: Sizes that show in seconds that everything runs, and mean nothing.
_REHEARSAL = {
    "layers": 1,
    "width": 16,
    "positions": 4,
    "num_examples": 1,
    "batch_size": 2,
    "steps": 4,
    "every": 2,
    "over": [1],
    "num_steps": 8,
    "num_probes": 2,
    "num_shells": 4,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for."""
    options = parsed(arguments)
    report = measure(options)
    print(costs(report))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        records.write_json(options.out / "language_balance.json", report)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line, those of a rehearsal if it is one."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", type=int, default=4, help="Blocks of the GPT.")
    add("--width", type=int, default=64, help="Features.")
    add("--positions", type=int, default=64, help="T, bytes of a sequence.")
    add("--num_examples", type=int, default=4, help="N, sequences of the probe.")
    add("--batch_size", type=int, default=16, help="Sequences of a training step.")
    add("--learning_rate", type=float, default=1e-3, help="That of AdamW.")
    add("--steps", type=int, default=20, help="Training steps.")
    add("--every", type=int, default=20, help="Steps between two records.")
    add("--over", type=int, nargs="*", default=[1, 4], help="Records over fewer steps.")
    add("--num_steps", type=int, default=36, help="Steps m of Lanczos.")
    add("--num_probes", type=int, default=4, help="Vectors behind the null; 0: none.")
    add("--num_shells", type=int, default=12, help="Soft shells of width 1/2.")
    add("--seed", type=int, default=0, help="Of all that is random.")
    add("--rehearse", action="store_true", help="Run tiny sizes, for a test.")
    add("--out", type=Path, help="The folder of language_balance.json.")
    options = parser.parse_args(arguments)
    if options.rehearse:
        vars(options).update(_REHEARSAL)
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the records of a training, with its settings and cost."""
    size = gpt.Size(
        options.layers,
        options.width,
        _VOCABULARY,
        options.positions,
        options.num_examples,
    )
    text = np.frombuffer(text_of_topics(), np.uint8)
    problem = grsd.Problem(gpt.logits, probe_sequences(text, size))
    probe = grsd.make_probe(
        problem,
        every=options.every,
        over=options.over,
        solver=KrylovSteps(options.num_steps, num_probes=options.num_probes),
        shells=options.num_shells,
    )
    params = gpt.make_params(size)
    training = Training(problem, params, text, options)
    state, lines, losses = probe.init(jax.random.key(options.seed), params), [], []
    first_seconds = float("nan")  # of the look that compiles, and gives no record
    for step in progress_bar(range(options.steps + 1), desc="steps"):
        if step:
            losses.append(training.step())
        started, used = time.perf_counter(), time.process_time()
        state, record = probe.update(
            state, training.params, step, step_seconds=training.step_seconds
        )
        if not step:
            first_seconds = time.perf_counter() - started
        if record is not None:
            lines.append(line_of(record))
            lines[-1]["cpu_seconds"] = time.process_time() - used
            print(table(lines[-1]), end="\n\n", flush=True)
    return {
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "dimension": size.dimension,
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "text_bytes": len(text),
        "losses": losses,
        "train_step_seconds": training.step_seconds,
        "first_look_seconds": first_seconds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "records": lines,
        "machine": describe_machine(),
        "environment": environment(precision="default"),
    }


def text_of_topics() -> bytes:
    """Returns the help pages, one after the other."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def probe_sequences(text: np.ndarray, size: gpt.Size) -> dict[str, jax.Array]:
    """Returns N sequences at equal distances of the text, with a leading axis K = 1."""
    starts = np.arange(size.examples) * (len(text) // size.examples)
    return batches_from(text, starts, size.positions)


def batches_from(
    text: np.ndarray, starts: np.ndarray, positions: int
) -> dict[str, jax.Array]:
    """Returns the bytes from every start on, and those that follow each of them."""
    places = starts[None, :, None] + np.arange(positions + 1)[None, None, :]
    tokens = jnp.asarray(text[places], jnp.int32)
    return {"tokens": tokens[..., :-1], "label": tokens[..., 1:]}


class Training:
    """A training by AdamW on random pieces of the text.

    Attributes:
        params: The parameters now.
        step_seconds: Median of the steps but the first; NaN before there are any.
    """

    def __init__(
        self,
        problem: grsd.Problem,
        params: Any,
        text: np.ndarray,
        options: argparse.Namespace,
    ):
        self.params, self.step_seconds = params, float("nan")
        self._text, self._options, self._seconds = text, options, []
        self._random = np.random.default_rng(options.seed)
        optimizer = optax.adamw(options.learning_rate)
        self._state = optimizer.init(params)

        @jax.jit
        def update(params: Any, state: Any, batches: Any) -> Any:
            loss, gradient = jax.value_and_grad(problem.replace(batches=batches).loss)(
                params
            )
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, loss

        self._update = update

    def step(self) -> float:
        """Takes a step, and returns the loss before it, in nats a byte."""
        positions = self._options.positions
        last = len(self._text) - positions
        starts = self._random.integers(0, last, self._options.batch_size)
        batches = batches_from(self._text, starts, positions)
        started = time.perf_counter()
        self.params, self._state, loss = jax.block_until_ready(
            self._update(self.params, self._state, batches)
        )
        self._seconds.append(time.perf_counter() - started)
        if self._seconds[1:]:
            self.step_seconds = statistics.median(self._seconds[1:])
        return float(loss) / positions


def line_of(record: ProbeRecord) -> dict[str, Any]:
    """Returns a record as JSON has it, with the shifts that need no time.

    ``shift`` is ``F_k / eps_k``, the velocity times the time, and ``shift_mask`` where
    it can be used; ``counting_shift`` is the same of the number of eigenvalues.
    """
    line = record_line(record)
    by_one = dataclasses.replace(record.balance, elapsed=np.float32(1))
    line["shift"], line["shift_error"] = by_one.velocity, by_one.velocity_error
    line["shift_mask"] = by_one.velocity_mask
    line["counting_shift"] = by_one.counting_velocity
    if (counted := record.balance.counting) is not None:
        line["counting_error"] = counted.error
    return records.plain(line)


def table(line: Mapping[str, Any]) -> str:
    """Returns a record as text, the largest edges first, amounts over ``|e|^2``."""
    energy = sum(line["energies"][0])
    resolved = resolved_edges(line)
    span = np.log10(np.max(resolved) / np.min(resolved)) if len(resolved) else 0
    told = [
        f"Steps {line['start_step']} to {line['step']}: |e|^2 {energy:.5g} to "
        f"{sum(line['energies'][1]):.5g}; lost {lost_share(line):.2%}, moved "
        f"{moved_share(line):.2%} of it.",
        f"{len(resolved)} of {len(line['edges'])} edges are resolved, over {span:.1f} "
        f"decades. {_time_text(line['measured_time'])}",
        f"{line['seconds']:.1f} s ({line['cpu_seconds']:.1f} s of the cores' time): "
        f"{line['num_columns']} products, {line['cost']:.0f} gradients, "
        f"{_text(line['cost_in_steps'], '.0f')} training steps.",
    ]
    rows = [["edge", "F", "error", "floor", "F/eps", "error", "counted", "error", "v"]]
    for k in reversed(range(len(line["edges"]))):
        used = line["shift_mask"][k]
        rows.append(
            [
                _text(line["edges"][k], ".2e"),
                *(
                    _text(_entry(line, name, k, over=energy), ".1e")
                    for name in ("flux", "flux_error", "floor")
                ),
                *(
                    _text(_entry(line, name, k) if used else None, ".3f")
                    for name in ("shift", "shift_error")
                ),
                *(
                    _text(_entry(line, name, k), ".3f")
                    for name in ("counting_shift", "counting_error")
                ),
                _text(_entry(line, "velocity", k) if used else None, ".3g"),
            ]
        )
    return "\n".join([*told, aligned(rows)])


def resolved_edges(line: Mapping[str, Any]) -> np.ndarray:
    """Returns the edges that have converged and whose flux exceeds its error."""
    flux, error, converged = (
        np.array(line[name], np.float64) for name in ("flux", "flux_error", "converged")
    )
    return np.array(line["edges"])[(converged > 0) & (np.abs(flux) > error)]


def costs(report: Mapping[str, Any]) -> str:
    """Returns the cost of a record, in words."""
    lines = report["records"]
    seconds = [line["seconds"] for line in lines]
    return (
        f"n = {report['dimension']}, {report['num_parameters']} parameters. A record: "
        f"{statistics.median(seconds):.1f} s in the median, {max(seconds):.1f} at most "
        f"({report['first_look_seconds']:.1f} the first look, which compiles); a "
        f"training step: {report['train_step_seconds']:.3f} s. Peak memory "
        f"{report['peak_memory_gib']:.1f} GiB. Loss {report['losses'][0]:.2f} to "
        f"{report['losses'][-1]:.2f} nats a byte."
    )


def _time_text(measured: Mapping[str, Any]) -> str:
    start, end = measured["start"], measured["end"]
    ends = f"{_text(start, '.2g')} by the gradient before, {_text(end, '.2g')} after"
    if measured["meaningful"]:
        return f"Time {ends}."
    return f"The time has no meaning ({ends}), so there are no velocities."


def _entry(
    line: Mapping[str, Any], name: str, edge: int, over: float = 1.0
) -> float | None:
    """Returns a number of an edge, None where there is none."""
    values = line.get(name)
    value = None if values is None else values[edge]
    return None if value is None else value / over


def _text(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


if __name__ == "__main__":
    main()
