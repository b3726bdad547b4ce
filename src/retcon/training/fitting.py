"""The loop in which an editor is trained: validation, early stop, and going on after a kill with the identical result.

The loop knows nothing of editing: `step` adds a gradient to the parameters, `validate` gives the loss that decides.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retcon.checked import Kind, read_checked, under, write_checked
from retcon.errors import AnotherIdentity, InvalidSetting, MalformedFile, NonFinite, RetconWarning
from retcon.work import silent

TRAINING = Kind("unfinished training of an editor", format=1, computation=1)


@dataclass(frozen=True, kw_only=True)
class FitSchedule:
    """How long to go on."""

    steps: int
    """At most."""
    validate_every: int
    """Steps between two validations."""
    patience: int
    """Steps without a better validation loss after which it ends."""
    clip: float
    """Largest norm of a gradient."""
    anneal: bool = False
    """Let learning rates fall linearly to nothing over the steps, so that the noise of small batches settles."""


@dataclass(frozen=True)
class CurvePoint:
    """The losses at one validation."""

    step: int
    train: float | None
    """Mean over the steps since the validation before; None at the first."""
    validation: float


@dataclass
class Fit:
    """A training, running or ended."""

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    curve: list[CurvePoint] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    """The module's tensors at the lowest validation loss."""

    @property
    def best_point(self) -> CurvePoint:
        """The validation that `best` is from."""
        return min(self.curve, key=lambda point: point.validation)

    def run(
        self,
        step: Callable[[int], float],
        validate: Callable[[], float],
        schedule: FitSchedule,
        *,
        unfinished: Path,
        identity: Mapping[str, Any],
        force: bool = False,
        progress: Callable[[int, int], None] = silent,
    ) -> None:
        """Train until the steps are over or validation gets no better; the module then has its best tensors.

        A killed run that is given the same arguments again goes on from its last validation.

        Args:
            step: adds the gradient of step i to the parameters' `.grad` and returns the loss; it draws by i alone.
            validate: the loss on what is not trained on.
            unfinished: file that the training is kept in, and that is removed by whoever has saved its result.
            identity: all that determines the training.
            force: replace what another training has kept in the file.

        Raises:
            InvalidSetting: another training is kept in the file; the message says what differs.
            NonFinite: a loss or a gradient is NaN or infinite; the file keeps what there was before.
        """
        first = self._resume(unfinished, identity, force)
        losses: list[float] = []
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        for i in range(first, schedule.steps + 1):
            last = i == schedule.steps
            if i % schedule.validate_every == 0 or last:
                self._validated(i, losses, validate)
                losses = []
                self._keep(unfinished, identity, i)
                if i - self.best_point.step >= schedule.patience:
                    break
            if last:
                break
            if schedule.anneal:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * (1 - i / schedule.steps)
            losses.append(self._step(step, i, schedule.clip))
            progress(i + 1, schedule.steps)
        self.module.load_state_dict(self.best)

    def _step(self, step: Callable[[int], float], i: int, clip: float) -> float:
        self.module.train()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = step(i)
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFinite(
                f"training step {i}: the loss is {loss}, its gradient's norm {norm}; lower learning_rate or step_size"
            )
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def _validated(self, i: int, losses: Sequence[float], validate: Callable[[], float]) -> None:
        if self.curve and self.curve[-1].step == i:  # resumed here
            return
        self.module.eval()
        found = validate()
        if not math.isfinite(found):
            raise NonFinite(f"validation at step {i}: the loss is {found}; lower learning_rate or step_size")
        self.curve.append(CurvePoint(i, sum(losses) / len(losses) if losses else None, found))
        if self.best_point.step == i:
            self.best = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def _keep(self, unfinished: Path, identity: Mapping[str, Any], i: int) -> None:
        tensors = {f"now.{name}": t for name, t in self.module.state_dict().items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        for k, optimizer in enumerate(self.optimizers):
            for number, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{k}.{number}.{name}": torch.as_tensor(t) for name, t in state.items()}
        curve = [asdict(point) for point in self.curve]
        write_checked(unfinished, TRAINING, identity, tensors, {"step": i, "curve": curve})

    def _resume(self, unfinished: Path, identity: Mapping[str, Any], force: bool) -> int:
        """Return the step to begin with: where a killed run of the same training was, else 0."""
        try:
            tensors, about = read_checked(unfinished, TRAINING, identity)
        except FileNotFoundError:
            return 0
        except MalformedFile as error:
            if isinstance(error, AnotherIdentity) and not force:
                raise InvalidSetting(
                    f"{error}: a training that was begun with something else is kept there; end it first, name another "
                    "file, or replace it",
                    python=" (force=True)",
                    option=" (--force)",
                ) from None
            warnings.warn(f"{error}; training begins anew", RetconWarning, stacklevel=3)
            return 0
        self.curve = [CurvePoint(**point) for point in about["curve"]]
        self.best = under("best.", tensors)
        now = under("now.", tensors)
        self.module.load_state_dict(now)
        for k, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{k}."):
                    number, _, own = name.removeprefix(f"optimizer.{k}.").partition(".")
                    state.setdefault(int(number), {})[own] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(about["step"])
