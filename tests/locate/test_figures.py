"""Figures: they show the numbers, come out the same every time, and the lack of matplotlib is said."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retcon.drawing import figure, save
from retcon.errors import MissingPackage
from retcon.lm.model import LM
from retcon.locate import Tracing, WordSets, advise, causal_trace, contrast_probe, figures
from tests.locate.test_contrast import EDITS

UNSAID = [replace(e, target_true=None) for e in EDITS]
"""Whatever a random model says is the answer."""


@pytest.fixture
def drawn(still: Callable[[str], LM]) -> dict[str, Any]:
    pytest.importorskip("matplotlib", reason="figures need matplotlib (pip install 'retcon-lm[plot]')")
    lm = still("gptj")
    found = contrast_probe(lm, EDITS, word_sets=WordSets({"france": frozenset({"Rome"})}, {}, frozenset({"the"})))
    advice = advise(found)
    underflown = found.sum_prob.clone()
    underflown[:, :, 1] = 0
    traces = causal_trace(lm, UNSAID, Tracing(window=3, samples=2))
    return {
        "contrast": figures.contrast_figure(found, advice),
        "sets": figures.sets_figure(found),
        "underflown": figures.sets_figure(replace(found, sum_prob=underflown)),
        "advice": figures.advice_figure(advice),
        "effects": figures.effects_figure(traces),
        "trace": figures.trace_figure(traces.traces[0], 3),
    }


def test_all_are_drawn_and_the_same_every_time(drawn: dict[str, Any], tmp_path: Path) -> None:
    for name, made in drawn.items():
        written = save(made, tmp_path / name)
        assert [p.suffix for p in written] == [".png", ".svg"]
        first = [p.read_bytes() for p in written]
        assert first[0].startswith(b"\x89PNG")
        assert b"<svg" in first[1]
        if name in ("contrast", "trace"):
            assert [p.read_bytes() for p in save(made, tmp_path / name)] == first


def test_axes_name_layers_tokens_and_curves(drawn: dict[str, Any]) -> None:
    def texts(made: Any) -> set[str]:
        labels = [
            label.get_text() for axis in made.axes for label in (*axis.get_xticklabels(), *axis.get_yticklabels())
        ]
        legends = [text.get_text() for axis in made.axes if axis.get_legend() for text in axis.get_legend().texts]
        return {*labels, *legends}

    assert {"E", "0", "3", "original answer", "target answer"} <= texts(drawn["contrast"])
    assert {"low group: 0-1", "high group: 2"} <= texts(drawn["advice"])
    assert {"first subject (n=4)", "last (n=4)"} <= texts(drawn["effects"])
    tokens = [t for t in texts(drawn["trace"]) if t.endswith("*")]
    assert "".join(tokens).strip() != ""
    lines = drawn["contrast"].axes[0].get_lines()
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 2  # told apart without colour


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackage, match=r"pip install 'retcon-lm\[plot\]'"):
        figure(1, 1, 2, 2)
