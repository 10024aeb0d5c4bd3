"""A small language model in a model folder, of a stage's own making."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stoker import config
from stoker.data.text.tokenizers import open_tokenizer
from stoker.training.core import pretrained
from stoker.training.train_lm import Config, LanguageModel


def write(folder: Path, texts: Sequence[str], *, steps: int = 60, **options: Any) -> Path:
    """Trained for some steps on texts, each a document of its own; by default over bytes."""
    values: dict[str, Any] = dict(tokenizer="bytes", d_model=32, num_heads=2, num_layers=1, d_ff=64, max_seq_len=64,
                                  dropout=0.0) | options
    folder.mkdir(parents=True)
    stage = LanguageModel(replace(Config(), **values), folder)
    stage.tokenizer = open_tokenizer(values["tokenizer"], stage.cfg.vocab_size, list(texts))
    torch.manual_seed(0)
    model, end = stage.model(), stage.tokenizer.end_of_text
    rows = [torch.tensor([end, *ids.tolist(), end]) for ids in stage.tokenizer.encode_batch(texts)]
    whole = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(whole[:, :-1], whole[:, 1:]) / whole.numel()).backward()
        optimizer.step()
    stage.export(model, folder)
    pretrained.note(folder, stage.name, steps, config.to_json(stage.cfg), {})
    return folder
