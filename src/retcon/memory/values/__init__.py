"""Values: vectors that make the model say the new answer when they take a site's place.

`objective` says what is looked for, `reference` finds it as the definition reads, `search` fast: it cuts a batch up
(`plan`), works chunk by chunk (`rows`, `step` and `state`, `schedule`), and can keep what it has on disk (`store`).
"""

from retcon.memory.values.objective import Values, ValueSearch, ValueSite
from retcon.memory.values.search import search_values
from retcon.memory.values.store import ValueCache

__all__ = ["ValueCache", "ValueSearch", "ValueSite", "Values", "search_values"]
