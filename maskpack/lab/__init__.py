"""Research on masks: comparison with baselines, analyses of trained networks, pictures.

from maskpack.lab import compare, density_figure
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.network import *  # noqa: F403  # noqa: F403
    from .analysis.pairs import *  # noqa: F403  # noqa: F403
    from .analysis.starts import *  # noqa: F403
    from .comparison import *  # noqa: F403
    from .plots.figure import *  # noqa: F403
    from .plots.pictures import *  # noqa: F403
    from .report import *  # noqa: F403

_MODULES = {
    "analysis.network": "Evaluations grouped read_networks",
    "analysis.pairs": "barrier barriers criticality distances mistakes similarities",
    "analysis.starts": "feature_reuse from_checkpoints",
    "comparison": "compare",
    "plots.figure": "save_figure",
    "plots.pictures": (
        "agreement barrier_figure bytes_figure checkpoint_figure cluster_figure confusion_figure criticality_figure "
        "density_figure feature_figure gate_figure label_figure mistakes_figure overlap_figure score_figure "
        "shuffle_figure similarity_figure"
    ),
    "report": "adapter_report",
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:  # imported when first used
    if name not in _WHERE:
        raise AttributeError(f"module 'maskpack.lab' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
