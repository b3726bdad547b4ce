"""Choices: where one of a few names is wanted, any other is refused by name."""

from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch

from retcon.errors import InvalidSetting
from retcon.evaluation.metrics import gen_em
from retcon.lm.layouts import Fused, Layout
from retcon.lm.prompts import Row, pad
from retcon.locate.attribution import Attribution, attribute
from retcon.locate.ensemble import unit_scores
from retcon.locate.paths import choose_paths, paths, step_weights
from retcon.memory.solve import NullSpace, null_space, null_space_ridge
from retcon.memory.values import Values, ValueSearch
from retcon.memory.write import divisor
from retcon.methods.prune import restrain
from retcon.training.descent import shares
from retcon.training.parts import trained_units

ONES = torch.ones(2, 2, dtype=torch.float64)
PATHS = dict.fromkeys(("block", "down_proj", "up_proj", "q_proj", "k_proj", "v_proj", "o_proj"), "a") | dict.fromkeys(
    ("embedding", "final_norm"), "a"
)
ASKED: dict[str, Callable[[Any], Any]] = {
    "mode of the null space": lambda lm: null_space(ONES, 0.1, "x"),  # type: ignore[arg-type]
    "form of the update": lambda lm: null_space_ridge(ONES, NullSpace(ONES, True), 1.0, "x"),  # type: ignore[arg-type]
    "rule for when to stop": lambda lm: ValueSearch(stop="x"),  # type: ignore[arg-type]
    "kind of target": lambda lm: Values((), (), (), ()).target(0, "x"),  # type: ignore[arg-type]
    "spread": lambda lm: divisor("x", 1),  # type: ignore[arg-type]
    "restraint": lambda lm: restrain(ONES[0], 1.0, restraint="x"),  # type: ignore[arg-type]
    "reduction": lambda lm: shares([], [], "x"),  # type: ignore[arg-type]
    "unit": lambda lm: trained_units(lm.site(0, "down_proj"), "x", torch.arange(2), 1.0),  # type: ignore[arg-type]
    "unit of an attribution": lambda lm: attribute(lm, [], [], Attribution(), "x"),  # type: ignore[arg-type]
    "score of units": lambda lm: unit_scores(lm, [], [], Attribution(), "row", "x"),  # type: ignore[arg-type]
    "score of nodes": lambda lm: paths(lm, [], score="x"),  # type: ignore[arg-type]
    "pool": lambda lm: paths(lm, [], pool="x"),  # type: ignore[arg-type]
    "key matrix": lambda lm: paths(lm, [], key_matrix="x"),  # type: ignore[arg-type]
    "selection of paths": lambda lm: choose_paths([], [], 1, 1, "x"),  # type: ignore[arg-type]
    "rule of the layers' steps": lambda lm: step_weights(paths(lm, [], score="random"), "x"),  # type: ignore[arg-type]
    "part of a fused matrix": lambda lm: Fused("a", "x"),  # type: ignore[arg-type]
    "cut of a fused matrix": lambda lm: Fused("a", "q", "x"),  # type: ignore[arg-type]
    "orientation of stored matrices": lambda lm: Layout(**PATHS, stored="x"),  # type: ignore[arg-type]
    "way of earlier tokens": lambda lm: Layout(**PATHS, earlier="x"),  # type: ignore[arg-type]
    "side to pad on": lambda lm: pad([Row((1,), 1)], side="x"),  # type: ignore[arg-type]
    "mode of answers": lambda lm: gen_em("a", [["a"]], "x"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", ASKED)
def test_an_unknown_name_is_refused(what: str, tiny: Callable[..., Any]) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # the tests' check of types would be first
    with pytest.raises(InvalidSetting, match=f"^unknown {what} 'x'; known: "):
        ASKED[what](tiny("llama"))
