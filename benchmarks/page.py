"""How long a browser waits for the page: until it first shows something, and for the edit of one fact.

    python -m benchmarks.page

Starts `retcon ui demo:gptj` and a Chromium without a window, and prints seconds by the clock: the first paint (an empty
store, then one of 10,000 facts in 100 entries), and an edit from the click until its fact is in force; of edits also
the seconds of the processor, which other programs on the machine touch less (Linux). Needs playwright and Chromium.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import sync_playwright

import retcon
from benchmarks.store import many

PAINT = "performance.getEntriesByName('first-contentful-paint').map(paint => paint.startTime / 1000)[0]"
FACTS = ("{} lies within the borders of | Geneva | Norway", "The capital of {} is | France | Rome")


@contextmanager
def serving(store: Path) -> Iterator[tuple[str, int]]:
    """Return the address of a page for that store, and the number of its process."""
    command = [sys.executable, "-m", "retcon", "ui", "demo:gptj", "--store", str(store), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                break
        else:
            raise SystemExit("retcon ui ended without an address")
        try:
            yield found.group(), process.pid
        finally:
            process.terminate()


def first_paint(browser: Any, address: str) -> float:
    """Return the seconds to the first text, the best of three visits."""
    seconds = []
    for _ in range(3):
        page = browser.new_page()
        page.goto(address)
        while not (painted := page.evaluate(PAINT)):  # the page's rules forbid a condition that the browser evaluates
            page.wait_for_timeout(20)
        seconds.append(painted)
        page.close()
    return float(min(seconds))


def processor(pid: int) -> float:
    """Return the seconds of the processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def edit(browser: Any, address: str, pid: int, fact: str) -> tuple[float, float]:
    """Return the seconds from the click on Edit until the fact is in force: of the clock and of the processor."""
    page = browser.new_page()
    page.goto(address)
    page.get_by_label("One fact per line").fill(fact)
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#draft td").first.wait_for()
    started, used = time.perf_counter(), processor(pid)
    page.get_by_role("button", name="Edit", exact=True).click()
    page.locator("#in-force td", has_text=fact.rpartition("| ")[2]).wait_for(timeout=300_000)
    took = time.perf_counter() - started, processor(pid) - used
    page.close()
    return took


def main() -> None:
    """Print the figures."""
    chromium = shutil.which("chromium")
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with serving(Path(folder) / "empty") as (address, pid):
            print(f"first paint, an empty store     {first_paint(browser, address):6.2f} s", flush=True)
            for name, fact in zip(("first edit", "second edit"), FACTS, strict=True):
                clock, used = edit(browser, address, pid, fact)
                print(f"{name:31} {clock:6.2f} s, processor {used:.2f} s", flush=True)
        big = retcon.Store.init(Path(folder) / "big", retcon.load("demo:gptj"), model="demo:gptj")
        many(big, 100, 10_000)
        with serving(Path(folder) / "big") as (address, _):
            print(f"first paint, 10,000 facts       {first_paint(browser, address):6.2f} s", flush=True)
        browser.close()
    print(f"load of the machine meanwhile: {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
