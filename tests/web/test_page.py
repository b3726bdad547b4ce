"""The page in a real browser: edit, look, undo, verify, export; hostile text stays text. And what it refuses."""

import json
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import retcon
from retcon import workflow
from retcon.cli import app
from retcon.edits import Case, Edit, Query
from retcon.errors import MalformedFile, RetconError
from retcon.store import Entry, Store
from retcon.store.index import fact_line
from retcon.store.verify import Check, Verification
from retcon.web.app import make_app
from retcon.web.jobs import N_JOBS, Job
from retcon.web.pasted import pasted_cases
from retcon.web.session import Session
from retcon.work import Progress

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '<img src=x onerror="document.title=1"> {} {{ 7*7 }} "\' is'
SECONDS = 240_000
"""Milliseconds that a step may take on a busy machine."""

UNNAMED = """[...document.querySelectorAll("input:not([type=hidden]), select, textarea, button, [tabindex]")]
  .filter((e) => !(e.ariaLabel || e.textContent.trim() || (e.labels && e.labels.length))).map((e) => e.outerHTML)"""
"""What a screen reader would have no name for."""


class Served:
    """A page on a free port."""

    def __init__(self, folder: Path) -> None:
        import uvicorn

        lm = retcon.load("demo:gptj")
        self.lm = lm
        self.store = Store.init(folder / "edits", lm, model="demo:gptj")
        self.session = Session(self.store, lambda name: lm if name == "demo:gptj" else retcon.load(name), "demo:gptj")
        self.session.jobs.start()
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(
            make_app(self.session, "secret"), log_level="error", lifespan="off", timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=30)
        self.session.jobs.stop()
        self.socket.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETCON_CACHE", str(folder / "cache"))
        found = Served(folder)
        yield found
        found.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def wait_for_job(page: Any, name: str, state: str = "done") -> str:
    shown = page.locator(f"#job [data-state={state}]", has_text=name)
    shown.wait_for(timeout=SECONDS)
    return str(shown.inner_text())


def test_edit_look_undo_verify_export(served: Served, browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(f"{served.address}/?token=secret")
    assert "token" not in page.url
    page.get_by_text("demo:gptj").first.wait_for(timeout=SECONDS)

    page.get_by_label("One fact per line").fill("{} lies within the borders of | Geneva | Norway")
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#draft td", has_text="Geneva lies within the borders of").wait_for(timeout=SECONDS)
    page.get_by_role("button", name="Edit", exact=True).click()
    assert "1 of 1 edit took" in wait_for_job(page, "edit")

    page.get_by_label("Prompt", exact=True).fill("Geneva lies within the borders of")
    page.get_by_role("button", name="Ask").click()
    page.locator("#replies mark", has_text="Norway").wait_for(timeout=SECONDS)

    second = browser.new_context(viewport={"width": 400, "height": 800}, color_scheme="dark").new_page()
    second.goto(f"{served.address}/?token=secret")
    second.locator("#in-force td", has_text="Norway").wait_for(timeout=SECONDS)
    assert second.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.get_by_label("Another answer to Geneva").fill("Brazil")
    page.get_by_role("button", name="Amend Geneva").click()
    assert "1 value searched" in wait_for_job(page, "amend")
    second.locator("#in-force td", has_text="Brazil").wait_for(timeout=SECONDS)
    page.get_by_label("One fact per line").fill("{} lies within the borders of | Geneva | Norway")
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_role("region", name="Conflicts").get_by_role("button", name="Amend").click()  # and back again
    page.locator("#in-force td", has_text="Norway").wait_for(timeout=SECONDS)
    assert page.get_by_role("region", name="Conflicts").count() == 0
    assert page.evaluate(UNNAMED) == []

    page.get_by_role("button", name="Verify").click()
    assert "nothing broke" in wait_for_job(page, "verify")
    page.locator("#checks", has_text="1 of 1").wait_for(timeout=SECONDS)  # panels come one by one

    page.get_by_label("Folder").fill(str(tmp_path / "edited"))
    page.get_by_role("button", name="Export", exact=True).click()
    wait_for_job(page, "export")
    assert (tmp_path / "edited" / "model.safetensors").is_file()

    fingerprint = page.locator("#fingerprint").inner_text()
    link = page.locator("#state a").get_attribute("href")
    page.get_by_role("switch").uncheck()
    page.locator("#fingerprint", has_not_text=fingerprint).wait_for(timeout=SECONDS)
    second.locator("#state input:not(:checked)").wait_for(timeout=SECONDS)
    assert served.store.facts() == []
    second.goto(f"{served.address}{link}")  # the link shows the state that was undone
    second.locator("#fingerprint", has_text=fingerprint).wait_for(timeout=SECONDS)
    page.locator("#state input:not(:checked)").wait_for(timeout=SECONDS)  # and in this browser alone
    assert second.get_by_role("switch").is_checked()
    assert second.get_by_role("switch").is_disabled()
    second.get_by_label("Prompt", exact=True).fill("Geneva lies within the borders of the")
    second.get_by_role("button", name="Ask").click()
    second.locator("#replies mark", has_text="Norway").wait_for(timeout=SECONDS)
    second.get_by_role("link", name="Back to now").click()
    second.locator("#state input:not(:checked)").wait_for(timeout=SECONDS)
    assert "at=" not in second.url
    page.get_by_role("switch").check()
    page.locator("#fingerprint", has_text=fingerprint).wait_for(timeout=SECONDS)
    page.get_by_role("button", name="Undo Geneva").click()
    page.locator("#in-force td", has_text="Norway").wait_for(state="detached", timeout=SECONDS)
    page.locator("#commands", has_text="retcon revert --fact").wait_for(timeout=SECONDS)
    assert problems == []
    assert served.lm.applied == ()


def counting(session: Session, name: str = "count") -> Job:
    """A job that reports its progress ten times a second, for long."""

    def count(lm: Any, progress: Progress) -> str:
        for i in range(999):
            progress("counting", i, 999)
            time.sleep(0.1)
        return "counted"

    return session.jobs.submit(name, count)


def test_a_slow_press_cancels(served: Served, browser: Any) -> None:
    page = browser.new_context().new_page()
    page.goto(f"{served.address}/?token=secret")
    cancel = page.get_by_role("button", name="Cancel")
    cancel.wait_for(state="hidden", timeout=SECONDS)
    first, waiting = counting(served.session, "first"), counting(served.session, "second")
    page.locator("#job progress[value]").wait_for(timeout=SECONDS)
    cancel.focus()
    page.wait_for_timeout(500)
    assert cancel.evaluate("button => button === document.activeElement")
    cancel.click(delay=500)
    wait_for_job(page, "second", "cancelled")
    assert (first.state, waiting.state) == ("cancelled", "cancelled")
    cancel.wait_for(state="hidden", timeout=SECONDS)


UNNUMBERED = """[...document.querySelectorAll("section[hx-get] :is(a, button, summary, select, textarea, [tabindex], "
  + "input:not([type=hidden]))")].filter((e) => !e.id).map((e) => e.outerHTML)"""
"""What would lose the keyboard's focus when its panel is exchanged."""


def test_the_keyboard_keeps_its_place(served: Served, browser: Any) -> None:
    session = served.session
    session.add_facts("{} lies within the borders of | Geneva | Norway")
    assert done(session.edit()).state == "done"
    made = session.store.log()[-1].id
    assert done(session.verify()).state == "done"
    assert done(session.probe()).state == "done"
    session.add_facts("{} lies within the borders of | Geneva | Brazil\n{} lies within the borders of | Bern | Norway")
    page = browser.new_context().new_page()
    page.goto(f"{served.address}/?token=secret")
    page.locator("#in-force td", has_text="Norway").wait_for(timeout=SECONDS)
    page.locator("#conflicts").wait_for(timeout=SECONDS)
    assert page.evaluate(UNNUMBERED) == []
    focused = "document.activeElement.getAttribute('aria-label') || document.activeElement.closest('li').innerText"

    details = page.locator("#checks details").first
    is_open = details.get_attribute("open")
    details.locator("summary").press("Enter")
    undo = page.get_by_role("button", name="Undo Geneva")
    undo.focus()
    done(session.ask("Basel is"))
    page.locator("#replies article", has_text="Basel is").wait_for(timeout=SECONDS)
    page.wait_for_timeout(1000)
    assert page.evaluate(focused).startswith("Undo Geneva")
    assert details.get_attribute("open") != is_open

    switch = page.locator(f"#state li:has-text('{made}') [role=switch]")
    switch.press("Space")
    page.locator(f"#state li:has-text('{made}') input:not(:checked)").wait_for(timeout=SECONDS)
    wait_for_job(page, "switch")
    page.wait_for_timeout(1000)
    assert made in page.evaluate(focused)
    delta = session.store.path / "deltas" / f"{next(iter(session.store.entry(made).sets))}.safetensors"
    delta.rename(delta.with_suffix(".gone"))
    switch.press("Space")
    wait_for_job(page, "switch", "failed")
    page.locator(f"#state li:has-text('{made}') input:not(:checked)").wait_for(timeout=SECONDS)
    delta.with_suffix(".gone").rename(delta)
    session.clear()


def test_hostile_text_stays_text(served: Served, browser: Any) -> None:
    page = browser.new_context().new_page()
    page.goto(f"{served.address}/?token=secret")
    title = page.title()
    page.get_by_label("One fact per line").fill(f"{HOSTILE} | <b>Geneva</b> | <script>document.title=2</script>")
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#draft td", has_text="<script>document.title=2</script>").wait_for(timeout=SECONDS)
    page.get_by_label("Prompt", exact=True).fill("<b>bold</b> {{ 7*7 }}")
    page.get_by_role("button", name="Ask").click()
    page.locator("#replies .prompt", has_text="<b>bold</b> {{ 7*7 }}").wait_for(timeout=SECONDS)
    page.get_by_label("Settings over the preset's").fill("<u>low</u>=<script>document.title=3</script>")
    page.get_by_role("combobox", name="Method").select_option("memit")
    page.locator("#said-choose .bad", has_text="<u>low</u>").wait_for(timeout=SECONDS)
    page.get_by_label("Model: a path").fill("<s>no model</s>")
    page.get_by_role("button", name="Load").click()
    assert "<s>no model</s>" in wait_for_job(page, "load", "failed")
    page.get_by_label("Folder").fill("<i>/\x00")
    page.get_by_role("button", name="Export", exact=True).click()
    wait_for_job(page, "export", "failed")
    assert page.title() == title
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("No facts yet").wait_for(timeout=SECONDS)


def test_a_map_chooses_a_layer(served: Served, browser: Any) -> None:
    page = browser.new_context().new_page()
    page.goto(f"{served.address}/?token=secret")
    page.get_by_label("One fact per line").fill("{} lies within the borders of | Geneva | Norway")
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#draft td", has_text="Geneva").first.wait_for(timeout=SECONDS)
    page.get_by_role("button", name="Contrast").click()
    wait_for_job(page, "contrast")
    page.get_by_role("button", name="layer 2, subject's last token").click()
    expect = pytest.importorskip("playwright.sync_api").expect
    expect(page.get_by_label("Settings over")).to_have_value("low=[2]", timeout=SECONDS)
    served.session.settings = {}
    served.session.clear()


def test_what_a_browser_shows_is_what_it_edits_by(served: Served, browser: Any) -> None:
    expect = pytest.importorskip("playwright.sync_api").expect
    pages = [browser.new_context().new_page() for _ in range(2)]
    for page in pages:
        page.goto(f"{served.address}/?token=secret")
    one, other = pages
    other.get_by_label("Method", exact=True).select_option("ft")
    expect(one.get_by_label("Method", exact=True)).to_have_value("ft", timeout=SECONDS)
    other.get_by_label("Settings over").fill("epochs=3\nbox=none")
    other.get_by_label("Settings over").blur()
    expect(one.get_by_label("Settings over")).to_have_value("epochs=3\nbox=none", timeout=SECONDS)

    n_jobs = len(served.session.jobs.all)
    one.get_by_label("Settings over").fill("epochs=many")
    one.get_by_role("button", name="Edit", exact=True).click()
    one.locator("#said-edit .bad", has_text="epochs").wait_for(timeout=SECONDS)
    assert len(served.session.jobs.all) == n_jobs
    served.session.choose("jeep", [])


def test_commands_say_settings_as_the_command_line_reads_them(served: Served) -> None:
    session = served.session
    given = ["joint_optimisation=true", "low=[2]", "threshold=none"]
    session.choose("jeep", given)
    assert session.settings_text.split("\n") == given
    session.add_facts("{} lies within the borders of | Geneva | Norway")
    assert done(session.edit()).state == "done"
    assert "--set joint_optimisation=true --set 'low=[2]' --set threshold=none" in session.commands[-1]
    session.choose("jeep", [])
    done(session.toggle(session.store.log()[-1].id))


def test_lists_and_tables_over_the_preset_are_read_back(served: Served) -> None:
    session = served.session
    for method, given in [("lora", 'modules=["q_proj", "v_proj"]'), ("rect", 'base_settings={stop = "probability"}')]:
        session.choose(method, [given])
        chosen = session.settings
        assert session.settings_text == given
        session.choose(method, session.settings_text.splitlines())
        assert session.settings == chosen
    session.choose("jeep", [])


@pytest.mark.parametrize("change", ["method", "facts"])
def test_an_estimate_is_shown_with_what_it_is_of_alone(served: Served, change: str, monkeypatch: Any) -> None:
    session, real = served.session, workflow.estimate

    def estimate(*given: Any, **named: Any) -> workflow.Estimate:
        if change == "method":
            session.choose("ft", [])
        else:
            session.add_facts("{} lies within the borders of | Bergen | Peru")
        return real(*given, **named)

    session.choose("memit", ["steps=1"])
    session.add_facts("{} lies within the borders of | Geneva | Norway")
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "estimate", estimate)
        assert done(session.dry_run()).state == "done"
    assert session.estimate is None
    assert done(session.dry_run()).state == "done"
    assert session.estimate is not None
    session.clear()
    session.choose("jeep", [])


@pytest.mark.long
def test_another_model_has_a_store_of_its_own(served: Served, browser: Any) -> None:
    page = browser.new_context().new_page()
    page.goto(f"{served.address}/?token=secret")
    page.get_by_label("Model: a path").fill("demo:llama")
    page.get_by_role("button", name="Load").click()
    assert "edits-demo-llama" in wait_for_job(page, "load")
    page.locator("#model", has_text="edits-demo-llama").wait_for(timeout=SECONDS)
    page.locator("#state", has_text="the model is as it was").wait_for(timeout=SECONDS)
    page.get_by_label("One fact per line").fill("{} lies within the borders of | Geneva | Norway")
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#draft td", has_text="Geneva").first.wait_for(timeout=SECONDS)
    page.get_by_role("button", name="Dry run").click()
    page.locator("#estimate", has_text="write at layer low").wait_for(timeout=SECONDS)
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Model: a path").fill("demo:gptj")
    page.get_by_role("button", name="Load").click()
    page.locator("#model:not(:has-text('llama'))").wait_for(timeout=SECONDS)
    assert served.session.store is served.store


def with_many_facts(path: Path, served: Served, n: int) -> Store:
    """A store of so many facts in one entry, without the delta's file."""
    store = Store.init(path, served.lm)
    edits = [Edit("The town that {} lies in is", f"river {i:04}", f"Town {i % 7}", id=f"P17/#{i} 'é") for i in range(n)]
    entry = Entry.make("edit", "many", time="2026-01-01T00:00:00+00:00", after=None, sets={"0" * 16: (None, "0" * 16)})
    lines = [fact_line(Case(edit.id, (edit,), ()), "0" * 16) for edit in edits]
    (store.path / "facts" / f"{entry.id}.jsonl").write_text("\n".join(lines) + "\n")
    (store.path / "log.jsonl").write_text(entry.line + "\n")
    return Store(path)


@pytest.mark.long
def test_many_facts_come_by_the_hundred_are_filtered_and_sorted(
    served: Served, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.session, "store", with_many_facts(tmp_path / "many", served, 250))
    page = browser.new_context().new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{served.address}/?token=secret")
    rows = page.locator("#in-force tbody tr")
    expect = pytest.importorskip("playwright.sync_api").expect

    def shows(text: str, n_rows: int) -> None:
        page.locator("#in-force p", has_text=text).wait_for(timeout=SECONDS)
        expect(rows).to_have_count(n_rows, timeout=SECONDS)

    shows("100 of 250 facts", 100)
    page.get_by_role("button", name="More").click()
    shows("200 of 250 facts", 200)
    served.session.changed()  # looking again keeps what was asked for
    page.get_by_label("Sort").select_option("newest")
    page.locator("#in-force tbody tr:first-child", has_text="river 0249").wait_for(timeout=SECONDS)
    shows("200 of 250 facts", 200)
    page.get_by_label("Filter").fill("TOWN river 024")
    shows("11 of 11 found, 250 facts", 11)
    assert all("024" in text for text in rows.all_inner_texts())
    page.get_by_label("Filter").fill("nowhere")
    shows("0 of 0 found", 0)
    assert problems == []


# --- without a browser -------------------------------------------------------------------------------------------


def fetch(served: Served, path: str, *, method: str = "GET", body: str = "", **headers: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", served.socket.getsockname()[1], timeout=60)
    connection.request(method, path, body, headers)
    found = connection.getresponse()
    text = found.read().decode()
    connection.close()
    return found.status, text


def test_who_may_not_ask_is_told_why(served: Served) -> None:
    port = served.socket.getsockname()[1]
    cookie = {"Cookie": f"retcon-token-{port}=secret"}
    assert fetch(served, "/")[0] == 403
    stale = {"Cookie": f"retcon-token-{port}=of-an-earlier-run"}
    assert fetch(served, "/?token=secret", **stale)[0] == 303  # the address that was just printed opens the page
    assert fetch(served, "/panel/state", **stale)[0] == 403
    assert "wrong token, or none" in fetch(served, "/?token=Secret")[1]
    assert fetch(served, "/panel/state", **cookie)[0] == 200
    assert fetch(served, "/panel/state", Host="evil.example", **cookie)[0] == 403
    status, text = fetch(served, "/do/clear", method="POST", Origin="http://evil.example", **cookie)
    assert (status, "another site" in text) == (403, True)
    for origin in ("http://127.0.0.1:3000", "null"):
        assert fetch(served, "/do/clear", method="POST", Origin=origin, **cookie)[0] == 403
    assert fetch(served, "/do/clear", method="POST", Origin=f"http://127.0.0.1:{port}", **cookie)[0] == 200
    assert fetch(served, "/panel/nope", **cookie)[0] == 404
    assert fetch(served, "/static/..%2Fapp.py", **cookie)[0] == 404
    assert "no layer" in fetch(served, "/do/layer", method="POST", **cookie)[1]
    assert fetch(served, "/do/nope", method="POST", **cookie)[0] == 404
    assert "no entry" in fetch(served, "/?at=nope", **cookie)[1]


def done(job: Job) -> Job:
    deadline = time.monotonic() + SECONDS / 1000
    while not job.ended and time.monotonic() < deadline:
        time.sleep(0.02)
    return job


@pytest.mark.parametrize("broken", ["<<<<<<< HEAD\n", "{}\n", "\xff"])
def test_a_log_that_cannot_be_read_is_named(served: Served, tmp_path: Path, broken: str, monkeypatch: Any) -> None:
    store = with_many_facts(tmp_path / "many", served, 2)
    monkeypatch.setattr(served.session, "store", store)
    log = store.path / "log.jsonl"
    log.write_bytes(broken.encode("latin-1") + log.read_bytes())
    cookie = {"Cookie": f"retcon-token-{served.socket.getsockname()[1]}=secret"}
    for path in ("/", "/?at=HEAD~1", "/panel/state", "/panel/facts"):
        status, text = fetch(served, path, **cookie)
        assert (status, 'role="alert"' in text, "log.jsonl" in text) == (200, True, True)
    status, text = fetch(served, "/do/add", method="POST", body="facts=a+%7C++%7C+b", **cookie)
    assert (status, "log.jsonl" in text) == (200, True)


def check_of(n: int, outcome: Any) -> Check:
    return Check(f"fact {n}", Query(f"rewrite/{n}", "rewrite", f"Prompt {n} is", "so"), "took", outcome)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,subject,target_new\n{} is,x,\n", "the facts, row 2: the answer to write is empty. Mend the row, or"),
        ("prompt,subject,target_new\n{} is,x,y\n{} was,,y\n", "the facts, row 3: the prompt has a {} for the subject"),
        ("{} is | x | y\n{} was | | y", "line 2: the prompt has a {} for the subject"),
        ("{} is | x | y\n{} was | x | ", "line 2: edit of 'x': target_new is empty"),
        ("prompt,subject,target_new\n{} is,x,y\n{} is,x,z\n", "1 such group. Take one out."),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named_in_the_words_of_the_page(text: str, said: str) -> None:
    with pytest.raises(RetconError) as caught:
        pasted_cases(text)
    found = caught.value.on_page
    assert said in found
    assert found.count("Mend the row") <= 1
    assert "=" not in found


def test_a_file_is_read_as_utf8_and_can_be_chosen_again(served: Served, browser: Any, tmp_path: Path) -> None:
    page = browser.new_context().new_page()
    page.goto(f"{served.address}/?token=secret")
    file, text = tmp_path / "facts.csv", "prompt,subject,target_new\n{} is in,Zürich,Österreich\n"
    for encoding in ("latin-1", "utf-8", "utf-8-sig"):
        page.get_by_label("One fact per line").fill("")
        file.write_text(text, encoding)
        with page.expect_file_chooser() as chosen:  # as a hand does it, which a browser passes over for the same name
            page.locator("#file").click()
        chosen.value.set_files(file)
        page.locator("#said-add", has_text="not UTF-8" if encoding == "latin-1" else "is above").wait_for(
            timeout=SECONDS
        )
        assert page.get_by_label("One fact per line").input_value() == ("" if encoding == "latin-1" else text)
        page.locator("#said-add").evaluate("said => said.replaceChildren()")
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#draft td", has_text="Zürich").wait_for(timeout=SECONDS)
    served.session.clear()


def test_checks_say_of_which_state_and_how_many(served: Served, browser: Any, monkeypatch: Any) -> None:
    session = served.session
    checks = [check_of(n, "never" if n < 30 else "broke" if n < 35 else "passed") for n in range(40)]
    found = Verification("", "", session.store.state("base"), tuple(checks), 40, 0)
    monkeypatch.setattr(session, "verification", found)
    page = browser.new_context().new_page()
    page.goto(f"{served.address}/?token=secret")
    own = page.locator("#checks li details").first
    assert "5 of 40, 5 broke, 30 never passed" in own.inner_text()
    own.locator("summary").click()
    items = own.locator("li").all_inner_texts()
    assert len(items) == 20
    assert ["Prompt 3" in item for item in items[:6]] == [True] * 5 + [False]
    own.get_by_text("and 15 more").wait_for(timeout=SECONDS)
    page.locator("#checked code", has_text=found.state.id).wait_for(timeout=SECONDS)
    assert page.locator("#checked .bad").count() == 0
    session.add_facts("{} lies within the borders of | Zug | Norway")
    assert done(session.edit()).state == "done"
    page.locator("#checked .bad", has_text="verify again").wait_for(timeout=SECONDS)
    assert own.get_attribute("open") is not None
    done(session.toggle(session.store.log()[-1].id))


def test_commands_name_the_state_that_was_shown(served: Served, tmp_path: Path) -> None:
    session = served.session
    session.add_facts("{} lies within the borders of | Geneva | Norway")
    assert done(session.edit()).state == "done"
    made = session.store.log()[-1].id
    edit = shlex.split(session.commands[-1])
    assert [case.edits[0].target_new for case in retcon.read_cases(edit[3])[0]] == ["Norway"]
    undo = done(session.toggle(made))
    assert undo.state == "done"
    jobs = [
        session.ask("Geneva lies within the borders of", at=made),
        session.verify(made),
        session.export(str(tmp_path / "x"), "hf", at=made),
    ]
    assert [done(job).state for job in jobs] == ["done"] * 3
    ask, verify, export = session.commands[-3:]
    at = f"{session.store.path}@{made}"
    assert ask.endswith(f"--delta {at}")
    assert verify == f"retcon verify {made} --store {session.store.path}"
    assert at in export
    assert CliRunner().invoke(app, [*shlex.split(export)[1:-1], str(tmp_path / "y")]).exit_code == 0
    ours, theirs = (tmp_path / name / "model.safetensors" for name in "xy")
    assert ours.read_bytes() == theirs.read_bytes()  # in the dtype of the checkpoint
    assert "no chat template" in done(session.ask("Where is Geneva?", chat=True)).message
    done(session.toggle(made))
    done(session.toggle(made))


def test_the_page_says_what_it_did_not_understand(served: Served) -> None:
    session = served.session
    fact = {"prompt": "{} lies within the borders of", "subject": "Aarau", "target_new": "Norway"}
    odd = {**fact, "paraphrase": ["x"], "neighbors": ["Bern lies within the borders of"]}
    said = session.add_facts(json.dumps([odd, odd]))
    assert said == (
        "1 fact added; dropped: duplicate 1; queries dropped: neighbor_without_answer 1; "
        "unknown field 'paraphrase' in 2 rows (did you mean 'paraphrases'?)"
    )
    session.clear()


def test_what_comes_while_an_edit_runs_stays_in_the_draft(served: Served) -> None:
    session = served.session
    session.add_facts("{} lies within the borders of | Basel | Norway")
    job = session.edit()
    while job.state == "waiting":
        time.sleep(0.01)
    session.add_facts("{} lies within the borders of | Bern | Norway")
    session.choose("ft", [])
    assert done(job).state == "done"
    assert [case.edits[0].subject for case in session.draft] == ["Bern"]
    assert "--method jeep" in session.commands[-1]
    session.choose("jeep", [])
    session.draft.clear()
    done(session.toggle(session.store.log()[-1].id))


def test_what_another_process_writes_is_shown(served: Served) -> None:
    connection = HTTPConnection("127.0.0.1", served.socket.getsockname()[1], timeout=60)
    connection.request("GET", "/events", headers={"Cookie": f"retcon-token-{served.socket.getsockname()[1]}=secret"})
    stream = connection.getresponse()
    assert stream.readline() == b"event: changed\n"
    (served.store.path / "log.jsonl").touch()
    lines = [stream.readline() for _ in range(3)]  # the rest of the first event, then the next
    assert lines[2] == b"event: changed\n"
    connection.close()


def test_a_cancelled_edit_changes_nothing(served: Served) -> None:
    session = served.session
    log = served.store.log()
    session.add_facts("{} lies within the borders of | Geneva | Norway")

    def wait(lm: Any, progress: Progress) -> str:
        time.sleep(0.3)
        return "waited"

    blocker = session.jobs.submit("wait", wait)
    job = session.edit()
    job.cancel = True
    done(job)
    assert (blocker.state, job.state) == ("done", "cancelled")
    running = counting(session)
    time.sleep(0.2)
    session.jobs.cancel()
    done(running)
    assert running.state == "cancelled"
    assert served.store.log() == log
    session.clear()


def test_errors_of_jobs_are_in_the_words_of_the_page(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    session = served.session
    session.add_facts("{} lies within the borders of | Chur | Norway")
    assert done(session.edit()).state == "done"

    def gone(*args: Any) -> Any:
        raise MalformedFile("delta x: no such file")

    monkeypatch.setattr("retcon.store.verify._blame", gone)
    monkeypatch.setattr("retcon.store.verify._Asker.ask", lambda asker, at, cases: {(cases[0].id, "rewrite/0"): False})
    message = done(session.verify()).message
    assert message.endswith("cannot be asked without it; retcon verify --no-bisect checks the present one alone")
    monkeypatch.undo()
    assert done(session.ask("The capital of France is", chat=True)).message.endswith("ask without 'as a chat message'")
    done(session.toggle(session.store.log()[-1].id))


def test_jobs_that_have_not_ended_are_kept(served: Served) -> None:
    session = served.session
    jobs = [counting(session) for _ in range(N_JOBS + 5)]
    assert session.jobs.all[-len(jobs) :] == jobs
    session.jobs.cancel()
    assert [done(job).state for job in jobs] == ["cancelled"] * len(jobs)
    done(session.jobs.submit("last", lambda lm, progress: ""))
    assert len(session.jobs.all) == N_JOBS + 1


def test_the_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    from retcon.cli.ui import _listen
    from retcon.errors import InvalidSetting

    first = _listen("127.0.0.1", 0)
    with pytest.raises(InvalidSetting, match="another page may be open there: use --port 0"):
        _listen("127.0.0.1", first.getsockname()[1])
    first.close()


def test_the_first_model_is_loaded_again_as_it_was_and_an_interrupt_ends_it_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    sessions: list[Session] = []
    sources: list[Any] = []

    def page(session: Session, token: str, **options: Any) -> Any:
        sessions.append(session)
        return make_app(session, token, **options)

    def look(lm: Any, progress: Progress) -> str:
        sources.append(lm.source)
        return ""

    def run(server: Any, sockets: Any) -> None:
        for name in ("demo:llama", "demo:gptj"):
            done(sessions[0].choose_model(name))
            done(sessions[0].jobs.submit("look", look))
            done(sessions[0].ask("A prompt"))
        raise KeyboardInterrupt

    monkeypatch.setattr("retcon.web.app.make_app", page)
    monkeypatch.setattr(uvicorn.Server, "run", run)
    how = ["--device", "cpu", "--revision", "main", "--dtype", "float32"]
    command = ["ui", "demo:gptj", *how, "--store", str(tmp_path / "edits"), "--port", "0"]
    ended = CliRunner().invoke(app, command)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert [(name, options["revision"]) for name, options in sources] == [("demo:llama", None), ("demo:gptj", "main")]
    assert [shlex.split(typed)[6:] for typed in sessions[0].commands] == [[*how[:2], *how[4:]], how]
