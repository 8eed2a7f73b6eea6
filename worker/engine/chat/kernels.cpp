// Two operators for decoding on a CPU, built at run time where there is a compiler (kernels.py).
//
// verbatim::decode  stores the keys and values of a pass and lets each decoding row attend to its
//                   blocks where they lie; blocks that all rows begin with are read once for all.
// verbatim::linear  what linear.py says, without the way through Python.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int BLOCK = 16;       // tokens of a block, as in cache.py
constexpr int MOST_SIZE = 256;  // of a head; a multiple of LANES
constexpr int PART = 128;       // tokens that one piece of work attends to
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// What the processor computes side by side, in the vector types of gcc and clang.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(float))));

inline Floats load(const float* from) {
  Floats found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

inline void put(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// The sums of neighbours, first those of one, then those of the other.
template <int... I>
inline Floats neighbours(Floats one, Floats other, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(one, other, (2 * I)...) +
         __builtin_shufflevector(one, other, (2 * I + 1)...);
}

// The sum of each of `count` vectors, `count` being LANES at first.
template <int count>
inline Floats sums(const Floats* vectors) {
  if constexpr (count == 1) {
    return vectors[0];
  } else {
    Floats half[count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i)
      half[i] = neighbours(vectors[2 * i], vectors[2 * i + 1],
                           std::make_integer_sequence<int, LANES>());
    return sums<count / 2>(half);
  }
}

// e^x for x <= 0; below -87 it is e^-87. What is not a number stays so, that a broken model is seen.
// The exponent of two nearest to x is split off, and the rest is the series of e^r for |r| < 0.35,
// whose remainder is below 0.35^8 / 8! = 6e-9; ln 2 in two parts is Cody and Waite's.
inline Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats twos = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds: 1.5 * 2^23
  const Floats r = (x - twos * 0.693359375f) + twos * 2.12194440e-4f;
  Floats e = Floats{} + 1.0f / 5040;
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  return e * reinterpret_cast<Floats>((__builtin_convertvector(twos, Ints) + 127) << 23);
}

inline float exponential(float x) { return exponential(Floats{} + x)[0]; }

// Tokens that rows attend to in one go, at most PART. What a row gets from its parts is put
// together at the end: `most` is its largest score there, `sum` that of the exponentials of the
// scores less `most`, and `out` the values weighted with these exponentials.
struct Part {
  int first_row, rows;
  const int32_t* blocks;
  int tokens;
  int64_t at;  // of the first row's results
};

template <typename T>
const float* as_floats(const T* from, int count, float* room) {
  if constexpr (std::is_same_v<T, float>) return from;
  for (int i = 0; i < count; ++i) room[i] = static_cast<float>(from[i]);
  return room;
}

template <typename T>
void attend(const Part& part, const float* queries, int count, int size, const T* keys,
            const T* values, float* most, float* sum, float* out) {
  alignas(64) float key_room[BLOCK * MOST_SIZE], value_room[BLOCK * MOST_SIZE], weight[BLOCK];
  std::fill_n(most, count, LOWEST);
  std::fill_n(sum, count, 0.0f);
  std::fill_n(out, static_cast<int64_t>(count) * size, 0.0f);
  for (int begin = 0; begin < part.tokens; begin += BLOCK) {
    const int tokens = std::min(BLOCK, part.tokens - begin);
    const int64_t from = static_cast<int64_t>(part.blocks[begin / BLOCK]) * BLOCK * size;
    const float* key = as_floats(keys + from, BLOCK * size, key_room);
    const float* value = as_floats(values + from, BLOCK * size, value_room);
    for (int q = 0; q < count; ++q) {
      const float* query = queries + static_cast<int64_t>(q) * size;
      float top = most[q];
      for (int first = 0; first < BLOCK; first += LANES) {
        Floats products[LANES] = {};
        for (int i = 0; i < size; i += LANES) {
          const Floats own = load(query + i);
#pragma GCC unroll 16
          for (int t = 0; t < LANES; ++t)
            products[t] += own * load(key + (first + t) * size + i);
        }
        put(weight + first, sums<LANES>(products));
      }
      std::fill(weight + tokens, weight + BLOCK, LOWEST);  // what is no token of this sequence
      for (int t = 0; t < BLOCK; ++t) top = weight[t] > top ? weight[t] : top;
      const float before = exponential(most[q] - top);
      Floats total{};
      for (int first = 0; first < BLOCK; first += LANES) {
        const Floats weights = exponential(load(weight + first) - top);
        put(weight + first, weights);
        total += weights;
      }
      most[q] = top;
      sum[q] *= before;
      for (int i = 0; i < LANES; ++i) sum[q] += total[i];
      float* result = out + static_cast<int64_t>(q) * size;
      for (int i = 0; i < size; i += LANES) {
        Floats values_sum = load(result + i) * before;
        for (int t = 0; t < tokens; ++t) values_sum += weight[t] * load(value + t * size + i);
        put(result + i, values_sum);
      }
    }
  }
}

template <typename T>
void store(const at::Tensor& from, const at::Tensor& slots, at::Tensor& pool) {
  const int64_t heads = pool.size(0), size = pool.size(3), room = pool.size(1) * BLOCK;
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t token = 0; token < slots.size(0); ++token)
      std::memcpy(pool.data_ptr<T>() + (head * room + slot[token]) * size,
                  from.const_data_ptr<T>() + head * from.stride(1) + token * from.stride(2),
                  size * sizeof(T));
}

template <typename T>
void decode_as(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
               const at::Tensor& tables, const at::Tensor& ends, int64_t common, float scale,
               at::Tensor& out) {
  const int rows = ends.size(0), heads = keys.size(0), size = keys.size(3);
  const int group = query.size(1) / heads;  // query heads of one key head
  const int64_t pool = keys.size(1) * BLOCK * size;
  const int32_t *table = tables.const_data_ptr<int32_t>(), *end = ends.const_data_ptr<int32_t>();

  std::vector<Part> parts;
  std::vector<int> own(1);  // where in `parts` each row's own ones begin
  int64_t results = 0;
  const auto add = [&](int row, int count, int begin, int until) {
    for (; begin < until; begin += PART) {
      const int32_t* blocks = table + row * tables.size(1) + begin / BLOCK;
      parts.push_back({row, count, blocks, std::min(PART, until - begin), results});
      results += count * group;
    }
  };
  add(0, rows, 0, common * BLOCK);
  const int shared = own[0] = parts.size();
  for (int row = 0; row < rows; ++row) {
    add(row, 1, common * BLOCK, end[row]);
    own.push_back(parts.size());
  }

  // Of one key head: (rows, group, size), so that the queries of neighbouring rows are neighbours.
  std::vector<float> queries(static_cast<int64_t>(heads) * rows * group * size);
  for (int head = 0, i = 0; head < heads; ++head)
    for (int row = 0; row < rows; ++row)
      for (int member = 0; member < group; ++member) {
        const T* from = query.const_data_ptr<T>() + (head * group + member) * query.stride(1) +
                        row * query.stride(2);
        for (int at = 0; at < size; ++at) queries[i++] = static_cast<float>(from[at]) * scale;
      }

  std::vector<float> most(heads * results), sum(heads * results), outs(heads * results * size);
  const int count = parts.size() * heads;
  std::atomic<int> next{0};  // parts differ in length: who is done takes the next
  at::parallel_for(0, std::min(at::get_num_threads(), count), 1, [&](int64_t, int64_t) {
    for (int i; (i = next++) < count;) {
      const Part& part = parts[i / heads];
      const int head = i % heads;
      const int64_t at = head * results + part.at;
      const float* from = queries.data() + (head * rows + part.first_row) * group * size;
      attend<T>(part, from, part.rows * group, size, keys.const_data_ptr<T>() + head * pool,
                values.const_data_ptr<T>() + head * pool, &most[at], &sum[at], &outs[at * size]);
    }
  });

  for (int row = 0; row < rows; ++row)
    for (int q = 0; q < heads * group; ++q) {
      const int head = q / group, member = q % group;
      float total[MOST_SIZE] = {}, top = LOWEST, divisor = 0;
      const auto each = [&](const auto& visit) {
        for (int i = 0; i < shared; ++i)
          visit(head * results + parts[i].at + row * group + member);
        for (int i = own[row]; i < own[row + 1]; ++i)
          visit(head * results + parts[i].at + member);
      };
      each([&](int64_t at) { top = most[at] > top ? most[at] : top; });
      each([&](int64_t at) {
        const float weight = exponential(most[at] - top);
        divisor += weight * sum[at];
        for (int i = 0; i < size; ++i) total[i] += weight * outs[at * size + i];
      });
      T* to = out.data_ptr<T>() + (static_cast<int64_t>(row) * heads * group + q) * size;
      for (int i = 0; i < size; ++i) to[i] = static_cast<T>(total[i] / divisor);
    }
}

// query: (1, query heads, tokens, size); key, value: (1, heads, tokens, size), each head's numbers
// side by side. keys, values: (heads, blocks, BLOCK, size). slots: int64, where each token goes.
// tables: int32 (rows, blocks), ends: int32 (rows,): blocks and tokens of the first rows. common:
// blocks that all tables begin with. out: (1, tokens, query heads, size), of which rows are filled.
void decode(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
            at::Tensor keys, at::Tensor values, const at::Tensor& slots, const at::Tensor& tables,
            const at::Tensor& ends, int64_t common, double scale, at::Tensor out) {
  TORCH_CHECK(keys.size(2) == BLOCK && keys.size(3) % LANES == 0 && keys.size(3) <= MOST_SIZE,
              "keys of shape ", keys.sizes());
  TORCH_CHECK(query.stride(3) == 1 && key.stride(3) == 1 && value.stride(3) == 1 &&
                  keys.is_contiguous() && values.is_contiguous() && out.is_contiguous() &&
                  tables.is_contiguous(),
              "numbers of a head must lie side by side");
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, query.scalar_type(), "verbatim::decode", [&] {
        store<scalar_t>(key, slots, keys);
        store<scalar_t>(value, slots, values);
        if (ends.size(0))
          decode_as<scalar_t>(query, keys, values, tables, ends, common, scale, out);
      });
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, int64_t) {
  using Scalars = c10::List<std::optional<at::Scalar>>;
  using Library = at::Tensor(const at::Tensor&, const at::Tensor&,
                             const std::optional<at::Tensor>&, c10::string_view, Scalars,
                             std::optional<c10::string_view>);
  static const auto library = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
                                  .typed<Library>();
  return library.call(x, weight, bias, "none", Scalars(), "");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(verbatim, library) {
  library.def(
      "decode(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor slots, Tensor tables, Tensor ends, int common, float scale, Tensor(c!) out) -> ()");
}

TORCH_LIBRARY_IMPL(verbatim, CPU, library) {
  library.impl("decode", decode);
}

// Packed weights have a backend of their own, and it goes before that of x.
TORCH_LIBRARY_IMPL(verbatim, MkldnnCPU, library) {
  library.impl("linear", linear);
}
