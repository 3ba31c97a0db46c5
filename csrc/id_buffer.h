// Where ids are written.

#ifndef MVBERT_ID_BUFFER_H_
#define MVBERT_ID_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace mvbert {

// A growing array of ids whose new memory is not cleared first.
class IdBuffer {
 public:
  IdBuffer() = default;
  // Takes memory of malloc's with room for `capacity` ids, or null for new memory.
  IdBuffer(std::int32_t* data, std::size_t capacity) : data_(data), capacity_(capacity) {
    if (data_ != nullptr) return;
    data_ = static_cast<std::int32_t*>(std::malloc(capacity * sizeof(std::int32_t)));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~IdBuffer() { std::free(data_); }
  IdBuffer(IdBuffer&& other) noexcept { *this = std::move(other); }
  IdBuffer& operator=(IdBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
    return *this;
  }

  std::int32_t* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::size_t capacity() const { return capacity_; }
  std::int32_t* end() const { return data_ + size_; }
  void SetEnd(const std::int32_t* end) { size_ = static_cast<std::size_t>(end - data_); }

  // Room for `more` ids past the end.
  void Reserve(std::size_t more) {
    if (size_ + more <= capacity_) return;
    const std::size_t capacity = size_ + more + (size_ + more) / 2 + 1024;
    void* data = std::realloc(data_, capacity * sizeof(std::int32_t));
    if (data == nullptr) throw std::bad_alloc();
    data_ = static_cast<std::int32_t*>(data);
    capacity_ = capacity;
  }
  void Append(const std::int32_t* ids, std::size_t count) {
    if (count == 0) return;
    Reserve(count);
    std::memcpy(end(), ids, count * sizeof(std::int32_t));
    size_ += count;
  }
  // The memory, to be freed with std::free; this is then empty.
  std::int32_t* Release() {
    std::int32_t* data = data_;
    data_ = nullptr;
    size_ = capacity_ = 0;
    return data;
  }

 private:
  std::int32_t* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace mvbert

#endif  // MVBERT_ID_BUFFER_H_
