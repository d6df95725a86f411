/* Attention over KV pages that reads a page once for all the queries that need it.
 *
 * An item is a run of pages and a run of queries that read all of them, for one KV head. Its pages are taken by tiles:
 * logits = queries x K, an online softmax, output += probabilities x V, both products by one register-tiled kernel.
 * Each item leaves a partial output with its maximum and sum; at the end those of one query are merged. Logits are to
 * the base of two.
 */
#include <stdlib.h>
#include "pages.h"
#include "product.h"

enum { TILE_TOKENS = 256, TILE_FLOATS = 4096, MOST_ROWS = 48 };

/* `NativeWork` of work.py. */
typedef struct {
    const int32_t *page_from, *page_to, *query_from, *query_to, *columns, *partial, *entry;
    const int32_t *page, *first, *held, *offset;
    const int32_t *query_row, *query_seen, *column_from, *column_to;
    const int32_t *entries, *merge_start, *merge;
    int64_t num_items, num_queries;
} work_list;

typedef struct {
    int64_t page_from, page_to, query_from, query_to, columns, partial, entry, head;
} work_item;

/* One thread's memory: queries [rows, key size], logits [rows, row], outputs [rows, value size], maxima, sums, and
 * pages that had to be unpacked: keys [key size, columns of a page], values [row, value size]. */
typedef struct {
    float *query, *logits, *output, *most, *sum, *keys, *values;
    strip *value_strips;
    int32_t *pages;
    int64_t row;
} workspace;

/* Pages in a tile: for one block of rows as many as fill TILE_TOKENS, for more of them no more V than stays close. */
INLINE int64_t tile_pages(const page_store *store, int64_t rows)
{
    int64_t tokens = rows <= ROWS ? TILE_TOKENS : TILE_FLOATS / store->value_size;
    int64_t pages = tokens / padded(store->tokens);
    return pages ? pages : 1;
}

static void *carve(uint8_t **memory, int64_t bytes)
{
    uint8_t *start = *memory;
    *memory += (bytes + LINE - 1) / LINE * LINE;
    return start;
}

/* Lays a workspace out in `memory`; returns the bytes it takes. */
static int64_t lay_out(workspace *space, const page_store *store, uint8_t *memory)
{
    uint8_t *at = memory;
    int64_t rows = store->group > MOST_ROWS ? store->group : MOST_ROWS;
    int64_t pages = tile_pages(store, 1);
    space->row = pages * padded(store->tokens) + 16;
    space->query = carve(&at, rows * store->key_size * 4);
    space->logits = carve(&at, rows * space->row * 4);
    space->output = carve(&at, rows * store->value_size * 4);
    space->most = carve(&at, rows * 4);
    space->sum = carve(&at, rows * 4);
    space->keys = carve(&at, padded(store->tokens) * (store->key_size + 16) * 4);
    space->values = carve(&at, (space->row + 2) * store->value_size * 4);
    space->value_strips = carve(&at, (pages + 1) * sizeof(strip));
    space->pages = carve(&at, pages * 4);
    return at - memory;
}

/* What a call is about. */
typedef struct {
    const page_store *store;
    const work_list *work;
    const float *query, *key_scale, *value_scale;
    float scale;
    float *partial, *partial_most, *partial_sum;
} task;

INLINE const int32_t *entry_of(const task *task, const work_item *item, int32_t page)
{
    return task->work->entries + item->entry + (int64_t)(page - item->page_from) * item->columns;
}

INLINE const uint8_t *key_of(const page_store *store, int64_t page, int64_t head)
{
    return store->keys + page * store->key_page + head * store->key_head;
}

/* How many tokens of `page`, counted from its first one, a query sees. */
INLINE int64_t visible(const work_list *work, int32_t page, int64_t seen)
{
    int64_t tokens = seen + 1 - work->offset[page];
    return tokens < 0 ? 0 : tokens < work->held[page] ? tokens : work->held[page];
}

INLINE void mask(float *logits, int64_t columns, int64_t first, int64_t count)
{
    for (int64_t t = 0; t < first; t++)
        logits[t] = -INFINITY;
    for (int64_t t = first + count; t < columns; t++)
        logits[t] = -INFINITY;
}

/* Turns a row's logits of `num_pages` pages into probabilities over 2^maximum, and what was summed up before to match.
 * A page that one sequence reads several times counts as often, each time with scales of its own. */
INLINE void soften(const task *task, const work_item *item, int64_t row, int64_t num_pages, workspace *space,
                   int scaled)
{
    const work_list *work = task->work;
    int64_t columns = padded(task->store->tokens), size = task->store->value_size;
    int32_t query = item->query_from + row / task->store->group;
    int32_t from = work->column_from[query], to = work->column_to[query];
    float *logits = space->logits + row * space->row;
    floats most = (floats){0} - INFINITY;
    for (int64_t i = 0; i < num_pages; i++) {
        int32_t page = space->pages[i];
        const int32_t *entry = entry_of(task, item, page);
        float *at = logits + i * columns;
        int64_t count = visible(work, page, work->query_seen[query]);
        if (count < columns)
            mask(at, columns, work->first[page], count);
        for (int32_t e = from; e < (scaled ? to : from + 1); e++)
            for (int64_t t = 0; t < columns; t += WIDTH)
                most = larger(most, scaled ? load_floats(at + t) * task->key_scale[entry[e]] : load_floats(at + t));
    }
    float before = space->most[row], now = largest_of(most);
    now = before > now ? before : now;
    float base = now == -INFINITY ? 0 : now;
    floats sum = {0}, weight = (floats){0} + log2f(to - from);
    for (int64_t i = 0; i < num_pages; i++) {
        const int32_t *entry = entry_of(task, item, space->pages[i]);
        for (int64_t t = i * columns; t < (i + 1) * columns; t += WIDTH) {
            floats logit = load_floats(logits + t), total = {0};
            if (!scaled) {
                total = power_of_two(logit - base + weight);
                sum += total;
            }
            for (int32_t e = from; scaled && e < to; e++) {
                floats power = power_of_two(logit * task->key_scale[entry[e]] - base);
                sum += power;
                total += power * task->value_scale[entry[e]];
            }
            store_floats(logits + t, total);
        }
    }
    if (now > before) {
        floats shrink = power_of_two((floats){0} + (before - base));
        float *output = space->output + row * size;
        for (int64_t k = 0; k < size; k += WIDTH)
            store_floats(output + k, load_floats(output + k) * shrink);
        space->sum[row] *= shrink[0];
        space->most[row] = now;
    }
    space->sum[row] += sum_of(sum);
}

INLINE void gather(const task *task, const work_item *item, int64_t rows, workspace *space)
{
    const page_store *store = task->store;
    int64_t group = store->group, size = store->key_size;
    for (int64_t row = 0; row < rows; row++) {
        int64_t query = task->work->query_row[item->query_from + row / group];
        const float *from = task->query + ((query * store->heads + item->head) * group + row % group) * size;
        for (int64_t k = 0; k < size; k++)
            space->query[row * size + k] = from[k] * task->scale;
        space->most[row] = -INFINITY;
        space->sum[row] = 0;
    }
    memset(space->output, 0, rows * store->value_size * sizeof(float));
}

/* The pages from `page` on that make a tile, those left out that no query of the item sees; returns the page after. */
INLINE int32_t choose_pages(const task *task, const work_item *item, int32_t page, int64_t most, workspace *space,
                            int64_t *chosen)
{
    int64_t last_seen = task->work->query_seen[item->query_to - 1];
    for (*chosen = 0; page < item->page_to && *chosen < most; page++)
        if (visible(task->work, page, last_seen))
            space->pages[(*chosen)++] = page;
    return page;
}

/* One tile: logits, probabilities, output. */
INLINE void attend_tile(const task *task, const work_item *item, int64_t rows, int64_t num_pages, const uint8_t *after,
                        workspace *space, enum dtype dtype)
{
    const page_store *store = task->store;
    const work_list *work = task->work;
    int64_t columns = padded(store->tokens), last_seen = work->query_seen[item->query_to - 1];
    int many = dtype != FLOAT32 && rows > ROWS;
    int unpack_k = store->order != BY_COLUMNS || columns != store->tokens || many;
    int unpack_v = store->order == BY_PAIRS || many;
    const uint8_t *values = store->values + item->head * store->value_head;
    for (int64_t i = 0; i < num_pages; i++) {
        const uint8_t *page = values + work->page[space->pages[i]] * store->value_page;
        int64_t first = work->first[space->pages[i]], count = visible(work, space->pages[i], last_seen);
        strip *v = space->value_strips + i;
        *v = (strip){page + first * store->value_line, NULL, count, store->value_line, i * columns + first};
        if (i)
            v[-1].next = v->at;
    }
    space->value_strips[num_pages - 1].next = after;
    for (int64_t i = 0; i < num_pages; i++) {
        const uint8_t *page = key_of(store, work->page[space->pages[i]], item->head);
        const uint8_t *next = i + 1 < num_pages ? key_of(store, work->page[space->pages[i + 1]], item->head)
                                                : space->value_strips[0].at;
        strip k = {page, next, store->key_size, store->key_line, 0};
        if (unpack_k) {
            unpack_keys(store, page, space->keys, dtype);
            k = (strip){(uint8_t *)space->keys, (uint8_t *)space->keys, store->key_size, columns * sizeof(float), 0};
        }
        factors of = {space->query, store->key_size, &k, 1, 0, space->logits + i * columns, space->row, 0};
        int64_t end = work->first[space->pages[i]] + visible(work, space->pages[i], last_seen);
        multiply(of, rows, padded(end) / WIDTH, unpack_k ? FLOAT32 : dtype);
    }
    for (int64_t row = 0; row < rows; row++)
        if (task->key_scale)
            soften(task, item, row, num_pages, space, 1);
        else
            soften(task, item, row, num_pages, space, 0);
    for (int64_t i = 0; unpack_v && i < num_pages; i++) {
        strip *v = space->value_strips + i;
        float *to = space->values + i * columns * store->value_size;
        int64_t first = work->first[space->pages[i]];
        unpack_values(store, v->at - first * store->value_line, first + v->lines, to, dtype);
        v->at = v->next = (uint8_t *)(to + first * store->value_size);
        v->line = store->value_size * sizeof(float);
    }
    int64_t close = TILE_FLOATS / store->value_size / columns;
    close = close ? close : 1;
    for (int64_t i = 0; i < num_pages; i += close) {
        int64_t some = num_pages - i < close ? num_pages - i : close;
        factors of = {space->logits, space->row, space->value_strips + i, some, 0, space->output, store->value_size, 1};
        multiply(of, rows, store->value_size / WIDTH, unpack_v ? FLOAT32 : dtype);
    }
}

INLINE void attend(const task *task, const work_item *item, workspace *space, enum dtype dtype)
{
    const page_store *store = task->store;
    int64_t group = store->group, rows = (item->query_to - item->query_from) * group, chosen;
    space->row = tile_pages(store, rows) * padded(store->tokens) + 16;
    gather(task, item, rows, space);
    for (int32_t page = item->page_from; page < item->page_to;) {
        page = choose_pages(task, item, page, tile_pages(store, rows), space, &chosen);
        int32_t after = task->work->page[page < item->page_to ? page : page - 1];
        if (chosen)
            attend_tile(task, item, rows, chosen, key_of(store, after, item->head), space, dtype);
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = ((item->partial + row / group) * store->heads + item->head) * group + row % group;
        task->partial_most[at] = space->most[row];
        task->partial_sum[at] = space->sum[row];
        memcpy(task->partial + at * store->value_size, space->output + row * store->value_size,
               store->value_size * sizeof(float));
    }
}

/* The outputs of one query, all heads, from its partial ones: `output [value size]`, and the natural log-sum-exp. */
static void merge(const task *task, int64_t query, float *output, float *log_sum)
{
    const work_list *work = task->work;
    int64_t heads = task->store->heads * task->store->group, size = task->store->value_size;
    for (int64_t head = 0; head < heads; head++) {
        float most = -INFINITY, sum = 0, *to = output + head * size;
        for (int32_t i = work->merge_start[query]; i < work->merge_start[query + 1]; i++)
            most = fmaxf(most, task->partial_most[work->merge[i] * heads + head]);
        memset(to, 0, size * sizeof(float));
        for (int32_t i = work->merge_start[query]; i < work->merge_start[query + 1]; i++) {
            int64_t at = work->merge[i] * heads + head;
            float factor = exp2f(task->partial_most[at] - most);
            const float *from = task->partial + at * size;
            sum += factor * task->partial_sum[at];
            for (int64_t k = 0; k < size; k++)
                to[k] += factor * from[k];
        }
        for (int64_t k = 0; k < size; k++)
            to[k] /= sum;
        log_sum[head] = (most + log2f(sum)) * 0.69314718f;
    }
}

static void attend_as(const task *task, int64_t number, int64_t head, workspace *space)
{
    const work_list *work = task->work;
    work_item item = {work->page_from[number], work->page_to[number], work->query_from[number], work->query_to[number],
                      work->columns[number],   work->partial[number], work->entry[number],      head};
    switch (task->store->dtype) {
    case FLOAT32: attend(task, &item, space, FLOAT32); return;
    case BFLOAT16: attend(task, &item, space, BFLOAT16); return;
    case FLOAT16: attend(task, &item, space, FLOAT16); return;
    }
}

/* Writes `output [queries, heads, value size]` and `log_sum [queries, heads]` of `query [rows, heads, key size]`; the
 * scales, both or none, are looked up by entry. `partial [partials, heads, value size + 2]` is scratch. Returns 0, or
 * -1 where there is no memory. */
int32_t jointkv_paged_attention(const page_store *store, const work_list *work, const float *query, float scale,
                                const float *key_scale, const float *value_scale, float *partial, int64_t num_partials,
                                float *output, float *log_sum, int32_t threads)
{
    int64_t heads = store->heads * store->group, tasks = work->num_items * store->heads;
    float *partial_most = partial + num_partials * heads * store->value_size;
    task task = {store,       work,    query,        key_scale, value_scale, scale * 1.44269504f,
                 partial,     partial_most, partial_most + num_partials * heads};
    workspace measured;
    int64_t bytes = lay_out(&measured, store, NULL);
    int32_t failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        workspace space;
        uint8_t *memory = aligned_alloc(LINE, bytes);
        if (memory)
            lay_out(&space, store, memory);
        else
#pragma omp atomic write
            failed = -1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++)
            if (memory)
                attend_as(&task, i / store->heads, i % store->heads, &space);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < work->num_queries; i++)
            if (memory)
                merge(&task, i, output + i * heads * store->value_size, log_sum + i * heads);
        free(memory);
    }
    return failed;
}
