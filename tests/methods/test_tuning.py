"""The scope that methods of masked tuning share: what it checks, restores and reports."""

import math
from typing import Any

import pytest
import torch

from retcon.errors import NotEditable, OutOfMemory, RetconWarning
from retcon.methods.adalora import AdaLora
from retcon.methods.common import tuning as module
from retcon.methods.common.tuning import tuning
from retcon.methods.ctp import Ctp
from retcon.methods.ft import Ft
from retcon.methods.kne import Kne
from retcon.methods.lora import Lora
from retcon.training.parts import TrainedRows, fresh

KNE = Kne(epochs=2, learning_rate=1e-2)
RUNAWAY: dict[str, Any] = dict(epochs=1, learning_rate=1e30)


def test_what_does_not_fit_is_refused_with_the_figures_before_any_step(tiny, edits, untouched, monkeypatch):
    lm = tiny("llama")
    before = untouched(lm)
    monkeypatch.setattr(module, "free_bytes", lambda device: 2**18)
    with pytest.raises(OutOfMemory, match=r"kne trains \d[\d,]+ values, which take .* GiB are free on cpu"):
        Kne(budget=None, p=1.0, modules=("down_proj", "up_proj", "gate_proj", "q_proj", "o_proj")).propose(lm, edits)
    assert untouched(lm) == before
    KNE.propose(lm, edits)  # a small ensemble does


def test_flags_and_weights_come_back_when_the_method_fails(tiny, edits, untouched):
    lm = tiny("gpt2")
    lm.model.train()
    before = untouched(lm)
    site = lm.site(1, "down_proj")
    with pytest.raises(RuntimeError, match="cut"), tuning(KNE, lm, edits, [site.name], seed=0, progress=None) as run:
        part = TrainedRows(site, torch.tensor([3]), fresh(site, 1, site.weight.shape[1]))

        def cut() -> None:
            raise RuntimeError("cut")

        run.train([part], after_step=cut)
    assert untouched(lm) == before


@pytest.mark.parametrize(
    "method",
    [
        Ft(layers=(1,), **RUNAWAY),
        AdaLora(**RUNAWAY),
        Lora(**RUNAWAY),
        Kne(budget=None, p=0.5, **RUNAWAY),
        Ctp(**RUNAWAY),
    ],
    ids=lambda method: method.name,
)
def test_no_method_gives_back_what_its_last_step_blew_up(method, tiny, edits):
    with pytest.warns(RetconWarning, match="the last finite values are kept"):
        delta = method.propose(tiny("gpt2", torch.float32), edits)
    assert {report.stopped for report in delta.report} == {"non_finite"}
    assert all(math.isfinite(report.detail["nll"]) for report in delta.report)
    assert not delta.changes  # the first step was the last


def test_a_parameter_that_must_not_change_is_refused_at_the_door(tiny, edits):
    lm = tiny("llama")
    lm.not_editable["model.norm.weight"] = "it is shared with another"
    with (
        pytest.raises(NotEditable, match="shared with another"),
        tuning(KNE, lm, edits, ["model.norm.weight"], seed=0, progress=None),
    ):
        pass


def test_a_method_s_own_loss_and_optimiser_are_used(tiny, edits):
    lm = tiny("gpt2")
    site = lm.site(1, "down_proj")
    with tuning(KNE, lm, edits, [site.name], seed=0, progress=None) as run:
        part = TrainedRows(site, torch.tensor([3, 5]), fresh(site, 2, site.weight.shape[1]))
        ended = run.train([part], optimizer=torch.optim.SGD([part.values], lr=0.0))
        delta = run.delta([part], ended)
    assert not delta.changes
    assert [report.id for report in delta.report] == [edit.id for edit in edits]
    assert all(report.steps == KNE.epochs and report.final_probability is not None for report in delta.report)
