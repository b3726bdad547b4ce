"""Attacks on what retcon promises: each is a module that prints `tried / held / faults` and exits with 1 on a fault.

`make attack` runs them at full size; `make test` runs all at a small size (test_attacks.py).
"""
