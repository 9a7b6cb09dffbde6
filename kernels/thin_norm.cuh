/* Rows of x that a product of few rows norms for itself: every block all of them, into shared memory, before it multiplies.
 *
 * The bits are those of norm.cu.  What counts is the time from mil_wait() on, as all blocks wait for it: all of a thread's
 * vectors are on their way at once, and weights are there before.
 */
#ifndef MIL_KERNELS_THIN_NORM_CUH
#define MIL_KERNELS_THIN_NORM_CUH

#include "thin_tile.cuh"

#define ROWS_AT_ONCE 5 /* of many that are copied or normed: a draft of four tokens and the one before */
#define NORM_STEPS 4   /* columns of a normed row are at most this many vectors a thread, */
#define NORM_STEPS_OF_MANY 2 /* of one of many this many */

/* The multiplying warps meet. */
static __device__ __forceinline__ void
meet()
{
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

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

/* A thread's columns of a normed row: narrow rows are a warp's, wide ones the block's. */
struct norm_columns {
    static_assert(THREADS == MIL_NORM_THREADS, "a wide row's columns");
    bool narrow;
    int first, step, end;

    explicit __device__ __forceinline__ norm_columns(const thin_arguments &a)
    {
        narrow = a.in <= MIL_NORM_WIDEST_FOR_WARP;
        first = (narrow ? (int)threadIdx.x % MIL_WARP : (int)threadIdx.x) * 8;
        step = narrow ? MIL_WARP * 8 : MIL_NORM_THREADS * 8;
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

/* What ROWS rows are to be multiplied by, of a thread's columns of them.  partial: [ROWS][WARPS], for wide rows. */
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
        if (!columns.narrow && lane == 0) {
            partial[row * WARPS + warp] = sum[row];
        }
    }
    float squares = sum[0];
    if (!columns.narrow) {
        meet();
        squares = sum_of_warps(partial + min(lane, ROWS - 1) * WARPS);
    }
    /* A lane has a row: five roots one after another take longer than the loads. */
    const float mine = 1.0f / sqrtf(squares / (float)n.group + n.eps);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        scale[row] = __shfl_sync(MIL_ALL_LANES, mine, row);
    }
}

/* Rows `first` to at most `first` + ROWS - 1, all at once. */
template <typename T, int PAD, int ROWS, typename Weights>
static __device__ __forceinline__ void
norm_some(const thin_arguments &a, int first, const norm_columns &columns, const Weights &weights, T *y,
          float *partial)
{
    constexpr int STEPS = ROWS == 1 ? NORM_STEPS : NORM_STEPS_OF_MANY;
    const norm_arguments &n = a.norm;
    uint4 raw[ROWS][STEPS];
    load_rows((const T *)n.x + first * n.x_stride, n.x_stride, a.rows - first, columns.first, columns.step,
              columns.end, raw);
    float scale[ROWS];
    find_scales<T>(n, columns, raw, partial, scale);
#pragma unroll
    for (int row = 0; row < ROWS && first + row < a.rows; row++) {
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
                mil_store<8>(y + (first + row) * (a.in + PAD) + column, value);
            }
        }
    }
}

/* All rows of x, of wide ones at most MANY; all warps have met at the end. */
template <typename T, int PAD, int MANY, typename Weights>
static __device__ __forceinline__ void
norm_rows(const thin_arguments &a, const norm_columns &columns, const Weights &weights, T *y, float *partial)
{
    if (columns.narrow || a.rows == 1) {
        const int each = columns.narrow ? WARPS : 1;
        for (int row = columns.narrow ? (int)threadIdx.x / MIL_WARP : 0; row < a.rows; row += each) {
            norm_some<T, PAD, 1>(a, row, columns, weights, y, partial);
        }
    }
    else {
        norm_some<T, PAD, MANY>(a, 0, columns, weights, y, partial);
    }
    meet();
}

#endif
