"""What a state says of how it was made, so that no call takes it up for anything else."""

from collections.abc import Mapping

from torch import Tensor

from retcon.checked import from_bytes
from retcon.errors import DeltaMismatch
from retcon.lm.model import LM


def marked(state: Mapping[str, Tensor], lm: LM, **marks: str | float) -> dict[str, Tensor]:
    """Return a state with the fingerprint of the unedited model and other marks: what `unmarked` compares."""
    return {**state, **{name: from_bytes(value.encode()) for name, value in _texts(lm, marks).items()}}


def unmarked(method: str, state: Mapping[str, Tensor], lm: LM, remedy: str, **marks: str | float) -> dict[str, Tensor]:
    """Return a state without its marks. A mark that it lacks, as a state of an earlier version does, is not compared.

    Raises:
        DeltaMismatch: it was made on another model, or with another value of a mark.
    """
    wanted = _texts(lm, marks)
    for name, value in wanted.items():
        found = bytes(state[name].tolist()).decode() if name in state else value
        if found != value:
            raise DeltaMismatch(f"{method}: the state given is of {name} {found}, wanted is {name} {value}; {remedy}")
    return {name: tensor for name, tensor in state.items() if name not in wanted}


def _texts(lm: LM, marks: Mapping[str, str | float]) -> dict[str, str]:
    return {"base": lm.fingerprint(), **{name: str(value) for name, value in marks.items()}}
