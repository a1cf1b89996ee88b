"""What one of several processes that share a model does: `python -m tests.helpers_sharded FOLDER`.

Every check compares with a model that this process has whole. What was found is written to `FOLDER/RANK.json`, with
the id of the mask that the code of docs/devices.md makes.
"""

import json
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from maskpack import MaskBank, Parts, fingerprint, load_mask, save_adapter, unload_mask
from maskpack.adapter.read import Adapter, read_adapter
from maskpack.backbone.shards import local, whole
from maskpack.errors import BackboneMismatchError, StateError
from maskpack.mask import MaskSet
from maskpack.training import attach_scores, budget, count_trainable, extract_parts
from maskpack.training.scores import density, scored_weights


class Block(nn.Module):
    """Attention with one head, and two layers."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.up, self.down = (
            nn.LayerNorm(6),
            nn.Linear(6, 18),
            nn.Linear(6, inner),
            nn.Linear(inner, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.down(nn.functional.gelu(self.up(x)))  # type: ignore[no-any-return]


class Tiny(nn.Module):
    """A language model of two blocks, whose output layer is its embedding, of sizes that two and four do not divide."""

    def __init__(self, inner: int = 11) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(13, 6), nn.ModuleList([Block(inner), Block(inner)])
        self.output = nn.Linear(6, 13, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.output(x)  # type: ignore[no-any-return]


RANK, WORLD = 0, 1
NORMS: dict[str, Any] = {"train": ["norms"]}


def sharded(model: nn.Module) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    return model


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 13, (3, 8), generator=torch.Generator().manual_seed(seed))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(tokens(99))
    return found


def trained(model: nn.Module, seeds: range, steps: int = 3, optimizer: Any = None) -> Any:
    """Train on the mean loss of some batches."""
    optimizer = optimizer or torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.6)
    for step in range(steps):
        optimizer.zero_grad()
        for seed in seeds:
            ids = tokens(seed + 10 * step)
            logits = model(ids[:, :-1]).flatten(0, 1)
            (nn.functional.cross_entropy(logits, ids[:, 1:].flatten()) / len(seeds)).backward()
        optimizer.step()
    return optimizer


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor.detach()).clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(one, second[name]) for name, one in first.items())


def close(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    # two halves are added exactly; more are added in an order of their own
    return (
        same(first, second)
        if WORLD == 2
        else all(torch.allclose(one, second[n], atol=1e-3) for n, one in first.items())
    )


def scores_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(one.scores.detach()).clone() for name, one in scored_weights(model).items()}


def attached(order: str, **options: Any) -> nn.Module:
    model = Tiny()
    if order == "before":
        attach_scores(model, **options)
        return sharded(model)
    attach_scores(sharded(model), **options)
    return model


def kept_to(model: nn.Module) -> tuple[int, dict[str, Tensor]]:
    """Let masks become a tenth smaller; bytes, and the gradients of the penalty."""
    scored = scored_weights(model)
    control = budget.RateControl([*scored.values()], 0.9 * budget.coded_bytes(one.mask() for one in scored.values()))
    for one in scored.values():
        one.scores.grad = None
    control.penalty().backward()  # type: ignore[no-untyped-call]
    gradients = {name: whole(one.scores.grad) for name, one in scored.items()}
    return control.fit(), gradients


def trains(order: str, folder: Path, **options: Any) -> Iterator[tuple[str, bool]]:
    """Train with each process's own batch, save, resume, and take the scores off."""
    alone, base = Tiny(), bits(Tiny())
    attach_scores(alone, **options)
    trained(alone, range(WORLD))
    model = attached(order, **options)
    counts = count_trainable(model)
    trained(model, range(RANK, RANK + 1))
    yield "scores", close(scores_of(model), scores_of(alone))
    yield "counted", counts == count_trainable(alone)
    for name, one in scored_weights(alone).items():  # from now on to the bit
        with torch.no_grad():
            one.scores.copy_(scores_of(model)[name])
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad and not name.endswith(".scores"):
            parameter.data.copy_(bits(model)[name])
    yield "density", density(scored_weights(model).values()) == density(scored_weights(alone).values())
    yield "output", torch.equal(output(model), output(alone))
    if "method" not in options:
        (size, gradients), (expected_size, expected_gradients) = kept_to(model), kept_to(alone)
        yield "budget", size == expected_size and close(gradients, expected_gradients)
        yield "scores in the budget", same(scores_of(model), scores_of(alone))
    expected = save_adapter(folder / f"alone-{RANK}.safetensors", alone, "tests:tiny")
    found = save_adapter(folder / "shared.safetensors", model, "tests:tiny")
    yield "bytes", found.digest == expected.digest
    dist.barrier()
    yield "file", read_adapter(folder / "shared.safetensors").digest == expected.digest
    logits = output(model)
    parts = extract_parts(model)
    yield "masks", parts.masks == extract_parts(alone).masks
    yield "as before", same(bits(model), base) and torch.equal(output(model), output(alone))
    load_mask(model, found)
    yield "loaded", torch.equal(output(model), logits)
    unload_mask(model)
    yield "undone", same(bits(model), base)


def resumes(order: str, folder: Path) -> Iterator[tuple[str, bool]]:
    """Save by torch.distributed.checkpoint after two steps, and go on in another model."""
    model = attached(order, top=0.5, **NORMS)
    own = range(RANK, RANK + 1)
    optimizer = trained(model, own, 2)
    states = get_state_dict(model, optimizer)
    checkpoint.save(dict(zip("mo", states, strict=True)), checkpoint_id=folder / order)
    trained(model, own, 1, optimizer)
    other = attached(order, top=0.5, **NORMS)
    again = torch.optim.Adam([one for one in other.parameters() if one.requires_grad], lr=0.6)
    states = dict(zip("mo", get_state_dict(other, again), strict=True))
    checkpoint.load(states, checkpoint_id=folder / order)
    set_state_dict(other, again, model_state_dict=states["m"], optim_state_dict=states["o"])
    trained(other, own, 1, again)
    yield "resumed", same(scores_of(model), scores_of(other))


@contextmanager
def gathered_at_once() -> Iterator[list[int]]:
    """Note, whenever a tensor is gathered, how many gathered ones are in memory."""
    alive, counts = weakref.WeakSet[Tensor](), list[int]()
    gather = DTensor.full_tensor

    def counted(tensor: DTensor) -> Tensor:
        found = gather(tensor)
        alive.add(found)
        counts.append(len(alive))
        return found

    DTensor.full_tensor = counted  # type: ignore[method-assign, assignment]
    try:
        yield counts
    finally:
        DTensor.full_tensor = gather  # type: ignore[method-assign]


def adapters(folder: Path, inner: int) -> list[Adapter]:
    """Adapters of masks that remove, that are scaled, and that put other values in, with norms beside them."""
    model = Tiny(inner)
    drawn = torch.Generator().manual_seed(5)
    names = ["blocks.0.up.weight", "blocks.1.down.weight", "blocks.1.qkv.weight", "embed.weight"]
    masks = {
        name: torch.rand(one.shape, generator=drawn) > 0.4 for name, one in model.named_parameters() if name in names
    }
    values = {name: torch.randn(int((~mask).sum()), generator=drawn) for name, mask in masks.items()}
    norms = {"blocks.0.norm.weight": torch.randn(6, generator=drawn)}
    base = fingerprint(model, id="tests:tiny")
    given = [
        Parts(MaskSet.from_tensors(masks), parameters=norms),
        Parts(MaskSet.from_tensors(masks, scale=True)),
        Parts(MaskSet.from_tensors(masks, op="flip")),
        Parts(MaskSet.from_tensors(masks, op="replace"), values=values),
    ]
    made = [save_adapter(folder / f"{RANK}-{number}.safetensors", one, base) for number, one in enumerate(given)]
    codec = {"codec": "logit-base", "weights": model}
    return [*made, save_adapter(folder / f"{RANK}-base.safetensors", given[0], base, **codec)]  # type: ignore[arg-type]


def applies(shard: Callable[[nn.Module], nn.Module], folder: Path, inner: int = 11) -> Iterator[tuple[str, bool]]:
    """Fingerprints, loading, undoing, a bank, and a base of which one process has another bit."""
    alone, base = Tiny(inner), bits(Tiny(inner))
    model = shard(Tiny(inner))
    made = adapters(folder, inner)
    yield "fingerprint", fingerprint(model, id="x") == fingerprint(alone, id="x")
    with gathered_at_once() as counts:
        fingerprint(model, id="x")
        for adapter in made:
            load_mask(model, adapter)
            unload_mask(model)
    yield "one tensor gathered at a time", bool(counts) and max(counts) == 1
    plain = output(model)
    yield "fingerprint after a pass", fingerprint(model, id="x") == fingerprint(alone, id="x")
    for number, adapter in enumerate(made):
        load_mask(alone, adapter)
        load_mask(model, adapter)
        changed = bits(model)
        yield f"loaded {number}", same(changed, bits(alone)) and torch.allclose(output(model), output(alone), atol=1e-5)
        unload_mask(alone)
        unload_mask(model)
        yield f"undone {number}", same(bits(model), base) and torch.equal(output(model), plain)
        later = shard(load_mask(Tiny(inner), adapter))
        unload_mask(later)
        yield f"sharded while loaded {number}", same(bits(later), base)
    with MaskBank(model) as bank:
        names = [bank.add(adapter, str(number)) for number, adapter in enumerate(made)]
        for name in [*names, *names]:
            bank.use(name)
            load_mask(alone, made[int(name)])
            yield f"bank {name}", same(bits(model), bits(alone))
            unload_mask(alone)
    yield "bank closed", same(bits(model), base)
    other = shard(Tiny(inner))
    if RANK == WORLD - 1:
        with torch.no_grad():
            local(other.blocks[0].up.weight)[-1, -1] += 1e-3  # type: ignore[union-attr, index]
    try:
        load_mask(other, made[0])
    except BackboneMismatchError as error:
        yield "another base", "1 of 4 masked tensors differ" in str(error)
    else:
        yield "another base", False


def in_columns(model: nn.Module) -> nn.Module:
    """Share a model as tensor parallelism does, by rows and by columns."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def in_parallel(folder: Path) -> Iterator[tuple[str, bool]]:
    yield from applies(in_columns, folder, 12)
    try:
        attach_scores(in_columns(Tiny()))
    except StateError as error:
        yield "scores", "shared by tensor parallelism" in str(error)


def by_plan(folder: Path) -> Iterator[tuple[str, bool]]:
    """Load onto a language model that transformers shares by the plan of its own config, and undo."""
    import transformers
    from transformers.distributed import DistributedConfig

    from .helpers_loops import LLAMA, tokens
    from .helpers_models import random_masks

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4})
    alone = transformers.LlamaForCausalLM(config).eval()
    alone.save_pretrained(folder / "llama")  # which the first process does
    dist.barrier()
    plan = DistributedConfig(tp_plan="auto")
    model = type(alone).from_pretrained(folder / "llama", distributed_config=plan).eval()
    base, ids = bits(alone), tokens(2, 6)
    yield "shared", any(isinstance(one, DTensor) for one in model.parameters())
    yield "fingerprint", fingerprint(model, id="x") == fingerprint(alone, id="x")
    adapter = save_adapter(folder / f"{RANK}.safetensors", random_masks(alone), fingerprint(alone, id="tests:llama"))
    load_mask(alone, adapter)
    load_mask(model, adapter)
    yield "loaded", same(bits(model), bits(alone))
    with torch.no_grad():
        yield "output", torch.allclose(model(ids).logits, alone(ids).logits, atol=1e-5)
    unload_mask(model)
    yield "undone", same(bits(model), base)


def page_code() -> str:
    """Return the code of docs/devices.md that trains, saves, loads and resumes."""
    text = Path(__file__).parent.parent / "docs/devices.md"
    blocks = re.findall(r"^```python\n(.*?)^```", text.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return "\n".join(blocks[:3])


def page() -> str:
    """Run the code of docs/devices.md; return the id of its mask."""
    names: dict[str, Any] = {}
    exec(page_code().replace('torch.distributed.init_process_group("gloo")', "pass"), names)  # there is one
    return str(names["adapter"].mask_id)


def main(folder: Path) -> None:
    """Run all checks, then the page."""
    global RANK, WORLD
    dist.init_process_group("gloo")
    RANK, WORLD = dist.get_rank(), dist.get_world_size()
    budget.HALVINGS = 5  # the same with fewer passes over all scores
    checks: dict[str, Callable[[Path], Iterator[tuple[str, bool]]]] = {
        "before, top": lambda path: trains("before", path, top=0.5, **NORMS),
        "after, top": lambda path: trains("after", path, top=0.5, **NORMS),
        "after, all, scaled": lambda path: trains("after", path, scale=True, head="blocks.1.down"),
        "after, topk": lambda path: trains("after", path, method="topk"),
        "resume before": lambda path: resumes("before", path),
        "resume after": lambda path: resumes("after", path),
        "apply": lambda path: applies(sharded, path),
        "tensor parallel": in_parallel,
        **({"plan of transformers": by_plan} if "MASKPACK_FOUR" in os.environ else {}),
    }
    found: dict[str, bool | str] = {}
    for name, check in checks.items():
        own = folder / name.replace(", ", "-").replace(" ", "-")
        own.mkdir(exist_ok=True)
        for what, right in check(own):
            found[f"{name}: {what}"] = bool(right)
    dist.barrier()
    found["page"] = page()  # which ends the group
    (folder / f"{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
