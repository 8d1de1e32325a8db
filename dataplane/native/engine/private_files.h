// Files that ONNX Runtime maps, made private to this process.
//
// ONNX Runtime maps a graph's external data, and computes from the mapping for as long as the
// session lives (but for what it has packed into memory of its own). Whoever then cuts the file
// short ends the process by SIGBUS; whoever writes into it changes answers. So once a session is
// loaded, what it has mapped is copied, page by page, into memory that no file system has, and that
// is mapped in its place. Sessions that have mapped the same pages share the copy.
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace attnserve::engine {

// For sessions of one model, which are loaded one after another; copies live as long as mappings of
// them do. One thread at a time.
class PrivateFiles {
 public:
  PrivateFiles() = default;
  ~PrivateFiles();
  PrivateFiles(const PrivateFiles&) = delete;
  PrivateFiles& operator=(const PrivateFiles&) = delete;

  // Puts copies in the place of all that this process has mapped of files in a folder. Nobody
  // writes to these mappings. Throws std::runtime_error that names the file and the reason; then
  // some are mapped as they were.
  void take_over(const std::filesystem::path& folder);

 private:
  struct Copy {
    int memory = -1;            // of memfd_create
    std::vector<bool> written;  // by page
  };
  std::map<std::string, Copy> copies_;  // by the file's path
};

}  // namespace attnserve::engine
