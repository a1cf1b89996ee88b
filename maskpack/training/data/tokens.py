"""Rows of texts, chats, and prompts with answers, cut into blocks of tokens."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...backbone.classifier import IGNORED
from ...backbone.load import Backbone
from ...errors import DataError
from ...preprocess import TextPreprocess
from .base import Examples

PROMPTS = ("prompt", "question", "instruction", "input", "query")  # names of columns
ANSWERS = ("answer", "completion", "response", "output")
Piece = tuple[list[int], bool]  # tokens, and whether they are learned


def is_chat(tokenizer: Any, examples: Examples) -> bool:
    """Return whether rows are put into the tokenizer's chat template: chats, and answers where there is one."""
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
