"""Loaders on invented files with every kind of dirt, and on the real file where it is at hand."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from retcon.edits import Case, Edit, Query, resolve_conflicts, write_cases
from retcon.errors import ConflictingEdits, InvalidSetting, MalformedFile, RetconError, UnusableRow
from retcon.evaluation import contaminated, evaluate, read_cases
from retcon.evaluation.datasets import Loaded
from retcon.lm.model import LM

FIXTURES = Path(__file__).parents[1] / "fixtures"
NATIVE, FLAT = FIXTURES / "counterfact.json", FIXTURES / "counterfact-flat.json"
ZSRE, OWN = FIXTURES / "zsre.json", FIXTURES / "cases.jsonl"
read: Callable[..., Loaded] = partial(read_cases, on_error="skip")
"""The fixtures hold rows that cannot be used."""
REAL = Path(__file__).parents[3] / "shared" / "data" / "counterfact-edit.json"


def flags(cases: list[Case]) -> dict[str, list[str]]:
    return {case.id: case.meta["flags"] for case in cases if case.meta["flags"]}


def queries(case: Case, axis: str) -> list[Query]:
    return [query for query in case.queries if query.axis == axis]


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """rows(*objects) -> path of a JSON list."""

    def write(*objects: Any) -> Path:
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(list(objects)), "utf-8")
        return path

    return write


# --- CounterFact, native -------------------------------------------------------------------------------------------


def test_native_counts() -> None:
    cases, report = read(NATIVE)
    assert (report.format, report.rows, report.cases) == ("counterfact", 10, 7)
    assert report.dropped == {"conflict": 1, "empty_target": 1, "subject_missing": 1}
    assert report.dropped_queries == {"empty_target": 1, "empty_prompt": 1}
    assert report.flags == {
        "braces": 1,
        "contaminated": 1,
        "double_space": 1,
        "newline": 1,
        "noop_edit": 1,
        "paraphrase_is_prompt": 1,
        "repeated_question": 1,
        "repeated_subject": 2,
        "subject_twice": 1,
        "target_whitespace": 1,
        "trailing_whitespace": 1,
    }
    assert report.options == {"start": 0, "limit": None, "conflicts": "drop", "on_error": "skip", "case_target": "new"}
    assert flags(cases) == {
        "107": ["braces", "double_space", "newline"],
        "108": ["contaminated", "subject_twice"],
        "110": ["repeated_question", "repeated_subject"],
        "111": ["repeated_subject"],
        "113": ["noop_edit", "target_whitespace"],
        "8": ["paraphrase_is_prompt", "trailing_whitespace"],
    }


def test_native_fields() -> None:
    case = read(NATIVE)[0][0]
    assert (case.id, case.dataset) == ("107", "counterfact")
    assert case.edits == (Edit("{} was trained as a", "Ada Quill", "baker", "surgeon", id="107", relation_id="P106"),)
    assert case.meta["row"] == 0
    assert case.meta["extra"] == {"pararel_idx": 901}
    assert (case.meta["relation_id"], case.meta["target_new_id"], case.meta["target_true_id"]) == ("P106", "Q1", "Q2")
    assert [query.id for query in case.queries] == [
        "rewrite/0",
        *(f"paraphrase/{i}" for i in range(2)),
        *(f"neighborhood/{i}" for i in range(3)),
        *(f"attribute/{i}" for i in range(2)),
        *(f"generation/{i}" for i in range(3)),
    ]
    wanted = (("baker",),)
    assert case.queries[0] == Query(
        "rewrite/0", "rewrite", "Ada Quill was trained as a", "baker", "surgeon", answers=wanted
    )
    assert case.queries[1].prompt == "The ferry was late again.\nAda Quill earns a living as a"
    assert case.queries[2].prompt == '{| class="wikitable" |}  The work of Ada Quill is that of a'
    neighbour = queries(case, "neighborhood")[0]
    assert (neighbour.target, neighbour.contrast, neighbour.answers) == ("surgeon", "baker", (("surgeon",),))
    assert {(query.target, query.answers) for query in queries(case, "attribute")} == {(None, wanted)}
    assert {(query.target, query.answers) for query in queries(case, "generation")} == {(None, ())}


def test_native_rows_that_are_unusual() -> None:
    cases = {case.id: case for case in read(NATIVE)[0]}
    twice = cases["108"].edits[0]
    assert twice.text == "Norr is a town; the mayor of Norr was born in"
    assert twice.subject_span == (0, 4)
    assert cases["108"].meta["contaminated"] == ["neighborhood/0"]
    assert cases["113"].edits[0].target_new == "Śląsk"
    assert queries(cases["113"], "neighborhood")[0].prompt == "東京 🗼 lies in"
    plain = cases["8"]  # no case_id: the row's index; no true answer: nothing to compare with, nothing for neighbours
    assert plain.meta["extra"] == {"source": "by hand"}
    assert [(q.prompt, q.contrast) for q in plain.queries] == [("Olga Marsh speaks", None)] * 2
    assert [q.id for q in cases["116"].queries] == ["rewrite/0", "paraphrase/1"]


def test_conflict_rules() -> None:
    kept = {rule: [c.id for c in read(NATIVE, conflicts=rule)[0]] for rule in ("drop", "last", "keep")}  # type: ignore[arg-type]
    assert "109" not in kept["drop"]
    assert kept["last"] == kept["drop"]  # the row before and the row after it want the same
    assert kept["keep"] == ["107", "108", "109", "110", "111", "113", "8", "116"]
    cases, report = read(NATIVE, conflicts="keep")
    assert [c.id for c in cases if "conflict" in c.meta["flags"]] == ["107", "109", "110"]
    assert report.flags["conflict"] == 3
    assert report.dropped == {"empty_target": 1, "subject_missing": 1}
    with pytest.raises(ConflictingEdits, match="edits '107' and '109' contradict each other"):
        read(NATIVE, conflicts="error")


def test_loading_twice_gives_equal_objects_in_the_files_order() -> None:
    for path in (NATIVE, FLAT, ZSRE, OWN):
        once, twice = read(path), read(path)
        assert once == twice
        places = [case.meta["row"] for case in once[0] if "row" in case.meta]
        assert places == sorted(places)


# --- CounterFact, flat ---------------------------------------------------------------------------------------------


def test_flat_counts() -> None:
    cases, report = read(FLAT)
    assert (report.format, report.rows, report.cases) == ("counterfact-flat", 10, 7)
    assert report.dropped == {"conflict": 1, "empty_target": 1, "marker_in_prompt": 1}
    assert report.dropped_queries == {"empty_prompt": 1, "empty_target": 1}
    assert report.flags == {
        "braces": 1,
        "contaminated": 1,
        "double_space": 1,
        "newline": 1,
        "noop_edit": 1,
        "paraphrase_is_prompt": 1,
        "repeated_question": 1,
        "repeated_subject": 2,
        "subject_twice": 1,
        "target_whitespace": 1,
        "trailing_whitespace": 1,
    }
    assert flags(cases) == {
        "107": ["newline"],
        "108": ["braces", "contaminated", "double_space", "subject_twice"],
        "110": ["repeated_question", "repeated_subject"],
        "111": ["paraphrase_is_prompt", "repeated_subject"],
        "113": ["noop_edit", "target_whitespace"],
        "115": ["trailing_whitespace"],
    }


def test_flat_rows() -> None:
    cases = {case.id: case for case in read(FLAT)[0]}
    assert [query.id for query in cases["107"].queries] == ["rewrite/0", "paraphrase/0", "neighborhood/0"]
    neighbour = cases["107"].queries[2]
    assert (neighbour.target, neighbour.contrast) == ("surgeon", "baker")
    decomposed, folded = cases["113"].edits[0], cases["114"].edits[0]
    start, end = decomposed.require_subject_span()
    assert decomposed.text[start:end] == "Zoe\u0308"
    assert decomposed.target_true == "jura"
    assert folded.subject_span == (0, 12)
    assert (folded.target_new, folded.target_true) == ("Bern", None)
    assert cases["115"].meta["extra"] == {"note": {"by": "hand"}}
    assert [query.id for query in cases["115"].queries] == ["rewrite/0"]
    assert cases["115"].queries[0].prompt == "The physician was born in"


@pytest.mark.skipif(not REAL.exists(), reason="the flat CounterFact file (shared/data beside the repository) is absent")
def test_the_published_flat_file() -> None:
    cases, report = read(REAL, conflicts="keep")
    assert (report.rows, report.cases) == (10_000, 10_000)
    assert report.dropped == report.dropped_queries == {}
    assert report.flags == {
        "braces": 1,
        "conflict": 143,
        "contaminated": 214,
        "double_space": 29,
        "newline": 262,
        "paraphrase_is_prompt": 15,
        "repeated_question": 83,
        "repeated_subject": 413,
    }
    assert {len(case.queries) for case in cases} == {3}
    kept = resolve_conflicts([case.edits[0] for case in cases], "drop")
    assert len(kept) == 9_921


REAL_ZSRE = REAL.with_name("zsre-mend-1k.json")


@pytest.mark.skipif(not REAL_ZSRE.exists(), reason="1,000 rows of zsRE (shared/data beside the repository) are absent")
def test_the_published_zsre_file() -> None:
    cases, report = read_cases(REAL_ZSRE)
    assert (report.rows, report.cases, report.unknown) == (1000, 1000, {})
    assert {edit.subject is None for case in cases for edit in case.edits} == {False}
    with pytest.raises(UnusableRow, match="row 535: the answer to write is empty"):
        read_cases(REAL_ZSRE, case_target="alt")
    report = read_cases(REAL_ZSRE, case_target="alt", on_error="skip")[1]
    assert [(r.row, r.reason) for r in report.left_out] == [(535, "empty_target"), (724, "empty_target")]
    assert (report.flags["noop_edit"], report.flags["several_answers"]) == (21, 22)


# --- zsRE ----------------------------------------------------------------------------------------------------------


def test_zsre_counts() -> None:
    cases, report = read(ZSRE)
    assert (report.format, report.rows, report.cases) == ("zsre", 6, 5)
    assert report.dropped == {"empty_target": 1}
    assert report.dropped_queries == {"empty_target": 1}
    assert report.flags == {
        "paraphrase_is_prompt": 1,
        "repeated_question": 1,
        "repeated_subject": 2,
        "several_answers": 1,
        "subject_twice": 1,
    }
    assert report.options["case_target"] == "new"
    assert report.options["prompt_style"] == "loc.nq_q"
    assert {edit.target_true for case in cases for edit in case.edits} == {None}
    several = cases[2]
    assert several.edits[0].target_new == "River Sel"
    assert several.queries[0].answers == (("River Sel",), ("the Sel",), ("Sel",))
    assert several.queries[0].contrast is None
    long = queries(cases[1], "locality.nq")[0].target
    assert long is not None
    assert len(long.split()) == 26
    assert queries(cases[3], "locality.nq") == []


def test_zsre_with_the_sampled_wrong_answer() -> None:
    cases, report = read(ZSRE, case_target="alt")
    assert (report.rows, report.cases) == (6, 4)
    assert report.dropped == {"conflict": 1, "empty_target": 1}
    assert report.flags == {"noop_edit": 1, "repeated_subject": 1, "subject_twice": 1, "target_whitespace": 1}
    assert flags(cases) == {"0": ["target_whitespace"], "1": ["repeated_subject"], "3": ["noop_edit", "subject_twice"]}
    assert cases[0].edits[0].target_new == "Upper Tarn"


def test_the_target_changes_nothing_but_targets() -> None:
    def without_targets(cases: list[Case]) -> list[Any]:
        edits = [replace(case.edits[0], target_new="x") for case in cases]
        asked = [[replace(q, target="x", answers=()) for q in c.queries if q.axis != "locality.nq"] for c in cases]
        return [edits, asked, [queries(case, "locality.nq") for case in cases]]

    both = {c.id for c in read(ZSRE, conflicts="keep")[0]} & {
        c.id for c in read(ZSRE, conflicts="keep", case_target="alt")[0]
    }
    answers, alt = (
        [case for case in read(ZSRE, conflicts="keep", case_target=target)[0] if case.id in both]  # type: ignore[arg-type]
        for target in ("new", "alt")
    )
    assert without_targets(answers) == without_targets(alt)
    assert answers != alt


def test_the_prompt_style_changes_nothing_but_the_locality_text() -> None:
    def by(style: Any) -> tuple[list[str], list[Case]]:
        cases = read(ZSRE, prompt_style=style)[0]
        texts = [query.prompt for case in cases for query in queries(case, "locality.nq")]
        rest = [
            replace(case, queries=[replace(q, prompt="x") if q.axis == "locality.nq" else q for q in case.queries])  # type: ignore[arg-type]
            for case in cases
        ]
        return texts, rest

    styles = {style: by(style) for style in ("loc.nq_q", "loc.nq", "loc.plain_q")}
    assert {style: texts[0] for style, (texts, _) in styles.items()} == {
        "loc.nq_q": "nq question: who wrote the marsh king?",
        "loc.nq": "nq question: who wrote the marsh king",
        "loc.plain_q": "who wrote the marsh king?",
    }
    assert all(text.startswith("nq question: ") and text.endswith("?") for text in styles["loc.nq_q"][0])
    rest = [cases for _, cases in styles.values()]
    assert rest[0] == rest[1] == rest[2]


@pytest.mark.parametrize("loc", ["诺尔在哪里？", "أين نور؟", "where is norr?"])
def test_a_locality_question_gets_no_second_question_mark(loc: str, rows: Callable[..., Path]) -> None:
    row = {"subject": "Norr", "src": "Who leads Norr?", "answers": ["Ida"], "loc": loc, "loc_ans": "x"}
    assert queries(read(rows(row))[0][0], "locality.nq")[0].prompt == loc


@pytest.mark.parametrize("setting", [dict(case_target="pred"), dict(prompt_style="nq")])
def test_unknown_zsre_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=r"unknown .* '(pred|nq)'; known: (new, alt|loc.nq_q, loc.nq)"):
        read(ZSRE, **setting)


def test_the_first_answer_that_is_not_blank_counts(rows: Callable[..., Path]) -> None:
    blanks = {"alt": ["  ", "Rhine", "Elbe"], "answers": ["", "River Sel"], "loc_ans": [[], ["", "Ida"]]}
    path = rows({**GOOD_ZSRE, **blanks})
    for target, wanted in (("alt", "Rhine"), ("new", "River Sel")):
        case = read(path, case_target=target)[0][0]  # type: ignore[arg-type]
        assert (case.edits[0].target_new, case.queries[2].target) == (wanted, "Ida")


# --- our own -------------------------------------------------------------------------------------------------------


def test_own_counts() -> None:
    cases, report = read(OWN)
    assert (report.format, report.rows, report.cases) == ("cases", 4, 3)
    assert report.dropped == {"conflict": 1}
    assert report.dropped_queries == {"empty_target": 1}
    assert report.flags == {
        "braces": 1,
        "contaminated": 1,
        "double_space": 1,
        "newline": 1,
        "noop_edit": 1,
        "noted": 1,
        "paraphrase_is_prompt": 1,
        "repeated_subject": 1,
        "trailing_whitespace": 2,
    }
    # `ada` came with the flags conflict and contaminated (another query) from the set it once belonged to
    assert flags(cases) == {
        "ada": ["contaminated", "noted", "trailing_whitespace"],
        "pair": ["repeated_subject"],
        "lost": [
            "braces",
            "double_space",
            "newline",
            "noop_edit",
            "paraphrase_is_prompt",
            "trailing_whitespace",
        ],
    }
    assert cases[0].meta["contaminated"] == ["neighborhood/1"]
    assert cases[0].meta["relation"] == "job"
    assert cases[0].queries[1].prompt.rstrip() == "Tom Reed was trained as a"  # whose end is kept as it is
    assert cases[0].queries[-1].answers == (("bakery", "a bakery"), ("shop",))
    assert cases[0].queries[-1].answers_mode == "all"
    assert [case.dataset for case in cases] == ["hand", "cases", "hand"]


def test_a_case_goes_when_any_of_its_edits_does() -> None:
    cases, report = read(OWN, conflicts="last")
    assert [case.id for case in cases] == ["ada", "rival", "lost"]
    assert report.dropped == {"conflict": 1}


@pytest.mark.parametrize("path", [NATIVE, FLAT, ZSRE])
def test_loaded_cases_survive_being_written(path: Path, tmp_path: Path) -> None:
    cases = read(path, conflicts="keep")[0]
    file = tmp_path / "cases.jsonl"
    write_cases(file, cases)
    assert read_cases(file, conflicts="keep")[0] == cases


# --- any format ----------------------------------------------------------------------------------------------------


def test_formats_are_told_apart() -> None:
    assert [read(path)[1].format for path in (NATIVE, FLAT, ZSRE, OWN)] == [
        "counterfact",
        "counterfact-flat",
        "zsre",
        "cases",
    ]
    assert read(OWN, "cases") == read(OWN)
    with pytest.raises(InvalidSetting, match="unknown format 'csv'; known: mquake, counterfact, ripple"):
        read(OWN, "csv")
    for setting in ("case_target", "prompt_style", "answers", "prompting"):
        with pytest.raises(InvalidSetting, match=f"unknown {setting} 'other'; known: "):
            read(OWN, **{setting: "other"})
    with pytest.raises(
        MalformedFile, match=r"zsre\.json, row 1: field 'requested_rewrite' is missing.*read as counter"
    ):
        read_cases(ZSRE, "counterfact")


def test_a_part_of_the_rows() -> None:
    cases, report = read(NATIVE, start=2, limit=3)
    assert [case.id for case in cases] == ["109", "111"]  # alone, 109 comes first
    assert (report.rows, report.dropped) == (3, {"conflict": 1})
    assert cases[0].meta["row"] == 2
    assert read(NATIVE, limit=0)[0] == []
    assert read(NATIVE, start=99)[1].rows == 0
    with pytest.raises(InvalidSetting, match="start and limit must not be negative, found -1 and None"):
        read(NATIVE, start=-1)


def test_the_report_reads_as_one_line() -> None:
    text = str(read(ZSRE, case_target="alt")[1])
    assert "\n" not in text
    assert "zsre.json (zsre, case_target=alt, sha256 " in text
    assert "4 of 6 rows kept; dropped: conflict 1, empty_target 1; queries dropped: empty_target 1; flagged: " in text


def test_the_report_tells_files_apart(rows: Callable[..., Path]) -> None:
    row = json.loads(FLAT.read_text("utf-8"))[0]
    one = read(rows(row))[1].sha256
    assert one != read(rows({**row, "subject": "Quill"}))[1].sha256
    assert len(one) == 64


def test_contamination_is_judged_on_the_cases_given() -> None:
    cases = read(NATIVE)[0]
    assert contaminated(cases) == {"108": ["neighborhood/0"]}
    assert contaminated(cases[1:]) == {}
    edit = Edit("{} died in", "Zoë", "Bern", id="z")
    asked = Query("locality.x/0", "locality.x", "Zoe\u0308 died in ", "Bern")
    assert contaminated([Case("z", (edit,), (asked, Query("r", "rewrite", "Zoë died in", "Bern")))]) == {
        "z": ["locality.x/0"]
    }


# --- malformed -----------------------------------------------------------------------------------------------------

GOOD_NATIVE = json.loads(NATIVE.read_text("utf-8"))[0]
GOOD_FLAT = json.loads(FLAT.read_text("utf-8"))[0]
GOOD_ZSRE = json.loads(ZSRE.read_text("utf-8"))[0]


def inside(**fields: Any) -> dict[str, Any]:
    return {**GOOD_NATIVE, "case_id": 1, "requested_rewrite": {**GOOD_NATIVE["requested_rewrite"], **fields}}


def less(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (GOOD_NATIVE, {"case_id": 1}, "row 2: field 'requested_rewrite' is missing; found: case_id"),
        (GOOD_NATIVE, {"requested_rewrite": "x"}, "row 2: field 'requested_rewrite' must be dict, found str"),
        (GOOD_NATIVE, inside(subject=""), "row 2: field 'subject' is empty"),
        (GOOD_NATIVE, inside(subject=5), "row 2, requested_rewrite: field 'subject' must be str, found int"),
        (GOOD_NATIVE, inside(target_new={"id": "Q1"}), "row 2, requested_rewrite, target_new: field 'str' is missing"),
        (GOOD_NATIVE, inside(target_true=5), "field 'target_true' must be text or a list of texts, found int"),
        (GOOD_NATIVE, inside(prompt="{} and {}"), "row 2: edit '1': 2 markers '{}' in the prompt"),
        (GOOD_NATIVE, inside(relation_id=106), "row 2: edit '1': relation_id must be text, found int (106)"),
        (GOOD_NATIVE, {**inside(), "paraphrase_prompts": [3]}, "row 2: field 'paraphrase_prompts' must be text or"),
        (
            GOOD_NATIVE,
            {**GOOD_NATIVE, "paraphrase_prompts": []},
            "row 2: the same fact as row 1 (id '107'), with other queries",
        ),
        (GOOD_FLAT, less(GOOD_FLAT, "subject"), "row 2: field 'subject' is missing"),
        (GOOD_FLAT, less(GOOD_FLAT, "target_new"), "row 2: field 'target_new' is missing"),
        (GOOD_FLAT, {**GOOD_FLAT, "prompt": " "}, "row 2: edit '107': the prompt is empty"),
        (GOOD_FLAT, {**GOOD_FLAT, "ground_truth": {"a": 1}}, "row 2: field 'ground_truth' must be text or a list"),
        (GOOD_FLAT, {**GOOD_FLAT, "case_id": 1, "subject": "\t"}, "row 2: field 'subject' is empty"),
        (GOOD_ZSRE, less(GOOD_ZSRE, "answers"), "row 2: field 'answers' is missing"),
        (GOOD_ZSRE, less(GOOD_ZSRE, "src"), "row 2: field 'src' is missing"),
        (GOOD_ZSRE, {**GOOD_ZSRE, "loc": 5}, "row 2: field 'loc' must be text or a list of texts, found int"),
        (GOOD_ZSRE, [GOOD_ZSRE], "row 2: expected an object, found list"),
    ],
)
def test_a_malformed_row_is_named(good: Any, bad: Any, message: str, rows: Callable[..., Path]) -> None:
    path = rows(good, bad)
    with pytest.raises(MalformedFile) as caught:
        read_cases(path)
    assert f"{path}, {message}" in str(caught.value) or (
        str(path) in str(caught.value) and message in str(caught.value)
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", "[1]", "subject\tprompt", '{"a": 1}', '[{"a": 1}]', "[", '"text"'])
@pytest.mark.parametrize("format", [None, "counterfact", "zsre", "cases"])
def test_other_files_give_one_clear_error(content: str, format: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(MalformedFile, match=r"rows\.json"):
        read_cases(path, format)


def test_an_unknown_format_lists_what_is_known(rows: Callable[..., Path]) -> None:
    with pytest.raises(MalformedFile, match=r"no known format; the rows have the fields color, answer\. Known: mquake"):
        read(rows({"color": "x", "answer": "y"}))


def test_every_error_is_ours(rows: Callable[..., Path]) -> None:
    for bad in (None, 5, True, "", " ", [], [None], {}, {"str": None}, [["x"], 3], "\ud800"):
        spoilt = [{**good, name: bad} for good in (GOOD_NATIVE, GOOD_FLAT, GOOD_ZSRE) for name in good]
        spoilt += [inside(**{name: bad}) for name in GOOD_NATIVE["requested_rewrite"]]
        for row in spoilt:
            with suppress(RetconError):
                read_cases(rows(row))
            with suppress(RetconError):
                read(rows(row))


# --- two files of one fact -----------------------------------------------------------------------------------------


def test_flat_and_native_rows_of_one_fact_give_the_same_rewrite_records(tiny: Callable[..., LM]) -> None:
    lm = tiny(n_layers=1)
    found = []
    for path in (NATIVE, FLAT):
        case = read(path, limit=1)[0]
        records = [r for r in evaluate(lm, case).records if r.axis == "rewrite"]
        found.append([(r.case_id, r.subject, r.query_id, r.metric, r.variant, r.value, r.n, r.detail) for r in records])
    assert len(found[0]) == 10
    for native, flat in zip(*found, strict=True):
        assert native == pytest.approx(flat)
