"""Running commands in this process, on a tiny model."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from jointkv.cli import main
from jointkv.evaluate.traffic.gsm8k import load_problems

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}"
)


def save_tiny(
    folder: Path, *, template: str | None = TEMPLATE, end_token: int = 1, tokens: int = 2048, head_size: int = 8
) -> str:
    """A random Llama of 4 layers and a byte-level tokenizer trained on the packaged sample, in `folder`."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([problem.question for problem in load_problems()[:50]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_size,
        max_position_embeddings=tokens,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=end_token,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `jointkv ARGUMENTS`; an error that is no refusal is raised."""
    result = CliRunner().invoke(main.app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def run_json(*arguments: object) -> dict[str, Any]:
    """What a command that ends well writes as JSON."""
    code, out, err = run(*arguments, "--json", "-")
    assert code == 0, err
    return json.loads(out)


def refusal(*arguments: object) -> str:
    """The one line in which a command refuses bad input."""
    code, out, err = run(*arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (2, "") and errors == err.splitlines()[-1:], err
    return errors[0]
