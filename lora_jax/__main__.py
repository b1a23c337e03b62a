from lora_jax.start import console_script

console_script()
