"""Edit the same facts by three methods and compare what they keep."""

import retcon

lm = retcon.load("demo:gptj")
cases, _ = retcon.read_cases("world", limit=10)
edits = [edit for case in cases for edit in case.edits]
before = retcon.evaluate(lm, cases, generate=False)

for name in ("jeep", "memit", "rome"):
    delta = retcon.in_steps(retcon.method(name, for_model=lm), lm, edits)
    with lm.edited(delta):
        print(name)
        print(retcon.evaluate(lm, cases, pre=before, generate=False).summary())
