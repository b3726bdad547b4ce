"""The table of formats: which fields decide each, which it reads, and its reader; and how a file's format is found."""

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from retcon.errors import InvalidSetting, MalformedFile
from retcon.evaluation.datasets.counterfact import flat, native
from retcon.evaluation.datasets.easyedit import cknowedit, fastedit, knowedit, qaedit, unke, wikibigedit
from retcon.evaluation.datasets.mquake import Prompting, mquake
from retcon.evaluation.datasets.own import own, plain
from retcon.evaluation.datasets.ripple import AXES, ripple
from retcon.evaluation.datasets.rows import Answers, CaseTarget, Draft, FormatName, Parser, RowDropped
from retcon.evaluation.datasets.tables import with_lists
from retcon.evaluation.datasets.zsre import PromptStyle, zsre
from retcon.extensions import named_function
from retcon.files import NumberedRow

IDENTITY = ("case_id", "id")
"""Fields that name a row, in any format."""
CHOICES: Mapping[str, Any] = {
    "case_target": CaseTarget,
    "prompt_style": PromptStyle,
    "answers": Answers,
    "prompting": Prompting,
}
"""Settings that some formats have."""
SYNONYMS = (
    ("target_new", "target", "answer", "ans", "labels"),
    ("target_true", "ground_truth", "target_old", "answer_old"),
    ("paraphrases", "paraphrase_prompts", "rephrase", "rephrase_prompt", "para_question", "queries"),
    ("neighbors", "neighborhood_prompts", "locality_prompt"),
    ("prompt", "question", "src", "text", "update"),
    ("subject", "concept"),
)
"""Fields that are for the same thing in different formats."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One kind of file."""

    name: FormatName
    title: str
    needs: tuple[tuple[str, ...], ...]
    """Fields that it has; of each group, at least one."""
    reads: tuple[str, ...] = ()
    """Fields that it may have."""
    carries: tuple[str, ...] = ()
    """Fields of the published files that nothing is made of; they are kept in `meta["extra"]`."""
    types: Mapping[str, type] = field(default_factory=dict)
    """What a field is, where another format has one of that name."""
    signs: tuple[str, ...] = ()
    """Fields of which it has one, of a row or of an item of its `portability` or `locality`, where all that it needs
    may be another format's."""
    lists: tuple[str, ...]
    """Fields that may be a list or an object; a table's cell holds one text, or JSON."""
    reader: Callable[..., Draft]
    settings: Mapping[str, str] = field(default_factory=dict)
    """The reader's own settings: their names here, and their names as the reader's arguments."""

    @property
    def fields(self) -> tuple[str, ...]:
        """All that is read."""
        return (*(name for group in self.needs for name in group), *self.reads, *IDENTITY)

    def missing(self, found: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Return the groups of which a file has no field."""
        return [group for group in self.needs if not any(name in found for name in group)]

    def fits(self, found: Mapping[str, Any]) -> bool:
        """Return whether a file has every field it needs, each of its type, and one of its signs."""
        signs = {*found, *_item_fields(found.get("portability")), *_item_fields(found.get("locality"))}
        return (
            not self.missing(found)
            and all(not found.get(name) or isinstance(found[name], kind) for name, kind in self.types.items())
            and (not self.signs or not signs.isdisjoint(self.signs))
        )

    def likeness(self, found: Mapping[str, Any]) -> int:
        """Return how many of a file's fields belong to it."""
        return len(found.keys() & {*self.fields, *self.carries})

    def misspelt(self, found: Mapping[str, Any]) -> dict[str, str]:
        """Return the right name of each of a file's fields that looks like one it needs and lacks."""
        meant: dict[str, str] = {}
        for group in self.missing(found):
            for name in (name for name in found if name not in {*self.fields, *self.carries, *meant}):
                if close := difflib.get_close_matches(name.lower().replace("-", "_"), group, n=1, cutoff=0.8):
                    meant[name] = close[0]
                    break
        return meant

    def nearness(self, found: Mapping[str, Any]) -> int:
        """Return how well it explains a file that it does not fit: fields it has, less those it needs and lacks."""
        return self.likeness(found) + 2 * len(self.misspelt(found)) - len(self.missing(found))


FORMATS: Mapping[FormatName, Format] = {
    f.name: f
    for f in (
        Format(
            name="mquake",
            title="MQuAKE",
            needs=(("requested_rewrite",),),
            reads=(
                *("questions", "answer", "answer_alias", "answer_extended", "new_answer", "new_answer_alias"),
                *("single_hops", "new_single_hops", "orig"),
            ),
            types={"requested_rewrite": list},
            lists=(
                *("requested_rewrite", "questions", "answer_alias", "answer_extended", "new_answer_alias"),
                *("single_hops", "new_single_hops", "orig"),
            ),
            reader=mquake,
            settings={"prompting": "prompting"},
        ),
        Format(
            name="counterfact",
            title="CounterFact",
            needs=(("requested_rewrite",),),
            reads=(
                *("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts"),
                *("portability", "alt"),
            ),
            carries=("pararel_idx",),
            types={"requested_rewrite": dict},
            lists=(
                *("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "attribute_prompts"),
                *("generation_prompts", "portability"),
            ),
            reader=native,
            settings={"case_target": "target"},
        ),
        Format(
            name="ripple",
            title="RippleEdits",
            needs=(("edit",), tuple(AXES)),
            reads=("example_type",),
            types={"edit": dict},
            lists=("edit", *AXES),
            reader=ripple,
        ),
        Format(
            name="wikibigedit",
            title="WikiBigEdit",
            needs=(("update",), ("subject",), ("ans",)),
            reads=("rephrase", "personas", "mhop", "mhop_ans", "loc", "loc_ans", "tag", "portability"),
            carries=("ground_truth", "relation", "object", "subject_id", "relation_id", "object_id"),
            lists=("rephrase", "personas", "mhop", "mhop_ans", "loc", "loc_ans", "portability"),
            reader=wikibigedit,
        ),
        Format(
            name="zsre",
            title="zsRE",
            needs=(("src", "prompt"), ("answers", "ans"), ("src", "rephrase", "rephrase_prompt", "loc")),
            reads=("subject", "alt", "loc_ans", "portability"),
            carries=("pred", "cond"),
            lists=("answers", "rephrase", "rephrase_prompt", "loc", "loc_ans", "portability"),
            reader=zsre,
            settings={"case_target": "target", "prompt_style": "style"},
        ),
        Format(
            name="knowedit",
            title="KnowEdit, or EasyEdit's requests",
            needs=(("prompt", "text"), ("subject", "concept"), ("target_new", "labels"), ("portability", "locality")),
            reads=("ground_truth", "rephrase_prompt", "rephrase"),
            carries=("cond",),
            types={"portability": dict, "locality": dict},
            signs=("ground_truth", "rephrase_prompt", "rephrase", "concept", "labels"),
            lists=("target_new", "ground_truth", "rephrase_prompt", "rephrase", "portability", "locality"),
            reader=knowedit,
            settings={"answers": "answers"},
        ),
        Format(
            name="qaedit",
            title="QAEdit",
            needs=(("prompt",), ("subject",), ("target",), ("locality",)),
            reads=("rephrase", "source", "portability"),
            types={"locality": list},
            signs=("loc", "loc_ans"),
            lists=("rephrase", "portability", "locality"),
            reader=qaedit,
        ),
        Format(
            name="cknowedit",
            title="CKnowEdit",
            needs=(("prompt",), ("target_new",), ("target_old",)),
            reads=("subject", "rephrase", "portability", "locality"),
            lists=("rephrase", "portability", "locality"),
            reader=cknowedit,
        ),
        Format(
            name="unke",
            title="UnKE",
            needs=(("question",), ("answer",)),
            reads=("subject", "para_question", "sub_question", "sub_answer", "portability"),
            lists=("para_question", "sub_question", "sub_answer", "portability"),
            reader=unke,
        ),
        Format(
            name="fastedit",
            title="FastEdit",
            needs=(("prompt",), ("subject",), ("target",)),
            reads=("queries", "portability"),
            lists=("queries", "portability"),
            reader=fastedit,
        ),
        Format(
            name="cases",
            title="cases as retcon writes them",
            needs=(("edits",), ("queries",)),
            reads=("dataset", "meta", "delta"),  # the last of them names what a store wrote the fact with
            types={"edits": list, "queries": list},
            lists=("edits", "queries", "meta"),
            reader=own,
        ),
        Format(
            name="edits",
            title="facts",
            needs=(("prompt",), ("subject",), ("target_new",)),
            reads=(
                *(
                    "target_true",
                    "relation_id",
                    "subject_start",
                    "separator",
                    "chat",
                    "paraphrases",
                    "neighbors",
                    "neighbours",
                ),
                *("portability", "locality", "alt"),
            ),
            lists=("chat", "paraphrases", "neighbors", "neighbours", "portability", "locality"),
            reader=plain,
            settings={"case_target": "target"},
        ),
        Format(
            name="counterfact-flat",
            title="flat CounterFact",
            needs=(("prompt",), ("subject",), ("target_new",)),
            reads=(
                *("ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth", "alt"),
                *("portability", "portability_prompt", "portability_ground_truth", "case_id"),
            ),
            lists=(
                *("target_new", "ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth"),
                *("portability", "portability_ground_truth"),
            ),
            reader=flat,
            settings={"case_target": "target"},
        ),
    )
}
"""All formats; where two fit a file equally well, the earlier one is taken."""
ENTRY_POINTS = "retcon.datasets"
"""Group of entry points by which an installed package brings formats: functions from a row to the fields of our own."""


def table_of(format: str) -> Format:
    """Return what is known of a format; one of the user's own gives rows of ours."""
    return FORMATS[format if format in FORMATS else "edits"]  # type: ignore[index]


def recognise(rows: Sequence[NumberedRow], path: object) -> FormatName:
    """Return the format that has the most of the file's fields, of those whose own fields are all there.

    A format that does not read `target_new` writes another field's text, so it is none of a file that has that one.

    Raises:
        MalformedFile: none has; the message says which one comes closest and what it lacks.
    """
    found: dict[str, Any] = {}
    for _, record in rows:
        for name, value in record.items():
            held = found.get(name)
            if not held or (isinstance(held, dict) and not any(held.values())):
                found[name] = value
    able = [f for f in FORMATS.values() if "target_new" not in found or "target_new" in f.fields]
    fitting = [f for f in able if f.fits(found)]
    if fitting:
        return max(fitting, key=lambda f: f.likeness(found)).name
    nearest = max(able, key=lambda f: (f.nearness(found), f.name == "edits"))
    shown = ", ".join(map(str, found)) or "(none)"
    missing, misspelt = nearest.missing(found), nearest.misspelt(found)
    if not missing:
        return nearest.name
    if nearest.likeness(found) + len(misspelt) >= 2 and len(missing) - len(misspelt) < len(nearest.needs):
        lacking = " and ".join(" or ".join(map(repr, group)) for group in missing)
        are = "field {} is" if len(missing) == 1 else "fields {} are"
        meant = " and ".join(f"{right!r} by {wrong!r}" for wrong, right in sorted(misspelt.items()))
        raise MalformedFile(
            f"{path}: taken for {nearest.title} ({nearest.name}), of which the {are.format(lacking)} missing; its "
            f"fields are {shown}"
            + (f" (did you mean {meant}?)" if meant else "")
            + ("; a fact that names no subject says so: null, or an empty cell" if missing == [("subject",)] else "")
            + f". Name the format if it is another: {', '.join(FORMATS)}"
        )
    if holders := _holders(rows):
        raise MalformedFile(
            f"{path}: one object that holds the rows under {holders}; save them as a list, or one object per line"
        )
    known = "; ".join(f"{f.name} ({', '.join('/'.join(group[:2]) for group in f.needs)})" for f in FORMATS.values())
    raise MalformedFile(f"{path}: no known format; the rows have the fields {shown}. Known: {known}")


def _item_fields(kinds: Any) -> set[str]:
    """Return the names of the fields of the items in a list, or in an object of lists by kind."""
    lists = kinds.values() if isinstance(kinds, dict) else (kinds,)
    items = (item for held in lists for item in (held if isinstance(held, list) else [held]))
    return {name for item in items if isinstance(item, dict) for name in item}


def _holders(rows: Sequence[NumberedRow]) -> str:
    """Return the fields of a file's only row that hold rows themselves, for a message; empty where there are none."""

    def is_row(item: Any) -> bool:
        return isinstance(item, dict) and len(item) > 1

    if len(rows) != 1:
        return ""
    names = [
        repr(name)
        for name, value in rows[0][1].items()
        if is_row(value) or (isinstance(value, list) and value and all(map(is_row, value)))
    ]
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def reader(
    format: str, given: Mapping[str, str], counts: Counter[str], *, table: bool = False
) -> tuple[Parser, dict[str, str]]:
    """Return the reader of a format with its settings, and those settings by name; `counts` gets the unknown fields.

    Args:
        table: the rows are a table's, whose lists are JSON in cells.

    Raises:
        InvalidSetting: no such format, or it has no alternative answers, which `given` asks for.
    """
    translate = None if format in FORMATS else _translator(format)
    chosen = table_of(format)
    if "case_target" not in chosen.settings:
        check_case_target(format, given["case_target"])
    parse = partial(chosen.reader, **{argument: given[name] for name, argument in chosen.settings.items()})
    known_fields = {*chosen.fields, *chosen.carries}

    def read(record: Mapping[str, Any], where: str, row: int) -> Draft:
        if translate is not None:
            record = translate(record, where)
        elif table:
            record = with_lists(record, chosen.lists, where)
        try:
            made = parse(record, where, row)
        except RowDropped as dropped:
            made = dropped.draft
        extra = {name: value for name, value in record.items() if name not in chosen.fields}
        counts.update(name for name in extra if name not in known_fields)
        if extra:
            made.meta["extra"] = {**made.meta.get("extra", {}), **extra}
        return made

    return read, {name: given[name] for name in chosen.settings}


def _translator(format: str) -> Callable[[Mapping[str, Any], str], Mapping[str, Any]]:
    """Return how rows of the user's own format become rows of ours.

    Raises:
        InvalidSetting: no such format.
    """
    try:
        own = named_function(format, ENTRY_POINTS, "format")
    except InvalidSetting as error:
        raise InvalidSetting(f"unknown format {format!r}; known: {', '.join(FORMATS)} ({error})") from None

    def translate(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        try:
            made = own(record)
        except Exception as error:
            raise MalformedFile(f"{where}: {format} ends in {type(error).__name__}: {error}") from error
        if not isinstance(made, Mapping):
            raise MalformedFile(f"{where}: {format} gives {type(made).__name__} in place of the fields of a fact")
        return made

    return translate


def check_case_target(format: str, case_target: str) -> None:
    """Refuse another answer than the new one, for a format that has no other.

    Raises:
        InvalidSetting: another one is asked for.
    """
    if case_target != "new":
        able = ", ".join(f.name for f in FORMATS.values() if "case_target" in f.settings)
        raise InvalidSetting(f"case target {case_target!r}: {format} has no alternative answers; {able} may")


def likely_fields(format: str, unknown: Sequence[str], present: Sequence[str]) -> dict[str, str]:
    """Return, for each unknown field, the absent one that was probably meant: it is for the same thing, or spelt like
    it."""
    absent = [name for name in table_of(format).fields if name not in present]

    def meant(name: str) -> str | None:
        same = next((group for group in SYNONYMS if name in group), ())
        sure = [known for known in absent if known in same or known == name.lower()]
        like = difflib.get_close_matches(name.lower(), [n for n in absent if n not in IDENTITY], n=1, cutoff=0.7)
        return next(iter(sure + like), None)

    return {name: right for name in unknown if (right := meant(name)) is not None}
