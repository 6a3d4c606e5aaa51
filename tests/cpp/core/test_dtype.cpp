// bf16 conversion: rounding, special values; dtype names.
#include "core/dtype.h"
#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

TEST(Bfloat16, RoundTripsEveryValue) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    bfloat16 value{static_cast<uint16_t>(bits)};
    if (std::isnan(to_float(value))) {
      EXPECT_TRUE(std::isnan(to_float(to_bfloat16(to_float(value)))));
    } else {
      EXPECT_EQ(to_bfloat16(to_float(value)).bits, bits);
    }
  }
}

TEST(Bfloat16, RoundsToNearestEven) {
  EXPECT_EQ(to_bfloat16(float_of(0x3f808000)).bits, 0x3f80);  // a tie, down to even
  EXPECT_EQ(to_bfloat16(float_of(0x3f818000)).bits, 0x3f82);  // a tie, up to even
  EXPECT_EQ(to_bfloat16(float_of(0x3f808001)).bits, 0x3f81);
  EXPECT_EQ(to_bfloat16(float_of(0x7f7fffff)).bits, 0x7f80);  // overflows to infinity
  EXPECT_TRUE(std::isnan(to_float(to_bfloat16(float_of(0x7f800001)))));
  EXPECT_TRUE(std::isnan(to_float(to_bfloat16(float_of(0xffffffff)))));
}

TEST(Bfloat16, VectorRoutinesRoundAlike) {
  Rng rng(17);
  std::vector<float> values;
  for (int i = 0; i < 4099; ++i) values.push_back(float_of(rng()));
  for (int isa = 0; isa <= static_cast<int>(cpu::best_isa()); ++isa) {
    cpu::set_active_isa(static_cast<cpu::Isa>(isa));
    const auto& simd = cpu::simd_kernels<bfloat16>();
    int count = static_cast<int>(values.size());
    std::vector<bfloat16> narrow(values.size());
    std::vector<float> wide(values.size());
    simd.narrow(values.data(), narrow.data(), count);
    simd.widen(narrow.data(), wide.data(), count);
    for (int i = 0; i < count; ++i) {
      EXPECT_EQ(narrow[i].bits, to_bfloat16(values[i]).bits) << values[i];
      if (!std::isnan(wide[i])) {
        EXPECT_EQ(wide[i], to_float(narrow[i]));
      }
    }
  }
  cpu::set_active_isa(cpu::best_isa());
}

TEST(DType, ParsesNames) {
  EXPECT_EQ(parse_dtype("float32"), DType::float32);
  EXPECT_EQ(parse_dtype("bfloat16"), DType::bfloat16);
  EXPECT_STREQ(dtype_name(DType::bfloat16), "bfloat16");
  EXPECT_EQ(dtype_size(DType::float32) + dtype_size(DType::bfloat16), 6u);
  expect_invalid([] { parse_dtype("float16"); },
                 "[dtype] must be float32 or bfloat16, got float16");
}

}  // namespace
}  // namespace optimus
