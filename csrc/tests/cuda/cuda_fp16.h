// Stands in for the toolkit's header of this name; see cuda_runtime.h.
#pragma once

#include "common.h"

using __half = vss::Half;

inline float __half2float(__half value) {
    return vss::to_float(value);
}
