"""How far a write at one prompt reaches others: keys of paraphrases and neighbours beside the edit's, layer by layer.

    python -m benchmarks.key_likeness --model .cache/smollm2-135m --data counterfact-edit.json --corpus text.txt \
        --start 20 --n 40 --layers 5 7 9 21 22 23

With old keys C, an edit whose key is k changes the output for a key x by k^T C^-1 x / k^T C^-1 k of what it changes for
itself, as far as the weight on old keys is small. Printed is the mean of that share: for the paraphrase's key at the
subject's last token and at the prediction position, and for the neighbour's key, at the token where it is largest and
at the prediction position. A layer stores a fact well where paraphrases are near 1 and neighbours near 0. Last, how
large k^T C^-1 k is at the prediction position, over the key width m.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import retcon
from benchmarks.common import command_line, machine, moments_of, preferred
from retcon.edits import Case
from retcon.lm.forward import Inputs, Point, run
from retcon.lm.model import LM
from retcon.lm.prompts import Row, encode, encode_edit, pad


def keys_of(lm: LM, row: Row, layers: Sequence[int]) -> dict[int, Tensor]:
    """Return the keys of every token, by layer: (tokens, m)."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, value: Tensor) -> None:
        found[layer] = value[0].detach().double().cpu()

    hooks = {Point(layer, "key"): partial(keep, layer) for layer in layers}
    with torch.inference_mode():
        run(lm, Inputs.of(pad([row], lm.device)), hooks)
    return found


def rows_of(lm: LM, case: Case) -> tuple[Row, Row, Row] | None:
    """Return the prompts of the edit, its first paraphrase and its first neighbour; None without a subject in it."""
    (edit,) = case.edits
    asked = {axis: [q.prompt for q in case.queries if q.axis == axis] for axis in ("paraphrase", "neighborhood")}
    if edit.subject is None or not all(asked.values()) or edit.subject not in asked["paraphrase"][0]:
        return None
    start = asked["paraphrase"][0].index(edit.subject)
    span = (start, start + len(edit.subject))
    return (
        encode_edit(lm.tokenizer, edit),
        encode(lm.tokenizer, asked["paraphrase"][0], subject_span=span),
        encode(lm.tokenizer, asked["neighborhood"][0]),
    )


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True)
    parser.add_argument("--n", type=int, default=40, help="cases")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    asked = parser.parse_args()
    print(f"# {machine()}", flush=True)
    lm = retcon.load(asked.model)
    moments = moments_of(lm, asked.corpus)
    made = [rows_of(lm, case) for case in preferred(lm, asked.data, asked.start, asked.n, asked.seed)]
    triples = [rows for rows in made if rows is not None]
    read = [[keys_of(lm, row, asked.layers) for row in rows] for rows in triples]
    print(f"{len(triples)} facts\nlayer  subject: paraphrase neighbour  prediction: paraphrase neighbour  k'C^-1k / m")
    for layer in asked.layers:
        factor = moments.factor(lm, lm.site(layer, "down_proj")).double().cpu()
        shares: list[list[float]] = []
        for rows, keys in zip(triples, read, strict=True):
            edit, paraphrase, neighbour = (
                torch.linalg.solve_triangular(factor, key[layer].T, upper=False) for key in keys
            )
            line = []
            for places in ([row.subject_last for row in rows], [row.prediction for row in rows]):
                own = edit[:, places[0]]
                near = own @ neighbour
                line += [
                    float(own @ paraphrase[:, places[1]] / own.square().sum()),
                    float((near.max() if places[2] is None else near[places[2]]) / own.square().sum()),
                ]
            shares.append([*line, float(own.square().sum()) / len(factor)])
        mean = torch.tensor(shares).mean(0).tolist()
        print(f"{layer:5}  {mean[0]:19.2f} {mean[1]:9.2f}  {mean[2]:22.2f} {mean[3]:9.2f}  {mean[4]:12.2f}", flush=True)


if __name__ == "__main__":
    main()
