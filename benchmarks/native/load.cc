// One fixed request, sent again and again by gRPC's own C++ client; one line of
// JSON at the end.
//
//     load TARGET METHOD FILE CALLERS SECONDS DEADLINE
//
// FILE holds the request's serialised message. A closed loop: each caller, a
// thread, sends when it has its answer. What ends in the first quarter is not
// counted.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "figures.h"

namespace {

using Stubs = std::vector<std::unique_ptr<grpc::GenericStub>>;

constexpr int kConnections = 4;

std::chrono::system_clock::time_point deadline_in(double seconds) {
  return std::chrono::system_clock::now() +
         std::chrono::microseconds(static_cast<long>(seconds * 1e6));
}

Stubs connect(const std::string &target) {
  Stubs stubs;
  for (int i = 0; i < kConnections; ++i) {
    grpc::ChannelArguments arguments;
    arguments.SetInt("attnserve.connection", i); // else they would share one
    arguments.SetMaxReceiveMessageSize(-1);
    stubs.push_back(
        std::make_unique<grpc::GenericStub>(grpc::CreateCustomChannel(
            target, grpc::InsecureChannelCredentials(), arguments)));
  }
  return stubs;
}

Figures closed(const Stubs &stubs, const std::string &method,
               const grpc::Slice &slice, std::size_t callers, double seconds,
               double deadline) {
  const auto start = Clock::now();
  const auto counted = start + of_seconds(seconds / 4);
  const auto stop = start + of_seconds(seconds);
  std::vector<Figures> each(callers);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < callers; ++i) {
    threads.emplace_back([&, i] {
      Figures &own = each[i];
      grpc::CompletionQueue queue;
      for (auto now = Clock::now(); now < stop; now = Clock::now()) {
        grpc::ClientContext context;
        context.set_deadline(deadline_in(deadline));
        const grpc::ByteBuffer request(&slice, 1);
        grpc::ByteBuffer reply;
        grpc::Status status;
        const auto call = stubs[i % stubs.size()]->PrepareUnaryCall(
            &context, method, request, &queue);
        call->StartCall();
        call->Finish(&reply, &status, &own);
        void *tag = nullptr;
        bool ok = false;
        queue.Next(&tag, &ok);
        const auto done = Clock::now();
        if (status.ok() && own.first < 0)
          own.first = milliseconds(done - start);
        if (done < counted || done > stop)
          continue;
        ++own.statuses[status.error_code()];
        if (status.ok()) {
          own.answers.push_back(milliseconds(done - now));
          ++own.good;
        } else if (status.error_code() ==
                   grpc::StatusCode::RESOURCE_EXHAUSTED) {
          own.refusals.push_back(milliseconds(done - now));
        }
      }
    });
  }
  for (auto &thread : threads)
    thread.join();
  Figures figures;
  for (const Figures &own : each)
    figures.add(own);
  figures.seconds = seconds * 3 / 4;
  return figures;
}

} // namespace

int main(int count, char **arguments) {
  if (count != 7) {
    std::fprintf(stderr, "load TARGET METHOD FILE CALLERS SECONDS DEADLINE\n");
    return 2;
  }
  std::ifstream file(arguments[3], std::ios::binary);
  const std::string payload{std::istreambuf_iterator<char>(file), {}};
  const grpc::Slice slice(payload.data(), payload.size(),
                          grpc::Slice::STATIC_SLICE);
  const auto callers = static_cast<std::size_t>(std::atoi(arguments[4]));
  Figures figures = closed(connect(arguments[1]), arguments[2], slice, callers,
                           std::atof(arguments[5]), std::atof(arguments[6]));
  print(figures);
}
