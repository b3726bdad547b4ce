"""Full-C: fine-tune every MLP matrix of every layer, in a box.

Zhai et al. 2025 (CTP) compare with it and cite Zhu et al. 2020, arXiv:2012.00363, for it; neither defines it. What we
take it for, and why: docs/methods/ft.md.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from retcon.methods.common.contract import ModelShape
from retcon.methods.common.fine_tuning import FineTuning, Modules
from retcon.methods.common.settings import AnyLayers, NotNegative


@dataclass(frozen=True, kw_only=True)
class FullC(FineTuning):
    """Fine-tuning of every MLP matrix of every layer, in a box."""

    name: ClassVar[str] = "full_c"

    layers: AnyLayers = ()
    modules: Modules = ("up_proj", "down_proj")
    box: NotNegative | None = 5e-4

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Return all layers of any model."""
        return {}
