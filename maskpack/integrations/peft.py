"""MaskConfig: masks as a method of PEFT. This module is to be imported before PEFT reads one.

What `save_pretrained` writes beside PEFT's own config is a whole adapter of ours, as one tensor of bytes: packed masks
with the fingerprint of their base, which is checked when PEFT reads it.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import ModulesToSaveWrapper, register_peft_method
from torch import Tensor, nn

from ..adapter.content import Parts
from ..adapter.read import Adapter, parse_adapter
from ..adapter.write import save_adapter
from ..backbone.fingerprint import Measured, check_measured, compared_dtype, fingerprint_of, tensor_digests
from ..backbone.model import body_of, source_of, unusable
from ..errors import AdapterError, ConfigError, MissingDependencyError, StateError
from ..mask import MaskSet
from ..safetensors_io import read_tensors, write_tensors
from ..training.methods.base import build_method
from ..training.scores import ScoredModel, ScoredWeight

NAME, FILE = "MASK", "adapter_model.safetensors"
PREFIX, STORED = "base_model.model.", "maskpack_adapter"


@dataclass
class MaskConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of masks as a method of PEFT.

    Attributes:
        target_modules: names or a regular expression of the layers to mask. modules_to_save: that learn themselves.
        method: "threshold" removes weights, "flip" inverts their signs.
        top: share of each layer's weights that have scores, those with the greatest absolute values; None: all.

    Example:
        model = get_peft_model(model, MaskConfig(top=0.1))
    """

    target_modules: Any = "all-linear"
    exclude_modules: Any = None
    modules_to_save: list[str] | None = None
    method: Literal["threshold", "flip"] = "threshold"
    top: float | None = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if self.method not in ("threshold", "flip"):
            raise ConfigError(f"the method of a MaskConfig must be threshold or flip, got {self.method!r}")


class MaskLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer that computes with the masked weight of the one in it; several masks act one after another.

    By its name PEFT knows it again where "all-linear" asks for a second mask.
    """

    adapter_layer_names = ("maskpack_scored",)
    get_base_layer: Any
    set_adapter: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig):
        super().__init__()
        self.base_layer, self.maskpack_scored = base_layer, nn.ModuleDict()
        self._disable_adapters, self._active_adapter = False, adapter_name
        self.merged_adapters: list[str] = []
        self._before: list[tuple[Tensor, Tensor]] = []  # where merged masks changed weights, and these
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MaskConfig) -> None:
        """Add a mask."""
        weight = self.get_base_layer().weight
        if why := unusable(weight):
            raise ConfigError(f"the weight of a layer that MaskConfig names {why}")
        scored = ScoredWeight(weight, False, ScoredModel(build_method(config.method)), config.top)
        self.maskpack_scored[adapter_name] = scored
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def scored(self, name: str) -> ScoredWeight:
        """Return a mask of this layer by its name."""
        found = self.maskpack_scored[name]
        assert isinstance(found, ScoredWeight)
        return found

    def effective(self, names: list[str]) -> Tensor:
        """Return the weight with these masks on it."""
        weight: Tensor = self.get_base_layer().weight
        for scored in (self.scored(name) for name in names if name in self.maskpack_scored):
            weight = scored.effective(weight, scored.scores, scored.state(self.training))
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the layer with the active masks; as it is where masks are disabled or merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        weight = self.effective(self.active_adapters)
        return torch.func.functional_call(self.base_layer, {"weight": weight}, args, kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write masks into the weight; `unmerge` puts its bits back."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.maskpack_scored:
                weight: Tensor = self.get_base_layer().weight
                new = self.effective([name])
                changed = ~self.scored(name).binary()
                self._before.append((changed, weight[changed]))
                weight.copy_(new)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back what `merge` changed, to the bit."""
        while self._before:
            changed, values = self._before.pop()
            self.get_base_layer().weight[changed] = values
            self.merged_adapters.pop()


class MaskModel(BaseTuner):  # type: ignore[misc]
    """A model whose layers have masks."""

    prefix = "maskpack_"
    tuner_layer_cls = MaskLinear
    target_module_mapping: Mapping[str, Any] = {}

    def _create_and_replace(
        self, config: MaskConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, **_: Any
    ) -> None:
        if isinstance(target, MaskLinear):
            target.update_layer(adapter_name, config)
            return
        new = MaskLinear(target, adapter_name, config)
        if adapter_name not in self.active_adapter:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: Mapping[str, Tensor], **_: Any
    ) -> dict[str, Tensor]:
        layers = _layers(model)
        if any(layer.merged for layer in layers.values()):
            raise StateError("masks are merged into the weights of this model; call unmerge_adapter() before saving")
        masks = {}
        for name, layer in layers.items():
            if adapter_name in layer.maskpack_scored:
                masks[f"{_plain(name)}.weight"] = layer.scored(adapter_name).mask()
        trained = (name for name, one in model.named_modules() if isinstance(one, ModulesToSaveWrapper))
        heads = tuple(sorted({_plain(name) for name in trained}))
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        base = fingerprint_of(_body(model, heads), *source_of(inner), heads)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "mask.safetensors"
            save_adapter(file, Parts(MaskSet(masks)), base)
            return {PREFIX + STORED: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        adapter, found = _stored(state_dict, FILE), dict(state_dict)
        body = _body(model, adapter.base.head)
        check_measured(Measured(body, tensor_digests(body, compared_dtype(body.values()))), adapter.base)
        masks, method = adapter.parts(base=body).masks, build_method(config.method)
        layers = {f"{_plain(name)}.weight": (name, layer) for name, layer in _layers(model).items()}
        if unknown := sorted(masks.keys() - layers.keys()):
            raise AdapterError(f"the config names no layer for {len(unknown)} masks, first {unknown[0]!r}")
        for name, mask in masks.items():
            where, layer = layers[name]
            scored, kept = layer.scored(adapter_name), mask.tensor()
            if scored.places is not None:
                kept = kept.flatten()[scored.places.long().cpu()]
            start = method.init_scores(scored.scores.detach()).cpu()
            off = 2 * getattr(method, "threshold", 0.0) - start  # as far below as the others are above
            scores = torch.where(kept.reshape(start.shape), start, off)
            if mask.op != method.op or scored.whole(method.binarize(scores)).count_nonzero() != mask.kept:
                raise AdapterError(f"the mask of {name!r} is none that the config's method {method.id!r} and top make")
            place = f"{where}.maskpack_scored.{adapter_name}"
            found[f"{place}.scores"] = scores
            found |= {} if scored.places is None else {f"{place}.places": scored.places}
        return {name: tensor for name, tensor in found.items() if not name.endswith(STORED)}


def _layers(model: nn.Module) -> dict[str, MaskLinear]:
    return {name: one for name, one in model.named_modules() if isinstance(one, MaskLinear)}


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX)


def _body(model: nn.Module, head: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of the model's base by its own names, without what PEFT put there."""
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".maskpack_scored." not in name and ".modules_to_save." not in name:
            own = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            state[own.removeprefix(PREFIX)] = tensor
    return body_of(state, head)


def _stored(tensors: Mapping[str, Tensor], path: str | Path) -> Adapter:
    data = next((one for name, one in tensors.items() if name.endswith(STORED)), None)
    if data is None:
        raise AdapterError(f"{path} holds no masks; expected what a model with a MaskConfig wrote")
    return parse_adapter(memoryview(data.cpu().contiguous().numpy().tobytes()), Path(path))


def read_peft(folder: str | Path) -> Adapter:
    """Read the adapter that PEFT saved in a folder; a head that PEFT keeps beside it is left out."""
    path = Path(folder) / FILE
    return _stored(read_tensors(path), path)


def write_peft(folder: str | Path, adapter: Adapter) -> None:
    """Write an adapter of masks alone as a folder that `PeftModel.from_pretrained` reads."""
    parts = adapter.parts(stream=True)
    kinds = {coding.op for coding in (payload.coding for payload in adapter.header.sets["default"].payloads)}
    if parts.head is not None or parts.dense or len(kinds) > 1 or not kinds <= {"zero", "flip"}:
        raise AdapterError(
            f"{adapter.path} holds more than masks that remove weights or invert signs, which PEFT has no place for; "
            f"load it with load_mask"
        )
    method: Literal["threshold", "flip"] = "flip" if kinds == {"flip"} else "threshold"
    targets = sorted(name.removesuffix(".weight") for name in adapter.shapes())
    MaskConfig(target_modules=targets, method=method, top=None, inference_mode=True).save_pretrained(str(folder))
    data = torch.frombuffer(bytearray(Path(adapter.path).read_bytes()), dtype=torch.uint8)
    write_tensors(Path(folder) / FILE, {PREFIX + STORED: data}, {"format": "pt"})


def _register() -> None:
    """Register the method with PEFT, whose enumeration of types has no public way to be extended."""
    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        raise MissingDependencyError("masks are a method of PEFT 0.21 or newer; run: pip install 'peft>=0.21'")
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
        type.__setattr__(PeftType, NAME, member)
        register_peft_method(name=NAME.lower(), config_cls=MaskConfig, model_cls=MaskModel, prefix=MaskModel.prefix)


_register()
