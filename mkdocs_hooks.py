"""What `make docs` adds to mkdocs: pages of the repository's root, folders in the navigation, links into the code."""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "BENCHMARKS.md": "benchmarks.md"}
"""Files of the repository's root that are pages of the site, and as what."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the root's pages, and name the pages that a folder in the navigation stands for."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    pages = sorted(file.src_uri for file in files.documentation_pages())
    named = set(_named(config.nav))
    config.nav = _expanded(config.nav, [page for page in pages if page not in named])
    return files


def _named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [name for entry in entries for name in _named(entry)]


def _expanded(nav: Any, rest: list[str]) -> Any:
    if isinstance(nav, dict):
        return {title: _expanded(entry, rest) for title, entry in nav.items()}
    if isinstance(nav, list):
        return [page for entry in nav for page in _in_list(entry, rest)]
    return nav


def _in_list(entry: Any, rest: list[str]) -> list[Any]:
    if isinstance(entry, str) and entry.endswith("/"):
        return [page for page in rest if posixpath.dirname(page) == entry.rstrip("/")]
    return [_expanded(entry, rest)]


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave docs/ to the page or to the repository; without an address they become plain paths."""
    source = {site: root for root, site in ROOT_PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def led(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or ":" in target:
            return match[0]
        at = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / at).exists():
            return match[0]  # mkdocs reports it
        inside = ROOT_PAGES.get(at, "index.md" if at == "README.md" else at.removeprefix("docs/"))
        on_site = at.startswith("docs/") or at in (*ROOT_PAGES, "README.md")
        if on_site and files.get_file_from_path(inside) is not None:
            relative = posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".")
            return f"[{text}]({relative}{'#' if anchor else ''}{anchor})"
        if address := os.environ.get("REPOSITORY"):
            return f"[{text}]({address}/blob/main/{at})"
        return text if text.startswith("`") else f"{text} (`{at}`)"

    return LINK.sub(led, markdown)
