"""Train a mask on a table of texts within a budget of bytes, and classify sentences."""

import argparse

from maskpack import load_backbone, load_mask, save_adapter
from maskpack.training import TrainConfig, load_data, train_mask

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--backbone", default="hf/sentence-transformers/all-MiniLM-L6-v2", help="hf/REPO or hf/FOLDER")
parser.add_argument("--data", required=True, help="a folder with train.csv and test.csv: columns text and label")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--output", default="./texts-mask")
given = parser.parse_args()

backbone = load_backbone(given.backbone)
data = load_data(given.data)
result = train_mask(backbone, data, TrainConfig(steps=given.steps, batch_size=32, bytes_budget=40_000))
adapter = save_adapter(given.output, result.parts, result.base, result.about)
print(f"{adapter.size:,} bytes, test accuracy {result.metrics['test_accuracy']:.3f}")

model = load_mask(backbone.model, adapter)
for at in range(min(3, len(data.test))):
    text, label = data.test[at]
    found = adapter.predict(model, [text], tokenizer=backbone.tokenizer)[0]
    print(f"{found.label} ({found.score:.2f}), true {data.class_names[label]}: {text}")
