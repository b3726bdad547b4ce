"""Why CTP's contrast `mirror` moves nothing: how long its gradient on T+ is, beside that of the new answers.

    python -m benchmarks.mirror_gradient --model demo:llama --n 16

Step by step of one batch: L(y*) with the change in the weights, L(y) with T-'s nodes changed as T+'s on average, and
the ratio of their gradients' lengths on T+'s nodes, |grad L(y)| / |grad L(y*)|, before lambda. The last three columns
have nodes of T+ and T- at random: whether it is because T- takes the lowest ones.
"""

import math
from dataclasses import fields, replace
from typing import ClassVar, cast

import retcon
from benchmarks.common import cases_of, command_line, machine, print_row
from retcon.methods.common.path_nodes import PathNodes, accumulate_attached
from retcon.methods.ctp import Ctp, PathTrainer
from retcon.training.descent import Step, shares
from retcon.training.objective import AnswerLoss


class Watched(PathTrainer):
    """A trainer that notes the two gradients' lengths before every step."""

    seen: ClassVar[list[tuple[float, float, float]]] = []

    def prepare(self, items: list[int]) -> Step:
        """Note, then prepare the step as CTP does."""
        share = dict(zip(items, shares(self.target.rows, items, self.method.reduction).tolist(), strict=True))
        assert self.original is not None
        self.paths.forget_gradients()
        new = accumulate_attached(self.target, self.paths.parts, items, lambda i, _: share[i])
        towards_new = self._length()
        self.paths.forget_gradients()
        old = accumulate_attached(self.original, self.paths.mirrored, items, lambda i, _: share[i])
        mirrored = self._length()
        mean = [sum(losses.values()) / len(losses) for losses in (new, old)]
        self.seen.append((mean[0], mean[1], mirrored / towards_new))
        return super().prepare(items)

    def _length(self) -> float:
        grads = [value.grad for value in self.paths.values() if value.grad is not None]
        return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))


class WatchedCtp(Ctp):
    """CTP with that trainer."""

    def trainer(self, paths: PathNodes, target: AnswerLoss, original: AnswerLoss | None) -> PathTrainer:
        """Return the trainer that notes."""
        return Watched(self, paths, target, original)


def main() -> None:
    parser = command_line(__doc__, cases=True, dataset=True)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--n-negative", type=int, default=1)
    args = parser.parse_args()
    lm = retcon.load(args.model)
    edits = [case.edits[0] for case in cases_of(args.data, args.start, args.n, args.seed)]
    preset = cast(Ctp, retcon.method("ctp", for_model=lm, dataset=args.dataset))
    asked = replace(preset, contrast="mirror", batch_size=None, stop_loss=0.0, n_negative=args.n_negative)
    settings = {field.name: getattr(asked, field.name) for field in fields(asked)}
    columns = {}
    for score in ("z_abs", "random"):
        Watched.seen.clear()
        WatchedCtp(**{**settings, "score": score}).propose(lm, edits, seed=args.seed)
        columns[score] = list(Watched.seen)
    print(
        f"{args.model}, {len(edits)} edits from {args.start}, T- of {args.n_negative}, seed {args.seed}; {machine()}\n"
    )
    print("| step | L(y*) | L(y), mirrored | ratio | L(y*), nodes at random | L(y), mirrored | ratio |")
    print("|" + "---|" * 7)
    for step, noted in enumerate(zip(columns["z_abs"], columns["random"], strict=True)):
        if step in (0, 1, 2, 5, 10, 20, 30, 39):
            cells = [cell for new, old, ratio in noted for cell in (f"{new:.3f}", f"{old:.3f}", f"{ratio:.1e}")]
            print_row(step, *cells)


if __name__ == "__main__":
    main()
