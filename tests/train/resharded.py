"""Runs of twelve steps on all devices of this process: whole, interrupted after seven, resumed.

python resharded.py CONFIG [whole|interrupted|resumed OUTPUT]...
"""

import os
import signal
import sys
import time

import jax

from lora_jax.cli import train_main
from lora_jax.train import trainer

OPTIONS = [
    *("train.steps=12", "train.batch_size=8", "train.micro_batch_size=null", "data.eval=null"),
    "eval.batch_size=8",
]
MESH = {8: ("2", "2", "2"), 4: ("1", "2", "2"), 1: ("1", "1", "1")}


def main(config: str, *jobs: str) -> None:
    axes = zip(("data", "fsdp", "tensor"), MESH[len(jax.devices())], strict=True)
    mesh = [f"mesh.{axis}={size}" for axis, size in axes]
    take_step = trainer._Trainer.take_step

    def end_after_seven(self):
        line = take_step(self)
        if self.state.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return line

    for kind, output in zip(jobs[::2], jobs[1::2], strict=True):
        trainer._Trainer.take_step = end_after_seven if kind == "interrupted" else take_step
        resume = ["resume=true"] if kind == "resumed" else []
        overrides = [f"output_dir={output}", *OPTIONS, *mesh, *resume]
        assert train_main(["--config", config, *overrides]) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
