"""The rule that turns ranks into layers: planted evidence is found, and weak evidence is called weak."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retcon.errors import InvalidSetting
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.locate import Contrast, Rule, advise, contrast_probe
from retcon.locate.advice import layer_contrast
from tests.conftest import FAMILIES
from tests.locate.test_contrast import EDITS


def planted(subject: Tensor, prediction: Tensor, *, known: float = 1.0) -> Contrast:
    """A probe of records whose Δ is as given, (records, layers): the target's rank stays, the original's moves."""
    n, depth = subject.shape
    ranks = torch.zeros(n, 2, depth + 1, 1, 2, dtype=torch.float64)
    for w, delta in enumerate((subject, prediction)):
        fall = torch.cat([torch.zeros(n, 1, dtype=torch.float64), delta.cumsum(1)], dim=1)
        ranks[:, w, :, 0, 0] = (12 - fall).expm1()  # log(1 + rank) = 12 - what was gained so far
        ranks[:, w, :, 0, 1] = 1000.0
    return Contrast(
        ids=tuple(map(str, range(n))),
        positions=("subject_last", "prediction"),
        points=tuple(Point(layer, "block") for layer in range(-1, depth)),
        norms=(True,),
        sets=("original", "target"),
        size=torch.ones(n, 2, dtype=torch.long),
        mean_rank=ranks,
        sum_prob=torch.zeros_like(ranks),
        known=torch.arange(n) < known * n,
        assumed=torch.zeros(n, dtype=torch.bool),
        skipped={},
        vocabulary=100_000,
    )


def bumps(n: int, depth: int, at: list[int], *, noise: float = 0.05, height: float = 0.3) -> Tensor:
    delta = noise * torch.randn(n, depth, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    delta[:, at] += height
    return delta


def test_the_contrast_is_what_was_planted() -> None:
    subject, prediction = bumps(5, 8, [2]), bumps(5, 8, [6])
    probe = planted(subject, prediction)
    assert_close(layer_contrast(probe, "subject_last", final_norm=True), subject)
    assert_close(layer_contrast(probe, "prediction", final_norm=True), prediction)


@pytest.mark.parametrize(
    ("depth", "low", "high"),
    [
        (8, (1, 2), (5, 6)),
        (28, (3, 4, 5, 6, 7, 8), (15, 16)),  # the widths of the published groups
        (32, (5, 6, 7, 8, 9, 10), (22, 23, 24)),
    ],
)
def test_planted_groups_are_found(depth: int, low: tuple[int, ...], high: tuple[int, ...]) -> None:
    found = advise(planted(bumps(200, depth, list(low)), bumps(200, depth, list(high))))
    assert (found.low.layers, found.high.layers) == (low, high)
    assert found.low.score == pytest.approx(0.3 * len(low), abs=0.03)
    assert found.low.low < found.low.score < found.low.high
    assert found.low.stability == found.high.stability == 1.0
    assert found.weak == ()
    assert found.contrast["prediction"].argmax() in high


def test_each_group_keeps_to_its_half_and_off_the_top() -> None:
    found = advise(planted(bumps(100, 20, [11, 12, 13, 14]), bumps(100, 20, [1, 2, 18, 19])))
    assert max(found.low.layers) < 10 <= min(found.high.layers)
    assert max(found.high.layers) < 18  # a tenth of 20 layers is left out
    assert found.high.starts[-1] + len(found.high.layers) == 18


def test_the_same_seed_gives_the_same_stability() -> None:
    probe = planted(bumps(40, 8, [], noise=1.0), bumps(40, 8, [], noise=1.0))
    first, again, other = advise(probe), advise(probe), advise(probe, seed=1)
    assert torch.equal(first.low.shares, again.low.shares)
    assert not torch.equal(first.low.shares, other.low.shares)
    assert float(first.low.shares.sum()) == pytest.approx(1)
    assert first.low.layers == other.low.layers  # the choice itself is not drawn


def test_stability_is_the_share_of_resamples() -> None:
    """Two kinds of cases want different windows: which one wins is a matter of how many of each are drawn."""
    one, two = bumps(30, 8, [0, 1], noise=0), bumps(30, 8, [2, 3], noise=0)
    probe = planted(torch.cat([one, one[:1], two]), bumps(61, 8, [5], noise=0))
    found = advise(probe)
    assert found.low.layers == (0, 1)
    assert 0.4 < found.low.stability < 0.7


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (planted(bumps(10, 8, [1, 2]), bumps(10, 8, [5])), "only 10 cases, 30 or more are wanted"),
        (planted(bumps(1, 8, [1, 2]), bumps(1, 8, [5])), "only 1 case, 30 or more are wanted"),
        (
            planted(bumps(100, 8, [1, 2]), bumps(100, 8, [5]), known=0.3),
            "the model says the original answer in 30 of 100 cases only",
        ),
        (
            planted(bumps(100, 8, [], noise=0.5) - 1, bumps(100, 8, [5])),
            r"low group: the answers do not part there \(score -1",
        ),
        (
            planted(bumps(100, 20, [2, 4]), bumps(100, 20, list(range(10, 18)), noise=1.0)),
            r"high group: only \d+\.\d% of the resamples choose the same layers",
        ),
    ],
)
def test_weak_evidence_is_called_weak(probe: Contrast, reason: str) -> None:
    (found,) = advise(probe).weak
    assert re.search(reason, found), found


def test_answers_that_stand_in_are_not_known() -> None:
    """They are the model's own by construction."""
    probe = planted(bumps(100, 8, [1, 2]), bumps(100, 8, [5]), known=0.8)
    found = advise(replace(probe, assumed=torch.arange(100) < 70))
    assert (found.n_known, found.n_assumed) == (80, 70)
    assert found.weak == ("the model says the original answer in 10 of the 30 cases that give one only",)
    assert not advise(replace(probe, known=torch.ones(100).bool(), assumed=torch.ones(100).bool())).weak


def test_what_a_probe_finds_is_compared_as_itself() -> None:
    """Tensors have no single answer to whether they are equal."""
    probe = planted(bumps(50, 8, [1, 2]), bumps(50, 8, [5]))
    for found in (probe, advise(probe)):
        assert found in [found]
        assert found != replace(found)
        assert len({found, replace(found)}) == 2


def test_settings_go_by_the_names_of_fields() -> None:
    found = advise(planted(bumps(50, 28, list(range(3, 9))), bumps(50, 28, [15, 16])))
    assert found.settings(["low", "high", "steps"]) == {"low": (3, 4, 5, 6, 7, 8), "high": (15, 16)}
    assert found.settings(["layers"]) == {"layers": (3, 4, 5, 6, 7, 8)}
    assert found.settings(["layer", "steps"]) == {"layer": 6}
    with pytest.raises(InvalidSetting, match=r"the method's settings name no layers \(it has steps\)"):
        found.settings(["steps"])


def test_shallow_models() -> None:
    found = advise(planted(bumps(50, 3, [0]), bumps(50, 3, [1])))
    assert (found.low.layers, found.high.layers) == ((0,), (1,))
    assert [w.split(":")[0] for w in found.weak] == ["low group", "high group"]
    assert "nothing to choose from" in found.weak[0]
    with pytest.raises(InvalidSetting, match="2 layers leave no room for a low and a high group"):
        advise(planted(bumps(50, 2, [0]), bumps(50, 2, [1])))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_gets_advice(family: str, still: Callable[[str], LM]) -> None:
    probe = contrast_probe(still(family), EDITS)
    for final_norm in (True, False):
        found = advise(probe, Rule(final_norm=final_norm))
        assert set(found.low.layers) <= {0, 1}
        assert found.high.layers == (2,)
        assert "only 4 cases, 30 or more are wanted" in found.weak
        assert len(found.contrast["prediction"]) == 4


def test_the_rule_needs_its_reading() -> None:
    probe = planted(bumps(50, 8, [1]), bumps(50, 8, [5]))
    with pytest.raises(InvalidSetting, match="the probe holds no reading final_norm = False"):
        advise(probe, Rule(final_norm=False))
    with pytest.raises(InvalidSetting, match="the probe holds no position prediction"):
        one = {"mean_rank": probe.mean_rank[:, :1], "sum_prob": probe.sum_prob[:, :1]}
        advise(replace(probe, positions=("subject_last",), **one))


@pytest.mark.parametrize("settings", [{"low_share": 0.0}, {"top_share": 0.6}, {"least_width": 0}, {"n_resamples": 0}])
def test_rules_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(InvalidSetting, match="must"):
        Rule(**settings)  # type: ignore[arg-type]
