"""A run that was interrupted and resumed is the run that was not, to the bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from lora_jax.cli import main, train_main
from lora_jax.errors import UserError
from lora_jax.report.journal import read_lines
from lora_jax.train import base, checkpoint, loop, trainer
from lora_jax.train.evaluate import Evaluator

from .tiny import SUMS, write_model, write_rows

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "adapter": {"rank": 4, "dropout": 0.2},
    "train": {
        "steps": 20,  # several epochs
        "batch_size": 4,
        "micro_batch_size": 2,
        "remat": "none",
        "learning_rate": 5e-3,
        "schedule": "cosine",
        "warmup_steps": 3,
        "eval_every": 6,
        "save_every": 5,
    },
    "eval": {"batch_size": 4, "max_new_tokens": 4, "samples": 1},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file whose run has packing, shuffling, dropout, accumulation and evaluations."""
    directory = tmp_path_factory.mktemp("resume")
    model = write_model(directory / "model")
    rows = str(write_rows(directory / "rows.jsonl", SUMS))
    data = {"train": rows, "eval": rows, "max_length": 96}
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump({"model": str(model), "data": data, **SETTINGS}))
    return file


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run that nothing interrupted."""
    return train(config, tmp_path_factory.mktemp("whole") / "out")


def command(config, output, *overrides):
    return ["--config", str(config), f"output_dir={output}", *overrides]


def train(config, output, *overrides):
    assert train_main(command(config, output, *overrides)) == 0
    return output


def trace(output):
    """Return what must be equal to the bit: logs without speed, leaves of the last checkpoint."""
    speed = ("tokens_per_second",)
    lines = [
        {name: value for name, value in line.items() if name not in speed}
        for line in read_lines(output / "metrics.jsonl")
    ]
    files = ("norms.jsonl", "samples.jsonl", "predictions.jsonl")
    files += ("adapter/adapter_model.safetensors",)
    texts = {name: (output / name).read_bytes() for name in files if (output / name).exists()}
    record = checkpoint.read_record(output / "checkpoints")
    return lines, texts, record["leaves"], record["data"], record["watch"]


@pytest.fixture
def interrupted(monkeypatch):
    """`interrupted(config, output, step, *overrides)`: a run that a signal ends after `step`."""

    def run(config, output, step, *overrides, number=signal.SIGTERM):
        take_step = trainer._Trainer.take_step

        def then_signal(self):
            line = take_step(self)
            if self.state.step == step:
                os.kill(os.getpid(), number)
                time.sleep(0.05)  # the handler runs between two lines of Python
            return line

        with monkeypatch.context() as patch:
            patch.setattr(trainer._Trainer, "take_step", then_signal)
            status = train_main(command(config, output, *overrides))
        assert status == (0 if number == signal.SIGTERM else 130)
        assert not (output / "summary.json").exists()
        return output

    return run


CASES = {
    "packed": (),
    "unpacked": ("data.packing=false", "data.shuffle=false"),
    "stream": ("data.streaming=true", "data.stream_rows=7"),
    "prompt of a text": (
        *("adapter.method=prompt", "adapter.dropout=0", "adapter.prompt_init=text"),
        *("adapter.prompt_text=sum", "data.max_length=99"),
    ),
    "prefix, stream": (
        *("adapter.method=prefix", "adapter.dropout=0", "adapter.num_virtual_tokens=3"),
        *("data.streaming=true", "data.stream_rows=7"),
    ),
    "vera over NF4": ("adapter.method=vera", "adapter.rank=12", "base_dtype=nf4"),
    "the best answers": (
        *("eval.generate_every=6", "train.load_best_model_at_end=true"),
        "train.metric_for_best_model=exact_match",
    ),
    "mixture": None,  # two sources; the paths are known in the test only
}


@pytest.mark.long_table(2)
@pytest.mark.parametrize("case", CASES)
def test_seven_steps_and_thirteen_more_are_twenty(config, tmp_path, interrupted, case):
    options = CASES[case]
    if options is None:
        other = write_rows(tmp_path / "other.jsonl", SUMS[:9])
        options = (f"data.train={{{config.parent / 'rows.jsonl'}: 0.7, {other}: 0.3}}",)
    whole = trace(train(config, tmp_path / "whole", *options))
    assert [line["step"] for line in whole[0]] == list(range(1, 21))
    parts = interrupted(config, tmp_path / "parts", 7, *options)
    assert checkpoint.list_steps(parts / "checkpoints") == [6, 7]
    train(config, parts, *options, "resume=true")
    assert trace(parts) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_evaluation_that_a_signal_prevents_is_made_up_for(
    config, tmp_path, interrupted, whole, number
):
    parts = interrupted(config, tmp_path / "parts", 12, number=number)
    assert checkpoint.list_steps(parts / "checkpoints")[-1] == 12
    assert read_lines(parts / "metrics.jsonl")[-1]["step"] == 11
    train(config, parts, "resume=true")
    assert trace(parts) == trace(whole)


def test_a_line_is_the_mean_over_its_steps_however_often_the_run_is_resumed(
    config, tmp_path, interrupted, whole
):
    options = ("train.log_every=4", "train.save_total_limit=null")
    logged = trace(train(config, tmp_path / "logged", *options))
    steps = {line["step"]: line for line in read_lines(whole / "metrics.jsonl")}
    first = 1
    for line in logged[0]:
        own = [steps[step] for step in range(first, line["step"] + 1)]
        tokens = [step["supervised_tokens"] for step in own]
        loss = np.average([step["loss"] for step in own], weights=tokens)
        assert line["loss"] == pytest.approx(loss, rel=1e-12)
        assert line["grad_norm"] == pytest.approx(np.mean([step["grad_norm"] for step in own]))
        assert line["supervised_tokens"] == sum(tokens)
        assert line["learning_rate"] == own[-1]["learning_rate"]
        first = line["step"] + 1
    assert [line["step"] for line in logged[0]] == [4, 6, 8, 12, 16, 18, 20]
    parts = interrupted(config, tmp_path / "parts", 7, *options)
    # As after a kill: the last checkpoint is in the middle of a line that was written later.
    for step in (6, 7):
        shutil.rmtree(parts / "checkpoints" / str(step))
    interrupted(config, parts, 11, *options, "resume=true")
    train(config, parts, *options, "resume=true")
    assert trace(parts) == logged


def test_a_signal_ends_an_evaluation_at_once(config, tmp_path, monkeypatch, whole):
    losses, calls = Evaluator.losses, 0

    def signal_inside(self, adapters, *check):
        nonlocal calls
        calls += 1
        if calls == 3:  # before training, at step 6, at step 12
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            raise AssertionError("the evaluation went on")
        return losses(self, adapters)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "losses", signal_inside)
        assert train_main(command(config, parts, "eval.cache=false")) == 0
    assert read_lines(parts / "metrics.jsonl")[-1]["step"] == 11
    train(config, parts, "resume=true")
    assert trace(parts) == trace(whole)


@pytest.mark.parametrize("inside", ["losses", "generate"])
def test_ctrl_c_while_the_base_is_measured_leaves_a_directory_to_start_in(
    config, tmp_path, monkeypatch, inside
):
    """The same command runs again, without `resume`."""
    from lora_jax.train import evaluate

    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("the evaluation went on")

    run = command(config, tmp_path / "out", "train.steps=1", "eval.cache=false")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "mean_loss" if inside == "losses" else "generate_all", stop)
        assert train_main(run) == 130
    assert not list((tmp_path / "out").iterdir())
    assert train_main(run) == 0


def test_seconds_count_all_sessions(config, tmp_path, interrupted):
    output = interrupted(config, tmp_path / "out", 2, "data.eval=null", "train.steps=3")
    place = output / "checkpoints"
    earlier = checkpoint.read_record(place)["seconds"]
    train(config, output, "data.eval=null", "train.steps=3", "resume=true")
    summary = json.loads((output / "summary.json").read_text())
    assert 0 < earlier < checkpoint.read_record(place)["seconds"] < summary["seconds"]
    assert summary["seconds"] == pytest.approx(earlier + summary["session_seconds"])


def test_a_signal_before_the_first_step_leaves_a_directory_to_start_in(
    config, tmp_path, monkeypatch
):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)

    with monkeypatch.context() as patch:
        patch.setattr(base.formats, "read_params", stop)
        assert train_main(command(config, tmp_path / "out")) == 0
    assert not list((tmp_path / "out").iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_resume_needs_a_checkpoint_and_auto_does_not(config, tmp_path, capsys):
    output = tmp_path / "out"
    capsys.readouterr()
    assert train_main(command(config, output, "resume=true")) == 2
    assert "has no checkpoint to go on from; resume=auto starts anew" in capsys.readouterr().err
    train(config, output, "resume=auto", "train.steps=2")
    first = trace(output)
    # A finished run is left alone, whatever is asked for.
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}
    capsys.readouterr()
    train(config, output, "resume=auto", "train.steps=2")
    assert "is finished: 2 steps; nothing is left to do" in capsys.readouterr().err
    assert before == {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}
    assert trace(output) == first
    # Without resume it is refused, and the message says what there is.
    assert train_main(command(config, output)) == 2
    assert "resume=true goes on from its last checkpoint" in capsys.readouterr().err


def test_auto_starts_a_run_anew_that_was_killed_before_its_first_checkpoint(
    config, tmp_path, monkeypatch
):
    def die(**_):
        raise UserError("killed")

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", die)
        assert train_main(command(config, output, "train.steps=2")) == 2
    files = {"config.yaml", "predictions.jsonl", "run.json"}
    assert {path.name for path in output.iterdir()} == files
    (output / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    (output / ".config.yaml").write_text("model:")  # the kill came while it was written
    (output / "mine.txt").write_text("mine")
    train(config, output, "resume=auto", "train.steps=2")
    assert [line["step"] for line in read_lines(output / "metrics.jsonl")] == [1, 2]
    assert (output / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "names",
    [
        *(("thesis.tex",), ("config.yaml", "train.jsonl"), ("adapter",)),
        ("config.yaml", "metrics.jsonl", "checkpoints/notes.txt"),
    ],
)
def test_auto_never_takes_a_directory_of_other_files(config, tmp_path, capsys, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    assert train_main(command(config, tmp_path, "resume=auto")) == 2
    found = capsys.readouterr().err
    assert "already has a run or other files" in found or "has other files" in found
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_fewer_steps_than_are_done_are_refused(config, two_steps, tmp_path, capsys):
    output = copy_of(two_steps, tmp_path)
    options = ("train.steps=1", "resume=true", "allow_change=[train.steps]")
    capsys.readouterr()
    assert train_main(command(config, output, *options)) == 2
    assert "the checkpoint is that of step 2: nothing can be taken back" in capsys.readouterr().err


def test_a_damaged_summary_is_made_again(config, two_steps, tmp_path):
    output = copy_of(two_steps, tmp_path)
    whole = json.loads((output / "summary.json").read_text())
    (output / "summary.json").write_text('{"steps": 2')
    train(config, output, "train.steps=2", "resume=true")
    again = json.loads((output / "summary.json").read_text())
    assert (again["task"], again["steps"]) == (whole["task"], 2)


def test_a_step_without_an_evaluation_can_be_the_last_one(config, tmp_path, interrupted):
    output = interrupted(config, tmp_path / "out", 5)
    train(config, output, "resume=true", "train.steps=5", "allow_change=[train.steps]")
    assert json.loads((output / "summary.json").read_text())["task"]["loss_after"] > 0


def test_a_signal_during_the_last_save_still_ends_the_run(config, tmp_path, monkeypatch):
    output, save = tmp_path / "out", trainer._Trainer._save

    def then_signal(self, pending):
        save(self, pending)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)

    options = ("train.steps=1", "data.eval=null")
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Trainer, "_save", then_signal)
        assert train_main(command(config, output, *options)) == 0
    assert not (output / "adapter").exists()
    train(config, output, *options, "resume=true")
    assert (output / "adapter").is_dir()


def test_the_same_data_elsewhere_are_the_same_data(config, two_steps, tmp_path):
    output = copy_of(two_steps, tmp_path)
    moved = shutil.copy(config.parent / "rows.jsonl", tmp_path / "moved.jsonl")
    changes = (f"data.train={moved}", "train.steps=3", "allow_change=[train.steps]")
    train(config, output, "resume=true", *changes)


@pytest.fixture(scope="module")
def two_steps(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("two") / "out", "train.steps=2")


def copy_of(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


CHANGES = {
    "adapter.rank=8": "adapter.rank=8, and the checkpoint was made with 4",
    "train.learning_rate=1e-3": "train.learning_rate=0.001, and the checkpoint was made with 0.005",
    "train.schedule=constant": "train.schedule='constant', and",
    "train.steps=4": "train.steps=4, and the checkpoint was made with 2",
    "seed=1": "seed=1, and",
    "data.max_length=64": "data.max_length=64, and",
    "data.system_prompt=Hi": "data.system_prompt='Hi', and",
    "data.chat_template_kwargs={x: 1}": "data.chat_template_kwargs={'x': 1}, and",
    "data.ignore_columns=[x]": "data.ignore_columns=['x'], and",
    "adapter.target_modules=[q_proj]": "adapter.target_modules=['q_proj'], and",
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_settings_are_refused_by_name(config, two_steps, tmp_path, capsys, change):
    output = copy_of(two_steps, tmp_path)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert train_main(command(config, output, "train.steps=2", "resume=true", change)) == 2
    message = capsys.readouterr().err
    key = change.partition("=")[0]
    assert CHANGES[change] in message and f"list '{key}' in allow_change" in message
    assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}


def test_what_is_allowed_to_change_goes_on(config, two_steps, tmp_path, capsys):
    output = copy_of(two_steps, tmp_path)
    options = ("train.steps=4", "resume=true", "mesh.data=1", "train.log_every=2")
    train(config, output, *options, "allow_change=[train.steps]")
    assert [line["step"] for line in read_lines(output / "metrics.jsonl")] == [1, 2, 4]
    assert json.loads((output / "summary.json").read_text())["steps"] == 4
    # Another rank cannot be allowed: the checkpoint holds other shapes.
    output = copy_of(two_steps, tmp_path / "again")
    options = ("train.steps=4", "resume=true", "adapter.rank=8", "allow_change=[adapter,train]")
    capsys.readouterr()
    assert train_main(command(config, output, *options)) == 2
    assert "lora_a: ([2, 32, 4], 'float32') in the checkpoint" in capsys.readouterr().err


@pytest.fixture
def altered(config, tmp_path):
    """`altered(what)`: a model directory, or rows, that differ in one respect."""
    source = yaml.safe_load(config.read_text())["model"]

    def make(what):
        if what == "data":
            return f"data.train={write_rows(tmp_path / 'new.jsonl', [*SUMS[:-1], SUMS[0]])}"
        if what == "template":
            file = tmp_path / "template.jinja"
            file.write_text("{{ '!' }}" + (Path(source) / "chat_template.jinja").read_text())
            return f"data.chat_template={file}"
        if what == "base":
            return f"model={write_model(tmp_path / 'other', seed=1)}"
        directory = Path(shutil.copytree(source, tmp_path / "other"))
        file = directory / "tokenizer.json"
        content = json.loads(file.read_text())
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        file.write_text(json.dumps(content))
        return f"model={directory}"

    return make


@pytest.mark.parametrize("what", ["base", "tokenizer", "template", "data"])
def test_another_base_tokenizer_template_or_data_is_refused_by_name(
    config, two_steps, tmp_path, capsys, altered, what
):
    output = copy_of(two_steps, tmp_path)
    options = ["train.steps=3", "allow_change=[train.steps]", "resume=true", altered(what)]
    capsys.readouterr()
    assert train_main(command(config, output, *options)) == 2
    message = capsys.readouterr().err
    assert f"error: {what}: " in message and f"or list '{what}' in allow_change" in message
    # Other tokens are other data too.
    changed = [what, *(["data", "held_out"] if what in ("tokenizer", "template") else [])]
    options[1] = f"allow_change=[train.steps,{','.join(changed)}]"
    train(config, output, *options)
    assert json.loads((output / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize("what", ["base", "tokenizer", "template"])
def test_export_training_on_and_generation_refuse_the_same(
    config, two_steps, tmp_path, capsys, altered, what
):
    run = copy_of(two_steps, tmp_path)
    change = altered(what)
    key, _, value = change.partition("=")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    if key == "model":
        settings["model"] = value
    else:
        settings["data"]["chat_template"] = value
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    refused = f"error: {what}: the "

    def check(arguments, call=main):
        capsys.readouterr()
        assert call(arguments) == 2
        assert refused in capsys.readouterr().err

    for kind in ("peft", "hf"):
        target = tmp_path / f"export-{kind}"
        export = ["export", "--run", str(run), "--format", kind, "--output", str(target)]
        check(export)
        assert not target.exists()
        assert main([*export, "--allow-change", what]) == 0

    adapter = run / "adapter"
    start = [f"adapter.path={adapter}", "adapter.dropout=0.2", change, "train.steps=1"]
    check(command(config, tmp_path / "on", *start), train_main)
    train(config, tmp_path / "on", *start, f"allow_change=[{what}]")

    model = ["--model", value if key == "model" else settings["model"]]
    if what == "tokenizer":  # the adapter's own tokenizer is used: that is the one to alter
        shutil.copyfile(Path(value) / "tokenizer.json", adapter / "tokenizer.json")
    template = ["--chat-template", value] if what == "template" else []
    generate = ["generate", *model, "--adapter", str(adapter), *template, "--prompt", "what is 1"]
    check([*generate, "--max-new-tokens", "2"])
    assert main([*generate, "--max-new-tokens", "2", "--allow-change", what]) == 0


# Real kills


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(arguments)`: the process id of a run; `launch.status()`: how it ended."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        # Of its own: a process that is killed can leave half an entry.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("launcher.py"))],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdin and server.stdout

        def start(arguments):
            server.stdin.write(json.dumps(arguments) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        start.status = lambda: int(server.stdout.readline())
        yield start
        server.stdin.close()


def last_step(log):
    return max((line["step"] for line in read_lines(log)), default=0)


def changed(log):
    """Time of the last change of a log; 0 where there is none, as while a run starts anew."""
    with contextlib.suppress(FileNotFoundError):
        return log.stat().st_ctime_ns
    return 0


KILLED = (
    *("train.steps=400", "train.save_every=3", "train.eval_every=40", "eval.samples=0"),
    *("eval.generate=false", "resume=auto"),
)


@pytest.fixture(scope="module")
def unkilled(config, launch, tmp_path_factory):
    """The run that no test kills."""
    output = tmp_path_factory.mktemp("unkilled") / "out"
    launch(command(config, output, *KILLED))
    assert launch.status() == 0
    return output


@pytest.mark.parametrize("kills", [5, pytest.param(15, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(config, tmp_path, launch, unkilled, kills):
    """kill -9 while it starts, trains, evaluates and saves; then the run is let finish."""
    killed = tmp_path / "killed"
    rng, log = random.Random(0), killed / "metrics.jsonl"
    reached, lost = [], []
    for kill in range(kills):
        kept = checkpoint.list_steps(killed / "checkpoints")
        before = changed(log)
        pid = launch(command(config, killed, *KILLED))
        deadline = time.monotonic() + (rng.uniform(0, 3) if kill % 5 == 4 else 120)
        while time.monotonic() < deadline:
            # The log is cut back to the checkpoint first, and then grows beyond it.
            if changed(log) not in (0, before):
                if last_step(log) > (kept[-1] if kept else 0):
                    time.sleep(rng.expovariate(1 / 0.15))
                    break
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        assert launch.status() in (-signal.SIGKILL, 0)
        reached.append(last_step(log) if log.exists() else 0)
        kept = checkpoint.list_steps(killed / "checkpoints")
        lost.append(reached[-1] - (kept[-1] if kept else 0))
    launch(command(config, killed, *KILLED))
    assert launch.status() == 0
    assert max(lost) <= 6, f"more than the save under way and the one before were lost: {lost}"
    assert len(set(reached)) > min(3, kills // 2), f"the kills all fell together: {reached}"
    for output in (unkilled, killed):
        (output / "samples.jsonl").touch()  # none are asked for
    assert trace(killed) == trace(unkilled)


@pytest.mark.slow
def test_a_run_on_eight_devices_goes_on_on_one_and_four(config, tmp_path):
    """Bit-exact on eight again, and to 1e-5 elsewhere."""
    script = Path(__file__).with_name("resharded.py")

    def run(devices, *arguments):
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
            f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
        }
        result = subprocess.run(
            [sys.executable, str(script), str(config), *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr[-3000:]

    run(8, "whole", tmp_path / "whole", "interrupted", tmp_path / "parts")
    losses = {}
    for devices in (8, 4, 1):
        output = Path(shutil.copytree(tmp_path / "parts", tmp_path / f"on{devices}"))
        run(devices, "resumed", output)
        losses[devices] = [line["loss"] for line in read_lines(output / "metrics.jsonl")]
    whole = [line["loss"] for line in read_lines(tmp_path / "whole" / "metrics.jsonl")]
    assert len(whole) == 12
    assert losses[8] == whole
    for devices in (4, 1):
        assert losses[devices][:7] == whole[:7]
        assert np.abs(np.subtract(losses[devices], whole)).max() <= 1e-5
        assert losses[devices] != whole, "on other devices sums are taken in another order"
