"""Settings of the experiments: one frozen dataclass, its help texts and its checks.

Every flag that the scripts share is one field here, with its help text beside it. The
defaults are those of the main job on the embedded data set.
"""

import dataclasses
import json
import math
import os
from typing import Any, Literal

from grsd_jax._checks import check_at_least, check_choice


class UserError(ValueError):
    """A mistake or a condition outside the program, told in one sentence.

    Scripts print the sentence and exit with status 1, without a traceback.
    """


#: The networks: what the scripts and the figures call them.
TITLES = {
    "resnet18": "ResNet-18",
    "plainnet18": "PlainNet-18",
    "mlp": "MLP",
    "resmlp": "Residual MLP",
    "cnn": "CNN",
    "rescnn": "Residual CNN",
    "transformer": "Transformer",
    "ssm": "State-space model",
}
MODELS = tuple(TITLES)

#: Where the weights of the plain twin can come from.
PROTOCOLS = ("shared", "recalibrated", "own")

#: The networks of any depth, and those of them that take a ``branch_scale``.
CHAINS = MODELS[2:]
RESIDUAL = ("resmlp", "rescnn", "transformer")


def setting(default: Any, help_text: str, **checks: Any) -> Any:
    """Returns the dataclass field of one setting.

    Args:
        default: Its default.
        help_text: What ``--help`` says.
        **checks: What `check_field` checks: choices, minimum, maximum, low, high, each,
            each_above.

    Returns:
        The field.
    """
    return dataclasses.field(default=default, metadata={"help": help_text, **checks})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all experiments take; invalid ones raise `UserError` at construction."""

    dataset: str = setting(
        "synthetic",
        "Data set: the embedded textures, or CIFAR-10 read through TFDS.",
        choices=("synthetic", "cifar10"),
    )
    data_dir: str | None = setting(
        None, "Folder of the prepared TFDS data; default: TFDS_DATA_DIR, then TFDS's."
    )
    workdir: str = setting("runs/default", "Folder of the run, and of all it writes.")
    train_batch_size: int = setting(64, "Examples in one training step.", minimum=1)
    optimizer: str = setting(
        "sgd",
        "Optimizer of optax, with its defaults; sgd takes --momentum.",
        choices=("sgd", "adamw", "muon"),
    )
    learning_rate: float = setting(
        0.05, "Learning rate; the default is meant for SGD.", low=0.0
    )
    momentum: float = setting(0.9, "Momentum of SGD, in [0, 1).", low=0.0, high=1.0)
    rho: float = setting(0.9, "Spectral radius of the state-space model, ssm.", low=0.0)
    batch_size: int = setting(32, "Examples N in one measured batch.", minimum=1)
    num_batches: int = setting(2, "Measured batches K.", minimum=1)
    num_shells: int = setting(12, "Logarithmic shells S.", minimum=2)
    window: int = setting(5, "Shells in one sliding window.", minimum=2)
    precision: str = setting(
        "highest",
        "Precision of the network's matrix products; the library's own are always "
        "highest.",
        choices=("highest", "high", "default"),
    )

    def __post_init__(self) -> None:
        """Checks every field, and reads ``~`` in a path as the home folder."""
        validate(self)
        for name in ("workdir", "data_dir"):
            if path := getattr(self, name):
                object.__setattr__(self, name, os.path.expanduser(path))


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """All settings of one run, beside those of `Settings`."""

    seed: int = setting(
        0,
        "Seed of the initial weights, the order of the data and the measured batches.",
        minimum=0,
        maximum=2**32 - 1,
    )
    model: str = setting("resnet18", "The network.", choices=MODELS)
    width: int = setting(
        8, "Channels of the first stage, or features of the state.", minimum=1
    )
    depth: int = setting(
        4, "Blocks L of the networks other than resnet18 and plainnet18.", minimum=1
    )
    branch_scale: float = setting(
        1.0, f"Scale s of the residual branches of {', '.join(RESIDUAL)}.", low=0.0
    )
    activation: str = setting(
        "relu",
        "Activation of the networks.",
        choices=("relu", "gelu", "silu", "softplus", "tanh"),
    )
    epochs: int = setting(3, "Training epochs.", minimum=1)
    schedule: str = setting(
        "constant_schedule", "Name of an optax function that ends in _schedule."
    )
    schedule_args: str = setting(
        "{}",
        "Arguments of the schedule as a JSON object; a missing peak or initial value "
        "is --learning_rate, missing decay_steps are those of the whole training.",
    )
    checkpoint_every: int = setting(200, "Steps between checkpoints.", minimum=1)
    keep_checkpoints: int = setting(
        2,
        "Number of newest checkpoints to keep; the conditions need several.",
        minimum=1,
    )
    log_every: int = setting(20, "Steps between lines of metrics.", minimum=1)
    record_every: int = setting(10, "Steps between records of the probe.", minimum=1)
    over: tuple[int, ...] = setting(
        (),
        "Adds balances over the first h steps after each record, such as 1,4; each h "
        "is below --record_every.",
    )
    shells: Literal["soft", "sharp"] = setting(
        "soft",
        "Shells of the probe's balances: soft ones of width 1/2, or sharp ones, which "
        "need all eigenpairs and give the share between non-adjacent shells.",
        choices=("soft", "sharp"),
    )
    num_steps: int = setting(
        48, "Krylov steps m of the probe's balances, without all eigenpairs.", minimum=4
    )
    solver: Literal["auto", "dense", "lanczos"] = setting(
        "auto",
        "How the spectrum is found; auto takes the cheaper that fits in memory.",
        choices=("auto", "dense", "lanczos"),
    )
    num_pairs: int = setting(
        100, "Leading eigenpairs that are measured, by either solver.", minimum=1
    )
    block_size: int = setting(8, "Columns b of a Lanczos block.", minimum=1)
    derivative: Literal["exact", "finite_difference"] = setting(
        "exact",
        "How the derivative of the kernel is computed. In ReLU networks a finite "
        "difference also sees the units that switch on or off.",
        choices=("exact", "finite_difference"),
    )
    reduction: Literal["mean", "stack"] = setting(
        "stack",
        "Stack the batches into one, or average their kernels (mean, as in the paper).",
        choices=("mean", "stack"),
    )
    protocol: tuple[str, ...] = setting(
        PROTOCOLS,
        "Where the weights of plainnet18 come from: resnet18 (shared), resnet18 with "
        "BatchNorm statistics gathered again (recalibrated), its own training (own).",
        each=PROTOCOLS,
    )


#: The settings that decide what training computes; a run resumes only under the same.
TRAINING_FIELDS = (
    "dataset",
    "seed",
    "model",
    "width",
    "depth",
    "branch_scale",
    "rho",
    "activation",
    "epochs",
    "train_batch_size",
    "optimizer",
    "learning_rate",
    "momentum",
    "schedule",
    "schedule_args",
    "precision",
)


#: The settings that concern the probe alone.
PROBE_FIELDS = ("record_every", "over", "shells", "num_steps")


#: The settings that concern a script that trains.
TRAINING_FLAGS = (
    *TRAINING_FIELDS,
    "data_dir",
    "workdir",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
)


def validate(config: Settings) -> None:
    """Checks every setting, and those that depend on each other.

    Args:
        config: The settings.

    Raises:
        UserError: If a setting is out of range; the sentence names its flag, what was
            expected and what was got.
    """
    for field in dataclasses.fields(config):
        check_field(field, getattr(config, field.name))
    over = getattr(config, "over", ())
    if over and not all(1 <= h < getattr(config, "record_every", 0) for h in over):
        raise UserError(
            "--over: expected numbers of steps from 1 to below --record_every, got "
            f"{','.join(map(str, over))}."
        )
    solver = getattr(config, "solver", None)
    if getattr(config, "shells", None) == "sharp" and solver == "lanczos":
        raise UserError(
            "--shells: expected 'soft' with --solver=lanczos, whose steps do not "
            "converge for others, got 'sharp'."
        )
    if config.window > config.num_shells:
        raise UserError(
            f"--window: expected at most --num_shells = {config.num_shells}, "
            f"got {config.window}."
        )


def check_field(field: dataclasses.Field, value: Any) -> None:
    """Checks one setting by the metadata of its field.

    Args:
        field: The field of a dataclass of settings.
        value: The value to check.

    Raises:
        UserError: If the value does not fit.
    """
    flag, checks = f"--{field.name}", field.metadata
    try:
        if "choices" in checks:
            check_choice(flag, value, checks["choices"])
        if "minimum" in checks:
            check_at_least(flag, value, checks["minimum"])
        if "maximum" in checks and value > checks["maximum"]:
            raise UserError(
                f"{flag}: expected an integer <= {checks['maximum']}, got {value}."
            )
        if "each" in checks:
            _check_each(flag, value, checks["each"])
        if "each_above" in checks:
            _check_each_number(flag, value, checks["each_above"])
    except ValueError as error:
        raise UserError(str(error)) from None
    if "low" in checks:
        check_interval(flag, value, checks["low"], checks.get("high", math.inf))
    if field.name == "schedule" and not str(value).endswith("_schedule"):
        raise UserError(
            f"{flag}: expected the name of an optax function that ends in _schedule, "
            f"got {value!r}."
        )
    if field.name == "schedule_args":
        parse_schedule_args(value)
    if field.name == "workdir" and not value:
        raise UserError(f"{flag}: expected the name of a folder, got {value!r}.")


def parse_schedule_args(text: str) -> dict[str, Any]:
    """Parses ``--schedule_args``.

    Args:
        text: A JSON object; keys of inner objects that are digits become integers, as
            the boundaries of a piecewise schedule need.

    Returns:
        The keyword arguments.

    Raises:
        UserError: If the text is not a JSON object.
    """
    try:
        arguments = json.loads(text)
    except (json.JSONDecodeError, TypeError):
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"--schedule_args: expected a JSON object, got {text!r}.")
    return {name: _integer_keys(value) for name, value in arguments.items()}


def _integer_keys(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {int(k) if k.isdecimal() else k: item for k, item in value.items()}


def check_interval(flag: str, value: Any, low: float, high: float = math.inf) -> None:
    """Checks a number that has to be finite.

    Args:
        flag: The flag, for the sentence.
        value: The value.
        low: The smallest that fits.
        high: The first that is too large.

    Raises:
        UserError: If it is not a finite number in ``[low, high)``.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # `low <= value < high` is false for NaN, and for infinity as high is excluded.
    if not (is_number and low <= value < high):
        bound = f"in [{low:g}, {high:g})" if math.isfinite(high) else f">= {low:g}"
        raise UserError(f"{flag}: expected a finite number {bound}, got {value!r}.")


def _check_each(flag: str, value: Any, options: tuple[str, ...]) -> None:
    if not isinstance(value, tuple) or not value or len(set(value)) < len(value):
        raise UserError(
            f"{flag}: expected a list of different entries out of "
            f"{', '.join(options)}, got {value!r}."
        )
    for entry in value:
        check_choice(flag, entry, options)


def _check_each_number(flag: str, value: Any, low: float) -> None:
    good = isinstance(value, tuple) and bool(value) and len(set(value)) == len(value)
    if not good or not all(low < entry < 2**32 for entry in value):
        raise UserError(
            f"{flag}: expected a list of different numbers > {low:g} and < 2^32, "
            f"got {value!r}."
        )
