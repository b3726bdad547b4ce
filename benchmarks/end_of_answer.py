"""Fine-tuning done well, and when its answer counts: end token trained or not, context in the test or not.

    python -m benchmarks.end_of_answer --model .cache/smollm2-135m --data counterfact.json --n 20
    python -m benchmarks.end_of_answer --model PATH --data FILE --n 20 --set epochs=15 --set steps_per_epoch=5

Two papers are 30 points apart about the same method (arXiv:2509.22072 and one that measures it): one trains the end of
the text after the answer, the other does not; one asks with a context before the prompt, the other without. `ft` edits
all facts at once, with either choice; the edited model then writes up to 50 tokens, until it ends by itself or a line
does, with either prompt. "whole" is the share of facts of which that text is the answer and nothing else (a full stop
left out), "begins" of which it begins with the answer, "ended" of texts shorter than 50 tokens. "local" is the share of
neighbours whose first token is the unedited model's.
"""

import time
from dataclasses import asdict

import retcon
from benchmarks.common import cases_of, command_line, machine, print_row
from retcon.edits import Case
from retcon.lm.generate import Writing, generate
from retcon.lm.model import LM
from retcon.workflow import read_settings

CONTEXT = "Complete the sentence with the right words, and write nothing else.\n\n"
HOW = Writing(max_new_tokens=50, stops=("\n",), skip_newlines=True)


def share(found: list[bool]) -> str:
    return f"{100 * sum(found) / len(found):.0f}"


def row(lm: LM, cases: list[Case], context: str) -> list[str]:
    """Return whole, begins, ended: over the cases' edits."""
    written = generate(lm, [context + case.edits[0].text for case in cases], HOW)
    answers = [case.edits[0].target_new for case in cases]
    texts = [each.text.strip() for each in written]
    whole = [text.rstrip(".") == answer for text, answer in zip(texts, answers, strict=True)]
    begins = [text.startswith(answer) for text, answer in zip(texts, answers, strict=True)]
    ended = [len(lm.tokenizer(text)["input_ids"]) < HOW.max_new_tokens - 1 for text in texts]
    return [share(whole), share(begins), share(ended)]


def firsts(lm: LM, cases: list[Case]) -> list[str]:
    """Return the first token after each neighbour's prompt."""
    asked = [q.prompt for case in cases for q in case.queries if q.axis.startswith("neighborhood")]
    return [each.text for each in generate(lm, asked, Writing(max_new_tokens=1, stops=()))] if asked else []


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default=".cache/smollm2-135m")
    parser.add_argument("--data", required=True, help="facts, in any format of docs/data.md")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    given = parser.parse_args()
    lm = retcon.load(given.model)
    cases = cases_of(given.data, given.start, given.n, 0)
    own = read_settings("ft", dataset=None, preset=None, assignments=given.set)
    before = firsts(lm, cases)
    print(f"{given.model}, {len(cases)} facts from {given.start}; {machine()}\n", flush=True)
    print(
        "| end trained | context in the test | whole | begins | ended | local |\n|---|---|---|---|---|---|", flush=True
    )
    for end in (None, False, True):
        if end is None:
            for context in ("", CONTEXT):
                print_row("unedited", "yes" if context else "no", *row(lm, cases, context), 100)
            continue
        ft = retcon.method("ft", for_model=lm, **{**own, "target_eos": end})
        started = time.perf_counter()
        delta = ft.propose(lm, [case.edits[0] for case in cases])
        took = time.perf_counter() - started
        with lm.edited(delta):
            after = firsts(lm, cases)
            local = share([a == b for a, b in zip(before, after, strict=True)]) if before else "-"
            for context in ("", CONTEXT):
                print_row("yes" if end else "no", "yes" if context else "no", *row(lm, cases, context), local)
        settings = {name: value for name, value in asdict(ft).items() if name in ("layers", "learning_rate", "epochs")}
        print(f"<!-- {took:.0f} s, {settings} -->", flush=True)


if __name__ == "__main__":
    main()
