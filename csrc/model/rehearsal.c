/* A rehearsal: the forward pass with operators that do nothing, on an arena of addresses that nobody touches.
 *
 * The bytes that a pass takes follow from its model, its rows and the order in which layers push and rewind, and that
 * order is written down once, in mixer.c and forward.c.  So instead of a second list of the same sums, which
 * would be wrong after the next change, the pass itself runs, and the arena's peak is the answer: exact for
 * activations, logits and uploads.  What a device's operators take for themselves is not seen here.
 *
 * A pass of 8 sequences through 32 layers takes some 0.1 ms.
 */
#include "model/rehearsal.h"

#include <string.h>

/* ---- operators that do nothing -------------------------------------------------------------------------- */

/* Memory is an address that is never read. */
#define NOWHERE ((void *)(uintptr_t)MIL_ALIGNMENT)

static mil_status
no_alloc(mil_context *context, size_t bytes, void **out)
{
    (void)context;
    (void)bytes;
    *out = NOWHERE;
    return MIL_OK;
}

static void
no_free(mil_context *context, void *pointer)
{
    (void)context;
    (void)pointer;
}

static mil_status
no_copy(mil_context *context, void *to, const void *from, size_t bytes)
{
    (void)context;
    (void)to;
    (void)from;
    (void)bytes;
    return MIL_OK;
}

static mil_status
no_zero(mil_context *context, void *pointer, size_t bytes)
{
    (void)context;
    (void)pointer;
    (void)bytes;
    return MIL_OK;
}

/* The one that takes memory, as a device does whose kernels cannot read the host's. */
static mil_status
count_upload(mil_context *context, const void *from, size_t bytes, const void **out)
{
    (void)from;
    void *memory;
    MIL_TRY(mil_arena_push(context->scratch, bytes, 1, &memory));
    *out = memory;
    return MIL_OK;
}

static mil_status
no_products(mil_context *context, const mil_linear *products, int64_t count)
{
    (void)context;
    (void)products;
    (void)count;
    return MIL_OK;
}

#define NOTHING(name, type)                                             \
    static mil_status name(mil_context *context, const type *arguments) \
    {                                                                   \
        (void)context;                                                  \
        (void)arguments;                                                \
        return MIL_OK;                                                  \
    }
NOTHING(no_norm, mil_norm)
NOTHING(no_rope_table, mil_rope_table)
NOTHING(no_rope, mil_rope)
NOTHING(no_attention, mil_attention)
NOTHING(no_append, mil_kv_append)
NOTHING(no_conv1d, mil_conv1d)
NOTHING(no_scan, mil_scan)
NOTHING(no_ssd, mil_ssd)
NOTHING(no_glu, mil_glu)
NOTHING(no_embedding, mil_embedding)
#undef NOTHING

static mil_status
no_add(mil_context *context, int64_t rows, int64_t width, const void *x, int64_t x_stride, void *y,
       int64_t y_stride)
{
    (void)context;
    (void)rows;
    (void)width;
    (void)x;
    (void)x_stride;
    (void)y;
    (void)y_stride;
    return MIL_OK;
}

static mil_status
no_gather(mil_context *context, int64_t count, int64_t width, const int64_t *index, const void *x,
          int64_t x_stride, void *y, int64_t y_stride)
{
    (void)index;
    return no_add(context, count, width, x, x_stride, y, y_stride);
}

static mil_status
no_widen(mil_context *context, int64_t rows, int64_t width, mil_dtype dtype, const void *x, int64_t x_stride,
         float scale, float *y)
{
    (void)dtype;
    (void)scale;
    return no_add(context, rows, width, x, x_stride, y, 0);
}

static mil_ops
table_of(const mil_rehearsal *rehearsal)
{
    return (mil_ops){
        .version = MIL_OPS_VERSION,
        .size = sizeof(mil_ops),
        .name = "rehearsal",
        .activation_dtype = rehearsal->activation,
        .keeps_current = rehearsal->keeps_current,
        .alloc = no_alloc,
        .free = no_free,
        .copy = no_copy,
        .zero = no_zero,
        .upload = count_upload,
        .linear_forward = no_products,
        .norm_forward = no_norm,
        .rope_table = no_rope_table,
        .rope = no_rope,
        .attention_forward = no_attention,
        .kv_append = no_append,
        .conv1d_forward = no_conv1d,
        .scan_forward = no_scan,
        .ssd_forward = no_ssd,
        .glu_forward = no_glu,
        .embedding_forward = no_embedding,
        .add = no_add,
        .gather_rows = no_gather,
        .widen = no_widen,
    };
}

/* ---- the pass ------------------------------------------------------------------------------------------- */

static void *
take_nothing(void *owner, size_t bytes)
{
    (void)owner;
    (void)bytes;
    return NOWHERE;
}

static void
give_nothing(void *owner, void *memory)
{
    (void)owner;
    (void)memory;
}

/* Every parameter that must be there is, somewhere. */
static mil_status
furnish(mil_model *model, const mil_ops *ops, mil_dtype dtype)
{
    model->ops = ops;
    for (int64_t i = 0; i < model->parameter_count; i++) {
        mil_parameter *p = &model->parameters[i];
        p->dtype = p->matrix ? dtype : MIL_F32;
        p->data = p->required ? NOWHERE : NULL;
    }
    return mil_model_bind(model);
}

/* Tokens, offsets and states of the pass in `arena`; all rows beyond one a sequence are the last one's. */
static mil_status
lay_out(mil_arena *arena, const mil_model *model, const mil_rehearsal *rehearsal, mil_forward *forward)
{
    int64_t sequences = rehearsal->sequences, *offsets, *logit_rows;
    int32_t *tokens;
    mil_state *states, **list;
    MIL_TRY(MIL_PUSH(arena, rehearsal->rows, int32_t, &tokens));
    MIL_TRY(MIL_PUSH(arena, sequences + 1, int64_t, &offsets));
    MIL_TRY(MIL_PUSH(arena, rehearsal->logits + 1, int64_t, &logit_rows));
    MIL_TRY(MIL_PUSH(arena, sequences, mil_state, &states));
    MIL_TRY(MIL_PUSH(arena, sequences, mil_state *, &list));
    memset(tokens, 0, (size_t)rehearsal->rows * sizeof *tokens);
    memset(logit_rows, 0, (size_t)(rehearsal->logits + 1) * sizeof *logit_rows);
    mil_layer_state *layers;
    MIL_TRY(MIL_PUSH(arena, model->config.layer_count, mil_layer_state, &layers));
    memset(layers, 0, (size_t)model->config.layer_count * sizeof *layers);
    for (int64_t i = 0; i < sequences; i++) {
        offsets[i] = i;
        states[i] = (mil_state){.model = model, .capacity = rehearsal->rows, .layers = layers};
        list[i] = &states[i];
    }
    offsets[sequences] = rehearsal->rows;
    *forward = (mil_forward){
        .tokens = tokens,
        .sequences = sequences,
        .offsets = offsets,
        .states = list,
        .logit_rows = logit_rows,
        .logit_count = rehearsal->logits,
        .logits = NOWHERE,
    };
    return MIL_OK;
}

static mil_status
run(const mil_model *model, const mil_rehearsal *rehearsal, mil_arena *host, mil_footprint *out)
{
    mil_allocator nowhere = {.alloc = take_nothing, .free = give_nothing};
    mil_arena scratch = {.allocator = &nowhere};
    mil_forward forward;
    MIL_TRY(lay_out(host, model, rehearsal, &forward));
    mil_context context = {.ops = model->ops, .scratch = &scratch, .host = host, .threads = 1};
    mil_status status = mil_model_forward(&context, model, &forward);
    out->workspace = (int64_t)scratch.peak;
    mil_arena_release(&scratch);
    out->mixer_bytes = mil_state_bytes_at(model, 0);
    out->token_bytes = mil_state_bytes_at(model, 1) - out->mixer_bytes;
    return status;
}

mil_status
mil_rehearse(const mil_model_config *config, const mil_rehearsal *rehearsal, mil_footprint *out)
{
    *out = (mil_footprint){0};
    const mil_rehearsal *r = rehearsal;
    if (r->sequences < 1 || r->rows < r->sequences || r->logits < 0 || r->logits > r->rows ||
        r->rows > (int64_t)1 << 32) {
        return mil_fail(MIL_ERR_VALUE, "rehearse: %lld rows of %lld sequences with %lld logits cannot be",
                        (long long)r->rows, (long long)r->sequences, (long long)r->logits);
    }
    mil_model model;
    mil_ops ops = table_of(rehearsal);
    mil_arena host = {0};
    MIL_TRY(mil_model_init(&model, config));
    mil_status status = furnish(&model, &ops, rehearsal->dtype);
    if (status == MIL_OK) {
        status = run(&model, rehearsal, &host, out);
    }
    mil_arena_release(&host);
    mil_model_release(&model);
    return status;
}
