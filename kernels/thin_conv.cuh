/* The convolution of a mixer's inputs on their way out of the product that makes them (device.h: mil_conv1d).
 *
 * A thread that sums one output of one row has the newest input of its channel; those of this call's other rows are with the
 * threads beside it, and older ones in the tail.  So the block that multiplies convolves, too, each input once, and moves the
 * tails of its channels on: no kernel of its own, which would take 2 us a layer, and none after it convolves again.  Inputs
 * themselves go to the tail alone.  The bits are those of conv1d.cu.
 *
 * All but this call's inputs is fetched while weights are on their way (mil_rows.settled): what waits for it comes in the end.
 * Where a window is folded, the tails move on then, too, as nobody else reads these channels.
 */
#ifndef MIL_KERNELS_THIN_CONV_CUH
#define MIL_KERNELS_THIN_CONV_CUH

#include "conv1d.cuh"
#include "tail.cuh"
#include "thin_tile.cuh"

#define CONV_LEAD (CONV_TAPS - 1) /* inputs before a sequence's first row */

/* Of a sequence: tokens in its tail, and of them those that are folded. */
struct conv_number {
    int before, shift;

    __device__ __forceinline__ void find(int64_t past, int64_t boundary)
    {
        const mil_span span = mil_span_from(0, 0, past, boundary);
        before = span.before;
        shift = (int)(span.after - span.boundary);
    }

    /* Rows that stay where some are folded. */
    __device__ __forceinline__ int kept(const thin_conv &c) const
    {
        return before - shift + c.taps - 1;
    }
};

/* Where a window is folded: rows `first`, `first` + `apart`, ..., MOST at most, of the `kept` ones of one channel move to the
 * tail's beginning.  `apart` divides a window's length, so what a thread overwrites no other one reads; nor does anybody for
 * this call. */
template <int MOST>
static __device__ __forceinline__ void
fold_channel(const thin_conv &c, float *channel, int shift, int kept, int first, int apart)
{
    float value[MOST][1];
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        if (first + i * apart < kept) {
            mil_load_settled<1>(channel + (shift + first + i * apart) * c.channels, value[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        if (first + i * apart < kept) {
            channel[(first + i * apart) * c.channels] = value[i][0];
        }
    }
}

/* What a thread adds to `place` where its output is an input of the convolution. */
template <typename T>
struct conv_output {
    T *y; /* NULL: it is not */
    float *tail;
    int index;  /* of the row in its sequence */
    bool meets; /* all threads do, once more: the tile has such outputs, of rows that follow each other */
    float weight[CONV_TAPS], bias; /* taps behind zeros for those that do not exist */
    float lead[CONV_LEAD];         /* inputs before this call, as far as the row needs them */

    /* Where they go. */
    __device__ __forceinline__ void find(const thin_arguments &a, const conv_number &number, int channel)
    {
        const thin_conv &c = a.conv;
        const int row = (int)threadIdx.x / TILE;
        index = c.index[row];
        y = (T *)c.y + row * c.y_stride + channel;
        tail = c.tails[c.sequence[row]] + (number.kept(c) + index) * c.channels + channel;
    }

    /* place::write, by all multiplying threads. */
    template <typename W>
    __device__ __forceinline__ void
    write(const thin_arguments &a, const place<T, W, false> &place, float *partial, int pitch) const
    {
        float *const own = partial + place.column() * pitch + place.row(); /* nobody else reads this sum */
        T raw = mil_round<T>(0.0f);
        if (y != NULL) {
            raw = mil_round<T>(place.add(partial, pitch, 0));
        }
        else {
            place.write(a, partial, pitch);
        }
        if (meets) {
            if (y != NULL) {
                *own = mil_float(raw);
            }
            meet();
        }
        if (y != NULL) {
            float window[CONV_TAPS];
#pragma unroll
            for (int j = 0; j < CONV_LEAD; j++) {
                window[j] = index >= CONV_LEAD - j ? own[j - CONV_LEAD] : lead[j];
            }
            window[CONV_LEAD] = mil_float(raw);
            *y = mil_round<T>(mil_convolve<T, CONV_TAPS>(weight, window, bias, 0, true));
            *tail = window[CONV_LEAD];
        }
    }
};

/* ---- one tile a block: in registers */

/* What a thread knows of its column of the tile, and asks for. */
struct conv_tile {
    int channel; /* of the thread's column, or none such */
    int64_t past, boundary;

    /* The numbers of the thread's sequence, on their way. */
    __device__ __forceinline__ void ask(const thin_arguments &a, int channel_here)
    {
        const thin_conv &c = a.conv;
        const int row = (int)threadIdx.x / TILE;
        channel = channel_here;
        if (row < a.rows) {
            mil_wait_for_states(c.rows);
            past = mil_load_number(c.rows.past + c.sequence[row]);
            boundary = mil_load_number(c.rows.boundary + c.sequence[row]);
        }
    }

    /* What comes with the thread's output, to be waited for at the end; and the sequences' numbers for all. */
    template <typename T>
    __device__ __forceinline__ void
    fetch(const thin_arguments &a, bool there, conv_number *numbers, conv_output<T> *output) const
    {
        const thin_conv &c = a.conv;
        const int row = (int)threadIdx.x / TILE, missing = CONV_TAPS - c.taps;
        output->meets = c.mixes;
        output->y = NULL;
        if (row >= a.rows) {
            return;
        }
        conv_number number;
        number.find(past, boundary);
        if (c.index[row] == 0) {
            numbers[c.sequence[row]] = number;
        }
        if (!there || channel < 0 || channel >= c.channels) {
            return;
        }
        output->bias = c.bias == NULL ? 0.0f : c.bias[channel];
        if (c.whole) {
            mil_load_settled<4>(c.weight + channel * CONV_TAPS, output->weight);
        }
        else {
#pragma unroll
            for (int j = 0; j < CONV_TAPS; j++) {
                output->weight[j] = j < missing ? 0.0f : c.weight[channel * c.taps + j - missing];
            }
        }
        output->find(a, number, channel);
        const float *tail = c.tails[c.sequence[row]] + channel;
#pragma unroll
        for (int j = 0; j < CONV_LEAD; j++) {
            float value[1] = {0.0f};
            if (j >= missing && output->index + j < CONV_LEAD) {
                mil_load_settled<1>(tail + (number.before + output->index + j - missing) * c.channels, value);
            }
            output->lead[j] = value[0];
        }
    }

    /* By all multiplying threads, which have met since: a column of the tile and two of the rows that stay each. */
    __device__ __forceinline__ void fold(const thin_conv &c, const conv_number *numbers) const
    {
        static_assert(2 * THREADS / TILE >= MIL_TAIL - MIL_WINDOW + CONV_TAPS, "all rows that stay");
#pragma unroll 1
        for (int sequence = 0; sequence < c.rows.sequences; sequence++) {
            const conv_number number = numbers[sequence];
            if (number.shift > 0 && channel >= 0 && channel < c.channels) {
                fold_channel<2>(c, c.tails[sequence] + channel, number.shift, number.kept(c),
                                (int)threadIdx.x / TILE, THREADS / TILE);
            }
        }
    }
};

/* ---- many tiles a block: in shared memory */

/* Floats in it for so many channels: taps, bias, and each sequence's inputs before this call. */
static __host__ __device__ constexpr int
conv_floats(int channels, int sequences)
{
    return channels * (CONV_TAPS + 1 + CONV_LEAD * sequences);
}

/* 4 bytes on their way into shared memory, or zeros. */
static __device__ __forceinline__ void
copy_float(float *to, const float *from, bool there)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(there ? 4 : 0)
                 : "memory");
}

/* A block's channels. */
struct conv_share {
    int first, count;     /* at most 0: there are none */
    float *table;         /* [item][count]: taps, bias, leads of each sequence */
    conv_number *numbers; /* [sequences] */

    /* The block's outputs are `outputs` from `output` on, all products' one behind another. */
    __device__ __forceinline__ bool find(const thin_arguments &a, int output, int outputs)
    {
        const int column = output - a.outputs[a.conv.product].first_tile - a.conv.first;
        first = max(column, 0);
        count = min(column + outputs, a.conv.channels) - first;
        return count > 0;
    }

    /* Item and channel of what the threads deal out among themselves. */
    template <typename Each>
    __device__ __forceinline__ void deal(int items, Each each) const
    {
#pragma unroll 1
        for (int unit = (int)threadIdx.x; unit < items * count; unit += THREADS) {
            const int item = unit / count;
            each(item, unit - item * count);
        }
    }

    /* All that is needed, on its way: to be waited for before the threads next meet. */
    __device__ __forceinline__ void fetch(const thin_arguments &a) const
    {
        const thin_conv &c = a.conv;
        const int missing = CONV_TAPS - c.taps;
        mil_wait_for_states(c.rows);
        if ((int)threadIdx.x < c.rows.sequences) {
            numbers[threadIdx.x].find(mil_load_number(c.rows.past + threadIdx.x),
                                      mil_load_number(c.rows.boundary + threadIdx.x));
        }
        deal(CONV_TAPS + 1, [&](int item, int k) {
            const float *from =
                item < CONV_TAPS ? c.weight + (first + k) * c.taps + item - missing : c.bias + first + k;
            const bool there = item < CONV_TAPS ? item >= missing : c.bias != NULL;
            copy_float(table + item * count + k, there ? from : c.weight, there);
        });
        meet();
        deal(CONV_LEAD * c.rows.sequences, [&](int item, int k) {
            const int sequence = item / CONV_LEAD, j = item % CONV_LEAD;
            const float *from = c.tails[sequence] + first + k;
            copy_float(table + (CONV_TAPS + 1 + item) * count + k,
                       from + (numbers[sequence].before + max(j - missing, 0)) * c.channels, j >= missing);
        });
#pragma unroll 1
        for (int sequence = 0; sequence < c.rows.sequences; sequence++) {
            const conv_number number = numbers[sequence];
            if (number.shift > 0) {
                constexpr int PARTS = 2;
                deal(PARTS, [&](int part, int k) {
                    fold_channel<(MIL_TAIL - MIL_WINDOW + CONV_TAPS) / PARTS>(
                        c, c.tails[sequence] + first + k, number.shift, number.kept(c), part, PARTS);
                });
            }
        }
    }

    /* What comes with the thread's output in the tile of `outputs` from `output` on. */
    template <typename T>
    __device__ __forceinline__ void
    find(const thin_arguments &a, int output, int outputs, bool there, conv_output<T> *to) const
    {
        const thin_conv &c = a.conv;
        const int k = output - a.outputs[c.product].first_tile - c.first - first,
                  own = k + (int)threadIdx.x % TILE, row = (int)threadIdx.x / TILE;
        to->meets = c.mixes && k < count && k + outputs > 0;
        to->y = NULL;
        if (!there || own < 0 || own >= count) {
            return;
        }
        const float *from = table + own;
#pragma unroll
        for (int j = 0; j < CONV_TAPS; j++) {
            to->weight[j] = from[j * count];
        }
        to->bias = from[CONV_TAPS * count];
        to->find(a, numbers[c.sequence[row]], first + own);
        from += (CONV_TAPS + 1 + CONV_LEAD * c.sequence[row] + to->index) * count;
#pragma unroll
        for (int j = 0; j < CONV_LEAD; j++) {
            to->lead[j] = to->index + j < CONV_LEAD ? from[j * count] : 0.0f;
        }
    }
};

#endif
