"""An editor trained for a model, for methods that edit with one, and the picture of its training."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from retcon.edits import Case
from retcon.errors import InvalidSetting
from retcon.work import Progress

if TYPE_CHECKING:
    from retcon.lm.model import LM
    from retcon.methods.common.contract import Trainable
    from retcon.training.fitting import CurvePoint
    from retcon.workflow.settings import Resolved


@dataclass(frozen=True)
class Fitted:
    """A trained editor, and how its training went."""

    path: Path
    curve: "tuple[CurvePoint, ...]"
    """Empty where the method's file has no losses."""
    seconds: float

    @property
    def best(self) -> "CurvePoint":
        """The validation with the lowest loss, which the editor is from; there must be one."""
        return min(self.curve, key=lambda point: point.validation)


def check_trainable(name: str) -> None:
    """Check that a method is one that is trained before it edits.

    Raises:
        InvalidSetting: it is not; the message names those that are.
        UnknownMethod: the message lists what is known.
    """
    from retcon.methods.common.contract import Trainable
    from retcon.methods.common.registry import method_class, registered_classes

    if not issubclass(method_class(name), Trainable):
        able = [other for other, known in registered_classes().items() if issubclass(known, Trainable)]
        raise InvalidSetting(f"{name} edits as it is, with nothing to train first; trained are: {', '.join(able)}")


def memory_needed(lm: "LM", resolved: "Resolved") -> str:
    """Return what training an editor takes, in words."""
    from retcon.methods.common.tuning import memory_note

    return memory_note(_trainable(resolved).n_fitted(lm), resolved.method.bytes_per_value)


def _trainable(resolved: "Resolved") -> "Trainable":
    """Raise InvalidSetting where the method is not one that is trained before it edits."""
    check_trainable(resolved.name)
    return cast("Trainable", resolved.method)


def fit_editor(
    lm: "LM",
    resolved: "Resolved",
    cases: Sequence[Case],
    out: Path,
    *,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Fitted:
    """Train an editor on the cases and write it to `out`; a run that was killed goes on when given the same again.

    Raises:
        InvalidSetting: the method is not trained before it edits, the cases are too few, or the unfinished training of
            another run is at `out` and not `force`.
    """
    method = _trainable(resolved)
    started = time.perf_counter()
    method.fit(lm, cases, out, seed=seed, force=force, progress=progress)
    return Fitted(out, tuple(method.curve(out)), time.perf_counter() - started)


def draw_curve(fitted: Fitted, stem: Path) -> list[Path]:
    """Write the losses of a training as pictures, `stem`.png and `stem`.svg.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    from retcon.drawing import figure, save

    made, axes = figure(1, 1, 4.8, 3.0)
    axis = axes[0, 0]
    trained = [point for point in fitted.curve if point.train is not None]
    axis.plot([p.step for p in trained], [p.train for p in trained], color="0.55", linestyle="--", label="training")
    axis.plot([p.step for p in fitted.curve], [p.validation for p in fitted.curve], color="black", label="validation")
    axis.plot([fitted.best.step], [fitted.best.validation], "o", color="black", label="kept")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(fontsize=8)
    return save(made, stem)
