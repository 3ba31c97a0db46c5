// Large tables that are read anywhere, in pages of 2 MB where the system has them.

#ifndef MVBERT_HUGE_PAGES_H_
#define MVBERT_HUGE_PAGES_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mvbert {

inline constexpr std::size_t kHugePage = std::size_t{1} << 21;

// Asks for huge pages where memory of at least one lies whole within [data, data + size): with
// small ones, each read far from the last costs a walk through the page tables as well. To be
// called before the memory is first written. A hint: where it is refused, nothing else changes.
inline void AdviseHugePages(void* data, std::size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + size) / kHugePage * kHugePage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)size;
#endif
}

// Memory whose every byte is zero; for types that are bytes and nothing else.
template <typename T>
class ZeroedTable {
 public:
  explicit ZeroedTable(std::size_t size) : size_(size) {
    data_ = static_cast<T*>(std::aligned_alloc(kHugePage, size * sizeof(T)));
    if (data_ == nullptr) throw std::bad_alloc();
    AdviseHugePages(data_, size * sizeof(T));
    Clear();
  }
  ZeroedTable(const ZeroedTable&) = delete;
  ZeroedTable& operator=(const ZeroedTable&) = delete;
  ~ZeroedTable() { std::free(data_); }

  T& operator[](std::size_t i) { return data_[i]; }
  void CopyFrom(const ZeroedTable& other) {
    std::memcpy(static_cast<void*>(data_), other.data_, size_ * sizeof(T));
  }
  void Clear() { std::memset(static_cast<void*>(data_), 0, size_ * sizeof(T)); }

 private:
  std::size_t size_;
  T* data_;
};

}  // namespace mvbert

#endif  // MVBERT_HUGE_PAGES_H_
