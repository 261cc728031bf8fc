"""Rows: where they come from, who owns them, and what the trainers take."""

from fedtune.data.client_table import client_table, format_table
from fedtune.data.columns import find_label_column
from fedtune.data.detect import RowFormat, row_format
from fedtune.data.formats import (
    as_classification_rows,
    as_label_prompt_rows,
    as_language_rows,
    instruction_prompt,
    label_prompt,
)
from fedtune.data.inputs import sft_inputs, text_inputs
from fedtune.data.labels import check_held_out_labels, find_label_names
from fedtune.data.lengths import (
    check_lengths,
    check_row_lengths,
    context_length,
    length_limit,
    readable_length,
    token_lengths,
    virtual_tokens,
)
from fedtune.data.load import hold_out, load_rows, load_split
from fedtune.data.partition import partition
from fedtune.data.silos import Silos, make_silos

__all__ = [
    "RowFormat",
    "Silos",
    "as_classification_rows",
    "as_label_prompt_rows",
    "as_language_rows",
    "check_held_out_labels",
    "check_lengths",
    "check_row_lengths",
    "client_table",
    "context_length",
    "find_label_column",
    "find_label_names",
    "format_table",
    "hold_out",
    "instruction_prompt",
    "label_prompt",
    "length_limit",
    "load_rows",
    "load_split",
    "make_silos",
    "partition",
    "readable_length",
    "row_format",
    "sft_inputs",
    "text_inputs",
    "token_lengths",
    "virtual_tokens",
]
