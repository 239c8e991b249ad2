// Dynamic input pruning: a token chooses columns of a matrix, and sums them, each times a value. Columns lie as rows of a table.
// Entries of 8 or 4 bits are in groups of 32. A row of 8 bits has its entries, then the float16 scale of each group. A row of 4
// bits has its entries, then the scale and then the minimum of each group as int8, and two floats that multiply these: an entry q
// stands for scale * q + minimum. A group of 4 bits is 16 bytes: the low halves are its first 16 entries.
#pragma once

#include "vector.h"

namespace {

constexpr int64_t IN_GROUP = 32;
constexpr int64_t SHARED = 512;      // entries of rows that a thread takes at once: whole groups of scales
constexpr int64_t FEW = 1 << 15;     // entries in all that one thread sums sooner than several
constexpr int AT_A_TIME = 8;  // rows that are read side by side, so that sums stay in registers that long

// The first n <= W float16 entries; the others are zero.
GK_INLINE vf load_halves(const uint16_t* p, int64_t n) {
    uint16_t x[W] = {};
    if (n >= W) return load_half(p);
    memcpy(x, p, n * sizeof *p);
    return load_half(x);
}

template <int BITS> struct GroupedRow {
    const uint8_t* entries;
    const char *scale, *minimum;
    float factors[2];
    GroupedRow() = default;
    GroupedRow(const char* at, int64_t groups)
        : entries((const uint8_t*)at), scale(at + groups * IN_GROUP * BITS / 8), minimum(scale + groups) {
        if (BITS == 4) memcpy(factors, minimum + groups, sizeof factors);
    }
    // The scales and the minima of n groups, W at most.
    GK_INLINE vf scales(int64_t first, int64_t n) const {
        if (BITS == 8) return load_halves((const uint16_t*)scale + first, n);
        return load_at((const int8_t*)scale, first, first + n) * all(factors[0]);
    }
    GK_INLINE vf minima(int64_t first, int64_t n) const { return load_at((const int8_t*)minimum, first, first + n) * all(factors[1]); }
    // The entries of a group as numbers, W at a time.
    GK_INLINE vf at(int64_t group, int part) const {
        if (BITS == 8) return load((const int8_t*)entries + group * IN_GROUP + part * W);
        vub x;
        const int first = part * W;
        memcpy(&x, entries + group * 16 + first % 16, sizeof x);
        return __builtin_convertvector(vi(__builtin_convertvector(first < 16 ? x & 15 : x >> 4, vu)), vf);
    }
};

struct ColumnsJob {
    const gk_columns& c;
    const char* row(int64_t number) const { return (const char*)c.table + c.places[number]; }
};

// The sums of R rows are added to entries [begin, end) of the output.
template <class T, int R> void add_rows(const ColumnsJob& job, int64_t row, int64_t begin, int64_t end) {
    const T* rows[R];
    vf values[R];
    for (int r = 0; r < R; r++) rows[r] = (const T*)job.row(row + r), values[r] = all(job.c.values[row + r]);
    for (int64_t i = begin; i < end; i += W) {
        vf total = load_at(job.c.output, i, end);
        for (int r = 0; r < R; r++) total = fma(load_at(rows[r], i, end), values[r], total);
        store_at(job.c.output, i, end, total);
    }
}

// Of W groups at a time, the scales are multiplied by the values first.
template <int BITS, int R> void add_grouped(const ColumnsJob& job, int64_t row, int64_t begin, int64_t end) {
    const int64_t groups = up(job.c.length, IN_GROUP) / IN_GROUP;
    GroupedRow<BITS> rows[R];
    for (int r = 0; r < R; r++) rows[r] = {job.row(row + r), groups};
    for (int64_t first = begin / IN_GROUP; first * IN_GROUP < end; first += W) {
        const int64_t count = smaller<int64_t>(W, groups - first);
        float scales[R][W], shift[W];
        vf shifts{};
        for (int r = 0; r < R; r++) {
            const vf value = all(job.c.values[row + r]);
            store(scales[r], rows[r].scales(first, count) * value);
            if (BITS == 4) shifts = fma(rows[r].minima(first, count), value, shifts);
        }
        store(shift, shifts);
        for (int64_t g = 0; g < count; g++)
            for (int part = 0; part < IN_GROUP / W; part++) {
                const int64_t i = (first + g) * IN_GROUP + part * W;
                if (i >= end) break;
                vf total = load_at(job.c.output, i, end);
                if (BITS == 4) total += all(shift[g]);
                for (int r = 0; r < R; r++) total = fma(rows[r].at(first + g, part), all(scales[r][g]), total);
                store_at(job.c.output, i, end, total);
            }
    }
}

template <int R> void add_columns(const ColumnsJob& job, int64_t row, int64_t begin, int64_t end) {
    switch (job.c.format) {
        case GK_F32: return add_rows<float, R>(job, row, begin, end);
        case GK_BF16: return add_rows<bf16, R>(job, row, begin, end);
        case GK_Q8: return add_grouped<8, R>(job, row, begin, end);
        default: return add_grouped<4, R>(job, row, begin, end);
    }
}
void run_columns(const ColumnsJob& job, int64_t begin, int64_t end) {
    int64_t row = 0;
    for (; row + AT_A_TIME <= job.c.count; row += AT_A_TIME) add_columns<AT_A_TIME>(job, row, begin, end);
    for (; row < job.c.count; row++) add_columns<1>(job, row, begin, end);
}

// A row as states of type T.
template <class T> void unpack_column(const ColumnsJob& job, int64_t row, T* output) {
    const int64_t length = job.c.length, groups = up(length, IN_GROUP) / IN_GROUP;
    auto straight = [&](auto* entries) {
        for (int64_t i = 0; i < length; i += W) store_at(output, i, length, load_at(entries, i, length));
    };
    auto grouped = [&](auto entries, bool minima) {
        for (int64_t first = 0; first < groups; first += W) {
            const int64_t count = smaller<int64_t>(W, groups - first);
            float scale[W], minimum[W] = {};
            store(scale, entries.scales(first, count));
            if (minima) store(minimum, entries.minima(first, count));
            for (int64_t g = first; g < first + count; g++)
                for (int64_t i = g * IN_GROUP, part = 0; part < IN_GROUP / W && i < length; part++, i += W)
                    store_at(output, i, length, fma(entries.at(g, int(part)), all(scale[g - first]), all(minimum[g - first])));
        }
    };
    switch (job.c.format) {
        case GK_F32: return straight((const float*)job.row(row));
        case GK_BF16: return straight((const bf16*)job.row(row));
        case GK_Q8: return grouped(GroupedRow<8>(job.row(row), groups), false);
        default: return grouped(GroupedRow<4>(job.row(row), groups), true);
    }
}

// Returns the least of the `count` largest keys, by 11, 11 and 10 of their bits. Magnitudes, as the bits of positive floats, have
// the same order as unsigned numbers.
inline uint32_t least_of_largest(const uint32_t* keys, int64_t number, int64_t count) {
    uint32_t least = 0, mask = 0;
    for (int shift : {21, 10, 0}) {
        int64_t bins[2048] = {};
        const uint32_t bits = shift ? 2047 : 1023;
        for (int64_t i = 0; i < number; i++)
            if ((keys[i] & mask) == least) bins[(keys[i] >> shift) & bits]++;
        uint32_t bin = bits;
        while (bin && bins[bin] < count) count -= bins[bin--];
        least |= bin << shift;
        mask |= bits << shift;
    }
    return least;
}

// Columns are chosen if their magnitudes are among the `count` largest. If reads cost anything, all columns in memory are used,
// because they are there. The others lie on disk one behind the other, and what is read is used. So they are used in runs: a column is worth the square of its magnitude, as a share of the least one that
// would be chosen, less 1; a run costs a read; and the runs are those with the largest sum. Without such a cost, the largest
// columns are used.
int32_t choose_columns(gk_choice& c) {
    Room room(c.columns * 5);
    if (!room.at) return GK_NO_MEMORY;
    uint32_t* keys = room.of<uint32_t>();
    uint8_t* steps = (uint8_t*)(keys + c.columns);
    for (int64_t i = 0; i < c.columns; i++) {
        const float size = bits<float>(bits<uint32_t>(c.values[i]) & 0x7fffffffu);
        keys[i] = bits<uint32_t>(i < c.resident ? size : size * c.preference);
    }
    // Columns that are 0 add nothing.
    const uint32_t least = larger(least_of_largest(keys, c.columns, c.count), uint32_t(1));
    const bool reads = c.cost > 0 && c.resident < c.columns;
    c.used = 0;
    for (int64_t i = 0; i < c.resident; i++)
        if (reads || keys[i] >= least) c.places[c.used++] = i;
    c.hits = c.used;
    // What the best runs so far are worth if the last of them goes on, and if it has ended.
    double open = -INFINITY, closed = 0;
    const double share = bits<float>(least);
    for (int64_t i = c.resident; i < c.columns; i++) {
        const double size = bits<float>(keys[i]) / share, begun = closed - c.cost;
        const bool goes_on = open >= begun;
        open = (goes_on ? open : begun) + (size * size - 1);
        const bool ends = open >= closed;
        closed = ends ? open : closed;
        steps[i] = uint8_t(goes_on | ends << 1);
    }
    bool used = false;
    for (int64_t i = c.columns - 1; i >= c.resident; i--) {
        const uint8_t step = steps[i];
        used = used || step & 2;
        steps[i] = used;
        used = used && step & 1;
    }
    for (int64_t i = c.resident; i < c.columns; i++)
        if (steps[i]) c.places[c.used++] = i;
    return 0;
}

}  // namespace
