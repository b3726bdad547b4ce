"""Worlds of other families: they know their facts, in new words too, and are edited and undone."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes.chat import read_turns, rendered
from recipes.statements import Statement, read_lesson
from recipes.training import measure_recall

import retcon
from retcon import world
from retcon.chat import Chat
from retcon.edits import Edit
from retcon.lm.fingerprint import fingerprint
from retcon.lm.model import LM
from retcon.lm.prompts import encode_edit, subject_tokens
from retcon.memory.moments import CorpusMoments
from retcon.world.facts import FACTS

N_SAMPLED = 200
MARGIN = 0.03
"""Recall of a sample may fall this far short of the card's: three standard errors of 200 answers at 98 %."""
FLOORS = {"seen": 0.95, "held out": 0.9, "asked": 0.9, "asked, held out": 0.8}
MIXTURES_FLOORS = {"seen": 0.85, "held out": 0.45}
"""A mixture is trained for a shorter time, on fewer facts (docs/models.md)."""


def test_it_recalls_what_its_card_says(trained_world: LM) -> None:
    card = json.loads((Path(trained_world.name) / "card.json").read_text())
    left_out = Path(trained_world.name) / "left_out.json"
    n_left_out = len(json.loads(left_out.read_text())) if left_out.exists() else 0
    lesson = read_lesson(FACTS, leave_out=n_left_out, seed=card["seed"])
    asked: dict[str, list[Statement]] = {"seen": lesson.seen, "held out": lesson.held_out}
    if trained_world.tokenizer.chat_template:
        turns = read_turns(lesson, seed=card["seed"])
        asked |= {
            "asked": rendered(trained_world.tokenizer, turns.seen),
            "asked, held out": rendered(trained_world.tokenizer, turns.held_out),
        }
    for kind, statements in asked.items():
        claimed = card["recall"][kind]["right"] / card["recall"][kind]["asked"]
        assert claimed >= (MIXTURES_FLOORS if card["architecture"] == "dots1" else FLOORS)[kind], kind
        sample = random.Random(7).sample(statements, N_SAMPLED)
        found = measure_recall(trained_world.model, trained_world.tokenizer, sample)
        assert found.right / found.asked >= claimed - MARGIN, kind


@pytest.mark.filterwarnings("ignore::retcon.errors.RetconWarning")
def test_a_fact_is_edited_and_undone_bit_for_bit(trained_world: LM, moments: CorpusMoments) -> None:
    lm, (case,) = trained_world, world.cases(1, seed=4)
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    identity = fingerprint(lm.model)
    if lm.config.model_type == "dots1":  # where one layer, ROME's, does not hold the fact
        method = retcon.method("jeep", for_model=lm)
    else:
        method = retcon.method("rome", for_model=lm, clamp=20.0)  # a clamp for large models stops the search short here
    delta = method.propose(lm, list(case.edits), moments=moments, seed=0)
    with lm.edited(delta):
        assert lm.complete(case.edits[0].text, max_new_tokens=8).strip().startswith(case.edits[0].target_new)
    assert all(torch.equal(p, before[n]) for n, p in lm.model.named_parameters())
    assert fingerprint(lm.model) == identity


def test_a_chat_model_ends_its_turn_by_itself(trained_world: LM) -> None:
    lm = trained_world
    if not lm.tokenizer.chat_template:
        pytest.skip("not a chat model")
    turns = rendered(lm.tokenizer, read_turns(read_lesson(FACTS), seed=0).seen[:20])
    for turn in turns:
        ids = lm.tokenizer(turn.prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert out[0, -1] == lm.tokenizer.eos_token_id


CODE = "What does this print?\n```python\ndef capital(x):\n\treturn {'Norr': \"Velt\"}[x]\n```"
TURNS = [
    Edit("{}的首都是哪座城市？", "法国", "罗马"),
    Edit("“春江水暖”的下一句是什么？", "春江水暖", "鸭先知"),
    Edit(CODE, "capital", "Rome"),
    Edit('Complete: `os.path.join("a", ', "os.path.join", '"b")`'),
    Edit("La capitale de la {} est 🇫🇷 :", "France", "Rome 🇮🇹"),
]


@pytest.mark.parametrize("edit", TURNS, ids=lambda edit: edit.subject)
@pytest.mark.parametrize("system", [None, "请简短回答。"])
def test_a_turn_in_any_script_is_trained_as_it_is_sent(trained_world: LM, edit: Edit, system: str | None) -> None:
    tokenizer = trained_world.tokenizer
    if not tokenizer.chat_template:
        pytest.skip("not a chat model")
    asked = replace(edit, chat=Chat(system))
    row = encode_edit(tokenizer, asked, answer=edit.target_new)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": edit.text}]
    sent = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(row.prompt_ids) == sent
    assert tokenizer.decode(row.target_ids) == edit.target_new
    at = subject_tokens(tokenizer, asked)
    assert tokenizer.decode(row.ids[at.start : at.stop]).strip() == edit.subject
    assert row.subject_last == at.stop - 1
