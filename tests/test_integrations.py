"""Masks in other libraries' training: what learns, what is written, and what is read back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn

from maskpack import fingerprint, load_mask, save_adapter, unload_mask
from maskpack.errors import StateError
from maskpack.training import attach_scores, extract_parts
from maskpack.training.scores import scored_models, scored_weights

from .helpers_loops import CASES, bare_bert, numbered, tokens
from .helpers_models import bits, random_masks, same

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_bert(tmp_path_factory.mktemp("models") / "bert").parent


def model_with_scores(folder: Path, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = CASES["classification"](folder).model
    for one in model.modules():
        if isinstance(one, nn.Dropout):  # not all versions of Trainer go on with the random numbers where they were
            one.p = 0.0
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
    given = {"max_steps": 6, "save_steps": 3, "logging_steps": 2, "learning_rate": 0.6, "weight_decay": 0.1}
    arguments = transformers.TrainingArguments(
        output, per_device_train_batch_size=8, report_to=[], disable_tqdm=True, use_cpu=True, **given, **options
    )
    # one row again and again: not all versions go on with the order of rows where they were
    rows = torch.utils.data.Subset(Rows(), [0] * 32)
    return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)


def scores_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.scores.detach().clone() for name, one in scored_weights(model).items()}


@pytest.mark.parametrize("with_callback", [True, False])
def test_a_trainer_goes_on_with_the_same_scores(with_callback: bool, folder: Path, tmp_path: Path) -> None:
    from maskpack.integrations.transformers import MaskCallback

    def callbacks() -> list[Any]:
        return [MaskCallback(tmp_path / "adapter", task="text-classification")] if with_callback else []

    # before 5.8 Trainer saves the norms of BERT under old names, and does not find them again
    train = ["norms"] if Version(transformers.__version__) >= Version("5.8") else []
    model = model_with_scores(folder, train=train)
    before, told = bits(model), list[tuple[float, int]]()
    shared = scored_models(model)[0]
    model.register_forward_hook(lambda *_: told.append((shared.progress, shared.batch_size)))
    run = trainer(model, tmp_path / "run", callbacks())
    run.train()
    other = model_with_scores(folder, train=train)
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
    assert told[:6] == [(step / 6, 8) for step in range(6)]
    assert all(0 < one["density"] <= 1 for one in run.state.log_history if "density" in one)
    assert sum("density" in one for one in run.state.log_history) >= 3
    assert run.state.log_history[-1]["density"] < 1
    extract_parts(model)
    assert torch.equal(load_mask(model, tmp_path / "adapter")(**batch).logits, expected)


def test_sentence_transformers_trains_masks(folder: Path, tmp_path: Path) -> None:
    library, losses = map(pytest.importorskip, ("sentence_transformers", "sentence_transformers.losses"))
    datasets = pytest.importorskip("datasets")
    from maskpack.integrations.transformers import MaskCallback

    torch.manual_seed(0)
    case = CASES["retrieval"](folder)
    base = bits(case.model)
    attach_scores(case.model, top=0.5)
    pairs = datasets.Dataset.from_dict({"anchor": ["a b", "c d"] * 8, "positive": ["b a", "d c"] * 8})
    given: dict[str, Any] = {"max_steps": 4, "learning_rate": 0.6, "save_strategy": "no", "report_to": []}
    library.SentenceTransformerTrainer(
        case.model,
        library.SentenceTransformerTrainingArguments(str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **given),
        train_dataset=pairs,
        loss=losses.MultipleNegativesRankingLoss(case.model),
        callbacks=[MaskCallback(tmp_path / "adapter")],
    ).train()
    expected = case.model.eval().encode("a b c")  # type: ignore[operator]
    extract_parts(case.model)
    assert same(bits(case.model), base)
    assert not (case.model.encode("a b c") == expected).all()  # type: ignore[operator]
    assert (load_mask(case.model, tmp_path / "adapter").encode("a b c") == expected).all()  # type: ignore[operator]


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


# --- PEFT ------------------------------------------------------------------------------------------------------------


def peft_of(folder: Path, kind: str = "language_model", **options: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model with a mask of PEFT's, and a batch."""
    peft = pytest.importorskip("peft")
    from maskpack.integrations.peft import MaskConfig

    torch.manual_seed(0)
    case = CASES[kind](folder)
    return peft.get_peft_model(case.model, MaskConfig(**{"top": 0.5, **options})), case.inputs


def trained_by_peft(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval()(**batch).logits.clone()


CLASSIFIER = {"kind": "classification", "modules_to_save": ["classifier"], "target_modules": ["query", "dense"]}


@pytest.mark.parametrize("options", [{}, {"method": "flip", "top": None}, CLASSIFIER])
def test_peft_trains_saves_and_reads_masks(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from maskpack.integrations.peft import read_peft

    model, batch = peft_of(folder, **options)
    learning = {name for name, one in model.named_parameters() if one.requires_grad}
    assert all(name.endswith(".scores") or ".modules_to_save." in name for name in learning)
    torch.manual_seed(0)
    base = CASES[options.get("kind", "language_model")](folder).model.eval()
    expected = trained_by_peft(model, batch)
    assert not torch.equal(expected, base(**batch).logits)
    with model.disable_adapter():  # type: ignore[operator]
        disabled = model(**batch).logits
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    again = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    assert torch.equal(again(**batch).logits, expected)
    merged = again.merge_and_unload()
    assert torch.equal(merged(**batch).logits, expected)
    if not options.get("modules_to_save"):
        torch.manual_seed(0)
        ours = CASES["language_model"](folder).model.eval()
        assert torch.equal(disabled, ours(**batch).logits)
        load_mask(ours, read_peft(tmp_path / "saved"))
        assert torch.equal(ours(**batch).logits, expected)
        saved, scores = (
            tmp_path / "saved/adapter_model.safetensors",
            (one for one in model.parameters() if one.requires_grad),
        )
        assert saved.stat().st_size < sum(one.nbytes for one in scores), "masks are packed"


def test_peft_merges_and_has_several_masks(folder: Path) -> None:
    from maskpack.integrations.peft import MaskConfig

    model, batch = peft_of(folder)
    first = trained_by_peft(model, batch)
    weights = {name: one.clone() for name, one in model.state_dict().items() if "base_layer" in name}
    model.merge_adapter()  # type: ignore[operator]
    assert torch.equal(model(**batch).logits, first)
    model.unmerge_adapter()  # type: ignore[operator]
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items() if name in weights)
    model.add_adapter("other", MaskConfig(top=None))  # type: ignore[operator]
    model.set_adapter("other")  # type: ignore[operator]
    second = trained_by_peft(model, batch)
    assert not torch.equal(second, first)
    model.set_adapter("default")  # type: ignore[operator]
    assert torch.equal(model(**batch).logits, first)


def tokenizer_of_letters() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    return transformers.BertTokenizerFast(vocab=numbered(words), eos_token="[SEP]")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL's, about names of transformers
@pytest.mark.parametrize("by_peft", [True, False])
def test_trl_trains_masks(by_peft: bool, folder: Path, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from maskpack.integrations.peft import MaskConfig, read_peft
    from maskpack.integrations.transformers import MaskCallback

    torch.manual_seed(0)
    model = CASES["language_model"](folder).model
    base = copy.deepcopy(model).eval()
    data = datasets.Dataset.from_dict({"text": ["a b c d", "d c b a", "a a b b"] * 4})
    given: dict[str, Any] = {"max_steps": 4, "learning_rate": 1.0, "report_to": [], "use_cpu": True, "bf16": False}
    arguments = trl.SFTConfig(str(tmp_path / "run"), save_strategy="no", disable_tqdm=True, **given)
    if by_peft:
        how: dict[str, Any] = {"peft_config": MaskConfig(top=0.5)}
    else:
        attach_scores(model, top=0.5)
        how = {"callbacks": [MaskCallback(tmp_path / "adapter")]}
    run = trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer_of_letters(), **how)
    run.train()
    batch = {"input_ids": tokens(2, 8)}
    expected = run.model.eval()(**batch).logits
    assert not torch.equal(expected, base(**batch).logits)
    if by_peft:
        run.save_model(str(tmp_path / "saved"))
    ref = read_peft(tmp_path / "saved") if by_peft else tmp_path / "adapter"
    assert torch.equal(load_mask(base, ref)(**batch).logits, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of Lightning's, about names of torch
@pytest.mark.filterwarnings("ignore:Found .* in eval mode:UserWarning")
def test_lightning_goes_on_with_the_same_scores(folder: Path, tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")
    from maskpack.integrations.lightning import MaskCallback

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model_with_scores(folder)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=10.0, weight_decay=0.1)

    def run(steps: int) -> Any:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        callback = MaskCallback(tmp_path / "adapter", task="text-classification")
        return lightning.Trainer(max_steps=steps, accelerator="cpu", callbacks=[callback], **quiet)

    # all steps have the same batch: where an epoch goes on is Lightning's own affair
    rows = torch.utils.data.DataLoader(torch.utils.data.Subset(Rows(), range(8)), batch_size=8)
    whole, first, again = Module(), Module(), Module()
    run(6).fit(whole, rows)
    trainer = run(3)
    trainer.fit(first, rows)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    run(6).fit(again, rows, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert same(scores_of(again.model), scores_of(whole.model))
    assert 0 < trainer.callback_metrics["density"] <= 1
    kept = torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]
    assert not any(name.endswith((".original", "embeddings.weight")) for name in kept)
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0
    with pytest.raises(StateError, match="the module's attribute 'network' is no model with scores"):
        lightning.Trainer(max_epochs=1, callbacks=[MaskCallback(tmp_path, "network")], logger=False).fit(whole, rows)
    model, batch = again.model.eval(), {"input_ids": tokens(4, 8)}
    expected = model(**batch).logits
    extract_parts(model)
    assert torch.equal(load_mask(model, tmp_path / "adapter")(**batch).logits, expected)


def test_peft_refuses_another_base(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from maskpack.errors import BackboneMismatchError

    model, batch = peft_of(folder)
    trained_by_peft(model, batch)
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    torch.manual_seed(1)
    with pytest.raises(BackboneMismatchError, match="this adapter was made for the weights of"):
        peft.PeftModel.from_pretrained(CASES["language_model"](folder).model, tmp_path / "saved")


def test_peft_reads_an_adapter_of_ours(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from maskpack.errors import AdapterError
    from maskpack.integrations.peft import read_peft, write_peft

    torch.manual_seed(0)
    case = CASES["language_model"](folder)
    adapter = save_adapter(tmp_path / "ours", random_masks(case.model), fingerprint(case.model, id="tests:llama"))
    write_peft(tmp_path / "theirs", adapter)
    assert read_peft(tmp_path / "theirs").mask_id == adapter.mask_id
    other = peft.PeftModel.from_pretrained(copy.deepcopy(case.model), tmp_path / "theirs").eval()
    load_mask(case.model.eval(), adapter)
    assert torch.equal(other(**case.inputs).logits, case.model(**case.inputs).logits)
    model = model_with_scores(folder)
    with pytest.raises(AdapterError, match="holds more than masks that remove weights or invert signs"):
        write_peft(tmp_path / "more", save_adapter(tmp_path / "head", model))


def test_lm_evaluation_harness_measures_masks(folder: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    model = CASES["language_model"](folder).model.eval()
    (tmp_path / "rows.jsonl").write_text('{"text": "a b c d"}\n{"text": "d c b a"}\n')
    task: dict[str, Any] = {
        "task": "letters",
        "output_type": "loglikelihood_rolling",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    task |= {"test_split": "test", "doc_to_text": "", "doc_to_target": "{{text}}"}

    def measured() -> float:
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer_of_letters()), tasks=[task], bootstrap_iters=0
        )
        return float(found["results"]["letters"]["word_perplexity,none"])

    base = measured()
    load_mask(model, save_adapter(tmp_path / "a", random_masks(model), fingerprint(model, id="tests:llama")))
    assert measured() != base
    unload_mask(model)
    assert measured() == base
