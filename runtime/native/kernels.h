// The inner loops, one table of them for each instruction set. Chosen at run time; each table is
// compiled with its own flags, so nothing here may be an inline function that the linker could
// share between files.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packed.h"

namespace elsa {

// Ascending: each includes the ones before it.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512vnni = 3 };

// What a kernel multiplies: the stored type, and for int8 weights the type of the activations.
enum class Kind : int { f32 = 0, bf16 = 1, f16 = 2, s8 = 3, s8_by_s16 = 4 };
constexpr int kKinds = 5;

constexpr std::size_t kTile = 64;       // most tokens of a prefill tile
constexpr std::size_t kSliceTile = 16;  // and of one of slices

// Functions of one number that stand between products.
enum class Function : int { sigmoid = 0, silu = 1, relu = 2, gelu = 3, gelu_tanh = 4 };
constexpr int kFunctions = 5;

// Tokens as a decode kernel wants them. Rows are padded with zeros to a multiple of 64 columns.
struct Activations {
    std::size_t tokens = 0;
    std::size_t stride = 0;                 // elements between tokens
    const float* values = nullptr;          // all kinds but s8_by_s16
    const float* split = nullptr;           // wants_split: of 32 columns the even, then the odd
    const std::int32_t* quantised = nullptr;  // s8_by_s16: low 16 bits the value, high 16 bits zero
    // s8_by_s16, wants_shifted: value + 32768, of a token first the high bytes, then the low ones.
    const std::uint8_t* shifted = nullptr;
    const float* scales = nullptr;  // (tokens), s8_by_s16
    // Lanes of floats: of a token the first bytes of all values, then the second ones, ... (4, stride).
    const std::uint8_t* planes = nullptr;
};

// Where results go: y[token * stride + row] = sum * scales + bias[row].
struct Output {
    float* y = nullptr;
    std::size_t stride = 0;
    const float* bias = nullptr;  // may be missing
};

// A row's non-zeros in one cut of columns.
struct Piece {
    const float* value = nullptr;
    const std::uint16_t* offset = nullptr;  // (column - the cut's first) * width
    std::size_t count = 0;
};

// Non-zeros of some rows as plain lists, for prefill, cut by columns so that the activations of a
// cut stay in the first cache.
struct WorkList {
    std::uint16_t* offset = nullptr;
    float* value = nullptr;
    Piece* pieces = nullptr;  // (cuts, rows)
    std::size_t rows = 0, cuts = 0;
    std::size_t cut_chunks = 1;  // chunks of 64 columns in a cut; cut_chunks * width <= 1024
    std::size_t width = kTile;   // tokens side by side: 8, 16, 32 or 64
};
constexpr std::size_t kListGap = 64;  // entries that may be written behind the lists

// Where keys or values are copied to while they are read. `past`: past the caches.
struct KeptCopy {
    float* to = nullptr;
    bool past = false;
};

// A step of Adam on parameters that lie one behind the other; what belongs to blocks of 256 of them is
// there for whole blocks.
struct AdamStep {
    float* weights = nullptr;
    const float* gradients = nullptr;
    std::int8_t* m = nullptr;
    float* m_scales = nullptr;
    std::uint8_t* v = nullptr;
    float* v_scales = nullptr;
    const float* noise = nullptr;  // in [0, 1)
    std::size_t count = 0;
    // Of the first moment 1 - beta1, of the second beta2 and 1 - beta2.
    float fresh1 = 0.0f, kept2 = 0.0f, fresh2 = 0.0f;
    float eps = 0.0f;
    float correction = 1.0f;  // of the root of the second moment
    float rate = 0.0f;        // of the step
};

struct Kernels {
    Isa isa = Isa::portable;
    // All tokens, units [first, last) of the weight.
    using Decode = void (*)(const Packed&, const Activations&, const Output&, std::size_t first,
                            std::size_t last);
    Decode bitmap[kKinds] = {};
    Decode lanes[kKinds] = {};  // units are those of lanes.h; may be missing
    Decode sliced[kKinds] = {};
    Decode rows[kKinds] = {};
    bool wants_split = false;    // of bf16 bitmaps and rows
    bool wants_shifted = false;  // of s8_by_s16 bitmaps and rows

    // A token's activations as integers (quantise.inc); its scale.
    float (*quantise)(const float* x, std::size_t columns, std::size_t stride,
                      std::int32_t levels, std::int32_t* words, std::uint8_t* bytes) = nullptr;

    // A token's activations as planes (to: 4 planes of `stride` bytes, zeros behind `count`).
    void (*split_bytes)(const float* x, std::size_t count, std::uint8_t* to,
                        std::size_t stride) = nullptr;

    // One group of a bitmap, or of rows -> its four rows with their zeros, (4, chunks * 64).
    void (*widen[4])(const Packed&, std::size_t group, float* rows) = {};
    // sums[token][4] = the four rows times each token; all of `columns`, a multiple of 64. `ask`: what
    // lies behind the rows will be read next.
    void (*four_rows)(const float* rows, const float* x, std::size_t columns, std::size_t tokens,
                      float* sums, bool ask) = nullptr;

    // Units [first, last) of a bitmap -> lists.
    void (*list_bitmap[4])(const Packed&, std::size_t first, std::size_t last, WorkList&) = {};
    // yt[row][width] (+)= pieces * xt[column][width], the first 8 * eights tokens. `begin`: the
    // sums start from zero.
    void (*tile)(const WorkList&, const Piece* pieces, bool begin, const float* xt, float* yt,
                 std::size_t eights) = nullptr;
    // A slice -> what `slice` reads: (steps, 16) columns * width, and the values.
    void (*list_slice[4])(const Packed&, std::size_t slice, std::size_t width,
                          std::uint32_t* offset, float* value) = {};
    // yt[order[r]][width] = row r of a slice * xt[column][width], for `rows` of 16; width 8 or 16.
    void (*slice)(const std::uint32_t* offset, const float* value, std::size_t steps,
                  const std::uint32_t* order, std::size_t rows, const float* xt, float* yt,
                  std::size_t width) = nullptr;
    // to[column * to_stride + row] = from[row * from_stride + column]
    void (*transpose)(const float* from, std::size_t from_stride, float* to, std::size_t to_stride,
                      std::size_t rows, std::size_t columns) = nullptr;

    // Between products (rowwise.inc); y may be one of the inputs. Norms are of one token.
    void (*rms_norm)(const float* x, const float* scale, float epsilon, std::size_t columns,
                     float* y) = nullptr;
    // bias: (columns) or null.
    void (*layer_norm)(const float* x, const float* scale, const float* bias, float epsilon,
                       std::size_t columns, float* y) = nullptr;
    void (*add)(const float* a, const float* b, std::size_t count, float* y) = nullptr;
    void (*times)(const float* a, const float* b, std::size_t count, float* y) = nullptr;
    void (*each[kFunctions])(const float* x, std::size_t count, float* y) = {};

    // Attention (attention.inc); widths and columns are multiples of 16. Missing in portable kernels.
    // c[r][n] = c[r][n] * factors[r] + sum over k of a[r][k] * b[k][n]; without factors c is not read.
    void (*small_product)(const float* a, std::size_t a_stride, std::size_t rows,
                          std::size_t inner, const float* b, std::size_t b_stride,
                          std::size_t columns, const float* factors, float* c,
                          std::size_t c_stride) = nullptr;
    // scores[r * stride + t] = q[r] . keys[t], both of `width` elements, one behind the other.
    void (*dots)(const float* q, std::size_t rows, std::size_t width, const float* keys,
                 std::size_t count, float* scores, std::size_t stride,
                 const KeptCopy& copy) = nullptr;
    // sums[r] (+)= sum over t of p[r * stride + t] * values[t], of `width` elements; `fresh`: from zero.
    void (*blend)(const float* p, std::size_t stride, std::size_t rows, const float* values,
                  std::size_t count, std::size_t width, bool fresh, float* sums,
                  const KeptCopy& copy) = nullptr;
    // In place e^(score - *maximum), after *maximum has been raised to the largest score; their sum.
    // `count` is a multiple of 16.
    float (*soften)(float* scores, std::size_t count, float* maximum) = nullptr;
    // Behind copies past the caches, before others may read them.
    void (*written_past)() = nullptr;

    // Training (moments.inc).
    void (*adam_step)(const AdamStep&) = nullptr;
};

extern const Kernels kPortable;
#if defined(ELSA_HAVE_X86_KERNELS)
// Completes a copy of the next lower table.
void add_avx2(Kernels& table);
void add_avx512(Kernels& table);
void add_avx512vnni(Kernels& table);
#endif

// Best instruction set of this processor among those compiled in.
Isa best_isa();
const char* isa_name(Isa isa);
// By name ("portable", "avx2", "avx512", "avx512vnni"); throws std::invalid_argument when unknown
// or beyond this processor. Null or empty: the environment's ELSA_ISA, or else the best.
Isa isa_by_name(const char* name);
const Kernels& kernels_for(Isa isa);
std::uint64_t cpu_features();
bool made_by_amd();
// Of the processor's last cache; 32 MiB where the system does not say.
std::size_t last_cache_bytes();

}  // namespace elsa
