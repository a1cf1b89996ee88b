"""The options of verbs that train: those of a TOML file, and over them the command line's."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer

UNIONS = (UnionType, Union)  # X | None, and the same where X is a Literal
DATA = ("input_column", "label_column", "labels_fraction", "validation_fraction")  # how data are read
OWN = ("config", "resume", "dry_run", "as_json", "quiet")  # of a call, not of a run


def read_settings(
    verb: Callable[..., None],
    given: Mapping[str, Any],
    config: Path | None,
    needed: Sequence[str] = ("backbone", "data", "output"),
    apart: str | None = None,
) -> dict[str, Any]:
    """Return the settings of a run by option name.

    Args:
        verb: whose options may stand in the file.
        given: options of the command line, which override the file's.
        needed: options without which there is no run.
        apart: key of the file that is no option, returned with the settings as it is.

    Raises:
        ConfigError: if the file cannot be read, has what is no option or not of its type, a needed one is missing, or
            two exclude each other.
    """
    from maskpack.errors import ConfigError
    from maskpack.training.config import read_config

    stored = read_config(config) if config else {}
    other = {key: stored.pop(key) for key in (apart,) if key in stored}
    settings = {**checked(kinds_of(verb), stored, str(config), apart), **given, **other}
    for name in ("mean", "std"):
        if name in settings:
            settings[name] = _three_numbers(name, settings[name])
    for kind in ("method", "objective"):
        options = settings.pop(f"{kind}_option", None)
        if options is not None:
            pairs = [option.partition("=") for option in ([options] if isinstance(options, str) else options)]
            if any(not mark for _, mark, _ in pairs):
                raise ConfigError(f"--{kind}-option must be KEY=VALUE, got {options}")
            settings[f"{kind}_options"] = {key: value for key, _, value in pairs}
    if isinstance(settings.get("bytes_budget"), str):
        settings["bytes_budget"] = _size(settings["bytes_budget"])
    if settings.get("profile") == "fast" and ("bytes_budget" in settings or "rate" in settings):
        raise ConfigError(
            "--bytes-budget and --rate are kept in the profiles default and max; in the profile fast masks take more"
        )
    missing = [name for name in needed if name not in settings]
    if missing:
        raise ConfigError(f"missing: {', '.join('--' + name for name in missing)} (or the same keys in --config FILE)")
    return settings


def option(panel: str, name: str, kind: Any, help: str, *names: str) -> inspect.Parameter:
    """Return an option with the default None, to be added to those of another verb."""
    annotation = Annotated[kind, typer.Option(*names, help=help, rich_help_panel=panel)]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def take(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    """Take the settings with these names."""
    return {name: settings.pop(name) for name in names if name in settings}


def kinds_of(verb: Callable[..., None]) -> dict[str, Any]:
    """Return the types of a verb's options that may stand in a file, by name."""
    parameters = inspect.signature(verb).parameters.items()
    return {name: get_args(one.annotation)[0] for name, one in parameters if name not in OWN}


def checked(known: Mapping[str, Any], settings: dict[str, Any], place: str, apart: str | None = None) -> dict[str, Any]:
    """Return settings of a file, each of which is an option and has its type.

    Args:
        apart: name of the tables that may stand beside them.

    Raises:
        ConfigError: if one is or has not; the message names it and the place.
    """
    from maskpack.errors import ConfigError

    for name in ("random_weights", "bytes_budget"):  # a seed alone, or bytes
        if type(settings.get(name)) is int:
            settings[name] = str(settings[name])
    for name, value in settings.items():
        if name not in known:
            tables = f"the tables [[{apart}]], " if apart else ""
            names = tables + ", ".join(one.replace("_", "-") for one in known)
            raise ConfigError(f"{place} has the setting {name!r}, which cannot stand there; known: {names}")
        triple = name in ("mean", "std") and isinstance(value, list)
        if not triple and not _fits(value, known[name]):
            raise ConfigError(f"{name} in {place} must be {_words(known[name])}, got {value!r}")
    return settings


def _fits(value: Any, kind: Any) -> bool:
    """Tell whether a value of TOML is of an option's type; one may stand for a list of one."""
    arguments, origin = get_args(kind), get_origin(kind)
    if origin in UNIONS:
        return any(_fits(value, one) for one in arguments)
    if origin is list:
        return all(_fits(one, arguments[0]) for one in (value if isinstance(value, list) else [value]))
    if arguments:  # a Literal
        return value in arguments
    types = {float: (int, float), Path: (str,)}.get(kind, (kind,))
    return isinstance(value, types) and (kind is bool or not isinstance(value, bool))


def _words(kind: Any) -> str:
    """What a value has to be, in words."""
    arguments, origin = get_args(kind), get_origin(kind)
    if origin in UNIONS:
        return " or ".join(_words(one) for one in arguments if one is not type(None))
    if origin is list:
        return f"a list, each {_words(arguments[0])}"
    if arguments:
        return f"one of {', '.join(arguments)}"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a text")


def _size(text: str) -> int:
    """A number of bytes, perhaps in kB (1000) or MB."""
    from maskpack.errors import ConfigError

    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(B|kB|MB)?", text)
    size = 0 if found is None else round(float(found[1]) * {"kB": 1e3, "MB": 1e6}.get(found[2], 1))
    if size < 1:
        raise ConfigError(
            f"--bytes-budget must be a number of bytes above 0, as in 200000, 200kB or 1.5MB; got {text!r}"
        )
    return size


def _three_numbers(name: str, value: str | list[Any]) -> list[float]:
    """Three numbers, one a channel, as a text with commas or, from a file, as a list."""
    from maskpack.errors import ConfigError

    parts = value.split(",") if isinstance(value, str) else value
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 3:
        raise ConfigError(f"--{name} must be three numbers joined by commas, got {value!r}")
    return numbers
