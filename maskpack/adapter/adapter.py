"""Adapter: an opened adapter file, its payloads not yet decoded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from ..backbone.fingerprint import Fingerprint
from ..backbone.head import Head
from ..errors import UnknownNameError
from ..mask import MaskSet
from ..parts import CascadeParts
from ..preprocess import ImagePreprocess, preprocess_from_json
from ..tensorheader import DTYPES, Span
from ..threads import Progress
from .cascade import PREFIX, cascade_parts
from .decode import Decoder, Masks, checked_scales
from .header import Header
from .heads import stored_head
from .layout import BASE, BASE_BYTES, beginning, masked_names
from .predict import Prediction, predict
from .sets import SetHeader
from .weights import Weights, by_name


class Adapter:
    """One or more mask sets with their heads and statistics, verified but not yet decoded.

    Made by `read_adapter`. Decoding happens when masks are asked for; nothing here touches a model.

    Attributes:
        path: the file that it was read from, for messages.
        header: what the file says beside its tensors.
        spans: where each tensor lies in the data section. names: those of the tensors, sorted.
        content: the bytes of the file. size: their number.
        pinned: the reference that always means these bytes, `user/name@commit`; the path of a local adapter.
    """

    def __init__(self, path: str, header: Header, spans: Mapping[str, Span], content: memoryview, start: int):
        self.path = self.pinned = path
        self.header = header
        self.spans = spans
        self.names = sorted(spans)
        self.content = content
        self.size = len(content)
        self._data = content[start:]

    def __repr__(self) -> str:
        return f"Adapter({self.path!r}, base={self.header.base.id!r}, sets={self.sets}, bytes={self.size})"

    @cached_property
    def base(self) -> Fingerprint:
        """The fingerprint of the base; its `tensors` are those that are masked."""
        rows = bytes(self.bytes_of(BASE))
        names = masked_names(self.header)
        each = {name: rows[i * BASE_BYTES : (i + 1) * BASE_BYTES] for i, name in enumerate(names)}
        return replace(self.header.base, tensors=each)

    @cached_property
    def digest(self) -> str:
        """Hex BLAKE3 of the whole file."""
        return blake3(self.content).hexdigest()

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the mask sets, sorted."""
        return tuple(self.header.sets)

    @cached_property
    def cascade(self) -> CascadeParts | None:
        """What makes a cascade of the mask sets, or None; raises CorruptAdapterError if a value in it cannot be."""
        one = self.header.cascade
        return None if one is None else cascade_parts(self.path, one, self.tensors(PREFIX))

    @property
    def mask_id(self) -> str:
        """Digest of the decoded masks as the header states it; `verify` compares it."""
        return self.header.mask_id

    @property
    def task(self) -> str | None:
        """What the adapter does, as in "image-classification"."""
        return self.header.task

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the head's classes in order, or None."""
        return self.header.class_names

    @property
    def training(self) -> Mapping[str, Any] | None:
        """The training record, or None."""
        return self.header.training

    @property
    def preprocess_config(self) -> Mapping[str, Any] | None:
        """How inputs are prepared, as stored, or None."""
        return self.header.preprocess

    def masks(self, base: Weights | None = None, set: str = "default") -> MaskSet:
        """Decode the masks of a set.

        Args:
            base: the frozen model or its state dict, in float32 or bfloat16; only needed where masks were packed
                with the base's weights.
            set: name of the mask set.

        Raises:
            UnknownNameError: if there is no such set.
            UnknownCodecError: if a mask is packed with a codec that is not installed.
            AdapterError: if a mask needs the base and none is given.
            BackboneMismatchError: if the base given is not the one that the masks were packed with.
            CorruptAdapterError: if a payload does not decode to the mask that the header describes.
        """
        return MaskSet(dict(self.iter_masks(base, set)))

    def iter_masks(self, base: Weights | None = None, set: str = "default", zeros: bool = False) -> Masks:
        """As `masks`, each when asked for, by name, in threads a bounded way ahead; `zeros`: with their positions."""
        return self._decoder.masks(set, self._alphas(set), None if base is None else by_name(base), zeros)

    def stream_masks(self, base: Weights | None = None, set: str = "default") -> MaskSet:
        """Return a set that decodes a mask whenever it is asked for, in the caller's thread; else as `masks`."""
        return self._decoder.streamed(set, self._alphas(set), None if base is None else by_name(base))

    def shapes(self, set: str = "default") -> dict[str, tuple[int, ...]]:
        """Return the shape of every mask of a set, by parameter name, without decoding."""
        return {payload.name: payload.shape for payload in self._set(set).payloads}

    def head(self, set: str = "default") -> Head | None:
        """Return the head of a set, or None if it has none; a masked random one is rebuilt."""
        spec = self._set(set).head
        return None if spec is None else stored_head(spec, self.tensors(f"{set}/head/"), self.path)

    def statistics(self, set: str = "default") -> dict[str, Tensor]:
        """Return the BatchNorm buffers of a set by dotted name, float32."""
        self._set(set)
        return self.tensors(f"{set}/statistics/")

    def parameters(self, set: str = "default") -> dict[str, Tensor]:
        """Return the parameters of a set that are stored whole, by dotted name."""
        self._set(set)
        return self.tensors(f"{set}/parameters/")

    def values(self, set: str = "default") -> dict[str, Tensor]:
        """Return the values that replace weights where a mask with op "replace" has zeros, flat, by parameter name."""
        self._set(set)
        return self.tensors(f"{set}/values/")

    def preprocess(self) -> Callable[[Any], Tensor] | None:
        """Return the function from a PIL image to float32 (3, size, size); None for texts, or if none is stored.

        Raises:
            MissingDependencyError: if torchvision is not installed.
        """
        config = self.preprocess_config
        stored = None if config is None else preprocess_from_json(config)
        return stored.transform() if isinstance(stored, ImagePreprocess) else None

    def predict(
        self,
        model: nn.Module,
        inputs: Sequence[Any] | Tensor,
        *,
        class_names: Sequence[str] | None = None,
        tokenizer: Any = None,
        batch_size: int = 64,
    ) -> list[Prediction]:
        """Classify inputs with a model that has this adapter loaded.

        Args:
            inputs: image paths or PIL images; a tensor (B, 3, H, W) that is preprocessed already; or texts.
            class_names: of the model's head, if not the adapter's. tokenizer: of a text model; default: its own.

        Raises:
            AdapterError: if the adapter has no head, class names or preprocessing.
            StateError: if the model's head is not the adapter's. DataError: if an input cannot be read.
        """
        return predict(
            model,
            inputs,
            head=self.head(),
            class_names=class_names or self.class_names,
            preprocess=self.preprocess_config,
            tokenizer=tokenizer,
            batch_size=batch_size,
        )

    def verify(self, progress: Progress | None = None, base: Weights | None = None) -> dict[str, Any]:
        """Decode every mask, or without a base those that need none, and compare `mask_id` if those are all.

        After each payload, `progress` gets the number of weights done and of those in all.

        Returns:
            `payloads` and `decoded` (counts), `needs_base` (set and parameter names that were left out) and
            `mask_id`, True if it was compared and agrees, None if some masks were left out.

        Raises:
            UnknownCodecError, BackboneMismatchError, CorruptAdapterError: as for `masks`, or if `mask_id` differs.
        """
        _ = self.cascade
        for name in self.sets:
            self._alphas(name)
            self.head(name)
        return self._decoder.verify(progress, None if base is None else by_name(base))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return copies of the tensors whose names begin with `prefix`, under the rest of their names."""
        found = {}
        for name in beginning(self.names, prefix):
            raw, span = bytearray(self.bytes_of(name)), self.spans[name]
            dtype = DTYPES[span.dtype]
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            found[name.removeprefix(prefix)] = flat.reshape(span.shape)
        return found

    def bytes_of(self, tensor: str) -> memoryview:
        """Return the bytes of a tensor, not copied."""
        span = self.spans[tensor]
        return self._data[span.start : span.end]

    def _set(self, name: str) -> SetHeader:
        if name not in self.header.sets:
            together = "; it is a cascade, which load_cascade(model, ref) puts to use" if self.header.cascade else ""
            known = ", ".join(self.sets)
            raise UnknownNameError(f"{self.path} has no mask set {name!r}; it has: {known}{together}")
        return self.header.sets[name]

    def _alphas(self, set: str) -> list[float | None]:
        """Return the scale of each payload of a set, None where it is off."""
        return checked_scales(self.path, self._set(set).payloads, self.tensors(f"{set}/scale").get(""))

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.path, self.header, self.base, self.pieces)

    @cached_property
    def pieces(self) -> dict[str, list[memoryview]]:
        """For each set the bytes of its tables, then of its payloads, not copied."""
        found = {}
        for name, one in self.header.sets.items():
            data, at, pieces = self.bytes_of(f"{name}/payloads"), 0, []
            for size in (*one.tables, *(payload.size for payload in one.payloads)):
                pieces.append(data[at : at + size])
                at += size
            found[name] = pieces
        return found
