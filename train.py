"""python train.py --config configs/quickstart.yaml [key.sub=value ...]"""

import sys

from lora_jax.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
