"""Write constraints.txt from environments in which the whole suite passed.

    python .ci/constraints.py 3.11=freeze311.txt 3.12=freeze312.txt > constraints.txt

Each file holds what `pip freeze --exclude-editable` printed under that version of Python, oldest
version first. A version that is not the same under all of them gets a marker.
"""

import re
import sys
from pathlib import Path

# Parts of torch's CUDA build, which pip chooses with torch itself.
_OF_TORCH = re.compile(r"(nvidia|cuda|triton)\b", re.IGNORECASE)


def read(file: str) -> dict[str, str]:
    """Versions by the name of the package."""
    lines = [line.split("==") for line in Path(file).read_text().split() if "==" in line]
    # A local version such as 2.13.0+cpu names a build, and an index may have only another.
    found = {name.lower().replace("_", "-"): version.split("+")[0] for name, version in lines}
    return {name: version for name, version in found.items() if not _OF_TORCH.match(name)}


def merged(found: dict[str, dict[str, str]]) -> list[str]:
    """One line for each package and version."""
    pythons = list(found)
    lines = []
    for name in sorted(set().union(*found.values())):
        versions = {python: found[python].get(name) for python in pythons}
        if len({*versions.values()} - {None}) == 1:
            lines.append(f"{name}=={next(filter(None, versions.values()))}")
            continue
        for index, python in enumerate(pythons):
            last = index == len(pythons) - 1
            marker = f'python_version {">=" if last else "=="} "{python}"'
            lines += [f"{name}=={versions[python]}; {marker}"] if versions[python] else []
    return lines


if __name__ == "__main__":
    files = dict(argument.split("=") for argument in sys.argv[1:])
    print("# The versions that the whole suite was run with; see CONTRIBUTING.md.")
    print("\n".join(merged({python: read(file) for python, file in files.items()})))
