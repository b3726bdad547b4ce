"""The write's linear problem: the small-n form against the direct form, float64 on the CPU.

    python -m benchmarks.write --d 11008 --n 10 100 1000
    python -m benchmarks.write --d 1024 --n 10 100      # small

Keys and moment are random; only their sizes matter for the time. Four ways are timed: the direct form (K K^T added to
lambda C, one Cholesky of d x d, solve), and the small-n form with C's factor made on the spot, read from a file as from
the disk cache, and in memory. The last column is the largest difference from the direct form over the largest entry.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common import command_line, machine, print_row, timed
from retcon.memory.moments import pack_triangle, unpack_triangle
from retcon.memory.solve import cholesky, equality, ridge_direct

WEIGHT = 15_000.0


def moment(d: int, seed: int) -> Tensor:
    """Return a well-conditioned symmetric positive definite matrix, float32 as it is stored."""
    x = torch.randn(max(d // 8, 1), d, generator=torch.Generator().manual_seed(seed))
    c = x.T @ x / (2 * d)
    c.diagonal().add_(0.1)
    return c


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--d", type=int, default=11_008, help="key dimensions")
    parser.add_argument("--n", type=int, nargs="+", default=[10, 100, 1000], help="edits")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    print(f"d = {args.d:,}, lambda = {WEIGHT:,.0f}, seed {args.seed}; {machine()}\n")
    c = moment(args.d, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "factor.safetensors"
        lower, made = timed(lambda: cholesky(c)[0])
        save_file({"factor": pack_triangle(lower)}, file)
        print(f"Cholesky factor of C: {made:.2f} s, {file.stat().st_size / 1e6:,.0f} MB on disk\n")
        print(
            "| n | direct, s | small-n, factor made, s | factor from disk, s | factor in memory, s | gain, from disk |"
            " largest difference |\n|---|---|---|---|---|---|---|"
        )
        for n in args.n:
            k = torch.randn(args.d, n, dtype=torch.float64)
            wanted, direct = timed(partial(ridge_direct, k, lambda: c, WEIGHT))
            small = partial(equality, k, lambda: c, stabiliser=WEIGHT)
            _, fresh = timed(small)
            found, disk = timed(partial(small, factor=lambda: unpack_triangle(load_file(file)["factor"], args.d)))
            _, memory = timed(partial(small, factor=lambda: lower))
            apart = float((found - wanted).abs().max() / wanted.abs().max())
            cells = [f"{seconds:.2f}" for seconds in (direct, fresh, disk, memory)]
            print_row(f"{n:,}", *cells, f"{direct / disk:.1f}x", f"{apart:.0e}")


if __name__ == "__main__":
    main()
