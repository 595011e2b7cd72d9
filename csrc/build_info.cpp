#include "build_info.h"

#include <cstring>

// setup.py passes the version of the torch that the library was compiled against.
#ifndef SINGD_TORCH_VERSION
#error "SINGD_TORCH_VERSION is not defined: build with setup.py"
#endif

#define SINGD_STRING_(...) #__VA_ARGS__
#define SINGD_STRING(...) SINGD_STRING_(__VA_ARGS__)

namespace singd {

// singd_ext/_load.py finds this text in a library that does not load.
extern const char built_with_torch[];
const char built_with_torch[] = "singd_ext built with torch " SINGD_STRING(SINGD_TORCH_VERSION);

std::map<std::string, std::string> build_info() {
  const char* volatile text = built_with_torch;  // read from where _load.py finds it
  return {
      {"torch", std::strrchr(text, ' ') + 1},
#if defined(__clang__)
      {"compiler", "clang " __clang_version__},
#elif defined(__GNUC__)
      {"compiler", "gcc " __VERSION__},
#elif defined(_MSC_VER)
      {"compiler", "msvc " SINGD_STRING(_MSC_VER)},
#endif
      {"c++", std::to_string(__cplusplus)},
#if defined(SINGD_CUDA)  // the toolkit's version and the architectures, separated by commas
      {"devices", "cpu cuda"},
      {"cuda", SINGD_STRING(SINGD_CUDA)},
#else
      {"devices", "cpu"},
#endif
  };
}

}  // namespace singd
