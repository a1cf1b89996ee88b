"""Reading adapter files: verified before anything is used, decoded when asked for. Needs torch for tensors alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from blake3 import blake3

from ..backbone.model import Fingerprint
from ..errors import AdapterError, CorruptAdapterError, UnknownNameError
from ..mask import MaskSet
from ..preprocess import ImagePreprocess, preprocess_from_json
from ..safetensors_io import MAX_HEADER, Span, check_seal, parse_header, strict_json, tensor_of
from ..threads import Progress
from .content import About, Cascade, Parts
from .decode import Decoder, Masks, Weights, by_name
from .fields import Fields
from .header import Header, SetHeader
from .tensors import (
    BASE,
    BASE_BYTES,
    CASCADE,
    DIGEST_BYTES,
    DIGESTS,
    beginning,
    cascade_of,
    check_cascade,
    check_layout,
    dense_names,
    float_array,
    head_mask,
    head_of,
    masked_names,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .predict import Prediction


T = TypeVar("T")
P = ParamSpec("P")


class Adapter:
    """One or more mask sets with what travels beside them, verified but not yet decoded.

    Made by `load_adapter`. Decoding happens when masks are asked for; nothing here touches a model.

    Attributes:
        path: the file that it was read from, for messages.
        header: what the file says beside its tensors.
        spans: where each tensor lies in the data section. names: those of the tensors, sorted.
        content: the bytes of the file. size: their number.
        pinned: the reference that always means these bytes, `user/name@commit`; the path of a local adapter.

    Example:
        adapter = load_adapter("user/name")
        adapter.parts().masks["layer1.0.conv1.weight"].density
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

    @property
    def mask_id(self) -> str:
        """Digest of the decoded masks as the header states it; `verify` compares it."""
        return self.header.mask_id

    @property
    def about(self) -> About:
        """Task, class names, preprocessing and training record."""
        return self.header.about

    @cached_property
    def cascade(self) -> Cascade | None:
        """How the mask sets work together, or None; raises CorruptAdapterError if a value in it cannot be."""
        if self.header.cascade is None:
            return None
        self._check_cascade()
        return cascade_of(self.header.cascade, self._tensors(CASCADE))

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
        spec = self._set(set).head
        head = None if spec is None else self._located(head_of, spec, self._tensors(f"{set}/head/"))
        tensors = (self._tensors(f"{set}/{role}/") for role in ("statistics", "parameters", "values"))
        if stream:
            masks = self._decoder(base).streamed(set, self._alphas(set))
        else:
            masks = MaskSet(dict(self.iter_masks(set, base)))
        return Parts(masks, head, *tensors)

    def iter_masks(self, set: str = "default", base: Weights | None = None, *, zeros: bool = False) -> Masks:
        """Yield name and mask of each parameter, by name, decoded in threads a bounded way ahead.

        Args:
            set, base: as of `parts`, whose errors are raised. zeros: with the positions of zero bits, where known.
        """
        return self._decoder(base).masks(set, self._alphas(set), zeros)

    def shapes(self, set: str = "default") -> dict[str, tuple[int, ...]]:
        """Return the shape of every mask of a set, by parameter name, without decoding."""
        return {payload.name: payload.shape for payload in self._set(set).payloads}

    def preprocess(self) -> Callable[[Any], Tensor] | None:
        """Return the function from a PIL image to float32 (3, size, size); None for texts, or if none is stored.

        Raises:
            MissingDependencyError: if torchvision is not installed.
        """
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
            StateError: if the model's head is not the adapter's. DataError: if an input cannot be read.
        """
        from .predict import predict

        about = replace(self.about, class_names=tuple(class_names)) if class_names else self.about
        return predict(model, inputs, self.parts(stream=True).head, about, tokenizer, batch_size)

    def verify(self, progress: Progress | None = None, base: Weights | None = None) -> dict[str, Any]:
        """Decode every mask, or without a base those that need none, and compare `mask_id` if those are all.

        After each payload, `progress` gets the number of weights done and of those in all.

        Returns:
            `payloads` and `decoded` (counts), `needs_base` (set and parameter names that were left out) and
            `mask_id`, True if it was compared and agrees, None if some masks were left out.

        Raises:
            UnknownCodecError, BackboneMismatchError, CorruptAdapterError: as for `parts`, or if `mask_id` differs.
        """
        self.check_values()
        return self._decoder(base).verify(progress)

    def check_values(self) -> None:
        """Raise CorruptAdapterError if a scale, the mask of a head or a number of the cascade cannot be."""
        for name, one in self.header.sets.items():
            self._alphas(name)
            if one.head is not None and one.head.random is not None:
                self._located(head_mask, one.head.random, self.bytes_of(f"{name}/head/mask"))
        self._check_cascade()

    def bytes_of(self, tensor: str) -> memoryview:
        """Return the bytes of a tensor, not copied."""
        span = self.spans[tensor]
        return self._data[span.start : span.end]

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

    def _set(self, name: str) -> SetHeader:
        if name not in self.header.sets:
            together = "; it is a cascade, which load_cascade(model, ref) puts to use" if self.header.cascade else ""
            known = ", ".join(self.sets)
            raise UnknownNameError(f"{self.path} has no mask set {name!r}; it has: {known}{together}")
        return self.header.sets[name]

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return copies of the tensors whose names begin with `prefix`, under the rest of their names."""
        names = beginning(self.names, prefix)
        return {n.removeprefix(prefix): tensor_of(self.bytes_of(n), *self.spans[n][:2]) for n in names}

    def _alphas(self, set: str) -> list[float | None]:
        """Return the scale of each payload of a set, None where it is off."""
        payloads, name = self._set(set).payloads, f"{set}/scale"
        alphas = np.frombuffer(self.bytes_of(name), "<f4").tolist() if name in self.spans else [0.0] * len(payloads)
        for payload, alpha in zip(payloads, alphas, strict=True):
            if not 0 <= alpha < float("inf"):
                raise CorruptAdapterError(
                    f"{self.path}: the scale of {payload.name!r} is {alpha}, expected a positive number"
                )
        return [alpha or None for alpha in alphas]

    def _check_cascade(self) -> None:
        names = beginning(self.names, CASCADE)
        arrays = {name.removeprefix(CASCADE): float_array(self.bytes_of(name), self.spans[name]) for name in names}
        if self.header.cascade is not None:
            self._located(check_cascade, arrays)

    def _decoder(self, base: Weights | None) -> Decoder:
        return Decoder(self.path, self.header, self.base, self.pieces, None if base is None else by_name(base))

    def _located(self, step: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        return _located(self.path, step, *arguments, **named)


MODEL_FILE = "maskpack_model.safetensors"
CONFIG_FILE = "maskpack_config.json"
MAX_MODEL = 16 << 30  # bytes; masks of 10^11 weights fit
MAX_CONFIG = 1 << 20  # bytes; class names of 20,000 classes fit


def read_adapter(path: str | Path) -> Adapter:
    """Read and verify an adapter: a folder, or a `.safetensors` file alone. Masks are decoded when asked for.

    Each file is opened and read once; what is verified are the bytes that are used. A config beside the model file
    must name its digest.

    Raises:
        AdapterError: if there is no adapter; the message lists what is there.
        UnsupportedVersionError: if a newer format version wrote it.
        CorruptAdapterError: if its bytes are not what format, digests or config say.
    """
    return parse_files(read_files(Path(path)))


def read_files(path: Path, look: bool = True) -> dict[str, tuple[Path, bytes | memoryview]]:
    """Read an adapter folder's model file and config, if it has one, or a model file alone; nothing is verified.

    Args:
        look: as of `read_model`.

    Returns:
        Path and bytes of each file, by the name that the format gives it.
    """
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


def parse_files(files: Mapping[str, tuple[Path, bytes | memoryview]], digest: str | None = None) -> Adapter:
    """Verify what `read_files` gives; `digest` is the model file's, if it is known. Raises as `read_adapter`."""
    path, content = files[MODEL_FILE]
    adapter = parse_adapter(memoryview(content), path)
    if digest is not None:
        adapter.digest = digest
    if CONFIG_FILE in files:
        config, text = files[CONFIG_FILE]
        check_config(bytes(text), config, adapter)
    return adapter


def read_file(path: Path, name: Path) -> Adapter:
    """Read and verify one model file; `name` is what messages call it."""
    return parse_adapter(read_model(path, name), name)


def read_model(path: Path, name: Path, look: bool = True) -> memoryview:
    """Return the bytes of a model file; one that does not begin like an adapter's is refused before it is read whole.

    Args:
        look: False where a signature has to be verified before even the beginning is parsed.

    Raises:
        AdapterError, CorruptAdapterError: as `read_adapter`; `name` is what messages call the file.
    """
    if not look:
        return memoryview(read_bytes(path, name, MAX_MODEL))
    with _opened(path, name, MAX_MODEL) as (file, size):
        start = file.read(8)
        length = _header_length(start, size, name)
        head = file.read(length)
        if b'"maskpack"' not in head:
            _parse_header(memoryview(head), size - 8 - length, name)  # says what is wrong
        content = bytearray(size)
        content[: 8 + len(head)] = start + head
        read = 8 + len(head) + file.readinto(memoryview(content)[8 + len(head) :])
    return memoryview(content)[:read].toreadonly()


def read_bytes(path: Path, name: Path, limit: int) -> bytes:
    """Return all bytes of a file of at most `limit`; `name` is what messages call it.

    Raises:
        AdapterError: if it is missing, no regular file, too large or unreadable.
    """
    with _opened(path, name, limit) as (file, size):
        return file.read(size)


def parse_adapter(content: memoryview, name: Path) -> Adapter:
    """Verify the bytes of a model file; `name` is what messages call it. Raises as `read_adapter`."""
    start = 8 + _header_length(content[:8], len(content), name)
    head, data = content[8:start], content[start:]
    metadata, spans = _parse_header(head, len(data), name)
    _located(name, check_seal, bytes(head), metadata)
    header = _located(name, Header.from_json, metadata["maskpack"])
    _located(name, check_layout, header, spans)
    adapter = Adapter(str(name), header, spans, content, start)
    _check_digests(adapter, data)
    return adapter


def _header_length(start: bytes | memoryview, size: int, name: Path) -> int:
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise CorruptAdapterError(
            f"{name} has {size} bytes and states a header of {length}, expected 2 to {MAX_HEADER} "
            f"within the file; it was cut off or is no safetensors file"
        )
    return length


def _parse_header(head: memoryview, data_size: int, name: Path) -> tuple[dict[str, str], dict[str, Span]]:
    metadata, spans = _located(name, parse_header, head, data_size)
    if "maskpack" not in metadata:
        raise AdapterError(f"{name} is a safetensors file, but no adapter: its metadata has no 'maskpack'")
    return metadata, spans


@contextmanager
def _opened(path: Path, name: Path, limit: int) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file of at most `limit` bytes and give it with its size; errors are ours."""
    try:
        # not blocking, so that a named pipe is refused and not waited for
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(f"{name} is not a regular file; delete it, or fetch the adapter again")
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


def _located(name: str | Path, step: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run a step of reading; its errors get the file's name."""
    try:
        return step(*arguments, **named)
    except AdapterError as error:
        raise type(error)(f"{name}: {error}") from None


def _check_digests(adapter: Adapter, data: memoryview) -> None:
    # tables and payloads of each set, then the dense tensors
    pieces = list[tuple[str, memoryview]]()
    for name, one in adapter.header.sets.items():
        labels = [f"table {i} of set {name!r}" for i in range(len(one.tables))]
        labels += [f"the mask of {payload.name!r} in set {name!r}" for payload in one.payloads]
        pieces += zip(labels, adapter.pieces[name], strict=True)
    pieces += [(f"tensor {name!r}", adapter.bytes_of(name)) for name in dense_names(adapter.spans)]
    stored = bytes(adapter.bytes_of(DIGESTS))
    for index, (what, piece) in enumerate(pieces):
        if blake3(piece).digest()[:DIGEST_BYTES] != stored[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]:
            raise CorruptAdapterError(
                f"{adapter.path}: {what} has not the digest that was stored; fetch the file again"
            )
    if (found := blake3(data).hexdigest()) != adapter.header.data_digest:
        raise CorruptAdapterError(
            f"{adapter.path}: the digest of its data is {found}, the header states {adapter.header.data_digest}; fetch "
            f"the file again"
        )


def check_config(text: bytes, name: Path, adapter: Adapter) -> None:
    """Compare size and digest in the text of a config file with the model file.

    Raises:
        CorruptAdapterError: if the config is no such record, or records another file.
    """
    fields = Fields.of(strict_json(text, str(name)), str(name))
    digest, size = fields.digest("blake3"), fields.get("size")
    if (digest, size) != (adapter.digest, adapter.size):
        raise CorruptAdapterError(
            f"{name} names a model file of {size} bytes with digest {digest}, and {MODEL_FILE} has {adapter.size} "
            f"bytes and {adapter.digest}: one of them was replaced; fetch both again, tell their "
            f"owner, or delete {CONFIG_FILE}"
        )
