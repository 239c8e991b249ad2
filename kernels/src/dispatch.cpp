// Finds what the processor has, and passes calls on to the level that was chosen. Compiled for the oldest processor.
#include <string.h>

#include "level.h"
#include "reading.h"
#include "levels.inc"  // made by the build: the levels of this platform, the best first

#if defined(GK_EMULATED_ARM)
#elif defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(_WIN32)
#include <windows.h>
#endif

namespace {

struct Found {
    bool avx2 = false, avx2vnni = false, avx512 = false, avx512bf16 = false, amx = false;
    bool neon = false, neondot = false, neonmm = false, portable = true;
};

#if defined(GK_EMULATED_ARM)  // in tests
Found find() {
    Found found;
    found.neon = found.neondot = found.neonmm = true;
    return found;
}
#elif defined(__x86_64__) || defined(_M_X64)
uint64_t enabled_states() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t(high) << 32) | low;
}

bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}

Found find() {
    Found found;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return found;  // OSXSAVE
    const bool fma = (c & (1u << 12)) && (c & (1u << 29));                   // FMA, F16C
    const uint64_t states = enabled_states();
    const bool ymm = (states & 0x6) == 0x6, zmm = (states & 0xe6) == 0xe6, tmm = (states & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    const uint32_t leaves = a, b7 = b, c7 = c, d7 = d;
    uint32_t a71 = 0;
    if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) a71 = a;
    found.avx2 = ymm && fma && (b7 & (1u << 5));
    found.avx2vnni = found.avx2 && (a71 & (1u << 4));
    const bool f = b7 & (1u << 16), dq = b7 & (1u << 17), bw = b7 & (1u << 30), vl = b7 & (1u << 31);
    found.avx512 = found.avx2 && zmm && f && dq && bw && vl && (c7 & (1u << 11));
    found.avx512bf16 = found.avx512 && (a71 & (1u << 5));
    found.amx = found.avx512bf16 && tmm && (d7 & (1u << 22)) && (d7 & (1u << 24)) && (d7 & (1u << 25)) && tiles_permitted();
    return found;
}
#elif defined(__aarch64__)
Found find() {
    Found found;
    found.neon = true;
#if defined(__linux__)
    const unsigned long caps = getauxval(AT_HWCAP), more = getauxval(AT_HWCAP2);
    found.neondot = caps & (1ul << 20);                                             // ASIMDDP
    found.neonmm = found.neondot && (more & (1ul << 13)) && (more & (1ul << 14));    // I8MM, BF16
#elif defined(__APPLE__)
    auto has = [](const char* name) {
        int value = 0;
        size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
    };
    found.neondot = has("hw.optional.arm.FEAT_DotProd");
    found.neonmm = found.neondot && has("hw.optional.arm.FEAT_I8MM") && has("hw.optional.arm.FEAT_BF16");
#elif defined(_WIN32)
    // By number: older headers lack the names PF_ARM_V82_DP, PF_ARM_V82_I8MM and PF_ARM_V86_BF16_INSTRUCTIONS_AVAILABLE.
    found.neondot = IsProcessorFeaturePresent(43);
    found.neonmm = found.neondot && IsProcessorFeaturePresent(66) && IsProcessorFeaturePresent(68);
#endif
    return found;
}
#else
Found find() { return Found(); }
#endif

const Level* chosen = nullptr;
gk_parallel pool = nullptr;
thread_local Host host{nullptr, 1};  // each thread that calls may compute with another number of threads

}  // namespace

int32_t gk_version() { return GK_VERSION; }

const char* gk_start(gk_parallel parallel, int32_t threads, const char* name) {
    const Found found = find();
    const char* started = nullptr;
    // The first level of the list that is there, or the named one.
#define GK_TRY(level)                                                   \
    if (!started && found.level && (!name || !strcmp(name, #level))) { \
        chosen = &gk_level_##level;                                     \
        started = #level;                                               \
    }
    GK_LEVELS(GK_TRY)
#undef GK_TRY
    if (!started) return nullptr;
    pool = parallel;
    host = {parallel, threads};
    chosen->start();
    return started;
}

void gk_levels(char* names, int32_t size) {
    const Found found = find();
    names[0] = 0;
#define GK_ADD(level)                                                                        \
    if (found.level && int32_t(strlen(names) + strlen(#level) + 2) <= size) {                \
        if (names[0]) strcat(names, " ");                                                    \
        strcat(names, #level);                                                               \
    }
    GK_LEVELS(GK_ADD)
#undef GK_ADD
}

int32_t gk_has(int32_t dtype) { return chosen && (dtype != GK_BF16 || chosen->bf16); }
void gk_threads(int32_t threads) { host = {pool, threads}; }

int32_t gk_pack(int32_t dtype, void* matrix, int64_t columns, int64_t inner) {
    return chosen->pack(host, dtype, matrix, columns, inner);
}
int32_t gk_run_linear(const gk_linear* l) { return l->rows ? chosen->linear(host, l) : 0; }
int32_t gk_run_chain(const gk_linear steps[3]) { return steps->rows ? chosen->chain(host, steps) : 0; }
int32_t gk_run_attention(const gk_attention* a) { return a->count ? chosen->attention(host, a) : 0; }
int32_t gk_run_features(const gk_features* f) { return f->count ? chosen->features(host, f) : 0; }
int32_t gk_run_embed(const gk_embed* e) { return e->count ? chosen->embed(host, e) : 0; }
int32_t gk_run_rows(int32_t states, int64_t rows, int64_t width, const gk_rows* x, const gk_norm* norm, const gk_rows* output,
                    const gk_rows* quantised) {
    return rows ? chosen->rows(host, states, rows, width, x, norm, output, quantised) : 0;
}
int32_t gk_run_heads(int32_t states, int64_t rows, int64_t heads, int64_t size, const gk_rows* x, const gk_norm* norm,
                     const float* cosine, const float* sine) {
    return rows ? chosen->heads(host, states, rows, heads, size, x, norm, cosine, sine) : 0;
}
int32_t gk_run_columns(const gk_columns* c) { return c->count ? chosen->columns(host, c) : 0; }
int32_t gk_unpack_columns(const gk_columns* c, int32_t dtype, void* states) {
    return c->count ? chosen->unpack_columns(host, c, dtype, states) : 0;
}
int32_t gk_choose(gk_choice* choice) { return chosen->choose(choice); }
void* gk_begin_reading(
    int32_t file, int64_t count, const int64_t* starts, const int64_t* sizes, void* to, const int64_t* places) {
    return begin_reading(file, count, starts, sizes, to, places);
}
int64_t gk_end_reading(void* reading) { return end_reading(reading); }
int32_t gk_run_token(const gk_token* t) { return chosen->token(host, t); }
