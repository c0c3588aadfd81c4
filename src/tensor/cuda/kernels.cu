// The operations of a transformer block that candle composes of many kernels, in f32.
//
// A row is one warp's where it is reduced: its numbers stay in registers, so each is read once. Everything else is
// element by element. All results are the same from run to run: nothing is added atomically.

#define WARP 32
// Numbers of a row that a lane holds at most.
#define HELD 8

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
__device__ __forceinline__ float centre(const float *x, unsigned d, unsigned lane, float eps, float v[HELD]) {
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const unsigned c = lane + WARP * i;
        v[i] = c < d ? x[c] : 0.f;
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
extern "C" __global__ void modulate_forward(const float *x, const float *shift, const float *scale, float *y,
                                            unsigned rows, unsigned t, unsigned d, float eps) {
    const unsigned lane = threadIdx.x % WARP;
    EACH_ROW(row, rows) {
        const size_t start = (size_t)row * d, of = (size_t)(row / t) * d;
        float v[HELD];
        const float r = centre(x + start, d, lane, eps, v);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const unsigned c = lane + WARP * i;
            if (c < d) y[start + c] = v[i] * r * (1.f + scale[of + c]) + shift[of + c];
        }
    }
}

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

// silu(gate) up, both side by side in columns `from..from + 2 f` of rows of `width`.
extern "C" __global__ void swiglu_forward(const float *x, float *y, unsigned rows, unsigned f, unsigned width,
                                          unsigned from) {
    const unsigned long long i = thread_index();
    if (i >= (unsigned long long)rows * f) return;
    const size_t at = (size_t)(i / f) * width + from + i % f;
    const float gate = x[at];
    y[i] = gate / (1.f + expf(-gate)) * x[at + f];
}

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

// x + gate y; a batch row has `n` = t d numbers, and a gate d.
extern "C" __global__ void gate_forward(const float *x, const float *gate, const float *y, float *out,
                                        unsigned long long all, unsigned n, unsigned d) {
    const unsigned long long i = thread_index();
    if (i < all) out[i] = x[i] + gate[i / n * d + i % d] * y[i];
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
