"""Files read, with errors that name them; their names and places; the folder of the cache."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from retcon.atomic import TEMPORARY, remove_abandoned
from retcon.errors import InvalidSetting, MalformedFile
from retcon.escaping import is_text

MAX_NAME_BYTES = 200
"""Of a name made from labels that people chose; file systems take 255 bytes, and endings follow."""
NumberedRow = tuple[int, dict[str, Any]]
"""A row's number in its file, and the object."""

_HALF_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file, a byte order mark left out.

    Raises:
        MalformedFile: not there, not a file, not UTF-8, or empty.
    """
    text = _decoded(path)
    if not text.strip():
        raise MalformedFile(f"{path}: the file is empty; expected rows")
    return text


def read_prose(path: str | os.PathLike[str]) -> str:
    r"""Return the text of a file for a model to read: as `read_text`, with \n at the end of every line.

    Raises:
        MalformedFile: not there, not a file, not UTF-8, or without a word in it.
    """
    text = _decoded(path).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise MalformedFile(f"{path}: holds no text")
    return text


def _decoded(path: str | os.PathLike[str]) -> str:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise MalformedFile(f"{path}: no such file") from None
    except IsADirectoryError:
        raise MalformedFile(f"{path}: is a directory, expected a file") from None
    except (OSError, ValueError) as error:
        raise MalformedFile(f"{path}: cannot be read ({error})") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = "UTF-16 text" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 text (byte {error.start})"
        raise MalformedFile(f"{path}: {what}; save it as UTF-8") from None


def read_json_rows(path: str | os.PathLike[str], bad: list[tuple[int, str]] | None = None) -> list[NumberedRow]:
    """(row number from 1, object) of a JSON list or of JSON lines; NaN, which a table writes for no value, is null.

    Args:
        bad: gets (row number, what is wrong) of the rows that cannot be read; None refuses the file for the first.

    Raises:
        MalformedFile: not UTF-8, not JSON, empty, or a row that is not an object.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            found: list[tuple[int, Any]] = list(enumerate(_loads(text), 1))
        except json.JSONDecodeError as error:
            raise MalformedFile(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
        except (RecursionError, ValueError) as error:
            raise MalformedFile(f"{path}: {_json_problem(error)}") from None
    else:
        found = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may be inside a string
            if not line.strip():
                continue
            try:
                found.append((number, _loads(line)))
            except (RecursionError, ValueError) as error:
                if not found and not bad and _is_json(text):
                    raise MalformedFile(f"{path}: holds one value, expected a list or one object per line") from None
                _refuse(path, number, _json_problem(error), bad)
    rows = []
    suspect = _HALF_SURROGATE.search(text) is not None
    for number, record in found:
        if not isinstance(record, dict):
            _refuse(path, number, f"expected an object, found {type(record).__name__}", bad)
        elif suspect and not is_text(json.dumps(record, ensure_ascii=False)):
            _refuse(path, number, "holds half a surrogate pair, which is no text; write the character itself", bad)
        else:
            rows.append((number, record))
    if not rows and not bad:
        raise MalformedFile(f"{path}: holds no rows; expected a JSON list or JSON lines of objects")
    return rows


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=lambda constant: None if constant == "NaN" else float(constant))


def _refuse(path: str | os.PathLike[str], number: int, problem: str, bad: list[tuple[int, str]] | None) -> None:
    if bad is None:
        raise MalformedFile(f"{path}, row {number}: {problem}")
    bad.append((number, problem))


def _json_problem(error: Exception) -> str:
    """Return what keeps a text from being read as JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg})"
    if isinstance(error, RecursionError):
        return "nested too deeply to be read; give flat objects"
    return "holds a number of too many digits; write it as text"


def as_json(values: Mapping[str, Any], what: str, *, allow_nan: bool = True) -> dict[str, Any]:
    """Return values as a JSON file gives them back; `what` they are, for the message.

    Raises:
        InvalidSetting: JSON does not have such values.
    """
    try:
        return json.loads(json.dumps(dict(values), allow_nan=allow_nan))
    except (TypeError, ValueError) as error:
        raise InvalidSetting(f"{what} must be JSON values, such as text, numbers and lists: {error}") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (RecursionError, ValueError):
        return False
    return True


def require(record: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """Return the field `name` of `record`, of type `kind`.

    Raises:
        MalformedFile: it is missing or of another type; `where` names file and row.
    """
    if name not in record:
        raise MalformedFile(f"{where}: field {name!r} is missing; found: {', '.join(map(str, record)) or 'nothing'}")
    if not isinstance(record[name], kind):
        found = type(record[name]).__name__
        raise MalformedFile(f"{where}: field {name!r} must be {kind.__name__}, found {found} ({record[name]!r:.60})")
    return record[name]


def looks_like_path(name: str) -> bool:
    """Return whether a model's name can only be a path, and none of the hub's."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name


def hub_problem(repo: str, file: str, *, kind: str = "model", revision: str | None = None) -> str | None:
    """Say why the hub cannot be asked for a file; None where it answers, whatever it says, or the file is in its cache.

    Asks once; a download asks six times, over half a minute, before it fails.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if try_to_load_from_cache(repo, file, repo_type=kind, revision=revision) is None:
            get_hf_file_metadata(hf_hub_url(repo, file, repo_type=kind, revision=revision), timeout=10)
    except (HfHubHTTPError, HFValidationError):
        pass  # an answer, which the download explains
    except Exception as error:  # of whatever the connection failed
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def as_shared(path: str, folder: str | os.PathLike[str] | None = None) -> str:
    """Return a path as a file that people share holds it: no folder of this machine from its root on.

    Args:
        folder: of that file. An absolute path becomes relative to it; without one, its last part is left.
    """
    if not os.path.isabs(path):
        return path
    return Path(path).name if folder is None else os.path.relpath(path, Path(folder).absolute())


def all_shared(value: Any) -> Any:
    """Return a setting as files that people share have it: each text, those of a mapping too, `as_shared`."""
    if isinstance(value, Mapping):
        return {name: all_shared(v) for name, v in value.items()}
    return as_shared(value) if isinstance(value, str) else value


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def found_from(path: str, folder: str | os.PathLike[str]) -> str:
    """Return where what `as_shared` made of a path is: from that folder on if it exists there, else as it is."""
    beside = Path(folder) / path
    return str(beside) if beside.exists() else path


def check_exists(path: str | os.PathLike[str]) -> None:
    """Check that an input file is there, before a model is loaded.

    Raises:
        MalformedFile: it is not.
    """
    if Path(path).is_dir():
        raise MalformedFile(f"{path}: is a directory, expected a file")
    if not Path(path).is_file():
        raise MalformedFile(f"{path}: no such file")


def short_name(name: str) -> str:
    """Return a name of a file or folder, cut where file systems would not take it with an ending; at a letter's end."""
    return name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def cache_dir() -> Path:
    """Return where moments and fingerprints are kept: $RETCON_CACHE, $XDG_CACHE_HOME/retcon or ~/.cache/retcon."""
    if own := os.environ.get("RETCON_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retcon"


def tidy_cache() -> list[Path]:
    """Remove what processes that were killed while they saved have left in the cache, once in the life of a process."""
    return _tidied(cache_dir())


@cache
def _tidied(folder: Path) -> list[Path]:
    return remove_abandoned(folder, f"**/.*{TEMPORARY}")
