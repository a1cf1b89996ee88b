"""Train a mask on images, use it, and undo it. Without arguments: the digits, on the network of `maskpack demo`."""

import argparse

from maskpack import load_backbone, load_mask, save_adapter, unload_mask
from maskpack.training import TrainConfig, load_data, train_mask

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--backbone", help="as in timm/resnet18.a1_in1k")
parser.add_argument("--data", default="digits:5-9", help="a folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--output", default="./images-mask")
given = parser.parse_args()

if given.backbone:
    backbone = load_backbone(given.backbone)
else:
    backbone = load_backbone("demo-output/backbone.py:digits_cnn", weights="demo-output/backbone.safetensors")
data = load_data(given.data)
before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}

result = train_mask(backbone, data, TrainConfig(steps=given.steps, batch_size=32))
adapter = save_adapter(given.output, result.parts, result.base, result.about)
print(f"{adapter.size:,} bytes, test accuracy {result.metrics['test_accuracy']:.3f}")

model = load_mask(backbone.model, adapter)
image, label = data.test[0]
print(f"predicted {adapter.predict(model, [image])[0].label}, true {data.class_names[label]}")

unload_mask(model)
assert all((model.state_dict()[name] == tensor).all() for name, tensor in before.items())
print("the base is back, to the bit")
