"""`retcon.method(..., layers="probe")`."""

from collections.abc import Callable

import pytest

from retcon.edits import Case, Edit
from retcon.errors import InvalidSetting, RetconWarning
from retcon.lm.model import LM
from retcon.locate import advise, contrast_probe
from retcon.methods.common.choosing import method
from retcon.methods.common.registry import list_methods, method_class
from tests.conftest import everyday

pytestmark = pytest.mark.filterwarnings("ignore:no [a-z_]+ preset for this model:retcon.errors.RetconWarning")


@pytest.fixture(autouse=True)
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clamps and learning rates are not what is asked here."""
    monkeypatch.setattr("retcon.methods.common.starting_point.MAX_FACTOR", 1.0)
    monkeypatch.setattr("retcon.methods.common.starting_point.MAX_RATE_FACTOR", 1.0)


EVERYDAY = ("emmet", "jeep", "kn", "rect", "rome")
"""One of each way to name layers; `kn` names none."""


@pytest.mark.parametrize("name", everyday(*EVERYDAY, of=list_methods()))
def test_every_method_that_names_layers_takes_the_probes(name: str, tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm = tiny("llama")
    advice = advise(contrast_probe(lm, edits))
    fields = set(method_class(name).__dataclass_fields__)
    with pytest.warns(RetconWarning, match="is weak: only 4 cases"):
        if not fields & {"low", "layers", "layer", "base_method"}:
            with pytest.raises(InvalidSetting, match="the method's settings name no layers"):
                method(name, for_model=lm, layers="probe", cases=edits)
            return
        found = method(name, for_model=lm, layers="probe", cases=edits)
    wanted = {"low": advice.low.layers, "high": advice.high.layers, "layers": advice.low.layers, "layer": 1}
    if name == "emmet":  # which writes one layer, ROME's
        wanted["layers"] = (1,)
    settings = getattr(found, "base_settings", None) or vars(found)
    assert {k: v for k, v in settings.items() if k in wanted}.items() <= wanted.items()
    assert set(settings) & set(wanted)


@pytest.mark.filterwarnings("ignore:the evidence for layers:retcon.errors.RetconWarning")
def test_cases_are_edits_or_cases_and_names_stand_over_the_advice(tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm = tiny("gptj")
    by_edits = method("jeep", for_model=lm, layers="probe", cases=edits)
    assert method("jeep", for_model=lm, layers="probe", cases=[Case("all", tuple(edits), ())]) == by_edits
    assert by_edits.low == (0, 1)  # type: ignore[attr-defined]
    own = method("jeep", for_model=lm, layers="probe", cases=edits, low=(1,), steps=7)
    assert (own.low, own.high, own.steps) == ((1,), (2,), 7)  # type: ignore[attr-defined]


def test_what_the_probe_needs(tiny: Callable[..., LM], edits: list[Edit]) -> None:
    with pytest.raises(InvalidSetting, match="pass for_model=lm"):
        method("jeep", layers="probe", cases=edits)
    with pytest.raises(InvalidSetting, match="pass cases="):
        method("jeep", for_model=tiny("gptj"), layers="probe")
    with pytest.raises(InvalidSetting, match="has no setting 'layers'"):
        method("jeep", for_model=tiny("gptj"), layers="prob")


@pytest.mark.long  # tests/cli/test_probe.py asks the same of the command
def test_the_embedded_models_bring_their_own_facts() -> None:
    import retcon

    found = retcon.method("jeep", for_model=retcon.load("demo:gptj"), layers="probe")
    assert found.low == (2, 3)  # type: ignore[attr-defined]
    assert found.high == (4, 5)  # type: ignore[attr-defined]
    assert found.low_clamp == 6.0  # type: ignore[attr-defined]  # the preset's
