// CARAFE on the CPU; the letters and the formula are those of carafe.py.
//
// One source file with a plain C interface, called with pointers and strides:
// it knows nothing of torch, so one binary serves every torch. It is compiled
// once per vector width (see setup.py), and cpu.py loads the widest that the
// machine runs.
//
// All three operators work in the same way. A block is a rectangle of source
// pixels; neighbouring columns are the lanes of a vector. Blocks are the outer
// loop and channels the inner one: the weights of a block, K*K*S*S for each of
// its pixels, stay in the cache while the channels of the group stream past
// them, CHUNK at a time, through small buffers. Only the copies to and from
// these buffers know of dtypes, memory formats and borders; the arithmetic
// between them sees dense rows.
//
// Memory costs more than arithmetic, so blocks are as wide as the map where
// they can be, and several rows high: copies are long and contiguous, and only
// the surroundings of a block are copied more than once.
//
// A block writes outputs that no other block writes, and adds up everything
// for them in one order that depends on neither the block nor the threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if __has_include(<unistd.h>)
#include <unistd.h>  // sysconf
#endif

// The OpenMP runtime that torch has loaded already (libgomp's entry point,
// which the runtimes of LLVM and Intel offer too). Linking one here could
// bring in a second, whose threads would compete with torch's. Where there is
// none, this is null, and one thread does all.
extern "C" void GOMP_parallel(void (*function)(void *), void *data,
                              unsigned threads, unsigned flags)
    __attribute__((weak));

// The first version of exp, which every glibc has. The linker would choose the
// one of glibc 2.29, which differs in how it reports errors, and one wheel
// would not run on all systems that torch's own wheels run on.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17");
#endif

namespace {

// SUMS: how many sums are kept in registers at once.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, SUMS = 16;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, SUMS = 12;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, SUMS = 16;
#else
constexpr int VECTOR_BYTES = 16, SUMS = 8;
#endif

// Source pixels of a row whose weights lie together: a multiple of LANES.
constexpr int COLUMNS = 16;

// Channels that are copied at once: whole cache lines of 32-bit numbers, and
// whole tiles of the arithmetic.
constexpr int CHUNK = SUMS == 12 ? 48 : 16;

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

template <class A> inline A widen(A x) { return x; }
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

template <class A> inline void narrow(A x, A &to) { to = x; }
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

// A store that bypasses the caches: an ordinary one would first read the rest
// of its cache line. It is weakly ordered, so run() ends with a fence.
template <class V> inline void stream(void *to, V x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i *>(to), (__m512i)x);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i *>(to), (__m256i)x);
#else
  std::memcpy(to, &x, sizeof x);
#endif
}

// The elements FROM... of a and b, those of b counted on from those of a
template <int... FROM, class V> inline V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, FROM...);
#else
  typedef std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t> Index;
  typedef Index Indices __attribute__((vector_size(VECTOR_BYTES)));
  return __builtin_shuffle(a, b, Indices{FROM...});
#endif
}

// a0 b0 a1 b1 ..., its first or its second half
template <bool SECOND, class V, int... I>
inline V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  return shuffle<(SECOND * L / 2 + I / 2 + I % 2 * L)...>(a, b);
}

// The elements of a and b with an even or with an odd number
template <bool ODD, class V, int... I>
inline V deinterleave(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<(ODD + 2 * I)...>(a, b);
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
      y[2 * i + 1] = interleave<1>(x[i], x[i + L / 2], lanes);
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
  y = (y * r + 8.3334519073e-3f) * r + 4.1665795894e-2f;
  y = (y * r + 1.6666665459e-1f) * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  y = (Vector<float>)((Integers)y + ((Integers)shifted << 23));
  y = x < -87.33654f ? Vector<float>{} : y;
  return x != x ? x : y;
}

// ---------------------------------------------------------------------------
// Copies between tensors and buffers

// Calls body(i, width) so that its ranges [i, i + width) cover [0, count).
// They are L wide: the last one overlaps its neighbour rather than reaching
// beyond the end. Only a count below L makes a narrower one.
template <int L, class Body>
[[gnu::always_inline]] inline void for_overlapping(int64_t count, Body body) {
  constexpr std::integral_constant<int64_t, L> whole;
  if (count < L)
    return body(0, count);
  for (int64_t i = 0; i < count - L; i += L)
    body(i, whole);
  body(count - L, whole);
}

// to_0[i], to_1[i] = from[2 * i], from[2 * i + 1] for L values of i
template <class T, class A>
inline void read_pairs(A *to_0, A *to_1, const T *from) {
  constexpr int L = LANES<A>;
  constexpr std::make_integer_sequence<int, L> lanes;
  A values[2 * L];
  for (int i = 0; i < 2 * L; ++i)
    values[i] = widen(from[i]);
  const Vector<A> a = load(values), b = load(values + L);
  store(to_0, deinterleave<0>(a, b, lanes));
  store(to_1, deinterleave<1>(a, b, lanes));
}

// Where the first of two 16-bit numbers is, in the 32 bits of both
constexpr int FIRST = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 0 : 16;

// to[2 * i], to[2 * i + 1] = from_0[i], from_1[i] for L values of i
template <class T, class A>
inline void write_pairs(T *to, const A *from_0, const A *from_1) {
  constexpr int L = LANES<A>;
  constexpr std::make_integer_sequence<int, L> lanes;
  const Vector<A> a = load(from_0), b = load(from_1);
  if constexpr (sizeof(T) == sizeof(A)) {
    store(to, interleave<0>(a, b, lanes));
    store(to + L, interleave<1>(a, b, lanes));
  } else {
    for (int i = 0; i < L; ++i) {
      T x, y;
      narrow(a[i], x);
      narrow(b[i], y);
      const uint32_t pair = uint32_t(x.bits) << FIRST | uint32_t(y.bits)
                                                            << (16 - FIRST);
      std::memcpy(to + 2 * i, &pair, sizeof pair);
    }
  }
}

// to[r * pitch + c] = from[r * row + c * column] for 0 <= c < count
template <class T, class A>
[[gnu::noinline]] void read(A *to, int64_t pitch, const T *from, int64_t rows,
                            int64_t count, int64_t row, int64_t column) {
  constexpr int L = LANES<A>;
  int64_t r = 0;
  if (column == 1) {
    for (; r < rows; ++r)
      for_overlapping<L>(count, [=](int64_t c, auto width) {
        for (int i = 0; i < width; ++i)
          to[r * pitch + c + i] = widen(from[r * row + c + i]);
      });
  } else if (row == 1 && column == 2 && rows == 2 && count >= L) {
    for_overlapping<L>(count, [=](int64_t c, auto) {
      read_pairs(to + c, to + pitch + c, from + 2 * c);
    });
    r = 2;
  } else if (row == 1) {
    for (; r + L <= rows; r += L)
      for_overlapping<L>(count, [=](int64_t c, auto width) {
        Vector<A> x[L] = {};
        for (int i = 0; i < width; ++i) {
          A values[L];
          for (int j = 0; j < L; ++j)
            values[j] = widen(from[r + j + (c + i) * column]);
          // Pixels are far apart: fetch those that are read next.
          __builtin_prefetch(from + r + (c + COLUMNS + i) * column);
          x[i] = load(values);
        }
        transpose<A>(x);
        for (int j = 0; j < L; ++j)
          std::memcpy(to + (r + j) * pitch + c, &x[j], width * sizeof(A));
      });
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < count; ++c)
      to[r * pitch + c] = widen(from[r * row + c * column]);
}

// to[r * row + c * column] = from[r * pitch + c] for 0 <= c < count
template <class T, class A>
[[gnu::noinline]] void write(const A *from, int64_t pitch, T *to, int64_t rows,
                             int64_t count, int64_t row, int64_t column) {
  constexpr int L = LANES<A>;
  int64_t r = 0;
  if (column == 1) {
    for (; r < rows; ++r)
      for_overlapping<L>(count, [=](int64_t c, auto width) {
        for (int i = 0; i < width; ++i)
          narrow(from[r * pitch + c + i], to[r * row + c + i]);
      });
  } else if (row == 1 && column == 2 && rows == 2 && count >= L) {
    for_overlapping<L>(count, [=](int64_t c, auto) {
      write_pairs(to + 2 * c, from + c, from + pitch + c);
    });
    r = 2;
  } else if (row == 1) {
    const auto transposed = [&](auto streams) {
      constexpr int COUNT = streams ? 64 / sizeof(T) : L;
      for (; r + COUNT <= rows; r += COUNT)
        for_overlapping<L>(count, [=](int64_t c, auto width) {
          Vector<A> x[COUNT / L][L] = {};
          for (int j = 0; j < COUNT; ++j)
            std::memcpy(&x[j / L][j % L], from + (r + j) * pitch + c,
                        width * sizeof(A));
          for (auto &part : x)
            transpose<A>(part);
          for (int i = 0; i < width; ++i)
            for (int j = 0; j < COUNT; j += L) {
              T *pixel = to + r + j + (c + i) * column;
              if constexpr (streams)
                stream(pixel, x[j / L][i]);
              else
                for (int k = 0; k < L; ++k)
                  narrow(x[j / L][i][k], pixel[k]);
            }
        });
    };
    if constexpr (sizeof(T) == sizeof(A))
      if ((uintptr_t(to) | column * sizeof(T)) % 64 == 0)
        transposed(std::true_type());
    transposed(std::false_type());
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < count; ++c)
      narrow(from[r * pitch + c], to[r * row + c * column]);
}

// Like read(), into rows of width: those columns, and left zeros before them.
template <class T, class A>
void read_padded(A *to, int64_t pitch, int64_t left, int64_t width,
                 const T *from, int64_t rows, int64_t count, int64_t row,
                 int64_t column) {
  if (left > 0 || left + count < width)
    for (int64_t r = 0; r < rows; ++r) {
      std::fill(to + r * pitch, to + r * pitch + left, A(0));
      std::fill(to + r * pitch + left + count, to + r * pitch + width, A(0));
    }
  if (count > 0)
    read(to + left, pitch, from, rows, count, row, column);
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
  const auto is = [&](auto m) { return normalizer == m && (f(m), true); };
  return is(std::integral_constant<int, SOFTMAX>()) ||
         is(std::integral_constant<int, SIGMOID_NORMALIZED>()) ||
         is(std::integral_constant<int, SIGMOID>()) ||
         is(std::integral_constant<int, NONE>());
}

constexpr bool has_sum(int mode) {
  return mode == SOFTMAX || mode == SIGMOID_NORMALIZED;
}

// Turns scores into weights, [K*K, S*S, COLUMNS].
template <int MODE, class A>
void normalize_mode(const A *logits, A *weights, int64_t taps,
                    int64_t subpixels) {
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
    if (has_sum(MODE))
      for (int64_t k = 0; k < taps; ++k)
        store(weights + k * size + at, load(weights + k * size + at) / sum);
  }
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
// Arithmetic on COLUMNS source pixels of a row. Pitches are distances in
// buffers. A KERNEL of 0 means that K is known at run time only.

struct Counts {
  int64_t K, subpixels, channels, columns;
};

// y[c, p] = sum over k of x[c, k] * w[k, p], for SUBPIXELS subpixels p
template <int KERNEL, int SUBPIXELS, class A>
inline void reassemble_tile(const A *x, int64_t x_pitch, int64_t pitch,
                            const A *w, A *y, int64_t y_pitch, Counts n) {
  constexpr int CHANNELS = SUMS / SUBPIXELS;
  static_assert(CHUNK % CHANNELS == 0, "whole tiles");
  const int64_t K = KERNEL ? KERNEL : n.K;
  for (int64_t v = 0; v < n.columns; v += LANES<A>)
    for (int64_t c = 0; c < n.channels; c += CHANNELS) {
      Vector<A> sum[CHANNELS][SUBPIXELS] = {};
      for (int64_t ky = 0; ky < K; ++ky)
        for (int64_t kx = 0; kx < K; ++kx) {
          Vector<A> value[CHANNELS];
          for (int i = 0; i < CHANNELS; ++i)
            value[i] = load(x + (c + i) * x_pitch + ky * pitch + kx + v);
          for (int p = 0; p < SUBPIXELS; ++p) {
            const Vector<A> weight =
                load(w + ((ky * K + kx) * n.subpixels + p) * COLUMNS + v);
            for (int i = 0; i < CHANNELS; ++i)
              sum[i][p] += value[i] * weight;
          }
        }
      for (int i = 0; i < CHANNELS; ++i)
        for (int p = 0; p < SUBPIXELS; ++p)
          store(y + ((c + i) * n.subpixels + p) * y_pitch + v, sum[i][p]);
    }
}

// x [CHUNK, lines, pitch] from a line on, w [K*K, S*S, COLUMNS] -> y [CHUNK,
// S*S, y_pitch]
template <int KERNEL, class A>
void reassemble_row(const A *x, int64_t x_pitch, int64_t pitch, const A *w,
                    A *y, int64_t y_pitch, Counts n) {
  int64_t p = 0;
  for (; p + 4 <= n.subpixels; p += 4)
    reassemble_tile<KERNEL, 4>(x, x_pitch, pitch, w + p * COLUMNS,
                               y + p * y_pitch, y_pitch, n);
  for (; p < n.subpixels; ++p)
    reassemble_tile<KERNEL, 1>(x, x_pitch, pitch, w + p * COLUMNS,
                               y + p * y_pitch, y_pitch, n);
}

// x[kx, c] = sum over r and p of w[r, ky, kx, p] * g[c, r, p], where row r is
// that of the source pixels whose tap ky is wanted: r + ky = last
// g [CHUNK, rows, S*S, pitch], w [rows, ..., K*K, S*S, COLUMNS]
// -> x [K, CHUNK, x_pitch]
template <int KERNEL, class A>
void scatter_row(const A *g, int64_t g_pitch, int64_t pitch, const A *w,
                 int64_t w_pitch, A *x, int64_t x_pitch, int64_t rows,
                 int64_t last, Counts n) {
  constexpr int TAPS = KERNEL ? KERNEL : 1;
  constexpr int CHANNELS = TAPS == 1 ? 8 : SUMS < 16 ? 2 : 4;
  static_assert(CHUNK % CHANNELS == 0, "whole tiles");
  const int64_t K = KERNEL ? KERNEL : n.K;
  const int64_t ky_begin = std::max<int64_t>(0, last - rows + 1);
  const int64_t ky_end = std::min(K, last + 1);
  for (int64_t kx = 0; kx < K; kx += TAPS)
    for (int64_t v = 0; v < n.columns; v += LANES<A>)
      for (int64_t c = 0; c < n.channels; c += CHANNELS) {
        Vector<A> sum[TAPS][CHANNELS] = {};
        for (int64_t ky = ky_begin; ky < ky_end; ++ky)
          for (int64_t p = 0; p < n.subpixels; ++p) {
            const A *g_p =
                g + c * g_pitch + v + ((last - ky) * n.subpixels + p) * pitch;
            const A *w_p = w + (last - ky) * w_pitch + v +
                           ((ky * K + kx) * n.subpixels + p) * COLUMNS;
            Vector<A> value[CHANNELS];
            for (int i = 0; i < CHANNELS; ++i)
              value[i] = load(g_p + i * g_pitch);
            for (int t = 0; t < TAPS; ++t) {
              const Vector<A> weight = load(w_p + t * n.subpixels * COLUMNS);
              for (int i = 0; i < CHANNELS; ++i)
                sum[t][i] += weight * value[i];
            }
          }
        for (int t = 0; t < TAPS; ++t)
          for (int i = 0; i < CHANNELS; ++i)
            store(x + ((kx + t) * CHUNK + c + i) * x_pitch + v, sum[t][i]);
      }
}

// w[k, p] += sum over c of x[c, k] * g[c, p], for TAPS taps k of one tap row
// and SUBPIXELS subpixels p
template <int TAPS, int SUBPIXELS, class A>
inline void correlate_tile(const A *x, int64_t x_pitch, const A *g,
                           int64_t g_pitch, int64_t pitch, A *w, Counts n) {
  for (int64_t v = 0; v < n.columns; v += LANES<A>) {
    Vector<A> sum[TAPS][SUBPIXELS];
    for (int t = 0; t < TAPS; ++t)
      for (int p = 0; p < SUBPIXELS; ++p)
        sum[t][p] = load(w + (t * n.subpixels + p) * COLUMNS + v);
    for (int64_t c = 0; c < n.channels; ++c) {
      Vector<A> grad[SUBPIXELS];
      for (int p = 0; p < SUBPIXELS; ++p)
        grad[p] = load(g + c * g_pitch + p * pitch + v);
      for (int t = 0; t < TAPS; ++t) {
        const Vector<A> value = load(x + c * x_pitch + t + v);
        for (int p = 0; p < SUBPIXELS; ++p)
          sum[t][p] += value * grad[p];
      }
    }
    for (int t = 0; t < TAPS; ++t)
      for (int p = 0; p < SUBPIXELS; ++p)
        store(w + (t * n.subpixels + p) * COLUMNS + v, sum[t][p]);
  }
}

// x [CHUNK, lines, pitch] from a line on, g [CHUNK, rows, S*S, g_row]
// -> added to w [K*K, S*S, COLUMNS]
template <int KERNEL, class A>
void correlate_row(const A *x, int64_t x_pitch, int64_t pitch, const A *g,
                   int64_t g_pitch, int64_t g_row, A *w, Counts n) {
  constexpr int TAPS = KERNEL ? KERNEL : 1, SUBPIXELS = SUMS < 16 ? 2 : 4;
  const int64_t K = KERNEL ? KERNEL : n.K;
  for (int64_t ky = 0; ky < K; ++ky)
    for (int64_t kx = 0; kx < K; kx += TAPS) {
      const A *x_k = x + ky * pitch + kx;
      A *w_k = w + (ky * K + kx) * n.subpixels * COLUMNS;
      int64_t p = 0;
      for (; p + SUBPIXELS <= n.subpixels; p += SUBPIXELS)
        correlate_tile<TAPS, SUBPIXELS>(x_k, x_pitch, g + p * g_row, g_pitch,
                                        g_row, w_k + p * COLUMNS, n);
      for (; p < n.subpixels; ++p)
        correlate_tile<TAPS, 1>(x_k, x_pitch, g + p * g_row, g_pitch, g_row,
                                w_k + p * COLUMNS, n);
    }
}

// ---------------------------------------------------------------------------
// The operators, block by block

// Aligned memory, of zeros at first.
template <class A> class Buffer {
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines_;

public:
  explicit Buffer(int64_t count) : lines_((count * sizeof(A) + 63) / 64) {}
  operator A *() { return reinterpret_cast<A *>(lines_.data()); }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// The second-level cache of a core, within what is usual.
inline int64_t cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t found = 0;
#endif
  return std::clamp<int64_t>(found, 1 << 19, 1 << 20);
}

// Part of a map: rows from y on, columns from x on.
struct Area {
  int64_t y, x, rows, columns;
};

// Where the blocks are, and copies between one of them and buffers that hold
// it, CHUNK channels from c on.
template <class T> struct Block {
  typedef Accumulator<T> A;

  const Arguments &a;
  const int64_t K, S, radius, taps, subpixels, group_channels;
  const int64_t weights_size;  // of COLUMNS source pixels
  const int64_t reach;         // how far around a block weights are wanted
  int64_t down, across;        // blocks of a map
  int64_t rows, lanes;         // of wide, at most; lanes: whole COLUMNS
  int64_t lines, pitch;        // of a block with the windows of its pixels
  int64_t n, g;
  Area block, wide;  // wide: the block and its reach, inside the map

  Block(const Arguments &arguments, int64_t threads, bool reaches)
      : a(arguments), K(a.K), S(a.S), radius(K / 2), taps(K * K),
        subpixels(S * S), group_channels(a.C / a.G),
        weights_size(taps * subpixels * COLUMNS), reach(reaches ? radius : 0) {
    // The weights of a block share the cache with CHUNK channels of it.
    const int64_t pixels =
        cache_bytes() * 9 / 16 / (taps * subpixels * sizeof(A));
    const int64_t lowest = 2 + 2 * reach, narrowest = COLUMNS + 4 * reach;
    across = divide_up(
        a.W, std::clamp<int64_t>(pixels / 4, narrowest, 192 + 4 * reach));
    const int64_t width = round_up(divide_up(a.W, across), COLUMNS);
    down = divide_up(
        a.H, std::clamp<int64_t>(pixels / width, lowest, 16 + 2 * reach));
    share_out(threads, divide_up(a.H, lowest), divide_up(a.W, narrowest));
    rows = std::min(divide_up(a.H, down) + 2 * reach, a.H);
    lanes =
        round_up(std::min(divide_up(a.W, across) + 2 * reach, a.W), COLUMNS);
    lines = divide_up(a.H, down) + K - 1;
    pitch = round_up(lanes + K - 1, 8);
  }

  // Few blocks may leave threads idle. Divides further where this lessens the
  // largest share of a thread, surroundings of the blocks included.
  void share_out(int64_t threads, int64_t most_down, int64_t most_across) {
    const auto cost = [&](int64_t i, int64_t j) {
      return double(divide_up(a.N * a.G * i * j, threads)) *
             (double(a.H) / i + radius) * (double(a.W) / j + radius);
    };
    const int64_t most = 8 * threads / (a.N * a.G);
    const int64_t least_across = across;
    for (int64_t i = down; i <= std::min(most_down, most); ++i)
      for (int64_t j = least_across; j <= most_across && i * j <= most; ++j)
        if (cost(i, j) < cost(down, across))
          down = i, across = j;
  }

  int64_t count() const { return a.N * a.G * down * across; }
  int64_t row_weights() const { return lanes / COLUMNS * weights_size; }

  void seek(int64_t item) {
    const int64_t column = item % across, row = item / across % down;
    item /= across * down;
    g = item % a.G;
    n = item / a.G;
    block.y = a.H * row / down;
    block.x = a.W * column / across;
    block.rows = a.H * (row + 1) / down - block.y;
    block.columns = a.W * (column + 1) / across - block.x;
    wide.y = std::max<int64_t>(0, block.y - reach);
    wide.x = std::max<int64_t>(0, block.x - reach);
    wide.rows = std::min(a.H, block.y + block.rows + reach) - wide.y;
    wide.columns = std::min(a.W, block.x + block.columns + reach) - wide.x;
  }

  // Calls f(r, v, columns) for these rows of wide, COLUMNS at a time: those
  // from v on.
  template <class F> void for_columns(int64_t begin, int64_t end, F f) const {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t v = 0; v < wide.columns; v += COLUMNS)
        f(r, v, std::min<int64_t>(COLUMNS, wide.columns - v));
  }

  // Channel c of the group in low or high
  T *channel(void *map, const int64_t *strides, int64_t c) const {
    return static_cast<T *>(map) + n * strides[0] +
           (g * group_channels + c) * strides[1];
  }

  // low, with K/2 pixels around the block -> [CHUNK, lines, pitch]
  void read_low(A *to, int64_t c, int64_t channels) const {
    const int64_t *strides = a.low_strides;
    const int64_t x = block.x - radius, begin = std::max<int64_t>(x, 0);
    const int64_t end = std::min(block.x + block.columns + radius, a.W);
    for (int64_t r = 0; r < block.rows + K - 1; ++r) {
      const int64_t y = block.y - radius + r;
      const bool inside = y >= 0 && y < a.H;
      read_padded(to + r * pitch, lines * pitch, begin - x,
                  block.columns + K - 1,
                  channel(a.low, strides, c) + (inside ? y : 0) * strides[2] +
                      begin * strides[3],
                  channels, inside ? end - begin : 0, strides[1], strides[3]);
    }
  }

  // [CHUNK, from_pitch] -> low, row r of the block
  void write_low(const A *from, int64_t from_pitch, int64_t r, int64_t c,
                 int64_t channels) const {
    const int64_t *strides = a.low_strides;
    write(from, from_pitch,
          channel(a.low, strides, c) + (block.y + r) * strides[2] +
              block.x * strides[3],
          channels, block.columns, strides[1], strides[3]);
  }

  // Copies between high, of an area, and a buffer of rows [S*S, lanes].
  // Channels with dense columns are copied one by one, since the rows of a
  // channel lie together.
  template <class Copy>
  void for_high(const Area &area, A *buffer, int64_t row_pitch,
                int64_t channel_pitch, int64_t c, int64_t channels,
                Copy copy) const {
    const int64_t *strides = a.high_strides;
    const bool dense = strides[3] == 1;
    for (int64_t j = 0; j < (dense ? channels : 1); ++j)
      for (int64_t r = 0; r < area.rows; ++r)
        for (int64_t i = 0; i < S; ++i) {
          T *line = channel(a.high, strides, c + j) +
                    (S * (area.y + r) + i) * strides[2] +
                    S * area.x * strides[3];
          A *to = buffer + j * channel_pitch + r * row_pitch + i * S * lanes;
          if (dense)
            copy(to, lanes, line, S, area.columns, 1, S);
          else
            for (int64_t k = 0; k < S; ++k)
              copy(to + k * lanes, channel_pitch, line + k * strides[3],
                   channels, area.columns, strides[1], S * strides[3]);
        }
  }

  // high, of wide -> [CHUNK, rows, S*S, lanes]
  void read_high(A *to, int64_t c, int64_t channels) const {
    for_high(wide, to, subpixels * lanes, rows * subpixels * lanes, c,
             channels, read<T, A>);
  }

  // [rows, CHUNK, S*S, lanes] -> high
  void write_high(A *from, int64_t c, int64_t channels) const {
    for_high(block, from, CHUNK * subpixels * lanes, subpixels * lanes, c,
             channels, write<T, A>);
  }

  // A position in a tensor like the scores: row r of wide, column v.
  T *scores_at(void *tensor, const int64_t *strides, int64_t r,
               int64_t v) const {
    return static_cast<T *>(tensor) + n * strides[0] + g * strides[1] +
           (wide.y + r) * strides[5] + (wide.x + v) * strides[6];
  }

  // Calls f(in the tensor, in the buffer, rows) for the planes [K*K, S, S] of
  // scores that are one distance apart: usually all of them at once.
  template <class F> void for_planes(const int64_t *strides, F f) const {
    if (strides[3] == S * strides[4] && strides[2] == S * strides[3])
      return f(0, 0, taps * subpixels);
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t i = 0; i < S; ++i)
        f(k * strides[2] + i * strides[3], (k * S + i) * S * COLUMNS, S);
  }

  // The scores of row r of wide, columns from v on -> [K*K, S*S, COLUMNS]
  void read_scores(A *to, int64_t r, int64_t v, int64_t columns) const {
    const int64_t *strides = a.scores_strides;
    const T *from = scores_at(a.scores, strides, r, v);
    for_planes(strides, [&](int64_t plane, int64_t at, int64_t count) {
      read_padded(to + at, COLUMNS, 0, COLUMNS, from + plane, count, columns,
                  strides[4], strides[6]);
    });
    if (a.border == RENORMALIZE)
      fill_outside(to, r, v, columns, -std::numeric_limits<A>::infinity());
  }

  // [K*K, S*S, COLUMNS] -> the gradient of these scores
  void write_grad_scores(const A *from, int64_t r, int64_t v,
                         int64_t columns) const {
    const int64_t *strides = a.grad_scores_strides;
    T *to = scores_at(a.grad_scores, strides, r, v);
    for_planes(strides, [&](int64_t plane, int64_t at, int64_t count) {
      write(from + at, COLUMNS, to + plane, count, columns, strides[4],
            strides[6]);
    });
  }

  // Gives the taps of these pixels that read outside the map a value. For
  // weights it is zero, whatever they were: they may be infinite, or NaN.
  void fill_outside(A *weights, int64_t r, int64_t v, int64_t columns,
                    A value) const {
    const int64_t y = wide.y + r, x = wide.x + v;
    if (y >= radius && y + radius < a.H && x >= radius &&
        x + columns + radius <= a.W)
      return;
    for (int64_t k = 0; k < taps; ++k) {
      // The columns whose tap is inside: [begin, end)
      const int64_t tap_y = y + k / K - radius, dx = x + k % K - radius;
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

  // In a buffer [rows, lanes / COLUMNS, K*K, S*S, COLUMNS], row r of wide and
  // its columns from v on
  A *weights_at(A *weights, int64_t r, int64_t v) const {
    return weights + r * row_weights() + v / COLUMNS * weights_size;
  }

  // The weights of wide -> such a buffer
  void read_weights(A *weights) const {
    for_columns(0, wide.rows, [&](int64_t r, int64_t v, int64_t columns) {
      A *to = weights_at(weights, r, v);
      read_scores(to, r, v, columns);
      with_normalizer(a.normalizer, [&](auto mode) {
        normalize_mode<mode.value, A>(to, to, taps, subpixels);
      });
      fill_outside(to, r, v, columns, A(0));
    });
  }

  template <class Body> void for_chunks(Body body) const {
    for (int64_t c = 0; c < group_channels; c += CHUNK)
      body(c, std::min<int64_t>(CHUNK, group_channels - c));
  }
};

template <class T> struct Forward {
  typedef Accumulator<T> A;
  Block<T> at;
  Buffer<A> x, weights, y;
  static constexpr bool REACHES = false;

  Forward(const Arguments &a, int64_t threads)
      : at(a, threads, REACHES), x(CHUNK * at.lines * at.pitch),
        weights(at.rows * at.row_weights()),
        y(at.rows * CHUNK * at.subpixels * at.lanes) {}

  void operator()(int64_t item) {
    at.seek(item);
    at.read_weights(weights);
    const auto function = at.K == 5   ? reassemble_row<5, A>
                          : at.K == 3 ? reassemble_row<3, A>
                                      : reassemble_row<0, A>;
    at.for_chunks([&](int64_t c, int64_t channels) {
      at.read_low(x, c, channels);
      at.for_columns(0, at.block.rows, [&](int64_t r, int64_t v, int64_t w) {
        function(x + r * at.pitch + v, at.lines * at.pitch, at.pitch,
                 at.weights_at(weights, r, v),
                 y + r * CHUNK * at.subpixels * at.lanes + v, at.lanes,
                 {at.K, at.subpixels, channels, w});
      });
      at.write_high(y, c, channels);
    });
  }
};

// Tap (ky, kx) of the pixel at distance (radius - ky, radius - kx) reads a
// source pixel. The sums over ky, one for each kx, are made where the windows
// have their centres; then they are moved by radius - kx and added.
template <class T> struct GradFeatures {
  typedef Accumulator<T> A;
  Block<T> at;
  const int64_t margin;  // around each row of sums; stays zero before it
  const int64_t pitch;
  Buffer<A> grad, weights, sums, x;
  static constexpr bool REACHES = true;

  GradFeatures(const Arguments &a, int64_t threads)
      : at(a, threads, REACHES), margin(round_up(at.radius, COLUMNS)),
        pitch(at.lanes + 2 * margin + COLUMNS),
        grad(CHUNK * at.rows * at.subpixels * at.lanes),
        weights(at.rows * at.row_weights()), sums(at.K * CHUNK * pitch),
        x(CHUNK * pitch) {}

  void operator()(int64_t item) {
    at.seek(item);
    at.read_weights(weights);
    const auto function = at.K == 5   ? scatter_row<5, A>
                          : at.K == 3 ? scatter_row<3, A>
                                      : scatter_row<0, A>;
    at.for_chunks([&](int64_t c, int64_t channels) {
      at.read_high(grad, c, channels);
      for (int64_t r = 0; r < at.block.rows; ++r) {
        at.for_columns(r, r + 1, [&](int64_t, int64_t v, int64_t columns) {
          function(grad + v, at.rows * at.subpixels * at.lanes, at.lanes,
                   at.weights_at(weights, 0, v), at.row_weights(),
                   sums + margin + v, pitch, at.wide.rows,
                   at.block.y + r + at.radius - at.wide.y,
                   {at.K, at.subpixels, channels, columns});
        });
        add_sums(channels);
        at.write_low(x, pitch, r, c, channels);
      }
    });
  }

  void add_sums(int64_t channels) {
    const int64_t shift = at.block.x - at.wide.x + at.radius;
    for (int64_t c = 0; c < channels; ++c) {
      A *from = sums + c * pitch + margin;
      // Lanes beyond the last column hold anything, but sums read them.
      for (int64_t k = 0; k < at.K; ++k) {
        A *end = from + k * CHUNK * pitch + at.wide.columns;
        std::fill(end, end + margin, A(0));
      }
      for (int64_t v = 0; v < at.block.columns; v += LANES<A>) {
        Vector<A> sum{};
        for (int64_t k = 0; k < at.K; ++k)
          sum += load(from + k * CHUNK * pitch + shift - k + v);
        store(x + c * pitch + v, sum);
      }
    }
  }
};

template <class T> struct GradWeights {
  typedef Accumulator<T> A;
  Block<T> at;
  Buffer<A> x, y, logits, weights, grad;
  static constexpr bool REACHES = false;

  GradWeights(const Arguments &a, int64_t threads)
      : at(a, threads, REACHES), x(CHUNK * at.lines * at.pitch),
        y(CHUNK * at.rows * at.subpixels * at.lanes), logits(at.weights_size),
        weights(at.weights_size), grad(at.rows * at.row_weights()) {}

  void operator()(int64_t item) {
    at.seek(item);
    std::fill(grad + 0, grad + at.rows * at.row_weights(), A(0));
    const auto function = at.K == 5   ? correlate_row<5, A>
                          : at.K == 3 ? correlate_row<3, A>
                                      : correlate_row<0, A>;
    at.for_chunks([&](int64_t c, int64_t channels) {
      at.read_low(x, c, channels);
      at.read_high(y, c, channels);
      at.for_columns(0, at.block.rows, [&](int64_t r, int64_t v, int64_t w) {
        function(x + r * at.pitch + v, at.lines * at.pitch, at.pitch,
                 y + r * at.subpixels * at.lanes + v,
                 at.rows * at.subpixels * at.lanes, at.lanes,
                 at.weights_at(grad, r, v), {at.K, at.subpixels, channels, w});
      });
    });
    at.for_columns(0, at.block.rows, [&](int64_t r, int64_t v, int64_t w) {
      A *grad_v = at.weights_at(grad, r, v);
      at.fill_outside(grad_v, r, v, w, A(0));
      with_normalizer(at.a.normalizer, [&](auto mode) {
        if (mode == NONE)
          return;
        at.read_scores(logits, r, v, w);
        normalize_mode<mode.value, A>(logits, weights, at.taps, at.subpixels);
        normalize_backward_mode<mode.value, A>(logits, weights, grad_v,
                                               at.taps, at.subpixels);
      });
      at.write_grad_scores(grad_v, r, v, w);
    });
  }
};

// ---------------------------------------------------------------------------
// Threads

template <template <class> class Worker, class T>
void run(const Arguments &a) {
  // A thread is worth waking for a million multiplications, which take it
  // tens of microseconds.
  const int64_t work_size = a.N * a.C * a.H * a.W * a.K * a.K * a.S * a.S;
  const int64_t wanted =
      std::min(GOMP_parallel ? a.threads : 1, 1 + work_size / 1000000);
  const int64_t count = Block<T>(a, wanted, Worker<T>::REACHES).count();
  const int64_t threads = std::min(wanted, count);
  // Neighbouring blocks share their surroundings, so a thread takes many at
  // once; but not its whole share, since another thread may be held up.
  const int64_t share = divide_up(count, 8 * threads);
  std::atomic<int64_t> next{0};
  auto work = [&] {
    Worker<T> worker(a, wanted);
    for (int64_t i; (i = next.fetch_add(share)) < count;)
      for (const int64_t end = std::min(i + share, count); i < end; ++i)
        worker(i);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // orders stream()
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
  constexpr void (*functions[])(const Arguments &) = {
      run<Worker, Half>, run<Worker, Bfloat>, run<Worker, float>,
      run<Worker, double>};  // in the order of Dtype
  if (a.dtype < FLOAT16 || a.dtype > FLOAT64)
    return 1;
  functions[a.dtype](a);
  return 0;
}

}  // namespace

extern "C" {
int reassemble(const Arguments *a) { return run_dtype<Forward>(*a); }
int reassemble_grad_features(const Arguments *a) {
  return run_dtype<GradFeatures>(*a);
}
int reassemble_grad_weights(const Arguments *a) {
  return run_dtype<GradWeights>(*a);
}
}
