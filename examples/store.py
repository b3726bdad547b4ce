"""Keep edits under version control: take one fact of a batch back, change another, prove that nothing broke."""

from pathlib import Path
from tempfile import TemporaryDirectory

import retcon
from retcon.store.verify import verify

lm = retcon.load("demo:gptj")
facts, _ = retcon.read_cases("world", limit=10)

with TemporaryDirectory() as folder:
    store = retcon.Store.init(Path(folder) / "edits", lm)
    store.edit(lm, facts, retcon.method("jeep", for_model=lm), message="ten facts")
    store.revert_fact(lm, facts[0].id)  # the other nine are written again; none is searched again
    store.amend(lm, facts[1].id, "Norway")
    for entry in store.log():
        print(entry.id, entry.action, entry.message)
    print(verify(store, lm).markdown())
