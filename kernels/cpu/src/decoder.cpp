// All layers of a decoder for one step: the coarse operation that leaves Python out of everything between embedding and last norm.
//
// The residual stream is float32 whatever the weights are kept in. The caller owns every tensor that a descriptor points to.
#include <cstdlib>
#include <vector>

#include "ahead.h"
#include "attention.h"
#include "attention_plan.h"
#include "chunk.h"
#include "decoder.h"
#include "elementwise.h"
#include "formats.h"
#include "group_tiles.h"
#include "matmul.h"
#include "packed.h"
#include "pool.h"
#include "rounded.h"
#include "rounded_tiles.h"
#include "slices.h"
#include "steps.h"

using namespace dt;

namespace {

struct Workspace {
  float* data = nullptr;
  size_t size = 0;
  Plan plan;
  Ahead ahead;
  ~Workspace() { free(data); }
  void reserve(size_t count) {
    if (count <= size) return;
    free(data);
    data = static_cast<float*>(aligned_alloc(64, (count * 4 + 63) / 64 * 64));
    size = data ? count : 0;
  }
};

// Any number of Python's threads may call at once, each with memory of its own: it grows to what the largest call needs.
static thread_local Workspace workspace;

static Matrix matrix_of(const dt_matrix& m) {
  const bool is_packed = m.format >= int(Format::kInt8);
  return Matrix{m.weight, m.bias,  int(m.rows), int(m.cols), int(is_packed ? m.stride : m.cols), Format(m.format),
                m.scales, m.mins, m.high,      int(m.group), int(m.scale_format), m.has_zeros != 0};
}

// --- products of rows, whatever is done to the activations first ---------------------------------------------------------

// What is done to activations: rounding as the operation says, or nothing but another form, in which int8 weights are read faster.
enum class Form { kPlain, kRows, kBlocks, kFloat8, kTiles, kDigits, kNibbles, kRoundedFloats, kSteps, kGroupTiles };

// Tokens up to which packed weights are multiplied in integers a row at a time: with activations that are rounded by blocks, of Q6_K and
// of others, and with all their bits, of up to 6 bits and of 8. With more, tiles in integers are faster, where there are any, or widening
// weights once (measured).
constexpr int kMostRounded = !kHasGroupTiles ? 24 : kHasSteps ? 12 : 4, kMostRoundedSixes = !kHasGroupTiles ? 24 : kHasSteps ? 18 : 4;
constexpr int kMostWhole = 12, kMostWholeBytes = 8;

static Form form_of(const dt_matrix& m, int tokens) {
  const bool is_many = m.format == int(Format::kInt8) && tokens > kFewRows;
  const bool is_dotted = kHasDots && m.format == int(Format::kInt8) && tokens <= kFewRows;
  const bool is_rounded = m.rounding != int(Rounding::kNone), is_wide = m.format == int(Format::kBlocks) + kQ8_0;
  const int most_rounded = m.format == int(Format::kBlocks) + kQ6_K ? kMostRoundedSixes : kMostRounded;
  const int most = is_rounded ? most_rounded : is_wide ? kMostWholeBytes : kMostWhole;
  if (kHasSteps && tokens <= most && takes_steps(matrix_of(m))) return Form::kSteps;
  const bool is_by_blocks = m.rounding == int(Rounding::kNibbles) || m.rounding == int(Rounding::kBlocks);
  if constexpr (kHasGroupTiles)
    if (is_by_blocks && tokens > most && takes_group_tiles(matrix_of(m))) return Form::kGroupTiles;
  if (!is_rounded) return (kHasWholeTiles && is_many) || is_dotted ? Form::kDigits : Form::kPlain;
  if (m.rounding == int(Rounding::kRows)) return kHasIntTiles && is_many && tokens > kMostByRows ? Form::kTiles : Form::kRows;
  if (m.rounding == int(Rounding::kNibbles)) return streams(matrix_of(m)) && tokens <= kMostRounded ? Form::kNibbles : Form::kRoundedFloats;
  if (m.rounding == int(Rounding::kBlocks)) return tokens <= kMostRounded ? Form::kBlocks : Form::kRoundedFloats;
  return Form::kFloat8;
}
static bool is_plain(const dt_matrix& m, int tokens) { return form_of(m, tokens) == Form::kPlain; }

// Floats of workspace for products of T rows of size I, where all matrices take them plain or some don't.
static size_t product_floats(int tokens, int size, bool all_plain) {
  size_t plain = rounded(packed_floats(tokens, size)), other = rounded(rounded_floats(tokens, size));
  if (all_plain) return plain;
  if (kHasSteps && tokens <= kMostRoundedSixes) other = rounded(other > step_floats(tokens, size) ? other : step_floats(tokens, size));
  if constexpr (kHasIntTiles) other = rounded(other > tiled_floats(tokens, size) ? other : tiled_floats(tokens, size));
  if constexpr (kHasGroupTiles)
    other = rounded(other > group_tiled_floats(tokens, size) ? other : group_tiled_floats(tokens, size));
  return plain + rounded(size_t(tokens) * size) + other;
}

constexpr int kMostAlike = 3;  // matrices in one call

// Products of the same rows [T, I] of float32 with several matrices. Neighbours that take them in the same form are one. is_bf16: the
// rows stand for numbers of bf16, and may be rounded to them.
static void multiply(const float* rows, size_t stride, int tokens, const dt_matrix* const* matrices, const Sink* sinks, int count,
                     float* space, bool is_bf16) {
  const int size = int(matrices[0]->cols);
  for (int begin = 0, end; begin < count; begin = end) {
    Matrix alike[kMostAlike];
    const dt_matrix& first = *matrices[begin];
    const Form form = form_of(first, tokens);
    auto is_alike = [&](const dt_matrix& m) {
      if (form == Form::kSteps && (m.format != first.format || m.rounding != first.rounding)) return false;
      if constexpr (kHasGroupTiles)
        if (form == Form::kGroupTiles && takes_words(Format(m.format)) != takes_words(Format(first.format))) return false;
      return form_of(m, tokens) == form && (!m.x_scale || *m.x_scale == *first.x_scale);
    };
    for (end = begin; end < count && end - begin < kMostAlike && is_alike(*matrices[end]); end++)
      alike[end - begin] = matrix_of(*matrices[end]);
    const int number = end - begin;
    if (form == Form::kPlain) {
      bool in_pairs = is_bf16;
      for (int i = 0; i < number; i++) in_pairs &= takes_pairs(alike[i], tokens);
      matmul(pack(rows, stride, tokens, size, space, in_pairs), alike, sinks + begin, number);
    } else if (form == Form::kDigits && tokens <= kFewRows) {
      matmul(digit_rows(rows, stride, tokens, size, space), alike, sinks + begin, number);
    } else if (form == Form::kSteps) {
      const int digits = first.rounding == int(Rounding::kNone) ? 3 : 1;
      matmul(step_rows(rows, stride, tokens, size, digits, alike[0].format, space), alike, sinks + begin, number);
    } else if (form == Form::kGroupTiles) {
      if constexpr (kHasGroupTiles)
        matmul(group_tile_rows(rows, stride, tokens, size, alike[0].format, space), alike, sinks + begin, number);
    } else if (form == Form::kTiles || form == Form::kDigits) {
      if constexpr (kHasIntTiles)
        matmul(tile_rows(rows, stride, tokens, size, form == Form::kTiles ? 1 : 3, space), alike, sinks + begin, number);
    } else if (form == Form::kFloat8 || form == Form::kRoundedFloats) {
      float* copy = space + rounded(packed_floats(tokens, size));
      for (int t = 0; t < tokens; t++) memcpy(copy + size_t(t) * size, rows + size_t(t) * stride, size_t(size) * 4);
      if (form == Form::kFloat8)
        round_to_float8(copy, tokens, size, *first.x_scale);
      else
        round_to_blocks(copy, tokens, size);
      matmul(pack(copy, size, tokens, size, space), alike, sinks + begin, number);
    } else {
      matmul(round_rows(rows, stride, tokens, size, Rounding(first.rounding), space), alike, sinks + begin, number);
    }
  }
}

// Rows [T, size] in `format` as float32, and `extra` floats behind them, for the caller. False when there is no memory.
static bool taken(const void* x, int tokens, int size, int format, size_t extra, const float*& rows, float*& rest) {
  Workspace& room = workspace;
  size_t plain = format == int(Format::kFloat32) ? 0 : rounded(size_t(tokens) * size);
  room.reserve(plain + extra);
  if (!room.data) return false;
  rows = static_cast<const float*>(x);
  if (plain) {
    const bf16* in = static_cast<const bf16*>(x);
    for (size_t i = 0; i < size_t(tokens) * size; i++) room.data[i] = to_float(in[i]);
    rows = room.data;
  }
  rest = room.data + plain;
  return true;
}

// One step of one decoder.
class Run {
 public:
  // slice: which the step is, and `before` the one before it; null where the step is whole.
  Run(const dt_decoder& model, const dt_step& step, float* x, Workspace& space, Slice* slice = nullptr, const Slice* before = nullptr)
      : model_(model), step_(step), x_(x), tokens_(int(step.num_tokens)), plan_(space.plan), ahead_(space.ahead), slice_(slice),
        before_(before) {
    int q = int(model.num_heads * model.head_size), kv = int(model.kv_heads * model.head_size), sequences = int(step.num_sequences);
    qkv_stride_ = q + 2 * kv;
    const bool has_ends = ends_only();
    const Room all = room_for(tokens_), ends = has_ends ? room_for(sequences) : Room{};
    size_t sizes[] = {size_t(tokens_) * model.hidden,
                      size_t(tokens_) * qkv_stride_,
                      size_t(tokens_) * q,
                      all.product > ends.product ? all.product : ends.product,
                      all.gated > ends.gated ? all.gated : ends.gated,
                      attention_floats(sequences, int(model.num_heads), int(model.kv_heads), int(model.head_size)),
                      has_ends ? size_t(sequences) * model.hidden : 0,
                      has_ends ? size_t(sequences) + 1 : 0};
    size_t total = 0;
    for (size_t size : sizes) total += rounded(size);
    space.reserve(total);
    float* next = space.data;
    is_ready_ = next != nullptr;
    float** places[] = {&normed_, &qkv_, &attended_, &packed_, &gated_, &parts_, &x_ends_};
    size_t index = 0;
    for (float** place : places) {
      *place = next;
      next += rounded(sizes[index++]);
    }
    one_each_ = reinterpret_cast<int32_t*>(next);
  }

  bool is_ready() const { return is_ready_; }

  void layer(int index) {
    const dt_layer& layer = model_.layers[index];
    if (index + 1 == model_.num_layers && ends_only()) return last_layer(layer, index);
    attention(layer, index);
    mlp(layer, index);
  }

 private:
  // Floats of workspace for the products of so many rows.
  struct Room {
    size_t product = 0, gated = 0;
  };
  Room room_for(int tokens) const {
    bool all_plain = true;
    for (int i = 0; i < model_.num_layers; i++) all_plain &= takes_plain(model_.layers[i], tokens);
    int q = int(model_.num_heads * model_.head_size), widest = int(model_.hidden > q ? model_.hidden : q);
    size_t gated = size_t(tokens) * model_.intermediate;  // of which there are two where the gate is a step of its own
    return {product_floats(tokens, widest, all_plain),
            product_floats(tokens, int(model_.intermediate), all_plain) + (all_plain ? 0 : rounded(2 * gated))};
  }

  bool ends_only() const { return step_.ends_only && step_.num_sequences < step_.num_tokens; }

  Norm norm(const void* weight) const { return Norm{weight, Format(model_.format), float(model_.eps), float(model_.norm_offset)}; }

  bool is_bf16() const { return model_.format == int(Format::kBfloat16); }
  static bool gate_takes_plain(const dt_layer& l, int tokens) {
    return is_plain(l.gate, tokens) && is_plain(l.up, tokens) && is_plain(l.down, tokens);
  }
  static bool takes_plain(const dt_layer& l, int tokens) {
    return is_plain(l.q, tokens) && is_plain(l.k, tokens) && is_plain(l.v, tokens) && is_plain(l.o, tokens) && gate_takes_plain(l, tokens);
  }

  // Rows of the residual stream, normed where there is a weight.
  const float* normed(const void* weight) {
    if (!weight) return x_;
    int size = int(model_.hidden);
    for_tokens(size, [&](int t) {
      rms_norm_row(x_ + size_t(t) * size, norm(weight), size, normed_ + size_t(t) * size);
    });
    return normed_;
  }

  // Products of the rows of the residual stream, normed where there is a weight.
  void multiply_normed(const void* weight, const dt_matrix* const* matrices, const Sink* sinks, int count) {
    const int hidden = int(model_.hidden);
    bool all_plain = packs_norms(tokens_), in_pairs = is_bf16();
    Matrix plain[kMostAlike];
    for (int i = 0; i < count; i++) {
      all_plain &= is_plain(*matrices[i], tokens_);
      plain[i] = matrix_of(*matrices[i]);
      in_pairs &= takes_pairs(plain[i], tokens_);
    }
    if (all_plain)
      matmul(pack(x_, hidden, tokens_, hidden, packed_, in_pairs, norm(weight)), plain, sinks, count, asked());
    else
      multiply(normed(weight), hidden, tokens_, matrices, sinks, count, packed_, is_bf16());
  }

  template <class F>
  void for_tokens(int size, F&& body) {
    int run = 8192 / (size > 0 ? size : 1);
    if (run < 1) run = 1;
    parallel((tokens_ + run - 1) / run, [&](int chunk, int) {
      int end = (chunk + 1) * run < tokens_ ? (chunk + 1) * run : tokens_;
      for (int t = chunk * run; t < end; t++) body(t);
    });
  }

  // x += scale * product, with a norm in between where the layer has one. `product(sink)` makes it.
  template <class F>
  void add(const void* after, F&& product) {
    float scale = float(model_.residual_scale);
    int size = int(model_.hidden);
    if (!after) return product(Sink{Sink::kAdd, x_, size_t(size), scale});
    product(Sink{Sink::kStore, normed_, size_t(size), 1.0f});
    for_tokens(size, [&](int t) {
      float* row = normed_ + size_t(t) * size;
      rms_norm_row(row, norm(after), size, row);
      float* to = x_ + size_t(t) * size;
      for (int i = 0; i < size; i++) to[i] += scale * row[i];
    });
  }

  void attention(const dt_layer& layer, int index) {
    int heads = int(model_.num_heads), kv_heads = int(model_.kv_heads), size = int(model_.head_size);
    int q_size = heads * size, kv_size = kv_heads * size;
    const dt_matrix* matrices[] = {&layer.q, &layer.k, &layer.v};
    Sink sinks[] = {{Sink::kStore, qkv_, size_t(qkv_stride_), 1.0f},
                    {Sink::kStore, qkv_ + q_size, size_t(qkv_stride_), 1.0f},
                    {Sink::kStore, qkv_ + q_size + kv_size, size_t(qkv_stride_), 1.0f}};
    multiply_normed(layer.before_attention, matrices, sinks, 3);
    is_asking_ = false;

    const Batch batch = batch_of(layer);
    const LayerCache cache = cache_of(layer, index);
    for_tokens(qkv_stride_, [&](int t) { turn_and_write(layer, cache, batch, t); });
    share_keys(index);
    attend_and_add(layer, cache, batch);
  }

  // Only what the rows of last tokens need: keys and values of all tokens, and the rest as a decode of one token a sequence.
  void last_layer(const dt_layer& layer, int index) {
    const int heads = int(model_.num_heads), hidden = int(model_.hidden), sequences = int(step_.num_sequences);
    const int q_size = heads * int(model_.head_size), kv_size = int(model_.kv_heads * model_.head_size);
    const dt_matrix* matrices[] = {&layer.k, &layer.v};
    Sink sinks[] = {{Sink::kStore, qkv_ + q_size, size_t(qkv_stride_), 1.0f},
                    {Sink::kStore, qkv_ + q_size + kv_size, size_t(qkv_stride_), 1.0f}};
    multiply_normed(layer.before_attention, matrices, sinks, 2);
    Batch batch = batch_of(layer);
    const LayerCache cache = cache_of(layer, index);
    for_tokens(2 * kv_size, [&](int t) { turn_and_write_key(layer, cache, batch, t); });
    share_keys(index);

    for (int s = 0; s < sequences; s++)
      memcpy(x_ends_ + size_t(s) * hidden, x_ + size_t(last_of(s)) * hidden, size_t(hidden) * 4);
    float* all = x_;
    x_ = x_ends_;
    tokens_ = sequences;
    const dt_matrix* q = &layer.q;
    const Sink to_q{Sink::kStore, qkv_, size_t(qkv_stride_), 1.0f};
    multiply_normed(layer.before_attention, &q, &to_q, 1);
    for (int s = 0; s <= sequences; s++) one_each_[s] = s;
    batch.num_tokens = sequences;
    batch.query_starts = one_each_;
    for_tokens(q_size, [&](int s) { turn(layer, qkv_ + size_t(s) * qkv_stride_, heads, layer.q_norm, last_of(s)); });
    attend_and_add(layer, cache, batch);
    mlp(layer, index);
    for (int s = 0; s < sequences; s++) memcpy(all + size_t(last_of(s)) * hidden, x_ends_ + size_t(s) * hidden, size_t(hidden) * 4);
  }

  // Keys and values of this layer are written: the next slice may read them, and this one those of the slice before.
  void share_keys(int index) {
    if (!slice_) return;
    if (slice_->continues) before_->wait_for(index + 1);
    slice_->layers_written.store(index + 1, std::memory_order_release);
  }

  int last_of(int sequence) const { return step_.query_starts[sequence + 1] - 1; }

  Batch batch_of(const dt_layer& layer) const {
    return Batch{int(step_.num_sequences), tokens_,       step_.query_starts, step_.kv_lengths, step_.tables[layer.group],
                 int(step_.table_strides[layer.group]), step_.slots[layer.group]};
  }

  LayerCache cache_of(const dt_layer& layer, int index) const {
    return LayerCache{step_.keys[index],
                      step_.values[index],
                      step_.key_scales ? step_.key_scales[index] : nullptr,
                      step_.value_scales ? step_.value_scales[index] : nullptr,
                      int(model_.block_size),
                      int(model_.kv_heads),
                      int(model_.head_size),
                      CacheFormat(model_.cache_format),
                      float(model_.attention_scale),
                      float(model_.soft_cap),
                      int(layer.window)};
  }

  void attend_and_add(const dt_layer& layer, const LayerCache& cache, const Batch& batch) {
    const int heads = int(model_.num_heads), q_size = heads * int(model_.head_size);
    make_plan(layer, cache, batch);
    attend(cache, batch, plan_, heads, qkv_, qkv_stride_, attended_, q_size, parts_);
    const dt_matrix* o = &layer.o;
    add(layer.after_attention, [&](const Sink& sink) { multiply(attended_, q_size, tokens_, &o, &sink, 1, packed_, is_bf16()); });
  }

  // The plan of a layer's attention: most layers of a step have the same.
  void make_plan(const dt_layer& layer, const LayerCache& cache, const Batch& batch) {
    if (planned_tokens_ == batch.num_tokens && planned_group_ == layer.group && planned_window_ == layer.window) return;
    plan_.make(cache, batch, int(model_.num_heads));
    planned_tokens_ = batch.num_tokens;
    planned_group_ = layer.group;
    planned_window_ = layer.window;
    if (can_ask()) find_ahead(plan_, cache, batch, ahead_);
  }

  // Beside many tokens of prompts nothing is gained (measured): their activations need the last cache.
  bool can_ask() const { return takes_ahead(tokens_) && tokens_ <= 2 * step_.num_sequences; }

  // While the last products before the attention of layer `next` are computed, keys and values of its decodes are asked for: from here
  // on, unless there is time enough for that in the products `later` and those that begin the layer.
  void ask_ahead(int next, const dt_matrix* later) {
    if (is_asking_ || !can_ask() || next >= model_.num_layers || (next + 1 == model_.num_layers && ends_only())) return;
    const dt_layer& layer = model_.layers[next];
    const LayerCache cache = cache_of(layer, next);
    make_plan(layer, cache, batch_of(layer));
    size_t time = 0;
    if (later)
      for (const dt_matrix* m : {later, &layer.q, &layer.k, &layer.v}) time += ahead_bytes(matrix_of(*m), tokens_);
    if (ahead_.most_bytes == 0 || ahead_.most_bytes <= time) return;
    ahead_.begin(cache.keys, cache.values);
    is_asking_ = true;
  }
  Ahead* asked() { return is_asking_ ? &ahead_ : nullptr; }

  // Head norms, rotary embedding and the cache, for one token.
  void turn_and_write(const dt_layer& layer, const LayerCache& cache, const Batch& batch, int t) {
    turn(layer, qkv_ + size_t(t) * qkv_stride_, int(model_.num_heads), layer.q_norm, t);
    turn_and_write_key(layer, cache, batch, t);
  }

  void turn_and_write_key(const dt_layer& layer, const LayerCache& cache, const Batch& batch, int t) {
    float* k = qkv_ + size_t(t) * qkv_stride_ + model_.num_heads * model_.head_size;
    turn(layer, k, int(model_.kv_heads), layer.k_norm, t);
    Batch one = batch;
    one.num_tokens = 1;
    one.slots = batch.slots + t;
    write_cache(cache, one, k, k + model_.kv_heads * model_.head_size, qkv_stride_);
  }

  // Norm, where there is a weight, and rotary embedding of the heads of one token, for queries or keys.
  void turn(const dt_layer& layer, float* row, int heads, const void* weight, int t) {
    const int size = int(model_.head_size);
    if (weight && !model_.norms_heads) rms_norm_row(row, norm(weight), heads * size, row);
    for (int h = 0; h < heads; h++) {
      float* head = row + h * size;
      if (weight && model_.norms_heads) rms_norm_row(head, norm(weight), size, head);
      if (layer.rope >= 0)
        rotate(head, step_.cos[layer.rope] + size_t(t) * model_.rotary, step_.sin[layer.rope] + size_t(t) * model_.rotary,
               int(model_.rotary));
    }
  }

  void mlp(const dt_layer& layer, int index) {
    Activation kind = Activation(model_.activation);
    if (!gate_takes_plain(layer, tokens_)) return mlp_by_rows(layer, kind);
    int hidden = int(model_.hidden);
    Matrix gate = matrix_of(layer.gate), up = matrix_of(layer.up), down = matrix_of(layer.down);
    const bool in_pairs = is_bf16() && takes_pairs(gate, tokens_) && takes_pairs(up, tokens_), fuses = packs_norms(tokens_);
    const float* in = fuses ? x_ : normed(layer.before_mlp);
    Activations packed = pack(in, hidden, tokens_, hidden, packed_, in_pairs, fuses ? norm(layer.before_mlp) : Norm{});
    ask_ahead(index + 1, &layer.down);
    Activations gated = gated_matmul(packed, gate, up, kind, gated_, is_bf16() && takes_pairs(down, tokens_), asked());
    ask_ahead(index + 1, nullptr);
    add(layer.after_mlp, [&](const Sink& sink) { matmul(gated, &down, &sink, 1, asked()); });
  }

  // Where activations are brought into another form by rows, gate, up and what comes of them are rows too.
  void mlp_by_rows(const dt_layer& layer, Activation kind) {
    int size = int(model_.intermediate);
    float* gates = gated_;
    float* ups = gates + size_t(tokens_) * size;
    float* space = gated_ + rounded(2 * size_t(tokens_) * size);
    const dt_matrix* matrices[] = {&layer.gate, &layer.up};
    Sink sinks[] = {{Sink::kStore, gates, size_t(size), 1.0f}, {Sink::kStore, ups, size_t(size), 1.0f}};
    multiply_normed(layer.before_mlp, matrices, sinks, 2);
    gate_in_place(gates, ups, tokens_, size, kind);
    const dt_matrix* down = &layer.down;
    add(layer.after_mlp, [&](const Sink& sink) { multiply(gates, size, tokens_, &down, &sink, 1, space, is_bf16()); });
  }

  const dt_decoder& model_;
  const dt_step& step_;
  float* x_;
  int tokens_, qkv_stride_;
  float *normed_, *qkv_, *attended_, *packed_, *gated_, *parts_;
  float* x_ends_;             // rows of last tokens of the residual stream
  int32_t* one_each_;         // 0 to S
  bool is_ready_;
  Plan& plan_;  // of the attention of layers with this group and window
  int planned_tokens_ = -1;
  int64_t planned_group_ = -1, planned_window_ = -1;
  Ahead& ahead_;
  bool is_asking_ = false;
  Slice* slice_;
  const Slice* before_;
};

// Whether each thread can have rows of its own.
static bool takes_slices(const dt_decoder& model, int tokens) {
  const int threads = num_threads(), rows = (tokens + threads - 1) / threads;
  if (threads == 1 || rows_of_panels(rows) < kPanel || rows_of_panels(rows) < kLeastSliceRows * threads) return false;
  for (int64_t i = 0; i < model.num_layers; i++) {
    const dt_layer& l = model.layers[i];
    for (const dt_matrix* m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down})
      if (!reads_in_place(matrix_of(*m), rows)) return false;
  }
  return true;
}

// Slice number `index` through all layers. False when there is no memory.
static bool run_slice(const dt_decoder& model, std::deque<Slice>& slices, int index, float* x) {
  Alone alone;
  Slice& slice = slices[index];
  Run run(model, slice.step, x + size_t(slice.first) * model.hidden, workspace, &slice, index > 0 ? &slices[index - 1] : nullptr);
  if (run.is_ready())
    for (int i = 0; i < model.num_layers; i++) run.layer(i);
  else
    slice.layers_written.store(model.num_layers, std::memory_order_release);  // nobody waits for what does not come
  return run.is_ready();
}

}  // namespace


// Runs every layer on x [T, hidden] float32, in place; with ends_only, only the rows of last tokens are what they are without. Returns
// 0, or 1 when there is no memory.
DT_API int dt_decoder_forward(const dt_decoder* model, const dt_step* step, float* x) {
  if (takes_slices(*model, int(step->num_tokens))) {
    const std::vector<int> ends = slice_ends(Costs(*model, *step), num_threads());
    if (!ends.empty()) {
      std::deque<Slice> slices;
      for (size_t i = 0; i < ends.size(); i++) slices.emplace_back(*model, *step, i > 0 ? ends[i - 1] : 0, ends[i]);
      std::atomic<bool> has_memory{true};
      auto run = [&](int index, int) {
        if (!run_slice(*model, slices, index, x)) has_memory.store(false);
      };
      parallel(int(slices.size()), run, true);
      return has_memory.load() ? 0 : 1;
    }
  }
  Run run(*model, *step, x, workspace);
  if (!run.is_ready()) return 1;
  for (int i = 0; i < model->num_layers; i++) run.layer(i);
  return 0;
}

// y[T, O] = x[T, I] @ weight^T + bias. x and y in `io_format`, bias in float32 or null.
DT_API int dt_linear(const void* x, int tokens, const dt_matrix* m, int io_format, void* y) {
  const float* rows;
  float* space;
  if (!taken(x, tokens, int(m->cols), io_format, product_floats(tokens, int(m->cols), is_plain(*m, tokens)), rows, space)) return 1;
  Sink sink{io_format == int(Format::kFloat32) ? Sink::kStore : Sink::kStoreBf16, y, size_t(m->rows), 1.0f};
  multiply(rows, m->cols, tokens, &m, &sink, 1, space, io_format == int(Format::kBfloat16));
  return 0;
}

// y[T, O] = act(x @ gate^T) * (x @ up^T).
DT_API int dt_gated_linear(const void* x, int tokens, const dt_matrix* gate, const dt_matrix* up, int activation, int io_format,
                           void* y) {
  const float* rows;
  float* space;
  int size = int(gate->rows), cols = int(gate->cols);
  size_t count = size_t(tokens) * size, first = rounded(packed_floats(tokens, cols)), second = rounded(packed_floats(tokens, size));
  bool is_plain = io_format == int(Format::kFloat32);
  if (!taken(x, tokens, cols, io_format, first + second + (is_plain ? 0 : count), rows, space)) return 1;
  Matrix gates = matrix_of(*gate), ups = matrix_of(*up);
  bool in_pairs = !is_plain && takes_pairs(gates, tokens) && takes_pairs(ups, tokens);
  Activations packed = pack(rows, cols, tokens, cols, space, in_pairs);
  Activations gated = gated_matmul(packed, gates, ups, Activation(activation), space + first);
  float* out = is_plain ? static_cast<float*>(y) : space + first + second;
  unpack(gated, out);
  if (!is_plain)
    for (size_t i = 0; i < count; i++) static_cast<bf16*>(y)[i] = to_bf16(out[i]);
  return 0;
}

// Attention of one layer, keys and values already written or written here (when k is not null). float32 rows.
DT_API int dt_attend(const float* q, const float* k, const float* v, void* keys, void* values, float* key_scales,
              float* value_scales, int64_t num_heads, int64_t kv_heads, int64_t head_size, int64_t block_size,
              int64_t cache_format, double scale, double soft_cap, int64_t window,
              int64_t num_sequences, int64_t num_tokens, const int32_t* query_starts, const int32_t* kv_lengths,
              const int32_t* tables, int64_t table_stride, const int64_t* slots, float* out) {
  Workspace& room = workspace;
  room.reserve(attention_floats(int(num_sequences), int(num_heads), int(kv_heads), int(head_size)));
  if (!room.data) return 1;
  Batch batch{int(num_sequences), int(num_tokens), query_starts, kv_lengths, tables, int(table_stride), slots};
  LayerCache cache{keys,           values,         key_scales,   value_scales,    int(block_size),
                   int(kv_heads),  int(head_size), CacheFormat(cache_format), float(scale), float(soft_cap), int(window)};
  if (k) write_cache(cache, batch, k, v, size_t(kv_heads * head_size));
  room.plan.make(cache, batch, int(num_heads));
  attend(cache, batch, room.plan, int(num_heads), q, size_t(num_heads * head_size), out, size_t(num_heads * head_size), room.data);
  return 0;
}
