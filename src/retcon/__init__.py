"""retcon: change what a language model knows, precisely, fast, and so that it can be undone.

Importing is light: names are loaded when first used, and transformers only when a model is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from retcon.chat import Chat
from retcon.edits import (
    Case,
    Edit,
    Query,
    resolve_conflicts,
    write_cases,
    write_edits,
)
from retcon.version import __version__ as __version__

if TYPE_CHECKING:
    from retcon.delta import Columns, Delta, Dense, Entries, LowRank, Rows
    from retcon.evaluation import evaluate, read_cases
    from retcon.lm.layouts import Layout
    from retcon.lm.load import load
    from retcon.lm.model import LM
    from retcon.memory.contexts import Contexts, sample_contexts
    from retcon.memory.moments import Corpus, CorpusMoments, GivenMoments
    from retcon.memory.values import ValueCache
    from retcon.methods.common.choosing import method
    from retcon.methods.common.registry import list_methods
    from retcon.methods.common.sequence import in_steps
    from retcon.store import Store

_LAZY = {
    "Columns": "retcon.delta",
    "Contexts": "retcon.memory.contexts",
    "Corpus": "retcon.memory.moments",
    "CorpusMoments": "retcon.memory.moments",
    "Delta": "retcon.delta",
    "Dense": "retcon.delta",
    "Entries": "retcon.delta",
    "GivenMoments": "retcon.memory.moments",
    "LM": "retcon.lm.model",
    "Layout": "retcon.lm.layouts",
    "LowRank": "retcon.delta",
    "Rows": "retcon.delta",
    "Store": "retcon.store",
    "ValueCache": "retcon.memory.values",
    "evaluate": "retcon.evaluation",
    "in_steps": "retcon.methods.common.sequence",
    "list_methods": "retcon.methods.common.registry",
    "load": "retcon.lm.load",
    "method": "retcon.methods.common.choosing",
    "read_cases": "retcon.evaluation",
    "sample_contexts": "retcon.memory.contexts",
}

__all__ = [
    "LM",
    "Case",
    "Chat",
    "Columns",
    "Contexts",
    "Corpus",
    "CorpusMoments",
    "Delta",
    "Dense",
    "Edit",
    "Entries",
    "GivenMoments",
    "Layout",
    "LowRank",
    "Query",
    "Rows",
    "Store",
    "ValueCache",
    "evaluate",
    "in_steps",
    "list_methods",
    "load",
    "method",
    "read_cases",
    "resolve_conflicts",
    "sample_contexts",
    "write_cases",
    "write_edits",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'retcon' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
