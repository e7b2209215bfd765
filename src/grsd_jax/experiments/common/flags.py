"""From `Config` to command-line flags and back, and the frame around every command."""

import dataclasses
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from grsd_jax._memory import naming_what_to_lower
from grsd_jax.conditions import Thresholds
from grsd_jax.conditions.verdicts import check_threshold
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import (
    TRAINING_FIELDS,
    Config,
    UserError,
    check_field,
)

#: Where absl keeps the flags that a script takes and does not heed.
_OTHERS = "shared flags without effect here"


def define_flags(
    *,
    only: Collection[str] | None = None,
    settings: type = Config,
    flag_values: flags.FlagValues = flags.FLAGS,
    **defaults: Any,
) -> None:
    """Defines one absl flag for every field of the settings.

    Args:
        only: The fields that concern the script, all of them by default. It takes the
            others too, so that one set of flags serves all scripts, but ``--help``
            leaves them to ``--helpfull``.
        settings: The dataclass of the settings, `Config` or one like it.
        flag_values: Where to define them.
        **defaults: Defaults of this script that differ from the dataclass's.

    Raises:
        ValueError: If a name is not a field of the settings.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name in {*defaults, *(only or ())} - set(fields):
        raise ValueError(
            f"define_flags: expected fields of {settings.__name__}, got {name!r}."
        )
    for name, field in fields.items():
        # As if the script itself had defined it: --help lists the script's own flags.
        concerns = only is None or name in only
        module = sys.argv[0] if concerns else _OTHERS
        _define(field, defaults.get(name, field.default), module, flag_values)


def all_but(*names: str) -> list[str]:
    """Returns the fields of `Config` without those that do not concern a script.

    Args:
        *names: The fields to leave out.

    Returns:
        The others, for ``only`` of `define_flags`.

    Raises:
        ValueError: If a name is not a field.
    """
    fields = [field.name for field in dataclasses.fields(Config)]
    for name in set(names) - set(fields):
        raise ValueError(f"all_but: expected fields of Config, got {name!r}.")
    return [name for name in fields if name not in names]


def config_from_flags(
    flag_values: flags.FlagValues = flags.FLAGS,
    *,
    settings: type = Config,
    reads_run: bool = False,
) -> Any:
    """Returns the settings that the flags say; fields without a flag keep defaults.

    Args:
        flag_values: Parsed flags.
        settings: The dataclass of the settings.
        reads_run: Whether flags that are not given are read from the training that is
            in the workdir, if there is one.

    Returns:
        The settings, checked.

    Raises:
        UserError: If a setting is out of range, the training's cannot be read, or a
            flag contradicts them.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        if field.name in flag_values:
            values[field.name] = _parsed(field, flag_values[field.name].value)
    config = settings(**values)
    if not reads_run:
        return config
    trained = _settings_of_training(Path(config.workdir), config.model)
    if not trained and not flag_values["model"].present:
        trained = _settings_of_the_only_training(Path(config.workdir))
    given = {name for name in trained if flag_values[name].present} - _FREE
    for name in sorted(given):
        if getattr(config, name) != trained[name]:
            raise UserError(
                f"--{name}: expected {trained[name]!r} as in the run that is in "
                f"'{config.workdir}', got {getattr(config, name)!r}."
            )
    kept = {n: value for n, value in trained.items() if not flag_values[n].present}
    return dataclasses.replace(config, **kept)


#: Training settings that a command which reads the run may set differently.
_FREE = {"model", "precision"}


def _settings_of_training(workdir: Path, model: str) -> dict[str, Any]:
    """Returns the settings of a training that decide what it computed.

    The plain network's may be the ResNet-18's, whose weights it takes.
    """
    for name in (model, "resnet18") if model == "plainnet18" else (model,):
        file = workdir / name / "config.json"
        if file.exists():
            written = records.read_json(file)
            # What is not a training's is told by what restores its weights.
            fields = TRAINING_FIELDS if isinstance(written, dict) else ()
            return {field: written[field] for field in fields if field in written}
    return {}


def _settings_of_the_only_training(workdir: Path) -> dict[str, Any]:
    """Returns the settings of the training in the workdir if there is only one."""
    names = [file.parent.name for file in workdir.glob("*/config.json")]
    return _settings_of_training(workdir, names[0]) if len(names) == 1 else {}


def check_names(flag: str, given: Sequence[str], options: Sequence[str]) -> list[str]:
    """Returns names that were given, after checking that each is one, and there once.

    Args:
        flag: The flag, for the sentence.
        given: The names.
        options: The names there are.

    Returns:
        The names.

    Raises:
        UserError: If they do not fit.
    """
    if not given or len({*given} & {*options}) < len(given):
        raise UserError(
            f"{flag}: expected a list of different entries out of "
            f"{', '.join(options)}, got {','.join(given)!r}."
        )
    return list(given)


def define_seeds(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines ``--seeds``, eight by default.

    Args:
        flag_values: Where to define it.
    """
    flags.DEFINE_list(
        "seeds",
        [str(seed) for seed in range(8)],
        "Seeds of the trainings.",
        flag_values=flag_values,
        module_name=sys.argv[0],
    )


def seeds_from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> list[int]:
    """Returns the seeds.

    Args:
        flag_values: Parsed flags.

    Returns:
        The seeds.

    Raises:
        UserError: Unless each is a seed, and there once.
    """
    given: list[str] = flag_values["seeds"].value or []
    seeds = [int(seed) for seed in given if seed.isascii() and seed.isdecimal()]
    if not given or len({x for x in seeds if x < 2**32}) < len(given):
        raise UserError(
            "--seeds: expected a list of integers >= 0 and < 2^32, each once, got "
            f"{','.join(given)!r}."
        )
    return seeds


#: What each field of `Thresholds` is, for ``--help``.
_THRESHOLD_HELP = {
    "influence_share": "Condition 1: share of the influence that the band must hold.",
    "max_band": "Condition 1: widest band, in blocks; by default (L - 1) // 2.",
    "max_tail_sum": "Condition 2: largest tail sum of the coherence profile.",
    "max_distant_coherence": "Condition 2: largest coherence of two distant blocks.",
    "distant": "Condition 2: distance from which blocks count as distant.",
    "max_growth": "Condition 3: largest growth of |J| and |Jdot| along the path.",
    "max_drift": "Condition 3: largest drift of the leading projector in one stretch.",
    "max_lipschitz": "Condition 3: largest local exponent of a shell statistic.",
    "max_residual": "Condition 4: largest Toeplitz residual nearest to the center.",
    "max_slope_error": "Condition 4: largest distance of the diagonal's slope to 1.",
    "min_r_squared": "Condition 4: smallest R^2 of the diagonal's fit.",
}


def define_threshold_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one absl flag for every field of `Thresholds`.

    Args:
        flag_values: Where to define them.
    """
    for name, default in Thresholds()._asdict().items():
        define = flags.DEFINE_float
        if Thresholds.__annotations__[name] is not float:
            define = flags.DEFINE_integer
        options = {"flag_values": flag_values, "module_name": sys.argv[0]}
        define(name, default, _THRESHOLD_HELP[name], **options)
        flags.register_validator(
            name, partial(_check_threshold, name), flag_values=flag_values
        )


def _check_threshold(name: str, value: float | None) -> bool:
    """Raises ValidationError unless a threshold is finite, >= 0, and a share <= 1."""
    try:
        check_threshold(name, name, value)
    except ValueError as error:
        raise flags.ValidationError(str(error).removeprefix(f"{name}: ")) from None
    return True


def thresholds_from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Thresholds:
    """Returns the thresholds that the flags say.

    Args:
        flag_values: Parsed flags.

    Returns:
        The thresholds.
    """
    values: dict[str, Any] = {n: flag_values[n].value for n in Thresholds._fields}
    return Thresholds(**values)


#: The settings that bound the memory of a run, those of most effect first.
_SIZES = (
    "batch_size", "num_batches", "train_batch_size", "width", "widths", "depth",
    "depths",
)  # fmt: skip


def run_main(
    main: Callable[[Any], None],
    *,
    description: str = "",
    settings: type = Config,
    positional: str | None = None,
    reads_run: bool = False,
) -> None:
    """Parses the flags, sets the matmul precision and calls ``main(config)``.

    An expected error (`UserError`, or a check of the library, whose sentences all read
    "argument: expected ..., got ...") is printed as one sentence, without a traceback,
    and the process exits with status 1. So is running out of memory, on the host or on
    a device, whenever the device tells, with the settings that lower it.

    Args:
        main: The body of the command.
        description: What ``--help`` says above the flags.
        settings: The dataclass of the settings.
        positional: A field that may also be given as the one argument without a flag.
        reads_run: As for `config_from_flags`.
    """
    asked = {argument.lstrip("-") for argument in sys.argv if argument[:1] == "-"}
    if asked & {"h", "help", "helpshort", "helpfull"}:
        print(_help(description, full="helpfull" in asked))
        sys.exit(0)
    sizes = _sizes(settings)

    def wrapped(argv: list[str]) -> None:
        try:
            if len(argv) > 1:
                beside = "" if positional is None else f" beside one --{positional}"
                raise UserError(
                    f"arguments: expected only --flags{beside}, got {argv[1]!r}."
                )
            _say_without_effect()
            if not flags.FLAGS["verbosity"].present:
                logging.set_verbosity(logging.ERROR)  # Orbax tells every step
            config = config_from_flags(settings=settings, reads_run=reads_run)
            if config.precision != "default":
                jax.config.update("jax_default_matmul_precision", config.precision)
            with naming_what_to_lower(*sizes):
                main(config)
        except MemoryError as error:
            text = str(error)
            if "lower one of" not in text:  # the host's memory, not the device's
                text = f"out of memory; lower one of: {', '.join(sizes)}. {text}"
            print(f"error: {text.strip()}", file=sys.stderr)
            sys.exit(1)
        except ValueError as error:
            if not isinstance(error, UserError) and ": expected " not in str(error):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("error: interrupted.", file=sys.stderr)
            sys.exit(130)

    app.run(wrapped, flags_parser=partial(_parse, positional))


def _parse(positional: str | None, argv: list[str]) -> list[str]:
    """Returns the program and what is no flag; exits with one sentence on a bad one."""
    try:
        rest = flags.FLAGS(argv)
        if positional and len(rest) > 1 and not flags.FLAGS[positional].present:
            setattr(flags.FLAGS, positional, rest.pop(1))
    except (flags.Error, ValueError) as error:
        print(f"error: {_flag_sentence(str(error))}", file=sys.stderr)
        sys.exit(1)
    return rest


def _flag_sentence(text: str) -> str:
    """Returns what absl says of a flag in the words of the other errors."""
    found = re.fullmatch(r"flag (--\w+)=(.*?): (?=expected )(.*)", text, re.DOTALL)
    if found:
        return f"{found[1]}: {found[3]}"
    found = re.fullmatch(r"flag --(\w+)=(.*?): .*", text, re.DOTALL)
    if found:
        parser: Any = flags.FLAGS[found[1]].parser
        options = getattr(parser, "enum_values", ())
        wanted = f"one of {', '.join(options)}" if options else parser.syntactic_help
        return f"--{found[1]}: expected {wanted or 'true or false'}, got {found[2]!r}."
    text = text.replace(" ?", "?")  # did you mean
    return f"{text}{'' if text[-1:] in '.?' else '.'} --help lists the flags."


def _say_without_effect() -> None:
    """Tells which of the flags that were given concern other commands only."""
    for flag in flags.FLAGS.flags_by_module_dict().get(_OTHERS, ()):
        if flag.present:
            print(
                f"note: --{flag.name} has no effect on this command.", file=sys.stderr
            )


def _help(description: str, *, full: bool) -> str:
    """Returns the description as it is, and the command's own flags below it."""
    lines = [description.strip(), "", "Flags, with their defaults:", ""]
    for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]):
        default = (flag.default_as_str or "").strip("'")
        if isinstance(flag.default, list):
            default = ",".join(map(str, flag.default))
        lines.append(f"  --{flag.name}={default}")
        lines += textwrap.wrap(
            flag.help, 88, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    if full:
        lines += ["", "Flags that every command takes:", flags.FLAGS.get_help()]
    return "\n".join(lines)


def _sizes(settings: type) -> list[str]:
    """Returns the flags of the script that bound memory; all if it has none of them."""
    own = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    fields = [field.name for field in dataclasses.fields(settings)]
    there = [f"--{name}" for name in _SIZES if name in fields]
    return [flag for flag in there if flag[2:] in own] or there


def _define(
    field: dataclasses.Field,
    default: Any,
    module: str,
    flag_values: flags.FlagValues,
) -> None:
    """Defines the flag of one field, checked while the command line is parsed."""
    help_text = field.metadata["help"]
    options: dict[str, Any] = {"flag_values": flag_values, "module_name": module}
    if "choices" in field.metadata:
        flags.DEFINE_enum(
            field.name, default, field.metadata["choices"], help_text, **options
        )
        return
    kinds: dict[type, Callable[..., Any]] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        tuple: flags.DEFINE_list,
    }
    define = kinds.get(type(default), flags.DEFINE_string)
    default = list(default) if isinstance(default, tuple) else default
    define(field.name, default, help_text, **options)

    def check(value: Any) -> bool:
        try:
            check_field(field, _parsed(field, value))
        except UserError as error:
            sentence = str(error).removeprefix(f"--{field.name}: ")  # absl names it
            raise flags.ValidationError(sentence) from None
        return True

    flags.register_validator(field.name, check, flag_values=flag_values)


def _parsed(field: dataclasses.Field, value: Any) -> Any:
    """Returns a list as a tuple of entries like the field's default ones."""
    if not isinstance(value, list):
        return value
    default: Any = field.default
    kind = type(default[0]) if default else int
    try:
        return tuple(kind(entry) for entry in value)
    except ValueError:
        listed = ",".join(value)
        raise UserError(
            f"--{field.name}: expected a list of {kind.__name__} numbers, "
            f"got {listed!r}."
        ) from None
