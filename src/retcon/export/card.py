"""Model cards: what was changed in a model, by what, with which scores and limits, in Markdown."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from retcon.delta import Delta
from retcon.escaping import markdown
from retcon.lm.model import LM
from retcon.plural import plural
from retcon.version import __version__

N_FACTS = 50
"""Facts that a card lists; of more, it says how many there are."""


def model_card(
    lm: LM,
    deltas: Sequence[Delta],
    *,
    kind: str,
    base_name: str,
    called: str,
    revision: str | None = None,
    scores: Mapping[str, Any] | None = None,
    losses: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    has_base_card: bool = False,
) -> str:
    """Return the card of an exported edit.

    Args:
        kind: what lies beside the card ("merged checkpoint", "LoRA adapter", ...).
        base_name: where the base is: a hub id, or a path.
        called: what the text calls the base.
        revision: of the hub, that the base was loaded at.
        scores: measured figures by name (0 to 100), put into a table with what was measured.
        losses: per parameter, what a smaller rank has lost.
        has_base_card: the base's README lies beside it as README.base.md.
    """
    edits = [e for d in deltas for e in d.edits]
    reports = [r for d in deltas for r in d.report]
    first = sum(bool(r.greedy_match) for r in reports)
    known = sum(r.greedy_match is not None for r in reports)
    is_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", base_name) is not None
    lines = ["---", *([f"base_model: {base_name}"] if is_hub else []), "library_name: transformers"]
    lines += ["pipeline_tag: text-generation", "tags:", "- knowledge-editing", "- retcon", "---", ""]
    lines += [f"# {markdown(called)}, edited", ""]
    lines += [
        f"{markdown(called)} with {plural(len(edits), 'fact')} changed by "
        f"[retcon](https://pypi.org/project/retcon-lm/) {__version__}; a {kind}. All else is meant to be as "
        "in the base.",
        "",
    ]
    lines += ["## What was changed", "", "| delta | method | facts | layers' matrices |", "|---|---|---:|---|"]
    for d in deltas:
        names = ", ".join(f"`{n}`" for n in d.changes)
        lines.append(f"| `{d.id}` | {markdown(str(d.provenance.get('method', '?')))} | {len(d.edits)} | {names} |")
    at = f", revision {markdown(revision)}" if revision else ""
    lines += ["", f"Base: `{lm.fingerprint()}` (SHA-256 over its config and weights){at}.", ""]
    if edits:
        lines += ["| prompt | new answer | instead of |", "|---|---|---|"]
        for e in edits[:N_FACTS]:
            lines.append(f"| {' | '.join(map(markdown, (e.text, e.target_new, e.target_true or '')))} |")
        if len(edits) > N_FACTS:
            lines.append(f"\n... and {len(edits) - N_FACTS:,} more, listed in `retcon.json`.")
        lines.append("")
    lines += ["## Scores", ""]
    if known:
        lines.append(
            f"- Right after the edit, the model's own first answer was the new one for {first:,} of "
            f"{plural(known, 'fact')}."
        )
    outcomes = Counter(r.outcome for r in reports if r.outcome != "reached")
    if outcomes:
        lines.append("- Short of what was asked for: " + ", ".join(f"{n} {why}" for why, n in outcomes.items()) + ".")
    lines += [f"- {markdown(name)}: {value:.1f}" for name, value in (scores or {}).items()]
    if not known and not scores:
        lines.append("- Not measured.")
    if losses and any(f["error"] for f in losses.values()):
        worst = max(losses.items(), key=lambda item: item[1]["error"])
        lines.append(
            f"- Rank cut to {worst[1]['rank']}: up to {100 * worst[1]['error']:.2f} % of a matrix's change is lost "
            f"(`{worst[0]}`, Frobenius norm)."
        )
    lines += [
        "",
        "## Limits",
        "",
        "- A fact is changed where it is asked for as in the prompts above and in paraphrases of them; what follows "
        "from it by reasoning over several steps need not follow.",
        "- Prompts about other subjects were kept by a statistical constraint, not by proof: measure what matters to "
        "you (`retcon check`, `retcon verify`).",
        *(f"- {markdown(note)}" for note in notes),
    ]
    if has_base_card:
        lines += ["", "The base's own card is in [README.base.md](README.base.md); its licence applies."]
    return "\n".join(lines) + "\n"
