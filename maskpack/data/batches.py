"""Batches of examples, in an order that a seed and an epoch decide."""

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import DataError
from ..preprocess import Augment, ImagePreprocess, Preprocess, collate_text
from .base import Examples

Collate = Callable[[list[Any]], Any]


class _Transformed(Dataset[Any]):
    """Examples after their per-item transform; of an unreadable one only the row.

    What a transform draws follows from the sampler's epoch and the example, whichever process reads it and when.
    """

    def __init__(self, examples: Examples, transform: Callable[[Any], Any], sampler: "EpochSampler | None"):
        self.examples, self.transform, self.sampler = examples, transform, sampler

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        item = self.examples[index]
        if self.sampler is not None:
            torch.default_generator.manual_seed(draw_seed(self.sampler.seed, self.sampler.epoch, "example", index))
        return self.examples.indices[index] if item is None else (self.transform(item[0]), item[1])


class EpochSampler(Sampler[int]):
    """A permutation that the seed and the epoch decide, so that a resumed run sees the same order."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        yield from torch.randperm(self.length, generator=generator).tolist()


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch's order."""
    return (seed * 1_000_003 + epoch) % 2**63


def draw_seed(seed: int, epoch: int, *place: str | int) -> int:
    """Return the seed of what is drawn at a place in an epoch, such as a batch."""
    return int.from_bytes(blake3(repr((seed, epoch, *place)).encode()).digest(7), "little")


def _ignore_signals(_: int) -> None:
    """In a process that reads data: a signal to the whole group of processes is for the one that trains."""
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _stack(images: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(images))


def _collate(to_inputs: Callable[[Sequence[Any]], Any]) -> Collate:
    def collate(items: list[Any]) -> tuple[Any, Tensor | None, list[int]]:
        unreadable = [item for item in items if isinstance(item, int)]
        pairs = [item for item in items if not isinstance(item, int)]
        if not pairs:
            return None, None, unreadable
        inputs, labels = zip(*pairs, strict=True)
        return to_inputs(inputs), torch.tensor(labels), unreadable

    return collate


def loader(
    examples: Examples,
    preprocess: Preprocess,
    tokenizer: Any = None,
    *,
    batch_size: int = 64,
    augment: Augment = "none",
    sampler: EpochSampler | None = None,
    workers: int = 0,
    transform: Callable[[Any], Any] | None = None,
    stack: Callable[[Sequence[Any]], Any] = _stack,
) -> DataLoader[Any]:
    """Return batches of (inputs, labels, unreadable rows), to be read through `readable`.

    Args:
        sampler: for training: the order; a last batch that is not full is then left out. Else all, in order.
        transform: of a PIL image, in place of the preprocessing.
        stack: makes the inputs of a batch of what the transform returns.

    Raises:
        DataError: if images meet a text backbone, or texts an image backbone.
    """
    images = isinstance(preprocess, ImagePreprocess)
    feature = examples.rows.features[examples.column]
    if images != (getattr(feature, "dtype", "") not in ("string", "large_string")):
        raise DataError(
            f"the backbone expects {preprocess.kind} inputs, and column {examples.column!r} holds "
            f"{'texts' if images else 'images'}"
        )
    if isinstance(preprocess, ImagePreprocess):
        transform = transform or preprocess.transform(augment)
    else:
        transform, stack = lambda text: text, collate_text(tokenizer, preprocess)
    return DataLoader(
        _Transformed(examples, transform, sampler),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None and len(examples) >= batch_size,
        num_workers=workers,
        collate_fn=_collate(stack),
        worker_init_fn=_ignore_signals if workers else None,
    )


def readable(batches: DataLoader[Any]) -> Iterator[tuple[Any, Tensor]]:
    """Yield (inputs, labels) of the batches in which something could be read, and note which rows could not."""
    return (batch for _, batch in numbered(batches))


def numbered(batches: DataLoader[Any]) -> Iterator[tuple[int, tuple[Any, Tensor]]]:
    """Yield what `readable` does, each with the number of batches up to it, those that could not be read included."""
    for number, (inputs, labels, unreadable) in enumerate(batches, 1):
        examples: Examples = batches.dataset.examples  # type: ignore[attr-defined]
        # noted here and not where they are read: that may be another process
        examples.unreadable.update(unreadable)
        if inputs is not None:
            yield number, (inputs, labels)
