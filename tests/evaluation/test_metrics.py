"""Metrics as pure functions of scores and texts."""

import math
import re
import string

import pytest

from retcon.edits import Query
from retcon.evaluation.metrics import (
    Measured,
    accepted,
    accuracy,
    agreement,
    compare,
    gen_contains,
    gen_em,
    gen_prefix,
    is_locality,
    macro,
    matches,
    metric_names,
    normalise,
    score_am,
    score_hm,
)
from retcon.evaluation.score import TokenScore


def scored(*logp: float, right: bool = True) -> TokenScore:
    ids = tuple(range(len(logp)))
    return TokenScore(logp, ids if right else tuple(i + 1 for i in ids), ids)


def by_variant(found: list[Measured]) -> dict[str, float | None]:
    return {m.variant: m.value for m in found}


# --- teacher forcing -----------------------------------------------------------------------------------------------


def test_mean_and_sum_disagree_where_answers_differ_in_length() -> None:
    new, true = scored(-0.2, -1.4), scored(-0.9)
    found = by_variant(compare("rewrite", new, true))
    assert found["cf.prob_mean"] == 1
    assert found["cf.prob_sum"] == 0
    assert found["cf.magnitude"] == pytest.approx(0.0428, abs=5e-5)
    assert found["cf.magnitude"] == pytest.approx(math.exp(-0.8) - math.exp(-0.9))


def test_swapping_the_answers_gives_the_complement() -> None:
    one, two = scored(-0.2, -1.4), scored(-0.9)
    for axis in ("rewrite", "paraphrase", "neighborhood"):
        there, back = by_variant(compare(axis, one, two)), by_variant(compare(axis, two, one))
        for variant in ("cf.prob_mean", "cf.prob_sum"):
            assert there[variant] + back[variant] == 1  # type: ignore[operator]
        assert there["cf.magnitude"] == pytest.approx(-back["cf.magnitude"])  # type: ignore[operator]


def test_ties_fail_and_are_marked() -> None:
    found = {m.variant: m for m in compare("neighborhood", scored(-0.5, -0.5), scored(-0.5, -0.5))}
    for variant in ("cf.prob_mean", "cf.prob_sum"):
        assert found[variant].value == 0
        assert found[variant].note == "tie"
    assert found["cf.magnitude"].value == 0
    assert not any(m.note for m in compare("rewrite", scored(-0.5), scored(-0.6)))


def test_metrics_go_by_the_axis() -> None:
    assert metric_names("rewrite") == ("ES", "EM", "EA")
    assert metric_names("paraphrase") == ("GS", "PM", "PA")
    assert metric_names("neighborhood") == metric_names("locality.nq") == ("LS", "NM", "NA")
    assert metric_names("two_hop") == ("two_hop",) * 3
    assert metric_names("locality") == metric_names("neighborhood")
    axes = ("neighborhood", "locality.x", "locality", "rewrite", "localityless")
    assert [axis for axis in axes if is_locality(axis)] == ["neighborhood", "locality.x", "locality"]
    found = compare("neighborhood", scored(-0.5), scored(-0.6, -0.7))
    assert [(m.metric, m.variant, m.n) for m in found] == [
        ("LS", "cf.prob_mean", 1),
        ("LS", "cf.prob_sum", 1),
        ("NM", "cf.magnitude", 1),
        ("NA", "cf.all_correct", 1),
        ("LS", "zsre.tok", 1),
    ]


def test_token_accuracy_and_its_stricter_forms() -> None:
    found = accuracy("rewrite", TokenScore((-1.0,) * 4, (7, 9, 9, 4), (5, 9, 9, 4)))
    assert by_variant(found) == {"zsre.tok": 0.75, "zsre.seq": 0, "zsre.first": 0}
    assert {(m.metric, m.n) for m in found} == {("ES", 4)}
    assert set(by_variant(accuracy("rewrite", scored(-1.0, -2.0))).values()) == {1}
    one = by_variant(accuracy("rewrite", scored(-1.0, right=False)))
    assert one["zsre.tok"] == one["zsre.seq"] == one["zsre.first"] == 0


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_has_no_value(bad: float) -> None:
    assert set(by_variant(compare("rewrite", scored(-1.0), scored(bad))).values()) == {None}
    assert set(by_variant(compare("rewrite", scored(bad), scored(-1.0))).values()) == {None}
    assert set(by_variant(accuracy("rewrite", scored(-1.0, bad))).values()) == {None}
    good = compare("rewrite", scored(-1.0), scored(-1.0))
    lost = compare("rewrite", scored(bad), scored(-1.0))
    assert [(m.metric, m.variant) for m in good] == [(m.metric, m.variant) for m in lost]


def test_agreement() -> None:
    assert agreement((29, 234, 334), (29, 234, 333)) == pytest.approx(0.6667, abs=5e-5)
    assert agreement((1, 2), (1, 2)) == 1


# --- generated text ------------------------------------------------------------------------------------------------


def test_the_match_ignores_case_articles_punctuation_and_spaces() -> None:
    assert normalise(" The  Paris. ") == "paris"
    assert normalise("St. Louis, a city\nof the U.S.") == "st louis city of us"
    assert normalise("cafe\u0301") == normalise("CAF\u00c9")
    assert normalise("Another theatre") == "another theatre"


def test_an_a_that_ends_an_answer_is_no_article() -> None:
    answers = [["Serie A"]]
    for text in ("Serie B", "Serie", "He plays in Serie B."):
        assert not any(test(text, answers) for test in (gen_em, gen_prefix, gen_contains))
    assert gen_em("The Serie A.", answers)
    assert gen_prefix("Serie A, the league of Italy", answers)
    assert gen_contains("He plays in Serie A for Milan", answers)
    assert gen_em("a cat", [["cat"]])


def test_answers_of_nothing_but_articles_and_signs_keep_them() -> None:
    assert normalise("The The") == "the the"
    assert gen_em("the the", [["The The"]])
    assert gen_em("The The.", [["The The"]])
    assert gen_em(" A.", [["A"]])  # a blood group
    assert not gen_em("A+", [["A"]])
    assert normalise("+") == "+"
    assert normalise("...") == "..."
    assert gen_em("C++", [["C"]])  # the price of dropping punctuation
    assert not gen_em("", [["A"]])
    assert not gen_em("", [[""]])
    assert not gen_contains("anything", [["  "]])


@pytest.mark.parametrize(
    ("text", "em", "prefix", "contains"),
    [
        ("The  Paris.", True, True, True),
        ("Paris, of course", False, True, True),
        ("It is Paris", False, False, True),
        ("Parisian", False, False, False),
        ("a Parisian in New Paris", False, False, True),
        ("", False, False, False),
    ],
)
def test_exact_prefix_and_contains(text: str, em: bool, prefix: bool, contains: bool) -> None:
    answers = [["paris"]]
    assert (gen_em(text, answers), gen_prefix(text, answers), gen_contains(text, answers)) == (em, prefix, contains)


@pytest.mark.parametrize(
    ("text", "answer", "em", "prefix", "contains"),
    [
        ("罗马。", "罗马", True, True, True),
        ("他住在罗马市", "罗马", False, False, True),
        ("罗马是首都", "罗马", False, True, True),
        ("他写《红楼梦》。", "红楼梦", False, False, True),
        ("อยู่ในโรม", "โรม", False, False, True),
        ("他住在Rome市", "Rome", False, False, True),
        ("他住在Romeo市", "Rome", False, False, False),
        ("\u201cRome\u201d", "Rome", True, True, True),
        ("«Rome», bien sûr", "Rome", False, True, True),
        ("¿Roma?", "Roma", True, True, True),
        ("Rome\u2014the capital", "Rome", False, True, True),
        ("Palme d\u2019Or", "Palme d'Or", True, True, True),
        ("Łódźer", "Łódź", False, False, False),
        ("5 °C", "5 C", False, False, False),  # a sign that means something
    ],
)
def test_punctuation_and_boundaries_outside_ascii(
    text: str, answer: str, em: bool, prefix: bool, contains: bool
) -> None:
    answers = [[answer]]
    assert (gen_em(text, answers), gen_prefix(text, answers), gen_contains(text, answers)) == (em, prefix, contains)


def test_ascii_is_judged_by_its_own_punctuation_and_by_spaces() -> None:
    texts = ["".join(map(chr, range(32, 127))), "Rome -- the U.S.", "$5 + `x`", "a_b", "Rome, Rome", "Romeo", "a ^ the"]
    for text in texts:
        bare = text.lower().translate(str.maketrans("", "", string.punctuation))
        wanted = " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split()) or text.lower()
        assert normalise(text) == wanted
        for alias in ("rome", "x", "5", "ab", "us"):
            assert gen_contains(text, [[alias]]) == (f" {alias} " in f" {wanted} ")


def test_a_rival_that_is_part_of_the_answer_counts_only_elsewhere() -> None:
    query = Query("rewrite/0", "rewrite", "他住在", "罗马市", "罗马", (("罗马市",),))
    for text, right in (("罗马市的中心", 1), ("罗马市在罗马", 0), ("罗马", 0)):
        assert {m.variant: m.value for m in matches(query, text)}["gen.prefix"] == right


def test_each_variant_implies_the_weaker() -> None:
    texts = ["The The", "an apple", "apple", "The apple pie", "a", "+", "U.S. and A.", "the", "pie"]
    for text in texts:
        for alias in texts:
            em, prefix, contains = (f(text, [[alias]]) for f in (gen_em, gen_prefix, gen_contains))
            assert em <= prefix <= contains


def test_any_alias_of_any_answer_or_of_every_answer() -> None:
    answers = [["Rome", "Roma"], ["Bern", "Berne"]]
    assert gen_contains("roma", answers)
    assert not gen_contains("roma", answers, "all")
    assert gen_contains("roma and berne", answers, "all")
    assert not gen_contains("roma", [])
    assert not gen_contains("roma", [], "all")


def test_only_new_text_counts() -> None:
    query = Query("portability/0", "portability.one_hop", "Paris or Rome? It is", answers=(("Rome",),))
    assert {m.value for m in matches(query, "")} == {0}
    assert {m.value for m in matches(query, "Rome")} == {1}
    assert [(m.metric, m.variant, m.n) for m in matches(query, "in Rome")] == [
        ("Portability", "gen.em", 2),
        ("Portability", "gen.prefix", 2),
        ("Portability", "gen.contains", 2),
    ]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Manila, the capital of the Philippines.", True),
        ("Manila. It used to be Rome.", False),
        ("Manilana", False),
        ("the city of Manila", False),
        ("MANILA\nQ: ...", True),
    ],
)
def test_a_completion_starts_with_the_answer_and_does_not_name_the_old_one(text: str, right: bool) -> None:
    query = Query("rewrite/0", "rewrite", "The capital of France is", "Manila", contrast="Rome")
    assert {m.variant: m.value for m in matches(query, text)}["gen.prefix"] == right


def test_a_rival_inside_the_answer_is_no_rival() -> None:
    query = Query("rewrite/0", "rewrite", "He was born in", "New York City", contrast="New York")
    assert {m.variant: m.value for m in matches(query, "New York City in 1950")}["gen.prefix"] == 1
    assert {m.variant: m.value for m in matches(query, "New York City, New York")}["gen.prefix"] == 0


@pytest.mark.parametrize(
    ("new", "old", "text", "right"),
    [
        ("Paris", "Paris Saint-Germain", "Paris Saint-Germain.", 0),
        ("Paris", "Paris Saint-Germain", "Paris, the capital", 1),
        ("Guinea", "Papua New Guinea", "Guinea and Papua New Guinea", 0),
        ("New York", "New York City", "New York City is the largest", 0),
        ("東京", "東京都", "東京都です", 0),
        ("京都", "東京", "京都は東京都の西", 0),
        ("Serie A", "Serie B", "Serie B", 0),
        ("Serie A", "Serie B", "Serie A, in Italy", 1),
        ("Hepatitis B", "Hepatitis A", "Hepatitis B, a form of hepatitis", 1),
        ("Hepatitis B", "Hepatitis A", "Hepatitis B and hepatitis A", 0),
        ("New York City", "New York", "New York City, New York City", 1),
        # what is normalised like the answer differs from it in signs or articles
        ("C++", "C", "C", 0),
        ("C++", "C", "C, the language", 0),
        ("C++", "C", "C++", 1),
        ("C++", "C", "C++, unlike C", 0),
        ("C", "C++", "C++", 0),
        ("C", "C++", "C.", 1),
        ("1.5", "15", "15", 0),
        ("1.5", "15", "1.5", 1),
        ("Group A", "Group", "Group", 0),
    ],
)
def test_a_rival_is_looked_for_in_the_text_as_it_is_written(new: str, old: str, text: str, right: float) -> None:
    values = {m.variant: m.value for m in matches(Query("rewrite/0", "rewrite", "It is", new, contrast=old), text)}
    assert values["gen.prefix"] == right
    assert values["gen.em"] <= values["gen.prefix"] <= values["gen.contains"]


def test_a_judge_is_asked_about_every_answer() -> None:
    def judge(question: str, gold: str, answer: str) -> bool:
        return gold in answer

    for mode, right in (("any", 1), ("all", 0)):
        query = Query("q/0", "ripple.x", "They are", answers=(("Ann",), ("Bob",)), answers_mode=mode)  # type: ignore[arg-type]
        assert {m.variant: m.value for m in matches(query, "Ann only", judge)}["gen.judge"] == right
    assert {m.variant: m.value for m in matches(Query("q/0", "rewrite", "x"), "Ann", judge)}["gen.judge"] == 0


def test_what_is_accepted() -> None:
    assert accepted(Query("q", "rewrite", "x", "Rome", answers=(("Roma",),))) == (("Roma",),)
    assert accepted(Query("q", "rewrite", "x", "Rome")) == (("Rome",),)
    assert accepted(Query("q", "rewrite", "x", "Rome", answers=((), ("",)))) == (("Rome",),)
    assert accepted(Query("q", "rewrite", "x", " ")) == ()
    assert accepted(Query("q", "rewrite", "x")) == ()


# --- over cases ----------------------------------------------------------------------------------------------------


def test_macro_mean_by_hand() -> None:
    assert macro({"a": [1, 0, 0, 0], "b": [1]}) == pytest.approx((0.25 + 1) / 2)
    assert macro({"a": [1, 0, 0, 0], "b": [1], "c": []}) == pytest.approx((0.25 + 1) / 2)
    assert macro({"a": [1, 0], "b": [1, 1]}) == pytest.approx(3 / 4)  # micro, for equal counts
    assert macro({}) is None


def test_harmonic_mean() -> None:
    assert score_hm([98.4, 91.5, 26.9]) == pytest.approx(51.49, abs=5e-3)
    assert score_hm([99.8, 90.9, 73.1]) == pytest.approx(86.45, abs=5e-3)
    assert score_hm([0.4, 0.4, 0.4]) == pytest.approx(0.4)
    assert score_hm([0.9, 0.0, 0.9]) == 0
    assert score_hm([0.9, None, 0.9]) is None
    assert score_hm([]) is None
    assert score_hm([0.2, 0.5, 0.9]) == score_hm([0.9, 0.2, 0.5])


def test_arithmetic_mean() -> None:
    assert score_am(88.74, 51.28, 49.50) == pytest.approx(63.17, abs=5e-3)
    assert score_am(26.32, 25.79, None) == pytest.approx(26.055)
    assert score_am(None, 1.0, 1.0) is None
    assert score_am(1.0, None, None) is None


def test_harmonic_is_at_most_arithmetic() -> None:
    values = [0.01, 0.3, 0.5, 0.99, 1.0]
    for parts in [(a, b, c) for a in values for b in values for c in values]:
        hm, am = score_hm(parts), score_am(*parts)
        assert hm is not None
        assert am is not None
        assert hm <= am + 1e-12


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [("罗马。", "罗马", True), ("罗马是首都", "罗马", True), ("ローマです", "ローマ", True), ("巴黎", "罗马", False)],
)
def test_scripts_without_spaces_have_a_boundary_everywhere(text: str, answer: str, right: bool) -> None:
    assert gen_prefix(text, ((answer,),)) == right
    assert not gen_prefix("Romeo", (("Rome",),))
