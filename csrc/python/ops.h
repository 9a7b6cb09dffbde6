/* Bindings of the operator table: one function of _core a member (see call.h for how they read). */
#ifndef MIL_PYTHON_OPS_H
#define MIL_PYTHON_OPS_H

#include "python/call.h"

#define CORE_OPERATOR(name)                                                   \
    {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL | METH_KEYWORDS, \
     "See mambainllama.ops." #name "."}

extern PyMethodDef core_dense_methods[];
extern PyMethodDef core_attention_methods[];
extern PyMethodDef core_mixer_methods[];

#endif
