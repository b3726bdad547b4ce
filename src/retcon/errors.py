"""What can go wrong, by name: every error retcon raises on purpose, and the one warning category.

Each message says what was asked, what was found and what to do. Everything derives from `RetconError`.
"""


class _Message(Exception):
    """A message whose end each interface says in its own words; `str` gives it for Python.

    Args:
        problem: what was asked and found, and what to do, in words that every interface has.
        python, option, page: how it goes on in Python, on the command line and on the page.
    """

    def __init__(self, problem: str, *, python: str = "", option: str = "", page: str = "") -> None:
        super().__init__(problem + python)
        self.on_command_line, self.on_page = problem + option, problem + page


class RetconError(_Message):
    """Base of every error that retcon raises on purpose."""


class InvalidEdit(RetconError):
    """An edit, query or case that cannot mean anything: no subject in the prompt, an empty target, two markers."""


class ConflictingEdits(InvalidEdit):
    """Two edits ask for different answers to the same question."""


class MalformedFile(RetconError):
    """A file that is not what its reader expects; the message names file, row and field."""


class AnotherIdentity(MalformedFile):
    """A whole file of the kind that was asked for, which belongs to something else; the message says what differs."""


class UnusableRow(MalformedFile):
    """A row of a file that cannot be used, where none was to be left out."""


class InvalidSetting(RetconError):
    """A setting with a value that the method or the model cannot use."""


class UnknownMethod(RetconError):
    """No method of that name is registered."""


class UnknownPreset(RetconError):
    """No preset of that name exists for the method and the model."""


class UnsupportedModel(RetconError):
    """The model, its tokenizer or the way it was loaded is out of reach; the message says the way out."""


class UnknownLayout(UnsupportedModel):
    """`config.model_type` has no row in the layout table."""


class NotEditable(RetconError):
    """A parameter that must not be edited: quantised, offloaded, shared, or of an integer dtype."""


class PositionNotFound(RetconError):
    """No token covers the character asked for."""


class WrongBase(RetconError):
    """A delta made for other base weights than the model's."""


class DeltaMismatch(RetconError):
    """A delta that does not fit the model's parameters: missing name, wrong shape, index out of range."""


class DeltaNotApplied(RetconError):
    """Asked to revert a delta that is not applied, or to apply one that is."""


class WeightsChanged(RetconError):
    """Something other than retcon has changed weights under an applied delta."""


class ModelBusy(RetconError):
    """Another thread is changing the model or is inside a scope of it, an active scope is entered once more, or an LM
    is copied inside one."""


class UnknownEntry(RetconError):
    """A store has no entry, delta or fact of that name."""


class StoreBusy(RetconError):
    """Another process is writing to the store."""


class PlaceBusy(RetconError):
    """Another process is at work in the same folder."""


class NonFinite(RetconError):
    """NaN or infinity where a number must be: a loss, a moment, a change."""


class UnsafeUpdate(RetconError):
    """An update so large that it would disable the model, where the method's settings refuse such."""


class TooFewTokens(RetconError):
    """A second moment from fewer tokens than the keys have dimensions: it would be singular."""


class WorkFailed(RetconError):
    """A piece of work ended in a worker with an error that cannot be sent to the asking process; the message has it."""


class WorkersLost(RetconError):
    """Workers are lost as often as they are started."""


class MissingPackage(RetconError):
    """An optional package is needed and not installed; the message names the extra that brings it."""


class EndpointFailed(RetconError):
    """A served model cannot be asked: no answer, a refusal, or an answer of another kind; the message says which."""

    def __init__(self, problem: str, *, status: int | None = None) -> None:
        super().__init__(problem)
        self.status = status
        """The status of HTTP that it answered with."""


class RetconWarning(_Message, UserWarning):
    """Something worth knowing that does not stop the work."""


class NoPreset(RetconWarning):
    """A method's settings follow from the model's shape, for no preset is for it."""


class OtherParents(RetconWarning):
    """A delta is applied on top of other deltas than it was proposed on."""


class LargeChange(RetconWarning):
    """A change is much larger than the weight that it changes."""


class OutOfMemory(RetconError):
    """Not even the smallest piece of the work fits into memory."""


def unusable_row(problem: str) -> UnusableRow:
    """Return the error about a row, with what to do."""
    skip = "leave such rows out"
    return UnusableRow(
        f"{problem}. Mend the row, or ",
        python=f"{skip} (on_error='skip').",
        option=f"{skip}: --on-error skip",
        page="take it out.",
    )


def how_to_install(extra: str) -> str:
    """Return what to type for an optional dependency, for a message."""
    return f"pip install 'retcon-lm[{extra}]', or in a clone pip install '.[{extra}]'"
