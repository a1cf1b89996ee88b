"""The model card: ours in the front matter and in the fence, its owner's everywhere else."""

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from maskpack.adapter.card import BEGIN, END, base_model, render_card, update_card
from maskpack.adapter.describe import inspect_adapter
from maskpack.adapter.file import save_adapter
from maskpack.errors import DataError

from .helpers_adapter import base_of, random_masks

SHAPES = {"a.weight": (4, 3)}


def described(path: Path, base: str = "timm/resnet18.a1_in1k", **options: Any) -> dict[str, Any]:
    save_adapter(path / "x.safetensors", random_masks(SHAPES), base_of(SHAPES, base), **options)
    return inspect_adapter(path / "x.safetensors")


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_new_card(tmp_path: Path) -> None:
    record = {"metrics": {"accuracy": 0.91, "steps": 3}, "data": {"id": "uoft-cs/cifar100", "hash": "0"}}
    what = described(tmp_path, task="image-classification", class_names=["a_b", "c"], training=record)
    card = render_card(what, "user/name")
    assert front(card) == {
        "library_name": "maskpack",
        "base_model": "timm/resnet18.a1_in1k",
        "base_model_relation": "adapter",
        "tags": ["maskpack", "binary-mask", f"maskpack:base:{what['base']['digests']['float32'][:12]}"],
        "pipeline_tag": "image-classification",
        "model-index": [{
            "name": "user/name",
            "results": [{
                "task": {"type": "image-classification"},
                "dataset": {"name": "uoft-cs/cifar100", "type": "uoft-cs/cifar100"},
                "metrics": [{"type": "accuracy", "name": "accuracy", "value": 0.91}],
            }],
        }],
    }  # fmt: skip
    for text in (
        'load_mask(model, "user/name")',
        "| accuracy | 0.91 |",
        "a\\_b, c",
        "| default | 1 | 12 |",
        what["mask_id"],
    ):
        assert text in card
    assert update_card(card, card) == card


@pytest.mark.parametrize(
    ("id", "hub"),
    [
        ("timm/x.y", "timm/x.y"),
        ("hf/org/name", "org/name"),
        ("torchvision/resnet18", None),
        ("net:make", None),
        ("hf/x", None),
    ],
)
def test_base_model_only_for_hub_ids(tmp_path: Path, id: str, hub: str | None) -> None:
    assert base_model(id) == hub
    assert front(render_card(described(tmp_path, id))).get("base_model") == hub


def test_text_from_elsewhere_cannot_break_the_card(tmp_path: Path) -> None:
    evil = f"{END}<script>`|"
    names = [evil, "🐈", 'quote" \\ back']
    record = {"note": f"{END}\n```\u2028\x85", "data": '"\n---\nlicense: x\u2028 🐈', "metrics": {f"accuracy {END}": 1}}
    card = render_card(described(tmp_path, task="image-classification", class_names=names, training=record))
    assert card.count(BEGIN) == card.count(END) == 1
    assert card.endswith(END + "\n")
    assert "<script>" not in card
    assert "license" not in front(card)
    assert front(card)["model-index"][0]["results"][0]["dataset"]["name"] == record["data"]
    assert card.count("```") == 4


MINE = f"""---
# my comment
license: mit   # because
tags:
- vision
- maskpack:base:000000000000
- maskpack
datasets: [x,
  y]
# about the base
base_model: other/base
base_model_relation: finetune

language: en
---
# Title

{BEGIN} old {END}

My words: {{x}} \\1.
"""


def test_update_keeps_what_is_the_owners(tmp_path: Path) -> None:
    new = render_card(described(tmp_path))
    card = update_card(MINE, new)
    block = new[new.index(BEGIN) :].rstrip("\n")
    head = '---\n# my comment\nlicense: mit   # because\ntags: ["vision", "maskpack", "binary-mask", "maskpack:base:'
    assert card.startswith(head)
    assert ']\ndatasets: [x,\n  y]\n# about the base\nbase_model: "timm/resnet18.a1_in1k"\n' in card
    assert 'base_model_relation: "adapter"\n\nlanguage: en\nlibrary_name: "maskpack"\n---\n# Title\n\n' in card
    assert card.endswith(f"# Title\n\n{block}\n\nMy words: {{x}} \\1.\n")
    assert update_card(card, new) == card
    assert "000000000000" not in card


def test_update_drops_a_base_that_is_no_more(tmp_path: Path) -> None:
    card = update_card(MINE, render_card(described(tmp_path, "net:make")))
    assert "base_model" not in front(card)
    assert "# about the base\n\nlanguage: en\n" in card


@pytest.mark.parametrize(
    "card", ["", "Words", "Words\n", "---\n---\nWords\n", "---\r\nlicense: mit\r\n---\r\nWords\r\n"]
)
def test_update_adds_what_is_missing(tmp_path: Path, card: str) -> None:
    new = render_card(described(tmp_path))
    found = update_card(card, new)
    assert front(found).items() >= front(new).items()
    assert ("Words" in found) == ("Words" in card)
    assert ("license" in front(found)) == ("license" in card)
    assert found.endswith(f"{new[new.index(BEGIN) :]}")
    assert update_card(found, new) == found


@pytest.mark.parametrize(
    ("card", "match"),
    [
        ("---\na: [\n---\n", "front matter of README.md is not YAML.*correct it"),
        ("---\ndate: 2020-13-45\n---\n", "front matter of README.md is not YAML"),
        ("---\n{a: 1}\n---\n", "not a block of `key: value` lines"),
        ("---\n- a\n---\n", "not a block of `key: value` lines"),
        (f"{BEGIN}\nold", "has only one of <!-- maskpack:begin -->"),
    ],
)
def test_update_refuses_what_it_cannot_understand(tmp_path: Path, card: str, match: str) -> None:
    new = render_card(described(tmp_path))
    with pytest.raises(DataError, match=match):
        update_card(card, new)
    # the adapter is saved nevertheless, and the card left alone
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(DataError, match=match):
        save_adapter(tmp_path, random_masks(SHAPES), base_of(SHAPES))
    assert (tmp_path / "README.md").read_text() == card
    assert (tmp_path / "maskpack_config.json").exists()
