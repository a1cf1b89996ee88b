"""A server's model seen as its checkpoint: fused, sliced and renamed weights get what load_mask gives the model."""

import importlib
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from maskpack import MaskSet, fingerprint, load_mask, push, save_adapter, unload_mask
from maskpack.adapter.content import About, Parts
from maskpack.backbone.model import named_parameters
from maskpack.errors import BackboneMismatchError, ConfigError, StateError
from maskpack.runtime.serve import switch_server
from maskpack.runtime.served import Served
from maskpack.safetensors_io import write_tensors

from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import HubServer
from .helpers_hub_server.accounts import WRITE_TOKEN
from .helpers_models import KINDS, masks_of

SIZE, KEYS, HIDDEN = 16, 8, 24


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=SIZE, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()  # type: ignore[no-any-return]


def checkpoint_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in model.state_dict().items() if name != "lm_head.weight"}


class Rank(nn.Module):
    """A worker's share of the weights, laid out as servers do it: q, k, v and gate, up in one, rows and columns cut."""

    def __init__(self, rank: int = 0, of: int = 1):
        super().__init__()
        self.rank, self.of = rank, of
        sizes = {"embed": (64 // of, SIZE), "norm": (SIZE,)}
        for i in range(2):
            sizes |= {
                f"{i}_qkv": ((SIZE + 2 * KEYS) // of, SIZE),
                f"{i}_o": (SIZE, SIZE // of),
                f"{i}_norms": (2, SIZE),
            }
            sizes |= {f"{i}_gate_up": (2 * HIDDEN // of, SIZE), f"{i}_down": (SIZE, HIDDEN // of)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size, dtype=torch.bfloat16), False))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            layer, kind = name.split(".")[2] if ".layers." in name else "", name.split(".")[-2]
            rows, columns = tensor.shape[0] // self.of, tensor.shape[-1] // self.of
            cut = tensor.narrow(0, self.rank * rows, rows) if tensor.dim() > 1 else tensor
            if kind == "embed_tokens":
                target = self.embed.data[: cut.shape[0]]
                self.embed.data[cut.shape[0] :].fill_(0)
            elif kind in ("o_proj", "down_proj"):
                cut = tensor.narrow(1, self.rank * columns, columns)
                target = self.get_parameter(f"{layer}_{kind.removesuffix('_proj')}").data
            elif kind in ("q_proj", "k_proj", "v_proj"):
                start = {"q": 0, "k": SIZE, "v": SIZE + KEYS}[kind[0]] // self.of
                target = self.get_parameter(f"{layer}_qkv").data.narrow(0, start, rows)
            elif kind in ("gate_proj", "up_proj"):
                target = self.get_parameter(f"{layer}_gate_up").data.narrow(0, rows * (kind[0] == "u"), rows)
            else:
                target = self.get_parameter(f"{layer}_norms").data[int("post" in kind)] if layer else self.norm.data
            target.copy_(cut)


def laid_out(model: nn.Module, of: int = 1) -> list[Rank]:
    ranks = [Rank(rank, of) for rank in range(of)]
    for one in ranks:
        one.load_weights(checkpoint_of(model).items())
    return ranks


def same(ranks: list[Rank], others: list[Rank]) -> bool:
    flat, wanted = ([p.view(torch.int16) for one in each for p in one.parameters()] for each in (ranks, others))
    return all(torch.equal(a, b) for a, b in zip(flat, wanted, strict=True))


class Group:
    """Workers in threads, which do everything together."""

    def __init__(self, model: nn.Module, of: int, **options: Any):
        self.ranks, self.values, self.barrier = laid_out(model, of), [None] * of, threading.Barrier(of, timeout=30)
        tensors = checkpoint_of(model)
        lock = threading.Lock()  # a loader's copies are looked at by replacing Tensor.copy_

        def checkpoint() -> Iterator[tuple[str, Tensor]]:
            yield from tensors.items()

        def everyone(rank: int, value: Any) -> list[Any]:
            if lock.locked():
                lock.release()
            self.values[rank] = value
            self.barrier.wait()
            found = list(self.values)
            self.barrier.wait()
            return found

        def make(rank: int) -> Served:
            lock.acquire(timeout=30)
            return Served(self.ranks[rank], checkpoint, torch.bfloat16, tied=True,
                          everyone=lambda value: everyone(rank, value), **options)  # fmt: skip

        self.served = self.all(make)

    def all(self, work: Any) -> list[Any]:
        found: list[Any] = [None] * len(self.ranks)

        def do(rank: int) -> None:
            try:
                found[rank] = work(rank)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=do, args=(rank,)) for rank in range(len(self.ranks))]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        return found

    def switch(self, path: Path | str | None) -> list[Any]:
        def do(rank: int) -> None:
            one = self.served[rank]
            one.switch(None if path is None else one.prepare(path).digest)

        return self.all(do)


def adapter(path: Path, model: nn.Module, kind: str, seed: int = 0) -> Path:
    parts = masks_of(model, kind, seed)
    if kind == "zero":  # one mask packed with the base's weights
        mask = dict(parts.masks)["model.layers.0.mlp.down_proj.weight"]
        parts = Parts(MaskSet({"model.layers.0.mlp.down_proj.weight": mask}))
    if kind == "replace":
        norm = model.get_parameter("model.norm.weight").detach() + 0.5
        parts = Parts(parts.masks, values=parts.values, parameters={"model.norm.weight": norm})
    save_adapter(path, parts, fingerprint(model, id="tests:llama"), weights=model)
    return path


@pytest.mark.parametrize("of", [1, 2])
def test_switches(of: int, tmp_path: Path) -> None:
    model = llama()
    paths = {kind: adapter(tmp_path / kind, model, kind, seed) for seed, kind in enumerate(KINDS)}
    wanted = {}
    for kind, path in paths.items():
        load_mask(model, path)
        wanted[kind] = laid_out(model, of)
        unload_mask(model)
    base, group = laid_out(model, of), Group(model, of, keep=3)
    assert same(group.ranks, base)
    for kind in (*KINDS, "flip", "zero"):
        assert group.switch(paths[kind]) == [None] * of
        assert same(group.ranks, wanted[kind]), kind
        assert {one.active.pinned for one in group.served} == {str(paths[kind] / "maskpack_model.safetensors")}
    assert len(group.served[0]._prepared) == 3
    assert group.switch(None) == [None] * of
    assert same(group.ranks, base)


def test_names_without_the_head_and_a_missing_adapter(tmp_path: Path) -> None:
    model = llama()
    inner = model.get_submodule("model")
    path = adapter(tmp_path / "inner", inner, "ternary")  # its names have no "model." in front
    load_mask(model, path)
    group = Group(model := llama(), 1)
    group.switch(path)
    load_mask(model, path)
    assert same(group.ranks, laid_out(model))
    (error,) = group.switch(tmp_path / "nothing")
    assert "nothing" in str(error)
    assert same(group.ranks, laid_out(model))  # it computes as before


def test_another_base_is_refused(tmp_path: Path) -> None:
    path = adapter(tmp_path / "mask", llama(1), "flip")
    group = Group(llama(), 1)
    with pytest.raises(BackboneMismatchError, match="14 of 14 masked tensors differ"):
        group.served[0].prepare(path)


def test_weights_that_are_not_the_checkpoints(tmp_path: Path) -> None:
    model = llama()
    (rank,) = laid_out(model)
    rank.get_parameter("1_qkv").data[SIZE, 3] += 1
    with pytest.raises(StateError, match="other weights than its checkpoint, first 'model.layers.1.self_attn.k_proj"):
        Served(rank, checkpoint_of(model).items, torch.bfloat16)
    assert torch.Tensor.copy_ is nn.Parameter.copy_


def test_tensors_without_a_place(tmp_path: Path) -> None:
    model = llama()

    class Turned(Rank):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            super().load_weights((name, one.clone() if "down_proj" in name else one) for name, one in weights)

    rank = Turned()
    rank.load_weights(checkpoint_of(model).items())
    served = Served(rank, checkpoint_of(model).items, torch.bfloat16, tied=True)
    with pytest.raises(BackboneMismatchError, match=r"does not hold 'model.layers.0.mlp.down_proj.weight'"):
        served.prepare(adapter(tmp_path / "mask", model, "zero"))


def test_a_worker_that_fails_takes_all_back_to_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    one, other = adapter(tmp_path / "one", model, "flip"), adapter(tmp_path / "other", model, "replace", 1)
    group = Group(model, 2)
    group.switch(one)
    bank = group.served[1]._bank
    real = bank.use
    monkeypatch.setattr(bank, "use", lambda name: real(name) and (_ for _ in ()).throw(RuntimeError("out of luck")))
    left, right = group.switch(other)
    assert "another process of this server failed" in str(left)
    assert str(right) == "out of luck"
    assert same(group.ranks, laid_out(model, 2))
    monkeypatch.undo()
    group.switch(other)
    load_mask(model, other)
    assert same(group.ranks, laid_out(model, 2))


def test_a_chain_of_commits(tmp_path: Path, hub: HubServer) -> None:
    states = [llama()]
    for step in range(2):
        before, after = states[-1], llama()
        after.load_state_dict(before.state_dict())
        own, new, generator = named_parameters(before), named_parameters(after), torch.Generator().manual_seed(step)
        base = fingerprint(before, id="tests:llama")
        with torch.no_grad():
            masks = {name: torch.rand(own[name].shape, generator=generator) > 0.2 for name in base.tensors}
            for name, mask in masks.items():
                new[name].copy_(torch.where(mask, own[name], own[name] * 1.5 + 0.25))
        same_bits = {name: own[name].detach() == new[name].detach() for name in masks}
        values = {name: new[name].detach()[~one] for name, one in same_bits.items()}
        parts = Parts(MaskSet.from_tensors(same_bits, op="replace"), values=values)
        about = About(result=fingerprint(after, id="x").digests)
        save_adapter(tmp_path / f"{step}", parts, base, about, weights=before)
        push(tmp_path / f"{step}", "alice/run", token=WRITE_TOKEN)
        states.append(after)
    for of in (1, 2):
        group = Group(states[0], of)
        assert group.switch("alice/run") == [None] * of
        assert same(group.ranks, laid_out(states[2], of))
    assert Group(states[1], 1).served[0].prepare("alice/run").changed > 0


def test_the_loader_for_sglang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    (rank,) = laid_out(model)
    rank.config = model.config  # type: ignore[assignment]
    write_tensors(tmp_path / "model.safetensors", checkpoint_of(model), {"format": "pt"})
    monkeypatch.setenv("MASKPACK_CHECKPOINT", str(tmp_path))
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    switch = importlib.import_module("sglang_loader").switch
    path = adapter(tmp_path / "mask", model, "flip")
    load_mask(model, path)
    masked = laid_out(model)
    unload_mask(model)
    for ref, wanted in ((path, masked), (tmp_path / "nothing", masked), ("base", laid_out(model))):
        switch(rank, [(str(ref), torch.zeros(1))])
        assert same([rank], wanted)
    assert "nothing does not exist" in caplog.text


class Page(BaseHTTPRequestHandler):
    """Answers every call with a page."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_is_no_vllm() -> None:
    for handler, what in ((Page, "<html>"), (BaseHTTPRequestHandler, "Unsupported method")):
        with HTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.handle_request, daemon=True).start()
            with pytest.raises(StateError, match=f"{what}.*VLLM_SERVER_DEV_MODE"):
                switch_server(f"http://127.0.0.1:{server.server_port}", None)
    with pytest.raises(ConfigError, match="'localhost:8000', expected its URL"):
        switch_server("localhost:8000", None)
