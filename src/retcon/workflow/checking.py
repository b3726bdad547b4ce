"""Whether an edit is safe to ship: the edited model from wherever it is, and the verdict as a file."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from retcon.errors import InvalidSetting, MissingPackage
from retcon.files import write_atomically
from retcon.pages import render

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
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_OUTCOMES = {
    "passed": "passed",
    "failed": "failed",
    "unknown": "not known",
    "off": "not asked",
    "unmeasurable": "not measurable there",
}


def load_edited(folder: Path, base: str, *, device: str | None = None, dtype: str | None = None) -> "LM":
    """Load an edited model: a merged checkpoint, or `base` with the PEFT adapter of a folder merged into it.

    Raises:
        InvalidSetting: there is no such folder.
        MissingPackage: it is an adapter, and peft is not installed.
        UnsupportedModel: it is neither.
    """
    from retcon.lm.load import load
    from retcon.lm.model import LM

    if not folder.is_dir():
        raise InvalidSetting(f"{folder}: no such folder; give a merged checkpoint or an adapter")
    if not (folder / ADAPTER).is_file():
        return load(str(folder), device=device, dtype=dtype)
    try:
        from peft import PeftModel
    except ImportError:
        raise MissingPackage(f"{folder} is a PEFT adapter, and peft is not installed: pip install peft") from None
    lm = load(base, device=device, dtype=dtype)
    model, tokenizer = lm.model, lm.tokenizer
    lm.release()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what transformers is about to rename
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return LM(merged.eval(), tokenizer, name=str(folder))


def verdict_line(verdict: "Verdict") -> str:
    """Return the verdict in one sentence."""
    failed = [TITLES[a.part].lower() for a in verdict.answers if a.outcome == "failed"]
    unknown = [TITLES[a.part].lower() for a in verdict.answers if a.outcome == "unknown"]
    n = "1 case" if verdict.n_cases == 1 else f"{verdict.n_cases:,} cases"
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
        raise InvalidSetting(f"--report {path}: expected a name that ends in {', '.join(ENDINGS)} (.xml is JUnit)")


def write_verdict(path: Path, verdict: "Verdict", about: str) -> None:
    """Write a verdict as a page, as Markdown or as JUnit XML, by the ending of `path`.

    Args:
        about: what was checked, in a line.

    Raises:
        InvalidSetting: another ending.
    """
    check_report_name(path)
    writers: dict[str, Callable[[Verdict, str], str]] = {".html": _page, ".md": _markdown, ".xml": _junit}
    write_atomically(path, writers[path.suffix.lower()](verdict, about).encode())


def _examples(answer: "Answer") -> list[tuple[str, str, str, str]]:
    if answer.outcome not in ("failed", "unknown"):
        return []
    return [(e.prompt, e.wanted, e.before, e.after) for e in answer.worst]


def _markdown(verdict: "Verdict", about: str) -> str:
    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    lines = [f"# {verdict_line(verdict)}", "", about, "", "| question | outcome | finding |", "|---|---|---|"]
    lines += [f"| {TITLES[a.part]} | {_OUTCOMES[a.outcome]} | {cell(a.words)} |" for a in verdict.answers]
    for answer in verdict.answers:
        if rows := _examples(answer):
            lines += ["", f"{TITLES[answer.part]}: where it fell short", "", "| prompt | wanted | before | after |"]
            lines += ["|---|---|---|---|", *(f"| {' | '.join(map(cell, row))} |" for row in rows)]
    return "\n".join([*lines, "", *(f"{note}." for note in verdict.notes)]) + "\n"


def _page(verdict: "Verdict", about: str) -> str:
    questions = [(TITLES[a.part], a.outcome, _OUTCOMES[a.outcome], a.words) for a in verdict.answers]
    examples = [(TITLES[a.part], rows) for a in verdict.answers if (rows := _examples(a))]
    line = verdict_line(verdict)
    return render("check.html", verdict=verdict, line=line, about=about, questions=questions, examples=examples)


def _junit(verdict: "Verdict", about: str) -> str:
    """Return one test a question: what is not known fails, as the exit code does; what was not asked is skipped."""
    outcomes = [a.outcome for a in verdict.answers]
    failures = sum(o in ("failed", "unknown") for o in outcomes)
    skipped = sum(o in ("off", "unmeasurable") for o in outcomes)
    counts = {"tests": str(len(outcomes)), "failures": str(failures), "skipped": str(skipped)}
    suite = ElementTree.Element("testsuite", {"name": f"retcon check: {about}", **counts})
    for answer in verdict.answers:
        test = ElementTree.SubElement(suite, "testcase", {"classname": "retcon.check", "name": TITLES[answer.part]})
        if answer.outcome in ("off", "unmeasurable"):
            ElementTree.SubElement(test, "skipped", {"message": answer.words})
        elif answer.outcome != "passed":
            failure = ElementTree.SubElement(test, "failure", {"message": answer.words})
            failure.text = "\n".join(f"{p}: wanted {w}, was {b}, is {a}" for p, w, b, a in _examples(answer))
    for element in suite.iter():  # XML holds no control characters, and a model may write any
        element.text = element.text and _NO_XML.sub("\ufffd", element.text)
        element.attrib = {name: _NO_XML.sub("\ufffd", value) for name, value in element.attrib.items()}
    text: str = ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)
    return text + "\n"
