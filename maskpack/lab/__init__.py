"""Research on masks: comparison with baselines, analyses of trained networks, pictures.

from maskpack.lab import compare, density_figure
"""

from typing import TYPE_CHECKING

from .. import lazily

if TYPE_CHECKING:
    from .comparison import *  # noqa: F403
    from .figure import *  # noqa: F403
    from .networks import *  # noqa: F403
    from .pairs import *  # noqa: F403
    from .pictures import *  # noqa: F403
    from .report import *  # noqa: F403
    from .starts import *  # noqa: F403

__all__, __getattr__, __dir__ = lazily(
    __name__,
    {
        "networks": "Evaluations grouped read_networks",
        "pairs": "barrier barriers criticality distances mistakes similarities",
        "starts": "feature_reuse from_checkpoints",
        "comparison": "compare",
        "figure": "save_figure",
        "pictures": (
            "agreement barrier_figure bytes_figure checkpoint_figure cluster_figure confusion_figure "
            "criticality_figure density_figure feature_figure gate_figure label_figure mistakes_figure overlap_figure "
            "score_figure shuffle_figure similarity_figure"
        ),
        "report": "adapter_report",
    },
)
