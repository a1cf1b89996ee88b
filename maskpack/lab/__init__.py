"""Research on masks: comparison with baselines, analyses of trained networks, pictures.

from maskpack.lab import compare, density_figure
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.criticality import criticality
    from .analysis.evaluation import Evaluations
    from .analysis.network import grouped, read_networks
    from .analysis.pairs import barrier, barriers, distances, mistakes
    from .analysis.similarity import similarities
    from .analysis.starts import feature_reuse, from_checkpoints
    from .comparison import compare
    from .plots.curves import (
        barrier_figure,
        bytes_figure,
        checkpoint_figure,
        label_figure,
        shuffle_figure,
        similarity_figure,
    )
    from .plots.figure import save_figure
    from .plots.masks import agreement, density_figure, feature_figure, overlap_figure, score_figure
    from .plots.results import cluster_figure, confusion_figure, criticality_figure, gate_figure, mistakes_figure

_MODULES = {
    "analysis.criticality": "criticality",
    "analysis.evaluation": "Evaluations",
    "analysis.network": "grouped read_networks",
    "analysis.pairs": "barrier barriers distances mistakes",
    "analysis.similarity": "similarities",
    "analysis.starts": "feature_reuse from_checkpoints",
    "comparison": "compare",
    "plots.curves": "barrier_figure bytes_figure checkpoint_figure label_figure shuffle_figure similarity_figure",
    "plots.figure": "save_figure",
    "plots.masks": "agreement density_figure feature_figure overlap_figure score_figure",
    "plots.results": "cluster_figure confusion_figure criticality_figure gate_figure mistakes_figure",
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "Evaluations",
    "agreement",
    "barrier",
    "barrier_figure",
    "barriers",
    "bytes_figure",
    "checkpoint_figure",
    "cluster_figure",
    "compare",
    "confusion_figure",
    "criticality",
    "criticality_figure",
    "density_figure",
    "distances",
    "feature_figure",
    "feature_reuse",
    "from_checkpoints",
    "gate_figure",
    "grouped",
    "label_figure",
    "mistakes",
    "mistakes_figure",
    "overlap_figure",
    "read_networks",
    "save_figure",
    "score_figure",
    "shuffle_figure",
    "similarities",
    "similarity_figure",
]


def __getattr__(name: str) -> Any:  # imported when first used
    if name not in _WHERE:
        raise AttributeError(f"module 'maskpack.lab' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
