"""What an LM attaches and detaches: a change to a model that is a value.

`Delta` is the kind that is only weights. Others act beside the weights: on the outputs of modules (a memory of keys, an
adapter with a router) or on the prompt before it becomes tokens (in-context editing). The ledger, scopes, `in_steps`,
benchmarks and the command line know an attachment by the protocol below and by nothing else.

A kind of one's own extends `Beside`, gives its tensors, and says what it does in `hooks` or `prompt`. Its files can be
read once it is registered: by `register(MyKind)`, or by an entry point of the group `retcon.attachments`.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, Self, TypeVar, runtime_checkable

from retcon.checked import Kind, digest_of, read_checked, under, write_checked
from retcon.edits import Edit, edit_record
from retcon.errors import DeltaMismatch, InvalidSetting, MalformedFile
from retcon.extensions import installed, named_object
from retcon.files import as_json, check_exists

if TYPE_CHECKING:
    from torch import Tensor

    from retcon.delta import Change

_Kind = TypeVar("_Kind")
ENTRY_POINTS = "retcon.attachments"
DELTA = "retcon.delta:Delta"
"""Where files go that name no kind of their own."""


@dataclass(frozen=True)
class Hook:
    """What happens to the output of one module while an attachment is attached."""

    module: str
    """Its name in the model, inside a block: `model.layers.3.mlp`. Not a block itself, whose recorded output may stand
    in for a run of it."""
    call: "Callable[[Tensor, Tensor], Tensor]"
    """(the module's first input, its output) -> what the model goes on with; (batch, seq, d) each. It may look at one
    token at a time only: earlier tokens of a row may be missing, since their states are known."""


@dataclass(frozen=True)
class Cost:
    """What an attachment costs at inference, beside the model without it."""

    nbytes: int = 0
    """Memory held beside the weights."""
    flops_per_token: float = 0.0
    """Floating-point operations, multiply and add counted apart."""
    prompt_characters: int = 0
    """Text put before or after every prompt."""


@dataclass(frozen=True)
class EditReport:
    """What happened to one edit while its delta was made."""

    id: str
    search_probability: float
    """Geometric-mean probability of the target per token, mean over contexts, with the values in place (not yet the
    weights); where nothing is searched, that of the weights."""
    steps: int
    """Optimisation steps taken."""
    stopped: str
    """Why the search ended: `reached`, `steps`, `clamped` (out of steps with a value on its clamp), or `non_finite`
    (masked tuning went back to the last finite values); `written` by a method that searches nothing."""
    detail: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Method-specific figures, such as the loss terms at the end."""
    final_probability: float | None = None
    """Geometric-mean probability of the target per token on the bare prompt, with the delta; None: not measured."""
    greedy_match: bool | None = None
    """Whether every target token is then the model's first choice."""

    @property
    def lost_in_write(self) -> bool:
        """Whether the search found what the weights do not give, whatever ended the search: the answer is not the first
        choice, and its probability is less than half of what was searched."""
        if self.greedy_match is not False or self.final_probability is None or self.stopped == "written":
            return False
        return self.stopped == "reached" or self.final_probability < 0.5 * self.search_probability

    @property
    def outcome(self) -> str:
        """`reached`, or why it was not: `conflict` (lost in the write, to the weight on old keys or to other
        edits), which is asked first, `clamped`, `steps` or `non_finite`; or `missed`, where nothing was searched."""
        if self.stopped == "written":
            return "reached" if self.greedy_match else "missed"
        return "conflict" if self.lost_in_write else self.stopped


@runtime_checkable
class Attachment(Protocol):
    """A change to a model, with the record of how it came about. Inert: only the LM attaches and detaches it."""

    @property
    def id(self) -> str:
        """Hash of the content: the attachment's identity (16 hexadecimal digits)."""

    @property
    def base(self) -> str:
        """Fingerprint of the unedited model it was made for."""

    @property
    def parents(self) -> tuple[str, ...]:
        """Ids of what was attached when it was proposed, in order."""

    @property
    def supersedes(self) -> tuple[str, ...]:
        """Ids that this one replaces: attaching takes them off, detaching puts them back."""

    @property
    def changes(self) -> "Mapping[str, tuple[Change, ...]]":
        """What it adds to weights, by parameter name; empty where it acts beside them."""

    @property
    def report(self) -> tuple[EditReport, ...]:
        """Per edit: probability reached, steps, why the search stopped."""

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What it writes, in the order of the report."""

    @property
    def contexts(self) -> tuple[str, ...]:
        """Prefixes that were put before the prompts."""

    @property
    def state(self) -> "Mapping[str, Tensor] | None":
        """What the next call of a sequential method takes as `state`."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Method, settings, seed, versions. JSON values."""

    def hooks(self) -> Sequence[Hook]:
        """Return what it does to the outputs of modules."""

    def prompt(self, text: str) -> str:
        """Return what the model reads in place of a prompt."""

    def cost(self) -> Cost:
        """Return what it costs at inference."""

    def nbytes(self) -> int:
        """Return the bytes of its tensors."""

    def norms(self) -> dict[str, float]:
        """Return the Frobenius norm of the change, per parameter."""

    def ranks(self) -> dict[str, int | None]:
        """Return an upper bound of the change's rank, per parameter; None where it has none."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one file; a crash leaves the old file or the new, never a part."""


class FrozenDict(dict[str, Any]):
    """A dict that stays as it is, though what its values hold need not. A copy is a plain dict."""

    def __new__(cls, given: Any) -> Any:
        """Return a plain dict where pairs are given: so `dataclasses.asdict` makes its copies."""
        return super().__new__(cls) if isinstance(given, Mapping) else dict(given)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("an attachment stays as it is; dataclasses.replace makes another one")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = _refuse
    pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle and copy make of it: a dict, which an attachment freezes again."""
        return dict, (dict(self),)


@dataclass(frozen=True, eq=False, kw_only=True)
class Beside:
    """An attachment that acts beside the weights. Extend it: a name in `kind`, and `hooks` or `prompt`.

    Attachments compare by `id`. `save` and `load` are exact.
    """

    kind: ClassVar[str]
    """Name in its files, such as "lookup"."""
    version: ClassVar[int] = 1
    """Raised when the same tensors and settings come to mean something else; older files are then refused."""

    base: str
    tensors: "Mapping[str, Tensor]" = field(default_factory=dict)
    """What it is made of, by name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else it needs to act. JSON values."""
    parents: tuple[str, ...] = ()
    supersedes: tuple[str, ...] = ()
    report: tuple[EditReport, ...] = ()
    edits: tuple[Edit, ...] = ()
    contexts: tuple[str, ...] = ()
    state: "Mapping[str, Tensor] | None" = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("settings", "provenance"):  # as a file gives them back
            object.__setattr__(self, name, FrozenDict(as_json(getattr(self, name), name)))

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()  # the copies of frozen dicts are plain

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Beside) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    @cached_property
    def id(self) -> str:
        """Hash of kind, settings, tensors, base, parents and edit ids."""
        head = [self.kind, self.version, dict(self.settings), self.base, list(self.parents), list(self.supersedes)]
        head_text = json.dumps([*head, [r.id for r in self.report]], sort_keys=True)
        return digest_of(head_text, sorted(self.tensors.items()))[:16]

    @property
    def changes(self) -> "Mapping[str, tuple[Change, ...]]":
        """None: the weights stay."""
        return {}

    def hooks(self) -> Sequence[Hook]:
        """Return what it does to the outputs of modules: nothing."""
        return ()

    def prompt(self, text: str) -> str:
        """Return what the model reads in place of a prompt: the prompt."""
        return text

    def cost(self) -> Cost:
        """Return what it costs at inference: its tensors' memory. A kind that computes says more."""
        return Cost(nbytes=self.nbytes())

    def nbytes(self) -> int:
        """Return the bytes of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def norms(self) -> dict[str, float]:
        """Return nothing: the weights stay."""
        return {}

    def ranks(self) -> dict[str, int | None]:
        """Return nothing: the weights stay."""
        return {}

    def with_report(self, report: Sequence[EditReport], **provenance: Any) -> Self:
        """Return the same with another report, and with more said about how it was made."""
        return replace(self, report=tuple(report), provenance={**self.provenance, **provenance})

    def joined(self, later: Self) -> Self:
        """Return one attachment that does what this one and a later one do; what `in_steps` makes of its batches.

        Raises:
            InvalidSetting: this kind has not said how.
        """
        raise InvalidSetting(f"attachments of the kind {self.kind!r} cannot be joined; edit all facts in one batch")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; a crash leaves the old file or the new, never a part."""
        tensors = {f"own/{name}": t for name, t in self.tensors.items()}
        tensors |= {f"state/{name}": t for name, t in (self.state or {}).items()}
        about = {
            "id": self.id,
            "base": self.base,
            "settings": dict(self.settings),
            "parents": list(self.parents),
            "supersedes": list(self.supersedes),
            "report": [asdict(r) for r in self.report],
            "edits": [edit_record(e) for e in self.edits],
            "contexts": list(self.contexts),
            "has_state": self.state is not None,
            "provenance": dict(self.provenance),
        }
        write_checked(path, self._file_kind(), {}, tensors, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an attachment of this kind as `save` wrote it.

        Raises:
            MalformedFile: there is no such file, it is damaged, or it holds another kind or version.
        """
        try:
            tensors, about = read_checked(path, cls._file_kind(), {})
        except FileNotFoundError:
            raise MalformedFile(f"{path}: no such file") from None
        return cls(
            base=about["base"],
            tensors=under("own/", tensors),
            settings=about["settings"],
            parents=tuple(about["parents"]),
            supersedes=tuple(about["supersedes"]),
            report=tuple(EditReport(**r) for r in about["report"]),
            edits=tuple(Edit(**e) for e in about["edits"]),
            contexts=tuple(about["contexts"]),
            state=under("state/", tensors) if about["has_state"] else None,
            provenance=about["provenance"],
        )

    @classmethod
    def _file_kind(cls) -> Kind:
        return Kind(name=cls.kind, format=1, computation=cls.version)


# --- files of any kind ---------------------------------------------------------------------------------------------

_REGISTERED: dict[str, type[Beside]] = {}


def list_of_deltas(deltas: Iterable[_Kind]) -> tuple[_Kind, ...]:
    """Return the deltas.

    Raises:
        DeltaMismatch: one delta in place of several.
    """
    if isinstance(deltas, Attachment):
        raise DeltaMismatch(f"one delta given where a list of them is wanted: [delta] (delta {deltas.id!r})")
    return tuple(deltas)


def register(kind: type[Beside]) -> type[Beside]:
    """Make `load` read files of this kind. Usable as a decorator."""
    _REGISTERED[kind.kind] = kind
    return kind


def load(path: str | os.PathLike[str]) -> Attachment:
    """Read an attachment of whatever kind: a `Delta`, or one that is registered.

    Raises:
        MalformedFile: it cannot be read, or is of a kind that nobody has registered.
    """
    from safetensors import SafetensorError, safe_open

    check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("retcon", "{}"))
        name = record.get("kind")
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise MalformedFile(f"{path}: not a readable safetensors file ({error})") from None
    if name is None:
        module, _, attribute = DELTA.partition(":")
        return getattr(importlib.import_module(module), attribute).load(path)
    known: dict[str, Any] = {**installed(ENTRY_POINTS), **_REGISTERED}
    if name not in known:
        raise MalformedFile(
            f"{path}: an attachment of the kind {name!r}, which nothing here reads (known: delta"
            + "".join(f", {other}" for other in sorted(known))
            + "); install the package that made it, or register its class (retcon.attachment.register)"
        )
    found = known[name]
    try:
        kind: type[Beside] = found if isinstance(found, type) else named_object(found)
    except ImportError as error:
        raise MalformedFile(f"{path}: cannot find what reads an attachment of the kind {name!r}: {error}") from error
    return kind.load(path)
