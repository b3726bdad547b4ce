"""Edits under version control: a store of facts, deltas and values that lives in git."""

from retcon.store.history import Entry, State
from retcon.store.store import Store

__all__ = ["Entry", "State", "Store"]
