"""Which model something belongs to: a profile, or whatever else must not be used with another one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from jointkv.errors import ModelMismatch


class ModelIdentity(BaseModel):
    """A model by its shape and by hashes of its weights.

    Attributes:
        name: as the user gave it; never compared.
        layers: layers with full attention.
        kv_heads, head_size: of one layer's K.
        checkpoint: hash of the files it was loaded from, see `checkpoint_fingerprint`; None if it came from no file.
        weights: hash of the weights as loaded by transformers, see `jointkv.hf.identity.model_fingerprint`; None if it
            was not loaded by transformers. Weights of one checkpoint differ between dtypes.
        dtype: of the weights as loaded, such as `"float32"`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    layers: int
    kv_heads: int
    head_size: int
    checkpoint: str | None = None
    weights: str | None = None
    dtype: str | None = None

    def check(self, other: ModelIdentity, what: str) -> None:
        """Raises ModelMismatch unless `other` is this model; `what` belongs to this one.

        Equal shapes are not enough: one of the two hashes must be known of both, and agree. Where both have weights of
        one dtype, those must agree, because a checkpoint says nothing of what was changed in memory.
        """
        for field in ("layers", "kv_heads", "head_size"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise ModelMismatch(f"{what} belongs to {self.name} with {field}={mine}; {other.name} has {theirs}")
        loaded, files = (self.weights, other.weights), (self.checkpoint, other.checkpoint)
        known = [pair for pair in (loaded, files) if None not in pair]
        if None not in loaded and self.dtype == other.dtype:
            known = [loaded]
        if any(mine == theirs for mine, theirs in known):
            return
        if not known:
            raise ModelMismatch(f"{what} belongs to {self.name}; whether {other.name} has the same weights is unknown")
        raise ModelMismatch(f"{what} belongs to {self.name}; {other.name} has the same shape but other weights")


def checkpoint_fingerprint(folder: Path | str) -> str | None:
    """A hash of every tensor's name, shape, type and first row in the model's safetensors files in `folder`.

    Files may be split in any way; others, such as adapters, do not count. None if there are none, or one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, bytes] = {}
    try:
        for path in sorted(Path(folder).glob("model*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    shape = part.get_shape()
                    row = (part[:1] if shape else file.get_tensor(name)).flatten()
                    head = row.float().numpy().tobytes()
                    tensors[name] = f"{name}{shape}{part.get_dtype()}".encode() + head
    except (OSError, SafetensorError, RuntimeError, TypeError):  # damaged, or of a type that torch does not convert
        return None
    if not tensors:
        return None
    return hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest()[:32]


def checkpoint_folder(location: str, revision: str | None = None) -> Path | None:
    """The folder with the files of a model: `location` itself, or what the hub's cache has of it. Never downloads."""
    if Path(location).is_dir():
        return Path(location)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(location, revision=revision, local_files_only=True))
    except (ImportError, OSError, ValueError):  # the hub's own errors derive from these
        return None
