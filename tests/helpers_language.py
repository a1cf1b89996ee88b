"""A small language model with random weights and a tokenizer of bytes, as transformers keeps them, and data for it."""

import json
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SUMS = [(f"{a} plus {b}?", f"It is\n#### {a + b}") for a in range(8) for b in range(8)]


def language_model(folder: Path, chat: bool = False, steps: int = 0) -> Path:
    """Write a Llama of two layers, trained for so many steps on sums; it has a chat template if asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    tokenizer.chat_template = CHAT if chat else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "tie_word_embeddings": True}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes, **ends))
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        ids = [tokenizer(f"{q} {a}<|end|>", return_tensors="pt")["input_ids"] for q, a in SUMS]
        for step in range(steps):
            optimizer.zero_grad()
            model(input_ids=ids[step % len(ids)], labels=ids[step % len(ids)]).loss.backward()
            optimizer.step()
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
                    layer.weight.mul_(3 if steps == 0 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_folder(folder: Path) -> Path:
    """Write a folder of two plain texts, real ones."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    folder.mkdir()
    (folder / "train.txt").write_text(text[:9000], encoding="utf-8")
    (folder / "test.txt").write_text(text[9000:], encoding="utf-8")
    return folder


def sums_file(path: Path, chats: bool) -> Path:
    """Write sums as JSON lines, of chats or of prompts and answers."""
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        if chats
        else {"question": q, "answer": a}
        for q, a in SUMS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
