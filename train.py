"""python train.py --config configs/quickstart.yaml [key.sub=value ...]"""

import sys

from lora_jax.cli import own_process, train_main

if __name__ == "__main__":
    own_process()
    sys.exit(train_main())
