"""The part of stage 2 that runs in JAX; `speed.py` starts it, a part at a time."""

import functools
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

_IMPORTING = time.perf_counter()

import common  # noqa: E402, I001  (puts the source tree on the path)

import grsd_jax as grsd  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import gpt  # noqa: E402
from comparison import inputs as made  # noqa: E402
from comparison.grid import parse_problem  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - _IMPORTING

#: Columns and rows that are compared with float64.
COLUMNS, MOST_ROWS = 4, 2**18

PRECISIONS = {"highest": "highest", "tf32": "tensorfloat32"}


class Part:
    """What the measurements of this process share."""

    def __init__(self, folder: Path, clock: common.Clock, rehearse: bool) -> None:
        self.results = common.Results(folder, clock)
        self.folder, self.rehearse = folder, rehearse
        self.network = "mlp" if rehearse else "resnet"
        self.examples = 4 if rehearse else 128
        self.widths = (2, 3, 4) if rehearse else (8, 32, 160)

    @functools.cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        """The weights, images and columns that torch is given too."""
        with np.load(self.folder / "inputs.npz") as file:
            return dict(file)

    def save(self, name: str, columns: Any) -> None:
        """Keeps the first columns of a result, to be compared with float64."""
        columns = np.asarray(columns[:, :COLUMNS])
        stride = -(-len(columns) // MOST_ROWS)
        np.savez(self.folder / f"{name}.npz", columns=columns[::stride])

    def measure(
        self,
        name: str,
        call: Callable[[], Any],
        *,
        columns: Callable[[Any], Any] | None = None,
        needs: float = 8.0,
        seconds: float = 2.0,
        **details: Any,
    ) -> None:
        """Times a call, and keeps its columns and the peak of memory."""

        def run() -> dict[str, Any]:
            before = peak_bytes()
            COMPILING.clear()
            result, times = common.timed(
                lambda: jax.block_until_ready(call()), seconds=seconds
            )
            after = peak_bytes()
            if columns is not None:
                self.save(name, columns(result))
            # The peak is the process's: a lower one than before it cannot be told.
            told = after if after != before else None
            return {
                **times,
                "peak_bytes": told,
                "peak_bytes_at_most": after,
                "import_seconds": IMPORT_SECONDS,
                "compiling": compiling(),
                **details,
            }

        self.results.measure(name, run, needs=needs)


#: What JAX reports of tracing, lowering and compiling: event, function, seconds.
COMPILING: list[tuple[str, str, float]] = []

_EVENTS = {
    "jaxpr_trace_duration": "trace",
    "jaxpr_to_mlir_module_duration": "lower",
    "backend_compile_duration": "compile",
}


def _listen(event: str, seconds: float, **about: Any) -> None:
    name = _EVENTS.get(event.rpartition("/")[2])
    if name is not None:
        COMPILING.append((name, str(about.get("fun_name", "?")), seconds))


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiling() -> dict[str, Any]:
    """Returns the programs, the seconds of each part, and the longest compilations."""
    totals = dict.fromkeys(_EVENTS.values(), 0.0)
    longest: dict[str, float] = {}
    for name, function, seconds in COMPILING:
        totals[name] += seconds
        if name == "compile":
            longest[function] = longest.get(function, 0.0) + seconds
    ranked = sorted(longest.items(), key=lambda item: -item[1])[:8]
    programs = sum(name == "compile" for name, *_ in COMPILING)
    return {"programs": programs, "seconds": totals, "longest": dict(ranked)}


def peak_bytes() -> int | None:
    """Returns the peak memory of the device so far, None if it does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def peaks(part: Part) -> None:
    """Measures the rates of large products and of a copy."""
    side = 256 if part.rehearse else 8192
    noise = jax.random.normal(jax.random.key(0), (2, side, side), jnp.float32)
    cases = {
        "matmul_highest": (jnp.float32, "highest"),
        "matmul_tf32": (jnp.float32, "tensorfloat32"),
        "matmul_bf16": (jnp.bfloat16, "default"),
    }
    for name, (dtype, precision) in cases.items():
        left, right = (noise[index].astype(dtype) for index in (0, 1))
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        part.measure(
            name,
            lambda f=product, a=left, b=right: [f(a, b) for _ in range(4)],
            operations=4 * 2 * side**3,
            seconds=1.0,
        )
    count = 2**16 if part.rehearse else 2**28
    array, copy = jnp.zeros(count), jax.jit(lambda x: x + 1)
    part.measure(
        "copy",
        lambda: [copy(array) for _ in range(4)],
        bytes=4 * 2 * 4 * count,
        seconds=1.0,
    )


def make_inputs(part: Part) -> None:
    """Makes weights, images and columns of a ResNet-18, as the comparison does."""
    path = part.folder / "inputs.npz"
    if path.exists():
        return
    started = time.perf_counter()
    name = common.problem_name(4 * part.examples, rehearse=part.rehearse)
    spec = parse_problem(name)
    # Of twice as many images, half are kept, far from the corners of the relus.
    with (
        jax.default_matmul_precision("highest"),
        mock.patch.object(made, "_CANDIDATES", 2),
        mock.patch.object(made, "_FORWARD", 128),
    ):
        arrays = made.make_inputs(spec)
    partial = path.with_name("inputs.part.npz")
    np.savez(partial, **arrays)
    partial.replace(path)
    print(f"inputs: {time.perf_counter() - started:.1f} s", flush=True)


class ResNet:
    """The ResNet-18 of the comparison, on some of its images; its MLP to rehearse."""

    def __init__(self, part: Part, copies: int, examples: int, dtype: Any) -> None:
        arrays = {
            name: array.astype(dtype) if array.dtype == np.float32 else array
            for name, array in part.inputs.items()
        }
        name = common.problem_name(examples, rehearse=part.rehearse)
        spec = parse_problem(name)
        loaded = made.load(spec, arrays)
        count = copies * examples
        batches = jax.tree.map(
            lambda leaf: leaf[0, :count].reshape(copies, examples, *leaf.shape[2:]),
            loaded.batches,
        )
        loaded = loaded._replace(batches=batches)
        self.problem = loaded.problem().replace(reduction="stack")
        self.plain = loaded.problem(plain=True).replace(reduction="stack")
        self.params, self.direction = loaded.params, loaded.direction
        self.block = loaded.block[: 10 * count]
        self.dimension = 10 * count
        self.name = f"{part.network}_k{copies}n{examples}"


@contextmanager
def at(precision: str) -> Iterator[None]:
    """The user's precision of products, here that of the network."""
    with jax.default_matmul_precision(PRECISIONS[precision]):
        yield


def resnet_dense(
    part: Part, model: ResNet, precision: str, chunk: int | None = None
) -> None:
    """Measures the dense kernel."""
    told = "" if chunk is None else f"_chunk{chunk}"
    with at(precision):
        part.measure(
            f"{model.name}_dense{told}_{precision}",
            lambda: grsd.kernel_dense(model.problem, model.params, example_chunk=chunk),
            columns=lambda result: result,
            needs=15,
        )


def resnet_prepared(part: Part, model: ResNet, precision: str, width: int) -> None:
    """Measures a block product with the linearized kernel."""
    name = f"{model.name}_block{width}_prepared_{precision}"
    if part.results.path(name).exists():
        return
    if part.results.clock.left() < 15:
        part.results.left_out.append(name)
        return

    def make() -> Any:
        return jax.block_until_ready(grsd.linearize_kernel(model.problem, model.params))

    with at(precision):
        try:
            started = time.perf_counter()
            kernel = make()
            first = time.perf_counter() - started
            kernel = None  # two at once would double the peak of memory
            started = time.perf_counter()
            kernel = make()
            again = time.perf_counter() - started
        except Exception as error:
            failure = error

            def fail() -> Any:
                raise failure

            part.measure(name, fail)
            return
        part.measure(
            name,
            lambda: kernel.matmat(model.block[:, :width]),
            columns=lambda result: result,
            first_prepare_seconds=first,
            prepare_seconds=again,
        )


def resnet_unprepared(
    part: Part, model: ResNet, precision: str, width: int, chunk: int | None = None
) -> None:
    """Measures a block product that passes through the network each time."""
    told = "" if chunk is None else f"_chunk{chunk}"
    with at(precision):
        part.measure(
            f"{model.name}_block{width}_unprepared{told}_{precision}",
            lambda: grsd.kernel_matmat(
                model.problem, model.params, model.block[:, :width], column_chunk=chunk
            ),
            columns=lambda result: result,
            needs=15,
        )


def resnet_derivative(part: Part, model: ResNet, precision: str, width: int) -> None:
    """Measures the derivative along the gradient flow, projected."""
    with at(precision):
        part.measure(
            f"{model.name}_derivative{width}_{precision}",
            lambda: grsd.kernel_derivative(
                model.problem, model.params, model.direction, model.block[:, :width]
            ),
            columns=lambda result: result[:COLUMNS],
            needs=15,
        )


def resnet_gradient(part: Part, model: ResNet, precision: str) -> None:
    """Measures one gradient of all batches, the unit."""
    with at(precision):
        part.measure(
            f"{model.name}_gradient_{precision}",
            lambda: grsd.gradient_flow_direction(model.problem, model.params),
        )


def resnet_whole(part: Part, model: ResNet, precision: str) -> None:
    """Measures the whole measurement, by the solver that it chooses."""
    told: dict[str, Any] = {}

    def call() -> Any:
        result = grsd.measure_coupling(
            model.problem, model.params, model.direction, key=jax.random.key(0)
        )
        told["solver"], told["jacobian"] = result.solver, result.jacobian
        told["resolved"] = int(jnp.sum(result.resolved))
        return result

    with at(precision):
        part.measure(
            f"{model.name}_measurement_{precision}",
            call,
            needs=25,
            told=told,
        )


def gpt_measurements(part: Part, name: str, precision: str) -> None:
    """Measures products with the kernel of a GPT, a gradient and a GGN product."""
    size = gpt.TINY if part.rehearse else gpt.SIZES[name]
    wanted = ("gradient", "block8", "ggn8", "block8_prepared")
    if all(part.results.path(f"{name}_{w}_{precision}").exists() for w in wanted):
        return
    if part.results.clock.left() < 15:
        part.results.left_out += [f"{name}_{what}_{precision}" for what in wanted]
        return
    params, batches = gpt.make_params(size), gpt.make_batches(size)
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    problem = grsd.Problem(gpt.logits, batches, reduction="stack")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    details = {"parameters": count, "dimension": size.dimension, "width": 8}
    block = gpt_block(size, jnp.float32)
    with at(precision):
        part.measure(
            f"{name}_gradient_{precision}",
            lambda: gpt.gradient(params, batch),
            **details | {"width": 1},
        )
        part.measure(
            f"{name}_block8_{precision}",
            lambda: grsd.kernel_matmat(problem, params, block),
            columns=lambda result: result,
            needs=20,
            **details,
        )
        vectors = gpt.random_vectors(params, 8)
        part.measure(
            f"{name}_ggn8_{precision}",
            functools.partial(gpt.gauss_newton, params, batch, vectors),
            needs=15,
            **details,
        )
        vectors = None

        def prepared() -> Any:
            if not held:
                held.append(grsd.linearize_kernel(problem, params))
            return held[0].matmat(block)

        held: list[Any] = []
        part.measure(
            f"{name}_block8_prepared_{precision}", prepared, needs=15, **details
        )


def gpt_block(size: gpt.Size, dtype: Any) -> jax.Array:
    """Returns columns ``[n, 8]``, the same numbers in either dtype."""
    block = jax.random.normal(jax.random.key(4), (size.dimension, 8), jnp.float32)
    return block.astype(dtype)


def gpt_reference(part: Part, name: str) -> None:
    """Makes the first columns of a GPT's product in float64, on the same device."""
    size = gpt.TINY if part.rehearse else gpt.SIZES[name]

    def call() -> jax.Array:
        params = jax.tree.map(lambda p: p.astype(jnp.float64), gpt.make_params(size))
        problem = grsd.Problem(gpt.logits, gpt.make_batches(size), reduction="stack")
        block = gpt_block(size, jnp.float64)[:, :COLUMNS]
        return grsd.kernel_matmat(problem, params, block, column_chunk=1)

    _reference(part, f"{name}_reference", call)


def resnet_reference(part: Part) -> None:
    """Makes columns of M, products, and a derivative, in float64 on the same device."""

    def products() -> jax.Array:
        model = ResNet(part, 4, part.examples, np.float64)
        unit = jnp.eye(model.dimension, COLUMNS, dtype=jnp.float64)
        columns = jnp.concatenate([unit, model.block[:, :COLUMNS]], axis=1)
        return grsd.kernel_matmat(model.plain, model.params, columns, column_chunk=1)

    def derivative() -> jax.Array:
        model = ResNet(part, 4, part.examples, np.float64)
        columns = model.block[:, :COLUMNS]
        return grsd.kernel_derivative(
            model.plain, model.params, model.direction, columns, column_chunk=1
        )

    _reference(part, "reference", products)
    _reference(part, "reference_derivative", derivative)


def _reference(part: Part, name: str, call: Callable[[], jax.Array]) -> None:
    def run() -> dict[str, Any]:
        with jax.enable_x64(True):
            started = time.perf_counter()
            columns = np.asarray(call())
            seconds = time.perf_counter() - started
        stride = -(-len(columns) // MOST_ROWS)
        np.savez(part.folder / f"{name}.npz", columns=columns[::stride])
        return {"seconds": common.summary([seconds])}

    part.results.measure(name, run, needs=20)


def _count(part: Part, name: str, call: Callable[..., Any], *arguments: Any) -> None:
    """Records the operations and bytes of a lowered program, by XLA's account."""

    def counted() -> dict[str, Any]:
        found = jax.jit(call).lower(*arguments).cost_analysis() or {}
        return {
            "operations": found.get("flops"),
            "bytes_before_fusion": found.get("bytes accessed"),
        }

    part.results.measure(f"operations_{name}", counted, needs=5)


def operations(part: Part) -> None:
    """Counts the operations of every program.

    The dense kernel is counted with all examples in one chunk, which leaves out what
    the symmetry of its tiles saves.
    """
    small = ResNet(part, 1, part.examples // 4, np.float32)
    whole = ResNet(part, 4, part.examples, np.float32)
    _product_operations(part, whole)
    for model in (small, whole):
        _count(
            part,
            f"{model.name}_dense",
            lambda p, m=model: grsd.kernel_dense(
                m.problem, p, example_chunk=m.dimension, max_bytes=2**60
            ),
            model.params,
        )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(whole.params))
    part.results.measure("operations_parameters", lambda: {"operations": parameters})
    _gpt_operations(part)


def _product_operations(part: Part, model: ResNet) -> None:
    """Counts the forward pass, block products, and the derivative of a block."""
    problem, params = model.problem, model.params
    one = jax.tree.map(lambda leaf: leaf[0], problem.batches)
    _count(part, f"{model.name}_forward", lambda p: problem.error(p, one), params)
    prepared = jax.eval_shape(lambda p: grsd.linearize_kernel(problem, p), params)
    for width in part.widths[::-1]:
        name, block = f"{model.name}_block{width}", model.block[:, :width]
        _count(part, f"{name}_prepared", lambda k, v: k.matmat(v), prepared, block)
        _count(
            part,
            f"{name}_unprepared",
            lambda p, v: grsd.kernel_matmat(problem, p, v),
            params,
            block,
        )
    width = part.widths[-1]
    _count(
        part,
        f"{model.name}_derivative{width}",
        lambda p, d, v: grsd.kernel_derivative(problem, p, d, v),
        params,
        model.direction,
        model.block[:, :width],
    )


def _gpt_operations(part: Part) -> None:
    """Counts the gradient and a block product of each language model."""
    for name, size in gpt.SIZES.items():
        size = gpt.TINY if part.rehearse else size
        params = jax.eval_shape(lambda s=size: gpt.make_params(s))
        batches = gpt.make_batches(size)
        batch = jax.tree.map(lambda leaf: leaf[0], batches)
        problem = grsd.Problem(gpt.logits, batches, reduction="stack")
        block = jax.ShapeDtypeStruct((size.dimension, 8), jnp.float32)
        _count(part, f"{name}_gradient", gpt.gradient, params, batch)
        _count(
            part,
            f"{name}_block8",
            lambda p, v, q=problem: grsd.kernel_matmat(q, p, v),
            params,
            block,
        )


def first(part: Part) -> None:
    """The roofs, and the dense kernel that torch is compared with."""
    make_inputs(part)
    small = ResNet(part, 1, part.examples // 4, np.float32)
    run_all([(peaks,), (resnet_dense, small, "highest")], part)


def second(part: Part) -> None:
    """Everything else, by importance."""
    small = ResNet(part, 1, part.examples // 4, np.float32)
    middle = ResNet(part, 1, part.examples, np.float32)
    whole = ResNet(part, 4, part.examples, np.float32)
    narrow, medium, widest = part.widths
    run_all(
        [
            (resnet_dense, whole, "highest"),
            (resnet_whole, small, "highest"),
            (resnet_derivative, whole, "highest", widest),
            (gpt_measurements, "gpt124", "highest"),
            (resnet_reference,),
            (resnet_prepared, whole, "highest", widest),
            (resnet_dense, small, "tf32"),
            (gpt_measurements, "gpt10", "highest"),
            (gpt_reference, "gpt10"),
            (resnet_dense, whole, "tf32"),
            (resnet_prepared, whole, "tf32", widest),
            (gpt_measurements, "gpt10", "tf32"),
            (resnet_whole, whole, "highest"),
            (resnet_unprepared, whole, "highest", narrow),
            (resnet_prepared, whole, "highest", narrow),
            (resnet_derivative, whole, "tf32", widest),
            (resnet_unprepared, whole, "tf32", narrow),
            (resnet_unprepared, whole, "highest", widest, narrow),
            (gpt_measurements, "gpt124", "tf32"),
            (resnet_prepared, whole, "highest", medium),
            (resnet_gradient, whole, "highest"),
            (resnet_dense, middle, "highest"),
            *((resnet_dense, middle, "highest", c) for c in (8, 16, 64, 128)),
            (resnet_unprepared, whole, "highest", medium),
            (resnet_unprepared, whole, "highest", widest),
            (resnet_prepared, whole, "tf32", medium),
            (resnet_prepared, whole, "tf32", narrow),
            (resnet_gradient, whole, "tf32"),
            (gpt_reference, "gpt124"),
        ],
        part,
    )


def run_all(steps: list[tuple[Any, ...]], part: Part) -> None:
    """Takes one step after the other; one that cannot be prepared ends none after."""
    for step, *arguments in steps:
        try:
            step(part, *arguments)
        except Exception:
            traceback.print_exc()


PARTS = {"first": first, "second": second, "operations": operations}
