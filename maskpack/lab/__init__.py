"""Research on masks: comparison with baselines, analyses of trained networks, pictures.

from maskpack.lab import compare, density_figure
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.barrier import barriers
    from .analysis.criticality import criticality
    from .analysis.mistakes import mistakes
    from .analysis.similarity import similarities
    from .analysis.starts import feature_reuse, from_checkpoints
    from .comparison import compare

# imported when first used
_WHERE = {
    "barriers": "analysis.barrier",
    "compare": "comparison",
    "criticality": "analysis.criticality",
    "feature_reuse": "analysis.starts",
    "from_checkpoints": "analysis.starts",
    "mistakes": "analysis.mistakes",
    "similarities": "analysis.similarity",
}

__all__ = [
    "barriers",
    "compare",
    "criticality",
    "feature_reuse",
    "from_checkpoints",
    "mistakes",
    "similarities",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'maskpack.lab' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
