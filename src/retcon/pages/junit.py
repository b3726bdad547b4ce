"""Test results as JUnit XML, which continuous integration reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from retcon.escaping import printable

TestOutcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class TestCase:
    """One test and what came of it."""

    group: str
    name: str
    outcome: TestOutcome
    message: str = ""
    text: str = ""


def junit(suite: str, cases: Sequence[TestCase]) -> str:
    """Return a suite of tests as XML, without the control characters that XML cannot hold."""
    counted = (("failures", "failed"), ("skipped", "skipped"))
    counts = {name: str(sum(c.outcome == outcome for c in cases)) for name, outcome in counted}
    root = ElementTree.Element("testsuite", {"name": suite, "tests": str(len(cases)), **counts, "errors": "0"})
    for case in cases:
        test = ElementTree.SubElement(root, "testcase", {"classname": case.group, "name": case.name})
        if case.outcome != "passed":
            tag = "failure" if case.outcome == "failed" else "skipped"
            ElementTree.SubElement(test, tag, {"message": case.message}).text = case.text or None
    for element in root.iter():
        element.text = element.text and printable(element.text)
        element.attrib = {name: printable(value) for name, value in element.attrib.items()}
    text: str = ElementTree.tostring(root, encoding="unicode", xml_declaration=True)
    return text + "\n"
