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

// Magnitudes, as the bits of positive floats, and numbers of uses have the same order as unsigned numbers.
struct Largest {
    uint32_t least;  // the least key that is taken
    int64_t ties;    // how many keys of this value are taken
    // Finds the `count` largest of keys, by 11, 11 and 10 of their bits.
    Largest(const uint32_t* keys, int64_t number, int64_t count) : least(0), ties(count) {
        uint32_t mask = 0;
        for (int shift : {21, 10, 0}) {
            int64_t bins[2048] = {};
            const uint32_t bits = shift ? 2047 : 1023;
            for (int64_t i = 0; i < number; i++)
                if ((keys[i] & mask) == least) bins[(keys[i] >> shift) & bits]++;
            uint32_t bin = bits;
            while (bin && bins[bin] < ties) ties -= bins[bin--];
            least |= bin << shift;
            mask |= bits << shift;
        }
    }
    // Of equal keys the first ones are taken, so this must be asked for each key in turn.
    bool takes(uint32_t key) { return key > least || (key == least && ties-- > 0); }
};

int32_t choose_columns(const gk_cache& cache, const float* values, int64_t count, gk_choice& choice) {
    const int64_t most = larger(cache.columns, cache.capacity);
    Room room(most * 12);
    if (!room.at) return GK_NO_MEMORY;
    uint32_t* keys = room.of<uint32_t>();
    int64_t* missing = (int64_t*)(room.of<char>() + up(most * 4, 8));
    for (int64_t i = 0; i < cache.columns; i++) {
        const float size = bits<float>(bits<uint32_t>(values[i]) & 0x7fffffffu);
        keys[i] = bits<uint32_t>(cache.slots[i] < 0 ? size * cache.preference : size);
    }
    int64_t hits = 0, absent = 0;
    Largest chosen(keys, cache.columns, count);
    for (int64_t i = 0; i < cache.columns; i++) {
        if (!chosen.takes(keys[i])) continue;
        cache.uses[i]++;
        if (cache.slots[i] < 0) missing[absent++] = i;
        else choice.columns[hits] = i, choice.slots[hits++] = cache.slots[i];
    }
    choice.hits = hits;
    for (int64_t i = 0; i < absent; i++) choice.columns[hits + i] = missing[i], choice.slots[hits + i] = -1;
    // The most used of the missing columns take the slots of the least used columns.
    const int64_t admitted = smaller(absent, cache.capacity - hits);
    if (admitted > 0) {
        for (int64_t i = 0; i < absent; i++) keys[i] = uint32_t(smaller<int64_t>(cache.uses[missing[i]], 0x7fffffff));
        Largest used(keys, absent, admitted);
        int64_t next = 0;
        for (int64_t i = 0; i < absent; i++)
            if (used.takes(keys[i])) missing[next++] = hits + i;
        for (int64_t slot = 0; slot < cache.capacity; slot++) {
            const int64_t column = cache.held[slot];
            keys[slot] = column < 0 ? ~0u : ~1u - uint32_t(smaller<int64_t>(cache.uses[column], 0x7fffffff));
        }
        for (int64_t i = 0; i < hits; i++) keys[choice.slots[i]] = 0;
        Largest idle(keys, cache.capacity, admitted);
        next = 0;
        for (int64_t slot = 0; slot < cache.capacity && next < admitted; slot++) {
            if (!idle.takes(keys[slot])) continue;
            if (cache.held[slot] >= 0) cache.slots[cache.held[slot]] = -1;
            const int64_t place = missing[next++], column = choice.columns[place];
            cache.held[slot] = column;
            cache.slots[column] = choice.slots[place] = slot;
        }
    }
    int64_t beside = cache.capacity;
    for (int64_t i = hits; i < hits + absent; i++)
        if (choice.slots[i] < 0) choice.slots[i] = beside++;
    return 0;
}

}  // namespace
