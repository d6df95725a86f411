"""The only place where jointkv reads environment variables."""

import shlex
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from jointkv.errors import BadInput


class Settings(BaseSettings):
    """What the environment says, frozen.

    Read are `JOINTKV_CACHE_DIR`, `JOINTKV_DATA_DIR`, `XDG_CACHE_HOME`, `HF_HUB_OFFLINE` and `CC`.
    """

    model_config = SettingsConfigDict(env_prefix="JOINTKV_", env_ignore_empty=True, frozen=True, populate_by_name=True)

    cache_dir: Path | None = None
    data_dir: Path | None = None
    xdg_cache_home: Path | None = Field(default=None, validation_alias="XDG_CACHE_HOME")
    hf_hub_offline: bool = Field(default=False, validation_alias="HF_HUB_OFFLINE")
    cc: str = Field(default="cc", validation_alias="CC")

    @field_validator("cache_dir", "data_dir")
    @classmethod
    def _home_exists(cls, folder: Path | None) -> Path | None:
        try:
            return None if folder is None else folder.expanduser()
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    @field_validator("cc")
    @classmethod
    def _can_be_split(cls, command: str) -> str:
        shlex.split(command)  # raises ValueError
        return command

    @classmethod
    def from_environment(cls) -> Self:
        """Read the environment now. Raises `BadInput` when a variable has a value of the wrong type."""
        try:
            return cls()
        except ValidationError as error:
            problem = error.errors()[0]
            variable = ".".join(str(part) for part in problem["loc"])
            raise BadInput(f"environment variable {variable}: {problem['msg']}") from error

    @property
    def models_dir(self) -> Path:
        """The folder that holds one folder per fetched model. It need not exist."""
        return self._cache_root / "models"

    @property
    def native_dir(self) -> Path:
        """The folder of compiled kernels. It need not exist."""
        return self._cache_root / "native"

    @property
    def _cache_root(self) -> Path:
        if self.cache_dir is not None:
            return self.cache_dir.absolute()
        # The XDG specification says that a relative path must be ignored.
        if self.xdg_cache_home is not None and self.xdg_cache_home.is_absolute():
            return self.xdg_cache_home / "jointkv"
        return Path.home() / ".cache" / "jointkv"
