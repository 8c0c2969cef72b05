// y[m, n] = scale[n] * sum_k x[m, k] w[n, k] for few rows m: the weights are read once, as they are stored, and are all the
// work there is. x, scale, y: float32; w: float32, bfloat16 or int8, row-major.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kLanes = 16, kAhead = 1024;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

struct Bf16 { uint16_t bits; };

template <typename To, typename From>
To As(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename Vector>
Vector Read(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline Floats Load(const float* w) { return Read<Floats>(w); }
inline Floats Load(const Bf16* w) { return As<Floats>(Words(__builtin_convertvector(Read<Halves>(w), Words) << 16)); }
#ifdef __AVX512F__   // one instruction, which compilers do not find
inline Floats Load(const int8_t* w) { return As<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Read<__m128i>(w)))); }
#else
inline Floats Load(const int8_t* w) { return __builtin_convertvector(Read<Bytes>(w), Floats); }
#endif

inline float One(float w) { return w; }
inline float One(Bf16 w) { return As<float>(static_cast<uint32_t>(w.bits) << 16); }
inline float One(int8_t w) { return w; }

inline float Sum(const Floats& v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps(As<__m512>(v));
#else
  float half[kLanes / 2], sum = 0;
  for (int i = 0; i < kLanes / 2; ++i) half[i] = v[i] + v[i + kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) sum += half[i];
  return sum;
#endif
}

struct Job {
  const float* x;
  const void* w;
  const float* scale;
  float* y;
  int64_t M, N, K;
};

// R rows of w against M rows of x, so that both are in registers as often as they are used; U steps at once, so that enough
// sums are under way. For one row of x that is one row of w: memory is fastest read in a single stream.
template <typename W, int M, int R, int U>
inline void Tile(const Job& job, int64_t n) {
  constexpr int kStep = U * kLanes;
  const int64_t K = job.K, whole = K / kStep * kStep;
  const W* w = static_cast<const W*>(job.w) + n * K;
  Floats sums[R][M][U] = {};
  for (int64_t k = 0; k < whole; k += kStep) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      Floats x[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) x[m] = Load(job.x + m * K + k + u * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const W* here = w + r * K + k + u * kLanes;
        __builtin_prefetch(reinterpret_cast<const char*>(here) + kAhead);   // while there is much to do, the hardware's own lags
        const Floats weights = Load(here);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[r][m][u] += weights * x[m];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Floats total = sums[r][m][0];
      for (int u = 1; u < U; ++u) total += sums[r][m][u];
      float sum = Sum(total);
      for (int64_t k = whole; k < K; ++k) sum += One(w[r * K + k]) * job.x[m * K + k];
      job.y[m * job.N + n + r] = job.scale[n + r] * sum;
    }
  }
}

template <typename W, int M>
void Rows(const Job& job, int64_t begin, int64_t end) {
  constexpr int R = M <= 2 ? 1 : 2, U = M == 1 ? 8 : M == 2 ? 4 : 1;
  int64_t n = begin;
  for (; n + R <= end; n += R) Tile<W, M, R, U>(job, n);
  for (; n < end; ++n) Tile<W, M, 1, U>(job, n);
}

template <typename W>
void (*Pick(int64_t M))(const Job&, int64_t, int64_t) {
  switch (M) {
    case 1: return Rows<W, 1>;
    case 2: return Rows<W, 2>;
    case 3: return Rows<W, 3>;
    case 4: return Rows<W, 4>;
    case 5: return Rows<W, 5>;
    case 6: return Rows<W, 6>;
    case 7: return Rows<W, 7>;
    case 8: return Rows<W, 8>;
  }
  return nullptr;
}

// Blocks of rows are taken one by one by whoever comes: this thread, and those of XLA's pool that are free. So no thread is
// waited for but one that is at work.
struct Work {
  Job job;
  void (*rows)(const Job&, int64_t, int64_t);
  int64_t size, blocks;
  std::atomic<int64_t> next{0}, done{0};

  void Run() {
    for (int64_t block; (block = next.fetch_add(1)) < blocks; done.fetch_add(1, std::memory_order_release)) {
      rows(job, block * size, std::min(job.N, (block + 1) * size));
    }
  }
};

ffi::Error Matvec(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::F32> scale,
                  ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const auto shape = w.dimensions();
  auto work = std::make_shared<Work>();
  work->job = {x.typed_data<float>(), w.untyped_data(), scale.typed_data(), y->typed_data(), x.dimensions()[0], shape[0], shape[1]};
  int64_t width;
  switch (w.element_type()) {
    case ffi::F32: work->rows = Pick<float>(work->job.M); width = 4; break;
    case ffi::BF16: work->rows = Pick<Bf16>(work->job.M); width = 2; break;
    case ffi::S8: work->rows = Pick<int8_t>(work->job.M); width = 1; break;
    default: return ffi::Error::InvalidArgument("matvec: weights are float32, bfloat16 or int8");
  }
  if (work->rows == nullptr) return ffi::Error::InvalidArgument("matvec: 1 to 8 rows");
  const int64_t bytes = std::max<int64_t>(1, shape[1] * width);
  work->size = std::max<int64_t>(8, (128 << 10) / bytes / 8 * 8);
  work->blocks = (shape[0] + work->size - 1) / work->size;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), work->blocks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Run(); });
  work->Run();
  while (work->done.load(std::memory_order_acquire) < work->blocks) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Gemma4Matvec, Matvec,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
