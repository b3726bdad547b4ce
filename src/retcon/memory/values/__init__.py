"""Values: vectors that make the model say the new answer when they stand at a site.

`objective` says what is looked for, `plain` finds it as the definition reads, `search` fast: it cuts a batch up
(`plan`), works chunk by chunk (`chunk`), and can keep what it has on disk (`store`).
"""

from retcon.memory.values.objective import Values, ValueSearch, ValueSite
from retcon.memory.values.search import search_values
from retcon.memory.values.store import keeping_values

__all__ = ["ValueSearch", "ValueSite", "Values", "keeping_values", "search_values"]
