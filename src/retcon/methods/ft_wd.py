"""FT-WD: fine-tune a whole block, with weight decay that falls with the number of edits.

Meng et al. 2022 (MEMIT), arXiv:2210.07229, whose released code never applies the decay: `apply_decay=False` does as it
does. docs/methods/ft.md.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from retcon.methods.common.contract import ModelShape
from retcon.methods.common.fine_tuning import FineTuning, Modules


@dataclass(frozen=True, kw_only=True)
class FtWd(FineTuning):
    """Fine-tuning of a whole block, with weight decay by the number of edits."""

    name: ClassVar[str] = "ft_wd"

    modules: Modules = ("block",)
    objective: Literal["target_new", "prompt_last"] = "prompt_last"
    power_law: bool = True

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Return the block, by depth, that MEMIT's code has for GPT-J."""
        return {"layers": (min(round(0.75 * shape.n_layers), shape.n_layers - 1),)}
