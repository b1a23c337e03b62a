"""Runs of `lora-jax train` as processes of their own, without the seconds of imports of each.

Reads a JSON list of arguments per line, and answers with the process id of a fork that runs it and,
when that has ended, with its status. Its messages are appended to the file that LAUNCHER_LOG names.
"""

import json
import os
import sys

import orbax.checkpoint  # noqa: F401 - what a run imports, before the fork
from transformers import AutoTokenizer, LlamaConfig  # noqa: F401

from lora_jax.cli import train_main
from lora_jax.train import loop  # noqa: F401


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            silence = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(silence, stream)
            if log := os.environ.get("LAUNCHER_LOG"):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os._exit(train_main(json.loads(line)))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
