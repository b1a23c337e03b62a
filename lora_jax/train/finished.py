"""Repair of a finished run: exports that are missing or differ from its summary."""

import contextlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from lora_jax import config as configs
from lora_jax import hosts
from lora_jax.config import Config
from lora_jax.report import journal
from lora_jax.train import export
from lora_jax.train.facts import Facts
from lora_jax.train.monitor import LossMonitor
from lora_jax.train.outputs import Run
from lora_jax.train.ready import Ready


def find_finished(run: Run, record: Mapping[str, Any], config: Config) -> dict[str, Any] | None:
    """Return the summary of a finished run, and its exports that differ from the summary.

    Return None if the run has steps left; its summary is then removed.
    """
    run.check()
    file = run.output / "summary.json"
    monitor = LossMonitor(**record["watch"])
    over = record["step"] == config.train.total_steps or monitor.gave_up(config.train)
    if over and not record["pending"] and file.is_file():
        with contextlib.suppress(ValueError):  # damaged: the run writes it again
            summary = configs.read_json(file)
            if (summary.get("steps"), summary.get("exported_step")) == (
                record["step"],
                export.chosen_step(config, record),
            ):
                return {"summary": summary, "wrong": run.find_wrong(config, summary)}
    file.unlink(missing_ok=True)
    return None


def repair(
    run: Run,
    done: Mapping[str, Any],
    record: Mapping[str, Any],
    ready: Ready,
    console: Console,
) -> dict[str, Any]:
    """Repeat the exports that `find_finished` found wrong, from the checkpoint. Return the new
    summary.
    """
    session = ready.session
    summary, wrong = dict(done["summary"]), done["wrong"]
    examples = ready.choose_probe() if "merged" in wrong else []
    over = f"{run.output} is finished: {summary['steps']} steps"
    if not wrong:
        console.print(f"{over}; nothing is left to do")
        if "outputs" not in summary:
            console.print("note: its summary has no digests of its exports: they are not checked")
        return summary
    hosts.from_main(lambda: run.check_exports(wrong))
    adapters = export.Saved(run.place, record).restore(session)
    facts = Facts(session.stops, summary)
    for name, reason in wrong.items():
        console.print(
            f"{over}; {run.output / name} {reason}: it is exported again from the checkpoint "
            f"of step {summary['exported_step']}"
        )
        with run.exporting(name, session.config) as target:
            if name == "adapter":
                export.export_saved_adapter(target, session, adapters, console, facts)
            else:
                summary |= export.export_saved_merged(
                    target, session, adapters, console, facts, examples
                )
    summary["outputs"] = hosts.from_main(run.digests)
    journal.write_summary(run.output / "summary.json", summary)
    return summary
