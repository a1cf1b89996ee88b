"""Masks in other libraries' training: what learns, what is written, and what is read back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskpack import load_mask
from maskpack.errors import StateError
from maskpack.training import attach_scores, extract_parts
from maskpack.training.scores import scored_weights

from .helpers_loops import CASES, bare_bert, tokens
from .helpers_models import bits, same

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_bert(tmp_path_factory.mktemp("models") / "bert").parent


def model_with_scores(folder: Path, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = CASES["classification"](folder).model
    attach_scores(model, top=0.5, **options)
    return model


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Tokens whose first says the class."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = tokens(8, seed=row)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 3}


def trainer(model: nn.Module, output: Path, callbacks: list[Any], **options: Any) -> Any:
    given = {"max_steps": 6, "save_steps": 3, "logging_steps": 2, "learning_rate": 0.3, "weight_decay": 0.1}
    arguments = transformers.TrainingArguments(
        output, per_device_train_batch_size=8, report_to=[], disable_tqdm=True, use_cpu=True, **given, **options
    )
    return transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks)


def scores_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.scores.detach().clone() for name, one in scored_weights(model).items()}


@pytest.mark.parametrize("with_callback", [True, False])
def test_a_trainer_goes_on_with_the_same_scores(with_callback: bool, folder: Path, tmp_path: Path) -> None:
    from maskpack.integrations.transformers import MaskCallback

    def callbacks() -> list[Any]:
        return [MaskCallback(tmp_path / "adapter", task="text-classification")] if with_callback else []

    model = model_with_scores(folder, train=["norms"])
    before = bits(model)
    run = trainer(model, tmp_path / "run", callbacks())
    run.train()
    other = model_with_scores(folder, train=["norms"])
    trainer(other, tmp_path / "run", callbacks()).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert same(scores_of(model), scores_of(other))
    assert same(bits(model), bits(other))
    assert not same(scores_of(model), scores_of(model_with_scores(folder)))
    base = sum(tensor.nbytes for name, tensor in before.items() if name.endswith((".original", "embeddings.weight")))
    size = (tmp_path / "run/checkpoint-6/model.safetensors").stat().st_size
    assert size < base if with_callback else size > base
    model.eval()
    batch = {"input_ids": tokens(4, 8)}
    expected = model(**batch).logits
    if not with_callback:
        merged = type(model).from_pretrained(tmp_path / "run/checkpoint-6").eval()  # type: ignore[attr-defined]
        assert torch.equal(merged(**batch).logits, expected)
        return
    assert all(0 < one["density"] <= 1 for one in run.state.log_history if "density" in one)
    assert sum("density" in one for one in run.state.log_history) >= 3
    extract_parts(model)
    assert torch.equal(load_mask(model, tmp_path / "adapter")(**batch).logits, expected)


def test_scores_do_not_decay(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from maskpack.integrations.transformers import MaskCallback

    model = model_with_scores(folder, head=())
    run = trainer(model, tmp_path, [MaskCallback()], save_strategy="no", lr_scheduler_type="constant")
    for one in scored_weights(model).values():
        one.scores.register_hook(torch.zeros_like)  # nothing but decay could move them
    before = scores_of(model)
    with caplog.at_level("INFO"):
        run.train()
    assert same(scores_of(model), before)
    assert "scores must not decay: the weight decay 0.1 of 13 scores' tensors, and of 0 others" in caplog.text
    assert "scores on" in caplog.text
    assert (tmp_path / "adapter" / "maskpack_model.safetensors").exists() or list((tmp_path / "adapter").iterdir())


def test_a_trainer_without_scores_is_an_error(folder: Path, tmp_path: Path) -> None:
    from maskpack.integrations.transformers import MaskCallback

    model = CASES["classification"](folder).model
    with pytest.raises(StateError, match="the model of this trainer has no scores; call attach_scores"):
        trainer(model, tmp_path, [MaskCallback()]).train()
