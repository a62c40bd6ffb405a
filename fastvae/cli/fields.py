"""Fields of models and of training as options: one each, with its meaning and default."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastvae.names import suggestion
from fastvae.presets import MEANINGS, PRESETS, defaults

MODEL, TRAINING = "Model", "Training"


def groups(preset: str) -> dict[str, dict[str, Any]]:
    """Every field of the preset by group -> its default there."""
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}: {suggestion(preset, PRESETS)}")
    model, training = defaults(PRESETS[preset])
    return {MODEL: model, TRAINING: training}


def shown(value: Any) -> str:
    """A field's value as its option takes it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def with_field_options(command: Callable) -> Callable:
    """The command with an option for each field in place of its argument `overrides`.

    It is called with the options that were given, by field, as text.
    """
    fields = {}
    for preset in PRESETS:
        for group, values in groups(preset).items():
            fields |= {name: (group, value) for name, value in values.items() if name not in fields}
    signature = inspect.signature(command, eval_str=True)
    parameters = {k: p for k, p in signature.parameters.items() if k != "overrides"}
    for name, (group, value) in fields.items():
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            help=f"{MEANINGS[name]} (default {shown(value)})",
            rich_help_panel=group,
            metavar="",
            show_default=False,
        )
        annotation = Annotated[str | None, option]
        parameters[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )

    def run(**values):
        given = {name: values.pop(name) for name in fields}
        overrides = {name: text for name, text in given.items() if text is not None}
        return command(**values, overrides=overrides)

    run.__signature__ = signature.replace(
        parameters=[p.replace(kind=p.KEYWORD_ONLY) for p in parameters.values()]
    )
    run.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run
