"""python train.py --config configs/quickstart.yaml [key.sub=value ...]"""

import sys

from lora_jax import programs
from lora_jax.cli import train_main, use_huge_pages

if __name__ == "__main__":
    use_huge_pages()
    programs.keep()
    sys.exit(train_main())
