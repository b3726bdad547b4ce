"""Verdicts of `evaluation.safety` as a sentence, a page, Markdown or JUnit; edited models loaded for it."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retcon.atomic import write_atomically
from retcon.errors import InvalidSetting, MissingPackage
from retcon.escaping import markdown
from retcon.pages import PASSES_BY_CHOICE, Answered, Fact, FactOutcome, FactTable, render, worst_first
from retcon.pages.junit import TestCase, TestOutcome, junit
from retcon.plural import plural

if TYPE_CHECKING:
    from retcon.evaluation.safety import Answer, Verdict
    from retcon.lm.model import LM

TITLES = {
    "took": "The edit took",
    "generalised": "It generalised",
    "local": "It stayed local",
    "language": "The language is intact",
}
ADAPTER = "adapter_config.json"
ENDINGS = (".html", ".md", ".xml")
_OUTCOMES = {
    "passed": "passed",
    "failed": "failed",
    "unknown": "not known",
    "off": "not asked",
    "unmeasurable": "not measurable there",
}
_TESTS: dict[str, TestOutcome] = {"passed": "passed", "off": "skipped", "unmeasurable": "skipped"}


def check_edited(folder: Path) -> None:
    """Refuse a folder of an edited model that is not there: better known before the base is loaded than after.

    Raises:
        InvalidSetting: there is none.
    """
    if not folder.is_dir():
        raise InvalidSetting(f"{folder}: no such folder; give a merged checkpoint or an adapter")


def load_edited(folder: Path, base: str, options: Mapping[str, Any]) -> "LM":
    """Load an edited model: a merged checkpoint, or `base` with the PEFT adapter of a folder merged into it.

    Args:
        options: how `retcon.load` is to load it. Nothing stays packed, which changes no result: an adapter is merged
            into floats, and a merged checkpoint has them.

    Raises:
        InvalidSetting: there is no such folder.
        MissingPackage: it is an adapter, and peft is not installed.
        UnsupportedModel: it is neither.
    """
    from retcon.lm.load import load
    from retcon.lm.model import LM
    from retcon.lm.quantised import no_remarks_of

    check_edited(folder)
    options = {**options, "packed": False}
    if not (folder / ADAPTER).is_file():
        return load(str(folder), **options)
    try:
        with no_remarks_of("bitsandbytes"):  # on kernels of the hub's, which are not needed
            from peft import PeftModel
    except ImportError:
        raise MissingPackage(f"{folder} is a PEFT adapter, and peft is not installed: pip install peft") from None
    lm = load(base, **options)
    model, tokenizer = lm.model, lm.tokenizer
    lm.release()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of what peft reads, to be renamed
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return LM(merged.eval(), tokenizer, name=str(folder))


def verdict_line(verdict: "Verdict") -> str:
    """Return the verdict in one sentence."""
    failed = [TITLES[a.part].lower() for a in verdict.answers if a.outcome == "failed"]
    unknown = [TITLES[a.part].lower() for a in verdict.answers if a.outcome == "unknown"]
    n = plural(verdict.n_cases, "case")
    if failed:
        return f"Not safe to ship: fell short of: {', '.join(failed)}."
    if unknown:
        return f"Not known to be safe: {', '.join(unknown)}."
    left = [TITLES[a.part].lower() for a in verdict.answers if a.outcome == "unmeasurable"]
    return f"Safe to ship by these thresholds, on {n}" + (
        f"; not measurable there: {', '.join(left)}." if left else "."
    )


def check_report_name(path: Path) -> None:
    """Refuse a report that is of no known kind, before the work.

    Raises:
        InvalidSetting: another ending than .html, .md or .xml.
    """
    if path.suffix.lower() not in ENDINGS:
        raise InvalidSetting(f"report {path}: expected a name that ends in {', '.join(ENDINGS)} (.xml is JUnit)")


def write_verdict(path: Path, verdict: "Verdict", about: str, against: "tuple[str, Verdict] | None" = None) -> None:
    """Write a verdict as a page, as Markdown or as JUnit XML, by the ending of `path`.

    Args:
        about: what was checked, in a line.
        against: what it is compared with, by name, and the verdict on that; JUnit leaves it out.

    Raises:
        InvalidSetting: another ending.
    """
    check_report_name(path)
    if path.suffix.lower() == ".xml":
        text = _junit(verdict, about)
    else:
        write = _page if path.suffix.lower() == ".html" else _markdown
        text = write(verdict, about, against)
    write_atomically(path, text.encode())


def _examples(answer: "Answer") -> list[tuple[str, str, str, str]]:
    if answer.outcome not in ("failed", "unknown"):
        return []
    return [(e.prompt, e.wanted, e.before, e.after) for e in answer.worst]


def _markdown(verdict: "Verdict", about: str, against: "tuple[str, Verdict] | None") -> str:
    lines = [f"# {verdict_line(verdict)}", "", markdown(about), "", "| question | outcome | finding |", "|---|---|---|"]
    lines += [f"| {TITLES[a.part]} | {_OUTCOMES[a.outcome]} | {markdown(a.words)} |" for a in verdict.answers]
    for answer in verdict.answers:
        if rows := _examples(answer):
            lines += ["", f"{TITLES[answer.part]}: where it fell short", "", "| prompt | wanted | before | after |"]
            lines += ["|---|---|---|---|", *(f"| {' | '.join(map(markdown, row))} |" for row in rows)]
    if against is not None:
        lines += ["", f"## Compared with {markdown(against[0])}: {verdict_line(against[1])}", ""]
        lines += ["| question | outcome | finding |", "|---|---|---|"]
        lines += [f"| {TITLES[a.part]} | {_OUTCOMES[a.outcome]} | {markdown(a.words)} |" for a in against[1].answers]
    return "\n".join([*lines, "", *(f"{markdown(note)}." for note in verdict.notes)]) + "\n"


def _page(verdict: "Verdict", about: str, against: "tuple[str, Verdict] | None") -> str:
    verdicts = [("", verdict), *([against] if against else [])]
    return render(
        "check.html",
        verdict=verdict,
        line=verdict_line(verdict),
        about=about,
        verdicts=[
            (name, verdict_line(v), [(TITLES[a.part], a.outcome, _OUTCOMES[a.outcome], a.words) for a in v.answers])
            for name, v in verdicts
        ],
        examples=[] if verdict.findings else [(TITLES[a.part], e) for a in verdict.answers if (e := _examples(a))],
        table=_facts(verdict, against) if verdict.findings else None,
    )


def _facts(verdict: "Verdict", against: "tuple[str, Verdict] | None") -> FactTable:
    """Return a row per case; two sides where there is something to compare with."""
    sides = [_outcomes(verdict), *([_outcomes(against[1])] if against else [])]
    before = {f.case.id: f.before for f in reversed(verdict.findings) if f.query.axis == "rewrite" and f.before}
    rows = [
        Fact(
            case.id,
            "; ".join(e.text for e in case.edits),
            before.get(case.id, "; ".join(e.target_true or "" for e in case.edits)),
            "; ".join(e.target_new for e in case.edits),
            tuple(outcomes.get(case.id) for outcomes in sides),
        )
        for case in {f.case.id: f.case for f in verdict.findings}.values()
    ]
    return FactTable(
        "Facts", ("the edit", against[0]) if against else ("the edit",), worst_first(rows), passes=PASSES_BY_CHOICE
    )


def _outcomes(verdict: "Verdict") -> dict[str, FactOutcome]:
    """Return what came of each case's prompts, by case id."""
    from retcon.evaluation.metrics import is_locality, prompt_kind

    answers: dict[str, list[Answered]] = {}
    for f in verdict.findings:
        local = is_locality(f.query.axis)
        answers.setdefault(f.case.id, []).append(
            Answered(
                prompt_kind(f.query.axis),
                f.query.prompt,
                "as before" if local else f.query.target or "",
                f.before,
                f.after or "something else",
                f.passed,
                broke=f.passed_before and not f.passed,
            )
        )
    return {case: FactOutcome(tuple(own)) for case, own in answers.items()}


def _junit(verdict: "Verdict", about: str) -> str:
    """Return one test a question: what is not known fails, as the exit code does; what was not asked is skipped."""
    cases = []
    for answer in verdict.answers:
        outcome: TestOutcome = _TESTS.get(answer.outcome, "failed")
        examples = "\n".join(f"{p}: wanted {w}, was {b}, is {a}" for p, w, b, a in _examples(answer))
        cases.append(TestCase("retcon.check", TITLES[answer.part], outcome, answer.words, examples))
    return junit(f"retcon check: {about}", cases)
