// A server whose connections echo bytes, and what its tests share.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/log.h"
#include "grpc_sockets.h"

namespace attnserve::grpc {

struct Echo {
  explicit Echo(ServerOptions options = {}) {
    if (options.addresses.empty()) options.addresses = {"127.0.0.1:0"};
    server = server_of(service, echo_factory(record), std::move(options));
    server->start();
  }
  std::string address() const { return server->addresses().front(); }

  NoService service;
  EchoRecord record;
  std::unique_ptr<Server> server;
};

inline ServerOptions on(std::vector<std::string> addresses) {
  ServerOptions options;
  options.addresses = std::move(addresses);
  return options;
}

inline std::string answer_to(const std::string& address, const std::string& question) {
  Client client(address);
  client.send(question);
  return client.receive(question.size());
}

// A folder of its own for sockets, removed with all in it.
struct Folder {
  Folder() {
    std::string name = "/tmp/attnserve-sockets-XXXXXX";
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Folder() { std::filesystem::remove_all(path); }
  std::filesystem::path path;
};

inline std::string reason_not_to_start(ServerOptions options) {
  NoService service;
  EchoRecord record;
  const auto server = server_of(service, echo_factory(record), std::move(options));
  try {
    server->start();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// Log events of a test's server are looked at, not printed.
struct Quiet {
  Quiet() {
    set_log_sink([this](const LogRecord& record) {
      const std::scoped_lock lock(mutex);
      ++events[std::string(record.event)];
    });
  }
  ~Quiet() { set_log_sink({}); }
  std::size_t count(const std::string& event) {
    const std::scoped_lock lock(mutex);
    return events[event];
  }
  std::mutex mutex;
  std::map<std::string, std::size_t> events;
};

}  // namespace attnserve::grpc
