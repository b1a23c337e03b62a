"""Rows of conversations to batches of tokens, loss weights, segments and positions.

files -> `read_rows` -> rows -> `encode_all` -> examples -> `Loader` or `eval_batches` -> batches
"""

from .loader import Loader as Loader
from .loader import eval_batches as eval_batches
from .loader import order as order
from .packing import pack as pack
from .packing import to_row as to_row
from .rows import AnyRow as AnyRow
from .rows import Row as Row
from .rows import TextRow as TextRow
from .rows import TokenRow as TokenRow
from .sources import read_hub_rows as read_hub_rows
from .sources import read_rows as read_rows
from .templates import Counts as Counts
from .templates import Example as Example
from .templates import encode as encode
from .templates import encode_all as encode_all
from .templates import prompt_tokens as prompt_tokens
from .templates import reference as reference
from .templates import resolve_template as resolve_template
from .templates import stop_tokens as stop_tokens
