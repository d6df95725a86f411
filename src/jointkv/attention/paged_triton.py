"""The Triton kernels of gpu.py: attention over the items of a work list, and the merge of what they leave.

One program takes one item for one KV head, and its pages by tiles: logits = queries x K, an online softmax, output +=
probabilities x V. Logits are to the base of two. Lists are those of work.py, on the device.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton was told to run kernels on the CPU; what holds is what it was told when kernels were declared."""

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def last_page(pages: tl.tuple, page_from: tl.tensor, page_to: tl.tensor, seen: tl.tensor) -> tl.tensor:
    """Index after the last page that begins no later than the query of number `seen`."""
    end = page_from
    for start in range(page_from, page_to, 64):
        index = start + tl.arange(0, 64)
        offset = tl.load(pages.offset + index, index < page_to, 2**30)
        end = tl.maximum(end, tl.max(tl.where(offset <= seen, index + 1, 0), 0))
    return end


@triton.jit
def read_lines(start: tl.tensor, there: tl.tensor, size: tl.constexpr, sizes: tl.constexpr) -> tl.tensor:
    """`size` numbers from each of the addresses `start` on, filled up to `sizes`; zero where a line is not `there`."""
    axis = tl.arange(0, sizes)
    return tl.load(start[:, None] + axis[None, :], there[:, None] & (axis < size)[None, :], 0.0)


@triton.jit
def write_lines(start: tl.tensor, lines: tl.tensor, there: tl.tensor, size: tl.constexpr, sizes: tl.constexpr) -> None:
    axis = tl.arange(0, sizes)
    tl.store(start[:, None] + axis[None, :], lines, there[:, None] & (axis < size)[None, :])


@triton.jit
def product(left: tl.tensor, right: tl.tensor, added: tl.tensor) -> tl.tensor:
    """`left x right + added`, in the dtype of `right`; Triton's interpreter would cut bfloat16 off instead of rounding,
    and multiply its bits as integers."""
    if INTERPRETED and right.dtype == tl.bfloat16:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), added)
    return tl.dot(left.to(right.dtype), right, added, input_precision="ieee")


@triton.jit
def soften(logits: tl.tensor, visible: tl.tensor, most: tl.tensor, repeats: tl.tensor) -> tl.tuple:
    """Weights of V over 2^base, their sums, and the maximum; a page counts as often as the sequence reads it."""
    logits = tl.where(visible, logits + tl.log2(repeats.to(tl.float32))[:, None], float("-inf"))
    now = tl.maximum(most, tl.max(logits, 1))
    base = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(logits - base[:, None])
    return weights, tl.sum(weights, 1), now


@triton.jit
def soften_scaled(
    logits: tl.tensor,
    visible: tl.tensor,
    most: tl.tensor,
    repeats: tl.tensor,
    scales: tl.tuple,
    entry: tl.tensor,
    most_repeats: tl.tensor,
) -> tl.tuple:
    """`soften` where each of the readings, `entry [rows, tokens]` and those after it, has scales of its own."""
    now = most
    for i in range(most_repeats):
        read = visible & (i < repeats)[:, None]
        scaled = logits * tl.load(scales.key + entry + i, read, 1.0)
        now = tl.maximum(now, tl.max(tl.where(read, scaled, float("-inf")), 1))
    base = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.zeros_like(logits)
    sums = tl.zeros_like(most)
    for i in range(most_repeats):
        read = visible & (i < repeats)[:, None]
        scaled = logits * tl.load(scales.key + entry + i, read, 1.0)
        power = tl.exp2(tl.where(read, scaled, float("-inf")) - base[:, None])
        weights += power * tl.load(scales.value + entry + i, read, 1.0)
        sums += tl.sum(power, 1)
    return weights, sums, now


@triton.jit
def read_tile(
    store: tl.tuple, pages: tl.tuple, index: tl.tensor, place: tl.tensor, end: tl.tensor, head: tl.tensor,
    key_size: tl.constexpr, value_size: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """K, V, which tokens they hold and at which positions; `place` is that in the page of number `index`."""
    exists = index < end
    after = place - tl.load(pages.first + index, exists, 0)
    held = (after >= 0) & (after < tl.load(pages.held + index, exists, 0))
    page = tl.load(pages.page + index, exists, 0).to(tl.int64)
    key_at = store.key + page * store.key_page + place * store.key_token + head * store.key_head
    value_at = store.value + page * store.value_page + place * store.value_token + head * store.value_head
    keys = read_lines(key_at, held, key_size, triton.next_power_of_2(key_size))
    values = read_lines(value_at, held, value_size, triton.next_power_of_2(value_size))
    return keys, values, held, after + tl.load(pages.offset + index, exists, 0)


@triton.jit
def attend(
    query: tl.tensor, rest: tl.tensor, store: tl.tuple, scales: tl.tuple, items: tl.tuple, pages: tl.tuple,
    queries: tl.tuple, partial: tl.tuple, scale: tl.tensor, most_repeats: tl.tensor, heads: tl.tensor,
    group: tl.constexpr, block_size: tl.constexpr, key_size: tl.constexpr, value_size: tl.constexpr,
    rows: tl.constexpr, tokens: tl.constexpr, causal: tl.constexpr, whole: tl.constexpr,
) -> None:  # fmt: skip
    """Partial outputs of one item for one KV head.

    Args:
        query, rest: `[any, heads * group, key_size]`, to be added where there is a rest.
        store, scales, partial: `Store`, `Scales` or None, and `Partial` of gpu.py.
        scale: factor on the logits, to the base of two.
        most_repeats: how often a sequence reads a page, at most.
        rows, tokens: of a tile, powers of two; an item has no more than `rows` query heads for a KV head.
        causal: an item may have pages that its queries do not see.
        whole: each query has one part only, which is its output, and the log-sum-exp in place of the maximum.
    """
    key_sizes: tl.constexpr = triton.next_power_of_2(key_size)
    value_sizes: tl.constexpr = triton.next_power_of_2(value_size)
    slots: tl.constexpr = triton.next_power_of_2(block_size)
    item, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row = tl.arange(0, rows)
    which = tl.load(items.query_from + item) + row // group
    asked = which < tl.load(items.query_to + item)
    at = (tl.load(queries.row + which, asked, 0).to(tl.int64) * heads + head) * group + row % group
    matrix = read_lines(query + at * key_size, asked, key_size, key_sizes)
    if rest is not None:
        rest_matrix = read_lines(rest + at * key_size, asked, key_size, key_sizes)
    seen = tl.load(queries.seen + which, asked, -1)
    column = tl.load(queries.column_from + which, asked, 0)
    repeats = tl.load(queries.column_to + which, asked, 1) - column
    page_from, end = tl.load(items.page_from + item), tl.load(items.page_to + item)
    entry_from, columns = tl.load(items.entry + item), tl.load(items.columns + item)
    if causal:
        end = last_page(pages, page_from, end, tl.max(seen, 0))
    most = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    output = tl.zeros([rows, value_sizes], tl.float32)
    for start in range(page_from * slots, end * slots, tokens):
        slot = start + tl.arange(0, tokens)
        index = slot // slots
        keys, values, held, position = read_tile(store, pages, index, slot % slots, end, head, key_size, value_size)
        visible = asked[:, None] & held[None, :] & (position[None, :] <= seen[:, None])
        logits = product(matrix, tl.trans(keys), tl.zeros([rows, tokens], tl.float32))
        if rest is not None:
            logits = product(rest_matrix, tl.trans(keys), logits)
        logits *= scale
        if scales is None:
            weights, sums, now = soften(logits, visible, most, repeats)
        else:
            entry = entry_from + ((index - page_from) * columns)[None, :] + column[:, None]
            weights, sums, now = soften_scaled(logits, visible, most, repeats, scales, entry, most_repeats)
        shrink = tl.exp2(most - tl.where(now == float("-inf"), 0.0, now))
        output *= shrink[:, None]
        if scales is not None and values.dtype == tl.float16:
            # Scaled weights may leave the range of float16, but not that of tf32, which keeps as many digits.
            output = tl.dot(weights, values.to(tl.float32), output, input_precision="tf32")
        else:
            output = product(weights, values, output)
        total, most = total * shrink + sums, now
    if whole:
        total = tl.where(asked, total, 1.0)
        output = output / total[:, None]
        most = (most + tl.log2(total)) * LN_2
    else:
        at = ((tl.load(items.partial + item) + row // group).to(tl.int64) * heads + head) * group + row % group
        tl.store(partial.total + at, total, asked)
    tl.store(partial.most + at, most, asked)
    write_lines(partial.output + at * value_size, output, asked, value_size, value_sizes)


@triton.jit
def merge(
    partial: tl.tuple,
    parts: tl.tuple,
    output: tl.tensor,
    log_sum: tl.tensor,
    heads: tl.tensor,
    value_size: tl.constexpr,
) -> None:
    """The output and natural log-sum-exp of one query and head from its partial ones; `parts` is `Merge`."""
    query, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    axis = tl.arange(0, triton.next_power_of_2(value_size))
    most, total = float("-inf"), 0.0
    merged = tl.zeros([triton.next_power_of_2(value_size)], tl.float32)
    for i in range(tl.load(parts.start + query), tl.load(parts.start + query + 1)):
        at = tl.load(parts.partial + i).to(tl.int64) * heads + head
        found = tl.load(partial.most + at)
        now = tl.maximum(most, found)
        base = tl.where(now == float("-inf"), 0.0, now)
        shrink, factor = tl.exp2(most - base), tl.exp2(found - base)
        part = tl.load(partial.output + at * value_size + axis, axis < value_size, 0.0)
        merged = merged * shrink + part * factor
        total = total * shrink + tl.load(partial.total + at) * factor
        most = now
    at = query.to(tl.int64) * heads + head
    tl.store(output + at * value_size + axis, merged / total, axis < value_size)
    tl.store(log_sum + at, (most + tl.log2(total)) * LN_2)
