"""python train.py --config configs/quickstart.yaml [key.sub=value ...]"""

from lora_jax.start import run

if __name__ == "__main__":
    run("train_main")
