"""Research on masks: comparison with baselines, analyses of trained networks, pictures.

from maskpack.lab import compare, density_figure
"""

from typing import TYPE_CHECKING

from .. import lazily

if TYPE_CHECKING:
    from .analysis.network import *  # noqa: F403
    from .analysis.pairs import *  # noqa: F403
    from .analysis.starts import *  # noqa: F403
    from .comparison import *  # noqa: F403
    from .plots.figure import *  # noqa: F403
    from .plots.pictures import *  # noqa: F403
    from .report import *  # noqa: F403

__all__, __getattr__, __dir__ = lazily(
    __name__,
    {
        "analysis.network": "Evaluations grouped read_networks",
        "analysis.pairs": "barrier barriers criticality distances mistakes similarities",
        "analysis.starts": "feature_reuse from_checkpoints",
        "comparison": "compare",
        "plots.figure": "save_figure",
        "plots.pictures": (
            "agreement barrier_figure bytes_figure checkpoint_figure cluster_figure confusion_figure "
            "criticality_figure density_figure feature_figure gate_figure label_figure mistakes_figure overlap_figure "
            "score_figure shuffle_figure similarity_figure"
        ),
        "report": "adapter_report",
    },
)
