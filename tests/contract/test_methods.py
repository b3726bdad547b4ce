"""One battery that every registered method passes on every architecture (tiny random models)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import retcon
from retcon.edits import Edit
from retcon.lm.layouts import LAYOUTS
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.methods.registry import METHODS, method
from tests.conftest import random_moments

CONTEXTS = Contexts(("The train stood still. ", "I read. "))

SETTINGS: dict[str, dict[str, Any]] = {
    "jeep": dict(
        low=(0, 1),
        high=(2, 3),
        low_clamp=8.0,
        high_clamp=8.0,
        low_moment_weight=1.0,
        high_moment_weight=1.0,
        low_weight_decay=0.0,
        high_weight_decay=0.0,
        steps=12,
    ),
}
"""Settings that make sense for four random layers of width 32."""

EVERYWHERE = [(name, family) for name in METHODS for family in LAYOUTS]


def test_every_method_has_settings_here() -> None:
    assert set(SETTINGS) == set(METHODS)


def probability(lm: LM, edit: Edit) -> float:
    """p(target | prompt), from the model's own logits, token by token."""
    row = lm.encode(edit.text, edit.target_new)
    with torch.no_grad():
        log_p = lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    labels = torch.tensor(row.target_ids)
    return float(log_p[row.n_prompt - 1 : len(row.ids) - 1].gather(1, labels[:, None]).sum().exp())


@pytest.mark.parametrize(("name", "family"), EVERYWHERE)
def test_propose_writes_nothing_and_apply_then_revert_restores(
    name: str, family: str, tiny: Callable[..., LM], edit: Edit, untouched: Callable[[LM], Any]
) -> None:
    lm = tiny(family, torch.float32)
    lm.model.train()  # flags that are not the default must come back too
    moments = random_moments(lm)
    before = untouched(lm)
    delta = method(name, **SETTINGS[name]).propose(lm, [edit], contexts=CONTEXTS, moments=moments)
    assert untouched(lm) == before
    weights = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    lm.apply(delta)
    changed = {n for n, p in lm.model.named_parameters() if not torch.equal(p, weights[n])}
    assert changed == set(delta.changes)
    lm.revert(delta)
    assert untouched(lm) == before
    with lm.edited(delta):
        assert {n for n, p in lm.model.named_parameters() if not torch.equal(p, weights[n])} == changed
    assert untouched(lm) == before


@pytest.mark.parametrize(("name", "family"), EVERYWHERE)
def test_one_edit_raises_its_probability(name: str, family: str, tiny: Callable[..., LM], edit: Edit) -> None:
    lm = tiny(family)
    delta = method(name, **SETTINGS[name]).propose(lm, [edit], contexts=CONTEXTS, moments=random_moments(lm))
    before = probability(lm, edit)
    with lm.edited(delta):
        after = probability(lm, edit)
    assert after > 5 * before, (before, after, delta.report)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_unicode_and_longer_targets(name: str, family: str, tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm = tiny(family)
    moments = random_moments(lm)
    chosen = method(name, **SETTINGS[name])
    delta = chosen.propose(lm, edits, contexts=CONTEXTS, moments=moments)
    assert [r.id for r in delta.report] == [e.id for e in edits]
    before = [probability(lm, e) for e in edits]
    with lm.edited(delta):
        after = [probability(lm, e) for e in edits]
    assert all(b > a for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_delta(name: str, tiny: Callable[..., LM], edit: Edit) -> None:
    moments = random_moments(tiny("llama"))
    first, second = (
        method(name, **SETTINGS[name]).propose(tiny("llama"), [edit], moments=moments, seed=3) for _ in range(2)
    )
    other = method(name, **SETTINGS[name]).propose(tiny("llama"), [edit], moments=moments, seed=4)
    assert first.id == second.id
    assert first.id != other.id


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_batch_gives_an_empty_delta(
    name: str, tiny: Callable[..., LM], untouched: Callable[[LM], Any]
) -> None:
    lm = tiny("gptj")
    before = untouched(lm)
    delta = method(name, **SETTINGS[name]).propose(lm, [], contexts=CONTEXTS, moments=random_moments(lm))
    assert not delta.changes
    with lm.edited(delta):
        pass
    assert untouched(lm) == before


@pytest.mark.parametrize("name", METHODS)
def test_padding_side_of_the_tokenizer_does_not_matter(name: str, tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm = tiny("gpt2")
    moments = random_moments(lm)
    ids = []
    for side in ("left", "right"):
        kept, lm.tokenizer.padding_side = lm.tokenizer.padding_side, side
        try:
            delta = method(name, **SETTINGS[name]).propose(lm, edits, contexts=CONTEXTS, moments=moments)
            assert lm.tokenizer.padding_side == side
        finally:
            lm.tokenizer.padding_side = kept
        ids.append(delta.id)
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_delta_is_the_same_from_memory_and_from_its_file(
    name: str, tiny: Callable[..., LM], edits: list[Edit], tmp_path: Any
) -> None:
    lm = tiny("llama", torch.float32)
    delta = method(name, **SETTINGS[name]).propose(lm, edits, contexts=CONTEXTS, moments=random_moments(lm))
    delta.save(tmp_path / "delta.safetensors")
    loaded = retcon.Delta.load(tmp_path / "delta.safetensors")
    assert (loaded, loaded.report, dict(loaded.provenance)) == (delta, delta.report, dict(delta.provenance))
    with lm.edited(delta):
        wanted = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    with lm.edited(loaded):
        assert all(torch.equal(p, wanted[n]) for n, p in lm.model.named_parameters())


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_models_can_be_edited(name: str, tiny: Callable[..., LM], edit: Edit) -> None:
    lm = tiny("llama", torch.bfloat16)
    delta = method(name, **SETTINGS[name]).propose(lm, [edit], contexts=CONTEXTS, moments=random_moments(lm))
    assert all(c.values().dtype == torch.float32 for changes in delta.changes.values() for c in changes)
    with lm.edited(delta):
        assert probability(lm, edit) > 0
