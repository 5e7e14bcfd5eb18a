// CARAFE on the CPU; the letters and the formula are those of carafe.py.
//
// One source file with a plain C interface, called with pointers and strides:
// it knows nothing of torch, so one binary serves every torch. It is compiled
// once per vector width (see setup.py), and cpu.py loads the widest that the
// machine runs.
//
// All three operators work in the same way. A block is ROWS by COLUMNS source
// pixels; neighbouring columns are the lanes of a vector. Blocks are the outer
// loop and channels the inner one: the weights of a block, K*K*S*S for each of
// its pixels, stay in the cache while the channels of the group stream past
// them, CHUNK at a time, through small buffers. Only the copies to and from
// these buffers know of dtypes, memory formats and borders; the arithmetic
// between them sees dense rows with zeros around the map.
//
// A block writes outputs that no other block writes, and adds up everything
// for them in one fixed order, so results do not depend on the threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

// The OpenMP runtime that torch has loaded already (libgomp's entry point,
// which the runtimes of LLVM and Intel offer too). Linking one here could
// bring in a second, whose threads would compete with torch's. Where there is
// none, this is null, and one thread does all.
extern "C" void GOMP_parallel(void (*function)(void *), void *data,
                              unsigned threads, unsigned flags)
    __attribute__((weak));

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// How many sums are kept in registers at once.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int SUMS = 16;
#else
constexpr int SUMS = 8;
#endif

constexpr int ROWS = 2;
constexpr int COLUMNS = 16;
constexpr int CHUNK = 16;

// In the order of the tuples in reference.py.
enum Border { ZEROS, RENORMALIZE };
enum Normalizer { SOFTMAX, SIGMOID_NORMALIZED, SIGMOID, NONE };
enum Dtype { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };

// Mirrored by _Arguments in cpu.py. Strides count elements.
struct Arguments {
  int64_t dtype, normalizer, border, threads;
  int64_t N, C, H, W, K, G, S;
  void *low;  // [N, C, H, W]: features or their gradient
  int64_t low_strides[4];
  void *high;  // [N, C, S*H, S*W]: the output or its gradient
  int64_t high_strides[4];
  void *scores;  // [N, G, K*K, S, S, H, W]
  int64_t scores_strides[7];
  void *grad_scores;  // [N, G, K*K, S, S, H, W]
  int64_t grad_scores_strides[7];
  void *statistics;  // [2, N, G, S*S, H, W]: see GradFeatures
};

// ---------------------------------------------------------------------------
// Numbers: what is stored (T) and what is computed with (A)

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

template <class To, class From> inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bfloat x) {
  return bit_cast<float>(uint32_t(x.bits) << 16);
}
inline float widen(Half x) {
  // Moves exponent and mantissa into place; the product corrects the bias.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x7c00u << 13 ? 0x7f800000 : 0;  // inf and nan
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
}

inline void narrow(float x, float &to) { to = x; }
inline void narrow(double x, double &to) { to = x; }
inline void narrow(float x, Bfloat &to) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = uint16_t(x != x ? 0x7fc0 : rounded);
}
inline void narrow(float x, Half &to) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits & 0x80000000;
  const uint32_t magnitude = bits ^ sign;
  const uint32_t normal =
      (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Adding 0.5 shifts the bits of a subnormal to the end of the mantissa.
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t finite = magnitude < 113u << 23 ? subnormal : normal;
  to.bits =
      uint16_t((magnitude >= 143u << 23 ? special : finite) | sign >> 16);
}

template <class T> using Accumulator = decltype(widen(T()));

// ---------------------------------------------------------------------------
// Vectors

template <class A> constexpr int LANES = VECTOR_BYTES / int(sizeof(A));
template <class A> struct VectorOf {
  typedef A type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class A> using Vector = typename VectorOf<A>::type;

template <class A> inline Vector<A> load(const A *from) {
  Vector<A> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <class A> inline void store(A *to, Vector<A> x) {
  std::memcpy(to, &x, sizeof x);
}

// a0 b0 a1 b1 ..., its first or its second half
template <int FIRST, class V, int... I>
inline V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (FIRST + I / 2 + I % 2 * L)...);
#else
  typedef std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t> Index;
  typedef Index Indices __attribute__((vector_size(VECTOR_BYTES)));
  return __builtin_shuffle(a, b, Indices{(FIRST + I / 2 + I % 2 * L)...});
#endif
}

// Interleaving the upper with the lower half of the rows rotates the bits of
// every element's address (row, column) by one; log2(L) times swaps the two.
template <class A> inline void transpose(Vector<A> (&x)[LANES<A>]) {
  constexpr int L = LANES<A>;
  constexpr std::make_integer_sequence<int, L> lanes;
  for (int done = 1; done < L; done *= 2) {
    Vector<A> y[L];
    for (int i = 0; i < L / 2; ++i) {
      y[2 * i] = interleave<0>(x[i], x[i + L / 2], lanes);
      y[2 * i + 1] = interleave<L / 2>(x[i], x[i + L / 2], lanes);
    }
    std::copy(y, y + L, x);
  }
}

inline Vector<double> exp_nonpositive(Vector<double> x) {
  for (int i = 0; i < LANES<double>; ++i)
    x[i] = std::exp(x[i]);
  return x;
}

// exp(x) = 2^n exp(r), r = x - n log 2, |r| <= log(2) / 2; below the smallest
// normal number, 0. Coefficients: Cephes' expf, 1 ulp.
inline Vector<float> exp_nonpositive(Vector<float> x) {
  typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
  const float round = 0x1.8p23f;  // its last bit is worth 1
  const Vector<float> shifted = x * 1.44269504f + round, n = shifted - round;
  const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float> y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  y = (Vector<float>)((Integers)y + ((Integers)shifted << 23));
  y = x < -87.33654f ? Vector<float>{} : y;
  return x != x ? x : y;
}

// ---------------------------------------------------------------------------
// Copies between tensors and buffers

// Calls body(i) so that its ranges [i, i + L) cover [0, count): the last one
// overlaps its neighbour rather than reaching beyond the end.
template <int L, class Body>
inline void for_overlapping(int64_t count, Body body) {
  for (int64_t i = 0; i < count - L; i += L)
    body(i);
  body(count - L);
}

// to[r, c] = from[r, c], dense columns to dense columns
template <class T, class A>
inline void read_row(A *to, const T *from, int64_t count) {
  constexpr int L = LANES<A>;
  if (count >= L)
    for_overlapping<L>(count, [=](int64_t c) {
      for (int i = 0; i < L; ++i)
        to[c + i] = widen(from[c + i]);
    });
  else
    for (int64_t c = 0; c < count; ++c)
      to[c] = widen(from[c]);
}

template <class T, class A>
inline void write_row(T *to, const A *from, int64_t count) {
  constexpr int L = LANES<A>;
  if (count >= L)
    for_overlapping<L>(count, [=](int64_t c) {
      for (int i = 0; i < L; ++i)
        narrow(from[c + i], to[c + i]);
    });
  else
    for (int64_t c = 0; c < count; ++c)
      narrow(from[c], to[c]);
}

// to[r * pitch + c] = from[r * row + c * column] for 0 <= c < count
template <class T, class A>
void read(A *to, int64_t pitch, const T *from, int64_t rows, int64_t count,
          int64_t row, int64_t column) {
  constexpr int L = LANES<A>;
  int64_t r = 0;
  if (column == 1) {
    for (; r < rows; ++r)
      read_row(to + r * pitch, from + r * row, count);
  } else if (row == 1 && column == 2 && rows == 2 && count >= L) {
    for_overlapping<L>(count, [=](int64_t c) {
      for (int i = 0; i < L; ++i) {
        to[c + i] = widen(from[2 * (c + i)]);
        to[pitch + c + i] = widen(from[2 * (c + i) + 1]);
      }
    });
    r = 2;
  } else if (row == 1 && count >= L) {
    for (; r + L <= rows; r += L)
      for_overlapping<L>(count, [=](int64_t c) {
        Vector<A> x[L];
        for (int i = 0; i < L; ++i) {
          A values[L];
          for (int j = 0; j < L; ++j)
            values[j] = widen(from[r + j + (c + i) * column]);
          x[i] = load(values);
        }
        transpose<A>(x);
        for (int j = 0; j < L; ++j)
          store(to + (r + j) * pitch + c, x[j]);
      });
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < count; ++c)
      to[r * pitch + c] = widen(from[r * row + c * column]);
}

// to[r * row + c * column] = from[r * pitch + c] for 0 <= c < count
template <class T, class A>
__attribute__((noinline)) void write(T *to, int64_t row, int64_t column,
                                     const A *from, int64_t pitch,
                                     int64_t rows, int64_t count) {
  constexpr int L = LANES<A>;
  int64_t r = 0;
  if (column == 1) {
    for (; r < rows; ++r)
      write_row(to + r * row, from + r * pitch, count);
  } else if (row == 1 && column == 2 && rows == 2 && count >= L) {
    for_overlapping<L>(count, [=](int64_t c) {
      for (int i = 0; i < L; ++i) {
        narrow(from[c + i], to[2 * (c + i)]);
        narrow(from[pitch + c + i], to[2 * (c + i) + 1]);
      }
    });
    r = 2;
  } else if (row == 1 && count >= L) {
    for (; r + L <= rows; r += L)
      for_overlapping<L>(count, [=](int64_t c) {
        Vector<A> x[L];
        for (int j = 0; j < L; ++j)
          x[j] = load(from + (r + j) * pitch + c);
        transpose<A>(x);
        for (int i = 0; i < L; ++i) {
          A values[L];
          store(values, x[i]);
          for (int j = 0; j < L; ++j)
            narrow(values[j], to[r + j + (c + i) * column]);
        }
      });
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < count; ++c)
      narrow(from[r * pitch + c], to[r * row + c * column]);
}

// Like read(), for columns [first, first + count) of a map with limit columns;
// those outside the map are zero.
template <class T, class A>
__attribute__((noinline)) void
read_padded(A *to, int64_t pitch, const T *from, int64_t rows, int64_t count,
            int64_t row, int64_t column, int64_t first, int64_t limit) {
  const int64_t begin = std::clamp<int64_t>(-first, 0, count);
  const int64_t end = std::clamp<int64_t>(limit - first, begin, count);
  for (int64_t r = 0; r < rows && (begin > 0 || end < count); ++r) {
    std::fill(to + r * pitch, to + r * pitch + begin, A(0));
    std::fill(to + r * pitch + end, to + r * pitch + count, A(0));
  }
  if (begin < end)
    read(to + begin, pitch, from + (first + begin) * column, rows, end - begin,
         row, column);
}

// ---------------------------------------------------------------------------
// Normalisation over the K*K taps, written as
//   weight = rise(logit, top) * scale

template <int MODE, class V> inline V rise(V logit, V top) {
  static_assert(MODE >= SOFTMAX && MODE <= NONE, "a normaliser");
  const V zero{};
  if (MODE == SOFTMAX)
    return exp_nonpositive(logit - top);
  if (MODE == NONE)
    return logit;
  const V tail = exp_nonpositive(logit < zero ? logit : -logit);
  if (MODE == SIGMOID)
    return (logit < zero ? tail : zero + 1) / (1 + tail);
  // sigmoid(logit) / exp(top), with top >= min(logit, 0)
  return exp_nonpositive((logit < zero ? logit : zero) - top) / (1 + tail);
}

// Calls f with the normaliser as a constant; false if it is unknown.
template <class F> inline bool with_normalizer(int64_t normalizer, F f) {
  switch (normalizer) {
  case SOFTMAX:
    f(std::integral_constant<int, SOFTMAX>());
    return true;
  case SIGMOID_NORMALIZED:
    f(std::integral_constant<int, SIGMOID_NORMALIZED>());
    return true;
  case SIGMOID:
    f(std::integral_constant<int, SIGMOID>());
    return true;
  case NONE:
    f(std::integral_constant<int, NONE>());
    return true;
  }
  return false;
}

constexpr bool has_sum(int mode) {
  return mode == SOFTMAX || mode == SIGMOID_NORMALIZED;
}

// Turns scores into weights, [K*K, S*S, COLUMNS]. Where these depend on a sum
// over the taps, also gives the top and scale of above, each [S*S, COLUMNS].
template <int MODE, class A>
void normalize_mode(const A *logits, A *weights, A *tops, A *scales,
                    int64_t taps, int64_t subpixels) {
  typedef Vector<A> V;
  const int64_t size = subpixels * COLUMNS;  // of one tap
  for (int64_t at = 0; at < size; at += LANES<A>) {
    V top{}, sum{};
    if (has_sum(MODE)) {
      top = load(logits + at);
      for (int64_t k = 1; k < taps; ++k) {
        const V x = load(logits + k * size + at);
        top = x > top ? x : top;
      }
      if (MODE == SIGMOID_NORMALIZED)
        top = top < V{} ? top : V{};
    }
    for (int64_t k = 0; k < taps; ++k) {
      const V x = rise<MODE>(load(logits + k * size + at), top);
      store(weights + k * size + at, x);
      sum += x;
    }
    if (has_sum(MODE)) {
      for (int64_t k = 0; k < taps; ++k)
        store(weights + k * size + at, load(weights + k * size + at) / sum);
      store(tops + at, top);
      store(scales + at, 1 / sum);
    }
  }
}

// Turns count scores into weights, given the top and scale of each of them.
template <int MODE, class A>
void reweigh_mode(A *logits, const A *tops, const A *scales, int64_t count) {
  for (int64_t at = 0; at < count; at += LANES<A>)
    store(logits + at,
          rise<MODE>(load(logits + at), load(tops + at)) * load(scales + at));
}

// Turns the gradient of the weights into that of the scores, in place.
template <int MODE, class A>
void normalize_backward_mode(const A *logits, const A *weights, A *grad,
                             int64_t taps, int64_t subpixels) {
  static_assert(MODE >= SOFTMAX && MODE <= NONE, "a normaliser");
  typedef Vector<A> V;
  const int64_t size = subpixels * COLUMNS;
  for (int64_t at = 0; at < size; at += LANES<A>) {
    V dot{};
    if (has_sum(MODE))
      for (int64_t k = 0; k < taps; ++k)
        dot += load(weights + k * size + at) * load(grad + k * size + at);
    for (int64_t k = 0; k < taps; ++k) {
      const V w = load(weights + k * size + at);
      V g = load(grad + k * size + at);
      if (has_sum(MODE))
        g = w * (g - dot);
      if (MODE == SIGMOID)
        g = g * w * (1 - w);
      if (MODE == SIGMOID_NORMALIZED)
        g *= rise<SIGMOID>(-load(logits + k * size + at), V{});
      store(grad + k * size + at, g);
    }
  }
}

// ---------------------------------------------------------------------------
// Arithmetic on one row of a block. Pitches are distances in buffers. A
// template argument of 0 means that the number is known at run time only.

// y[c, p] = sum over k of x[c, k] * w[k, p], for SUBPIXELS subpixels p
template <int KERNEL, int SUBPIXELS, class A>
inline void reassemble_tile(const A *x, int64_t x_pitch, int64_t pitch,
                            const A *w, A *y, int64_t kernel,
                            int64_t subpixels, int64_t channels,
                            int64_t columns) {
  constexpr int CHANNELS = SUMS / SUBPIXELS;
  const int64_t K = KERNEL ? KERNEL : kernel;
  for (int64_t c = 0; c < channels; c += CHANNELS)
    for (int64_t v = 0; v < columns; v += LANES<A>) {
      Vector<A> sum[CHANNELS][SUBPIXELS] = {};
      for (int64_t ky = 0; ky < K; ++ky)
        for (int64_t kx = 0; kx < K; ++kx) {
          Vector<A> value[CHANNELS];
          for (int i = 0; i < CHANNELS; ++i)
            value[i] = load(x + (c + i) * x_pitch + ky * pitch + kx + v);
          for (int p = 0; p < SUBPIXELS; ++p) {
            const Vector<A> weight =
                load(w + ((ky * K + kx) * subpixels + p) * COLUMNS + v);
            for (int i = 0; i < CHANNELS; ++i)
              sum[i][p] += value[i] * weight;
          }
        }
      for (int i = 0; i < CHANNELS; ++i)
        for (int p = 0; p < SUBPIXELS; ++p)
          store(y + ((c + i) * subpixels + p) * COLUMNS + v, sum[i][p]);
    }
}

// x [CHUNK, K, pitch], w [K*K, S*S, COLUMNS] -> y [CHUNK, S*S, COLUMNS]
template <int KERNEL, class A>
void reassemble_row(const A *x, int64_t x_pitch, int64_t pitch, const A *w,
                    A *y, int64_t kernel, int64_t subpixels, int64_t channels,
                    int64_t columns) {
  int64_t p = 0;
  for (; p + 4 <= subpixels; p += 4)
    reassemble_tile<KERNEL, 4>(x, x_pitch, pitch, w + p * COLUMNS,
                               y + p * COLUMNS, kernel, subpixels, channels,
                               columns);
  for (; p < subpixels; ++p)
    reassemble_tile<KERNEL, 1>(x, x_pitch, pitch, w + p * COLUMNS,
                               y + p * COLUMNS, kernel, subpixels, channels,
                               columns);
}

// g [CHUNK, K, S*S, pitch], w [K*K, S*S, COLUMNS] -> x [CHUNK, COLUMNS]
template <int KERNEL, int SUBPIXELS, class A>
void gather_row(const A *g, int64_t g_pitch, int64_t pitch, const A *w, A *x,
                int64_t kernel, int64_t subpixels, int64_t channels,
                int64_t columns) {
  const int64_t K = KERNEL ? KERNEL : kernel;
  if (SUBPIXELS)
    subpixels = SUBPIXELS;
  for (int64_t c = 0; c < channels; c += SUMS)
    for (int64_t v = 0; v < columns; v += LANES<A>) {
      Vector<A> sum[SUMS] = {};
      for (int64_t ky = 0; ky < K; ++ky)
        for (int64_t p = 0; p < subpixels; ++p)
          for (int64_t kx = 0; kx < K; ++kx) {
            const Vector<A> weight =
                load(w + ((ky * K + kx) * subpixels + p) * COLUMNS + v);
            for (int i = 0; i < SUMS; ++i)
              sum[i] += weight * load(g + (c + i) * g_pitch +
                                      (ky * subpixels + p) * pitch + kx + v);
          }
      for (int i = 0; i < SUMS; ++i)
        store(x + (c + i) * COLUMNS + v, sum[i]);
    }
}

// w[k, p] += sum over c of x[c, k] * g[c, p], for TAPS taps k of one tap row
// and SUBPIXELS subpixels p
template <int TAPS, int SUBPIXELS, class A>
inline void correlate_tile(const A *x, int64_t x_pitch, const A *g,
                           int64_t g_pitch, A *w, int64_t subpixels,
                           int64_t channels, int64_t columns) {
  for (int64_t v = 0; v < columns; v += LANES<A>) {
    Vector<A> sum[TAPS][SUBPIXELS];
    for (int t = 0; t < TAPS; ++t)
      for (int p = 0; p < SUBPIXELS; ++p)
        sum[t][p] = load(w + (t * subpixels + p) * COLUMNS + v);
    for (int64_t c = 0; c < channels; ++c) {
      Vector<A> grad[SUBPIXELS];
      for (int p = 0; p < SUBPIXELS; ++p)
        grad[p] = load(g + c * g_pitch + p * COLUMNS + v);
      for (int t = 0; t < TAPS; ++t) {
        const Vector<A> value = load(x + c * x_pitch + t + v);
        for (int p = 0; p < SUBPIXELS; ++p)
          sum[t][p] += value * grad[p];
      }
    }
    for (int t = 0; t < TAPS; ++t)
      for (int p = 0; p < SUBPIXELS; ++p)
        store(w + (t * subpixels + p) * COLUMNS + v, sum[t][p]);
  }
}

// x [CHUNK, K, pitch], g [CHUNK, S*S, COLUMNS]
// -> added to w [K*K, S*S, COLUMNS]
template <int KERNEL, class A>
void correlate_row(const A *x, int64_t x_pitch, int64_t pitch, const A *g,
                   int64_t g_pitch, A *w, int64_t kernel, int64_t subpixels,
                   int64_t channels, int64_t columns) {
  constexpr int TAPS = KERNEL ? KERNEL : 1, SUBPIXELS = SUMS / 4;
  const int64_t K = KERNEL ? KERNEL : kernel;
  for (int64_t ky = 0; ky < K; ++ky)
    for (int64_t kx = 0; kx < K; kx += TAPS) {
      const A *x_k = x + ky * pitch + kx;
      A *w_k = w + (ky * K + kx) * subpixels * COLUMNS;
      int64_t p = 0;
      for (; p + SUBPIXELS <= subpixels; p += SUBPIXELS)
        correlate_tile<TAPS, SUBPIXELS>(x_k, x_pitch, g + p * COLUMNS, g_pitch,
                                        w_k + p * COLUMNS, subpixels, channels,
                                        columns);
      for (; p < subpixels; ++p)
        correlate_tile<TAPS, 1>(x_k, x_pitch, g + p * COLUMNS, g_pitch,
                                w_k + p * COLUMNS, subpixels, channels,
                                columns);
    }
}

// ---------------------------------------------------------------------------
// The operators, block by block

// Zeroed and aligned memory.
template <class A> class Buffer {
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines_;

public:
  explicit Buffer(int64_t count) : lines_((count * sizeof(A) + 63) / 64) {}
  operator A *() { return reinterpret_cast<A *>(lines_.data()); }
};

// Copies between a block and buffers that hold it, CHUNK channels from c on.
template <class T> struct Block {
  typedef Accumulator<T> A;

  const Arguments &a;
  const int64_t K, S, radius, taps, subpixels, group_channels;
  const int64_t lines;                // of source pixels that a block reads
  const int64_t pitch;                // from line to line
  const int64_t weights_size;         // of one row
  int64_t n, g, h, w, rows, columns;  // where the block is, and its extent

  explicit Block(const Arguments &arguments)
      : a(arguments), K(a.K), S(a.S), radius(K / 2), taps(K * K),
        subpixels(S * S), group_channels(a.C / a.G), lines(K + ROWS - 1),
        pitch((COLUMNS + K - 1 + 7) / 8 * 8),
        weights_size(taps * subpixels * COLUMNS) {}

  static int64_t down(const Arguments &a) { return (a.H + ROWS - 1) / ROWS; }
  static int64_t across(const Arguments &a) {
    return (a.W + COLUMNS - 1) / COLUMNS;
  }
  static int64_t count(const Arguments &a) {
    return a.N * a.G * down(a) * across(a);
  }

  void seek(int64_t item) {
    w = item % across(a) * COLUMNS;
    item /= across(a);
    h = item % down(a) * ROWS;
    item /= down(a);
    g = item % a.G;
    n = item / a.G;
    rows = std::min<int64_t>(ROWS, a.H - h);
    columns = std::min<int64_t>(COLUMNS, a.W - w);
  }

  // low, with K/2 pixels around the block -> [CHUNK, lines, pitch]
  void read_low(A *to, int64_t c, int64_t channels) const {
    const int64_t *strides = a.low_strides;
    const T *from = static_cast<const T *>(a.low) + n * strides[0] +
                    (g * group_channels + c) * strides[1];
    for (int64_t r = 0; r < rows + K - 1; ++r) {
      const int64_t y = h - radius + r;
      const bool inside = y >= 0 && y < a.H;
      read_padded(to + r * pitch, lines * pitch,
                  from + (inside ? y : 0) * strides[2], channels,
                  columns + K - 1, strides[1], strides[3], w - radius,
                  inside ? a.W : 0);
    }
  }

  // [ROWS, CHUNK, COLUMNS] -> low
  void write_low(const A *from, int64_t c, int64_t channels) const {
    const int64_t *strides = a.low_strides;
    for (int64_t r = 0; r < rows; ++r)
      write(static_cast<T *>(a.low) + n * strides[0] +
                (g * group_channels + c) * strides[1] + (h + r) * strides[2] +
                w * strides[3],
            strides[1], strides[3], from + r * CHUNK * COLUMNS, COLUMNS,
            channels, columns);
  }

  // high, with margin source pixels around the block
  // -> [CHUNK, ROWS + 2 * margin, S*S, to_pitch]
  void read_high(A *to, int64_t to_pitch, int64_t margin, int64_t c,
                 int64_t channels) const {
    const int64_t *strides = a.high_strides;
    const T *from = static_cast<const T *>(a.high) + n * strides[0] +
                    (g * group_channels + c) * strides[1];
    const int64_t channel = (ROWS + 2 * margin) * subpixels * to_pitch;
    const int64_t width = columns + 2 * margin;
    for (int64_t r = 0; r < rows + 2 * margin; ++r) {
      const int64_t y = h - margin + r;
      const bool inside = y >= 0 && y < a.H;
      for (int64_t i = 0; i < S; ++i) {
        A *to_row = to + (r * S + i) * S * to_pitch;
        const T *from_row = from + (inside ? S * y + i : 0) * strides[2];
        if (strides[3] == 1)
          for (int64_t j = 0; j < channels; ++j)
            read_padded(to_row + j * channel, to_pitch,
                        from_row + j * strides[1], S, width, 1, S, w - margin,
                        inside ? a.W : 0);
        else
          for (int64_t j = 0; j < S; ++j)
            read_padded(to_row + j * to_pitch, channel,
                        from_row + j * strides[3], channels, width, strides[1],
                        S * strides[3], w - margin, inside ? a.W : 0);
      }
    }
  }

  // [ROWS, CHUNK, S*S, COLUMNS] -> high
  void write_high(const A *from, int64_t c, int64_t channels) const {
    const int64_t *strides = a.high_strides;
    T *to = static_cast<T *>(a.high) + n * strides[0] +
            (g * group_channels + c) * strides[1] + S * w * strides[3];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < S; ++i) {
        T *to_row = to + (S * (h + r) + i) * strides[2];
        const A *from_row = from + (r * CHUNK * S + i) * S * COLUMNS;
        if (strides[3] == 1)
          for (int64_t j = 0; j < channels; ++j)
            write(to_row + j * strides[1], 1, S,
                  from_row + j * subpixels * COLUMNS, COLUMNS, S, columns);
        else
          for (int64_t j = 0; j < S; ++j)
            write(to_row + j * strides[3], strides[1], S * strides[3],
                  from_row + j * COLUMNS, subpixels * COLUMNS, channels,
                  columns);
      }
  }

  // The scores of row r -> [K*K, S*S, COLUMNS]
  void read_scores(A *to, int64_t r) const {
    for (int64_t k = 0; k < taps; ++k)
      read_tap(to + k * subpixels * COLUMNS, k, h + r, w);
    if (a.border == RENORMALIZE)
      fill_outside(to, r, -std::numeric_limits<A>::infinity());
  }

  // Those of tap k for the pixels (y, x), (y, x + 1), ... -> [S*S, COLUMNS]
  void read_tap(A *to, int64_t k, int64_t y, int64_t x) const {
    const int64_t *strides = a.scores_strides;
    const bool inside = y >= 0 && y < a.H;
    for (int64_t i = 0; i < S; ++i)
      read_padded(to + i * S * COLUMNS, COLUMNS,
                  static_cast<const T *>(a.scores) + n * strides[0] +
                      g * strides[1] + k * strides[2] + i * strides[3] +
                      (inside ? y : 0) * strides[5],
                  S, COLUMNS, strides[4], strides[6], x, inside ? a.W : 0);
  }

  // [K*K, S*S, COLUMNS] -> the gradient of the scores of row r
  void write_grad_scores(const A *from, int64_t r) const {
    const int64_t *strides = a.grad_scores_strides;
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t i = 0; i < S; ++i)
        write(static_cast<T *>(a.grad_scores) + n * strides[0] +
                  g * strides[1] + k * strides[2] + i * strides[3] +
                  (h + r) * strides[5] + w * strides[6],
              strides[4], strides[6], from + (k * S + i) * S * COLUMNS,
              COLUMNS, S, columns);
  }

  // Gives the taps of row r that read outside the map a value. For weights it
  // is zero, whatever they were: they may be infinite, or NaN.
  void fill_outside(A *weights, int64_t r, A value) const {
    const int64_t y = h + r;
    if (y >= radius && y + radius < a.H && w >= radius &&
        w + columns + radius <= a.W)
      return;
    for (int64_t k = 0; k < taps; ++k) {
      // The columns whose tap is inside: [begin, end)
      const int64_t tap_y = y + k / K - radius, dx = w + k % K - radius;
      const bool inside = tap_y >= 0 && tap_y < a.H;
      const int64_t begin =
          inside ? std::clamp<int64_t>(-dx, 0, COLUMNS) : COLUMNS;
      const int64_t end = std::clamp<int64_t>(a.W - dx, begin, COLUMNS);
      A *tap = weights + k * subpixels * COLUMNS;
      for (int64_t p = 0; p < subpixels; ++p, tap += COLUMNS) {
        std::fill(tap, tap + begin, value);
        std::fill(tap + end, tap + COLUMNS, value);
      }
    }
  }

  void normalize(const A *logits, A *weights, A *tops, A *scales) const {
    with_normalizer(a.normalizer, [&](auto mode) {
      normalize_mode<mode.value, A>(logits, weights, tops, scales, taps,
                                    subpixels);
    });
  }

  template <class Body> void for_chunks(Body body) const {
    for (int64_t c = 0; c < group_channels; c += CHUNK)
      body(c, std::min<int64_t>(CHUNK, group_channels - c));
  }
};

template <class T> class Forward {
  typedef Accumulator<T> A;
  Block<T> at;
  Buffer<A> x, weights, y, tops, scales;

public:
  explicit Forward(const Arguments &a)
      : at(a), x(CHUNK * at.lines * at.pitch), weights(ROWS * at.weights_size),
        y(ROWS * CHUNK * at.subpixels * COLUMNS), tops(at.subpixels * COLUMNS),
        scales(at.subpixels * COLUMNS) {}

  void operator()(int64_t item) {
    at.seek(item);
    for (int64_t r = 0; r < at.rows; ++r) {
      A *weights_r = weights + r * at.weights_size;
      at.read_scores(weights_r, r);
      at.normalize(weights_r, weights_r, tops, scales);
      at.fill_outside(weights_r, r, A(0));
    }
    const auto function = at.K == 5   ? reassemble_row<5, A>
                          : at.K == 3 ? reassemble_row<3, A>
                                      : reassemble_row<0, A>;
    at.for_chunks([&](int64_t c, int64_t channels) {
      at.read_low(x, c, channels);
      for (int64_t r = 0; r < at.rows; ++r)
        function(x + r * at.pitch, at.lines * at.pitch, at.pitch,
                 weights + r * at.weights_size,
                 y + r * CHUNK * at.subpixels * COLUMNS, at.K, at.subpixels,
                 channels, at.columns);
      at.write_high(y, c, channels);
    });
  }
};

// What the weights of a source pixel need besides their own scores, so that
// GradFeatures can compute any of them alone: tops and scales.
template <class T> class Statistics {
  typedef Accumulator<T> A;
  Block<T> at;
  Buffer<A> logits, weights, tops, scales;

public:
  explicit Statistics(const Arguments &a)
      : at(a), logits(at.weights_size), weights(at.weights_size),
        tops(at.subpixels * COLUMNS), scales(at.subpixels * COLUMNS) {}

  void operator()(int64_t item) {
    at.seek(item);
    const Arguments &a = at.a;
    const int64_t size = a.H * a.W, half = a.N * a.G * at.subpixels * size;
    for (int64_t r = 0; r < at.rows; ++r) {
      at.read_scores(logits, r);
      at.normalize(logits, weights, tops, scales);
      A *to = static_cast<A *>(a.statistics) +
              (at.n * a.G + at.g) * at.subpixels * size + (at.h + r) * a.W +
              at.w;
      write<A, A>(to, size, 1, tops, COLUMNS, at.subpixels, at.columns);
      write<A, A>(to + half, size, 1, scales, COLUMNS, at.subpixels,
                  at.columns);
    }
  }
};

// A source pixel takes part in the windows of K*K source pixels: the pixel at
// distance (y, x) reads it with the tap at distance (-y, -x) from its centre.
template <class T> class GradFeatures {
  typedef Accumulator<T> A;
  Block<T> at;
  Buffer<A> grad, weights, x, tops, scales;

public:
  explicit GradFeatures(const Arguments &a)
      : at(a), grad(CHUNK * at.lines * at.subpixels * at.pitch),
        weights(ROWS * at.weights_size), x(ROWS * CHUNK * COLUMNS),
        tops(at.weights_size), scales(at.weights_size) {}

  void operator()(int64_t item) {
    at.seek(item);
    for (int64_t r = 0; r < at.rows; ++r)
      read_opposite_weights(weights + r * at.weights_size, r);
    const auto function = at.S != 2   ? gather_row<0, 0, A>
                          : at.K == 5 ? gather_row<5, 4, A>
                          : at.K == 3 ? gather_row<3, 4, A>
                                      : gather_row<0, 0, A>;
    at.for_chunks([&](int64_t c, int64_t channels) {
      at.read_high(grad, at.pitch, at.radius, c, channels);
      for (int64_t r = 0; r < at.rows; ++r)
        function(grad + r * at.subpixels * at.pitch,
                 at.lines * at.subpixels * at.pitch, at.pitch,
                 weights + r * at.weights_size, x + r * CHUNK * COLUMNS, at.K,
                 at.subpixels, channels, at.columns);
      at.write_low(x, c, channels);
    });
  }

private:
  // Ordered by the distance of their pixels -> [K*K, S*S, COLUMNS]
  void read_opposite_weights(A *to, int64_t r) {
    const int64_t mode = at.a.normalizer, size = at.subpixels * COLUMNS;
    const bool sums = has_sum(int(mode));
    for (int64_t k = 0; k < at.taps; ++k) {
      const int64_t y = at.h + r + k / at.K - at.radius;
      const int64_t x = at.w + k % at.K - at.radius;
      at.read_tap(to + k * size, at.taps - 1 - k, y, x);
      if (sums)
        read_statistics(k, y, x);
    }
    if (!sums)
      return at.normalize(to, to, tops, scales);
    with_normalizer(mode, [&](auto constant) {
      reweigh_mode<constant.value, A>(to, tops, scales, at.weights_size);
    });
  }

  void read_statistics(int64_t k, int64_t y, int64_t x) {
    const Arguments &a = at.a;
    const int64_t size = a.H * a.W, half = a.N * a.G * at.subpixels * size;
    const bool inside = y >= 0 && y < a.H;
    const A *from = static_cast<const A *>(a.statistics) +
                    (at.n * a.G + at.g) * at.subpixels * size +
                    (inside ? y : 0) * a.W;
    const int64_t to = k * at.subpixels * COLUMNS, limit = inside ? a.W : 0;
    read_padded(tops + to, COLUMNS, from, at.subpixels, COLUMNS, size, 1, x,
                limit);
    read_padded(scales + to, COLUMNS, from + half, at.subpixels, COLUMNS, size,
                1, x, limit);
  }
};

template <class T> class GradWeights {
  typedef Accumulator<T> A;
  Block<T> at;
  Buffer<A> x, y, logits, weights, grad, tops, scales;

public:
  explicit GradWeights(const Arguments &a)
      : at(a), x(CHUNK * at.lines * at.pitch),
        y(CHUNK * ROWS * at.subpixels * COLUMNS), logits(at.weights_size),
        weights(at.weights_size), grad(ROWS * at.weights_size),
        tops(at.subpixels * COLUMNS), scales(at.subpixels * COLUMNS) {}

  void operator()(int64_t item) {
    at.seek(item);
    std::fill(grad + 0, grad + ROWS * at.weights_size, A(0));
    const auto function = at.K == 5   ? correlate_row<5, A>
                          : at.K == 3 ? correlate_row<3, A>
                                      : correlate_row<0, A>;
    at.for_chunks([&](int64_t c, int64_t channels) {
      at.read_low(x, c, channels);
      at.read_high(y, COLUMNS, 0, c, channels);
      for (int64_t r = 0; r < at.rows; ++r)
        function(x + r * at.pitch, at.lines * at.pitch, at.pitch,
                 y + r * at.subpixels * COLUMNS, ROWS * at.subpixels * COLUMNS,
                 grad + r * at.weights_size, at.K, at.subpixels, channels,
                 at.columns);
    });
    for (int64_t r = 0; r < at.rows; ++r) {
      A *grad_r = grad + r * at.weights_size;
      at.fill_outside(grad_r, r, A(0));
      normalize_backward(grad_r, r);
      at.write_grad_scores(grad_r, r);
    }
  }

private:
  void normalize_backward(A *grad_r, int64_t r) {
    if (at.a.normalizer == NONE)
      return;
    at.read_scores(logits, r);
    at.normalize(logits, weights, tops, scales);
    with_normalizer(at.a.normalizer, [&](auto mode) {
      normalize_backward_mode<mode.value, A>(logits, weights, grad_r, at.taps,
                                             at.subpixels);
    });
  }
};

// ---------------------------------------------------------------------------
// Threads

template <class Worker> void run(const Arguments &a, int64_t count) {
  // A thread is worth waking for a million multiplications, which take it
  // tens of microseconds.
  const int64_t work_size = a.N * a.C * a.H * a.W * a.K * a.K * a.S * a.S;
  const int64_t threads =
      GOMP_parallel ? std::min({a.threads, count, 1 + work_size / 1000000})
                    : int64_t(1);
  // Neighbouring blocks share their surroundings, so a thread takes many at
  // once; but not its whole share, since another thread may be held up.
  const int64_t share = (count + 8 * threads - 1) / (8 * threads);
  std::atomic<int64_t> next{0};
  auto work = [&] {
    Worker worker(a);
    for (;;) {
      const int64_t begin = next.fetch_add(share);
      if (begin >= count)
        return;
      for (int64_t i = begin; i < std::min(begin + share, count); ++i)
        worker(i);
    }
  };
  // One thread works without a parallel region: in a forked process, which
  // has lost the threads of the runtime, a region would wait for them forever.
  if (threads <= 1)
    work();
  else
    GOMP_parallel([](void *data) { (*static_cast<decltype(work) *>(data))(); },
                  &work, unsigned(threads), 0);
}

// Returns 0, or 1 if an argument is unknown and nothing was done.
template <template <class> class Worker>
int run_dtype(const Arguments &a) noexcept {
  if (!with_normalizer(a.normalizer, [](auto) {}) || a.border < ZEROS ||
      a.border > RENORMALIZE)
    return 1;
  switch (a.dtype) {
  case FLOAT16:
    run<Worker<Half>>(a, Block<Half>::count(a));
    return 0;
  case BFLOAT16:
    run<Worker<Bfloat>>(a, Block<Bfloat>::count(a));
    return 0;
  case FLOAT32:
    run<Worker<float>>(a, Block<float>::count(a));
    return 0;
  case FLOAT64:
    run<Worker<double>>(a, Block<double>::count(a));
    return 0;
  }
  return 1;
}

}  // namespace

extern "C" int reassemble(const Arguments *a) {
  return run_dtype<Forward>(*a);
}

extern "C" int reassemble_grad_features(const Arguments *a) {
  // A sum over the taps that the caller does not know of has no room.
  if (has_sum(int(a->normalizer)) != bool(a->statistics))
    return 1;
  if (a->statistics && run_dtype<Statistics>(*a))
    return 1;
  return run_dtype<GradFeatures>(*a);
}

extern "C" int reassemble_grad_weights(const Arguments *a) {
  return run_dtype<GradWeights>(*a);
}
