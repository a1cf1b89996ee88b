"""Reading adapter files: verified before anything is used, decoded when asked for. Needs torch for tensors alone."""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from ..backbone.model import Fingerprint
from ..codecs.base import from_frame
from ..errors import AdapterError, ConfigError, CorruptAdapterError, UnknownNameError, brief, check_argument
from ..mask import MaskSet, PackedMask
from ..preprocess import ImagePreprocess, TextPreprocess, preprocess_from_json
from ..safetensors_io import MAX_HEADER, Span, strict_json, tensor_of
from ..threads import Progress
from . import tensors
from .content import Cascade, Parts
from .decode import Decoder, Masks, Weights, by_name
from .fields import DIGEST, integer, record
from .header import DICTIONARY, Header, Payload, SetHeader
from .steps import Norm, norms_from_frame, rows_from_frame
from .tensors import BASE, BASE_BYTES, CASCADE, beginning
from .values import Steps

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .predict import Prediction

MODEL_FILE = "maskpack_model.safetensors"
CONFIG_FILE = "maskpack_config.json"
MAX_MODEL = 16 << 30  # bytes; masks of 10^11 weights fit
MAX_CONFIG = 1 << 20  # bytes; class names of 20,000 classes fit
TENSOR = "maskpack"  # the one tensor of the file
OPENING = re.compile(rb'\{"maskpack":\{"dtype":"U8","shape":\[(\d{1,18})\],"data_offsets":\[0,\1\]\}\} *')
MAX_OPENING = 128  # bytes
DIGEST_BYTES, SIZE_BYTES = 8, 4
NO_ADAPTER = "it is no adapter: it has not the one tensor 'maskpack'; give the model file of an adapter, or its folder"

Files = Mapping[str, tuple[Path, bytes | memoryview]]  # path and bytes of each file, by the name that the format gives


def opening(size: int) -> bytes:
    """Return the safetensors header, with its length before it, of a file whose one tensor has so many bytes."""
    text = b'{"%s":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (TENSOR.encode(), size, size)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def located(name: str | Path) -> Iterator[None]:
    """Put the name of the file before what errors about its content say."""
    try:
        yield
    except AdapterError as error:
        raise type(error)(f"{name}: {error}") from None


class Adapter:
    """One or more mask sets with what travels beside them, verified but not yet decoded.

    Made by `load_adapter`. Decoding happens when masks are asked for; nothing here touches a model.

    Attributes:
        path: the file that it was read from, for messages.
        header: what the file says beside its tensors.
        sets: names of the mask sets, sorted. about: task, class names, preprocessing and training record.
        mask_id: digest of the decoded masks as the header states it; `verify` compares it.
        spans: where each tensor lies in the data section. names: those of the tensors, sorted.
        content: the bytes of the file. size: their number.
        pinned: the reference that always means these bytes, `user/name@commit`; the path of a local adapter.

    Example:
        adapter = load_adapter("./my-mask")
        print(adapter, adapter.about.class_names)
        print(adapter.parts().masks["conv1.weight"].density)
    """

    def __init__(self, path: str, header: Header, spans: Mapping[str, Span], content: memoryview, start: int):
        self.path = self.pinned = path
        self.header = header
        self.sets, self.mask_id, self.about = tuple(header.sets), header.mask_id, header.about
        self.spans = spans
        self.names = sorted(spans)
        self.content = content
        self.size = len(content)
        self._data = content[start:]

    def __repr__(self) -> str:
        # of a ternary mask the zeros, which come last
        masks = [pieces[-1] for one in self.payloads.values() for pieces in one.values()]
        weights, kept = sum(one.weights for one in masks), sum(one.kept for one in masks)
        counts = f"{weights:,} weights, density {kept / weights if weights else 1.0:.4f}, {self.size:,} bytes"
        return f"Adapter({self.path!r}, base={self.header.base.id!r}, sets={brief(self.sets)}, {counts})"

    def _repr_html_(self) -> str:
        from .describe import inspect_adapter
        from .notebook import summary

        found = inspect_adapter(self)
        sets = {name: (one["weights"], one["kept"]) for name, one in found["sets"].items()}
        masks = sum(one["payload_bytes"] for one in found["sets"].values())
        return summary(self.pinned, found["base"], found, sets, masks, self.size)

    @cached_property
    def base(self) -> Fingerprint:
        """The fingerprint of the base; its `tensors` are those that are masked."""
        rows = bytes(self.bytes_of(BASE))
        names = tensors.masked_names(self.header)
        each = {name: rows[i * BASE_BYTES : (i + 1) * BASE_BYTES] for i, name in enumerate(names)}
        return replace(self.header.base, tensors=each)

    @cached_property
    def digest(self) -> str:
        """Hex BLAKE3 of the whole file."""
        return blake3(self.content).hexdigest()

    @cached_property
    def cascade(self) -> Cascade | None:
        """How the mask sets work together, or None; raises CorruptAdapterError if a value in it cannot be."""
        self._check_cascade()
        spec = self.header.cascade
        return None if spec is None else tensors.cascade_of(spec, self._tensors(CASCADE))

    def parts(self, set: str = "default", base: Weights | None = None, *, stream: bool = False) -> Parts:
        """Return a mask set with all that travels beside it; the masks are decoded, in several threads.

        Args:
            set: name of the mask set.
            base: the frozen model or its state dict, in float32 or bfloat16; only needed where masks were packed
                with the base's weights.
            stream: decode a mask whenever it is asked for, in the caller's thread, and keep none.

        Raises:
            UnknownNameError: if there is no such set.
            UnknownCodecError: if a mask is packed with a codec that is not installed.
            AdapterError: if a mask needs the base and none is given.
            BackboneMismatchError: if the base given is not the one that the masks were packed with.
            CorruptAdapterError: if a payload does not decode to the mask that the header describes.
        """
        one = self._set(set)
        with located(self.path):
            head = None if one.head is None else tensors.head_of(one.head, self._tensors(f"{set}/head/"))
            norms = self._norms(set)
        statistics, parameters = (self._tensors(f"{set}/{role}/") for role in tensors.ROLES)
        values = self._values(f"{set}/values/")
        masks = self._decoder(base).streamed(set) if stream else MaskSet(dict(self.iter_masks(set, base)))
        return Parts(masks, head, statistics, parameters, values, norms)

    def iter_masks(self, set: str = "default", base: Weights | None = None, *, zeros: bool = False) -> Masks:
        """Return name and mask of each parameter, decoded ahead in threads, a few at a time; see `parts`.

        With `zeros` masks that are decoded on a device have the positions of their zero bits.
        """
        return self._decoder(base).masks(set, zeros)

    def mask_on(self, name: str, base: Weights, weight: Tensor, set: str = "default") -> PackedMask:
        """Return a mask with the positions of its zeros, decoded where `weight`, a copy of the base's, lies."""
        return self._decoder(base).mask_on(set, name, weight)

    def shapes(self, set: str = "default") -> dict[str, tuple[int, ...]]:
        """Return the shape of every mask of a set, by parameter name, without decoding."""
        return {payload.name: payload.shape for payload in self._set(set).payloads}

    def preprocess(self) -> Callable[[Any], Tensor] | None:
        """Return the function from a PIL image to float32 (3, size, size); None for texts, or if none is stored."""
        stored = None if self.about.preprocess is None else preprocess_from_json(self.about.preprocess)
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
            StateError: if the model's head is not the adapter's.
        """
        from ..backbone.classifier import classifier_from, predictions
        from .predict import predict

        about = replace(self.about, class_names=tuple(class_names)) if class_names else self.about
        head = self.parts(stream=True).head
        classifier = None if head is None else classifier_from(model, head)
        run = None if classifier is None else lambda batches: [predictions(classifier, batches)[0]]
        return predict(model, inputs, about, tokenizer, batch_size, run)

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[str],
        *,
        tokenizer: Any = None,
        tokens: int = 256,
        temperature: float = 0.0,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> list[str]:
        """Continue texts, or answer them, with a language model that has this adapter loaded.

        Args:
            tokenizer: default: that of where the model was loaded from. tokens: new ones of a text, at most.
            temperature: 0 takes the most likely token each time; else they are drawn, by torch's generator.
            progress: called after each token of a batch with the number done and the most there may be.

        Raises:
            AdapterError: if the adapter is not one of a language model.
        """
        from .predict import generate, model_tokenizer

        how = None if self.about.preprocess is None else preprocess_from_json(self.about.preprocess)
        if self.about.task != "text-generation" or not isinstance(how, TextPreprocess):
            raise AdapterError(
                f"this adapter is for {self.about.task}, and text is generated with one for text-generation; call "
                f"predict"
            )
        tokenizer = tokenizer or model_tokenizer(model)
        return generate(model, prompts, how, tokenizer, tokens, temperature, batch_size, progress)

    def verify(self, progress: Progress | None = None, base: Weights | None = None) -> dict[str, Any]:
        """Decode every mask, or without a base those that need none, and compare `mask_id` if those are all.

        After each payload, `progress` gets the number of weights done and of those in all. Errors are as for `parts`.

        Returns:
            `payloads` and `decoded` (counts), `needs_base` (set and parameter names that were left out) and
            `mask_id`, True if it was compared and agrees, None if some masks were left out.
        """
        if progress is not None and (not callable(progress) or hasattr(progress, "state_dict")):
            raise ConfigError(
                f"progress is {progress!r:.80}, expected a function of two numbers; the base's model is given by name, "
                f"as in verify(base=model)"
            )
        self.check_values()
        return self._decoder(base).verify(progress)

    def check_values(self) -> None:
        """Raise CorruptAdapterError if a scale, a norm, a head or a number of the cascade cannot be."""
        _ = self.alphas
        with located(self.path):
            for name, one in self.header.sets.items():
                head = one.head or {}
                if "random" in head:
                    tensors.head_mask(head["random"], self.bytes_of(f"{name}/head/mask"))
                elif "features" in head:
                    steps = tensors.float_array(self.bytes_of(f"{name}/head/steps"), self.spans[f"{name}/head/steps"])
                    rows_from_frame(self.bytes_of(f"{name}/head/integers"), steps, head["features"])
                self._norms(name)
        self._check_cascade()

    def check_id(self, found: str) -> None:
        """Raise CorruptAdapterError if the `mask_id` of the decoded masks is not the one that the header states."""
        if found != self.mask_id:
            raise CorruptAdapterError(
                f"{self.path}: the decoded masks have the mask_id {found}, the header states {self.mask_id}; fetch the "
                f"file again"
            )

    def bytes_of(self, tensor: str) -> memoryview:
        """Return the bytes of a tensor, not copied."""
        span = self.spans[tensor]
        return self._data[span.start : span.end]

    def piece(self, payload: Payload) -> memoryview:
        """Return the bytes of a payload, not copied."""
        return self.bytes_of(f"{payload.set}/payloads")[payload.start : payload.start + payload.size]

    @cached_property
    def payloads(self) -> dict[str, dict[str, list[Payload]]]:
        """By set and parameter the payloads: of a ternary mask the signs, then the zeros."""
        found: dict[str, dict[str, list[Payload]]] = {name: {} for name in self.sets}
        for name, one in self.header.sets.items():
            for payload in one.payloads:
                found[name].setdefault(payload.name, []).append(payload)
        return found

    @cached_property
    def alphas(self) -> dict[str, dict[str, float | None]]:
        """By set and parameter the scale of a mask, None where it is off."""
        found = {}
        for name, one in self.header.sets.items():
            raw = self.bytes_of(f"{name}/scale") if f"{name}/scale" in self.spans else bytes(4 * len(one.payloads))
            alphas = np.frombuffer(raw, "<f4").tolist()
            for payload, alpha in zip(one.payloads, alphas, strict=True):
                if not 0 <= alpha < float("inf"):
                    raise CorruptAdapterError(
                        f"{self.path}: the scale of {payload.name!r} is {alpha}, expected a positive number"
                    )
            found[name] = {payload.name: alpha or None for payload, alpha in zip(one.payloads, alphas, strict=True)}
        return found

    def _norms(self, name: str) -> dict[str, Norm]:
        layers = self.header.sets[name].norms
        return norms_from_frame(self.bytes_of(f"{name}/norms"), layers) if layers else {}

    def _set(self, name: str) -> SetHeader:
        if name not in self.header.sets:
            together = "; it is a cascade, which load_cascade(model, ref) puts to use" if self.header.cascade else ""
            known = ", ".join(self.sets)
            raise UnknownNameError(f"{self.path} has no mask set {brief(name)}; it has: {known}{together}")
        return self.header.sets[name]

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return copies of the tensors whose names begin with `prefix`, under the rest of their names."""
        names = beginning(self.names, prefix)
        return {n.removeprefix(prefix): tensor_of(self.bytes_of(n), *self.spans[n][:2]) for n in names}

    def _values(self, prefix: str) -> dict[str, Tensor | Steps]:
        """Return stored values by parameter name, as they are stored."""
        found: dict[str, Tensor | Steps] = {}
        for name in beginning(self.names, prefix):
            raw, (dtype, shape, *_) = self.bytes_of(name), self.spans[name]
            found[name.removeprefix(prefix)] = Steps(raw) if dtype == "U8" else tensor_of(raw, dtype, shape)
        return found

    def _check_cascade(self) -> None:
        names = beginning(self.names, CASCADE)
        if names:
            with located(self.path):
                arrays = {n: tensors.float_array(self.bytes_of(n), self.spans[n]) for n in names}
                tensors.check_cascade({name.removeprefix(CASCADE): array for name, array in arrays.items()})

    def _decoder(self, base: Weights | None) -> Decoder:
        return Decoder(self, None if base is None else by_name(base))


def read_adapter(path: str | Path) -> Adapter:
    """Read and verify an adapter: a folder, or a `.safetensors` file alone. Masks are decoded when asked for.

    Each file is opened and read once; what is verified are the bytes that are used. A config beside the model file
    must name its digest. What is wrong is an AdapterError, of a kind of its own where a program may care.
    """
    check_argument("the adapter", path, str | Path, "an Adapter or its path", "read one: load_adapter('./folder')")
    return parse_files(read_files(Path(path)))


def read_files(path: Path, look: bool = True) -> dict[str, tuple[Path, bytes | memoryview]]:
    """Read an adapter folder's model file and config, if it has one, or a model file alone; nothing is verified."""
    if not path.is_dir():
        return {MODEL_FILE: (path, read_model(path, path, look))}
    model, config = path / MODEL_FILE, path / CONFIG_FILE
    if not model.exists():
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise AdapterError(f"{path} has no {MODEL_FILE}, it has: {there}; expected the folder of an adapter")
    files: dict[str, tuple[Path, bytes | memoryview]] = {MODEL_FILE: (model, read_model(model, model, look))}
    if config.exists():
        files[CONFIG_FILE] = config, read_bytes(config, config, MAX_CONFIG)
    return files


def parse_files(files: Files, digest: str | None = None) -> Adapter:
    """Verify what `read_files` gives; `digest` is the model file's, if it is known. Raises as `read_adapter`."""
    path, content = files[MODEL_FILE]
    adapter = parse_adapter(memoryview(content), path)
    if digest is not None:
        adapter.digest = digest
    if CONFIG_FILE in files:
        config, text = files[CONFIG_FILE]
        check_config(bytes(text), config, adapter)
    return adapter


def read_model(path: Path, name: Path, look: bool = True) -> memoryview:
    """Return the bytes of a model file, called `name` in messages.

    One that does not begin like an adapter's is refused before it is read whole; with `look` False, where a signature
    has to be verified before anything is parsed, it is not looked at.
    """
    with _opened(path, name, MAX_MODEL) as (file, size):
        if look:
            _opened_end(file.read(8 + MAX_OPENING), size, name)
            file.seek(0)
        return memoryview(file.read(size))


def read_bytes(path: Path, name: Path, limit: int) -> bytes:
    """Return all bytes of a file, called `name` in messages; AdapterError if it is unreadable or over `limit` bytes."""
    with _opened(path, name, limit) as (file, size):
        return file.read(size)


def parse_adapter(content: memoryview, name: Path) -> Adapter:
    """Verify the bytes of a model file; `name` is what messages call it. Raises as `read_adapter`."""
    start = _opened_end(content[: 8 + MAX_OPENING], len(content), name)
    with located(name):
        digest, rest = bytes(content[start : start + DIGEST_BYTES]), content[start + DIGEST_BYTES :]
        if (found := blake3(rest).digest()[:DIGEST_BYTES]) != digest:
            raise CorruptAdapterError(
                f"its bytes have the digest {found.hex()}, and it states {digest.hex()}: it is damaged, fetch it again"
            )
        size = int.from_bytes(rest[:SIZE_BYTES], "little")
        if len(rest) < SIZE_BYTES + size:
            raise CorruptAdapterError(f"its index has {size} bytes, which are not there; fetch the file again")
        index, data = rest[SIZE_BYTES : SIZE_BYTES + size], rest[SIZE_BYTES + size :]
        header = Header.from_json(from_frame(index, 2, MAX_HEADER, DICTIONARY))
        spans = tensors.spans_of(header)
        if (stated := max(span.end for span in spans.values())) != len(data):
            raise CorruptAdapterError(
                f"it has {len(data)} bytes of data, and its index describes {stated}; fetch the file again"
            )
        tensors.check_layout(header, spans)
    return Adapter(str(name), header, spans, content, len(content) - len(data))


def _opened_end(start: bytes | memoryview, size: int, name: Path) -> int:
    """Return how long the opening of a file of `size` bytes is, which begins with `start`."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= size - 8:
        raise CorruptAdapterError(
            f"{name} has {size} bytes and states a header of {length}, expected 2 or more within the file; it was cut "
            f"off or is no safetensors file"
        )
    found = OPENING.fullmatch(bytes(start[8 : 8 + length])) if length <= MAX_OPENING else None
    if found is None or opening(int(found[1])) != bytes(start[: 8 + length]):
        raise AdapterError(f"{name}: {NO_ADAPTER}")
    if 8 + length + int(found[1]) != size:
        raise CorruptAdapterError(
            f"{name} has {size} bytes, its header describes {8 + length + int(found[1])}; it was cut off or added to, "
            f"fetch it again"
        )
    return 8 + length


@contextmanager
def _opened(path: Path, name: Path, limit: int) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file of at most `limit` bytes and give it with its size; errors are ours."""
    try:
        # not blocking, so that a named pipe is refused and not waited for
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError
            if status.st_size > limit:
                raise AdapterError(f"{name} has {status.st_size} bytes; at most {limit} are accepted; fetch it again")
            yield file, status.st_size
    except IsADirectoryError:
        raise AdapterError(f"{name} is not a regular file; delete it, or fetch the adapter again") from None
    except FileNotFoundError:
        there = sorted(p.name for p in name.parent.iterdir()) if name.parent.is_dir() else []
        raise AdapterError(
            f"there is no {name}; {name.parent} has: {', '.join(there[:10]) or 'nothing'}; "
            f"expected a folder with {MODEL_FILE}, or a .safetensors file"
        ) from None
    except OSError as error:
        raise AdapterError(
            f"cannot read {name}: {error.strerror or error}; check the path and its permissions"
        ) from error


def check_config(text: bytes, name: Path, adapter: Adapter) -> None:
    """Compare size and digest in the text of a config file with the model file."""
    found = record({"blake3": DIGEST, "size": integer(0, MAX_MODEL)})(strict_json(text, str(name)), str(name))
    if (found["blake3"], found["size"]) != (adapter.digest, adapter.size):
        raise CorruptAdapterError(
            f"{name} names a model file of {found['size']} bytes with digest {found['blake3']}, and {MODEL_FILE} has "
            f"{adapter.size} bytes and {adapter.digest}: one of them was replaced; fetch both again, tell their "
            f"owner, or delete {CONFIG_FILE}"
        )
