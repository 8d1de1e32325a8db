#include <doctest/doctest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <ctime>
#include <functional>
#include <thread>
#include <tuple>

#include "attention_reference.h"
#include "base/half.h"
#include "base/status.h"
#include "onnx_model.h"

using namespace attnserve;
using namespace attnserve::engine;

// Sanitizers end the process where too much memory is asked for, unless told not to.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "allocator_may_return_null=1";
}
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "allocator_may_return_null=1";
}
// Its code is not instrumented: how its threads wait for each other is not seen.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_suppressions() {
  return "race:libonnxruntime.so\nrace:attnserve_kernels/operators\n";
}

namespace {

using Feeds = std::vector<Session::Feed>;

// A causal attention's tensors.
struct Problem {
  explicit Problem(Sizes s, unsigned seed = 1) : sizes(s) {
    std::mt19937 random(seed);
    query = normal(random, s.batch * s.num_heads * s.query_len * s.head_dim);
    key = normal(random, s.batch * s.num_kv_heads * s.key_len * s.head_dim);
    value = normal(random, s.batch * s.num_kv_heads * s.key_len * s.value_head_dim);
    key_lengths.assign(s.batch, s.key_len);
    output.assign(s.batch * s.num_heads * s.query_len * s.value_head_dim, NAN);
  }

  Feeds feeds() {
    const Sizes& s = sizes;
    return {{"query",
             tensor_over(DataType::kFp32, {s.batch, s.num_heads, s.query_len, s.head_dim}, query)},
            {"key",
             tensor_over(DataType::kFp32, {s.batch, s.num_kv_heads, s.key_len, s.head_dim}, key)},
            {"value", tensor_over(DataType::kFp32,
                                  {s.batch, s.num_kv_heads, s.key_len, s.value_head_dim}, value)},
            {"key_lengths", tensor_over(DataType::kInt64, {s.batch}, key_lengths)}};
  }
  Tensor place() {
    const Sizes& s = sizes;
    return tensor_over(DataType::kFp32, {s.batch, s.num_heads, s.query_len, s.value_head_dim},
                       output);
  }
  double error(bool causal = true) const {
    const auto weights = reference_weights(query, key, key_lengths, sizes, kScale, {causal, false});
    return largest_error(output, reference_output(weights, value, sizes));
  }

  static constexpr float kScale = 0.25F;
  Sizes sizes;
  std::vector<float> query, key, value, output;
  std::vector<std::int64_t> key_lengths;
};

void run(Session& session, const Feeds& feeds, const char* name, Tensor into,
         Stop* stop = nullptr) {
  Session::Fetch fetches[1] = {{name, into, {}}};
  session.run(feeds, fetches, stop);
}

Code code_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const RequestError& error) {
    return error.status().code;
  }
  return Code::kOk;
}

// A tensor's elements at an odd address.
struct Unaligned {
  explicit Unaligned(const Tensor& like) : memory(like.byte_size() + 1), tensor(like) {
    std::memcpy(memory.data() + 1, like.data, like.byte_size());
    tensor.data = memory.data() + 1;
  }
  std::vector<std::byte> memory;
  Tensor tensor;
};

constexpr double kFp32Error = 1e-5;

// Diagnostics of so many positions that they take far longer than any test may.
struct LongRun {
  explicit LongRun(std::int64_t length) : problem({1, 8, 8, length, length, 64, 1}) {
    entropy.assign(8 * length, 0);
  }
  void operator()(Session& session, Stop* stop) {
    Feeds feeds = problem.feeds();
    feeds.push_back({"top_k", tensor_over(DataType::kInt64, {1}, top_k)});
    feeds.push_back({"distances", tensor_over(DataType::kInt64, {1}, distances)});
    run(session, feeds, "entropy",
        tensor_over(DataType::kFp32, {1, 8, problem.sizes.query_len}, entropy), stop);
  }
  Problem problem;
  std::vector<float> entropy;
  std::vector<std::int64_t> top_k{256}, distances{64};
};

}  // namespace

TEST_CASE("the library of ONNX Runtime is loaded and says its version") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  CHECK(runtime->version().substr(0, 2) == "1.");
  CHECK_NOTHROW(test_runtime());  // once more in the same process
}

TEST_CASE("a library that is not there, or is another, is named") {
  CHECK_THROWS_WITH_AS(Runtime::load("/nowhere/libonnxruntime.so", ""),
                       doctest::Contains("/nowhere/libonnxruntime.so: does not load: "),
                       std::runtime_error);
  CHECK_THROWS_WITH_AS(Runtime::load("libm.so.6", ""), "libm.so.6: has no function OrtGetApiBase",
                       std::runtime_error);
  const char* library = std::getenv("ATTNSERVE_ONNXRUNTIME");
  if (library == nullptr) return;
  CHECK_THROWS_WITH_AS(Runtime::load(library, "libm.so.6"),
                       "libm.so.6: has no function RegisterCustomOps", std::runtime_error);
}

TEST_CASE("a graph that is none does not load") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  CHECK_THROWS_AS(Session::load(runtime, "/nowhere/model.onnx", {}), std::runtime_error);
  const GraphFile file("not a graph");
  CHECK_THROWS_AS(Session::load(runtime, file.path(), {}), std::runtime_error);
}

TEST_CASE("operators of attnserve-kernels are known only if their library was loaded") {
  if (!test_runtime()) return;
  const auto bare = Runtime::load(std::getenv("ATTNSERVE_ONNXRUNTIME"), "");
  CHECK_THROWS_AS(load_graph(bare, attention_graph(kOnnxFloat, 1, false)), std::runtime_error);
}

TEST_CASE("a session tells its inputs and outputs") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, attention_graph(kOnnxBFloat, 1, false));
  REQUIRE(session->inputs().size() == 4);
  CHECK(session->inputs()[0].name == "query");
  CHECK(session->inputs()[0].dtype == DataType::kBf16);
  CHECK(session->inputs()[0].shape == std::vector<std::int64_t>{-1, -1, -1, -1});
  CHECK(session->inputs()[3].dtype == DataType::kInt64);
  REQUIRE(session->outputs().size() == 2);
  CHECK(session->outputs()[1].name == "log_sum_exp");
  CHECK(session->takes("value"));
  CHECK_FALSE(session->takes("output"));
  CHECK(session->gives("output"));
  CHECK(session->any_heads());

  Graph fixed = attention_graph(kOnnxFloat, 1, false);
  fixed.inputs[1].shape[1] = 8;
  CHECK_FALSE(load_graph(runtime, fixed)->any_heads());
}

TEST_CASE("outputs are written where they are wanted, within tolerance of float64") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, attention_graph(kOnnxFloat, Problem::kScale, true));
  for (const Sizes& sizes : {Sizes{1, 1, 1, 1, 1, 8, 8}, Sizes{1, 8, 8, 32, 32, 64, 64},
                             Sizes{3, 4, 2, 17, 33, 16, 8}, Sizes{1, 2, 1, 300, 300, 8, 5}}) {
    Problem problem(sizes);
    run(*session, problem.feeds(), "output", problem.place());
    CHECK(problem.error() < kFp32Error);
  }
}

TEST_CASE("an output without a place is made, and outlives its session") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  auto session = load_graph(runtime, attention_graph(kOnnxFloat, Problem::kScale, true));
  Problem problem({2, 4, 4, 20, 20, 8, 8});
  Session::Fetch fetches[1] = {{"output", {}, {}}};
  session->run(problem.feeds(), fetches, nullptr);
  session.reset();
  const Tensor& made = fetches[0].made.tensor;
  CHECK(made.dtype == DataType::kFp32);
  CHECK(made.shape == Shape{2, 4, 20, 8});
  std::memcpy(problem.output.data(), made.data, made.byte_size());
  CHECK(problem.error() < kFp32Error);
}

TEST_CASE("tensors may lie at any address") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, attention_graph(kOnnxFloat, Problem::kScale, true));
  Problem problem({1, 2, 2, 9, 9, 8, 8});
  std::vector<Unaligned> moved;
  Feeds feeds = problem.feeds();
  for (Session::Feed& feed : feeds) feed.tensor = moved.emplace_back(feed.tensor).tensor;
  const Unaligned output(problem.place());
  run(*session, feeds, "output", output.tensor);
  std::memcpy(problem.output.data(), output.tensor.data, output.tensor.byte_size());
  CHECK(problem.error() < kFp32Error);
}

TEST_CASE("FP16 and BF16 go in and out as they are") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  for (const auto& [type, dtype, tolerance] : {std::tuple{kOnnxHalf, DataType::kFp16, 2e-3},
                                               std::tuple{kOnnxBFloat, DataType::kBf16, 2e-2}}) {
    const bool half = dtype == DataType::kFp16;
    const auto narrow = [&](std::vector<float>& values) {
      std::vector<std::uint16_t> bits;
      for (float& value : values) {
        bits.push_back(half ? half_of_float(value) : bfloat16_of_float(value));
        value = half ? float_of_half(bits.back()) : float_of_bfloat16(bits.back());
      }
      return bits;
    };
    const auto session = load_graph(runtime, attention_graph(type, Problem::kScale, true));
    Problem problem({2, 2, 2, 30, 30, 16, 16});
    auto query = narrow(problem.query), key = narrow(problem.key), value = narrow(problem.value);
    auto output = query;
    Feeds feeds = problem.feeds();
    std::size_t next = 0;
    for (auto* bits : {&query, &key, &value}) {
      feeds[next].tensor = tensor_over(dtype, feeds[next].tensor.shape, *bits);
      ++next;
    }
    run(*session, feeds, "output", tensor_over(dtype, {2, 2, 30, 16}, output));
    for (std::size_t i = 0; i < output.size(); ++i) {
      problem.output[i] = half ? float_of_half(output[i]) : float_of_bfloat16(output[i]);
    }
    CHECK(problem.error() < tolerance);
  }
}

TEST_CASE("sequences of unlike lengths, some of no key at all, bear nothing of each other") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, attention_graph(kOnnxFloat, Problem::kScale, false));
  Problem problem({4, 2, 2, 40, 40, 8, 8});
  problem.key_lengths = {40, 0, 1, 23};
  run(*session, problem.feeds(), "output", problem.place());
  CHECK(problem.error(false) < kFp32Error);
  const std::int64_t row = 2 * 40 * 8;
  CHECK(std::all_of(problem.output.begin() + row, problem.output.begin() + 2 * row,
                    [](float element) { return element == 0; }));
}

TEST_CASE("what the graph takes must be there, and what is fetched the graph's") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, attention_graph(kOnnxFloat, 1, false));
  Problem problem({1, 1, 1, 2, 2, 8, 8});
  Feeds feeds = problem.feeds();
  CHECK_THROWS_AS(run(*session, feeds, "weights", problem.place()), std::logic_error);
  feeds[2].tensor.data = nullptr;
  CHECK_THROWS_AS(run(*session, feeds, "output", problem.place()), std::logic_error);
  feeds.erase(feeds.begin() + 2);
  CHECK_THROWS_AS(run(*session, feeds, "output", problem.place()), std::logic_error);
}

TEST_CASE("what ONNX Runtime refuses comes with its message, and the session goes on") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, attention_graph(kOnnxFloat, Problem::kScale, true));
  Problem problem({1, 2, 2, 4, 4, 8, 8});
  Feeds feeds = problem.feeds();
  feeds[3].tensor.shape = {1, 1};
  CHECK_THROWS_WITH_AS(run(*session, feeds, "output", problem.place()),
                       doctest::Contains("key_lengths"), std::runtime_error);
  Tensor narrow = problem.place();
  narrow.shape[3] = 4;
  CHECK_THROWS_AS(run(*session, problem.feeds(), "output", narrow), std::runtime_error);
  run(*session, problem.feeds(), "output", problem.place());
  CHECK(problem.error() < kFp32Error);
}

// output = zeros of a shape that is given.
Graph zeros_graph() {
  return {{{"ConstantOfShape", "", {"shape"}, {"zeros"}, {}}},
          {{"shape", kOnnxInt64, {1}}},
          {{"zeros", kOnnxFloat, {-1}}}};
}

TEST_CASE("memory that cannot be had is one request's RESOURCE_EXHAUSTED") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, zeros_graph());
  std::vector<std::int64_t> size{std::int64_t{1} << 50};
  const Feeds feeds = {{"shape", tensor_over(DataType::kInt64, {1}, size)}};
  Session::Fetch fetches[1] = {{"zeros", {}, {}}};
  try {
    session->run(feeds, fetches, nullptr);
    FAIL("it ran");
  } catch (const RequestError& error) {
    CHECK(error.status().code == Code::kResourceExhausted);
    CHECK(error.status().message ==
          "memory: ONNX Runtime could not allocate what the computation needs");
  }
  size[0] = 3;
  CHECK_NOTHROW(session->run(feeds, fetches, nullptr));
}

#if !defined(__SANITIZE_ADDRESS__)
TEST_CASE("memory of a large run goes back to the system") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto resident = [] {
    std::size_t pages = 0, all = 0;
    std::ifstream("/proc/self/statm") >> all >> pages;
    return pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  };
  const auto session = load_graph(runtime, zeros_graph());
  std::vector<std::int64_t> size{64 << 20};
  const Feeds feeds = {{"shape", tensor_over(DataType::kInt64, {1}, size)}};
  const std::size_t before = resident();
  {
    Session::Fetch fetches[1] = {{"zeros", {}, {}}};
    session->run(feeds, fetches, nullptr);
    CHECK(resident() > before + (std::size_t{200} << 20));
  }
  CHECK(resident() < before + (std::size_t{32} << 20));
}
#endif

TEST_CASE("a run that was stopped before it began does not begin") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, attention_graph(kOnnxFloat, 1, false));
  Problem problem({1, 1, 1, 2, 2, 8, 8});
  const auto stop = session->make_stop();
  CHECK_FALSE(stop->requested());
  stop->request();
  stop->request();
  CHECK(stop->requested());
  CHECK(code_of([&] { run(*session, problem.feeds(), "output", problem.place(), stop.get()); }) ==
        Code::kCancelled);
  CHECK(std::isnan(problem.output[0]));
  CHECK_NOTHROW(run(*session, problem.feeds(), "output", problem.place()));
}

TEST_CASE("a stop that nobody requests changes nothing") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, attention_graph(kOnnxFloat, Problem::kScale, true));
  Problem problem({1, 2, 2, 70, 70, 8, 8});
  const auto stop = session->make_stop();
  run(*session, problem.feeds(), "output", problem.place(), stop.get());
  CHECK(problem.error() < kFp32Error);
}

TEST_CASE("a long computation ends within 100 ms of its stop, and no other does") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, diagnostics_graph(0.125F, false));
  LongRun long_run(16384), other(300);
  const auto stop = session->make_stop();
  Code code = Code::kOk;
  std::thread stopped([&] { code = code_of([&] { long_run(*session, stop.get()); }); });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  stop->request();
  const std::clock_t requested = std::clock();
  stopped.join();
  // Processor time, of all threads: the machine may be busy with something else.
  CHECK(static_cast<double>(std::clock() - requested) / CLOCKS_PER_SEC <= 0.1);
  CHECK(code == Code::kCancelled);
  CHECK_NOTHROW(other(*session, nullptr));
}

TEST_CASE("a stop is that of its own run, whatever runs beside it") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, diagnostics_graph(0.125F, false));
  LongRun long_run(16384);
  const auto stop = session->make_stop();
  Code code = Code::kOk;
  std::thread stopped([&] { code = code_of([&] { long_run(*session, stop.get()); }); });
  std::atomic<bool> requested{false};
  std::thread beside([&] {
    LongRun other(300);
    const auto another_stop = session->make_stop();
    do {
      CHECK_NOTHROW(other(*session, another_stop.get()));
    } while (!requested);
    CHECK_NOTHROW(other(*session, nullptr));
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  stop->request();
  requested = true;
  stopped.join();
  beside.join();
  CHECK(code == Code::kCancelled);
}

TEST_CASE("many threads run one session") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto session = load_graph(runtime, attention_graph(kOnnxFloat, Problem::kScale, true));
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (unsigned i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      Problem problem({1, 4, 4, 1 + 20 * i, 1 + 20 * i, 16, 16}, i);
      for (int turn = 0; turn < 20; ++turn) {
        problem.output.assign(problem.output.size(), NAN);
        run(*session, problem.feeds(), "output", problem.place());
      }
      right += problem.error() < kFp32Error ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right == 8);
}

TEST_CASE("CUDA that is not there is an error at load") {
  const auto runtime = test_runtime();
  if (!runtime || std::filesystem::exists("/dev/nvidiactl")) return;
  SessionOptions options;
  options.cuda = true;
  const GraphFile file(serialized(attention_graph(kOnnxFloat, 1, false)));
  CHECK_THROWS_AS(Session::load(runtime, file.path(), options), std::runtime_error);
  CHECK_THROWS_AS(pinned_memory(runtime), std::runtime_error);
}
