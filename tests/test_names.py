"""An adapter fits a model under whatever prefix its names stand there, and no other weights than its base's."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from maskpack import (
    MaskBank,
    fingerprint,
    load_adapter,
    load_backbone,
    load_mask,
    load_masked,
    save_adapter,
    unload_mask,
)
from maskpack.backbone.classifier import embeddings
from maskpack.errors import BackboneMismatchError
from maskpack.runtime.load import MaskpackWarning
from maskpack.runtime.place import TOP, find_place
from maskpack.training import TrainConfig, attach_scores, extract_parts
from maskpack.training.learn import base_of, borrowed, learn_scores

from .helpers_loops import CASES, LLAMA, bare_bert, noise, numbered, tokens
from .helpers_models import bits, random_masks, same

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a BERT encoder and of a language model, and of the parts of the latter."""
    path = tmp_path_factory.mktemp("models")
    bare_bert(path / "bert")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(path / "llama")
    return path


def of_kind(kind: str, folder: Path) -> nn.Module:
    torch.manual_seed(1)
    if kind == "sentences":
        pytest.importorskip("sentence_transformers")
        return CASES["retrieval"](folder).model.eval()
    path = folder / ("llama" if kind.startswith("Llama") else "bert")
    model: nn.Module = getattr(transformers, kind).from_pretrained(path)
    return model.eval()


def trained(model: nn.Module, path: Path) -> Path:
    """Save an adapter of random masks and of other values of norms; the model is as before."""
    torch.manual_seed(2)
    scores = attach_scores(model, train=["norms"])
    with torch.no_grad():
        for one in scores.values():
            one.copy_(torch.randn(one.shape))
        for name, one in model.named_parameters():
            if one.requires_grad and "norm" in name.lower():
                one.add_(0.1 * torch.randn(one.shape))
    save_adapter(path, model)
    extract_parts(model)
    return path


def inner(model: nn.Module) -> nn.Module:
    """The encoder or decoder inside a model."""
    found: nn.Module = model[0].auto_model if type(model).__name__ == "SentenceTransformer" else model.base_model  # type: ignore[index, operator, assignment, union-attr]
    return found


@torch.no_grad()
def hidden(model: nn.Module) -> torch.Tensor:
    return inner(model)(input_ids=tokens(2, 8)).last_hidden_state.clone()


ENCODERS = ("BertModel", "BertForSequenceClassification", "sentences")
PAIRS = [(one, other) for one in ENCODERS for other in ENCODERS if one != other]
PAIRS += [("BertForTokenClassification", "BertModel"), ("BertForTokenClassification", "sentences")]
PAIRS += [("BertForTokenClassification", "BertForSequenceClassification")]
DECODERS = ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification")
PAIRS += [(one, other) for one in DECODERS for other in DECODERS if one != other]


@pytest.mark.parametrize(("made", "used"), PAIRS)
def test_an_adapter_fits_every_model_of_its_base(
    made: str, used: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, model = of_kind(made, folder), of_kind(used, folder)
    ref = trained(source, tmp_path / "adapter")
    load_mask(source, ref)
    expected, before, base = hidden(source), bits(model), hidden(model)
    assert not torch.equal(expected, base)
    where = find_place(model, load_adapter(ref).base, load_adapter(ref).shapes())
    load_mask(model, ref, head="keep")
    assert (f"stand {where} in this model" in caplog.text) == (where != TOP)
    assert torch.equal(hidden(model), expected)
    unload_mask(model)
    assert same(bits(model), before)


@pytest.mark.parametrize(("made", "used"), [("BertModel", "BertForSequenceClassification"), ("BertForTokenClassification", "BertModel"), ("LlamaForCausalLM", "LlamaModel")])  # fmt: skip  # noqa: E501
def test_any_changed_bit_under_a_prefix_is_noticed(made: str, used: str, folder: Path, tmp_path: Path) -> None:
    ref = trained(of_kind(made, folder), tmp_path / "adapter")
    names = [name for name, _ in inner(of_kind(used, folder)).named_parameters() if "pooler" not in name]
    for name in names:
        model = of_kind(used, folder)
        with torch.no_grad():
            inner(model).get_parameter(name).view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
        with pytest.raises(BackboneMismatchError, match="was made for the weights of"):
            load_mask(model, ref, head="keep")


def test_a_base_that_the_model_has_not_whole(folder: Path, tmp_path: Path) -> None:
    ref = trained(of_kind("BertModel", folder), tmp_path / "adapter")
    model = of_kind("BertForTokenClassification", folder)  # which has no pooler
    with pytest.raises(BackboneMismatchError, match="all 12 masked tensors agree, but .* it lacks some, as those of a"):
        load_mask(model, ref)
    with pytest.warns(MaskpackWarning):
        load_mask(model, ref, verify="warn")


def test_a_head_has_no_place_in_an_encoder(folder: Path, tmp_path: Path) -> None:
    ref = trained(of_kind("BertForTokenClassification", folder), tmp_path / "adapter")
    model = of_kind("BertModel", folder)
    with pytest.raises(BackboneMismatchError, match="no 'classifier' for the adapter's head; pass head='keep'"):
        load_mask(model, ref)
    case = CASES["detection"](folder)
    ref = trained(case.model, tmp_path / "detection")
    bare = transformers.YolosModel.from_pretrained(folder / "yolos", add_pooling_layer=False)
    with pytest.raises(BackboneMismatchError, match="no 'bbox_predictor.*or, if that is of its head, pass head='keep'"):
        load_mask(bare, ref)
    load_mask(bare, ref, head="keep")


FITTING = [("BertModel", "BertForSequenceClassification"), ("LlamaModel", "LlamaForCausalLM")]
FITTING += [("LlamaForCausalLM", "LlamaModel"), ("BertModel", "sentences")]


@pytest.mark.parametrize(("made", "used"), FITTING)
def test_a_bank_takes_adapters_of_a_part(made: str, used: str, folder: Path, tmp_path: Path) -> None:
    source, model = of_kind(made, folder), of_kind(used, folder)
    refs = [trained(source, tmp_path / "a")]
    base = fingerprint(source, id="tests:one", head=["lm_head"])  # as attach_scores leaves it out
    refs.append(save_adapter(tmp_path / "b", random_masks(source), base).path)
    before, room = bits(model), max(load_adapter(ref).parts().nbytes for ref in refs)
    with MaskBank(model, max_host_bytes=room) as bank:  # so that the other is read again
        names = [bank.add(ref, str(number)) for number, ref in enumerate(refs)]
        for name in [*names, *names]:
            bank.use(name)
            expected = hidden(load_mask(source, refs[int(name)]))
            unload_mask(source)
            assert torch.equal(hidden(model), expected)
        assert bank.status().residents[names[0]].state == "evicted"
    assert same(bits(model), before)


@pytest.mark.parametrize(("made", "used"), FITTING[:3])
def test_base_and_mask_come_together_under_a_prefix(made: str, used: str, folder: Path, tmp_path: Path) -> None:
    ref, whole = trained(of_kind(made, folder), tmp_path / "adapter"), of_kind(used, folder)
    whole.save_pretrained(tmp_path / "weights")  # type: ignore[operator]
    with torch.device("meta"):
        empty, again = (type(whole)(whole.config).eval() for _ in range(2))
    load_masked(empty, tmp_path / "weights", ref)
    assert same(bits(empty), bits(load_mask(whole, ref)))
    other = type(whole)(whole.config)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BackboneMismatchError, match="was made for the weights of"):
        load_masked(again, tmp_path / "other", ref)


def test_of_two_places_the_digests_decide_and_nothing_is_guessed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    ref = tmp_path / "adapter"
    save_adapter(ref, random_masks(encoder), fingerprint(encoder, id="tests:encoder"))
    both = nn.ModuleDict({"left": other, "right": encoder})
    before, x = bits(both), noise(3, 4)
    load_mask(both, ref)
    assert "stand under 'right' in this model" in caplog.text
    expected = encoder(x)
    assert torch.equal(bits(both)["left.0.weight"], before["left.0.weight"])
    unload_mask(both)
    assert same(bits(both), before)
    twins = nn.ModuleDict({"left": copy.deepcopy(encoder), "right": encoder})
    with pytest.raises(
        BackboneMismatchError, match="at 2 places .* under 'left' and under 'right', and the weights of 2"
    ):
        load_mask(twins, ref)
    load_mask(twins["left"], ref)
    assert torch.equal(twins["left"](x), expected)
    strangers = nn.ModuleDict({"left": other, "right": copy.deepcopy(other)})
    with pytest.raises(BackboneMismatchError, match="the weights of 0 of them"):
        load_mask(strangers, ref)
    shared = nn.ModuleDict({"left": encoder, "right": encoder})
    load_mask(shared, ref)
    assert "under 'left'" in caplog.text
    assert torch.equal(shared["right"](x), expected)


def test_a_language_model_is_loaded_as_its_config_says(folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(f"hf/{language_folder(folder)}")
    assert type(backbone.model).__name__ == "LlamaForCausalLM"
    assert backbone.outside == ("lm_head",)
    batch = {"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    found, _ = embeddings(backbone, [(batch, torch.zeros(2))])
    assert torch.allclose(found, nn.functional.normalize(hidden(backbone.model).mean(1), dim=-1))
    with borrowed(backbone):
        assert not any(name.startswith("lm_head") for name in learn_scores(backbone, TrainConfig()))
        parts = extract_parts(backbone.model)
    save_adapter(tmp_path / "adapter", parts, base_of(backbone))
    load_mask(of_kind("LlamaForCausalLM", folder), tmp_path / "adapter")
    load_mask(of_kind("LlamaModel", folder), tmp_path / "adapter")


def language_folder(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    transformers.BertTokenizerFast(vocab=numbered(words)).save_pretrained(folder / "llama")
    return folder / "llama"
