"""Generation of text: greedy or sampled, in continuous batches, with a key-value cache.

engine  = Engine(model, rows=8, max_length=1024)
answers = engine.answer([Request(prompt, max_new_tokens=64, stop_tokens={2})])    # token ids

Each token equals that of a forward pass without a cache. If rotary frequencies depend on the length
of the text, its cache is recomputed when they change: for longrope once, at the original length;
for dynamic at each token beyond it, which costs a forward pass over the whole text per token.
"""

from lora_jax.generate.engine import Engine as Engine
from lora_jax.generate.form import for_decoding as for_decoding
from lora_jax.generate.gap import Gap as Gap
from lora_jax.generate.gap import make_log_prob_gap as make_log_prob_gap
from lora_jax.generate.requests import Completion as Completion
from lora_jax.generate.requests import Event as Event
from lora_jax.generate.requests import Request as Request
from lora_jax.generate.requests import beyond_positions as beyond_positions
from lora_jax.generate.requests import check_prompts as check_prompts
from lora_jax.generate.requests import check_room as check_room
from lora_jax.generate.sampling import Sampling as Sampling
