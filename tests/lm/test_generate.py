"""Generation on tiny random models: what is cut where, and what it must not depend on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from retcon.chat import Chat
from retcon.errors import InvalidSetting
from retcon.evaluation.writing import PRESETS
from retcon.lm import generate as module
from retcon.lm.generate import Writing, Written, generate
from retcon.lm.model import LM
from retcon.lm.prompts import encode

Make = Callable[..., LM]
PROMPTS = ["The capital of France is", "He", "Michel Rocard is a native speaker of French, and Łódź is", "東京 and"]


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "opt"])
def test_greedy_text_is_the_argmax_one_by_one(family: str, tiny: Make) -> None:
    lm = tiny(family, n_layers=2)
    found = generate(lm, PROMPTS, Writing(max_new_tokens=5, stops=()))
    for prompt, written in zip(PROMPTS, found, strict=True):
        ids = list(lm.encode(prompt).ids)
        new: list[int] = []
        with torch.no_grad():
            while len(new) < 5 and (not new or new[-1] != lm.tokenizer.eos_token_id):
                new.append(int(lm.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        ended = new[-1] == lm.tokenizer.eos_token_id
        kept = new[:-1] if ended else new
        assert written == Written(lm.tokenizer.decode(kept, skip_special_tokens=True), len(kept), not ended)


def test_batches_order_and_company_do_not_matter(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    how = Writing(max_new_tokens=6)
    together = generate(lm, PROMPTS, how)
    assert generate(lm, PROMPTS[::-1], how) == together[::-1]
    assert [generate(lm, [p], how)[0] for p in PROMPTS] == together
    assert generate(lm, PROMPTS, how, max_batch_tokens=1) == together


def test_stops_are_cut_and_counted(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    whole = generate(lm, PROMPTS[:1], Writing(max_new_tokens=8, stops=()))[0]
    stop = whole.text[2:4]
    cut = generate(lm, PROMPTS[:1], Writing(max_new_tokens=8, stops=(stop,)))[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert not cut.cut
    assert 0 < cut.n_tokens <= whole.n_tokens
    assert whole.cut
    answer = generate(lm, PROMPTS[:1], Writing(max_new_tokens=8, stops=(), after=whole.text[:3]))[0]
    assert answer.text == whole.text[whole.text.rindex(whole.text[:3]) + 3 :].strip()


def test_a_length_per_prompt(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    long = generate(lm, PROMPTS, Writing(max_new_tokens=4, stops=()))
    lengths = [1, 2, 4, 3]
    found = generate(lm, PROMPTS, PRESETS["gold_length"], lengths=lengths)
    for a, b, n in zip(found, long, lengths, strict=True):
        assert a.n_tokens == min(n, b.n_tokens)
        assert b.text.startswith(a.text.rstrip("\ufffd"))
    total = Writing(max_new_tokens=50, stops=(), total_tokens=len(lm.encode(PROMPTS[0]).ids) + 2)
    assert generate(lm, PROMPTS[:2], total)[0].n_tokens <= 2
    assert generate(lm, PROMPTS[2:3], Writing(total_tokens=1))[0] == Written("", 0, True)


def test_sampled_text_depends_on_its_own_seed_only(tiny: Make, untouched: Callable[[LM], Any]) -> None:
    lm = tiny(n_layers=2)
    how = Writing(max_new_tokens=8, stops=(), sample_top_k=5)
    look = untouched(lm)
    found = generate(lm, PROMPTS, how, seeds=[1, 2, 3, 4])
    assert untouched(lm) == look
    assert generate(lm, PROMPTS[::-1], how, seeds=[4, 3, 2, 1]) == found[::-1]
    assert generate(lm, PROMPTS[1:2], how, seeds=[2]) == found[1:2]
    assert generate(lm, PROMPTS, how, seeds=[5, 6, 7, 8]) != found
    greedy = generate(lm, PROMPTS, Writing(max_new_tokens=8, stops=()))
    assert generate(lm, PROMPTS, Writing(max_new_tokens=8, stops=(), sample_top_k=1), seeds=[1] * 4) == greedy
    with pytest.raises(InvalidSetting, match="sampled text needs a seed per prompt"):
        generate(lm, PROMPTS, how)


def test_memory_running_out_halves_the_batch(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny(n_layers=1)
    how = Writing(max_new_tokens=3, stops=())
    wanted, sizes, real = generate(lm, PROMPTS, how), [], module._write_batch

    def scarce(lm: LM, rows: Any, *more: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(lm, rows, *more)

    monkeypatch.setattr(module, "_write_batch", scarce)
    assert generate(lm, PROMPTS, how) == wanted
    assert sizes[0] == 4
    assert sizes.count(1) == 4
    monkeypatch.setattr(module, "_write_batch", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        generate(lm, PROMPTS[:1], how)


def test_settings_that_mean_nothing_are_refused(tiny: Make) -> None:
    with pytest.raises(InvalidSetting, match="max_new_tokens must be at least 1, found 0"):
        Writing(max_new_tokens=0)
    with pytest.raises(InvalidSetting, match="a stop text is empty"):
        Writing(stops=("",))
    with pytest.raises(InvalidSetting, match="has no chat template"):
        generate(tiny(n_layers=1), PROMPTS[:1], PRESETS["wild_easyedit"])


def test_a_chat_goes_through_the_template_once(tiny: Make) -> None:
    lm = tiny(n_layers=1, tok="bos")
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}assistant:"
    kept, lm.tokenizer.chat_template = lm.tokenizer.chat_template, template
    try:
        how = Writing(max_new_tokens=3, stops=(), chat=Chat("Be kind."))
        row = encode(lm.tokenizer, "Who?", chat=how.chat)
        assert row.ids.count(lm.tokenizer.bos_token_id) == 1
        assert lm.tokenizer.decode(row.ids) == "<s>system: Be kind. user: Who? assistant:"
        assert generate(lm, ["Who?"], how)[0].n_tokens <= 3
    finally:
        lm.tokenizer.chat_template = kept


def test_progress_is_told(tiny: Make) -> None:
    heard: list[tuple[int, int]] = []
    generate(tiny(n_layers=1), PROMPTS, Writing(max_new_tokens=1), on_progress=lambda n, of: heard.append((n, of)))
    assert heard[-1] == (4, 4)


def test_no_more_is_written_than_the_context_has_room_for(tiny: Make) -> None:
    lm = tiny("gpt2", n_layers=1)
    n = len(lm.encode(PROMPTS[0]).ids)
    how = Writing(max_new_tokens=50, stops=())
    whole = generate(lm, PROMPTS[:2], how)
    lm.model.config.n_positions = n + 3  # gpt2 keeps its table, so that only the limit can end a row
    assert lm.context_length == n + 3
    found = generate(lm, PROMPTS[:2], how)
    assert found[0].n_tokens <= 3
    assert found[0].cut
    assert whole[0].text.startswith(found[0].text)
    lm.model.config.n_positions = n
    assert generate(lm, PROMPTS[:1], how) == [Written("", 0, True)]
