"""Several attacks in one go: `python -m tests.attacks signals=42 kills=3 --seed 7`.

Each is run in a copy (fork) of this process, which has imported what is heavy and has run nothing, so that none sees
what another has changed, and the imports are paid for once.
"""

import os
import sys
from argparse import ArgumentParser
from importlib import import_module
from types import ModuleType


def attacked(module: ModuleType, n: int, seed: int) -> int:
    """Run one attack in a copy of this process; return its exit code."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 70
        try:
            tally = module.attack(n, seed)
            print(tally, *tally.faults[:10], sep="\n  ", flush=True)
            code = 1 if tally.faults else 0
        finally:
            os._exit(code)
    _, status, used = os.wait4(child, 0)
    print(f"  {used.ru_utime + used.ru_stime:.0f} s of the processor")
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    """Read the command line, and run what it names."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("attacks", nargs="+", metavar="ATTACK=N", help="a module of tests.attacks, and how many trials")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    named = dict(attack.split("=") for attack in asked.attacks)
    modules = {name: import_module(f"tests.attacks.{name}") for name in named}
    codes = [attacked(module, int(named[name]), asked.seed) for name, module in modules.items()]
    sys.exit(max(codes, key=abs))


if __name__ == "__main__":
    main()
