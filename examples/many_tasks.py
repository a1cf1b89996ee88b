"""A mask for each of three tasks, all resident on one model. Without arguments: the network of `maskpack demo`."""

import argparse

from maskpack import MaskBank, load_adapter, load_backbone
from maskpack.training import Task, TrainConfig, load_data, train_tasks

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--output", default="./many-masks")
given = parser.parse_args()

backbone = load_backbone("demo-output/backbone.py:digits_cnn", weights="demo-output/backbone.safetensors")
tasks = {
    "middle": Task(load_data("digits:4-8")),
    "high": Task(load_data("digits:5-9")),
    "most": Task(load_data("digits:3-9")),
}
found = train_tasks(backbone, tasks, given.output, config=TrainConfig(steps=given.steps, batch_size=32))
for row in found["rows"]:
    print(f"{row['task']}: accuracy {row['accuracy']:.3f}")

with MaskBank(backbone.model) as bank:
    for name in tasks:
        bank.add(f"{given.output}/{name}", name)
    for name, task in tasks.items():
        image, label = task.data.test[0]
        with bank.using(name) as model:
            said = load_adapter(f"{given.output}/{name}").predict(model, [image])[0].label
        print(f"{name}: predicted {said}, true {task.data.class_names[label]}")
    print(f"{bank.status().host_bytes:,} bytes in memory for all masks")
