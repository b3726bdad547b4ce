"""Prompts that are run once, against plain passes over everything."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retcon.evaluation import Evaluation, asking, evaluate
from retcon.lm.decoding import Prompts, common_beginning, pads, remembers, write_tokens
from retcon.lm.model import LM
from retcon.world import cases
from tests.conftest import FAMILIES, FLOAT32_INSIDE, WINDOWED

Make = Callable[..., LM]
EVERYDAY = ("gptj", "gemma2", "bloom")
PROMPTS = [(5, 6, 7, 8), (9, 10), (11, 12, 13, 14, 15, 16), (20, 21, 22)]


def plainly(lm: LM, ids: Sequence[int]) -> Tensor:
    """Logits after the last of these tokens."""
    with torch.no_grad():
        found: Tensor = lm.model(torch.tensor([list(ids)])).logits[0, -1]
    return found


@pytest.mark.parametrize("common", [(), tuple(range(60, 80))], ids=["apart", "alike"])
@pytest.mark.parametrize("family", [f if f in EVERYDAY else pytest.param(f, marks=pytest.mark.long) for f in FAMILIES])
def test_what_comes_after_prompts_is_what_a_plain_pass_gives(family: str, common: tuple[int, ...], tiny: Make) -> None:
    lm = tiny(family)
    close = dict(rtol=1e-3, atol=1e-5) if family in FLOAT32_INSIDE else dict(rtol=1e-7, atol=1e-7)
    assert remembers(lm)
    assert not (pads(lm) and family in (*WINDOWED, "bloom", "mpt", "gpt_neo"))
    own = PROMPTS if pads(lm) else [(*ids, *range(30, 36 - len(ids))) for ids in PROMPTS]
    prompts = [(*common, *ids) for ids in own]
    assert common_beginning(prompts) == len(common)
    with lm.frozen_eval(), torch.inference_mode():
        run = Prompts(lm, prompts)
        assert_close(run.logits, torch.stack([plainly(lm, ids) for ids in prompts]), **close)
        after = run.after([2, 0, 2], [(40, 41, 42), (43,), (44, 45)])
        texts = [(2, 40), (2, 40, 41), (2, 40, 41, 42), (0, 43), (2, 44), (2, 44, 45)]
        assert_close(after, torch.stack([plainly(lm, (*prompts[k], *new)) for k, *new in texts]), **close)
        run.take([50, 51, 52, 53])
        run.keep([1, 3])
        run.take([54, 55])
        run.keep([1])
        assert_close(run.logits, plainly(lm, (*prompts[3], 53, 55))[None], **close)


def test_rows_that_have_ended_leave(tiny: Make) -> None:
    lm = tiny("llama")
    widths: list[int] = []

    def choose(logits: Tensor, active: Sequence[int]) -> list[int]:
        widths.append(len(active))
        assert len(logits) == len(active)
        return [100 * i for i in active]

    with lm.frozen_eval(), torch.inference_mode():
        found = write_tokens(Prompts(lm, [(5, 6)] * 5), choose, lambda i, tokens: len(tokens) > i)
    assert found == [[100 * i] * (i + 1) for i in range(5)]
    assert widths == [5, 4, 3, 2, 1]


def test_a_row_that_has_ended_may_wait_for_others_to_leave(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retcon.lm.decoding.LEAVE_AT", 0.5)
    lm = tiny("llama")
    with lm.frozen_eval(), torch.inference_mode():
        found = write_tokens(
            Prompts(lm, [(5, 6)] * 4), lambda logits, active: [7] * len(active), lambda i, t: len(t) > 2 * i
        )
    assert [len(tokens) for tokens in found] == [1, 3, 5, 7]


def measured(lm: LM) -> Evaluation:
    return evaluate(lm, cases(3), max_new_tokens=5, max_batch_tokens=300)


@pytest.mark.parametrize("family", ["gptj", "gemma2"])
def test_asking_together_gives_what_scoring_and_writing_give(
    family: str, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny(family, torch.float32)
    together = measured(lm)
    monkeypatch.setattr(asking, "remembers", lambda lm: False)
    apart = measured(lm)
    assert together.texts == apart.texts
    assert together.predictions == apart.predictions
    for one, other in zip(together.records, apart.records, strict=True):
        assert one._replace(value=None) == other._replace(value=None)
        assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-6)
