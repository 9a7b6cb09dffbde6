/* Mamba-2's selective scan of a few rows a sequence, by itself (device.h: mil_ssd; ssd_window.cuh says how).
 *
 * Where there are many sequences a block does several slices of its head one after another.
 */
#include "ssd_window.cuh"

/* Grid: groups of slices of a head, heads, sequences. */
template <typename T, int V, int J>
static __global__ void
__launch_bounds__(THREADS, J <= 4 ? 2 : 1)
    ssd_windows_kernel(const __grid_constant__ ssd_arguments a, const __grid_constant__ mil_states states)
{
    extern __shared__ __align__(128) char shared[];
    auto &m = *reinterpret_cast<window_memory<V * QUADS, LANES_N * J> *>(shared);
    mil_trigger();
    const int of_x = a.heads / a.x_heads, of_B = a.heads / a.B_groups;
    const mil_tails tails = states.of[blockIdx.z];
    const int slice = blockIdx.x * a.slices_a_block, slices = min(a.slices_a_block, a.slices - slice);
    window_place p;
    p.head = blockIdx.y;
    p.column = slice * V * QUADS;
    p.x_column = (int64_t)(p.head / of_x) * a.head_dim + p.column;
    p.B_column = (int64_t)(p.head / of_B) * a.state_dim;
    p.C_column = (int64_t)(p.head / (a.heads / a.C_groups)) * a.state_dim;
    p.is_first_of_group = p.head % of_B == 0 && blockIdx.x == 0;
    float *state = states.given ? tails.state + (int64_t)p.head * a.state_dim * a.head_dim : NULL;
    const float exponent = get_exponent(a, p.head), bias = a.dt_bias[p.head], D = a.D[p.head];
    mil_wait_for_states(a.rows);
    const mil_span span = mil_span_of(a.rows, a.first + blockIdx.z);
    if (span.count < a.least || span.count > a.most) {
        mil_wait();
        return;
    }
    const bool appends = state != NULL && span.after == span.boundary; /* no rows of the tails move */
    window_owner owner = {appends && p.head % of_x == 0, appends && p.is_first_of_group,
                          appends && blockIdx.x == 0};
    unsigned last = 0; /* the tails that this block is to move, as the last to have read them */
    if (state != NULL && slices > 1) {
        prefetch_slices(a, p, V * QUADS, min(slices * V * QUADS, a.head_dim - p.column), state);
    }
    const int first_column = p.column;
#pragma unroll 1
    for (int k = 0; k < slices; k++) {
        p.columns = min(V * QUADS, a.head_dim - p.column);
        float H[J][V];
        load_H<V, J>(a, p, state, H);
        run_slice<T, V, J>(
            a, p, span, tails, owner, k == 0, state, exponent, bias, D, H, m,
            [&]() {
                if (state != NULL && !appends && k == slices - 1) {
                    last = come_for_tails(a, p, tails, gridDim.x);
                }
            },
            [&]() { mil_wait(); });
        owner.B = owner.dt = false;
        p.column += V * QUADS;
        p.x_column += V * QUADS;
    }
    if (state != NULL && !appends) {
        p.x_column -= p.column - first_column; /* all columns of the block */
        p.columns = min(p.column, a.head_dim) - first_column;
        p.column = first_column;
        move_tails<T>(a, p, span, tails, last, bias);
    }
    mil_wait();
}

/* ---- launches --------------------------------------------------------------------------------------------------- */

template <typename T, int V, int J>
static mil_status
launch_windows(mil_context *context, ssd_arguments a, const mil_states &states, int64_t sequences)
{
    const int64_t enough = 512; /* blocks */
    a.slices = (int)mil_ceil_div(a.head_dim, V * QUADS);
    const int64_t at_once = sequences * a.heads * a.slices / enough;
    a.slices_a_block = (int)(at_once < 1 ? 1 : at_once > a.slices ? a.slices : at_once);
    dim3 grid((unsigned)mil_ceil_div(a.slices, a.slices_a_block), (unsigned)a.heads, (unsigned)sequences);
    return mil_launch(context, "ssd", ssd_windows_kernel<T, V, J>, grid, dim3(THREADS),
                      sizeof(window_memory<V * QUADS, LANES_N * J>), a, states);
}

template <typename T, int V>
static mil_status
choose_rows(mil_context *context, const ssd_arguments &a, const mil_states &states, int64_t sequences)
{
    return a.state_dim <= 4 * LANES_N             ? launch_windows<T, V, 4>(context, a, states, sequences)
           : a.state_dim <= 8 * LANES_N && V == 4 ? launch_windows<T, 4, 8>(context, a, states, sequences)
                                                  : launch_windows<T, V, 16>(context, a, states, sequences);
}

/* Whether everything can be read 4 elements at a time. */
template <typename T>
static bool
takes_vectors(const ssd_arguments &a)
{
    return a.head_dim % 4 == 0 && a.state_dim % 4 == 0 && mil_is_aligned<T>(a.x, a.x_stride) &&
           mil_is_aligned<T>(a.B, a.B_stride) && mil_is_aligned<T>(a.C, a.C_stride);
}

template <typename T>
static mil_status
windows(mil_context *context, const ssd_arguments &a, const mil_states &states, int64_t sequences)
{
    return (takes_vectors<T>(a) ? choose_rows<T, 4> : choose_rows<T, 1>)(context, a, states, sequences);
}

mil_status
mil_ssd_windows(mil_context *context, const ssd_arguments *arguments, const mil_states *states,
                int64_t sequences)
{
    return MIL_FOR_ACT(context, windows, context, *arguments, *states, sequences);
}
