"""`maskpack combine` and `maskpack diff`: adapters in, one adapter or a table out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from torch import nn
from typer.testing import CliRunner, Result

from maskpack import MaskSet, combine, fingerprint, load_mask, push, save_adapter, unload_mask
from maskpack.adapter.card import render_card
from maskpack.adapter.content import Parts
from maskpack.adapter.describe import inspect_adapter
from maskpack.adapter.edit import combine_adapters
from maskpack.adapter.read import Adapter, read_adapter
from maskpack.backbone.load import export_state
from maskpack.backbone.model import Embedding, Head

from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer

SELECT = ("conv1.weight", "conv2.weight")
PREPROCESS = {"kind": "image", "size": 8, "resize": 8}
FACTORY = "import torch\n\n\ndef tiny():\n    from tests.conftest import TinyNet\n\n    return TinyNet()\n"


def masks_of(model: nn.Module, seed: int, density: float = 0.7, select: tuple[str, ...] = SELECT) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: model.get_parameter(name).shape for name in select}
    return MaskSet.from_tensors({n: torch.rand(shape, generator=generator) < density for n, shape in shapes.items()})


def save(path: Path, model: nn.Module, masks: Any, **options: Any) -> Adapter:
    base = fingerprint(model, id="tiny:tiny", head=["fc"])
    return save_adapter(path, masks, base, **{"preprocess": PREPROCESS, **options})


@pytest.fixture
def folder(tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four adapters of one base, a to d, and the base's own file; b has a head and more, d is of one parameter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setenv("COLUMNS", "200")
    for seed, name in enumerate("ac"):
        save(tmp_path / name, tiny, masks_of(tiny, seed), task="image-classification")
    rich = Parts(
        masks_of(tiny, 7),
        Head(Embedding("fc"), torch.ones(3, 16), torch.zeros(3)),
        statistics={"bn1.running_mean": torch.ones(8)},
        parameters={"bn2.bias": torch.ones(16)},
    )
    save(tmp_path / "b", tiny, rich, class_names=["x", "y", "z"], training={"seed": 1}, preprocess=None)
    save(tmp_path / "d", tiny, masks_of(tiny, 8, select=SELECT[:1]))
    (tmp_path / "tiny.py").write_text(FACTORY)
    export_state(tmp_path / "tiny.safetensors", tiny)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def ok(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments: object, code: int = 2) -> str:
    """Run what must fail; return the message on one line."""
    result = run(*arguments)
    assert result.exit_code == code, result.stdout
    assert result.stdout == ""
    assert not Path("out").exists()
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["majority", "./a", "./b", "./c"], {}),
        (["k-of-n", "./a", "./b", "./c", "-k", "1"], {"k": 1}),
        (["weighted", "./a", "./b", "--weight", "0.25", "--weight", "0.7"], {"weights": [0.25, 0.7]}),
        (["difference", "./a", "./c"], {}),
        (["not", "./b"], {}),
        (["xor", "a/maskpack_model.safetensors", "./c"], {}),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_combines(folder: Path, tiny: nn.Module, words: list[str], options: dict[str, Any]) -> None:
    refs = [word for word in words if "/" in word]
    parents = [read_adapter(ref) for ref in refs]
    facts = ok("combine", *words, "--output", "out")
    made = read_adapter("out")
    expected = combine(words[0], [parent.parts().masks for parent in parents], **options)
    assert made.parts().masks == expected
    assert (facts["density"], facts["mask_id"]) == (expected.density, made.mask_id)
    assert facts["adapter"] == "./out", "as verbs take it"
    assert (made.base.digests, made.about.preprocess) == (parents[0].base.digests, parents[0].about.preprocess)
    assert made.about.training == {
        "combined": {
            "operation": words[0],
            "missing": "error",
            "parents": [{"mask_id": parent.mask_id} for parent in parents],
            **options,
        }
    }
    load_mask(tiny, made)
    kept = expected["conv1.weight"].tensor()
    assert torch.equal(tiny.get_parameter("conv1.weight") != 0, kept)
    unload_mask(tiny)
    ok("combine", *words, "--output", "again")
    for name in ("maskpack_model.safetensors", "maskpack_config.json", "README.md"):
        assert (folder / "again" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_what_is_left_out_is_said(folder: Path) -> None:
    result = run("combine", "and", "./a", "./b", "--output", "out", "--quiet")
    said = " ".join(result.stdout.split())
    assert "left out: b/maskpack_model.safetensors: head, class names, statistics, trained parameters, training" in said
    assert said.endswith("training record, preprocessing, which is not the first's")
    made = read_adapter("out")
    parts = made.parts(stream=True)
    assert (parts.head, parts.statistics, parts.parameters, made.about.class_names) == (
        None,
        {},
        {},
        None,
    )
    assert made.about.task == "image-feature-extraction"
    assert ok("combine", "and", "./a", "./c", "--output", "other")["left_out"] == []
    again = run("combine", "and", "./a", "./c", "--output", "other", "--overwrite")
    assert again.exit_code == 0
    assert "left out" not in again.stdout


def test_what_all_have_is_kept(folder: Path) -> None:
    assert (
        ok("combine", "or", "./b", "./b", "--output", "out")["left_out"]
        == ["b/maskpack_model.safetensors: training record"] * 2
    )
    whole, made = read_adapter("b"), read_adapter("out")
    assert (made.about.class_names, made.about.task) == (whole.about.class_names, whole.about.task)
    one, other = whole.parts(), made.parts()
    assert one.head is not None
    assert other.head is not None
    assert torch.equal(one.head.weight, other.head.weight)
    assert one.dense.keys() == other.dense.keys()
    assert all(torch.equal(tensor, other.dense[name]) for name, tensor in one.dense.items())


def test_no_local_path_is_stored_and_the_hub_s_reference_is(folder: Path, hub: HubServer) -> None:
    commit = push(folder / "a", "alice/one", token=WRITE_TOKEN).commit
    said = "names no revision, and one is required"
    assert said in refused("combine", "or", "alice/one", "./c", "--output", "out", "--require-revision", code=1)
    assert said in refused("diff", "alice/one", "./c", "--require-revision", code=1)
    ok("combine", "or", "alice/one", "./c", "--output", "out")
    made = read_adapter("out")
    one, other = (read_adapter(name).mask_id for name in "ac")
    assert made.about.training is not None
    assert made.about.training["combined"]["parents"] == [
        {"mask_id": one, "reference": f"alice/one@{commit}"},
        {"mask_id": other},
    ]
    card = (folder / "out" / "README.md").read_text()
    assert f"| `{one}` | `alice/one@{commit}` |\n| `{other}` | - |\n" in card
    for name in ("maskpack_model.safetensors", "maskpack_config.json", "README.md"):
        assert str(folder).encode() not in (folder / "out" / name).read_bytes()


def test_card(folder: Path) -> None:
    made = combine_adapters("k-of-n", [read_adapter(name) for name in "abc"], "out", k=2)
    card = (folder / "out" / "README.md").read_text()
    assert "## Combined\n\nThe masks are those of 3 adapters, combined by `k-of-n, k = 2`, in this order:\n" in card
    ids = [read_adapter(name).mask_id for name in "abc"]
    table = "| mask_id | adapter |\n| --- | --- |\n" + "".join(f"| `{one}` | - |\n" for one in ids)
    assert table in card
    assert "It has no head: what it gives is features" in card
    about = inspect_adapter(made)
    hostile = {
        "operation": "</`x|`> /home/me/x",
        "parents": [{"mask_id": "a|b`", "reference": "/home/me"}, 7],
        "k": "`",
    }
    shown = render_card({**about, "training": {"combined": hostile}}).split("## Training")[0]
    assert "The masks are those of 1 adapters, combined by `" in shown
    assert "/home" not in shown
    assert r"| `a\u007cb\u0060` | `(local path)` |" in shown
    for strange in ({"combined": 3}, {"combined": {"parents": 3}}, {"combined": {}}):
        assert "## Combined" not in render_card({**about, "training": strange})
    many = {"operation": "or", "parents": [{"mask_id": str(n)} for n in range(60)]}
    assert "… and 10 more." in render_card({**about, "training": {"combined": many}})


def test_other_parameters_are_an_error_unless_asked_for(folder: Path) -> None:
    said = "the mask sets are over different parameters: 1 of 2 are not in all of them, first 'conv2.weight'"
    assert said in refused("combine", "and", "./a", "./d", "--output", "out")
    assert said in refused("diff", "./a", "./d")
    ok("combine", "and", "./d", "./a", "--output", "out", "--missing", "keep")
    made = read_adapter("out")
    assert made.parts().masks["conv2.weight"] == read_adapter("a").parts().masks["conv2.weight"]
    assert made.about.training is not None
    assert made.about.training["combined"]["missing"] == "keep"
    found = {row["name"]: row for row in ok("diff", "./a", "./d", "--missing", "keep")["parameters"]}
    assert found["conv2.weight"]["first_only"] == 0


def test_bases_must_be_one(folder: Path, tiny: nn.Module) -> None:
    with torch.no_grad():
        tiny.get_parameter("conv1.weight")[0] += 1
    save(folder / "e", tiny, masks_of(tiny, 0))
    said = refused("combine", "and", "./a", "./e", "--output", "out", code=1)
    assert "the adapters were made for other weights, a/maskpack_model.safetensors for tiny:tiny (" in said
    assert "1 of the 2 tensors that both mask differ, first 'conv1.weight'; give adapters of one base" in said
    assert "1 of the 2 tensors that both mask differ" in refused("diff", "./e", "./a", code=1)
    save(folder / "f", tiny, masks_of(tiny, 0, select=SELECT[1:]))
    save(folder / "d2", tiny, masks_of(tiny, 0, select=SELECT[:1]))
    assert "they mask no parameter of the same name" in refused("diff", "./f", "./d", code=1)
    assert "but other parameters, buffers or the head's place differ" in refused("diff", "./f", "./a", code=1)


def test_masks_packed_with_the_base_need_it(folder: Path, tiny: nn.Module) -> None:
    kept = MaskSet.from_tensors({name: tiny.get_parameter(name).abs() > 0.05 for name in SELECT})
    save(folder / "m", tiny, kept, codec="logit-base", weights=tiny)
    said = refused("combine", "and", "./a", "./m", "--output", "out", code=1)
    assert "is packed with the weights of tiny:tiny and cannot be decoded alone; pass that model: --backbone" in said
    assert "cannot be decoded alone" in refused("diff", "./a", "./m", code=1)
    base = ["--backbone", "tiny.py:tiny", "--weights", "tiny.safetensors"]
    ok("combine", "and", "./a", "./m", "--output", "out", *base)
    assert read_adapter("out").parts().masks == combine("and", [read_adapter("a").parts().masks, kept])
    assert ok("diff", "./m", "./m", *base)["hamming"] == 0
    other = run("diff", "./a", "./m", "--backbone", "tiny.py:tiny", "--random-weights", "3")
    assert other.exit_code == 1
    assert "this adapter was made for the weights of tiny:tiny" in other.stderr


def test_refuses_several_sets_and_values(folder: Path, tiny: nn.Module) -> None:
    save(folder / "two", tiny, {"x": masks_of(tiny, 0), "y": masks_of(tiny, 1)})
    said = "holds 2 mask sets (x, y), expected an adapter of one; in Python, maskpack.combine takes"
    assert said in refused("combine", "and", "./a", "./two", "--output", "out", code=1)
    assert said in refused("diff", "./two", "./a", code=1)
    mask = torch.rand(8, 3, 3, 3) < 0.5
    replacing = MaskSet.from_tensors({"conv1.weight": mask}, op="replace")
    values = {"conv1.weight": torch.zeros(int((~mask).sum()))}
    save(folder / "r", tiny, Parts(replacing, values=values))
    said = refused("combine", "or", "./r", "./r", "--output", "out")
    assert "r/maskpack_model.safetensors replaces weights by values, in 1 parameters, first 'conv1.weight'" in said
    assert ok("diff", "./r", "./r")["hamming"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["and", "./a"], "'and' takes 2 or more mask sets, got 1"),
        (["not", "./a", "./b"], "'not' takes exactly 1 mask set, got 2"),
        (["k-of-n", "./a", "./b"], "k goes with 'k-of-n' and with no other operation, got none"),
        (["k-of-n", "./a", "./b", "-k", "3"], "k must be from 1 to 2, the number of mask sets; got 3"),
        (["weighted", "./a", "./b", "--weight", "1"], "a weighted vote needs a finite weight from 0 for each of the 2"),
        (["or", "./a", "./b", "--weight", "1"], "weights go with 'weighted' and with no other operation"),
        (["nand", "./a", "./b"], "Invalid value"),
    ],
)  # fmt: skip
def test_wrong_words_are_refused_before_anything_is_read(tmp_path: Path, words: list[str], said: str) -> None:
    assert said in refused("combine", *words, "--output", tmp_path / "out")


def test_an_unequal_scale_is_refused_and_nothing_written(folder: Path, tiny: nn.Module) -> None:
    names = {name: tiny.get_parameter(name).shape for name in SELECT}
    for name, density in (("s", 0.5), ("t", 0.9)):
        masks = {n: torch.rand(shape) < density for n, shape in names.items()}
        save(folder / name, tiny, MaskSet.from_tensors(masks, scale=True))
    said = refused("combine", "and", "./s", "./t", "--output", "out")
    assert "the masks of 'conv1.weight' scale the kept weights differently, by the alphas 0." in said
    ok("combine", "not", "./s", "--output", "out")
    assert (
        read_adapter("out").parts().masks["conv1.weight"].alpha == read_adapter("s").parts().masks["conv1.weight"].alpha
    )
    assert ok("diff", "./s", "./t")["rescaled"] == 2


def test_diff(folder: Path) -> None:
    found = ok("diff", "./a", "./c")
    a, c = (read_adapter(name).parts().masks for name in "ac")
    differing = {name: int((a[name].tensor() != c[name].tensor()).sum()) for name in SELECT}
    assert {row["name"]: row["hamming"] for row in found["parameters"]} == differing
    assert found["hamming"] == sum(differing.values())
    assert found["share"] == found["hamming"] / a.total
    either = sum(int((~(a[name].tensor() & c[name].tensor())).sum()) for name in SELECT)
    assert found["jaccard"] == found["neither"] / either
    assert found["both"] + found["first_only"] + found["second_only"] + found["neither"] == a.total
    assert abs(found["jaccard"] - found["chance"]) < 0.1
    shown = run("diff", "./a", "./c").stdout
    assert shown.startswith(f"≠ {found['hamming']:,} bits differ\n  first: a/maskpack_model.safetensors\n  second: c/")
    assert "parameter" in shown
    assert "conv2.weight" in shown
    assert run("diff", "./a", "./a").stdout.startswith("= all bits are equal\n")


def test_over_an_earlier_adapter_the_owner_s_words_stay(folder: Path) -> None:
    ok("combine", "and", "./a", "./c", "--output", "out")
    card = folder / "out" / "README.md"
    card.write_text(card.read_text() + "\nMy words.\n")
    ok("combine", "or", "./a", "./c", "--output", "out", "--overwrite")
    assert "My words." in card.read_text()
    assert "combined by `or`" in card.read_text()
    ok("combine", "not", "./out", "--output", "out", "--overwrite")
    assert read_adapter("out").parts().masks == combine(
        "not", [combine("or", [read_adapter(n).parts().masks for n in "ac"])]
    )
