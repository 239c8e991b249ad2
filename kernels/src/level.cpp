// Everything that is compiled once for each level, with the level's instructions. All names are local to the level, so that
// the linker cannot take a function of a higher level for a lower one.
#include "level.h"

#include "activations.h"
#include "attention.h"
#include "columns.h"
#include "embed.h"
#include "linear.h"
#include "pack.h"
#include "rows.h"
#include "texts.h"
#include "token.h"

#define GK_JOIN(a, b) a##b
#define GK_NAME(a, b) GK_JOIN(a, b)

namespace {

struct Task {
    void (*run)(const void* job, int64_t begin, int64_t end, int32_t* failed);
    const void* job;
    int32_t failed;
};
void run_task(int64_t begin, int64_t end, void* at) {
    Task* task = (Task*)at;
    task->run(task->job, begin, end, &task->failed);
}
// Splits [0, count) among the host's threads.
int32_t spread(const Host& host, int64_t count, void (*run)(const void*, int64_t, int64_t, int32_t*), const void* job) {
    Task task{run, job, 0};
    if (count <= 1 || host.threads <= 1 || !host.parallel) run_task(0, count, &task);
    else if (host.parallel(0, count, 1, run_task, &task)) return GK_NO_MEMORY;
    return task.failed;
}

struct LinearJob {
    const gk_linear* l;
    float* results;  // of a product by columns
};

template <class S> int32_t run_rows_of(const gk_linear& l, int64_t begin, int64_t end) {
    if (only_output(l)) return straight<S>(l, begin, end, 0, up(l.weight.columns, COLUMNS) / COLUMNS);
    return only_quantised(l) ? by_blocks<S, S>(l, begin, end) : by_blocks<S, float>(l, begin, end);
}
template <class S> void linear_rows(const void* at, int64_t begin, int64_t end, int32_t* failed) {
    const gk_linear& l = *((const LinearJob*)at)->l;
    if (run_rows_of<S>(l, begin * ROWS, smaller(end * ROWS, l.rows))) *failed = GK_NO_MEMORY;
}
template <class S> void linear_columns(const void* at, int64_t begin, int64_t end, int32_t* failed) {
    const gk_linear& l = *((const LinearJob*)at)->l;
    if (straight<S>(l, 0, l.rows, begin, end)) *failed = GK_NO_MEMORY;
}
template <class S> void linear_ends(const void* at, int64_t begin, int64_t end, int32_t*) {
    const LinearJob& job = *(const LinearJob*)at;
    const int64_t stride = up(job.l->weight.columns, COLUMNS);
    for (int64_t row = begin; row < end; row += AT_ONCE)
        finish_complete<S>(*job.l, row, smaller(AT_ONCE, end - row), job.results + row * stride, stride);
}

template <class S> int32_t run_linear_of(const Host& host, const gk_linear& l) {
    const int64_t strips = up(l.rows, ROWS) / ROWS, width = up(l.weight.columns, COLUMNS);
    LinearJob job{&l, nullptr};
    if (strips >= host.threads) return spread(host, strips, linear_rows<S>, &job);
    // Few rows: the threads share the columns, and then the rows.
    if (only_output(l)) return spread(host, width / COLUMNS, linear_columns<S>, &job);
    Room results(l.rows * width * 4);
    if (!results.at) return GK_NO_MEMORY;
    gk_linear part = l;
    part.first_norm.kind = part.norm.kind = GK_NO_NORM;
    part.residual.data = part.total.data = part.quantised.data = nullptr;
    part.output = {results.at, width, nullptr};
    LinearJob columns{&part, nullptr};
    if (int32_t failed = spread(host, width / COLUMNS, linear_columns<float>, &columns)) return failed;
    job.results = results.of<float>();
    return spread(host, l.rows, linear_ends<S>, &job);
}

int32_t linear(const Host& host, const gk_linear* l) {
    return l->states == GK_BF16 ? run_linear_of<bf16>(host, *l) : run_linear_of<float>(host, *l);
}

// What lies between the maps of a chain, for some rows. A row has room for a cache line more, as in by_blocks.
struct Between {
    Room room[8];
    int64_t count = 0;
    template <class T> void give(gk_rows& rows, int64_t number, int64_t width) {
        if (!rows.data) return;
        rows.stride = width + 64 / sizeof(T);
        rows.data = room[count++].make(number * rows.stride * sizeof(T));
    }
    // Makes room for `number` rows.
    template <class S> bool link(gk_linear* l, int64_t number) {
        for (int step = 0; step < 2; step++) {
            const int64_t width = l[step].weight.columns;
            const bool quantised = l[step].quantised.data;
            give<S>(l[step].total, number, width);
            give<S>(l[step].output, number, width);
            give<int8_t>(l[step].quantised, number, up(width, 64));
            if (quantised) l[step].quantised.scale = (float*)room[count++].make(number * 8);
            l[step + 1].x = l[step + 1].dtype == GK_INT8 ? l[step].quantised : l[step].output;
        }
        l[2].residual = l[0].total.data ? l[0].total : l[0].output;
        for (int64_t n = 0; n < count; n++)
            if (!room[n].at) return false;
        return true;
    }
};

// Goes on by some rows of so many bytes an entry.
inline void skip(gk_rows& rows, int64_t number, int64_t size) {
    rows.data = (char*)rows.data + number * rows.stride * size;
    rows.scale += rows.scale ? 2 * number : 0;
}

// The rows pass in blocks through the same room, which is made once: fresh memory costs more than what is computed in it.
template <class S> void chain_rows(const void* at, int64_t begin, int64_t end, int32_t* failed) {
    const gk_linear* steps = (const gk_linear*)at;
    gk_linear l[3] = {steps[0], steps[1], steps[2]};
    int64_t left = smaller(end * ROWS, steps->rows) - begin * ROWS, number = begin * ROWS;
    Between between;
    if (!between.link<S>(l, smaller(left, TOGETHER * ROWS))) *failed = GK_NO_MEMORY;
    for (; left > 0 && !*failed; left -= number) {
        skip(l[0].x, number, item(l[0].dtype));
        skip(l[0].residual, number, sizeof(S));
        skip(l[2].output, number, sizeof(S));
        number = smaller(left, TOGETHER * ROWS);
        for (int step = 0; step < 3 && !*failed; step++) *failed = run_rows_of<S>(l[step], 0, number);
    }
}

template <class S> int32_t run_chain_of(const Host& host, const gk_linear* steps) {
    const int64_t strips = up(steps->rows, ROWS) / ROWS;
    if (strips >= host.threads) return spread(host, strips, chain_rows<S>, steps);
    gk_linear l[3] = {steps[0], steps[1], steps[2]};
    Between between;
    if (!between.link<S>(l, steps->rows)) return GK_NO_MEMORY;
    for (int step = 0; step < 3; step++)
        if (int32_t failed = run_linear_of<S>(host, l[step])) return failed;
    return 0;
}
int32_t chain(const Host& host, const gk_linear* steps) {
    return steps->states == GK_BF16 ? run_chain_of<bf16>(host, steps) : run_chain_of<float>(host, steps);
}

struct RowsJob {
    int32_t states;
    int64_t width, heads;
    const gk_rows *x, *output, *quantised;
    const gk_norm* norm;
    const float *cosine, *sine;
};
void rows_task(const void* at, int64_t begin, int64_t end, int32_t* failed) {
    const RowsJob& j = *(const RowsJob*)at;
    auto run = j.states == GK_BF16 ? run_rows<bf16> : run_rows<float>;
    if (run(begin, end, j.width, *j.x, *j.norm, *j.output, *j.quantised)) *failed = GK_NO_MEMORY;
}
void heads_task(const void* at, int64_t begin, int64_t end, int32_t* failed) {
    const RowsJob& j = *(const RowsJob*)at;
    auto run = j.states == GK_BF16 ? run_heads<bf16> : run_heads<float>;
    if (run(begin, end, j.heads, j.width, *j.x, *j.norm, j.cosine, j.sine)) *failed = GK_NO_MEMORY;
}
int32_t rows(const Host& host, int32_t states, int64_t count, int64_t width, const gk_rows* x, const gk_norm* norm,
             const gk_rows* output, const gk_rows* quantised) {
    RowsJob job{states, width, 0, x, output, quantised, norm, nullptr, nullptr};
    return spread(host, count, rows_task, &job);
}
int32_t heads(const Host& host, int32_t states, int64_t count, int64_t number, int64_t size, const gk_rows* x,
              const gk_norm* norm, const float* cosine, const float* sine) {
    RowsJob job{states, size, number, x, nullptr, nullptr, norm, cosine, sine};
    return spread(host, count, heads_task, &job);
}

void attention_task(const void* at, int64_t begin, int64_t end, int32_t* failed) {
    const AttentionJob& job = *(const AttentionJob*)at;
    if (run_attention(job, begin, end)) *failed = GK_NO_MEMORY;
}
int32_t attention(const Host& host, const gk_attention* a) {
    AttentionJob job{*a};
    return spread(host, job.tasks(), attention_task, &job);
}

void features_task(const void* at, int64_t begin, int64_t end, int32_t* failed) {
    if (run_features(*(const gk_features*)at, begin, end)) *failed = GK_NO_MEMORY;
}
int32_t features(const Host& host, const gk_features* f) { return spread(host, f->count, features_task, f); }

void embed_task(const void* at, int64_t begin, int64_t end, int32_t* failed) {
    const gk_embed& e = *(const gk_embed*)at;
    if (int32_t code = e.states == GK_BF16 ? run_embed<bf16>(e, begin, end) : run_embed<float>(e, begin, end)) *failed = code;
}
int32_t embed(const Host& host, const gk_embed* e) { return spread(host, e->count, embed_task, e); }

void pack_task(const void* at, int64_t begin, int64_t end, int32_t* failed) {
    if (pack_blocks(*(const PackJob*)at, begin, end)) *failed = GK_NO_MEMORY;
}
int32_t pack(const Host& host, int32_t dtype, void* matrix, int64_t columns, int64_t inner) {
    PackJob job{(char*)matrix, inner * item(dtype)};
    return spread(host, columns / 16, pack_task, &job);
}

// Threads share the entries of the rows.
void columns_task(const void* at, int64_t begin, int64_t end, int32_t*) {
    const gk_columns& c = *(const gk_columns*)at;
    run_columns({c}, begin * SHARED, smaller(end * SHARED, c.length));
}
int32_t columns(const Host& host, const gk_columns* c) {
    const int64_t parts = up(c->length, SHARED) / SHARED;
    if (c->count * c->length >= FEW) return spread(host, parts, columns_task, c);
    columns_task(c, 0, parts, nullptr);
    return 0;
}
struct UnpackJob {
    const gk_columns& c;
    int32_t dtype;
    char* states;
};
void unpack_task(const void* at, int64_t begin, int64_t end, int32_t*) {
    const UnpackJob& j = *(const UnpackJob*)at;
    for (int64_t row = begin; row < end; row++) {
        char* to = j.states + row * j.c.length * item(j.dtype);
        if (j.dtype == GK_BF16) unpack_column({j.c}, row, (bf16*)to);
        else unpack_column({j.c}, row, (float*)to);
    }
}
int32_t unpack_columns(const Host& host, const gk_columns* c, int32_t dtype, void* states) {
    UnpackJob job{*c, dtype, (char*)states};
    return spread(host, c->count, unpack_task, &job);
}
int32_t choose(gk_choice* choice) { return choose_columns(*choice); }

void token_task(int64_t begin, int64_t end, void* job) { ((TokenJob*)job)->run(end - begin); }
int32_t token(const Host& host, const gk_token* t) {
    const int32_t threads = host.parallel ? larger(1, host.threads) : 1;
    TokenJob job(*t, threads);
    if (!job.room.at) return GK_NO_MEMORY;
    if (threads == 1) token_task(0, 1, &job);
    else if (host.parallel(0, threads, 1, token_task, &job)) return GK_NO_MEMORY;
    return 0;
}

void start() { start_activations(); }

}  // namespace

extern const Level GK_NAME(gk_level_, GK_LEVEL);
const Level GK_NAME(gk_level_, GK_LEVEL) = {HAS_BF16, start, linear, chain, attention, features, embed, rows, heads, pack,
    columns, unpack_columns, choose, token};
