// Stands in for the toolkit's header of this name; see cuda_runtime.h.
#pragma once

#include "common.h"

using __nv_bfloat16 = vss::BFloat16;

inline float __bfloat162float(__nv_bfloat16 value) {
    return vss::to_float(value);
}
