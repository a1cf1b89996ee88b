"""maskpack demo: the main job, offline, on the digits images that scikit-learn ships."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import maskpack
from maskpack import training
from maskpack.errors import StateError
from maskpack.training.config import TrainConfig

from .console import app, emit, note, say, table, training_progress
from .options import verb

BACKBONE_EPOCHS, MASK_EPOCHS = 12, 20


@verb(app, "Use", "maskpack demo", "maskpack demo --output /tmp/demo --json")
def demo(output: Annotated[Path, "Folder to write; an earlier demo in it is replaced."] = Path("demo-output")) -> None:
    """Train, pack, push, pull, load, evaluate and unload a mask on digits, offline, in about a minute."""
    import torch

    from maskpack.backbone.load import export_state
    from maskpack.training.evaluate import held_out_accuracy
    from maskpack.training.features import measure_features
    from maskpack.training.learn import body_parameters
    from maskpack.training.trainer import train_dense

    # so small a network is slower on several cores than on one
    torch.set_num_threads(1)
    if output.exists() and any(output.iterdir()) and not (output / "backbone.py").exists():
        raise StateError(f"{output} holds something that is not an earlier demo; choose another folder with --output")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    factory, weights, registry = output / "backbone.py", output / "backbone.safetensors", output / "registry"
    times: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        note(f"{name} …")
        start = time.monotonic()
        yield
        times[name] = time.monotonic() - start

    with step("train the backbone on digits 0-4"):
        shutil.copyfile(Path(__file__).with_name("digits_backbone.py"), factory)
        backbone = maskpack.load_backbone(f"{factory}:digits_cnn", random_weights=0)
        old_task, new_task = training.load_data("digits:0-4"), training.load_data("digits:5-9")
        config = TrainConfig(epochs=BACKBONE_EPOCHS, lr=0.003, augment="crop")
        with training_progress() as report:  # all of the network: the demo needs a pretrained base without a download
            train_dense(backbone, old_task, config, lambda own, _: body_parameters(own), report=report)
        export_state(weights, backbone.model)
        old_accuracy = held_out_accuracy(backbone, old_task)
    with step("probe the frozen backbone on digits 5-9"):
        (probe,) = measure_features(backbone, new_task, ["probe"], cache=False)
    with step("train the mask for digits 5-9"):
        config = TrainConfig(
            epochs=MASK_EPOCHS, optimizer="sgd", lr=20.0, scale=True, train=(), bn="adapt", warmup=0.2, augment="crop"
        )
        with training_progress() as report:
            result = training.train_mask(backbone, new_task, config, report=report)
    with step("pack"):
        maskpack.save_adapter(output / "adapter", result.parts, result.base, result.about)
    with step("push to a local registry, pull"):
        reference = str((registry / "digits-5-9").absolute())
        maskpack.push(output / "adapter", reference)
        pulled = maskpack.pull(reference, output=output / "pulled").path
    with step("load_mask"):
        adapter = maskpack.load_adapter(str(pulled.absolute()))
        maskpack.load_mask(backbone.model, adapter)
    masked = held_out_accuracy(backbone, new_task)
    with step("unload_mask"):
        maskpack.unload_mask(backbone.model)
    after = maskpack.fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    restored = after.digests == result.base.digests
    whole = maskpack.inspect_adapter(adapter)["sets"]["default"]
    facts: dict[str, Any] = {
        "old_task_accuracy": old_accuracy,
        "probe_accuracy": probe["accuracy"],
        "mask_accuracy": masked,
        "old_task_accuracy_after_unload": held_out_accuracy(backbone, old_task),
        "base_bits_unchanged": restored,
        "density": result.metrics["density"],
        "mask_bytes": whole["payload_bytes"],
        "bits_per_weight": whole["bits_per_weight"],
        "file_bytes": adapter.size,
        "backbone_bytes": weights.stat().st_size,
        "seconds": times,
        "adapter": str(output / "adapter"),
    }
    emit(facts)
    of_masks = f"{adapter.size:,} ({facts['mask_bytes']:,} of masks)"
    rows = [
        ("backbone", f"{100 * facts['old_task_accuracy']:.1f} %", "-", f"{facts['backbone_bytes']:,}"),
        ("backbone + linear probe", "-", f"{100 * facts['probe_accuracy']:.1f} %", "-"),
        ("backbone + mask", "-", f"{100 * facts['mask_accuracy']:.1f} %", of_masks),
        ("after unload_mask", f"{100 * facts['old_task_accuracy_after_unload']:.1f} %", "-", "-"),
    ]
    columns = ["network", "digits 0-4", "digits 5-9", "bytes"]
    table([dict(zip(columns, row, strict=True)) for row in rows], columns)
    shown = f"{facts['bits_per_weight']:.3f} bits per weight at density {facts['density']:.3f}"
    say("", f"{shown}; base bits unchanged: {'yes' if restored else 'NO'}", "")
    table([{"step": name, "seconds": f"{value:.2f}"} for name, value in times.items()], ["step", "seconds"])
    adapter_path = str(output / "adapter") if output.is_absolute() else f"./{output / 'adapter'}"
    say(
        *("", f"The adapter: {adapter_path}", "Use it:", ""),
        *("    from maskpack import load_backbone, load_mask", ""),
        f"    backbone = load_backbone({f'{factory}:digits_cnn'!r}, weights={str(weights)!r})",
        f"    load_mask(backbone.model, {adapter_path!r})",
    )
