// Attention in bf16 without its scores in memory, as FlashAttention-2 does (arXiv 2307.08691), by the tensor cores' m16n8k16
// products.
//
// A block takes 128 queries of one head, a warp 16 of them; keys and values come by tiles, the next one while this one is
// worked on. What a thread holds of a matrix of 16 by 8 is its rows lane / 4 and lane / 4 + 8, at the columns 2 (lane % 4)
// and the one behind it.

#include <cuda_bf16.h>

typedef __nv_bfloat16 bf16;

#define WARP 32
#define WARPS 8
#define QUERIES (16 * WARPS)
#define LOG2E 1.4426950408889634f

__device__ __forceinline__ unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// Copies 16 bytes into shared memory, or zeros if `bytes` is 0, without waiting.
__device__ __forceinline__ void copy(bf16 *to, const bf16 *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;"); }

// Waits for all groups of copies but the last `N`.
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

// Four matrices of 8 by 8; each lane names a row.
__device__ __forceinline__ void load(unsigned r[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

__device__ __forceinline__ void load_transposed(unsigned r[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

// c += a b, of 16 by 16 and 16 by 8.
__device__ __forceinline__ void multiply(float c[4], const unsigned a[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned *>(&pair);
}

// q (B, Tq, H, D), k and v (B, Tk, Hkv, D). Batch row b sees the keys first[b]..last[b], and query i of them only those up
// to i + Tk - Tq where `causal`; a query that sees none gets zeros.
template <int D>
__device__ __forceinline__ void attend(const bf16 *q, const bf16 *k, const bf16 *v, const unsigned *first,
                                       const unsigned *last, bf16 *out, unsigned heads, unsigned kv_heads, unsigned tq,
                                       unsigned tk, unsigned causal, float scale) {
    constexpr int KEYS = D == 128 ? 32 : 64, CHUNKS = D / 8, STEPS = D / 16;
    __shared__ __align__(128) bf16 keys[2][KEYS * D], values[2][KEYS * D];
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, tiles = (tq + QUERIES - 1) / QUERIES;
    // Under a causal mask the last queries have most to do: they begin.
    const unsigned top = (tiles - 1 - blockIdx.x % tiles) * QUERIES, head = blockIdx.x / tiles % heads;
    const size_t batch = blockIdx.x / tiles / heads;
    const unsigned kv_head = head / (heads / kv_heads);
    // Chunks of 8 numbers are swapped so that the same chunk of 8 rows lies in different banks.
    const auto place = [](unsigned row, unsigned chunk) {
        return row * D + 8 * (chunk ^ (D == 32 ? row / 2 % 4 : row % 8));
    };
    const unsigned from = first[batch];
    const auto end_of = [&](unsigned query) {
        const unsigned seen = query + tk + 1 > tq ? query + tk + 1 - tq : 0;
        return causal ? min(last[batch], seen) : last[batch];
    };
    const unsigned all_end = min(end_of(min(top + QUERIES, tq) - 1), tk), first_end = end_of(top);
    const auto fetch = [&](unsigned stage, unsigned tile) {
        for (unsigned i = threadIdx.x; i < KEYS * CHUNKS; i += WARPS * WARP) {
            const unsigned row = i / CHUNKS, chunk = i % CHUNKS, key = tile * KEYS + row;
            const size_t at = ((batch * tk + min(key, tk - 1)) * kv_heads + kv_head) * D + 8 * chunk;
            copy(&keys[stage][place(row, chunk)], k + at, key < tk ? 16 : 0);
            copy(&values[stage][place(row, chunk)], v + at, key < tk ? 16 : 0);
        }
        end_copies();
    };

    const unsigned rows[2] = {top + 16 * warp + lane / 4, top + 16 * warp + lane / 4 + 8};
    unsigned a[STEPS][4];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned row = rows[i % 2], column = 16 * s + i / 2 * 8 + lane % 4 * 2;
            const size_t at = ((batch * tq + row) * heads + head) * D + column;
            a[s][i] = row < tq ? *reinterpret_cast<const unsigned *>(q + at) : 0;
        }
    }
    const unsigned ends[2] = {end_of(rows[0]), end_of(rows[1])};
    const float factor = scale * LOG2E;
    float sums[D / 8][4] = {}, highest[2] = {-INFINITY, -INFINITY}, totals[2] = {0.f, 0.f};

    const unsigned begin = from / KEYS, end = (all_end + KEYS - 1) / KEYS;
    if (begin < end) fetch(0, begin);
    for (unsigned tile = begin; tile < end; tile++) {
        const unsigned stage = (tile - begin) % 2;
        if (tile + 1 < end) {
            fetch(1 - stage, tile + 1);
            wait<1>();
        } else {
            wait<0>();
        }
        __syncthreads();
        float scores[KEYS / 8][4] = {};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int s = 0; s < STEPS; s += 2) {
                unsigned b[4];
                load(b, &keys[stage][place(8 * n + lane % 8, 2 * s + lane / 8)]);
                multiply(scores[n], a[s], b[0], b[1]);
                multiply(scores[n], a[s + 1], b[2], b[3]);
            }
        }
        const unsigned key = tile * KEYS + lane % 4 * 2;
        if (tile * KEYS < from || (tile + 1) * KEYS > first_end) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const unsigned at = key + 8 * n + i % 2;
                    if (at < from || at >= ends[i / 2]) scores[n][i] = -INFINITY;
                }
            }
        }
        float shrink[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float high = highest[r];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) high = fmaxf(high, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
            high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
            high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
            // A row that has seen nothing yet: any finite level keeps its weights at zero.
            const float level = high == -INFINITY ? 0.f : high * factor;
            shrink[r] = exp2f(highest[r] * factor - level);
            highest[r] = high;
            float total = 0.f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    scores[n][i] = exp2f(scores[n][i] * factor - level);
                    total += scores[n][i];
                }
            }
            totals[r] = totals[r] * shrink[r] + total;
        }
        if (__any_sync(0xffffffffu, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) sums[n][i] *= shrink[i / 2];
            }
        }
#pragma unroll
        for (int s = 0; s < KEYS / 16; s++) {
            const unsigned p[4] = {
                pack(scores[2 * s][0], scores[2 * s][1]), pack(scores[2 * s][2], scores[2 * s][3]),
                pack(scores[2 * s + 1][0], scores[2 * s + 1][1]), pack(scores[2 * s + 1][2], scores[2 * s + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                unsigned b[4];
                load_transposed(b, &values[stage][place(16 * s + lane % 16, n + lane / 16)]);
                multiply(sums[n], p, b[0], b[1]);
                multiply(sums[n + 1], p, b[2], b[3]);
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = totals[r];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const float share = total > 0.f ? 1.f / total : 0.f;
        if (rows[r] >= tq) continue;
        unsigned *to = reinterpret_cast<unsigned *>(out + ((batch * tq + rows[r]) * heads + head) * D) + lane % 4;
#pragma unroll
        for (int n = 0; n < D / 8; n++) to[4 * n] = pack(sums[n][2 * r] * share, sums[n][2 * r + 1] * share);
    }
}

#define ATTEND(D)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP, 2) attention_##D(                                           \
        const bf16 *q, const bf16 *k, const bf16 *v, const unsigned *first, const unsigned *last, bf16 *out,           \
        unsigned heads, unsigned kv_heads, unsigned tq, unsigned tk, unsigned causal, float scale) {                   \
        attend<D>(q, k, v, first, last, out, heads, kv_heads, tq, tk, causal, scale);                                  \
    }

ATTEND(32)
ATTEND(64)
ATTEND(128)
