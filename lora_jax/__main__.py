from lora_jax.cli import console_script

console_script()
