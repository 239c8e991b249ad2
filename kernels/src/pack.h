// Brings a weight [columns, inner], row by row, into blocks of 16 columns: see product.h.
#pragma once

#include "product.h"

namespace {

struct PackJob {
    int32_t dtype;
    const char* weight;
    int64_t stride;  // entries
    int64_t columns, inner;
    char* packed;
};

// Packs the blocks of 16 columns from `begin` to `end`, which lie at `from`.
inline void pack_blocks_from(const PackJob& job, const char* from, int64_t begin, int64_t end) {
    const int64_t size = item(job.dtype), bytes = job.inner * size, whole = bytes / 4, step = job.stride * size;
    for (int64_t block = begin; block < end; block++, from += 16 * step) {
        char* to = job.packed + block * block_bytes(job.dtype, job.inner);
        const int64_t there = larger<int64_t>(0, smaller<int64_t>(16, job.columns - block * 16));
        if (there < 16 || bytes % 64) memset(to, 0, block_bytes(job.dtype, job.inner));
        for (int64_t k = 0; k < whole; k += 16)  // a cache line of each of the columns at a time
            for (int64_t c = 0; c < there; c++)
                for (int64_t g = k; g < smaller(whole, k + 16); g++) memcpy(to + g * 64 + c * 4, from + c * step + g * 4, 4);
        for (int64_t c = 0; c < there; c++)  // what is left of the last group
            memcpy(to + whole * 64 + c * 4, from + c * step + whole * 4, bytes % 4);
    }
}

// A matrix without padding may be packed where it lies: a block takes the place of its own 16 columns.
inline int32_t pack_blocks(const PackJob& job, int64_t begin, int64_t end) {
    const int64_t bytes = 16 * job.stride * item(job.dtype);
    if (job.weight != job.packed) {
        pack_blocks_from(job, job.weight + begin * bytes, begin, end);
        return 0;
    }
    Room copy(bytes);
    if (!copy.at) return GK_NO_MEMORY;
    for (int64_t block = begin; block < end; block++) {
        memcpy(copy.of<char>(), job.weight + block * bytes, bytes);
        pack_blocks_from(job, copy.of<char>(), block, block + 1);
    }
    return 0;
}

}  // namespace
