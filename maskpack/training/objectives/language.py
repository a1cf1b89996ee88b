"""The objective of a language model: the next token of texts, chats and answers, which are cut into blocks."""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from ..data.base import TEXT_NAMES, Data, Examples, column_kind, loader, no_column, readable
from ..features import SPLITS
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
            remedy = "name it with --input-column, and that of answers to it with --label-column"
            raise no_column("texts", features, remedy)
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

    The backbone has an adapter loaded, and its preprocessing; the first `most` rows are asked.
    """
    rows = examples.indices[:most]
    prompts, wanted = [examples.rows[row][examples.column] for row in rows], [examples.labels[row] for row in rows]
    if not prompts or not all(isinstance(one, str) and last_number(one) is not None for one in wanted):
        raise DataError("exact answers need rows with a prompt, and an answer that has a number; name both columns")
    assert isinstance(backbone.preprocess, TextPreprocess)
    given = generate(backbone.model, prompts, backbone.preprocess, backbone.tokenizer, tokens, 0.0, batch_size)
    right = sum(last_number(one) == last_number(other) for one, other in zip(given, wanted, strict=True))
    return right / len(prompts)


PROMPTS = ("prompt", "question", "instruction", "input", "query")  # names of columns
ANSWERS = ("answer", "completion", "response", "output")
Piece = tuple[list[int], bool]  # tokens, and whether they are learned


def is_chat(tokenizer: Any, examples: Examples) -> bool:
    """Return True if rows go into the tokenizer's chat template: chats, and answers where there is one."""
    if not len(examples):
        return False
    value, answer = examples.rows[examples.indices[0]][examples.column], examples.labels[examples.indices[0]]
    template = getattr(tokenizer, "chat_template", None) is not None
    if isinstance(value, list) and not template:
        raise DataError(
            f"column {examples.column!r} has chats, and the backbone's tokenizer has no chat template; give prompts "
            f"and answers in two columns, or take a backbone for chats"
        )
    return template and (isinstance(value, list) or isinstance(answer, str))


def cut(examples: Examples, backbone: Backbone) -> Examples:
    """Return the rows of a split as blocks of tokens: texts one behind the other, chats and answers one a block.

    What is longer than a block of a chat is cut off; a row without a token to learn is left out.
    """
    tokenizer, preprocess = backbone.tokenizer, backbone.preprocess
    if tokenizer is None or not isinstance(preprocess, TextPreprocess):
        raise DataError(f"the backbone {backbone.id} has no tokenizer; load one for texts, as hf/REPO")
    length, chat = preprocess.max_length, is_chat(tokenizer, examples)
    rows = ((examples.rows[row][examples.column], examples.labels[row]) for row in examples.indices)
    first = examples.labels[examples.indices[0]] if len(examples) else None
    if chat or isinstance(first, str):
        whole = [_row(_answered(tokenizer, value, answer, chat)) for value, answer in rows]
        found = [(ids[: length - 1], targets[: length - 1]) for ids, targets in whole]
        if longer := sum(len(ids) >= length for ids, _ in whole):
            warnings.warn(
                f"{longer} of {len(whole)} rows are longer than {length} tokens, and cut off there; give more tokens",
                stacklevel=2,
            )
    else:
        texts = [(value, ends is not False) for value, ends in rows if value]
        found = list(_packed(_tokens(tokenizer, texts), length))
    blocks = [one for one in found if bool((one[1] != IGNORED).any())]
    if not blocks:
        raise DataError(f"the {len(examples)} rows have no token to learn within {length} tokens; give longer blocks")
    ids, targets = [{"ids": one} for one, _ in blocks], [one for _, one in blocks]
    return replace(examples, rows=ids, column="ids", labels=targets, indices=range(len(blocks)), unreadable=set())


def pad(ids: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Return blocks as one batch, padded behind the shorter ones."""
    together = torch.nn.utils.rnn.pad_sequence
    mask = together([torch.ones_like(one) for one in ids], batch_first=True)
    inputs = {"input_ids": together(list(ids), batch_first=True), "attention_mask": mask}
    return inputs, together(list(targets), batch_first=True, padding_value=IGNORED)


def _answered(tokenizer: Any, value: Any, answer: Any, chat: bool) -> Iterator[Piece]:
    """Yield the pieces of a chat, or of a prompt and its answer, as they are tokenised when an answer is asked for."""

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if not chat:
        yield list(tokenizer(value)["input_ids"]), False
        yield [*encoded(f" {answer}"), *_end(tokenizer)], True
        return
    messages = value if isinstance(value, list) else [*_said(value), {"role": "assistant", "content": answer}]
    before = ""
    for number, one in enumerate(messages):
        if one["role"] == "assistant":
            asked = render(tokenizer, messages[:number], True)
            whole = render(tokenizer, messages[: number + 1], False)
            if not (whole.startswith(asked) and asked.startswith(before)):
                raise DataError("the chat template changes earlier messages, so that answers cannot be told from them")
            yield encoded(asked[len(before) :]), False
            yield encoded(whole[len(asked) :]), True
            before = whole


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def render(tokenizer: Any, messages: Sequence[Any], ask: bool) -> str:
    """Return messages in the chat template; `ask`: up to where an answer begins."""
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    return text


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _row(pieces: Iterable[Piece]) -> tuple[Tensor, Tensor]:
    """Return the tokens of a row, and for each the next one where that is learned."""
    ids, wanted = list[int](), list[int]()
    for piece, learned in pieces:
        ids += piece
        wanted += piece if learned else [IGNORED] * len(piece)
    return torch.tensor(ids[:-1]), torch.tensor(wanted[1:])


def _tokens(tokenizer: Any, texts: Sequence[tuple[str, bool]]) -> list[int]:
    """Return the tokens of texts, one behind the other, with an end behind each that ends there."""
    found, fresh = list[int](), True
    for (_, ends), own in zip(
        texts, tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"], strict=True
    ):
        if fresh and tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False):
            found.append(tokenizer.bos_token_id)
        found += own
        found += _end(tokenizer) if ends else []
        fresh = ends
    return found


def _packed(tokens: Sequence[int], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of a length; each begins with the last token of the one before, so that every token is learned."""
    whole = torch.tensor(tokens)
    for start in range(0, len(whole) - 1, length - 1):
        block = whole[start : start + length]
        yield block[:-1], block[1:]
