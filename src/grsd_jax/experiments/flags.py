"""From `Config` to command-line flags and back, and the frame around every script."""

import dataclasses
import sys
from collections.abc import Callable, Collection
from typing import Any

import jax
from absl import app, flags, logging

from grsd_jax.experiments.config import Config, UserError, check_field


def define_flags(
    *,
    only: Collection[str] | None = None,
    settings: type = Config,
    flag_values: flags.FlagValues = flags.FLAGS,
    **defaults: Any,
) -> None:
    """Defines one absl flag for every field of the settings.

    Args:
        only: The fields to define; all of them by default.
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
        if only is None or name in only:
            _define(field, defaults.get(name, field.default), flag_values)


def config_from_flags(
    flag_values: flags.FlagValues = flags.FLAGS, *, settings: type = Config
) -> Any:
    """Returns the settings that the flags say; fields without a flag keep defaults.

    Args:
        flag_values: Parsed flags.
        settings: The dataclass of the settings.

    Returns:
        The settings, checked.

    Raises:
        UserError: If a setting is out of range.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        if field.name in flag_values:
            values[field.name] = _parsed(field, flag_values[field.name].value)
    return settings(**values)


def run_main(main: Callable[[Any], None], *, settings: type = Config) -> None:
    """Parses the flags, sets the matmul precision and calls ``main(config)``.

    An expected error (`UserError`, or a check of the library, whose sentences all read
    "argument: expected ..., got ...") is printed as one sentence, without a traceback,
    and the process exits with status 1.

    Args:
        main: The body of the script.
        settings: The dataclass of the settings.
    """

    def wrapped(argv: list[str]) -> None:
        try:
            if len(argv) > 1:
                raise UserError(f"arguments: expected only --flags, got {argv[1]!r}.")
            if not flags.FLAGS["verbosity"].present:
                logging.set_verbosity(logging.ERROR)  # Orbax tells every step
            config = config_from_flags(settings=settings)
            if config.precision != "default":
                jax.config.update("jax_default_matmul_precision", config.precision)
            main(config)
        except ValueError as error:
            if not isinstance(error, UserError) and ": expected " not in str(error):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("error: interrupted.", file=sys.stderr)
            sys.exit(130)

    app.run(wrapped)


def _define(
    field: dataclasses.Field, default: Any, flag_values: flags.FlagValues
) -> None:
    """Defines the flag of one field, checked while the command line is parsed."""
    help_text = field.metadata["help"]
    # As if the script itself had defined it: --help lists the script's own flags.
    options: dict[str, Any] = {"flag_values": flag_values, "module_name": sys.argv[0]}
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
    kind = type(default[0])
    try:
        return tuple(kind(entry) for entry in value)
    except ValueError:
        listed = ",".join(value)
        raise UserError(
            f"--{field.name}: expected a list of {kind.__name__} numbers, "
            f"got {listed!r}."
        ) from None
