"""Reports from a benchmark's directory: tables in the papers' layouts, pictures, and one page to read.

groups.py gathers runs, tables.py lays out, plots.py draws (matplotlib, the extra `plot`), facts.py has every fact with
its texts, page.py writes the page.
"""

from retcon.bench.report.groups import Group, groups_of
from retcon.bench.report.tables import Table, tables_of

__all__ = ["Group", "Table", "groups_of", "tables_of"]
