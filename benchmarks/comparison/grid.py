"""What is compared: the problems, the tasks, the peers, and what is left out and why.

Only the standard library is imported, so that every environment can read it.
"""

import re
from typing import NamedTuple

#: Classes C of every problem.
NUM_CLASSES = 10

#: Leading eigenpairs, and their largest residual ``|M v - lambda v| / lambda_max``.
NUM_PAIRS = 20
PAIR_TOLERANCE = 1e-4

#: Columns of the widest block in the inputs.
MAX_COLUMNS = 160

TASKS = (
    "dense",
    "block_8",
    "block_32",
    "derivative_8",
    "derivative_32",
    "derivative_160",
    "eigenpairs",
    "measurement",
)

#: What each default problem is there for.
PLAN = {
    "mlp_w256_n32": ("dense", "block_8", "block_32", "eigenpairs", "measurement"),
    "resnet18_w16_n32": TASKS,
    "resnet18_w64_n16": ("dense", "block_8"),
    "resnet18_w64_n32": ("block_8", "block_32", "eigenpairs"),
}


class ProblemSpec(NamedTuple):
    """A network and a batch, told by their name: ``resnet18_w16_n32``.

    Attributes:
        name: ``MODEL_wWIDTH_nEXAMPLES``.
        model: ``resnet18`` or ``mlp``.
        width: Channels of the first stage, or units of a hidden layer.
        num_examples: N.
    """

    name: str
    model: str
    width: int
    num_examples: int

    @property
    def size(self) -> int:
        """The dimension ``n = N C`` of the error space."""
        return self.num_examples * NUM_CLASSES


class Peer(NamedTuple):
    """A way to do the work.

    Attributes:
        title: What tables call it.
        module: Its module in `peers`.
        environment: The virtual environment it runs in.
        variants: The variants of each task that it can do; the fastest counts.
    """

    title: str
    module: str
    environment: str
    variants: dict[str, tuple[str, ...]]


_DERIVATIVES = {f"derivative_{width}": ("exact",) for width in (8, 32, 160)}
_OURS = {
    "dense": ("exact",),
    "block_8": ("prepared",),
    "block_32": ("prepared",),
    **_DERIVATIVES,
}
#: Widths of the Lanczos block: of fewer columns or of cheaper ones.
_WIDTHS = ("b = 1", "b = 2", "b = 4", "b = 8")
_TORCH_BLOCK = ("recomputed", "linearized")

PEERS = {
    "grsd_jax": Peer(
        "grsd_jax",
        "grsd",
        "grsd_jax",
        {**_OURS, "eigenpairs": _WIDTHS, "measurement": ("auto",)},
    ),
    "grsd_jax_plain": Peer("grsd_jax, plain path", "grsd", "grsd_jax", _OURS),
    "torch_func": Peer(
        "torch.func",
        "torch_func",
        "torch",
        {
            "dense": ("whole batch", "chunks of 8"),
            "block_8": _TORCH_BLOCK,
            "block_32": (*_TORCH_BLOCK, "recomputed, chunks of 8"),
            "measurement": ("composition",),
        },
    ),
    "curvlinops": Peer(
        "curvlinops",
        "curvlinops",
        "curvlinops",
        {"dense": ("rows",), "block_8": ("product",), "block_32": ("product",)},
    ),
    "neural_tangents": Peer(
        "neural-tangents",
        "neural_tangents",
        "neural_tangents",
        {
            "dense": (
                "structured derivatives",
                "Jacobian contraction",
                "NTK-vector products",
                "Jacobian contraction, no vmap_axes",
            ),
            "block_8": ("NTK-vector products",),
            "block_32": ("NTK-vector products",),
        },
    ),
    "scipy_eigsh": Peer(
        "SciPy eigsh", "solvers", "grsd_jax", {"eigenpairs": ("eigsh",)}
    ),
    "scipy_lobpcg": Peer(
        "SciPy lobpcg", "solvers", "grsd_jax", {"eigenpairs": ("lobpcg",)}
    ),
    "matfree": Peer(
        "matfree Lanczos", "solvers", "grsd_jax", {"eigenpairs": ("matfree",)}
    ),
    "jax_lobpcg": Peer(
        "JAX lobpcg_standard", "solvers", "grsd_jax", {"eigenpairs": ("jax_lobpcg",)}
    ),
}

_SOLVERS = ("scipy_eigsh", "scipy_lobpcg", "matfree", "jax_lobpcg")
_CANNOT = {
    "derivative": "no peer computes the derivative of the kernel",
    "measurement": "no peer computes dM/dt, nor shells of a spectrum",
    "eigenpairs": "has no eigensolver of its own; its products could drive SciPy's",
}
_WIDE_NETWORK = 64


def parse_problem(name: str) -> ProblemSpec:
    """Reads a problem's name.

    Args:
        name: ``resnet18_wWIDTH_nEXAMPLES`` or ``mlp_wWIDTH_nEXAMPLES``.

    Returns:
        The problem.

    Raises:
        ValueError: If the name has another form.
    """
    match = re.fullmatch(r"(resnet18|mlp)_w([1-9]\d*)_n([1-9]\d*)", name)
    if match is None:
        raise ValueError(
            "problem: expected resnet18_wWIDTH_nEXAMPLES or mlp_wWIDTH_nEXAMPLES, "
            f"got {name!r}."
        )
    return ProblemSpec(name, match[1], int(match[2]), int(match[3]))


def is_wide(spec: ProblemSpec) -> bool:
    """Whether a problem is so large that not everything is measured on it."""
    return spec.model == "resnet18" and spec.width >= _WIDE_NETWORK


def entrants(task: str) -> tuple[str, ...]:
    """Returns the peers that a task is for, whether they can do it or not.

    Eigensolvers need an operator from elsewhere, so they enter for eigenpairs alone;
    the plain path enters where it differs from the default one.
    """
    special = (*_SOLVERS, "grsd_jax_plain")
    return tuple(
        name
        for name, peer in PEERS.items()
        if name not in special or task in peer.variants
    )


def task_kind(task: str) -> str:
    """Returns the kind of a task: ``block`` of ``block_8``."""
    return task.partition("_")[0]


def block_width(task: str) -> int:
    """Returns b of a task named ``block_b`` or ``derivative_b``."""
    return int(task.rpartition("_")[2])


def why_not(peer: str, spec: ProblemSpec, task: str) -> tuple[str, str] | None:
    """Tells why a peer is not measured on a task.

    Args:
        peer: A key of `PEERS`.
        spec: The problem.
        task: One of `TASKS`.

    Returns:
        None if it is; else ``(status, reason)``, where the status is ``cannot`` if the
        peer has no such function and ``skipped`` if the time it takes forbids it.
    """
    kind = task_kind(task)
    if task not in PEERS[peer].variants:
        return "cannot", _CANNOT[kind]
    if kind == "derivative" and block_width(task) > spec.size:
        return "skipped", f"the error space has only {spec.size} dimensions"
    if task == "derivative_160" and peer == "grsd_jax_plain":
        return "skipped", "as at b = 32; left out to bound the time of a run"
    if not is_wide(spec):
        return None
    if peer == "neural_tangents":
        return "skipped", "slow enough at width 16: see there"
    if task == "block_32" and peer not in ("grsd_jax", "torch_func"):
        return "skipped", "as at b = 8; left out to bound the time of a run"
    if task == "eigenpairs" and peer not in ("grsd_jax", "scipy_eigsh"):
        return "skipped", "as at width 16; left out to bound the time of a run"
    return None


def variants(peer: str, spec: ProblemSpec, task: str) -> tuple[str, ...]:
    """Returns the variants to measure; of a wide network's, those of less memory."""
    names = PEERS[peer].variants[task]
    if is_wide(spec) and peer == "torch_func" and task == "block_32":
        return names[-1:]
    return names
