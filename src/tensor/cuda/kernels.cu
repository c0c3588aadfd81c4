// The operations of a transformer block that candle composes of many kernels: those of training in f32, those of a forward
// pass in bf16 too, computed in f32.
//
// A row is one warp's or one block's where it is reduced: its numbers stay in registers, so each is read once. Everything
// else is element by element. All results are the same from run to run: nothing is added atomically.

#include <cuda_bf16.h>

typedef __nv_bfloat16 bf16;

#define WARP 32
// Numbers of a row that a lane holds at most.
#define HELD 8

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T number(float x);
template <> __device__ __forceinline__ float number(float x) { return x; }
template <> __device__ __forceinline__ bf16 number(float x) { return __float2bfloat16(x); }

// Numbers that are read and written at once.
template <typename T> struct __align__(4 * sizeof(T)) Four {
    T v[4];
};

template <typename T> __device__ __forceinline__ Four<T> four(const T *from) {
    return *reinterpret_cast<const Four<T> *>(from);
}

// The kernels `name_f32` and `name_bf16` of one template; `T` is the number format in `parameters`.
#define IN_BOTH(name, parameters, arguments)                                                       \
    namespace in_f32 {                                                                             \
    typedef float T;                                                                               \
    extern "C" __global__ void name##_f32 parameters { name<T> arguments; }                        \
    }                                                                                              \
    namespace in_bf16 {                                                                            \
    typedef bf16 T;                                                                                \
    extern "C" __global__ void name##_bf16 parameters { name<T> arguments; }                       \
    }

__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

__device__ __forceinline__ unsigned long long thread_index() {
    return (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
}

// The row of this warp and the step to its next one.
#define EACH_ROW(row, rows)                                                                        \
    for (unsigned row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP; row < rows;                \
         row += gridDim.x * blockDim.x / WARP)

// x r weight with r = 1 / sqrt(mean(x^2) + eps): the gradient of x, and each warp's part of the weight's.
extern "C" __global__ void rms_backward(const float *x, const float *weight, const float *grad, float *to_x,
                                        float *to_weight, unsigned rows, unsigned d, float eps) {
    const unsigned lane = threadIdx.x % WARP, warp = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    float sums[HELD] = {0.f};
    EACH_ROW(row, rows) {
        const size_t start = (size_t)row * d;
        float v[HELD], g[HELD], squares = 0.f, along = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const unsigned c = lane + WARP * i;
            v[i] = c < d ? x[start + c] : 0.f;
            g[i] = c < d ? grad[start + c] : 0.f;
            squares += v[i] * v[i];
            along += c < d ? v[i] * g[i] * weight[c] : 0.f;
        }
        squares = warp_sum(squares);
        along = warp_sum(along);
        const float r = 1.f / sqrtf(squares / d + eps);
        const float pull = along * r * r * r / d;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const unsigned c = lane + WARP * i;
            if (c < d) to_x[start + c] = g[i] * weight[c] * r - v[i] * pull;
            sums[i] += g[i] * v[i] * r;
        }
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const unsigned c = lane + WARP * i;
        if (c < d) to_weight[(size_t)warp * d + c] = sums[i];
    }
}

// Reads a row of `d` numbers from `x` on into `v`, without their mean; the reciprocal of their deviation.
template <typename T>
__device__ __forceinline__ float centre(const T *x, unsigned d, unsigned lane, float eps, float v[HELD]) {
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const unsigned c = lane + WARP * i;
        v[i] = c < d ? wide(x[c]) : 0.f;
        sum += v[i];
    }
    const float mean = warp_sum(sum) / d;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        v[i] = lane + WARP * i < d ? v[i] - mean : 0.f;
        squares += v[i] * v[i];
    }
    return 1.f / sqrtf(warp_sum(squares) / d + eps);
}

// n (1 + scale) + shift, where n is a row of x without its mean, over its deviation; a batch row has t tokens.
template <typename T>
__device__ void modulate_forward(const T *x, const T *shift, const T *scale, T *y, unsigned rows, unsigned t, unsigned d,
                                 float eps) {
    const unsigned lane = threadIdx.x % WARP;
    EACH_ROW(row, rows) {
        const size_t start = (size_t)row * d, of = (size_t)(row / t) * d;
        float v[HELD];
        const float r = centre(x + start, d, lane, eps, v);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const unsigned c = lane + WARP * i;
            if (c < d) y[start + c] = number<T>(v[i] * r * (1.f + wide(scale[of + c])) + wide(shift[of + c]));
        }
    }
}

IN_BOTH(modulate_forward,
        (const T *x, const T *shift, const T *scale, T *y, unsigned rows, unsigned t, unsigned d, float eps),
        (x, shift, scale, y, rows, t, d, eps))

// The sum over a block of 256 threads; `parts` is free again after the next synchronisation.
__device__ __forceinline__ float block_sum(float x, float parts[WARP]) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % WARP < blockDim.x / WARP ? parts[threadIdx.x % WARP] : 0.f);
}

// The same of rows of up to 4096 numbers, a multiple of four: a block for each.
#define FOURS 4
template <typename T>
__device__ void modulate_wide(const T *x, const T *shift, const T *scale, T *y, unsigned t, unsigned d, float eps) {
    __shared__ float parts[2][WARP];
    const size_t start = (size_t)blockIdx.x * d, of = (size_t)(blockIdx.x / t) * d;
    float v[FOURS][4], sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        const unsigned c = 4 * (threadIdx.x + blockDim.x * i);
        if (c >= d) continue;
        const Four<T> some = four(x + start + c);
#pragma unroll
        for (int k = 0; k < 4; k++) sum += v[i][k] = wide(some.v[k]);
    }
    const float mean = block_sum(sum, parts[0]) / d;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        if (4 * (threadIdx.x + blockDim.x * i) >= d) continue;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            v[i][k] -= mean;
            squares += v[i][k] * v[i][k];
        }
    }
    const float r = 1.f / sqrtf(block_sum(squares, parts[1]) / d + eps);
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        const unsigned c = 4 * (threadIdx.x + blockDim.x * i);
        if (c >= d) continue;
        const Four<T> by = four(scale + of + c), to = four(shift + of + c);
        Four<T> result;
#pragma unroll
        for (int k = 0; k < 4; k++) result.v[k] = number<T>(v[i][k] * r * (1.f + wide(by.v[k])) + wide(to.v[k]));
        *reinterpret_cast<Four<T> *>(y + start + c) = result;
    }
}

IN_BOTH(modulate_wide, (const T *x, const T *shift, const T *scale, T *y, unsigned t, unsigned d, float eps),
        (x, shift, scale, y, t, d, eps))

// Its gradient, and grad * n, whose sum over the tokens is the scale's.
extern "C" __global__ void modulate_backward(const float *x, const float *scale, const float *grad, float *to_x,
                                             float *to_scale, unsigned rows, unsigned t, unsigned d, float eps) {
    const unsigned lane = threadIdx.x % WARP;
    EACH_ROW(row, rows) {
        const size_t start = (size_t)row * d, of = (size_t)(row / t) * d;
        float v[HELD], g[HELD], level = 0.f, along = 0.f;
        const float r = centre(x + start, d, lane, eps, v);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const unsigned c = lane + WARP * i;
            v[i] *= r;
            const float given = c < d ? grad[start + c] : 0.f;
            if (c < d) to_scale[start + c] = given * v[i];
            g[i] = c < d ? given * (1.f + scale[of + c]) : 0.f;
            level += g[i];
            along += g[i] * v[i];
        }
        level = warp_sum(level) / d;
        along = warp_sum(along) / d;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const unsigned c = lane + WARP * i;
            if (c < d) to_x[start + c] = (g[i] - level - v[i] * along) * r;
        }
    }
}

// silu(gate) up, both side by side in columns `from..from + 2 f` of rows of `width`; all are multiples of four.
template <typename T>
__device__ void swiglu_forward(const T *x, T *y, unsigned rows, unsigned f, unsigned width, unsigned from) {
    const unsigned long long i = 4 * thread_index();
    if (i >= (unsigned long long)rows * f) return;
    const size_t at = (size_t)(i / f) * width + from + i % f;
    const Four<T> gate = four(x + at), up = four(x + at + f);
    Four<T> result;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const float g = wide(gate.v[k]);
        result.v[k] = number<T>(g / (1.f + expf(-g)) * wide(up.v[k]));
    }
    *reinterpret_cast<Four<T> *>(y + i) = result;
}

IN_BOTH(swiglu_forward, (const T *x, T *y, unsigned rows, unsigned f, unsigned width, unsigned from),
        (x, y, rows, f, width, from))

// Its gradient, in rows of 2 f; `grad` is in columns `skip..skip + f` of rows of `skip + f`.
extern "C" __global__ void swiglu_backward(const float *x, const float *grad, float *to_x, unsigned rows, unsigned f,
                                           unsigned width, unsigned from, unsigned skip) {
    const unsigned long long i = thread_index();
    if (i >= (unsigned long long)rows * f) return;
    const size_t row = i / f, c = i % f, at = row * width + from + c;
    const float gate = x[at], g = grad[row * (skip + f) + skip + c];
    const float s = 1.f / (1.f + expf(-gate)), silu = gate * s;
    to_x[row * 2 * f + c] = g * x[at + f] * (s + silu * (1.f - s));
    to_x[row * 2 * f + f + c] = g * silu;
}

// x + gate y; a batch row has `n` = t d numbers, and a gate d, a multiple of four.
template <typename T>
__device__ void gate_forward(const T *x, const T *gate, const T *y, T *out, unsigned long long all, unsigned n,
                             unsigned d) {
    const unsigned long long i = 4 * thread_index();
    if (i >= all) return;
    const Four<T> base = four(x + i), by = four(gate + i / n * d + i % d), more = four(y + i);
    Four<T> result;
#pragma unroll
    for (int k = 0; k < 4; k++) result.v[k] = number<T>(wide(base.v[k]) + wide(by.v[k]) * wide(more.v[k]));
    *reinterpret_cast<Four<T> *>(out + i) = result;
}

IN_BOTH(gate_forward,
        (const T *x, const T *gate, const T *y, T *out, unsigned long long all, unsigned n, unsigned d),
        (x, gate, y, out, all, n, d))

// Rotates rows of `d` numbers, `heads` of which have the same angles, after an RMS norm where `normed`. Row r turns by the
// angles number r / heads % n, of d / 2 each; numbers 2 i and 2 i + 1 are turned together, or i and i + d / 2 where `half`.
template <typename T>
__device__ void rotate(const T *x, const T *weight, const float *cosine, const float *sine, T *y, unsigned rows,
                       unsigned heads, unsigned n, unsigned d, unsigned half, unsigned normed, unsigned back, float eps) {
    const unsigned lane = threadIdx.x % WARP, pairs = d / 2;
    EACH_ROW(row, rows) {
        const size_t start = (size_t)row * d, turn = (size_t)(row / heads % n) * pairs;
        float a[HELD / 2], b[HELD / 2], squares = 0.f;
#pragma unroll
        for (int i = 0; i < HELD / 2; i++) {
            const unsigned p = lane + WARP * i, first = half ? p : 2 * p, second = half ? p + pairs : 2 * p + 1;
            a[i] = p < pairs ? wide(x[start + first]) : 0.f;
            b[i] = p < pairs ? wide(x[start + second]) : 0.f;
            squares += a[i] * a[i] + b[i] * b[i];
        }
        const float r = normed ? 1.f / sqrtf(warp_sum(squares) / d + eps) : 1.f;
#pragma unroll
        for (int i = 0; i < HELD / 2; i++) {
            const unsigned p = lane + WARP * i, first = half ? p : 2 * p, second = half ? p + pairs : 2 * p + 1;
            if (p >= pairs) continue;
            if (normed) {
                a[i] *= r * wide(weight[first]);
                b[i] *= r * wide(weight[second]);
            }
            const float c = cosine[turn + p], s = back ? -sine[turn + p] : sine[turn + p];
            y[start + first] = number<T>(a[i] * c - b[i] * s);
            y[start + second] = number<T>(b[i] * c + a[i] * s);
        }
    }
}

IN_BOTH(rotate,
        (const T *x, const T *weight, const float *cosine, const float *sine, T *y, unsigned rows, unsigned heads,
         unsigned n, unsigned d, unsigned half, unsigned normed, unsigned back, float eps),
        (x, weight, cosine, sine, y, rows, heads, n, d, half, normed, back, eps))

// Row i of `out` is the sum of the rows `order[starts[i]]..order[starts[i + 1]]` of `grad`, of d numbers each.
extern "C" __global__ void select_backward(const float *grad, const unsigned *starts, const unsigned *order, float *out,
                                           unsigned long long all, unsigned d) {
    const unsigned long long i = thread_index();
    if (i >= all) return;
    const size_t row = i / d, c = i % d;
    float sum = 0.f;
    for (unsigned k = starts[row]; k < starts[row + 1]; k++) sum += grad[(size_t)order[k] * d + c];
    out[i] = sum;
}

// The gradient of y, and grad * y, whose sum over the tokens is the gate's.
extern "C" __global__ void gate_backward(const float *gate, const float *y, const float *grad, float *to_y,
                                         float *to_gate, unsigned long long all, unsigned n, unsigned d) {
    const unsigned long long i = thread_index();
    if (i >= all) return;
    to_y[i] = grad[i] * gate[i / n * d + i % d];
    to_gate[i] = grad[i] * y[i];
}

// weights (grad - level), the gradient of attention's scores; a row has one level.
extern "C" __global__ void scores_backward(const float *weights, const float *grad, const float *level, float *out,
                                           unsigned long long all, unsigned n) {
    const unsigned long long i = thread_index();
    if (i < all) out[i] = weights[i] * (grad[i] - level[i / n]);
}

// Group normalisation of a group of `channels * pixels` numbers a block, then silu if asked for.
extern "C" __global__ void group_norm(const float *x, const float *weight, const float *bias, float *y,
                                      unsigned groups, unsigned channels, unsigned pixels, unsigned silu, float eps) {
    __shared__ float parts[2][WARP];
    const unsigned n = channels * pixels, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const size_t start = (size_t)blockIdx.x * n;
    // Sums of differences from the first number, which keeps the squares small.
    const float origin = x[start];
    float sum = 0.f, squares = 0.f;
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) {
        const float v = x[start + i] - origin;
        sum += v;
        squares += v * v;
    }
    sum = warp_sum(sum);
    squares = warp_sum(squares);
    if (lane == 0) {
        parts[0][warp] = sum;
        parts[1][warp] = squares;
    }
    __syncthreads();
    const unsigned warps = blockDim.x / WARP;
    sum = warp_sum(lane < warps ? parts[0][lane] : 0.f);
    squares = warp_sum(lane < warps ? parts[1][lane] : 0.f);
    const float shift = sum / n, mean = origin + shift;
    const float r = 1.f / sqrtf(fmaxf(squares / n - shift * shift, 0.f) + eps);
    const unsigned first = blockIdx.x % groups * channels;
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) {
        const unsigned c = first + i / pixels;
        const float v = (x[start + i] - mean) * r * weight[c] + bias[c];
        y[start + i] = silu ? v / (1.f + expf(-v)) : v;
    }
}

// The gradient of GELU by its tanh approximation.
extern "C" __global__ void gelu_tanh_backward(const float *x, const float *grad, float *to_x, unsigned long long all) {
    const unsigned long long i = thread_index();
    if (i >= all) return;
    // (1 + tanh(u)) / 2 = sigmoid(2 u)
    const float k = 1.5957691216057308f, cubic = 0.044715f, v = x[i];
    const float s = 1.f / (1.f + expf(-k * (v + cubic * v * v * v)));
    to_x[i] = grad[i] * (s + v * s * (1.f - s) * k * (1.f + 3.f * cubic * v * v));
}

// Pixels of a block along each side, outputs of a thread, inputs that are read at once, and the largest span of inputs
// that a block sees: kernels of up to 3 by steps of up to 2.
#define TILE 16
#define OUTS 16
#define INS 4
#define SPAN (2 * (TILE - 1) + 3)

// Convolution: a block computes TILE x TILE pixels of OUTS channels of one picture.
extern "C" __global__ void conv2d(const float *x, const float *weight, const float *bias, float *y, unsigned inner,
                                  unsigned out, unsigned in_h, unsigned in_w, unsigned out_h, unsigned out_w,
                                  unsigned kernel, unsigned stride, unsigned padding) {
    __shared__ float tile[INS][SPAN * SPAN];
    __shared__ __align__(16) float weights[INS][9][OUTS];
    const unsigned across = (out_w + TILE - 1) / TILE, down = (out_h + TILE - 1) / TILE;
    const unsigned chunks = (out + OUTS - 1) / OUTS, span = (TILE - 1) * stride + kernel, taps = kernel * kernel;
    unsigned rest = blockIdx.x;
    const unsigned left = rest % across * TILE, top = (rest /= across) % down * TILE;
    const unsigned first = (rest /= down) % chunks * OUTS, picture = rest / chunks;
    const unsigned column = threadIdx.x % TILE, row = threadIdx.x / TILE;
    float sums[OUTS] = {0.f};
    for (unsigned from = 0; from < inner; from += INS) {
        __syncthreads();
        for (unsigned i = threadIdx.x; i < INS * span * span; i += blockDim.x) {
            const unsigned c = i / (span * span), place = i % (span * span);
            // Unsigned: what lies left of or above the picture is far right or below.
            const unsigned py = top * stride + place / span - padding, px = left * stride + place % span - padding;
            const bool inside = from + c < inner && py < in_h && px < in_w;
            tile[c][place] = inside ? x[(((size_t)picture * inner + from + c) * in_h + py) * in_w + px] : 0.f;
        }
        for (unsigned i = threadIdx.x; i < INS * taps * OUTS; i += blockDim.x) {
            const unsigned o = i % OUTS, tap = i / OUTS % taps, c = i / (OUTS * taps);
            const bool inside = first + o < out && from + c < inner;
            weights[c][tap][o] = inside ? weight[((size_t)(first + o) * inner + from + c) * taps + tap] : 0.f;
        }
        __syncthreads();
        for (unsigned c = 0; c < INS; c++) {
            for (unsigned tap = 0; tap < taps; tap++) {
                const float v = tile[c][(row * stride + tap / kernel) * span + column * stride + tap % kernel];
                const float4 *w = reinterpret_cast<const float4 *>(weights[c][tap]);
#pragma unroll
                for (int o = 0; o < OUTS / 4; o++) {
                    const float4 some = w[o];
                    sums[4 * o] += v * some.x;
                    sums[4 * o + 1] += v * some.y;
                    sums[4 * o + 2] += v * some.z;
                    sums[4 * o + 3] += v * some.w;
                }
            }
        }
    }
    const unsigned oy = top + row, ox = left + column;
    if (oy >= out_h || ox >= out_w) return;
#pragma unroll
    for (int o = 0; o < OUTS; o++) {
        if (first + o < out)
            y[(((size_t)picture * out + first + o) * out_h + oy) * out_w + ox] = sums[o] + bias[first + o];
    }
}
