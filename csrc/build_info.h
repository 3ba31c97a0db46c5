// What this build was made from. The definitions are written by CMakeLists.txt.

#ifndef MVBERT_BUILD_INFO_H_
#define MVBERT_BUILD_INFO_H_

namespace mvbert {

// The version of the package, as in mvbert/__init__.py.
extern const char* const kVersion;

// SHA-256 over the names and SHA-256 sums of the sources in csrc/ and CMakeLists.txt.
extern const char* const kSourceHash;

}  // namespace mvbert

#endif  // MVBERT_BUILD_INFO_H_
