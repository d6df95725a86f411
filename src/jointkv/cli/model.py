"""`jointkv model`: fetch a known model, describe any."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from jointkv.cli.console import named_errors, stages, write_json
from jointkv.cli.options import Json
from jointkv.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Types of `layer_types` that keep one K and one V vector per KV head and token.
KV_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
# Entries of a configuration under which layers differ, or keep something else than K and V per head.
OTHER_LAYOUTS = ("kv_lora_rank", "global_head_dim", "num_global_key_value_heads", "num_kv_shared_layers")


@dataclass(frozen=True)
class ModelInfo:
    """The KV cache of a model: `kv_bytes_per_token` bytes for each token in all `kv_layers` layers."""

    model: str
    architecture: str
    layers: int
    kv_layers: int
    attention_heads: int
    kv_heads: int
    head_size: int
    dtype: str
    kv_bytes_per_token: int
    max_tokens: int | None


def describe(name: str, config: "PreTrainedConfig") -> ModelInfo:
    """Read `ModelInfo` from a transformers configuration. Raises `UnsupportedModel` on another KV layout."""
    import torch

    text: Any = config.get_text_config(decoder=True)
    odd = [entry for entry in OTHER_LAYOUTS if getattr(text, entry, None)]
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if odd or not isinstance(heads, int) or not isinstance(kv_heads, int):
        reason = odd[0] if odd else "heads differ from layer to layer, or are unknown"
        raise UnsupportedModel(f"{name}: {text.model_type} does not keep plain K and V per head ({reason})")
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = text.num_hidden_layers
    layer_types = getattr(text, "layer_types", None) or ["full_attention"] * layers
    kv_layers = sum(layer_type in KV_LAYER_TYPES for layer_type in layer_types)
    dtype = text.dtype or config.dtype or torch.float32
    return ModelInfo(
        model=name,
        architecture=(config.architectures or [config.model_type])[0],
        layers=layers,
        kv_layers=kv_layers,
        attention_heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        dtype=str(dtype).removeprefix("torch."),
        kv_bytes_per_token=2 * kv_layers * kv_heads * head_size * dtype.itemsize,
        max_tokens=getattr(text, "max_position_embeddings", None),
    )


@named_errors()
def fetch(
    name: str = typer.Argument(help="A known model, for example smollm2."),
    output: Path | None = typer.Option(None, "--output", help="Folder to write instead of the cache folder."),
    json_file: Json = None,
) -> None:
    """Download a known model once and print the folder where it is."""
    from jointkv.hf.models import RECORD, fetch_model

    with stages(f"looking for {name}") as show:
        folder = fetch_model(name, output, progress=show)
    write_json(json_file, {"folder": folder, **json.loads((folder / RECORD).read_text(encoding="utf-8"))})
    if json_file != "-":
        typer.echo(folder)


@named_errors()
def info(
    name_or_path: str = typer.Argument(help="A known model, a model folder or a hub name."),
    json_file: Json = None,
) -> None:
    """Print a model's architecture and what its KV cache costs per token."""
    from jointkv.hf.models import load_config

    model_info = describe(name_or_path, load_config(name_or_path))
    write_json(json_file, model_info)
    if json_file != "-":
        typer.echo(_as_text(model_info))


def register(app: typer.Typer) -> None:
    """Add the verb `model` to `app`."""
    group = typer.Typer(no_args_is_help=True, help="Fetch and describe models.")
    group.command()(fetch)
    group.command()(info)
    app.add_typer(group, name="model")


def _as_text(model_info: ModelInfo) -> str:
    rows = {
        "architecture": model_info.architecture,
        "layers": f"{model_info.layers} ({model_info.kv_layers} with a KV cache)",
        "KV heads": f"{model_info.kv_heads} (of {model_info.attention_heads} attention heads)",
        "head size": model_info.head_size,
        "KV per token": f"{model_info.kv_bytes_per_token} bytes in {model_info.dtype}",
        "longest context": "unknown" if model_info.max_tokens is None else f"{model_info.max_tokens} tokens",
    }
    return "\n".join(f"{label:<16}{value}" for label, value in rows.items())
