"""The model card: ours in the front matter and in the fence, its owner's everywhere else."""

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from markdown_it import MarkdownIt

from maskpack import MaskSet
from maskpack.adapter.card import BEGIN, END, base_model, render_card, update_card
from maskpack.adapter.content import Parts
from maskpack.adapter.describe import inspect_adapter
from maskpack.adapter.write import save_adapter
from maskpack.errors import ConfigError, DataError, escape

from .helpers_adapter import base_of, random_masks

SHAPES = {"a.weight": (4, 3)}


def described(path: Path, base: str = "timm/resnet18.a1_in1k", **options: Any) -> dict[str, Any]:
    save_adapter(path / "x.safetensors", random_masks(SHAPES), base_of(SHAPES, base), **options)
    return inspect_adapter(path / "x.safetensors")


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_without_a_head_says_what_there_is_instead(tmp_path: Path) -> None:
    said = "It has no head: what it gives is features, for nearest neighbours or a linear probe."
    assert said in render_card(described(tmp_path, task="image-feature-extraction"))
    assert said not in render_card(described(tmp_path, task="image-classification"))


def test_card_of_an_adapter_that_replaces_weights_says_so(tmp_path: Path) -> None:
    masks = MaskSet.from_tensors({"a.weight": torch.eye(4, 3, dtype=torch.bool)}, op="replace")
    parts = Parts(masks, values={"a.weight": torch.zeros(9)})
    save_adapter(tmp_path / "x.safetensors", parts, base_of(SHAPES, "timm/x"))
    said = 'replaced by stored values (36 bytes): this is the target. With `load_mask(…, mode="source")` they are 0'
    assert said in render_card(inspect_adapter(tmp_path / "x.safetensors"))
    assert "stored values" not in render_card(described(tmp_path))


def test_new_card(tmp_path: Path) -> None:
    record = {
        "metrics": {"accuracy": 0.91, "steps": 3},
        "data": {"id": "uoft-cs/cifar100", "source": "hub", "rows": {"train": 45000}},
    }
    what = described(tmp_path, task="image-classification", class_names=["a_b", "c"], training=record)
    card = render_card(what, "user/name")
    assert front(card) == {
        "library_name": "maskpack",
        "base_model": "timm/resnet18.a1_in1k",
        "base_model_relation": "adapter",
        "tags": ["maskpack", "binary-mask", f"maskpack:base:{what['base']['digests']['float32'][:12]}"],
        "pipeline_tag": "image-classification",
        "datasets": ["uoft-cs/cifar100"],
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
        'model = load_backbone("timm/resnet18.a1_in1k").model',
        'load_mask(model, "user/name")',
        "maskpack pull user/name",
        "`timm/resnet18.a1_in1k` at revision `aaaa",
        "Data: `uoft-cs/cifar100` of the Hugging Face Hub (examples: train 45,000).",
        "| accuracy | 91.00 % |",
        "a\\_b, c",
        "| default | 1 | 12 |",
        what["mask_id"],
    ):
        assert text in card
    assert update_card(card, card) == card


@pytest.mark.parametrize(
    ("id", "hub", "load"),
    [
        ("timm/x.y", "timm/x.y", "timm/x.y"),
        ("hf/org/name", "org/name", f"hf/org/name@{'a' * 40}"),
        ("torchvision/resnet18", None, f"torchvision/resnet18@{'a' * 40}"),
        ("net:make", None, None),
        ("hf/x", None, None),
        ('timm/x"y', None, None),
    ],
)
def test_base_is_named_as_far_as_others_can_get_it(tmp_path: Path, id: str, hub: str | None, load: str | None) -> None:
    assert base_model(id) == hub
    what = described(tmp_path, id)
    card = render_card(what)
    found = front(card)
    assert (found.get("base_model"), found.get("base_model_relation")) == (hub, hub and "adapter")
    own = [tag for tag in found["tags"] if tag.startswith("maskpack:base-id:")]
    assert own == ([f"maskpack:base-id:{id}"] if id.startswith("torchvision/") else [])
    assert ("load_backbone" in card) == (load is not None)
    if load is not None:
        assert f'model = load_backbone("{load}").model' in card
    code = card[card.index("```python\n") + len("```python\n") :]
    compile(code[: code.index("```")], "card", "exec")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"id": "uoft-cs/cifar100", "source": "hub"}, ["uoft-cs/cifar100"]),
        ({"id": "imdb", "source": "hub"}, ["imdb"]),
        ({"id": "flowers", "source": "image_folder"}, None),
        ({"id": "data/flowers"}, None),  # nobody says that this is a data set of the Hub
        ({"id": "/data/x", "source": "hub"}, None),
        ({"id": "a/b/c", "source": "hub"}, None),
        ({"id": 3, "source": "hub"}, None),
        ("user/name", None),
    ],
)
def test_only_data_sets_of_the_hub_are_named_as_such(tmp_path: Path, data: Any, named: list[str] | None) -> None:
    record = {"data": data, "metrics": {"accuracy": 0.5}}
    found = front(render_card(described(tmp_path, task="image-classification", training=record)))
    assert found.get("datasets") == named
    assert found["model-index"][0]["results"][0]["dataset"]["type"] == (named[0] if named else "unknown")


PLACES = [
    "/home/me/run.toml",
    "~/data/x",
    "./data",
    "../data",
    "C:\\Users\\me me\\x",
    "D:/data",
    "\\\\server\\share",
    "hf//home/me/net",
    "nets/model.py:make",
    "data\\flowers",
    "file:///home/me/x",
    "trained on /home/me/flowers, twice",
    "the data: 'C:\\Users\\me'",
    "see:/home/me/x",
    "from ~me/x",
]


@pytest.mark.parametrize("place", PLACES)
def test_no_place_on_a_disk_is_told(tmp_path: Path, place: str) -> None:
    record = {
        "data": {"id": place, "rows": {place: 1}},
        "settings": {"weights": [place], place: 1},
        "metrics": {f"accuracy {place}": 0.5},
    }
    card = render_card(described(tmp_path, task="image-classification", training=record))
    assert card.count("(local path)") >= 5
    for word in ("home", "Users", "flowers", "server", "model.py", "/x", "/data", "run.toml", "~me"):
        assert word not in card, word


def test_what_is_no_place_stays(tmp_path: Path) -> None:
    kept = [
        "https://x.org/a/b",
        "uoft-cs/cifar100",
        "layer?.*/weight",
        "and/or",
        "digits:5-9",
        "1 / 2",
        "a.py",
        "x \\ y",
    ]
    card = render_card(described(tmp_path, training={"kept": kept, "rate": 0.5, "none": None}))
    block = card[card.index("```json\n") + len("```json\n") :]
    assert json.loads(block[: block.index("```")]) == {"kept": kept, "rate": 0.5, "none": None}


def test_license(tmp_path: Path) -> None:
    what = described(tmp_path)
    stated = render_card(what, license="apache-2.0")
    assert front(stated)["license"] == "apache-2.0"
    assert "license" not in front(render_card(what))
    for text in ("Apache 2.0", "", "mit\nx: y"):
        with pytest.raises(ConfigError, match=r"license must be an identifier .* such as apache-2.0, mit or other"):
            render_card(what, license=text)
    mine = "---\nlicense: mit   # because\n---\n"
    assert update_card(mine, render_card(what)).startswith("---\nlicense: mit\nlibrary_name")
    assert update_card(mine, stated).startswith("---\nlicense: apache-2.0\nlibrary_name")
    # what was stated once is not taken back by silence
    assert update_card(stated, render_card(what)) == stated


@pytest.mark.parametrize(
    ("theirs", "merged"),
    [
        ("[x, y]", ["x", "y", "ours"]),
        ("\n- x\n- ours", ["x", "ours"]),
        ("x", ["x", "ours"]),
        ("", ["ours"]),
        ("[2024]", ["2024", "ours"]),
        ("[{a: b}]", [{"a": "b"}]),  # not for us to understand
    ],
)
def test_data_sets_are_merged(tmp_path: Path, theirs: str, merged: list[Any]) -> None:
    mine = f"---\ndatasets: {theirs}\n---\nWords\n"
    assert front(update_card(mine, render_card(described(tmp_path))))["datasets"] == front(mine)["datasets"]
    new = render_card(described(tmp_path, training={"data": {"id": "ours", "source": "hub"}}))
    card = update_card(mine, new)
    assert front(card)["datasets"] == merged
    assert update_card(card, new) == card


def test_densities_are_told(tmp_path: Path) -> None:
    shapes = {"low": (40, 3), "high": (40, 3), "middle": (40, 3)}
    generator = torch.Generator().manual_seed(0)
    rates = {"low": 0.2, "high": 0.9, "middle": 0.5}
    masks = MaskSet.from_tensors({name: torch.rand(40, 3, generator=generator) < rates[name] for name in shapes})
    save_adapter(tmp_path / "x.safetensors", {"one": masks, "two": masks}, base_of(shapes))
    what = inspect_adapter(tmp_path / "x.safetensors")
    density = {row["name"]: f"{row['density']:.4f}" for row in what["sets"]["one"]["payloads"]}
    told = f"ensity of the 3 masked parameters: lowest {density['low']} in `low`, highest {density['high']} in `high`."
    card = render_card(what)
    assert f"Set `one`: d{told}" in card
    assert f"Set `two`: d{told}" in card


def test_density_that_is_the_same_everywhere(tmp_path: Path) -> None:
    masks = MaskSet.from_tensors({"a": torch.ones(4) == 1, "b": torch.ones(6) == 1})
    save_adapter(tmp_path / "x.safetensors", masks, base_of(["a", "b"]))
    assert "\nDensity of the 2 masked parameters: 1.0000 in every one.\n" in render_card(
        inspect_adapter(tmp_path / "x.safetensors")
    )


def test_text_from_elsewhere_cannot_break_the_card(tmp_path: Path) -> None:
    evil = f"{END}<script>`|"
    names = [evil, "🐈", 'quote" \\ back']
    record = {"note": f"{END}\n```\u2028\x85", "data": '"\n---\nlicense: x\u2028 🐈', "metrics": {f"accuracy {END}": 1}}
    card = render_card(described(tmp_path, task="image-classification", class_names=names, training=record))
    assert card.count(BEGIN) == card.count(END) == 1
    assert card.endswith(END + "\n")
    assert "<script>" not in card
    assert "license" not in front(card)
    assert front(card)["model-index"][0]["results"][0]["dataset"]["name"] == escape(record["data"])
    assert card.count("```") == 6


def test_names_from_elsewhere_cannot_break_the_card(tmp_path: Path) -> None:
    evil = [f"a`{END}", "|b|\u00a0[x](http://x.org)<img>", "c" * 3000]
    save_adapter(tmp_path / "x.safetensors", random_masks(dict.fromkeys(evil, (40,))), base_of(evil))
    card = render_card(inspect_adapter(tmp_path / "x.safetensors"))
    assert card.count(END) == 1
    assert "<img>" not in card
    assert "c" * 100 not in card
    line = next(line for line in card.splitlines() if line.startswith("Density of"))
    assert line.count("`") == 4


def test_links_in_names_are_not_live(tmp_path: Path) -> None:
    card = render_card(described(tmp_path, class_names=["https://x.org", "a@x.org", "[x](y)"]))
    assert "Classes: `https://x.org`, `a@x.org`, \\[x\\](y)\n" in card


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return described(tmp_path_factory.mktemp("adapter"), task="image-classification")


HOSTILE = (
    *("<script>alert(1)</script>", "</td></tr></table>", "<img src=x>", "<http://x.org>", "<!-- x", "&lt;b&gt;"),
    *("![x](http://x.org/a.png)", "[x](y)", "![x](y)", "[x][y]", "[y]: http://x.org", "[^1]", r"\[x\](y)", r"\<b>"),
    *("www.x.org", "WWW.x.org", "http://x.org", "a@x.org", "mailto:a@x.org", "x.org/y", "//x.org", "@user"),
    *(
        "| a | b |",
        "a|b",
        "`a`",
        "``",
        "`",
        "```\n# x",
        "**b**",
        "_b_",
        "__b__",
        "~~b~~",
        "# h",
        "\n\n# h\n\n",
        "\n- a",
    ),
    *(
        "    code",
        "\t",
        "---",
        "===",
        "$$x$$",
        "$x$",
        r"\(x\)",
        r"\\",
        "\u202e\x1b[31m",
        END,
        f"`{END}`",
        r"\`<b>`",
        "1. x",
        "* x",
    ),
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_only_shows_itself(text: str, adapter: dict[str, Any]) -> None:
    """A card full of it is rendered with the structure of one with harmless words, and no text becomes a link."""

    def rendered(text: str) -> tuple[list[str], list[str], str, str]:
        what = copy.deepcopy(adapter)
        what["class_names"] = [text, f"a {text} b", "www.x.org"]
        what["base"]["id"] = what["base"]["revision"] = what["task"] = text
        what["sets"]["default"]["payloads"][0]["name"] = text
        parents = [{"mask_id": text, "reference": text}, {"mask_id": "x", "reference": "y"}]
        data = {"id": text, "source": "hub", "rows": {f"train {text}": 1}}
        combined = {"operation": text, "parents": parents}
        what["training"] = {"metrics": {f"a {text}": 1, "b": 2}, "data": data, "combined": combined, text: text}
        card = render_card(what)
        assert all(letter.isprintable() or letter == "\n" for letter in card)
        assert card.count(BEGIN) == card.count(END) == 1
        blocks = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card[card.index(BEGIN) :])
        tokens = [token for block in blocks for token in [block, *(block.children or [])]]
        # what is text and what a code span depends on the words
        structure = [token.type for token in tokens if token.type not in ("text", "code_inline")]
        cells = [after.content for token, after in itertools.pairwise(blocks) if token.type == "td_open"]
        classes = next(block for block in blocks if block.content.startswith("Classes: "))
        named = "".join(token.content for token in classes.children or ())
        return structure, cells, named, " ".join(token.content for token in tokens if token.type == "text")

    (structure, cells, named, shown), (expected, benign, *_) = rendered(text), rendered("word")
    assert structure == expected
    assert [one for one, other in zip(cells, benign, strict=True) if "word" not in other] == [
        one for one in benign if "word" not in one
    ]
    assert not re.search(r"//|www\.|@|mailto:|\w\.(org|com)", shown, re.IGNORECASE)
    words = re.sub(r"\\u00(60|7c|3c)", lambda found: chr(int(found[1], 16)), named).split()
    assert "".join(words) == "".join(f"Classes: {escape(text)}, a {escape(text)} b, www.x.org".split())


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
    found = front(card)
    assert (found["license"], found["datasets"], found["language"]) == ("mit", ["x", "y"], "en")
    assert found["tags"][:3] == ["vision", "maskpack", "binary-mask"]
    assert len(found["tags"]) == 4
    assert (found["base_model"], found["base_model_relation"]) == ("timm/resnet18.a1_in1k", "adapter")
    assert card.endswith(f"# Title\n\n{block}\n\nMy words: {{x}} \\1.\n")
    assert update_card(card, new) == card
    assert "000000000000" not in card


def test_update_leaves_what_says_the_same_already(tmp_path: Path) -> None:
    what = described(tmp_path)
    tag = f"maskpack:base:{what['base']['digests']['float32'][:12]}"
    mine = f"# mine\nlibrary_name: maskpack\ntags: [binary-mask, vision, maskpack, {tag}]\n"
    mine += "base_model: timm/resnet18.a1_in1k\nbase_model_relation: adapter\n"
    assert update_card(f"---\n{mine}---\n", render_card(what)).startswith(f"---\n{mine}---\n")


def test_update_drops_the_tags_of_another_base(tmp_path: Path) -> None:
    old = render_card(described(tmp_path, "torchvision/resnet18"))
    new = render_card(described(tmp_path, "torchvision/resnet50"))
    card = update_card(old, new)
    assert front(card)["tags"] == front(new)["tags"]
    assert "resnet18" not in card


def test_update_drops_a_base_that_is_no_more(tmp_path: Path) -> None:
    card = update_card(MINE, render_card(described(tmp_path, "net:make")))
    assert "base_model" not in front(card)
    assert front(card)["language"] == "en"


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
        ("---\n- a\n---\n", "not `key: value` lines"),
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


def test_card_says_what_the_masks_are_worth(tmp_path: Path) -> None:
    found = {"test_accuracy": 0.8, "test_probe_accuracy": 0.85, "test_over_probe": -0.05}
    record = {
        "metrics": {**found, "test_accuracy_without_masks": 0.7},
        "lora_bytes": {"rank_1_4bit": 1234, "rank_8_4bit": 9872},
        "warnings": ["the mask was <b> _not_ worth it", 5],
    }
    what = described(tmp_path, training=record)
    card = render_card(what)
    size = what["sets"]["default"]["payload_bytes"]
    for said in (
        "On the test split a linear probe of the raw backbone has the accuracy 85.00 %. This adapter has "
        "80.00 % (-5.00), and 70.00 % with the masks alone taken out.",
        f"The masks take {size:,} bytes; LoRA for the same weights, at 4 bits a number, takes 9,872 at rank 8 and "
        f"1,234 at rank 1.",
        f"Training warned: {escape('the mask was <b> _not_ worth it', 'markdown')}.",
    ):
        assert said in card
    for wrong in ({"lora_bytes": {"rank_1_4bit": "1", "rank_8_4bit": 9}}, {"lora_bytes": 5}, {"warnings": "x"}):
        shown = render_card(described(tmp_path, training={"metrics": {"accuracy": 1.0}, **wrong}))
        assert not any(said in shown for said in ("LoRA", "warned", "raw backbone"))
