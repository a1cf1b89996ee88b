"""MaskCallback: masks in Lightning's Trainer."""

import logging
from pathlib import Path
from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:  # the package of the same code under its older name
    from pytorch_lightning import Callback

from ..adapter.write import save_adapter
from ..errors import StateError
from ..training.own_loop import count_trainable, learning_state, stop_decay
from ..training.scores import density, scored_models, scored_weights, set_progress

LOG = logging.getLogger(__name__)


class MaskCallback(Callback):  # type: ignore[misc]
    """Callback for training masks in Lightning's Trainer; the module holds a model with scores (`attach_scores`).

    Scores do not decay; methods that change on the way are told the progress; the density is logged at the end of each
    epoch; checkpoints hold what learns and not the base; the adapter is saved at the end.

    Args:
        output: folder of the adapter.
        model: name of the module's attribute that is the model.
        options: of `save_adapter`, as `task` and `class_names`.

    Example:
        attach_scores(module.model, top=0.1)
        Trainer(max_steps=100, callbacks=[MaskCallback("./my-mask")]).fit(module, rows)
    """

    def __init__(self, output: str | Path, model: str = "model", **options: Any):
        self.output, self.model, self.options = output, model, options

    def _model(self, module: Any) -> Any:
        found = getattr(module, self.model, None)
        if found is None or not scored_models(found):
            raise StateError(
                f"the module's attribute {self.model!r} is no model with scores; call attach_scores on the model "
                f"before training, and name its attribute: MaskCallback(output, model=...)"
            )
        return found

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Let checkpoints without the base be loaded."""
        self._model(module)
        module.strict_loading = False

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Look at the optimisers."""
        model = self._model(module)
        LOG.info("%s", count_trainable(model))
        for optimizer in trainer.optimizers:
            stop_decay(model, optimizer)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Tell the scores where training stands."""
        size = getattr(trainer.train_dataloader, "batch_size", None) or 1
        size *= trainer.accumulate_grad_batches * trainer.world_size
        set_progress(self._model(module), trainer.global_step / max(trainer.estimated_stepping_batches, 1), size)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Log the density."""
        module.log("density", density(scored_weights(self._model(module)).values()))

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Reduce the state to the tensors that learn."""
        checkpoint["state_dict"] = learning_state(module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Save the adapter; the model keeps its scores."""
        model = self._model(module)
        set_progress(model, 1.0)
        if trainer.is_global_zero:
            save_adapter(self.output, model, **self.options)
