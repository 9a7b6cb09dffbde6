/* Mamba-2's convolution and selective scan of a few rows in one launch (device.h: mil_ssd_mixer).
 *
 * A block has a slice of a head, as in ssd_step.cu (ssd_window.cuh), and convolves for itself what it reads: its columns of
 * x, and B and C of the head's groups, 288 channels for a state of 128.  Several blocks do the same B and C over again,
 * which costs each some 50 cycles; a launch of its own costs a boundary and a trip to the second-level cache.
 *
 *   before the kernel before has ended   taps, the inputs before this call's (into shared memory), H, the tails
 *   then                                 one trip to this call's rows and dt; outputs, rounded as the convolution's are, into
 *                                        shared memory, where the windows find them as they would in memory
 *
 * So results are the bits of the two operators.  The inputs' tail grows and moves as x, B and C are shared: by the first
 * block that has a column, or, where a window is folded, by the last to have read it.
 */
#include "conv1d.cuh"
#include "ssd_window.cuh"

#define MOST_TAPS 4
#define FRESH MIL_WINDOW /* rows of the call */
#define MOST_BLOCKS 512  /* more are better off with several slices each */

struct ssd_mixer_arguments {
    ssd_arguments ssd; /* x, B and C are not read */
    const void *raw;   /* [rows, inputs] before the convolution */
    int64_t raw_stride;
    int inputs, taps;
    int x_at, B_at, C_at; /* columns of the convolution */
    const float *weight, *bias;
};

/* What a block convolves: `columns` of x, then B, then C, for `rows` of the call. */
template <typename T, int COLUMNS, int J>
struct mixer_memory {
    static constexpr int WIDTH = COLUMNS + 2 * LANES_N * J;
    window_memory<COLUMNS, LANES_N * J> window;
    float lead[MOST_TAPS - 1][WIDTH]; /* inputs before the call's */
    T fresh[FRESH][WIDTH];            /* the convolution's outputs */
    T dt[FRESH];
};

/* The column of the convolution that is the block's `e`-th, or -1. */
template <int COLUMNS>
static __device__ __forceinline__ int
channel_of(const ssd_mixer_arguments &m, const window_place &p, int e)
{
    const int N = m.ssd.state_dim;
    return e < COLUMNS           ? (e < p.columns ? m.x_at + (int)p.x_column + e : -1)
           : e < COLUMNS + N     ? m.B_at + (int)p.B_column + e - COLUMNS
           : e < COLUMNS + 2 * N ? m.C_at + (int)p.C_column + e - COLUMNS - N
                                 : -1;
}

/* One channel of the call's rows. */
template <typename T>
static __device__ __forceinline__ void
convolve_channel(const ssd_mixer_arguments &m, const mil_span &span, int channel, const float *lead,
                 const float (&weight)[MOST_TAPS], float bias, int width, T *fresh)
{
    constexpr int AHEAD = 4;
    const int missing = MOST_TAPS - m.taps, count = (int)span.count;
    const T *rows = (const T *)m.raw + span.row * m.raw_stride + channel;
    float x[MOST_TAPS - 1 + AHEAD];
#pragma unroll
    for (int j = 0; j < MOST_TAPS - 1; j++) {
        x[j] = lead[j * width];
    }
#pragma unroll 1
    for (int row = 0; row < count; row += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            x[MOST_TAPS - 1 + i] = row + i < count ? mil_float(rows[(row + i) * m.raw_stride]) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (row + i < count) {
                float window[MOST_TAPS];
#pragma unroll
                for (int j = 0; j < MOST_TAPS; j++) {
                    window[j] = x[i + j];
                }
                fresh[(row + i) * width] =
                    mil_round<T>(mil_convolve<T, MOST_TAPS>(weight, window, bias, missing, true));
            }
        }
#pragma unroll
        for (int j = 0; j < MOST_TAPS - 1; j++) {
            x[j] = x[j + AHEAD];
        }
    }
}

/* ---- the inputs' tail ---------------------------------------------------------------------------------------------- */

/* This call's rows to the inputs' tail, in `columns` columns from `channel` on, by a whole block. */
template <typename T>
static __device__ __forceinline__ void
append_inputs(const ssd_mixer_arguments &m, const mil_span &span, const mil_tails &tails, int channel,
              int columns)
{
    const int first = (int)(span.past - span.after) + m.taps - 1; /* row of the call's first */
#pragma unroll 1
    for (int e = threadIdx.x; e < (int)span.count * columns; e += THREADS) {
        const int row = e / columns, column = channel + e % columns;
        tails.conv[(int64_t)(first + row) * m.inputs + column] =
            mil_float(((const T *)m.raw)[(span.row + row) * m.raw_stride + column]);
    }
}

/* Does something to the columns of x, B and C for which `bits` has its bit. */
template <typename Do>
static __device__ __forceinline__ void
each_of_inputs(const ssd_mixer_arguments &m, const window_place &p, unsigned bits, Do run)
{
    if (bits & 1) {
        run(m.x_at + (int)p.x_column, p.columns);
    }
    if (bits & 2) {
        run(m.B_at + (int)p.B_column, m.ssd.state_dim);
    }
    if (bits & 8) {
        run(m.C_at + (int)p.C_column, m.ssd.state_dim);
    }
}

/* Which columns this block is the last to have read: bits for x, B, dt and C. */
static __device__ __forceinline__ unsigned
come_for_all_tails(const ssd_mixer_arguments &m, const window_place &p, const mil_tails &tails)
{
    const ssd_arguments &a = m.ssd;
    const int64_t x_width = (int64_t)a.x_heads * a.head_dim, B_width = (int64_t)a.B_groups * a.state_dim;
    const unsigned slices = gridDim.x;
    return mil_last_of(
        {{mil_slot(tails.x, x_width, p.x_column), mil_slot(tails.B, B_width, p.B_column),
          mil_slot(tails.dt, a.heads, p.head),
          mil_slot(tails.conv, m.inputs, m.C_at + p.C_column) + (int64_t)(m.taps - 1) * m.inputs},
         {(unsigned)(a.heads / a.x_heads), (unsigned)(a.heads / a.B_groups) * slices, slices,
          (unsigned)(a.heads / a.C_groups) * slices}});
}

/* ---- the kernel ------------------------------------------------------------------------------------------------------ */

/* Grid: slices of a head, heads, sequences. */
template <typename T, int J>
static __global__ void
__launch_bounds__(THREADS, J <= 4 ? 2 : 1)
    ssd_mixer_kernel(const __grid_constant__ ssd_mixer_arguments m, const __grid_constant__ mil_states states)
{
    constexpr int V = 4, COLUMNS = V * QUADS, WIDTH = mixer_memory<T, COLUMNS, J>::WIDTH;
    constexpr int SHARE = (WIDTH + THREADS - 1) / THREADS; /* channels of a thread */
    extern __shared__ __align__(128) char shared[];
    auto &memory = *reinterpret_cast<mixer_memory<T, COLUMNS, J> *>(shared);
    mil_trigger();
    ssd_arguments a = m.ssd;
    const int of_x = a.heads / a.x_heads, of_B = a.heads / a.B_groups, of_C = a.heads / a.C_groups;
    const mil_tails tails = states.of[blockIdx.z];
    window_place p;
    p.head = blockIdx.y;
    p.column = blockIdx.x * COLUMNS;
    p.columns = min(COLUMNS, a.head_dim - p.column);
    p.x_column = (int64_t)(p.head / of_x) * a.head_dim + p.column;
    p.B_column = (int64_t)(p.head / of_B) * a.state_dim;
    p.C_column = (int64_t)(p.head / of_C) * a.state_dim;
    p.is_first_of_group = p.head % of_B == 0 && blockIdx.x == 0;
    float *state = tails.state + (int64_t)p.head * a.state_dim * a.head_dim;
    const int missing = MOST_TAPS - m.taps;
    float weight[SHARE][MOST_TAPS], conv_bias[SHARE];
#pragma unroll
    for (int k = 0; k < SHARE; k++) {
        const int channel = channel_of<COLUMNS>(m, p, threadIdx.x + k * THREADS);
#pragma unroll
        for (int j = 0; j < MOST_TAPS; j++) {
            weight[k][j] = channel >= 0 && j >= missing ? m.weight[channel * m.taps + j - missing] : 0.0f;
        }
        conv_bias[k] = channel >= 0 && m.bias != NULL ? m.bias[channel] : 0.0f;
    }
    const float exponent = get_exponent(a, p.head), bias = a.dt_bias[p.head], D = a.D[p.head];

    mil_wait_for_states(a.rows);
    const mil_span span = mil_span_of(a.rows, blockIdx.z);
    float H[J][V];
    load_H<V, J>(a, p, state, H);
#pragma unroll
    for (int k = 0; k < SHARE; k++) {
        const int e = threadIdx.x + k * THREADS, channel = channel_of<COLUMNS>(m, p, e);
        float lead[MOST_TAPS - 1][1] = {};
        if (channel < 0) {
            continue;
        }
#pragma unroll
        for (int j = 0; j < MOST_TAPS - 1; j++) {
            if (j >= missing) {
                mil_load_settled<1>(tails.conv + (int64_t)(span.before + j - missing) * m.inputs + channel,
                                    lead[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < MOST_TAPS - 1; j++) {
            memory.lead[j][e] = lead[j][0];
        }
    }
    const bool appends = span.after == span.boundary; /* no rows of the tails move */
    const window_owner owner = {appends && p.head % of_x == 0, appends && p.is_first_of_group,
                                appends && blockIdx.x == 0};
    const bool owns_C = appends && p.head % of_C == 0 && blockIdx.x == 0;
    const T *dt = (const T *)a.dt + span.row * a.dt_stride + p.head;
    const int64_t dt_stride = a.dt_stride;
    /* The windows find this call's rows as if they lay in memory. */
    a.x = &memory.fresh[0][0] - span.row * WIDTH - p.x_column;
    a.B = &memory.fresh[0][COLUMNS] - span.row * WIDTH - p.B_column;
    a.C = &memory.fresh[0][COLUMNS + a.state_dim] - span.row * WIDTH - p.C_column;
    a.dt = memory.dt - span.row - p.head;
    a.x_stride = a.B_stride = a.C_stride = WIDTH;
    a.dt_stride = 1;
    unsigned last = 0;
    run_slice<T, V, J>(
        a, p, span, tails, owner, true, state, exponent, bias, D, H, memory.window,
        [&]() {
            if (!appends) {
                const int shift = (int)(span.after - span.boundary), kept = span.before - shift + m.taps - 1;
                last = come_for_all_tails(m, p, tails);
                each_of_inputs(m, p, last, [&](int channel, int columns) {
                    mil_tail_shift<THREADS>(tails.conv + channel, m.inputs, columns, shift, kept);
                });
            }
        },
        [&]() {
            mil_wait();
            if (threadIdx.x < (unsigned)span.count) {
                memory.dt[threadIdx.x] = dt[threadIdx.x * dt_stride];
            }
#pragma unroll
            for (int k = 0; k < SHARE; k++) {
                const int e = threadIdx.x + k * THREADS, channel = channel_of<COLUMNS>(m, p, e);
                if (channel >= 0) {
                    convolve_channel<T>(m, span, channel, &memory.lead[0][e], weight[k], conv_bias[k], WIDTH,
                                        &memory.fresh[0][e]);
                }
            }
            __syncthreads();
        });
    if (!appends) {
        move_tails<T>(a, p, span, tails, last, bias);
    }
    else {
        last = (owner.x ? 1 : 0) | (owner.B ? 2 : 0) | (owns_C ? 8 : 0);
    }
    mil_wait();
    each_of_inputs(m, p, last,
                   [&](int channel, int columns) { append_inputs<T>(m, span, tails, channel, columns); });
}

/* ---- launches -------------------------------------------------------------------------------------------------------- */

template <typename T, int J>
static mil_status
launch(mil_context *context, const ssd_mixer_arguments &m, const mil_states &states)
{
    dim3 grid((unsigned)m.ssd.slices, (unsigned)m.ssd.heads, (unsigned)m.ssd.rows.sequences);
    return mil_launch(context, "ssd mixer", ssd_mixer_kernel<T, J>, grid, dim3(THREADS),
                      sizeof(mixer_memory<T, 4 * QUADS, J>), m, states);
}

/* Whether the kernel above can take it. */
static bool
takes(const mil_context *context, const mil_ssd_mixer *m)
{
    const mil_ssd *s = &m->ssd;
    const mil_conv1d *c = &m->conv;
    return context->ops->activation_dtype != MIL_F32 && s->rows.rows <= FRESH && s->states != NULL &&
           s->states == c->states && c->repeat == 1 && c->silu && c->width >= 2 && c->width <= MOST_TAPS &&
           c->channels < 1 << 24 && s->heads >= 1 && s->heads <= 65535 && s->head_dim % 4 == 0 &&
           s->state_dim % 4 == 0 && s->state_dim <= 8 * LANES_N && s->x_heads >= 1 && s->B_groups >= 1 &&
           s->C_groups >= 1 && s->heads % s->x_heads == 0 && s->heads % s->B_groups == 0 &&
           s->heads % s->C_groups == 0 &&
           s->rows.sequences * s->heads * mil_ceil_div(s->head_dim, 4 * QUADS) <= MOST_BLOCKS;
}

template <typename T>
static mil_status
mixer(mil_context *context, const mil_ssd_mixer *arguments)
{
    const mil_ssd *s = &arguments->ssd;
    const mil_conv1d *c = &arguments->conv;
    const int64_t x_at = (const T *)s->x - (const T *)c->y, B_at = (const T *)s->B - (const T *)c->y,
                  C_at = (const T *)s->C - (const T *)c->y;
    if (x_at < 0 || x_at + s->x_heads * s->head_dim > c->channels || B_at < 0 ||
        B_at + s->B_groups * s->state_dim > c->channels || C_at < 0 ||
        C_at + s->C_groups * s->state_dim > c->channels || !mil_is_aligned<T>(s->x, s->x_stride) ||
        !mil_is_aligned<T>(s->B, s->B_stride) || !mil_is_aligned<T>(s->C, s->C_stride)) {
        return mil_ssd_mixer_apart(context,
                                   arguments); /* where nothing is aligned its sums have another order */
    }
    ssd_mixer_arguments m = {};
    m.ssd = ssd_arguments_of(s);
    m.ssd.slices = (int)mil_ceil_div(s->head_dim, 4 * QUADS);
    m.raw = c->x;
    m.raw_stride = c->x_stride;
    m.inputs = (int)c->channels;
    m.taps = (int)c->width;
    m.x_at = (int)x_at;
    m.B_at = (int)B_at;
    m.C_at = (int)C_at;
    m.weight = c->weight;
    m.bias = c->bias;
    const mil_states states = mil_states_of(s->states, 0, s->rows.sequences);
    return s->state_dim <= 4 * LANES_N ? launch<T, 4>(context, m, states) : launch<T, 8>(context, m, states);
}

mil_status
mil_cuda_ssd_mixer(mil_context *context, const mil_ssd_mixer *arguments)
{
    if (!takes(context, arguments)) {
        return mil_ssd_mixer_apart(context, arguments);
    }
    return context->ops->activation_dtype == MIL_BF16 ? mixer<__nv_bfloat16>(context, arguments)
                                                      : mixer<__half>(context, arguments);
}
