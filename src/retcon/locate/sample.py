"""Which facts a probe of many can take, and why the others are left out."""

from collections.abc import Mapping, Sequence

from retcon.edits import Edit


def with_subject(edits: Sequence[Edit]) -> tuple[list[Edit], dict[str, str]]:
    """Return the edits whose subject is in their prompt, and why each other one is left out, by its id."""
    skipped = {
        e.id: "it names no subject" if e.subject is None else "the subject does not occur in the prompt"
        for e in edits
        if e.subject_span is None
    }
    return [e for e in edits if e.subject_span is not None], skipped


def why_none_is_left(skipped: Mapping[str, str]) -> str:
    """Return why nothing is left: how many facts were left out for each reason."""
    reasons = list(skipped.values())
    counted = "; ".join(f"{reasons.count(reason)} left out, {reason}" for reason in dict.fromkeys(reasons))
    return counted or "no edits were given"
