"""The zero-shot head of a CLIP-like backbone: the text embeddings of its classes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackboneError, MaskpackError, require
from .head import Head
from .hf import TOWERS
from .load import Backbone

TEXTS = 64  # that the text tower gets at a time


@torch.no_grad()
def text_head(backbone: Backbone, class_names: Sequence[str], template: str) -> Head:
    """Return the head whose logits are those of zero-shot CLIP (https://arxiv.org/abs/2103.00020, section 3.1).

    Its weight is the text embedding of each class, divided by its Euclidean norm, times exp(logit_scale). The text
    tower is loaded from where the model of the backbone came from, and not kept.

    Args:
        template: text in which `{label}` stands for the name of the class.

    Raises:
        BackboneError: if the backbone is not CLIP-like, or has no text tower that can be loaded.
    """
    transformers = require("transformers", "train", "loading a text tower")
    if backbone.pooling != "projection":
        raise BackboneError(
            f"a text head needs a CLIP-like backbone (hf/ and a model of type {', '.join(TOWERS)}), and {backbone.id} "
            f"is none; take a linear or a masked head"
        )
    source: Any = backbone.model.name_or_path
    options = {} if backbone.revision is None else {"revision": backbone.revision}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        if config.model_type not in TOWERS:
            raise BackboneError(
                f"{backbone.id} has a vision tower only, and a text head needs the text tower as well; name the "
                f"repository or folder of the whole model, or take a linear or a masked head"
            )
        model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32, **options).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except MaskpackError:
        raise
    except Exception as error:
        raise BackboneError(
            f"cannot load the text tower of {backbone.id} from {source!r}: {type(error).__name__}: {error}; a folder "
            f"needs the whole model and its tokenizer"
        ) from error
    length = config.text_config.max_position_embeddings
    rows: list[Tensor] = []
    for start in range(0, len(class_names), TEXTS):
        texts = [template.replace("{label}", name) for name in class_names[start : start + TEXTS]]
        # always to the full length, as SigLIP was trained; CLIP's attention does not look behind the text
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        found = model.get_text_features(**tokens)
        rows.append(found if isinstance(found, Tensor) else found.pooler_output)
    weight = nn.functional.normalize(torch.cat(rows), dim=-1) * model.logit_scale.exp()
    bias = model.logit_bias.expand(len(weight)).clone() if hasattr(model, "logit_bias") else None
    return Head("pooled-linear", weight, bias, pooling="projection", normalize=True)
