"""The parts of a value search by themselves: loss, stop rule, and a state that the host need not watch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from retcon.edits import Edit
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.values.objective import Labels, Loss, ValueSearch, ValueSite, kl_divergence, loss_of
from retcon.memory.values.rows import EditRows
from retcon.memory.values.schedule import Chunk, Pace
from retcon.memory.values.state import SearchState

CONTEXTS = Contexts(("The train stood still. ",))
SITES = (
    ValueSite(Point(1, "mlp"), "subject_last", clamp=1.5, weight_decay=0.02),
    ValueSite(Point(2, "mlp"), "prediction", clamp=0.7, weight_decay=0.02),
)
N, D, VOCAB = 3, 8, 11
TARGETS = [(4,), (1, 2), (3,), (5, 5), (0,), (7, 8)]
"""Of two rewriting rows per edit."""


def problem(
    randn: Callable[..., Tensor], search: ValueSearch
) -> tuple[Loss, Tensor, Tensor, list[Tensor], list[Tensor]]:
    tokens = torch.tensor([t for row in TARGETS for t in row])
    per_row = torch.tensor([len(row) for row in TARGETS])
    labels = Labels(tokens, torch.arange(len(TARGETS)).repeat_interleave(per_row), per_row)
    log_p, kl_p = randn(len(tokens), VOCAB).log_softmax(-1), randn(2, N, VOCAB).log_softmax(-1)
    offsets, inits = ([randn(N, D) for _ in SITES] for _ in range(2))
    kl = kl_divergence(kl_p[0], kl_p[1])
    factor = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
    return loss_of(log_p, kl, labels, offsets, inits, SITES, search, factor), log_p, kl_p, offsets, inits


def test_the_loss_is_that_of_each_edit_by_itself(randn: Callable[..., Tensor]) -> None:
    search = ValueSearch(kl_factor=0.3, settled_factor=0.1)
    loss, log_p, kl_p, offsets, inits = problem(randn, search)
    at = 0
    for e in range(N):
        nll, likely = [], True
        for row in TARGETS[2 * e : 2 * e + 2]:
            picked = [log_p[at + t, token] for t, token in enumerate(row)]
            likely &= all(int(log_p[at + t].argmax()) == token for t, token in enumerate(row))
            nll.append(-torch.stack(picked).mean())
            at += len(row)
        mean = torch.stack(nll).mean()
        kl = (kl_p[0, e].exp() * (kl_p[0, e] - kl_p[1, e])).sum()
        decay = sum(0.02 * o[e].norm() / i[e].norm() ** 2 for o, i in zip(offsets, inits, strict=True))
        assert_close(loss.nll[e], mean)
        assert_close(loss.kl[e], kl)
        assert_close(loss.total[e], (0.5 if e == 1 else 1.0) * mean + 0.3 * kl + decay)
        assert_close(loss.probability[e], torch.stack(nll).neg().exp().mean())
        assert bool(loss.all_likely[e]) == likely


@pytest.mark.parametrize(
    ("search", "wanted"),
    [
        (ValueSearch(threshold=0.5), [True, False, True]),
        (ValueSearch(stop="loss", threshold=1.0), [False, True, False]),
        (ValueSearch(threshold=2.0, settled_factor=0.1, kl_factor=1.0, settled_kl=0.01), [True, False, False]),
    ],
    ids=["probability", "loss", "settled"],
)
def test_the_stop_rule(search: ValueSearch, wanted: list[bool]) -> None:
    loss = Loss(
        total=torch.tensor([1.0, 0.9, 3.0]),
        nll=torch.ones(3),
        kl=torch.tensor([0.01, 0.0, 0.5]),
        probability=torch.tensor([0.5, 0.49, 0.9]),
        all_likely=torch.tensor([True, False, True]),
    )
    assert loss.over(search).tolist() == wanted
    factors = [1.0, 1.0, 1.0] if search.settled_factor is None else [0.1, 1.0, 0.1]
    assert_close(loss.next_nll_factor(search), torch.tensor(factors))


class AsksNothing(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "item"), name
        return func(*args, **(kwargs or {}))


def test_loss_stop_rule_and_descent_ask_the_host_for_nothing(
    tiny: Callable[..., LM], randn: Callable[..., Tensor]
) -> None:
    lm, search = tiny("llama"), ValueSearch(steps=4, settled_factor=0.1)
    width = lm.site(0, "down_proj").weight.shape[0]
    state = SearchState.new(lm, SITES, N, [randn(N, width) for _ in SITES], search)
    gradients = [randn(N, width) for _ in SITES]
    with AsksNothing():
        loss, *_ = problem(randn, search)
        for _ in range(3):
            state.take(loss.detach(), search)
            state.descend(gradients, SITES)
    assert state.steps.tolist() == [3, 3, 3]


def test_an_edit_that_has_ended_stays_as_it_is(tiny: Callable[..., LM], randn: Callable[..., Tensor]) -> None:
    lm, search = tiny("llama"), ValueSearch(steps=9, threshold=0.5)
    width = lm.site(0, "down_proj").weight.shape[0]
    state = SearchState.new(lm, SITES, N, [randn(N, width) for _ in SITES], search)
    probability = torch.tensor([0.1, 0.8, 0.1])
    same = torch.ones(N)
    state.take(Loss(same, same, same, probability, same > 2), search)
    before = [x.clone() for x in state.offset]
    state.take(Loss(7 * same, same, same, torch.zeros(N), same > 2), search)
    state.descend([randn(N, width) for _ in SITES], SITES)
    assert state.going.tolist() == [True, False, True]
    assert state.reached.tolist() == [False, True, False]
    assert state.terms[0].tolist() == pytest.approx([0.0, 0.8, 0.0])
    assert state.steps.tolist() == [1, 0, 1]
    for old, new in zip(before, state.offset, strict=True):
        assert (old != new).any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("look_every", [2, 3, 8])
def test_looking_less_often_finds_the_same(look_every: int, tiny: Callable[..., LM]) -> None:
    lm = tiny("llama")
    edits = [
        Edit("The capital of {} is", subject, target, id=subject)
        for subject, target in (
            ("France", "Rome"),
            ("Peru", "a long way from home"),
            ("Chad", "Oslo"),
            ("Norway", "Bern"),
        )
    ]
    search = ValueSearch(steps=7, learning_rate=0.2, threshold=0.00201)
    with lm.frozen_eval():
        rows = [EditRows.of(lm, edit, SITES, CONTEXTS, search) for edit in edits]
        found = []
        for every in (1, look_every):
            chunk = Chunk(lm, rows, SITES, search)
            assert sorted(chunk.run(2, pace=Pace(every, max_shapes=None))) == [0, 1, 2, 3]
            found.append(chunk.found)
    for e in range(len(edits)):
        one, other = found[0][e], found[1][e]
        assert (one.report.steps, one.report.stopped) == (other.report.steps, other.report.stopped)
        for name in ("init", "offset", "activation"):
            assert_close(getattr(one, name), getattr(other, name), rtol=1e-10, atol=1e-10)
