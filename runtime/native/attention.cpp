#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "scratch.h"

namespace elsa {
namespace {

constexpr std::size_t kBlockKeys = 64;   // keys of so many tokens stay in the first cache
constexpr std::size_t kFewRows = 24;     // queries times heads that read keys as they lie
constexpr std::size_t kSpanKeys = 512;   // of a task with few rows
constexpr std::size_t kTaskRows = 96;    // of a task with many, about
constexpr std::size_t kTileRows = 12;    // a multiple of what a kernel holds in registers
constexpr std::size_t kEarlyLines = 16;  // of 64 bytes; 4 and 32 are slower, Zen 4
constexpr float kNone = -std::numeric_limits<float>::infinity();

// Which keys a query sees: [first, last), or only what the mask says there.
struct Range {
    std::size_t first = 0, last = 0;
    bool whole = true;
};

std::size_t whole_steps(std::size_t keys) {
    return (keys + kAttentionStep - 1) / kAttentionStep * kAttentionStep;
}

// The first byte of [at, end) that is not 0.
const std::uint8_t* first_set(const std::uint8_t* at, const std::uint8_t* end) {
    for (std::uint64_t word; end - at >= 8; at += 8) {
        std::memcpy(&word, at, 8);
        if (word != 0) break;
    }
    while (at < end && *at == 0) ++at;
    return at;
}

// A processor asks for what follows once it has seen some lines in a row: these it sees early.
inline void start_reading(const float* at) {
#if defined(__GNUC__) || defined(__clang__)
    for (std::size_t line = 0; line < kEarlyLines; ++line) __builtin_prefetch(at + line * 16, 0, 2);
#endif
}

class Work {
  public:
    Work(const Attention& call, const Kernels& kernels)
        : call_(call),
          kernels_(kernels),
          shared_(call.heads / call.groups),
          keys_(call.past + call.added),
          copied_(call.keys == call.past_keys && call.values == call.past_values ? 0 : call.past),
          rows_(call.queries * shared_) {}

    void run(const Parallel& parallel) const {
        if (call_.batches == 0) return;
        if (rows_ == 0 || keys_ == 0) {
            for_each(parallel, call_.batches * call_.groups, [&](std::size_t i) { fill(i, 0, keys_); });
            const std::size_t heads = call_.batches * call_.heads * call_.queries;
            std::fill(call_.y, call_.y + heads * call_.value_width, 0.0f);
            return;
        }
        rows_ <= kFewRows ? few(parallel) : many(parallel);
    }

  private:
    // A batch entry and a group of heads that share keys: `pair` numbers both.
    std::size_t batch(std::size_t pair) const { return pair / call_.groups; }
    std::size_t group(std::size_t pair) const { return pair % call_.groups; }
    std::size_t head(std::size_t pair, std::size_t row) const {
        return group(pair) * shared_ + row % shared_;
    }
    float* keys(std::size_t pair, std::size_t t) const {
        return call_.keys + (pair * call_.room + t) * call_.width;
    }
    float* values(std::size_t pair, std::size_t t) const {
        return call_.values + (pair * call_.room + t) * call_.value_width;
    }
    const float* past_keys(std::size_t pair, std::size_t t) const {
        return call_.past_keys + (pair * call_.past_room + t) * call_.width;
    }
    const float* past_values(std::size_t pair, std::size_t t) const {
        return call_.past_values + (pair * call_.past_room + t) * call_.value_width;
    }

    // One head of one token, turned and scaled.
    void load(const HeadsView& view, const Rotary& turn, std::size_t b, std::size_t h,
              std::size_t t, float scale, float* to) const {
        const float* x = view.data + b * view.batch + t * view.token + h * view.head;
        std::size_t e = 0;
        if (turn.cosines != nullptr) {
            const std::size_t half = turn.half;
            const float* c = turn.cosines + b * turn.batch + t * half;
            const float* s = turn.sines + b * turn.batch + t * half;
            for (; e < half; ++e) {
                to[e] = (c[e] * x[e] - s[e] * x[half + e]) * scale;
                to[half + e] = (s[e] * x[e] + c[e] * x[half + e]) * scale;
            }
            e = 2 * half;
        }
        for (; e < call_.width; ++e) to[e] = x[e] * scale;
    }

    float* load_queries(std::size_t pair, std::size_t first, std::size_t last) const {
        const std::size_t rows = (last - first) * shared_;
        float* q = scratch<float>(Scratch::queries, rows * call_.width);
        for (std::size_t r = 0; r < rows; ++r) {
            load(call_.q, call_.turn_q, batch(pair), head(pair, r), first + r / shared_,
                 call_.scale, q + r * call_.width);
        }
        return q;
    }

    // Keys and values of tokens [first, last) to where they are kept.
    void fill(std::size_t pair, std::size_t first, std::size_t last) const {
        const std::size_t old = std::min(last, copied_);
        if (first < old) {
            std::memcpy(keys(pair, first), past_keys(pair, first),
                        (old - first) * call_.width * sizeof(float));
            std::memcpy(values(pair, first), past_values(pair, first),
                        (old - first) * call_.value_width * sizeof(float));
        }
        const HeadsView& v = call_.v;
        for (std::size_t t = std::max(first, call_.past); t < last; ++t) {
            const std::size_t now = t - call_.past;
            load(call_.k, call_.turn_k, batch(pair), group(pair), now, 1.0f, keys(pair, t));
            const float* value =
                v.data + batch(pair) * v.batch + now * v.token + group(pair) * v.head;
            std::memcpy(values(pair, t), value, call_.value_width * sizeof(float));
        }
    }

    // Of each batch entry and query. Masks that heads or single keys share are read in full later.
    Range* ranges() const {
        Range* found = scratch<Range>(Scratch::ranges, call_.batches * call_.queries);
        for (std::size_t b = 0; b < call_.batches; ++b) {
            for (std::size_t s = 0; s < call_.queries; ++s) {
                found[b * call_.queries + s] = range(b, s);
            }
        }
        return found;
    }

    Range range(std::size_t b, std::size_t s) const {
        const Mask& mask = call_.mask;
        const std::size_t end = call_.causal ? std::min(keys_, call_.past + s + 1) : keys_;
        if (mask.allowed == nullptr && mask.added == nullptr) return {0, end, true};
        const std::size_t known = std::min(end, mask.keys);
        if (mask.allowed == nullptr || mask.head != 0 || mask.key != 1) return {0, known, false};
        const std::uint8_t* row = mask.allowed + b * mask.batch + s * mask.query;
        const std::uint8_t* first = first_set(row, row + known);
        const auto rest = static_cast<std::size_t>(row + known - first);
        const void* zero = rest == 0 ? nullptr : std::memchr(first, 0, rest);
        const auto* last = zero == nullptr ? row + known : static_cast<const std::uint8_t*>(zero);
        const bool whole = first_set(last, row + known) == row + known;
        return {static_cast<std::size_t>(first - row),
                whole ? static_cast<std::size_t>(last - row) : known, whole};
    }

    // Scores of keys [first, first + count) that a query does not see become -infinity.
    void apply_mask(const Range& range, std::size_t b, std::size_t h, std::size_t s,
                    std::size_t first, std::size_t count, float* scores) const {
        const std::size_t end = first + count;
        const std::size_t from = std::min(std::max(range.first, first), end) - first;
        const std::size_t to = std::max(std::min(range.last, end), first + from) - first;
        std::fill(scores, scores + from, kNone);
        std::fill(scores + to, scores + count, kNone);
        if (range.whole) return;
        const Mask& mask = call_.mask;
        const std::size_t at = b * mask.batch + h * mask.head + s * mask.query + first * mask.key;
        for (std::size_t t = from; t < to; ++t) {
            if (mask.added != nullptr) {
                scores[t] += mask.added[at + t * mask.key];
            } else if (mask.allowed[at + t * mask.key] == 0) {
                scores[t] = kNone;
            }
        }
    }

    // sums / total to the result.
    void finish(std::size_t pair, std::size_t s, std::size_t row, const float* sums,
                float total) const {
        const HeadsView& view = call_.y_view;
        float* y = call_.y + batch(pair) * view.batch + s * view.token +
                   head(pair, row) * view.head;
        const float factor = total == 0.0f ? 0.0f : 1.0f / total;
        for (std::size_t e = 0; e < call_.value_width; ++e) y[e] = sums[e] * factor;
    }

    // Few rows: the cache is what is read, so it is read once, in spans that are put together at
    // the end. Of a span and a row: the largest score, the sum of weights, weighed values.
    std::size_t share_size() const { return 2 + call_.value_width; }

    void few(const Parallel& parallel) const {
        const std::size_t spans = (keys_ + kSpanKeys - 1) / kSpanKeys;
        const std::size_t pairs = call_.batches * call_.groups;
        float* shares = scratch<float>(Scratch::shares, pairs * spans * rows_ * share_size());
        const Range* seen = ranges();
        for_each(parallel, pairs * spans, [&](std::size_t i) {
            const std::size_t first = keys_ * (i % spans) / spans;
            const std::size_t last = keys_ * (i % spans + 1) / spans;
            span(i / spans, first, last, seen, shares + i * rows_ * share_size());
        });
        for (std::size_t i = 0; i < pairs * rows_; ++i) {
            const std::size_t pair = i / rows_, row = i % rows_;
            join(pair, row, shares + (pair * spans * rows_ + row) * share_size(), spans);
        }
    }

    // work(t, count) for runs of tokens that the first cache holds, old ones and new ones apart.
    template <class Run>
    static void each_run(std::size_t first, std::size_t old, std::size_t last, const Run& work) {
        for (std::size_t t = first; t < last;) {
            const std::size_t some = std::min(kBlockKeys, (t < old ? old : last) - t);
            work(t, some);
            t += some;
        }
    }

    void span(std::size_t pair, std::size_t first, std::size_t last, const Range* seen,
              float* shares) const {
        const std::size_t count = last - first;
        const std::size_t stride = whole_steps(count);
        const float* q = load_queries(pair, 0, call_.queries);
        float* scores = scratch<float>(Scratch::scores, rows_ * stride);
        float* blended = scratch<float>(Scratch::blended, rows_ * call_.value_width);
        const std::size_t old = std::min(last, std::max(first, copied_));  // read where they come from
        fill(pair, std::max(first, call_.past), last);
        start_reading(first < old ? past_values(pair, first) : values(pair, first));
        each_run(first, old, last, [&](std::size_t t, std::size_t some) {
            float* to = keys(pair, t);
            const bool copied = t < old;
            kernels_.dots(q, rows_, call_.width, copied ? past_keys(pair, t) : to, some,
                          scores + (t - first), stride, {copied ? to : nullptr, call_.bypass});
        });
        for (std::size_t r = 0; r < rows_; ++r) {
            float* row = scores + r * stride;
            const std::size_t b = batch(pair), s = r / shared_;
            apply_mask(seen[b * call_.queries + s], b, head(pair, r), s, first, count, row);
            std::fill(row + count, row + stride, kNone);
            float* share = shares + r * share_size();
            share[0] = kNone;
            share[1] = kernels_.soften(row, stride, share);
        }
        const std::size_t width = call_.value_width;
        if (pair + 1 < call_.batches * call_.groups) {
            start_reading(first < old ? past_keys(pair + 1, first) : keys(pair + 1, first));
        }
        each_run(first, old, last, [&](std::size_t t, std::size_t some) {
            float* to = values(pair, t);
            const bool copied = t < old;
            kernels_.blend(scores + (t - first), stride, rows_, copied ? past_values(pair, t) : to,
                           some, width, t == first, blended,
                           {copied ? to : nullptr, call_.bypass});
        });
        for (std::size_t r = 0; r < rows_; ++r) {
            std::memcpy(shares + r * share_size() + 2, blended + r * width, width * sizeof(float));
        }
        if (call_.bypass) kernels_.written_past();
    }

    void join(std::size_t pair, std::size_t row, float* shares, std::size_t spans) const {
        const std::size_t step = rows_ * share_size();
        float most = kNone, total = 0.0f;
        for (std::size_t i = 0; i < spans; ++i) most = std::max(most, shares[i * step]);
        float* sums = shares + 2;
        for (std::size_t i = 0; i < spans; ++i) {
            const float* share = shares + i * step;
            const float factor = share[0] == kNone ? 0.0f : std::exp(share[0] - most);
            total += share[1] * factor;
            for (std::size_t e = 0; e < call_.value_width; ++e) {
                sums[e] = (i == 0 ? 0.0f : sums[e]) + share[2 + e] * factor;
            }
        }
        finish(pair, row / shared_, row, sums, total);
    }

    // Many rows: products of blocks, as a matrix product does them.
    void many(const Parallel& parallel) const {
        const std::size_t pairs = call_.batches * call_.groups;
        const std::size_t parts = (keys_ + kSpanKeys - 1) / kSpanKeys;
        for_each(parallel, pairs * parts, [&](std::size_t i) {
            fill(i / parts, keys_ * (i % parts) / parts, keys_ * (i % parts + 1) / parts);
        });
        const std::size_t step = std::max<std::size_t>(1, kTaskRows / shared_);
        const std::size_t blocks = (call_.queries + step - 1) / step;
        const Range* seen = ranges();
        for_each(parallel, pairs * blocks, [&](std::size_t i) {
            // The last ones see most keys: they come first.
            const std::size_t first = step * (blocks - 1 - i % blocks);
            const Range* of_batch = seen + batch(i / blocks) * call_.queries;
            rows(i / blocks, first, std::min(call_.queries, first + step), of_batch);
        });
    }

    // Of keys [t, t + count) those up to the last one that any of queries [begin, end) sees.
    static std::size_t seen_by_any(const Range* seen, std::size_t begin, std::size_t end,
                                   std::size_t t, std::size_t count) {
        std::size_t last = t;
        for (std::size_t s = begin; s < end; ++s) {
            if (seen[s].first < t + count) last = std::max(last, seen[s].last);
        }
        return std::min(last - t, count);
    }

    void rows(std::size_t pair, std::size_t first, std::size_t last, const Range* seen) const {
        const std::size_t count = (last - first) * shared_, width = call_.value_width;
        const float* q = load_queries(pair, first, last);
        float* sums = scratch<float>(Scratch::blended, count * (width + 2));
        float *most = sums + count * width, *totals = most + count;
        std::fill(sums, most, 0.0f);
        std::fill(most, totals, kNone);
        std::fill(totals, totals + count, 0.0f);
        for (std::size_t t = 0; t < keys_; t += kBlockKeys) {
            const std::size_t some = std::min(kBlockKeys, keys_ - t);
            if (!seen_by_any(seen, first, last, t, some)) continue;
            float* turned = scratch<float>(Scratch::turned, call_.width * kBlockKeys);
            if (some < kBlockKeys) std::fill(turned, turned + call_.width * kBlockKeys, 0.0f);
            kernels_.transpose(keys(pair, t), call_.width, turned, kBlockKeys, some, call_.width);
            for (std::size_t r = 0; r < count; r += kTileRows) {
                const std::size_t tile = std::min(kTileRows, count - r);
                const std::size_t begin = first + r / shared_;
                const std::size_t end = first + (r + tile - 1) / shared_ + 1;
                const std::size_t used = seen_by_any(seen, begin, end, t, some);
                const std::size_t columns = whole_steps(used);
                if (used == 0) continue;
                float scores[kTileRows * kBlockKeys], factors[kTileRows];
                kernels_.small_product(q + r * call_.width, call_.width, tile, call_.width, turned,
                                       kBlockKeys, columns, nullptr, scores, kBlockKeys);
                for (std::size_t i = 0; i < tile; ++i) {
                    float* row = scores + i * kBlockKeys;
                    const std::size_t s = first + (r + i) / shared_;
                    apply_mask(seen[s], batch(pair), head(pair, r + i), s, t, used, row);
                    std::fill(row + used, row + columns, kNone);
                    const float before = most[r + i];
                    const float weights = kernels_.soften(row, columns, most + r + i);
                    factors[i] = before == kNone ? 0.0f : std::exp(before - most[r + i]);
                    totals[r + i] = totals[r + i] * factors[i] + weights;
                }
                kernels_.small_product(scores, kBlockKeys, tile, used, values(pair, t), width,
                                       width, factors, sums + r * width, width);
            }
        }
        for (std::size_t r = 0; r < count; ++r) {
            finish(pair, first + r / shared_, r, sums + r * width, totals[r]);
        }
    }

    const Attention& call_;
    const Kernels& kernels_;
    std::size_t shared_, keys_;
    std::size_t copied_;  // old tokens that are not where they are kept
    std::size_t rows_;
};

}  // namespace

bool can_attend(const Kernels& kernels) { return kernels.dots != nullptr; }

void attend(const Attention& call, const Kernels& kernels, const Parallel& parallel) {
    Work(call, kernels).run(parallel);
}

}  // namespace elsa
