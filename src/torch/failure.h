// How the C++ half and Rust report failures to each other: no exception leaves an extern "C" function and no panic
// enters one. Either side returns a malloc'ed message, or null on success.
#pragma once
#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace tllib {

// The failure of `body`, which the Rust side frees by tllib_free.
template <typename F>
char* guarded(F&& body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& e) {
    return strdup(e.what_without_backtrace());
  } catch (const std::exception& e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("an exception that says nothing");
  }
}

// Throws the failure of a Rust function.
inline void check(char* failure) {
  if (!failure) return;
  const std::string text(failure);
  std::free(failure);
  TORCH_CHECK(false, text);
}

}  // namespace tllib
