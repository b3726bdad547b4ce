"""One entry on its way into a store: files staged, deltas proposed, then all of it made an entry at once."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retcon.atomic import write_atomically
from retcon.edits import Case, Edit
from retcon.errors import InvalidSetting, MalformedFile, NonFinite, RetconWarning
from retcon.files import cache_dir, sha256_of
from retcon.plural import plural
from retcon.store.contents import DELTAS, VALUES, Contents, Precision
from retcon.store.history import Action, Entry
from retcon.store.index import FACTS
from retcon.store.journal import Transaction

if TYPE_CHECKING:
    from retcon.attachment import Attachment
    from retcon.lm.model import LM
    from retcon.memory.moments import Moments
    from retcon.memory.values import ValueCache
    from retcon.methods.common.contract import Method
    from retcon.work import Progress


class PendingEntry:
    """One entry on its way into a store."""

    def __init__(self, store: Contents) -> None:
        self.store, self.transaction = store, Transaction(store.path)
        self.searched = 0
        self.caches: list[Any] = []

    def path(self, name: str) -> Path:
        """Return where to write the file that shall be `name` in the store."""
        return self.transaction.path(name)

    def commit(
        self,
        action: Action,
        message: str,
        sets: Mapping[str, tuple[str | None, str | None]],
        lines: Sequence[str] = (),
        *,
        drops: tuple[str, ...] = (),
        about: Mapping[str, Any] | None = None,
        remove: Sequence[str] = (),
    ) -> Entry:
        """Make it an entry."""
        last = self.store.log()
        entry = Entry.make(
            action,
            " ".join(message.split()),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            after=last[-1].id if last else None,
            sets=sets,
            drops=drops,
            about=dict(about or {}),
        )
        if lines:
            write_atomically(self.path(f"{FACTS}/{entry.id}.jsonl"), ("\n".join(lines) + "\n").encode())
        self.transaction.commit(entry.line, remove=remove)
        for cache in self.caches:
            cache.discard()
        return entry

    def propose(
        self,
        lm: "LM",
        edits: Sequence[Edit],
        method: "Method",
        *,
        moments: "Moments | None",
        values: "ValueCache | None" = None,
        known: Any = None,
        state: Any = None,
        seed: int,
        contexts: Any = None,
        progress: "Progress | None" = None,
    ) -> "Attachment":
        """Return a delta on the model as it is, in the store's precision, staged with its values.

        Raises:
            InvalidSetting: it would replace the deltas before it.
        """
        from retcon.memory.values import ValueCache
        from retcon.memory.values.store import KnownValues

        if method.replaces_applied and lm.applied:
            raise InvalidSetting(
                f"{method.name} replaces all deltas before it; a store keeps each delta. Edit with the method it "
                f"wraps, then apply {method.name} to the exported edit "
                f"(retcon edit --delta ... --method {method.name})"
            )
        cache = values or ValueCache(cache_dir() / "values")
        known = known or KnownValues(len(lm.applied))
        delta = method.propose(
            lm,
            edits,
            contexts=contexts,
            moments=moments,
            state=state,
            values=replace(cache, known=known),
            seed=seed,
            progress=progress,
        )
        delta = in_precision(lm, delta, self.store.precision)
        delta.save(self.path(f"{DELTAS}/{delta.id}.safetensors"))
        if known.used:
            known.save(self.path(f"{VALUES}/{delta.id}.safetensors"))
        self.searched += known.searched
        self.caches.append(cache)
        return delta

    def propose_again(
        self,
        lm: "LM",
        delta: str,
        cases: Sequence[Case],
        *,
        moments: "Moments | None",
        search: bool,
        progress: "Progress | None",
        editor: "str | os.PathLike[str] | None" = None,
        method: str | None = None,
    ) -> "Attachment":
        """Return the delta's method, settings, contexts and seed once more, for these facts, on the model as it is.

        Args:
            moments: None: of the text that the delta was made with.
            editor: where the trained editor is that the delta was made with; None: where it was, or its last part.
            method: "module:Class" of a method of one's own that the delta was made with; None: where it is imported.

        Raises:
            MalformedFile: that text is no longer where it was.
            InvalidSetting: other second moments, or another editor, than the delta was made with; or its editor is not
                found; or its method is one of one's own that is neither imported nor given; or another is given.
        """
        from retcon.memory.contexts import Contexts
        from retcon.memory.values.store import KnownValues
        from retcon.methods.common.contract import with_files
        from retcon.methods.common.registry import build
        from retcon.methods.common.sequence import state_after

        old = self.store.delta(delta)
        made = old.provenance
        files = self.store.files_of(delta)
        settings = with_files(made["settings"], files)
        if settings.get("editor") is not None:
            settings["editor"] = _editor_of(delta, made, editor or files.get("editor"))
        again = build(self._method_of(delta, made, method, lenient=search), settings)
        if moments is None and again.uses_moments:
            moments = self._moments_of(delta)
        known = None
        if not search:
            with_values = self.store.path / VALUES / f"{delta}.safetensors"
            if with_values.is_file():
                known = KnownValues.load(self.store.file(VALUES, delta), len(lm.applied))
            elif settings.get("editor") is None:  # a trained editor searches nothing
                warnings.warn(
                    f"delta {delta} has no values in the store ({made['method']} keeps none, or gc removed them): "
                    f"{plural(len(cases), 'fact')} edited anew",
                    RetconWarning,
                    stacklevel=4,
                )
        new = self.propose(
            lm,
            [edit for case in cases for edit in case.edits],
            again,
            moments=moments,
            known=known,
            state=state_after(lm.applied, again),
            seed=int(made["seed"]),
            contexts=Contexts(old.contexts) if old.contexts else None,
            progress=progress,
        )
        if old.provenance.get("moments") and new.provenance["moments"] != old.provenance["moments"]:
            raise InvalidSetting(
                f"delta {delta} was made with other second moments than those given; name the same text",
                option=" (--corpus)",
            )
        return new

    def _method_of(self, delta: str, made: Mapping[str, Any], given: str | None, *, lenient: bool) -> str:
        """Return the name of the method that made a delta, or its "module:Class"; no code is imported for it that is
        neither given nor a registered method's.

        Args:
            lenient: one given that is not this delta's is another's.

        Raises:
            InvalidSetting: it, or the method that it wraps, is in no module that is imported; or another is given.
        """
        from retcon.methods.common.contract import class_path
        from retcon.methods.common.registry import class_at_hand, list_methods, method_class

        name = str(made["method"])
        place = str(made.get("class", name))
        known = method_class(name) if name in list_methods() else None
        registered = known is not None and place in (name, class_path(known))
        found, wrapped = name if registered else place, []
        settings = made["settings"]
        while settings.get("base_method"):
            wrapped.append(str(settings["base_method"]))
            settings = settings.get("base_settings", {})
        if given is not None and given not in wrapped:
            chosen = method_class(given)
            if chosen is known if registered else chosen.name == name:
                found = given
            elif not lenient:
                raise InvalidSetting(
                    f"method {given} is {chosen.name} ({class_path(chosen)}), and {name} ({place}) made delta "
                    f"{delta}: " + ("leave it out" if registered else "name that one")
                )
        for each in (found, *wrapped):
            kind = class_at_hand(each)
            if each != given and (kind is None or (each == found and kind.name != name)):
                facts = list(self.store.lines_by_delta()[delta])
                raise InvalidSetting(
                    f"delta {delta} (fact {facts[0]!r}{f' and {len(facts) - 1} more' * (len(facts) > 1)}) was made by "
                    f"{each}, a method that is not part of retcon. Its code is not run unless you ask for it; nothing "
                    "was changed. Name its file and class: retcon amend or retcon revert --fact with --method "
                    "module:Class (in Python, method=..., or import it first)"
                )
        return found

    def _moments_of(self, delta: str) -> "Moments | None":
        from retcon.memory.corpus import Corpus
        from retcon.memory.moments import CorpusMoments

        corpus = self.store.corpus_of(delta)
        if corpus is None:
            return None
        try:
            return CorpusMoments(Corpus.named(corpus))
        except MalformedFile as error:
            raise MalformedFile(
                f"{error}; delta {delta} was made with second moments of it; say where it is now", option=" (--corpus)"
            ) from None


def _editor_of(delta: str, made: Mapping[str, Any], given: "str | os.PathLike[str] | None") -> str:
    """Return the file of the trained editor that a delta was made with: the one given, or the one on record."""
    path = Path(made["settings"]["editor"] if given is None else given)
    name_it = {
        "python": "name it: editor=FILE",
        "option": "name it: --editor FILE",
        "page": "name it in the settings: editor=FILE",
    }
    if not path.is_file():
        raise InvalidSetting(
            f"{path}: no such file; {made['method']} made delta {delta} with a trained editor, and without its file no "
            f"fact of it can be changed; ",
            **name_it,
        )
    found = sha256_of(path)
    if found != made["editor_sha256"]:
        raise InvalidSetting(
            f"{path}: not the editor that delta {delta} was made with (SHA-256 {found[:12]}, on record is "
            f"{made['editor_sha256'][:12]}); ",
            **name_it,
        )
    return str(path)


def in_precision(lm: "LM", delta: "Attachment", precision: Precision) -> "Attachment":
    """Return the delta with its changes in that precision, and with what the model says then in its report; an
    attachment of another kind as it is.

    Raises:
        NonFinite: a value is out of float16's range.
    """
    import torch

    from retcon.delta import Delta
    from retcon.methods.common.proposal import report_after

    if precision == "float32" or not isinstance(delta, Delta):
        return delta
    changes = {}
    for name, parts in delta.changes.items():
        narrow = []
        for change in parts:
            tensors: dict[str, Any] = {
                n: tensor.to(torch.float16) for n, tensor in change.tensors().items() if tensor.is_floating_point()
            }
            if not all(bool(t.isfinite().all()) for t in tensors.values()):
                raise NonFinite(f"{name}: the change is out of float16's range; make the store with float32")
            narrow.append(replace(change, **tensors))
        changes[name] = tuple(narrow)
    delta = replace(delta, changes=changes)
    with lm.edited(delta):
        return replace(delta, report=report_after(lm, delta.edits, delta.report))
