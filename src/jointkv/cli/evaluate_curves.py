"""`jointkv evaluate curves`: the rate-distortion curve predicted from half of the requests, measured on the others."""

from __future__ import annotations

from pathlib import Path

import typer

from jointkv.cli.console import named_errors, progress, write_json, wrote
from jointkv.cli.loading import load
from jointkv.cli.options import BlockSize, Dtype, Json, Model, Seed
from jointkv.system.files import make_room

BOUNDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


@named_errors()
def curves(
    model: Model = "smollm2",
    traffic: str = typer.Option("near_prefix", help="Kind of requests, or dataset:NAME."),
    requests: int = typer.Option(32, min=16, help="Requests: half predict, half are measured."),
    block_size: BlockSize = 16,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    output: Path = typer.Option(Path("out/evaluate/curves.json"), help="Where the result goes."),
    json: Json = None,
) -> None:
    """Predict ratio against error bound, and measure it.

    Half of the requests predict, over all layers and for each layer alone; the others are measured.
    """
    from jointkv.evaluate.predict.curves import measured_curves
    from jointkv.evaluate.predict.result import Curves
    from jointkv.evaluate.traffic import get_traffic

    kind = get_traffic(traffic)
    make_room(output)
    loaded, tokenizer = load(model, dtype)
    made = kind.requests(tokenizer, requests, continuation_tokens=1, seed=seed)
    with progress(3) as steps:
        found = measured_curves(loaded, made, BOUNDS, block_size, steps)
    result = Curves(
        model=model,
        dtype=dtype,
        traffic=kind.name,
        requests=requests - requests // 2,
        held_out=requests // 2,
        block_size=block_size,
        seed=seed,
        curves=found,
    )
    write_json(output, result)
    write_json(json, result)
    wrote(output)
