"""Context prefixes: short sampled texts before a prompt that make keys and values robust (MEMIT's style).

Five starts ("The", "Therefore", "Because", "I", "You"), each continued by the unedited model with top-5 sampling up to
ten tokens, cleaned, and closed with ". ". A prompt is always used bare as well.
"""

import re
import unicodedata
from dataclasses import dataclass

import torch

from retcon.lm.model import LM
from retcon.lm.prompts import Row, encode, pad

STARTS = ("The", "Therefore", "Because", "I", "You")
N_TOKENS = 10
"""Cap on a prefix: start text, BOS and sampled tokens together."""
TOP_K = 5


@dataclass(frozen=True)
class Contexts:
    """Prefixes to put before every prompt, each ending in its separator; the bare prompt always comes first."""

    prefixes: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """The empty prefix, then the sampled ones."""
        return ("", *self.prefixes)


def sample_contexts(lm: LM, *, seed: int = 0) -> Contexts:
    """MEMIT-style prefixes from the unedited model: the same seed gives the same texts; global RNGs are left alone."""
    generator = torch.Generator().manual_seed(seed)
    rows = [encode(lm.tokenizer, start) for start in STARTS]
    with lm.borrowed(), lm.unedited(), torch.inference_mode():
        for _ in range(N_TOKENS - min(len(r.ids) for r in rows)):
            last = torch.tensor([len(r.ids) - 1 for r in rows])
            logits = lm.logits_at(pad(rows, lm.device), torch.arange(len(rows)), last).float().cpu()
            top = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
            drawn = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
            chosen = top.indices.gather(1, drawn)[:, 0].tolist()
            rows = [
                Row((*row.ids, token), row.n_prompt + 1) if len(row.ids) < N_TOKENS else row
                for row, token in zip(rows, chosen, strict=True)
            ]
    texts = [lm.tokenizer.decode(list(r.ids), skip_special_tokens=True) for r in rows]
    return Contexts(tuple(_clean(text) + ". " for text in texts))


def _clean(text: str) -> str:
    """One line of plain text: NFKD, no end-of-text marks, no braces, runs of whitespace made one space."""
    text = unicodedata.normalize("NFKD", text).replace("<|endoftext|>", " ").replace("\ufffd", " ")
    return re.sub(r"\s+", " ", re.sub(r"[{}]", " ", text)).strip()
