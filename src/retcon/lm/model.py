"""`LM`: a transformers model and its tokenizer, as the library sees them."""

import gc
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count, product
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from retcon.arguments import list_of_texts
from retcon.attachment import Attachment
from retcon.chat import Chat, chat_from
from retcon.delta import Change, Delta
from retcon.edits import Edit
from retcon.errors import (
    DeltaMismatch,
    DeltaNotApplied,
    InvalidEdit,
    InvalidSetting,
    ModelBusy,
    NonFinite,
    NotEditable,
    RetconWarning,
    UnsupportedModel,
)
from retcon.files import looks_like_path
from retcon.lm.blocks import count_blocks, decoder_path, device_of, find_module, is_conv1d, kind_of
from retcon.lm.experts import expert_matrix
from retcon.lm.fingerprint import StoredTensors, fingerprint
from retcon.lm.fits import check_fits
from retcon.lm.gguf import DEQUANTIZED_FROM
from retcon.lm.hooks import Hooks
from retcon.lm.layouts import Fused, Layout, layout_for
from retcon.lm.ledger import Ledger
from retcon.lm.owners import OWNERS, refuse_taken, set_owner
from retcon.lm.packed import Parameters, packed_matrices
from retcon.lm.prompts import Row, encode, encode_edit, end_of_turn
from retcon.lm.quantised import shown_unquantised
from retcon.lm.refusals import refuse_other_vocabulary, refuse_slow, refuse_subclasses, refuse_wrapped, why_not_editable
from retcon.lm.scopes import Edited, FrozenEval, SavedFlags, Scope, Turn, Turns, WithoutDeltas
from retcon.lm.site import Site, SiteName
from retcon.lm.status import unverified
from retcon.plural import plural
from retcon.work import Here, Workers


class LM:
    """A decoder-only transformers model with its tokenizer; the only place where weights are changed.

    Args:
        model: a transformers causal LM that the caller has loaded; it stays the caller's (`lm.model`).
        tokenizer: its fast tokenizer; never changed.
        layout: a row for an architecture that the layout table does not know.
        name: what reports call it; the model's own name by default.

    Raises:
        UnsupportedModel: wrapped by PEFT, compiled, a family that cannot be edited, slow tokenizer; another LM has it,
            or one that is gone has left it edited.
        UnknownLayout: no layout for this `model_type`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, layout: Layout | None = None, name: str | None = None) -> None:
        refuse_wrapped(model)
        if not hasattr(tokenizer, "is_fast"):
            raise UnsupportedModel(
                f"{type(tokenizer).__name__} given where a tokenizer is wanted: AutoTokenizer.from_pretrained(...)"
            )
        refuse_slow(tokenizer)
        refuse_other_vocabulary(model, tokenizer, name)
        self.model = model
        self.tokenizer = tokenizer
        self.layout = (layout or layout_for(model.config)).within(decoder_path(model))
        self.name = name or getattr(model.config, "_name_or_path", "") or model.config.model_type
        self.n_layers = count_blocks(model, self.layout)
        refuse_taken(model, self.name)
        self.packed = packed_matrices(model, model.get_input_embeddings().weight.dtype)
        """Quantised matrices that stay packed until they are edited, by the names of their parameters."""
        self.not_editable = {n: why for n, why in why_not_editable(model).items() if n not in self.packed}
        """Parameters that must not be edited, with the reason."""
        refuse_subclasses(model, self.packed)
        self._parameters = Parameters(model, self.packed)
        self.turns = Turns(f"LM({self.name})")
        """Who may change the model now."""
        self.serials = count()
        """Numbers of scopes."""
        self._ledger = Ledger(self._parameters, Hooks(model), self.packed)
        self._saved_flags: SavedFlags | None = None
        self.source: tuple[str, dict[str, Any]] | None = None
        """What `retcon.load` was given, so that another process can load the same; None where the caller loaded it."""
        self.workers: Workers = Here()
        """Where independent pieces of work on this model are done (`retcon.cluster`)."""
        self._fingerprint: str | None = None
        self._stored: StoredTensors | None = None
        self._seen: dict[str, tuple[object, ...]] = {}
        self.kinds = tuple(kind_of(self.block(layer), self.layout) for layer in range(self.n_layers))
        """The layout of each block: the first of the row's kinds whose modules it has."""
        for layer, kind in product(range(self.n_layers), get_args(SiteName)):
            if self.has(layer, kind):
                self.site(layer, kind)  # a layout that does not fit fails here, not in an edit
        for name in ("embedding", "final_norm", "head"):
            find_module(model, getattr(self.layout, name), name)
        if layout is None:  # whoever brings a layout knows that the family is none of ours
            _warn_of_the_unverified(model.config.model_type, self.name)
        set_owner(model, self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and copy make an LM from, once no other thread has the model.

        Raises:
            ModelBusy: inside a scope, which could not end in a copy; or another thread has the model.
        """
        self._finish()
        if self.turns.mine:
            raise ModelBusy(
                f"{self.turns.what} cannot be copied or pickled inside a scope (lm.edited, a propose); do it after the "
                "scope has ended, with lm.apply(delta) where the copy shall have the delta"
            )
        with Turn(self.turns):
            self._finish()
        return vars(self) | {"workers": Here()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become the LM of the model that came with this one's copy, or out of its pickle."""
        vars(self).update(state)
        if self.model not in OWNERS:
            set_owner(self.model, self)

    def __repr__(self) -> str:
        n = len(self._ledger.applied)
        applied = f", {plural(n, 'applied delta')}" if n else ""
        state = "" if self.consistent else ", interrupted in the middle of a change"
        kind = f"{self.model.config.model_type}, {self.n_layers} layers, {self.dtype}"
        return f"LM({self.name}: {kind}{''.join(f', {note}' for note in self.notes)}{applied}{state})"

    @property
    def label(self) -> str:
        """The name as it goes into files that people share: of a local folder, its last part."""
        return Path(self.name).name if looks_like_path(self.name) else self.name

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever reads figures measured on this model should know, one phrase each; usually none."""
        source = getattr(self.model.config, DEQUANTIZED_FROM, None)
        packings = sorted({matrix.packing for matrix in self.packed.values() if not matrix.shows_floats})
        packed = (f"{' and '.join(packings)} weights, packed",) if packings else ()
        return ((f"weights dequantised from {source}",) if source else ()) + packed

    # --- parts ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where token ids go: the embedding's device."""
        return device_of(self.model.get_submodule(self.layout.embedding))

    @cached_property
    def config(self) -> Any:
        """The text model's config; in a wrapper it is a part of `lm.model.config`."""
        return self.model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, read from the first out-projection."""
        return self.site(0, "o_proj").dtype

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.site(0, "o_proj").shape[0]

    @property
    def d_ff(self) -> int:
        """Width of the keys of the MLP: of the first block's that has one, else of a routed expert."""
        for layer in range(self.n_layers):
            if self.has(layer, "down_proj"):
                return self.site(layer, "down_proj").shape[1]
        experts = find_module(self.model, f"{self.layout.block.format(0)}.{self.kinds[0].experts}", "experts")
        shape: torch.Size = experts.down_proj.shape  # type: ignore[assignment]
        return min(shape[1:], key=lambda n: n == self.d_model)

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can read at once; None where its config does not say.

        With longrope, as many as its short factors are for: in a pass beyond that every token has the long ones, so
        that a row's result would depend on its batch, and recorded states would be of another model.
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            return int(rope["original_max_position_embeddings"])
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        found = next((n for name in names if (n := getattr(self.config, name, None))), None)
        return found if isinstance(found, int) else None

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the vocabulary's longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def check_length(self, text: str, row: Row | None = None, *, what: str = "the text") -> None:
        """Check that a text fits into the model's context with its answer (`Row.n_needed`), before anything is run.

        Args:
            row: its tokens; without them, only a text that no tokens of this vocabulary could make short enough fails.

        Raises:
            InvalidEdit: it does not fit; the message shows both ends of the text, its length and the limit.
        """
        limit = self.context_length
        if limit is None:
            return
        length = None
        if row is not None and row.n_needed > limit:
            length = f"{len(row.ids):,} tokens"
        elif row is None and len(text) > limit * self._longest_token:
            length = f"{len(text):,} characters"
        if length is not None:
            shown = text if len(text) <= 80 else f"{text[:40]} ... {text[-40:]}"
            raise InvalidEdit(
                f"{what} {shown!r} has {length}; {self.name} reads {limit:,} tokens at once, its answer included"
            )

    def check_edit_length(self, edit: Edit) -> None:
        """Check that an edit's prompt and answer fit into the model's context.

        Raises:
            InvalidEdit: they do not.
        """
        what = f"edit {edit.id!r}:"
        self.check_length(edit.text, what=what)
        self.check_length(edit.text, encode_edit(self.tokenizer, edit, answer=edit.target_new), what=what)

    @property
    def head(self) -> nn.Module:
        """The vocabulary projection."""
        return self.model.get_submodule(self.layout.head)

    def block(self, layer: int) -> nn.Module:
        """Return transformer block `layer`, counted from 0."""
        self._check_layer(layer)
        return self.model.get_submodule(self.layout.block.format(layer))

    def site(self, layer: int, kind: SiteName) -> Site:
        """Return one matrix of block `layer`.

        Raises:
            UnsupportedModel: the layout names a module the model does not have, or another orientation than it has.
        """
        self._check_layer(layer)
        entry = getattr(self.kinds[layer], kind)
        if entry is None:
            raise UnsupportedModel(f"{self.config.model_type} has no {kind}{self._where_it_is(layer, kind)}")
        path = self.layout.block.format(layer) + "." + (entry.module if isinstance(entry, Fused) else entry)
        module = find_module(self.model, path, kind)
        transposed = self.layout.stored == "in,out"
        if transposed != is_conv1d(module):
            raise UnsupportedModel(
                f"{path} is a {type(module).__name__}, but the layout says its weight is stored as "
                f"({self.layout.stored}); Conv1D stores (in, out), Linear (out, in)"
            )
        rows = entry.rows(self.config) if isinstance(entry, Fused) else None
        name = f"{path}.weight"
        return Site(layer, kind, name, module, transposed, rows, packed=self.packed.get(name))

    def experts(self, layer: int) -> nn.Module:
        """Return the module that holds a block's routed experts.

        Raises:
            UnsupportedModel: it has none, or they are not stored and run as the library knows it.
        """
        self._check_layer(layer)
        path = self.kinds[layer].experts
        if path is None:
            raise UnsupportedModel(f"layer {layer} of {self.name!r} has no routed experts")
        module = find_module(self.model, f"{self.layout.block.format(layer)}.{path}", "experts")
        if not hasattr(module, "is_transposed") or getattr(module, "has_post_expert_norm", False):
            raise UnsupportedModel(
                f"{type(module).__name__} runs its experts in a way of its own; only dense and shared MLPs of "
                f"{self.config.model_type!r} can be edited"
            )
        return module

    def expert_sites(self, layer: int, kind: SiteName = "down_proj") -> list[Site]:
        """Return the matrices of a block's routed experts, in the experts' order; none where they have no gate.

        Args:
            kind: `down_proj`, `up_proj` or `gate_proj`.

        Raises:
            UnsupportedModel: the block has no routed experts, or they are not stored and run as the library knows it.
        """
        module = self.experts(layer)
        parameter, rows = expert_matrix(module, kind)
        if parameter is None:
            return []
        name = f"{self.layout.block.format(layer)}.{self.kinds[layer].experts}.{parameter}"
        n_experts, transposed = len(module.down_proj), bool(module.is_transposed)  # type: ignore[arg-type]
        return [Site(layer, kind, name, module, transposed, rows, expert=e) for e in range(n_experts)]

    def sites(self, layer: int, kind: SiteName, *, routed: bool = False) -> list[Site]:
        """Return all matrices of this kind in a block: one, or those of its routed experts, or none.

        Args:
            routed: the experts' also where the block has a dense or a shared MLP.

        Raises:
            UnsupportedModel: the experts are not stored and run as the library knows it.
        """
        of_mlp = kind in ("down_proj", "up_proj", "gate_proj")
        if of_mlp and self.kinds[layer].experts and (routed or not self.has(layer, "down_proj")):
            return self.expert_sites(layer, kind)
        return [self.site(layer, kind)] if self.has(layer, kind) else []

    def has(self, layer: int, kind: SiteName) -> bool:
        """Return whether a block has a matrix of this kind."""
        self._check_layer(layer)
        return getattr(self.kinds[layer], kind) is not None

    def _where_it_is(self, layer: int, kind: SiteName) -> str:
        """Return what to say of a block without such a matrix: which blocks have one."""
        having = [i for i in range(self.n_layers) if getattr(self.kinds[i], kind) is not None]
        if having:
            return f" in layer {layer}; it has one in layers {', '.join(map(str, having))}"
        if kind in ("down_proj", "up_proj", "gate_proj") and self.kinds[layer].experts:
            return f" in layer {layer}: every expert of that block is routed"
        return ""

    def parameter(self, name: str) -> Tensor:
        """Return a parameter by name.

        Raises:
            DeltaMismatch: the model has none of that name.
        """
        if name not in self._parameters:
            raise DeltaMismatch(f"model {self.name!r} has no parameter {name!r}; was the delta made for another one?")
        return self._parameters[name]

    def shape_of(self, name: str) -> torch.Size:
        """Return a parameter's shape; of a packed one, that of its dequantised matrix.

        Raises:
            DeltaMismatch: the model has none of that name.
        """
        return self.packed[name].shape if name in self.packed else self.parameter(name).shape

    @property
    def n_parameters(self) -> int:
        """Values of all parameters, shared ones once, packed ones as many as dequantised."""
        return sum(self.shape_of(name).numel() for name, _ in self.model.named_parameters())

    def transposed_parameters(self) -> list[str]:
        """Return the parameters stored (in, out), which a PEFT export must know."""
        return [f"{name}.weight" for name, module in self.model.named_modules() if is_conv1d(module)]

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.n_layers:
            raise UnsupportedModel(f"layer {layer} asked for; {self.name!r} has layers 0 to {self.n_layers - 1}")

    # --- deltas --------------------------------------------------------------------------------------------------

    @property
    def applied(self) -> tuple[Attachment, ...]:
        """What is in force (deltas, mostly), in order of application. Finishes first what an interrupt left undone."""
        self._finish()
        return self._ledger.applied

    @property
    def showing(self) -> tuple[Attachment, ...]:
        """What the model computes with now: `applied`, or nothing inside `without_deltas`."""
        return () if self._ledger.hidden else self.applied

    @property
    def consistent(self) -> bool:
        """Whether weights and flags are what `applied` and the open scopes say.

        False after an interrupt in the middle of a change; any call of the LM then finishes it.
        """
        return self._ledger.settled and (self._saved_flags is None or self._saved_flags.scope() is not None)

    def _finish(self) -> None:
        """Do what an interrupt has left undone: take off deltas of scopes that are gone, put flags and hooks back."""
        if self.turns.interrupted:
            self.turns.interrupted = False
            if self._saved_flags is not None or any(entry.scope is not None for entry in self._ledger.entries):
                gc.collect()  # scopes that were cut may hang in circles of frames and exceptions
        if self.consistent:
            return
        with Turn(self.turns):
            if (saved := self._saved_flags) is not None and saved.scope() is None:
                saved.restore()
                self._saved_flags = None
            self._ledger.settle()

    def fingerprint(self) -> str:
        """Return the identity of the unedited model: a hash of config and every tensor.

        Tensors count as the checkpoint stores them where `retcon.load` read one, else as the model holds them. Computed
        once, and again where the weights look changed.

        Raises:
            WeightsChanged: something else has changed weights under an applied delta.
            ModelBusy: another thread has the model.
        """
        with Turn(self.turns):
            self._finish()
            self._ledger.check_unchanged()
            touched = self._ledger.touched()
            now = self._look()
            if self._fingerprint is None or any(self._seen.get(n) != x for n, x in now.items() if n not in touched):
                with self.without_deltas():
                    self._fingerprint = fingerprint(self.model, self._stored, self.packed)
                    self._seen = self._look()
            return self._fingerprint

    @property
    def offloaded(self) -> bool:
        """Whether some weights have no data here: the model can be run, and has no fingerprint and cannot be edited."""
        return any(p.is_meta for p in self.model.parameters())

    def remember_fingerprint(self, value: str, stored: StoredTensors | None = None) -> None:
        """Take a fingerprint that the loader has worked out for exactly these weights.

        Args:
            stored: the checkpoint that they were read from. It counts again where the weights are moved or changed.
        """
        self._fingerprint, self._stored, self._seen = value, stored, self._look()

    def _look(self) -> dict[str, tuple[object, ...]]:
        """Return enough of every parameter to notice that something else has changed it."""
        return {name: tuple(map(_seen, self._parameters.stored(name))) for name in self._parameters}

    def apply(self, delta: Attachment, *, other_base: bool = False) -> None:
        """Put `delta` into the weights, until `revert`; an attachment of another kind, beside them.

        On any failure, an interrupt included, the weights are as they were, or the next call makes them so.

        Args:
            other_base: apply even though it was made for another base.

        Raises:
            WrongBase: it was made for another base.
            DeltaMismatch: it does not fit a parameter.
            NotEditable: it touches a parameter that must not be edited.
            NonFinite: it holds NaN or infinity.
            DeltaNotApplied: it is applied already.
            WeightsChanged: something else has changed weights under an applied delta.
            ModelBusy: another thread has the model.
        """
        with Turn(self.turns):
            self.push(delta, other_base, None)

    def revert(self, delta: Attachment | str) -> None:
        """Take a delta (or the one of that id) out, wherever it is; with none left, the base is back bit for bit.

        Raises:
            DeltaNotApplied: it is not applied.
            WeightsChanged: something else has changed weights under an applied delta.
            ModelBusy: another thread has the model.
        """
        with Turn(self.turns):
            self._finish()
            self._ledger.remove(self._ledger.find(delta) if isinstance(delta, str) else delta)

    def revert_all(self, *, force: bool = False) -> None:
        """Take every delta out and end every scope of this thread, from whatever state: the base, bit for bit.

        Args:
            force: also where something else has changed the weights under the deltas since; its changes are lost.

        Raises:
            WeightsChanged: without `force`, something else has changed weights under an applied delta.
            ModelBusy: another thread has the model.
        """
        with Turn(self.turns):
            self._ledger.clear(force=force)
            self._finish()

    def edited(self, *deltas: Attachment, other_base: bool = False) -> Edited:
        """Return the model with `deltas` while the scope lasts; scopes nest. Other threads wait meanwhile."""
        return Edited(self, deltas, other_base)

    def scope(self) -> Scope:
        """Return a stretch of work on the model: this thread's turn; scopes that begin in it end with it."""
        return Scope(self)

    def without_deltas(self) -> WithoutDeltas:
        """Return the base's own weights while the scope lasts, the applied deltas off."""
        return WithoutDeltas(self)

    def release(self) -> None:
        """Give the model up, so that another LM may wrap it.

        Raises:
            DeltaNotApplied: deltas are applied; revert them first.
        """
        if n := len(self.applied):
            raise DeltaNotApplied(f"{n} delta{'s are' if n > 1 else ' is'} applied; revert_all() before release()")
        for matrix in self.packed.values():
            matrix.give_back()
        OWNERS.pop(self.model, None)

    # What scopes ask for (lm/scopes.py), inside their turn.

    def push(self, delta: Attachment, other_base: bool, scope: "weakref.ref[Any] | None") -> None:
        """Check a delta and apply it, until it is reverted or `scope` ends or is gone."""
        if not isinstance(delta, Attachment):
            raise DeltaMismatch(
                f"{type(delta).__name__} given where a delta is wanted; retcon.Delta.load(path) reads one from its file"
            )
        self._finish()
        check_fits(self, delta, other_base)
        self._ledger.push(delta, scope)

    def leave(self, serial: int) -> None:
        """End the scope of that serial number and those that began inside it."""
        self._ledger.leave(serial)
        if self._saved_flags is not None and _began_from(self._saved_flags.scope, serial):
            self._saved_flags.restore()
            self._saved_flags = None

    def hide(self, scope: "weakref.ref[Any]") -> None:
        """Show the base until `scope` ends or is gone."""
        self._finish()
        self._ledger.hide(scope)

    def freeze(self, scope: "weakref.ref[Scope]") -> None:
        """Set eval mode and freeze parameters, until `scope` ends or is gone."""
        self._finish()
        if self._saved_flags is None:  # else a scope around this one has them already
            self._saved_flags = SavedFlags(self.model, scope)
            self.model.eval()
            self.model.requires_grad_(False)

    @contextmanager
    def as_floats(self) -> Iterator[None]:
        """Replace every packed matrix by its floats while the scope lasts, so that the model can be saved as it is.

        It takes the memory of the model in float meanwhile.
        """
        if not self.packed:
            yield
            return
        packings = " and ".join(sorted({matrix.packing for matrix in self.packed.values()}))
        with Turn(self.turns), shown_unquantised(self.model, packings):
            self._finish()
            try:
                for matrix in self.packed.values():
                    matrix.hold()
                    matrix.bring(held=True, shown=True)
                yield
            finally:
                self._ledger.bring_packed()

    def delta(self, changes: Mapping[str, Sequence[Change]], **record: Any) -> Delta:
        """Return a Delta of these changes, proposed on this model as it is now; `record` fills its other fields."""
        return Delta(
            changes={name: tuple(c) for name, c in changes.items()},
            base=self.fingerprint(),
            parents=tuple(d.id for d in self.showing),
            **record,
        )

    def base_weight(self, name: str) -> Tensor:
        """Return the unedited values of a parameter, a copy."""
        self.shape_of(name)
        self._finish()
        return self._ledger.base_values(name)

    def model_bytes(self) -> int:
        """Return the bytes of the unedited weights in memory, packed ones with their scales."""
        stored = {id(tensor): tensor for name in self._parameters for tensor in self._parameters.stored(name)}
        return sum(tensor.nbytes for tensor in stored.values())

    def undo_bytes(self) -> int:
        """Return the bytes held so that the applied deltas can be undone."""
        return self._ledger.nbytes()

    def check_editable(self, name: str) -> None:
        """Check that a parameter may be edited.

        Raises:
            NotEditable: with the reason.
        """
        if name in self.not_editable:
            raise NotEditable(f"{name} cannot be edited: {self.not_editable[name]}")

    def check_shapes(self, delta: Attachment) -> None:
        """Check that the model has the parameters that a delta changes, and that the changes fit them.

        Raises:
            DeltaMismatch: it has not, or they do not.
            NonFinite: a change holds NaN or infinity.
        """
        for name, changes in delta.changes.items():
            shape = self.shape_of(name)
            for change in changes:
                try:
                    change.check(shape)
                except (DeltaMismatch, NonFinite) as error:
                    raise type(error)(f"{name}: {error}") from None

    # --- running -------------------------------------------------------------------------------------------------

    def prompted(self, text: str) -> str:
        """Return what the model reads in place of a prompt: the prompt, unless something attached acts on it."""
        for attachment in () if self._ledger.hidden else self.applied:
            text = attachment.prompt(text)
        return text

    def frozen_eval(self) -> FrozenEval:
        """Eval mode and frozen parameters while the scope lasts, the caller's `torch.inference_mode` and
        `torch.autocast` off; every flag goes back as it was."""
        return FrozenEval(self)

    @cached_property
    def block_outputs(self) -> int | None:
        """How many things a block returns in a tuple; None: it returns a tensor. Seen in a pass over one token."""
        seen: list[Any] = []
        hook = self.block(0).register_forward_hook(lambda _, __, output: seen.append(output))
        with hook, self.frozen_eval(), torch.no_grad():
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        return len(seen[0]) if isinstance(seen[0], tuple) else None

    def encode(self, prompt: str, target: str | None = None, **options: Any) -> Row:
        """Tokenise a prompt (and target); see `retcon.lm.prompts.encode`."""
        return encode(self.tokenizer, self.prompted(prompt), target, **options)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end what the model writes: those of the tokenizer, the generation config and the chat template.

        A chat model's tokenizer often names the end of a document where the model ends its turn with another token.
        """
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        listed = configured if isinstance(configured, list | tuple) else [configured]
        found = [self.tokenizer.eos_token_id, *listed, end_of_turn(self.tokenizer)]
        return frozenset(int(token) for token in found if token is not None)

    def complete(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 32,
        stops: Sequence[str] = ("\n",),
        chat: "Chat | Mapping[str, Any] | bool | None" = None,
        system: str | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """Return what the model says after `prompt`, greedily, up to the first stop text.

        Newlines that the answer begins with are kept, and do not stop it.

        Args:
            chat: True puts the prompt as the user's turn in the tokenizer's chat template; a `Chat` also says how.
            system: text of the chat's system turn; implies `chat=True`.
            template_args: for the chat template, such as `{"enable_thinking": False}`; implies `chat=True`.

        Raises:
            InvalidEdit: the prompt is longer than the model's context.
            InvalidSetting: `system` or `template_args` beside a `Chat` or `chat=False`, or no chat template.
        """
        if system is not None or template_args:
            if chat is not None and not isinstance(chat, bool):
                raise InvalidSetting(
                    f"chat={chat!r} has a system turn and template arguments of its own; write them there, "
                    "Chat(system, template_args), or give chat=True with system= and template_args="
                )
            if chat is False:
                raise InvalidSetting(
                    "chat=False asks without the chat template, and system= and template_args= are for it; leave "
                    "either out"
                )
            chat = Chat(system, tuple((template_args or {}).items()))
        return self.generate([prompt], max_new_tokens=max_new_tokens, stops=stops, chat=chat)[0]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 32,
        stops: Sequence[str] = ("\n",),
        chat: "Chat | Mapping[str, Any] | bool | None" = None,
    ) -> list[str]:
        """Return greedy continuations: only the new text, cut at the earliest stop text (`retcon.lm.generate`).

        Raises:
            InvalidEdit: a prompt is longer than the model's context.
            InvalidSetting: a chat without a template, or one text in place of a list of them.
        """
        from retcon.lm.generate import Writing, generate  # which is written for an LM

        how = Writing(
            max_new_tokens=max_new_tokens, stops=list_of_texts(stops, "stops"), chat=chat_from(chat), skip_newlines=True
        )
        return [one.text for one in generate(self, list_of_texts(prompts, "prompts"), how)]


def _began_from(scope: "weakref.ref[Any]", serial: int) -> bool:
    """Return whether a scope began with or inside the one of that serial number, or is gone."""
    alive = scope()
    return alive is None or alive.serial >= serial


def _seen(tensor: Tensor) -> tuple[object, ...]:
    """Return where a tensor is, and a few values spread over it."""
    flat = tensor.detach().reshape(-1)
    few = () if tensor.is_meta else flat[:: max(1, flat.numel() // 3)].tolist()
    return (tensor.data_ptr(), tensor.dtype, tensor._version, *few)


def _warn_of_the_unverified(model_type: str, name: str) -> None:
    from transformers import __version__

    if reason := unverified(model_type, __version__):
        warnings.warn(f"{reason}; `retcon doctor {name}` tries it on the model itself", RetconWarning, stacklevel=4)


def require_lm(given: Any) -> None:
    """Raise UnsupportedModel where what is given is no `LM`; the message says how to get one."""
    if isinstance(given, LM):
        return
    if isinstance(given, str | Path):
        raise UnsupportedModel(f"{str(given)!r} is a model's name; load it first: retcon.load({str(given)!r})")
    raise UnsupportedModel(f"{type(given).__name__} given where an LM is wanted: retcon.LM(model, tokenizer)")
