/* Products with 1 to 16 rows: y [rows, out] (+)= x [rows, in] W^T + bias, at the speed of reading W.
 *
 * One token of an 8B model reads 16 GB of weights and multiplies each once, so only the reading counts.  16-bit
 * weights go through the tensor cores even for one row: m16n8k16 takes 16 rows of W as its A and 8 rows of x
 * as its B, so up to 8 rows cost what one costs, and a row's sum is the same bits whatever stands beside it,
 * because every column of B is reduced by itself in one order:
 *
 *   chunk of 32 inputs: thread (g, t) of a warp holds W[g][8 t .. 8 t + 7], W[g + 8][8 t ..] and x[g][8 t ..],
 *   each one 16-byte load straight from memory.  The sum over inputs does not mind their order, so those eight
 *   values serve as the fragments of two products (values 0 to 3, then 4 to 7): no shuffle, no shared memory.
 *   A warp w of the block's 8 takes chunks w, w + 8, ... in ascending order; the 8 partial sums are added in
 *   order of w.
 *
 * Weights of 8 bits (quantized.cuh) take the same way: 16 codes a load, so a chunk has 64 inputs, become four
 * fragments in registers, and the scale of an output's row multiplies the finished sum.
 *
 * A norm before few tiles of products and the gated activation after them need no kernels of their own: every block
 * norms the few rows for itself in the order of norm.cu, and a block that has summed a tile of both gate and up
 * writes only their product.  Both give the bits of the separate kernels.
 *
 * The first loads of W do not wait for the kernel before (nobody writes weights), so they are on their way
 * while it drains.  float32 weights, which only comparisons with the CPU use, take plain multiply-adds in a
 * kernel of the same shape.
 */
#include "thin_conv.cuh"
#include "thin_norm.cuh"

#define LOADS 8       /* 16-byte loads of weights that a thread has under way; more, */
#define MOST_LOADS 16 /* where these are all that it has, so that they are on their way before mil_wait() */
#define NORMED_BYTES (64 << 10)
#define NORMED_ROWS 2
#define NORMED_TILES \
    396 /* three for each of 132 multiprocessors: blocks that come later would norm again, for nothing */

/* Starts copying the weights of wide rows' norm, which nobody writes, into shared memory. */
static __device__ __forceinline__ void
fetch_norm_weight(const thin_arguments &a, float *weight)
{
    for (int i = (int)threadIdx.x * 4; i < a.in; i += THREADS * 4) {
        mil_copy_16(weight + i, a.norm.weight + i);
    }
}

/* One matrix's share of a block: 16 rows of weights on their way, and their sums with GROUPS * 8 rows of x.  ONCE: nothing
 * comes after the first loads. */
template <typename T, typename W, int GROUPS, int UNROLL, bool ONCE>
struct tile_sums {
    static constexpr int STEP = UNROLL * WARPS * CHUNK<W>;
    const W *low, *high;
    uint4 wl[UNROLL], wh[UNROLL];
    float c[CHAINS<W>][GROUPS][4];

    __device__ __forceinline__ void begin(const void *weight, int first, int out, int in, int g, int k)
    {
        low = (const W *)weight + (int64_t)min(first + g, out - 1) * in;
        high = (const W *)weight + (int64_t)min(first + g + 8, out - 1) * in;
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            fetch(u, k + u * WARPS * CHUNK<W>, in);
        }
#pragma unroll
        for (int i = 0; i < CHAINS<W> * GROUPS * 4; i++) {
            c[i / (GROUPS * 4)][i / 4 % GROUPS][i % 4] = 0.0f;
        }
    }

    __device__ __forceinline__ void fetch(int u, int at, int in)
    {
        const uint4 zero = make_uint4(0, 0, 0, 0);
        wl[u] = at < in ? load_once(low + at) : zero;
        wh[u] = at < in ? load_once(high + at) : zero;
    }

    /* Takes chunk `u` and fetches the one that will lie in its place. */
    __device__ __forceinline__ void take(int u, int next, int in, const uint4 (&x)[GROUPS][X_LOADS<T, W>])
    {
        uint4 l = wl[u], h = wh[u];
        if constexpr (!ONCE) {
            fetch(u, next, in);
        }
        multiply_load<T, W, GROUPS>(c, l, h, x);
    }

    __device__ __forceinline__ void end(float (&partial)[TILE][GROUPS * 8], int g, int t) const
    {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            int row = group * 8 + 2 * t;
            partial[g][row] = add_chains<W, GROUPS>(c, group, 0);
            partial[g][row + 1] = add_chains<W, GROUPS>(c, group, 1);
            partial[g + 8][row] = add_chains<W, GROUPS>(c, group, 2);
            partial[g + 8][row + 1] = add_chains<W, GROUPS>(c, group, 3);
        }
    }
};

/* Whether x is the norm of a.norm.x, and of which kind (thin_norm.cuh). */
enum x_norm { AS_IT_IS, NORMED_NARROW, NORMED_WIDE };

/* W: of the weights, T or 8 bits; GROUPS of 8 rows; GATED: outputs[0] is up, outputs[1] the gate, and only their gated
 * activation is written; AT_ONCE loads of W are under way, and ONCE: those are all; CONV: outputs are convolved. */
template <typename T, typename W, int GROUPS, x_norm NORM, bool GATED, int AT_ONCE, bool ONCE, bool CONV>
static __global__ void
__launch_bounds__(THREADS, GROUPS == 1 && AT_ONCE == LOADS && !CONV ? 3 : 2)
    thin_kernel(const __grid_constant__ thin_arguments a)
{
    constexpr int MATRICES = GATED ? 2 : 1, UNROLL = AT_ONCE / 2 / MATRICES;
    using sums_type = tile_sums<T, W, GROUPS, UNROLL, ONCE>;
    __shared__ float partial[MATRICES][WARPS][TILE][GROUPS * 8];
    extern __shared__ uint4 normed_rows[]; /* the rows, then the norm's weights where they are wide */
    const int product = GATED ? 0 : product_of(a, (int)blockIdx.x);
    const thin_output &o = a.outputs[product];
    int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP, g = lane / 4, t = lane % 4;
    int first = ((int)blockIdx.x - o.first_tile) * TILE;
    int k = warp * CHUNK<W> + PER_LOAD<W> * t;

    place<T, W, GATED> written;
    const int out = first + written.column();
    const bool convolves = CONV && product == a.conv.product && first + TILE > a.conv.first &&
                           first < a.conv.first + a.conv.channels;
    conv_tile conv;
    conv_output<T> convolved;
    __shared__ conv_number numbers[CONV ? MIL_THIN_ROWS : 1];
    if (convolves) {
        conv.ask(a, out - a.conv.first);
    }
    sums_type sums[MATRICES];
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
        sums[m].begin(m == 0 ? o.weight : a.outputs[1].weight, first, o.out, a.in, g, k);
    }
    float *norm_weights = (float *)((T *)normed_rows + a.rows * a.in);
    if constexpr (NORM == NORMED_WIDE) {
        fetch_norm_weight(a, norm_weights);
    }
    mil_trigger();
    written.find(a, product, out, out < o.out);
    auto prepare_conv = [&]() {
        if (convolves) {
            conv.fetch(a, out < o.out, numbers, &convolved);
            meet();
            conv.fold(a.conv, numbers);
        }
    };
    /* Of the lane's first row and input. */
    const int64_t x_stride = NORM == AS_IT_IS ? a.x_stride : a.in;
    const T *x = (NORM == AS_IT_IS ? (const T *)a.x : (const T *)normed_rows) + g * x_stride + k;
    const int lane_rows = a.rows - g;
    if constexpr (NORM == NORMED_NARROW) {
        const narrow_columns<T> columns(a);
        prepare_conv();
        mil_wait_knowing(columns.known());
        written.read();
        norm_narrow<T, 0>(a, columns, (T *)normed_rows, &partial[0][0][0][0]);
    }
    else if constexpr (NORM == NORMED_WIDE) {
        const norm_columns columns(a);
        mil_await_copies();
        meet();
        mil_wait();
        written.read();
        norm_wide<T, 0, NORMED_ROWS>(a, columns, weights_beside{norm_weights}, (T *)normed_rows,
                                     &partial[0][0][0][0]);
    }
    else {
        prepare_conv();
        mil_wait_knowing(mil_known(x) ^ lane_rows);
        written.read();
    }

    /* The whole warp stays in the loop until its last chunk: products take all its threads. */
    for (int chunk = warp * CHUNK<W>; chunk < a.in; chunk += sums_type::STEP) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            constexpr int STEP = sums_type::STEP;
            const int apart = u * WARPS * CHUNK<W>;
            uint4 xv[GROUPS][X_LOADS<T, W>];
#pragma unroll
            for (int i = 0; i < GROUPS * X_LOADS<T, W>; i++) {
                const int row = i / X_LOADS<T, W> * 8, part = i % X_LOADS<T, W>;
                const bool real = k + apart < a.in && row < lane_rows;
                xv[i / X_LOADS<T, W>][part] =
                    real ? *(const uint4 *)(x + row * x_stride + apart + 8 * part) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                sums[m].take(u, k + apart + STEP, a.in, xv);
            }
        }
        k += sums_type::STEP;
        x += sums_type::STEP;
        if constexpr (ONCE) {
            break;
        }
    }
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
        sums[m].end(partial[m][warp], g, t);
    }
    __syncthreads();
    if (convolves) {
        if constexpr (!GATED) {
            convolved.template write<W>(a, written, &partial[0][0][0][0], GROUPS * 8);
        }
    }
    else {
        written.write(a, &partial[0][0][0][0], GROUPS * 8);
    }
}

/* float32: a warp takes inputs of its chunks for all outputs of the tile; lane (j, t) sums outputs j and j + 8 over every
 * fourth input. */
static __global__ void
__launch_bounds__(THREADS) thin_kernel_float(const __grid_constant__ thin_arguments a)
{
    __shared__ float partial[WARPS][TILE][MIL_THIN_ROWS];
    const int product = product_of(a, (int)blockIdx.x);
    const thin_output &o = a.outputs[product];
    int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP;
    int first = ((int)blockIdx.x - o.first_tile) * TILE;
    const float *x = (const float *)a.x;
    mil_trigger();
    place<float, float, false> written;
    const int out = first + written.column();
    written.find(a, product, out, out < o.out);
    mil_wait();
    written.read();
    for (int row = 0; row < a.rows; row++) {
        for (int j = 0; j < TILE; j++) {
            const float *w = (const float *)o.weight + (int64_t)min(first + j, o.out - 1) * a.in;
            float sum = 0.0f;
            for (int k = warp * MIL_WARP + lane; k < a.in; k += THREADS) {
                sum = fmaf(w[k], x[row * a.x_stride + k], sum);
            }
            sum = mil_warp_sum(sum);
            if (lane == 0) {
                partial[warp][j][row] = sum;
            }
        }
    }
    __syncthreads();
    written.write(a, &partial[0][0][0], MIL_THIN_ROWS);
}

bool
mil_thin_product_fits(const mil_context *context, const mil_linear *p)
{
    mil_dtype act = context->ops->activation_dtype;
    bool scaled = mil_dtype_is_scaled(p->dtype);
    if (p->rows > MIL_THIN_ROWS || (p->dtype != act && !(scaled && act != MIL_F32)) ||
        p->in > INT32_MAX / 2 || p->out > INT32_MAX / 2) {
        return false;
    }
    return p->dtype == MIL_F32 || (p->in % (scaled ? 16 : 8) == 0 && (uintptr_t)p->weight % 16 == 0 &&
                                   (uintptr_t)p->x % 16 == 0 && p->x_stride % 8 == 0);
}

static thin_output
output_of(const mil_linear *p, int first_tile)
{
    return {p->weight,   p->scale,   p->bias,       p->y,           p->y_stride,
            (int)p->out, first_tile, p->accumulate, p->float_output};
}

static thin_arguments
arguments_of(const mil_linear *products, int64_t count)
{
    return mil_product_arguments<thin_arguments>(
        products, count, TILE, [](const mil_linear *p, int first_tile) { return output_of(p, first_tile); });
}

template <typename T, typename W, x_norm NORM, bool GATED, int AT_ONCE, bool ONCE, bool CONV = false>
static mil_status
launch_rows(mil_context *context, const thin_arguments &a, size_t shared)
{
    auto kernel = a.rows <= 8 ? thin_kernel<T, W, 1, NORM, GATED, AT_ONCE, ONCE, CONV>
                              : thin_kernel<T, W, 2, NORM, GATED, AT_ONCE, ONCE, CONV>;
    return mil_launch(context, "thin product", kernel, dim3((unsigned)a.tiles), dim3(THREADS), shared, a);
}

/* All of a thread's loads of W at once, where they are few. */
template <typename T, typename W, x_norm NORM, bool GATED>
static mil_status
launch_loads(mil_context *context, const thin_arguments &a, size_t shared)
{
    if constexpr (NORM == NORMED_NARROW && !GATED) {
        static_assert(LOADS / 2 * WARPS * CHUNK<W> >= MIL_NORM_WIDEST_FOR_WARP, "they are always few");
        if (sizeof(W) == 2 && a.conv.channels > 0) {
            return launch_rows<T, T, NORM, GATED, LOADS, true, true>(context, a, shared);
        }
        return launch_rows<T, W, NORM, GATED, LOADS, true>(context, a, shared);
    }
    else if constexpr (NORM == AS_IT_IS && !GATED && sizeof(W) == 2) {
        const int64_t loads = 2 * mil_ceil_div(a.in, WARPS * CHUNK<W>);
        if (a.conv.channels > 0) {
            return loads <= LOADS ? launch_rows<T, W, NORM, GATED, LOADS, true, true>(context, a, shared)
                                  : launch_rows<T, W, NORM, GATED, LOADS, false, true>(context, a, shared);
        }
        return loads <= LOADS        ? launch_rows<T, W, NORM, GATED, LOADS, true>(context, a, shared)
               : loads <= 12         ? launch_rows<T, W, NORM, GATED, 12, true>(context, a, shared)
               : loads <= MOST_LOADS ? launch_rows<T, W, NORM, GATED, MOST_LOADS, true>(context, a, shared)
                                     : launch_rows<T, W, NORM, GATED, LOADS, false>(context, a, shared);
    }
    else {
        return launch_rows<T, W, NORM, GATED, LOADS, false>(context, a, shared);
    }
}

template <typename T, x_norm NORM, bool GATED>
static mil_status
launch_weights(mil_context *context, mil_dtype weights, const thin_arguments &a, size_t shared)
{
    return weights == MIL_F8   ? launch_loads<T, mil_f8, NORM, GATED>(context, a, shared)
           : weights == MIL_I8 ? launch_loads<T, mil_i8, NORM, GATED>(context, a, shared)
                               : launch_loads<T, T, NORM, GATED>(context, a, shared);
}

template <x_norm NORM, bool GATED>
static mil_status
launch(mil_context *context, mil_dtype weights, const thin_arguments &a, size_t shared)
{
    return context->ops->activation_dtype == MIL_BF16
               ? launch_weights<__nv_bfloat16, NORM, GATED>(context, weights, a, shared)
               : launch_weights<__half, NORM, GATED>(context, weights, a, shared);
}

/* Products of x in place. */
static mil_status
multiply(mil_context *context, mil_dtype weights, const thin_arguments &a)
{
    if (weights == MIL_F32) {
        return mil_launch(context, "thin product", thin_kernel_float, dim3((unsigned)a.tiles), dim3(THREADS),
                          0, a);
    }
    bool done;
    MIL_TRY(mil_thin_stream(context, weights, a, false, false, &done));
    return done ? MIL_OK : launch<AS_IT_IS, false>(context, weights, a, 0);
}

mil_status
mil_thin_product(mil_context *context, const mil_linear *products, int64_t count)
{
    return multiply(context, products->dtype, arguments_of(products, count));
}

/* ---- with the norm before and the gate after ------------------------------------------------------------------- */

/* Shared memory for the rows after the norm and for its weights. */
static size_t
norm_bytes(const mil_norm *n)
{
    return (size_t)(n->rows * n->width) * 2 + (size_t)n->width * sizeof(float);
}

/* Whether a norm can go along: in blocks of which three share a multiprocessor. */
static bool
norm_fits(const mil_norm *n, const mil_linear *products, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (products[i].x != n->y || products[i].dtype == MIL_F32) {
            return false;
        }
    }
    return n->group == n->width && n->z == NULL && n->width == products->in && n->width % 8 == 0 &&
           (uintptr_t)n->x % 16 == 0 && n->x_stride % 8 == 0 && n->weight != NULL &&
           (uintptr_t)n->weight % 16 == 0;
}

/* Rows that every block norms in about the time of one: as many as it has warps, where a row is a warp's. */
static int64_t
most_normed(const mil_norm *n)
{
    return n->width <= MIL_NORM_WIDEST_FOR_WARP ? WARPS : NORMED_ROWS;
}

/* A convolution of outputs on their way out, where it can be had (thin_conv.cuh); else one of no channels. */
static thin_conv
conv_of(const mil_context *context, const mil_conv1d *c, const mil_linear *products, int64_t count)
{
    thin_conv conv = {};
    if (c == NULL || c->states == NULL || products->dtype == MIL_F32 ||
        products->dtype != context->ops->activation_dtype || c->repeat != 1 || c->width < 2 ||
        c->width > CONV_TAPS || c->rows.sequences > MIL_THIN_ROWS || c->rows.rows != products->rows ||
        !c->silu) {
        return conv;
    }
    for (int i = 0; i < count; i++) {
        const mil_linear *p = &products[i];
        const int64_t at = ((const uint16_t *)c->x - (const uint16_t *)p->y);
        if (at >= 0 && at + c->channels <= p->out && c->x_stride == p->y_stride && !p->accumulate &&
            !p->float_output) {
            conv.product = i;
            conv.first = (int)at;
            conv.channels = (int)c->channels;
        }
    }
    conv.taps = (int)c->width;
    conv.whole = c->width == CONV_TAPS && mil_is_aligned<float>(c->weight, 0);
    conv.rows = mil_rows_of(c->rows);
    conv.weight = c->weight;
    conv.bias = c->bias;
    conv.y = c->y;
    conv.y_stride = (int)c->y_stride;
    for (int sequence = 0; sequence < conv.rows.sequences; sequence++) {
        const int64_t first = c->rows.offsets[sequence], end = c->rows.offsets[sequence + 1];
        conv.tails[sequence] = c->states[sequence].conv;
        conv.mixes = conv.mixes || end - first > 1;
        conv.channels = end > first ? conv.channels : 0; /* nobody would fold its tail */
        for (int64_t row = first; row < end; row++) {
            conv.sequence[row] = (uint8_t)sequence;
            conv.index[row] = (uint8_t)(row - first);
        }
    }
    return conv;
}

mil_status
mil_thin_project(mil_context *context, const mil_norm *norm, const mil_linear *products, int64_t count,
                 const mil_glu *gate, const mil_conv1d *conv)
{
    bool normed = norm_fits(norm, products, count),
         gated = gate != NULL && products->dtype != MIL_F32 && mil_gate_fits(products, count, gate);
    mil_dtype weights = products->dtype;
    thin_arguments a = arguments_of(products, gated ? 1 : count);
    a.norm = norm_arguments_of(norm);
    if (gated) {
        a.outputs[1] = output_of(&products[1], 0);
        a.gated = gate->y;
        a.gated_stride = gate->y_stride;
        a.activation = gate->activation;
    }
    else {
        a.conv = conv_of(context, conv, products, count);
    }
    bool done = false;
    if (normed) {
        MIL_TRY(mil_thin_stream(context, weights, a, true, gated, &done));
    }
    normed = normed && !done && a.tiles <= NORMED_TILES && norm->rows <= most_normed(norm) &&
             norm_bytes(norm) <= NORMED_BYTES && norm_is_short(a);
    if (!normed && !done) {
        MIL_TRY(context->ops->norm_forward(context, norm));
    }
    if (!normed && !done && gated) {
        MIL_TRY(mil_thin_stream(context, weights, a, false, true, &done));
    }
    if (!done) {
        size_t shared = normed ? norm_bytes(norm) : 0;
        const bool narrow = is_narrow(a);
        a.conv.channels = normed && !narrow ? 0 : a.conv.channels; /* so few outputs are rarely convolved */
        auto function = !normed  ? launch<AS_IT_IS, true>
                        : gated  ? narrow ? launch<NORMED_NARROW, true> : launch<NORMED_WIDE, true>
                        : narrow ? launch<NORMED_NARROW, false>
                                 : launch<NORMED_WIDE, false>;
        mil_status status =
            normed || gated ? function(context, weights, a, shared) : multiply(context, weights, a);
        MIL_TRY(status);
    }
    if (conv != NULL && a.conv.channels == 0) {
        MIL_TRY(context->ops->conv1d_forward(context, conv));
    }
    return gate == NULL || gated ? MIL_OK : context->ops->glu_forward(context, gate);
}
