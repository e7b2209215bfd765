import dataclasses

import pytest

from grsd_jax.experiments.common.config import (
    TRAINING_FIELDS,
    Config,
    UserError,
    parse_schedule_args,
)


def test_defaults_are_valid_and_every_field_has_help():
    config = Config()
    for field in dataclasses.fields(config):
        assert len(field.metadata["help"]) > 10, field.name
    assert set(TRAINING_FIELDS) <= {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "mnist"),
        ("model", "resnet19"),
        ("activation", "Relu"),
        ("solver", ""),
        ("derivative", "secant"),
        ("reduction", "sum"),
        ("precision", "low"),
        ("width", 0),
        ("width", 1.5),
        ("width", True),
        ("epochs", -1),
        ("seed", -1),
        ("batch_size", 0),
        ("num_batches", 0),
        ("block_size", 0),
        ("num_pairs", 0),
        ("num_shells", 1),
        ("window", 1),
        ("checkpoint_every", 0),
        ("keep_checkpoints", 0),
        ("log_every", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", -0.1),
        ("learning_rate", "0.1"),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("schedule", "constant"),
        ("schedule_args", "[1]"),
        ("schedule_args", "{"),
        ("protocol", ()),
        ("protocol", "shared"),
        ("protocol", ("shared", "shared")),
        ("protocol", ("shared", "theirs")),
        ("workdir", ""),
    ],
)
def test_a_bad_setting_is_one_sentence_with_its_flag(name, value):
    with pytest.raises(UserError) as caught:
        Config(**{name: value})
    text = str(caught.value)
    assert text.startswith(f"--{name}: expected ")
    assert ", got " in text
    assert "\n" not in text


def test_window_must_fit_into_the_shells():
    assert Config(num_shells=5, window=5).window == 5
    with pytest.raises(UserError, match=r"--window: expected at most .* 5, got 6"):
        Config(num_shells=5, window=6)


def test_settings_are_frozen_and_hashable():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 3
    assert hash(config) == hash(Config())
    assert dataclasses.replace(config, width=3) != config


def test_schedule_args_give_integer_boundaries():
    parsed = parse_schedule_args('{"boundaries_and_scales": {"10": 0.1}, "value": 2}')
    assert parsed == {"boundaries_and_scales": {10: 0.1}, "value": 2}
