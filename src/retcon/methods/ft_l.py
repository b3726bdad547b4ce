"""FT-L: fine-tuning in a box, in which no weight moves further than a bound.

Zhu et al. 2020, arXiv:2012.00363, in the form that Meng et al. 2022 (ROME, arXiv:2202.05262) compare with: one matrix,
a bound on the largest change, all answer tokens asked of the prompt's last token. docs/methods/ft.md.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from retcon.methods.common.contract import ModelShape
from retcon.methods.common.fine_tuning import FineTuning
from retcon.methods.common.settings import NotNegative


@dataclass(frozen=True, kw_only=True)
class FtL(FineTuning):
    """Fine-tuning in a box: no weight moves further than `box`."""

    name: ClassVar[str] = "ft_l"

    objective: Literal["target_new", "prompt_last"] = "prompt_last"
    box: NotNegative | None = 5e-4

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Return the first layer, as published for GPT-2 XL and GPT-J."""
        return {"layers": (0,)}
