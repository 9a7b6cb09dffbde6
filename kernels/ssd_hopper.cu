/* Mamba-2's prompts on Hopper: the chunks of ssd.cu over wgmma.
 *
 * A block has three groups of four warps.  Two hold 64 columns of a head each, as H^T [64, N] in their accumulators: two
 * halves of 128 columns of one head, or two heads of 64 that read the same B and C.  The third prepares what they share,
 * and runs a chunk of 64 tokens ahead of them:
 *
 *   third    x, B and C into shared memory (tensor copies, two or three chunks ahead), decays, and scores C B^T [64, 64], weighted
 *            and rounded, into shared memory
 *   others   Y^T = h (H^T C^T) + D x^T + x^T S^T, left operands from registers: H^T as it is, rounded, x^T by ldmatrix;
 *            H^T = h_last H^T + (to_end x)^T B right behind the first product, so that it runs while Y^T is scaled; and
 *            Y^T goes out through x's place
 *
 * What a chunk needs passes from the third group to the others and back by barriers in shared memory, so the two
 * holders are apart from each other: one computes while the other's products run.  A block has a multiprocessor of its own:
 * H^T, Y^T and their operands are 160 registers a thread, of which the third group gives some of its own.
 */

#include "panel_map.cuh"
#include "ssd_chunks.cuh"
#include "wgmma.cuh"

#define HOLDERS 2
#define GROUP_THREADS 128
#define THREADS ((HOLDERS + 1) * GROUP_THREADS)
#define PANEL (CHUNK * 64) /* elements of a panel: 64 tokens by 64 columns */
#define SCORES 3           /* chunks whose scores are in shared memory */

/* Registers a thread: a third of 504 each, as the kernel begins and ends, and between. */
#define REGISTERS 168
#define REGISTERS_TO_PREPARE 104
#define REGISTERS_TO_HOLD 200

/* ---- an instruction that wgmma.cuh does not have ----------------------------------------------------------------- */

#define STRAIGHT_32(TYPE)                                                              \
    asm volatile(                                                                      \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                   \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" WGMMA_TEXT_32 \
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"                                 \
        : WGMMA_32(c)                                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)                 \
        : "memory")

/* c [64, CHUNK] (+)= a [64, 16] b [CHUNK, 16]^T, a in registers. */
template <typename T>
static __device__ __forceinline__ void
multiply_straight(float (&c)[CHUNK / 2], const uint32_t (&a)[4], uint64_t b, int add)
{
#if MIL_HAS_WGMMA
    if constexpr (wgmma_is_half<T>) {
        STRAIGHT_32("f16");
    }
    else {
        STRAIGHT_32("bf16");
    }
#else
    (void)c, (void)a, (void)b, (void)add;
#endif
}

/* ---- shared memory ------------------------------------------------------------------------------------------------ */

/* Tiles are panels as wgmma reads them. Panel g of x is holder g's. */
template <typename T, int N, bool PAIRS>
struct hopper_memory {
    static constexpr int STAGES = PAIRS && N == 128 ? 3 : 4; /* chunks */
    static constexpr int DECAYS = STAGES + 1; /* theirs, which are made before the inputs are there */
    alignas(1024) T x[STAGES][HOLDERS][PANEL];
    alignas(1024) T B[STAGES][CHUNK * N];
    alignas(1024) T C[STAGES][CHUNK * N];
    alignas(1024) T scores[SCORES][PAIRS ? HOLDERS : 1][PANEL];
    chunk_decays decays[DECAYS][PAIRS ? HOLDERS : 1];
    uint64_t full[STAGES], ready[STAGES]; /* inputs are here; and scores */
    uint64_t free[STAGES];                /* the holders are done with both */
};

/* Descriptions of x, B and C of all rows, for copies of a panel. */
struct hopper_maps {
    CUtensorMap x, B, C;
};

/* What earlier calls left of the first chunk: its first `before` tokens. */
template <typename T, int UNITS>
static __device__ __forceinline__ void
take_tail(T *tile, const float *tail, int64_t stride, int before)
{
    const int thread = threadIdx.x % GROUP_THREADS;
    for (int row = thread / UNITS; row < before; row += GROUP_THREADS / UNITS) {
        T *to = (T *)((char *)tile + panel_place<CHUNK>(row, thread % UNITS));
        float value[4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            mil_load<4>(tail + row * stride + thread % UNITS * 8 + 4 * half, value);
            mil_store<4>(to + 4 * half, value);
        }
    }
}

/* Zeros for the rows of a tile from `from` on: what lies there is another sequence's, or nobody's. */
template <typename T, int UNITS>
static __device__ __forceinline__ void
clear_rows(T *tile, int from)
{
    const int thread = threadIdx.x % GROUP_THREADS;
    for (int row = from + thread / UNITS; row < CHUNK; row += GROUP_THREADS / UNITS) {
        *(uint4 *)((char *)tile + panel_place<CHUNK>(row, thread % UNITS)) = make_uint4(0, 0, 0, 0);
    }
}

/* ---- what every group knows of the block ------------------------------------------------------------------------- */

struct hopper_place {
    int slice, segment;
    int head;          /* the block's first */
    int before, count; /* tokens of earlier calls and of this one */
    int folded;        /* of both, to be in the state */
    int first, end;    /* chunks of the segment */
    int64_t row;       /* first of the call */

    __device__ __forceinline__ int folded_of(int chunk) const
    {
        return max(0, min(CHUNK, folded - chunk * CHUNK));
    }
};

/* ---- the third group ----------------------------------------------------------------------------------------------- */

/* Weighted and rounded scores of the warp's 16 rows into the tile, up to the diagonal; beyond, the tile is 0.  Left of the
 * warp's diagonal tiles a decay is two factors: from the token to the warp's first row, and from there. */
template <typename T>
static __device__ __forceinline__ void
place_scores(const float (&s)[CHUNK / 2], const chunk_decays &decays, T *tile)
{
    const int lane = threadIdx.x % MIL_WARP, warp = threadIdx.x % GROUP_THREADS / MIL_WARP;
    const int row = warp * 16 + lane / 4;
    const float2 top = decays.sum[row], bottom = decays.sum[row + 8];
    const float2 before = decays.sum[max(warp * 16 - 1, 0)];
    const float from_top = fast_power((top.x - before.x) + (top.y - before.y));
    const float from_bottom = fast_power((bottom.x - before.x) + (bottom.y - before.y));
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
        if (j >= 2 * warp + 2) {
            continue;
        }
        const int at = 8 * j + lane % 4 * 2;
        const float4 others = *(const float4 *)(decays.sum + at);
        const float2 dt = *(const float2 *)(decays.dt + at);
        float value[4];
        if (j < 2 * warp) {
            const float left = fast_power((before.x - others.x) + (before.y - others.y)) * dt.x;
            const float right = fast_power((before.x - others.z) + (before.y - others.w)) * dt.y;
            value[0] = from_top * left * s[4 * j];
            value[1] = from_top * right * s[4 * j + 1];
            value[2] = from_bottom * left * s[4 * j + 2];
            value[3] = from_bottom * right * s[4 * j + 3];
        }
        else {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 own = e < 2 ? top : bottom;
                const float high = e % 2 == 0 ? others.x : others.z, low = e % 2 == 0 ? others.y : others.w;
                const float weight = fast_power((own.x - high) + (own.y - low)) * (e % 2 == 0 ? dt.x : dt.y);
                value[e] = at + e % 2 <= row + e / 2 * 8 ? weight * s[4 * j + e] : 0.0f;
            }
        }
        *(uint32_t *)((char *)tile + panel_place<CHUNK>(row, j) + lane % 4 * 4) = pack<T>(value[0], value[1]);
        *(uint32_t *)((char *)tile + panel_place<CHUNK>(row + 8, j) + lane % 4 * 4) =
            pack<T>(value[2], value[3]);
    }
}

template <typename T, int N, bool PAIRS, bool OUTPUT>
static __device__ __forceinline__ void
prepare(const chunk_arguments &c, const hopper_maps &maps, const mil_tails &tails, const mil_span &span,
        const hopper_place &p, hopper_memory<T, N, PAIRS> &m)
{
    constexpr int STAGES = hopper_memory<T, N, PAIRS>::STAGES, DECAYS = hopper_memory<T, N, PAIRS>::DECAYS;
    constexpr int HEADS = PAIRS ? HOLDERS : 1, UNITS = N / 8 /* of a token's B or C */;
    constexpr int COPIER = 2 * MIL_WARP; /* a thread of a warp that makes no decays */
    const ssd_arguments &a = c.ssd;
    const int thread = threadIdx.x % GROUP_THREADS, warp = thread / MIL_WARP, of_x = a.heads / a.x_heads;
    const int x_columns[HOLDERS] = {
        p.head / of_x * a.head_dim + p.slice * (PAIRS ? 64 : 128),
        PAIRS ? (p.head + 1) / of_x * a.head_dim + p.slice * 64
              : p.head / of_x * a.head_dim + p.slice * 128 + 64,
    };
    const int B_column = p.head / (a.heads / a.B_groups) * N, C_column = p.head / (a.heads / a.C_groups) * N;
    const int total = p.before + p.count, decay_head = p.head + (warp < HEADS ? warp : 0);
    const float exponent = get_exponent(a, decay_head), bias = a.dt_bias[decay_head];
    auto ask = [&](int n) {
        const int stage = n % STAGES, row = (int)p.row + (p.first + n) * CHUNK - p.before;
        if (p.first + n >= p.end) {
            return;
        }
        phase_expect(&m.full[stage], (HOLDERS + N / 64 * (OUTPUT ? 2 : 1)) * (int)sizeof m.x[0][0]);
#pragma unroll
        for (int i = 0; i < HOLDERS; i++) {
            copy_panel(m.x[stage][i], &maps.x, x_columns[i], row, &m.full[stage]);
        }
#pragma unroll
        for (int i = 0; i < N / 64; i++) {
            copy_panel(m.B[stage] + i * PANEL, &maps.B, B_column + i * 64, row, &m.full[stage]);
            if (OUTPUT) {
                copy_panel(m.C[stage] + i * PANEL, &maps.C, C_column + i * 64, row, &m.full[stage]);
            }
        }
    };
    chunk_times<T> even, odd; /* of chunks, two chunks ahead */
    /* The decays of a chunk. */
    auto decide = [&](int n, chunk_times<T> &dt) {
        const int chunk = p.first + n;
        const chunk_times<T> raw = dt;
        ask_for_dt<T>(a, span, tails.dt, decay_head, (chunk + 2) * CHUNK, total, dt);
        fill_decays(a, span, chunk * CHUNK, total, p.folded_of(chunk), exponent, bias, raw,
                    m.decays[n % DECAYS][warp]);
    };

    double log_decay = 0.0; /* of the segment */
    if (thread == COPIER) {
#pragma unroll 1
        for (int n = 0; n < STAGES; n++) {
            ask(n);
        }
    }
    if (OUTPUT) {
        uint4 *scores = (uint4 *)m.scores;
        for (int i = thread; i < (int)(sizeof m.scores / sizeof *scores); i += GROUP_THREADS) {
            scores[i] = make_uint4(0, 0, 0, 0);
        }
    }
    if (warp < HEADS) {
        ask_for_dt<T>(a, span, tails.dt, decay_head, p.first * CHUNK, total, even);
        ask_for_dt<T>(a, span, tails.dt, decay_head, (p.first + 1) * CHUNK, total, odd);
        decide(0, even);
    }
#pragma unroll 1
    for (int n = 0; p.first + n < p.end; n++) {
        const int stage = n % STAGES, chunk = p.first + n, there = total - chunk * CHUNK;
        phase_wait(&m.full[stage], n / STAGES % 2);
        if (chunk == 0 && p.before > 0 && tails.x != NULL) {
            const int64_t x_stride = (int64_t)a.x_heads * a.head_dim;
#pragma unroll
            for (int i = 0; i < HOLDERS; i++) {
                take_tail<T, 8>(m.x[0][i], tails.x + x_columns[i], x_stride, p.before);
            }
            take_tail<T, UNITS>(m.B[0], tails.B + B_column, (int64_t)a.B_groups * N, p.before);
        }
        if (there < CHUNK) {
#pragma unroll
            for (int i = 0; i < HOLDERS; i++) {
                clear_rows<T, 8>(m.x[stage][i], there);
            }
            clear_rows<T, UNITS>(m.B[stage], there);
        }
        if (chunk == 0 || there < CHUNK) {
            wgmma_publish();
        }
        barrier_meet(1, GROUP_THREADS); /* the chunk is here, and its decays */
        float s[CHUNK / 2];
        if constexpr (OUTPUT) {
            const uint32_t B_tile = shared_address(m.B[stage]), C_tile = shared_address(m.C[stage]);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < N / 16; k++) {
                const uint32_t at = k / 4 * PANEL * 2 + k % 4 * 32;
                wgmma_shared<T>(s, wgmma_factor(C_tile + at, 16), wgmma_factor(B_tile + at, 16), k > 0);
            }
            wgmma_commit();
        }
        if (warp < HEADS) {
            if constexpr (!OUTPUT) {
                const float2 last = m.decays[n % DECAYS][warp].sum[p.folded_of(chunk) - 1];
                log_decay += (double)last.x + (double)last.y;
            }
            /* The next chunk's, where the chunk that left this one's place had its own. */
            if (n % 2 == 0) {
                decide(n + 1, odd);
            }
            else {
                decide(n + 1, even);
            }
        }
        if constexpr (OUTPUT) {
            wgmma_wait<0>(s);
            if (n >= SCORES) {
                phase_wait(&m.free[(n - SCORES) % STAGES], (n - SCORES) / STAGES % 2);
            }
#pragma unroll
            for (int i = 0; i < HEADS; i++) {
                place_scores<T>(s, m.decays[n % DECAYS][i], m.scores[n % SCORES][i]);
            }
            wgmma_publish();
        }
        phase_arrive(&m.ready[stage]);
        if (thread == COPIER && n > 0 && chunk + STAGES - 1 < p.end) {
            phase_wait(&m.free[(n - 1) % STAGES], (n - 1) / STAGES % 2);
            ask(n + STAGES - 1);
        }
        __syncwarp();
    }
    if (!OUTPUT && warp < HEADS && thread % MIL_WARP == 0) {
        c.segment_decays[find_segment(c, decay_head, p.segment)] = (float)exp2(log_decay);
    }
}

/* ---- the holders ----------------------------------------------------------------------------------------------------- */

/* Y^T = h Y^T + D x^T. */
template <typename T>
static __device__ __forceinline__ void
scale_output(const chunk_decays &decays, float D, const uint32_t (&x)[4][4], float (&Y)[CHUNK / 2])
{
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
        const float2 h = *(const float2 *)(decays.from_start + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 value = unpack<T>(x[j / 2][j % 2 * 2 + half]);
            Y[4 * j + 2 * half] = fmaf(D, value.x, h.x * Y[4 * j + 2 * half]);
            Y[4 * j + 2 * half + 1] = fmaf(D, value.y, h.y * Y[4 * j + 2 * half + 1]);
        }
    }
}

/* x^T of the warp's 16 columns: four left operands of 16 tokens. */
template <typename T>
static __device__ __forceinline__ void
load_x(const T *panel, uint32_t (&x)[4][4])
{
    const int lane = threadIdx.x % MIL_WARP, unit = threadIdx.x % GROUP_THREADS / MIL_WARP * 2 + lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        load_matrices_transposed(
            (const char *)panel + panel_place<CHUNK>(16 * k + lane % 8 + lane / 16 * 8, unit), x[k]);
    }
}

/* (to_end x)^T, rounded. */
template <typename T>
static __device__ __forceinline__ void
weigh_x(const chunk_decays &decays, const uint32_t (&x)[4][4], uint32_t (&weighed)[4][4])
{
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const float2 weight = *(const float2 *)(decays.to_end + 16 * k + q / 2 * 8 + threadIdx.x % 4 * 2);
            const float2 value = unpack<T>(x[k][q]);
            weighed[k][q] = pack<T>(weight.x * value.x, weight.y * value.y);
        }
    }
}

/* Y^T, rounded, into the warp's columns of x's panel, and from there to y, 16 bytes at a time. `y`: of the call's first
 * row, at the warp's columns; `token`: of the call, the chunk's first. */
template <typename T>
static __device__ __forceinline__ void
store_output(const float (&Y)[CHUNK / 2], void *panel, T *y, int64_t stride, int token, int count)
{
    const int lane = threadIdx.x % MIL_WARP, first = threadIdx.x % GROUP_THREADS / MIL_WARP * 2;
    __syncwarp(); /* the warp alone has read these columns of x, and is done with them */
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++) {
        uint32_t to = shared_address(panel) +
                      panel_place<CHUNK>(16 * t + lane % 8 + lane / 16 * 8, first + lane / 8 % 2);
#if MIL_HAS_WGMMA
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                     "r"(pack<T>(Y[8 * t], Y[8 * t + 1])), "r"(pack<T>(Y[8 * t + 2], Y[8 * t + 3])),
                     "r"(pack<T>(Y[8 * t + 4], Y[8 * t + 5])), "r"(pack<T>(Y[8 * t + 6], Y[8 * t + 7]))
                     : "memory");
#else
        (void)to;
#endif
    }
    __syncwarp();
    y += (token + lane / 2) * stride + lane % 2 * 8;
#pragma unroll
    for (int s = 0; s < CHUNK; s += MIL_WARP / 2) {
        const int row = s + lane / 2;
        if ((unsigned)(token + row) < (unsigned)count) {
            *(uint4 *)y = *(const uint4 *)((const char *)panel + panel_place<CHUNK>(row, first + lane % 2));
        }
        y += MIL_WARP / 2 * stride;
    }
}

/* Each value of H^T and its place in a state [N, head_dim], from the group's first column on. */
template <int N, typename Move>
static __device__ __forceinline__ void
each_of_H(int head_dim, float (&H)[N / 2], Move move)
{
    const int lane = threadIdx.x % MIL_WARP, row = threadIdx.x % GROUP_THREADS / MIL_WARP * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        move((i / 4 * 8 + lane % 4 * 2 + i % 2) * head_dim + row + i % 4 / 2 * 8, H[i]);
    }
}

template <typename T, int N, bool PAIRS, bool OUTPUT>
static __device__ __forceinline__ void
hold(const chunk_arguments &c, const mil_tails &tails, bool given, const hopper_place &p,
     hopper_memory<T, N, PAIRS> &m)
{
    constexpr int STAGES = hopper_memory<T, N, PAIRS>::STAGES, DECAYS = hopper_memory<T, N, PAIRS>::DECAYS;
    const ssd_arguments &a = c.ssd;
    const int group = threadIdx.x / GROUP_THREADS, warp = threadIdx.x % GROUP_THREADS / MIL_WARP;
    const int head = PAIRS ? p.head + group : p.head;
    const int column = PAIRS ? p.slice * 64 : p.slice * 128 + group * 64; /* the group's first in its head */
    const int64_t size = (int64_t)N * a.head_dim;
    float *state = given ? tails.state + head * size + column : NULL;
    float *segment_state = c.segment_states + find_segment(c, head, p.segment) * size + column;
    const float D = a.D[head];
    T *y = (T *)a.y + p.row * a.y_stride + head * a.head_dim + column + warp * 16;
    float H[N / 2];
    {
        const float *from = !OUTPUT ? NULL : c.segments == 1 ? state : segment_state;
        each_of_H<N>(a.head_dim, H, [&](int at, float &h) { h = from == NULL ? 0.0f : from[at]; });
    }
#pragma unroll 1
    for (int n = 0; p.first + n < p.end; n++) {
        const int stage = n % STAGES, chunk = p.first + n;
        const chunk_decays &decays = m.decays[n % DECAYS][PAIRS ? group : 0];
        T *x_panel = m.x[stage][group];
        const uint32_t B = shared_address(m.B[stage]), C = shared_address(m.C[stage]),
                       scores = shared_address(m.scores[n % SCORES][PAIRS ? group : 0]);
        float Y[CHUNK / 2];
        uint32_t left[N / 16][4], x[4][4], weighed[4][4];
        if constexpr (OUTPUT) {
#pragma unroll
            for (int i = 0; i < N / 4; i++) {
                left[i / 4][i % 4] = pack<T>(H[2 * i], H[2 * i + 1]);
            }
        }
        phase_wait(&m.full[stage], n / STAGES % 2); /* long since; but it is what shows the copies */
        phase_wait(&m.ready[stage], n / STAGES % 2);
        const float last = decays.last;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            H[i] *= last;
        }
        if constexpr (OUTPUT) {
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < N / 16; k++) {
                multiply_straight<T>(Y, left[k], wgmma_factor(C + k / 4 * PANEL * 2 + k % 4 * 32, 16), k > 0);
            }
            wgmma_commit();
        }
        load_x(x_panel, x);
        weigh_x<T>(decays, x, weighed);
        wgmma_hold(H);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            wgmma_registers<T>(H, weighed[k], wgmma_factor(B + k * 16 * 128, PANEL * 2));
        }
        wgmma_commit(); /* where nothing of the chunk folds, it is the last and H is not used again */
        if constexpr (OUTPUT) {
            wgmma_wait<1>(Y);
            scale_output<T>(decays, D, x, Y);
            wgmma_hold(Y);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < CHUNK / 16; k++) {
                multiply_straight<T>(Y, x[k], wgmma_factor(scores + k * 32, 16), 1);
            }
            wgmma_commit();
            wgmma_wait<0>(Y);
            store_output<T>(Y, x_panel, y, a.y_stride, chunk * CHUNK - p.before, p.count);
        }
        wgmma_wait<0>(H);
        __syncwarp();
        if (threadIdx.x % MIL_WARP == 0) {
            phase_arrive(&m.free[stage]);
        }
        if (OUTPUT && state != NULL && chunk == (p.folded - 1) / CHUNK && p.folded > 0) {
            each_of_H<N>(a.head_dim, H, [&](int at, float &h) { state[at] = h; });
        }
    }
    if constexpr (!OUTPUT) {
        each_of_H<N>(a.head_dim, H, [&](int at, float &h) { segment_state[at] = h; });
    }
}

/* Grid: (segments, slices of a head), heads or pairs of heads, sequences. */
template <typename T, int N, bool PAIRS, bool OUTPUT>
static __global__ void
__launch_bounds__(THREADS, 1)
    ssd_hopper_kernel(const __grid_constant__ chunk_arguments c, const __grid_constant__ mil_states states,
                      const __grid_constant__ hopper_maps maps)
{
#if MIL_HAS_WGMMA
    extern __shared__ __align__(1024) char shared[];
    auto &m = *reinterpret_cast<hopper_memory<T, N, PAIRS> *>(shared);
    const ssd_arguments &a = c.ssd;
    const mil_tails &tails = states.of[blockIdx.z];
    hopper_place p;
    p.slice = blockIdx.x % a.slices;
    p.segment = blockIdx.x / a.slices;
    p.head = PAIRS ? 2 * blockIdx.y : blockIdx.y;
    if (threadIdx.x < hopper_memory<T, N, PAIRS>::STAGES) {
        phase_init(&m.full[threadIdx.x], 1);
        phase_init(&m.ready[threadIdx.x], GROUP_THREADS);
        phase_init(&m.free[threadIdx.x], HOLDERS * GROUP_THREADS / MIL_WARP);
        wgmma_publish();
    }
    __syncthreads();
    mil_wait();
    const mil_span span = mil_span_of(a.rows, a.first + blockIdx.z);
    const int total = span.before + (int)span.count, chunks = (total + CHUNK - 1) / CHUNK;
    p.before = span.before;
    p.count = (int)span.count;
    p.folded = states.given ? (int)(span.after - span.boundary) : total;
    p.first = p.segment * c.segment_chunks;
    p.end = min(chunks, p.first + c.segment_chunks);
    p.row = span.row;
    if (span.count < a.least || p.first >= chunks || (!OUTPUT && p.end == chunks)) {
        return; /* nothing follows the last segment's own state */
    }
    if (threadIdx.x >= HOLDERS * GROUP_THREADS) {
        group_give_registers<REGISTERS_TO_PREPARE>();
        prepare<T, N, PAIRS, OUTPUT>(c, maps, tails, span, p, m);
        group_take_registers<REGISTERS>();
    }
    else {
        group_take_registers<REGISTERS_TO_HOLD>();
        hold<T, N, PAIRS, OUTPUT>(c, tails, states.given, p, m);
        group_give_registers<REGISTERS>();
    }
    mil_trigger();
    if (OUTPUT && states.given && p.segment == 0) {
#pragma unroll 1
        for (int i = 0; i < (PAIRS ? 2 : 1); i++) {
            window_place w = {};
            w.head = p.head + i;
            w.columns = PAIRS ? 64 : 128;
            w.column = p.slice * w.columns;
            w.x_column = (int64_t)(w.head / (a.heads / a.x_heads)) * a.head_dim + w.column;
            w.B_column = (int64_t)(w.head / (a.heads / a.B_groups)) * N;
            move_tails<T>(a, w, span, tails, come_for_tails(a, w, tails, a.slices), a.dt_bias[w.head]);
        }
    }
#else
    __trap(); /* the launcher asks for the architecture; setup.py and make build it as sm_90a */
#endif
}

/* ---- launches ------------------------------------------------------------------------------------------------------- */

template <typename T, int N, bool PAIRS>
static mil_status
launch(mil_context *context, const chunk_arguments *c, const mil_states *states, int64_t sequences,
       bool outputs)
{
    const ssd_arguments &a = c->ssd;
    hopper_maps maps;
    MIL_TRY(mil_map_panels(context, a.x, a.rows_count, (int64_t)a.x_heads * a.head_dim, a.x_stride, CHUNK,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &maps.x));
    MIL_TRY(mil_map_panels(context, a.B, a.rows_count, (int64_t)a.B_groups * N, a.B_stride, CHUNK,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &maps.B));
    MIL_TRY(mil_map_panels(context, a.C, a.rows_count, (int64_t)a.C_groups * N, a.C_stride, CHUNK,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &maps.C));
    const dim3 grid((unsigned)(c->segments * c->ssd.slices), (unsigned)(c->ssd.heads / (PAIRS ? 2 : 1)),
                    (unsigned)sequences);
    return mil_launch(context, "ssd",
                      outputs ? ssd_hopper_kernel<T, N, PAIRS, true> : ssd_hopper_kernel<T, N, PAIRS, false>,
                      grid, dim3(THREADS), sizeof(hopper_memory<T, N, PAIRS>), *c, *states, maps);
}

bool
mil_ssd_hopper_takes(const mil_context *context, const ssd_arguments *a, chunk_blocks *out)
{
    const bool pairs = a->head_dim % 128 != 0, /* of which both must read the same B and C */
        shares = a->heads / a->B_groups % 2 == 0 && a->heads / a->C_groups % 2 == 0;
    int major = 0, multiprocessors = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, context->ops->device) !=
            cudaSuccess ||
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, context->ops->device) !=
            cudaSuccess ||
        major != 9 || a->head_dim % 64 != 0 || (a->state_dim != 64 && a->state_dim != 128) ||
        (pairs && !shares) || a->rows_count > INT32_MAX / 2 || mil_find_panel_encoder() == NULL) {
        return false;
    }
    *out = {pairs, a->head_dim / (pairs ? 64 : 128), multiprocessors};
    return true;
}

mil_status
mil_ssd_hopper(mil_context *context, const chunk_arguments *c, const mil_states *states, int64_t sequences,
               bool outputs)
{
    const bool pairs = c->ssd.head_dim % 128 != 0, half = context->ops->activation_dtype == MIL_F16;
    typedef mil_status (*launcher)(mil_context *, const chunk_arguments *, const mil_states *, int64_t, bool);
    static const launcher launchers[2][2][2] = {
        {{launch<__nv_bfloat16, 64, false>, launch<__nv_bfloat16, 64, true>},
         {launch<__nv_bfloat16, 128, false>, launch<__nv_bfloat16, 128, true>}},
        {{launch<__half, 64, false>, launch<__half, 64, true>},
         {launch<__half, 128, false>, launch<__half, 128, true>}},
    };
    return launchers[half][c->ssd.state_dim == 128][pairs](context, c, states, sequences, outputs);
}
