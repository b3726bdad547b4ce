"""FT-M: fine-tune one matrix on the answer's own tokens, each after those before it.

Zhang et al. 2024, arXiv:2401.01286 (EasyEdit's benchmark), where it repairs what FT-L's objective asks for: all tokens
of the answer at once. docs/methods/ft.md.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from retcon.methods.common.contract import ModelShape
from retcon.methods.common.fine_tuning import FineTuning


@dataclass(frozen=True, kw_only=True)
class FtM(FineTuning):
    """Fine-tuning of one matrix on the answer's own tokens."""

    name: ClassVar[str] = "ft_m"

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Return one down-projection: by depth, the one that EasyEdit has for GPT-J and LLaMA."""
        return {"layers": (round(0.7 * (shape.n_layers - 1)),)}
