"""What the options of a benchmark mean where they depend on the machine."""

from types import SimpleNamespace
from typing import cast

import pytest

from jointkv.bench import options
from jointkv.bench.options import Options, client_cores, server_cores


def test_the_last_of_four_cores_is_left_to_the_load_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(allowed: set[int], text: str | None = None) -> tuple[set[int], set[int]]:
        monkeypatch.setattr(options, "allowed_cores", lambda: allowed)
        asked = cast(Options, SimpleNamespace(server_cores=text, client_cores=None))
        return server_cores(asked), client_cores(asked)

    assert chosen({0, 1}) == ({0, 1}, {0, 1})
    assert chosen({1, 2, 3, 5}) == ({1, 2, 3}, {5})
    assert chosen({0, 1, 2, 3}, "0-1,3") == ({0, 1, 3}, {2})
