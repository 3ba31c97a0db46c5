// Parts of a job on several threads that live no longer than the call.

#ifndef MVBERT_SHARE_H_
#define MVBERT_SHARE_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace mvbert {

// Runs work(next) on up to `threads` threads, this one among them, and on no more than there are
// parts: next(&part) hands out the parts [0, parts), each to one thread, and is false when none is
// left. Throws what the first thread that failed threw, when all have ended.
template <typename Work>
void Share(std::size_t parts, int threads, Work&& work) {
  const std::size_t workers =
      std::max<std::size_t>(std::min(parts, static_cast<std::size_t>(std::max(threads, 1))), 1);
  std::vector<std::exception_ptr> errors(workers);
  std::atomic<std::size_t> next{0};
  const auto run = [&](std::size_t worker) {
    try {
      work([&next, parts](std::size_t* part) { return (*part = next++) < parts; });
    } catch (...) {
      errors[worker] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(workers - 1);
  for (std::size_t worker = 1; worker < workers; ++worker) {
    try {
      others.emplace_back(run, worker);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: these do the work
    }
  }
  run(0);
  for (std::thread& thread : others) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace mvbert

#endif  // MVBERT_SHARE_H_
