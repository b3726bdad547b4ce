"""What every editing method is: settings in a frozen dataclass, one verb, and no side effect."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import UnionType
from typing import (
    Any,
    Literal,
    Protocol,
    TypedDict,
    Union,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import torch

from retcon.delta import Change, Delta
from retcon.edits import Edit, edit_record
from retcon.errors import InvalidSetting
from retcon.lm.model import LM, Site
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.version import __version__

State = Mapping[str, torch.Tensor]
"""What a sequential method keeps: tensors by name."""
Progress = Callable[[str, int, int], None]
"""Hears (stage, done, total) while a method works."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody listens to."""


def unfiltered(name: str, change: Change) -> Change:
    """A change as it is: no filter before it is written."""
    return change


class Given(TypedDict, total=False):
    """What `propose` may be given besides model, edits and state; what is left out is made, or read from the cache."""

    contexts: Contexts | None
    """Prefixes; sampled by `seed` where none are given."""
    moments: Moments | None
    """Second moments; those of the model's default text where none are given."""
    seed: int
    progress: Progress
    """Hears (stage, done, total)."""


@runtime_checkable
class Method(Protocol):
    """An editing method; its fields are its settings.

    What `propose` returns is something the LM can attach and detach. A Delta is the kind that is only weights.
    """

    @property
    def name(self) -> str:
        """What it is called in the table of methods."""

    @property
    def batch(self) -> bool:
        """Whether `propose` takes more than one edit; `in_steps` applies those of any number one by one."""

    @property
    def keeps(self) -> str:
        """What the delta's `state` holds for the next batch, in words; empty for nothing."""

    def propose(self, lm: LM, edits: Sequence[Edit], *, state: State | None = None, **given: Unpack[Given]) -> Delta:
        """The change that writes `edits`; the model is untouched. `state` is that of the delta before, if any."""

    @classmethod
    def fallback_settings(cls, n_layers: int, *, parallel: bool) -> dict[str, Any]:
        """Settings by relative depth, for a model that has no preset; `parallel`: attention and MLP side by side."""


def uses_moments(method: Any) -> bool:
    """Whether `propose` asks for second moments; a method that does not says so by an attribute of this name."""
    return getattr(method, "uses_moments", True)


def needs_subject(method: Any) -> bool:
    """Whether `method` writes at the subject; one that does not says so by an attribute of this name."""
    return bool(getattr(method, "needs_subject", True))


def provenance(
    method: Any,
    lm: LM,
    edits: Sequence[Edit],
    *,
    contexts: Contexts | None = None,
    moments: Moments | None = None,
    sites: Sequence[Site] = (),
    seed: int,
) -> dict[str, Any]:
    """The record of a run: enough to repeat it and to compare it with another implementation.

    A method that uses no contexts or moments leaves them out.
    """
    import transformers

    return {
        "method": method.name,
        "settings": asdict(method),
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "edits": [edit_record(e) for e in edits],
        "contexts": list(contexts.prefixes) if contexts else [],
        "moments": moments.keys(lm, sites) if moments else {},
        "seed": seed,
        "versions": {
            "retcon": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


# --- settings ----------------------------------------------------------------------------------------------------


def check_layers(method: Any, *settings: str) -> None:
    """Makes each of these settings a tuple of ascending layers.

    Raises:
        InvalidSetting: layers repeat or do not ascend.
    """
    for setting in settings:
        layers = tuple(getattr(method, setting))
        object.__setattr__(method, setting, layers)
        if list(layers) != sorted(set(layers)):
            raise InvalidSetting(f"{method.name}: {setting} layers must ascend without repeats, found {layers}")


def check_not_negative(method: Any, *settings: str) -> None:
    """Raises InvalidSetting where one of these settings is below 0."""
    for setting in settings:
        if getattr(method, setting) < 0:
            found = getattr(method, setting)
            raise InvalidSetting(f"{method.name}: {setting} must not be negative, found {found}")


def check_choices(method: Any) -> None:
    """Raises InvalidSetting where a setting whose type lists its values (a Literal) has another one."""
    for setting, hint in get_type_hints(type(method)).items():
        known = _choices(hint)
        if known and getattr(method, setting) not in known:
            shown = ", ".join(map(str, known))
            raise InvalidSetting(f"{method.name}: {setting} is {getattr(method, setting)!r}; known: {shown}")


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, UnionType) and any(get_origin(part) is Literal for part in get_args(hint)):
        return tuple(v for part in get_args(hint) for v in (_choices(part) or (None,)))
    return ()


def check_stateless(name: str, state: object) -> None:
    """Raises InvalidSetting where a state is handed to a method that has no use for one."""
    if state is not None:
        raise InvalidSetting(f"{name} keeps nothing between batches, but a state was given; leave it out")


def early_layers(n_layers: int) -> tuple[int, ...]:
    """Where the family writes, by relative depth: about the second seventh of the layers."""
    first, last = round(0.14 * n_layers), max(round(0.14 * n_layers), round(0.29 * n_layers))
    return tuple(range(first, last + 1))
