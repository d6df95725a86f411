"""The flags of vLLM that the pages name are vLLM's."""

from __future__ import annotations

import pytest

from tests.docs.doc_pages import VLLM_FLAGS

pytest.importorskip("vllm")


def test_flags_exist() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = make_arg_parser(FlexibleArgumentParser())._option_string_actions
    assert not {"--kv-transfer-config", "--worker-cls", *VLLM_FLAGS} - known.keys()
