"""Baselines that train some numbers and a head, or none: full fine-tuning, BitFit, norms; probe and neighbours."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...adapter.content import Parts
from ...adapter.steps import norms_to_frame, rows_to_frame
from ...backbone.classifier import Classifier, Inputs
from ...backbone.load import Backbone
from ...backbone.model import Head
from ...errors import ConfigError
from ...mask import MaskSet
from ...training.config import TrainConfig
from ...training.features import fit_probe, knn_scores
from ...training.learn import body_parameters, learning_names
from ...training.run_folder import FILE, RunOptions
from ...training.stored import batchnorm_statistics, shortened
from ...training.trainer import ObjectiveRun, train_dense
from .base import BASELINES, Baseline, Fitted, Rates, Trial, classified, parameters

IN_STEPS = 0  # stands for norms as adapters have them, among numbers of bits


class Dense(Baseline):
    """Trains some numbers and a head, by the loop that masks are trained by.

    Attributes:
        bits: of a number; with each, what was trained is a control, and with norms in steps, where any learned.
        relative: whether the difference from the start is what is rounded to these bits.
    """

    bits: ClassVar[tuple[int, ...]] = (4,)
    relative: ClassVar[bool] = True

    @abstractmethod
    def learn(self, backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
        """Return the parameters that learn; may put modules into the model."""

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """Return a view of a parameter, (R, N); each row has a step of its own where it is rounded to few bits."""
        return tensor.view(1, -1)

    def note(self, backbone: Backbone, config: TrainConfig) -> str:
        """Return a note to stand beside the name of the baseline."""
        return ""

    def fit(self, trial: Trial) -> Fitted:
        folder, start = trial.folder / "training", dict[str, Tensor]()
        settings, note = trial.settings("supervised"), self.note(trial.backbone, trial.config)

        def learn(backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
            learned = self.learn(backbone, config)
            if self.bits:
                start.update({name: one.detach().clone() for name, one in learned.items()})
            return learned

        options: RunOptions = {"output": folder, "resume": (folder / FILE).exists(), "report": trial.report}
        run = train_dense(trial.backbone, trial.data, settings, learn, **options)
        classifier = run.objective.module
        assert isinstance(classifier, Classifier)
        head, (folded, statistics) = parameters(*classifier.linear.parameters()), self._settled(run)
        numbers = {name: one for name, one in run.scores.items() if name not in folded}
        trained = parameters(*run.scores.values()) + head
        # values and bytes of the numbers, by bits
        stored = {16: ({name: one.detach().half() for name, one in numbers.items()}, 2 * parameters(*numbers.values()))}
        stored |= {bits: self._rounded(numbers, start, bits) for bits in self.bits}
        if self.bits and (coded := self._in_steps(run, numbers)) is not None:
            stored[IN_STEPS] = coded
        others = {"statistics": statistics, "head": _head_bytes(run.objective.head())}
        predict, inside = classified(classifier), list[int]()  # of how many bits the numbers in the network are

        def put_in(bits: int) -> None:
            if inside != [bits]:
                for name, one in numbers.items():
                    one.data.copy_(stored[bits][0][name])
                inside[:] = [bits]

        def fitted(bits: int) -> Fitted:
            def by_the_stored(inputs: Inputs) -> Tensor:
                put_in(bits)
                return predict(inputs)

            return Fitted(by_the_stored, trained, {"weights": stored[bits][1], **others}, run.steps, note=note)

        put_in(16)
        words = {1: "1 bit", IN_STEPS: "in steps"}
        controls = {words.get(bits, f"{bits} bits"): fitted(bits) for bits in stored if bits != 16}
        return replace(fitted(16), controls=controls)

    def _settled(self, run: ObjectiveRun) -> tuple[set[str], int]:
        """Put head and adapted statistics into the network as they are stored beside a mask.

        Return the names of the parameters that are stored with the statistics, as one scale and one shift a channel;
        and the bytes of both.
        """
        if run.config.bn != "adapt" or not batchnorm_statistics(run.backbone.model):
            run.objective.settle()
            return set(), 0
        kept = _settled_parts(run)
        whole = {**kept.parameters, **kept.statistics}
        names = {*whole, *(f"{name}.{leaf}" for name in kept.norms for leaf in ("weight", "bias"))}
        return names, len(norms_to_frame(kept.norms)) + sum(one.numel() * one.element_size() for one in whole.values())

    def _in_steps(self, run: ObjectiveRun, numbers: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int] | None:
        """Return numbers with norms stored as beside a mask, and their bytes; None if none is a norm's."""
        norms = _settled_parts(run).norms
        others = [one for name, one in numbers.items() if name.rpartition(".")[0] not in norms]
        if len(others) == len(numbers):
            return None
        values = {name: one.detach().clone() for name, one in numbers.items()}
        values |= {name: one.half() for name, one in values.items() if name.rpartition(".")[0] not in norms}
        return values, len(norms_to_frame(norms)) + 2 * parameters(*others)

    def _rounded(
        self, learned: Mapping[str, Tensor], start: Mapping[str, Tensor], bits: int
    ) -> tuple[dict[str, Tensor], int]:
        """Return the values that numbers of so many bits stand for, and the bytes of these numbers."""
        values, size = {}, 0.0
        for name, one in learned.items():
            origin = start[name].float() if self.relative else torch.zeros(one.shape, device=one.device)
            change = one.detach().float() - origin
            rows = self.rows(name, change)
            rounded, taken = quantized(rows, bits)
            rows.copy_(rounded)
            values[name], size = origin + change, size + taken
        return values, math.ceil(size / 8)


def _settled_parts(run: ObjectiveRun) -> Parts:
    """Settle the network as beside a mask; return the norms, parameters and statistics to store."""
    run.settle()
    return shortened(Parts(MaskSet({})), run.backbone.model, run.before)


def _head_bytes(head: Head | None) -> int:
    """Return the bytes that a linear head takes in an adapter."""
    assert head is not None
    weight = head.weight.numel() * head.weight.element_size()
    if head.steps is not None:
        weight = len(rows_to_frame(head.weight, head.steps)) + 4 * head.steps.numel()
    return weight + (0 if head.bias is None else head.bias.numel() * head.bias.element_size())


@BASELINES.register
class Full(Dense):
    """Full fine-tuning: every weight of the body learns, and a head."""

    id = "full"
    reference = ""
    rates: ClassVar[Rates] = {"adam": (1e-4, 3e-4, 1e-3), "sgd": (0.003, 0.01, 0.03)}
    bits = ()

    def learn(self, backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
        return body_parameters(backbone)


class Named(Dense):
    """Parameters of one kind are trained, and a head; `word` names the kind as `learning_names` takes it."""

    word: ClassVar[str]

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        if not self.learn(backbone, config):
            raise ConfigError(
                f"the backbone {backbone.id} has no {self.word}, so there is no baseline {self.id!r}; leave it out"
            )

    def learn(self, backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
        body = body_parameters(backbone)
        return {name: body[name] for name in learning_names(backbone.model, [self.word], backbone.outside)}


@BASELINES.register
class BitFit(Named):
    """Biases alone learn, those of normalisation layers included, and a head."""

    id = "bitfit"
    reference = "https://arxiv.org/abs/2106.10199"
    rates: ClassVar[Rates] = {"adam": (1e-3, 3e-3, 1e-2), "sgd": (0.01, 0.03, 0.1)}
    word = "biases"


@BASELINES.register
class Norms(Named):
    """Scales and shifts of normalisation layers alone learn, and a head."""

    id = "norms"
    reference = "https://arxiv.org/abs/2003.00152"
    rates: ClassVar[Rates] = {"adam": (3e-3, 1e-2, 3e-2), "sgd": (0.01, 0.03, 0.1)}
    word = "norms"


STEP_BITS = 16  # of a row's step, float16
SHARES = torch.linspace(0.05, 1.0, 39)  # of the step that reaches a row's greatest value, to choose from


def quantized(rows: Tensor, bits: int) -> tuple[Tensor, float]:
    """Return rows of numbers, (R, N), rounded to `bits` bits each, at most 8, and the bits that they take together.

    The levels of a row are the odd multiples of half a step, as many above zero as below it: with one bit, a sign. The
    step is the one of smallest squared error among 39, each fitted by least squares, and is stored as float16. The
    levels are coded by an adaptive arithmetic coder, or as they are; one more bit says which.
    """
    half = 2 ** (bits - 1)
    widest = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / (half - 0.5)
    levels, values = torch.zeros_like(rows), torch.zeros_like(rows)
    least = torch.full((len(rows), 1), math.inf, device=rows.device)
    for share in SHARES:
        found = (rows / (share * widest)).floor().clamp(-half, half - 1) + 0.5
        step = (rows * found).sum(1, keepdim=True) / (found * found).sum(1, keepdim=True)
        rounded = found * step.half().float()
        error = (rounded - rows).square().sum(1, keepdim=True)
        levels, values = torch.where(error < least, found, levels), torch.where(error < least, rounded, values)
        least = torch.minimum(error, least)
    counts = torch.bincount((levels - 0.5).long().flatten() + half, minlength=2 * half)
    return values, len(rows) * STEP_BITS + 1 + min(code_bits(counts), rows.numel() * bits)


def code_bits(counts: Tensor) -> float:
    """Return the length of an adaptive arithmetic code of symbols that occur so often, (S,); it needs no table.

    Each symbol is coded with the probability (times that it came before + 1/2) / (symbols before + S/2).
    """
    seen, kinds = counts.double(), len(counts)
    logarithm = torch.lgamma(seen.sum() + kinds / 2) - math.lgamma(kinds / 2)
    logarithm -= (torch.lgamma(seen + 0.5) - math.lgamma(0.5)).sum()
    return float(logarithm) / math.log(2)


@BASELINES.register
class Knn(Baseline):
    """Nearest neighbours of the frozen features: k 200, cosine, temperature 0.1; the bank is stored."""

    id = "knn"
    reference = "https://arxiv.org/abs/1805.01978"
    seeded = False

    def fit(self, trial: Trial) -> Fitted:
        x, y = trial.embed()
        return Fitted(
            lambda inputs: knn_scores(x, y, trial.features(inputs), trial.classes), 0, {"bank": x.nbytes + y.nbytes}
        )


@BASELINES.register
class LinearProbe(Baseline):
    """Linear probe of the frozen features, a convex problem without a learning rate."""

    id = "probe"
    reference = "https://arxiv.org/abs/1610.01644"
    seeded = False

    def fit(self, trial: Trial) -> Fitted:
        probe = fit_probe(*trial.embed(), trial.classes)
        count = parameters(probe.weight, probe.bias)
        return Fitted(trial.probed(probe), count, {"head": 4 * count})
