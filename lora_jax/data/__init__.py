"""Rows to batches of tokens, loss weights, segments and positions.

source -> `read` -> rows -> `encode_all` -> examples -> `Loader`, `Mixture` or `eval_batches`
source -> `records` -> blocks of them -> `StreamLoader`
"""

from .answers import AnswerReader as AnswerReader
from .cache import Cached as Cached
from .cache import cached_examples as cached_examples
from .cache import code_version as code_version
from .cache import digest_files as digest_files
from .chat_templates import stop_tokens as stop_tokens
from .dates import reads_date as reads_date
from .examples import Counts as Counts
from .examples import Example as Example
from .examples import has_prompt as has_prompt
from .examples import prompt_key as prompt_key
from .keys import describe_problems as describe_problems
from .labels import encode_labelled as encode_labelled
from .labels import label_names as label_names
from .labels import parse_label_row as parse_label_row
from .loader import Loader as Loader
from .loader import Mixture as Mixture
from .loader import eval_batches as eval_batches
from .loader import order as order
from .loader import stack as stack
from .named_columns import columns as columns
from .packing import pack as pack
from .packing import to_row as to_row
from .packing import with_places as with_places
from .parse import parse_row as parse_row
from .parse import parse_rows as parse_rows
from .readers import Record as Record
from .render import PLAIN as PLAIN
from .render import Rendering as Rendering
from .render import RenderingOptions as RenderingOptions
from .render import resolve_template as resolve_template
from .render import template_text as template_text
from .rows import AnyRow as AnyRow
from .rows import BadRow as BadRow
from .rows import LabelRow as LabelRow
from .rows import Row as Row
from .rows import TextRow as TextRow
from .rows import TokenRow as TokenRow
from .sources import Rows as Rows
from .sources import is_data_file as is_data_file
from .sources import is_hub_name as is_hub_name
from .sources import parse_record as parse_record
from .sources import raise_first as raise_first
from .sources import read as read
from .sources import records as records
from .sources import source_files as source_files
from .stream import StreamLoader as StreamLoader
from .templates import encode as encode
from .templates import encode_all as encode_all
from .templates import encode_prompt as encode_prompt
from .templates import encode_rows as encode_rows
from .templates import nothing_left as nothing_left
from .templates import prompt_tokens as prompt_tokens
