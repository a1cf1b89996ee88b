"""Loading a backbone by reference: timm, torchvision, transformers, or a factory in a Python file."""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import BackboneError, ConfigError, MaskpackError, UnknownNameError, require
from ..network import UnreachableError, library_calls, reach
from ..preprocess import ImagePreprocess, Preprocess, TextPreprocess
from ..redact import hides_secrets
from .head import Pooling, find_head, head_features
from .hf import is_vision, load_model, stated_preprocess, tower_name
from .random_init import PREFIX, parse_random, randomize
from .state import load_weights

LARGEST_IMAGE = 8192  # pixels
Task = Literal["image-classification", "text-classification"]


@dataclass(frozen=True, slots=True, eq=False)
class Backbone:
    """A frozen base model and what belongs to it.

    Attributes:
        model: in evaluation mode.
        id: where it comes from, as in "timm/resnet18.a1_in1k"; never a path.
        revision: Hub commit, torchvision weights enum, "random:KIND:SEED", or None.
        head: dotted name of the linear layer that gives the logits; None for an encoder.
        outside: modules that do not belong to the body: the head, or an encoder's unused pooler.
        preprocess: what the model expects of its inputs.
        tokenizer: of a text backbone, else None.
        pooling, normalize: how an encoder's output becomes one embedding; "projection" for a CLIP-like vision tower.
    """

    model: nn.Module
    id: str
    revision: str | None = None
    task: Task = "image-classification"
    head: str | None = None
    preprocess: Preprocess = field(default_factory=ImagePreprocess)
    tokenizer: Any = None
    pooling: Pooling | None = None
    normalize: bool = False

    @property
    def outside(self) -> tuple[str, ...]:
        """Modules that do not belong to the body: the head, or an encoder's unused pooler."""
        if self.head is not None:
            return (self.head,)
        return ("pooler",) if self.pooling is not None and hasattr(self.model, "pooler") else ()

    @property
    def features(self) -> int:
        """Number of features that go into the head.

        Raises:
            BackboneError: if there is no head, or it was removed and the model does not state its `num_features`.
        """
        if self.head is not None:
            return head_features(self.model, self.head)
        if self.pooling is None:
            raise BackboneError(f"the backbone {self.id} has no linear layer that could be its head; add one")
        config: Any = self.model.config
        projected = getattr(config, "projection_dim", None) if self.pooling == "projection" else None
        return int(projected or config.hidden_size)


def _timm(name: str, pretrained: bool, image_size: int | None) -> Backbone:
    timm = require("timm", "train", "loading timm backbones")
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('.')[0][:6]}*")[:5]
        raise UnknownNameError(f"timm has no model {name!r}; near: {', '.join(near) or 'see timm.list_models()'}")
    with library_calls() if pretrained else nullcontext():
        try:
            # only the families with a fixed token grid take img_size
            model = timm.create_model(name, pretrained=pretrained, **({"img_size": image_size} if image_size else {}))
        except TypeError:
            model = timm.create_model(name, pretrained=pretrained)
    config = timm.data.resolve_model_data_config(model)
    size = image_size or config["input_size"][-1]
    resize = size if image_size else round(size / config["crop_pct"])
    stated = getattr(model, "pretrained_cfg", None) or {}
    full = f"{stated.get('architecture', name)}.{stated['tag']}" if pretrained and stated.get("tag") else name
    interpolation: Any = config["interpolation"] if config["interpolation"] in ("nearest", "bicubic") else "bilinear"
    preprocess = ImagePreprocess(size, resize, interpolation, tuple(config["mean"]), tuple(config["std"]))
    return Backbone(model, f"timm/{full}", preprocess=preprocess)


def _torchvision(name: str, pretrained: bool, image_size: int | None) -> Backbone:
    models = require("torchvision.models", "train", "loading torchvision backbones")
    name, _, enum = name.partition("@")
    if name not in models.list_models():
        raise UnknownNameError(f"torchvision has no model {name!r}; known: {', '.join(models.list_models()[:8])}, …")
    known = models.get_model_weights(name)
    if enum and enum not in known.__members__:
        raise UnknownNameError(f"torchvision's {name} has no weights {enum!r}; known: {', '.join(known.__members__)}")
    weights = known[enum] if enum else known.DEFAULT
    stated = weights.transforms()
    size, resize = (image_size, image_size) if image_size else (stated.crop_size[0], stated.resize_size[0])
    preprocess = ImagePreprocess(size, resize, stated.interpolation.value, tuple(stated.mean), tuple(stated.std))
    if pretrained and not Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name).exists():
        reach(weights.url)  # torch would wait for minutes
    model = models.get_model(name, weights=weights if pretrained else None)
    return Backbone(model, f"torchvision/{name}", weights.name if pretrained else None, preprocess=preprocess)


def _transformers(name: str, pretrained: bool, image_size: int | None) -> Backbone:
    transformers = require("transformers", "train", "loading transformers backbones")
    repo, _, revision = name.partition("@")
    folder = Path(repo)
    local = folder.is_dir()
    if not local and repo.startswith(("/", ".", "~")):
        raise BackboneError(f"no folder {repo!r}; hf/ is followed by a Hub repository or an existing folder")
    with nullcontext() if local else library_calls():
        return _from_transformers(transformers, repo, None if local else revision or "main", pretrained, image_size)


def _from_transformers(
    transformers: Any, repo: str, revision: str | None, pretrained: bool, image_size: int | None
) -> Backbone:
    """Load a model and what belongs to it from a Hub repository at a revision, or from a folder where that is None."""
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    config = transformers.AutoConfig.from_pretrained(repo, **options)
    # a folder is named by its own name, never by its path
    id_ = f"hf/{Path(repo).resolve().name}" if revision is None else f"hf/{repo}"
    commit = None if revision is None else getattr(config, "_commit_hash", None)
    model = load_model(transformers, config, repo, pretrained, options)
    if is_vision(transformers, config):
        stated = stated_preprocess(transformers.AutoImageProcessor.from_pretrained(repo, **options), image_size)
        if tower_name(config) is None:
            return Backbone(model, id_, commit, preprocess=stated)
        return Backbone(model, id_, commit, preprocess=stated, pooling="projection", normalize=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(repo, **options)
    text = TextPreprocess(min(128, getattr(config, "max_position_embeddings", 128), int(tokenizer.model_max_length)))
    return Backbone(model, id_, commit, "text-classification", None, text, tokenizer, "mean", normalize=True)


def _factory(reference: str, image_size: int | None) -> Backbone:
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise BackboneError(f"no file {file!r}; a factory is given as PATH.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"maskpack_factory_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    make = getattr(module, name, None)
    if not callable(make):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownNameError(f"{path.name} has no function {name!r}; it has: {', '.join(known) or 'none'}")
    model = make()
    if not isinstance(model, nn.Module):
        raise BackboneError(f"{path.name}:{name} returned a {type(model).__name__}, expected a torch.nn.Module")
    preprocess = ImagePreprocess(**getattr(module, "PREPROCESS", {}))
    if image_size:
        preprocess = replace(preprocess, size=image_size, resize=image_size)
    return Backbone(model, f"{path.stem}:{name}", preprocess=preprocess)


def _make(reference: str, pretrained: bool, image_size: int | None) -> Backbone:
    kind, _, name = reference.partition("/")
    loaders: dict[str, Callable[[str, bool, int | None], Backbone]] = {
        "timm": _timm,
        "torchvision": _torchvision,
        "hf": _transformers,
    }
    if ".py:" in reference:
        return _factory(reference, image_size)
    if kind not in loaders or not name:
        raise BackboneError(
            f"cannot read the backbone {reference!r}; expected timm/NAME, torchvision/NAME, hf/REPO, hf/FOLDER or "
            f"PATH.py:FUNCTION"
        )
    return loaders[kind](name, pretrained, image_size)


@hides_secrets
def load_backbone(
    reference: str,
    *,
    weights: str | Path | None = None,
    random_weights: int | str | None = None,
    head: str | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Backbone:
    """Load a backbone in evaluation mode.

    Args:
        reference: `timm/NAME`, `torchvision/NAME[@WEIGHTS]`, `hf/REPO[@REVISION]`, `hf/FOLDER` or `PATH.py:FUNCTION`
            (which runs that file: only ever from the user's own command line, never from an adapter).
        weights: safetensors state dict to load strictly in place of the pretrained weights; its head may have other
            classes.
        random_weights: random weights in place of the pretrained ones: a seed for those that the library draws, or
            "kaiming:SEED" or "signed-constant:SEED" for those of `random_init`, which are the same everywhere.
        head: dotted name of the head, where it cannot be found.
        image_size: pixels, in place of the backbone's own.
        mean, std: normalisation per channel, in place of the backbone's own.

    Raises:
        BackboneError: if it cannot be loaded. UnknownNameError: if there is no such model or module.
        MissingDependencyError: if the library that has it is not installed.
    """
    if image_size is not None and not 1 <= image_size <= LARGEST_IMAGE:
        raise ConfigError(f"image_size must be from 1 to {LARGEST_IMAGE} pixels, got {image_size}")
    kind, seed = parse_random(str(random_weights)) if random_weights is not None else ("", 0)
    if random_weights is not None and weights is not None:
        raise ConfigError(f"weights {weights} and random_weights {random_weights} exclude each other; leave one out")
    with torch.random.fork_rng():
        try:
            if random_weights is not None:
                torch.manual_seed(seed)
            backbone = _make(reference, weights is None and random_weights is None, image_size)
        except MaskpackError:
            raise
        except UnreachableError as error:
            raise BackboneError(
                f"cannot load the backbone {reference!r}: it is not in the cache, and {error.host} cannot be reached "
                f"({error}); check network, proxy and HF_ENDPOINT, or give weights with --weights FILE.safetensors"
            ) from error
        except Exception as error:
            raise BackboneError(
                f"cannot load the backbone {reference!r}: {type(error).__name__}: {' '.join(str(error).split())}; if "
                f"its weights cannot be downloaded, give them with --weights FILE.safetensors"
            ) from error
    if kind:
        randomize(backbone.model, kind, seed)
        backbone = replace(backbone, revision=f"{PREFIX}{kind}:{seed}")
    if isinstance(backbone.preprocess, ImagePreprocess):
        stated = backbone.preprocess
        backbone = replace(
            backbone, preprocess=replace(stated, mean=tuple(mean or stated.mean), std=tuple(std or stated.std))
        )
    if backbone.pooling == "projection" and head is not None:
        raise BackboneError(f"{backbone.id} has its head behind the projection, not at {head!r}; leave out head")
    if backbone.pooling is None or head is not None:
        backbone = replace(backbone, head=find_head(backbone.model, head), pooling=None)
    if weights is not None:
        load_weights(backbone.model, weights, backbone.head)
    backbone.model.eval()
    return backbone
