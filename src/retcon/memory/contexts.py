"""Context prefixes: short sampled texts before a prompt that make keys and values robust.

Starts are continued by the unedited model with top-5 sampling up to a number of tokens, cleaned, and closed with ". ".
A prompt is always used bare as well.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

import torch

from retcon.arguments import check_choice, list_of_texts
from retcon.errors import InvalidSetting, NonFinite
from retcon.lm.forward import logits_at
from retcon.lm.model import LM
from retcon.lm.prompts import Row, encode, pad
from retcon.seed import generator_of

STARTS = ("The", "Therefore", "Because", "I", "You")
N_TOKENS = 10
"""Cap on a prefix of MEMIT's style: start text, BOS and sampled tokens together."""
TOP_K = 5

ContextStyle = Literal["memit", "rome", "rome_easyedit"]
"""`memit`: five starts, once each, up to 10 tokens; `rome`: an end-of-text mark, ten times up to 5 and ten times up to
10 tokens (kmeng01/rome); `rome_easyedit`: the five starts, twice up to 5 and twice up to 10 tokens (EasyEdit)."""


@dataclass(frozen=True)
class Contexts:
    """Prefixes to put before every prompt, each ending in its separator; the bare prompt always comes first."""

    prefixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", list_of_texts(self.prefixes, "prefixes"))

    @property
    def all(self) -> tuple[str, ...]:
        """The empty prefix, then the sampled ones."""
        return ("", *self.prefixes)


def sample_contexts(lm: LM, *, seed: int = 0, style: ContextStyle = "memit") -> Contexts:
    """Return prefixes from the unedited model: the same seed gives the same texts; global RNGs are left alone.

    Raises:
        InvalidSetting: no such style, it starts from a mark which the tokenizer lacks, or the seed is none.
        NonFinite: the model's logits are NaN or infinite.
    """
    check_choice(style, ContextStyle, "style of contexts")
    generator = generator_of(seed)
    starts = _starts(lm.tokenizer, style)
    rows, caps = [row for row, _ in starts], [cap for _, cap in starts]
    with lm.frozen_eval(), lm.without_deltas(), torch.inference_mode():
        for _ in range(max(cap - len(row.ids) for row, cap in starts)):
            last = torch.tensor([len(r.ids) - 1 for r in rows])
            logits = logits_at(lm, pad(rows, lm.device), (torch.arange(len(rows)), last)).float().cpu()
            top = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
            shares = top.values.softmax(-1)
            if not shares.isfinite().all():
                raise NonFinite(
                    f"the logits of {lm.name!r} are NaN or infinite, so it writes no contexts; load it as bfloat16 or "
                    "float32, or look at its weights"
                )
            drawn = torch.multinomial(shares, 1, generator=generator)
            chosen = top.indices.gather(1, drawn)[:, 0].tolist()
            rows = [
                Row((*row.ids, token), row.n_prompt + 1) if len(row.ids) < cap else row
                for row, token, cap in zip(rows, chosen, caps, strict=True)
            ]
    texts = [lm.tokenizer.decode(list(r.ids), skip_special_tokens=True) for r in rows]
    return Contexts(tuple(_clean(text) + ". " for text in texts))


def _starts(tokenizer: Any, style: ContextStyle) -> list[tuple[Row, int]]:
    """Return what each prefix starts with, and how many tokens it may have in all."""
    if style == "memit":
        return [(encode(tokenizer, start), N_TOKENS) for start in STARTS]
    if style == "rome_easyedit":
        return [(encode(tokenizer, start), cap) for cap in (5, 10) for start in STARTS for _ in range(2)]
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if mark is None:
        raise InvalidSetting("contexts of ROME's style start from a BOS or EOS token; the tokenizer has neither")
    return [(Row((mark,), 1), cap) for cap in (5, 10) for _ in range(10)]


def _clean(text: str) -> str:
    """Return one line of plain text: NFKD, no end-of-text marks, no braces, runs of whitespace made one space."""
    text = unicodedata.normalize("NFKD", text).replace("<|endoftext|>", " ").replace("\ufffd", " ")
    return re.sub(r"\s+", " ", re.sub(r"[{}]", " ", text)).strip()
