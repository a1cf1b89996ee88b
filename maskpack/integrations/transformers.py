"""MaskCallback: masks in the Trainer of transformers, and in TRL, whose trainers are made of it."""

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..adapter.write import save_adapter
from ..backbone.model import named_parameters
from ..backbone.shards import any_shared
from ..errors import StateError
from ..training.own_loop import count_trainable, stop_decay
from ..training.scores import density, scored_models, scored_weights, set_progress

LOG = logging.getLogger(__name__)


class MaskCallback(TrainerCallback):  # type: ignore[misc]
    """Callback for training masks in a Trainer, whose model has scores (`attach_scores`).

    Scores do not decay; methods that change on the way are told the progress; the log has the density; checkpoints
    hold what learns and not the base; the adapter is saved at the end.

    Args:
        output: folder of the adapter; default: "adapter" in the trainer's output folder.
        options: of `save_adapter`, as `task` and `class_names`.

    Example:
        attach_scores(model, top=0.1)
        Trainer(model, arguments, train_dataset=data, callbacks=[MaskCallback("./my-mask")]).train()
    """

    def __init__(self, output: str | Path | None = None, **options: Any):
        self.output, self.options = output, options

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Look at model and optimiser."""
        models = scored_models(model)
        if not models:
            raise StateError("the model of this trainer has no scores; call attach_scores(model) before it is made")
        for one in models:
            one.sparse = True
        LOG.info("%s", count_trainable(model))
        stop_decay(model, others["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Tell the scores where training stands."""
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        set_progress(model, state.global_step / max(state.max_steps, 1), batch)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **others: Any) -> None:
        """Add the density to what is logged."""
        found = {"density": round(density(scored_weights(model).values()), 6)}
        state.log_history[-1].update(found)
        (logs if logs is not None else {}).update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Save the adapter; the model keeps its scores."""
        set_progress(model, 1.0)
        assert isinstance(model, nn.Module)
        if state.is_world_process_zero or any_shared(named_parameters(model)):
            save_adapter(self.output or Path(args.output_dir) / "adapter", model, **self.options)
