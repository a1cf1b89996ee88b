"""Put scores into a model of transformers, and let its Trainer train it as it trains everything."""

import argparse
import csv
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from maskpack import load_mask
from maskpack.integrations.transformers import MaskCallback
from maskpack.training import attach_scores, count_trainable, extract_parts

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="repository or folder")
parser.add_argument("--data", required=True, help="a folder with train.csv: columns text and label")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--output", default="./own-loop-mask")
given = parser.parse_args()

with Path(given.data, "train.csv").open(encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
classes = sorted({row["label"] for row in rows})
tokenizer = AutoTokenizer.from_pretrained(given.model)
texts = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=32)
labels = [classes.index(row["label"]) for row in rows]
examples = [{**{key: texts[key][at] for key in texts}, "labels": label} for at, label in enumerate(labels)]

model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=len(classes))
scores = list(attach_scores(model, top=0.1, train=["norms"]).values())
print(count_trainable(model))
known = {id(score) for score in scores}
others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
groups = [{"params": scores, "lr": 0.05}, {"params": others, "lr": 0.01}]
Trainer(
    model,
    TrainingArguments(f"{given.output}-run", max_steps=given.steps, save_strategy="no", report_to=[]),
    train_dataset=examples,
    callbacks=[MaskCallback(given.output, task="text-classification", class_names=classes)],
    optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
).train()

batch = {key: torch.tensor(texts[key][:4], device=model.device) for key in texts}
model.eval()
trained = model(**batch).logits
extract_parts(model)  # the model as it was
load_mask(model, given.output)
assert torch.equal(model(**batch).logits, trained)
print("the loaded adapter computes what was trained:", [classes[at] for at in trained.argmax(1).tolist()])
