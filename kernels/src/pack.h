// Brings a weight [columns, inner], row by row, into blocks of 16 columns where it lies: see product.h.
#pragma once

#include "product.h"

namespace {

// A matrix that needs no padding: columns are a multiple of 32, and the bytes of a column one of 64.
struct PackJob {
    char* matrix;
    int64_t bytes;  // of a column
};

// A block takes the place of its own 16 columns.
inline int32_t pack_blocks(const PackJob& job, int64_t begin, int64_t end) {
    Room copy(16 * job.bytes);
    if (!copy.at) return GK_NO_MEMORY;
    const char* from = copy.of<char>();
    for (int64_t block = begin; block < end; block++) {
        char* to = job.matrix + block * 16 * job.bytes;
        memcpy(copy.of<char>(), to, 16 * job.bytes);
        for (int64_t k = 0; k < job.bytes; k += 64)  // a cache line of each of the columns at a time
            for (int64_t c = 0; c < 16; c++)
                for (int64_t i = k; i < k + 64; i += 4) memcpy(to + i * 16 + c * 4, from + c * job.bytes + i, 4);
    }
    return 0;
}

}  // namespace
