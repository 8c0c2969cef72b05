// y[m, n] = scale[n] * sum_k x[m, k] w[n, k] for few rows m: the weights are read once, as they are stored, and are all the
// work there is. x, scale, y: float32; w: float32, bfloat16 or int8, row-major.
//
// Or of codes: w[n, k] = scale[k / group, n] * levels[code], rows packed as `turboquant.packing` packs them: planes of 4, 2 or 1 bits,
// low bits first; a byte of a plane of w bits holds the codes of 8 / w numbers that are K * w / 8 apart. scale: bfloat16 or float16.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
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

inline void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

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

constexpr int kMost = 32;   // levels that are looked up; more have equal steps

// How codes of some width are packed.
struct Packing {
  int planes, width[2];
};

template <int B>
constexpr Packing PackingOf() {
  return B == 2 ? Packing{1, {2, 0}} : B == 3 ? Packing{2, {2, 1}} : B == 4 ? Packing{1, {4, 0}} : B == 5 ? Packing{2, {4, 1}}
       : B == 6 ? Packing{2, {4, 2}} : Packing{1, {8, 0}};
}

struct Levels {
  float value[kMost], first, step;   // of up to 5 bits; of more: first + code * step
};

// Where the codes of a run of numbers are that is at one shift of each plane.
template <int B>
struct Run {
  static constexpr Packing P = PackingOf<B>();
  const uint8_t* from[2] = {};
  int shift[2] = {};

  Run(const uint8_t* w, int64_t K, int64_t k) {
    int64_t start = 0;
    for (int p = 0; p < P.planes; ++p) {
      const int64_t width = P.width[p], wide = K * width / 8, part = k / wide;
      from[p] = w + start + k - part * wide;
      shift[p] = static_cast<int>(part * width);
      start += wide;
    }
  }

  // Of numbers k .. k + kLanes after the first.
  Floats Decode(int64_t k, const Levels& levels) const {
    typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
    Ints code = {};
#pragma GCC unroll 2
    for (int p = 0; p < P.planes; ++p) {
#ifdef __AVX512F__
      const Ints bytes = As<Ints>(_mm512_cvtepu8_epi32(Read<__m128i>(from[p] + k)));
#else
      typedef uint8_t Codes __attribute__((vector_size(kLanes)));
      const Ints bytes = __builtin_convertvector(Read<Codes>(from[p] + k), Ints);
#endif
      code |= ((bytes >> shift[p]) & ((1 << P.width[p]) - 1)) << (p == 0 ? 0 : P.width[0]);
    }
    if constexpr (B > 5) return __builtin_convertvector(code, Floats) * levels.step + levels.first;
#ifdef __AVX512F__
    const __m512i index = As<__m512i>(code);
    if constexpr (B <= 4) return As<Floats>(_mm512_permutexvar_ps(index, _mm512_loadu_ps(levels.value)));
    return As<Floats>(_mm512_permutex2var_ps(_mm512_loadu_ps(levels.value), index, _mm512_loadu_ps(levels.value + kLanes)));
#else
    Floats found;
    for (int i = 0; i < kLanes; ++i) found[i] = levels.value[code[i] & (kMost - 1)];
    return found;
#endif
  }

  float DecodeOne(int64_t k, const Levels& levels) const {
    int code = 0;
    for (int p = 0; p < P.planes; ++p) code |= (from[p][k] >> shift[p] & ((1 << P.width[p]) - 1)) << (p == 0 ? 0 : P.width[0]);
    return B > 5 ? levels.first + code * levels.step : levels.value[code];
  }
};

struct CodesJob {
  const float* x;
  const uint8_t* w;
  const uint16_t* scale;
  bool half;
  float* y;
  int64_t M, N, K, bytes, group;
  Levels levels;

  float Scale(int64_t n, int64_t k) const {
    const uint16_t bits = scale[k / group * N + n];
    return half ? static_cast<float>(As<_Float16>(bits)) : As<float>(static_cast<uint32_t>(bits) << 16);
  }
};

// Numbers [from, from + count) of a row times M rows of x, all at one shift of each plane and of one scale.
template <int B, int M>
inline void Piece(const CodesJob& job, const uint8_t* w, float scale, int64_t from, int64_t count, Floats (&sums)[M], float (&rest)[M]) {
  const Run<B> run(w, job.K, from);
  const float* x = job.x + from;
  Floats piece[M] = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const Floats numbers = run.Decode(k, job.levels);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) piece[m] += numbers * Load(x + m * job.K + k);
  }
  for (int m = 0; m < M; ++m) sums[m] += piece[m] * scale;
  for (; k < count; ++k) {
    const float number = run.DecodeOne(k, job.levels) * scale;
    for (int m = 0; m < M; ++m) rest[m] += number * x[m * job.K + k];
  }
}

// The case that counts: R rows of one nibble plane, of which each byte is read once for both of its numbers.
template <int M, int R>
inline void Nibbles(const CodesJob& job, int64_t n, int64_t size) {
#ifdef __AVX512F__
  const int64_t half = job.K / 2;
  const uint8_t* w = job.w + n * job.bytes;
  const __m512 levels = _mm512_loadu_ps(job.levels.value);
  Floats sums[R][M] = {};
  for (int64_t start = 0; start < half; start += size) {
    Floats low[R][M] = {}, high[R][M] = {};
    for (int64_t k = start; k < start + size; k += kLanes) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint8_t* here = w + r * job.bytes + k;
        __builtin_prefetch(here + kAhead);
        const __m512i bytes = _mm512_cvtepu8_epi32(Read<__m128i>(here));
        const Floats a = As<Floats>(_mm512_permutexvar_ps(bytes, levels));   // which looks at the low four bits alone
        const Floats b = As<Floats>(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), levels));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          low[r][m] += a * Load(job.x + m * job.K + k);
          high[r][m] += b * Load(job.x + m * job.K + half + k);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float s = job.Scale(n + r, start), t = job.Scale(n + r, half + start);
      for (int m = 0; m < M; ++m) sums[r][m] += low[r][m] * s + high[r][m] * t;
    }
  }
  for (int r = 0; r < R; ++r) for (int m = 0; m < M; ++m) job.y[m * job.N + n + r] = Sum(sums[r][m]);
#endif
}

int64_t Gcd(int64_t a, int64_t b) { return b == 0 ? a : Gcd(b, a % b); }

template <int B, int M>
void CodeRows(const CodesJob& job, int64_t begin, int64_t end) {
  constexpr Packing P = PackingOf<B>();
  constexpr int narrow = P.width[P.planes - 1];
  const int64_t size = Gcd(job.K * narrow / 8, job.group);
  int64_t n = begin;
#ifdef __AVX512F__
  if (B == 4 && size % kLanes == 0) {
    constexpr int R = M <= 2 ? 4 : M <= 4 ? 2 : 1;
    for (; n + R <= end; n += R) Nibbles<M, R>(job, n, size);
    for (; n < end; ++n) Nibbles<M, 1>(job, n, size);
  }
#endif
  for (; n < end; ++n) {
    Floats sums[M] = {};
    float rest[M] = {};
    for (int64_t k = 0; k < job.K; k += size) Piece<B, M>(job, job.w + n * job.bytes, job.Scale(n, k), k, size, sums, rest);
    for (int m = 0; m < M; ++m) job.y[m * job.N + n] = Sum(sums[m]) + rest[m];
  }
}

template <int B>
void (*PickCodes(int64_t M))(const CodesJob&, int64_t, int64_t) {
  switch (M) {
    case 1: return CodeRows<B, 1>;
    case 2: return CodeRows<B, 2>;
    case 3: return CodeRows<B, 3>;
    case 4: return CodeRows<B, 4>;
    case 5: return CodeRows<B, 5>;
    case 6: return CodeRows<B, 6>;
    case 7: return CodeRows<B, 7>;
    case 8: return CodeRows<B, 8>;
  }
  return nullptr;
}

// Blocks of rows are taken one by one by whoever comes: this thread, and those of XLA's pool that are free. So no thread is
// waited for but one that is at work.
struct Work {
  int64_t rows, size, blocks;
  std::atomic<int64_t> next{0}, done{0};

  virtual ~Work() = default;
  virtual void Rows(int64_t begin, int64_t end) const = 0;

  void Run() {
    for (int64_t block; (block = next.fetch_add(1)) < blocks; done.fetch_add(1, std::memory_order_release)) {
      Rows(block * size, std::min(rows, (block + 1) * size));
    }
  }
};

template <typename J>
struct WorkOf : Work {
  J job;
  void (*run)(const J&, int64_t, int64_t) = nullptr;
  void Rows(int64_t begin, int64_t end) const override { run(job, begin, end); }
};

// A thread of the pool that has helped looks out for more work for a while, as to be woken takes longer than many a product.
struct Helpers {
  static constexpr auto kPatience = std::chrono::microseconds(100);
  std::mutex mutex;
  std::shared_ptr<Work> latest;
  std::atomic<int64_t> posted{0}, waiting{0};

  void Post(ffi::ThreadPool& pool, const std::shared_ptr<Work>& work) {
    const int64_t wanted = std::min<int64_t>(pool.num_threads(), work->blocks) - 1;
    if (wanted < 1) return;
    {
      std::lock_guard<std::mutex> lock(mutex);
      latest = work;
    }
    posted.fetch_add(1, std::memory_order_release);
    for (int64_t i = waiting.load(); i < wanted; ++i) pool.Schedule([this, work] { Help(work); });
  }

  void Help(std::shared_ptr<Work> work) {
    while (true) {
      const int64_t seen = posted.load(std::memory_order_acquire);
      work->Run();
      work.reset();
      waiting.fetch_add(1);
      const auto end = std::chrono::steady_clock::now() + kPatience;
      while (posted.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < end) Pause();
      waiting.fetch_sub(1);
      if (posted.load(std::memory_order_acquire) == seen) return;
      std::lock_guard<std::mutex> lock(mutex);
      work = latest;
    }
  }
};

ffi::Error RunAll(ffi::ThreadPool& pool, const std::shared_ptr<Work>& work, int64_t rows, int64_t bytes, int64_t least) {
  static Helpers* const helpers = new Helpers;   // never destroyed: a thread may be in it when the process ends
  work->rows = rows;
  work->size = std::max<int64_t>(least, (128 << 10) / std::max<int64_t>(1, bytes) / least * least);
  work->blocks = (rows + work->size - 1) / work->size;
  helpers->Post(pool, work);
  work->Run();
  while (work->done.load(std::memory_order_acquire) < work->blocks) std::this_thread::yield();   // the machine may be busy
  return ffi::Error::Success();
}

ffi::Error Matvec(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::F32> scale,
                  ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const auto shape = w.dimensions();
  auto work = std::make_shared<WorkOf<Job>>();
  work->job = {x.typed_data<float>(), w.untyped_data(), scale.typed_data(), y->typed_data(), x.dimensions()[0], shape[0], shape[1]};
  int64_t width;
  switch (w.element_type()) {
    case ffi::F32: work->run = Pick<float>(work->job.M); width = 4; break;
    case ffi::BF16: work->run = Pick<Bf16>(work->job.M); width = 2; break;
    case ffi::S8: work->run = Pick<int8_t>(work->job.M); width = 1; break;
    default: return ffi::Error::InvalidArgument("matvec: weights are float32, bfloat16 or int8");
  }
  if (work->run == nullptr) return ffi::Error::InvalidArgument("matvec: 1 to 8 rows");
  return RunAll(pool, work, shape[0], shape[1] * width, 8);
}

ffi::Error MatvecCodes(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> w, ffi::AnyBuffer scale,
                       ffi::Buffer<ffi::F32> levels, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1], N = w.dimensions()[0], count = levels.dimensions()[0];
  auto work = std::make_shared<WorkOf<CodesJob>>();
  work->job = {x.typed_data(), w.typed_data(), static_cast<const uint16_t*>(scale.untyped_data()), scale.element_type() == ffi::F16,
               y->typed_data(), M, N, K, w.dimensions()[1], K / scale.dimensions()[0], {}};
  Levels& to = work->job.levels;
  const float* from = levels.typed_data();
  for (int64_t i = 0; i < kMost; ++i) to.value[i] = from[i % std::min<int64_t>(count, kMost)];
  to.first = from[0], to.step = (from[count - 1] - from[0]) / (count - 1);
  switch (count) {
    case 4: work->run = PickCodes<2>(M); break;
    case 8: work->run = PickCodes<3>(M); break;
    case 16: work->run = PickCodes<4>(M); break;
    case 32: work->run = PickCodes<5>(M); break;
    case 64: work->run = PickCodes<6>(M); break;
    case 256: work->run = PickCodes<8>(M); break;
    default: return ffi::Error::InvalidArgument("matvec: 2, 3, 4, 5, 6 or 8 bits");
  }
  if (work->run == nullptr) return ffi::Error::InvalidArgument("matvec: 1 to 8 rows");
  return RunAll(pool, work, N, w.dimensions()[1], 16);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Gemma4Matvec, Matvec,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Gemma4MatvecCodes, MatvecCodes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
