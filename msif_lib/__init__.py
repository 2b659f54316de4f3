"""Multi-stage influence functions: which pretraining examples made a finetuned model predict so.

After H. Chen, S. Si, Y. Li, C. Chelba, S. Kumar, D. Boning and C.-J. Hsieh, "Multi-Stage
Influence Function", NeurIPS 2020.
"""

from msif_lib.influence import (
    Chain,
    FixedEmbeddingInfluence,
    Scores,
    SingleStageInfluence,
    StationarityWarning,
    UpdatedEmbeddingInfluence,
)
from msif_lib.stage import Stage, cross_entropy

__all__ = [
    "Chain",
    "FixedEmbeddingInfluence",
    "Scores",
    "SingleStageInfluence",
    "Stage",
    "StationarityWarning",
    "UpdatedEmbeddingInfluence",
    "cross_entropy",
]
