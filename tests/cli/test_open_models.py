"""What a new user does with a checkpoint, for each group of models: doctor, edit, apply, and transformers alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recipes.tiny import tiny_wrapper

import retcon
from tests.conftest import tiny_model, tokenizer
from tests.lm.test_quantised import packed

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:.*larger than the weight", "ignore:.*no memit preset", "ignore:.*took"),
    pytest.mark.filterwarnings("ignore:too few tokens of the corpus", "ignore:.*a (norm|factor) stands between"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore::UserWarning"),
]
GROUPS = {
    "dense": "llama",
    "wrapper": "gemma3",
    "hybrid": "falcon_h1",
    "mixture": "mixtral",
    "quantised": "compressed-tensors",
}
LOADED_BY = {"wrapper": "AutoModelForImageTextToText"}


def checkpoint(group: str, folder: Path) -> None:
    if group == "wrapper":
        model = tiny_wrapper(GROUPS[group])
    else:
        model = tiny_model("llama" if group == "quantised" else GROUPS[group], torch.float32)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if group == "quantised":
        packed(folder, GROUPS[group])


@pytest.mark.parametrize("group", GROUPS)
def test_doctor_edit_and_apply(group: str, cli: Callable[..., Any], here: Path) -> None:
    if group == "quantised":
        pytest.importorskip("compressed_tensors")
    checkpoint(group, here / "mine")
    examined = cli("doctor", "./mine").stdout
    assert "failed" not in examined
    cli("edit", "./mine", "edits.jsonl", "--method", "memit", "--corpus", "corpus.txt", "--out", "d.safetensors")
    told = cli("apply", "./mine", "d.safetensors", "--save", "edited").stdout
    name = LOADED_BY.get(group, "AutoModelForCausalLM")
    assert f"load it with {name}.from_pretrained('edited')" in told
    ids = torch.tensor([[5, 9, 31, 77, 200, 3]])
    again = getattr(transformers, name).from_pretrained("edited", dtype=torch.float32).eval()
    lm = retcon.load("./mine")
    with torch.no_grad():
        before = lm.model(ids).logits
        with lm.edited(retcon.Delta.load("d.safetensors")):
            edited = lm.model(ids).logits
        torch.testing.assert_close(again(ids).logits, edited, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, edited)
    first, second = (cli("complete", "./mine", "The capital of France is", *more).stdout
                     for more in ((), ("--delta", "d.safetensors")))  # fmt: skip
    assert first.strip()
    assert second.strip()


def test_a_packed_checkpoint_is_edited_as_it_is(cli: Callable[..., Any], here: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wide = tiny_model("llama", torch.float32, hidden_size=64, head_dim=16, intermediate_size=128)
    wide.save_pretrained("plain")
    four = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained("plain", quantization_config=four, dtype=torch.float32)
    model.save_pretrained("mine")
    tokenizer().save_pretrained("mine")
    tokenizer().save_pretrained("plain")
    refused = cli("complete", "./plain", "The capital of France is", "--packed", code=2).stderr
    assert "its weights are not quantised" in " ".join(refused.split())
    assert "failed" not in cli("doctor", "./mine", "--packed").stdout
    command = ("edit", "./mine", "edits.jsonl", "--method", "memit", "--corpus", "corpus.txt", "--packed")
    expected = json.loads(cli(*command, "--dry-run", "--json").stdout)
    assert expected["float_bytes"] % (4 * 64 * 128) == 0 < expected["float_bytes"] < expected["model_bytes"]
    assert "--delta d.safetensors --packed" in cli(*command, "--out", "d.safetensors").stdout
    packed, plain = (
        cli("complete", "./mine", "The capital of France is", "--delta", "d.safetensors", *more).stdout
        for more in (("--packed",), ())
    )
    assert packed == plain
    cli("apply", "./mine", "d.safetensors", "--save", "edited")  # the delta fits the dequantised model, too
    cli("apply", "./mine", "d.safetensors", "--save", "edited-packed", "--packed")
    ids = torch.tensor([[5, 9, 31, 77, 200, 3]])
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        one, two = (load(name, dtype=torch.float32)(ids).logits for name in ("edited", "edited-packed"))
    assert torch.equal(one, two)
