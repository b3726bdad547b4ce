"""What every editing method is: settings in a frozen dataclass, one verb, and no side effect."""

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch

from retcon.attachment import Attachment
from retcon.edits import Case, Edit, check_edits, list_of_cases
from retcon.errors import InvalidSetting
from retcon.files import all_shared
from retcon.lm.model import LM, require_lm
from retcon.lm.scopes import plain_modes
from retcon.lm.site import Site
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.memory.write import UpdateFilter as UpdateFilter
from retcon.methods.common.settings import checked_settings
from retcon.seed import check_seed
from retcon.training.fitting import CurvePoint
from retcon.version import versions
from retcon.work import Progress

LAYER_SETTINGS = ("layer", "layers", "low", "high")
"""Settings that count blocks from 0."""
State = Mapping[str, torch.Tensor]
"""What a sequential method keeps: tensors by name."""


@dataclass(frozen=True)
class ModelShape:
    """What settings follow from where a model has no preset."""

    n_layers: int
    d_model: int
    d_ff: int
    """Width of the keys of the down-projection."""
    parallel: bool
    """Attention and MLP side by side."""

    @classmethod
    def of(cls, lm: LM) -> "ModelShape":
        """Return the shape of a model."""
        return cls(lm.n_layers, lm.d_model, lm.d_ff, lm.layout.parallel)


def _prepared_to_propose(propose: Callable[..., Attachment]) -> Callable[..., Attachment]:
    @wraps(propose)
    def prepared(self: Any, lm: LM, edits: Iterable[Edit], **given: Any) -> Attachment:
        require_lm(lm)
        with plain_modes(), torch.enable_grad():
            return propose(self, lm, check_edits(edits), **_checked(self, given))

    return prepared


def _prepared_to_fit(fit: Callable[..., Path]) -> Callable[..., Path]:
    @wraps(fit)
    def prepared(self: Any, lm: LM, cases: Iterable[Case], out: str | Path, **given: Any) -> Path:
        require_lm(lm)
        with plain_modes(), torch.enable_grad():
            return fit(self, lm, tuple(list_of_cases(cases)), out, **_checked(self, given))

    return prepared


_ARGUMENTS: dict[str, tuple[type[Any], str]] = {
    "contexts": (Contexts, "retcon.Contexts([...])"),
    "moments": (Moments, "retcon.GivenMoments({...}) or retcon.CorpusMoments(...)"),
    "state": (Mapping, "the state of the delta before, delta.state"),
    "values": (ValueCache, "retcon.ValueCache(folder)"),
    "progress": (Callable, "a function of (stage, done, total)"),  # type: ignore[dict-item]
}
"""What `propose` and `fit` may be given besides model, facts and seed, and how to say what is wanted."""


def _checked(method: "Method", given: dict[str, Any]) -> dict[str, Any]:
    """Return what a verb was given, the seed as an int of Python's.

    Raises:
        InvalidSetting: an argument is of another type, the seed is none, or a state is given to a method that keeps
            none; the message names it.
    """
    for name, (kind, wanted) in _ARGUMENTS.items():
        if (value := given.get(name)) is not None and not isinstance(value, kind):
            raise InvalidSetting(f"{name} must be {wanted}, found {value!r:.60}")
    if given.get("state") is not None:
        method.check_takes_state()
    return {**given, "seed": check_seed(given["seed"])} if "seed" in given else given


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """An editing method; its fields are its settings. A method says below where it differs from what is here.

    What `propose` returns is something the LM can attach and detach. A Delta is the kind that is only weights.
    """

    name: ClassVar[str]
    """What it is called in the table of methods."""
    supports_batches: ClassVar[bool] = True
    """Whether `propose` takes more than one edit; `in_steps` applies those of any number one by one."""
    state_description: ClassVar[str | None] = None
    """What the delta's `state` holds for the next batch, in words; empty for nothing, and a state is refused. Where it
    is not said, the next batch of an edit gets the state that there is, and a later edit none."""
    replaces_applied: ClassVar[bool] = False
    """Whether the delta replaces all that were applied before it."""
    uses_moments: ClassVar[bool] = False
    """Whether `propose` needs second moments."""
    needs_subject: ClassVar[bool] = False
    """Whether it writes at the subject, so that an edit without one is refused."""
    layerwise: ClassVar[bool] = False
    """Whether it writes layer by layer, and `propose` takes an `update_filter`."""
    one_layer: ClassVar[bool] = False
    """Whether it is meant for one layer, where its setting `layers` allows several."""
    takes_shrunk_moments: ClassVar[bool] = False
    """Whether second moments may be those of a pass that was cut smaller where memory ran out (`--shrink`)."""
    fits_learning_rate: ClassVar[bool] = False
    """Whether a model without a preset gets a learning rate fitted to as many edits as will be written at once."""
    fits_layer: ClassVar[bool] = False
    """Whether a model without a preset gets the one layer that is trained from what the facts' gradients show."""
    bytes_per_value: ClassVar[int] = 20
    """Memory of each value that is trained: float32, its gradient, Adam's two moments, and a copy to go back to."""

    def __init_subclass__(cls, **named: Any) -> None:
        """Have `propose` and `fit` called in plain modes, on facts that are checked and are a tuple."""
        super().__init_subclass__(**named)
        for verb, prepared in (("propose", _prepared_to_propose), ("fit", _prepared_to_fit)):
            if verb in vars(cls):
                setattr(cls, verb, prepared(vars(cls)[verb]))

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by its name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def keeps_state(self) -> bool:
        """Whether there is a state to go on with, with these settings."""
        return bool(self.state_description)

    @property
    def state_is_change(self) -> bool:
        """Whether the state is the change itself, which has to be in the weights as it is for the next batch."""
        return False

    @property
    def state_layers(self) -> tuple[int, ...] | None:
        """The layers that a state is of, and has to be of to be taken; None where any will do."""
        return tuple(self.settings.get("layers") or ())

    def check_takes_state(self) -> None:
        """Check that `propose` takes the state of the batch before.

        Raises:
            InvalidSetting: with these settings, or with any, nothing is kept.
        """
        if self.state_description is None or self.keeps_state:
            return
        described = self.state_description
        which, kept = (" with these settings", f" (kept: {described})") if described else ("", "")
        raise InvalidSetting(
            f"{self.name}{which} keeps nothing between batches{kept}, but a state was given; leave it out"
        )

    @abstractmethod
    def propose(
        self,
        lm: LM,
        edits: Sequence[Edit],
        *,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
        state: State | None = None,
        values: ValueCache | None = None,
        keep_values: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Attachment:
        """Return the change that writes `edits`; the model is untouched.

        Args:
            contexts: prefixes; sampled by `seed` where none are given.
            moments: second moments; those of the model's default text where none are given.
            state: what the delta of the batch before has as its `state`.
            values: where searched values are kept on disk, so that a run that was killed goes on where it was.
            keep_values: put what was searched into the delta (`delta.values`).
            seed: of everything drawn.
            progress: called with (stage, done, total).

        Raises:
            InvalidEdit, ConflictingEdits: an edit cannot mean anything, or contradicts another.
            InvalidSetting: a layer or a matrix that the model does not have, or an argument of another type.
            NotEditable: a matrix that must not be edited.
            NonFinite: the model gives an edit no finite probability, or the change would not be finite.
        """

    def state_as_written(
        self, lm: LM, edits: Sequence[Edit], contexts: Contexts, *, earlier: State | None, proposed: State | None
    ) -> State | None:
        """Return the state of a batch of which a filter has written less than was proposed, with that in the weights.

        Args:
            earlier: the state that the batch was given.
            proposed: the state that came with the proposal; it holds where nothing in it is of the weights.
        """
        return proposed

    @classmethod
    def fallback_settings(cls, shape: ModelShape) -> dict[str, Any]:
        """Return settings for a model of that shape that has no preset; none where no setting depends on it."""
        return {}

    def as_trained(self) -> Self:
        """Return the method with the settings that its editor was trained with; itself where there is no editor."""
        return self

    def n_trained(self, lm: LM) -> int:
        """Return how many values `propose` trains; 0 where it trains none, or as many as the edits decide."""
        return 0


class Trainable(Method):
    """A method that is trained for a model before it edits; the trained file is its setting `editor`."""

    @abstractmethod
    def fit(
        self,
        lm: LM,
        cases: Sequence[Case],
        out: str | Path,
        *,
        seed: int = 0,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Path:
        """Train on cases other than those to be edited, and write the editor to `out`; the model is untouched.

        Args:
            force: replace the unfinished training of another run at `out`.

        Raises:
            InvalidSetting: too few cases, a layer that the model does not have, or the unfinished training of another
                run at `out` and not `force`.
            InvalidEdit: an edit, a rephrasing or a neighbour that is longer than the model's context.
            OutOfMemory: networks, gradients, Adam's moments and the best networks do not fit.
            NonFinite: the loss overflows.
        """

    @abstractmethod
    def n_fitted(self, lm: LM) -> int:
        """Return how many values `fit` trains."""

    def curve(self, editor: Path) -> Sequence[CurvePoint]:
        """Return the losses of the training, from the file that `fit` wrote; none where it holds none."""
        return ()


def recorded(
    method: Method,
    lm: LM,
    edits: Sequence[Edit],
    *,
    contexts: Contexts | None = None,
    moments: Moments | None = None,
    sites: Sequence[Site] = (),
    seed: int,
    **notes: Any,
) -> dict[str, Any]:
    """Return the fields of a Delta that record its run: enough to repeat it and to compare implementations.

    A method that uses no contexts or moments leaves them out. `notes` join the provenance.
    """
    about = {
        **made_by(method),
        "model": lm.label,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "moments": moments.keys(lm, sites) if moments else {},
        "seed": seed,
        "versions": versions() | {"python": platform.python_version()},
    }
    return {"edits": tuple(edits), "contexts": contexts.prefixes if contexts else (), "provenance": about | notes}


FILES = ("editor", "locate_on", "stop_on")
"""Settings that are paths of files."""


def files_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the files that settings name; one of a wrapped method's goes by both names, `base_settings.stop_on`."""
    inner = {
        f"{outer}.{name}": path
        for outer, value in settings.items()
        if isinstance(value, Mapping)
        for name, path in files_of(value).items()
    }
    return {name: settings[name] for name in FILES if settings.get(name)} | inner


def with_files(settings: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings with other paths for the files, by the names of `files_of`."""
    found = dict(settings)
    for name, path in files.items():
        outer, _, inner = name.rpartition(".")
        found |= {outer: with_files(found[outer], {inner: path})} if outer else {name: path}
    return found


def made_by(method: Method) -> dict[str, Any]:
    """Return what a record says of a method: its name, its class as "module:Class", its settings."""
    return {"method": method.name, "class": class_path(type(method)), "settings": recorded_settings(method)}


def class_path(kind: type) -> str:
    """Return a class as "module:Class"."""
    return f"{kind.__module__}:{kind.__qualname__}"


def recorded_settings(method: Method) -> dict[str, Any]:
    """Return the settings as a delta records them, a wrapped method's too; of an absolute path, the last part."""
    return all_shared(asdict(method))


# --- settings ----------------------------------------------------------------------------------------------------


def check_depth(name: str, lm: LM, layers: Sequence[int]) -> None:
    """Check that the model has the layers that are asked for.

    Raises:
        UnsupportedModel: `lm` is no `LM`.
        InvalidSetting: it has no such layer.
    """
    require_lm(lm)
    for layer in layers:
        if not 0 <= layer < lm.n_layers:
            raise InvalidSetting(f"{name}: layer {layer} asked for, {lm.name!r} has layers 0 to {lm.n_layers - 1}")


def check_mlp(name: str, lm: LM, layers: Sequence[int], mlp: Literal["dense", "experts"] | None) -> None:
    """Check that a model has the MLPs in these layers that a setting `mlp` asks for.

    Raises:
        UnsupportedModel: `lm` is no `LM`.
        InvalidSetting: `dense` where a block has routed experts alone, `experts` where no block has any, or there is no
            such layer.
    """
    check_depth(name, lm, layers)
    if mlp == "dense" and (alone := [layer for layer in layers if not lm.has(layer, "down_proj")]):
        raise InvalidSetting(
            f"{name}: mlp is 'dense', but layer {alone[0]} of {lm.name!r} ({lm.config.model_type}) has routed experts "
            "alone; set it to 'experts', or leave it out"
        )
    if mlp == "experts" and not any(lm.kinds[layer].experts for layer in layers):
        where = f" in layers {', '.join(map(str, layers))}" if any(kind.experts for kind in lm.kinds) else ""
        found = f"{lm.name!r} ({lm.config.model_type}) has no routed experts{where}"
        raise InvalidSetting(f"{name}: mlp is 'experts', but {found}; leave it out")


def check_model_has_layers(method: Method, lm: LM) -> None:
    """Check the settings that are layers of the model: `layer`, `layers`, `low`, `high`.

    Raises:
        InvalidSetting: the model has no such layer.
    """
    for setting in LAYER_SETTINGS:
        found = method.settings.get(setting)
        listed = found if isinstance(found, tuple) else (found,)
        check_depth(f"{method.name}: {setting}", lm, [layer for layer in listed if isinstance(layer, int)])


def check_settings(method: Method) -> None:
    """Check every setting against its field's type, and bring it to that type.

    Raises:
        InvalidSetting: another type, an unknown choice, NaN or infinity; the message names the setting.
    """
    for setting, value in checked_settings(method.name, type(method), method.settings).items():
        object.__setattr__(method, setting, value)


def check_as_trained(method: Method, trained: Method, given: Iterable[str]) -> None:
    """Check that settings given beside an editor are those that it was trained with, which an edit takes.

    Raises:
        InvalidSetting: one is not; the message names it.
    """
    for setting in given:
        value, there = method.settings[setting], trained.settings[setting]
        if value != there:
            raise InvalidSetting(
                f"{method.name}: {setting} is {value!r}, and the editor {trained.settings['editor']} was trained with "
                f"{there!r}, which an edit takes; leave it out, or train an editor with it (retcon fit)"
            )


def early_layers(n_layers: int) -> tuple[int, ...]:
    """Return where the family writes, by relative depth: about the second seventh of the layers, three at least as far
    as there are some below the topmost, from which nothing at a subject reaches the answer.

    What a shallow model lacks is added below: a write one layer higher reaches the prediction less
    (docs/results/without-preset.md).
    """
    last = min(max(round(0.29 * n_layers), 2), max(n_layers - 2, 0))
    return tuple(range(max(min(round(0.14 * n_layers), last - 2), 0), last + 1))


def rome_layer(n_layers: int) -> int:
    """Return the second of `early_layers`, or the only one."""
    return early_layers(n_layers)[:2][-1]


def lower_layers(n_layers: int) -> tuple[int, ...]:
    """Return the layers that fine-tuning stays local in: from a fifteenth to three eighths of the depth.

    Rows trained higher up raise an answer whatever the subject is.
    """
    first = min(round(n_layers / 15), n_layers - 1)
    return tuple(range(first, max(round(0.375 * n_layers), first + 1)))


def by_key_width(share: float, shape: ModelShape) -> float:
    """Return a weight of the second moment that suits the key width m: `share` times m, to three digits.

    It is compared with k^T C^-1 k of a key k, which grows as m: about 2 m in low layers, 3 to 7 m in high ones.
    """
    return float(f"{share * shape.d_ff:.3g}")
