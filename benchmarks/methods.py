"""All methods with the budget of the quickstart; prints a JSON line per run and a table.

    python benchmarks/methods.py                     # all of them, into runs/methods
    python benchmarks/methods.py dora nf4            # some
    python benchmarks/methods.py lora eval.generate_examples=20 train.steps=20

A row is `train.py --config configs/quickstart.yaml` with the settings of METHODS below: the
same 533 addresses, once each. A finished run is not repeated: its summary is read again.
"""

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
METHODS = {
    "lora": (),
    "rslora": ("adapter.use_rslora=true", "adapter.alpha=16", "train.learning_rate=1e-3"),
    "dora": ("adapter.use_dora=true",),
    "lora-plus": ("adapter.lora_plus_ratio=8", "train.learning_rate=5e-4"),
    "pissa": ("adapter.init=pissa", "adapter.alpha=16", "train.learning_rate=5e-4"),
    "nf4": ("base_dtype=nf4",),
    "int8": ("base_dtype=int8",),
    "eva": ("adapter.init=eva",),
    "lora-ga": ("adapter.init=lora_ga", "train.learning_rate=3e-4"),
    "loftq": ("base_dtype=nf4", "adapter.init=loftq"),
    "prompt": ("adapter.method=prompt", "train.learning_rate=0.1"),
    "prefix": ("adapter.method=prefix", "train.learning_rate=0.03"),
    "full": ("adapter.method=full", "train.learning_rate=2e-4"),
}
COLUMNS = {
    "loss": lambda found: f"{found['task']['loss_after']:.3f}",
    "exact match": lambda found: f"{found['task']['exact_match_after']:.2f}",
    "regression": lambda found: f"{found['regression']['loss_after']:.2f}",
    "trainable": lambda found: f"{found['trainable_parameters']:,}",
    "adapter MB": lambda found: f"{found['adapter_bytes'] / 1e6:.1f}",
    "peak RSS GB": lambda found: f"{found['peak_rss_bytes'] / 1e9:.2f}",
    "tokens/s": lambda found: f"{found['tokens_per_second']:.0f}",
}


def run(name: str, overrides: list[str]) -> dict:
    """Run a method and return the summary."""
    output = Path("runs/methods") / name
    command = [sys.executable, str(ROOT / "train.py")]
    command += ["--config", str(ROOT / "configs/quickstart.yaml"), f"output_dir={output}"]
    command += ["export.merged=false", "resume=auto", *METHODS[name], *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))


def main() -> None:
    overrides = [text for text in sys.argv[1:] if "=" in text]
    names = [text for text in sys.argv[1:] if "=" not in text] or list(METHODS)
    if unknown := set(names) - set(METHODS):
        sys.exit(f"error: {', '.join(sorted(unknown))}; there are: {', '.join(METHODS)}")
    table = Table("method", *COLUMNS, "settings")
    for name in names:
        found = run(name, overrides)
        cells = {column: cell(found) for column, cell in COLUMNS.items()}
        print(json.dumps({"method": name, "settings": METHODS[name], **cells}), flush=True)
        table.add_row(name, *cells.values(), " ".join(METHODS[name]))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
