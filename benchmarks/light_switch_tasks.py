"""The tasks of "Like a Light Switch" (Blum and Law, 2020): linear, noisy linear, sinusoids, coloured MNIST."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Generator, Tensor, nn

from .tasks import DATA

CURVE_IMAGES = 1_000  # of the 10,000 test images for each point of a curve
COLOURS = {"black": (0.0, 0.0, 0.0), "red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """Tasks and the model that learns them.

    Attributes:
        tasks: their names. model: makes a network, at random.
        batch: (task's number, generator) -> inputs and targets of a step.
        test: (task's number, is it the last time) -> inputs and targets, without noise.
        classes: targets are classes: cross-entropy and accuracy; else mean squared error for both.
        weights: A of the linear problem, (outputs, d), to be compared with; None elsewhere.
    """

    tasks: tuple[str, ...]
    model: Callable[[], nn.Module]
    batch: Callable[[int, Generator], Pair]
    test: Callable[[int, bool], Pair]
    classes: bool = False
    weights: Tensor | None = None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (nn.functional.cross_entropy if self.classes else nn.functional.mse_loss)(outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> float:
        if self.classes:
            return float((outputs.argmax(1) == targets).double().mean())
        return float(nn.functional.mse_loss(outputs, targets))


def linear(
    seed: int,
    count: int = 5,
    size: int = 10,
    outputs: int = 3,
    rows: int = 200,
    noise: float = 0.0,
    half_width: float = 1.0,
    sinusoid: bool = False,
    model: Callable[[], nn.Module] | None = None,
) -> Problem:
    """Return the problem y = (A * mask of the task) x + b * mask of the task, or its sine; every step has all rows."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    a, b = torch.randn(outputs, size, generator=generator), torch.randn(outputs, generator=generator)
    kept_a = torch.rand(count, outputs, size, generator=generator) < 0.5
    kept_b = torch.rand(count, outputs, generator=generator) < 0.5

    def examples(number: int, noise: float) -> list[Pair]:
        found = []
        for task in range(count):
            x = half_width * uniform(number, size)
            y = x @ (a * kept_a[task]).T + b * kept_b[task]
            y = torch.sin(y) if sinusoid else y
            found.append((x, y + noise * torch.randn(y.shape, generator=generator)))
        return found

    train, test = examples(rows, noise), examples(1000, 0.0)
    return Problem(
        tuple(f"task {task}" for task in range(count)),
        model or partial(nn.Linear, size, outputs),
        lambda task, _: train[task],
        lambda task, _: test[task],
        weights=None if sinusoid else a,
    )


def sinusoids(seed: int, count: int = 8) -> Problem:
    """Return sines of linear functions, for a network of three layers."""
    hidden = 64

    def model() -> nn.Module:
        layers = nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3)
        return nn.Sequential(*layers)

    return linear(seed, count=count, size=5, rows=500, half_width=2.0, sinusoid=True, model=model)


class LeNet(nn.Module):
    """LeNet-5 for images of 32x32 pixels, with ReLU and maxima."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))  # type: ignore[no-any-return]


@cache
def digits(split: str) -> Pair:
    """Return MNIST as grey values from 0 to 1, (N, 1, 32, 32), and its labels."""
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(DATA / f"data/mnist/{split}.parquet")
    grey = torch.empty(len(table), 28, 28, dtype=torch.uint8)
    for at, cell in enumerate(table["image"].to_pylist()):
        grey[at] = torch.frombuffer(bytearray(Image.open(io.BytesIO(cell["bytes"])).tobytes()), dtype=torch.uint8).view(
            28, 28
        )
    return nn.functional.pad(grey.float().unsqueeze(1) / 255, (2, 2, 2, 2)), torch.tensor(table["label"].to_pylist())


def coloured(grey: Tensor, name: str, channels: int) -> Tensor:
    """Return digits, (B, 1, H, W), on a background of the colour `name`, (B, channels, H, W).

    "white" is white and nothing else; "inverse" is black digits on white; a number behind a name changes nothing.
    """
    name = name.split()[0]
    if name == "white":
        return torch.ones(len(grey), channels, *grey.shape[2:])
    if name == "inverse":
        return (1 - grey).expand(-1, channels, -1, -1)
    background = torch.tensor(COLOURS[name][:channels]).view(1, -1, 1, 1)
    return grey + (1 - grey) * background


def mnist(seed: int, names: tuple[str, ...], channels: int = 3) -> Problem:
    """Return digits on backgrounds; colours are made for each batch."""
    (x, y), (x_test, y_test) = digits("train"), digits("test")

    def batch(task: int, generator: Generator) -> Pair:
        rows = torch.randint(len(x), (32,), generator=generator)
        return coloured(x[rows], names[task], channels), y[rows]

    def test(task: int, last: bool) -> Pair:
        rows = slice(0, None if last else CURVE_IMAGES)
        return coloured(x_test[rows], names[task], channels), y_test[rows]

    return Problem(names, partial(LeNet, channels), batch, test, classes=True)
