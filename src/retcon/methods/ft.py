"""FT: fine-tune chosen matrices on the new answers, with every choice open.

Yang et al. 2025, arXiv:2509.22072 (LocFT-BF): breadth first, many small steps on one well chosen matrix, which is what
presets do. The engine: methods/common/fine_tuning.py; what the released codes of the family do: docs/methods/ft.md.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from retcon.methods.common.contract import ModelShape
from retcon.methods.common.fine_tuning import FineTuning


@dataclass(frozen=True, kw_only=True)
class Ft(FineTuning):
    """Fine-tuning of chosen matrices."""

    name: ClassVar[str] = "ft"
    fits_learning_rate: ClassVar[bool] = True
    fits_layer: ClassVar[bool] = True

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Return one down-projection, in mini-batches: at seven tenths of the depth where there are no facts to choose
        it by; the learning rate is the smallest to try."""
        return {"layers": (math.floor(0.7 * shape.n_layers),), "batch_size": 100, "steps_per_epoch": 30}
