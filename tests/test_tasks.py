"""Tasks of training beside classes: language models, classes of words, numbers; from the command line and in Python."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from typer.testing import CliRunner, Result

from maskpack import load_adapter, load_backbone, load_mask, save_adapter, unload_mask
from maskpack.backbone.classifier import IGNORED
from maskpack.errors import ConfigError, DataError
from maskpack.preprocess import ChatPreprocess, TextPreprocess
from maskpack.training import TrainConfig, load_data, train_mask
from maskpack.training.config import RECIPES
from maskpack.training.evaluate import as_loaded
from maskpack.training.objectives.language import TextGeneration, cut, exact_answers, last_number

from .helpers_language import ROOT, SUMS, language_model, sums_file, text_folder

QUICK = TrainConfig(**{**RECIPES["text-generation"], "distance": 1.6}, steps=16)


def call(*arguments: str, code: int = 0) -> Result:
    """Run a verb, which has to end with this code."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, one for chats, and data."""
    folder = tmp_path_factory.mktemp("language")
    language_model(folder / "lm")
    language_model(folder / "chat", chat=True, steps=10)
    text_folder(folder / "texts")
    sums_file(folder / "chats.jsonl", True)
    sums_file(folder / "sums.jsonl", False)
    return folder


def learned(blocks: Any, tokenizer: Any) -> list[str]:
    """The text of each block that is learned."""
    return [tokenizer.decode(one[one != IGNORED]) for one in blocks.labels]


def test_texts_are_packed_and_every_token_is_learned_once(world: Path) -> None:
    backbone = load_backbone(f"hf/{world}/lm", task="text-generation", tokens=50)
    data = load_data(f"{world}/texts", task="text-generation")
    assert data.train is not None
    text = (world / "texts/train.txt").read_text()
    assert "".join(data.train.rows["text"]) == text, "rows are pieces of the file"
    assert len(data.train) > 1
    blocks = cut(data.train, backbone)
    assert {len(one["ids"]) for one in blocks.rows[:-1]} == {49}
    assert text[:1] + "".join(learned(blocks, backbone.tokenizer)) == text + "<|end|>"


@pytest.mark.parametrize("file", ["chats.jsonl", "sums.jsonl"])
def test_of_chats_and_answers_only_answers_are_learned(world: Path, file: str) -> None:
    chat = load_backbone(f"hf/{world}/chat", task="text-generation")
    data = load_data(f"{world}/{file}", task="text-generation")
    assert data.train is not None
    backbone, blocks = TextGeneration.prepared(chat, data)
    assert backbone.preprocess == ChatPreprocess(256), "of the 512 it takes 256"
    assert blocks.train is not None
    assert learned(blocks.train, chat.tokenizer) == [f"{answer}<|end|>\n" for _, answer in SUMS]
    whole = chat.tokenizer.decode(blocks.train.rows[0]["ids"])
    assert whole == "<|start|>user\n0 plus 0?<|end|>\n<|start|>assistant\nIt is\n#### 0<|end|>"


def test_answers_without_a_template_and_turns_of_a_chat(world: Path, tmp_path: Path) -> None:
    plain, chat = (load_backbone(f"hf/{world}/{name}", task="text-generation") for name in ("lm", "chat"))
    data = load_data(f"{world}/sums.jsonl", task="text-generation")
    assert data.train is not None
    assert learned(cut(data.train, plain), plain.tokenizer)[1] == " It is\n#### 1<|end|>"
    turns = [("system", "Be short."), ("user", "a"), ("assistant", "B"), ("user", "c"), ("assistant", "D")]
    (tmp_path / "two.jsonl").write_text(json.dumps({"messages": [{"role": r, "content": t} for r, t in turns]}))
    two = load_data(f"{tmp_path}/two.jsonl", task="text-generation")
    assert two.train is not None
    assert learned(cut(two.train, chat), chat.tokenizer) == ["B<|end|>\nD<|end|>\n"]
    with pytest.warns(UserWarning, match="1 of 1 rows are longer than 60 tokens, and cut off there; give more tokens"):
        short = cut(two.train, replace(chat, preprocess=TextPreprocess(60)))
    assert learned(short, chat.tokenizer) == ["B<|end|>\n"]
    with pytest.raises(DataError, match="has chats, and the backbone's tokenizer has no chat template"):
        cut(two.train, plain)


def test_command_line_from_text_to_text(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = f"train --task text-generation --backbone hf/{world}/lm --data {world}/texts --tokens 50 --steps 16 --json"
    found = json.loads(call(*train.split(), "--output", "m", "--distance", "1.6").stdout)
    assert found["test_perplexity"] < found["test_raw_perplexity"]
    assert found["test_over_raw"] == found["test_raw_perplexity"] - found["test_perplexity"]
    assert found["bits_per_changed_weight"] > 0
    assert found["file_bytes"] > found["mask_bytes"]
    assert found["lora_rank_8_4bit_bytes"] == 8 * found["lora_rank_1_4bit_bytes"]
    base = ("--backbone", f"hf/{world}/lm")
    measured = json.loads(call("eval", "./m", *base, "--data", f"{world}/texts", "--batch-size", "8", "--json").stdout)
    assert measured["perplexity"] == found["test_perplexity"], "to the bit"
    described = json.loads(call("inspect", "./m", "--json").stdout)
    assert (described["task"], described["preprocess"]) == ("text-generation", {"kind": "text", "max_length": 50})
    assert "the raw model has the perplexity" in Path("m/README.md").read_text()
    assert "pipeline_tag: text-generation" in Path("m/README.md").read_text()
    told = json.loads(call("generate", "./m", *base, "--prompt", "The", "--tokens", "5", "--json").stdout)["generated"]
    backbone = load_backbone(f"hf/{world}/lm", task="text-generation")
    ids = backbone.tokenizer("The", return_tensors="pt")["input_ids"]
    raw = backbone.model(ids).logits
    load_mask(backbone.model, "./m")
    expected = backbone.model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert told == [{"prompt": "The", "text": backbone.tokenizer.decode(expected, skip_special_tokens=True)}]
    assert torch.equal(unload_mask(backbone.model)(ids).logits, raw)


def test_a_run_that_stops_goes_on_to_the_bit(world: Path, tmp_path: Path) -> None:
    def trained(folder: Path | None, steps: int | None = None, **options: Any) -> Any:
        backbone = load_backbone(f"hf/{world}/lm", task="text-generation", tokens=50)
        data = load_data(f"{world}/texts", task="text-generation", validation_fraction=0.4)
        kinds = []

        def stop(event: Any) -> None:
            kinds.append(event["event"])
            if steps is not None and event["step"] >= steps:
                raise KeyboardInterrupt

        result = train_mask(backbone, data, QUICK, output=folder, report=stop, **options)
        assert kinds[0] == "begin", "something is seen at once"
        return result

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", 10, checkpoint_every="7steps")
    again, whole = trained(tmp_path / "run", resume=True), trained(None)
    assert again.metrics == whole.metrics
    assert all(again.parts.masks[name] == whole.parts.masks[name] for name in whole.parts.masks)
    assert whole.metrics["validation_perplexity"] < whole.metrics["validation_raw_perplexity"]


def test_exact_answers_are_counted_by_their_last_number(world: Path, tmp_path: Path) -> None:
    assert [last_number(one) for one in ("no", "1,234.50 in all", "a 3 - 4", "-7.")] == [None, 1234.5, 4.0, -7.0]
    backbone = load_backbone(f"hf/{world}/chat", task="text-generation")
    data = load_data(f"{world}/sums.jsonl", task="text-generation")
    result = train_mask(backbone, data, QUICK)
    save_adapter(tmp_path / "m", result.parts, result.base, result.about)
    adapter = load_adapter(f"{tmp_path}/m")
    load_mask(backbone.model, adapter)
    assert data.train is not None
    share = exact_answers(as_loaded(backbone, adapter), data.train, 12, tokens=12)
    asked = [question for question, _ in SUMS[:12]]
    seen = list[tuple[int, int]]()
    options: dict[str, Any] = {"tokens": 12, "batch_size": 5, "progress": lambda *one: seen.append(one)}
    given = adapter.generate(backbone.model, asked, tokenizer=backbone.tokenizer, **options)
    assert seen == sorted(seen)
    assert 0 < seen[-1][0] <= seen[-1][1]
    right = [last_number(one) == last_number(answer) for one, (_, answer) in zip(given, SUMS, strict=False)]
    assert share == sum(right) / 12
    base = ("--backbone", f"hf/{world}/chat", "--data", f"{world}/sums.jsonl", "--split", "train")
    found = json.loads(call("eval", f"{tmp_path}/m", *base, "--answers", "3", "--json").stdout)
    assert found["exact_answers"] == exact_answers(as_loaded(backbone, adapter), data.train, 3)
    drawn = [adapter.generate(backbone.model, asked[:1], tokens=4, temperature=2.0) for _ in range(4)]
    assert len({one for (one,) in drawn}) > 1


def test_classes_of_words(world: Path, tmp_path: Path) -> None:
    lines = [one.split() for one in (ROOT / "LICENSE").read_text().splitlines() if len(one.split()) > 3][:120]
    rows = [{"tokens": [w.lower() for w in one], "tags": [str(w[0].isupper()) for w in one]} for one in lines]
    (data := tmp_path / "data").mkdir()
    for split, own in (("train", rows[:90]), ("test", rows[90:])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    options = ("--task", "token-classification", "--backbone", f"hf/{world}/lm", "--data", str(data))
    done = call("train", *options, "--epochs", "3", "--batch-size", "16", "--json", "--output", f"{tmp_path}/m")
    found = json.loads(done.stdout)
    words = sum(len(row["tags"]) for row in rows[90:])
    most = max(sum(tag == name for row in rows[90:] for tag in row["tags"]) for name in ("True", "False"))
    assert found["test_accuracy"] >= most / words - 0.02
    assert {"test_probe_accuracy", "test_over_probe"} <= found.keys()
    base = ("--backbone", f"hf/{world}/lm", "--data", str(data))
    measured = json.loads(call("eval", f"{tmp_path}/m", *base, "--json").stdout)
    assert measured["accuracy"] == found["test_accuracy"]
    assert measured["class_names"] == ["False", "True"]
    assert sum(map(sum, measured["confusion"])) == words, "a word counts once, however many tokens it has"


def test_numbers(world: Path, tmp_path: Path) -> None:
    lines = [one for one in (ROOT / "LICENSE").read_text().splitlines() if one.strip()]
    rows = [{"text": one, "score": 1000 + 10 * sum(letter in "aeiou" for letter in one)} for one in lines]
    (data := tmp_path / "data").mkdir()
    for split, own in (("train", rows[:130]), ("test", rows[130:])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    options = ("--task", "regression", "--backbone", f"hf/{world}/lm", "--data", str(data))
    done = call("train", *options, "--epochs", "3", "--batch-size", "16", "--json", "--output", f"{tmp_path}/m")
    found = json.loads(done.stdout)
    assert {"test_r2", "test_probe_r2", "test_over_probe"} <= found.keys()
    base = ("--backbone", f"hf/{world}/lm")
    measured = json.loads(call("eval", f"{tmp_path}/m", *base, "--data", str(data), "--json").stdout)
    assert measured["r2"] == pytest.approx(found["test_r2"], abs=1e-6)
    (tmp_path / "in.txt").write_text("".join(f"{row['text']}\n" for row in rows[130:]))
    given = json.loads(call("predict", f"{tmp_path}/m", f"{tmp_path}/in.txt", *base, "--json").stdout)["predictions"]
    numbers = torch.tensor([float(row["score"]) for row in rows[130:]])
    error = (torch.tensor([one["score"] for one in given]) - numbers).square().sum()
    assert {one["label"] for one in given} == {"score"}
    assert 1 - error / (numbers - numbers.mean()).square().sum() == pytest.approx(found["test_r2"], abs=1e-3)


def test_what_does_not_fit_a_task_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for images, so task text-generation or tokens None is not possible"):
        load_backbone("timm/test_resnet", random_weights=0, task="text-generation")
    with pytest.raises(ConfigError, match=r"tokens must be from 2 to 256, which hf/lm takes, got 1000"):
        load_backbone(f"hf/{world}/lm", tokens=1000)
    (tmp_path / "x.jsonl").write_text('{"a": "x", "b": "y"}\n')
    with pytest.raises(DataError, match="cannot tell which column holds the texts among a, b; name it with"):
        load_data(f"{tmp_path}/x.jsonl", task="text-generation")
    with pytest.raises(DataError, match="'x' in column 'a', expected numbers"):
        load_data(f"{tmp_path}/x.jsonl", task="regression", label_column="a", input_column="b")
    train = ("train", "--task", "text-generation", "--backbone", f"hf/{world}/lm", "--data", f"{world}/texts")
    refused = call(*train, "--output", f"{tmp_path}/m", "--head-kind", "masked", code=2)
    assert "does not use --head-kind" in refused.stderr
    assert not (tmp_path / "m").exists()
