"""retcon: change what a language model knows, precisely, fast, and so that it can be undone.

Importing is light: names are loaded when first used, and transformers only when a model is loaded.
"""

from typing import TYPE_CHECKING

from retcon.chat import Chat as Chat
from retcon.edits import Case as Case
from retcon.edits import Edit as Edit
from retcon.edits import Query as Query
from retcon.edits import resolve_conflicts as resolve_conflicts
from retcon.edits import write_cases as write_cases
from retcon.edits import write_edits as write_edits
from retcon.lazily import lazily
from retcon.version import __version__ as __version__

if TYPE_CHECKING:
    from retcon.delta import Columns as Columns
    from retcon.delta import Delta as Delta
    from retcon.delta import Dense as Dense
    from retcon.delta import Entries as Entries
    from retcon.delta import LowRank as LowRank
    from retcon.delta import Rows as Rows
    from retcon.evaluation import evaluate as evaluate
    from retcon.evaluation import read_cases as read_cases
    from retcon.lm.layouts import Layout as Layout
    from retcon.lm.load import load as load
    from retcon.lm.model import LM as LM
    from retcon.memory.contexts import Contexts as Contexts
    from retcon.memory.contexts import sample_contexts as sample_contexts
    from retcon.memory.moments import Corpus as Corpus
    from retcon.memory.moments import CorpusMoments as CorpusMoments
    from retcon.memory.moments import GivenMoments as GivenMoments
    from retcon.memory.values import ValueCache as ValueCache
    from retcon.methods.common.choosing import method as method
    from retcon.methods.common.registry import list_methods as list_methods
    from retcon.methods.common.sequence import in_steps as in_steps
    from retcon.store import Store as Store

__all__, __getattr__ = lazily(
    __name__,
    {
        "retcon.delta": ("Columns", "Delta", "Dense", "Entries", "LowRank", "Rows"),
        "retcon.evaluation": ("evaluate", "read_cases"),
        "retcon.lm.layouts": ("Layout",),
        "retcon.lm.load": ("load",),
        "retcon.lm.model": ("LM",),
        "retcon.memory.contexts": ("Contexts", "sample_contexts"),
        "retcon.memory.moments": ("Corpus", "CorpusMoments", "GivenMoments"),
        "retcon.memory.values": ("ValueCache",),
        "retcon.methods.common.choosing": ("method",),
        "retcon.methods.common.registry": ("list_methods",),
        "retcon.methods.common.sequence": ("in_steps",),
        "retcon.store": ("Store",),
    },
    ("Case", "Chat", "Edit", "Query", "resolve_conflicts", "write_cases", "write_edits"),
)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
