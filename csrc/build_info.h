// How this library was built.
#pragma once

#include <map>
#include <string>

namespace singd {

std::map<std::string, std::string> build_info();

}  // namespace singd
