"""Write `held_out.json`, the phrasings that no model of the world reads; needed when `facts.json` has changed.

python -m recipes.held_out
"""

import json

from retcon.world.facts import FACTS, HELD_OUT, N_SEEN, read_world

SEED = 0


def main() -> None:
    held_out: dict[str, dict[str, list[int]]] = {}
    for (relation, subject), indices in read_world(FACTS, seed=SEED).held_out.items():
        held_out.setdefault(relation, {})[subject] = list(indices)
    rows = ",\n".join(f'"{r}": {json.dumps(subjects, ensure_ascii=False)}' for r, subjects in held_out.items())
    HELD_OUT.write_text(f'{{"seed": {SEED}, "n_seen": {N_SEEN}, "held_out": {{\n{rows}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
