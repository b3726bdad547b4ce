"""Generation on tiny random models: what is cut where, and what it must not depend on."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from retcon.audit import audit
from retcon.chat import Chat
from retcon.edits import Edit
from retcon.errors import InvalidEdit, InvalidSetting
from retcon.evaluation.writing import PRESETS
from retcon.lm import generate as module
from retcon.lm.capacity import key_value_bytes
from retcon.lm.generate import WriteBatch, Writing, Written, generate, texts_after
from retcon.lm.model import LM
from retcon.lm.prompts import encode, encode_turns
from retcon.methods.kn import completions
from tests.card import Card, both
from tests.conftest import FAMILIES, tiny_model, tokenizer

Make = Callable[..., LM]
PROMPTS = ["The capital of France is", "He", "Michel Rocard is a native speaker of French, and Łódź is", "東京 and"]


EVERYDAY = ("gpt2", "gptj", "llama", "opt", "gemma2", "mpt")


@pytest.mark.parametrize("family", [f if f in EVERYDAY else pytest.param(f, marks=pytest.mark.long) for f in FAMILIES])
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


def test_a_card_writes_in_batches_as_large_as_its_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a pass takes as long for one row as for a thousand, so that padding costs less than another batch."""
    batches: list[int] = []

    class Noted(module.Prompts):
        def __init__(self, lm: LM, prompts: Sequence[Sequence[int]]) -> None:
            batches.append(len(prompts))
            super().__init__(lm, prompts)

    monkeypatch.setattr(module, "Prompts", Noted)
    how = Writing(max_new_tokens=5, stops=())
    with Card():
        here, there = both()
        assert key_value_bytes(there) == 2 * 4 * 32 * 4
        assert module.written_batch(here, 40) == dict(max_tokens=80)
        assert module.written_batch(there, 40) == dict(max_tokens=640, least=640)
        wanted = generate(here, PROMPTS, how, max_batch_tokens=40)
        assert len(batches) > 1
        batches.clear()
        assert generate(there, PROMPTS, how, max_batch_tokens=40) == wanted
        assert batches == [len(PROMPTS)]
        for room, most in ((100, 100), (10, 80)):  # tokens whose attention keys and values a quarter of it takes
            monkeypatch.setattr(module, "planned_bytes", lambda lm, n=room: 4 * n * key_value_bytes(lm))
            assert module.written_batch(there, 40) == dict(max_tokens=most, least=most)


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


@pytest.mark.parametrize("stop", ["🙂", "Mi"])
def test_writing_ends_at_a_stop_however_many_tokens_spell_it(stop: str, tiny: Make) -> None:
    lm = tiny(n_layers=1)
    script, n_prompt = lm.encode(f"He lived in{stop} and so on").ids, len(lm.encode("He").ids)
    end = next(n for n in range(n_prompt, len(script) + 1) if stop in lm.tokenizer.decode(list(script[:n])))
    wanted, passes = iter(script[n_prompt:]), 0

    def next_of_script(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return torch.zeros_like(logits).index_fill_(-1, torch.tensor([next(wanted)]), 1.0)

    with lm.head.register_forward_hook(next_of_script):
        (found,) = generate(lm, ["He"], Writing(max_new_tokens=20, stops=(stop,)))
    assert (found.text, found.cut, found.n_tokens) == (" lived in", False, end - n_prompt)
    assert passes == found.n_tokens


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
    wanted, sizes, real = generate(lm, PROMPTS, how), [], WriteBatch.__call__

    def scarce(self: WriteBatch, lm: LM, items: Any) -> Any:
        sizes.append(len(items))
        if len(items) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(self, lm, items)

    monkeypatch.setattr(WriteBatch, "__call__", scarce)
    assert generate(lm, PROMPTS, how) == wanted
    assert sizes[0] == 4
    assert sizes.count(1) == 4
    monkeypatch.setattr(WriteBatch, "__call__", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        generate(lm, PROMPTS[:1], how)


def test_settings_that_mean_nothing_are_refused(tiny: Make) -> None:
    with pytest.raises(InvalidSetting, match="max_new_tokens must be at least 1, found 0"):
        Writing(max_new_tokens=0)
    with pytest.raises(InvalidSetting, match="a stop text is empty"):
        Writing(stops=("",))
    for drawing in ({"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 2.0, "top_p": 0.5}):
        with pytest.raises(InvalidSetting, match=r"temperature and top_p .*sample_top_k=None is greedy"):
            Writing(**drawing)  # type: ignore[arg-type]
        Writing(**drawing, sample_top_k=5)  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="has no chat template"):
        generate(tiny(n_layers=1), PROMPTS[:1], PRESETS["wild_easyedit"])


@pytest.mark.parametrize("own", [{"system": "Be kind."}, {"template_args": {"a": 1}}])
def test_what_belongs_to_a_chat_is_given_once(own: dict[str, Any]) -> None:
    lm = chat_model()
    for chat in (Chat(), Chat("Be brief."), {"system": "Be brief."}):
        with pytest.raises(InvalidSetting, match=r"chat=.*has a system turn and template arguments of its own"):
            lm.complete("Who?", chat=chat, **own)
    with pytest.raises(InvalidSetting, match=r"chat=False"):
        lm.complete("Who?", chat=False, **own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the template knows no "a"
        said = [lm.complete("Who?", chat=chat, max_new_tokens=3, **own) for chat in (None, True)]
    assert said[0] == said[1]
    none: dict[str, Any] = dict.fromkeys(own)
    assert lm.complete("Who?", chat=False, max_new_tokens=3, **none) == lm.complete("Who?", max_new_tokens=3)
    assert lm.complete("Who?", chat=Chat(), max_new_tokens=3, template_args={}) == lm.complete(
        "Who?", chat=True, max_new_tokens=3
    )


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
    with pytest.raises(InvalidEdit, match=f"has {n} tokens; .* reads {n} tokens at once, its answer included"):
        generate(lm, PROMPTS[:1], how)


# --- chat models ---------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}<unk>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% if think %}<think>{% endif %}{% endif %}"
)


def chat_model() -> LM:
    tok = copy.deepcopy(tokenizer())
    tok.chat_template = TEMPLATE
    return LM(tiny_model("gptj", n_layers=1), tok)


def read(lm: LM, text: str, how: Writing, *, opened: str | None = None, end: bool = True) -> Written:
    ids = lm.tokenizer(text)["input_ids"] + ([lm.tokenizer.unk_token_id] if end else [])
    return module._read(module._Parts(lm.tokenizer, how, opened), ids, sorted(lm.end_tokens))


def test_a_text_ends_at_any_of_the_models_end_tokens() -> None:
    lm = chat_model()
    assert lm.end_tokens == {1, 2}  # </s> is the tokenizer's, <unk> what the template writes after an answer
    how = Writing(max_new_tokens=3, stops=(), chat=Chat())
    row = encode(lm.tokenizer, "Who?", chat=Chat())
    with torch.no_grad():
        first = int(lm.model(torch.tensor([row.ids])).logits[0, -1].argmax())
    assert generate(lm, ["Who?"], how)[0].n_tokens > 0
    lm.model.generation_config.eos_token_id = [first, 7]
    assert lm.end_tokens == {1, 2, 7, first}
    assert generate(lm, ["Who?"], how)[0] == Written("", 0, False)


def test_a_template_that_ends_turns_with_text_names_no_token() -> None:
    lm = chat_model()
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}; {% endfor %}"
    assert lm.end_tokens == {1}


def test_a_reasoning_part_is_taken_off_and_stop_texts_do_not_apply_inside_it() -> None:
    lm, how = chat_model(), Writing(stops=("\n",), chat=Chat())
    thought = "<think>It was Paris.\nNow?</think>"
    found = read(lm, thought + "\n\nRome\nis it.", how)
    assert (found.text, found.reasoning, found.cut) == ("\n\nRome", thought, False)
    assert found.n_tokens == len(lm.tokenizer(thought + "\n\nRome\n")["input_ids"])
    assert read(lm, "Paris?</think>Rome", how, opened="<think>").text == "Rome"  # the template has opened it
    unended = read(lm, "<think>It was\nParis", how, end=False)
    assert (unended.text, unended.cut, unended.reasoning) == ("", True, "<think>It was\nParis")
    plain = replace(how, chat=None)
    assert read(lm, "<think>\nParis", plain).text == "<think>"


def test_a_template_that_opens_the_reasoning_part_is_noticed() -> None:
    lm = chat_model()
    opening = Chat(None, (("think", True),))
    assert module._opened(lm.tokenizer, encode(lm.tokenizer, "Who?", chat=opening)) == "<think>"
    assert module._opened(lm.tokenizer, encode(lm.tokenizer, "Who?", chat=Chat())) is None


def test_newlines_before_an_answer_do_not_end_it() -> None:
    lm = chat_model()
    how = Writing(stops=("\n", "."))
    assert read(lm, "\n\nRome.\nYes", how).text == ""
    assert read(lm, "\n\nRome.\nYes", replace(how, skip_newlines=True)).text == "\n\nRome"
    stop = module._Stop([module._Parts(lm.tokenizer, replace(how, skip_newlines=True), None)] * 2, 1)
    rows = [[0, *lm.tokenizer(text)["input_ids"]] for text in ("\n\nRo", "\nRo.")]
    width = max(map(len, rows))
    padded = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    assert stop(padded, None).tolist() == [False, True]


def test_a_conversation_of_several_turns_is_one_row() -> None:
    lm = chat_model()
    row = encode_turns(lm.tokenizer, Chat("Be kind."), ["Who?", "Ada.", "And now?"])
    said = "<s>system: Be kind.<unk><s>user: Who?<unk><s>assistant: Ada.<unk><s>user: And now?<unk><s>assistant: "
    assert lm.tokenizer.decode(row.ids) == said
    how = Writing(max_new_tokens=2, stops=(), chat=Chat("Be kind."))
    assert generate(lm, [row], how)[0].n_tokens <= 2


def test_each_prompt_is_put_in_its_own_chat() -> None:
    lm, how, brief = chat_model(), Writing(max_new_tokens=4, stops=()), Chat("Be brief.")
    found = texts_after(lm, [("Who?", brief), ("Who?", None), ("Where?", brief), ("Who?", Chat())], how)
    alone = [
        generate(lm, [p], replace(how, chat=c))[0].text.strip()
        for p, c in (("Who?", brief), ("Who?", None), ("Where?", brief))
    ]
    assert found[:3] == alone
    assert len(set(found)) > 1
    assert texts_after(lm, [], how) == []


def test_an_edit_in_a_chat_is_asked_there_by_all_who_ask() -> None:
    """An audit, KN (for the model's own answer), and a store's verification."""
    lm = chat_model()
    edit = Edit("Who made {}?", "France", "Rome", chat=Chat("Be brief."), id="a")

    def said(n: int, *stops: str) -> str:
        return lm.complete(edit.text, max_new_tokens=n, stops=stops, chat=edit.chat)

    assert said(12, "\n") != lm.complete(edit.text, max_new_tokens=12)
    assert audit(lm, lm, edits=[edit]).answers[0].base == said(12, "\n").strip()
    assert completions(lm, [edit]) == [said(4, "\n", ".", ",")]


def test_drawing_by_temperature_and_share(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    greedy = generate(lm, PROMPTS[:1] * 4, Writing(max_new_tokens=4, stops=()))
    for narrow in (dict(temperature=1e-4), dict(top_p=1e-6)):
        how = Writing(max_new_tokens=4, stops=(), sample_top_k=50, **narrow)  # type: ignore[arg-type]
        assert generate(lm, PROMPTS[:1] * 4, how, seeds=[1, 2, 3, 4]) == greedy
    drawn = generate(lm, PROMPTS[:1] * 4, Writing(max_new_tokens=4, stops=(), sample_top_k=512), seeds=[1, 2, 3, 4])
    assert len({one.text for one in drawn}) > 1
    for temperature in (0.0, math.nan, math.inf):
        with pytest.raises(InvalidSetting, match="temperature must be above 0 and finite, and top_p in"):
            Writing(temperature=temperature)
