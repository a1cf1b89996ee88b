"""A weight loader for SGLang, which puts masks and patches onto a running model by reference, in place.

Where SGLang runs, with this file's folder on PYTHONPATH and the checkpoint that is served in MASKPACK_CHECKPOINT:

    engine = sglang.Engine(model_path="./smollm2", custom_weight_loader=["sglang_loader.switch"])
    engine.begin_weight_update()
    engine.update_weights_from_tensor([("user/mask@4f2c", torch.zeros(1))], load_format="sglang_loader.switch")
    engine.end_weight_update()
    while not engine.flush_cache().success:
        time.sleep(0.1)

The name is the reference, or `base`; the tensor carries nothing. SGLang ends when a loader raises an error, so that an
adapter that is refused is logged, and the model computes as before.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskpack import MaskpackError
from maskpack.runtime.served import Served
from maskpack.safetensors_io import TensorFile

SERVED: dict[int, Served] = {}  # by the id of a model: a draft model is another one


def everyone(value: Any) -> Sequence[Any]:
    """Return the values of all workers."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    found = [None] * group.world_size
    torch.distributed.all_gather_object(found, value, group=group.cpu_group)
    return found


def switch(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Have a model compute with an adapter from now on, or as the base."""
    ((ref, _),) = named_tensors
    if id(model) not in SERVED:
        config: Any = model.config
        checkpoint = TensorFile(os.environ["MASKPACK_CHECKPOINT"])
        dtype, tied = next(model.parameters()).dtype, bool(config.tie_word_embeddings)
        SERVED[id(model)] = Served(model, checkpoint.items, dtype, tied=tied, everyone=everyone)
    served, digest = SERVED[id(model)], None
    try:
        if ref != "base":
            digest = served.prepare(ref).digest
    except MaskpackError as error:
        logging.getLogger(__name__).error("%s is refused: %s", ref, error)
    if all(everyone(ref == "base" or digest is not None)):  # else all go on as before
        served.switch(digest)
