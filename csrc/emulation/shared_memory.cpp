#include "shared_memory.h"

#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace singd::emulation {

namespace {

using ElfHeader = ElfW(Ehdr);
using ElfSection = ElfW(Shdr);
using ElfSymbol = ElfW(Sym);

struct Range {
  size_t offset, bytes;  // in the module's thread-local storage
};

struct Module {
  std::string path;
  const char* begin = nullptr;  // its thread-local storage in the thread that looked it up
  size_t bytes = 0;
};

// A thread-local variable of this module: its address tells where the storage of a thread lies.
thread_local char anchor = 0;

int find_module(dl_phdr_info* info, size_t, void* found) {
  const ElfW(Phdr)* tls = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type == PT_TLS) tls = &info->dlpi_phdr[i];
  }
  const char* begin = static_cast<const char*>(info->dlpi_tls_data);
  if (tls == nullptr || begin == nullptr || &anchor < begin || &anchor >= begin + tls->p_memsz) {
    return 0;
  }
  Module& module = *static_cast<Module*>(found);
  module.path = *info->dlpi_name ? info->dlpi_name : "/proc/self/exe";
  module.begin = begin;
  module.bytes = tls->p_memsz;
  return 1;
}

// Mangled names of variables of a function in singd::cuda: _ZZN5singd4cuda..., with one Z more for
// each lambda between them.
bool is_shared_variable(const char* name) {
  if (std::strncmp(name, "_Z", 2) != 0) return false;
  const char* rest = name + 2;
  if (*rest != 'Z') return false;
  while (*rest == 'Z') ++rest;
  return std::strncmp(rest, "N5singd4cuda", 12) == 0;
}

std::vector<Range> shared_variables(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::vector<char> file{std::istreambuf_iterator<char>(stream), {}};
  std::vector<Range> ranges;
  if (file.size() < sizeof(ElfHeader)) return ranges;
  const auto* header = reinterpret_cast<const ElfHeader*>(file.data());
  const auto* sections = reinterpret_cast<const ElfSection*>(file.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const ElfSymbol*>(file.data() + sections[i].sh_offset);
    for (size_t s = 0; s < sections[i].sh_size / sizeof(ElfSymbol); ++s) {
      const ElfSymbol& symbol = symbols[s];
      // The type's place in st_info is the same for 32 and 64 bits.
      if (ELF64_ST_TYPE(symbol.st_info) != STT_TLS || symbol.st_shndx == SHN_UNDEF) continue;
      if (!is_shared_variable(names + symbol.st_name)) continue;
      ranges.push_back({static_cast<size_t>(symbol.st_value), static_cast<size_t>(symbol.st_size)});
    }
  }
  return ranges;
}

struct StaticShared {
  size_t anchor_offset = 0;
  size_t bytes = 0;  // of all thread-local storage
  std::vector<Range> ranges;

  StaticShared() {
    Module module;
    dl_iterate_phdr(find_module, &module);
    if (module.begin == nullptr) return;
    anchor_offset = static_cast<size_t>(&anchor - module.begin);
    bytes = module.bytes;
    ranges = shared_variables(module.path);
  }
  char* begin() const { return &anchor - anchor_offset; }
};

const StaticShared& static_shared() {
  static const StaticShared instance;
  return instance;
}

}  // namespace

void poison_static_shared() {
  const StaticShared& shared = static_shared();
  for (const Range& range : shared.ranges) {
    std::memset(shared.begin() + range.offset, 0xFF, range.bytes);
  }
}

size_t static_shared_bytes() {
  size_t bytes = 0;
  for (const Range& range : static_shared().ranges) bytes += range.bytes;
  return bytes;
}

bool in_static_shared(const void* p, size_t bytes) {
  const StaticShared& shared = static_shared();
  const char* q = static_cast<const char*>(p);
  return q >= shared.begin() && q + bytes <= shared.begin() + shared.bytes;
}

}  // namespace singd::emulation
