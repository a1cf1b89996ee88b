"""The objective of a language model: the next token of texts and answers."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...adapter.predict import generate
from ...backbone.classifier import IGNORED, Batch, modes_kept, to_device
from ...backbone.load import Backbone
from ...backbone.model import Head
from ...errors import DataError
from ...preprocess import ChatPreprocess, TextPreprocess
from ..config import TrainConfig
from ..data.base import Data, Examples, column_kind, loader, readable
from ..data.load import TEXT_NAMES
from ..data.tokens import ANSWERS, PROMPTS, cut, is_chat, pad
from ..worth import SPLITS
from .base import OBJECTIVES, Objective

MOST = 700  # nats of a token: the perplexity of a model that is lost is large, and a number


@OBJECTIVES.register
class TextGeneration(Objective):
    """Cross-entropy of the next token: of texts all tokens, of chats and of rows with an answer those of answers."""

    id: ClassVar[str] = "text-generation"
    reference: ClassVar[str] = "https://arxiv.org/abs/2004.12406"
    tasks: ClassVar[tuple[str, ...]] = ("text-generation",)
    needs_labels: ClassVar[bool] = True
    supervised: ClassVar[bool] = True
    least_classes: ClassVar[int] = 0
    augments: ClassVar[bool] = False
    figure: ClassVar[str] = "perplexity"

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        self.module = backbone.model

    @classmethod
    def columns(
        cls, features: Mapping[str, Any], column: str | None, label: str | None, task: str | None
    ) -> tuple[str, str | None]:
        """Return the columns of chats, None; of prompts and answers; or of texts, and of whether they end there."""
        chats = [name for name, one in features.items() if column_kind(one) == "chat"]
        texts = [name for name, one in features.items() if column_kind(one) == "text"]
        answer = label or next((name for name in ANSWERS if name in texts), None)
        prompt = next((name for name in PROMPTS if name in texts and name != answer), None)
        if column is None and chats:
            return chats[0], None
        if column is not None and (label is None or column in chats):
            return column, "ends" if "ends" in features else None
        if answer is not None and (column or prompt) is not None:
            return column or str(prompt), answer
        found = [name for name in TEXT_NAMES if name in texts][:1] or texts
        if len(found) != 1:
            raise DataError(
                f"cannot tell which column holds the texts among {', '.join(features)}; name it with --input-column, "
                f"and that of answers to it with --label-column"
            )
        return found[0], "ends" if "ends" in features else None

    @classmethod
    def targets(
        cls, rows: Any, column: str | None, names: Sequence[str] | None, split: str
    ) -> tuple[list[Any], tuple[str, ...]]:
        """Return the answer of each row; of a text whether it ends there, and None of a chat."""
        return [None] * len(rows) if column is None else list(rows[column][:]), ()

    @classmethod
    def prepared(cls, backbone: Backbone, data: Data) -> tuple[Backbone, Data]:
        """Return the data as blocks of tokens, and a backbone that knows whether texts are in a chat template."""
        splits = data.splits
        first = next(iter(splits.values()))
        if is_chat(backbone.tokenizer, first):
            assert isinstance(backbone.preprocess, TextPreprocess)
            backbone = replace(backbone, preprocess=ChatPreprocess(backbone.preprocess.max_length))
        cuts = {name: cut(one, backbone) for name, one in splits.items()}
        data = replace(data, train=cuts.get("train"), validation=cuts.get("validation"), test=cuts.get("test"))
        return backbone, data

    def load(self, examples: Examples, **options: Any) -> Any:
        own = {name: one for name, one in options.items() if name != "augment"}
        return batches_of(self.backbone, examples, **{"batch_size": self.config.batch_size, **own})

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        inputs, targets = batch
        return surprise(module, inputs, targets) / (targets != IGNORED).sum().clamp(min=1)

    def evaluate(self, examples: Examples) -> dict[str, float]:
        return {"perplexity": perplexity(self.module, readable(self.load(examples)))}

    def baseline(self) -> Mapping[str, float]:
        found = {name: self.evaluate(one) for name, one in self.data.splits.items() if name in SPLITS}
        return {f"{name}_raw_perplexity": one["perplexity"] for name, one in found.items()}

    @classmethod
    def measured(cls, backbone: Backbone, examples: Examples, head: Head | None, batch_size: int) -> dict[str, Any]:
        blocks = cut(examples, backbone)
        batches = batches_of(backbone, blocks, batch_size=batch_size)
        tokens = sum(int((one != IGNORED).sum()) for one in blocks.labels)
        return {"perplexity": perplexity(backbone.model, readable(batches)), "tokens": tokens}


def batches_of(backbone: Backbone, blocks: Examples, **options: Any) -> Any:
    """Return a loader of blocks of tokens; options are those of `loader`."""
    return loader(blocks, backbone.preprocess, join=pad, **options)


def surprise(module: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
    """Return the sum of -log p of the targets, a scalar in float32."""
    logits = module(**inputs, use_cache=False).logits
    wanted = targets != IGNORED
    return nn.functional.cross_entropy(logits[wanted].float(), targets[wanted], reduction="sum")


@torch.no_grad()
def perplexity(module: nn.Module, batches: Iterable[Batch]) -> float:
    """Return exp of the mean -log p over the tokens of all batches, in evaluation mode."""
    device, total, count = next(module.parameters()).device, 0.0, 0
    with modes_kept(module):
        module.eval()
        for inputs, targets in batches:
            total += float(surprise(module, to_device(inputs, device), targets.to(device)))
            count += int((targets != IGNORED).sum())
    if not count:
        raise DataError("there is no token to measure on; give longer texts, or answers")
    return math.exp(min(total / count, MOST)) if math.isfinite(total) else math.exp(MOST)


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """Return the last number in a text, None if there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def exact_answers(backbone: Backbone, examples: Examples, most: int, batch_size: int = 8, tokens: int = 256) -> float:
    """Return the share of prompts whose generated answer ends in the number that the row's answer ends in.

    Args:
        backbone: with an adapter loaded, and its preprocessing. most: first rows of the split that are asked.
    """
    rows = examples.indices[:most]
    prompts, wanted = [examples.rows[row][examples.column] for row in rows], [examples.labels[row] for row in rows]
    if not prompts or not all(isinstance(one, str) and last_number(one) is not None for one in wanted):
        raise DataError("exact answers need rows with a prompt, and an answer that has a number; name both columns")
    assert isinstance(backbone.preprocess, TextPreprocess)
    given = generate(backbone.model, prompts, backbone.preprocess, backbone.tokenizer, tokens, 0.0, batch_size)
    right = sum(last_number(one) == last_number(other) for one, other in zip(given, wanted, strict=True))
    return right / len(prompts)
