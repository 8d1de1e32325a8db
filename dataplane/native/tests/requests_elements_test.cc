#include <doctest/doctest.h>

#include <vector>

#include "base/half.h"
#include "base/text.h"
#include "requests/elements.h"
#include "requests/wide.h"
#include "requests_support.h"

namespace attnserve::requests {
namespace {

template <class Element>
Tensor tensor_of(std::vector<Element>& elements, DataType dtype, const Shape& shape) {
  return {dtype, shape, reinterpret_cast<std::byte*>(elements.data())};
}

TEST_CASE("a bias may hold -infinity and the largest numbers, wherever they lie") {
  std::vector<float> fp32(3000, -kInf);
  fp32[2999] = std::numeric_limits<float>::max();
  check_added("bias", tensor_of(fp32, DataType::kFp32, {1, 1, 1, 3000}));
  std::vector<std::uint16_t> fp16(3000, 0xFC00);
  fp16[0] = 0x7BFF;
  check_added("bias", tensor_of(fp16, DataType::kFp16, {1, 1, 3, 1000}));
  std::vector<std::uint16_t> bf16(3000, 0xFF80);
  bf16[0] = 0x7F7F;
  check_added("bias", tensor_of(bf16, DataType::kBf16, {1, 1, 3, 1000}));
}

TEST_CASE(
    "the first NaN of a bias is named, and else the first infinity, in blocks and behind them") {
  for (const std::size_t place : {0UL, 255UL, 256UL, 1023UL, 1024UL, 1029UL}) {
    CAPTURE(place);
    std::vector<float> fp32(1030);
    fp32[place] = kInf;
    const Tensor bias = tensor_of(fp32, DataType::kFp32, {1, 103, 5, 2});
    const auto message = [&] { return status_thrown([&] { check_added("bias", bias); }).message; };
    const auto named = [&](std::size_t at, const char* value) {
      const std::vector<std::int64_t> index{0, static_cast<std::int64_t>(at / 10),
                                            static_cast<std::int64_t>(at / 2 % 5),
                                            static_cast<std::int64_t>(at % 2)};
      return "bias" + list_text(index) + ": given " + value +
             "; allowed: finite numbers and -infinity";
    };
    CHECK(message() == named(place, "inf"));
    fp32[1029] = kNan;
    CHECK(message() == named(1029, "nan"));
    fp32[1] = -kNan;
    CHECK(message() == named(1, "nan"));
  }
}

TEST_CASE("starts rise or stay, from 0 to the end; the first that does not is named") {
  const auto message = [](std::vector<std::int64_t> starts, std::int64_t end) {
    const Shape shape{static_cast<std::int64_t>(starts.size())};
    const Tensor tensor = tensor_of(starts, DataType::kInt64, shape);
    return status_thrown([&] { check_starts("starts", tensor, end); }).message;
  };
  CHECK(message({0, 9}, 9).empty());
  CHECK(message({0, 0, 4, 4, 9, 9}, 9).empty());
  CHECK(message({1, 9}, 9) == "starts[0]: given 1; allowed: 0, the first token");
  CHECK(message({0, 4, 3, 9}, 9) == "starts[2]: given 3; allowed: 4..9");
  CHECK(message({0, 10, 9}, 9) == "starts[1]: given 10; allowed: 0..9");
  CHECK(message({0, -1, 9}, 9) == "starts[1]: given -1; allowed: 0..9");
  CHECK(message({0, 8}, 9) == "starts[1]: given 8; allowed: 9, all tokens");
}

TEST_CASE("a mask is of zeros and ones, and becomes a bias of every dtype") {
  for (const std::size_t place : {0UL, 255UL, 256UL, 1029UL}) {
    std::vector<std::uint8_t> bytes(1030, 1);
    const Tensor mask = tensor_of(bytes, DataType::kBool, {1, 103, 5, 2});
    check_mask("bias", mask);
    bytes[place] = 0;
    check_mask("bias", mask);
    std::vector<float> fp32(1030, kNan);
    bias_of_mask(mask, DataType::kFp32, reinterpret_cast<std::byte*>(fp32.data()));
    std::vector<std::uint16_t> fp16(1030, 1), bf16(1030, 1);
    bias_of_mask(mask, DataType::kFp16, reinterpret_cast<std::byte*>(fp16.data()));
    bias_of_mask(mask, DataType::kBf16, reinterpret_cast<std::byte*>(bf16.data()));
    for (std::size_t i = 0; i < fp32.size(); ++i) {
      CHECK(fp32[i] == (i == place ? -kInf : 0.0F));
      CHECK(fp16[i] == (i == place ? 0xFC00 : 0));
      CHECK(bf16[i] == (i == place ? 0xFF80 : 0));
    }
    bytes[place] = 2;
    CHECK(status_thrown([&] { check_mask("bias", mask); }).message.find("a byte of 2") !=
          std::string::npos);
  }
}

TEST_CASE("elements are multiplied as floats and rounded back, unaligned ones too") {
  const std::vector<float> given{1, -2.5F, 0, 3e38F, -kInf};
  std::vector<std::byte> bytes(given.size() * sizeof(float) + 1);
  std::memcpy(bytes.data() + 1, given.data(), bytes.size() - 1);
  std::vector<float> scaled(given.size());
  scale_elements(DataType::kFp32, ByteSpan(bytes).subspan(1), 1.7F,
                 std::as_writable_bytes(std::span(scaled)));
  for (std::size_t i = 0; i < given.size(); ++i) CHECK(scaled[i] == given[i] * 1.7F);

  const std::vector<std::uint16_t> halves{0x3C00, 0x3C01, 0x7BFF, 0x0001};
  std::vector<std::uint16_t> out(halves.size());
  scale_elements(DataType::kFp16, std::as_bytes(std::span(halves)), 1.3F,
                 std::as_writable_bytes(std::span(out)));
  for (std::size_t i = 0; i < halves.size(); ++i) {
    CHECK(out[i] == half_of_float(float_of_half(halves[i]) * 1.3F));
  }
  CHECK(out[2] == 0x7C00);  // infinite scores: the caller's wish
  scale_elements(DataType::kBf16, std::as_bytes(std::span(halves)), 0.3F,
                 std::as_writable_bytes(std::span(out)));
  CHECK(out[0] == bfloat16_of_float(float_of_bfloat16(0x3C00) * 0.3F));
}

TEST_CASE("sizes beyond 64 bits are written exactly, and saturate beyond 128") {
  CHECK(wide_text(0) == "0");
  CHECK(wide_text(Wide{1} << 64) == "18446744073709551616");
  CHECK(wide_text(kWidest) == "340282366920938463463374607431768211455");
  CHECK(times(Wide{1} << 100, 1 << 27) == Wide{1} << 127);
  CHECK(times(Wide{1} << 100, 1 << 28) == kWidest);
  CHECK(plus(kWidest - 1, 1) == kWidest);
  CHECK(plus(kWidest, kWidest) == kWidest);
  const std::vector<std::int64_t> tens(5, 1'000'000'000'000'000'000);
  CHECK(product_text(tens) == "1" + std::string(90, '0'));
  CHECK(product_text(std::vector<std::int64_t>{}) == "1");
  CHECK(product_text(std::vector<std::int64_t>{1'000'000'007, 3}) == "3000000021");
}

}  // namespace
}  // namespace attnserve::requests
