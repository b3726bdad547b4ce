"""What a user does, as functions that take and return objects: the command line, a page and a notebook call them.

Nothing here prints; what takes long says how far it is through `progress(stage, done, of)`.

    facts = read_facts("facts.jsonl")
    resolved = resolve(lm, "jeep", edits=facts.edits)
    made = write_facts(lm, resolved, facts.edits, out=Path("facts.safetensors"))
    print(took_line(made.delta.report))
"""

from retcon.workflow.editing import Made, check_replaces_its_like, remedy, search_line, took_line, write_facts
from retcon.workflow.estimate import Estimate, estimate
from retcon.workflow.facts import Facts, Reading, facts_that_fit, read_facts
from retcon.workflow.moments import moments_for, needed_moments
from retcon.workflow.settings import Resolved, as_toml, read_settings, resolve

__all__ = [
    "Estimate",
    "Facts",
    "Made",
    "Reading",
    "Resolved",
    "as_toml",
    "check_replaces_its_like",
    "estimate",
    "facts_that_fit",
    "moments_for",
    "needed_moments",
    "read_facts",
    "read_settings",
    "remedy",
    "resolve",
    "search_line",
    "took_line",
    "write_facts",
]
