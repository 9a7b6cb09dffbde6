/* Products whose outputs are convolved on their way out (project with a convolution) against the CPU's operators, against the
 * device's own operators one by one, and their bits in any company. */
#include "mixers.h"
#include "products.h"

/* A product [out, in] of whose outputs `channels` from `first` on are convolved; and one of `in` besides. */
typedef struct thin_conv_case {
    int64_t in, out, first, channels, taps, besides;
    bool silu, bias;
} thin_conv_case;

typedef struct thin_conv_parameters {
    thin_conv_case size;
    bool apart;      /* CUDA's operators one by one */
    mil_dtype dtype; /* of weights */
    harness_array norm, b, conv, conv_bias;
    scaled_weights W[2]; /* and of the other product; scale = NULL where they are of 16 bits or more */
} thin_conv_parameters;

/* A row of y is [the product, of which what was convolved is 0 | the other product | the convolution]. */
static void
run(harness *h, const mixer_case *c, bool gpu, const mil_rows *rows, const void *inputs, void *y,
    const mil_mixer_state *states)
{
    const thin_conv_parameters *p = (const thin_conv_parameters *)c->arguments;
    const thin_conv_case *s = &p->size;
    mil_context *context = gpu ? &h->gpu : &h->cpu;
    const mil_ops *ops = context->ops;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    const size_t size = gpu ? mil_dtype_size(h->act) : 4;
    mil_norm n = {};
    n.rows = rows->rows;
    n.width = n.group = n.x_stride = n.y_stride = s->in;
    n.x = inputs;
    n.weight = (const float *)mixer_side(&p->norm, gpu);
    n.eps = 1e-5f;
    harness_need(mil_arena_push(context->scratch, (size_t)(rows->rows * s->in), size, &n.y));
    mil_linear products[2];
    for (int i = 0; i < 2; i++) {
        products[i] =
            products_linear(rows->rows, s->in, i == 0 ? s->out : s->besides, gpu ? p->dtype : MIL_F32);
        products[i].x = n.y;
        products[i].y_stride = c->y_width;
        products[i].weight = gpu ? p->W[i].codes : p->W[i].values;
        products[i].scale = gpu ? p->W[i].scale : NULL;
        products[i].y = (void *)mixer_at(h, gpu, y, i == 0 ? 0 : s->out);
    }
    products[0].bias = s->bias ? (const float *)mixer_side(&p->b, gpu) : NULL;
    const int64_t count = s->besides > 0 ? 2 : 1;
    mil_conv1d conv = {};
    conv.rows = *rows;
    conv.channels = s->channels;
    conv.width = s->taps;
    conv.repeat = conv.repeat_group = 1;
    conv.x = mixer_at(h, gpu, y, s->first);
    conv.x_stride = conv.y_stride = c->y_width;
    conv.weight = (const float *)mixer_side(&p->conv, gpu);
    conv.bias = s->bias ? (const float *)mixer_side(&p->conv_bias, gpu) : NULL;
    conv.silu = s->silu;
    conv.y = (void *)mixer_at(h, gpu, y, s->out + s->besides);
    conv.states = states;
    if (gpu && !p->apart) {
        harness_check(h, ops->project(context, &n, products, count, NULL, &conv));
    }
    else {
        harness_check(h, ops->norm_forward(context, &n));
        harness_check(h, ops->linear_forward(context, products, count));
        harness_check(h, ops->conv1d_forward(context, &conv));
    }
    char *raw = (char *)mixer_at(h, gpu, y, s->first);
    for (int64_t row = 0; row < rows->rows; row++) { /* what passes between operators may stay unwritten */
        char *at = raw + row * c->y_width * (int64_t)size;
        if (gpu) {
            harness_need(mil_cuda_status(
                cudaMemsetAsync(at, 0, (size_t)s->channels * size, mil_stream(context)), "clearing"));
        }
        else {
            memset(at, 0, (size_t)s->channels * size);
        }
    }
    mil_arena_rewind(context->scratch, mark);
}

static scaled_weights
random_weights(harness *h, int64_t out, int64_t in, mil_dtype dtype)
{
    if (mil_dtype_is_scaled(dtype)) {
        return products_random_scaled(h, out, in, dtype);
    }
    const harness_array w = harness_random(h, out * in, 2.0f / sqrtf((float)in));
    return {w.cpu, w.gpu, NULL};
}

static mixer_case
make_case(harness *h, const thin_conv_case *size, mil_dtype dtype, thin_conv_parameters *p)
{
    mixer_case c = {};
    const thin_conv_case *s = size;
    memset(p, 0, sizeof *p);
    p->size = *size;
    p->norm = mixer_parameters(h, s->in, 0.5f, 1.5f);
    p->dtype = dtype;
    p->W[0] = random_weights(h, s->out, s->in, dtype);
    p->W[1] = random_weights(h, s->besides > 0 ? s->besides : 1, s->in, dtype);
    p->b = mixer_parameters(h, s->out, -1, 1);
    p->conv = mixer_parameters(h, s->channels * s->taps, -1, 1);
    p->conv_bias = mixer_parameters(h, s->channels, -1, 1);
    snprintf(c.name, sizeof c.name, "%s product %lld x %lld, %lld of it convolved from %lld on, %lld taps",
             mil_dtype_name(dtype), (long long)s->out, (long long)s->in, (long long)s->channels,
             (long long)s->first, (long long)s->taps);
    c.conv = s->channels;
    c.conv_rows = s->taps - 1 + MIL_TAIL;
    c.width = s->in;
    c.y_width = s->out + s->besides + s->channels;
    c.tolerance = 4 * mixer_tolerance(h);
    c.tail_tolerance = h->act == MIL_F32 ? 2e-5 : c.tolerance;
    c.makes_inputs = true;
    c.arguments = p;
    c.run = run;
    return c;
}

int
main(void)
{
    static const thin_conv_case cases[] = {
        /* A tile a block: all weights in registers, several turns, one launch with another product, not all columns. */
        {768, 3072, 0, 1536, 4, 0, true, true},
        {768, 264, 17, 200, 3, 40, true, false},
        {96, 50, 5, 7, 2, 0, false, true},
        {1536, 80, 32, 48, 4, 0, true, true},
        {2040, 130, 1, 129, 4, 0, true, true},
        {4096, 50, 10, 33, 4, 0, true, true}, /* normed, and too wide to be convolved there */
        /* A stream a multiprocessor: rows normed there, copied, in place; shares that lie across the ends. */
        {1024, 4096, 0, 2048, 4, 0, true, true},
        {2560, 2600, 40, 2500, 4, 8, true, false},
        {1032, 4300, 1000, 2333, 3, 0, true, true},
        {4096, 1100, 500, 600, 4, 100, true, true},
        {64, 40, 8, 24, 6, 0, true, true}, /* too many taps */
    };
    static const mil_dtype types[][2] = {/* activations, weights */
                                         {MIL_F32, MIL_F32}, {MIL_BF16, MIL_BF16}, {MIL_F16, MIL_F16},
                                         {MIL_BF16, MIL_F8}, {MIL_BF16, MIL_I8},   {MIL_F16, MIL_F8}};
    static harness h;
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        harness_begin(&h, types[t][0]);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            thin_conv_parameters p;
            mixer_case c = make_case(&h, &cases[i], types[t][1], &p);
            mixer_test_thin_parity(&h, &c);
            c = make_case(&h, &cases[i], types[t][1], &p);
            mixer_test_thin_bits(&h, &c, &p.apart);
        }
        harness_close(&h);
    }
    return harness_end(&h, "thin product and convolution");
}
