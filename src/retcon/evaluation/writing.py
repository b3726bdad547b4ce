"""Ways of writing that published evaluations use."""

from collections.abc import Sequence

from retcon.arguments import list_of_texts
from retcon.chat import Chat
from retcon.lm.generate import Writing, texts_after
from retcon.lm.model import LM

PRESETS = {
    "qa": Writing(),
    "wild_paper": Writing(max_new_tokens=50, stops=(".", "\n")),
    "wild_easyedit": Writing(max_new_tokens=512, stops=(".", "\n"), chat=Chat("You are a helpful assistant.")),
    "gold_length": Writing(stops=()),
    "ripple": Writing(max_new_tokens=30),
    "cot": Writing(max_new_tokens=200, stops=("\n\n",), after="Answer:"),
    "fluency": Writing(max_new_tokens=100, stops=()),
    "fluency_rome": Writing(max_new_tokens=100, stops=(), sample_top_k=5, total_tokens=100),
}
"""By name: `wild_*` are the Mirage study's, `gold_length` EasyEdit's for GRACE, which hands the model the length."""


def write_answers(
    lm: LM, prompts: Sequence[tuple[str, Chat | None]], stops: Sequence[str] = ("\n",), max_new_tokens: int = 12
) -> list[str]:
    """Return the first words that a model writes after prompts, each in its chat or none; newlines do not count."""
    how = Writing(max_new_tokens=max_new_tokens, stops=list_of_texts(stops, "stops"), skip_newlines=True)
    return texts_after(lm, prompts, how)
