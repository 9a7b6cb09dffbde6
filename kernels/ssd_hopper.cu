/* Mamba-2's prompts on Hopper: the chunks of ssd.cu over wgmma.
 *
 * A block has two groups of four warps, each with 64 columns of a head and H^T [64, N] in its accumulators: two halves of
 * 128 columns of one head, or two heads of 64 that read the same B and C.  What the groups share comes once; right
 * operands are read from shared memory once for 64 rows instead of 16 or 32.  Of every chunk of 64 tokens:
 *
 *   scores   C B^T [64, 64] from shared memory; groups of one head do 32 columns each.  Weighted, rounded, and into
 *            shared memory
 *   output   Y^T = h (H^T C^T) + D x^T + x^T S^T, left operands from registers: H^T as it is, rounded, x^T by ldmatrix
 *   fold     H^T = h_last H^T + (to_end x)^T B, in the background while Y^T goes out through x's place
 *
 * A block has a multiprocessor of its own, for two would leave 128 registers a thread, where H^T and Y^T alone are 96.
 * Inputs come by cp.async two chunks ahead.
 */
#include "ssd_chunks.cuh"
#include "wgmma.cuh"

#define GROUPS 2
#define GROUP_THREADS 128
#define THREADS (GROUPS * GROUP_THREADS)
#define PANEL (CHUNK * 64) /* elements of a panel: 64 tokens by 64 columns */
#define STAGES 3           /* chunks in shared memory */

/* ---- an instruction that wgmma.cuh does not have ----------------------------------------------------------------- */

#define STRAIGHT_32(TYPE)                                                                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" WGMMA_TEXT_32 \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"                                    \
                 : WGMMA_32(c)                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                           \
                 : "memory")

/* c [64, CHUNK] += a [64, 16] b [CHUNK, 16]^T, a in registers. */
template <typename T>
static __device__ __forceinline__ void
multiply_straight(float (&c)[CHUNK / 2], const uint32_t (&a)[4], uint64_t b)
{
#if MIL_HAS_WGMMA
    if constexpr (wgmma_is_half<T>) {
        STRAIGHT_32("f16");
    }
    else {
        STRAIGHT_32("bf16");
    }
#else
    (void)c, (void)a, (void)b;
#endif
}

/* ---- shared memory ------------------------------------------------------------------------------------------------ */

/* Tiles are panels as wgmma reads them. Panel g of x is group g's. */
template <typename T, int N, bool PAIRS>
struct hopper_memory {
    alignas(1024) T x[STAGES][GROUPS][PANEL];
    alignas(1024) T B[STAGES][CHUNK * N];
    alignas(1024) T C[STAGES][CHUNK * N];
    alignas(1024) T scores[PAIRS ? GROUPS : 1][PANEL];
    chunk_decays decays[2][GROUPS];
    float exponent[GROUPS], bias[GROUPS], D[GROUPS];
};

/* A thread's part of a tile of UNITS units a token: the same unit of 16 bytes of every few tokens. `from`: that unit of the
 * call's first row; token: of the call, the chunk's first. */
template <typename T, int UNITS>
static __device__ __forceinline__ void
ask_for_units(T *tile, const T *from, int64_t stride, int token, int count)
{
    constexpr int STEP = THREADS / UNITS;
    static_assert(STEP % 8 == 0, "a thread's units lie at the same place of every eight rows");
    const int row = threadIdx.x / UNITS;
    const T *at = from + (token + row) * stride;
    char *to = (char *)tile + panel_place<CHUNK>(row, threadIdx.x % UNITS);
#pragma unroll
    for (int s = 0; s < CHUNK; s += STEP) {
        const bool there = (unsigned)(token + row + s) < (unsigned)count;
        copy_unit(to + s * 128, there ? at : from, there);
        at += STEP * stride;
    }
}

/* What earlier calls left of the first chunk: its first `before` tokens. */
template <typename T, int UNITS>
static __device__ __forceinline__ void
take_tail(T *tile, const float *tail, int64_t stride, int before)
{
    for (int row = threadIdx.x / UNITS; row < before; row += THREADS / UNITS) {
        T *to = (T *)((char *)tile + panel_place<CHUNK>(row, threadIdx.x % UNITS));
        float value[4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            mil_load<4>(tail + row * stride + 4 * half, value);
            mil_store<4>(to + 4 * half, value);
        }
    }
}

/* ---- a chunk -------------------------------------------------------------------------------------------------------- */

/* Weighted and rounded scores of 2 * COUNT columns from `column` on into the tile. */
template <typename T, int COUNT>
static __device__ __forceinline__ void
place_scores(const float (&s)[COUNT], int column, const chunk_decays &decays, T *tile)
{
    const int lane = threadIdx.x % MIL_WARP, row = threadIdx.x % GROUP_THREADS / MIL_WARP * 16 + lane / 4;
    const float2 top = decays.sum[row], bottom = decays.sum[row + 8];
#pragma unroll
    for (int j = 0; j < COUNT / 4; j++) {
        const int at = column + 8 * j + lane % 4 * 2;
        const float4 others = *(const float4 *)(decays.sum + at);
        const float2 dt = *(const float2 *)(decays.dt + at);
        float value[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float2 own = e < 2 ? top : bottom;
            const float high = e % 2 == 0 ? others.x : others.z, low = e % 2 == 0 ? others.y : others.w;
            const float weight = fast_power((own.x - high) + (own.y - low)) * (e % 2 == 0 ? dt.x : dt.y);
            value[e] = at + e % 2 <= row + e / 2 * 8 ? weight * s[4 * j + e] : 0.0f;
        }
        *(uint32_t *)((char *)tile + panel_place<CHUNK>(row, at / 8) + lane % 4 * 4) =
            pack<T>(value[0], value[1]);
        *(uint32_t *)((char *)tile + panel_place<CHUNK>(row + 8, at / 8) + lane % 4 * 4) =
            pack<T>(value[2], value[3]);
    }
}

/* Y^T = H^T C^T. */
template <typename T, int N>
static __device__ __forceinline__ void
multiply_state(const float (&H)[N / 2], uint32_t C, float (&Y)[CHUNK / 2])
{
    uint32_t left[N / 16][4];
#pragma unroll
    for (int i = 0; i < CHUNK / 2; i++) {
        Y[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        left[i / 4][i % 4] = pack<T>(H[2 * i], H[2 * i + 1]);
    }
    wgmma_hold(Y);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        multiply_straight<T>(Y, left[k], wgmma_factor(C + k / 4 * PANEL * 2 + k % 4 * 32, 16));
    }
    wgmma_commit();
    wgmma_wait<0>(Y);
}

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

/* x^T for the fold. */
template <typename T>
static __device__ __forceinline__ void
weigh_x(const chunk_decays &decays, uint32_t (&x)[4][4])
{
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const float2 weight = *(const float2 *)(decays.to_end + 16 * k + q / 2 * 8 + threadIdx.x % 4 * 2);
            const float2 value = unpack<T>(x[k][q]);
            x[k][q] = pack<T>(weight.x * value.x, weight.y * value.y);
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

/* Grid: (segments, slices of a head), heads or pairs of heads, sequences. */
template <typename T, int N, bool PAIRS, bool OUTPUT>
static __global__ void
__launch_bounds__(THREADS, 1)
    ssd_hopper_kernel(const __grid_constant__ chunk_arguments c, const __grid_constant__ mil_states states)
{
#if MIL_HAS_WGMMA
    extern __shared__ __align__(1024) char shared[];
    auto &m = *reinterpret_cast<hopper_memory<T, N, PAIRS> *>(shared);
    const ssd_arguments &a = c.ssd;
    const mil_tails &tails = states.of[blockIdx.z];
    const bool given = states.given;
    const int slice = blockIdx.x % a.slices, segment = blockIdx.x / a.slices;
    const int group = threadIdx.x / GROUP_THREADS, warp = threadIdx.x % GROUP_THREADS / MIL_WARP;
    const int head = PAIRS ? 2 * blockIdx.y + group : blockIdx.y;
    const int column = PAIRS ? slice * 64 : slice * 128 + group * 64; /* the group's first in its head */
    if (threadIdx.x % GROUP_THREADS == 0) {                           /* registers are scarce */
        m.exponent[group] = get_exponent(a, head);
        m.bias[group] = a.dt_bias[head];
        m.D[group] = a.D[head];
    }
    mil_wait();
    const mil_span span = mil_span_of(a.rows, a.first + blockIdx.z);
    const int before = span.before, count = (int)span.count, total = before + count;
    const int folded = given ? (int)(span.after - span.boundary) : total; /* tokens to be in the state */
    const int chunks = (total + CHUNK - 1) / CHUNK;
    const int first = segment * c.segment_chunks, end = min(chunks, first + c.segment_chunks);
    if (count < a.least || first >= chunks || (!OUTPUT && end == chunks)) {
        return; /* nothing follows the last segment's own state */
    }
    const int64_t size = (int64_t)N * a.head_dim;
    const int64_t index = ((int64_t)blockIdx.z * a.heads + head) * c.segments + segment;
    float *state = given ? tails.state + head * size + column : NULL;

    constexpr int UNITS = N / 8; /* of a token's B or C */
    const int x_unit = threadIdx.x % (GROUPS * 8), x_head_of = a.heads / a.x_heads;
    const int x_column =
        PAIRS ? (2 * (int)blockIdx.y + x_unit / 8) / x_head_of * a.head_dim + slice * 64 + x_unit % 8 * 8
              : head / x_head_of * a.head_dim + slice * 128 + x_unit * 8;
    const int B_first = head / (a.heads / a.B_groups) * N, C_first = head / (a.heads / a.C_groups) * N,
              unit = threadIdx.x % UNITS * 8;
    auto ask = [&](int chunk) {
        const int stage = chunk % STAGES, token = chunk * CHUNK - before;
        if (chunk < end) {
            ask_for_units<T, GROUPS * 8>(m.x[stage][0], (const T *)a.x + span.row * a.x_stride + x_column,
                                         a.x_stride, token, count);
            ask_for_units<T, UNITS>(m.B[stage], (const T *)a.B + span.row * a.B_stride + B_first + unit,
                                    a.B_stride, token, count);
            if (OUTPUT) {
                ask_for_units<T, UNITS>(m.C[stage], (const T *)a.C + span.row * a.C_stride + C_first + unit,
                                        a.C_stride, token, count);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    auto folded_of = [&](int chunk) { return max(0, min(CHUNK, folded - chunk * CHUNK)); };

    float dt[2];
    double log_decay = 0.0; /* of the segment; in each group's first warp */
    ask(first);
    if (given && first == 0 && before > 0) {
        asm volatile("cp.async.wait_all;" ::: "memory"); /* their zeros */
        take_tail<T, GROUPS * 8>(m.x[0][0], tails.x + x_column, (int64_t)a.x_heads * a.head_dim, before);
        take_tail<T, UNITS>(m.B[0], tails.B + B_first + unit, (int64_t)a.B_groups * N, before);
    }
    ask(first + 1);
    if (warp == 0) {
        __syncwarp();
        ask_for_dt<T>(a, span, tails.dt, head, first * CHUNK, total, dt);
        fill_decays(a, span, first * CHUNK, total, folded_of(first), m.exponent[group], m.bias[group], dt,
                    m.decays[first % 2][group]);
        ask_for_dt<T>(a, span, tails.dt, head, (first + 1) * CHUNK, total, dt);
    }
    float H[N / 2];
    {
        const float *from = !OUTPUT           ? NULL
                            : c.segments == 1 ? state
                                              : c.segment_states + index * size + column;
        each_of_H<N>(a.head_dim, H, [&](int at, float &h) { h = from == NULL ? 0.0f : from[at]; });
    }
#pragma unroll 1
    for (int chunk = first; chunk < end; chunk++) {
        const int stage = chunk % STAGES, turn = chunk % 2;
        const chunk_decays &decays = m.decays[turn][group];
        const bool folds = folded_of(chunk) > 0;
        T *x_panel = m.x[stage][group];
        T *scores = m.scores[PAIRS ? group : 0];
        const uint32_t B = shared_address(m.B[stage]), C = shared_address(m.C[stage]);
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        wgmma_publish();
        __syncthreads(); /* this chunk is here, and the one before is done with */
        ask(chunk + 2);
        constexpr int SCORES = PAIRS ? 32 : 16;
        float s[SCORES];
        const int score_column = PAIRS ? 0 : group * 32;
        if constexpr (OUTPUT) {
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < N / 16; k++) {
                const uint32_t at = k / 4 * PANEL * 2 + k % 4 * 32;
                wgmma_shared<T>(s, wgmma_factor(C + at, 16), wgmma_factor(B + at + score_column * 128, 16),
                                k > 0);
            }
            wgmma_commit();
        }
        if (warp == 0) { /* the next chunk's decays; its dt were asked for a chunk ago */
            if constexpr (!OUTPUT) {
                int at = folded_of(chunk) - 1;
                log_decay += (double)decays.sum[at].x + (double)decays.sum[at].y;
            }
            fill_decays(a, span, (chunk + 1) * CHUNK, total, folded_of(chunk + 1), m.exponent[group],
                        m.bias[group], dt, m.decays[turn ^ 1][group]);
            ask_for_dt<T>(a, span, tails.dt, head, (chunk + 2) * CHUNK, total, dt);
        }
        float Y[CHUNK / 2];
        uint32_t x[4][4];
        if constexpr (OUTPUT) {
            wgmma_wait<0>(s);
            place_scores<T>(s, score_column, decays, scores);
            wgmma_publish();
            if (PAIRS) {
                barrier_meet(1 + group, GROUP_THREADS);
            }
            else {
                __syncthreads();
            }
            multiply_state<T, N>(H, C, Y);
        }
        load_x(x_panel, x);
        if constexpr (OUTPUT) {
            scale_output<T>(decays, m.D[group], x, Y);
            wgmma_hold(Y);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < CHUNK / 16; k++) {
                multiply_straight<T>(Y, x[k], wgmma_factor(shared_address(scores) + k * 32, 16));
            }
            wgmma_commit();
            wgmma_wait<0>(Y);
        }
        if (folds) {
            weigh_x<T>(decays, x);
            const float last = decays.last;
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                H[i] *= last;
            }
            wgmma_hold(H);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < CHUNK / 16; k++) {
                wgmma_registers<T>(H, x[k], wgmma_factor(B + k * 16 * 128, PANEL * 2));
            }
            wgmma_commit();
        }
        if constexpr (OUTPUT) {
            store_output<T>(Y, x_panel,
                            (T *)a.y + span.row * a.y_stride + head * a.head_dim + column + warp * 16,
                            a.y_stride, chunk * CHUNK - before, count);
        }
        wgmma_wait<0>(H);
        if (OUTPUT && state != NULL && folds && chunk * CHUNK + CHUNK >= folded) {
            each_of_H<N>(a.head_dim, H, [&](int at, float &h) { state[at] = h; });
        }
    }
    mil_trigger();
    if constexpr (!OUTPUT) {
        float *to = c.segment_states + index * size + column;
        each_of_H<N>(a.head_dim, H, [&](int at, float &h) { to[at] = h; });
        if (threadIdx.x % GROUP_THREADS == 0) { /* of one head: the same from both groups */
            c.segment_decays[index] = (float)exp2(log_decay);
        }
    }
    else if (state != NULL && segment == 0) {
#pragma unroll 1
        for (int i = 0; i < (PAIRS ? 2 : 1); i++) {
            window_place p = {};
            p.head = PAIRS ? 2 * blockIdx.y + i : blockIdx.y;
            p.columns = PAIRS ? 64 : 128;
            p.column = slice * p.columns;
            p.x_column = (int64_t)(p.head / x_head_of) * a.head_dim + p.column;
            p.B_column = B_first;
            move_tails<T>(a, p, span, tails, come_for_tails(a, p, tails, a.slices), m.bias[PAIRS ? i : 0]);
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
    const dim3 grid((unsigned)(c->segments * c->ssd.slices), (unsigned)(c->ssd.heads / (PAIRS ? 2 : 1)),
                    (unsigned)sequences);
    return mil_launch(context, "ssd",
                      outputs ? ssd_hopper_kernel<T, N, PAIRS, true> : ssd_hopper_kernel<T, N, PAIRS, false>,
                      grid, dim3(THREADS), sizeof(hopper_memory<T, N, PAIRS>), *c, *states);
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
        (pairs && !shares)) {
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
