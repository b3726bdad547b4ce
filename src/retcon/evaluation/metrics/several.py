"""What one case's queries say together: MQuAKE's multi-hop metrics and RippleEdits' tests."""

from collections.abc import Mapping, Sequence
from typing import Any

from retcon.edits import Case
from retcon.evaluation.metrics.names import Measured
from retcon.evaluation.metrics.written import accepted, gen_contains, gen_em, gen_prefix


def multihop(case: Case, texts: Mapping[str, str]) -> list[Measured]:
    """Return MQuAKE's case-level numbers from generated answers by query id; variants say how it was prompted.

    `edit_wise`: share of edits recalled from their cloze prompts (the text may go on). `instance_wise`: every hop after
    the edits answered. `multi_hop`: at least one of the wordings answered. `hop_wise`: both of the last two.
    `unedited_hops`: share of the hops that no edit touches which are still answered. A number whose queries were not
    all answered is left out.
    """
    right: dict[str, list[bool]] = {}
    whole: dict[str, int] = {}
    for query in case.queries:
        whole[query.axis] = whole.get(query.axis, 0) + 1
        if query.id in texts:
            test = gen_prefix if query.axis == "rewrite" else gen_em
            right.setdefault(query.axis, []).append(test(texts[query.id], accepted(query), query.answers_mode))
    done = {axis: found for axis, found in right.items() if len(found) == whole[axis]}
    variant = f"mq.{case.meta.get('prompting', 'bare')}"

    def number(metric: str, value: float, *axes: str) -> list[Measured]:
        return [Measured(metric, variant, value, sum(len(done[a]) for a in axes))]

    found: list[Measured] = []
    if "rewrite" in done:
        found += number("edit_wise", sum(done["rewrite"]) / len(done["rewrite"]), "rewrite")
    if "singlehop" in done:
        found += number("instance_wise", float(all(done["singlehop"])), "singlehop")
    if "multihop" in done:
        found += number("multi_hop", float(any(done["multihop"])), "multihop")
    if "singlehop" in done and "multihop" in done:
        both = all(done["singlehop"]) and any(done["multihop"])
        found += number("hop_wise", float(both), "singlehop", "multihop")
    if "unedited_hop" in done:
        kept = done["unedited_hop"]
        found += number("unedited_hops", sum(kept) / len(kept), "unedited_hop")
    return found


def ripple(case: Case, before: Mapping[str, str], after: Mapping[str, str]) -> list[Measured]:
    """Return RippleEdits' numbers from generated answers by query id, of the unedited and of the edited model.

    Per axis: tests passed of those executed (`ripple`), and executed of all (`ripple.executed`). A test is executed
    where the unedited model meets all its conditions. `ripple.edit_success` is the edit's own fact. What is averaged
    over the edits that took (`ripple.taken`) has a value only there. A number of which a text is missing has no value.
    """
    queries = {query.id: query for query in case.queries}

    def right(query_id: str, texts: Mapping[str, str]) -> bool:
        query = queries[query_id]
        return gen_contains(texts[query_id], accepted(query), query.answers_mode)

    own = [query.id for query in case.queries if query.axis == "rewrite"]
    asked = bool(own) and all(query_id in after for query_id in own)
    took = asked and all(right(query_id, after) for query_id in own)
    found = [Measured("edit_success", "ripple", float(took), len(own)) if asked else _without("edit_success", "ripple")]
    tests: Sequence[Mapping[str, Any]] = case.meta.get("tests", ())
    for axis in dict.fromkeys(test["axis"] for test in tests):
        metric, shares = f"ripple.{axis}", ["ripple.all", *(["ripple.taken"] if took else [])]
        here = [test for test in tests if test["axis"] == axis]
        if not all(q in before for test in here for q in test["conditions"]):
            note = "no text of the unedited model for a condition"
            found += [_without(metric, variant, note) for variant in ("ripple.executed", *shares)]
            continue
        executed = [test for test in here if all(right(q, before) for q in test["conditions"])]
        found.append(Measured(metric, "ripple.executed", len(executed) / len(here), len(here)))
        if not all(q in after for test in executed for q in test["queries"]):
            found += [_without(metric, variant) for variant in shares]
        elif executed:
            passed = sum(passes(test["rule"], [right(q, after) for q in test["queries"]]) for test in executed)
            found += [Measured(metric, variant, passed / len(executed), len(executed)) for variant in shares]
    return found


def _without(metric: str, variant: str, note: str = "the model has written nothing for a prompt of it") -> Measured:
    return Measured(metric, variant, None, 0, note)


def passes(rule: str, right: Sequence[bool]) -> bool:
    """Return whether any query is right (OR), or all are (AND)."""
    return any(right) if rule == "OR" else all(right)
