// A check that names what failed; main() returns the number of failures.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

namespace singd::tests {

inline int failures = 0;

inline void check(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

template <class A, class B>
void check_equal(const A& got, const B& expected, const std::string& what) {
  check(got == expected, what);
}

inline void check_close(double got, double expected, double tolerance, const std::string& what) {
  check(std::abs(got - expected) <= tolerance,
        what + ": got " + std::to_string(got) + ", expected " + std::to_string(expected));
}

template <class Error, class Function>
void check_throws(Function f, const std::string& text, const std::string& what) {
  try {
    f();
  } catch (const Error& error) {
    check(std::string(error.what()).find(text) != std::string::npos,
          what + ": the message does not contain '" + text + "': " + error.what());
    return;
  }
  check(false, what + ": nothing was thrown");
}

}  // namespace singd::tests
