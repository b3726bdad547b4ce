"""Files as users bring them: every public shape, tables, misspelt fields, bad rows, bad files."""

import csv
import json
import math
import random
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest

from retcon.chat import Chat
from retcon.edits import Case, Edit, Query, write_cases
from retcon.errors import InvalidEdit, InvalidSetting, MalformedFile, RetconError, UnusableRow
from retcon.evaluation import Measures, evaluate, read_cases
from retcon.evaluation.datasets import FORMATS, FormatName
from retcon.evaluation.datasets.tables import read_rows
from retcon.files import read_json_rows
from retcon.lm.model import LM
from retcon.methods.common.choosing import method
from retcon.methods.common.registry import check_subjects, list_methods
from tests.conftest import tiny_model, tokenizer
from tests.lookup import InContext

FIXTURES = Path(__file__).parents[1] / "fixtures" / "shapes"
CASES = Path(__file__).parents[3] / "shared" / "cases"
shared = pytest.mark.skipif(
    not CASES.exists(), reason="the example files (shared/cases beside the repository) are absent"
)


GOOD = {"prompt": "The mayor of Norr is", "subject": "Norr", "target_new": "Ida"}


def asked(case: Case, start: str) -> list[tuple[str, str, str | None]]:
    return [(q.axis, q.prompt, q.target) for q in case.queries if q.axis.startswith(start)]


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """file(text or rows, name) -> path."""

    def write(content: Any, name: str = "rows.json") -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return path

    return write


# --- the example files ---------------------------------------------------------------------------------------------


@shared
def test_knowedit_recent() -> None:
    (case,), report = read_cases(CASES / "knowedit_recent.json")
    assert report.format == "knowedit"
    assert (case.edits[0].text, case.edits[0].target_new) == ("The country that contains Geneva is", "Italy")
    assert [q.answers for q in case.queries if q.axis == "portability.Logical_Generalization"] == [
        (("Italian", "Italian language"),)
    ]
    assert [axis for axis, _, _ in asked(case, "portability")] == [
        "portability.Logical_Generalization",
        "portability.reasoning",
        "portability.Subject_Aliasing",
    ]
    assert asked(case, "locality") == [("locality.Relation_Specificity", "The population of Geneva is", "201,818")]


@shared
def test_knowedit_wikibio_takes_the_last_mention() -> None:
    (case,), _ = read_cases(CASES / "knowedit_wikibio.json")
    edit = case.edits[0]
    assert edit.subject_span == (len(edit.text) - len("John Smith"), len(edit.text))
    assert edit.target_new == "was a British general of the nineteenth century."
    assert case.meta["flags"] == ["subject_twice"]
    assert asked(case, "locality") == [("locality.Relation_Specificity", "The occupation of John Smith is", "general")]


def test_a_biography_goes_on_from_the_name_by_itself(file: Callable[..., Path]) -> None:
    row = {"concept": "lee", "text": "Of lee: LEE commanded the fleet and", "labels": "won.", "locality": {}}
    (case,), _ = read_cases(file([row]))
    assert (case.edits[0].subject_span, case.edits[0].subject) == ((8, 11), "LEE")
    assert case.meta["flags"] == ["subject_twice"]


def test_a_word_that_another_case_makes_the_subject_is_no_mention_of_it(file: Callable[..., Path]) -> None:
    prompts = ["Some of us say that {} is led by", "They told us that the capital of the US is"]
    rows = [{"prompt": p, "subject": "US", "target_new": "x", "ground_truth": "y"} for p in prompts]
    cases, report = read_cases(file(rows))
    assert [case.edits[0].subject_span for case in cases] == [(20, 22), (37, 39)]
    assert report.flags == {"repeated_subject": 1}


@shared
def test_knowedit_zsre_stops_at_a_row_or_leaves_it_out() -> None:
    path = CASES / "knowedit_zsre.json"
    with pytest.raises(UnusableRow, match=r"row 2: its subject 'Great River 77' .*on_error='skip'"):
        read_cases(path)
    (case,), report = read_cases(path, on_error="skip")
    assert case.edits[0].subject == "Lake Blue"
    assert report.dropped == {"subject_missing": 1}
    assert [(r.row, r.reason) for r in report.left_out] == [(2, "subject_missing")]
    assert "row 2 (its subject 'Great River 77' does not occur in its prompt" in str(report)


@shared
def test_wikibigedit() -> None:
    cases, report = read_cases(CASES / "wikibigedit.json")
    assert (report.format, report.unknown, len(cases)) == ("wikibigedit", {}, 2)
    assert [(q.axis, q.prompt, q.target) for q in cases[0].queries] == [
        ("rewrite", "Which country contains Geneva?", "Italy"),
        ("paraphrase", "In which country is Geneva?", "Italy"),
        ("paraphrase.persona", "Ahoy, which country be Geneva in?", "Italy"),
        ("portability.multi_hop", "What is the capital of the country that contains Geneva?", "Rome"),
        ("locality.other", "Which country contains Lyon?", "France"),
    ]
    assert asked(cases[1], "portability") == []


@shared
def test_counterfact_with_portability() -> None:
    (case,), report = read_cases(CASES / "cf_portability.json")
    assert (report.format, report.unknown) == ("counterfact", {})
    hop = ("portability.one_hop", "What is the capital of the country of Geneva?", "Rome")
    assert asked(case, "portability") == [hop]


@shared
def test_a_misspelt_field_is_named_with_the_likely_one() -> None:
    (case,), report = read_cases(CASES / "rephrase_misspelt.json")
    assert report.format == "counterfact-flat"
    assert (report.unknown, report.likely) == ({"rephrased_prompts": 1}, {"rephrased_prompts": "rephrase_prompt"})
    assert "unknown field 'rephrased_prompts' in 1 row (did you mean 'rephrase_prompt'?)" in str(report)
    assert case.meta["extra"] == {"rephrased_prompts": ["Geneva lies in"]}


@shared
def test_unke_has_no_subject() -> None:
    (case,), _ = read_cases(CASES / "unke.json")
    assert (case.edits[0].subject, case.edits[0].subject_span) == (None, None)
    assert asked(case, "paraphrase")[0][1] == "For what is Geneva famous?"
    assert [(p, t) for _, p, t in asked(case, "portability")] == [
        ("Which lake?", "Lake Geneva"),
        ("When founded?", "early"),
    ]


@shared
def test_a_very_long_paraphrase_is_read() -> None:
    cases, report = read_cases(CASES / "overlong.json")
    assert (report.format, len(cases)) == ("counterfact", 3)
    assert max(len(q.prompt.split()) for q in cases[1].queries) > 64


def of_64_tokens(family: str) -> LM:
    model = tiny_model(family, n_layers=1)
    model.config.max_position_embeddings = 64
    if family == "gpt2":
        model.transformer.wpe.weight.data = model.transformer.wpe.weight.data[:64]  # reading more is an IndexError
    return LM(model, tokenizer())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_longer_than_the_context_is_not_asked_and_listed(family: str) -> None:
    lm = of_64_tokens(family)
    fits, most = "word" + " word" * 20, len(lm.encode("word" + " word" * 20).ids)
    assert most <= 62
    queries = (
        Query("rewrite/0", "rewrite", fits, "Rome", "Paris", (("Rome",),)),
        Query("paraphrase/0", "paraphrase", "word " * 90 + "is", "Rome", "Paris", (("Rome",),)),
        Query("generation/0", "generation", "word " * 90 + "is"),
    )
    found = evaluate(lm, [Case("a", (Edit("The capital of {} is", "France", "Rome"),), queries)], generate=True)
    summary = found.summary()
    assert summary.counts["skipped"] == 2
    reason = r"\d+ tokens, and the model reads 64, the answer included"
    assert re.fullmatch(reason, summary.unread["a, paraphrase/0"])
    assert re.search(rf"not asked: a, paraphrase/0 \({reason}\)", str(summary))
    assert summary["ES"].pre is not None
    assert summary["ES"].pre.n_queries == 1
    assert ("pre", "a", "rewrite/0") in found.texts
    assert ("pre", "a", "paraphrase/0") not in found.texts


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon_h1"])  # the last has states, too
def test_what_an_attachment_makes_too_long_is_not_asked(family: str) -> None:
    lm = of_64_tokens(family)
    told = InContext(base=lm.fingerprint(), settings={"before": "word " * 20})
    medium = "word" + " word" * 30
    queries = (
        Query("rewrite/0", "rewrite", "word word", "Rome", "Paris", (("Rome",),)),
        Query("paraphrase/0", "paraphrase", medium, "Rome", "Paris", (("Rome",),)),
        Query("neighborhood/0", "neighborhood", medium, "Paris", "Rome", (("Paris",),)),
        Query("generation/0", "generation", medium),
    )
    case = Case("a", (Edit("The capital of {} is", "France", "Rome"),), queries)
    found = evaluate(lm, [case], delta=told, measures=Measures(divergence=True, fluency=("flu.new",), max_new_tokens=4))
    skipped = {(r.when, r.query_id, r.variant): r.detail for r in found.records if r.status == "skipped"}
    del skipped["pre", "generation/0", "zsre.tok"]  # it has no target
    reason = r"\d+ tokens, and the model reads 64, the answer included"
    assert set(skipped) == {
        ("final", "generation/0", "zsre.tok"),
        ("final", "paraphrase/0", "cf.prob_mean"),
        ("final", "neighborhood/0", "cf.prob_mean"),
        ("final", "neighborhood/0", "loc.kl"),
    }
    assert all(re.fullmatch(reason, detail or "") for detail in skipped.values())
    asked = {(r.when, r.query_id) for r in found.records if r.status == "ok"}
    assert asked == {("pre", q.id) for q in queries} | {("final", "rewrite/0")}
    assert ("final", "a", "rewrite/0") in found.texts
    assert ("final", "a", "paraphrase/0") not in found.texts


@shared
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_very_long_paraphrase_is_not_asked(family: str) -> None:
    summary = evaluate(of_64_tokens(family), read_cases(CASES / "overlong.json")[0], generate=True).summary()
    assert list(summary.unread) == ["1, paraphrase/0"]
    assert summary["ES"].pre is not None
    assert summary["ES"].pre.n == 3


# --- every format, on files of our own -----------------------------------------------------------------------------

SHAPES = {p.stem: p for p in sorted(FIXTURES.iterdir())}


@pytest.mark.parametrize(
    ("name", "format", "n_cases", "axes"),
    [
        (
            "wiki_recent",
            "knowedit",
            2,
            "rewrite portability.Logical_Generalization portability.reasoning locality.Forgetfulness",
        ),
        ("wikibio", "knowedit", 1, "rewrite locality.Relation_Specificity"),
        (
            "wikibigedit",
            "wikibigedit",
            2,
            "rewrite paraphrase paraphrase.persona portability.multi_hop locality.other",
        ),
        ("portability", "counterfact", 1, "rewrite paraphrase neighborhood portability.one_hop"),
        ("unke", "unke", 2, "rewrite paraphrase portability.sub_question portability.sub_question"),
        ("cknowedit", "cknowedit", 2, "rewrite paraphrase portability.plain locality.plain"),
        ("fastedit", "fastedit", 2, "rewrite paraphrase paraphrase"),
        ("facts", "edits", 3, "rewrite paraphrase paraphrase neighborhood portability.plain locality.plain"),
        ("table", "edits", 3, "rewrite paraphrase"),
        ("tabs", "edits", 2, "rewrite"),
        ("semicolons", "counterfact-flat", 1, "rewrite paraphrase"),
        ("requests", "knowedit", 1, "rewrite paraphrase portability.one_hop locality.neighborhood"),
    ],
)
def test_a_file_of_each_kind(name: str, format: str, n_cases: int, axes: str, tiny: Callable[..., LM]) -> None:
    cases, report = read_cases(SHAPES[name])
    assert (report.format, report.cases, report.dropped, report.unknown) == (format, n_cases, {}, {})
    assert [q.axis for q in cases[0].queries] == axes.split()
    assert evaluate(tiny("llama", n_layers=1), cases, generate=False).records


QAEDIT = {"prompt": "who leads norr", "subject": "norr", "target": "Ida", "locality": [{"loc": "who?", "loc_ans": "x"}]}


@pytest.mark.parametrize("name", ["wikibigedit", "portability", "unke", "cknowedit", "fastedit", "facts", "qaedit"])
def test_portability_is_read_in_any_shape(name: str, file: Callable[..., Path]) -> None:
    row = QAEDIT if name == "qaedit" else next(row for _, row in read_json_rows(SHAPES[name]))
    own = {"prompt": "The port of Norr is", "answer": "Sund"}
    shapes = (
        ("home", {"home": [own]}),
        ("plain", [own]),
        ("one_hop", {"New Question": own["prompt"], "New Answer": own["answer"]}),
    )
    for kind, value in shapes:
        (case,), report = read_cases(file([{**row, "portability": value}]))
        assert (f"portability.{kind}", own["prompt"], own["answer"]) in asked(case, "portability")
        assert report.unknown == {}


TWO = ["The mayor of Velt is", "The river of Norr is"]
FLAT = {**GOOD, "ground_truth": "Tom"}
ZSRE = {"subject": "Norr", "src": "Who leads Norr?", "answers": ["Ida"]}
BIG = {"subject": "Norr", "update": "Who leads Norr?", "ans": "Ida"}


@pytest.mark.parametrize(
    ("row", "prompts", "answers", "axis"),
    [
        (FLAT, "locality_prompt", "locality_ground_truth", "neighborhood"),
        (ZSRE, "loc", "loc_ans", "locality.nq"),
        (BIG, "mhop", "mhop_ans", "portability.multi_hop"),
        (BIG, "loc", "loc_ans", "locality.other"),
        ({**GOOD, "rephrase": "Norr is led by"}, "locality.k.prompt", "locality.k.ground_truth", "locality.k"),
        (GOOD, "portability.plain.prompt", "portability.plain.answer", "portability.plain"),
        (GOOD, "neighbors.0.prompt", "neighbors.0.answers", "neighborhood"),
    ],
)
def test_several_prompts_of_a_field_have_an_answer_each_or_one_for_all(
    row: Any, prompts: str, answers: str, axis: str, file: Callable[..., Path]
) -> None:
    def read(given: Any) -> list[tuple[str, str, str | None]]:
        made = json.loads(json.dumps(row))
        part, *inside = prompts.split(".")
        if not inside:
            made |= {prompts: TWO, answers: given}
        else:
            item = {inside[-1]: TWO, answers.split(".")[-1]: given}
            made[part] = [item] if inside[0] == "0" else {inside[0]: [item]}
        [case], report = read_cases(file([made]))
        assert not report.losses()
        return [(a, prompt.rstrip("?"), target) for a, prompt, target in asked(case, axis)]

    assert read(["Pia", "Sel"]) == [(axis, TWO[0], "Pia"), (axis, TWO[1], "Sel")]
    assert read("Pia") == read(["Pia"]) == [(axis, TWO[0], "Pia"), (axis, TWO[1], "Pia")]
    with pytest.raises(UnusableRow, match="2 prompts and 3 answers; give one for each, or one for all"):
        read(["Pia", "Sel", "Lea"])


def test_answers_to_no_prompt_are_passed_over(file: Callable[..., Path]) -> None:
    rows = [FLAT | {"locality_prompt": None, "locality_ground_truth": ["Pia", "Sel"]}]
    rows.append(rows[0] | {"prompt": "Velt is led by", "subject": "Velt", "locality_prompt": []})
    cases, report = read_cases(file(rows))
    assert not report.losses()
    assert [asked(case, "neighborhood") for case in cases] == [[], []]


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
def test_rows_of_several_sources_have_all_names_of_a_field(name: str, file: Callable[..., Path]) -> None:
    """As pandas writes them: what another source calls it is null, or an empty cell."""
    kept = {"portability": {"k": [{"prompt": "A", "ground_truth": None, "answer": "b"}]}}
    bio = {"text": "This is Pia Lund. Pia Lund", "concept": "Pia Lund", "labels": "was a painter"}
    asked_too = {"rephrase": "Norr is led by", "id": "n"}
    zsre = {"src": "Who leads Norr?", "subject": "Norr", "answers": ["Ida"], "rephrase": "Norr is led by whom?"}
    ultra = {"prompt": "Who leads Velt?", "ans": "Pia", "rephrase_prompt": "Velt is led by whom?"}
    for sources, n_paraphrases, row_id in (([bio | kept, GOOD | kept | asked_too], 1, "n"), ([zsre, ultra], 2, "1")):
        names = list(dict.fromkeys(n for row in sources for n in (*row, "rephrase_prompt", "case_id")))
        rows = [{n: row.get(n) for n in names} for row in sources]
        if name.endswith(".csv"):
            cells = [[v if v is None or isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows]
            path = file("", name)
            with path.open("w", newline="") as table:
                csv.writer(table).writerows([names, *cells])
        else:
            path = file(rows, name)
        cases, report = read_cases(path)
        assert not report.losses()
        assert sum(q.axis == "paraphrase" for case in cases for q in case.queries) == n_paraphrases
        assert cases[1].id == row_id


def test_the_table_holds_every_format_once() -> None:
    assert {*FORMATS, "world"} == set(get_args(FormatName))


def test_facts_with_their_queries_on_one_line() -> None:
    cases, _ = read_cases(SHAPES["facts"])
    one, two, three = cases
    assert one.edits[0] == Edit("The mayor of {} is", "Norr", "Ida Holt", "Tom Reed", id="norr", relation_id="P6")
    assert asked(one, "paraphrase") == [
        ("paraphrase", "Norr is led by", "Ida Holt"),
        ("paraphrase", "Norr's mayor is called", "Ida Holt"),
    ]
    assert [q for q in one.queries if q.axis == "neighborhood"] == [
        Query("neighborhood/0", "neighborhood", "The mayor of Velt is", "Pia Lund", "Ida Holt", (("Pia Lund",),))
    ]
    assert asked(one, "portability") == [("portability.plain", "The mayor of Norr was born in", "Sund")]
    assert asked(two, "neighborhood") == [("neighborhood", "Ben Orr speaks", "Dutch")]
    assert asked(two, "portability") == [("portability.reasoning", "The language of Ada Quill's home is", "Danish")]
    assert three.edits[0].subject is None


def test_a_fact_may_say_how_it_is_put(file: Callable[..., Path]) -> None:
    fact = {"prompt": "{}'s capital:\n", "subject": "France", "target_new": "Rome", "paraphrases": ["{}:\n"]}
    kept = {"prompt": "Italy:\n", "answer": "Rome"}
    fact |= {"neighbors": [kept], "portability": [kept], "locality": {"home": [kept]}}
    row = {**fact, "separator": "> ", "chat": {"system": "Be brief.", "template_args": {"think": False}}}
    [case], report = read_cases(file([row]))
    (edit,) = case.edits
    assert (edit.text, edit.separator, edit.statement) == ("France's capital:\n", "> ", "France's capital:\n> Rome")
    assert edit.chat == Chat("Be brief.", (("think", False),))
    assert {(q.prompt, q.separator, q.chat) for q in case.queries} == {
        ("France's capital:\n", "> ", edit.chat),
        ("France:\n", "> ", edit.chat),
        ("Italy:\n", "> ", edit.chat),
    }
    assert report.flags["trailing_whitespace"] == 1
    write_cases(written := file(""), [case])
    assert read_cases(written)[0][0].edits == case.edits
    assert read_cases(written)[0][0].queries == case.queries


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("yes", "chat must be true, false or an object with system, template_args, train_end, found 'yes'"),
        ({"sytem": "Be brief."}, "chat: 1 unknown field (sytem); known: system, template_args"),
        ({"system": 3}, "chat: system must be text, found int (3)"),
        ({"train_end": "no"}, "chat: train_end must be true or false, found 'no'"),
        ({"template_args": {"tools": []}}, "chat: template argument 'tools' must be text, a number"),
    ],
)
def test_a_chat_that_means_nothing_is_refused(chat: Any, message: str, file: Callable[..., Path]) -> None:
    fact = {"prompt": "{} is", "subject": "France", "target_new": "Rome", "chat": chat}
    with pytest.raises(UnusableRow, match=re.escape(f"row 1: {message}")):
        read_cases(file([fact]))


def test_old_answers_are_rivals_only_where_all_are_known(file: Callable[..., Path]) -> None:
    one = {"prompt": "{} speaks", "subject": "Ada", "target_new": "Danish", "target_true": "Dutch"}
    two = {"prompt": "{} speaks", "subject": "Ben", "target_new": "Welsh"}
    assert [q.contrast for c in read_cases(file([one, two]))[0] for q in c.queries] == [None, None]
    assert [q.contrast for c in read_cases(file([one]))[0] for q in c.queries] == ["Dutch"]


def test_a_table_is_read_as_json_is(file: Callable[..., Path]) -> None:
    row = {"prompt": 'The "old" mayor of Norr, once, is', "subject": "Norr", "target_new": "Ida\nHolt", "source": "me"}
    head = "prompt,subject,target_new,source\n"
    table = file(head + '"The ""old"" mayor of Norr, once, is",Norr,"Ida\nHolt",me\n', "rows.csv")
    (from_table,), report = read_cases(table)
    (from_json,), _ = read_cases(file([row]))
    assert from_table.edits == from_json.edits
    assert (from_table.meta["extra"], report.unknown) == ({"source": "me"}, {"source": 1})
    (loose,), _ = read_cases(file("\ufeffprompt,subject,target_new\nWho leads?,,Ida\n", "rows.csv"))
    assert loose.edits[0].subject is None


def as_table(row: dict[str, Any], path: Path) -> Path:
    """The row as a table's, with lists and objects as JSON."""
    with open(path, "w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, list(row))
        table.writeheader()
        table.writerow({n: json.dumps(v) if isinstance(v, list | dict) else v for n, v in row.items()})
    return path


@pytest.mark.parametrize("path", [*SHAPES.values(), *FIXTURES.parent.glob("*.json*")], ids=lambda p: p.name)
def test_a_table_holds_the_lists_of_any_format(path: Path, file: Callable[..., Path], tmp_path: Path) -> None:
    if path.suffix not in (".json", ".jsonl"):
        pytest.skip("is a table")
    for _, row in read_json_rows(path):
        if (read := read_cases(file([row]), on_error="skip"))[0]:
            (wanted,), report = read
            (found,), again = read_cases(as_table(row, tmp_path / "rows.csv"))
            assert again.format == report.format
            assert (found.queries, [e.text for e in found.edits]) == (wanted.queries, [e.text for e in wanted.edits])


@pytest.mark.parametrize(
    "cell", ["['a']['b']", '["a"],', "['a', 'b']", "[\u201ca\u201d]", '["a", "b', "{'k': [{'prompt': 'a'}]}", "[['a']]"]
)
@pytest.mark.parametrize("column", ["paraphrases", "portability", "neighbors"])
def test_a_cell_that_is_a_list_in_another_notation_is_refused(
    cell: str, column: str, file: Callable[..., Path]
) -> None:
    content = f'prompt,subject,target_new,{column}\n{{}} is,Norr,x,"{cell.replace(chr(34), chr(34) * 2)}"\n'
    message = rf"row 2: column '{column}' holds .* is no JSON; write it as JSON, with straight double quotes"
    with pytest.raises(UnusableRow, match=message):
        read_cases(file(content, "rows.csv"))


@pytest.mark.parametrize(
    "content",
    [
        'prompt, subject, target_new\n"The mayor of Norr, once, is", Norr, "Ida"\n',
        'sep=;\nprompt;subject;target_new\n"The mayor of Norr, once, is";Norr;Ida\n',
        'prompt,subject,target_new\r"The mayor of Norr, once, is",Norr,Ida\r',
        'prompt,subject,target_new,\n"The mayor of Norr, once, is",Norr,Ida, ,\n',
        'prompt,subject,target_new\n"The mayor of Norr, once, is",Norr,Ida,,\n',
    ],
)
def test_a_table_may_be_written_in_any_hand(content: str, file: Callable[..., Path]) -> None:
    (case,), _ = read_cases(file(content, "rows.csv"))
    (edit,) = case.edits
    assert (edit.text, edit.target_new) == ("The mayor of Norr, once, is", "Ida")
    with pytest.raises(MalformedFile, match="row 2"):  # whatever the header's row in the file
        read_cases(file(content.replace("Norr", "", 1).replace("Norr", "Velt"), "rows.csv"))


@pytest.mark.parametrize("separator", [" ", "\n", "\n ", "\nA: "])
def test_a_separator_of_a_table_may_be_whitespace(separator: str, file: Callable[..., Path]) -> None:
    content = f'prompt,subject,target_new,separator\n{{}}是,诺尔,北省,"{separator}"\n{{}}是,维尔,北省,\n'
    cases, _ = read_cases(file(content, "rows.csv"))
    assert [case.edits[0].separator for case in cases] == [separator, None]


@pytest.mark.parametrize(
    ("line", "cells"),
    [
        ("a, ,b", ["a", " ", "b"]),
        ('a, "b, c" , ', None),  # as a quoted cell that goes on
        (' "a, ""b"", c", "d",e', ['a, "b", c', "d", "e"]),
        ('"a, ""b"", c, ","d, ", " "', ['a, "b", c, ', "d, ", " "]),
        ('a 5" b, "c, d", ', ['a 5" b', "c, d", " "]),
        ('a, "b" c,d', ["a", ' "b" c', "d"]),
        ('"a,\n ""b""", "c",d', ['a,\n "b"', "c", "d"]),
    ],
)
def test_a_space_goes_before_quotes_and_nowhere_else(
    line: str, cells: list[str] | None, file: Callable[..., Path]
) -> None:
    path = file(f"prompt,subject,separator\n{{}} is,Norr, \n{line}\n", "rows.csv")
    if cells is None:
        with pytest.raises(MalformedFile, match="row 3: not a valid table"):
            read_rows(path)
        return
    (_, row), (_, found) = read_rows(path)
    assert row["separator"] == " "
    assert [found[name] or " " for name in row] == cells


def test_cells_of_text_stay_text(file: Callable[..., Path]) -> None:
    for cell in (
        "[1] {} is",
        '["French"] the land of {}',
        "[\u2018French\u2019, 'German'] {} is (in) ",
        '{"name": "x"} of {}:',
    ):
        quoted = cell.replace('"', '""')
        content = f'prompt,subject,target_new,paraphrases\nThe list of Norr is,Norr,"[""a"", 1]","{quoted}"\n'
        (case,), _ = read_cases(file(content, "rows.csv"))
        assert case.edits[0].target_new == '["a", 1]'
        assert asked(case, "paraphrase") == [("paraphrase", cell.replace("{}", "Norr"), '["a", 1]')]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,subject,target_new\na,b,c,d\n", "row 2: 4 cells under 3 columns"),
        ("prompt,prompt,target_new\na,b,c\n", "row 1: two columns are called 'prompt'"),
        ("prompt,,target_new\na,b,c\n", "row 1: column 2 has no name"),
        ("prompt,subject,target_new\n", "holds no rows below its header"),
        ('prompt,subject,target_new\n"a,b,c\n', "row 2: not a valid table"),
        (
            "prompt,target_new\nNorr is,x\n",
            "field 'subject' is missing; .*; a fact that names no subject says so: null, or",
        ),
    ],
)
def test_a_bad_table_is_named(content: str, message: str, file: Callable[..., Path]) -> None:
    with pytest.raises(MalformedFile, match=message):
        read_cases(file(content, "rows.csv"))


def test_a_file_without_a_row_that_can_be_read_says_what_is_wrong_with_them(file: Callable[..., Path]) -> None:
    """Whichever the file's kind: not that its format is unknown."""
    half = '{"prompt": "{} is \\ud83d", "subject": "Norr", "target_new": "x"}\n'
    for content, name, reason in (
        ("prompt,subject,target_new\na,b,c,d\n", "rows.csv", "row 2: 4 cells under 3 columns"),
        ('["a"]', "rows.json", "row 1: expected an object, found str"),
        (half, "rows.jsonl", "row 1: holds half a surrogate pair"),
    ):
        with pytest.raises(MalformedFile, match=f"{reason}.*; no other row can be read either"):
            read_cases(file(content, name), on_error="skip")


def test_a_table_may_hold_long_texts(file: Callable[..., Path]) -> None:
    before = csv.field_size_limit()
    (case,), _ = read_cases(file(f"prompt,subject,target_new,notes\n{{}} is,Norr,x,{'long ' * 40_000}\n", "rows.csv"))
    assert len(case.meta["extra"]["notes"]) == 200_000
    assert csv.field_size_limit() == before


def test_a_table_may_say_that_its_facts_are_put_in_a_chat(file: Callable[..., Path]) -> None:
    cells = ("TRUE", "false", "", '"{""system"": ""Be brief.""}"')
    rows = "".join(f"{{}} is,Land {i},x,{cell}\n" for i, cell in enumerate(cells))
    cases, _ = read_cases(file(f"prompt,subject,target_new,chat\n{rows}", "rows.csv"))
    assert [case.edits[0].chat for case in cases] == [Chat(), None, None, Chat("Be brief.")]


def test_a_subject_that_is_elsewhere_is_said_to_be(file: Callable[..., Path]) -> None:
    row = {"prompt": "Norr and Norr is", "subject": "Norr", "target_new": "x", "subject_start": 3}
    with pytest.raises(UnusableRow, match="does not occur in its prompt 'Norr and Norr is' at character 3"):
        read_cases(file([row]))


@pytest.mark.parametrize("name", ["id", "case_id"])
def test_a_fact_may_have_a_number_as_its_id(name: str, file: Callable[..., Path]) -> None:
    row = {name: 7, "prompt": "{} is", "subject": "Norr", "target_new": "x"}
    (case,), _ = read_cases(file([row]))
    assert (case.id, case.edits[0].id) == ("7", "7")


def test_neighbours_need_an_answer(file: Callable[..., Path]) -> None:
    row = {"prompt": "{} is", "subject": "Norr", "target_new": "x", "neighbors": ["Velt is", {"prompt": "Sund is"}]}
    _, report = read_cases(file([row]))
    assert report.dropped_queries == {"neighbor_without_answer": 2}


def test_neighbours_name_their_answers_as_portability_does(file: Callable[..., Path]) -> None:
    items = [
        {"prompt": "A is", "answers": ["Sel", ["Om", "the Om"]]},
        {"prompt": "B is", "answer": ["Sel", "Om"]},
        {"prompt": "C is", "answer": 5},
        {"prompt": "D is"},
        "E is",
    ]
    row = {"prompt": "{} is", "subject": "Norr", "target_new": "x", "target_true": "Tom", "neighbors": items}
    (case,), report = read_cases(file([row]))
    assert [(q.target, q.answers, q.contrast) for q in case.queries if q.axis == "neighborhood"] == [
        ("Sel", (("Sel",), ("Om", "the Om")), "x"),
        ("Sel", (("Sel",), ("Om",)), "x"),
        ("5", (("5",),), "x"),
        ("Tom", (("Tom",),), "x"),
        ("Tom", (("Tom",),), "x"),
    ]
    assert report.dropped_queries == {}


def test_a_report_names_only_options_that_were_chosen(file: Callable[..., Path]) -> None:
    path = file([GOOD])
    assert re.fullmatch(rf"{path} \(edits, sha256 \w+\): 1 of 1 rows kept", str(read_cases(path)[1]))
    assert "(edits, limit=1, sha256" in str(read_cases(path, limit=1)[1])


# --- formats by all their fields -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"update": "Q?", "ans": "x", "rephrase": "R?"}, r"WikiBigEdit \(wikibigedit\).*'subject' is missing"),
        ({"prompt": "Norr is", "target_new": "x", "neighbors": []}, r"facts \(edits\).*'subject' is missing"),
        ({"subject": "Norr", "src": "Q?", "rephrase": "R?"}, r"zsRE \(zsre\).*'answers' or 'ans' is missing"),
        ({"subject": "Norr", "src": "Q?", "alt": "x", "loc": "R?"}, r"zsRE \(zsre\).*'answers' or 'ans' is missing"),
        ({"edits": [], "meta": {}}, r"cases as retcon writes them \(cases\).*'queries' is missing"),
    ],
)
def test_an_error_says_which_format_was_taken_and_what_is_missing(
    row: dict[str, Any], message: str, file: Callable[..., Path]
) -> None:
    with pytest.raises(MalformedFile, match=message):
        read_cases(file([row]))


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"ground_truth": "Tom", "answers": ["Tom"], "loc": "who?", "loc_ans": "x"}, "counterfact-flat"),
        ({"answers": ["Tom"], "rephrase": "Norr's mayor is"}, "edits"),
        ({"alt": "Tom", "rephrase_prompt": "Norr's mayor is"}, "counterfact-flat"),
        ({"question": "Who leads Norr?", "answer": "Tom", "sub_question": []}, "edits"),
        ({"update": "Who leads Norr?", "ans": "Tom", "rephrase": "Norr's mayor is"}, "edits"),
        ({"target": "Tom", "locality": [{"loc": "who?", "loc_ans": "x"}], "source": "NQ"}, "edits"),
    ],
)
def test_target_new_is_what_is_written_whatever_else_a_row_has(
    fields: dict[str, Any], format: str, file: Callable[..., Path]
) -> None:
    (case,), report = read_cases(file([{**GOOD, **fields}]))
    assert (report.format, case.edits[0].statement) == (format, "The mayor of Norr is Ida")


def test_a_file_with_target_new_is_not_read_as_one_that_has_none(file: Callable[..., Path]) -> None:
    row = {"prompt": "The mayor of Norr is", "target_new": "Ida", "answers": ["Tom"], "rephrase": "Norr's mayor is"}
    with pytest.raises(MalformedFile, match=r"is missing; its fields are .* Name the format if it is another"):
        read_cases(file([row]))


def test_objects_of_portability_do_not_make_a_fact_knowedit(file: Callable[..., Path]) -> None:
    fact = {"prompt": "Q: Who leads Norr?\nA:\n", "subject": None, "target_new": "Ida"}
    kinds = {"home": [{"prompt": "The river of Norr is", "answer": "Sel"}]}
    for field in ("portability", "locality"):
        (case,), report = read_cases(file([{**fact, field: kinds}]))
        assert (report.format, case.edits[0].text, case.id) == ("edits", fact["prompt"], case.edits[0].id)
        assert asked(case, field) == [(f"{field}.home", "The river of Norr is", "Sel")]
    empty = {**GOOD, "portability": {"home": []}}
    assert read_cases(file([empty]))[1].format == "edits"
    published = {**GOOD, "portability": {"home": [{"prompt": "The river of Norr is", "ground_truth": [["Sel"]]}]}}
    assert read_cases(file([empty, published]), limit=1)[1].format == "knowedit"


def test_misspelt_fields_do_not_lead_to_another_format(file: Callable[..., Path]) -> None:
    row = {"Prompt": "Norr is in", "subject": "Norr", "target-new": "Velt", "target_true": "Sund"}
    wanted = r"facts \(edits\), of which the fields 'prompt' and 'target_new' are missing; its fields are Prompt, .*"
    with pytest.raises(MalformedFile, match=wanted + r"mean 'prompt' by 'Prompt' and 'target_new' by 'target-new'\?"):
        read_cases(file([row]))


@pytest.mark.parametrize(
    ("content", "holders"), [({"data": [GOOD]}, "'data'"), ({"0": GOOD, "1": GOOD, "2": GOOD}, "'0', '1', ...")]
)
def test_an_object_around_the_rows_is_named(content: Any, holders: str, file: Callable[..., Path]) -> None:
    with pytest.raises(MalformedFile, match=f"one object that holds the rows under {holders}; save them as a list"):
        read_cases(file(content))


def test_nan_in_a_table_turned_into_json_is_no_value(file: Callable[..., Path]) -> None:
    row = {
        "tag": "2023", "subject": "Norr", "update": "Who leads Norr?", "ans": "Ida", "rephrase": "Norr's leader?",
        "personas": math.nan, "mhop": math.nan, "mhop_ans": math.nan, "loc": "Who leads Velt?", "loc_ans": "Pia",
    }  # fmt: skip
    (case,), report = read_cases(file([row]))
    assert [q.axis for q in case.queries] == ["rewrite", "paraphrase", "locality.other"]
    assert report.dropped_queries == {}


@pytest.mark.parametrize("subject", ["Ada Quill", "ada quill", "Ada\u2009Quill"])
def test_a_subject_is_found_whatever_the_space(subject: str, file: Callable[..., Path]) -> None:
    (case,), _ = read_cases(file([{**GOOD, "prompt": "The mayor, Ada\u00a0Quill, is", "subject": subject}]))
    assert (case.edits[0].subject, case.edits[0].subject_span) == (subject, (11, 20))


def test_fields_that_only_later_rows_have_count_too(file: Callable[..., Path]) -> None:
    fact = {"prompt": "The mayor of Norr is", "subject": "Norr", "target_new": "Ida"}
    more = {**fact, "subject": "Velt", "prompt": "The mayor of Velt is", "ground_truth": "Tom", "rephrase_prompt": "x"}
    assert read_cases(file([fact, more]))[1].format == "counterfact-flat"


def test_unknown_fields_are_counted_and_kept(file: Callable[..., Path]) -> None:
    rows = [
        {"prompt": f"The mayor of {s} is", "subject": s, "target_new": "Ida", "portabilty": [], "batch": 3}
        for s in ("Norr", "Velt")
    ]
    cases, report = read_cases(file(rows))
    assert report.unknown == {"portabilty": 2, "batch": 2}
    assert report.likely == {"portabilty": "portability"}
    assert cases[0].meta["extra"] == {"portabilty": [], "batch": 3}


def test_fields_of_other_formats_are_named_by_their_own(file: Callable[..., Path]) -> None:
    row = {**GOOD, "ID": "n", "target_old": "Tom", "neighborhood_prompts": [], "rephrase": "x", "separator": " "}
    _, report = read_cases(file([row]), "edits")
    assert report.likely == {
        "ID": "id",
        "target_old": "target_true",
        "neighborhood_prompts": "neighbors",
        "rephrase": "paraphrases",
    }


def test_facts_with_a_target_and_localities_of_their_own_are_not_qaedit(file: Callable[..., Path]) -> None:
    row = {"prompt": "The mayor of Norr is", "subject": "Norr", "target": "Ida", "paraphrases": ["x"]}
    (case,), report = read_cases(file([{**row, "locality": [{"prompt": "The river of Norr is", "answer": "Sel"}]}]))
    assert (report.format, case.edits[0].target_new) == ("fastedit", "Ida")
    assert report.unknown == {"paraphrases": 1, "locality": 1}
    assert report.likely["paraphrases"] == "queries"


# --- the alternative answer ----------------------------------------------------------------------------------------


def test_the_alternative_answer_of_any_format_that_has_one(file: Callable[..., Path]) -> None:
    nested = {
        "requested_rewrite": {
            "prompt": "{} is in", "subject": "Norr", "target_new": {"str": "Velt"}, "target_true": {"str": "Sund"},
            "alt": "Gent",
        }
    }  # fmt: skip
    flat = {"prompt": "Norr is in", "subject": "Norr", "target_new": "Velt", "alt": "Gent", "ground_truth": "Sund"}
    plain = {"prompt": "{} is in", "subject": "Norr", "target_new": "Velt", "alt": "Gent"}
    zsre = {"src": "Where is Norr?", "subject": "Norr", "answers": ["Velt"], "alt": "Gent"}
    for row in (nested, flat, plain, zsre):
        (case,), report = read_cases(file([row]), case_target="alt")
        assert (case.edits[0].target_new, report.options["case_target"]) == ("Gent", "alt")
        assert case.queries[0].target == "Gent"
    for row in (flat, plain, zsre):
        del row["alt"]
        with pytest.raises(UnusableRow, match="row 1: it has no alternative answer"):
            read_cases(file([row]), case_target="alt")
    with pytest.raises(InvalidSetting, match="unke has no alternative answers; counterfact, zsre, edits"):
        read_cases(SHAPES["unke"], case_target="alt")


# --- bad rows and bad files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (json.dumps({**GOOD, "target_new": " "}), "empty_target", "the answer to write is empty"),
        (json.dumps({**GOOD, "subject": "Velt"}), "subject_missing", "its subject 'Velt' does not occur"),
        (json.dumps({**GOOD, "subject": ""}), "malformed", "field 'subject' is empty"),
        (json.dumps({**GOOD, "prompt": 7}), "malformed", "field 'prompt' must be text, found int"),
        (json.dumps({"prompt": "x", "subject": "x"}), "malformed", "field 'target_new' is missing"),
        ("{broken", "malformed", "not valid JSON"),
        ("[1]", "malformed", "expected an object, found list"),
        (json.dumps({**GOOD, "target_new": "\ud800"}), "malformed", "half a surrogate pair"),
        ("[" * 100_000, "malformed", "nested too deeply"),
        ('{"prompt": ' + "9" * 5000 + "}", "malformed", "a number of too many digits"),
    ],
)
def test_one_bad_row_does_not_stop_a_file(line: str, reason: str, detail: str, file: Callable[..., Path]) -> None:
    good = json.dumps({**GOOD, "subject": "mayor", "id": "kept"})
    path = file(f"{good}\n{line}\n", "rows.jsonl")
    with pytest.raises(MalformedFile, match="row 2"):
        read_cases(path)
    cases, report = read_cases(path, on_error="skip")
    assert [case.id for case in cases] == ["kept"]
    assert (report.rows, report.dropped) == (2, {reason: 1})
    assert [r.row for r in report.left_out] == [2]
    assert detail in report.left_out[0].detail
    assert "row 2" in str(report)


def test_a_fact_on_two_rows_is_said_to_be_one(file: Callable[..., Path]) -> None:
    path = file("".join(f"{{}} is,Norr,x,{p}\n" for p in ("paraphrases", "So is {}", "And is {}")), "rows.csv")
    path.write_text(path.read_text("utf-8").replace("{} is,Norr,x", "prompt,subject,target_new", 1), "utf-8")
    with pytest.raises(
        UnusableRow, match=r"row 3: the same fact as row 2 \(id '\w+'\), with other queries; put them into one row"
    ):
        read_cases(path)


def test_the_id_of_a_row_without_one_is_no_other_rows(file: Callable[..., Path]) -> None:
    rows = [{"src": f"Who leads {s}?", "subject": s, "answers": ["Ida"], "rephrase": "x"} for s in ("Norr", "Velt")]
    cases, report = read_cases(file([rows[0], {**rows[1], "case_id": 0}]))
    assert [(case.id, case.edits[0].id) for case in cases] == [("row 1", "row 1"), ("0", "0")]
    assert report.unknown == {}


def test_a_fact_given_twice_is_made_once(file: Callable[..., Path]) -> None:
    cases, report = read_cases(file([GOOD, GOOD]))
    assert (len(cases), report.dropped) == (1, {"duplicate": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{\x00", "UTF-16 text; save it as UTF-8"),
        (b'[{"prompt": "caf\xe9"}]', r"not UTF-8 text \(byte 16\); save it as UTF-8"),
        (b"", "the file is empty"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "a number of too many digits"),
        (b'[{"prompt": "x"', "line 1: not valid JSON"),
        (b"[1, 2]", "row 1: expected an object, found int"),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_bad_file_gives_one_error(content: bytes, message: str, on_error: Any, file: Callable[..., Path]) -> None:
    path = file(content)
    with pytest.raises(MalformedFile) as caught:
        read_cases(path, on_error=on_error)
    assert str(path) in str(caught.value)
    if on_error == "stop":
        caught.match(message)


def test_a_byte_order_mark_is_no_text(file: Callable[..., Path]) -> None:
    assert read_cases(file(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode()))[0][0].edits[0].subject == "Norr"


def test_rows_can_be_drawn(file: Callable[..., Path]) -> None:
    rows = [{**GOOD, "id": str(i), "prompt": f"Mayor {i} of Norr is"} for i in range(20)]

    def ids(**options: Any) -> list[str]:
        return [case.id for case in read_cases(file(rows), **options)[0]]

    drawn = ids(order="shuffle", seed=1)
    assert sorted(drawn, key=int) == ids() != drawn
    assert ids(order="shuffle", seed=1, start=3, limit=5) == drawn[3:8]
    assert drawn != ids(order="shuffle", seed=2)
    with pytest.raises(InvalidSetting, match="unknown order 'random'; known: file, shuffle"):
        ids(order="random")


# --- facts without a subject ---------------------------------------------------------------------------------------


def test_methods_that_write_at_the_subject_refuse_a_fact_without_one() -> None:
    fact = Edit("Who leads Norr?", None, "Ida", id="lost")
    free = [name for name in list_methods() if name in ("ctp", "kne")]
    for name in free:
        check_subjects(method(name), [fact])
    with pytest.raises(InvalidEdit, match=r"edit 'lost' names no subject, and rome writes at .*: .*\bctp\b.*\bkne\b"):
        check_subjects(method("rome", layer=1), [fact])


@pytest.mark.parametrize("name", ["ctp", "kne"])
def test_the_trained_methods_take_a_fact_without_a_subject(name: str, tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=2)
    case = read_cases(SHAPES["unke"], limit=1)[0][0]
    settings: dict[str, Any] = {"epochs": 1} | ({"n_positive": 2} if name == "ctp" else {"budget": 0.01})
    delta = method(name, **settings).propose(lm, case.edits)
    assert [report.id for report in delta.report] == [case.edits[0].id]
    assert delta.edits[0].subject is None


def test_the_page_has_a_readable_row_of_every_format(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    shown = page.split("```json\n")[2].split("```")[0].splitlines()
    assert {line.split()[0] for line in shown} | {"edits"} == set(FORMATS)
    for line in shown:
        name, row = line.split(maxsplit=1)
        (tmp_path / "row.json").write_text(f"[{row}]", "utf-8")
        cases, report = read_cases(tmp_path / "row.json")
        assert (report.format, len(cases), report.unknown) == (name, 1, {})


ODD = (None, 1.5, True, "", "{} {}", [], [None], ["a", 3], {}, {"a": [{}]}, [{"prompt": []}], "\ud800")
"""What a field may hold where another thing is expected."""


def spoilt(item: Any, draw: random.Random) -> Any:
    """The same with some of its parts exchanged for something odd, and some fields gone."""
    if draw.random() < 0.12:
        return draw.choice(ODD)
    if isinstance(item, dict):
        return {name: spoilt(value, draw) for name, value in item.items() if draw.random() > 0.03}
    return [spoilt(part, draw) for part in item] if isinstance(item, list) else item


@pytest.mark.parametrize("path", [*SHAPES.values(), *FIXTURES.parent.glob("*.json*")], ids=lambda p: p.name)
def test_every_error_is_ours_whatever_the_fields_hold(path: Path, file: Callable[..., Path]) -> None:
    if path.suffix not in (".json", ".jsonl"):
        pytest.skip("a table's cells are all text")
    rows = [row for _, row in read_json_rows(path)]
    draw = random.Random(path.name)
    for _ in range(60):
        odd = file([spoilt(row, draw) for row in rows])
        for on_error in ("stop", "skip"):
            with suppress(RetconError):
                report = read_cases(odd, on_error=on_error)[1]  # type: ignore[arg-type]
                assert report.rows == report.cases + len(report.left_out)
