// The states before the first layer: for each token the sum of rows of tables, and its norm.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "vector.h"

namespace {

template <class S> int32_t run_embed(const gk_embed& e, int64_t begin, int64_t end) {
    Room room(up(e.width, 64) * 4);
    float* y = room.of<float>();
    if (!y) return GK_NO_MEMORY;
    for (int64_t token = begin; token < end; token++) {
        const S* from[GK_TABLES];
        for (int32_t t = 0; t < e.tables; t++) {
            const int64_t row = e.lookups[t].rows[token];
            if (row < 0 || row >= e.lookups[t].count) return GK_NO_ROW;
            from[t] = (const S*)e.lookups[t].table + row * e.width;
        }
        if (token + 2 < end) {  // the processor does not foresee which row is next
            const char* ahead = (const char*)e.lookups[0].table + e.lookups[0].rows[token + 2] * e.width * sizeof(S);
            for (int64_t i = 0; i < e.width * int64_t(sizeof(S)); i += 64) __builtin_prefetch(ahead + i);
        }
        for (int64_t i = 0; i < e.width; i += W) {
            vf x = load_at(from[0], i, e.width) * e.factor;
            for (int32_t t = 1; t < e.tables; t++) x += load_at(from[t], i, e.width);
            store_at(y, i, e.width, x);
        }
        end_rows<S>(y, 0, 1, e.width, e.norm, e.output, {}, token);
    }
    return 0;
}

}  // namespace
