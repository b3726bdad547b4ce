"""Rows from the Hugging Face hub: one JSON file of a dataset repository, or a split that `datasets` reads."""

import re
from dataclasses import dataclass
from typing import Any

from retcon.errors import MalformedFile, MissingPackage, how_to_install
from retcon.evaluation.datasets.tables import read_rows
from retcon.files import NumberedRow, hub_problem

PREFIX = "hub:"
_ADDRESS = re.compile(r"^hub:(?P<repo>[^/@:]+/[^/@:]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?$")

NAMED = {
    "counterfact": "hub:azhx/counterfact",
    "knowedit/recent": "hub:zjunlp/KnowEdit/benchmark/wiki_recent/recent_test.json",
    "knowedit/counterfact": "hub:zjunlp/KnowEdit/benchmark/wiki_counterfact/test_cf.json",
    "knowedit/zsre": "hub:zjunlp/KnowEdit/benchmark/ZsRE/ZsRE-test-all.json",
    "knowedit/wikibio": "hub:zjunlp/KnowEdit/benchmark/WikiBio/wikibio-test-all.json",
    "zsre": "hub:wangzn2001/Model_Editing_Hurt/training-data/zsre_mend_eval.json",
    "qaedit": "hub:WenDingY/QAEdit",
    "ultraedit": "hub:XiaojieGu/UltraEditBench",
}
"""Short names of what is on the hub; CounterFact's and MQuAKE's own files are to be had from their authors' pages."""


@dataclass(frozen=True)
class Address:
    """`hub:owner/name@revision/path/file.json`; revision and file may be left out."""

    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raise MalformedFile where `text` is no such address."""
        found = _ADDRESS.match(text)
        if found is None:
            raise MalformedFile(f"{text}: expected hub:owner/name, hub:owner/name/file.json or hub:owner/name@revision")
        return cls(found["repo"], found["revision"], found["file"])


def read_hub_rows(address: str, bad: list[tuple[int, str]] | None = None) -> list[NumberedRow]:
    """Return the rows of the file named, or of the training split where no file is; `bad` as for `read_rows`.

    Raises:
        MalformedFile: not found, or not readable.
        MissingPackage: the package `datasets` is needed and not installed.
    """
    at = Address.parse(address)
    try:
        if at.file is not None:
            from huggingface_hub import hf_hub_download

            if reason := hub_problem(at.repo, at.file, kind="dataset", revision=at.revision):
                raise MalformedFile(f"{address}: the hub cannot be asked for it ({reason})")
            file = hf_hub_download(at.repo, at.file, repo_type="dataset", revision=at.revision)
            return read_rows(file, bad)
        from datasets import load_dataset

        rows: list[dict[str, Any]] = [dict(row) for row in load_dataset(at.repo, split="train", revision=at.revision)]
        return list(enumerate(rows, 1))
    except ImportError:
        raise MissingPackage(
            f"{address}: reading a whole dataset needs the package 'datasets' ({how_to_install('hub')}); or name "
            "one file, hub:owner/name/file.json"
        ) from None
    except MalformedFile:
        raise
    except Exception as error:  # the hub's own errors are of many kinds, and none of them is ours
        raise MalformedFile(f"{address}: cannot be read from the hub ({error})") from error
