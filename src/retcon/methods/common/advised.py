"""Layers by the probe, as settings of a method: `retcon.method(name, for_model=lm, layers="probe", cases=...)`."""

import warnings
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from retcon import world
from retcon.edits import Case, Edit
from retcon.errors import InvalidSetting, RetconWarning
from retcon.lm.load import DEMO
from retcon.lm.model import LM
from retcon.locate.advice import Advice, advise
from retcon.locate.contrast import contrast_probe
from retcon.methods.common.contract import Method
from retcon.methods.common.starting_point import edits_of

N_DEMO_CASES = 500
"""Facts of the embedded world that its models are probed with where no cases are given."""


def probe_layers(lm: LM, cases: Iterable[Edit | Case] | None = None) -> Advice:
    """Return which layers to edit, by the contrast-based probe over the edits of `cases`; warn where that is weak."""
    if cases is None and not lm.name.startswith(DEMO):
        raise InvalidSetting(
            "layers='probe' needs facts to probe the model with: pass cases= (edits or cases; thirty at least, better "
            "some hundreds)"
        )
    cases = world.cases(N_DEMO_CASES, seed=0) if cases is None else cases
    advice = advise(contrast_probe(lm, edits_of(cases)))
    if advice.weak:
        warnings.warn(
            f"the evidence for layers {list(advice.low.layers)} and {list(advice.high.layers)} is weak: "
            + "; ".join(advice.weak),
            RetconWarning,
            stacklevel=3,
        )
    return advice


def settings_for(advice: Advice, method: type[Method]) -> dict[str, Any]:
    """Return the advice as settings of a method, by the names of its fields.

    Raises:
        InvalidSetting: none of its settings names layers.
    """
    names = [f.name for f in fields(method)]
    if method.one_layer:
        return {"layers": (advice.settings(["layer"])["layer"],)}
    return advice.settings(names)
