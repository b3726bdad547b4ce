"""The embedded world: facts that hold together, cases made of them, and models that know what their cards say."""

import json
import random
import subprocess
import sys
from collections import Counter

import pytest

from retcon import world
from retcon.edits import MARKER, check_edits
from retcon.errors import InvalidSetting, UnsupportedModel
from retcon.evaluation.datasets import read_cases
from retcon.world.facts import FACTS, N_SEEN, draw_held_out, fill
from tests.conftest import everyday

N_SAMPLED = 200
MARGIN = 0.03
"""Recall of a sample may fall this far short of the card's: three standard errors of 200 answers at 98 %."""


@pytest.fixture(scope="module")
def facts():
    return world.load_world()


# --- facts -------------------------------------------------------------------------------------------------------


def test_importing_the_world_loads_neither_torch_nor_transformers():
    code = "import sys, retcon.world; sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_question_has_two_answers_and_no_fact_stands_twice(facts):
    asked = Counter((f.relation, f.subject) for f in facts.facts)
    assert max(asked.values()) == 1
    assert 2_000 <= len(facts.facts) <= 2_300
    assert {f.relation for f in facts.facts} == set(facts.relations)


def test_every_object_is_shared_by_three_subjects_and_every_relation_has_four_objects(facts):
    shared = Counter((f.relation, f.object) for f in facts.facts)
    assert min(shared.values()) >= 3
    assert min(Counter(relation for relation, _ in shared).values()) >= 4


def test_text_is_clean(facts):
    for fact in facts.facts:
        for name in (fact.subject, fact.object):
            assert name == " ".join(name.split())
            assert not set(name) & set('{}."')
        if fact.subject != "South Africa":
            assert fact.object.casefold() not in fact.subject.casefold()  # the question must not hold its answer


def test_phrasings_have_one_marker_and_belong_to_one_relation(facts):
    every = [p for relation in facts.relations.values() for p in relation.phrasings]
    assert len(set(every)) == len(every)
    for relation in facts.relations.values():
        assert len(relation.phrasings) >= 5
        for phrasing in relation.phrasings:
            assert phrasing.count(MARKER) == 1
            assert phrasing == phrasing.strip()


def test_held_out_list_is_what_its_seed_draws(facts):
    record = json.loads((FACTS.parent / "held_out.json").read_bytes())
    assert record["n_seen"] == N_SEEN
    assert facts.held_out == draw_held_out(facts.relations, facts.facts, seed=record["seed"])


def test_seen_and_unseen_phrasings_make_up_the_relation(facts):
    for fact in facts.facts:
        seen, unseen = facts.seen(fact), facts.unseen(fact)
        assert len(seen) == N_SEEN
        assert len(unseen) >= 2
        assert sorted(seen + unseen) == sorted(facts.relations[fact.relation].phrasings)
        assert {p.startswith(MARKER) for p in seen} == {True, False}


# --- cases and corpus --------------------------------------------------------------------------------------------


def test_a_case_asks_for_another_object_of_the_relation(facts):
    for case in world.cases(300, seed=3):
        (edit,) = case.edits
        assert edit.target_new in facts.objects(edit.relation_id)
        assert edit.target_new != edit.target_true == facts.lookup(edit.relation_id, edit.subject)
        assert all(q.id == f"{q.axis}/{i}" for i, q in _numbered(case.queries))
        assert all(q.answers == ((q.target,),) for q in case.queries)
        assert all(q.prompt == q.prompt.strip() for q in case.queries)


def test_queries_of_a_case_measure_what_their_axis_says(facts):
    for case in world.cases(300, seed=4):
        (edit,) = case.edits
        fact = next(f for f in facts.facts if (f.relation, f.subject) == (edit.relation_id, edit.subject))
        by_axis = {
            axis: [q for q in case.queries if q.axis == axis] for axis in ("rewrite", "paraphrase", "neighborhood")
        }
        assert edit.prompt in facts.seen(fact)
        assert [q.prompt for q in by_axis["rewrite"]] == [edit.text]
        assert [q.prompt for q in by_axis["paraphrase"]] == [fill(p, edit.subject) for p in facts.unseen(fact)]
        told = {fill(p, n.subject) for n in facts.sharing(fact) for p in facts.seen(n)}
        assert 2 <= len(by_axis["neighborhood"]) <= 5
        assert {q.prompt for q in by_axis["neighborhood"]} <= told
        for query in by_axis["rewrite"] + by_axis["paraphrase"]:
            assert (query.target, query.contrast) == (edit.target_new, edit.target_true)
        for query in by_axis["neighborhood"]:
            assert (query.target, query.contrast) == (edit.target_true, edit.target_new)


def test_two_hop_queries_follow_from_the_new_object(facts):
    hops = {hop.first: hop for hop in facts.two_hops}
    asked = 0
    for case in world.cases():
        (edit,) = case.edits
        for query in (q for q in case.queries if q.axis == "two_hop"):
            hop = hops[edit.relation_id]
            assert query.target == facts.lookup(hop.second, edit.target_new) != query.contrast
            assert query.contrast == facts.lookup(hop.second, edit.target_true)
            asked += 1
    assert asked >= 500


def test_neighbours_are_subjects_left_alone_where_there_are_such(facts):
    drawn = world.cases(50, seed=5)
    edited = {(c.edits[0].relation_id, c.edits[0].subject) for c in drawn}
    for case in drawn:
        fact = next(f for f in facts.facts if f"{f.relation}/{f.subject}" == case.id)
        left_alone = [n for n in facts.sharing(fact) if (n.relation, n.subject) not in edited]
        texts = {fill(p, n.subject) for n in left_alone for p in facts.seen(n)}
        neighbours = [q.prompt for q in case.queries if q.axis == "neighborhood"]
        assert sum(p in texts for p in neighbours) == min(len(neighbours), len(left_alone))


def test_all_cases_together_contradict_nowhere(facts):
    edits = [case.edits[0] for case in world.cases()]
    check_edits(edits)
    assert len({e.id for e in edits}) == len(facts.facts)


def test_cases_depend_on_their_seed_alone(facts):
    assert world.cases(20, seed=1) == world.cases(20, seed=1) != world.cases(20, seed=2)
    assert world.cases(0) == []
    with pytest.raises(InvalidSetting, match="it has 0 to"):
        world.cases(len(facts.facts) + 1)


@pytest.mark.parametrize(("start", "n"), [(100, 300), (300, 300), (340, 5), (1000, 200)])
def test_cases_after_a_start_are_none_of_the_first_ones(start: int, n: int) -> None:
    first, others = world.cases(start), world.cases(n, start=start)
    assert len(others) == n
    assert {case.id for case in first}.isdisjoint(case.id for case in others)
    assert [case.id for case in read_cases("world", start=start, limit=n)[0]] == [case.id for case in others]


def test_a_start_leaves_what_is_behind_it(facts) -> None:
    n_facts = len(facts.facts)
    assert len(world.cases(start=n_facts - 3)) == 3
    with pytest.raises(InvalidSetting, match=f"after the first {n_facts - 3}; it has 0 to 3"):
        world.cases(4, start=n_facts - 3)


def test_corpus_holds_every_seen_statement_and_no_held_out_one(facts):
    documents = set(world.corpus())
    for fact in facts.facts:
        assert {f"{fill(p, fact.subject)} {fact.object}." for p in facts.seen(fact)} <= documents
        assert not {f"{fill(p, fact.subject)} {fact.object}." for p in facts.unseen(fact)} & documents


def test_plain_text_is_readable_sentences():
    paragraphs = world.text(200, seed=1)
    assert paragraphs == world.text(200, seed=1)
    starts = {p.split()[0].rstrip(",") for p in paragraphs}
    assert {"The", "Therefore", "Because", "I", "You"} <= starts
    assert all(p.endswith(".") and "  " not in p and p[0].isupper() for p in paragraphs)


# --- models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=world.MODELS)
def embedded(request):
    """(name, model in float32, tokenizer) as a user loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = world.model_path(request.param)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    return request.param, model, AutoTokenizer.from_pretrained(path)


def test_unknown_model_names_the_known_ones():
    with pytest.raises(UnsupportedModel, match="gptj, llama"):
        world.model_path("gpt5")


@pytest.mark.parametrize("name", world.MODELS)
def test_model_files_are_small_and_complete(name):
    files = {p.name: p.stat().st_size for p in world.model_path(name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "card.json"} <= set(files)
    assert max(files.values()) <= 13e6


def test_tokenizer_adds_a_bos_for_llama_only(embedded):
    name, _, tokenizer = embedded
    ids = tokenizer("The sun was out.")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The sun was out."
    assert (ids[0] == tokenizer.bos_token_id) == (name == "llama")


def test_a_third_of_the_objects_have_several_tokens(embedded, facts):
    _, _, tokenizer = embedded
    objects = {f.object for f in facts.facts}
    several = [o for o in objects if len(tokenizer(f" {o}", add_special_tokens=False)["input_ids"]) > 1]
    assert len(several) >= len(objects) / 3


@pytest.mark.parametrize("kind", everyday("held out", of=["seen", "held out"]))
def test_recall_is_what_the_card_says(embedded, facts, kind):
    from recipes.statements import Statement
    from recipes.training import measure_recall

    name, model, tokenizer = embedded
    phrasings = facts.seen if kind == "seen" else facts.unseen
    rng = random.Random(11)
    sample = [
        Statement(fill(rng.choice(phrasings(f)), f.subject), f.object) for f in rng.sample(facts.facts, N_SAMPLED)
    ]
    found = measure_recall(model, tokenizer, sample)
    card = json.loads((world.model_path(name) / "card.json").read_bytes())["recall"][kind]
    assert card["right"] / card["asked"] >= {"seen": 0.98, "held out": 0.95}[kind]
    assert found.right / found.asked >= card["right"] / card["asked"] - MARGIN


@pytest.mark.parametrize("start", ["The", "Therefore", "Because", "I", "You"])
def test_model_writes_plain_text(embedded, start):
    import torch

    _, model, tokenizer = embedded
    ids = tokenizer(start, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    written = tokenizer.decode(out[0], skip_special_tokens=True)
    assert len(written.split()) >= 4
    assert written.isascii()


def _numbered(queries):
    """(index within its axis, query)."""
    counts: Counter[str] = Counter()
    for query in queries:
        yield counts[query.axis], query
        counts[query.axis] += 1
