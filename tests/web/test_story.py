"""The engineer's story of docs/guides/production.md by clicks, from two batches to an adapter and a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import retcon
from retcon import world
from retcon.edits import case_record
from retcon.store import Store
from tests.web.test_page import SECONDS, Served, browser, served, wait_for_job

__all__ = ["browser", "served"]


def add(page: Any, cases: list[Any]) -> None:
    page.get_by_label("One fact per line").fill("\n".join(json.dumps(case_record(case)) for case in cases))
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#said-add", has_text=f"{len(cases)} facts added").wait_for(timeout=SECONDS)


def edit(page: Any, cases: list[Any], *, in_force: int) -> str:
    add(page, cases)
    page.get_by_role("button", name="Edit", exact=True).click()
    page.locator("#in-force p", has_text=f"100 of {in_force} facts" if in_force > 100 else "100 of 100 facts").wait_for(
        timeout=10 * SECONDS
    )
    return wait_for_job(page, "edit")


def find(page: Any, words: str) -> None:
    """Filter the facts in force, and wait until they are: a click on a row that is being exchanged is lost."""
    with page.expect_response(lambda response: f"words={words}" in response.url, timeout=SECONDS):
        page.get_by_label("Filter").fill(words)
    page.locator("#in-force p", has_text="found").wait_for(timeout=SECONDS)
    page.wait_for_timeout(1000)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_correct_200_facts_by_clicks(served: Served, browser: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    cases = world.cases()[:200]
    page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    page.goto(f"{served.address}/?token=secret")
    page.get_by_text("demo:gptj").first.wait_for(timeout=SECONDS)
    assert "100 of 100 edits took" in edit(page, cases[:100], in_force=100)
    edit(page, cases[100:], in_force=200)
    both = page.locator("#fingerprint").inner_text()

    page.get_by_role("button", name="Verify").click()
    wait_for_job(page, "verify")
    page.locator("#checks", has_text="of 200").wait_for(timeout=SECONDS)
    broke = page.locator("#checks li details", has_text="own prompts give the new answer")
    broke.locator("summary").click()
    broke.locator("li", has_text="broke in").first.wait_for(timeout=SECONDS)
    page.screenshot(path=tmp_path / "verified.png", full_page=True)

    find(page, "Geneva")
    page.get_by_role("button", name="Undo Geneva").click()
    assert "0 values searched" in wait_for_job(page, "revert fact")
    page.locator("#in-force p", has_text="199 facts").wait_for(timeout=SECONDS)
    find(page, "Chevrolet")
    page.get_by_label("Another answer to Country of origin of Chevrolet").fill("Portugal")
    page.get_by_role("button", name="Amend Country of origin of Chevrolet").click()
    assert "1 value searched" in wait_for_job(page, "amend")
    page.locator("#in-force td", has_text="Portugal").wait_for(timeout=SECONDS)
    page.screenshot(path=tmp_path / "amended.png", full_page=True)

    for name in ("peft", "hf"):
        page.get_by_label("Folder").fill(str(tmp_path / name))
        page.get_by_label("Format").select_option(name)
        page.get_by_role("button", name="Export", exact=True).click()
        wait_for_job(page, "export")
        page.locator("#job", has_text=str(tmp_path / name)).wait_for(timeout=SECONDS)

    store = Store(served.store.path)
    assert (both, len(store.facts("HEAD~2"))) == (store.state("HEAD~2").id, 200)
    assert {line.fact for line in store.facts()} == {case.id for case in cases} - {"P17/Geneva"}
    stored = retcon.load("demo:gptj", dtype="auto")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with store.at(stored):
        for name, weight in stored.model.named_parameters():
            assert torch.equal(weight, merged.get_parameter(name))
    ids = served.lm.tokenizer("Country of origin of Chevrolet:", return_tensors="pt").input_ids
    adapted = PeftModel.from_pretrained(served.lm.model, str(tmp_path / "peft"))
    for model in (merged, adapted):
        with torch.no_grad():
            found = model(ids).logits[0, -1].argmax()
        assert served.lm.tokenizer.decode(found).strip() == "Portugal"
    adapted.unload()
