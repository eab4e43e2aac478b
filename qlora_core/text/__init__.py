"""Text to token ids and loss masks: templates, dataset formats, and the check of a whole file. No torch.

The service validates uploads with exactly this code, and the trainer reads its examples with it:
what validates is what trains.
"""

from __future__ import annotations

from qlora_core.text.check import check_dataset, scan_dataset
from qlora_core.text.encoder import EncodedExample, TextEncoder
from qlora_core.text.formats import (
    ChatExample,
    CompletionExample,
    ExampleError,
    TextExample,
    parse_example,
)
from qlora_core.text.report import DatasetProblem, DatasetReport, LineError
from qlora_core.text.template import ChatTemplate, TemplateError

__all__ = [
    "ChatExample",
    "ChatTemplate",
    "CompletionExample",
    "DatasetProblem",
    "DatasetReport",
    "EncodedExample",
    "ExampleError",
    "LineError",
    "TemplateError",
    "TextEncoder",
    "TextExample",
    "check_dataset",
    "parse_example",
    "scan_dataset",
]
