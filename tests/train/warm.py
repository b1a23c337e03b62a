"""`train.py` with JAX's counts of compiled programs printed as JSON at the end."""

import collections
import json
import sys

from lora_jax import programs
from lora_jax.cli import train_main

programs.keep()

import jax  # noqa: E402 - after `keep`, as in a run

counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.split("/")[-1]]))
status = train_main()
names = ("compile_requests_use_cache", "cache_hits", "cache_misses")
print("\n" + json.dumps({name: counts[name] for name in names}))
sys.exit(status)
