"""Accelerate: the device and the processes of a run."""

from typing import Any

from ..errors import ConfigError, require
from .config import TrainConfig


def is_main_process() -> bool:
    """Tell whether this process writes and prints, of those that Accelerate started."""
    accelerate = require("accelerate", "train", "training")
    # the first state of a process decides on its device, and does not look at this variable
    return bool(accelerate.PartialState(accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU")).is_main_process)


def new_accelerator(config: TrainConfig) -> Any:
    """Return the Accelerator of a run.

    Raises:
        ConfigError: if the precision is not possible on this device.
    """
    accelerate = require("accelerate", "train", "training")
    # Accelerate keeps one precision per process; a second run of ours may have another
    accelerate.state.AcceleratorState._reset_state()
    try:
        return accelerate.Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulate,
            dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=False),
        )
    except ValueError as error:
        raise ConfigError(f"precision {config.precision!r} is not possible on this device: {error}") from error
