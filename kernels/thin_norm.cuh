/* Rows of x that a product of few rows norms for itself: every block all of them, into shared memory, before it multiplies.
 *
 * The bits are those of norm.cu.  What counts is the time from mil_wait() on, as all blocks wait for it: all of a thread's
 * vectors are on their way at once, and weights are there before.  A narrow row's sum is a warp's, but all threads norm its
 * columns, a few each: a warp that does it alone takes four times as long, an instruction every four cycles.
 */
#ifndef MIL_KERNELS_THIN_NORM_CUH
#define MIL_KERNELS_THIN_NORM_CUH

#include "thin_tile.cuh"

#define ROWS_AT_ONCE 5 /* of many that are copied or normed: a draft of four tokens and the one before */
#define NORM_STEPS 4   /* columns of a normed row are at most this many vectors a thread, */
#define NORM_STEPS_OF_MANY 2 /* of one of many this many */

/* A thread's vectors of ROWS rows: STEPS columns from `column` on, `step` apart; what lies beyond the ends is left as it is. */
template <typename T, int ROWS, int STEPS>
static __device__ __forceinline__ void
load_rows(const T *x, int64_t stride, int rows, int column, int step, int end, uint4 (&to)[ROWS][STEPS])
{
#pragma unroll
    for (int i = 0; i < ROWS * STEPS; i++) {
        const int row = i / STEPS, at = column + i % STEPS * step;
        if (row < rows && at < end) {
            to[row][i % STEPS] = *(const uint4 *)(x + row * stride + at);
        }
    }
}

/* Whether a launch's rows can be normed so. */
static inline bool
norm_is_short(const thin_arguments &a)
{
    return a.in <= (a.rows == 1 ? NORM_STEPS : NORM_STEPS_OF_MANY) * MIL_NORM_THREADS * 8;
}

/* Whether a row's sum is a warp's, not the block's. */
static __host__ __device__ __forceinline__ bool
is_narrow(const thin_arguments &a)
{
    return a.in <= MIL_NORM_WIDEST_FOR_WARP;
}

/* ---- narrow rows */

#define NARROW_COLUMNS 4 /* of a thread */

/* A thread's columns of narrow rows. */
template <typename T>
struct narrow_columns {
    static_assert(THREADS * NARROW_COLUMNS >= MIL_NORM_WIDEST_FOR_WARP, "a row's columns");
    int first;
    bool there;
    float weight[NARROW_COLUMNS];
    const T *own;    /* of the first row */
    bool sums;       /* whether the thread's warp has a row to sum, */
    const T *summed; /* and the lane's first vector of it */

    /* Needs no mil_wait(): nobody writes weights. */
    explicit __device__ __forceinline__ narrow_columns(const thin_arguments &a)
    {
        const int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP;
        first = (int)threadIdx.x * NARROW_COLUMNS;
        there = first < a.in;
        sums = warp < a.rows;
        own = (const T *)a.norm.x + (there ? first : 0);
        summed = (const T *)a.norm.x + warp * a.norm.x_stride + lane * 8;
        if (there) {
            mil_load_settled<NARROW_COLUMNS>(a.norm.weight + first, weight);
        }
    }

    /* For mil_wait_knowing(). */
    __device__ __forceinline__ int known() const
    {
        return mil_known(own) ^ mil_known(summed);
    }
};

/* A lane's vectors of a narrow row; zeros where it has none. */
template <typename T>
static __device__ __forceinline__ void
load_narrow(const T *first, int in, uint4 (&to)[NORM_STEPS])
{
    static_assert(MIL_NORM_WIDEST_FOR_WARP <= NORM_STEPS * MIL_WARP * 8, "a lane's vectors");
    const int left = in - (int)threadIdx.x % MIL_WARP * 8;
#pragma unroll
    for (int i = 0; i < NORM_STEPS; i++) {
        const int at = i * MIL_WARP * 8;
        to[i] = at < left ? *(const uint4 *)(first + at) : make_uint4(0, 0, 0, 0);
    }
}

/* What such a row is to be multiplied by. */
template <typename T>
static __device__ __forceinline__ float
find_factor(const norm_arguments &n, const uint4 (&raw)[NORM_STEPS])
{
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < NORM_STEPS; i++) {
        float value[8];
        mil_load<8>((const T *)&raw[i], value);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum = fmaf(value[j], value[j], sum);
        }
    }
    return mil_norm_factor(n, mil_warp_sum(sum));
}

/* A thread's columns of one row. */
template <typename T>
static __device__ __forceinline__ void
norm_columns_of(const narrow_columns<T> &columns, const uint2 &raw, float factor, T *y)
{
    float value[NARROW_COLUMNS];
    mil_load<NARROW_COLUMNS>((const T *)&raw, value);
#pragma unroll
    for (int j = 0; j < NARROW_COLUMNS; j++) {
        value[j] *= factor;
        value[j] *= columns.weight[j];
    }
    mil_store<NARROW_COLUMNS>(y + columns.first, value);
}

/* All of at most WARPS rows, a warp the factor of each.  factors: [WARPS].  All multiplying warps have met at the end. */
template <typename T, int PAD>
static __device__ __forceinline__ void
norm_narrow(const thin_arguments &a, const narrow_columns<T> &columns, T *y, float *factors)
{
    uint2 own = *(const uint2 *)columns.own;
    if (columns.sums) {
        uint4 raw[NORM_STEPS];
        load_narrow(columns.summed, a.in, raw);
        factors[threadIdx.x / MIL_WARP] = find_factor<T>(a.norm, raw);
    }
    meet();
    if (columns.there) {
        norm_columns_of(columns, own, factors[0], y);
        /* More rows come out of the first-level cache, where the warps' reading has left them. */
#pragma unroll 1
        for (int row = 1; row < a.rows; row++) {
            own = *(const uint2 *)(columns.own + row * a.norm.x_stride);
            norm_columns_of(columns, own, factors[row], y + row * (a.in + PAD));
        }
    }
    meet();
}

/* ---- wide rows */

/* A thread's columns of a row that is the block's. */
struct norm_columns {
    static_assert(THREADS == MIL_NORM_THREADS, "a row's columns");
    static constexpr int step = MIL_NORM_THREADS * 8;
    int first, end;

    explicit __device__ __forceinline__ norm_columns(const thin_arguments &a)
    {
        first = (int)threadIdx.x * 8;
        end = a.in;
    }
};

/* The norm's weights of a thread's columns in registers, where there are enough. */
struct weights_at_hand {
    float value[NORM_STEPS][2][4]; /* by loads that the compiler leaves where they are, before mil_wait() */

    __device__ __forceinline__ weights_at_hand(const thin_arguments &a, const norm_columns &columns)
    {
#pragma unroll
        for (int i = 0; i < NORM_STEPS; i++) {
            const int column = columns.first + i * columns.step;
            if (column < columns.end) {
                float (&half)[2][4] = *(float (*)[2][4])value[i];
                mil_load_settled<4>(a.norm.weight + column, half[0]);
                mil_load_settled<4>(a.norm.weight + column + 4, half[1]);
            }
        }
    }

    __device__ __forceinline__ void get(int i, int, float (&weight)[8]) const
    {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            weight[j] = value[i][j / 4][j % 4];
        }
    }
};

/* The same in shared memory. */
struct weights_beside {
    const float *value; /* [in] */

    __device__ __forceinline__ void get(int, int column, float (&weight)[8]) const
    {
        float low[4], high[4];
        mil_load<4>(value + column, low);
        mil_load<4>(value + column + 4, high);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            weight[j] = j < 4 ? low[j % 4] : high[j % 4];
        }
    }
};

/* Eight elements as float32, made here and not kept from where they were made before: they take twice the registers. */
template <typename T>
static __device__ __forceinline__ void
widen_again(uint4 &raw, float (&value)[8])
{
    asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
    mil_load<8>((const T *)&raw, value);
}

/* The warps' sums of one row, as mil_warp_sum adds eight of them and zeros. */
static __device__ __forceinline__ float
sum_of_warps(const float *sum)
{
    static_assert(WARPS == 8, "the tree of mil_warp_sum");
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

/* What ROWS rows are to be multiplied by, of a thread's columns of them.  partial: [ROWS][WARPS]. */
template <typename T, int ROWS, int STEPS>
static __device__ __forceinline__ void
find_scales(const norm_arguments &n, const norm_columns &columns, uint4 (&raw)[ROWS][STEPS], float *partial,
            float (&scale)[ROWS])
{
    const int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP;
    float sum[ROWS] = {};
#pragma unroll
    for (int i = 0; i < ROWS * STEPS; i++) {
        if (columns.first + i % STEPS * columns.step < columns.end) {
            float value[8];
            widen_again<T>(raw[i / STEPS][i % STEPS], value);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                sum[i / STEPS] = fmaf(value[j], value[j], sum[i / STEPS]);
            }
        }
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        sum[row] = mil_warp_sum(sum[row]);
        if (lane == 0) {
            partial[row * WARPS + warp] = sum[row];
        }
    }
    meet();
    const float squares = sum_of_warps(partial + min(lane, ROWS - 1) * WARPS);
    /* A lane has a row: five factors one after another take longer. */
    const float mine = mil_norm_factor(n, squares);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        scale[row] = __shfl_sync(MIL_ALL_LANES, mine, row);
    }
}

/* All of at most ROWS rows.  partial: [ROWS][WARPS]. */
template <typename T, int PAD, int ROWS, typename Weights>
static __device__ __forceinline__ void
norm_some(const thin_arguments &a, const norm_columns &columns, const Weights &weights, T *y, float *partial)
{
    constexpr int STEPS = ROWS == 1 ? NORM_STEPS : NORM_STEPS_OF_MANY;
    const norm_arguments &n = a.norm;
    uint4 raw[ROWS][STEPS];
    load_rows((const T *)n.x, n.x_stride, a.rows, columns.first, columns.step, columns.end, raw);
    float scale[ROWS];
    find_scales<T>(n, columns, raw, partial, scale);
#pragma unroll
    for (int row = 0; row < ROWS && row < a.rows; row++) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int column = columns.first + i * columns.step;
            if (column < columns.end) {
                float value[8], weight[8];
                widen_again<T>(raw[row][i], value);
                weights.get(i, column, weight);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    value[j] *= scale[row];
                    value[j] *= weight[j];
                }
                mil_store<8>(y + row * (a.in + PAD) + column, value);
            }
        }
    }
}

/* All rows of x, of which there are at most MANY; all multiplying warps have met at the end. */
template <typename T, int PAD, int MANY, typename Weights>
static __device__ __forceinline__ void
norm_wide(const thin_arguments &a, const norm_columns &columns, const Weights &weights, T *y, float *partial)
{
    if (a.rows == 1) {
        norm_some<T, PAD, 1>(a, columns, weights, y, partial);
    }
    else {
        norm_some<T, PAD, MANY>(a, columns, weights, y, partial);
    }
    meet();
}

#endif
