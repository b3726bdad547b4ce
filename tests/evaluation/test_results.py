"""From records to a summary, by hand; records in and out of files."""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retcon.errors import MalformedFile, MissingPackage
from retcon.evaluation import Evaluation, Interval, Record, ci_case, ci_wilson
from retcon.evaluation.records import whole_model_record

FIELDS: dict[str, Any] = dict(
    when="pre", case_id="a", subject="A", axis="rewrite", query_id="rewrite/0", metric="ES", variant="cf.prob_mean"
)


def record(case: str = "a", value: float | None = 1.0, **fields: Any) -> Record:
    return Record(**{**FIELDS, "case_id": case, "subject": case.upper(), "value": value, "n": 1, **fields})


def axis(name: str, metric: str, values: dict[str, Iterable[float]], **fields: Any) -> list[Record]:
    """Records of one axis: case -> value of each of its queries."""
    return [
        record(case, value, axis=name, query_id=f"{name}/{i}", metric=metric, **fields)
        for case, found in values.items()
        for i, value in enumerate(found)
    ]


THREE = [
    *axis("rewrite", "ES", {"a": [1], "b": [1], "c": [0], "d": [1]}),
    *axis("paraphrase", "GS", {"a": [1, 0], "b": [1], "c": [0, 0, 0], "d": [1, 1]}),
    *axis("neighborhood", "LS", {"a": [1, 0, 0, 0], "b": [1]}),
]


def test_macro_means_by_hand() -> None:
    summary = Evaluation(THREE).summary()
    assert (summary.family, summary.n_cases) == ("cf", 4)
    found = {line.metric: line.pre for line in summary.lines if line.variant == "cf.prob_mean"}
    assert {metric: e.value for metric, e in found.items() if e} == pytest.approx(
        {"ES": 0.75, "GS": (0.5 + 1 + 0 + 1) / 4, "LS": (0.25 + 1) / 2}
    )
    assert {metric: (e.n, e.n_queries) for metric, e in found.items() if e} == {
        "ES": (4, 4),
        "GS": (4, 8),
        "LS": (2, 5),
    }
    assert all(line.post is None for line in summary.lines)
    assert found["GS"] is not None
    assert found["GS"].interval == ci_wilson(2.5 / 4, 4)  # so few that a normal interval would leave [0, 1]


def test_scores_come_from_unrounded_means() -> None:
    summary = Evaluation(THREE).summary()
    hm, am = summary["Score"].pre, summary["Score", "score.am"].pre
    assert hm is not None
    assert am is not None
    assert hm.value == pytest.approx(3 / (1 / 0.75 + 1 / 0.625 + 1 / 0.625))
    assert am.value == pytest.approx((0.75 + 0.625 + 0.625) / 3)
    assert hm.interval is not None
    assert hm.interval.kind == "ci.boot"
    assert hm.interval.low <= hm.value <= hm.interval.high
    assert am.interval is not None
    assert am.interval.low <= am.value <= am.interval.high


def test_without_one_part_there_is_no_score() -> None:
    summary = Evaluation([r for r in THREE if r.metric != "LS"]).summary()
    assert summary["Score", "score.hm"].pre.value is None  # type: ignore[union-attr]
    assert summary["Score", "score.am"].pre.value == pytest.approx((0.75 + 0.625) / 2)  # type: ignore[union-attr]


def test_a_part_of_nought_gives_nought() -> None:
    zero = [r for r in THREE if r.metric != "ES"] + axis("rewrite", "ES", {"a": [0], "b": [0]})
    assert Evaluation(zero).summary()["Score"].pre.value == 0  # type: ignore[union-attr]


def test_a_metric_of_several_axes_is_the_mean_over_them_inside_a_case() -> None:
    records = [*axis("locality.x", "LS", {"a": [1, 1, 1]}), *axis("locality.y", "LS", {"a": [0], "b": [1]})]
    assert Evaluation(records).summary()["LS"].pre.value == pytest.approx((0.5 + 1) / 2)  # type: ignore[union-attr]


def test_cases_that_share_a_subject_are_drawn_together_in_the_zsre_family() -> None:
    cases = [f"c{i}" for i in range(24)]

    def interval(subjects: dict[str, str]) -> Interval:
        values = {case: [float(i < 12)] for i, case in enumerate(cases)}
        records = axis("rewrite", "ES", values, variant="zsre.tok")
        records = [Record(**{**vars_of(r), "subject": subjects[r.case_id]}) for r in records]
        summary = Evaluation(records).summary()
        assert summary.family == "zsre"
        found = summary["ES"].pre
        assert found is not None
        assert found.interval is not None
        assert found.interval.kind == "ci.boot"
        return found.interval

    apart = interval({case: case for case in cases})
    together = interval({case: f"S{i // 2}" for i, case in enumerate(cases)})
    mixed = interval({case: f"S{i % 12}" for i, case in enumerate(cases)})  # each subject has one of either
    assert mixed == Interval("ci.boot", 0.5, 0.5)
    assert 0.1 < apart.half_width < together.half_width


def test_cases_are_told_apart_by_whatever_their_records_name_them_by() -> None:
    numbers = [r._replace(case_id=ord(str(r.case_id))) for r in THREE]  # type: ignore[arg-type]
    assert Evaluation(numbers).summary().lines == Evaluation(THREE).summary().lines
    nameless = [r._replace(subject=None if r.subject == "A" else "None") for r in THREE]
    paired = [r._replace(subject="A" if r.subject == "A" else "B") for r in THREE]
    assert Evaluation(nameless).summary().lines == Evaluation(paired).summary().lines


def vars_of(r: Record) -> dict[str, Any]:
    return {name: getattr(r, name) for name in Record._fields}


def test_what_belongs_to_no_case_is_the_mean_over_the_batches_by_their_cases() -> None:
    def measured(value: float, step: int) -> Record:
        return whole_model_record("final", "perplexity", "ppl.value", value, 9, step)

    batches = {0: "abc", 1: "de", 2: "f"}
    cases = [record(case, when="final", step=step) for step, names in batches.items() for case in names]
    summary = Evaluation([*cases, measured(1.0, 0), measured(4.0, 1), measured(7.0, 2)]).summary()
    found = summary["perplexity", "ppl.value"].post
    assert found is not None
    assert found.value == pytest.approx((3 * 1 + 2 * 4 + 7) / 6)
    assert found.n_queries == 9
    for values in ([0.1], [math.inf, 0.1]):  # one is given as it is; what is no number is left out
        records = [*cases, *(measured(value, step) for step, value in enumerate(values))]
        assert Evaluation(records).summary()["perplexity", "ppl.value"].post.value == 0.1  # type: ignore[union-attr]


def test_before_and_after_with_the_paired_change_of_locality() -> None:
    before = axis("neighborhood", "LS", {"a": [1, 1], "b": [1], "c": [0]})
    after = axis("neighborhood", "LS", {"a": [1, 0], "b": [1]}, when="final")
    summary = Evaluation([*before, *after]).summary()
    change = summary["LS", "cf.ls.delta"]
    assert change.pre is None
    assert change.post is not None
    assert change.post.value == pytest.approx(-0.25)
    assert (change.post.n, change.post.interval) == (2, ci_case([-0.5, 0]))
    assert summary["LS"].pre.value == pytest.approx(2 / 3)  # type: ignore[union-attr]
    assert summary["LS"].post.value == pytest.approx(0.75)  # type: ignore[union-attr]


@pytest.mark.parametrize(("family", "kind"), [("cf.prob_mean", "ci.case"), ("zsre.tok", "ci.boot")])
def test_a_change_is_no_share_even_where_nothing_changed(family: str, kind: str) -> None:
    values: dict[str, Iterable[float]] = {f"c{i}": [1] for i in range(8)}
    both = [r for when in ("pre", "final") for r in axis("neighborhood", "LS", values, variant=family, when=when)]
    line = Evaluation(both).summary()["LS", f"{family.split('.')[0]}.ls.delta"]
    assert line.post is not None
    assert (line.post.value, line.post.interval) == (0, Interval(kind, 0, 0))


def test_locality_with_and_without_contaminated_neighbours() -> None:
    records = [
        *axis("neighborhood", "LS", {"a": [1, 1]}),
        *axis("neighborhood", "LS", {"b": [0]}, detail="contaminated; tie"),
    ]
    summary = Evaluation(records).summary()
    assert summary["LS"].pre.value == 0.5  # type: ignore[union-attr]
    clean = summary["LS", "cf.prob_mean.clean"].pre
    assert clean is not None
    assert (clean.value, clean.n, clean.n_queries) == (1, 1, 2)
    assert summary["LS"].pre.ties == 1  # type: ignore[union-attr]
    assert summary.counts["contaminated"] == summary.counts["tie"] == 1


def test_axes_without_a_key_have_their_own_name_beside_those_with_one() -> None:
    axes = [axis(name, "LS", {"a": [1]}) for name in ("locality.nq", "locality.facts", "locality")]
    lines = Evaluation([r for records in axes for r in records]).summary().lines
    assert {"LS.nq", "LS.facts", "LS.locality"} == {line.metric for line in lines if line.metric.startswith("LS.")}


def test_what_was_skipped_or_failed_is_counted_and_left_out_of_the_means() -> None:
    records = [
        record("a"),
        record("b", None, status="error", detail="NaN or infinite log-probability"),
        record("b", None, status="error", variant="cf.prob_sum", detail="NaN or infinite log-probability"),
        record("c", None, status="skipped", detail="150 tokens"),
        record("c", None, axis="generation", metric="generation", query_id="g", status="skipped", detail="no target"),
    ]
    summary = Evaluation(records).summary()
    assert (summary["ES"].pre.value, summary["ES"].pre.n) == (1, 1)  # type: ignore[union-attr]
    assert summary["ES", "cf.prob_sum"].pre.value is None  # type: ignore[union-attr]
    assert {name: n for name, n in summary.counts.items() if n} == {"error": 1, "skipped": 1}
    assert "generation" not in {line.metric for line in summary.lines}
    assert "skipped 1, error 1" in str(summary)


def test_skipped_queries_do_not_decide_the_family() -> None:
    records = [record("a", variant="zsre.tok"), record("b", None, status="skipped", detail="no target")]
    assert Evaluation(records).summary().family == "zsre"


def test_lines_can_be_asked_for_by_name() -> None:
    summary = Evaluation(THREE).summary()
    assert summary["ES"] is summary["ES", "cf.prob_mean"]
    assert summary["Score"] is summary["Score", "score.hm"]
    assert summary.get("EA") is None
    assert summary.get("ES") is summary["ES"]
    with pytest.raises(KeyError, match=r"no metric EA cf\.prob_mean; measured: Score score\.hm, Score score\.am, ES"):
        summary["EA"]
    with pytest.raises(KeyError, match=r"no metric ES gen\.em; measured"):
        summary["ES", "gen.em"]
    assert Evaluation([]).summary().lines == ()


def test_the_score_and_the_familys_own_metrics_come_first() -> None:
    more = [
        *axis("rewrite", "EA", {"a": [1]}, variant="cf.all_correct"),
        *axis("rewrite", "ES", {"a": [1]}, variant="gen.em"),
        *axis("two_hop", "two_hop", {"a": [1]}),
        *axis("rewrite", "EM", {"a": [0.5]}, variant="cf.magnitude"),
    ]
    lines = Evaluation([*more, *THREE]).summary().lines
    assert [(line.metric, line.variant) for line in lines] == [
        ("Score", "score.hm"),
        ("Score", "score.am"),
        ("ES", "cf.prob_mean"),
        ("GS", "cf.prob_mean"),
        ("LS", "cf.prob_mean"),
        ("two_hop", "cf.prob_mean"),
        ("ES", "gen.em"),
        ("EA", "cf.all_correct"),
        ("EM", "cf.magnitude"),
    ]


def test_the_table() -> None:
    side = axis("rewrite", "EM", {"a": [0.5]}, variant="cf.magnitude")
    aside = axis("rewrite", "ES", {"a": [0.5]}, variant="zsre.tok")
    after = axis("rewrite", "ES", {"a": [1], "b": [0]}, when="final")
    summary = Evaluation([*THREE, *side, *aside, *after]).summary()
    lines = str(summary).splitlines()
    assert lines[0] == "4 cases, values x100 with 95 % intervals"
    assert lines[1].split() == ["metric", "variant", "pre", "post", "cases", "queries", "interval"]
    assert next(line for line in lines if line.startswith("ES")).split() == [
        *("ES", "cf.prob_mean", "75.0", "[30.1,", "95.4]", "50.0", "[9.5,", "90.5]", "2", "2", "ci.wilson"),
    ]
    assert "cf.magnitude" not in str(summary)
    assert "zsre.tok" not in str(summary)
    assert "cf.magnitude" in summary.table(everything=True)
    assert "zsre.tok" in summary.table(everything=True)
    assert "post" not in str(Evaluation(THREE).summary())


def test_the_summary_as_plain_values() -> None:
    plain = json.loads(json.dumps(Evaluation(THREE).summary().as_dict()))
    assert plain["n_cases"] == 4
    assert plain["lines"][2]["metric"] == "ES"
    assert plain["lines"][2]["pre"]["value"] == 0.75
    assert plain["lines"][2]["pre"]["interval"]["kind"] == "ci.wilson"


def test_the_seed_of_the_context_is_the_bootstraps() -> None:
    def low(seed: int) -> Any:
        return Evaluation(THREE, {"seed": seed}).summary(n_resamples=200)["Score"].pre

    assert low(1) == low(1)
    assert low(1) != low(2)


# --- files ---------------------------------------------------------------------------------------------------------

CONTEXT = {"model": "m@0123", "method": "jeep", "seed": 3, "n_edits": 4}


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    odd = [record("b\u2028", None, status="error", detail="Łódź\x85")]
    written = Evaluation([*THREE, *odd], CONTEXT)
    path = tmp_path / "records.jsonl"
    written.write(path)
    read = Evaluation.read(path)
    assert read.records == written.records
    assert read.context == CONTEXT
    assert read.summary() == written.summary()
    row = json.loads(path.read_text("utf-8").split("\n")[0])
    assert row == {"schema": 1, **CONTEXT, **vars_of(THREE[0])}


def test_no_number_that_json_lacks_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan is no JSON"):
        Evaluation([record("a", math.nan)]).write(tmp_path / "records.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(schema=2), "row 2: schema 2, this version reads 1"),
        (dict(schema=None), "row 2: field 'schema' must be int, found NoneType"),
        (dict(metric=None), "row 2: field 'metric' must be str, found None"),
        (dict(value="1"), "row 2: field 'value' must be a number or null, found '1'"),
        (dict(n=0.5), "row 2: field 'n' must be int, found 0.5"),
        (dict(when="later"), "row 2: field 'when' must be pre or immediate or checkpoint or final, found 'later'"),
        (dict(status="fine"), "row 2: field 'status' must be ok or skipped or error, found 'fine'"),
        (dict(method="rome"), "row 2: of another run than the rows above (method); one file holds one run"),
    ],
)
def test_malformed_records_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Evaluation(THREE[:2], CONTEXT).write(path)
    first, second = path.read_text("utf-8").splitlines()
    path.write_text(first + "\n" + json.dumps({**json.loads(second), **change}))
    with pytest.raises(MalformedFile) as caught:
        Evaluation.read(path)
    assert str(caught.value).startswith(f"{path}, {message}")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Evaluation(THREE[:1], CONTEXT).write(path)
    for name in ("schema", "when", "case_id", "subject", "axis", "query_id", "metric", "variant", "value", "n"):
        row = {k: v for k, v in json.loads(path.read_text("utf-8")).items() if k != name}
        other = tmp_path / "other.jsonl"
        other.write_text(json.dumps(row))
        with pytest.raises(MalformedFile, match=f"row 1: field '{name}' is missing"):
            Evaluation.read(other)


def test_an_evaluation_does_not_flood_the_screen() -> None:
    assert repr(Evaluation([], {})) == "Evaluation(0 records of 0 cases; print(evaluation.summary()) for the figures)"


def test_many_cases_away_from_the_bounds_keep_the_published_interval() -> None:
    values = {f"c{i}": [i % 2] for i in range(40)}
    found = Evaluation(axis("rewrite", "ES", values)).summary()["ES"].pre
    assert found is not None
    assert found.interval == ci_case([float(v[0]) for v in values.values()])


def test_shares_near_their_bounds_have_an_interval_within_them() -> None:
    records = axis("rewrite", "ES", {f"c{i}": [1] for i in range(40)})
    found = Evaluation(records).summary()["ES"].pre
    assert found is not None
    assert found.interval == ci_wilson(1.0, 40)
    assert found.percent() == "100.0 [91.2, 100.0]"
    ours = [replace_subject(r, "S") for r in records]  # forty cases about one subject are one observation
    assert Evaluation(ours).summary()["ES"].pre.interval == ci_wilson(1.0, 1)  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", ["flu.new.re", "flu.easyedit.nltk", "cons.tfidf", "cf.magnitude", "loc.kl"])
def test_what_is_no_share_keeps_its_own_interval(variant: str) -> None:
    bits = {f"c{i}": [0.9] for i in range(8)}
    records = [*axis("rewrite", "ES", bits), *axis("rewrite", "other", bits, variant=variant)]
    found = Evaluation(records).summary()
    assert found["ES"].pre.interval.kind == "ci.wilson"  # type: ignore[union-attr]
    assert found["other", variant].pre.interval == ci_case([0.9] * 8)  # type: ignore[union-attr]


def replace_subject(record: Record, subject: str) -> Record:
    return record._replace(subject=subject)


def test_notebooks_get_a_table() -> None:
    evaluation = Evaluation([*THREE, record("<a>", None, n=0, status="skipped", detail="its 5 < 6 tokens")])
    text = evaluation._repr_html_()
    assert text == evaluation.summary()._repr_html_()
    assert text.startswith("<table><caption>")
    assert "<td>75.0 [30.1, 95.4]</td>" in text
    assert "not asked: &lt;a&gt;, rewrite/0 (its 5 &lt; 6 tokens)" in text


def test_records_as_a_pandas_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows, columns: seen.update(r=rows)))
    Evaluation(THREE, {"model": "m"}).frame()
    assert seen["r"][0] == {"model": "m", **THREE[0]._asdict()}
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackage, match=r"frame\(\) needs pandas"):
        Evaluation(THREE).frame()
