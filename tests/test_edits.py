"""`Edit`, `Query`, `Case`: what they refuse, where the subject is found, what contradicts what, and their files."""

import hashlib
import json
import unicodedata
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

import retcon
from retcon.audit import audit
from retcon.edits import (
    Case,
    ConflictRule,
    Edit,
    Query,
    case_from,
    case_record,
    cases_hash,
    check_edits,
    conflicts,
    in_chat,
    resolve_conflicts,
    same_question,
    write_cases,
    write_edits,
)
from retcon.errors import ConflictingEdits, InvalidEdit, InvalidSetting, MalformedFile
from retcon.evaluation import contaminated, read_cases
from retcon.files import read_json_rows
from retcon.lm.model import LM
from retcon.locate import causal_trace, contrast_probe, retrieve_word_sets
from retcon.locate.paths import paths
from retcon.spelling import mentions
from retcon.workflow.estimate import estimate

NFC: Callable[[str], str] = lambda text: unicodedata.normalize("NFC", text)  # noqa: E731
NFD: Callable[[str], str] = lambda text: unicodedata.normalize("NFD", text)  # noqa: E731


# --- what an edit is -----------------------------------------------------------------------------------------------


def test_whitespace_around_subject_and_targets_goes() -> None:
    edit = Edit("The capital of {} is ", " France", " Rome\n", "  ")
    assert (edit.subject, edit.target_new, edit.target_true) == ("France", "Rome", None)
    assert edit.text == "The capital of France is "  # whose end is the user's own
    assert edit.statement == "The capital of France is Rome"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(prompt=" "), "edit 'e': the prompt is empty; give the text up to the answer"),
        (dict(subject=" "), "edit 'e': the subject is empty; name the entity the fact is about"),
        (dict(target_new="\n"), "edit 'e': target_new is empty; give the answer the model shall say"),
        (dict(prompt="{} and {} are"), "edit 'e': 2 markers '{}' in the prompt, expected one: '{} and {} are'"),
        (dict(prompt=None), "edit 'e': prompt must be text, found NoneType (None)"),
        (dict(subject=5), "edit 'e': subject must be text, found int (5)"),
        (dict(target_new=["Rome"]), "edit 'e': target_new must be text, found list (['Rome'])"),
        (dict(target_true=7), "edit 'e': target_true must be text, found int (7)"),
        (dict(relation_id=36), "edit 'e': relation_id must be text, found int (36)"),
        (dict(id=3), "edit 3: id must be text, found int (3)"),
        (dict(target_new="\ud800"), "edit 'e': target_new holds half a surrogate pair, which is no text"),
        (dict(prompt="France is", subject_start=-1), "subject_start must be a character's index from 0, found -1"),
        (dict(prompt="France is", subject_start=True), "subject_start must be a character's index from 0, found True"),
        (dict(subject_start=0), "edit 'e': '{}' says where the subject is; leave subject_start out"),
        (dict(id="", prompt=""), "edit of 'France': the prompt is empty"),
    ],
)
def test_what_an_edit_refuses(fields: dict[str, Any], message: str) -> None:
    good = dict(prompt="The capital of {} is", subject="France", target_new="Rome", id="e")
    Edit(**good)  # type: ignore[arg-type]
    with pytest.raises(InvalidEdit) as caught:
        Edit(**{**good, **fields})
    assert message in str(caught.value)


def test_identity_is_a_hash_of_what_is_asked_or_the_given_one() -> None:
    ids = {
        Edit("The capital of {} is", "France", "Rome").id,
        Edit("The capital of {} is", "France", "Bern").id,
        Edit("The capital of {} is", "Italy", "Rome").id,
        Edit("The seat of {} is", "France", "Rome").id,
    }
    assert len(ids) == 4
    assert all(len(i) == 12 for i in ids)
    assert Edit("The capital of {} is", "France", " Rome", "Paris").id in ids
    assert Edit("The capital of {} is", "France", "Rome", id="mine").id == "mine"


def test_braces_are_text_wherever_they_are_not_the_marker() -> None:
    edit = Edit('{| class="x" |} {0} {name} {} is', "A {b} %s \\1", "Rome")
    assert edit.text == '{| class="x" |} {0} {name} A {b} %s \\1 is'
    start, end = edit.require_subject_span()
    assert edit.text[start:end] == "A {b} %s \\1"


# --- where the subject stands --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject", "found"),
    [
        ("The capital of {} is", "France", "France"),
        ("{}", "France", "France"),
        ("Who leads {} ", "France", "France"),
        ("The capital of France is", "France", "France"),
        ("France, says France, is", "France", "France"),
        ("The city of " + NFD("Łódź") + " is", NFC("Łódź"), NFD("Łódź")),
        ("The city of " + NFC("Łódź") + " is", NFD("Łódź"), NFC("Łódź")),
        ("The city of " + NFD("한국어") + " is", NFC("한국어"), NFD("한국어")),
        ("The city of " + NFC("한국어") + " is", NFD("한국어"), NFC("한국어")),
        ("The city of " + NFD("ệ") + " is", "e\u0302\u0323", NFD("ệ")),  # marks in another order
        ("the CAPITAL of france is", "The Capital of France", "the CAPITAL of france"),
        ("In der STRASSE ist", "Straße", "STRASSE"),
        ("In der Straße ist", "STRASSE", "Straße"),
        (NFD("ZÜRICH lies in"), "Zürich", NFD("ZÜRICH")),
        ("ΟΔΥΣΣΕΥΣ sailed to", "Οδυσσεύς".replace("ύ", "υ"), "ΟΔΥΣΣΕΥΣ"),
        ("🗼 of 東京 is", "🗼 of 東京", "🗼 of 東京"),
        ("عاصمة فرنسا هي", "فرنسا", "فرنسا"),
    ],
)
def test_the_subject_is_found_exactly_then_normalised_then_folded(prompt: str, subject: str, found: str) -> None:
    edit = Edit(prompt, subject, "Rome")
    start, end = edit.require_subject_span()
    assert edit.text[start:end] == found
    assert start == edit.text.index(found)


@pytest.mark.parametrize("prompt", ["The physician was born in", "한 is", "Stra is"])
@pytest.mark.parametrize("subject", ["France", "하", "straß"])
def test_a_subject_that_is_not_there(prompt: str, subject: str) -> None:
    edit = Edit(prompt, subject, "Rome", id="e")
    assert edit.subject_span is None
    with pytest.raises(
        InvalidEdit, match=f"edit 'e': subject '{subject}' does not occur in the prompt '{prompt}'; put"
    ):
        edit.require_subject_span()


def test_an_exact_occurrence_goes_before_a_folded_one() -> None:
    assert Edit("ADA or Ada is", "Ada", "x").subject_span == (7, 10)


@pytest.mark.parametrize(
    ("prompt", "subject", "start"),
    [
        ("The teacher who taught CHER is", "Cher", 23),
        ("Manfred of MAN is", "Man", 0),  # spelt so nowhere else
        ("The USD that he paid us was printed in", "US", 4),
        ("Der Essener Dom, wo man auch essen kann, steht in", "Essen", 4),
        ("K2 and K is", "K", 7),
        ("cafe\u0301 of cafe is", "cafe", 9),
        ("Norr's mayor, of Norr, is", "Norr", 0),
        ("Beatles are", "beatle", 0),  # nowhere by itself
        ("Tokyo東京は東京 の", "東京", 5),  # no spaces between words: none is a part of a longer one
        ("กรุงเทพคือ กรุงเทพ", "กรุงเทพ", 0),
    ],
)
def test_a_subject_by_itself_goes_before_one_in_a_longer_word(prompt: str, subject: str, start: int) -> None:
    assert Edit(prompt, subject, "x").subject_span == (start, start + len(subject))


def test_mentions_are_of_the_nearest_spelling_and_by_themselves_where_some_are() -> None:
    assert mentions("Lee commanded the fleet of LEE", "lee") == [(19, 22)]
    assert mentions("Lee commanded the fleet of LEE", "lee", any_case=True) == [(0, 3), (27, 30)]
    assert mentions("Lee commanded the ship of LEE", "lee") == [(0, 3), (26, 29)]
    assert mentions("the fleet fleet", "lee") == [(5, 8), (11, 14)]
    assert mentions("They told us that the US and the USA", "US") == [(22, 24)]
    assert mentions("the ship", "lee") == []


def test_subject_start_picks_the_occurrence() -> None:
    prompt = "Norr, says the mayor of Norr, lies in"
    assert Edit(prompt, "Norr", "Velt").subject_span == (0, 4)
    assert Edit(prompt, "Norr", "Velt", subject_start=24).subject_span == (24, 28)
    edit = Edit(prompt, "Norr", "Velt", id="e", subject_start=23)
    assert edit.subject_span is None
    with pytest.raises(InvalidEdit, match=r"'Norr' does not occur in the prompt '.*' at character 23; put"):
        edit.require_subject_span()


# --- queries and cases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(prompt=" "), "query 'q': the prompt is empty"),
        (dict(prompt=3), "query 'q': prompt must be text, found int (3)"),
        (dict(axis=None), "query 'q': axis must be text, found NoneType (None)"),
        (dict(target=3), "query 'q': target must be text, found int (3)"),
        (dict(contrast=["x"]), "query 'q': contrast must be text, found list (['x'])"),
        (dict(answers="Rome"), "answers must be a list of answers, each a list of aliases; found 'Rome'"),
        (dict(answers=("Rome",)), "answers must be a list of answers, each a list of aliases; found ('Rome',)"),
        (dict(answers=((3,),)), "query 'q': answers must be text, found int (3)"),
        (dict(answers_mode="some"), "query 'q': answers_mode must be 'any' or 'all', found 'some'"),
    ],
)
def test_what_a_query_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidEdit) as caught:
        Query(**{**dict(id="q", axis="rewrite", prompt="The capital of France is"), **fields})
    assert message in str(caught.value)


def test_lists_become_tuples() -> None:
    edit, query = Edit("{} is", "France", "Rome"), Query("q", "rewrite", "France is", answers=[["a", "b"]])  # type: ignore[arg-type]
    assert query.answers == (("a", "b"),)
    case = Case("c", [edit], [query])  # type: ignore[arg-type]
    assert (case.edits, case.queries) == ((edit,), (query,))


def test_blank_answers_are_left_out_and_a_blank_rival_is_none() -> None:
    query = Query("q", "rewrite", "France is", "big", contrast=" ", answers=((), ("", " "), ("big", "")))
    assert (query.answers, query.contrast) == ((("big",),), None)


def test_what_a_case_refuses() -> None:
    query = Query("rewrite/0", "rewrite", "France is", "big")
    with pytest.raises(InvalidEdit, match="case 'c': two queries share the id 'rewrite/0'; ids must be unique within"):
        Case("c", (), (query, query))
    with pytest.raises(InvalidEdit, match=r"case 7: id must be text, found int \(7\)"):
        Case(7, (), ())  # type: ignore[arg-type]


# --- conflicts -----------------------------------------------------------------------------------------------------

ROME = Edit("The capital of {} is", "France", "Rome", id="rome")
BERN = Edit("The capital of {} is", "FRANCE", "Bern", id="bern")
AGAIN = Edit("the  capital of France is", "France", "Rome", id="again")
OTHER = Edit("The language of {} is", "France", "Danish", id="other")


def test_the_question_is_subject_and_template_once_normalised() -> None:
    assert same_question(ROME) == same_question(BERN) == same_question(AGAIN)
    assert same_question(ROME) != same_question(OTHER)
    composed, decomposed = Edit("{} lies in", NFC("Łódź"), "a"), Edit("{} lies in", NFD("Łódź"), "b")
    assert same_question(composed) == same_question(decomposed)


def test_a_relation_goes_before_the_template() -> None:
    one = Edit("{} was trained as a", "Ada", "baker", relation_id="P106")
    two = Edit("{} earns a living as a", "ada", "pilot", relation_id="P106")
    far = Edit("{} was trained as a", "Ada", "pilot", relation_id="P101")
    assert conflicts([one, two, far]) == [(one, two)]


def test_edits_that_agree_are_no_conflict() -> None:
    assert conflicts([ROME, OTHER, BERN, AGAIN]) == [(ROME, BERN, AGAIN)]
    assert conflicts([ROME, OTHER, AGAIN]) == []
    one, two = Edit("{} is", "x", NFC("é"), id="1"), Edit("{} is", "x", NFD("é"), id="2")
    assert conflicts([one, two]) == []


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("drop", [ROME, OTHER, AGAIN]),
        ("last", [ROME, OTHER, AGAIN]),
        ("keep", [ROME, OTHER, BERN, AGAIN]),
    ],
)
def test_resolving(rule: ConflictRule, kept: list[Edit]) -> None:
    assert resolve_conflicts([ROME, OTHER, BERN, AGAIN], rule) == kept
    assert resolve_conflicts(iter([ROME, OTHER, BERN, AGAIN]), rule) == kept


def test_first_or_last_goes_by_the_order_given() -> None:
    assert resolve_conflicts([BERN, OTHER, ROME], "drop") == [BERN, OTHER]
    assert resolve_conflicts([BERN, OTHER, ROME], "last") == [OTHER, ROME]


def test_error_names_both_and_the_way_out() -> None:
    with pytest.raises(ConflictingEdits) as caught:
        resolve_conflicts([OTHER, ROME, AGAIN, BERN])
    message = str(caught.value)
    assert "edits 'rome' and 'bern' contradict each other: 'France' shall become both 'Rome' and 'Bern'" in message
    assert "conflicts='drop' or 'last'" in message
    assert resolve_conflicts([OTHER, ROME, AGAIN]) == [OTHER, ROME, AGAIN]


def test_an_unknown_rule_is_refused_even_without_conflicts() -> None:
    with pytest.raises(InvalidSetting, match="unknown conflict rule 'first'; known: error, drop, last, keep"):
        resolve_conflicts([ROME], "first")  # type: ignore[arg-type]


def test_what_methods_check_first() -> None:
    check_edits([])
    check_edits([ROME, OTHER, ROME])
    with pytest.raises(InvalidEdit, match="does not occur in the prompt"):
        check_edits([ROME, Edit("The town lies in", "Norr", "Velt")])
    with pytest.raises(InvalidEdit, match="two different edits share the id 'rome'; ids must be unique"):
        check_edits([ROME, Edit("{} speaks", "Ada", "Danish", id="rome")])
    with pytest.raises(ConflictingEdits):
        check_edits([ROME, BERN])


# --- files ---------------------------------------------------------------------------------------------------------

ODD = 'a\u2028b\u2029c\x85d "quoted" \\ \t{} 🗼 東京 ' + NFD("é")


def test_edits_come_back_as_they_were(tmp_path: Path) -> None:
    edits = [
        ROME,
        Edit(ODD, ODD, ODD, ODD, relation_id="P1"),
        Edit("Norr of Norr is", "Norr", "Velt", subject_start=8),
    ]
    path = tmp_path / "edits.jsonl"
    write_edits(path, edits)
    assert [case.edits[0] for case in read_cases(path)[0]] == edits
    assert path.read_bytes().count(b"\n") == len(edits)
    assert "null" not in path.read_text("utf-8")


def test_cases_come_back_as_they_were(tmp_path: Path) -> None:
    queries = (
        Query("rewrite/0", "rewrite", ODD, "Rome", "Paris", (("Rome", ODD), ("Roma",)), "all"),
        Query("generation/0", "generation", "France"),
    )
    cases = [
        Case("one", (ROME, OTHER), queries, "hand", {"relation": None, "flags": ["newline"], "deep": {"x": [None, 1]}}),
        Case(ODD, (), ()),
    ]
    path = tmp_path / "cases.jsonl"
    write_cases(path, cases)
    assert [case_from(record, "") for _, record in read_json_rows(path)] == cases
    assert path.read_bytes().count(b"\n") == len(cases)


EDIT = {"prompt": "{} is", "subject": "France", "target_new": "big"}
QUERY = {"id": "rewrite/0", "axis": "rewrite", "prompt": "France is"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "{} is", "subject": "France"}, "row 2: field 'target_new' is missing; found: prompt, subject"),
        ({**EDIT, "subject": 5}, "row 2: field 'subject' must be text, found int (5)"),
        ({**EDIT, "subject": ""}, "row 2: field 'subject' is empty"),
        ({**EDIT, "subject_start": 0}, "row 2: edit of 'France': '{}' says where the subject is; leave subject_st"),
    ],
)
def test_a_malformed_edit_is_named_by_row_and_field(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(EDIT) + "\n" + json.dumps(record))
    with pytest.raises(MalformedFile) as caught:
        read_cases(path, "edits")
    assert f"{path}, {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "c", "edits": []}, "row 1: field 'queries' is missing; found: id, edits"),
        ({"edits": [], "queries": []}, "row 1: field 'id' is missing"),
        ({"id": 4, "edits": [], "queries": []}, "row 1: case 4: id must be text, found int (4)"),
        ({"id": "c", "edits": {}, "queries": []}, "row 1: field 'edits' must be list, found dict"),
        ({"id": "c", "edits": ["x"], "queries": []}, "row 1, edits[0]: expected an object, found str"),
        ({"id": "c", "edits": [EDIT, {**EDIT, "prompt": ""}], "queries": []}, "row 1, edits[1]: edit of 'France': the"),
        ({"id": "c", "edits": [EDIT], "queries": [{"id": "q", "axis": "rewrite"}]}, "queries[0]: field 'prompt' is mi"),
        ({"id": "c", "edits": [], "queries": [{**QUERY, "answers": ["x"]}]}, "queries[0]: query 'rewrite/0': answers"),
        ({"id": "c", "edits": [], "queries": [{**QUERY, "gold": "x"}]}, "queries[0]: 1 unknown field (gold); known"),
        ({"id": "c", "edits": [], "queries": [QUERY, QUERY]}, "row 1: case 'c': two queries share the id"),
        ({"id": "c", "edits": [], "queries": [], "meta": "x"}, "row 1: field 'meta' must be dict, found str"),
        ({"id": "c", "edits": [{**EDIT, "rival": "x"}], "queries": []}, "edits[0]: 1 unknown field (rival); known"),
    ],
)
def test_a_malformed_case_is_named_by_row_and_field(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(MalformedFile) as caught:
        read_cases(path, "cases")
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_what_json_does_not_have_is_refused_in_a_case(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="case 'a': meta must be JSON values"):
        write_cases(tmp_path / "a.jsonl", [Case("a", (), (), meta={"from": tmp_path})])


def test_the_hash_of_cases_is_of_what_is_written_and_takes_what_json_lacks() -> None:
    plain = Case("a", (Edit("{} is in", "Rome", "Peru"),), (), meta={"n": (1, float("nan")), "1": None})
    assert cases_hash([plain]) == hashlib.sha256(json.dumps([case_record(plain)]).encode()).hexdigest()
    one, same, other = (
        Case("a", (), (), meta={"on": date(2026, 1, day), "tags": set(tags), "pairs": {(1, 2): 3}})
        for day, tags in ((1, "abcdefgh"), (1, "hgfedcba"), (2, "abcdefgh"))
    )
    assert cases_hash([one]) == cases_hash([same]) != cases_hash([other])


def test_one_edit_or_query_in_place_of_a_list_is_refused_in_a_case() -> None:
    edit = Edit("{} is in", "Rome", "Peru")
    with pytest.raises(InvalidEdit, match="case 'a': edits must be a list of them, found one Edit"):
        Case("a", edit, ())  # type: ignore[arg-type]
    with pytest.raises(InvalidEdit, match="case 'a': queries must be a list of them, found one Query"):
        Case("a", (edit,), Query("q", "rewrite", "Rome is in"))  # type: ignore[arg-type]


TAKES_EDITS: dict[str, Callable[[LM, Any], Any]] = {
    "probe": contrast_probe,
    "trace": causal_trace,
    "paths": paths,
    "word sets": lambda lm, given: retrieve_word_sets(given, ["a"]),
    "audit": lambda lm, given: audit(lm, lm, edits=given),
    "estimate": lambda lm, given: estimate(lm, None, given),  # type: ignore[arg-type]
    "conflicts": lambda lm, given: resolve_conflicts(given),
    "file": lambda lm, given: write_edits("unwritten", given),
}
TAKES_CASES: dict[str, Callable[[LM, Any], Any]] = {
    "file": lambda lm, given: write_cases("unwritten", given),
    "chat": lambda lm, given: in_chat(given, None),
    "contaminated": lambda lm, given: contaminated(given),
}


def test_one_in_place_of_several_and_another_kind_are_named(tiny: Callable[..., LM]) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # the tests' check of types would be first
    lm = tiny()
    edit = Edit("The capital of {} is", "France", "Rome", id="f")
    case = Case("c", (edit,), ())
    for takes in TAKES_EDITS.values():
        with pytest.raises(InvalidEdit, match=r"^one edit given where a list of them is wanted: \[edit\] \(edit 'f'"):
            takes(lm, edit)
        for given in (case, [case]):
            with pytest.raises(InvalidEdit, match=r"^Case given where an Edit is wanted; a case's own are case\.edits"):
                takes(lm, given)
    for takes in TAKES_CASES.values():
        with pytest.raises(InvalidEdit, match=r"^one case given where a list of them is wanted: \[case\] \(case 'c'"):
            takes(lm, case)
        with pytest.raises(InvalidEdit, match=r"^Edit given where a Case is wanted, edits with the queries"):
            takes(lm, [edit])
    for given in (edit, case):
        with pytest.raises(InvalidEdit, match=r"^one (edit|case) given where a list of them is wanted"):
            retcon.method("memit", for_model=lm, cases=given)
    with pytest.raises(InvalidEdit, match=r"^NoneType given where an Edit is wanted$"):
        check_edits(None)  # type: ignore[arg-type]
