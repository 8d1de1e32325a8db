// One fixed request, sent again and again by gRPC's own C++ client; one line of JSON at the end.
//
//     load TARGET METHOD FILE closed CALLERS SECONDS DEADLINE
//     load TARGET METHOD FILE open RATE SECONDS DEADLINE
//
// FILE holds the request's serialised message. Closed: each caller, a thread, sends when it has its
// answer; what ends in the first quarter is not counted. Open: Poisson arrivals. Answers are timed
// from when they were due, and are good if they came within the deadline; refusals
// (RESOURCE_EXHAUSTED) from when they were sent.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Stubs = std::vector<std::unique_ptr<grpc::GenericStub>>;

constexpr int kConnections = 4;
constexpr double kDrainSeconds = 5.0;

struct Figures {
  std::map<int, long> statuses;
  std::vector<double> answers, refusals, starts;  // milliseconds
  long good = 0;
  double first = -1;  // milliseconds from the start until the first answer
  double seconds = 0;

  void add(const Figures& other) {
    for (const auto& [code, count] : other.statuses) statuses[code] += count;
    answers.insert(answers.end(), other.answers.begin(), other.answers.end());
    refusals.insert(refusals.end(), other.refusals.begin(), other.refusals.end());
    good += other.good;
    if (first < 0 || (other.first >= 0 && other.first < first)) first = other.first;
  }
};

double milliseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::milli>(duration).count();
}

Clock::duration of_seconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::chrono::system_clock::time_point deadline_in(double seconds) {
  return std::chrono::system_clock::now() +
         std::chrono::microseconds(static_cast<long>(seconds * 1e6));
}

double quantile(std::vector<double>& values, double share) {
  if (values.empty()) return -1;
  const auto index = static_cast<std::size_t>(share * static_cast<double>(values.size()));
  const auto at = values.begin() + static_cast<long>(std::min(values.size() - 1, index));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

Stubs connect(const std::string& target) {
  Stubs stubs;
  for (int i = 0; i < kConnections; ++i) {
    grpc::ChannelArguments arguments;
    arguments.SetInt("attnserve.connection", i);  // else they would share one
    arguments.SetMaxReceiveMessageSize(-1);
    stubs.push_back(std::make_unique<grpc::GenericStub>(
        grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments)));
  }
  return stubs;
}

Figures closed(const Stubs& stubs, const std::string& method, const grpc::Slice& slice,
               std::size_t callers, double seconds, double deadline) {
  const auto start = Clock::now();
  const auto counted = start + of_seconds(seconds / 4);
  const auto stop = start + of_seconds(seconds);
  std::vector<Figures> each(callers);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < callers; ++i) {
    threads.emplace_back([&, i] {
      Figures& own = each[i];
      grpc::CompletionQueue queue;
      for (auto now = Clock::now(); now < stop; now = Clock::now()) {
        grpc::ClientContext context;
        context.set_deadline(deadline_in(deadline));
        const grpc::ByteBuffer request(&slice, 1);
        grpc::ByteBuffer reply;
        grpc::Status status;
        const auto call =
            stubs[i % stubs.size()]->PrepareUnaryCall(&context, method, request, &queue);
        call->StartCall();
        call->Finish(&reply, &status, &own);
        void* tag = nullptr;
        bool ok = false;
        queue.Next(&tag, &ok);
        const auto done = Clock::now();
        if (status.ok() && own.first < 0) own.first = milliseconds(done - start);
        if (done < counted || done > stop) continue;
        ++own.statuses[status.error_code()];
        if (status.ok()) {
          own.answers.push_back(milliseconds(done - now));
          ++own.good;
        } else if (status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED) {
          own.refusals.push_back(milliseconds(done - now));
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  Figures figures;
  for (const Figures& own : each) figures.add(own);
  figures.seconds = seconds * 3 / 4;
  return figures;
}

struct Call {
  grpc::ClientContext context;
  grpc::ByteBuffer request, reply;
  grpc::Status status;
  Clock::time_point due, sent;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> reader;
};

Figures open(const Stubs& stubs, const std::string& method, const grpc::Slice& slice, double rate,
             double seconds, double deadline) {
  grpc::CompletionQueue queue;
  Figures figures;
  std::atomic<long> under_way{0};
  const auto start = Clock::now();
  std::thread reader([&] {
    void* tag = nullptr;
    bool ok = false;
    while (queue.Next(&tag, &ok)) {
      const std::unique_ptr<Call> call(static_cast<Call*>(tag));
      const auto now = Clock::now();
      ++figures.statuses[call->status.error_code()];
      if (call->status.ok()) {
        const double took = milliseconds(now - call->due);
        figures.answers.push_back(took);
        if (took <= deadline * 1e3) ++figures.good;
        if (figures.first < 0) figures.first = milliseconds(now - start);
      } else if (call->status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED) {
        figures.refusals.push_back(milliseconds(now - call->sent));
      }
      --under_way;
    }
  });
  std::mt19937 random(1);
  std::exponential_distribution<double> gap(rate);
  const auto stop = start + of_seconds(seconds);
  std::size_t number = 0;
  auto due = start;
  // A client that cannot keep up stops when the time is over: what it sent is what it offered.
  while ((due += of_seconds(gap(random))) < stop && Clock::now() < stop) {
    std::this_thread::sleep_until(due);
    auto* call = new Call;
    call->due = due;
    call->sent = Clock::now();
    figures.starts.push_back(milliseconds(call->sent - due));
    call->context.set_deadline(deadline_in(deadline));
    call->request = grpc::ByteBuffer(&slice, 1);
    call->reader = stubs[number++ % stubs.size()]->PrepareUnaryCall(&call->context, method,
                                                                    call->request, &queue);
    ++under_way;
    call->reader->StartCall();
    call->reader->Finish(&call->reply, &call->status, call);
  }
  figures.seconds = milliseconds(Clock::now() - start) * 1e-3;
  const auto given_up = Clock::now() + of_seconds(deadline + kDrainSeconds);
  while (under_way > 0 && Clock::now() < given_up) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  queue.Shutdown();
  reader.join();
  return figures;
}

void print(Figures& figures) {
  long calls = 0;
  std::string statuses;
  for (const auto& [code, count] : figures.statuses) {
    calls += count;
    statuses +=
        (statuses.empty() ? "\"" : ", \"") + std::to_string(code) + "\": " + std::to_string(count);
  }
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  const double cpu = static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                     static_cast<double>(used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
  std::printf("{\"seconds\": %.3f, \"offered\": %.1f, \"goodput\": %.1f, \"statuses\": {%s}, ",
              figures.seconds, static_cast<double>(calls) / figures.seconds,
              static_cast<double>(figures.good) / figures.seconds, statuses.c_str());
  std::printf("\"first_ms\": %.3f, \"cpu_seconds\": %.3f, \"late_p99_ms\": %.3f", figures.first,
              cpu, quantile(figures.starts, 0.99));
  for (const auto& [name, values] :
       {std::pair{"answers", &figures.answers}, std::pair{"refusals", &figures.refusals}}) {
    std::printf(", \"%s\": {\"p50_ms\": %.4f, \"p90_ms\": %.4f, \"p99_ms\": %.4f}", name,
                quantile(*values, 0.5), quantile(*values, 0.9), quantile(*values, 0.99));
  }
  std::printf("}\n");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 8) {
    std::fprintf(stderr, "load TARGET METHOD FILE closed|open CALLERS|RATE SECONDS DEADLINE\n");
    return 2;
  }
  std::ifstream file(arguments[3], std::ios::binary);
  const std::string payload{std::istreambuf_iterator<char>(file), {}};
  const grpc::Slice slice(payload.data(), payload.size(), grpc::Slice::STATIC_SLICE);
  const Stubs stubs = connect(arguments[1]);
  const std::string method = arguments[2];
  const double amount = std::atof(arguments[5]);
  const double seconds = std::atof(arguments[6]);
  const double deadline = std::atof(arguments[7]);
  Figures figures =
      std::string(arguments[4]) == "closed"
          ? closed(stubs, method, slice, static_cast<std::size_t>(amount), seconds, deadline)
          : open(stubs, method, slice, amount, seconds, deadline);
  print(figures);
}
