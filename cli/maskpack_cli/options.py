"""Options are fields of dataclasses: name, type and default are the field's, the text is in the class's docstring.

A parameter of a verb whose type is a dataclass stands for an option of each field. Classes of settings, such as
`TrainConfig`, are used as they are; the groups of options that several verbs share are classes here.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo

from maskpack.errors import BackboneError, ConfigError
from maskpack.training.config import RECIPES, Bytes, read_config

from .console import Output, quiet_libraries

if TYPE_CHECKING:
    from maskpack import Adapter
    from maskpack.backbone.load import Backbone
    from maskpack.training.data.base import Data

# which may not stand in a settings file: they are of a call, not of a run
OF_A_CALL = ("config", "recipe", "resume", "dry_run", "as_json", "quiet")
Channels = Annotated[tuple[float, ...], "channels"]


class Given(frozenset[str]):
    """Type of a verb's parameter that takes the names of the options on the command line or in the settings file."""


class Without:
    """Names of fields that are no options of a verb, and other defaults of those that are."""

    def __init__(self, *names: str, **defaults: Any):
        self.names, self.defaults = names, defaults


def verb(app: typer.Typer, *examples: str, name: str | None = None, panel: str | None = None) -> Callable[..., Any]:
    """Decorator: add a function to an app as a verb with the options --json and --quiet."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = list(inspect.signature(function).parameters.values())
        groups = {one.name: _group(one) for one in parameters if is_dataclass(_group(one)[0])}
        wants = [one.name for one in parameters if one.annotation is Given]
        options = []
        for one in parameters:
            options += options_of(*groups[one.name]) if one.name in groups else [] if one.name in wants else [one]
        if any(option.name == "config" for option in options):  # what a file turns on, the command line can turn off
            options = [_negatable(option) for option in options]
        options += options_of(Printed)

        def run(ctx: typer.Context, **values: Any) -> None:
            Output.json, Output.quiet = values.pop("as_json"), values.pop("quiet")
            quiet_libraries()
            given = Given(one for one in values if _source(ctx, one) in ("COMMANDLINE", "DEFAULT_MAP"))
            taken = {name: _made(cls, without, values) for name, (cls, without) in groups.items()}
            function(**values, **taken, **dict.fromkeys(wants, given))

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        options.append(inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        options = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
        run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        epilog = "Examples:\n\n" + "\n\n".join(f"  {line}" for line in examples)
        app.command(name, epilog=epilog, rich_help_panel=panel)(run)
        return function

    return decorate


def _group(parameter: inspect.Parameter) -> tuple[Any, Without]:
    """Return the type of a parameter, and what its annotation leaves out of it."""
    if get_origin(parameter.annotation) is not Annotated:
        return parameter.annotation, Without()
    kind, *extras = get_args(parameter.annotation)
    return kind, next((one for one in extras if isinstance(one, Without)), Without())


def _source(ctx: typer.Context, option: str) -> str:
    """Return where the value of an option comes from."""
    source = ctx.get_parameter_source(option)
    return "" if source is None else source.name


def described(cls: type[Any]) -> dict[str, tuple[str, str]]:
    """Return (section, text) of every field that the docstrings of a class and its bases describe, by name.

    A section is a line that ends in a colon, with lines `name: text` below it that are indented once more.
    """
    found: dict[str, tuple[str, str]] = {}
    for one in cls.__mro__:
        own: dict[str, tuple[str, str]] = {}
        section = name = ""
        for line in inspect.cleandoc(one.__doc__ or "").splitlines():
            if heading := re.fullmatch(r"(\w[\w ]*):", line):
                section, name = heading[1], ""
            elif entry := re.fullmatch(r" {4}(\w+): (.+)", line):
                name = entry[1]
                own[name] = (section, entry[2])
            elif name and line.startswith(" " * 8):
                own[name] = (section, f"{own[name][1]} {line.strip()}")
        found |= {name: text for name, text in own.items() if name not in found}
    return found


def options_of(cls: type[Any], without: Without | None = None) -> list[inspect.Parameter]:
    """Return the options that the fields of a dataclass are, as parameters for typer."""
    kinds, texts, without = get_type_hints(cls, include_extras=True), described(cls), without or Without()
    known = {field.name: field for field in fields(cls)}
    if known.keys() != texts.keys():
        raise TypeError(f"the docstring of {cls.__name__} must describe its fields: {known.keys() ^ texts.keys()}")
    found = []
    for field_name, (section, text) in texts.items():
        if field_name in without.names:
            continue
        name, kind, info = _as_option(field_name, kinds[field_name])
        default = without.defaults.get(field_name, known[field_name].default)
        if get_origin(kind) is list:
            default, text = None, f"{text} May be repeated."
        info.help, info.rich_help_panel = text if "/" in text.split()[0] else text[0].upper() + text[1:], section
        default = inspect.Parameter.empty if default is MISSING else default
        keyword, annotation = inspect.Parameter.KEYWORD_ONLY, Annotated[kind, info]
        found.append(inspect.Parameter(name, keyword, default=default, annotation=annotation))
    return found


def _as_option(name: str, kind: Any) -> tuple[str, Any, Any]:
    """Return name, type and typer's description of the option for a field."""
    arguments = get_args(kind)
    for one in arguments:
        if isinstance(one, ParameterInfo):
            return name, arguments[0], copy(one)
    alone = next((one for one in arguments if one in PARSERS), kind)
    if alone in PARSERS:
        return name, Any, typer.Option(parser=PARSERS[alone], metavar=str(alone.__metadata__[0]).upper())
    if get_origin(kind) is Mapping:
        name = name.removesuffix("s")
        return name, list[str], typer.Option(f"--{name.replace('_', '-')}", metavar="KEY=VALUE")
    kind = next((one for one in arguments if get_origin(one) is tuple), kind)
    if get_origin(kind) is tuple:
        arguments = get_args(kind)
        return name, list[arguments[0]], typer.Option(f"--{name.replace('_', '-')}")  # type: ignore[valid-type]
    return name, kind, typer.Option(f"--{name.replace('_', '-')}")


def _negatable(option: inspect.Parameter) -> inspect.Parameter:
    kind, info = get_args(option.annotation) if get_origin(option.annotation) is Annotated else (None, None)
    if kind is not bool or option.name in OF_A_CALL or option.name.startswith("no_"):
        return option
    name = option.name.replace("_", "-")
    info = typer.Option(f"--{name}/--no-{name}", help=info.help, rich_help_panel=info.rich_help_panel)
    return option.replace(annotation=Annotated[bool, info])


def _made(cls: type[Any], without: Without, values: dict[str, Any]) -> Any:
    """Make an object of a dataclass of what its options got; those are taken out of the values."""
    kinds, made = get_type_hints(cls), {}
    for field in (one for one in fields(cls) if one.name not in without.names):
        kind = kinds[field.name]
        several = any(get_origin(one) is tuple for one in (kind, *get_args(kind)))
        origin = tuple if several else get_origin(kind)
        option = field.name.removesuffix("s") if origin is Mapping else field.name
        value = values.pop(option, None)
        if origin is Mapping:
            pairs = [one.partition("=") for one in value or ()]
            if not all(mark for _, mark, _ in pairs):
                raise ConfigError(f"--{option.replace('_', '-')} must be KEY=VALUE, got {value}")
            value = {key: text for key, _, text in pairs}
        elif origin is tuple:
            value = tuple(value) if value else None
        if value is not None:
            made[field.name] = value
    return cls(**made)


def read_settings(ctx: typer.Context, file: Path | None) -> Path | None:
    """Callback of --config: let the keys of a TOML file stand for the options that are not on the command line."""
    return _take_settings(ctx, file, ())


def read_tasks(ctx: typer.Context, file: Path) -> Path:
    """Callback of TASKS.toml: the same, for a file that has tables of tasks too."""
    _take_settings(ctx, file, ("task",))
    return file


def _take_settings(ctx: typer.Context, file: Path | None, tables: tuple[str, ...]) -> Path | None:
    stored = {} if file is None or ctx.resilient_parsing else read_config(file)
    known = _storable(ctx)
    for key in stored.keys() - known.keys() - set(tables):
        names = [*(f"the tables [[{one}]]" for one in tables), *(str(one).replace("_", "-") for one in known)]
        raise ConfigError(f"{file} has the setting {key!r}, which cannot stand there; known: {', '.join(names)}")
    ctx.default_map = {**(ctx.default_map or {}), **_as_texts(stored, known)}
    return file


def take_recipe(ctx: typer.Context, name: str) -> str:
    """Callback of --recipe: let its settings stand for the options that file and command line leave open."""
    ctx.default_map = {**_as_texts(RECIPES[name], _storable(ctx)), **(ctx.default_map or {})}
    return name


def _storable(ctx: typer.Context) -> dict[str, Any]:
    """Return the parameters of a verb that may stand in a settings file, by name."""
    return {str(one.name): one for one in ctx.command.params if one.name not in (*OF_A_CALL, "help", "ctx")}


def _as_texts(stored: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of known parameters as they would be written on the command line."""
    found: dict[str, Any] = {}
    for key, value in stored.items():
        if key not in known:
            continue
        values = [f"{name}={one}" for name, one in value.items()] if isinstance(value, dict) else value
        texts = [str(one) for one in values] if isinstance(values, list | tuple) else [str(values)]
        flag = isinstance(value, bool) and getattr(known[key], "is_flag", False)
        found[key] = value if flag else texts if known[key].multiple else ",".join(texts)
    return found


def read_size(text: Any) -> int:
    """Parse a number of bytes, perhaps in kB (1000) or MB."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(B|kB|MB)?", str(text))
    size = 0 if found is None else round(float(found[1]) * {"kB": 1e3, "MB": 1e6}.get(found[2], 1))
    if size < 1:
        raise typer.BadParameter(f"expected bytes above 0, as in 200000, 200kB or 1.5MB; got {text!r}")
    return size


def read_channels(text: Any) -> tuple[float, ...]:
    """Parse three numbers joined by commas."""
    try:
        numbers = tuple(float(part) for part in str(text).split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise typer.BadParameter(f"expected three numbers joined by commas, got {text!r}")
    return numbers


PARSERS: dict[Any, Callable[[Any], Any]] = {Bytes: read_size, Channels: read_channels}


# --- options of several verbs ----------------------------------------------------------------------------------------

Profile = Literal["fast", "default", "max"]
DATA = "Hub data set, folder (parquet, csv, images), or digits:0-9."
BACKBONES = "timm/NAME, torchvision/NAME, hf/REPO, hf/FOLDER or PATH.py:FUNCTION."
Ref = Annotated[str, typer.Argument(help="user/name or user/name@revision, a folder, or a .safetensors file.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel="Adapter")]
DataRef = Annotated[str, typer.Option(help=DATA, rich_help_panel="Data")]
BackboneRef = Annotated[str, typer.Option(help=BACKBONES, rich_help_panel="Backbone")]
OutputRef = Annotated[Path, typer.Option(help="Folder to write, or a .safetensors file.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples per forward pass.")]
Mode = Annotated[
    Literal["target", "source"], typer.Option(help="Which of the two networks of an adapter of `maskpack transfer`.")
]
Token = Annotated[str | None, typer.Option(help="Hub token; better: `hf auth login` or the variable HF_TOKEN.")]


@dataclass(frozen=True, kw_only=True)
class Printed:
    """What is printed.

    Options:
        as_json: print the result as JSON.
        quiet: print the result only: no notes, no progress.
    """

    as_json: Annotated[bool, typer.Option("--json")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False


@dataclass(frozen=True, kw_only=True)
class Packed:
    """How hard masks are packed.

    Packing:
        profile: fast is quick; default is small and decodes quickly; max is smallest and slow, and may need the
            backbone to decode.
    """

    profile: Profile = "default"


@dataclass(frozen=True, kw_only=True)
class Packing(Packed):
    """How masks are packed.

    Packing:
        codec: only this codec: `maskpack list codecs`.
    """

    codec: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Which adapters are accepted.

    Adapter:
        require_revision: refuse what can change: branches, and no revision at all.
        require_signature: who must have signed it: a public key (PEM), a folder of keys, or an identity
            NAME@https://ISSUER. Default: MASKPACK_REQUIRE_SIGNATURE.
        token: Hub token; better: `hf auth login` or the variable HF_TOKEN.
    """

    require_revision: bool = False
    require_signature: str | None = None
    token: str | None = None

    def load(self, ref: str, revision: str | None = None) -> "Adapter":
        """Read an adapter."""
        from maskpack import load_adapter

        return load_adapter(ref, revision=revision, **vars(self))


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights in place of a backbone's pretrained ones.

    Backbone:
        weights: safetensors state dict in place of the pretrained weights: file, index or folder.
        random_weights: random weights in their place: SEED, kaiming:SEED or signed-constant:SEED.
    """

    weights: Path | None = None
    random_weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Base(Weights):
    """The backbone that an adapter is for.

    Backbone:
        backbone: timm/NAME, torchvision/NAME, hf/REPO, hf/FOLDER or PATH.py:FUNCTION. Default: the adapter's base.
    """

    backbone: str | None = None

    def of(self, adapter: "Adapter") -> "Backbone":
        """Load the backbone of an adapter; with random weights if the adapter names them and there are no others."""
        from maskpack import load_backbone

        reference, random = self.backbone, self.random_weights
        base, revision = adapter.base.id, adapter.base.revision or ""
        drawn = revision.startswith("random:")
        if drawn and self.weights is None:
            random = random or revision.removeprefix("random:")
        if reference is None:
            # only libraries' own models: a file's factory is never run because an adapter names it
            if not base.startswith(("timm/", "torchvision/", "hf/")) or (base[:3] == "hf/" and base.count("/") != 2):
                raise BackboneError(
                    f"the adapter's base {base!r} cannot be fetched by its name; give it with --backbone"
                )
            reference = f"{base}@{revision}" if revision and not drawn and not base.startswith("timm/") else base
        size = (adapter.about.preprocess or {}).get("size")
        return load_backbone(reference, weights=self.weights, random_weights=random, image_size=size)


@dataclass(frozen=True, kw_only=True)
class PackedBase(Base):
    """The base, where masks are packed with its weights.

    Backbone:
        backbone: the adapters' base, where masks are packed with its weights, or are to be.
    """

    def model_of(self, adapter: "Adapter") -> Any:
        """Return the base of an adapter, None if the options name none."""
        return None if self.backbone is None else self.of(adapter).model


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of the data.

    Data:
        input_column: column of images or texts, where it is not found.
        label_column: column of labels, where it is not found.
    """

    input_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rows(Columns):
    """Which rows of the data train.

    Data:
        labels_fraction: share of the training rows to use.
        validation_fraction: share of the training rows held out. Default: 0.1; 0 without labels.
    """

    labels_fraction: float = 1.0
    validation_fraction: float | None = None

    def load(self, data: str, supervised: bool = True, **options: Any) -> "Data":
        """Read data; an objective without labels holds no rows out."""
        from maskpack.training import load_data

        held_out = self.validation_fraction
        options["validation_fraction"] = (0.1 if supervised else 0.0) if held_out is None else held_out
        return load_data(data, **{**vars(self), **options})


@dataclass(frozen=True, kw_only=True)
class TrainedBackbone(Weights):
    """The backbone that a mask is trained on.

    Backbone:
        backbone: timm/NAME, torchvision/NAME, hf/REPO, hf/FOLDER or PATH.py:FUNCTION.
        head: module that gives the logits, where it is not found.
        image_size: pixels. Default: the backbone's.
        mean: three numbers joined by commas. Default: the backbone's.
        std: three numbers joined by commas. Default: the backbone's.
    """

    backbone: str
    head: str | None = None
    image_size: int | None = None
    mean: Channels | None = None
    std: Channels | None = None

    def arguments(self) -> dict[str, Any]:
        """Return what is given of these, as arguments of `load_backbone`."""
        options = {name: value for name, value in vars(self).items() if value is not None}
        return {"reference": options.pop("backbone"), **options}

    def load(self) -> "Backbone":
        from maskpack import load_backbone

        return load_backbone(**self.arguments())


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where results go, and where settings come from.

    Run:
        output: folder for the adapter, the checkpoint and the logs.
        config: TOML file with these options as keys; the command line overrides it.
        recipe: default, or source: the settings of Self-Masking Networks as published; file and command line override.
    """

    output: Path
    config: Annotated[Path | None, typer.Option(callback=read_settings, is_eager=True)] = None
    recipe: Annotated[Literal["default", "source"], typer.Option(callback=take_recipe, is_eager=True)] = "default"
