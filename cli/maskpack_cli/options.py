"""Options are fields of dataclasses and parameters of verbs: name, type and default of the field are the option's.

A parameter of a verb whose type is a dataclass stands for an option of each field. The text of an option is in the
annotation, `Annotated[int, "Examples per forward pass."]`; of the library's settings, such as `TrainConfig`, it is in
the docstring of the class. What else typer knows of an option stands behind the text. Groups of options say what they
are by their fields.
"""

import inspect
import os
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import typer
from typer.models import OptionInfo, ParameterInfo

import maskpack
from maskpack import training
from maskpack.errors import BackboneError, ConfigError, StateError
from maskpack.preprocess import TASKS
from maskpack.training.config import RECIPES, Bytes, read_config

from .console import Output, doing, heard, importing, note, quiet_libraries

if TYPE_CHECKING:
    from maskpack.backbone.load import Backbone
    from maskpack.training.data.base import Data

# which may not stand in a settings file: they are of a call, not of a run
OF_A_CALL = ("config", "recipe", "tasks", "resume", "overwrite", "dry_run", "as_json", "quiet")
Channels = Annotated[tuple[float, ...], "channels"]


class Without:
    """Names of fields that are no options of a verb, and other defaults of those that are."""

    def __init__(self, *names: str, **defaults: Any):
        self.names, self.defaults = names, defaults


@dataclass_transform(kw_only_default=True, frozen_default=True)
def group(panel: str) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: make a dataclass whose fields are options, shown in this panel of the help."""

    def decorate(cls: type[Any]) -> type[Any]:
        cls.panel = panel
        return dataclass(frozen=True, kw_only=True)(cls)

    return decorate


def verb(app: typer.Typer, panel: str | None, *examples: str, name: str | None = None) -> Callable[..., Any]:
    """Decorator: add a function to a panel of an app as a verb with the options --json and --quiet."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(function).parameters.values()
        kinds = {one.name: _taken_apart(one.annotation) for one in parameters}
        groups: dict[str, tuple[Any, Any]] = {name: one for name, one in kinds.items() if is_dataclass(one[0])}
        # what a settings file turns on, the command line can turn off
        negatable = any(hasattr(kind, "config") for kind, _ in groups.values()) or "tasks" in kinds
        options = []
        for one in parameters:
            if one.name in groups:
                options += options_of(*groups[one.name], negatable=negatable)
            else:
                options.append(_option(one.name, one.annotation, one.default, negatable=negatable))
        options += options_of(Printed)

        def run(ctx: typer.Context, **values: Any) -> None:
            sources = {one: ctx.get_parameter_source(one) for one in values}
            Output.given = frozenset(
                one for one, source in sources.items() if source and source.name in ("COMMANDLINE", "DEFAULT_MAP")
            )
            Output.json, Output.quiet = values.pop("as_json"), values.pop("quiet")
            quiet_libraries()
            for name, (cls, extras) in groups.items():
                hints, left_out = get_type_hints(cls), _without(extras).names
                own = {one: _value(one, hints[one], values.pop(one)) for one in hints if one not in left_out}
                values[name] = cls(**{key: value for key, value in own.items() if value is not None})
            with heard(ctx.command_path):
                function(**{name: _value(name, kinds[name][0], value) for name, value in values.items()})

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        options.append(inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        epilog = "Examples:\n\n" + "\n\n".join(f"  {line}" for line in examples)
        app.command(name, epilog=epilog, rich_help_panel=panel)(run)
        return function

    return decorate


def _taken_apart(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the type of an annotation, and what else it says."""
    found = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    return found[0], found[1:]


def _first(kind: type[Any], among: tuple[Any, ...]) -> Any:
    return next((one for one in among if isinstance(one, kind)), None)


def described(cls: type[Any]) -> dict[str, tuple[str, str]]:
    """Return (panel, text) of every field of a class and its bases, by name.

    In a docstring a panel is a line that ends in a colon, with lines `name: text` below it that are indented once more.
    """
    found: dict[str, tuple[str, str]] = {}
    for one in cls.__mro__:
        own: dict[str, tuple[str, str]] = {}
        for name, annotation in inspect.get_annotations(one).items():
            text = _first(str, _taken_apart(annotation)[1])
            if text is not None:
                own[name] = (vars(one)["panel"], text)
        panel = name = ""
        for line in inspect.cleandoc(one.__doc__ or "").splitlines():
            if heading := re.fullmatch(r"(\w[\w ]*):", line):
                panel, name = heading[1], ""
            elif entry := re.fullmatch(r" {4}(\w+): (.+)", line):
                name = entry[1]
                own[name] = (panel, entry[2][0].upper() + entry[2][1:])
            elif name and line.startswith(" " * 8):
                own[name] = (panel, f"{own[name][1]} {line.strip()}")
        found = {**found, **{name: text for name, text in own.items() if name not in found}}
    return found


def options_of(cls: type[Any], extras: tuple[Any, ...] = (), negatable: bool = False) -> list[inspect.Parameter]:
    """Return the options that the fields of a dataclass are, as parameters for typer."""
    kinds, texts, without = get_type_hints(cls, include_extras=True), described(cls), _without(extras)
    defaults = {field.name: field.default for field in fields(cls)}
    if defaults.keys() != texts.keys():
        raise TypeError(f"{cls.__name__} must say what its fields are: {defaults.keys() ^ texts.keys()}")
    defaults |= without.defaults
    return [
        _option(name, kinds[name], defaults[name], text, panel, negatable)
        for name, (panel, text) in texts.items()
        if name not in without.names
    ]


def _without(extras: tuple[Any, ...]) -> Without:
    return _first(Without, extras) or Without()


def _option(
    name: str, annotation: Any, default: Any, text: str | None = None, panel: str | None = None, negatable: bool = False
) -> inspect.Parameter:
    """Return the option for a field or a parameter, as a parameter for typer."""
    kind, extras = _taken_apart(annotation)
    text, info = text or _first(str, extras) or "", copy(_first(ParameterInfo, extras))
    alone = next((one for one in (annotation, *get_args(annotation), *get_args(kind)) if one in PARSERS), None)
    if get_origin(kind) in (UnionType, Union):
        kind = Union[tuple(_taken_apart(one)[0] for one in get_args(kind))]  # noqa: UP007
    flag = f"--{name.replace('_', '-')}"
    if alone is not None:
        kind, info = Any, typer.Option(parser=PARSERS[alone], metavar=str(alone.__metadata__[0]).upper())
    elif get_origin(kind) is Mapping:
        kind, info = list[str], typer.Option(flag.removesuffix("s"), metavar="KEY=VALUE")
    elif several := next((one for one in (kind, *get_args(kind)) if get_origin(one) is tuple), None):
        kind, info = list[get_args(several)[0]], info or typer.Option(flag)  # type: ignore[misc]
    elif info is None:
        plus = kind is bool and negatable and name not in OF_A_CALL and not name.startswith("no_")
        info = typer.Option(f"{flag}/--no-{flag[2:]}" if plus else flag)
    if get_origin(kind) is list and isinstance(info, OptionInfo):
        text = f"{text} May be repeated."
        default = None if default == () or default is MISSING else default
    if default == "default":  # "[default: default]" says nothing
        info.show_default = f"the {name} default"
    info.help, info.rich_help_panel = text, info.rich_help_panel or panel
    default = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _value(name: str, kind: Any, value: Any) -> Any:
    """Return what an option got as a value of the field's type."""
    if get_origin(kind) is tuple:
        return tuple(value or ())
    if any(get_origin(one) is tuple for one in get_args(kind)):
        return tuple(value) if value else None
    if get_origin(kind) is not Mapping:
        return value
    pairs = [one.partition("=") for one in value or ()]
    if not all(mark for _, mark, _ in pairs):
        raise ConfigError(f"--{name.removesuffix('s').replace('_', '-')} must be KEY=VALUE, got {value}")
    return {key: text for key, _, text in pairs}


def read_settings(ctx: typer.Context, parameter: typer.CallbackParam, file: Path | None) -> Path | None:
    """Callback of --config and TASKS.toml: let the keys of the file stand for options that are not given.

    A file of tasks has tables [[task]] too.
    """
    stored = {} if file is None or ctx.resilient_parsing else read_config(file)
    known = _storable(ctx)
    tables = ["task"] if parameter.name == "tasks" else []
    for key in stored:
        if key not in known and key not in tables:
            names = [*(f"the tables [[{one}]]" for one in tables), *(one.replace("_", "-") for one in known)]
            raise ConfigError(f"{file} has the setting {key!r}, which cannot stand there; known: {', '.join(names)}")
    ctx.default_map = {**(ctx.default_map or {}), **_as_texts(stored, known)}
    return file


def take_recipe(ctx: typer.Context, name: str) -> str:
    """Callback of --recipe: let its settings stand for the options that file and command line leave open."""
    ctx.default_map = {**_as_texts(RECIPES[name], _storable(ctx)), **(ctx.default_map or {})}
    return name


def _storable(ctx: typer.Context) -> dict[str, Any]:
    """Return the parameters of a verb that may stand in a settings file, by the name that they have there."""
    options = [one for one in ctx.command.params if one.name not in (*OF_A_CALL, "help", "ctx")]
    return {one.opts[0].removeprefix("--").replace("-", "_"): one for one in options}


def _as_texts(stored: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among known parameters, by parameter, as they would be written on the command line."""
    found: dict[str, Any] = {}
    for key, value in stored.items():
        if key in known:
            values = [f"{name}={one}" for name, one in value.items()] if isinstance(value, dict) else value
            texts = [str(one) for one in values] if isinstance(values, list | tuple) else [str(values)]
            flag = isinstance(value, bool) and getattr(known[key], "is_flag", False)
            found[known[key].name] = value if flag else texts if known[key].multiple else ",".join(texts)
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
ARGUMENT = typer.Argument()
POSITIVE = typer.Option(min=1)
Ref = Annotated[str, "user/name or user/name@revision, a folder, or a .safetensors file.", ARGUMENT]
DataRef = Annotated[
    str,
    "Hub data set, file or folder (parquet, csv, JSON lines, text, images), or digits:0-9.",
    typer.Option(rich_help_panel="Data"),
]
OutputRef = Annotated[Path, "Folder to write, or a .safetensors file."]
Overwrite = Annotated[bool, "Replace what is there."]
Device = Annotated[str | None, "As in cpu, cuda, cuda:1 or mps. Default: a GPU where there is one."]
BatchSize = Annotated[int, "Examples per forward pass.", POSITIVE]
Mode = Annotated[Literal["target", "source"], "Which of the two networks of an adapter of `maskpack transfer`."]
Token = Annotated[str | None, "Hub token; better: `hf auth login` or the variable HF_TOKEN."]


@group("Options")
class Printed:
    as_json: Annotated[bool, "Print the result as JSON.", typer.Option("--json")] = False
    quiet: Annotated[bool, "Print the result only: no notes, no progress.", typer.Option("--quiet", "-q")] = False


@group("Packing")
class Packed:
    profile: Annotated[
        Profile,
        "fast is quick; default is small and decodes quickly; max is smallest and slow, and may need the backbone to "
        "decode.",
    ] = "default"


@group("Packing")
class Packing(Packed):
    codec: Annotated[str | None, "Only this codec: `maskpack list codecs`."] = None


@group("Adapter")
class Trust:
    """Options that say which adapters are accepted."""

    require_revision: Annotated[bool, "Refuse what can change: branches, and no revision at all."] = False
    require_signature: Annotated[
        str | None,
        "Who must have signed it: a public key (PEM), a folder of keys, or an identity NAME@https://ISSUER. Default: "
        "MASKPACK_REQUIRE_SIGNATURE.",
    ] = None
    token: Token = None

    def load(self, ref: str) -> "maskpack.Adapter":
        """Read an adapter."""
        return maskpack.load_adapter(ref, **vars(self))


@group("Adapter")
class Source(Trust):
    """Options for an adapter's revision, and for whether it is accepted."""

    revision: Annotated[str | None, "Branch, tag or commit on the Hub."] = None


@group("Backbone")
class Weights:
    weights: Annotated[Path | None, "Safetensors state dict in place of pretrained weights: file, index, folder."] = (
        None
    )
    random_weights: Annotated[str | None, "Random weights instead: SEED, kaiming:SEED or signed-constant:SEED."] = None


def check_free(output: Path, overwrite: bool) -> None:
    """Refuse an output that cannot be written, or would replace what is there, before any work is done."""
    from maskpack.adapter.read import MODEL_FILE

    file = output if output.suffix in (".safetensors", ".html", ".toml") else output / MODEL_FILE
    if file.exists() and not overwrite:
        raise StateError(f"{file} is there already; choose another name, or replace it with --overwrite")
    folder = next(one for one in file.absolute().parents if one.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise StateError(f"cannot write {file}: {folder} is no folder that you may write to; choose another")


def reference(output: Path) -> str:
    """Return what verbs take for the adapter in a folder or file."""
    return str(output) if output.is_absolute() or str(output).startswith(".") else f"./{output}"


def use_device(name: str | None) -> None:
    """Choose the device of training and evaluation; None: the environment's choice, else a GPU where there is one."""
    import torch

    if name is None:
        return
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device {name} cannot be used: {str(error).splitlines()[0]}; give cpu, or a device that torch has here"
        ) from None
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    os.environ["ACCELERATE_USE_CPU"] = str(device.type == "cpu").lower()


def placed(backbone: "Backbone") -> "Backbone":
    """Move a backbone, before anything is loaded into it, to the device on which training would run."""
    import torch

    device = os.environ.get("ACCELERATE_TORCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    backbone.model.to("cpu" if on_cpu else device)
    return backbone


@group("Backbone")
class Base(Weights):
    """The backbone that an adapter is for."""

    backbone: Annotated[
        str | None,
        "timm/NAME, torchvision/NAME, hf/REPO, hf/FOLDER or PATH.py:FUNCTION. Default: the adapter's base, or the "
        "backbone with its weights that was used here before.",
    ] = None
    device: Device = None

    @importing()
    def of(self, adapter: "maskpack.Adapter", mapped: bool = False) -> "Backbone":
        """Load the backbone of an adapter; with random weights if the adapter names them and there are no others."""
        from maskpack.backbone.fingerprint import remembered_backbone

        use_device(self.device)
        reference, random, weights = self.backbone, self.random_weights, self.weights
        base, revision = adapter.base.id, adapter.base.revision or ""
        drawn = revision.startswith("random:")
        if drawn and self.weights is None:
            random = random or revision.removeprefix("random:")
        if reference is None:
            # only libraries' own models: a file's factory is never run because an adapter names it
            named = base.startswith(("timm/", "torchvision/", "hf/")) and (base[:3] != "hf/" or base.count("/") == 2)
            reference = f"{base}@{revision}" if revision and not drawn and not base.startswith("timm/") else base
            known = remembered_backbone(adapter.base.digests.get("float32", ""))
            if known is not None and self.weights is None and self.random_weights is None:
                reference, weights, random = known["reference"], known["weights"], known["random_weights"]
                note(f"The backbone {reference} was used here before, with the weights of this adapter's base.")
            elif not named:
                raise BackboneError(
                    f"the adapter's base {base!r} cannot be fetched by its name; give it with --backbone"
                )
        size = (adapter.about.preprocess or {}).get("size")
        task = next((one for one in TASKS if one == adapter.about.task), None)
        options: dict[str, Any] = {"weights": weights, "random_weights": random, "image_size": size, "task": task}
        with doing(f"Loading {reference} …"):
            backbone = maskpack.load_backbone(reference, mapped=mapped, **options)
            return backbone if mapped else placed(backbone)

    def loaded(self, adapter: "maskpack.Adapter", **options: Any) -> "Backbone":
        """Load the backbone and the adapter; later verbs find a backbone that was given, and was the right one."""
        backbone = self.of(adapter)
        maskpack.load_mask(backbone.model, adapter, **options)
        self.remember(adapter)
        return backbone

    def remember(self, adapter: "maskpack.Adapter") -> None:
        """Write down that the backbone given is the base of an adapter, which was loaded onto it."""
        from maskpack.backbone.fingerprint import remember_backbone

        if self.backbone is not None and "float32" in adapter.base.digests:
            given = {"reference": self.backbone, "weights": self.weights, "random_weights": self.random_weights}
            remember_backbone(adapter.base.digests["float32"], given)


@group("Backbone")
class AnyBase(Base):
    """Options for the backbone of an adapter, or for a backbone alone."""

    head: Annotated[str | None, "Of a backbone alone: module that gives the logits, where it is not found."] = None
    image_size: Annotated[int | None, "Of a backbone alone: pixels. Default: its own."] = None

    def check(self, alone: bool, missing: str) -> None:
        """Refuse options that are not for what there is, a backbone alone or an adapter; `missing`: without either."""
        if alone and self.backbone is None:
            raise ConfigError(missing)
        if not alone and (self.head is not None or self.image_size is not None):
            raise ConfigError("--head and --image-size are for a backbone alone; an adapter has its own")

    @importing()
    def of_any(self, adapter: "maskpack.Adapter | None") -> "Backbone":
        """Load the backbone of an adapter, or the one alone."""
        if adapter is not None:
            return self.of(adapter)
        options = dict(vars(self))
        use_device(options.pop("device"))
        return placed(maskpack.load_backbone(options.pop("backbone"), **options))


@group("Backbone")
class PackedBase(Base):
    """Options for the base, where masks are packed with its weights."""

    backbone: Annotated[str | None, "The adapters' base, where masks are packed with its weights, or are to be."] = None

    def model_of(self, adapter: "maskpack.Adapter") -> Any:
        """Return the base of an adapter, None if the options name none."""
        return None if self.backbone is None else self.of(adapter).model


@group("Backbone")
class TrainedBackbone(Weights):
    backbone: Annotated[str, "timm/NAME, torchvision/NAME, hf/REPO, hf/FOLDER or PATH.py:FUNCTION."]
    head: Annotated[str | None, "Module that gives the logits, where it is not found."] = None
    image_size: Annotated[int | None, "Pixels. Default: the backbone's."] = None
    mean: Annotated[Channels | None, "Three numbers joined by commas. Default: the backbone's."] = None
    std: Annotated[Channels | None, "Three numbers joined by commas. Default: the backbone's."] = None
    device: Device = None

    def arguments(self) -> dict[str, Any]:
        """Return what is given of these, as arguments of `load_backbone`."""
        options = {name: value for name, value in vars(self).items() if value is not None}
        options.pop("device", None)
        return {"reference": options.pop("backbone"), **options}

    @importing()
    def load(self, **options: Any) -> "Backbone":
        """Load it; `options` are others of `load_backbone`."""
        use_device(self.device)
        return maskpack.load_backbone(**self.arguments(), **options)


@group("Data")
class Columns:
    input_column: Annotated[str | None, "Column of images or texts, where it is not found."] = None
    label_column: Annotated[str | None, "Column of labels, where it is not found."] = None


@group("Data")
class Rows(Columns):
    labels_fraction: Annotated[float, "Share of the training rows to use."] = 1.0
    validation: Annotated[str | None, "Rows to validate on: a data set, file or folder, as --data."] = None
    validation_fraction: Annotated[
        float | None,
        "Share of these rows held out. Default: none where the data have a validation split beside a test split, which "
        "is taken then; else 0.1, or 0 without labels.",
    ] = None

    def load(self, data: str, supervised: bool = True, **options: Any) -> "Data":
        """Read data; by default an objective without labels holds no rows out."""
        from maskpack.training.data.base import hold_out

        if self.validation is not None and self.validation_fraction is not None:
            raise ConfigError("--validation names the rows that --validation-fraction would draw; give one of them")
        given = {**vars(self), **options}
        given.pop("validation")
        read = training.load_data(data, **given)
        if self.validation is not None:
            given |= {"labels_fraction": 1.0, "class_names": read.class_names or None}
            own = training.load_data(self.validation, **given)
            found = next(one for one in (own.validation, own.test, own.train) if one is not None)
            return replace(read, validation=found)
        if self.validation_fraction is None and supervised and read.train is not None and read.validation is None:
            train, held = hold_out(read.train, 0.1, options.get("seed", 0))
            read = replace(read, train=train, validation=held)
        return read


@group("Run")
class Folder:
    """Options for the folder of results and the file of settings."""

    output: Annotated[Path, "Folder for the adapter, the checkpoint and the logs."]
    config: Annotated[
        Path | None,
        "TOML file with these options as keys; the command line overrides it.",
        typer.Option(callback=read_settings, is_eager=True),
    ] = None
    recipe: Annotated[
        Literal["default", "source"],
        "default, or source: the settings of Self-Masking Networks as published; file and command line override them.",
        typer.Option(callback=take_recipe, is_eager=True),
    ] = "default"
