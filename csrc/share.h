// Parts of a job on several threads that live no longer than the call.

#ifndef MVBERT_SHARE_H_
#define MVBERT_SHARE_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace mvbert {

// Runs work(next) on up to `threads` threads, this one among them, and on no more than there are
// parts: next(&part) hands out the parts [0, parts) in order, each to one thread, and is false when
// none is left. If no more threads can be started, fewer do the work. When all have ended, throws
// what the lowest part that failed threw: it does not depend on the threads.
//
// Throws std::invalid_argument unless threads >= 1: how many are sensible is the caller's to know.
template <typename Work>
void Share(std::size_t parts, int threads, Work&& work) {
  if (threads < 1) {
    throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  }
  const std::size_t workers =
      std::max<std::size_t>(std::min(parts, static_cast<std::size_t>(threads)), 1);
  struct Failure {
    std::size_t part;
    std::exception_ptr error;
  };
  std::vector<Failure> failures(workers);
  std::atomic<std::size_t> next{0};
  const auto run = [&](std::size_t worker) {
    std::size_t mine = parts;
    try {
      work([&](std::size_t* part) { return (*part = mine = next++) < parts; });
    } catch (...) {
      failures[worker] = {mine, std::current_exception()};
    }
  };
  std::vector<std::thread> others;
  others.reserve(workers - 1);
  for (std::size_t worker = 1; worker < workers; ++worker) {
    try {
      others.emplace_back(run, worker);
    } catch (const std::system_error&) {
      break;
    }
  }
  run(0);
  for (std::thread& thread : others) thread.join();
  const Failure* first = nullptr;
  for (const Failure& failure : failures) {
    if (failure.error && (first == nullptr || failure.part < first->part)) first = &failure;
  }
  if (first != nullptr) std::rethrow_exception(first->error);
}

// Calls work(begin, end, part) for `parts` ranges that are [0, count) together, nearly equally
// long, on up to `threads` threads. Errors as above.
template <typename Work>
void ShareRanges(std::size_t count, std::size_t parts, int threads, Work&& work) {
  const std::size_t each = count / parts, longer = count % parts;
  const auto begin = [=](std::size_t part) { return part * each + std::min(part, longer); };
  Share(parts, threads, [&](auto&& next) {
    for (std::size_t part; next(&part);) work(begin(part), begin(part + 1), part);
  });
}

}  // namespace mvbert

#endif  // MVBERT_SHARE_H_
