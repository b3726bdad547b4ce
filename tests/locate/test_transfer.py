"""What a step on a fact gives to others: against whole gradients of the weights, and which layer it tells."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.lm.prompts import encode_edit
from retcon.locate.transfer import N_OTHERS, Transfer, others_of, transfer
from retcon.memory.contexts import Contexts
from retcon.training.objective import answer_nll
from tests.conftest import everyday

CONTEXTS = Contexts(("The dog. ", "Therefore, one day. "))


@pytest.mark.parametrize("family", everyday("gptj", "llama", of=["gptj", "gpt2", "llama", "opt"]))
def test_shares_are_those_of_whole_gradients(family: str, tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm, edit = tiny(family), edits[0]
    sites = [lm.site(layer, "down_proj") for layer in range(lm.n_layers)]
    found = transfer(lm, [edit], edits, CONTEXTS, sites)
    assert found is not None
    assert found.layers == tuple(range(lm.n_layers))

    def gradients(other: Edit, prefix: str = "") -> list[torch.Tensor]:
        row = encode_edit(lm.tokenizer, other, prefix, answer=edit.target_new)
        weights = [site.module.weight for site in sites]
        with lm.frozen_eval(), torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            taken = torch.autograd.grad(answer_nll(lm, [row]).sum(), weights)
        return [g.flatten() for g in taken]

    own = gradients(edit)
    for shares, rows in (
        (found.own, [gradients(edit, prefix) for prefix in CONTEXTS.prefixes]),
        (found.others, [gradients(other) for other in others_of(edit, edits)[:N_OTHERS]]),
    ):
        wanted = [sum(float(g @ row[i]) for row in rows) / len(rows) / float(g @ g) for i, g in enumerate(own)]
        assert_close(shares, torch.tensor(wanted, dtype=shares.dtype), rtol=1e-6, atol=1e-8)


def test_a_small_step_lowers_a_loss_by_its_share(tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm, edit = tiny("llama"), edits[0]
    site, (context, *_) = lm.site(1, "down_proj"), CONTEXTS.prefixes
    found = transfer(lm, [edit], edits, Contexts((context,)), [site])
    assert found is not None
    rows = [encode_edit(lm.tokenizer, edit, prefix, answer=edit.target_new) for prefix in ("", context)]
    weight = site.module.weight
    with lm.frozen_eval(), torch.enable_grad():
        weight.requires_grad_(True)
        (gradient,) = torch.autograd.grad(answer_nll(lm, rows[:1]).sum(), [weight])
    with lm.frozen_eval(), torch.no_grad():
        before = answer_nll(lm, rows)
        weight -= 1e-4 * gradient / gradient.norm() ** 2
        gained = before - answer_nll(lm, rows)
        weight += 1e-4 * gradient / gradient.norm() ** 2
    assert_close(gained[1] / gained[0], found.own[0].to(gained), rtol=5e-3, atol=0)  # norms are taken in float32


def test_others_are_of_the_relation_and_have_another_answer() -> None:
    def fact(name: str, answer: str, relation: str | None, true: str | None = None) -> Edit:
        return Edit("{} is in", name, answer, true, id=name, relation_id=relation)

    facts = [fact(f"{i}", "Rome" if i % 2 else f"town {i}", "lies in") for i in range(8)]
    far = fact("far", "Oslo", "speaks")
    assert [e.id for e in others_of(facts[1], [far, *facts])] == ["2", "4", "6", "0"]
    assert [e.id for e in others_of(facts[6], [far, *facts])] == list("7012345")
    assert others_of(facts[1], [facts[1], facts[3], fact("x", "Oslo", "lies in", true="Rome")]) == []
    assert others_of(far, [far, *facts]) == facts  # none of its relation


def test_the_layer_that_gives_most_to_its_own_fact_over_others_is_best() -> None:
    one = Transfer((2, 3, 4), torch.tensor([0.5, 0.9, 0.4]), torch.tensor([0.1, 0.3, 0.001]))
    assert one.best() == 4
    assert float(one.ratio[2]) == pytest.approx(40)
    assert replace(one, others=torch.tensor([-1.0, 0.3, 0.2])).best() == 2


def test_without_another_fact_there_is_nothing_to_tell(tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm = tiny("llama")
    assert transfer(lm, edits[:1], edits[:1], CONTEXTS, [lm.site(0, "down_proj")]) is None
