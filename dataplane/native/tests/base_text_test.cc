#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "base/text.h"

using namespace attnserve;
using namespace std::string_literals;

TEST_CASE("numbers are written as Python writes them") {
  CHECK(number_text(2) == "2.0");
  CHECK(number_text(0) == "0.0");
  CHECK(number_text(-0.0) == "-0.0");
  CHECK(number_text(0.1) == "0.1");
  CHECK(number_text(-12.5) == "-12.5");
  CHECK(number_text(1e-4) == "0.0001");
  CHECK(number_text(0.00012345) == "0.00012345");
  CHECK(number_text(1e-5) == "1e-05");
  CHECK(number_text(1.5e-7) == "1.5e-07");
  CHECK(number_text(123456789.0) == "123456789.0");
  CHECK(number_text(1e15) == "1000000000000000.0");
  CHECK(number_text(1e16) == "1e+16");
  CHECK(number_text(1e20) == "1e+20");
  CHECK(number_text(123456789012345680.0) == "1.2345678901234568e+17");
  CHECK(number_text(1.7976931348623157e308) == "1.7976931348623157e+308");
  CHECK(number_text(5e-324) == "5e-324");
  CHECK(number_text(0.1F) == "0.10000000149011612");
}

TEST_CASE("what is no number is named") {
  CHECK(number_text(std::nan("")) == "nan");
  CHECK(number_text(-std::nan("")) == "nan");
  CHECK(number_text(std::numeric_limits<double>::infinity()) == "inf");
  CHECK(number_text(-std::numeric_limits<double>::infinity()) == "-inf");
}

TEST_CASE("lists are written as Python writes them") {
  CHECK(list_text({}) == "[]");
  CHECK(list_text(std::vector<std::int64_t>{7}) == "[7]");
  CHECK(list_text(std::vector<std::int64_t>{1, -2, 3}) == "[1, -2, 3]");
}

TEST_CASE("texts are quoted as Python quotes them") {
  CHECK(quoted("") == "''");
  CHECK(quoted("plain") == "'plain'");
  CHECK(quoted("it's") == "\"it's\"");
  CHECK(quoted("say \"hi\"") == "'say \"hi\"'");
  CHECK(quoted("it's \"both\"") == "'it\\'s \"both\"'");
  CHECK(quoted("a\\b") == "'a\\\\b'");
  CHECK(quoted("a\nb\tc\rd") == "'a\\nb\\tc\\rd'");
  CHECK(quoted("\0\x01\x1f\x7f"s) == "'\\x00\\x01\\x1f\\x7f'");
}

TEST_CASE("characters that print are kept, those that could disguise a message are not") {
  CHECK(quoted("größe 語 😀") == "'größe 語 😀'");
  CHECK(quoted("\u00a0") == "'\\xa0'");
  CHECK(quoted("\u00ad") == "'\\xad'");
  CHECK(quoted("\u202e") == "'\\u202e'");
  CHECK(quoted("\u2028") == "'\\u2028'");
  CHECK(quoted("\ufeff") == "'\\ufeff'");
  CHECK(quoted("\ue000") == "'\\ue000'");
  CHECK(quoted("\U000e0041") == "'\\U000e0041'");
}

TEST_CASE("bytes that are not UTF-8 are escaped one by one") {
  CHECK(quoted("\xff") == "'\\xff'");
  CHECK(quoted("a\xc3") == "'a\\xc3'");
  CHECK(quoted("\xc3(") == "'\\xc3('");
  CHECK(quoted("\xc0\xaf") == "'\\xc0\\xaf'");                    // too long a form of '/'
  CHECK(quoted("\xe0\x80\xaf") == "'\\xe0\\x80\\xaf'");           // likewise
  CHECK(quoted("\xed\xa0\x80") == "'\\xed\\xa0\\x80'");           // a surrogate
  CHECK(quoted("\xf4\x90\x80\x80") == "'\\xf4\\x90\\x80\\x80'");  // beyond Unicode
  CHECK(quoted("\xf0\x9f\x98") == "'\\xf0\\x9f\\x98'");           // cut short
}

TEST_CASE("the beginning of a text ends between characters") {
  CHECK(first_characters("abc", 2) == "ab");
  CHECK(first_characters("abc", 3) == "abc");
  CHECK(first_characters("abc", 9) == "abc");
  CHECK(first_characters("abc", 0).empty());
  CHECK(first_characters("äöü", 2) == "äö");
  CHECK(first_characters("😀😀", 1) == "😀");
  CHECK(first_characters("\xff\xff\xff", 2) == "\xff\xff");
}

TEST_CASE("parts of every kind are put together") {
  const std::vector<std::int64_t> shape{1, 2};
  const std::string owned = "o";
  CHECK(text("Sk=", 3, ' ', owned, std::string_view("v"), ' ', 2.5, ' ', shape, ' ',
             std::size_t{18446744073709551615U}) == "Sk=3 ov 2.5 [1, 2] 18446744073709551615");
}
