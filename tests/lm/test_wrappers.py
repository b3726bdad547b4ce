"""Models that hold a text model beside others: loaded whole, edited in their text part, saved whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.tiny import WRAPPERS, tiny_wrapper, tokenizer

from retcon.edits import Edit
from retcon.lm.load import load
from retcon.memory.contexts import Contexts
from retcon.memory.moments import GivenMoments
from retcon.memory.values.search import REPLAYS
from retcon.methods.memit import Memit
from tests.conftest import random_moments

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*larger than the weight"),
    pytest.mark.filterwarnings("ignore:.*a norm stands between"),
]


def saved(wrapper: str, folder: Path) -> Any:
    """A tiny random model of that kind, written to `folder`."""
    model = tiny_wrapper(wrapper)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore:.*a factor stands between")
@pytest.mark.parametrize(
    "wrapper", [pytest.param(w, marks=[] if w in ("llava", "qwen3_vl") else [pytest.mark.long]) for w in WRAPPERS]
)
def test_a_wrapped_text_model_is_edited_in_place_and_saved_whole(
    wrapper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText

    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    original = saved(wrapper, tmp_path / "model")
    lm = load(str(tmp_path / "model"), device="cpu")
    assert lm.config.model_type == WRAPPERS[wrapper][0]
    assert lm.layout.block.removesuffix(".{}") in {n for n, _ in lm.model.named_modules()}
    edits = [Edit("You know {}", "France", "Rome", id="france")]
    method = Memit(layers=(0, 1), moment_weight=1.0, clamp=8.0, weight_decay=0.0, steps=6)
    contexts = Contexts(("The train stood still. ",))
    moments = random_moments(lm)
    if any(kind.experts for kind in lm.kinds):
        moments = GivenMoments({**moments.by_name, **random_moments(lm, experts=True).by_name})
    delta = method.propose(lm, edits, contexts=contexts, moments=moments)
    assert all(REPLAYS.get(lm, {}).values())  # the fast path is exact here too; gemma 4 does without
    ids = torch.tensor([lm.encode("You know France").ids])
    lm.apply(delta)
    with torch.no_grad():
        edited = lm.model(ids).logits
    lm.model.save_pretrained(tmp_path / "edited")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "edited", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, edited)
        assert not torch.allclose(original(ids).logits, edited)
    theirs = dict(again.named_parameters())
    changed = {n for n, p in original.named_parameters() if not torch.equal(p, theirs[n])}
    assert changed == set(delta.changes)
    lm.revert(delta)
    assert all(torch.equal(p, lm.parameter(n)) for n, p in original.named_parameters())
