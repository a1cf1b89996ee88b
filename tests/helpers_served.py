"""Adapters for language models that an inference server holds, and their merged checkpoints."""

import shutil
from pathlib import Path

import torch
from torch import nn

from maskpack import MaskSet, Parts, fingerprint, load_mask, save_adapter
from maskpack.mask import PackedMask


def network(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # type: ignore[no-any-return]


def mask(path: Path, model: nn.Module) -> Path:
    """Remove the smallest 40 % of the weights of the layers that go back to the hidden size."""
    weights = {
        n: p.detach().abs() for n, p in model.named_parameters() if n.endswith(("down_proj.weight", "o_proj.weight"))
    }
    masks = MaskSet.from_tensors({name: one > one.float().quantile(0.4) for name, one in weights.items()})
    save_adapter(path, masks, fingerprint(model, id="tests:base"), weights=model)
    return path


def patch(path: Path, model: nn.Module) -> Path:
    """Change a hundredth of all weights of the layers by a quarter, and the last norm."""
    generator, masks, values = torch.Generator().manual_seed(0), {}, {}
    for name, weight in model.named_parameters():
        if "_proj" in name:
            kept = torch.rand(weight.shape, generator=generator) > 0.01
            masks[name] = PackedMask.from_tensor(kept, "replace")
            values[name] = weight.detach()[~kept] * 1.25
    norm = {"model.norm.weight": model.get_parameter("model.norm.weight").detach() * 1.5}
    save_adapter(
        path, Parts(MaskSet(masks), values=values, parameters=norm), fingerprint(model, id="tests:base"), weights=model
    )
    return path


def merged(folder: Path, base: Path, adapter: Path) -> Path:
    from safetensors.torch import save_file

    model = load_mask(network(base), adapter)
    shutil.copytree(base, folder)
    tensors = {name: one.contiguous() for name, one in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
