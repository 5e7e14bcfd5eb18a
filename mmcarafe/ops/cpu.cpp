// CARAFE on the CPU; the letters and the formula are those of carafe.py.
//
// One source file with a plain C interface, called with pointers and strides:
// it knows nothing of torch, so one binary serves every torch. It is compiled
// once per vector width (see setup.py), and cpu.py loads the widest that the
// machine runs.
//
// All three operators work in the same way. A block is BLOCK neighbouring
// source pixels of one row, the lanes of a vector. Blocks are the outer loop
// and channels the inner one: the weights of a block, K*K*S*S*BLOCK numbers,
// stay in the L1 cache while the channels of the group stream past them,
// CHUNK at a time, through small buffers. Only the copies to and from these
// buffers know of dtypes, memory formats and borders; the arithmetic between
// them sees dense rows with zeros around the map.
//
// A block writes outputs that no other block writes, and adds up everything
// for them in one fixed order. Hence results do not depend on the threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
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

constexpr int BLOCK = 16;
constexpr int CHUNK = 16;

enum Normalizer { NONE, SOFTMAX, SIGMOID_NORMALIZED, SIGMOID };
enum Dtype { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };

// Mirrored by _Arguments in cpu.py. Strides count elements.
struct Arguments {
  int64_t dtype, normalizer, threads;
  int64_t N, C, H, W, K, G, S;
  void *low;  // [N, C, H, W]: features or their gradient
  int64_t low_strides[4];
  void *high;  // [N, C, S*H, S*W]: the output or its gradient
  int64_t high_strides[4];
  void *weights;  // [N, G, K*K, S, S, H, W]
  int64_t weights_strides[7];
  void *grad_weights;  // [N, G, K*K, S, S, H, W]
  int64_t grad_weights_strides[7];
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

// Calls body(i) such that body's [i, i + L) cover [0, count): the last one
// overlaps its neighbour rather than reach beyond the end.
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
void write(T *to, int64_t row, int64_t column, const A *from, int64_t pitch,
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

// As read(), of columns first to first + count of a map with limit columns:
// those outside it are zero.
template <class T, class A>
void read_padded(A *to, int64_t pitch, const T *from, int64_t rows,
                 int64_t count, int64_t row, int64_t column, int64_t first,
                 int64_t limit) {
  const int64_t begin = std::clamp<int64_t>(-first, 0, count);
  const int64_t end = std::clamp<int64_t>(limit - first, begin, count);
  for (int64_t r = 0; r < rows && (begin > 0 || end < count); ++r) {
    std::fill(to + r * pitch, to + r * pitch + begin, A(0));
    std::fill(to + r * pitch + end, to + r * pitch + count, A(0));
  }
  if (begin < end)
    read(to + begin, pitch, from + (first + begin) * column, rows,
         end - begin, row, column);
}

// ---------------------------------------------------------------------------
// Normalisation over the K*K taps, written as
//   weight = rise(logit, top) * scale

template <int MODE, class V> inline V rise(V logit, V top) {
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

// Weights [K*K, S*S, BLOCK] of logits, and, where they depend on a sum over
// the taps, the two numbers above, each [S*S, BLOCK].
template <int MODE, class A>
void normalize_mode(const A *logits, A *weights, A *tops, A *scales,
                    int64_t taps, int64_t subpixels) {
  typedef Vector<A> V;
  const int64_t size = subpixels * BLOCK;  // of one tap
  for (int64_t at = 0; at < size; at += LANES<A>) {
    V top{}, sum{};
    if (MODE == SOFTMAX || MODE == SIGMOID_NORMALIZED) {
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
    if (MODE == SOFTMAX || MODE == SIGMOID_NORMALIZED) {
      for (int64_t k = 0; k < taps; ++k)
        store(weights + k * size + at, load(weights + k * size + at) / sum);
      store(tops + at, top);
      store(scales + at, 1 / sum);
    }
  }
}

// Weights [taps, S*S, BLOCK], from the two numbers for every one of them.
template <int MODE, class A>
void reweigh_mode(A *logits, const A *tops, const A *scales, int64_t count) {
  for (int64_t at = 0; at < count; at += LANES<A>)
    store(logits + at, rise<MODE>(load(logits + at), load(tops + at)) *
                           load(scales + at));
}

// Gradient of the logits, in place of that of the weights.
template <int MODE, class A>
void normalize_backward_mode(const A *logits, const A *weights, A *grad,
                             int64_t taps, int64_t subpixels) {
  typedef Vector<A> V;
  const int64_t size = subpixels * BLOCK;
  for (int64_t at = 0; at < size; at += LANES<A>) {
    V dot{};
    if (MODE != SIGMOID)
      for (int64_t k = 0; k < taps; ++k)
        dot += load(weights + k * size + at) * load(grad + k * size + at);
    for (int64_t k = 0; k < taps; ++k) {
      const V w = load(weights + k * size + at);
      V g = load(grad + k * size + at);
      g = MODE == SIGMOID ? g * w * (1 - w) : w * (g - dot);
      if (MODE == SIGMOID_NORMALIZED)
        g *= rise<SIGMOID>(-load(logits + k * size + at), V{});
      store(grad + k * size + at, g);
    }
  }
}

// ---------------------------------------------------------------------------
// Arithmetic on one block. A template argument of 0 stands for "at run time".

// y[c, p] = sum over k of x[c, k] * w[k, p], for P subpixels p
template <int KERNEL, int P, class A>
inline void reassemble_tile(const A *x, int64_t pitch, const A *w, A *y,
                            int64_t kernel, int64_t subpixels,
                            int64_t channels, int64_t columns) {
  constexpr int CHANNELS = SUMS / P;
  const int64_t K = KERNEL ? KERNEL : kernel;
  for (int64_t c = 0; c < channels; c += CHANNELS)
    for (int64_t v = 0; v < columns; v += LANES<A>) {
      Vector<A> sum[CHANNELS][P] = {};
      for (int64_t ky = 0; ky < K; ++ky)
        for (int64_t kx = 0; kx < K; ++kx) {
          Vector<A> value[CHANNELS];
          for (int i = 0; i < CHANNELS; ++i)
            value[i] = load(x + ((c + i) * K + ky) * pitch + kx + v);
          for (int p = 0; p < P; ++p) {
            const Vector<A> weight =
                load(w + ((ky * K + kx) * subpixels + p) * BLOCK + v);
            for (int i = 0; i < CHANNELS; ++i)
              sum[i][p] += value[i] * weight;
          }
        }
      for (int i = 0; i < CHANNELS; ++i)
        for (int p = 0; p < P; ++p)
          store(y + ((c + i) * subpixels + p) * BLOCK + v, sum[i][p]);
    }
}

// x [CHUNK, K, pitch], w [K*K, S*S, BLOCK] -> y [CHUNK, S*S, BLOCK]
template <int KERNEL, class A>
void reassemble(const A *x, int64_t pitch, const A *w, A *y, int64_t kernel,
                int64_t subpixels, int64_t channels, int64_t columns) {
  int64_t p = 0;
  for (; p + 4 <= subpixels; p += 4)
    reassemble_tile<KERNEL, 4>(x, pitch, w + p * BLOCK, y + p * BLOCK, kernel,
                               subpixels, channels, columns);
  for (; p < subpixels; ++p)
    reassemble_tile<KERNEL, 1>(x, pitch, w + p * BLOCK, y + p * BLOCK, kernel,
                               subpixels, channels, columns);
}

// g [CHUNK, K, S*S, pitch], w [K*K, S*S, BLOCK] -> x [CHUNK, BLOCK]
template <int KERNEL, int SUBPIXELS, class A>
void gather(const A *g, int64_t pitch, const A *w, A *x, int64_t kernel,
            int64_t subpixels, int64_t channels, int64_t columns) {
  const int64_t K = KERNEL ? KERNEL : kernel;
  const int64_t P = SUBPIXELS ? SUBPIXELS : subpixels;
  for (int64_t c = 0; c < channels; c += SUMS)
    for (int64_t v = 0; v < columns; v += LANES<A>) {
      Vector<A> sum[SUMS] = {};
      for (int64_t ky = 0; ky < K; ++ky)
        for (int64_t p = 0; p < P; ++p)
          for (int64_t kx = 0; kx < K; ++kx) {
            const Vector<A> weight =
                load(w + ((ky * K + kx) * P + p) * BLOCK + v);
            for (int i = 0; i < SUMS; ++i)
              sum[i] += weight * load(g + (((c + i) * K + ky) * P + p) * pitch +
                                      kx + v);
          }
      for (int i = 0; i < SUMS; ++i)
        store(x + (c + i) * BLOCK + v, sum[i]);
    }
}

// w[k, p] += sum over c of x[c, k] * g[c, p], for TAPS taps k of one tap row
// and P subpixels p
template <int TAPS, int P, class A>
inline void correlate_tile(const A *x, int64_t x_pitch, const A *g,
                           int64_t g_pitch, A *w, int64_t subpixels,
                           int64_t channels, int64_t columns) {
  for (int64_t v = 0; v < columns; v += LANES<A>) {
    Vector<A> sum[TAPS][P];
    for (int t = 0; t < TAPS; ++t)
      for (int p = 0; p < P; ++p)
        sum[t][p] = load(w + (t * subpixels + p) * BLOCK + v);
    for (int64_t c = 0; c < channels; ++c) {
      Vector<A> grad[P];
      for (int p = 0; p < P; ++p)
        grad[p] = load(g + c * g_pitch + p * BLOCK + v);
      for (int t = 0; t < TAPS; ++t) {
        const Vector<A> value = load(x + c * x_pitch + t + v);
        for (int p = 0; p < P; ++p)
          sum[t][p] += value * grad[p];
      }
    }
    for (int t = 0; t < TAPS; ++t)
      for (int p = 0; p < P; ++p)
        store(w + (t * subpixels + p) * BLOCK + v, sum[t][p]);
  }
}

// x [CHUNK, K, pitch], g [CHUNK, S*S, BLOCK] -> added to w [K*K, S*S, BLOCK]
template <int KERNEL, class A>
void correlate(const A *x, int64_t pitch, const A *g, A *w, int64_t kernel,
               int64_t subpixels, int64_t channels, int64_t columns) {
  constexpr int TAPS = KERNEL ? KERNEL : 1, P = SUMS / 4;
  const int64_t K = KERNEL ? KERNEL : kernel;
  for (int64_t ky = 0; ky < K; ++ky)
    for (int64_t kx = 0; kx < K; kx += TAPS) {
      const A *x_k = x + ky * pitch + kx;
      A *w_k = w + (ky * K + kx) * subpixels * BLOCK;
      int64_t p = 0;
      for (; p + P <= subpixels; p += P)
        correlate_tile<TAPS, P>(x_k, K * pitch, g + p * BLOCK,
                                subpixels * BLOCK, w_k + p * BLOCK, subpixels,
                                channels, columns);
      for (; p < subpixels; ++p)
        correlate_tile<TAPS, 1>(x_k, K * pitch, g + p * BLOCK,
                                subpixels * BLOCK, w_k + p * BLOCK, subpixels,
                                channels, columns);
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

template <class T> class Block {
protected:
  typedef Accumulator<T> A;

  const Arguments &a;
  const int64_t K, S, radius, taps, subpixels, group_channels, pitch;
  int64_t n, g, h, w, columns;  // where the block is, and its true width

public:
  explicit Block(const Arguments &arguments)
      : a(arguments), K(a.K), S(a.S), radius(K / 2), taps(K * K),
        subpixels(S * S), group_channels(a.C / a.G),
        pitch((BLOCK + K - 1 + 7) / 8 * 8) {}

  static int64_t count(const Arguments &a) {
    return a.N * a.G * a.H * ((a.W + BLOCK - 1) / BLOCK);
  }

protected:
  void seek(int64_t item) {
    const int64_t across = (a.W + BLOCK - 1) / BLOCK;
    w = item % across * BLOCK;
    columns = std::min<int64_t>(BLOCK, a.W - w);
    item /= across;
    h = item % a.H;
    item /= a.H;
    g = item % a.G;
    n = item / a.G;
  }

  // low, K rows around the block -> [CHUNK, K, pitch]
  void read_low(A *to, int64_t c, int64_t channels) const {
    const int64_t *strides = a.low_strides;
    const T *from = static_cast<const T *>(a.low) + n * strides[0] +
                    (g * group_channels + c) * strides[1];
    for (int64_t r = 0; r < K; ++r) {
      const int64_t y = h - radius + r, width = columns + K - 1;
      const bool inside = y >= 0 && y < a.H;
      read_padded(to + r * pitch, K * pitch, from + (inside ? y : 0) * strides[2],
                  channels, width, strides[1], strides[3], w - radius,
                  inside ? a.W : 0);
    }
  }

  // [CHUNK, BLOCK] -> low
  void write_low(const A *from, int64_t c, int64_t channels) const {
    const int64_t *strides = a.low_strides;
    write(static_cast<T *>(a.low) + n * strides[0] +
              (g * group_channels + c) * strides[1] + h * strides[2] +
              w * strides[3],
          strides[1], strides[3], from, BLOCK, channels, columns);
  }

  // high, rows and columns up to margin around the block
  // -> [CHUNK, 2 * margin + 1, S*S, pitch]
  void read_high(A *to, int64_t pitch, int64_t margin, int64_t c,
                 int64_t channels) const {
    const int64_t *strides = a.high_strides;
    const T *from = static_cast<const T *>(a.high) + n * strides[0] +
                    (g * group_channels + c) * strides[1];
    const int64_t rows = 2 * margin + 1, width = columns + 2 * margin;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = h - margin + r;
      const bool inside = y >= 0 && y < a.H;
      for (int64_t i = 0; i < S; ++i) {
        A *to_row = to + (r * S + i) * S * pitch;
        const T *from_row = from + (inside ? S * y + i : 0) * strides[2];
        if (strides[3] == 1)
          for (int64_t j = 0; j < channels; ++j)
            read_padded(to_row + j * rows * subpixels * pitch, pitch,
                        from_row + j * strides[1], S, width, strides[3],
                        S * strides[3], w - margin, inside ? a.W : 0);
        else
          for (int64_t j = 0; j < S; ++j)
            read_padded(to_row + j * pitch, rows * subpixels * pitch,
                        from_row + j * strides[3], channels, width,
                        strides[1], S * strides[3], w - margin,
                        inside ? a.W : 0);
      }
    }
  }

  // [CHUNK, S*S, BLOCK] -> high
  void write_high(const A *from, int64_t c, int64_t channels) const {
    const int64_t *strides = a.high_strides;
    T *to = static_cast<T *>(a.high) + n * strides[0] +
            (g * group_channels + c) * strides[1] + S * h * strides[2] +
            S * w * strides[3];
    for (int64_t i = 0; i < S; ++i)
      if (strides[3] == 1)
        for (int64_t j = 0; j < channels; ++j)
          write(to + j * strides[1] + i * strides[2], strides[3],
                S * strides[3], from + (j * S + i) * S * BLOCK, BLOCK, S,
                columns);
      else
        for (int64_t j = 0; j < S; ++j)
          write(to + i * strides[2] + j * strides[3], strides[1],
                S * strides[3], from + (i * S + j) * BLOCK, subpixels * BLOCK,
                channels, columns);
  }

  // The weights of the pixels of the block -> [K*K, S*S, BLOCK]
  void read_weights(A *to) const {
    for (int64_t k = 0; k < taps; ++k)
      read_weights_of(to, k, h, w);
  }

  // The weights of tap k of the pixels (y, x), (y, x + 1), ... -> [S*S, BLOCK]
  void read_weights_of(A *to, int64_t k, int64_t y, int64_t x) const {
    const int64_t *strides = a.weights_strides;
    const bool inside = y >= 0 && y < a.H;
    for (int64_t i = 0; i < S; ++i)
      read_padded(to + (k * S + i) * S * BLOCK, BLOCK,
                  static_cast<const T *>(a.weights) + n * strides[0] +
                      g * strides[1] + k * strides[2] + i * strides[3] +
                      (inside ? y : 0) * strides[5],
                  S, BLOCK, strides[4], strides[6], x, inside ? a.W : 0);
  }

  // [K*K, S*S, BLOCK] -> gradient of the weights
  void write_grad_weights(const A *from) const {
    const int64_t *strides = a.grad_weights_strides;
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t i = 0; i < S; ++i)
        write(static_cast<T *>(a.grad_weights) + n * strides[0] +
                  g * strides[1] + k * strides[2] + i * strides[3] +
                  h * strides[5] + w * strides[6],
              strides[4], strides[6], from + (k * S + i) * S * BLOCK, BLOCK, S,
              columns);
  }

  // Taps that read outside the map count as zero, whatever their weight:
  // it may be infinite, or nan.
  void clear_outside(A *weights) const {
    if (h >= radius && h + radius < a.H && w >= radius &&
        w + columns + radius <= a.W)
      return;
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t y = h + k / K - radius;
      for (int64_t c = 0; c < BLOCK; ++c) {
        const int64_t x = w + c + k % K - radius;
        if (y < 0 || y >= a.H || x < 0 || x >= a.W)
          for (int64_t p = 0; p < subpixels; ++p)
            weights[(k * subpixels + p) * BLOCK + c] = 0;
      }
    }
  }

  void normalize(const A *logits, A *weights, A *tops, A *scales) const {
    switch (a.normalizer) {
    case SOFTMAX:
      return normalize_mode<SOFTMAX>(logits, weights, tops, scales, taps,
                                     subpixels);
    case SIGMOID_NORMALIZED:
      return normalize_mode<SIGMOID_NORMALIZED>(logits, weights, tops, scales,
                                                taps, subpixels);
    case SIGMOID:
      return normalize_mode<SIGMOID>(logits, weights, tops, scales, taps,
                                     subpixels);
    default:
      return normalize_mode<NONE>(logits, weights, tops, scales, taps,
                                  subpixels);
    }
  }

  template <class Body> void for_chunks(Body body) const {
    for (int64_t c = 0; c < group_channels; c += CHUNK)
      body(c, std::min<int64_t>(CHUNK, group_channels - c));
  }
};

template <class T> class Forward : Block<T> {
  typedef Accumulator<T> A;
  Buffer<A> x, weights, y, tops, scales;

public:
  explicit Forward(const Arguments &a)
      : Block<T>(a), x(CHUNK * this->K * this->pitch),
        weights(this->taps * this->subpixels * BLOCK),
        y(CHUNK * this->subpixels * BLOCK), tops(this->subpixels * BLOCK),
        scales(this->subpixels * BLOCK) {}

  using Block<T>::count;

  void operator()(int64_t item) {
    this->seek(item);
    this->read_weights(weights);
    this->normalize(weights, weights, tops, scales);
    this->clear_outside(weights);
    this->for_chunks([&](int64_t c, int64_t channels) {
      this->read_low(x, c, channels);
      const auto function = this->K == 5   ? reassemble<5, A>
                            : this->K == 3 ? reassemble<3, A>
                                           : reassemble<0, A>;
      function(x, this->pitch, weights, y, this->K, this->subpixels, channels,
               this->columns);
      this->write_high(y, c, channels);
    });
  }
};

// What the weights of a source pixel need beyond their own logits, so that
// GradFeatures can compute any of them alone: tops and scales.
template <class T> class Statistics : Block<T> {
  typedef Accumulator<T> A;
  Buffer<A> logits, weights, tops, scales;

public:
  explicit Statistics(const Arguments &a)
      : Block<T>(a), logits(this->taps * this->subpixels * BLOCK),
        weights(this->taps * this->subpixels * BLOCK),
        tops(this->subpixels * BLOCK), scales(this->subpixels * BLOCK) {}

  using Block<T>::count;

  void operator()(int64_t item) {
    this->seek(item);
    this->read_weights(logits);
    this->normalize(logits, weights, tops, scales);
    const auto &a = this->a;
    const int64_t size = a.H * a.W, half = a.N * a.G * this->subpixels * size;
    A *to = static_cast<A *>(a.statistics) +
            (this->n * a.G + this->g) * this->subpixels * size +
            this->h * a.W + this->w;
    write(to, size, 1, (const A *)tops, BLOCK, this->subpixels,
          this->columns);
    write(to + half, size, 1, (const A *)scales, BLOCK, this->subpixels,
          this->columns);
  }
};

// A source pixel takes part in the windows of K*K source pixels: pixel
// (h + r - radius, w + s - radius) reads it with the tap opposite to (r, s).
template <class T> class GradFeatures : Block<T> {
  typedef Accumulator<T> A;
  Buffer<A> grad, weights, opposite, x, tops, scales;

public:
  explicit GradFeatures(const Arguments &a)
      : Block<T>(a), grad(CHUNK * this->K * this->subpixels * this->pitch),
        weights(this->taps * this->subpixels * BLOCK),
        opposite(this->taps * this->subpixels * BLOCK), x(CHUNK * BLOCK),
        tops(this->taps * this->subpixels * BLOCK),
        scales(this->taps * this->subpixels * BLOCK) {}

  using Block<T>::count;

  void operator()(int64_t item) {
    this->seek(item);
    read_opposite_weights();
    this->for_chunks([&](int64_t c, int64_t channels) {
      this->read_high(grad, this->pitch, this->radius, c, channels);
      const auto function =
          this->S != 2   ? gather<0, 0, A>
          : this->K == 5 ? gather<5, 4, A>
          : this->K == 3 ? gather<3, 4, A>
                         : gather<0, 0, A>;
      function(grad, this->pitch, opposite, x, this->K, this->subpixels,
               channels, this->columns);
      this->write_low(x, c, channels);
    });
  }

private:
  void read_opposite_weights() {
    const int64_t size = this->subpixels * BLOCK;
    for (int64_t k = 0; k < this->taps; ++k)
      this->read_weights_of(weights, k, this->h + this->radius - k / this->K,
                            this->w + this->radius - k % this->K);
    const int64_t mode = this->a.normalizer;
    if (mode == SOFTMAX || mode == SIGMOID_NORMALIZED)
      read_statistics();
    const int64_t count = this->taps * size;
    if (mode == SOFTMAX)
      reweigh_mode<SOFTMAX, A>(weights, tops, scales, count);
    else if (mode == SIGMOID_NORMALIZED)
      reweigh_mode<SIGMOID_NORMALIZED, A>(weights, tops, scales, count);
    else
      this->normalize(weights, weights, tops, scales);
    for (int64_t k = 0; k < this->taps; ++k)
      std::copy(weights + k * size, weights + (k + 1) * size,
                opposite + (this->taps - 1 - k) * size);
  }

  void read_statistics() {
    const auto &a = this->a;
    const int64_t size = a.H * a.W, half = a.N * a.G * this->subpixels * size;
    const A *from = static_cast<const A *>(a.statistics) +
                    (this->n * a.G + this->g) * this->subpixels * size;
    for (int64_t k = 0; k < this->taps; ++k) {
      const int64_t y = this->h + this->radius - k / this->K;
      const int64_t x = this->w + this->radius - k % this->K;
      const bool inside = y >= 0 && y < a.H;
      const A *from_row = from + (inside ? y : 0) * a.W;
      A *to = tops + k * this->subpixels * BLOCK;
      read_padded(to, BLOCK, from_row, this->subpixels, BLOCK, size, 1, x,
                  inside ? a.W : 0);
      to = scales + k * this->subpixels * BLOCK;
      read_padded(to, BLOCK, from_row + half, this->subpixels, BLOCK, size, 1,
                  x, inside ? a.W : 0);
    }
  }
};

template <class T> class GradWeights : Block<T> {
  typedef Accumulator<T> A;
  Buffer<A> x, high, logits, weights, grad, tops, scales;

public:
  explicit GradWeights(const Arguments &a)
      : Block<T>(a), x(CHUNK * this->K * this->pitch),
        high(CHUNK * this->subpixels * BLOCK),
        logits(this->taps * this->subpixels * BLOCK),
        weights(this->taps * this->subpixels * BLOCK),
        grad(this->taps * this->subpixels * BLOCK),
        tops(this->subpixels * BLOCK), scales(this->subpixels * BLOCK) {}

  using Block<T>::count;

  void operator()(int64_t item) {
    this->seek(item);
    const int64_t size = this->taps * this->subpixels * BLOCK;
    std::fill(grad + 0, grad + size, A(0));
    this->for_chunks([&](int64_t c, int64_t channels) {
      this->read_low(x, c, channels);
      this->read_high(high, BLOCK, 0, c, channels);
      const auto function = this->K == 5   ? correlate<5, A>
                            : this->K == 3 ? correlate<3, A>
                                           : correlate<0, A>;
      function(x, this->pitch, high, grad, this->K, this->subpixels, channels,
               this->columns);
    });
    this->clear_outside(grad);
    normalize_backward();
    this->write_grad_weights(grad);
  }

private:
  void normalize_backward() {
    const int64_t mode = this->a.normalizer;
    if (mode == NONE)
      return;
    this->read_weights(logits);
    this->normalize(logits, weights, tops, scales);
    const auto function =
        mode == SOFTMAX   ? normalize_backward_mode<SOFTMAX, A>
        : mode == SIGMOID ? normalize_backward_mode<SIGMOID, A>
                          : normalize_backward_mode<SIGMOID_NORMALIZED, A>;
    function(logits, weights, grad, this->taps, this->subpixels);
  }
};

// ---------------------------------------------------------------------------
// Threads

template <class Worker> void run(const Arguments &a) {
  const int64_t count = Worker::count(a);
  const int64_t threads =
      GOMP_parallel ? std::min(a.threads, count) : int64_t(1);
  // Neighbouring blocks share their surroundings, so a thread takes many at
  // once; but not all of its share, since another may be held up.
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
    GOMP_parallel(
        [](void *data) { (*static_cast<decltype(work) *>(data))(); }, &work,
        unsigned(threads), 0);
}

template <template <class> class Worker>
void run_dtype(const Arguments &a) noexcept {
  switch (a.dtype) {
  case FLOAT16:
    return run<Worker<Half>>(a);
  case BFLOAT16:
    return run<Worker<Bfloat>>(a);
  case FLOAT32:
    return run<Worker<float>>(a);
  case FLOAT64:
    return run<Worker<double>>(a);
  }
}

}  // namespace

extern "C" void carafe(const Arguments *a) { run_dtype<Forward>(*a); }

extern "C" void carafe_grad_features(const Arguments *a) {
  if (a->statistics)
    run_dtype<Statistics>(*a);
  run_dtype<GradFeatures>(*a);
}

extern "C" void carafe_grad_weights(const Arguments *a) {
  run_dtype<GradWeights>(*a);
}
