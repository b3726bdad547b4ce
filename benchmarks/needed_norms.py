"""Where clamps should be: how long an offset a new answer needs, layer by layer, beside the clean value's length.

    python -m benchmarks.needed_norms --model demo:gptj --n 20
    python -m benchmarks.needed_norms --model .cache/smollm2-135m --data FILE --n 10 --every 3

At every layer each edit's value is searched alone at the MLP's output, at the subject's last token and at the
prediction position, on the bare prompt, with no clamp, no decay and small steps, until its answer has the probability
0.9. Printed, per place: edits that got there, and the median and the quartiles of ||offset|| / ||clean value|| over
those. Then a line through the logarithms of the ratios over depth (0 first layer, 1 last), of layers where half or more
got there, with a 95 % interval from resampled edits.
"""

import statistics

import torch

import retcon
from benchmarks.common import cases_of, command_line, machine, print_row
from retcon.lm.forward import Point
from retcon.lm.prompts import Where
from retcon.memory.contexts import Contexts
from retcon.memory.values import ValueSearch, ValueSite, search_values

NO_CLAMP = 1e6
WHERE: tuple[Where, ...] = ("subject_last", "prediction")


def main() -> None:
    parser = command_line(__doc__, cases=True)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="layers from one to the next")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rate", type=float, default=0.2, help="Adam's, so that the search does not overshoot")
    args = parser.parse_args()
    lm = retcon.load(args.model)
    edits = [case.edits[0] for case in cases_of(args.data, args.start, args.n, args.seed)]
    search = ValueSearch(steps=args.steps, learning_rate=args.rate, kl_factor=0.0)
    print(f"{args.model}, {len(edits)} edits from {args.start}, seed {args.seed}; {machine()}\n")
    print_row("layer", *(f"{where}: got there | median [quartiles]" for where in WHERE))
    print("|" + "---|" * (1 + 2 * len(WHERE)))
    layers = range(0, lm.n_layers, args.every)
    points: dict[str, list[list[tuple[float, float]]]] = {where: [[] for _ in edits] for where in WHERE}
    for layer in layers:
        cells = [str(layer)]
        for where in WHERE:
            site = ValueSite(Point(layer, "mlp"), where, NO_CLAMP, 0.0)
            found = search_values(lm, edits, [site], Contexts(), search)
            ratios = (found.offset[0].norm(dim=1) / found.init[0].norm(dim=1)).tolist()
            there = [i for i, report in enumerate(found.report) if report.stopped == "reached"]
            for i in there if 2 * len(there) >= len(edits) else ():
                points[where][i].append((layer / (lm.n_layers - 1), ratios[i]))
            cells += [f"{len(there)} of {len(edits)}", _spread([ratios[i] for i in there])]
        print_row(*cells)
    print()
    for where in WHERE:
        growth, low, high = fitted(points[where], args.seed)
        print(f"{where}: from the first layer to the last the ratio grows {growth:.2f} times [{low:.2f}, {high:.2f}]")


def _spread(ratios: list[float]) -> str:
    if len(ratios) < 3:
        return "-"
    first, middle, last = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} [{first:.2f}, {last:.2f}]"


def fitted(points: list[list[tuple[float, float]]], seed: int, n_resamples: int = 1000) -> tuple[float, float, float]:
    """Return how many times a line through the logarithms grows from the first layer to the last, with its interval."""
    generator = torch.Generator().manual_seed(seed)

    def factor(chosen: list[int]) -> float:
        data = torch.tensor([pair for i in chosen for pair in points[i]], dtype=torch.float64)
        depth, log_ratio = data[:, 0] - data[:, 0].mean(), data[:, 1].log()
        return float(torch.exp((depth * (log_ratio - log_ratio.mean())).sum() / depth.square().sum()))

    everyone = [i for i, own in enumerate(points) if own]
    drawn = torch.randint(len(everyone), (n_resamples, len(everyone)), generator=generator).tolist()
    factors = sorted(factor([everyone[j] for j in row]) for row in drawn)
    return factor(everyone), factors[n_resamples // 40], factors[-n_resamples // 40]


if __name__ == "__main__":
    main()
