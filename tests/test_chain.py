"""Chains of patches: each link checked, all or nothing, to the bit; squashed, shown, and as commits of a Hub."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from maskpack import Adapter, load_mask, load_masked, pull, push, save_adapter, unload_mask
from maskpack.adapter.chain import check_chain, squash_adapters
from maskpack.adapter.content import About
from maskpack.adapter.read import read_adapter
from maskpack.backbone.fingerprint import measure_body
from maskpack.errors import BackboneMismatchError, ConfigError, StateError

from .helpers_cli import BACKBONE
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import HubServer
from .helpers_hub_server.accounts import WRITE_TOKEN
from .helpers_models import bits, make_adapter, patch, same, stepped


@pytest.fixture
def states(tiny: nn.Module) -> list[nn.Module]:
    """The base in bfloat16 and three states after it; statistics in float32, as patches hold them."""
    base = tiny.bfloat16()
    for buffer in base.buffers():
        buffer.data = buffer.float() if buffer.is_floating_point() else buffer
    found = [base]
    for seed in (1, 2, 3):
        found.append(stepped(found[-1], seed))
    return found


@pytest.fixture
def chain(states: list[nn.Module], tmp_path: Path) -> list[Adapter]:
    return [patch(tmp_path / f"p{k}", states[k], states[k + 1]) for k in range(3)]


def test_a_chain_is_one_patch(states: list[nn.Module], chain: list[Adapter], tmp_path: Path) -> None:
    model = copy.deepcopy(states[0])
    before = bits(model)
    for links in ([chain[0]], chain[:2], [Path(one.path).parent for one in chain]):
        load_mask(model, links)
        assert same(bits(model), bits(states[len(links)]))
        unload_mask(model)
        assert same(bits(model), before)
    load_mask(model, chain, restorable=False)
    assert same(bits(model), bits(states[3]))
    with pytest.raises(StateError, match="restorable=False"):
        unload_mask(model)
    one = squash_adapters(chain, tmp_path / "one", states[0])
    assert one.about.result == chain[-1].about.result
    assert one.base.digests == chain[0].base.digests
    assert one.size < sum(each.size for each in chain)
    model = copy.deepcopy(states[0])
    load_mask(model, tmp_path / "one")
    assert same(bits(model), bits(states[3]))
    unload_mask(model)
    assert same(bits(model), before)
    last = patch(tmp_path / "back", states[3], states[0])
    with pytest.raises(StateError, match="undo each other"):
        squash_adapters([*chain, last], tmp_path / "none", states[0])
    with pytest.raises(StateError, match="no patch"):
        squash_adapters([make_adapter(tmp_path / "mask", states[0])], tmp_path / "none", states[0])
    load_mask(model, [*chain, last])  # a run may go back to where it was
    assert same(bits(model), before)


def test_what_is_no_chain_is_refused(states: list[nn.Module], chain: list[Adapter], tmp_path: Path) -> None:
    model = copy.deepcopy(states[0])
    before = bits(model)
    wrong: dict[str, tuple[type[Exception], list[Any]]] = {
        "a patch is missing between them": (BackboneMismatchError, [chain[0], chain[2]]),
        "a step back": (BackboneMismatchError, [*chain[:2], chain[1]]),
        "which is none of the states": (BackboneMismatchError, chain[::-1]),
        "the model has others": (BackboneMismatchError, chain[1:]),
        "does not say what its result is": (
            StateError,
            [convert_without_result(chain[0], states[0], tmp_path), chain[1]],
        ),
        "is no patch": (StateError, [make_adapter(tmp_path / "mask", states[0]), chain[0]]),
        "at least one patch": (ConfigError, []),
        "for an adapter alone": (ConfigError, chain),
    }
    for what, (kind, links) in wrong.items():
        with pytest.raises(kind, match=what):
            load_mask(model, links, mode="source" if "alone" in what else "target")
        assert same(bits(model), before)
    with pytest.raises(BackboneMismatchError, match="a step back"):
        check_chain([*chain, chain[0]])


def convert_without_result(one: Adapter, base: nn.Module, folder: Path) -> Adapter:
    parts = one.parts(base=base)
    return save_adapter(folder / "plain", parts, one.base, weights=base, profile="max")


def test_a_result_that_is_not_kept_puts_the_base_back(
    states: list[nn.Module], chain: list[Adapter], tmp_path: Path
) -> None:
    model, parts = copy.deepcopy(states[0]), chain[1].parts(base=states[1])
    wrong = About(result=chain[2].about.result)
    lying = save_adapter(tmp_path / "lying", parts, chain[1].base, wrong, weights=states[1], profile="max")
    before = bits(model)
    with pytest.raises(BackboneMismatchError, match="are not those that it says it makes"):
        load_mask(model, [chain[0], lying])
    assert same(bits(model), before)
    save_file(states[0].state_dict(), file := tmp_path / "base.safetensors")
    with pytest.raises(BackboneMismatchError, match="are not those that it says it makes"):
        load_masked(emptied(model), file, [chain[0], lying])
    assert all(one.is_meta for one in model.parameters())
    model = copy.deepcopy(states[0])
    load_mask(model, [chain[0], lying], verify="off")
    assert same(bits(model), bits(states[2]))


def test_patches_of_earlier_commits_are_fetched(states: list[nn.Module], chain: list[Adapter], hub: HubServer) -> None:
    for one in chain:
        commit = push(Path(one.path).parent, "alice/run", token=WRITE_TOKEN).commit
    pull("alice/run")
    for most in (len(chain) - 1, 0):  # each earlier one by one request, and kept
        hub.log.clear()
        load_mask(model := copy.deepcopy(states[0]), "alice/run")
        assert same(bits(model), bits(states[3]))
        assert len(hub.requests("GET", "/resolve/")) == most
        assert not hub.requests("HEAD")
        assert not hub.requests("POST")
    for start in (0, 1, 2):
        model = copy.deepcopy(states[start])
        load_mask(model, "alice/run")
        assert same(bits(model), bits(states[3]))
        unload_mask(model)
        assert same(bits(model), bits(states[start]))
    other = stepped(states[0], 9)
    before = bits(other)
    with pytest.raises(BackboneMismatchError):
        load_mask(other, f"alice/run@{commit}")
    assert same(bits(other), before)
    shown = CliRunner().invoke(app, ["log", "alice/run", "--json"])
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)["patches"]
    assert [row["result"] for row in rows] == [one.about.result["float32"] for one in chain[::-1]]
    assert [row["stands_on"] for row in rows] == [rows[1]["patch"], rows[2]["patch"], None]


def emptied(model: nn.Module) -> nn.Module:
    """Put a model's weights on the meta device; its statistics keep their float32."""
    return model.to("meta")


def test_base_and_chain_together(states: list[nn.Module], chain: list[Adapter], tmp_path: Path, hub: HubServer) -> None:
    files = [tmp_path / f"{k}.safetensors" for k in (0, 1)]
    for file, state in zip(files, states, strict=False):
        save_file(state.state_dict(), file)
    for one in chain:
        push(Path(one.path).parent, "alice/run", token=WRITE_TOKEN)
    for file, ref in ((files[0], chain), (files[1], chain[1:]), (files[0], "alice/run"), (files[1], "alice/run")):
        model = emptied(copy.deepcopy(states[0]))
        load_masked(model, file, ref)
        assert same(bits(model), bits(states[3]))
    wrong: dict[str, tuple[type[Exception], Any]] = {
        "a patch is missing between them": (BackboneMismatchError, [chain[0], chain[2]]),
        "the model has others": (BackboneMismatchError, chain[1:]),
        "at least one patch": (ConfigError, []),
        "for an adapter alone": (ConfigError, chain),
    }
    for what, (kind, links) in wrong.items():
        with pytest.raises(kind, match=what):
            load_masked(
                emptied(copy.deepcopy(states[0])), files[0], links, mode="source" if "alone" in what else "target"
            )


def test_command_line(tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        done = CliRunner().invoke(app, [str(one) for one in arguments])
        assert done.exit_code == 0, done.output
        return done

    from maskpack.backbone.load import load_backbone

    model = load_backbone(BACKBONE[1], random_weights=0).model
    files, backbone = [tmp_path / f"{k}.safetensors" for k in range(3)], BACKBONE[:2]
    for k, file in enumerate(files):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(k * 1e-3 * (torch.rand_like(parameter) < 0.1))
        save_file(model.state_dict(), file)
    for k in (1, 2):
        made = ["--weights", files[k - 1], "--output", tmp_path / f"patch{k}"]
        run("pack", files[k], "--from", "checkpoint", *backbone, *made)
    patches = [tmp_path / "patch1", tmp_path / "patch2"]
    squashed = ["--weights", files[0], "--output", tmp_path / "both.safetensors"]
    run("squash", *patches, *backbone, *squashed)
    run(
        "export",
        tmp_path / "both.safetensors",
        *backbone,
        "--weights",
        files[0],
        "--output",
        tmp_path / "end.safetensors",
    )
    first, last = (load_backbone(BACKBONE[1], weights=one).model for one in (tmp_path / "end.safetensors", files[2]))
    assert same(bits(first), bits(last))
    assert read_adapter(tmp_path / "both.safetensors").about.result is not None
    assert "patch2" in run("log", *patches).stdout
    assert measure_body(last, ()).digest == read_adapter(patches[1]).about.result["float32"]  # type: ignore[index]
    refused = CliRunner().invoke(app, ["squash", *map(str, patches[::-1]), *backbone, "--output", str(tmp_path / "x")])
    assert refused.exit_code == 1
    assert not (tmp_path / "x").exists()
