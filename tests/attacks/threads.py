"""Two threads on one LM: `python -m tests.attacks.threads`. Each trial lets both apply, revert and enter scopes for a
fifth of a second; every call succeeds or says that the model is busy, and the base comes back to the bit."""

import random
import threading
import time
import warnings

import torch

from retcon.delta import Delta
from retcon.errors import DeltaNotApplied, ModelBusy
from retcon.lm.model import LM
from tests.attacks.tally import Tally, main
from tests.conftest import tiny_model, tokenizer
from tests.lm.deltas import random_delta, same_bytes

SECONDS = 0.2


def trial(seed: int) -> str | None:
    """Two threads for a while; what did not hold, or None."""
    lm = LM(tiny_model("gptj", torch.bfloat16, n_layers=2), tokenizer())
    names = [lm.site(layer, "down_proj").name for layer in range(2)]
    base = {name: lm.parameter(name).detach().clone() for name in names}
    shapes = {name: tuple(w.shape) for name, w in base.items()}
    faults: list[str] = []

    def work(number: int) -> None:
        rng = random.Random(10 * seed + number)
        own: list[Delta] = [random_delta(100 * seed + 10 * number + i, shapes, lm.fingerprint()) for i in range(4)]
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            delta = rng.choice(own)
            try:
                if rng.random() < 0.4:
                    lm.apply(delta)
                elif rng.random() < 0.7:
                    lm.revert(delta)
                else:
                    with lm.edited(delta), lm.without_deltas():
                        if any(not same_bytes(lm.parameter(n), w) for n, w in base.items()):
                            faults.append(f"other bytes: seed {seed}: inside a scope")
            except (DeltaNotApplied, ModelBusy):
                pass
            except Exception as error:
                faults.append(f"error: seed {seed}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lm.revert_all()
    if any(not same_bytes(lm.parameter(n), w) for n, w in base.items()):
        faults.append(f"base lost: seed {seed}")
    return faults[0] if faults else None


def attack(n: int, seed: int) -> Tally:
    """`n` trials."""
    tally = Tally("threads")
    warnings.simplefilter("ignore")
    for i in range(n):
        tally.count(trial(seed + i))
    return tally


if __name__ == "__main__":
    main(attack, 50, __doc__)
