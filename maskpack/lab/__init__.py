"""Research on masks: comparison with baselines, analyses of trained networks, pictures.

from maskpack.lab import compare, density_figure
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.criticality import criticality as criticality
    from .analysis.evaluation import Evaluations as Evaluations
    from .analysis.network import grouped as grouped, read_networks as read_networks
    from .analysis.pairs import barrier as barrier, barriers as barriers, distances as distances, mistakes as mistakes
    from .analysis.similarity import similarities as similarities
    from .analysis.starts import feature_reuse as feature_reuse, from_checkpoints as from_checkpoints
    from .comparison import compare as compare
    from .plots.curves import (
        barrier_figure as barrier_figure,
        bytes_figure as bytes_figure,
        checkpoint_figure as checkpoint_figure,
        label_figure as label_figure,
        shuffle_figure as shuffle_figure,
        similarity_figure as similarity_figure,
    )
    from .plots.figure import save_figure as save_figure
    from .plots.masks import (
        agreement as agreement,
        density_figure as density_figure,
        feature_figure as feature_figure,
        overlap_figure as overlap_figure,
        score_figure as score_figure,
    )
    from .plots.results import (
        cluster_figure as cluster_figure,
        confusion_figure as confusion_figure,
        criticality_figure as criticality_figure,
        gate_figure as gate_figure,
        mistakes_figure as mistakes_figure,
    )

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
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:  # imported when first used
    if name not in _WHERE:
        raise AttributeError(f"module 'maskpack.lab' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
