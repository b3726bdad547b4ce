"""Adam on chosen matrices of a model: what the fine-tuning family (`methods/ft.py`) is made of.

Adam, its decay and its bounds work on V, the change of the weights W, in float32: W itself is never touched, so that a
bound is exact in any dtype and a small step is not lost to rounding.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from retcon.delta import Delta
from retcon.edits import Edit, edit_record, same_question
from retcon.errors import DeltaMismatch, InvalidSetting
from retcon.evaluation.datasets import read_cases
from retcon.lm.model import LM, Site
from retcon.lm.prompts import Row, encode, ended
from retcon.memory.contexts import Contexts
from retcon.memory.defaults import first_prefixes
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import State, check_depth
from retcon.methods.common.settings import EACH_ONCE, AnyLayers, Count, CountFromZero, NotNegative
from retcon.methods.common.tuning import TuningSettings, check_memory, check_no_end, tuning
from retcon.training.descent import EditLoss, Schedule
from retcon.training.objective import (
    AnswerLoss,
    GroupLoss,
    MeanLoss,
    PromptLastLoss,
    answer_rows,
    rephrasings,
    trained_rows,
)
from retcon.training.parts import Whole, whole, whole_parameter
from retcon.work import Progress

Module = Literal["block", "down_proj", "up_proj", "gate_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
"""A matrix of a block, or the block with its norms, biases and all."""
Modules = Annotated[tuple[Module, ...], EACH_ONCE]


@dataclass(frozen=True, kw_only=True)
class FineTuning(TuningSettings):
    """Fine-tuning of chosen matrices, with every choice open."""

    state_description: ClassVar[str] = "the edits so far, where replay is on"

    layers: AnyLayers
    """Blocks that are trained, ascending, counted from 0; none: all of them."""
    modules: Modules = ("down_proj",)
    """Matrices that are trained in each of the layers, or `block`: all that a block has."""
    train_bias: bool = True
    """Train the matrices' biases too, where they have any (GPT-2, GPT-J)."""
    objective: Literal["target_new", "prompt_last"] = "target_new"
    """`target_new`: the answer's tokens, each after those before it; `prompt_last`: all of them at the prompt's last
    token, as ROME's and MEMIT's code has it (a longer answer's tokens in any order)."""
    target_eos: bool = False
    """Train the end of the text after the answer too, so that the model stops there; in a chat the end of the turn,
    which `Chat.train_end` asks for too."""
    steps_per_epoch: Count | None = None
    """Mini-batches of an epoch, about: batches are made smaller, n / steps_per_epoch edits rounded up, where
    `batch_size` would give fewer (100 edits and 30: 25 of 4). What counts is the number of updates, not of epochs."""
    skip: Literal["edit", "batch"] = "edit"
    """What is left alone once its loss is below `stop_loss`: each edit, or a mini-batch by its mean (releases)."""
    box: NotNegative | None = None
    """Largest change of a single weight (L-infinity norm)."""
    ball: NotNegative | None = None
    """Largest norm of the whole change (L2)."""
    anchor: Literal["call", "base"] = "call"
    """Where box and ball are centred: the weights as the call finds them, or the unedited model's."""
    weight_decay: NotNegative = 0.0
    """Coupled (in the gradient, as Adam's `weight_decay`) towards zero, decoupled towards the base."""
    power_law: bool = False
    """Weight decay by MEMIT's law of the number of edits n, n^-0.87028798 e^0.15589562, in place of `weight_decay`."""
    apply_decay: bool = True
    """False: none at all, which is what the released FT-WD does, by a mistake in how it reads its settings."""
    decay_to: Literal["zero", "base"] = "zero"
    """Where decay leads: to zero, or to the unedited weights."""
    stop_on: str | None = None
    """File of cases with the edits' paraphrases: an edit is left alone once its mean loss over them is below
    `stop_loss`. A paraphrase that ended a training measures nothing any more."""
    n_prefixes: CountFromZero = 0
    """Further prompts for each edit, with a sampled prefix before each, of which there are five; an edit's loss is the
    mean over its prompts."""
    replay: bool = False
    """In a sequence, train on the edits so far (`state`) together with the new ones, but for those taken back since."""

    @property
    def keeps_state(self) -> bool:
        """With `replay`."""
        return self.replay

    @property
    def state_layers(self) -> None:
        """A state is facts, to be trained in any layers."""
        return None

    def __post_init__(self) -> None:
        super().__post_init__()
        if "block" in self.modules and len(self.modules) > 1:
            raise InvalidSetting(f"{self.name}: modules='block' has every matrix in it; name no others beside it")
        if "block" in self.modules and not self.train_bias:
            raise InvalidSetting(
                f"{self.name}: modules='block' trains biases too; leave train_bias out, or name matrices"
            )
        if self.stop_on is not None and self.skip == "batch":
            raise InvalidSetting(f"{self.name}: stop_on leaves each edit alone by itself; it goes with skip='edit'")
        if self.objective == "prompt_last" and (self.target_eos or self.n_prefixes):
            raise InvalidSetting(
                f"{self.name}: objective='prompt_last' looks at the prompt's last token alone; target_eos and "
                "n_prefixes belong to 'target_new'"
            )
        if self.power_law and self.weight_decay:
            raise InvalidSetting(
                f"{self.name}: power_law takes the place of weight_decay, found {self.weight_decay:g}; set "
                "power_law=False, or leave weight_decay out"
            )

    def schedule(self, n_edits: int) -> Schedule:
        """Return how long to go on, for so many edits."""
        size = self.batch_size
        if self.steps_per_epoch is not None:
            size = min(size or n_edits, math.ceil(n_edits / self.steps_per_epoch))
        return Schedule(epochs=self.epochs, batch_size=size, stop_loss=self.stop_loss, skip=self.skip)

    def propose(
        self,
        lm: LM,
        edits: Sequence[Edit],
        *,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
        state: State | None = None,
        values: ValueCache | None = None,
        keep_values: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Delta:
        """Return the change that writes `edits` as one batch; the model is untouched. Moments are not used.

        Contexts are used where `n_prefixes` asks for them, state where `replay` is on.

        Raises:
            InvalidSetting: more prefixes than are sampled; or the end of a turn is asked for, which `prompt_last` does
                not train.
            OutOfMemory: weights, gradients, Adam's moments and copies do not fit.
        """
        check_memory(self.name, lm, self.n_trained(lm), self.bytes_per_value)
        parts = self.parts(lm)
        with tuning(self, lm, edits, [part.parameter for part in parts], seed=seed, progress=progress) as run:
            if not edits:
                return run.delta(state=state if self.keeps_state else None)
            everything = [*edits, *earlier_edits(lm, state, edits)] if self.replay else [*edits]
            prefixes = first_prefixes(self.name, lm, self.n_prefixes, contexts, seed)
            ended = run.train(
                parts,
                edits=everything,
                loss=self.loss(lm, everything, prefixes),
                stop=None if self.stop_on is None else paraphrase_loss(self.name, lm, everything, self.stop_on),
                optimizer=self.optimizer(lm, parts, len(edits)),
            )
            kept = {"edits": _as_tensor(everything)} if self.replay else None
            return run.delta(parts, ended.first(len(edits)), state=kept, contexts=Contexts(prefixes))

    def loss(self, lm: LM, edits: Sequence[Edit], prefixes: Sequence[str] = ()) -> EditLoss:
        """Return what is minimised, per edit.

        Raises:
            InvalidSetting: the end of a turn is asked for, which `prompt_last` does not train.
        """
        if self.objective == "prompt_last":
            check_no_end(self.name, edits, "with objective='prompt_last' looks at the prompt's last token alone")
            return PromptLastLoss(lm, answer_rows(lm, edits))
        rows = [trained_rows(lm, edits, prefix=prefix, end=self.target_eos) for prefix in ("", *prefixes)]
        return MeanLoss([AnswerLoss(lm, each) for each in rows])

    def optimizer(self, lm: LM, parts: Sequence[Whole], n_edits: int) -> torch.optim.Adam:
        """Return Adam with weight decay and bounds as step hooks."""
        trained, decay = [part.values for part in parts], self.decay(n_edits)
        adam = torch.optim.Adam(trained, lr=self.learning_rate)
        if decay and self.decay_to == "zero":
            adam.register_step_pre_hook(lambda *_: add_decay(trained, (part.weight() for part in parts), decay))
        elif decay:
            away = [moved_so_far(lm, part) for part in parts]
            adam.register_step_post_hook(lambda *_: shrink(trained, away, self.learning_rate * decay))
        if self.box is not None or self.ball is not None:
            centre = [moved_so_far(lm, part) if self.anchor == "base" else None for part in parts]
            adam.register_step_post_hook(lambda *_: project_onto_bounds(trained, centre, self.box, self.ball))
        return adam

    def decay(self, n_edits: int) -> float:
        """Return the weight decay of a call with so many edits."""
        if not self.apply_decay:
            return 0.0
        return n_edits**-0.87028798 * math.exp(0.15589562) if self.power_law else self.weight_decay

    def trained(self, lm: LM) -> Iterator[int | Site]:
        """Yield what is trained: sites, and the numbers of blocks that are trained whole.

        Raises:
            InvalidSetting: a layer or matrix the model does not have.
        """
        check_depth(self.name, lm, self.layers)
        layers = self.layers or range(lm.n_layers)
        for layer in layers:
            for kind in self.modules:
                if kind == "block":
                    check_trains_whole(self.name, lm, layer)
                    yield layer
                    continue
                found = lm.sites(layer, kind)
                if not found and (self.layers or not any(lm.sites(other, kind) for other in layers)):
                    where = f"layer {layer}" if self.layers else "its blocks"
                    raise InvalidSetting(
                        f"{self.name}: {lm.name!r} ({lm.model.config.model_type}) has no {kind} in {where}"
                    )
                yield from found

    def n_trained(self, lm: LM) -> int:
        """Return how many values are trained."""
        n = 0
        for what in self.trained(lm):
            if isinstance(what, int):
                own = lm.block(what).named_parameters(prefix=lm.layout.block.format(what))
                n += sum(lm.shape_of(name).numel() for name, _ in own)
            else:
                out, into = what.shape
                n += out * into + (out if self.train_bias and what.bias is not None else 0)
        return n

    @property
    def bytes_per_value(self) -> int:  # type: ignore[override]
        """With the way from the unedited weights besides, for bounds around them and for decay towards them."""
        bounded = self.anchor == "base" and (self.box is not None or self.ball is not None)
        decays = self.decay_to == "base" and self.decay(1) > 0
        return TuningSettings.bytes_per_value + 4 * (bounded + decays)

    def parts(self, lm: LM) -> list[Whole]:
        """Return what is trained, unchanged so far."""
        found: list[Whole] = []
        for what in self.trained(lm):
            found += whole_block(lm, what) if isinstance(what, int) else whole(what, bias=self.train_bias)
        return found


def paraphrase_loss(name: str, lm: LM, edits: Sequence[Edit], path: str) -> GroupLoss:
    """Return the mean loss over each edit's paraphrases in a file of cases, in the edit's chat where it names none.

    Raises:
        MalformedFile: the file cannot be read.
        InvalidSetting: it has no paraphrase of an edit; the message names the edit.
        InvalidEdit: a paraphrase is longer than the model's context.
    """
    cases, _ = read_cases(path, conflicts="keep")
    known = {(edit.text, edit.target_new): case for case in cases for edit in case.edits}
    groups: list[list[Row]] = []
    for edit in edits:
        case = known.get((edit.text, edit.target_new))
        rows: list[Row] = []
        for query in rephrasings(case, edit) if case else ():
            chat = query.chat or edit.chat  # the facts may be put in a chat that the file says nothing of
            row = encode(lm.tokenizer, query.prompt, edit.target_new, separator=query.separator, chat=chat)
            rows.append(ended(lm.tokenizer, row, chat))
            lm.check_length(query.prompt, rows[-1], what=f"{path}: edit {edit.id!r}, query {query.id!r}:")
        if not rows:
            raise InvalidSetting(f"{name}: {path} has no paraphrase of edit {edit.id!r} ({edit.text!r}) to stop on")
        groups.append(rows)
    return GroupLoss(lm, groups)


AFFINE = ("Linear", "Conv1D", "Norm", "Norm1P")
"""How the classes are called whose output is affine in their parameters, as a trained one's has to be."""


def check_trains_whole(name: str, lm: LM, layer: int) -> None:
    """Check that a block's parameters are its matrices and norms, with their biases.

    Raises:
        InvalidSetting: it has others, of routed experts or of a mixer; the message names one.
    """
    for path, module in lm.block(layer).named_modules(prefix=lm.layout.block.format(layer)):
        own = [f"{path}.{own}" for own, _ in module.named_parameters(recurse=False)]
        if own and lm.packed.keys().isdisjoint(own) and not type(module).__name__.endswith(AFFINE):
            raise InvalidSetting(
                f"{name}: layer {layer} of {lm.name!r} has {own[0]} ({type(module).__name__}), and a block with more "
                "than matrices and norms is not trained whole; name matrices, modules=['down_proj'] for instance"
            )


def whole_block(lm: LM, layer: int) -> list[Whole]:
    """Return every parameter of a block."""
    path = lm.layout.block.format(layer)
    found: list[Whole] = []
    for name, module in lm.block(layer).named_modules(prefix=path):
        for own, _ in module.named_parameters(recurse=False):
            parameter = f"{name}.{own}"
            if (packed := lm.packed.get(parameter)) is not None:
                found += whole(Site(layer, name, parameter, module, transposed=False, packed=packed), bias=False)
            else:
                found.append(whole_parameter(module, parameter))
    return found


def moved_so_far(lm: LM, part: Whole) -> Tensor:
    """Return how far the weights that a part adds to are from the unedited model's."""
    now = part.weight().clone()
    with lm.without_deltas():
        return now - part.weight()


def add_decay(values: Sequence[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """Add the gradient of decay/2 ||W + V||^2 to that of each V; what has none, because no edit moves it, stays."""
    for v, w in zip(values, weights, strict=True):
        if v.grad is not None:
            v.grad += decay * (w + v.detach())


@torch.no_grad()
def shrink(values: Sequence[Tensor], away: Sequence[Tensor], share: float) -> None:
    """Take each weight this share of the way back to the unedited model's."""
    for v, far in zip(values, away, strict=True):
        v -= share * (v + far)


@torch.no_grad()
def project_onto_bounds(
    values: Sequence[Tensor], centre: Sequence[Tensor | None], box: float | None, ball: float | None
) -> None:
    """Put V + centre, the change from the anchor, back into the box, then into the ball."""
    if box is not None:
        for v, c in zip(values, centre, strict=True):
            v.copy_(v.clamp(-box, box) if c is None else (v + c).clamp(-box, box) - c)
    if ball is not None:
        pairs = list(zip(values, centre, strict=True))
        squares = [(v if c is None else v + c).pow(2).sum().to(values[0].device) for v, c in pairs]
        norm = math.sqrt(sum(torch.stack(squares).tolist()))  # one copy to the CPU for all
        if norm > ball:
            for v, c in pairs:  # V + centre again, one matrix at a time: all of them would be a copy
                v.copy_(v * (ball / norm) if c is None else (v + c) * (ball / norm) - c)


def _as_tensor(edits: Sequence[Edit]) -> Tensor:
    """Return edits as the bytes of their JSON, since a state holds tensors."""
    text = json.dumps([edit_record(edit) for edit in edits])
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def earlier_edits(lm: LM, state: State | None, edits: Sequence[Edit]) -> list[Edit]:
    """Return the edits of a state whose question none of the new ones asks, in these or in other words.

    Where the deltas before the state's own are no longer those that it was made on, since one was taken back, brought
    back or written again, they are the edits of the deltas in force that replay: what was undone is not trained again.

    Raises:
        DeltaMismatch: the state holds no edits.
    """
    if not state:
        return []
    try:
        kept = [Edit(**fields) for fields in json.loads(bytes(state["edits"].tolist()))]
    except (KeyError, ValueError, TypeError) as error:
        raise DeltaMismatch(f"the state given holds no edits of fine-tuning ({error}); leave it out") from None
    replaying = [delta for delta in lm.showing if "edits" in (delta.state or {})]
    made = next((d for d in replaying if torch.equal((d.state or {})["edits"], state["edits"])), None)
    on_now = [delta.id for delta in lm.showing]
    if made is not None and list(made.parents) != on_now[: on_now.index(made.id)]:
        kept = []
        for delta in replaying:
            kept = [*delta.edits, *_not_asked_again(kept, delta.edits)]
    return _not_asked_again(kept, edits)


def _not_asked_again(kept: Sequence[Edit], edits: Sequence[Edit]) -> list[Edit]:
    texts, questions = {edit.text for edit in edits}, set(map(same_question, edits))
    return [edit for edit in kept if edit.text not in texts and same_question(edit) not in questions]
