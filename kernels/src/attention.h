// Attention of each span's queries to the span's keys. A plain loop for now.
#pragma once

#include "kernels.h"
#include "rows.h"

namespace {

constexpr int64_t QUERIES = 32;  // of a task

// The tasks of a call: blocks of queries of the spans, in order.
struct AttentionJob {
    const gk_attention& a;
    Room firsts;  // the number of the first task of each span, and of all
    explicit AttentionJob(const gk_attention& a) : a(a), firsts((a.count + 1) * 8) {
        if (!ready()) return;
        int64_t n = 0;
        for (int64_t s = 0; s < a.count; s++) {
            firsts.of<int64_t>()[s] = n;
            n += up(a.spans[s].length, QUERIES) / QUERIES;
        }
        firsts.of<int64_t>()[a.count] = n;
    }
    bool ready() const { return firsts.at; }
    int64_t tasks() const { return firsts.of<int64_t>()[a.count]; }
};

template <class S> void attend_one(const gk_attention& a, const gk_span& span, int64_t n, int64_t head, float* scores) {
    const int64_t size = a.head_size, shared_head = head / (a.heads / a.key_heads), place = span.first + n;
    const S* q = (const S*)a.query + (span.start + n) * a.query_stride + head * size;
    S* out = (S*)a.output + (span.start + n) * a.output_stride + head * size;
    auto row = [&](const void* own, int64_t stride, const void* shared, int64_t shared_stride, int64_t j) {
        return (j < span.shared ? (const S*)shared + j * shared_stride : (const S*)own + (j - span.shared) * stride) + shared_head * size;
    };
    const int64_t begin = a.window ? larger<int64_t>(0, place - a.window + 1) : 0;
    const int64_t end = a.causal ? place + 1 : a.window ? smaller(span.keys, place + a.window) : span.keys;
    float most = -INFINITY, total = 0;
    for (int64_t j = begin; j < end; j++) {
        const S* k = row(span.key, span.key_stride, span.shared_key, span.shared_key_stride, j);
        vf s = {};
        for (int64_t i = 0; i < size; i += W) s += load_at(q, i, size) * load_at(k, i, size);
        float x = sum(s) * a.scaling;
        if (a.softcap > 0) x = a.softcap * tanhf(x / a.softcap);
        scores[j] = x;
        most = x > most ? x : most;
    }
    for (int64_t j = begin; j < end; j++) total += scores[j] = expf(scores[j] - most);
    for (int64_t i = 0; i < size; i += W) {
        vf s = {};
        for (int64_t j = begin; j < end; j++)
            s += load_at(row(span.value, span.value_stride, span.shared_value, span.shared_value_stride, j), i, size) * scores[j];
        store_at(out, i, size, s / total);
    }
}

inline int32_t run_attention(const AttentionJob& job, int64_t begin, int64_t end) {
    const gk_attention& a = job.a;
    int64_t longest = 0, span = 0;
    for (int64_t s = 0; s < a.count; s++) longest = larger(longest, a.spans[s].keys);
    Room scores(longest * 4);
    if (!scores.at) return GK_NO_MEMORY;
    const int64_t* firsts = job.firsts.of<int64_t>();
    for (int64_t task = begin; task < end; task++) {
        while (task >= firsts[span + 1]) span++;
        const gk_span& s = a.spans[span];
        const int64_t from = (task - firsts[span]) * QUERIES, to = smaller(s.length, from + QUERIES);
        for (int64_t n = from; n < to; n++)
            for (int64_t head = 0; head < a.heads; head++) {
                if (a.states == GK_BF16) attend_one<bf16>(a, s, n, head, scores.of<float>());
                else attend_one<float>(a, s, n, head, scores.of<float>());
            }
    }
    return 0;
}

}  // namespace
