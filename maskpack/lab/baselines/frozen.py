"""Baselines on frozen features: nearest neighbours and a linear probe."""

from ...training.features import fit_probe, knn_scores
from .base import BASELINES, Baseline, Fitted, Trial, parameters


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
