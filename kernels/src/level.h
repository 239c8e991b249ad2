// What a level offers to the dispatcher.
#pragma once

#include "kernels.h"

// The host's pool of threads.
struct Host {
    gk_parallel parallel;
    int32_t threads;
};

struct Level {
    bool bf16;
    void (*start)();
    int32_t (*linear)(const Host&, const gk_linear*);
    int32_t (*chain)(const Host&, const gk_linear*);
    int32_t (*attention)(const Host&, const gk_attention*);
    int32_t (*features)(const Host&, const gk_features*);
    int32_t (*embed)(const Host&, const gk_embed*);
    int32_t (*rows)(const Host&, int32_t, int64_t, int64_t, const gk_rows*, const gk_norm*, const gk_rows*, const gk_rows*);
    int32_t (*heads)(const Host&, int32_t, int64_t, int64_t, int64_t, const gk_rows*, const gk_norm*, const float*, const float*);
    int32_t (*pack)(const Host&, int32_t, void*, int64_t, int64_t);
    int32_t (*columns)(const Host&, const gk_columns*);
    int32_t (*unpack_columns)(const Host&, const gk_columns*, int32_t, void*);
    int32_t (*choose)(gk_choice*);
    int32_t (*token)(const Host&, const gk_token*);
};
