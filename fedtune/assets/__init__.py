"""Built-in model and corpus: a tiny pre-trained Llama and four private silos."""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "tiny_llm"
"""HuggingFace directory of the model and its tokenizer."""

CORPUS_FILE: Path = Path(__file__).parent / "silos.jsonl"
"""Rows of instruction, input, output, silo and label, one JSON object a line."""
