"""Random sequences of applying, reverting and scopes with all kinds of change: `python -m tests.attacks.sequences`.

Over the architectures and four dtypes: after every step the weights are those of `lm.applied` to the bit, and the
base's own at the end.
"""

import random
import warnings

import torch

from retcon.lm.layouts import LAYOUTS
from retcon.lm.model import LM
from tests.attacks.tally import Tally, main
from tests.conftest import FAMILIES, tiny_model, tokenizer
from tests.lm.deltas import by_hand, random_delta, same_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sequence(family: str, dtype: torch.dtype, seed: int) -> str | None:
    """One sequence of twelve steps; what did not hold, or None."""
    rng = random.Random(seed)
    lm = LM(tiny_model(family, dtype, n_layers=2), tokenizer())
    names = [lm.site(layer, kind).name for layer in (0, 1) for kind in ("down_proj", "o_proj")]
    base = {name: lm.parameter(name).detach().clone() for name in names}
    shapes = {name: tuple(w.shape) for name, w in base.items()}
    spare = [random_delta(100 * seed + i, shapes, lm.fingerprint()) for i in range(8)]
    for step in range(12):
        move = rng.random()
        applied = lm.applied
        free = [d for d in spare if d not in applied]
        if free and (move < 0.5 or not applied):
            lm.apply(rng.choice(free))
        elif free and move < 0.65:
            with lm.edited(rng.choice(free)), lm.without_deltas():
                pass
        elif move < 0.95:
            lm.revert(rng.choice(applied))
        else:
            lm.revert_all()
        for name, weight in base.items():
            own = [d for d in lm.applied if name in d.changes]
            if not same_bytes(lm.parameter(name), by_hand(weight, name, own) if own else weight):
                return f"other bytes: {family} {dtype} seed {seed}: {name} after step {step}"
    lm.revert_all()
    if not all(same_bytes(lm.parameter(name), weight) for name, weight in base.items()):
        return f"base lost: {family} {dtype} seed {seed}"
    return None


def attack(n: int, seed: int) -> Tally:
    """`n` sequences, family by family and dtype by dtype."""
    tally = Tally("sequences")
    warnings.simplefilter("ignore")
    families = [f for f in FAMILIES if f in LAYOUTS]
    for i in range(n):
        tally.count(sequence(families[i % len(families)], DTYPES[i // len(families) % 4], seed + i))
    tally.notes |= {"architectures": len(families), "dtypes": len(DTYPES)}
    return tally


if __name__ == "__main__":
    main(attack, 500, __doc__)
