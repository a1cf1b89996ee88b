"""Load a backbone: from timm, torchvision, transformers or a Python file, with pretrained, own or random weights."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackboneError, ConfigError, MaskpackError, UnknownNameError, check_argument, require
from ..mask import Shape
from ..network import UnreachableError, hides_secrets, library_calls, reach
from ..preprocess import IMAGENET_MEAN, IMAGENET_STD, LARGEST, ImagePreprocess, Preprocess, TaskName, TextPreprocess
from ..safetensors_io import INDEX, SUFFIX, read_tensors, write_tensors
from .model import (
    RANDOM,
    STATISTICS,
    Embedding,
    Head,
    aliases,
    canonical,
    exact_cast,
    find_head,
    named_buffers,
    named_parameters,
    parse_random,
    random_values,
    slots,
    swap_module,
    tied_outputs,
    unwrap,
)

TOKENS, BLOCK = 128, 512  # of a text, and of a language model's block, where nothing else is asked for


@dataclass(frozen=True, slots=True, eq=False)
class Backbone:
    """A frozen base model and what belongs to it.

    Attributes:
        model: in evaluation mode.
        id: where it comes from, as in "timm/resnet18.a1_in1k"; never a path.
        revision: Hub commit, torchvision weights enum, "random:KIND:SEED", or None.
        embedding: the input of its head, or an encoder's pooled output; `Embedding()` if it has no head.
        preprocess: what the model expects of its inputs. tokenizer: of a text backbone, else None.

    Example:
        backbone = Backbone(model, "my-network", embedding=Embedding("fc"), preprocess=ImagePreprocess(32, 32))
    """

    model: nn.Module
    id: str
    revision: str | None = None
    task: TaskName = "image-classification"
    embedding: Embedding = field(default_factory=Embedding)
    preprocess: Preprocess = field(default_factory=ImagePreprocess)
    tokenizer: Any = None

    def __repr__(self) -> str:
        return f"Backbone({self.id!r}, {type(self.model).__name__}, {self.task}, head={self.head!r})"

    @property
    def head(self) -> str | None:
        """Dotted name of the linear layer that gives the logits; None for an encoder."""
        return self.embedding.module

    @property
    def outside(self) -> tuple[str, ...]:
        """Modules that do not belong to the body: the head, or what an encoder has behind it, and its unused pooler.

        Without head and encoder they are the output layers whose tensors are the embedding's.
        """
        if self.head is not None:
            return (self.head,)
        if self.embedding.pooling not in ("mean", "cls", "tokens"):
            return tuple(tied_outputs(self.model))
        inner = encoder_of(self.model)
        place = next((f"{name}." for name, one in self.model.named_children() if one is inner), "")
        beside = (name for name, _ in self.model.named_children() if place and f"{name}." != place)
        return (*beside, *([f"{place}pooler"] if hasattr(inner, "pooler") else []))

    @property
    def linear(self) -> nn.Linear | None:
        """The linear layer that gives the logits; None for an encoder, or if it was removed."""
        own = None if self.head is None else unwrap(self.model).get_submodule(self.head)
        return own if isinstance(own, nn.Linear) else None

    def head_for(self, classes: int, use: str, advice: str) -> nn.Linear:
        """Return the head of the model, which must be linear and for so many classes, or raise ConfigError."""
        own = self.linear
        if own is None or own.out_features != classes:
            found = "no linear head" if own is None else f"a head for {own.out_features} classes"
            raise ConfigError(f"{use}, and {self.id} has {found}, the data have {classes} classes; {advice}")
        return own

    @property
    def features(self) -> int:
        """Number of features that go into the head; BackboneError if it is not known."""
        if self.linear is not None:
            return self.linear.in_features
        if self.head is not None:
            stated = getattr(unwrap(self.model), "num_features", None)
            if not isinstance(stated, int):
                raise BackboneError(
                    f"the head {self.head!r} was removed and num_features is not stated; load the whole model"
                )
            return stated
        if self.embedding.pooling is None:
            raise BackboneError(f"the backbone {self.id} has no linear layer that could be its head; add one")
        config: Any = self.model.config
        projected = getattr(config, "projection_dim", None) if self.embedding.pooling == "projection" else None
        return int(projected or config.hidden_size)


def encoder_of(model: nn.Module) -> nn.Module:
    """Return the part of a model of transformers that gives hidden states; the model itself where it is one."""
    found = getattr(model, "base_model", model)
    return found if isinstance(found, nn.Module) else model


def export_state(
    path: str | Path, model: nn.Module, metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
) -> int:
    """Write a model's state dict as a safetensors file, and return the number of tensors.

    Tied tensors are written under each of their names, so that the file loads strictly. Those that lose nothing by it
    are written in `dtype`.
    """
    state = unwrap(model).state_dict()
    tensors = {canonical(name): tensor.cpu() for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point():
            cast = exact_cast(tensor, dtype)
            tensors[name] = tensor if cast is None else cast
    write_tensors(path, tensors, {"format": "pt", **(metadata or {})})
    return len(tensors)


COUNTER = "num_batches_tracked"  # of BatchNorm; it has no effect on what is computed


def load_weights(model: nn.Module, path: str | Path, head: str | None = None, mapped: bool = False) -> None:
    """Load a safetensors state dict into a model, strictly; its head may have other classes in the file.

    `path` is a file, the index of one in several files (`*.safetensors.index.json`), or a folder of either. With
    `mapped` the file's tensors become the model's, in their dtypes; they are read from the file where they are used.
    """
    load_tensors(model, read_tensors(path), path, head, mapped)


def load_tensors(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, head: str | None = None, mapped: bool = False
) -> None:
    """Load the tensors of a state dict, which came from `path`; as `load_weights`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if head is not None:
        fit_head(model, head, shapes)
    stored = sources(model, shapes, path)
    model = unwrap(model)
    if mapped:
        parameters = dict[str, nn.Parameter]()  # by source: tied ones stay one
        for name, (owner, leaf) in slots(model):
            if (source := stored.get(name)) is not None:
                own = state[source]
                if isinstance(owner[leaf], nn.Parameter):
                    own = parameters.setdefault(source, nn.Parameter(own, own.is_floating_point()))
                owner[leaf] = own
        return
    wanted = {name: stored.get(canonical(name)) for name in model.state_dict()}
    model.load_state_dict({name: state[source] for name, source in wanted.items() if source is not None}, strict=True)


def sources(model: nn.Module, shapes: Mapping[str, Shape], path: str | Path) -> dict[str, str]:
    """Map each canonical name of a model's state dict to the tensor of a file, of these shapes, that it is loaded from.

    A tied tensor may have one of its names in the file, as Hugging Face writes it, and all names the prefix of the
    model that was saved, or none. The counters of BatchNorm may be missing, as in files of old PyTorch; they stay.
    Raises BackboneError if names or shapes differ.
    """
    own = {canonical(name): tensor for name, tensor in unwrap(model).state_dict(keep_vars=True).items()}
    first, names = aliases(model), {inside: name for name, inside in _renamed(model, shapes).items()}
    shapes = {inside: shapes[name] for inside, name in names.items()}
    present: dict[str, str] = {}
    for name in sorted(own.keys() & shapes.keys()):
        present.setdefault(first.get(name, name), name)
    sought = {name: name if name in shapes else present.get(first.get(name, name)) for name in own}
    found = {name: source for name, source in sought.items() if source is not None}
    missing = sorted(name for name in own.keys() - found.keys() if not name.endswith(COUNTER))
    unexpected = sorted(shapes.keys() - own.keys())
    other = [
        f"{name}: {shapes[source]} in the file, {tuple(own[name].shape)} in the model"
        for name, source in found.items()
        if shapes[source] != tuple(own[name].shape)
    ]
    if missing or unexpected or other:
        raise BackboneError(
            f"the weights in {path} do not fit the model: {len(missing)} missing {missing[:3]}, {len(unexpected)} "
            f"unexpected {unexpected[:3]}, {len(other)} of another shape {other[:3]}"
        )
    return {name: names[source] for name, source in found.items()}


def _renamed(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Return a model's name for each name in a file, with or without the prefix of a body in transformers."""
    own = {canonical(name) for name in unwrap(model).state_dict()}
    prefix, free = f"{getattr(unwrap(model), 'base_model_prefix', '')}.", own - set(names)
    tried = {one: (one.removeprefix(prefix), prefix + one) for one in names if one not in own}
    return {one: next((other for other in tried.get(one, ()) if other in free), one) for one in names}


def fit_head(model: nn.Module, head: str, shapes: Mapping[str, Shape]) -> None:
    """Give a model a linear head for as many classes as a state dict of these shapes has weights for."""
    own, weight = unwrap(model).get_submodule(head), shapes.get(f"{head}.weight", ())
    bias = f"{head}.bias" in shapes
    if len(weight) != 2 or not isinstance(own, nn.Linear) or weight[1] != own.in_features:
        return
    had = own.bias is not None
    if bias >= had and (weight[0] != own.out_features or bias != had):
        swap_module(model, head, nn.Linear(own.in_features, weight[0], bias, own.weight.device, own.weight.dtype))


@torch.no_grad()
def randomize(model: nn.Module, kind: str, seed: int) -> None:
    """Set a model's weights to those of a kind and a seed (docs/format.md section 3.1).

    Weights of two dimensions and more become random, those of one dimension (norms) 1, biases 0, BatchNorm statistics
    0 and 1. Other tensors stay as constructed.
    """
    parameters = named_parameters(model)
    for name in sorted(set(aliases(model).values())):
        parameter, leaf = parameters[name], name.rpartition(".")[2]
        if leaf.endswith("bias"):
            parameter.zero_()
        elif leaf.endswith("weight") and parameter.ndim > 1:
            parameter.copy_(random_values(name, tuple(parameter.shape), kind, seed))
        elif leaf.endswith("weight"):
            parameter.fill_(1.0)
    for name, buffer in named_buffers(model).items():
        if name.endswith(STATISTICS):
            buffer.fill_(float(name.endswith("running_var")))


# CLIP-like models by type: the vision tower whose output has the image's embedding in the space of the texts'
TOWERS = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
RESAMPLING: dict[int, Any] = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def _timm(name: str, pretrained: bool, image_size: int | None, task: TaskName | None) -> Backbone:
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
    size, stated = config["input_size"][-1], getattr(model, "pretrained_cfg", None) or {}
    full = f"{stated.get('architecture', name)}.{stated['tag']}" if pretrained and stated.get("tag") else name
    interpolation: Any = config["interpolation"] if config["interpolation"] in ("nearest", "bicubic") else "bilinear"
    resize, mean, std = round(size / config["crop_pct"]), tuple(config["mean"]), tuple(config["std"])
    return Backbone(model, f"timm/{full}", preprocess=ImagePreprocess(size, resize, interpolation, mean, std))


def _channels_last(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a model's inputs, images on a CPU with channels last in memory: convolutions are faster there.

    Not for networks of users, which may flatten by `view`; it needs channels first.
    """
    images = inputs[0]
    if images.dim() != 4 or images.device.type != "cpu":
        return inputs
    return (images.contiguous(memory_format=torch.channels_last), *inputs[1:])


def _torchvision(name: str, pretrained: bool, image_size: int | None, task: TaskName | None) -> Backbone:
    models = require("torchvision.models", "train", "loading torchvision backbones")
    name, _, enum = name.partition("@")
    if name not in models.list_models():
        raise UnknownNameError(f"torchvision has no model {name!r}; known: {', '.join(models.list_models()[:8])}, …")
    known = models.get_model_weights(name)
    if enum and enum not in known.__members__:
        raise UnknownNameError(f"torchvision's {name} has no weights {enum!r}; known: {', '.join(known.__members__)}")
    weights = known[enum] if enum else known.DEFAULT
    stated = weights.transforms()
    size, resize, mean, std = stated.crop_size[0], stated.resize_size[0], tuple(stated.mean), tuple(stated.std)
    if pretrained and not Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name).exists():
        reach(weights.url)  # torch would wait for minutes
    model = models.get_model(name, weights=weights if pretrained else None)
    preprocess = ImagePreprocess(size, resize, stated.interpolation.value, mean, std)
    return Backbone(model, f"torchvision/{name}", weights.name if pretrained else None, preprocess=preprocess)


def _transformers(name: str, pretrained: bool, image_size: int | None, task: TaskName | None) -> Backbone:
    transformers = require("transformers", "train", "loading transformers backbones")
    repo, _, revision = name.partition("@")
    local = Path(repo).is_dir()
    if not local and repo.startswith(("/", ".", "~")):
        raise BackboneError(f"no folder {repo!r}; hf/ is followed by a Hub repository or an existing folder")
    options: dict[str, Any] = {} if local else {"revision": revision or "main"}
    with nullcontext() if local else library_calls():
        config = transformers.AutoConfig.from_pretrained(repo, **options)
        # a folder is named by its own name, never by its path
        id_ = f"hf/{Path(repo).resolve().name if local else repo}"
        commit = None if local else getattr(config, "_commit_hash", None)
        tower = TOWERS.get(config.model_type.removesuffix("_vision_model"))
        classifiers = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        vision = tower is not None or config.model_type in classifiers
        named = (getattr(transformers, one, None) for one in config.architectures or ())
        cls = transformers.AutoModelForImageClassification if vision else next(filter(None, named), None)
        usual = transformers.AutoModelForCausalLM if task == "text-generation" else transformers.AutoModel
        cls = cls or usual  # code of its own, or a config that names no class
        if pretrained:
            # float32 whatever the file holds: the scores learn from full-precision products
            cls = getattr(transformers, tower) if tower else cls
            model = cls.from_pretrained(repo, dtype=torch.float32, **options)
        elif tower:
            model = getattr(transformers, tower)(getattr(config, "vision_config", config))
        else:
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
        if vision:
            processor = transformers.AutoImageProcessor.from_pretrained(repo, **options)
            embedding = Embedding(None, "projection", True) if tower else Embedding()
            return Backbone(
                model, id_, commit, embedding=embedding, preprocess=_stated_preprocess(processor, image_size)
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(repo, **options)
        if tokenizer.pad_token is None:  # as of language models; what is behind a text is never looked at
            tokenizer.pad_token = tokenizer.eos_token
        tokens = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS), int(tokenizer.model_max_length))
        embedding = Embedding(None, "mean", True)
        return Backbone(model, id_, commit, "text-classification", embedding, TextPreprocess(tokens), tokenizer)


def _mapped(name: str, image_size: int | None, task: TaskName | None) -> Backbone | None:
    """Return the backbone of a folder or of the Hub with its weights left in the file; None if they do not fit by name.

    As `from_pretrained` has it, all names may have the model's prefix in front, and others are left out.
    """
    file = Path(name) if Path(name).is_dir() else _fetched(name)
    if file is None or (file.is_dir() and not any(file.glob(f"*{SUFFIX}"))):
        return None
    with torch.device("meta"):
        backbone = _transformers(name, False, image_size, task)
    state, own = read_tensors(file), {canonical(one) for one in backbone.model.state_dict()}
    names = _renamed(backbone.model, state)
    try:
        load_tensors(backbone.model, {n: state[one] for one, n in names.items() if n in own}, name, mapped=True)
    except BackboneError:  # of a layout that transformers converts
        return None
    return backbone


def _fetched(name: str) -> Path | None:
    """Return the safetensors file of a Hub repository, or the index of several, in the cache; None if it has none."""
    hub = require("transformers", "train", "loading transformers backbones").utils.hub
    repo, _, revision = name.partition("@")
    if repo.startswith(("/", ".", "~")):  # a folder that is not there, which is told later
        return None
    options: dict[str, Any] = {"revision": revision or "main"}
    with library_calls():
        for file in (f"model{SUFFIX}", f"model{INDEX}"):
            found = hub.cached_file(repo, file, **options, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                if file.endswith(INDEX):
                    hub.get_checkpoint_shard_files(repo, found, **options)
                return Path(found)
    return None


def _stated_preprocess(processor: Any, image_size: int | None) -> ImagePreprocess:
    resize = image_size or processor.size.get("shortest_edge") or processor.size["height"]
    crop = processor.crop_size["height"] if not image_size and getattr(processor, "do_center_crop", False) else resize
    mean, std = tuple(processor.image_mean or IMAGENET_MEAN), tuple(processor.image_std or IMAGENET_STD)
    return ImagePreprocess(crop, max(resize, crop), RESAMPLING.get(int(processor.resample), "bilinear"), mean, std)


def _python_file(reference: str, pretrained: bool, image_size: int | None, task: TaskName | None) -> Backbone:
    """Call the function of "PATH.py:FUNCTION", which makes its weights itself."""
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
    return Backbone(model, f"{path.stem}:{name}", preprocess=ImagePreprocess(**getattr(module, "PREPROCESS", {})))


Loader = Callable[[str, bool, int | None, TaskName | None], Backbone]  # of name, pretrained, image size in pixels, task
LOADERS: Mapping[str, Loader] = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}


def _loader(reference: str) -> tuple[Loader, str]:
    """Return the loader of a reference and the name that it takes."""
    kind, _, name = reference.partition("/")
    if ".py:" in reference:
        return _python_file, reference
    if kind not in LOADERS or not name:
        raise BackboneError(
            f"cannot read the backbone {reference!r}; expected timm/, torchvision/ or hf/ and a name, or "
            "PATH.py:FUNCTION"
        )
    return LOADERS[kind], name


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
    mapped: bool = False,
    task: TaskName | None = None,
    tokens: int | None = None,
) -> Backbone:
    """Load a backbone in evaluation mode; BackboneError if it cannot be loaded.

    Args:
        reference: `timm/NAME`, `torchvision/NAME[@WEIGHTS]`, `hf/REPO[@REVISION]`, `hf/FOLDER` or `PATH.py:FUNCTION`,
            which runs that file. It must come from the user, never from an adapter.
        weights: safetensors state dict, loaded strictly in place of the pretrained weights; its head may have other
            classes.
        random_weights: in place of the pretrained weights: a seed for the library's own initialisation, or
            "kaiming:SEED" or "signed-constant:SEED", which are the same everywhere.
        head: dotted name of the head, if it cannot be found.
        image_size: pixels, in place of the backbone's own. mean, std: normalisation per channel, likewise.
        mapped: leave weights that are in a file on this disk (`weights`, or those of `hf/`) there, in its dtypes, and
            read them where they are used: for what looks at each tensor once. The model cannot compute.
        task: what a backbone for texts is for; default: text classification.
        tokens: of a text, at most, or of a block of texts; default: 128, and 512 for
            text-generation, or fewer if the backbone takes fewer.

    Example:
        backbone = load_backbone("timm/resnet18.a1_in1k")
        print(backbone.model(torch.rand(1, 3, 224, 224)).shape)
    """
    known = "timm/NAME, torchvision/NAME, hf/REPO or PATH.py:FUNCTION"
    check_argument("the backbone", reference, str, known, "a model of your own goes to train_mask as it is")
    if image_size is not None and not 1 <= image_size <= LARGEST:
        raise ConfigError(f"image_size must be from 1 to {LARGEST} pixels, got {image_size}")
    kind, seed = parse_random(str(random_weights)) if random_weights is not None else ("", 0)
    if random_weights is not None and weights is not None:
        raise ConfigError(f"weights {weights} and random_weights {random_weights} are mutually exclusive")
    with torch.random.fork_rng():
        try:
            if random_weights is not None:
                torch.manual_seed(seed)
            loader, name = _loader(reference)
            pretrained = weights is None and random_weights is None
            backbone = _mapped(name, image_size, task) if mapped and pretrained and loader is _transformers else None
            if backbone is None:
                with torch.device("meta") if mapped and weights is not None else nullcontext():
                    backbone = loader(name, pretrained, image_size, task)
                if loader is not _transformers and loader in LOADERS.values():
                    backbone.model.register_forward_pre_hook(_channels_last)
        except MaskpackError:
            raise
        except UnreachableError as error:
            raise BackboneError(
                f"cannot load the backbone {reference!r}: it is not in the cache, and {error.host} cannot be reached "
                f"({error}); check network, proxy and HF_ENDPOINT, or give weights with --weights FILE.safetensors"
            ) from error
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            file = Path(reference.rpartition(":")[0])
            frames = traceback.extract_tb(error.__traceback__) if file.is_file() else ()
            if own := [one for one in frames if Path(one.filename) == file.absolute()]:
                raise BackboneError(
                    f"cannot load the backbone {reference!r}: line {own[-1].lineno}, {own[-1].line!r:.200}, raised "
                    f"{said}"
                ) from error
            advice = "if its weights cannot be downloaded, give them with --weights FILE.safetensors"
            if loader is _transformers and Path(name).is_dir():
                advice = "its folder needs config.json and the files of its tokenizer or image processor"
            raise BackboneError(f"cannot load the backbone {reference!r}: {said}; {advice}") from error
    if kind:
        randomize(backbone.model, kind, seed)
        backbone = replace(backbone, revision=f"{RANDOM}{kind}:{seed}")
    if isinstance(stated := backbone.preprocess, ImagePreprocess):
        size, resize = image_size or stated.size, image_size or stated.resize
        preprocess = ImagePreprocess(
            size, resize, stated.interpolation, tuple(mean or stated.mean), tuple(std or stated.std)
        )
        backbone = replace(backbone, preprocess=preprocess)
    if backbone.embedding.pooling == "projection" and head is not None:
        raise BackboneError(f"{backbone.id} has its head behind the projection, not at {head!r}; leave out head")
    if task is not None or tokens is not None:
        backbone = _for_task(backbone, task or backbone.task, tokens)
    if (backbone.embedding.pooling is None and backbone.task != "text-generation") or head is not None:
        backbone = replace(backbone, embedding=Embedding(find_head(backbone.model, head)))
    if weights is not None:
        load_weights(backbone.model, weights, backbone.head, mapped)
    backbone.model.eval()
    return backbone


def _for_task(backbone: Backbone, task: TaskName, tokens: int | None) -> Backbone:
    """Return a backbone for a task, and for texts of so many tokens."""
    preprocess, embedding = backbone.preprocess, backbone.embedding
    texts = preprocess if isinstance(preprocess, TextPreprocess) else None
    if (texts is not None) == (task == "image-classification") or (tokens is not None and texts is None):
        raise ConfigError(
            f"the backbone {backbone.id} is for {'texts' if texts else 'images'}, so task {task} or tokens {tokens} is "
            f"not possible; take another backbone, or leave them out"
        )
    config = getattr(backbone.model, "config", None)
    most = getattr(config, "max_position_embeddings", None) or BLOCK
    if tokens is None and task == "text-generation":
        tokens = min(BLOCK, most)
    if tokens is not None and texts is not None:
        if not 2 <= tokens <= most:
            raise ConfigError(f"tokens must be from 2 to {most}, which {backbone.id} takes, got {tokens}")
        preprocess = replace(texts, max_length=tokens)
    if task == "text-generation":
        writes = getattr(backbone.model, "can_generate", None)
        if writes is None or not writes() or getattr(backbone.model.config, "is_encoder_decoder", False):
            raise ConfigError(
                f"the backbone {backbone.id} is a {type(backbone.model).__name__}, which is no causal language model; "
                f"take one whose config names a class such as LlamaForCausalLM, or none"
            )
        embedding = Embedding()
    elif task == "token-classification":
        embedding = Embedding(None, "tokens")
    return replace(backbone, task=task, embedding=embedding, preprocess=preprocess)


TEXTS = 64  # per batch of the text tower


@torch.no_grad()
def text_head(backbone: Backbone, class_names: Sequence[str], template: str) -> Head:
    """Return the zero-shot head of a CLIP-like model (https://arxiv.org/abs/2103.00020, section 3.1).

    Its weight is the normalised text embedding of each class times exp(logit_scale). The text tower is loaded from
    where the backbone's model came from, and not kept. In `template`, `{label}` stands for the class name.
    """
    transformers = require("transformers", "train", "loading a text tower")
    if backbone.embedding.pooling != "projection":
        raise BackboneError(f"a text head needs a backbone of type {', '.join(TOWERS)}, which {backbone.id} is not")
    source: Any = backbone.model.name_or_path
    options = {} if backbone.revision is None else {"revision": backbone.revision}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        whole = config.model_type in TOWERS
        if whole:
            model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32, **options).eval()
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise BackboneError(
            f"cannot load the text tower of {backbone.id} from {source!r}, which needs the whole model and its "
            f"tokenizer: {type(error).__name__}: {error}"
        ) from error
    if not whole:
        raise BackboneError(f"{backbone.id} has a vision tower only; a text head needs the whole model")
    texts = [template.replace("{label}", name) for name in class_names]
    length = config.text_config.max_position_embeddings
    rows: list[Tensor] = []
    for start in range(0, len(texts), TEXTS):
        # always to the full length, as SigLIP was trained; CLIP's attention does not look behind the text
        batch = texts[start : start + TEXTS]
        tokens = tokenizer(batch, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        found = model.get_text_features(**tokens)
        rows.append(found if isinstance(found, Tensor) else found.pooler_output)
    weight = nn.functional.normalize(torch.cat(rows), dim=-1) * model.logit_scale.exp()
    bias = model.logit_bias.expand(len(weight)).clone() if hasattr(model, "logit_bias") else None
    return Head(Embedding(None, "projection", True), weight, bias)
