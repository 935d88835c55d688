// The Python module vss._C: importing it loads the kernels; it holds how they were built.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "common.h"

#define VSS_TEXT_(...) #__VA_ARGS__
#define VSS_TEXT(...) VSS_TEXT_(__VA_ARGS__)

#if defined(__clang__)
#define VSS_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define VSS_COMPILER "gcc " __VERSION__
#else
#define VSS_COMPILER "unknown"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native kernels of vss and the facts of their build.";
    py::dict facts;
    facts["compiler"] = VSS_COMPILER;
    facts["torch"] = TORCH_VERSION;
    facts["cpu_clones"] = VSS_HAS_CLONES == 1;
#ifdef _OPENMP
    facts["openmp"] = _OPENMP;
#else
    facts["openmp"] = py::none();
#endif
#ifdef VSS_WITH_CUDA
    facts["cuda"] = true;
    facts["architectures"] = VSS_TEXT(VSS_ARCHITECTURES);
#else
    facts["cuda"] = false;
    facts["architectures"] = "";
#endif
    module.attr("BUILD") = facts;
}
