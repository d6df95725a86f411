"""Arms by name and as written: equal memory, no setting that must not differ."""

import pytest

from jointkv.bench.arms import BUILT_IN, LARGE_POOL, PoolSize, block_bytes, make_arms
from jointkv.errors import BadInput
from jointkv.vllm_plugin.settings import PluginSettings

POOL = PoolSize(blocks=100, block_size=32, numbers_per_token=600, layers=30, dtype="float32")


def test_every_built_in_arm_has_the_same_bytes_but_the_large_pool() -> None:
    arms = make_arms(list(BUILT_IN), POOL, {"max_relative_error": 0.1})
    sizes = {arm.name: arm.pool_blocks * block_bytes(arm, POOL) for arm in arms}
    bytes_asked_for = 100 * 32 * 600 * 4
    assert sizes.pop(LARGE_POOL) == sizes.pop("reuse_large_pool") == 8 * bytes_asked_for
    assert set(sizes.values()) == {bytes_asked_for}
    by_name = {arm.name: arm for arm in arms}
    assert by_name["fp8"].pool_blocks == 400 and by_name["fp8_fused"].pool_blocks == 400
    assert by_name["layer_groups"].pool_blocks == 200
    fused = {arm.name: arm.fusion for arm in arms if arm.fusion is not None}
    assert fused == {
        "fused": {"max_relative_error": 0.1, "reuse": "off"},
        "reuse": {"max_relative_error": 0.1, "reuse": "licensed"},
        "reuse_large_pool": {"max_relative_error": 0.1, "reuse": "licensed"},
        "fp8_fused": {"max_relative_error": 0.1, "reuse": "off"},
        "layer_groups": {"max_relative_error": 0.1, "reuse": "off", "layer_groups": 2},
        "store": {"max_relative_error": 0.1, "reuse": "off", "store": "stored"},
        "both": {"max_relative_error": 0.1, "reuse": "off", "candidates": "both"},
        "paper": {
            **{"max_relative_error": 0.1, "reuse": "off", "policy": "paper", "accept_unbounded": True},
            "layer_groups": 15,
        },
    }
    assert [arm.name for arm in arms if arm.reuses] == ["reuse", "reuse_large_pool"]


def test_the_papers_arm_has_its_thresholds_and_groups_of_two_layers_unless_others_are_chosen() -> None:
    usual, near, fewer = make_arms(["paper", "near=paper key_threshold=0.9", "fewer=paper layer_groups=5"], POOL, {})
    assert usual.fusion is not None and PluginSettings.parse(usual.fusion).unbounded and usual.pool_blocks == 1500
    assert near.fusion == {**usual.fusion, "key_threshold": 0.9} and fewer.pool_blocks == 500


def test_half_precision_has_twice_the_blocks_in_fp8() -> None:
    pool = PoolSize(blocks=100, block_size=32, numbers_per_token=600, layers=30, dtype="bfloat16")
    assert make_arms(["fp8"], pool, {})[0].pool_blocks == 200


def test_an_arm_of_ones_own() -> None:
    text = "tight=fused max_relative_error=0.1 layer_groups=3 --max-num-partial-prefills 3 --x=y"
    (arm,) = make_arms([text], POOL, {"max_relative_error": 0.2, "min_pool_usage": 0.0})
    assert arm.fusion == {"max_relative_error": 0.1, "min_pool_usage": 0.0, "reuse": "off", "layer_groups": 3}
    assert arm.flags == ["--max-num-partial-prefills", "3", "--x=y"]
    assert arm.pool_blocks == 300
    assert "max_relative_error=0.1" in arm.title


def test_reuse_is_for_the_arms_that_reuse() -> None:
    written = ["fused", "reuse", "licensed=reuse reuse=licensed reuse_miss_rate=0.01", "own=fused reuse=probed"]
    fused, reuse, licensed, own = make_arms(written, POOL, {"reuse": "probed"})
    assert [arm.fusion and arm.fusion["reuse"] for arm in (fused, reuse, licensed, own)] == [
        *("off", "probed", "licensed", "probed")
    ]
    assert (fused.reuses, reuse.reuses, own.reuses) == (False, True, True)
    assert licensed.title == "with jointkv and compute reuse, reuse=licensed reuse_miss_rate=0.01"
    with pytest.raises(BadInput, match="arm 'reuse': reuse=off is the arm fused"):
        make_arms(["reuse"], POOL, {"reuse": "off"})


@pytest.mark.parametrize("flag", ["--kv-cache-dtype fp8_e5m2", "--kv_cache_dtype=fp8", "--kv-cache-dtype=bfloat16"])
def test_blocks_follow_the_cache_dtype_of_the_flags(flag: str) -> None:
    (arm,) = make_arms([f"small=stock {flag}"], POOL, {})
    assert arm.pool_blocks == (200 if "bfloat16" in flag else 400)


def test_a_cache_dtype_for_all_arms() -> None:
    stock, back = make_arms(
        ["stock", "back=stock --kv-cache-dtype auto"], POOL, {}, common_flags=["--kv-cache-dtype", "fp8"]
    )
    assert (stock.pool_blocks, back.pool_blocks) == (100, 25)


@pytest.mark.parametrize(
    "flag",
    [
        *("--dtype", "--model", "--block-size", "--max-num-seqs", "--seed", "--port", "--max-model-len", "-tp"),
        "--scheduler-cls",
        *("--tokenizer", "--block_size=64", "--max-model", "--max-num-s", "--quantization", "--kv-transfer-config.x"),
    ],
)
def test_flags_that_must_be_the_same_are_named(flag: str) -> None:
    with pytest.raises(BadInput, match=flag.partition("=")[0]):
        make_arms([f"other=stock {flag} 1"], POOL, {})


def test_common_flags_may_change_the_model_but_not_what_the_benchmark_sets() -> None:
    make_arms(["stock"], POOL, {}, ["--quantization", "fp8"])
    with pytest.raises(BadInput, match=r"--flags: --dty \(short for --dtype\) is set by the benchmark"):
        make_arms(["stock"], POOL, {}, ["--dty", "float16"])


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["stok"], "no arm to start from: 'stok'; did you mean 'stock'"),
        (["mine="], "no arm to start from: ''; known: stock"),
        (["stock", "stock"], "twice"),
        (["stock=fused"], "built-in"),
        (["a b=stock"], "expected a name"),
        (["mine=stock max_relative_error=0.1"], "does not fuse"),
        (["mine=fused max_relative_error"], "expected KEY=VALUE"),
        (["mine=fused max_relativ_error=0.1"], "did you mean 'max_relative_error'"),
        (["mine=fused layer_groups=7"], "layer_groups=7 does not divide the model's 30 layers"),
        (["mine=stock --kv-cache-dtype int4"], "no arm of equal memory"),
        (["mine=stock --kv-cache-d fp8"], "write --kv-cache-dtype"),
        (["mine=stock 'x"], "quotation"),
    ],
)
def test_bad_arms(written: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_arms(written, POOL, {})


def test_a_pool_that_cannot_be_equal() -> None:
    odd = PoolSize(blocks=3, block_size=16, numbers_per_token=8, layers=2, dtype="float16")
    with pytest.raises(BadInput, match="cannot be made of blocks"):
        make_arms(["wide=stock --kv-cache-dtype float32"], odd, {})
