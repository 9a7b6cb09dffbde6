/* The state of one sequence: KV caches of the attention layers, convolution windows, SSM states and tails of
 * the mixers (device.h explains the tail; design.md, "The state of a sequence").
 *
 * All mixers of a sequence live in one block of fixed size, so copying a sequence without attention is one
 * memcpy however long it is.  KV caches grow with the sequence; those of all layers share one block, too, since a
 * device rounds blocks up to MiBs and takes longer to make many.
 *
 * The image of a state is what `write` lays out and `read` checks:
 *
 *   header | mixer block | per attention layer: k rows [length], v rows [length]
 */
#include <string.h>

#include "model/parameters.h"

typedef struct image_header {
    char magic[8];
    int64_t length, boundary, mixer_bytes, cache_bytes; /* cache bytes of one token, all layers */
    int64_t layer_count, cache_dtype;
} image_header;

/* Where each cache begins: kernels read rows of 16 bytes. */
#define CACHE_ALIGNMENT 256

static const char image_magic[8] = "milstat1";

/* For the few operators that manage memory: they need a device, not a call's arenas. */
static mil_context
memory_context(const mil_model *model)
{
    return (mil_context){.ops = model->ops, .threads = 1};
}

static void
device_free(const mil_model *model, void *memory)
{
    mil_context context = memory_context(model);
    model->ops->free(&context, memory);
}

static mil_status
device_copy(const mil_model *model, void *to, const void *from, size_t bytes)
{
    mil_context context = memory_context(model);
    return bytes == 0 ? MIL_OK : model->ops->copy(&context, to, from, bytes);
}

/* Bytes of one token's k (or v) in one layer. */
static int64_t
kv_row_bytes(const mil_model *model, const mil_layer_config *c)
{
    return c->kv_heads * c->head_dim * (int64_t)mil_dtype_size(model->cache_dtype);
}

static int64_t
cache_bytes_per_token(const mil_model *model)
{
    int64_t bytes = 0;
    for (int64_t i = 0; i < model->config.layer_count; i++) {
        const mil_layer_config *c = &model->layers[i].config;
        bytes += c->mixer == MIL_ATTENTION ? 2 * kv_row_bytes(model, c) : 0;
    }
    return bytes;
}

/* Hands out the next `count` floats of a block; with block NULL it only counts. */
static float *
take(float *block, int64_t *offset, int64_t count)
{
    float *at = block == NULL ? NULL : block + *offset;
    *offset += (count + 15) / 16 * 16;
    return at;
}

/* Points each mixer into `block` (NULL: none) and returns the floats that all of them need. */
static int64_t
lay_out_mixers(const mil_model *model, mil_layer_state *layers, float *block)
{
    int64_t offset = 0;
    for (int64_t i = 0; i < model->config.layer_count; i++) {
        const mil_layer_config *c = &model->layers[i].config;
        if (c->mixer == MIL_ATTENTION) {
            continue;
        }
        bool mamba1 = c->mixer == MIL_MAMBA1;
        int64_t state = c->inner * c->state_dim;
        mil_mixer_state mixer = {0};
        mixer.state = take(block, &offset, state);
        mixer.conv = take(block, &offset, (c->conv_width - 1 + MIL_TAIL) * mil_conv_inputs(c));
        mixer.x = take(block, &offset, MIL_TAIL * (mamba1 ? mil_conv_channels(c) : c->x_width));
        mixer.B = take(block, &offset, MIL_TAIL * c->B_groups * c->state_dim);
        mixer.dt = take(block, &offset, MIL_TAIL * (mamba1 ? c->inner : c->heads));
        mixer.current = mamba1 && model->ops->keeps_current ? take(block, &offset, state) : NULL;
        if (layers != NULL) {
            layers[i].mixer = mixer;
            layers[i].mixer.current_tokens = mixer.current != NULL ? &layers[i].current_tokens : NULL;
        }
    }
    return offset;
}

mil_status
mil_state_init(mil_state *state, const mil_model *model, int64_t capacity)
{
    *state = (mil_state){.model = model};
    int64_t floats = lay_out_mixers(model, NULL, NULL);
    size_t layer_count = (size_t)model->config.layer_count;
    state->layers = mil_alloc(layer_count, sizeof *state->layers);
    if (state->layers == NULL) {
        return mil_fail(MIL_ERR_MEMORY, "state: out of memory");
    }
    memset(state->layers, 0, layer_count * sizeof *state->layers);
    state->mixer_bytes = (size_t)floats * sizeof(float);
    mil_context context = memory_context(model);
    mil_status status = MIL_OK;
    if (floats > 0) {
        status = model->ops->alloc(&context, state->mixer_bytes, &state->mixer_memory);
    }
    if (status == MIL_OK) {
        lay_out_mixers(model, state->layers, state->mixer_memory);
        status = mil_state_clear(state);
    }
    if (status == MIL_OK) {
        status = mil_state_reserve(state, capacity);
    }
    if (status != MIL_OK) {
        mil_state_release(state);
    }
    return status;
}

void
mil_state_release(mil_state *state)
{
    if (state->layers != NULL) {
        device_free(state->model, state->cache_memory);
        device_free(state->model, state->mixer_memory);
    }
    mil_free(state->layers);
    *state = (mil_state){0};
}

/* Points each attention layer's k and v, of `capacity` tokens, into `block` (NULL: none) and returns the bytes that
 * all of them need. */
static int64_t
lay_out_caches(const mil_model *model, mil_kv_cache *caches, int64_t capacity, char *block)
{
    int64_t offset = 0;
    for (int64_t i = 0; i < model->config.layer_count; i++) {
        const mil_layer_config *c = &model->layers[i].config;
        if (c->mixer != MIL_ATTENTION) {
            continue;
        }
        int64_t bytes = capacity * kv_row_bytes(model, c);
        bytes = (bytes + CACHE_ALIGNMENT - 1) / CACHE_ALIGNMENT * CACHE_ALIGNMENT;
        if (block != NULL) {
            caches[i] = (mil_kv_cache){
                .k = block + offset,
                .v = block + offset + bytes,
                .dtype = model->cache_dtype,
                .capacity = capacity,
            };
        }
        offset += 2 * bytes;
    }
    return offset;
}

/* The tokens that are there, from the old caches into the new ones. */
static mil_status
move_tokens(const mil_state *state, const mil_kv_cache *caches)
{
    for (int64_t i = 0; i < state->model->config.layer_count; i++) {
        const mil_layer_config *c = &state->model->layers[i].config;
        if (c->mixer == MIL_ATTENTION) {
            size_t used = (size_t)(state->length * kv_row_bytes(state->model, c));
            MIL_TRY(device_copy(state->model, caches[i].k, state->layers[i].kv.k, used));
            MIL_TRY(device_copy(state->model, caches[i].v, state->layers[i].kv.v, used));
        }
    }
    return MIL_OK;
}

static mil_status
replace_caches(mil_state *state, mil_kv_cache *caches, int64_t capacity)
{
    const mil_model *model = state->model;
    mil_context context = memory_context(model);
    void *block = NULL;
    int64_t bytes = lay_out_caches(model, NULL, capacity, NULL);
    if (bytes > 0) {
        MIL_TRY(model->ops->alloc(&context, (size_t)bytes, &block));
        lay_out_caches(model, caches, capacity, block);
        mil_status status = move_tokens(state, caches);
        if (status != MIL_OK) {
            device_free(model, block);
            return status;
        }
    }
    for (int64_t i = 0; i < model->config.layer_count; i++) {
        if (model->layers[i].config.mixer == MIL_ATTENTION) {
            state->layers[i].kv = caches[i];
        }
    }
    device_free(model, state->cache_memory);
    state->cache_memory = block;
    state->capacity = capacity;
    return MIL_OK;
}

mil_status
mil_state_reserve(mil_state *state, int64_t capacity)
{
    if (capacity <= state->capacity) {
        return MIL_OK;
    }
    if (capacity > MIL_MOST_TOKENS) {
        return mil_fail(MIL_ERR_VALUE, "state: a capacity of %lld tokens is beyond reason",
                        (long long)capacity);
    }
    int64_t wanted = state->capacity + state->capacity / 2;
    if (capacity <= state->expected && wanted > state->expected) {
        wanted = state->expected;
    }
    wanted = capacity > wanted ? capacity : wanted;
    mil_kv_cache *caches = mil_alloc((size_t)state->model->config.layer_count, sizeof *caches);
    if (caches == NULL) {
        return mil_fail(MIL_ERR_MEMORY, "state: out of memory");
    }
    mil_status status = replace_caches(state, caches, wanted);
    mil_free(caches);
    return status;
}

mil_status
mil_state_clear(mil_state *state)
{
    mil_context context = memory_context(state->model);
    state->length = state->boundary = 0;
    state->torn = false;
    for (int64_t i = 0; i < state->model->config.layer_count; i++) {
        state->layers[i].current_tokens = 0;
    }
    return state->mixer_bytes == 0
               ? MIL_OK
               : state->model->ops->zero(&context, state->mixer_memory, state->mixer_bytes);
}

mil_status
mil_state_check(const mil_state *state)
{
    if (state->torn) {
        return mil_fail(
            MIL_ERR_STATE,
            "state: its last pass failed half way, and its content is lost: clear() it, or go on from an "
            "earlier copy()");
    }
    return MIL_OK;
}

static mil_status
copy_contents(mil_state *to, const mil_state *from)
{
    const mil_model *model = from->model;
    to->length = from->length;
    to->boundary = from->boundary;
    MIL_TRY(device_copy(model, to->mixer_memory, from->mixer_memory, from->mixer_bytes));
    for (int64_t i = 0; i < model->config.layer_count; i++) {
        const mil_layer_config *c = &model->layers[i].config;
        to->layers[i].current_tokens = from->layers[i].current_tokens;
        if (c->mixer == MIL_ATTENTION) {
            size_t bytes = (size_t)(from->length * kv_row_bytes(model, c));
            MIL_TRY(device_copy(model, to->layers[i].kv.k, from->layers[i].kv.k, bytes));
            MIL_TRY(device_copy(model, to->layers[i].kv.v, from->layers[i].kv.v, bytes));
        }
    }
    return MIL_OK;
}

mil_status
mil_state_copy(mil_state *to, const mil_state *from)
{
    MIL_TRY(mil_state_check(from));
    MIL_TRY(mil_state_init(to, from->model, from->capacity));
    mil_status status = copy_contents(to, from);
    if (status != MIL_OK) {
        mil_state_release(to);
    }
    return status;
}

mil_status
mil_state_rollback(mil_state *state, int64_t count)
{
    MIL_TRY(mil_state_check(state));
    /* Without mixers nothing is ever folded, and all tokens can go. */
    int64_t earliest = state->mixer_bytes > 0 ? state->boundary : 0;
    if (count < 0 || state->length - count < earliest) {
        return mil_fail(MIL_ERR_STATE,
                        "state: cannot take back %lld of %lld tokens; the last %lld can be taken back",
                        (long long)count, (long long)state->length, (long long)(state->length - earliest));
    }
    state->length -= count;
    if (state->length < state->boundary) {
        state->boundary = mil_boundary_after(state->length, 0);
    }
    return MIL_OK;
}

int64_t
mil_state_bytes(const mil_state *state)
{
    return (int64_t)state->mixer_bytes + state->capacity * cache_bytes_per_token(state->model);
}

int64_t
mil_state_bytes_at(const mil_model *model, int64_t length)
{
    return lay_out_mixers(model, NULL, NULL) * (int64_t)sizeof(float) + length * cache_bytes_per_token(model);
}

int64_t
mil_state_image_bytes(const mil_state *state)
{
    int64_t counters = state->model->config.layer_count * (int64_t)sizeof(int64_t);
    return (int64_t)sizeof(image_header) + counters + (int64_t)state->mixer_bytes +
           state->length * cache_bytes_per_token(state->model);
}

static image_header
header_of(const mil_state *state)
{
    image_header header = {
        .length = state->length,
        .boundary = state->boundary,
        .mixer_bytes = (int64_t)state->mixer_bytes,
        .cache_bytes = cache_bytes_per_token(state->model),
        .layer_count = state->model->config.layer_count,
        .cache_dtype = (int64_t)state->model->cache_dtype,
    };
    memcpy(header.magic, image_magic, sizeof image_magic);
    return header;
}

/* Copies `bytes` between the state's memory and the image, and moves on in the image. */
static mil_status
transfer(const mil_model *model, void *memory, char **image, size_t bytes, bool write)
{
    char *at = *image;
    *image += bytes;
    return device_copy(model, write ? at : memory, write ? memory : at, bytes);
}

/* The one order that both directions share. */
static mil_status
transfer_image(const mil_state *state, char *image, bool write)
{
    const mil_model *model = state->model;
    char *at = image + sizeof(image_header);
    for (int64_t i = 0; i < model->config.layer_count; i++) {
        int64_t *tokens = &state->layers[i].current_tokens;
        memcpy(write ? (void *)at : (void *)tokens, write ? (void *)tokens : (void *)at, sizeof *tokens);
        at += sizeof *tokens;
    }
    MIL_TRY(transfer(model, state->mixer_memory, &at, state->mixer_bytes, write));
    for (int64_t i = 0; i < model->config.layer_count; i++) {
        const mil_layer_config *c = &model->layers[i].config;
        if (c->mixer == MIL_ATTENTION) {
            size_t bytes = (size_t)(state->length * kv_row_bytes(model, c));
            MIL_TRY(transfer(model, state->layers[i].kv.k, &at, bytes, write));
            MIL_TRY(transfer(model, state->layers[i].kv.v, &at, bytes, write));
        }
    }
    return MIL_OK;
}

mil_status
mil_state_write(const mil_state *state, void *image)
{
    MIL_TRY(mil_state_check(state));
    image_header header = header_of(state);
    memcpy(image, &header, sizeof header);
    return transfer_image(state, image, true);
}

mil_status
mil_state_read(mil_state *state, const mil_model *model, const void *image, int64_t bytes)
{
    image_header header;
    if (bytes < (int64_t)sizeof header) {
        return mil_fail(MIL_ERR_FORMAT, "state: an image of %lld bytes is cut short", (long long)bytes);
    }
    memcpy(&header, image, sizeof header);
    if (memcmp(header.magic, image_magic, sizeof image_magic) != 0) {
        return mil_fail(MIL_ERR_FORMAT, "state: this is not a saved state");
    }
    /* More tokens than the image has bytes for would be memory asked for in vain. Without attention a state has one size
     * whatever the length. */
    int64_t token_bytes = cache_bytes_per_token(model);
    int64_t most = token_bytes > 0 ? bytes / token_bytes : INT64_MAX;
    if (header.length < 0 || header.length > most || header.boundary < 0 ||
        header.boundary % MIL_WINDOW != 0 || header.boundary > header.length ||
        (header.mixer_bytes > 0 && header.length - header.boundary >= MIL_TAIL)) {
        return mil_fail(MIL_ERR_FORMAT, "state: %lld tokens with boundary %lld cannot be",
                        (long long)header.length, (long long)header.boundary);
    }
    MIL_TRY(mil_state_init(state, model, header.length));
    state->length = header.length;
    state->boundary = header.boundary;
    image_header expected = header_of(state);
    if (memcmp(&header, &expected, sizeof header) != 0 || bytes != mil_state_image_bytes(state)) {
        mil_state_release(state);
        return mil_fail(MIL_ERR_FORMAT, "state: the saved state belongs to another model or is cut short");
    }
    mil_status status = transfer_image(state, (char *)(uintptr_t)image, false);
    if (status != MIL_OK) {
        mil_state_release(state);
    }
    return status;
}
