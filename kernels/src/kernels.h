// The C interface of grating-kernels. Python reads it with ctypes: grating_kernels/__init__.py mirrors each struct.
// Strides count elements. All functions but the first five return 0, or what went wrong.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define GK_API extern "C" __declspec(dllexport)
#else
#define GK_API extern "C" __attribute__((visibility("default")))
#endif

// Raised whenever a struct or the meaning of a function changes: a module of another version is refused.
#define GK_VERSION 11
#define GK_NO_MEMORY 1
#define GK_NO_ROW 2  // a table lacks a row
#define GK_TABLES 3

enum gk_dtype { GK_INT8 = 0, GK_BF16 = 1, GK_F32 = 2 };
// Formats of weights: a dtype, or entries of 8 or 4 bits in groups of 32 inner entries that share a scale, see unpack.h. In GK_Q4Z
// the scale has a byte, and another one says which entry of 4 bits stands for zero.
enum gk_format { GK_Q8 = 3, GK_Q4 = 4, GK_Q4Z = 5 };
enum gk_activation { GK_NONE = 0, GK_GELU = 1, GK_GELU_TANH = 2, GK_SILU = 3, GK_RELU = 4, GK_TANH = 5 };
enum gk_pooling { GK_FIRST = 0, GK_LAST = 1, GK_MEAN = 2 };
enum gk_norm_kind { GK_NO_NORM = 0, GK_LAYER_NORM = 1, GK_RMS_NORM = 2 };

// A norm. weight and bias (null for none) are float32 [width].
struct gk_norm {
    int32_t kind;
    float eps;
    float offset;  // added to the weight
    const float* weight;
    const float* bias;
};

// A packed weight [columns, inner]. scale and sums (of int8) and bias (null for none) are float32 [columns padded to 32]. A sum is
// that of a column's entries times its scale. Entries of int8 rows and weights lie in -127 ... 127. scale and minimum of groups are
// float16 [blocks of 16 columns, groups, 16]. Of GK_Q4Z, scale is uint8 [blocks of 16 columns, groups, 2, 16], a scale and a zero in
// sixteenths, and factor is float32 [columns padded to 32]: an entry q stands for factor * scale * (q - zero / 16).
struct gk_weight {
    const void* packed;
    const void* scale;
    const void* minimum;  // added to the entries of a group; null for 0 with 8 bits, and for -8 times the scale with 4 bits
    const float* factor;
    const float* sums;
    const float* bias;
    int64_t columns;
    int64_t inner;
    int32_t format;       // a gk_dtype or gk_format
};

// Rows of states, or of quantised states. Of those, scale is float32 [rows, 2]: entry q stands for scale[0] * q + scale[1].
struct gk_rows {
    void* data;
    int64_t stride;
    float* scale;
};

// output = norm(residual + factor * first_norm(activation(x @ weight + bias)))
// With a gate, the activation is of x @ gate, and multiplies x @ weight. Every part may be absent.
struct gk_linear {
    int32_t dtype;       // of x. Weights are of the same format or, where x is not int8, int8 or grouped.
    int32_t states;      // dtype of residual, total and output: GK_BF16 or GK_F32
    int32_t activation;
    float factor;
    int64_t rows;
    gk_rows x;
    gk_weight weight;
    gk_weight gate;      // packed is null for none
    gk_norm first_norm;
    gk_norm norm;
    gk_rows residual;    // data is null for none
    gk_rows total;       // the sum before the norm; data is null if it is not asked for
    gk_rows output;      // data is null if it is not asked for
    gk_rows quantised;   // int8 rows of the output, padded with zeros to a multiple of 64; data is null for none
};

// Queries of consecutive tokens of one sequence, and the keys and values that they may see.
struct gk_span {
    int64_t start;        // place of the first query among the rows
    int64_t length;       // number of queries
    int64_t first;        // position of the first query among the keys
    int64_t keys;         // number of keys and values
    int64_t place;        // row of the first of them that is not shared
    int64_t shared;       // number of shared ones, which come first
};

struct gk_attention {
    int32_t states;       // dtype: GK_BF16 or GK_F32
    int32_t causal;
    int64_t heads;
    int64_t key_heads;
    int64_t head_size;
    int64_t window;       // 0 for none: a token sees those at a distance below it
    float scaling;
    float softcap;        // 0 for none
    const void* query;    // [rows, heads, head_size]
    int64_t query_stride;
    const void* key;      // [rows, key_heads, head_size], with a stride for each row
    int64_t key_stride;
    const void* value;
    int64_t value_stride;
    const void* shared_key;    // the first keys and values of some spans; null for none
    int64_t shared_key_stride;
    const void* shared_value;
    int64_t shared_value_stride;
    void* output;         // [rows, heads, head_size]
    int64_t output_stride;
    const gk_span* spans;
    int64_t count;
    // Relative positions, which need as many heads of keys as of queries; null for none.
    const void* position_key;      // [rows, heads, head_size]; null for no products of queries with them
    int64_t position_key_stride;
    const void* position_query;    // likewise, for products with keys
    int64_t position_query_stride;
    const int32_t* position_rows;  // the row of each distance of a query from a key, from -reach on to reach
    int64_t reach;                 // at least the largest distance
};

// A sequence, which may begin with a shared prefix, and two texts in it: the numbers of the first token and of that behind the last.
struct gk_sequence {
    int64_t start;   // row of the first own token
    int64_t length;  // number of own tokens
    int64_t query[2];
    int64_t document[2];
    int64_t shared;  // number of tokens of the prefix
};

// The features of a lens, of sequences that are whole.
struct gk_features {
    int32_t states;        // dtype: GK_BF16 or GK_F32
    int32_t pooling;       // the own token that the head reads, or the mean of all
    int32_t similarities;  // whether the tokens of the texts are compared
    int64_t width;
    int64_t stride;        // of states
    const void* prefix;    // states of the prefix
    const void* own;       // states of all own tokens
    const gk_sequence* sequences;
    int64_t count;
    float* output;         // [count, 4 width], or [count, 5 width + 5] with similarities
    int64_t output_stride;
};

// A row of a table for each token. The table [count, width] is contiguous.
struct gk_lookup {
    const void* table;
    int64_t count;
    const int64_t* rows;
};

// output = norm(factor * first + second + ...), for each token, of its rows of the tables.
struct gk_embed {
    int32_t states;  // dtype of tables and output: GK_BF16 or GK_F32
    int32_t tables;  // number of lookups, at least one
    float factor;
    int64_t count;   // of tokens
    int64_t width;
    gk_lookup lookups[GK_TABLES];
    gk_norm norm;
    gk_rows output;
};

// Some columns of a matrix, which lie as rows of a table, see columns.h.
struct gk_columns {
    int32_t format;         // GK_F32, GK_BF16, GK_Q8 or GK_Q4
    int64_t length;         // entries of a row
    int64_t count;          // rows
    const void* table;
    const int64_t* places;  // bytes from the table's begin to each row
    const float* values;    // [count]
    float* output;          // [length]: the sum of the rows, each times its value, is added
};

// The choice of the columns of a table that a token uses. The first columns are in memory.
struct gk_choice {
    const float* values;  // of each column [columns]
    int64_t columns, resident;
    int64_t count;        // how many columns would be used if all were in memory
    float preference;     // factor of the magnitudes of columns that are not in memory
    double cost;          // of a read, in columns
    int64_t* places;      // of the columns that are used, rising [columns]
    int64_t used, hits;   // how many there are, and how many of them are in memory
};

// A layer of a decoder:
//   states += factor * attention_norm(output(attention(input_norm(states))))
//   states += factor * output_norm(down(activation(gate(x)) * up(x))), x = mlp_norm(states)
// Norms with kind GK_NO_NORM leave states as they are. The last layer of a call may lack its MLP, which is computed elsewhere.
struct gk_token_layer {
    gk_weight query, key, value, output;
    gk_weight gate;       // packed is null for none
    gk_weight up, down;   // packed is null for both if the MLP is lacking
    gk_norm input_norm, query_norm, key_norm, attention_norm, mlp_norm, output_norm;
    int64_t heads;
    int64_t key_heads;
    int64_t head_size;
    int64_t window;       // 0 for none
    int32_t activation;
    int32_t angles;       // number of the angles that queries and keys turn by; -1 for none
    float scaling;
    float softcap;        // 0 for none
    float factor;
};

// Keys and values of a sequence in one layer: [tokens, key_heads, head_size], with room for one token more.
struct gk_memory {
    void* key;
    void* value;
    float* key_scale;     // of GK_INT8 [tokens, key_heads], entry q stands for scale * q; else null
    float* value_scale;
    int64_t stride;       // from token to token
    int32_t dtype;
};

// One token through consecutive layers, and perhaps through the output embedding.
struct gk_token {
    int64_t width;
    int64_t count;        // of layers
    int64_t tokens;       // before this one
    const gk_token_layer* layers;
    const gk_memory* memory;     // of each layer
    const float* const* cosine;  // of each kind of angles, [head_size / 2]
    const float* const* sine;
    float* row;           // hidden states [width], before the layers and then behind them
    gk_norm final_norm;
    gk_weight head;       // the output embedding; packed is null if logits are not asked for
    int32_t table;        // whether the head is a table of GK_BF16 or GK_F32 that is not packed
    float* logits;        // [columns of the head]
    float* normed;        // mlp_norm(states) [width] of the last layer if its MLP is lacking; else null
};

// The pool of the host: what torch_parallel_for of torch's C interface is.
typedef int32_t (*gk_parallel)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

GK_API int32_t gk_version();
// Chooses the best level that this processor has, or the one that is named; returns its name, or null if there is none.
GK_API const char* gk_start(gk_parallel parallel, int32_t threads, const char* level);
// Writes the names of the levels that this processor has, the best first, with spaces between; at most `size` bytes.
GK_API void gk_levels(char* names, int32_t size);
// Whether products of this dtype are compiled for the level that was chosen.
GK_API int32_t gk_has(int32_t dtype);
// Sets the number of threads of the calls that this thread makes.
GK_API void gk_threads(int32_t threads);

// Packs a matrix [columns, inner] in its own memory; it must need no padding, see pack.h.
GK_API int32_t gk_pack(int32_t dtype, void* matrix, int64_t columns, int64_t inner);
GK_API int32_t gk_run_linear(const gk_linear*);
// Three maps one behind the other: what attention gave, what the MLP has inside, and the layer's output. What lies between
// them stays in the cache: where data of it is not null, it is asked for, and lives elsewhere. The second map takes the
// first one's output or its quantised rows, by its dtype; the third takes the second one's. The third's residual is the first
// one's total, or its output if there is no total. The third's output may lie where the first one's residual does.
GK_API int32_t gk_run_chain(const gk_linear steps[3]);
GK_API int32_t gk_run_attention(const gk_attention*);
GK_API int32_t gk_run_features(const gk_features*);
GK_API int32_t gk_run_embed(const gk_embed*);
// The rows of `norm(x)`, states of the dtype `states` [rows, width]: as states, or quantised, or both.
GK_API int32_t gk_run_rows(
    int32_t states, int64_t rows, int64_t width, const gk_rows* x, const gk_norm* norm, const gk_rows* output,
    const gk_rows* quantised);
// Norm (of each head) and rotation in place of states [rows, heads, size]; cosine and sine are float32 [rows, size / 2].
GK_API int32_t gk_run_heads(
    int32_t states, int64_t rows, int64_t heads, int64_t size, const gk_rows* x, const gk_norm* norm,
    const float* cosine, const float* sine);
GK_API int32_t gk_run_columns(const gk_columns*);
// The rows as states of a dtype [count, length]; values and output of the columns are not used.
GK_API int32_t gk_unpack_columns(const gk_columns*, int32_t dtype, void* states);
// Chooses columns for one token: see choose_columns.
GK_API int32_t gk_choose(gk_choice*);
// Begins to read pieces of a file with threads of its own. The arrays and the memory must stay until the reading has ended.
// Null where the system cannot do so.
GK_API void* gk_begin_reading(
    int32_t file, int64_t count, const int64_t* starts, const int64_t* sizes, void* to, const int64_t* places);
// Waits, and frees the reading. Returns how many pieces were read as a whole, from the first on.
GK_API int64_t gk_end_reading(void* reading);
// Keys and values of the token are added to the memory. The states do not depend on the number of threads.
GK_API int32_t gk_run_token(const gk_token*);
