"""Write cases of the embedded world in KnowEdit's form, with portability.

    python -m recipes.knowedit --n 100 --out world-knowedit.json

Taken are the first N drawn cases that the world knows a consequence of: portability has what follows from the new
answer over two relations (`Reasoning`). The world has no aliases, and its relations are many to one, so that none can
be asked in reverse. Locality has other subjects with the same old answer (`Relation_Specificity`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from retcon import world
from retcon.edits import Case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--drawn", type=int, default=400, help="cases that are drawn, by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("world-knowedit.json"))
    args = parser.parse_args()
    found = rows(world.cases(args.drawn, seed=args.seed))[: args.n]
    args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(found)} cases in {args.out}")


def rows(cases: list[Case]) -> list[dict[str, Any]]:
    """Return the rows of the cases with a consequence."""
    found = []
    for case in cases:
        edit = case.edits[0]
        axes = ("paraphrase", "neighborhood", "two_hop")
        asked = {axis: [q for q in case.queries if q.axis == axis] for axis in axes}
        if not asked["two_hop"]:
            continue
        follows, stays = (
            [{"prompt": q.prompt, "ground_truth": q.target} for q in asked[axis]]
            for axis in ("two_hop", "neighborhood")
        )
        found.append(
            {
                "id": case.id,
                "subject": edit.subject,
                "prompt": edit.text,
                "target_new": edit.target_new,
                "ground_truth": edit.target_true,
                "rephrase": [q.prompt for q in asked["paraphrase"]],
                "portability": {"Reasoning": follows},
                "locality": {"Relation_Specificity": stays},
            }
        )
    return found


if __name__ == "__main__":
    main()
