"""Cards that are not there: tensors that say they are on one, and count what the host asks of it.

Their numbers are on the CPU, so that results are the CPU's. As on a card, an operation on tensors of two places fails.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from retcon.lm.model import LM
from tests.conftest import tiny_model, tokenizer

CARD, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


def numbered(device: Any) -> torch.device:
    """A device with its number."""
    device = torch.device(device)
    return CARD if device == torch.device("cuda") else device


class OnCard(torch.Tensor):
    """A tensor of a card."""

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device = CARD) -> "OnCard":
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )

    def __init__(self, held: Tensor, device: torch.device = CARD) -> None:
        self.held, self.card = held, device

    @property
    def device(self) -> torch.device:
        return self.card

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnCard({self.held!r}, {self.card})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, _ = tree_flatten((args, kwargs or {}))
        on_cards = [x for x in given if isinstance(x, OnCard)]
        card = on_cards[0].card
        strays = [x for x in given if type(x) is Tensor and x.dim() > 0]
        name = str(func).split(".")[1]
        if name in ("index", "index_put", "index_put_"):  # indices may be on the CPU
            strays = [x for x in strays if x.is_floating_point()]
        if name == "copy_":  # which is made for it
            strays = []
        elif others := {x.card for x in on_cards} - {card}:
            raise RuntimeError(f"{func}: tensors on {card} and on {', '.join(map(str, others))}")
        if strays:
            raise RuntimeError(f"{func}: tensors on the card and on the CPU ({[tuple(x.shape) for x in strays]})")
        Card.ran[name] += 1
        if name.startswith("index") and any(isinstance(x, OnCard) and x.dtype == torch.bool for x in given[1:]):
            Card.ran["nonzero"] += 1  # what indexing by a mask does first
        known = {id(x.held): x for x in on_cards}  # what is changed in place stays itself
        inner_args, inner_kwargs = tree_map(lambda x: x.held if isinstance(x, OnCard) else x, (args, kwargs or {}))
        made = func(*inner_args, **inner_kwargs)

        def on_card(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return known[id(x)] if id(x) in known else OnCard(x, card)

        return return_and_correct_aliasing(func, args, kwargs or {}, tree_map(on_card, made))


class Moved(torch.autograd.Function):
    """A copy on another card; its gradient comes back to this one."""

    @staticmethod
    def forward(ctx: Any, x: OnCard, device: torch.device) -> OnCard:
        ctx.card = x.card
        return OnCard(x.held.clone(), device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[OnCard, None]:
        return OnCard(grads[0].held.clone(), ctx.card), None


class Card(TorchFunctionMode):
    """While it lasts, "cuda:0" and "cuda:1" are cards."""

    ran: ClassVar[Counter[str]] = Counter()
    """Operators that ran on a card, by name; `_local_scalar_dense` is a number that the host waited for."""

    def __init__(self, capability: tuple[int, int] = (9, 0), memory: int = 2**40) -> None:
        """A card of this compute capability, with so many bytes of memory."""
        super().__init__()
        self.to_card = self.to_host = 0
        self.sent = 0
        """Bytes that went to a card; a copy that also converts does so on the CPU."""
        Card.ran = Counter()
        self.named = ExitStack()
        self.capability, self.about = capability, SimpleNamespace(total_memory=memory)

    def __enter__(self) -> "Card":
        self.named.enter_context(patch("torch.cuda.get_device_capability", lambda device: self.capability))
        self.named.enter_context(patch("torch.cuda.get_device_properties", lambda device: self.about))
        # a module that is moved gets new parameters: those it has cannot become tensors of a card
        self.named.enter_context(patch("torch.__future__._overwrite_module_params_on_conversion", True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.named.close()

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], OnCard):
            self.to_host += 1
            return args[0].held.tolist()
        if func == Tensor.data.__get__ and isinstance(args[0], OnCard):  # type: ignore[attr-defined]
            return OnCard(args[0].held, args[0].card)
        if func is torch.unravel_index and isinstance(args[0], OnCard):
            return tuple(OnCard(x, args[0].card) for x in torch.unravel_index(args[0].held, *args[1:], **kwargs))
        if func is Tensor.new_tensor and isinstance(args[0], OnCard):
            return OnCard(args[0].held.new_tensor(*args[1:], **kwargs), args[0].card)
        if func in (Tensor.to, Tensor.cpu):
            return self._moved(func, args[0], list(args[1:]), kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            leaf = kwargs.pop("requires_grad", False)
            made = func(*args, **kwargs | {"device": "cpu"})
            held = made.held if isinstance(made, OnCard) else made
            return OnCard(held, numbered(device)).requires_grad_(leaf)
        return func(*args, **kwargs)

    def _moved(self, func: Any, x: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        place = kwargs.pop("device", None)
        if func is Tensor.cpu:
            place = "cpu"
        elif args and isinstance(args[0], Tensor):
            place, args = args[0].device, [args[0].dtype, *args[1:]]
        elif args and isinstance(args[0], torch.device | str):
            place, args = args[0], args[1:]
        args = [x for x in args if isinstance(x, torch.dtype)]
        place = x.device if place is None else numbered(place)
        if place == x.device:
            return x.to(*args, **kwargs) if args or kwargs else x
        if isinstance(x, OnCard) and place.type == "cuda":
            moved: Tensor = Moved.apply(x, place)  # type: ignore[no-untyped-call]
            return moved.to(*args, **kwargs) if args or kwargs else moved
        with torch._C.DisableTorchFunction():
            if place.type == "cuda":
                sent = (x.to(*args, **kwargs) if args or kwargs else x).clone()
                self.to_card += 1
                self.sent += sent.nbytes
                return OnCard(sent, place)
            self.to_host += 1
            inner = x.held  # type: ignore[attr-defined]
            return (inner.to(*args, **kwargs) if args or kwargs else inner).clone()


def put_on_card(model: nn.Module, place: Callable[[str], torch.device] = lambda name: CARD) -> None:
    """Put parameters and buffers onto the cards that `place` says by their names."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                held = OnCard(parameter.detach().clone(), place(f"{path}.{name}"))
                module._parameters[name] = nn.Parameter(held)
        for name, buffer in module._buffers.items():
            held = None if buffer is None else OnCard(buffer.detach().clone(), place(f"{path}.{name}"))
            module._buffers[name] = held


def both() -> tuple[LM, LM]:
    """A model on the CPU, and the same on the card."""
    here, model = (tiny_model("gptj", torch.float32) for _ in range(2))
    put_on_card(model)
    return LM(here, tokenizer("gpt"), name="tiny"), of_cards(model)


def on_two(family: str) -> tuple[LM, LM]:
    """A model on the CPU, and the same spread over two cards as by `device_map`: its second half, norm and head on the
    second one."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    here, model = LM(tiny_model(family, torch.float32), tokenizer("gpt")), tiny_model(family, torch.float32)
    blocks = [here.layout.block.format(layer) for layer in range(here.n_layers)]
    later = tuple(f"{name}." for name in (*blocks[len(blocks) // 2 :], here.layout.final_norm, here.layout.head))

    def place(name: str) -> torch.device:
        return SECOND if f"{name}.".startswith(later) else CARD

    put_on_card(model, place)
    add_hook_to_module(model, AlignDevicesHook(CARD, io_same_device=True))
    for name, module in model.named_modules():
        if name in blocks or module._parameters or module._buffers:
            add_hook_to_module(module, AlignDevicesHook(place(name)))
    return here, of_cards(model)


def of_cards(model: nn.Module) -> LM:
    lm = LM(model, tokenizer("gpt"), name="tiny")
    vars(lm)["not_editable"] = {}  # tensors of the card have no address by which it could be told
    return lm
