"""What one number is called, and which axis it speaks of."""

from dataclasses import dataclass

from retcon.pages import PromptKind

_NAMES = {"rewrite": ("ES", "EM", "EA"), "paraphrase": ("GS", "PM", "PA"), "neighborhood": ("LS", "NM", "NA")}


@dataclass(frozen=True, slots=True)
class Measured:
    """One number from one query, or from one case where it needs several queries."""

    metric: str
    """`ES`, `GS`, `LS`, `Portability`, ..., or the axis where it has no name of its own."""
    variant: str
    value: float | None
    """0 to 1 (magnitudes -1 to 1, fluency in bits, divergence in nats); None where it could not be had."""
    n: int
    """Target tokens that the value is the mean of (words, for generated text)."""
    note: str | None = None
    """`tie`, `few_words`, ..., or why there is no value."""


def metric_names(axis: str) -> tuple[str, str, str]:
    """Return the names of success, magnitude and accuracy on an axis; an axis without published names gives its own."""
    if axis in _NAMES:
        return _NAMES[axis]
    if is_locality(axis):
        return _NAMES["neighborhood"]
    if axis.split(".")[0] == "portability":
        return "Portability", "portability_magnitude", "portability_accuracy"
    return axis, axis, axis


def is_locality(axis: str) -> bool:
    """Return whether the axis asks for what an edit must leave alone."""
    return axis == "neighborhood" or axis.split(".")[0] == "locality"


def prompt_kind(axis: str) -> PromptKind:
    """Return what a query of the axis is to the fact, as tables of facts name it."""
    if is_locality(axis):
        return "neighbour"
    return "own" if axis == "rewrite" else "paraphrase" if axis.split(".")[0] == "paraphrase" else "follows"
