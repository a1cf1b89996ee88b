"""Adapters in vLLM: the weight-transfer engine `maskpack`, which vLLM finds as a plugin."""

import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from ..errors import ConfigError, StateError
from ..hub.pull import PullOptions
from ..runtime.served import Prepared, Served
from ..threads import in_thread

LOG = logging.getLogger(__name__)
NAME = "maskpack"
JOBS = 8  # that are remembered
OPTIONS = ("revision", "require_revision", "local_files_only", "require_signature")


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Body of `/init_weight_transfer_engine`; `keep`: number of adapters that stay prepared."""

    keep: int = 8


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Body of `/update_weights`: an adapter by the digest of its file, if it is prepared, or by reference.

    With neither the server computes as the base. Others: as of `pull`.
    """

    digest: str | None = None
    ref: str | None = None
    revision: str | None = None
    require_revision: bool = False
    local_files_only: bool = False
    require_signature: str | None = None


class MaskpackEngine(WeightTransferEngine):  # type: ignore[misc]
    """Puts masks and patches onto the weights of a worker, and takes them off."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._served: Served | None = None
        self._jobs: dict[str, dict[str, Any]] = {}

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Find the checkpoint's tensors in the memory of the model; a second call does nothing."""
        if self._served is None:
            self._served = self._seen(init_info.keep)

    def start_weight_update(self) -> None:
        """Do nothing: an update is one call."""

    def finish_weight_update(self) -> None:
        """Do nothing: an update is one call."""

    def shutdown(self) -> None:
        """Do nothing: there is no connection."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Compute with an adapter from now on, or as the base."""
        self.init_transfer_engine(InitInfo())
        assert self._served is not None
        digest = update_info.digest
        if digest is None and update_info.ref is not None:
            options = {key: value for key in OPTIONS if (value := getattr(update_info, key, None))}
            digest = self._served.prepare(update_info.ref, **options).digest
        self._served.switch(digest)

    def answer(self, request: str) -> dict[str, Any]:
        """Answer `{"prepare": {"ref": …}, "job": ID}`: begin that job, or tell how it stands; `{}`: what is active.

        Preparing is work of a thread. Its result, or its error, is the answer once it is there.
        """
        self.init_transfer_engine(InitInfo())
        served, asked = self._served, json.loads(request)
        assert served is not None
        if "prepare" not in asked:
            return {"active": None if served.active is None else served.active.pinned}
        job = asked["job"]
        if job not in self._jobs:
            for old in [*self._jobs][: len(self._jobs) + 1 - JOBS]:
                del self._jobs[old]
            options: Any = dict(asked["prepare"])
            if unknown := options.keys() - {"ref", *OPTIONS}:
                raise ConfigError(f"unknown options {sorted(unknown)}; known: ref, {', '.join(OPTIONS)}")
            state: dict[str, Any] = {}
            self._jobs[job] = state
            in_thread(partial(_prepare, served, state, options.pop("ref"), options))
        return dict(self._jobs[job])

    def _seen(self, keep: int) -> Served:
        from vllm.model_executor.model_loader import get_model_loader

        if getattr(self.model_config, "use_mla", False):
            raise StateError("this model computes weights of its attention anew after loading (MLA); maskpack cannot")
        loader = get_model_loader(self.vllm_config.load_config)
        if not hasattr(loader, "get_all_weights"):
            raise StateError(
                f"--load-format {self.vllm_config.load_config.load_format} does not give the checkpoint's tensors "
                f"again; use auto or safetensors"
            )

        def checkpoint() -> Iterable[tuple[str, Tensor]]:
            found: Iterable[tuple[str, Tensor]] = loader.get_all_weights(self.model_config, self.model)
            return found

        tied = bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))
        everyone = partial(_everyone, self.parallel_config.world_size)
        return Served(self.model, checkpoint, self.model_config.dtype, tied=tied, keep=keep, everyone=everyone)


def _prepare(served: Served, state: dict[str, Any], ref: str, options: PullOptions) -> None:
    try:
        found: Prepared = served.prepare(ref, **options)
        state |= {"pinned": found.pinned, "digest": found.digest, "size": found.size, "changed": found.changed}
    except Exception as error:
        LOG.warning("cannot prepare %s: %s", ref, error)
        state |= {"error": str(error)}


def _everyone(count: int, value: Any) -> Sequence[Any]:
    """Return the values of all workers."""
    if count == 1:
        return [value]
    from vllm.distributed.parallel_state import get_world_group

    found = [None] * count
    torch.distributed.all_gather_object(found, value, group=get_world_group().cpu_group)
    return found


def switch(llm: Any, ref: str | None, **options: Any) -> str | None:
    """Have an `LLM` in this program compute with an adapter from now on, or with None as the base.

    Return the reference that always means these bytes, which the LLM has as its weight version ("base": None). If it
    fails, the LLM computes as before or, after an error while weights were written, as the base; its version says it.

    Args:
        llm: made with `weight_transfer_config=WeightTransferConfig(backend="maskpack")`; it is answering nothing now.
        ref: as of `load_mask`. options: as of `pull`.
    """
    llm.start_weight_update()
    try:
        llm.update_weights({"update_info": {} if ref is None else {"ref": str(ref), **options}})
    except BaseException:
        with suppress(Exception):
            llm.start_weight_update()  # the error ended it
        raise
    finally:
        llm.reset_prefix_cache()
        active: str | None = llm.collective_rpc(NAME, args=("{}",))[0]["active"]
        llm.finish_weight_update(active or "base")
    return active


def register() -> None:
    """Make the engine known to vLLM, which calls this in each of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers import utils
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, NAME):
        return
    WeightTransferEngineFactory.register_engine(NAME, MaskpackEngine)
    # what `collective_rpc("maskpack", (request,))` calls in each worker
    WorkerBase.maskpack = lambda worker, request: _engine(worker).answer(request)
    utils.dispatch_cpu_unquantized_gemm = _keeping(utils.dispatch_cpu_unquantized_gemm)


def _engine(worker: Any) -> MaskpackEngine:
    engine = getattr(worker, "weight_transfer_engine", None)
    if not isinstance(engine, MaskpackEngine):
        raise StateError('the engine maskpack is not configured: --weight-transfer-config \'{"backend": "maskpack"}\'')
    return engine


def _keeping(dispatch: Any) -> Any:
    """Return vLLM's choice of a CPU kernel, made to keep the weight for our engine: others compute with copies."""

    @wraps(dispatch)
    def choose(layer: Any, remove_weight: bool) -> None:
        from vllm.config import get_current_vllm_config_or_none

        found = get_current_vllm_config_or_none()
        transfer = None if found is None else found.weight_transfer_config
        if transfer is not None and transfer.backend == NAME and layer.weight.ndim == 2:
            layer.cpu_linear = linear
        else:
            dispatch(layer, remove_weight)

    return choose
