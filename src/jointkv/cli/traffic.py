"""`jointkv traffic`: requests of a built-in traffic as a file."""

import json
from pathlib import Path

import typer

from jointkv.cli.console import named_errors, stages, write_result, wrote
from jointkv.cli.loading import locate
from jointkv.cli.options import Model, Seed
from jointkv.system.files import make_room


@named_errors()
def traffic(
    name: str = typer.Argument(..., metavar="NAME", help="Such as agent_turns_nonce; a wrong one shows all."),
    model: Model = "smollm2",
    requests: int = typer.Option(32, min=1, help="How many."),
    output_tokens: int = typer.Option(96, min=1, help="Tokens to be generated for each."),
    seed: Seed = 0,
    output: Path = typer.Option(Path("out/traffic.jsonl"), help="The file; - means stdout."),
) -> None:
    """Write requests of a built-in traffic as JSONL.

    Lines have the form of OpenAI's batch API. `jointkv` takes them as a log (`advise`, `bench serve --replay`),
    `vllm run-batch` as a batch; each body can be sent as it is. Turns of a conversation have a `session_id`, a
    `timestamp` and a `cache_salt`.
    """
    from jointkv.evaluate.traffic import get_traffic
    from jointkv.evaluate.traffic.writing import as_row
    from jointkv.hf.models import load_tokenizer

    kind = get_traffic(name)
    if str(output) != "-":
        make_room(output)
    locate(model)
    with stages(f"making {requests} requests of {kind.name}"):
        made = kind.requests(load_tokenizer(model), requests, continuation_tokens=1, seed=seed)
    rows = [as_row(request, number, model, output_tokens) for number, request in enumerate(made)]
    write_result(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if str(output) != "-":
        wrote(output)
