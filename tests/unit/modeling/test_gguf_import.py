"""A GGUF file becomes a plain checkpoint, as transformers converts it."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from gguf_files import write_gguf
from tiny import HIDDEN, VOCABULARY, make_tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from emloc_ray.io.formats.checkpoint import INDEX_NAME, Checkpoint
from emloc_ray.modeling import gguf_import as module
from emloc_ray.modeling.gguf_import import import_gguf
from emloc_ray.modeling.loading import ModelSource, load_model, read_model_config, resolve_source

IDS = torch.randint(2, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_gguf_file_becomes_a_plain_checkpoint(tmp_path: Path, dtype: str) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    source = resolve_source(str(tmp_path / "tiny.gguf"))
    assert source == ModelSource(tmp_path, "tiny.gguf")
    assert read_model_config(source).hidden_size == HIDDEN
    import_gguf(source, tmp_path / "model", dtype, max_shard_bytes=100_000)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert not [key for key in config if "quant" in key]
    assert config["dtype"] == ("float32" if dtype == "auto" else dtype)
    assert (tmp_path / "model" / INDEX_NAME).is_file()
    loaded = load_model(resolve_source(str(tmp_path / "model")).directory, device="cpu")
    expected = model if dtype == "auto" else model.to(torch.bfloat16)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
    if dtype == "auto":
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("hello wörld")["input_ids"] == make_tokenizer()("hello wörld")["input_ids"]
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert tokenizer.eos_token_id == 1


def test_a_gguf_file_is_converted_as_transformers_does_and_whole_where_its_tables_do_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same shards and configs, one tensor at a time or all together."""
    write_gguf(tmp_path / "tiny.gguf")
    source = resolve_source(str(tmp_path / "tiny.gguf"))
    opened = Mock(wraps=LlamaForCausalLM.from_pretrained)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", opened)
    import_gguf(source, tmp_path / "streamed", "bfloat16", max_shard_bytes=100_000)
    opened.assert_not_called()
    monkeypatch.setattr(module, "converted_names", Mock(side_effect=module.NeedsWhole))
    import_gguf(source, tmp_path / "whole", "bfloat16", max_shard_bytes=100_000)
    opened.assert_called_once()
    streamed, whole = Checkpoint(tmp_path / "streamed"), Checkpoint(tmp_path / "whole")
    assert streamed.entries.keys() == whole.entries.keys()
    assert all(torch.equal(streamed.read(name), whole.read(name)) for name in whole.entries)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "streamed" / name).read_text() == (tmp_path / "whole" / name).read_text()
