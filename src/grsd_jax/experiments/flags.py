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
    flag_values: flags.FlagValues = flags.FLAGS,
    **defaults: Any,
) -> None:
    """Defines one absl flag for every field of `Config`.

    Args:
        only: The fields to define; all of them by default.
        flag_values: Where to define them.
        **defaults: Defaults of this script that differ from `Config`'s.

    Raises:
        ValueError: If a name is not a field of `Config`.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name in {*defaults, *(only or ())} - set(fields):
        raise ValueError(f"define_flags: expected fields of Config, got {name!r}.")
    for name, field in fields.items():
        if only is None or name in only:
            _define(field, defaults.get(name, field.default), flag_values)


def config_from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """Returns the settings that the flags say; fields without a flag keep defaults.

    Args:
        flag_values: Parsed flags.

    Returns:
        The settings, checked.

    Raises:
        UserError: If a setting is out of range.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        if field.name in flag_values:
            value = flag_values[field.name].value
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return Config(**values)


def run_main(main: Callable[[Config], None], *, positional: str | None = None) -> None:
    """Parses the flags, sets the matmul precision and calls ``main(config)``.

    An expected error (`UserError`, or a check of the library, whose sentences all read
    "argument: expected ..., got ...") is printed as one sentence, without a traceback,
    and the process exits with status 1.

    Args:
        main: The body of the script.
        positional: A field that may also be given as the one argument without a flag.
    """

    def wrapped(argv: list[str]) -> None:
        try:
            if positional is not None and len(argv) == 2:
                setattr(flags.FLAGS, positional, argv.pop())
            if len(argv) > 1:
                raise UserError(f"arguments: expected only --flags, got {argv[1]!r}.")
            if not flags.FLAGS["verbosity"].present:
                logging.set_verbosity(logging.ERROR)  # Orbax tells every step
            config = config_from_flags()
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
            check_field(field, tuple(value) if isinstance(value, list) else value)
        except UserError as error:
            sentence = str(error).removeprefix(f"--{field.name}: ")  # absl names it
            raise flags.ValidationError(sentence) from None
        return True

    flags.register_validator(field.name, check, flag_values=flag_values)
