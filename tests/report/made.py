"""Files of a run, a sweep, an eval and a plan, as the commands write them, with made-up numbers."""

import json
import math
import random

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>&amp;\u2028"
)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = """\
model: org/tiny
output_dir: runs/made
data: {train: rows.jsonl, eval: test.jsonl, regression: general.jsonl, max_length: 64}
adapter: {rank: 16}
train: {steps: %d, batch_size: 4}
"""
WARNING = "the regression set has 3 rows: its loss says little"


def write(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(directory, steps=10_000, text=HOSTILE):
    """A finished run of so many steps, each logged, whose texts have `text`."""
    directory.mkdir(parents=True)
    draw, every = random.Random(0), max(1, steps // 20)
    lines, sizes = [], []
    for step in range(1, steps + 1):
        level = 1.4 + 1.6 * math.exp(-4 * step / steps)
        line = {"step": step, "loss": level + draw.gauss(0, 0.15), "grad_norm": draw.random() + 0.3}
        line |= {"supervised_tokens": 300.0, "learning_rate": 2e-3 * (1 - step / steps)}
        line |= {"tokens_per_second": 812.5}
        if step % every == 0:
            line |= {"task_loss": level + 0.05, "regression_loss": 2.3 + 0.2 * step / steps}
            line |= {"norm_relative": 0.02 * step / steps, "exact_match": 0.4 * step / steps}
            sizes.append({"step": step, "modules": norms(draw, step / steps)})
        lines.append(line)
    write(directory / "metrics.jsonl", lines)
    write(directory / "norms.jsonl", sizes)
    write(directory / "predictions.jsonl", answers(steps, text))
    (directory / "config.yaml").write_text(CONFIG % steps)
    (directory / "run.json").write_text(json.dumps({"run": "1f2e", "started": "2026-11-28"}))
    (directory / "summary.json").write_text(json.dumps(summary(steps), indent=2))
    (directory / "merged").mkdir()
    (directory / "merged" / "merge_report.json").write_text(json.dumps(merge(draw)))
    return directory


def norms(draw, share):
    found = {}
    for place, name in enumerate(MODULES):
        part = "self_attn" if place < 4 else "mlp"
        values = [share * 0.03 * (0.3 + draw.random()) * (1 + layer / 30) for layer in range(30)]
        found[f"model.layers.{part}.{name}"] = {"relative": values}
    return found


def answers(steps, text):
    for step in (0, steps):
        for row in range(40):
            answer = '{"street": "Main St"}' if step and row % 3 else f"{text} {row}"
            yield {
                "step": step,
                "where": f"test.jsonl:{row + 1}",
                "prompt": f"{text} address {row}",
                "references": ['{"street": "Main St"}'],
                "answer": answer,
                "exact_match": float(bool(step and row % 3)),
            }


def summary(steps):
    return {
        "steps": steps,
        "exported_step": steps,
        "supervised_tokens": 300 * steps,
        "peak_rss_bytes": 2_400_000_000,
        "device_bytes": 7_100_000_000,
        "checkpoint_bytes": 58_600_000,
        "task": {
            "loss_before": 3.05,
            "loss_after": 1.48,
            "bits_per_byte_before": 1.4667,
            "bits_per_byte_after": 0.7117,
            "exact_match_before": 0.0,
            "exact_match_after": 0.4,
            "examples": 40,
        },
        "regression": {"loss_before": 2.3, "loss_after": 2.5},
        "tokens_per_second": 812.5,
        "total_parameters": 139_399_488,
        "trainable_parameters": 4_884_480,
        "adapter_bytes": 19_537_920,
        "seconds": 3725.0,
        "session_seconds": 3725.0,
        "warnings": [WARNING],
        "data": {
            "data.train rows.jsonl": {"examples": 533, "supervised_tokens": 30_114}
            | {"tokens": 41_000, "longest": 71, "truncated": 2, "dropped": 0},
            "data.eval": {"examples": 40, "supervised_tokens": 1200, "tokens": 2000, "longest": 66},
        },
    }


def merge(draw):
    modules = {
        f"model.layers.{layer}.mlp.{name}": {
            "weights": 1000,
            "share_changed": 0.4,
            "cosine": 1 - 0.2 * draw.random(),
            "norm_ratio": 1.0,
        }
        for name in MODULES[4:]
        for layer in range(30)
    }
    lowest = min(modules, key=lambda name: modules[name]["cosine"])
    return {
        "dtype": "bfloat16",
        "weights": 90_000,
        "share_changed": 0.4,
        "cosine": 0.9,
        "norm_ratio": 1.0,
        "lowest_cosine": modules[lowest]["cosine"],
        "lowest_cosine_module": lowest,
        "kl_live_merged": 0.0012,
        "kl_live_base": 0.31,
        "probe_rows": 8,
        "modules": modules,
    }


def write_sweep(directory, steps=60):
    """A sweep over rate, rank, targets and seed, of which one trial diverged and one stopped."""
    directory.mkdir(parents=True)
    draw, trials, lines = random.Random(1), [], []
    for rank in (1, 4, 16):
        for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2):
            for target in ("all-linear", ["q_proj", "v_proj"]):
                number = len(trials)
                away = math.log10(rate / 1e-3)
                loss = 1.5 + 0.25 * away**2 - 0.05 * math.log2(rank) + 0.03 * draw.random()
                loss += 0.1 * (target != "all-linear")
                settings = {"adapter.rank": rank, "train.learning_rate": rate}
                settings |= {"adapter.target_modules": target, "seed": 0}
                trials.append(
                    {
                        "number": number,
                        "settings": settings,
                        "status": "complete",
                        "task_loss": loss,
                        "regression_loss": 2.3 + 0.15 * (away + 2) ** 2 * (1 + rank / 32),
                        "train_loss": loss - 0.05,
                        "steps": steps,
                        "group": 0,
                        "adapter": None,
                        "reason": None,
                    }
                )
                for step in range(1, steps + 1):
                    now = loss + 1.5 * math.exp(-6 * step / steps) + draw.gauss(0, 0.03)
                    line = {"trial": number, "step": step, "round": step, "loss": now}
                    lines.append(line | {"learning_rate": rate})
                    if step % 20 == 0:
                        own = {"trial": number, "step": step, "round": step, "task_loss": now}
                        lines.append(own | {"regression_loss": 2.3 + 0.001 * step})
    trials[8] |= {"status": "diverged", "task_loss": None, "regression_loss": None}
    trials[8] |= {"train_loss": None, "reason": "the run diverges", "steps": 12}
    trials[0] |= {"status": "stopped", "reason": f"loss 2 is not among the best {HOSTILE}"}
    best = min((t for t in trials if t["status"] == "complete"), key=lambda t: t["task_loss"])
    best["adapter"] = f"trial-{best['number']}"
    content = {"trials": trials, "best": [best["number"]], "groups": [{"programs": 1}]}
    (directory / "sweep.json").write_text(json.dumps(content))
    (directory / "config.yaml").write_text(CONFIG % steps)
    (directory / "best.yaml").write_text(CONFIG % steps)
    write(directory / "metrics.jsonl", lines)
    return directory


def write_eval(directory):
    """The table and the answers of an eval of two adapters at three scales."""
    rows = [{"adapter": "base", "scale": 0.0, "task_loss": 3.0, "regression_loss": 2.3}]
    rows[0]["exact_match"] = 0.0
    lines = []
    for number, name in enumerate(("runs/a/adapter", "runs/b/adapter")):
        for scale in (0.5, 0.75, 1.0):
            loss = 3 - 1.5 * scale + 0.2 * number
            row = {"adapter": name, "scale": scale, "task_loss": loss}
            row |= {"regression_loss": 2.3 + 0.2 * scale**2, "exact_match": 0.4 * scale}
            rows.append(row)
    for row in rows:
        for i in range(6):
            line = {"adapter": row["adapter"], "scale": row["scale"], "where": f"test.jsonl:{i}"}
            line |= {"prompt": f"{HOSTILE} {i}", "references": ["yes", "si"]}
            lines.append(line | {"answer": f"answer {i}", "exact_match": float(i % 2)})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "scores.json").write_text(json.dumps(rows, indent=2))
    write(directory / "answers.jsonl", lines)
    return directory / "scores.json", directory / "answers.jsonl"


def write_plan(file):
    """A plan for a TPU slice that does not fit, with a search."""
    parts = ("base", "adapters", "optimizer", "batch", "gradients", "weights", "kept")
    estimate = {name: (i + 1) * 2**28 for i, name in enumerate(parts)} | {"total": 9 * 2**30}
    compiled = {"arguments": 3 * 2**30, "temporaries": 5 * 2**30, "needed": 9 * 2**30}
    sent = {"kind": "all-gather", "count": 30, "bytes": 3_000_000_000, "largest": 60_000_000}
    one = {"overrides": ["mesh.fsdp=4", "train.remat=full"], "total": 2**32, "seconds": 0.12}
    content = {
        "model": "org/tiny",
        "topology": "v5e:2x2",
        "devices": 4,
        "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
        "hbm": 8 * 2**30,
        "estimate": estimate,
        "full_fine_tuning": {"total": 30 * 2**30},
        "notes": [HOSTILE],
        "compiled": compiled | {"collectives": [sent]},
        "step": {"tokens": 8192, "model_flops": 10**13, "flops": 2 * 10**13},
        "roofline": {"compute": 0.1, "memory": 0.05, "network": 0.02, "mfu": 0.4}
        | {"seconds": 0.1, "bound": "compute"},
        "members": {"count": 4, "shared": 2**30, "each": 2**29, "total": 3 * 2**30, "largest": 9},
        "fits": False,
        "remedies": [one],
        "search": [one | {"compiled": compiled}],
    }
    file.write_text(json.dumps(content))
    return file
